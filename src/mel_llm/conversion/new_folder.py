"""A folder that is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_new_folder(folder: Path) -> None:
    """Raises `FileExistsError` for a file, and for a folder with anything in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder. Choose another --output_dir.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a partial folder beside `folder` to write into, which takes its name when all went well and goes otherwise.

    What a killed process leaves is called `.NAME.partial`, and the next call removes it.

    Raises:
        FileExistsError: There is something in `folder` already.
    """
    folder = Path(os.path.abspath(folder))
    check_new_folder(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        check_new_folder(folder)  # somebody else may have been faster
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


__all__ = ["check_new_folder", "new_folder"]
