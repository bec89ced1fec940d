"""Files that are there whole or not at all, and folders that can be written to."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a file that appears whole or not at all; text as UTF-8."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    os.replace(partial, path)


def claim_folder(path: str | os.PathLike) -> Path:
    """The folder, made if need be, which can be written to: a night's work must not end where it cannot."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    return folder


__all__ = ["claim_folder", "write_whole"]
