"""`mel-llm serve-speech`: a server that speaks."""

import socket
import sys
from typing import Annotated

import typer


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
    # Imported late: `mel-llm --help` need not wait for torch
    from .cli import _fail

    if log_level not in ("critical", "error", "warning", "info", "debug", "trace"):
        _fail(f"--log-level must be critical, error, warning, info, debug or trace, got {log_level!r}.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        _fail(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    try:
        from .serving import speech
    except ImportError as error:
        _fail(f'serve-speech needs {error.name}: pip install "mel-llm[serve]".')
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:  # before the model is loaded, which may take long
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        _fail(f"cannot listen on {host}:{port}: {error.strerror or error}.")
    limits = speech.Limits(max_queue=max_queue, max_chars=max_chars, max_seconds=max_seconds)
    try:
        speaker, processor = _load(model, device, dtype)
        parsed = [speech.Voice.parse(entry, processor.feature_extractor.sampling_rate) for entry in voice or []]
        voices = dict(parsed)
        if len(voices) < len(parsed):
            raise ValueError(f"--voice: two voices have one name among {', '.join(name for name, _ in parsed)}.")
        app = speech.create_app(speaker, processor, served_model_name or model, voices, limits, api_key)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    address = f"[{host}]" if ":" in host else host
    names = ", ".join([speech.DEFAULT_VOICE, *voices])
    print(
        f"Speaking at http://{address}:{listener.getsockname()[1]}/v1 (voices: {names})", file=sys.stderr, flush=True
    )
    speech.run(app, [listener], log_level, shutdown_seconds)


def _load(name: str, device: str | None, dtype: str) -> tuple:
    """The model, ready to speak, and its processor."""
    import torch
    from transformers import AutoConfig, AutoModelForTextToWaveform, AutoProcessor
    from transformers.utils import logging

    import mel_llm

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(name)
    if config.model_type != mel_llm.MelLLMConfig.model_type:
        raise ValueError(f"{name} is no Mel-LLM but of the type {config.model_type!r}.")
    model = AutoModelForTextToWaveform.from_pretrained(name, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), AutoProcessor.from_pretrained(name)


__all__ = ["serve_speech"]
