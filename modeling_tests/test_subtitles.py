"""Subtitle formats: times, order and what must be escaped."""

import itertools
import json
import re

import pytest

from mel_llm import Segment, Transcription
from mel_llm.subtitles import format_segment, to_json, to_srt, to_txt, to_vtt


def transcription(*segments):
    return Transcription(" ".join(segment.text for segment in segments), list(segments), 7300.12345)


TWO = transcription(Segment(0.0, 59.9996, "First."), Segment(3725.0004, 7261.5, "Second & last."))


def test_srt():
    assert to_srt(TWO) == (
        "1\n00:00:00,000 --> 00:01:00,000\nFirst.\n\n2\n01:02:05,000 --> 02:01:01,500\nSecond & last.\n"
    )


def test_vtt():
    assert to_vtt(TWO) == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:00.000\nFirst.\n\n01:02:05.000 --> 02:01:01.500\nSecond &amp; last.\n"
    )


def test_json():
    text = to_json(TWO, file="talk.wav")
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "file": "talk.wav",
        "text": "First. Second & last.",
        "segments": [
            {"start": 0.0, "end": 60.0, "text": "First."},
            {"start": 3725.0, "end": 7261.5, "text": "Second & last."},
        ],
        "duration": 7300.123,
        "truncated": False,
        "warning": None,
    }
    assert json.loads(to_json(TWO, indent=2)) == {k: v for k, v in json.loads(text).items() if k != "file"}
    assert "日本" in to_json(transcription(Segment(0, 1, "日本")))


def test_text():
    assert to_txt(TWO) == "First. Second & last.\n"
    assert to_txt(TWO, timestamps=True) == (
        "[00:00.000 -> 01:00.000] First.\n[1:02:05.000 -> 2:01:01.500] Second & last.\n"
    )
    assert format_segment(Segment(3599.9996, 36000.0, "x")) == "[1:00:00.000 -> 10:00:00.000] x"


def test_text_cannot_break_the_format():
    nasty = transcription(Segment(0, 1, "a --> b\n\n<i>&amp;</i>\u2028end"), Segment(1, 2, " \n "), Segment(2, 3, "c"))
    srt, vtt = to_srt(nasty), to_vtt(nasty)
    assert srt.count("-->") == vtt.count("-->") == 2
    assert srt.split("\n\n")[0] == "1\n00:00:00,000 --> 00:00:01,000\na -> b <i>&amp;</i> end"
    assert "a --&gt; b &lt;i&gt;&amp;amp;&lt;/i&gt; end" in vtt
    assert srt.split("\n\n")[1].startswith("2\n00:00:02,000")  # the empty one has no number


def test_times_never_overlap_or_run_backwards():
    messy = transcription(
        Segment(2.0, 3.0, "b"), Segment(0.0, 2.5, "a"), Segment(3.0, 3.0, "c"), Segment(-1, 0.2, "z")
    )
    times = [
        tuple(int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in re.findall(r"(\d\d):(\d\d):(\d\d\.\d{3})", line))
        for line in to_vtt(messy).splitlines()
        if "-->" in line
    ]
    assert len(times) == 4 and all(start < end for start, end in times)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))


@pytest.mark.parametrize(("write", "nothing"), [(to_txt, "\n"), (to_srt, ""), (to_vtt, "WEBVTT\n")])
def test_nothing_was_said(write, nothing):
    assert write(Transcription("")) == nothing
