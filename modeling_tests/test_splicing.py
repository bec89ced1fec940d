"""scripts/prepare_data.py spliced: sentences that nobody said, out of words that somebody did."""

import csv
import itertools
import shutil
import sys
from difflib import SequenceMatcher

import numpy as np
import pytest
import soundfile
from conftest import ROOT, load_script
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mel_llm
from mel_llm.spelling import ctc_bytes


sys.path.insert(0, str(ROOT / "scripts"))

from speech_data import splicing
from speech_data.check import check_corpus
from speech_data.corpus import COLUMNS, read_metadata, write_metadata
from speech_data.splicing import align_letters, find_cuts, splice


MODEL = ROOT / "hub_cards" / "mel-llm-small-en"


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_data")


def run(script, *words) -> int:
    arguments = script.build_parser().parse_args([str(word) for word in words])
    return arguments.run(arguments)


def spell(letters: str, at: list[int], num_places: int, sure: float = 0.9) -> np.ndarray:
    """Log-probabilities of a head that hears each letter at its place, and nothing between."""
    probs = np.full((num_places, 256), (1 - sure) / 255)
    probs[:, 0] = sure
    for letter, place in zip(letters.encode(), at, strict=True):
        probs[place] = (1 - sure) / 255
        probs[place, letter] = sure
    return np.log(probs)


# --- where words are ----------------------------------------------------------------------------------------------------


def test_letters_are_found_where_they_are_heard():
    at = [2, 5, 7, 11, 12]
    places, scores = align_letters(spell("hello", at, 15), list(b"hello"))
    assert places.tolist() == at and np.allclose(np.exp(scores), 0.9)


def test_a_letter_that_comes_twice_needs_room():
    assert align_letters(spell("ll", [0, 1], 2), list(b"ll")) is None  # a blank must stand between them
    assert align_letters(spell("la", [0, 1], 2), list(b"la"))[0].tolist() == [0, 1]
    assert align_letters(spell("l", [0], 1), list(b"long")) is None


def test_cuts_are_where_it_is_quiet_between_words():
    rate, seconds = 16000, 1.5
    time = np.arange(round(rate * seconds)) / rate
    audio = np.sin(2 * np.pi * 300 * time).astype(np.float32)
    for start, end in ((0.46, 0.5), (0.98, 1.04)):
        audio[round(start * rate) : round(end * rate)] *= 0.01
    # 50 places a second, the words' letters around the pauses
    log_probs = spell("one two three", [5, 8, 12, 20, 30, 35, 44, 48, 56, 60, 64, 68, 70], 75)
    words, places = find_cuts(audio, "One, two — three!", log_probs)
    assert words == ("One,", "two —", "three!")
    assert places[0] == 0 and places[3] == len(audio)
    assert 0.46 <= places[1] / rate <= 0.5 and 0.98 <= places[2] / rate <= 1.04
    # What the head does not hear is not cut: neither another text nor one other word
    assert find_cuts(audio, "Nobody said any such thing", log_probs) is None
    assert find_cuts(audio, "One six three", log_probs) is None
    assert find_cuts(audio, " -- ", log_probs) is None and find_cuts(audio, "", log_probs) is None


# --- corpora ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The recordings of the repository, as a corpus that may be trained on."""
    folder = tmp_path_factory.mktemp("speech") / "recordings"
    (folder / "train").mkdir(parents=True)
    with open(ROOT / "demo_clips" / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        shutil.copyfile(ROOT / "demo_clips" / row["file_name"], folder / "train" / row["file_name"])
        row["duration"] = soundfile.info(folder / "train" / row["file_name"]).duration
    write_metadata(folder / "train", [{key: row.get(key, "") for key in COLUMNS} | {"speaker": "her"} for row in rows])
    shutil.copyfile(ROOT / "demo_clips" / "ATTRIBUTION.md", folder / "ATTRIBUTION.md")
    return folder


@pytest.fixture(scope="module")
def model():
    return AutoModelForSpeechSeq2Seq.from_pretrained(MODEL).eval(), AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def spliced(script, corpus):
    target = corpus.parent / "spliced"
    assert run(script, "spliced", "--corpora", corpus, "--model", MODEL, "--output_dir", target, "--hours", 0.02) == 0
    return target


def rows_of(folder):
    return read_metadata(folder / "train")


def test_what_is_spliced_says_its_text(spliced, corpus, model):
    rows, originals = rows_of(spliced), {row["text"] for row in rows_of(corpus)}
    said = {word for text in originals for word in text.split()}
    assert sum(float(row["duration"]) for row in rows) >= 0.02 * 3600
    assert all(row["speaker"] == "her" and row["source"].startswith("spliced:") for row in rows)
    assert {word for row in rows for word in row["text"].split()} <= said
    assert not {row["text"] for row in rows} & originals and len({row["text"] for row in rows}) == len(rows)
    [report] = check_corpus(spliced)
    assert not report.faults
    # What the head hears in a clip is likest the clip's own text
    clips = [mel_llm.load_audio(spliced / "train" / row["file_name"]) for row in rows[:8]]
    texts = [bytes(ctc_bytes(row["text"])) for row in rows[:8]]
    heard = model[0].get_ctc_log_probs(**model[1](audio=clips))
    for text, log_probs, count in zip(texts, *heard, strict=True):
        letters = bytes(letter for letter, _ in itertools.groupby(log_probs[:count].argmax(-1).tolist()) if letter)
        likeness = {other: SequenceMatcher(None, letters, other, autojunk=False).ratio() for other in texts}
        assert max(likeness, key=likeness.get) == text and likeness[text] > 0.7


def test_a_seed_decides_and_nothing_is_overwritten(script, spliced, corpus):
    words = ("spliced", "--corpora", corpus, "--model", MODEL, "--hours", 0.02, "--output_dir")
    with pytest.raises(FileExistsError, match="--output_dir"):
        run(script, *words, spliced)
    for seed, is_same in ((0, True), (1, False)):
        target = spliced.with_name(f"seed{seed}")
        run(script, *words, target, "--seed", seed, "--format", "wav")
        assert ([row["text"] for row in rows_of(target)] == [row["text"] for row in rows_of(spliced)]) is is_same


def test_licences_go_along(spliced):
    text = (spliced / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert (ROOT / "demo_clips" / "ATTRIBUTION.md").read_text(encoding="utf-8") in text and "put together" in text


def test_what_was_interrupted_leaves_no_corpus(script, corpus, monkeypatch):
    target, written = corpus.parent / "broken", []

    def write(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_clip(*arguments)

    write_clip = splicing.write_clip
    words = ("spliced", "--corpora", corpus, "--model", MODEL, "--hours", 0.01, "--output_dir", target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(splicing, "write_clip", write)
        run(script, *words)
    assert len(written) == 3 and not target.exists()
    run(script, *words)
    assert {row["file_name"] for row in rows_of(target)} == {file.name for file in (target / "train").glob("*.flac")}


def test_texts_of_tests_are_never_made(corpus, model, monkeypatch):
    cuts = splicing.cut_corpus(corpus, *model)
    assert splice(cuts, 2.0, np.random.default_rng(0))
    monkeypatch.setattr(splicing, "split_of", lambda text, language: "test")
    assert splice(cuts, 2.0, np.random.default_rng(0)) is None
    with pytest.raises(ValueError, match="validation or test"):
        next(splicing._plan(cuts, 1.0, (2.0, 3.0), 0))


def test_what_cannot_be_spliced_is_told(script, corpus, tmp_path, model):
    with pytest.raises(ValueError, match="No speaker has two clips"):
        list(splicing._plan(splicing.cut_corpus(corpus, *model)[:1], 1.0, (2.0, 3.0), 0))
    words = ("spliced", "--corpora", corpus, "--model", MODEL, "--output_dir", tmp_path / "new")
    with pytest.raises(ValueError, match="--hours must be more than 0"):
        run(script, *words, "--hours", 0)
    with pytest.raises(ValueError, match="--seconds must be two numbers"):
        run(script, *words, "--hours", 1, "--seconds", 5, 2)
    with pytest.raises(OSError):
        run(script, "spliced", "--corpora", tmp_path / "none", *words[3:], "--hours", 1)
    assert not (tmp_path / "new").exists()
