"""A corpus as it lies on disk: `SPLIT/metadata.csv` beside the clips, in the form of `audiofolder` datasets."""

import contextlib
import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mel_llm.whole_files import write_whole


COLUMNS = ("file_name", "text", "speaker", "language", "duration", "source")
METADATA = "metadata.csv"
SPLITS = ("train", "validation", "test")
SAMPLING_RATE = 16000

# How libsndfile is told to write each ending
_FORMATS = {".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "OPUS"), ".wav": ("WAV", "PCM_16")}


@contextlib.contextmanager
def new_corpus(target: Path) -> Iterator[Path]:
    """Gives a folder beside `target`, of this run alone, which takes its name when all went well and goes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp made it for this user alone
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_clip(path: Path, audio: np.ndarray) -> None:
    """Writes a file that appears whole or not at all, of a waveform `(samples,)` at 16 kHz, int16 or float, as FLAC, Ogg/Opus or WAV by its ending."""
    import soundfile

    kind, subtype = _FORMATS[path.suffix]
    partial = path.with_name(f".partial-{path.name}")
    soundfile.write(partial, audio, SAMPLING_RATE, format=kind, subtype=subtype)
    os.replace(partial, path)


def write_metadata(folder: Path, rows: Iterable[dict]) -> None:
    """`metadata.csv` of one split, whole or not at all. A row has the [`COLUMNS`]; `duration` is in seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "duration": f"{float(row['duration']):.3f}"} for row in rows)
    write_whole(folder / METADATA, text.getvalue())


def read_metadata(folder: Path) -> list[dict[str, str]]:
    """The rows of one split.

    Raises:
        ValueError: It is no table with a `file_name` and a `text`.
    """
    path = folder / METADATA
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table in UTF-8: {error}") from None
    if rows and not {"file_name", "text"} <= rows[0].keys():
        raise ValueError(f"{path} needs the columns file_name and text, it has {', '.join(map(str, rows[0]))}.")
    return rows


__all__ = [
    "COLUMNS",
    "METADATA",
    "SAMPLING_RATE",
    "SPLITS",
    "new_corpus",
    "read_metadata",
    "write_clip",
    "write_metadata",
]
