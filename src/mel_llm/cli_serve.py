"""`mel-llm serve-speech`: a server that speaks."""

import ipaddress
import os
import socket
from typing import Annotated

import typer

from .cli_common import fail, interruptible, load, report


def serve_speech(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a Mel-LLM that speaks.")],
    voice: Annotated[
        list[str] | None,
        typer.Option(
            help="A voice to offer: NAME=FILE:TRANSCRIPT, or NAME=FILE with the transcript in a .txt beside it. Give it "
            'again for more. "default" is the model\'s own.'
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model; MODEL by default.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MEL_LLM_API_KEY", help="Refuse requests that do not bear it.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that requests may call the server by (their Host). Give it again for more. By default those of "
            "this machine while it listens only to this machine, and any otherwise."
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 429.")] = 8,
    max_chars: Annotated[int, typer.Option(min=1, help="Longest text of a request.")] = 4096,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest speech of a request.")] = 600.0,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, help="How long what is being spoken may go on after SIGTERM or Ctrl-C.")
    ] = 10,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info, debug or trace.")] = "info",
) -> None:
    """Serve speech in the way of OpenAI's API: POST /v1/audio/speech.

    It ends with SIGTERM or Ctrl-C. The exit status is 2 if it could not start.
    """
    with interruptible():
        if log_level not in ("critical", "error", "warning", "info", "debug", "trace"):
            fail(f"--log-level must be critical, error, warning, info, debug or trace, got {log_level!r}.")
        # An empty variable is what a typing error in its name leaves; typer takes it for none
        if api_key is None and "MEL_LLM_API_KEY" in os.environ:
            api_key = os.environ["MEL_LLM_API_KEY"]
        if api_key is not None and not api_key.strip():
            fail("the API key is empty: give --api-key (or MEL_LLM_API_KEY) a key, or leave it out.")
        try:
            from .serving import speech  # late: `mel-llm --help` need not wait for torch
        except ImportError as error:
            fail(
                f"serve-speech needs {error.name}: pip install fastapi uvicorn pydantic, or this package's extra `serve`."
            )
        listener = _listen(host, port)  # before the model is loaded, which may take long
        limits = speech.Limits(max_queue=max_queue, max_chars=max_chars, max_seconds=max_seconds)
        voices: dict[str, speech.Voice] = {}

        def check(processor) -> None:
            if not hasattr(processor, "apply_speech_request"):
                raise ValueError(f"{model} is no Mel-LLM: its processor is a {type(processor).__name__}.")
            for entry in voice or []:
                name, parsed = speech.Voice.parse(entry, processor.feature_extractor.sampling_rate)
                if name in voices:
                    raise ValueError(f"--voice {name} is given twice.")
                processor.apply_speech_request("a", voice=parsed.audio, voice_text=parsed.text)
                voices[name] = parsed

        speaker, processor = load("AutoModelForTextToWaveform", model, device, dtype, check)
        try:
            app = speech.create_app(
                speaker,
                processor,
                served_model_name or model,
                voices,
                limits,
                api_key,
                _host_names(host, allowed_host),
            )
        except ValueError as error:
            fail(error)
    address = f"[{host}]" if ":" in host else host
    if api_key is None and not _is_loopback(host):
        report(f"Whoever reaches {host} can use this server: there is no --api-key.")
    names = ", ".join(dict.fromkeys([speech.DEFAULT_VOICE, *voices]))
    report(f"Speaking at http://{address}:{listener.getsockname()[1]}/v1 (voices: {names})")
    speech.run(app, [listener], log_level, shutdown_seconds)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_names(host: str, allowed: list[str] | None) -> list[str] | None:
    if not allowed and not _is_loopback(host):
        return None
    return list(dict.fromkeys(name.lower() for name in ["localhost", "127.0.0.1", "::1", host, *(allowed or [])]))


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, but refuses connections until it is served."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror or error}.")
    return listener


__all__ = ["serve_speech"]
