"""Speech as OpenAI's clients ask for it: `POST /v1/audio/speech`, streamed while it is spoken.

One thread speaks, one text after the other. What waits, what is being sent and what a request may ask for all have limits,
so that neither many clients nor slow ones make memory grow; a client that goes away ends its speech.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..audio_utils_mel_llm import load_audio
from ..synthesis_mel_llm import iter_speech
from .audio_encoding import FORMATS, AudioEncoder, check_format
from .http_server import error_body, make_server


logger = logging.getLogger(__name__)

DEFAULT_VOICE = "default"  # the model's own
_MAX_BODY_BYTES = 1 << 20
_BODY_SECONDS = 30.0
_SEND_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Args:
        max_queue: Requests that may wait behind the one that is spoken; also counts what is spoken but not yet fetched.
        max_chars: Longest text, in characters (OpenAI's limit).
        max_seconds: Longest speech of one request.
        stall_seconds: A client that takes nothing for so long is dropped.
    """

    max_queue: int = 8
    max_chars: int = 4096
    max_seconds: float = 600.0
    stall_seconds: float = 60.0


class VoiceName(BaseModel):
    """The other form in which OpenAI's clients name a voice."""

    id: str


class SpeechRequest(BaseModel):
    """The body of a request: OpenAI's fields, and three of ours."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str = Field(description="The text to speak.")
    voice: str | VoiceName | None = Field(None, description="Name of a voice; see /v1/audio/voices.")
    response_format: str = Field("mp3", description=f"{', '.join(FORMATS)}. pcm: 24 kHz, 16 bit, mono, little-endian.")
    speed: float = Field(1.0, description="Only 1.0: the tempo is the voice's.")
    instructions: str | None = Field(None, description="Not followed: must be empty.")
    stream_format: str = Field("audio", description='Only "audio".')
    stream: bool = Field(True, description="Ours: send audio while it is spoken. Otherwise the whole file at once.")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(None, description="Ours: makes it repeatable.")
    temperature: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] | None = Field(
        None, description="Ours: 1 is faithful, 0 takes the mean."
    )


@dataclass(frozen=True)
class Voice:
    """A recording to speak in the voice of, and what is said in it, word for word."""

    audio: object
    text: str

    @classmethod
    def parse(cls, value: str, sampling_rate: int) -> tuple[str, "Voice"]:
        """Name and voice from `NAME=FILE:TRANSCRIPT`, or `NAME=FILE` with the transcript beside it in a `.txt`.

        Raises:
            ValueError: It is not of this form, or a file is missing or is no audio.
        """
        name, equals, rest = value.partition("=")
        if not equals or not name.strip() or not rest:
            raise ValueError(f"--voice must be NAME=FILE:TRANSCRIPT, got {value!r}.")
        # The first colon behind a file that exists, since a path may have some too
        places = [index for index, letter in enumerate(rest) if letter == ":"]
        place = next((index for index in places if os.path.isfile(rest[:index])), None)
        path, text = (rest, None) if place is None else (rest[:place], rest[place + 1 :])
        if not os.path.isfile(path):
            raise ValueError(f"--voice {name}: there is no file {path!r}.")
        if text is None:
            beside = os.path.splitext(path)[0] + ".txt"
            if not os.path.isfile(beside):
                raise ValueError(f"--voice {name}: what is said in it? Give {name}={path}:TRANSCRIPT, or {beside}.")
            with open(beside, encoding="utf-8") as file:
                text = file.read()
        if not text.strip():
            raise ValueError(f"--voice {name}: the transcript is empty.")
        try:
            return name.strip(), cls(load_audio(path, sampling_rate=sampling_rate), text.strip())
        except (OSError, ValueError) as error:
            raise ValueError(f"--voice {name}: {error}") from error


class SpeechError(Exception):
    """Something to tell a client, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> JSONResponse:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        headers = {"Retry-After": "2"} if self.status in (429, 503) else None
        content = error_body(str(self), kind, self.param, self.code)
        return JSONResponse(content, status_code=self.status, headers=headers)


def _shutting_down() -> SpeechError:
    return SpeechError(503, "The server is shutting down.", code="shutting_down")


class _Cancelled(Exception):
    """Nobody waits for this speech any more."""


class _Job:
    """One request on its way from the event loop to the speaking thread and, as bytes, back."""

    def __init__(self, request: SpeechRequest, voice: Voice | None):
        self.request, self.voice = request, voice
        self.cancelled = threading.Event()
        self.items: asyncio.Queue = asyncio.Queue()  # bytes, then None or a SpeechError
        self._loop = asyncio.get_running_loop()

    def send(self, item: bytes | SpeechError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)


class _JobStreamer:
    """Takes samples from `generate`, and is where speech that nobody wants any more ends."""

    def __init__(self, job: _Job, encoder: AudioEncoder, max_samples: int, max_seconds: float):
        self.job, self.encoder, self.left, self.max_seconds = job, encoder, max_samples, max_seconds

    def put(self, samples: torch.Tensor) -> None:
        if self.job.cancelled.is_set():
            raise _Cancelled
        self.left -= len(samples)
        if self.left < 0:
            raise SpeechError(
                400,
                f"The speech is longer than {self.max_seconds:g} seconds; send a shorter text.",
                "input",
                "too_long",
            )
        if data := self.encoder.push(samples.numpy()):
            self.job.send(data)

    def end(self) -> None:
        pass  # a text's sentences may each come to an end here


class SpeechWorker:
    """The thread that speaks, and the line in front of it. `take`, `release` and `drain` are called on the event loop."""

    def __init__(self, model, processor, limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._active: _Job | None = None
        self._open = True
        self.closing = asyncio.Event()
        self._num_held = 0
        self._thread = threading.Thread(target=self._run, name="mel-llm-speech", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        return self._open and self._thread.is_alive()

    def take(self, job: _Job) -> None:
        """Puts a job into the line. Each that is taken must be given to `release`, once.

        Raises:
            SpeechError: The line is full, or the server is ending.
        """
        if not self.is_open:
            raise _shutting_down()
        if self._num_held > self.limits.max_queue:
            raise SpeechError(
                429,
                f"{self._num_held} requests are being served and no more are queued; try again.",
                code="queue_full",
            )
        self._num_held += 1
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def release(self, job: _Job) -> None:
        self._num_held -= 1
        job.cancelled.set()
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def drain(self) -> None:
        """Takes no more, and tells those that wait or are still sending; what is being spoken goes on."""
        with self._changed:
            self._open = False
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        self.closing.set()
        for job in waiting:
            job.send(_shutting_down())

    def close(self, seconds: float = 10.0) -> None:
        """Ends the thread, and with it what is being spoken."""
        self.drain()
        if (active := self._active) is not None:
            active.cancelled.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._waiting:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._active = self._waiting.popleft()
            job.send(self._speak(job))
            self._active = job = None  # its audio must not stay until the next one comes

    def _speak(self, job: _Job) -> SpeechError | None:
        request, rate = job.request, self.model.config.sampling_rate
        try:
            encoder = AudioEncoder(request.response_format, rate, request.stream)
            streamer = _JobStreamer(job, encoder, int(self.limits.max_seconds * rate), self.limits.max_seconds)
            voice = {} if job.voice is None else {"voice": job.voice.audio, "voice_text": job.voice.text}
            options = {"seed": request.seed, "temperature": request.temperature, "streamer": streamer}
            for _ in iter_speech(self.model, self.processor, request.input, **voice, **options):
                if job.cancelled.is_set():
                    raise _Cancelled
            job.send(encoder.finish())
        except _Cancelled:
            if not self._open:  # the client may still be there, and must not take this for the end
                return _shutting_down()
            logger.info("A client went away; its speech was ended.")
        except SpeechError as error:
            return error
        except ValueError as error:
            return SpeechError(400, str(error), "input")
        except Exception:
            logger.exception("Speaking failed.")
            return SpeechError(500, "Speaking failed; the server's log says why.")
        return None


class _SpeechResponse(Response):
    """The ASGI answer to one request: audio as it comes, or an error. Starlette's own streaming response notices that a
    client has gone only when there is something to send."""

    def __init__(self, worker: SpeechWorker, job: _Job, media_type: str):
        super().__init__(media_type=media_type)
        self.worker, self.job = worker, job

    async def __call__(self, scope, receive, send) -> None:
        try:
            self.worker.take(self.job)
        except SpeechError as error:
            return await error.response()(scope, receive, send)
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            item = await self._next(gone)
            if isinstance(item, SpeechError):
                return await item.response()(scope, receive, send)
            await self._send(send, item, gone)
        except (_Cancelled, OSError):
            pass
        except asyncio.CancelledError:
            if self.worker.is_open:
                raise
            logger.warning("Speech was broken off: the server is shutting down.")
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            logger.warning("A client took nothing for %g s and was dropped.", self.worker.limits.stall_seconds)
        finally:
            gone.cancel()
            self.worker.release(self.job)

    async def _send(self, send, item: bytes | None, gone: asyncio.Future) -> None:
        headers = [(b"content-type", self.media_type.encode())]
        if not self.job.request.stream:
            headers.append((b"content-length", str(len(item or b"")).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while item is not None:
            # A piece at a time: what the server has taken over stays with it as long as a stalled connection does
            for start in range(0, len(item), _SEND_BYTES):
                piece = item[start : start + _SEND_BYTES]
                message = {"type": "http.response.body", "body": piece, "more_body": True}
                await asyncio.wait_for(send(message), self.worker.limits.stall_seconds)
            item = await self._next(gone)
            if isinstance(item, SpeechError):
                # The status has been sent. Without the end of the body, the client sees that something is missing
                logger.error("Speech was broken off: %s", item)
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, gone: asyncio.Future) -> bytes | SpeechError | None:
        item = asyncio.ensure_future(self.job.items.get())
        try:
            await asyncio.wait((item, gone), return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                raise _Cancelled
            return item.result()
        finally:
            item.cancel()


async def _until_gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def create_app(
    model,
    processor,
    model_name: str,
    voices: dict[str, Voice] | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
    allowed_hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application: `/v1/audio/speech`, `/v1/audio/voices`, `/v1/models`, `/health`.

    Args:
        model ([`MelLLMForTextToSpeech`]), processor ([`MelLLMProcessor`]): A checkpoint that speaks.
        model_name (`str`): What requests call it.
        voices (`dict[str, Voice]`, *optional*): Beside the one called "default", which is the model's own.
        limits ([`Limits`], *optional*): What it takes on.
        api_key (`str`, *optional*): What requests must bear.
        allowed_hosts (`Collection[str]`, *optional*): Names that requests may call the server by (their `Host`); any by
            default. A server on the loopback needs them: a page in a browser there may come from a host whose name was
            made to mean 127.0.0.1 (DNS rebinding).

    Raises:
        ValueError: The model makes no waveform, a voice cannot be used with it, or the key is empty.
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("`api_key` is empty: give a key, or None for a server that asks for none.")
    limits = limits or Limits()
    if getattr(model, "vocoder", None) is None:
        raise ValueError("This model has no vocoder (`config.vocoder_config` is None), so it makes no waveform.")
    known: dict[str, Voice | None] = {DEFAULT_VOICE: None, **(voices or {})}
    for name, voice in (voices or {}).items():
        try:
            processor.apply_speech_request("Yes.", voice=voice.audio, voice_text=voice.text)
            iter_speech(
                model, processor, "Yes.", voice=voice.audio, voice_text=voice.text
            )  # speaks when it is iterated
        except ValueError as error:
            raise ValueError(f"voice {name!r}: {error}") from error
    worker = SpeechWorker(model, processor, limits)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(worker.close)

    # Not starlette's TrustedHostMiddleware: it answers in plain text, and takes [::1] for "["
    async def check_host(request: Request) -> None:
        if allowed_hosts is not None and (name := _host_name(request)) not in allowed_hosts:
            message = f"This server does not answer to the host {name!r}, but to {', '.join(allowed_hosts)}."
            raise SpeechError(400, message, code="wrong_host")

    async def check_key(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise SpeechError(401, "The API key is missing or wrong.", code="invalid_api_key")

    app = FastAPI(title="Mel-LLM speech", lifespan=lifespan, dependencies=[Depends(check_host)])
    app.state.worker = worker
    guarded = [Depends(check_key)]

    @app.exception_handler(SpeechError)
    async def tell(request: Request, error: SpeechError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def tell_http(request: Request, error: HTTPException) -> JSONResponse:
        return SpeechError(error.status_code, str(error.detail)).response()

    def check(request: SpeechRequest) -> Voice | None:
        if request.model != model_name:
            message = f"There is no model {request.model!r} here; this is {model_name!r}."
            raise SpeechError(404, message, "model", "model_not_found")
        name = request.voice.id if isinstance(request.voice, VoiceName) else request.voice
        name = next(iter(voices or known)) if name is None else name
        problems = {
            "voice": None if name in known else f"There is no voice {name!r}; there are {', '.join(known)}.",
            "input": _text_problem(request.input, limits.max_chars),
            "response_format": _problem(check_format, request.response_format),
            "speed": None if request.speed == 1 else "Only speed 1.0: the tempo is that of the voice.",
            "instructions": "This model follows no instructions." if request.instructions else None,
            "stream_format": None if request.stream_format == "audio" else 'Only stream_format "audio".',
        }
        for param, message in problems.items():
            if message is not None:
                raise SpeechError(400, message, param)
        return known[name]

    schema = {"content": {"application/json": {"schema": SpeechRequest.model_json_schema()}}, "required": True}

    @app.post("/v1/audio/speech", dependencies=guarded, openapi_extra={"requestBody": schema})
    async def speech(request: Request):
        # Any page may let a browser send text/plain; for JSON the browser asks the server first
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise SpeechError(415, "The request must have the header Content-Type: application/json.")
        try:
            asked = SpeechRequest.model_validate_json(await _read_body(request, worker.closing))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"][:1]))
            raise SpeechError(400, f"{place or 'body'}: {first['msg']}", place or None) from None
        voice = check(asked)
        media_type = FORMATS[asked.response_format]
        return _SpeechResponse(worker, _Job(asked, voice), media_type)

    @app.get("/v1/audio/voices", dependencies=guarded)
    async def list_voices():
        return {"voices": list(known)}

    card = {"id": model_name, "object": "model", "created": created, "owned_by": "mel_llm"}

    @app.get("/v1/models", dependencies=guarded)
    async def list_models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def get_model(name: str):
        if name != model_name:
            raise SpeechError(404, f"There is no model {name!r} here.", "model", "model_not_found")
        return card

    @app.get("/health")
    async def health():
        status = {"status": "ok" if worker.is_open else "closing", "waiting": worker.num_waiting}
        return JSONResponse(status, status_code=200 if worker.is_open else 503)

    return app


def _host_name(request: Request) -> str | None:
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname
    except ValueError:  # brackets that are not closed
        return None


def _text_problem(text: str, max_chars: int) -> str | None:
    if len(text) > max_chars:
        return f"The text has {len(text)} characters, more than the {max_chars} that are spoken at once."
    return None if any(map(str.isalnum, text)) else "There is no word to be spoken."


def _problem(check, value) -> str | None:
    try:
        check(value)
    except ValueError as error:
        return str(error)
    return None


async def _read_body(request: Request, closing: asyncio.Event) -> bytes:
    async def read() -> bytes:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                raise SpeechError(413, f"The request has more than {_MAX_BODY_BYTES} bytes.")
        return body

    reading, ended = asyncio.ensure_future(read()), asyncio.ensure_future(closing.wait())
    try:
        await asyncio.wait((reading, ended), timeout=_BODY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            return reading.result()
    except ClientDisconnect:
        raise SpeechError(400, "The client went away.") from None  # nobody hears it
    finally:
        reading.cancel()
        ended.cancel()
    if closing.is_set():
        raise _shutting_down()
    raise SpeechError(408, f"The request did not come within {_BODY_SECONDS:g} seconds.")


def run(app: FastAPI, sockets: list, log_level: str = "info", shutdown_seconds: int = 10) -> None:
    """Serves on `sockets`, which are bound, until SIGTERM or Ctrl-C. What is being spoken then has `shutdown_seconds`."""
    try:
        make_server(app, log_level, shutdown_seconds).run(sockets=sockets)
    except KeyboardInterrupt:  # which uvicorn raises again when all is done
        pass
    finally:
        app.state.worker.close()


__all__ = ["DEFAULT_VOICE", "Limits", "SpeechRequest", "SpeechWorker", "Voice", "create_app", "run"]
