"""`mel-llm speak`: what goes in, what comes out, and what happens when something is wrong."""

import os
import re
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import soundfile
import torch
from test_cli import ENVIRONMENT
from test_modeling_mel_llm_speech import build_speaking
from typer.testing import CliRunner

from mel_llm import cli_speak, iter_speech, load_audio, split_sentences
from mel_llm.cli import app
from mel_llm.speech_plot import _MAX_COLUMNS, SpeechPlot


TEXT = (
    "You have reached a number that is not in service. Please hang up and try your call again later. Good bye to you."
)
# Half a second for each sentence, which a random model does not end by itself
SHORT = ("--max-seconds", "0.4", "--seed", "5")


@pytest.fixture(scope="module")
def speaking(tokenizer):
    return build_speaking(tokenizer)


@pytest.fixture
def loaded(speaking, monkeypatch):
    """A tiny random model in place of one that is loaded. Lists the calls of `_load`."""
    calls = []

    def load(model, device, dtype, text, options):
        calls.append((model, device, dtype, options))
        return *speaking, speaking[1].clean_speech_text(text)

    monkeypatch.setattr(cli_speak, "_load", load)
    monkeypatch.setenv("MEL_LLM_MODEL", "a-model")
    return calls


@pytest.fixture(scope="module")
def speaking_folder(speaking, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaking") / "model"
    for part in speaking:
        part.save_pretrained(folder)
    return folder


def call(*arguments, **kwargs):
    return CliRunner().invoke(app, ["speak", *map(str, arguments)], **kwargs)


def expected(speaking, text=TEXT, **kwargs):
    model, processor = speaking
    kwargs = {"max_seconds": 0.4, "seed": 5, **kwargs}
    return torch.cat([audio for _, audio in iter_speech(model, processor, text, **kwargs)])


def assert_same(samples, reference):
    """Of 16-bit integers and of Griffin-Lim's stream, a thousandth of the loudest."""
    samples = torch.as_tensor(samples, dtype=torch.float32)
    assert samples.shape == reference.shape
    reference = reference.clamp(-1, 1)
    assert (samples - reference).abs().max() < 2e-3 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("stream", [(), ("--stream",)])
@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_file(loaded, speaking, tmp_path, stream, ending):
    result = call(TEXT, "-o", tmp_path / f"out.{ending}", *SHORT, *stream)
    assert result.exit_code == 0 and not result.stdout, result.output
    samples, rate = soundfile.read(tmp_path / f"out.{ending}", dtype="float32")
    assert rate == 16000 and [path.name for path in tmp_path.iterdir()] == [f"out.{ending}"]
    assert_same(samples, expected(speaking))
    assert loaded[0] == ("a-model", None, "auto", {"seed": 5, "max_seconds": 0.4})
    # a random model does not stop, and that is told
    assert "was ended after 0.4 s by a limit" in result.stderr and "1 of 2 sentences" not in result.stderr


@pytest.mark.parametrize("ending", ["ogg", "mp3", "opus", "aiff"])
def test_other_formats(loaded, speaking, tmp_path, ending):
    result = call(TEXT, "-o", tmp_path / f"out.{ending}", *SHORT)
    assert result.exit_code == 0, result.output
    duration = soundfile.info(tmp_path / f"out.{ending}").duration
    assert duration == pytest.approx(len(expected(speaking)) / 16000, abs=0.1)


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_standard_output_can_be_read_by_what_follows(loaded, speaking, stream):
    result = call(TEXT, "-o", "-", *SHORT, *stream)
    assert result.exit_code == 0
    assert_same(load_audio(result.stdout_bytes), expected(speaking))


def test_where_the_text_comes_from(loaded, speaking, tmp_path):
    reference = expected(speaking, "It costs five. Déjà vu, they say.")
    text = "It costs five.\r\nDéjà vu, they say.\n"
    for name, data in (("utf-8.txt", text.encode()), ("bom.txt", text.encode("utf-8-sig")), ("16.txt", text.encode("utf-16"))):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        result = call("--file", tmp_path / name, "-o", tmp_path / f"{name}.wav", *SHORT)
        assert result.exit_code == 0, result.output
        assert_same(soundfile.read(tmp_path / f"{name}.wav", dtype="float32")[0], reference)
    result = call("-", "-o", tmp_path / "stdin.wav", *SHORT, input=text.encode())
    assert result.exit_code == 0
    assert_same(soundfile.read(tmp_path / "stdin.wav", dtype="float32")[0], reference)


def test_a_voice(loaded, speaking, speech_clips, tmp_path):
    clip = speech_clips[0]
    arguments = ("--voice", clip["path"], "--voice-text", clip["text"], *SHORT)
    assert call(TEXT, "-o", tmp_path / "out.wav", *arguments).exit_code == 0
    reference = expected(speaking, voice=clip["path"], voice_text=clip["text"])
    assert_same(soundfile.read(tmp_path / "out.wav", dtype="float32")[0], reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Yes."], "no output"),
        (["Yes.", "-o", "out"], "the ending '' names no format.*wav, .*flac"),
        (["Yes.", "-o", "out.m4a"], "the ending '.m4a' names no format"),
        (["Yes.", "-o", "no/such/out.wav"], "cannot be written to"),
        (["Yes.", "-o", "folder.wav"], "is a folder"),
        (["Yes.", "-o", "there.wav"], "there.wav is there already; --overwrite"),
        (["--file", "text.txt", "-o", "text.wav", "--plot", "plot.jpg"], "must end in .png"),
        (["Yes.", "-o", "there.wav", "--overwrite", "--voice", "there.wav", "--voice-text", "x"], "both to be read"),
        (["Yes.", "-o", "out.wav", "--voice", "there.wav"], "go together"),
        (["Yes.", "-o", "out.wav", "--voice-text", "x"], "go together"),
        (["-o", "out.wav"], "no text"),
        (["Yes.", "--file", "text.txt", "-o", "out.wav"], "either the text"),
        (["", "-o", "out.wav"], "no word"),
        (["...!?", "-o", "out.wav"], "no word"),
        (["--file", "gone.txt", "-o", "out.wav"], "gone.txt"),
        (["--file", "empty.txt", "-o", "out.wav"], "empty.txt has no word"),
        (["--file", "latin.txt", "-o", "out.wav"], "latin.txt is no UTF-8 text.*byte 3"),
        (["Yes.", "-o", "out.wav", "--temperature", "nan"], "--temperature"),
        (["Yes.", "-o", "out.wav", "--temperature", "inf"], "--temperature"),
        (["Yes.", "-o", "out.wav", "--temperature", "-1"], "--temperature"),
        (["Yes.", "-o", "out.wav", "--max-seconds", "0"], "--max-seconds"),
        (["Yes.", "-o", "out.wav", "--max-seconds", "nan"], "--max-seconds"),
        (["Yes.", "-o", "out.wav", "--max-seconds", "inf"], "--max-seconds"),
    ],
)  # fmt: skip
def test_wrong_use_is_told_before_the_model_is_loaded(loaded, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "there.wav").write_bytes(b"by hand")
    (tmp_path / "text.txt").write_text("Yes.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1")[:1] + b"ab\xe9 vu")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = call(*arguments)
    assert result.exit_code == 2 and not loaded and not result.stdout
    assert result.stderr.startswith("mel-llm: ") and result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.wav").read_bytes() == b"by hand"


def test_no_model(tmp_path):
    result = call("Yes.", "-o", tmp_path / "out.wav", env={"MEL_LLM_MODEL": ""})
    assert result.exit_code == 2 and "MEL_LLM_MODEL" in result.stderr


def test_models_that_do_not_speak(tiny_folder, tmp_path, speaking_folder, speech_clips):
    result = call("Yes.", "-o", tmp_path / "out.wav", "--model", tiny_folder)
    assert result.exit_code == 2 and "only reads" in result.stderr
    result = call("Yes.", "-o", tmp_path / "out.wav", "--model", tmp_path)
    assert result.exit_code == 2 and result.stderr.startswith("mel-llm: ")
    soundfile.write(tmp_path / "short.wav", np.ones(800), 16000)
    result = call("Yes.", "-o", tmp_path / "out.wav", "--model", speaking_folder,
                  "--voice", tmp_path / "short.wav", "--voice-text", "x")  # fmt: skip
    assert result.exit_code == 2 and "0.5 to 30" in result.stderr
    result = call("Yes.", "-o", tmp_path / "out.wav", "--model", speaking_folder,
                  "--voice", tmp_path / "gone.wav", "--voice-text", "x")  # fmt: skip
    assert result.exit_code == 2 and "gone.wav" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["short.wav"]


def test_overwriting(loaded, tmp_path):
    (tmp_path / "out.wav").write_bytes(b"by hand")
    assert call("Yes, it is.", "-o", tmp_path / "out.wav", "--overwrite", *SHORT).exit_code == 0
    assert soundfile.info(tmp_path / "out.wav").duration > 0.3


def test_sound_is_written_as_it_comes_and_not_held(loaded, speaking, tmp_path, monkeypatch):
    """Behind each sentence its sound is in the file, and nobody holds it any more."""
    model, _ = speaking
    generate, sizes, held, alive = model.generate, [], [], []

    def spy(**kwargs):
        (partial,) = tmp_path.glob("out.partial.wav")
        sizes.append(partial.stat().st_size)
        alive.append(sum(reference() is not None for reference in held))
        output = generate(**kwargs)
        held.append(weakref.ref(output.audio[0]))
        held.append(weakref.ref(output.spectrogram[0]))
        return output

    monkeypatch.setattr(model, "generate", spy)
    text = "Please hang up now and try to call once more. " * 12
    plot = ("--plot", tmp_path / "plot.png") if _has_matplotlib() else ()
    assert call(text, "-o", tmp_path / "out.wav", *SHORT, *plot).exit_code == 0
    assert len(sizes) == 12 and np.diff(sizes).min() >= 2 * 0.4 * 16000
    assert max(alive) <= 3, alive  # the last sentence's, and the voice that is kept


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_run_that_breaks_off_leaves_its_part_and_no_result(loaded, speaking, tmp_path, monkeypatch):
    model, _ = speaking
    generate = model.generate
    for error, status in ((KeyboardInterrupt(), 130), (RuntimeError("out of memory"), 1)):
        left = [2]

        def failing(left=left, error=error, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return generate(**kwargs)

        monkeypatch.setattr(model, "generate", failing)
        result = call(TEXT + " And more of it.", "-o", tmp_path / "out.flac", *SHORT)
        assert result.exit_code == status and not (tmp_path / "out.flac").exists()
        (part,) = tmp_path.iterdir()
        (seconds,) = re.findall(
            rf"the first 2 sentences \(([0-9.]+) s of sound\) are in {re.escape(str(part))}\.", result.stderr
        )
        assert soundfile.info(part).duration == pytest.approx(float(seconds), abs=0.06) and float(seconds) > 0.5
        part.unlink()
        left[0] = 0  # nothing spoken, nothing left
        result = call(TEXT, "-o", tmp_path / "out.flac", *SHORT)
        assert result.exit_code == status and not list(tmp_path.iterdir())


def test_partial_files_of_others_are_left_alone(loaded, tmp_path):
    (tmp_path / "out.partial.wav").write_bytes(b"of another run")
    assert call("Yes, it is.", "-o", tmp_path / "out.wav", *SHORT).exit_code == 0
    assert (tmp_path / "out.partial.wav").read_bytes() == b"of another run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial.wav", "out.wav"]


def test_a_word_without_end_and_what_cannot_be_spoken(loaded, speaking, tmp_path, caplog):
    text = "x" * 1000 + "\x00 \x1b[31m and <|eos|> more."
    (tmp_path / "text.txt").write_text(text)
    result = call("--file", tmp_path / "text.txt", "-o", tmp_path / "out.wav", "--max-seconds", "0.1")
    assert result.exit_code == 0
    num_pieces = len(split_sentences(text.replace("\x00", "").replace("\x1b", "")))
    assert f"{num_pieces} of {num_pieces} sentences" in result.stderr
    assert soundfile.info(tmp_path / "out.wav").duration == pytest.approx(num_pieces * (0.12 + 0.15), abs=0.1)


# --- the picture --------------------------------------------------------------------------------------------------------


def test_a_plot(loaded, tmp_path):
    pytest.importorskip("matplotlib")
    result = call(TEXT, "-o", tmp_path / "out.wav", "--plot", tmp_path / "out.png", *SHORT)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.wav"]


def test_a_plot_without_matplotlib(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = call("Yes.", "-o", tmp_path / "out.wav", "--plot", tmp_path / "out.png")
    assert result.exit_code == 2 and "pip install matplotlib" in result.stderr and not loaded


def test_a_plot_of_hours_stays_small(speaking):
    extractor = speaking[1].feature_extractor
    plot = SpeechPlot(extractor)
    generator = torch.Generator().manual_seed(0)
    loudest = 0.0
    for _ in range(100):
        mel, audio = torch.rand(333, 80, generator=generator), torch.randn(333 * 160, generator=generator) * 0.1
        loudest = max(loudest, float(audio.max()))
        plot.add(mel, audio, pause_seconds=0.15)
        assert len(plot.mel) == len(plot.envelope) < _MAX_COLUMNS
        assert len(plot.held_mel) < plot.frames_per_column
    assert plot.seconds == pytest.approx(100 * 3.48, abs=plot.frames_per_column * 0.01)
    assert plot.envelope.max() == pytest.approx(loudest)
    assert plot.mel.mean() == pytest.approx(0.5 * 333 / 348 + plot.floor * 15 / 348, abs=0.01)


# --- as a program -------------------------------------------------------------------------------------------------------


def program(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "mel_llm.cli", "speak", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def test_the_program_streams_and_a_player_may_go_away(speaking_folder, tmp_path):
    (tmp_path / "book.txt").write_text("Please hang up now and try to call once more. " * 500)
    process = program("--file", tmp_path / "book.txt", "-o", "-", "--stream", "--model", speaking_folder)
    data = process.stdout.read(100_000)  # long before the end
    assert load_audio(data + b"\0" * (len(data) % 2)).std() > 0
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait(timeout=120) != 0 and "Traceback" not in stderr, stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_control_c(speaking_folder, tmp_path):
    (tmp_path / "book.txt").write_text("Please hang up now and try to call once more. " * 500)
    process = program("--file", tmp_path / "book.txt", "-o", tmp_path / "out.wav", "--model", speaking_folder,
                      "--max-seconds", "0.4")  # fmt: skip
    assert b"was ended" in process.stderr.readline()
    process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and stderr.splitlines()[-1] == "mel-llm: interrupted", stderr
    assert not (tmp_path / "out.wav").exists() and "sentences" in stderr
    assert soundfile.info(tmp_path / "out.partial.wav").duration >= 0.5
