"""The HTTP side of the speech server: uvicorn, with limits for clients that say nothing, too much, or nonsense.

uvicorn's own limit counts connections, so that some hundred silent ones would shut out everybody else. Here a silent
connection has ten seconds, and makes room when others need it.
"""

import asyncio
import json

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


_MAX_HEADER_BYTES = 1 << 16


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """An error as OpenAI's clients know it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _refuse(scope, receive, send) -> None:
    body = json.dumps(error_body("The server has too many connections; try again.", "server_error", code="busy"))
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"2"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


class Protocol(H11Protocol):
    """One connection. `request_seconds` is the time for the head of a request, and for what is left of a body that was
    answered before its end; `max_connections` is how many there are before silent ones make room."""

    request_seconds = 10.0
    max_connections = 512

    _timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self.max_connections:
            silent = [other for other in self.connections if other is not self and other._timer is not None]
            if silent:
                min(silent, key=lambda other: other._timer.when())._drop()
            else:  # all of them are being answered
                self.app = _refuse

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_waiting:
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_waiting and not self.transport.is_closing():
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's is plain text."""
        body = json.dumps(error_body(msg, "invalid_request_error")).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.request_seconds, self._drop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        self._stop_timer()
        self.connections.discard(self)  # at once, for those who count them; uvicorn's own discard comes later
        self.transport.close()


class Server(uvicorn.Server):
    """Serves an application whose `state.worker` has a `drain`."""

    async def shutdown(self, sockets=None) -> None:
        self.config.app.state.worker.drain()  # those that wait are told at once
        await super().shutdown(sockets)


def make_server(app, log_level: str | None = "info", shutdown_seconds: int = 10, **options) -> Server:
    """A server to `run`. `options` are those of `uvicorn.Config`."""
    # h11 by name: httptools, which uvicorn prefers where it is installed, has no limit for headers
    return Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            log_level=log_level,
            timeout_graceful_shutdown=shutdown_seconds,
            lifespan="on",
            **options,
        )
    )


__all__ = ["Protocol", "Server", "error_body", "make_server"]
