"""`mel-llm demo`: a page to try a model on, in the browser."""

import os
from typing import Annotated

import typer

from .cli_common import fail, interruptible, load, report


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

    Only this machine can reach the page, and nothing leaves it. It needs gradio: pip install gradio.
    """
    if model is None:
        fail("no model: pass --model FOLDER, or set MEL_LLM_MODEL.")
    with interruptible():
        demo = _load(model, device, dtype, max_seconds, max_chars)
        _serve(demo, os.path.basename(os.path.normpath(model)) or model, host, port, queue_size, open_browser)


def _load(model: str, device: str | None, dtype: str, max_seconds: float, max_chars: int):
    # Before the model, which may take long to load
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError:
        fail("the demo page needs gradio: pip install gradio.")
    from transformers import AutoConfig

    import mel_llm

    from .demo_page import Demo

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        fail(error)
    if config.model_type != mel_llm.MelLLMConfig.model_type:
        fail(f"{model} is no Mel-LLM but of the type {config.model_type!r}.")
    auto_class = "AutoModelForSpeechSeq2Seq" if config.speech_config is None else "AutoModelForTextToWaveform"
    return Demo(*load(auto_class, model, device, dtype, check=lambda processor: None), max_seconds, max_chars)


def _serve(demo, name: str, host: str, port: int, queue_size: int, open_browser: bool) -> None:
    from .demo_page import build_page

    page = build_page(demo, f"Mel-LLM: {name}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        report(f"Whoever reaches {host} can use this page: there is no password.")
    page.queue(max_size=queue_size, default_concurrency_limit=1)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or None,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            ssr_mode=False,
            max_file_size=demo.max_bytes,
            prevent_thread_lock=True,
        )
    except OSError as error:
        reason = str(error).split(". ")[0].strip()
        fail(f"the page cannot be opened on {host}:{port}: {reason}. Choose another --port or --host.")
    report(f"The page is at {url} (Ctrl-C ends it).")
    page.block_thread()


__all__ = ["demo"]
