"""Sentences to be spoken, without those that are kept for tests."""

import csv
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from .held_out import normalize_text, split_of


logger = logging.getLogger("prepare_data")

MAX_CHARS = 300  # longer is no sentence, and some engines would cut it


@dataclass(frozen=True)
class Sentence:
    """A text, what it is from and under which licence, as far as the list says."""

    text: str
    source: str
    licence: str


def load_sentences(path: Path, language: str = "en") -> tuple[list[Sentence], str]:
    """The sentences of a list, and a hash of all of them.

    Args:
        path (`Path`): A `.tsv` file without quoting, with the column `text` and perhaps `source` and `licence`; or any
            other file, with one sentence on each line.
        language (`str`, defaults to `"en"`): Whose held-out texts are refused.

    Raises:
        ValueError: There is no sentence in it that may be spoken.
    """
    if path.suffix == ".tsv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if rows and "text" not in rows[0]:
            raise ValueError(f"--texts: {path} has no column `text`, it has {', '.join(map(str, rows[0]))}.")
    else:
        rows = [{"text": line} for line in path.read_text(encoding="utf-8-sig").splitlines()]
    sentences: dict[str, Sentence] = {}
    held_out = unfit = 0
    for row in rows:
        text = " ".join((row["text"] or "").split())
        key = normalize_text(text)
        if not key or len(text) > MAX_CHARS:
            unfit += 1
        elif split_of(text, language) != "train":
            held_out += 1
        else:
            source, licence = row.get("source") or path.stem, row.get("licence") or "not stated"
            sentences.setdefault(key, Sentence(text, source, licence))
    repeated = len(rows) - unfit - held_out - len(sentences)
    logger.info(
        f"{path}: {len(sentences)} sentences; left out: {held_out} kept for tests, {repeated} repeated, {unfit} empty or "
        f"longer than {MAX_CHARS} characters."
    )
    if not sentences:
        raise ValueError(f"--texts: {path} has no sentence that may be spoken.")
    digest = hashlib.sha256("\n".join(sentence.text for sentence in sentences.values()).encode("utf-8"))
    return list(sentences.values()), digest.hexdigest()[:16]


__all__ = ["Sentence", "load_sentences"]
