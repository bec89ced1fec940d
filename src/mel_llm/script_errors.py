"""How a script ends that cannot do what was asked, or is interrupted."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


# What the user can mend: files, arguments, packages, configs and weights
USER_ERRORS = (OSError, ValueError, TypeError, ImportError, SafetensorError, StrictDataclassError)


@contextlib.contextmanager
def told_in_a_line(script: str, errors: tuple[type[BaseException], ...] = USER_ERRORS) -> Iterator[None]:
    """Ends the program with `SCRIPT: MESSAGE` and status 1 for `errors`; with MEL_LLM_DEBUG set they keep their traceback."""
    try:
        yield
    except errors as error:
        if os.environ.get("MEL_LLM_DEBUG"):
            raise
        sys.exit(f"{script}: {error}")


@contextlib.contextmanager
def interruption_goes_on(logger: logging.Logger) -> Iterator[None]:
    """Ends the program with status 130 at Ctrl-C, for scripts whose command goes on where it was."""
    try:
        yield
    except KeyboardInterrupt:
        logger.info("Interrupted. The same command goes on from here.")
        sys.exit(130)


__all__ = ["USER_ERRORS", "interruption_goes_on", "told_in_a_line"]
