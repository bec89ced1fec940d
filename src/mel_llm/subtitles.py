"""A `Transcription` as text, SubRip (srt), WebVTT (vtt) or JSON.

A subtitle is a whole segment: its times come from the pauses at which long audio is cut, not from an aligner.
"""

import dataclasses
import html
import json
import re
from collections.abc import Iterable

from .transcription_mel_llm import Segment, Transcription


def to_txt(transcription: Transcription, timestamps: bool = False) -> str:
    """The text on one line; with `timestamps`, a line per segment as [`format_segment`] writes it."""
    if timestamps:
        return "".join(format_segment(segment) + "\n" for segment in transcription.segments)
    return transcription.text + "\n"


def to_srt(transcription: Transcription) -> str:
    """SubRip: numbered subtitles, `HH:MM:SS,mmm`."""
    cues = []
    for number, (start, end, text) in enumerate(_cues(transcription.segments), 1):
        text = text.replace("-->", "->")  # some players take it for a line of times
        cues.append(f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n")
    return "\n".join(cues)


def to_vtt(transcription: Transcription) -> str:
    """WebVTT: `HH:MM:SS.mmm`, with `&`, `<` and `>` escaped."""
    cues = [
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{html.escape(text, quote=False)}\n"
        for start, end, text in _cues(transcription.segments)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def to_json(transcription: Transcription, indent: int | None = None, **fields) -> str:
    """A JSON object on one line (or with `indent`): `fields`, then those of [`Transcription`], times in seconds."""
    values = dataclasses.asdict(transcription)
    values["duration"] = round(values["duration"], 3)
    for segment in values["segments"]:
        segment["start"], segment["end"] = round(segment["start"], 3), round(segment["end"], 3)
    return json.dumps({**fields, **values}, ensure_ascii=False, indent=indent) + "\n"


def format_segment(segment: Segment) -> str:
    """`[00:00.000 -> 00:03.210] text`; from an hour on the times are `1:00:00.000`."""
    start, end = (_short_clock(_milliseconds(seconds)) for seconds in (segment.start, segment.end))
    return f"[{start} -> {end}] {_one_line(segment.text)}"


def _cues(segments: Iterable[Segment]) -> Iterable[tuple[int, int, str]]:
    """Start and end in ms, and text. In order, none empty, and none begins before the one before it has ended."""
    previous_end = 0
    for segment in sorted(segments, key=lambda segment: segment.start):
        text = _one_line(segment.text)
        if not text:
            continue
        start = max(_milliseconds(segment.start), previous_end)
        end = max(_milliseconds(segment.end), start + 1)
        previous_end = end
        yield start, end, text


def _one_line(text: str) -> str:
    # An empty line would end a subtitle
    return re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text.strip())


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _clock(milliseconds: int, decimal_mark: str) -> str:
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{seconds:02}{decimal_mark}{milliseconds:03}"


def _short_clock(milliseconds: int) -> str:
    clock = _clock(milliseconds, ".")
    return clock[3:] if milliseconds < 3_600_000 else clock.removeprefix("0")


__all__ = ["format_segment", "to_json", "to_srt", "to_txt", "to_vtt"]
