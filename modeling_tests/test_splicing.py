"""scripts/prepare_data.py spliced: sentences that nobody said, out of words that somebody did."""

import csv
import itertools
import logging
import shutil
import sys
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, build_tiny
from test_prepare_data import run, script  # noqa: F401
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mel_llm
from mel_llm.spelling import ctc_bytes


sys.path.insert(0, str(ROOT / "scripts"))

from speech_data import splicing
from speech_data.check import check_corpus
from speech_data.corpus import COLUMNS, read_metadata, write_metadata
from speech_data.splicing import CutClip, cut_corpus, splice, spliced_clips
from speech_data.word_cuts import align_letters, find_cuts


MODEL = ROOT / "hub_cards" / "mel-llm-small-en"
RATE = 16000


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
    assert align_letters(spell("", [], 3), []) is None and align_letters(spell("", [], 0), list(b"l")) is None


# The second clip ends inside its last place
@pytest.mark.parametrize("seconds", [1.5, 1.497])
def test_cuts_are_where_it_is_quiet_between_words(seconds):
    time = np.arange(round(RATE * seconds)) / RATE
    audio = np.sin(2 * np.pi * 300 * time).astype(np.float32)
    for start, end in ((0.46, 0.5), (0.98, 1.04)):
        audio[round(start * RATE) : round(end * RATE)] *= 0.01
    # 50 places a second, the words' letters around the pauses
    log_probs = spell("one two three", [5, 8, 12, 20, 30, 35, 44, 48, 56, 60, 64, 68, 70], 75)
    words, places = find_cuts(audio, "One, two — three!", log_probs, RATE / 50)
    assert words == ("One,", "two —", "three!")
    assert places[0] == 0 and places[3] == len(audio)
    assert 0.46 <= places[1] / RATE <= 0.5 and 0.98 <= places[2] / RATE <= 1.04
    # What the head does not hear is not cut: neither another text nor one other word
    for text in ("Nobody said any such thing", "One six three", " -- ", ""):
        assert find_cuts(audio, text, log_probs, RATE / 50) is None, text


# --- parts put together -------------------------------------------------------------------------------------------------


def tones(folder: Path, name: str, frequency: float, num_words: int = 5, **fields) -> CutClip:
    """A clip of words of half a second, each a tone of another loudness."""
    time = np.arange(RATE // 2) / RATE
    audio = np.concatenate([0.1 * (word + 1) * np.sin(2 * np.pi * frequency * time) for word in range(num_words)])
    path = folder / f"{name}.wav"
    soundfile.write(path, audio, RATE)
    words = tuple(f"{name}{word}" for word in range(num_words))
    places = tuple(range(0, len(audio) + 1, RATE // 2))
    return CutClip(path, words, places, **{"corpus": "c", "speaker": "s", "language": "en", "source": "x"} | fields)


def test_the_sound_is_that_of_the_words(tmp_path):
    clips = [tones(tmp_path, "a", 300), tones(tmp_path, "b", 700)]
    audio, text, used = splice(clips, 4.0, 8.0, np.random.default_rng(3))
    assert used and set(used) <= set(clips) and 4 <= len(audio) / RATE <= 8
    loud = np.concatenate([[False], np.abs(audio) > 0, [False]])
    assert not np.isnan(audio).any() and loud.any()
    # Each word again, by its pitch and its loudness; pauses are between parts alone
    position = 0
    for word in text.split():
        while not audio[position : position + 200].any():
            position += 100
        part = audio[position : position + RATE // 2][1000:7000]
        frequency = np.abs(np.fft.rfft(part)).argmax() * RATE / len(part)
        assert abs(frequency - {"a": 300, "b": 700}[word[0]]) < 20, word
        assert np.abs(part).max() == pytest.approx(0.1 * (int(word[1]) + 1), rel=0.02), word
        position += RATE // 2


def test_clips_have_one_speaker_and_are_not_longer_than_asked(tmp_path):
    places = itertools.product(("c1", "c2"), ("en", "fr"), ("1", "2"))
    clips = [
        tones(
            tmp_path, f"{corpus}{language}{speaker}{number}x", 300, corpus=corpus, language=language, speaker=speaker
        )
        for corpus, language, speaker in places
        for number in range(2)
    ]
    heard = set()
    for audio, text, used in spliced_clips(clips, 0.05, (1.5, 3.0), seed=0):
        [speaker] = {(clip.corpus, clip.language, clip.speaker) for clip in used}
        assert all(word.startswith("".join(speaker)) for word in text.split())
        assert 1.5 <= len(audio) / RATE <= 3.0 and len(used) >= 2
        heard.add(speaker)
    assert len(heard) == 8


def test_texts_of_tests_are_never_made(tmp_path, monkeypatch):
    clips = [tones(tmp_path, "a", 300, language="fr"), tones(tmp_path, "b", 700, language="fr")]
    asked = []
    monkeypatch.setattr(splicing, "split_of", lambda text, language: asked.append((text, language)) or "test")
    with pytest.raises(ValueError, match="validation or test"):
        next(spliced_clips(clips, 1.0, (3.0, 4.0), 0))
    assert asked and all(text[:1] in "ab" and language == "fr" for text, language in asked)


def test_what_cannot_be_spliced_is_told(tmp_path):
    with pytest.raises(ValueError, match="--corpora: no speaker has two clips"):
        next(spliced_clips([tones(tmp_path, "a", 300)], 1.0, (2.0, 3.0), 0))
    with pytest.raises(ValueError, match="Give more --seconds"):
        next(spliced_clips([tones(tmp_path, "a", 300), tones(tmp_path, "b", 300)], 1.0, (0.1, 0.3), 0))


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
        row |= {"duration": soundfile.info(folder / "train" / row["file_name"]).duration, "speaker": "her"}
    rows[0]["source"] = "somewhere?unverified"
    write_metadata(folder / "train", [{key: row.get(key, "") for key in COLUMNS} for row in rows])
    for file in (ROOT / "demo_clips").glob("[AL]*.*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def model():
    return AutoModelForSpeechSeq2Seq.from_pretrained(MODEL).eval(), AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def spliced(script, corpus):  # noqa: F811
    target = corpus.parent / "made" / "spliced"
    assert run(script, "spliced", "--corpora", corpus, "--model", MODEL, "--output_dir", target, "--hours", 0.02) == 0
    return target


def rows_of(folder):
    return read_metadata(folder / "train")


def test_what_is_spliced_says_its_text(spliced, corpus, model):
    rows, originals = rows_of(spliced), {row["text"]: row["source"] for row in rows_of(corpus)}
    said = {word for text in originals for word in text.split()}
    assert sum(float(row["duration"]) for row in rows) >= 0.02 * 3600
    assert all(row["speaker"] == "her" and float(row["duration"]) <= 12 for row in rows)
    assert {row["source"] for row in rows} <= {"spliced:recordings", "spliced:recordings?unverified"}
    assert {word for row in rows for word in row["text"].split()} <= said
    assert not {row["text"] for row in rows} & originals.keys() and len({row["text"] for row in rows}) == len(rows)
    [report] = check_corpus(spliced)
    assert not report.faults
    # What the head hears in a clip is likest the clip's own text
    clips = [mel_llm.load_audio(spliced / "train" / row["file_name"]) for row in rows[:8]]
    texts = [bytes(ctc_bytes(row["text"])) for row in rows[:8]]
    heard = model[0].get_ctc_log_probs(**model[1](audio=clips))
    for text, log_probs, count in zip(texts, *heard, strict=True):
        letters = bytes(letter for letter, _ in itertools.groupby(log_probs[:count].argmax(-1).tolist()) if letter)
        likeness = {other: SequenceMatcher(None, letters, other, autojunk=False).ratio() for other in texts}
        assert max(likeness, key=likeness.get) == text and likeness[text] > 0.5


def test_a_seed_decides_and_nothing_is_overwritten(script, spliced, corpus):  # noqa: F811
    words = ("spliced", "--corpora", corpus, "--model", MODEL, "--hours", 0.02, "--output_dir")
    with pytest.raises(FileExistsError, match="--output_dir"):
        run(script, *words, spliced)
    for seed, is_same in ((0, True), (1, False)):
        target = spliced.with_name(f"seed{seed}")
        run(script, *words, target, "--seed", seed, "--format", "wav")
        assert ([row["text"] for row in rows_of(target)] == [row["text"] for row in rows_of(spliced)]) is is_same


def test_licences_go_along(spliced, corpus):
    copies = spliced / "LICENCES" / "0-recordings"
    assert {file.name for file in copies.iterdir()} == {"ATTRIBUTION.md", "LICENSE-CC-BY-SA-3.0.txt"}
    for file in copies.iterdir():
        assert file.read_bytes() == (corpus / file.name).read_bytes()
    assert "recordings, whose terms are in" in (spliced / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_terms_that_nobody_knows_are_told(tmp_path, caplog):
    """And those that lie beside all corpora are found, in folders too; the corpora may be called alike."""
    for name in ("one/speech", "two/speech"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "one" / "LICENCES").mkdir()
    (tmp_path / "one" / "LICENCES" / "CC0.txt").write_text("take it")
    (tmp_path / "new").mkdir()
    with caplog.at_level(logging.WARNING):
        splicing._copy_licences([tmp_path / "one/speech", tmp_path / "two/speech"], tmp_path / "new")
    assert (tmp_path / "new/LICENCES/0-speech/LICENCES/CC0.txt").read_text() == "take it"
    assert "two/speech: there is no ATTRIBUTION.md or licence" in caplog.text and "one/speech" not in caplog.text


def test_what_was_interrupted_leaves_nothing(script, corpus, monkeypatch):  # noqa: F811
    target, written = corpus.parent / "broken", []

    def write(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_clip(*arguments)

    write_clip = splicing.write_clip
    words = ("spliced", "--corpora", corpus, "--model", MODEL, "--hours", 0.01, "--output_dir", target)
    before = sorted(corpus.parent.iterdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(splicing, "write_clip", write)
        run(script, *words)
    assert len(written) == 3 and sorted(corpus.parent.iterdir()) == before
    run(script, *words)
    assert {row["file_name"] for row in rows_of(target)} == {file.name for file in (target / "train").glob("*.flac")}


def test_clips_of_a_speaker_are_from_all_over(corpus, model, monkeypatch):
    rows = rows_of(corpus)
    monkeypatch.setattr(splicing, "_CLIPS_OF_A_SPEAKER", len(rows) - 1)
    heard = []
    monkeypatch.setattr(splicing, "find_cuts", lambda audio, text, *_: heard.append(text))
    cut_corpus(corpus, *model)
    assert len(heard) == len(rows) - 1 and {rows[0]["text"], rows[-1]["text"]} <= set(heard)


def test_tables_that_say_little(corpus, model, tmp_path, caplog):
    """Without durations and speakers, at the top of the folder; what is too long is left out and counted."""
    rows = rows_of(corpus)
    for row in rows:
        shutil.copyfile(corpus / "train" / row["file_name"], tmp_path / row["file_name"])
    soundfile.write(tmp_path / "long.wav", np.zeros(60 * RATE), RATE)
    table = [
        "file_name,text",
        *(f'{row["file_name"]},"{row["text"]}"' for row in rows),
        "long.wav,So long.",
        f"{rows[0]['file_name']},",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    with caplog.at_level(logging.INFO):
        clips = cut_corpus(tmp_path, *model)
    assert [clip.words for clip in clips] == [clip.words for clip in cut_corpus(corpus, *model)]
    assert f"{len(clips)} of {len(rows)} clips can be cut; 1 more are longer" in caplog.text
    assert "no named speaker" in caplog.text
    (tmp_path / "metadata.csv").write_text("file_name,text\nnone.wav,Nothing.\n")
    with pytest.raises(ValueError, match="--corpora: .*none.wav has no duration"):
        cut_corpus(tmp_path, *model)


def test_arguments_that_cannot_be_are_told_first(script, corpus, tmp_path, tokenizer):  # noqa: F811
    words = ("spliced", "--corpora", corpus, "--model", MODEL, "--output_dir", tmp_path / "new")
    with pytest.raises(ValueError, match="--hours must be more than 0"):
        run(script, *words, "--hours", 0)
    with pytest.raises(ValueError, match="--seconds must be two numbers"):
        run(script, *words, "--hours", 1, "--seconds", 5, 2)
    with pytest.raises(FileNotFoundError, match="--corpora: .*none has no metadata.csv"):
        run(script, *words, "--hours", 1, "--corpora", tmp_path / "none")
    model, processor = build_tiny(tokenizer)
    model.save_pretrained(tmp_path / "tiny"), processor.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="--model: .*tiny is no Mel-LLM with a CTC head"):
        run(script, *words, "--hours", 1, "--model", tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
