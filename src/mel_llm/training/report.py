"""What is in the data, told before training starts: how much, how long, what is left out and why."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from transformers.utils import logging


logger = logging.get_logger(__name__)

_MAX_NAMED = 20


@dataclass
class DataReport:
    r"""Counts and lengths of a set of clips.

    Attributes:
        num_clips, hours: What is kept.
        left_out: Reasons, and how many clips were left out for each.
        seconds, tokens, tokens_per_second: Minimum, 5th, 50th, 95th percentile and maximum over the clips kept; tokens
            are those of the transcript.
        unreadable: Names of (at most 20) clips that are missing or no audio.
    """

    num_clips: int = 0
    hours: float = 0.0
    left_out: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.num_clips} clips, {self.hours:.2f} hours"]
        if self.num_clips:
            lines[0] += "; minimum, 5 %, median, 95 %, maximum:"
            for name in ("seconds", "tokens", "tokens_per_second"):
                values = "  ".join(f"{value:8.2f}" for value in getattr(self, name))
                lines.append(f"  {name.replace('_', ' '):18}{values}")
        for reason, count in self.left_out.items():
            lines.append(f"  left out: {count} {reason}")
        for name in self.unreadable:
            lines.append(f"    {name}")
        return "\n".join(lines)


def clip_duration(row: dict[str, Any]) -> float:
    """Seconds of a clip: what its row says, or else what its file's header says.

    Raises:
        OSError: There is no such file.
        ValueError: It is no audio.
    """
    audio = row["audio"]
    if audio.get("bytes") is None and not os.path.isfile(audio["path"] or ""):
        raise FileNotFoundError("there is no such file")
    if row.get("duration"):
        return float(row["duration"])
    if row.get("offset"):
        raise ValueError("a clip with an `offset` into its file needs a `duration` too")
    import soundfile

    try:
        info = soundfile.info(BytesIO(audio["bytes"]) if audio.get("bytes") is not None else audio["path"])
    except (soundfile.LibsndfileError, TypeError) as error:
        raise ValueError(str(error)) from error
    return info.frames / info.samplerate


def select_clips(
    data,
    tokenizer,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    max_tokens: int | None = None,
    fraction: float | None = None,
    hours: float | None = None,
) -> tuple[Any, list[float], DataReport]:
    """Leaves out what cannot be trained on, and tells what is there. Only headers are read, where no duration is given.

    Args:
        data: A `datasets.Dataset` with the columns of `mel_llm.training.sources`.
        tokenizer (*optional*): Counts the tokens of the transcripts. Without one, transcripts do not matter.
        min_seconds, max_seconds (`float`): Clips outside are left out.
        max_tokens (`int`, *optional*): So are longer transcripts.
        fraction, hours (`float`, *optional*): Of what is left, only this share, or clips of about so many hours: see
            [`SpeechSource`].

    Returns:
        The rows kept, the seconds of each, and the report.
    """
    from tqdm.auto import tqdm

    kept, lengths, token_counts, left_out, unreadable = [], [], [], Counter(), []
    for index, row in enumerate(tqdm(data, desc="Looking at the clips", unit="clip", disable=None)):
        try:
            seconds = clip_duration(row)
        except (OSError, ValueError) as error:
            left_out["missing or not audio"] += 1
            if len(unreadable) < _MAX_NAMED:
                unreadable.append(f"{row['origin']}: {error}")
            continue
        num_tokens = 0 if tokenizer is None else len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
        text = None if tokenizer is None else row["text"]
        reason = _reason(text, seconds, num_tokens, min_seconds, max_seconds, max_tokens)
        if reason is not None:
            left_out[reason] += 1
            continue
        kept.append(index)
        lengths.append(seconds)
        token_counts.append(num_tokens)
    if fraction is not None or hours is not None:
        rows = data.select(kept)
        part = _part(
            [_rank(*row) for row in zip(rows["origin"], rows["offset"], rows["text"], strict=True)],
            lengths,
            fraction,
            hours,
        )
        left_out["beyond the part that is asked for"] = len(kept) - len(part)
        kept, lengths, token_counts = ([values[place] for place in part] for values in (kept, lengths, token_counts))
    report = describe(lengths, token_counts)
    report.left_out, report.unreadable = dict(left_out), unreadable
    return (data if len(kept) == len(data) else data.select(kept)), lengths, report


def _rank(origin: str, offset: float | None, text: str) -> bytes:
    """A clip's place in an order that no seed, machine or neighbour has a part in: its folders are not, its name is."""
    name = os.path.basename(origin.replace("\\", "/"))
    return hashlib.blake2b(f"{name}\0{offset}\0{text}".encode(), digest_size=8).digest()


def _part(ranks: list[bytes], lengths: list[float], fraction: float | None, hours: float | None) -> list[int]:
    """Places of the clips that come first by rank, in their own order: at least one, where there are any."""
    order = sorted(range(len(ranks)), key=lambda place: (ranks[place], place))
    if fraction is not None:
        count = math.ceil(round(fraction * len(order), 6))
    else:
        # As near to the hours as whole clips come
        ends = np.cumsum([lengths[place] for place in order])
        count = max(1, int(np.searchsorted(ends - np.asarray([lengths[p] for p in order]) / 2, hours * 3600)))
    return sorted(order[:count])


def _reason(text, seconds, num_tokens, min_seconds, max_seconds, max_tokens) -> str | None:
    if text is not None and not text.strip():
        return "without a transcript"
    if seconds < min_seconds:
        return f"shorter than {min_seconds:g} s"
    if seconds > max_seconds:
        return f"longer than {max_seconds:g} s"
    if max_tokens is not None and num_tokens > max_tokens:
        return f"with more than {max_tokens} tokens"
    return None


def describe(lengths: Iterable[float], token_counts: Iterable[int]) -> DataReport:
    """The report of clips of so many seconds and tokens."""
    seconds, tokens = np.asarray(list(lengths), dtype=float), np.asarray(list(token_counts), dtype=float)
    report = DataReport(num_clips=len(seconds), hours=float(seconds.sum() / 3600))
    if len(seconds):
        report.seconds = _quantiles(seconds)
        report.tokens = _quantiles(tokens)
        report.tokens_per_second = _quantiles(tokens / np.maximum(seconds, 1e-3))
    return report


def _quantiles(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in np.percentile(values, [0, 5, 50, 95, 100])]


__all__ = ["DataReport", "clip_duration", "describe", "select_clips"]
