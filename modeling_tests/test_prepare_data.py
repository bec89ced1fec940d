"""scripts/prepare_data.py: corpora out of packages, synthetic speech that goes on where it stopped, and checks."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, load_script


sys.path.insert(0, str(ROOT / "scripts"))

from speech_data.asterisk import clean_text, prepare_asterisk
from speech_data.check import check_corpus, find_corpora, format_table
from speech_data.clip_faults import clip_fault
from speech_data.corpus import write_clip, write_metadata
from speech_data.debian import find_packages, read_package
from speech_data.engines import EngineMissing, EngineOptions, make_engine
from speech_data.engines.base import SpeechEngine
from speech_data.g722 import _bundled_ffmpeg, find_g722_decoder
from speech_data.held_out import is_held_out_voice, split_of
from speech_data.synthesis import JOURNAL, Synthesis, SynthesisPlan, available_engines, choose_voices
from speech_data.texts import load_sentences


# One of each, as the prompts have them
VALIDATION_TEXT, TEST_TEXT, RESERVED_TEXT = (
    "Calling.",
    "Login incorrect. Please enter your agent number",
    "Invalid Choice",
)
TEST_TEXT += " followed by the pound key."
NO_OPTIONS = EngineOptions()


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_data")


def run(script, *words) -> int:
    arguments = script.build_parser().parse_args([str(word) for word in words])
    return arguments.run(arguments)


def tone(seconds: float, frequency: float = 300.0, level: float = 0.5) -> np.ndarray:
    time = np.arange(round(16000 * seconds)) / 16000
    return (level * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- what is held out ---------------------------------------------------------------------------------------------------


def test_held_out_texts_are_found_however_they_are_written():
    for text in (VALIDATION_TEXT, "calling", "  CALLING!  ", "“Calling…”"):
        assert split_of(text, "en") == "validation"
    assert split_of(TEST_TEXT, "en-us") == "test" and split_of(RESERVED_TEXT, "en") == "reserved"
    assert split_of("Calling all of you.", "en") == "train"
    assert split_of(VALIDATION_TEXT, "de") == "train"  # said in another language it is another text


def test_accents_and_apostrophes_do_not_hide_a_text():
    text = "Échec à l'ouverture de session. Veuillez recomposez votre numéro d'agent suivi du dièse."
    assert split_of(text, "fr") == "validation"
    assert split_of(text.replace("É", "E").replace("è", "e").replace("'", "’"), "fr") == "validation"


def test_the_demo_clips_may_be_trained_on(speech_clips):
    assert {split_of(clip["text"], "en") for clip in speech_clips} == {"train"}


@pytest.mark.parametrize(
    "name", ["bf_isabella", "am_fenrir", "rms", "flite_cmu_us_rms", "en_US-arctic-medium:rms", "ked"]
)
def test_held_out_voices(name):
    assert is_held_out_voice(name)


@pytest.mark.parametrize("name", ["af_bella", "slt", "piper_en_US_joe", "espeak_en-gb+m1", "kedar", "norms"])
def test_other_voices(name):
    assert not is_held_out_voice(name)


# --- packages -----------------------------------------------------------------------------------------------------------


def make_deb(path: Path, files: dict[str, bytes], compression: str = "xz") -> None:
    """A Debian package as dpkg-deb makes it, with an odd member before the data."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=f"w:{compression}") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", b"odd"),
        (f"data.tar.{compression}", archive.getvalue()),
    ]
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, data in members:
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode())
            file.write(data + b"\n" * (len(data) % 2))


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_files_of_a_package(tmp_path, compression):
    make_deb(
        tmp_path / "a_1_all.deb", {"usr/a.txt": b"first", "usr/share/b.txt": b"second", "usr/c": b""}, compression
    )
    assert read_package(tmp_path / "a_1_all.deb", r"usr/.*\.txt") == {
        "usr/a.txt": b"first",
        "usr/share/b.txt": b"second",
    }


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="Debian's own program is not here to compare with")
def test_debians_own_program_makes_what_is_read(tmp_path):
    (tmp_path / "p" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "p" / "usr").mkdir()
    (tmp_path / "p" / "usr" / "a.txt").write_text("first")
    control = "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: N <n@example.org>\nDescription: d\n"
    (tmp_path / "p" / "DEBIAN" / "control").write_text(control)
    for kind in ("xz", "zstd"):
        deb = tmp_path / f"p_1_{kind}.deb"
        command = ["dpkg-deb", f"-Z{kind}", "--root-owner-group", "-b", str(tmp_path / "p"), str(deb)]
        if subprocess.run(command, capture_output=True).returncode == 0:  # older ones know no zstd
            assert read_package(deb, "usr/.*") == {"usr/a.txt": b"first"}


@pytest.mark.parametrize("damage", ["half", "header", "text"])
def test_a_damaged_package_is_named(tmp_path, damage):
    path = tmp_path / "a_1_all.deb"
    make_deb(path, {"usr/a.txt": bytes(1000)})
    data = path.read_bytes()
    path.write_bytes({"half": data[:-60], "header": data[:100], "text": b"no package at all"}[damage])
    with pytest.raises(ValueError, match="a_1_all.deb"):
        read_package(path, ".*")


def test_packages_that_are_not_there_are_named(tmp_path):
    make_deb(tmp_path / "here_1.0_all.deb", {})
    with pytest.raises(FileNotFoundError, match=r"no \.deb file of missing"):
        find_packages(["here", "missing"], tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="--debs"):
        find_packages(["here"], tmp_path / "nowhere", tmp_path)


def test_without_apt_the_user_is_told_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"here, there.*--debs"):
        find_packages(["here", "there"], None, tmp_path)


def test_g722_sounds_as_before(tmp_path):
    program = shutil.which("ffmpeg") or _bundled_ffmpeg()
    soundfile.write(tmp_path / "in.wav", tone(0.5), 16000)
    command = [program, "-v", "error", "-i", str(tmp_path / "in.wav"), "-c:a", "g722", "-f", "g722"]
    subprocess.run([*command, str(tmp_path / "out.g722")], check=True)
    decoded = find_g722_decoder()((tmp_path / "out.g722").read_bytes())
    assert decoded.dtype == np.int16 and abs(len(decoded) - 8000) <= 2
    spectrum = np.abs(np.fft.rfft(decoded[1000:7000] / 32768))
    assert np.argmax(spectrum) * 16000 / 6000 == pytest.approx(300, abs=4)
    assert decoded[1000:7000].max() / 32768 == pytest.approx(0.5, abs=0.05)


def test_what_to_install_for_g722(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for module in ("av", "G722", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install av.*ffmpeg"):
        find_g722_decoder()


# --- telephone prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "written", "said"),
    [
        ("en", "at [@]", "At"),
        ("en", "... for ...", "For"),
        ("en", "a", "a"),
        ("en", "press * or #  to  go", "Press star or pound to go"),
        ("en", "tone (note: not said)", "Tone"),
        ("en", 'a "quoted" word', 'A "quoted" word'),
        ("fr", "... pour quitter la conférence.\"", "pour quitter la conférence."),
        ("ru", "Нажмите «звёздочку»…", "Нажмите звёздочку"),
        ("en", "[sound of monkeys screaming]", ""),
    ],
)  # fmt: skip
def test_transcripts_are_what_is_said(language, written, said):
    assert clean_text(written, language) == said


def as_bytes(audio: np.ndarray) -> bytes:
    return (audio * 32767).astype("<i2").tobytes()


def decode_pcm(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<i2")


@pytest.fixture
def debs(tmp_path):
    """Both packages of a language; their sound is PCM, so that no encoder is needed."""
    prompts = {
        "hello": ("Hello there.", tone(1.0)),
        "digits/30": ("thirty", tone(0.8, 400)),
        "calling": (VALIDATION_TEXT, tone(0.7, 500)),
        "login": (TEST_TEXT, tone(3.0, 600)),
        "errormenu": (RESERVED_TEXT, tone(0.9, 700)),
        "beep": ("[a beep]", tone(0.3)),
        "mute": ("Nothing is to be heard.", tone(1.0, level=0.001)),
        "endless": ("This goes on and on.", tone(31.0)),
        "unwritten": (None, tone(0.6)),
        "demo-congrats": ("One. Two. Three. Four! Five five five.", tone(30.0, 350)),
    }
    sounds = {
        f"usr/share/asterisk/sounds/en_US_f_Someone/{name}.g722": as_bytes(audio)
        for name, (_, audio) in prompts.items()
    }
    written = [f"{name}: {text}" for name, (text, _) in prompts.items() if text is not None]
    transcripts = gzip.compress("\n".join(["\ufeff; a comment: no prompt", "", *written, "hello: No."]).encode())
    folder = tmp_path / "debs"
    folder.mkdir()
    copyright_file = {"usr/share/doc/asterisk-core-sounds-en-g722/copyright": b"All about it"}
    make_deb(folder / "asterisk-core-sounds-en-g722_1.6.1-1_all.deb", {**sounds, **copyright_file})
    documents = {"usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": transcripts}
    make_deb(folder / "asterisk-core-sounds-en_1.6.1-1_all.deb", documents)
    return folder


def test_a_corpus_out_of_packages(debs, tmp_path):
    folder = prepare_asterisk("en", tmp_path / "speech", decode_pcm, debs)
    assert folder == tmp_path / "speech" / "asterisk-en"
    assert [path.name for path in (tmp_path / "speech").iterdir()] == ["asterisk-en"]
    texts = {split: {row["text"] for row in rows_of(folder / split)} for split in ("train", "validation", "test")}
    assert texts == {
        "train": {"Hello there.", "Thirty", "One. Two. Three. Four!", "Five five five."},
        "validation": {VALIDATION_TEXT},
        "test": {TEST_TEXT},
    }
    row = next(row for row in rows_of(folder / "train") if row["text"] == "Thirty")
    assert row["file_name"] == "en_digits_30.flac" and row["speaker"] == "en_US_f_Someone" and row["language"] == "en"
    assert row["source"] == "debian:asterisk-core-sounds-en-g722_1.6.1-1/digits/30" and row["duration"] == "0.800"
    sound, rate = soundfile.read(folder / "train" / row["file_name"], dtype="int16")
    assert rate == 16000 and sound.tobytes() == as_bytes(tone(0.8, 400))
    parts = [float(row["duration"]) for row in rows_of(folder / "train") if "#part" in row["source"]]
    assert len(parts) == 2 and sum(parts) == pytest.approx(30.0, abs=0.01)
    assert "CC-BY-SA-3.0" in (folder / "ATTRIBUTION.md").read_text()
    assert (folder / "LICENCE").read_text() == "All about it"
    assert [fault for report in check_corpus(folder) for fault in report.faults] == []


def test_a_corpus_that_is_there_stays_as_it_is(script, debs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(script, "find_g722_decoder", lambda: decode_pcm)
    words = ["real", "--output-dir", tmp_path / "speech", "--debs", debs, "--format", "wav"]
    assert run(script, *words) == 0
    (tmp_path / "speech" / "asterisk-en" / "mine").write_text("kept")
    with caplog.at_level("INFO"):
        assert run(script, *words) == 0
    assert "is there already" in caplog.text
    assert (tmp_path / "speech" / "asterisk-en" / "mine").read_text() == "kept"
    with pytest.raises(FileExistsError, match="asterisk-en"):
        prepare_asterisk("en", tmp_path / "speech", decode_pcm, debs)


def test_nothing_is_left_of_a_corpus_that_failed(debs, tmp_path):
    def fail(data):
        raise ValueError("no sound")

    with pytest.raises(ValueError, match="no sound"):
        prepare_asterisk("en", tmp_path / "speech", fail, debs)
    assert list((tmp_path / "speech").iterdir()) == []


# --- synthetic speech ---------------------------------------------------------------------------------------------------


class FakeEngine(SpeechEngine):
    """Tones as long as the text; the pitch tells the voice."""

    name = "python:fake_engine.make"
    names = ("ada", "bob", "rms")

    def __init__(self, options=None, stop_after=None):
        self.left = stop_after

    def voices(self):
        return list(self.names)

    def speaker(self, voice):
        return f"fake_{voice}"

    def speak(self, text, voice, speed):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        if "unspeakable" in text:
            raise ValueError("no")
        if "mute" in text:
            return np.zeros(8000, np.int16), 8000
        # At a rate of its own
        seconds = 0.06 * len(text) / speed
        time = np.arange(round(8000 * seconds)) / 8000
        return (16000 * np.sin(2 * np.pi * (200 + 100 * self.names.index(voice)) * time)).astype(np.int16), 8000


SENTENCES = [f"This is sentence {number} of a few, and no other." for number in range(8)]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text(
        "\n".join([*SENTENCES, "An unspeakable one.", "A mute one.", TEST_TEXT, RESERVED_TEXT, SENTENCES[0]])
    )
    return path


def make_synthesis(folder, texts, engine=None, suffix=".wav", seed=0):
    sentences, digest = load_sentences(texts)
    engine = engine or FakeEngine()
    voices = choose_voices({engine.name: engine}, [])
    plan = SynthesisPlan(tuple(sentences), tuple(voices), seed=seed)
    return Synthesis(plan, folder, {"texts": digest}, suffix), {engine.name: engine}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sentences_that_are_kept_for_tests_are_left_out(texts, tmp_path, caplog):
    with caplog.at_level("INFO"):
        sentences, _ = load_sentences(texts)
    assert "2 kept for tests, 1 repeated" in caplog.text
    assert [sentence.text for sentence in sentences] == [*SENTENCES, "An unspeakable one.", "A mute one."]
    (tmp_path / "only.txt").write_text(f"{TEST_TEXT.upper()}\n{VALIDATION_TEXT}\n")
    with pytest.raises(ValueError, match="no sentence that may be spoken"):
        load_sentences(tmp_path / "only.txt")


def test_sentences_with_their_sources(tmp_path):
    (tmp_path / "s.tsv").write_text('text\tsource\tlicence\n"Yes", he said.\tbook\tCC0\n')
    (sentence,), _ = load_sentences(tmp_path / "s.tsv")
    assert (sentence.text, sentence.source, sentence.licence) == ('"Yes", he said.', "book", "CC0")
    (tmp_path / "t.tsv").write_text("sentence\nHello.\n")
    with pytest.raises(ValueError, match="no column `text`"):
        load_sentences(tmp_path / "t.tsv")


def test_voices_that_are_kept_for_tests_are_refused(caplog):
    engines = {"fake": FakeEngine()}
    with caplog.at_level("INFO"):
        assert [voice.name for voice in choose_voices(engines, [])] == ["ada", "bob"]
    assert "fake:rms" in caplog.text
    assert [voice.name for voice in choose_voices(engines, ["fake:*"])] == ["ada", "bob"]
    assert [voice.name for voice in choose_voices(engines, ["bob"])] == ["bob"]
    for name in ("rms", "fake:rms", "kokoro:am_fenrir"):
        with pytest.raises(ValueError, match="kept for tests"):
            choose_voices(engines, [name])
    with pytest.raises(ValueError, match="kept for tests"):
        choose_voices(engines, ["r*"])
    with pytest.raises(ValueError, match=r"no fake:eve.*ada, bob"):
        choose_voices(engines, ["ada", "fake:eve"])


def test_a_plan_is_fair_and_its_seed_alone_decides(texts, tmp_path):
    plan = make_synthesis(tmp_path / "a", texts)[0].plan
    again = make_synthesis(tmp_path / "a", texts)[0].plan
    other = make_synthesis(tmp_path / "a", texts, seed=1)[0].plan
    clips = [plan[index] for index in range(len(plan))]
    assert clips == [again[index] for index in range(len(again))] != [other[index] for index in range(len(other))]
    assert len(clips) == 20  # ten sentences, two voices
    assert Counter(clip.voice.name for clip in clips) == {"ada": 10, "bob": 10}
    assert set(Counter(clip.sentence.text for clip in clips[:10]).values()) == {1}
    assert len({(clip.sentence, clip.voice) for clip in clips}) == 20
    speeds = [clip.speed for clip in clips]
    assert min(speeds) >= 0.9 and max(speeds) <= 1.1 and len(set(speeds)) > 10
    with pytest.raises(ValueError, match="--speeds"):
        SynthesisPlan(plan.sentences, plan.voices, 0, 1.2, 1.1)


def test_speech_is_made_until_there_is_enough(texts, tmp_path):
    synthesis, engines = make_synthesis(tmp_path / "out", texts)
    synthesis.run(15 / 3600, engines, NO_OPTIONS)
    rows = rows_of(tmp_path / "out" / "train")
    seconds = [float(row["duration"]) for row in rows]
    assert sum(seconds[:-1]) < 15 <= sum(seconds)
    assert not any("unspeakable" in row["text"] or "mute" in row["text"] for row in rows)
    assert {row["speaker"] for row in rows} == {"fake_ada", "fake_bob"} and rows[0]["language"] == "en"
    assert rows[0]["source"] == "synth:fake_engine.make text=sentences"
    for row in rows:
        audio, rate = soundfile.read(tmp_path / "out" / "train" / row["file_name"])
        assert rate == 16000 and len(audio) / rate == pytest.approx(float(row["duration"]), abs=0.001)
    assert check_corpus(tmp_path / "out")[0].faults == []


@pytest.mark.parametrize("damage", ["none", "line cut off", "clip without line", "table lost"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(texts, tmp_path, damage):
    whole, engines = make_synthesis(tmp_path / "whole", texts)
    whole.run(20 / 3600, engines, NO_OPTIONS)
    stopped, engines = make_synthesis(tmp_path / "parts", texts, FakeEngine(stop_after=4))
    with pytest.raises(KeyboardInterrupt):
        stopped.run(20 / 3600, engines, NO_OPTIONS)
    folder = tmp_path / "parts"
    listed = rows_of(folder / "train")
    assert 1 <= len(listed) <= 4 and all((folder / "train" / row["file_name"]).is_file() for row in listed)
    journal = (folder / JOURNAL).read_bytes()
    if damage == "line cut off":
        (folder / JOURNAL).write_bytes(journal[:-25])
    elif damage == "clip without line":
        *before, last = journal.splitlines(keepends=True)
        (folder / JOURNAL).write_bytes(b"".join(before))
        (folder / "train" / f".partial-{json.loads(last)['row']['file_name']}").write_bytes(b"half")
    elif damage == "table lost":
        (folder / "train" / "metadata.csv").unlink()
    engine = FakeEngine()
    rest, engines = make_synthesis(folder, texts, engine)
    rest.run(20 / 3600, engines, NO_OPTIONS)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_that_is_done_can_be_made_longer(texts, tmp_path):
    synthesis, engines = make_synthesis(tmp_path / "a", texts)
    synthesis.run(20 / 3600, engines, NO_OPTIONS)
    for hours in (8 / 3600, 8 / 3600, 20 / 3600):
        synthesis, engines = make_synthesis(tmp_path / "b", texts)
        synthesis.run(hours, engines, NO_OPTIONS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_run_does_not_go_on_in_the_same_folder(texts, tmp_path):
    synthesis, engines = make_synthesis(tmp_path / "out", texts)
    synthesis.run(5 / 3600, engines, NO_OPTIONS)
    with pytest.raises(ValueError, match="begun with other seed"):
        make_synthesis(tmp_path / "out", texts, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="holds something else"):
        make_synthesis(tmp_path / "mine", texts)
    next((tmp_path / "out" / "train").glob("*.wav")).unlink()
    with pytest.raises(ValueError, match="is missing"):
        make_synthesis(tmp_path / "out", texts)


def test_texts_that_run_out_are_told_and_what_there_is_is_kept(texts, tmp_path):
    synthesis, engines = make_synthesis(tmp_path / "out", texts)
    with pytest.raises(ValueError, match="every voice has said every text"):
        synthesis.run(10, engines, NO_OPTIONS)
    rows = rows_of(tmp_path / "out" / "train")
    assert len({(row["text"], row["speaker"]) for row in rows}) == len(rows) == 2 * len(SENTENCES)


def test_an_engine_that_always_fails_is_told(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(f"unspeakable {number}" for number in range(40)))
    synthesis, engines = make_synthesis(tmp_path / "out", tmp_path / "t.txt")
    with pytest.raises(ValueError, match="clips failed one after another, the last because ValueError: no"):
        synthesis.run(1, engines, NO_OPTIONS)


@pytest.mark.slow
def test_several_processes_make_the_same(script, texts, tmp_path, monkeypatch):
    (tmp_path / "fake_engine.py").write_text(
        "from test_prepare_data import FakeEngine as make_engine\n\ndef make(options):\n    return make_engine()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for workers in (1, 2):
        words = ["synthetic", "--texts", texts, "--output_dir", tmp_path / f"out{workers}", "--format", "wav"]
        words += ["--engines", FakeEngine.name, "--hours", 20 / 3600, "--workers", workers, "--seed", 3]
        assert run(script, *words) == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len(rows_of(tmp_path / "out1" / "train")) >= 5


@pytest.mark.parametrize(
    ("audio", "fault"),
    [
        (tone(1.5), None),
        (np.zeros(16000, np.float32), "silent"),
        (np.zeros(0, np.float32), "empty"),
        (np.full(16000, np.nan, np.float32), "finite"),
        (np.clip(tone(1.5, level=3.0), -1, 1), "clipped"),
        (tone(0.2), "not plausible"),
        (tone(20.0), "not plausible"),
    ],
)
def test_clips_that_cannot_be_right(audio, fault):
    found = clip_fault(audio, "Twenty-five letters here.")
    assert found is None if fault is None else fault in found


def test_engines_that_are_missing_are_told_and_the_rest_goes_on(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    for module in ("piper", "kokoro_onnx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "fake_engine", types.SimpleNamespace(make=lambda options: FakeEngine()))
    names = ["espeak", "flite", "piper", "kokoro", FakeEngine.name]
    assert list(available_engines(names, NO_OPTIONS)) == [FakeEngine.name]
    for hint in (
        "apt-get install espeak-ng",
        "apt-get install flite",
        "pip install piper-tts",
        "pip install kokoro-onnx",
    ):
        assert hint in caplog.text
    with pytest.raises(ValueError, match="none can be used here"):
        available_engines(["espeak"], NO_OPTIONS)
    with pytest.raises(ValueError, match="there is no 'festival'"):
        available_engines(["festival"], NO_OPTIONS)


PROGRAM = """#!{python}
import json, shutil, sys
if sys.argv[1:] == ["-lv"]:
    print("Voices available: kal awb_time kal16 awb rms slt ")
    sys.exit()
with open({log!r}, "w") as file:
    json.dump([sys.argv[1:], "" if "-t" in sys.argv else sys.stdin.read()], file)
if "-o" in sys.argv:
    shutil.copy({wav!r}, sys.argv[sys.argv.index("-o") + 1])
else:
    sys.stdout.buffer.write(open({wav!r}, "rb").read())
sys.exit("broken" in str(sys.argv) and "it broke" or 0)
"""


@pytest.mark.parametrize("name", ["espeak-ng", "flite"])
def test_programs_are_called_as_they_want_to_be(name, tmp_path, monkeypatch):
    wav, log = tmp_path / "said.wav", tmp_path / "log.json"
    soundfile.write(wav, tone(0.5), 16000)
    program = tmp_path / name
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log), wav=str(wav)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = make_engine(name.removesuffix("-ng"), NO_OPTIONS)
    text = "--help; $HOME 'and' \"more\""  # neither an option nor the shell's
    audio, rate = engine.speak(text, "en-us+f2" if name == "espeak-ng" else "slt", 1.25)
    assert rate == 16000 and audio.dtype == np.int16 and len(audio) == 8000
    words, stdin = json.loads(log.read_text())
    if name == "espeak-ng":
        assert stdin == text and words[words.index("-s") + 1] == "219" and "en-us+f2" in words
        assert len(set(engine.voices())) == 24
    else:
        assert words[words.index("-t") + 1] == text and "duration_stretch=0.8000" in words
        assert engine.voices() == ["awb", "kal16", "rms", "slt"] and engine.speaker("slt") == "flite_cmu_us_slt"
    with pytest.raises(ValueError, match="it broke"):
        engine.speak("broken", "broken", 1.0)


def test_pipers_voices(tmp_path, monkeypatch):
    spoken = []

    class PiperVoice:
        def __init__(self, session, config):
            self.session, self.config = session, config

        def synthesize(self, text, syn_config):
            assert self.session == (str(tmp_path / self.config["name"]), 1)  # thread
            spoken.append(syn_config)
            return [types.SimpleNamespace(audio_int16_array=np.ones(5, np.int16), sample_rate=22050)] * 2

    module = types.SimpleNamespace(
        PiperVoice=PiperVoice,
        SynthesisConfig=lambda **fields: fields,
        PiperConfig=types.SimpleNamespace(from_dict=dict),
    )
    monkeypatch.setitem(sys.modules, "piper", module)
    runtime = types.SimpleNamespace(
        SessionOptions=types.SimpleNamespace,
        InferenceSession=lambda file, options, providers: (file, options.intra_op_num_threads),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    config = {"espeak": {"voice": "en-us"}, "inference": {"length_scale": 1.2}, "num_speakers": 1}
    several = {**config, "num_speakers": 2, "speaker_id_map": {"rms": 0, "eey": 1}}
    for name, content in (("en_US-joe-medium", config), ("en_US-arctic-medium", several)):
        (tmp_path / f"{name}.onnx").write_bytes(b"")
        (tmp_path / f"{name}.onnx.json").write_text(json.dumps({**content, "name": f"{name}.onnx"}))
    files = tuple(sorted(tmp_path.glob("*.onnx")))
    engine = make_engine("piper", EngineOptions(piper_voices=files))
    assert engine.voices() == ["en_US-arctic-medium:eey", "en_US-arctic-medium:rms", "en_US-joe-medium"]
    speakers = {voice.speaker for voice in choose_voices({"piper": engine}, [])}
    assert speakers == {"piper_en_US_arctic_eey", "piper_en_US_joe"}
    audio, rate = engine.speak("Hello.", "en_US-arctic-medium:eey", 1.2)
    assert len(audio) == 10 and rate == 22050
    fields = {"length_scale": pytest.approx(1.0), "noise_scale": 0.667, "noise_w_scale": 0.8}  # Piper's own defaults
    assert spoken == [{"speaker_id": 1, **fields}]
    make_engine("piper", EngineOptions(piper_voices=files, piper_variation=0.0)).speak(
        "Hello.", "en_US-joe-medium", 1.0
    )
    assert spoken[1] == {"speaker_id": None, "length_scale": 1.2, "noise_scale": 0.0, "noise_w_scale": 0.0}
    (tmp_path / "es_MX-x.onnx.json").write_text(json.dumps({"espeak": {"voice": "es"}}))
    (tmp_path / "es_MX-x.onnx").write_bytes(b"")
    for name, message in (("es_MX-x", "speaks es"), ("none", "needs its none.onnx.json")):
        with pytest.raises(ValueError, match=message):
            make_engine("piper", EngineOptions(piper_voices=(tmp_path / f"{name}.onnx",)))


def test_kokoros_voices(tmp_path, monkeypatch):
    made = []

    class Kokoro:
        def __init__(self, model, voices):
            made.append((Path(model).read_bytes(), sorted(np.load(voices).files)))

        def create(self, text, voice, speed, lang):
            made.append((voice.shape, speed, lang))
            return np.ones(4, np.float32), 24000

    monkeypatch.setitem(sys.modules, "kokoro_onnx", types.SimpleNamespace(Kokoro=Kokoro))
    with pytest.raises(EngineMissing, match="--kokoro_voices"):
        make_engine("kokoro", NO_OPTIONS)
    for name in ("af_heart", "bf_emma", "am_fenrir", "zf_xiaoni"):
        np.zeros((510, 1, 256), np.float32).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "model.onnx").write_bytes(b"weights")
    engine = make_engine("kokoro", EngineOptions(kokoro_model=tmp_path / "model.onnx", kokoro_voices=tmp_path))
    assert [voice.name for voice in choose_voices({"kokoro": engine}, [])] == ["af_heart", "bf_emma"]
    assert made == []  # the model is loaded by the first clip
    engine.speak("Hello.", "bf_emma", 1.1)
    assert made == [(b"weights", ["af_heart"]), ((510, 1, 256), 1.1, "en-gb")]
    with pytest.raises(ValueError, match="--kokoro_voices"):
        make_engine("kokoro", EngineOptions(kokoro_model=tmp_path / "model.onnx", kokoro_voices=tmp_path / "no"))


def test_kokoros_voices_are_mixed_into_new_ones(tmp_path, monkeypatch):
    spoken = []

    class Kokoro:
        def __init__(self, model, voices):
            pass

        def create(self, text, voice, speed, lang):
            spoken.append((float(voice.mean()), lang))
            return np.ones(4, np.float32), 24000

    monkeypatch.setitem(sys.modules, "kokoro_onnx", types.SimpleNamespace(Kokoro=Kokoro))
    levels = {"af_heart": 1.0, "bf_emma": 2.0, "am_fenrir": 100.0, "zf_xiaoni": 3.0}
    for name, level in levels.items():
        np.full((510, 1, 256), level, np.float32).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "model.onnx").write_bytes(b"weights")

    def mixtures(count):
        options = EngineOptions(kokoro_model=tmp_path / "model.onnx", kokoro_voices=tmp_path, kokoro_mixtures=count)
        engine = make_engine("kokoro", options)
        return engine, {voice.name for voice in choose_voices({"kokoro": engine}, ["kokoro:*+*"])}

    engine, names = mixtures(4)
    pairs = {tuple(name.rpartition(".")[0].split("+")) for name in names}
    # English voices with any other, but not with those that only tests hear
    assert pairs == {
        (first, second) for first in ("af_heart", "bf_emma") for second in ("af_heart", "bf_emma", "zf_xiaoni")
    } - {("af_heart", "af_heart"), ("bf_emma", "bf_emma")}
    for name in names:
        pair, _, per_cent = name.rpartition(".")
        first, second = pair.split("+")
        assert 30 <= int(per_cent) <= 50
        engine.speak("Hello.", name, 1.0)
        level, accent = spoken.pop()
        expected = levels[first] + int(per_cent) / 100 * (levels[second] - levels[first])
        assert level == pytest.approx(expected, abs=1e-3) and accent == {"a": "en-us", "b": "en-gb"}[first[0]]
    assert mixtures(2)[1] < names  # more voices leave those that there were
    with pytest.raises(ValueError, match="--kokoro_mixtures must be from 0 to 4 with these voices, got 5"):
        mixtures(5)


# --- checking -----------------------------------------------------------------------------------------------------------


def make_corpus(folder: Path, texts: dict[str, list[str]], speaker: str = "someone") -> None:
    frequency = 200
    for split, of_split in texts.items():
        (folder / split).mkdir(parents=True)
        rows = []
        for number, text in enumerate(of_split):
            frequency += 20
            write_clip(folder / split / f"{split}{number}.flac", tone(1.0, frequency))
            rows.append(
                {
                    "file_name": f"{split}{number}.flac",
                    "text": text,
                    "speaker": speaker,
                    "language": "en",
                    "duration": 1,
                }
            )
        write_metadata(folder / split, rows)
    (folder / "LICENSE").write_text("CC0")


@pytest.fixture
def corpus(tmp_path):
    make_corpus(tmp_path / "speech" / "mine", {"train": SENTENCES[:4], "test": SENTENCES[4:6]})
    return tmp_path / "speech" / "mine"


def faults(corpus: Path) -> list[str]:
    return [fault for report in check_corpus(corpus) for fault in report.faults]


def change(corpus: Path, number: int, **cells) -> None:
    rows = rows_of(corpus / "train")
    rows[number].update(cells)
    write_metadata(corpus / "train", rows)


def test_a_corpus_that_is_right(corpus, script, capsys):
    assert faults(corpus) == []
    assert run(script, "check", corpus.parent) == 0
    out = capsys.readouterr().out
    assert "Nothing is wrong." in out and "| mine   | train | 4     | 0.001 | 1      | 1.00     |" in out
    assert find_corpora(corpus) == [corpus] == find_corpora(corpus.parent)


@pytest.mark.parametrize("text", [TEST_TEXT, VALIDATION_TEXT, RESERVED_TEXT, SENTENCES[4].upper()])
def test_texts_of_tests_are_found_in_train(corpus, text):
    change(corpus, 1, text=text)
    assert len(faults(corpus)) == 1 and "train1.flac" in faults(corpus)[0]


def test_voices_of_tests_are_found_in_train_alone(corpus, tmp_path):
    change(corpus, 2, speaker="flite_cmu_us_rms")
    assert faults(corpus) == ["train/train2.flac: the voice flite_cmu_us_rms is kept for tests"]
    make_corpus(tmp_path / "other", {"test": SENTENCES[:2]}, speaker="kokoro_bf_isabella")
    assert faults(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda corpus: change(corpus, 0, duration=1.2), "1.000 s, and metadata.csv says 1.200"),
        (lambda corpus: change(corpus, 0, text="..."), "no text"),
        (lambda corpus: (corpus / "train" / "train0.flac").unlink(), "there is no such file"),
        (lambda corpus: (corpus / "train" / "train0.flac").write_bytes(b"fLaC and no more"), "cannot be read"),
        (lambda corpus: (corpus / "LICENSE").unlink(), "no licence"),
        (lambda corpus: write_clip(corpus / "train" / "more.flac", tone(0.5)), "train/more.flac: in no row"),
        (lambda corpus: write_clip(corpus / "train" / "train0.flac", tone(1.0, level=0.001)), "it is silent"),
        (
            lambda corpus: soundfile.write(corpus / "train" / "train0.flac", tone(1.0, 700)[::2], 8000),
            "8000 Hz and not 16000",
        ),
        (
            lambda corpus: shutil.copy(corpus / "test" / "test0.flac", corpus / "train" / "train0.flac"),
            "test/test0.flac: the same sound as train/train0.flac",
        ),
        (
            lambda corpus: write_metadata(
                corpus / "train", [*rows_of(corpus / "train"), rows_of(corpus / "train")[0]]
            ),
            "train/train0.flac: 2 rows",
        ),
    ],
)
def test_planted_faults_are_found(corpus, script, capsys, plant, message):
    plant(corpus)
    found = faults(corpus)
    assert len(found) == 1 and message in found[0]
    assert run(script, "check", corpus) == 1
    assert message in capsys.readouterr().out


def test_a_folder_without_a_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv"):
        find_corpora(tmp_path)


def test_the_table_counts(corpus):
    reports = check_corpus(corpus)
    assert [(report.split, report.clips, report.voices) for report in reports] == [("train", 4, 1), ("test", 2, 1)]
    assert reports[0].seconds == pytest.approx(4.0) and reports[0].median_seconds == pytest.approx(1.0)
    assert f"{sum(len(text) for text in SENTENCES[:4]) / 4:.1f}" in format_table(reports)
