"""Looks a corpus over: what is in it, and what is wrong with it."""

import hashlib
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mel_llm.audio_utils_mel_llm import AUDIO_EXTENSIONS, load_audio

from .corpus import METADATA, SAMPLING_RATE, SPLITS, read_metadata
from .held_out import is_held_out_voice, normalize_text, split_of


_DURATION_TOLERANCE_S = 0.05
_SILENT_PEAK = 0.01
_LICENCES = re.compile(r"(attribution|licen[cs]e|copying|copyright)", re.IGNORECASE)

TABLE_COLUMNS = ("corpus", "split", "clips", "hours", "voices", "median s", "characters/s")


@dataclass
class SplitReport:
    """One split of a corpus: what was counted, and what is wrong, a line each."""

    corpus: str
    split: str
    clips: int = 0
    seconds: float = 0.0
    voices: int = 0
    median_seconds: float = 0.0
    characters: int = 0
    faults: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """One row of the table, as [`TABLE_COLUMNS`] says."""
        speed = f"{self.characters / self.seconds:.1f}" if self.seconds else "-"
        hours, median = f"{self.seconds / 3600:.3f}", f"{self.median_seconds:.2f}"
        return [self.corpus, self.split, str(self.clips), hours, str(self.voices), median, speed]


def is_licence(file: Path) -> bool:
    """Whether a file or folder says by its name that it tells under which terms something is."""
    return _LICENCES.match(file.name) is not None


def find_corpora(folder: Path) -> list[Path]:
    """The folder itself, or those in it, that have `metadata.csv` at the top or in their splits.

    Raises:
        FileNotFoundError: There is none.
    """
    corpora = [place for place in [folder, *sorted(folder.glob("*"))] if place.is_dir() and _splits(place)]
    # A split is no corpus of its own beside its siblings
    corpora = corpora[:1] if corpora[:1] == [folder] else corpora
    if not corpora:
        raise FileNotFoundError(f"{folder} has no {METADATA}, neither at its top nor in train/, validation/ or test/.")
    return corpora


def check_corpus(folder: Path) -> list[SplitReport]:
    """One report for each split of a corpus; the faults that concern all are with the first.

    Every file is decoded, which takes some seconds for each hour.

    Raises:
        ValueError: A `metadata.csv` cannot be read.
    """
    reports, split_texts = [], {}
    sounds: dict[str, str] = {}  # hash of a waveform to where it was first seen
    for split, place in _splits(folder).items():
        rows = read_metadata(place)
        report = SplitReport(folder.name, split)
        _check_rows(report, place, rows, sounds)
        split_texts[split] = {text: row["file_name"] for row in rows if (text := normalize_text(row["text"] or ""))}
        reports.append(report)
    for other in ("validation", "test"):
        shared = split_texts.get("train", {}).keys() & split_texts.get(other, {}).keys()
        for text in sorted(shared):
            reports[0].faults.append(f"train/{split_texts['train'][text]}: its text is in {other} too")
    if not any(is_licence(file) for place in (folder, folder.parent) for file in place.iterdir()):
        reports[0].faults.append(f"no licence or attribution in {folder} or above it")
    return reports


def format_table(reports: list[SplitReport]) -> str:
    """A Markdown table with a row for each split."""
    lines = [list(TABLE_COLUMNS), *(report.cells() for report in reports)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(TABLE_COLUMNS))]
    table = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([table[0], rule, *table[1:]])


def _splits(folder: Path) -> dict[str, Path]:
    """`SPLIT/` of those that have a table; a table at the top counts as train."""
    splits = {split: folder / split for split in SPLITS if (folder / split / METADATA).is_file()}
    return splits or ({"train": folder} if (folder / METADATA).is_file() else {})


def _check_rows(report: SplitReport, place: Path, rows: list[dict[str, str]], sounds: dict[str, str]) -> None:
    names = Counter(row["file_name"] for row in rows)
    report.faults += [f"{report.split}/{name}: {count} rows" for name, count in names.items() if count > 1]
    seconds, speakers = [], set()
    for row in rows:
        where = f"{report.split}/{row['file_name']}"
        faults, length = _check_clip(place / row["file_name"], row, where, sounds)
        faults += _check_text_and_voice(row, report.split)
        report.faults += [f"{where}: {fault}" for fault in faults]
        seconds.append(length)
        speakers.add(row.get("speaker"))
        report.characters += len(row["text"] or "")
    files = {
        file.relative_to(place).as_posix() for file in place.rglob("*") if file.suffix.lower() in AUDIO_EXTENSIONS
    }
    if place.name in SPLITS or not any((place / split).is_dir() for split in SPLITS):
        report.faults += [f"{report.split}/{name}: in no row" for name in sorted(files - names.keys())]
    report.clips, report.seconds, report.voices = len(rows), sum(seconds), len(speakers)
    report.median_seconds = statistics.median(seconds) if seconds else 0.0


def _check_clip(path: Path, row: dict, where: str, sounds: dict[str, str]) -> tuple[list[str], float]:
    """What is wrong with the file, and its seconds."""
    import soundfile

    if not path.is_file():
        return ["there is no such file"], 0.0
    try:
        rate = soundfile.info(path).samplerate
        audio = load_audio(path, rate)
    except (OSError, ValueError, soundfile.LibsndfileError) as error:
        return [f"cannot be read: {error}"], 0.0
    faults, seconds = [], len(audio) / rate
    if rate != SAMPLING_RATE:
        faults.append(f"{rate} Hz and not {SAMPLING_RATE}")
    if np.abs(audio).max() < _SILENT_PEAK:
        faults.append("it is silent")
    stated = row.get("duration")
    try:
        if stated and not abs(float(stated) - seconds) <= _DURATION_TOLERANCE_S:
            faults.append(f"{seconds:.3f} s, and metadata.csv says {stated}")
    except ValueError:
        faults.append(f"duration {stated!r} is no number")
    digest = hashlib.sha256(audio.tobytes()).hexdigest()  # not of the file: Ogg puts a random number into each
    if sounds.setdefault(digest, where) != where:
        faults.append(f"the same sound as {sounds[digest]}")
    return faults, seconds


def _check_text_and_voice(row: dict, split: str) -> list[str]:
    faults = []
    text = row["text"] or ""
    if not normalize_text(text):
        faults.append("no text")
    belongs = split_of(text, row.get("language") or "en")
    if (split == "train" and belongs != "train") or (split == "validation" and belongs in ("test", "reserved")):
        faults.append(f"its text is kept for {'figures' if belongs == 'reserved' else belongs}")
    if split == "train" and is_held_out_voice(row.get("speaker") or ""):
        faults.append(f"the voice {row['speaker']} is kept for tests")
    return faults


__all__ = ["SplitReport", "check_corpus", "find_corpora", "format_table", "is_licence"]
