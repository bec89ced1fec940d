"""Texts to be spoken, with their recordings where there are any."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..training.dataset import load_clip
from ..training.report import clip_duration, select_clips
from ..training.sources import AUDIO_COLUMNS, TEXT_COLUMNS, SpeechSource, load_source, read_rows
from .plugins import fingerprint


_TABLES = (".csv", ".tsv", ".json", ".jsonl")
_MAX_NAME = 80


@dataclass
class Utterance:
    r"""A text, and perhaps a recording of it.

    Attributes:
        id (`str`): Fit for a file name, and no other's of the same list. The recording's name without its ending; else
            the cell in the column `id`; else the number of the line.
        text (`str`): Empty where nobody wrote it down.
        source, index (*optional*): The dataset with the recording, and its row in it.
        seconds (`float`, *optional*): Of the recording, as its row or its file's header says.
    """

    id: str
    text: str
    source: Any = None
    index: int | None = None
    seconds: float | None = None

    @property
    def has_recording(self) -> bool:
        return self.source is not None

    @property
    def recording_key(self) -> str | None:
        """Another one if the recording is: its name and place, and the size and time of its file."""
        if self.source is None:
            return None
        row = self.source[self.index]
        audio = row["audio"]
        if audio.get("bytes") is not None:
            return hashlib.sha256(audio["bytes"]).hexdigest()[:8]
        stat = os.stat(audio["path"])
        # Clips cut to one length and unpacked at one moment are told apart by their places alone
        place = os.path.abspath(audio["path"])
        return fingerprint([self.id, place, row.get("offset"), row.get("duration"), stat.st_size, stat.st_mtime_ns])

    def load(self, sampling_rate: int) -> np.ndarray:
        """The recording, `(samples,)`, float32.

        Raises:
            ValueError, OSError: It cannot be read.
        """
        row = self.source[self.index]
        return load_clip(row["audio"], sampling_rate, row.get("offset"), row.get("duration"))


def load_utterances(place: str, split: str = "validation") -> list[Utterance]:
    """What is to be spoken, or was.

    Args:
        place (`str`): A text file with a text on each line; a table (csv, tsv, json, jsonl) with texts alone; or speech
            in any form that [`SpeechSource`] takes, with its options, whose transcripts may be missing.
        split (`str`, defaults to `"validation"`): Of speech, unless the source names one. A folder without splits is read
            whole.

    Raises:
        FileNotFoundError: There is no such file, folder or split.
        ValueError: There is nothing in it, a recording cannot be read, or two rows have the same `id`.
    """
    source = SpeechSource.parse(place)
    path = Path(source.place).expanduser()
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [(str(number), line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        utterances = [Utterance(number.zfill(4), text) for number, text in rows]
    elif path.suffix in _TABLES and path.is_file() and (texts := _texts_of_table(path, source)) is not None:
        utterances = texts
    else:
        utterances, _ = load_recordings(source, split, needs_text=False)
    if not utterances:
        raise ValueError(f"{source.place}: there is no text and no recording in it.")
    return utterances


def _texts_of_table(path: Path, source: SpeechSource) -> list[Utterance] | None:
    """The rows of a table without recordings; `None` if it names some."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(read_rows(file, path))
    audio = (source.audio_column,) if source.audio_column else AUDIO_COLUMNS
    if not rows or any(row.get(name) for row in rows[:1] for name in audio):
        return None
    names = list(rows[0])
    column = source.text_column or next((name for name in TEXT_COLUMNS if name in names), None)
    if column not in names:
        raise ValueError(
            f"{path}: none of the columns {', '.join(names)} is called {column or ' or '.join(TEXT_COLUMNS)}. Name one: "
            f"{path},text_column=..."
        )
    utterances = [
        Utterance(
            _file_name(str(row["id"])) if row.get("id") else str(number).zfill(4), str(row[column] or "").strip()
        )
        for number, row in enumerate(rows, start=1)
    ]
    seen = set()
    for utterance in utterances:
        if utterance.id in seen:
            raise ValueError(f"{path}: two rows have the id {utterance.id!r}.")
        seen.add(utterance.id)
    return [utterance for utterance in utterances if utterance.text]


def load_recordings(source: SpeechSource, split: str, **options) -> tuple[list[Utterance], str | None]:
    """Recordings, each of which has a header that can be read.

    Args:
        source ([`SpeechSource`]): Where they are.
        split (`str`): Unless the source names one. A folder without splits is read whole.
        options: For [`load_source`].

    Returns:
        The recordings, and of which split they are; `None` for manifests and for folders without splits.

    Raises:
        FileNotFoundError: There is no such file, folder or split.
        ValueError: The source streams, a column is missing, or a recording cannot be read; the message names it.
    """
    if source.streaming:
        raise ValueError(f"{source.place}: what is evaluated cannot stream; leave `streaming` out.")
    data, found = None, None if Path(source.place).expanduser().is_file() else split
    if source.split is not None:
        found = source.split
    elif Path(source.place).expanduser().is_dir():
        try:
            data = load_source(source, split, **options)
        except FileNotFoundError as error:
            if "not divided into splits" not in str(error):
                raise
            split, found = "train", None  # as a folder without splits is called
    data = load_source(source, split, **options) if data is None else data
    seconds = []
    for index in range(len(data)):  # headers only; a broken file must not be met after hours
        try:
            seconds.append(clip_duration(data[index]))
        except (OSError, ValueError) as error:
            raise ValueError(f"{data[index]['origin']}: {error}. Repair it or leave it out (`exclude`).") from None
    if source.fraction is not None or source.hours is not None:
        data, seconds, _ = select_clips(data, None, fraction=source.fraction, hours=source.hours)
    stems = [_file_name(Path(origin.rpartition(": ")[2]).stem) for origin in data["origin"]]
    if len(set(stems)) < len(stems):
        stems = [f"{index:05d}_{stem}" for index, stem in enumerate(stems)]
    texts = data["text"]
    return [
        Utterance(stem, text.strip(), data, index, seconds[index])
        for index, (stem, text) in enumerate(zip(stems, texts, strict=True))
    ], found


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:_MAX_NAME].strip(".") or "_"


__all__ = ["Utterance", "load_recordings", "load_utterances"]
