"""`mel-llm transcribe`: what goes in, what comes out, and what happens when something is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from typer.testing import CliRunner

import mel_llm
from mel_llm import cli
from mel_llm.cli import app


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture
def stub(monkeypatch):
    """A recogniser that reads the audio as the real one does and says how long it is. Lists the calls of `_load`."""
    loaded = []

    def load(model, device, dtype, options):
        loaded.append((model, device, dtype, options))

        def recognise(audio, on_segment, on_progress):
            num_samples, warning = 0, None
            try:
                for block in mel_llm.stream_audio(audio):
                    num_samples += len(block)
            except mel_llm.audio_utils_mel_llm.TruncatedAudioError as error:
                warning = str(error)
            duration = num_samples / 16000
            segments = [mel_llm.Segment(0.0, duration, f"{duration:.1f} seconds")]
            on_segment(segments[0])
            on_progress(duration)
            return mel_llm.Transcription(segments[0].text, segments, duration, warning is not None, warning)

        return recognise

    monkeypatch.setattr(cli, "_load", load)
    monkeypatch.setenv("MEL_LLM_MODEL", "a-model")
    return loaded


@pytest.fixture
def folder(tmp_path):
    """a.wav 1 s, sub/b.flac 2 s, sub/deep/c.MP3 (in truth a wav) 3 s; and what is none of the program's business."""
    (tmp_path / "in" / "sub" / "deep").mkdir(parents=True)
    for name, seconds in (("a.wav", 1), ("sub/b.flac", 2), ("sub/deep/c.MP3", 3)):
        container = "FLAC" if name.endswith("flac") else "WAV"
        wave = 0.1 * np.random.default_rng(0).standard_normal(seconds * 16000)
        soundfile.write(tmp_path / "in" / name, wave, 16000, format=container)
    (tmp_path / "in" / "notes.txt").write_text("not audio, and not called so")
    (tmp_path / "in" / ".hidden.wav").write_text("left by another program")
    return tmp_path / "in"


def call(*arguments, **kwargs):
    return CliRunner().invoke(app, ["transcribe", *map(str, arguments)], **kwargs)


def test_one_file_and_several(stub, folder):
    assert call(folder / "a.wav").stdout == "1.0 seconds\n"
    result = call(folder / "sub" / "b.flac", folder / "a.wav")
    assert result.stdout == f"{folder / 'sub' / 'b.flac'}: 2.0 seconds\n{folder / 'a.wav'}: 1.0 seconds\n"
    assert result.exit_code == 0 and result.stderr == ""
    assert stub[0] == (
        "a-model", None, "auto", {"language": None, "prompt": None, "batch_size": 8, "max_segment_seconds": None}
    )  # fmt: skip


def test_a_folder(stub, folder):
    result = call(folder)
    names = [line.rpartition(": ")[0] for line in result.stdout.splitlines()]
    assert names == [str(folder / name) for name in ("a.wav", "sub/b.flac", "sub/deep/c.MP3")]
    assert result.exit_code == 0
    (folder / "empty").mkdir()
    result = call(folder / "empty")
    assert result.exit_code == 1 and "empty: no audio files" in result.stderr


def test_timestamps(stub, folder):
    assert call(folder / "a.wav", "--timestamps").stdout == "[00:00.000 -> 00:01.000] 1.0 seconds\n"
    lines = call(folder, "--timestamps").stdout.splitlines()
    assert lines[1] == f"{folder / 'sub' / 'b.flac'}: [00:00.000 -> 00:02.000] 2.0 seconds"


def test_standard_input(stub, folder):
    result = call("-", "--json", input=(folder / "a.wav").read_bytes())
    assert json.loads(result.stdout)["file"] == "-" and json.loads(result.stdout)["duration"] == 1.0
    result = call("-", "-", input=b"x")
    assert result.exit_code == 2 and "only once" in result.stderr
    result = call("-", input=b"no audio")
    assert result.exit_code == 1 and result.stderr.startswith("-: ")


def test_formats_on_standard_output(stub, folder):
    assert call(folder / "a.wav", "--srt").stdout == "1\n00:00:00,000 --> 00:00:01,000\n1.0 seconds\n"
    assert call(folder / "a.wav", "--vtt").stdout.startswith("WEBVTT\n\n00:00:00.000 --> ")
    objects = [json.loads(line) for line in call(folder, "--json").stdout.splitlines()]
    assert [entry["duration"] for entry in objects] == [1, 2, 3]
    assert objects[0]["segments"] == [{"start": 0, "end": 1, "text": "1.0 seconds"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--srt"], "--srt for several files needs --output-dir"),
        (["--srt", "--vtt"], "srt, vtt.*need --output-dir"),
        (["--json", "--timestamps"], "--timestamps is for text"),
        (["--output-dir", "in/a.wav"], "is no folder"),
    ],
)
def test_wrong_use_is_told_before_any_work(stub, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder.parent)
    result = call("in", *arguments)
    assert result.exit_code == 2 and not stub and not result.stdout
    assert result.stderr.startswith("mel-llm: ")
    assert re.search(message, result.stderr)


def test_no_model(folder):
    result = call(folder / "a.wav", env={"MEL_LLM_MODEL": ""})
    assert result.exit_code == 2 and "--model" in result.stderr and "MEL_LLM_MODEL" in result.stderr


def test_output_folder(stub, folder, tmp_path):
    out = tmp_path / "new" / "out"
    result = call(folder, "--output-dir", out, "--txt", "--srt", "--vtt", "--json")
    assert result.exit_code == 0 and not result.stdout
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    stems = ("a", "sub/b", "sub/deep/c")
    assert written == sorted(f"{stem}.{name}" for stem in stems for name in ("txt", "srt", "vtt", "json"))
    assert (out / "sub" / "b.txt").read_text() == "2.0 seconds\n"
    assert json.loads((out / "a.json").read_text())["file"] == str(folder / "a.wav")
    umask = os.umask(0)
    os.umask(umask)
    assert (out / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask
    call(folder / "a.wav", "--output-dir", out / "timed", "--timestamps")
    assert (out / "timed" / "a.txt").read_text() == "[00:00.000 -> 00:01.000] 1.0 seconds\n"


def test_nothing_is_overwritten_unasked(stub, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("by hand")
    result = call(folder, "--output-dir", out)
    assert result.exit_code == 1 and "a.txt is there already" in result.stderr
    assert (out / "a.txt").read_text() == "by hand" and (out / "sub" / "b.txt").exists()
    stub.clear()
    assert call(folder, "--output-dir", out).exit_code == 1 and not stub  # nothing left to do: no model either
    assert call(folder, "--output-dir", out, "--overwrite").exit_code == 0
    assert (out / "a.txt").read_text() == "1.0 seconds\n"


def test_a_failed_write_leaves_nothing(stub, folder, tmp_path, monkeypatch):
    def replace(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", replace)
    result = call(folder / "a.wav", "--output-dir", tmp_path / "out")
    assert result.exit_code == 1 and "a.wav: disk full" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_before_the_work(stub, folder, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    result = call(folder / "a.wav", "--output-dir", tmp_path / "file" / "below")
    assert result.exit_code == 2 and "cannot be written to" in result.stderr and not stub


def test_same_names_do_not_collide(stub, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    out = tmp_path / "out"
    result = call(folder / "a.wav", tmp_path / "other" / "a.wav", "--output-dir", out)
    assert result.exit_code == 2 and "would both be written to" in result.stderr and not stub and not out.exists()
    assert call(folder, tmp_path / "other", "--output-dir", out).exit_code == 2
    shutil.copy(folder / "a.wav", folder / "a.flac")
    assert call(folder, "--output-dir", out).exit_code == 2
    soundfile.write(tmp_path / "a.txt", np.zeros(16000), 16000, format="WAV")
    result = call(tmp_path / "a.txt", "--output-dir", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "a.txt.txt").exists()
    (tmp_path / "notes").write_bytes(b"")
    os.symlink(tmp_path / "a.txt", tmp_path / "notes.txt")
    result = call(tmp_path / "notes", tmp_path / "a.txt", "--output-dir", tmp_path, "--overwrite")
    assert result.exit_code == 2 and "both to be read and to be written" in result.stderr


def test_bad_files_are_named_and_the_rest_goes_on(stub, folder):
    good = (folder / "a.wav").read_bytes()
    (folder / "a0-empty.wav").write_bytes(b"")
    (folder / "a1-text.wav").write_text("these are words, not sounds")
    (folder / "a2-cut.wav").write_bytes(good[: len(good) // 2])
    flac = (folder / "sub" / "b.flac").read_bytes()
    (folder / "a3-broken.flac").write_bytes(flac[: len(flac) // 2] + b"\x55" * (len(flac) // 2))
    locked = folder / "a4-locked.wav"
    locked.write_bytes(good)
    locked.chmod(0)
    result = call(folder, folder / "gone.wav")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == f"{folder / 'a.wav'}: 1.0 seconds"
    assert f"{folder / 'a2-cut.wav'}: 0.5 seconds" in result.stdout  # what there was
    assert result.stdout.count("sub/") == 2
    for name in ("a0-empty.wav", "a1-text.wav", "a2-cut.wav", "a3-broken.flac", "gone.wav"):
        assert name in result.stderr
    assert "a.wav:" not in result.stderr
    if os.geteuid():
        assert "a4-locked.wav" in result.stderr
    locked.chmod(0o600)


def test_an_error_of_the_model_costs_one_file(stub, folder, monkeypatch):
    load = cli._load

    def failing(*arguments):
        recognise = load(*arguments)

        def fail_on_flac(audio, *callbacks):
            if str(audio).endswith("flac"):
                raise RuntimeError("out of memory")
            return recognise(audio, *callbacks)

        return fail_on_flac

    monkeypatch.setattr(cli, "_load", failing)
    result = call(folder)
    assert result.exit_code == 1 and "b.flac: RuntimeError: out of memory" in result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_interruption(stub, folder, monkeypatch):
    def load(*arguments):
        def recognise(*arguments):
            raise KeyboardInterrupt

        return recognise

    monkeypatch.setattr(cli, "_load", load)
    result = call(folder)
    assert result.exit_code == 130 and result.stderr == "mel-llm: interrupted\n"


# --- as a program, with a real (tiny, random) model ---------------------------------------------------------------------


def program(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "mel_llm.cli", "transcribe", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # Shells let what they start in the background ignore Ctrl-C, and so would the program under a test run there
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def complaints(stderr: bytes) -> list[str]:
    """Lines of standard error but for the warning that a random model, which never stops, brings about."""
    return [line for line in stderr.decode().splitlines() if not line.startswith("A transcript reached the most")]


def test_the_program(tiny_folder, speech_clips):
    paths = [clip["path"] for clip in speech_clips[:2]]
    process = program("-", *paths, "--model", tiny_folder, "--json", "--dtype", "float32", "--device", "cpu",
                      stdin=subprocess.PIPE)  # fmt: skip
    stdout, stderr = process.communicate(Path(paths[0]).read_bytes(), timeout=300)
    assert process.returncode == 0 and not complaints(stderr), stderr.decode()
    piped, first, second = (json.loads(line) for line in stdout.decode().splitlines())
    assert piped["text"] == first["text"] != second["text"]
    assert [first["file"], second["file"]] == paths
    expected = mel_llm.transcribe(*load_tiny(tiny_folder), paths[0])
    assert first["text"] == expected.text and first["duration"] == round(expected.duration, 3)


def load_tiny(folder):
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    return AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_a_model_of_another_kind(speech_clips, tmp_path, tiny_folder):
    from transformers import AutoProcessor, Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                               decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1)  # fmt: skip
    Speech2TextForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    result = call(speech_clips[0]["path"], "--model", tmp_path)
    assert result.exit_code == 2 and "is no Mel-LLM but of the type 'speech_to_text'" in result.stderr


def test_a_reader_that_goes_away(tiny_folder, speech_clips):
    process = program(*[clip["path"] for clip in speech_clips], "--model", tiny_folder)
    assert process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=300) != 0 and not complaints(stderr), stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_control_c(tiny_folder, speech_clips):
    process = program(*[clip["path"] for clip in speech_clips] * 40, "--model", tiny_folder)
    assert process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and complaints(stderr) == ["mel-llm: interrupted"], stderr.decode()
