"""`mel-llm demo`: a page to try a model on, in the browser."""

import os
import sys
from typing import Annotated, NoReturn

import typer


def demo(
    model: Annotated[str | None, typer.Option(envvar="MEL_LLM_MODEL", help="Folder or Hub name of a Mel-LLM.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 finds a free one.")] = 7860,
    max_seconds: Annotated[float, typer.Option(min=1.0, help="Longest recording that the page takes.")] = 600.0,
    max_chars: Annotated[int, typer.Option(min=1, help="Longest text that the page speaks.")] = 2000,
    queue_size: Annotated[int, typer.Option(min=1, help="Visitors who may wait for the model.")] = 8,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Open a page to record or upload speech, see what the model reads and writes, and let it speak.

    Only this machine can reach the page, and nothing leaves it. It needs gradio: pip install "mel-llm[demo]".
    """
    if model is None:
        _fail("no model: pass --model FOLDER, or set MEL_LLM_MODEL.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        _fail(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    try:
        _serve(model, host, port, max_seconds, max_chars, queue_size, open_browser, device, dtype)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _serve(model, host, port, max_seconds, max_chars, queue_size, open_browser, device, dtype) -> None:
    # Imported late: `mel-llm --help` need not wait for torch; and gradio before the model, which may take long to load
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        _fail('the demo page needs gradio: pip install "mel-llm[demo]", or pip install gradio.')
    import torch
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, AutoProcessor

    import mel_llm

    from .demo_page import Demo, build_page

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type != mel_llm.MelLLMConfig.model_type:
            _fail(f"{model} is no Mel-LLM but of the type {config.model_type!r}.")
        processor = AutoProcessor.from_pretrained(model)
        auto_class = AutoModelForSpeechSeq2Seq if config.speech_config is None else AutoModelForTextToWaveform
        loaded = auto_class.from_pretrained(model, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        _fail(error)
    name = os.path.basename(os.path.normpath(model)) or model
    page = build_page(Demo(loaded, processor, max_seconds, max_chars), f"Mel-LLM: {name}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        _report(f"Whoever reaches {host} can use this page: there is no password.")
    page.queue(max_size=queue_size, default_concurrency_limit=1)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or None,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            ssr_mode=False,
            max_file_size="1gb",
            prevent_thread_lock=True,
        )
    except OSError as error:
        _fail(f"the page cannot be opened on {host}:{port}: {' '.join(str(error).split())}")
    _report(f"The page is at {url} (Ctrl-C ends it).")
    page.block_thread()


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: object) -> NoReturn:
    _report(f"mel-llm: {message}")
    raise typer.Exit(2)


__all__ = ["demo"]
