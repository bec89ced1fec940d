"""What the commands of `mel-llm` share: how they report, load a model, and leave files behind."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer


STDIN = "-"


def report(message: str) -> None:
    """Says something on standard error; a progress bar makes room."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        print(message, file=sys.stderr, flush=True)


def fail(message: object) -> NoReturn:
    """Ends the program: nothing could be done."""
    report(f"mel-llm: {message}")
    raise typer.Exit(2)


@contextlib.contextmanager
def interruptible():
    """Ctrl-C is told in a line, and its status is that of shells."""
    try:
        yield
    except KeyboardInterrupt:
        report("mel-llm: interrupted")
        raise typer.Exit(130) from None


def check_folder(folder: Path, name: str) -> None:
    """A night's work must not end at the first file that cannot be written."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"{name} {folder} cannot be written to: {error}")


def give_usual_rights(path: str | os.PathLike) -> None:
    """A temporary file is its owner's alone; this gives it the rights of a file that was opened."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def load(auto_class: str, model: str, device: str | None, dtype: str, check: Callable):
    """The model, for use, and its processor.

    Args:
        auto_class: Name of the class of transformers that loads the model.
        model: Folder or Hub name.
        device, dtype: As the options of these names.
        check: Called with the processor before the model is loaded; what it raises is reported.
    """
    # Imported late: `mel-llm --help` need not wait for torch
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    import mel_llm  # noqa: F401  (makes the Auto classes know it)

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        fail(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = transformers.AutoProcessor.from_pretrained(model)
        check(processor)
        loaded = getattr(transformers, auto_class).from_pretrained(model, dtype=dtype).to(device).eval()
    except SafetensorError as error:
        fail(f"{model}: a file of weights is broken, perhaps cut short: {error}")
    except (OSError, TypeError, ValueError, RuntimeError, AttributeError, ImportError) as error:
        fail(error)
    return loaded, processor
