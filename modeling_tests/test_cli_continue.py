"""`mel-llm continue`: what goes in, what comes out, and what happens when something is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny
from test_cli import ENVIRONMENT
from test_modeling_mel_llm_continuation import build_continuing
from typer.testing import CliRunner

from mel_llm import cli_common, cli_continue, load_audio
from mel_llm.cli import app


SHORT = ("--max-seconds", "0.2", "--seed", "5")


@pytest.fixture(scope="module")
def continuing(tokenizer):
    model, processor = build_continuing(tokenizer, vocoder=True)
    model.generation_config.max_new_tokens = 12
    with torch.no_grad():
        model.speech_head.stop.bias.fill_(-50.0)  # it goes on to the limit
    return model, processor


@pytest.fixture(scope="module")
def folder(continuing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing") / "model"
    for part in continuing:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wav(speech_clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "prompt.wav"
    soundfile.write(path, speech_clips[0]["array"], 16000, subtype="FLOAT")
    return str(path)


@pytest.fixture
def loaded(continuing, monkeypatch):
    """A tiny random model in place of one that is loaded."""
    model, processor = continuing

    def load(auto_class, name, device, dtype, check):
        assert (auto_class, name) == ("AutoModelForPreTraining", "a-model")
        try:
            check(processor)
        except (OSError, ValueError) as error:
            cli_common.fail(error)
        return model, processor

    monkeypatch.setattr(cli_continue, "load", load)
    monkeypatch.setenv("MEL_LLM_MODEL", "a-model")
    return model, processor


def call(*arguments, **kwargs):
    return CliRunner().invoke(app, ["continue", *map(str, arguments)], **kwargs)


def expected(loaded, wav, **kwargs):
    model, processor = loaded
    output = model.generate(**processor(audio=wav), **{"max_seconds": 0.2, "seed": 5, **kwargs})
    return processor.decode_continuation(output)[0], output


def assert_same(samples, reference, tolerance: float = 2e-3):
    """Of 16-bit integers and of Griffin-Lim's stream, a thousandth of the loudest."""
    samples, reference = torch.as_tensor(samples, dtype=torch.float32), reference.clamp(-1, 1)
    assert samples.shape == reference.shape
    assert (samples - reference).abs().max() < tolerance * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_text_and_sound(loaded, wav, tmp_path, stream):
    result = call(wav, "-o", tmp_path / "out.wav", *SHORT, *stream)
    assert result.exit_code == 0, result.output
    text, output = expected(loaded, wav)
    assert result.stdout.strip() == text["text"] and text["text"]
    assert_same(soundfile.read(tmp_path / "out.wav", dtype="float32")[0], output.audio[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]
    assert "ended after 0.2 s by a limit" in result.stderr


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_with_the_recording_before(loaded, wav, tmp_path, stream):
    result = call(wav, "-o", tmp_path / "out.flac", *SHORT, "--with-prompt", *stream)
    assert result.exit_code == 0, result.output
    prompt, (_, output) = torch.from_numpy(load_audio(wav)), expected(loaded, wav)
    assert_same(soundfile.read(tmp_path / "out.flac", dtype="float32")[0], torch.cat([prompt, output.audio[0]]))


def test_a_question_text_alone_and_sound_alone(loaded, wav, tmp_path):
    text, _ = expected(loaded, wav, task="qa", return_text_only=True)
    result = call(wav, "--question", "--text-only", *SHORT)
    assert result.exit_code == 0 and result.stdout.strip() == text["text"] != expected(loaded, wav)[0]["text"]
    result = call(wav, "--skip-text", "-o", tmp_path / "out.wav", *SHORT)
    assert result.exit_code == 0 and not result.stdout
    _, output = expected(loaded, wav, skip_text=True)
    assert_same(soundfile.read(tmp_path / "out.wav", dtype="float32")[0], output.audio[0])


def test_standard_input_and_output(loaded, wav):
    with open(wav, "rb") as file:
        result = call("-", "-o", "-", *SHORT, input=file.read())
    assert result.exit_code == 0, result.stderr
    text, output = expected(loaded, wav)
    assert_same(load_audio(result.stdout_bytes), output.audio[0])
    assert text["text"] in result.stderr


def test_json_and_a_plot(loaded, wav, tmp_path):
    result = call(wav, "-o", tmp_path / "out.wav", "--plot", tmp_path / "out.png", "--json", *SHORT)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row == {"file": wav, **expected(loaded, wav)[0], "seconds": 0.2}
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(call(wav, "--text-only", "--json").stdout)["transcript"] is None


def test_another_rate_and_more_than_the_model_knows(loaded, wav, tmp_path, speech_clips, monkeypatch):
    """The last seconds are taken, and it is said."""
    model, processor = loaded
    monkeypatch.setattr(model.config.audio_config, "max_audio_seconds", 1.0)
    long = np.concatenate([clip["array"] for clip in speech_clips[:3]])
    soundfile.write(tmp_path / "long.wav", np.stack([long, long], axis=1), 16000, subtype="FLOAT")
    result = call(tmp_path / "long.wav", "-o", tmp_path / "out.wav", *SHORT)
    assert result.exit_code == 0, result.output
    assert (
        f"has {len(long) / 16000:.1f} s and the model was trained on at most 1: its last 1 s are taken"
        in result.stderr
    )
    output = model.generate(**processor(audio=long[-16000:]), max_seconds=0.2, seed=5)
    assert_same(soundfile.read(tmp_path / "out.wav", dtype="float32")[0], output.audio[0])
    soundfile.write(tmp_path / "8k.wav", long[::2], 8000)
    assert call(tmp_path / "8k.wav", "-o", tmp_path / "8k-out.wav", *SHORT).exit_code == 0


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_recordings_that_are_none(loaded, tmp_path, stream):
    """Nothing is left behind by them."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "short.wav", np.ones(410) * 0.1, 16000)
    (tmp_path / "text.wav").write_text("no sound")
    for name, message in (("silent", "is silent"), ("short", "less than one audio token"), ("text", "text.wav")):
        result = call(tmp_path / f"{name}.wav", "-o", tmp_path / "out.wav", *SHORT, *stream)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.wav", "silent.wav", "text.wav"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no output"),
        (("--text-only", "-o", "x.wav"), "--text-only makes no sound: -o"),
        (("--text-only", "--skip-text"), "leave nothing to be made"),
        (("-o", "x.xyz"), "names no format"),
        (("-o", "x.wav", "--json", "--stream"), "not with --stream"),
        (("-o", "x.wav", "--max-seconds", "0"), "--max-seconds must be more than 0"),
    ],
)
def test_wrong_use_is_told_before_the_model_is_loaded(loaded, wav, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_continue, "_load", lambda *args: pytest.fail("the model was loaded"))
    result = call(wav, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_there_and_files_that_are(loaded, wav, tmp_path):
    result = call(tmp_path / "none.wav", "-o", tmp_path / "out.wav")
    assert result.exit_code == 2 and "there is no file" in result.stderr
    assert call(tmp_path, "-o", tmp_path / "out.wav").exit_code == 2
    (tmp_path / "out.wav").write_text("mine")
    result = call(wav, "-o", tmp_path / "out.wav", *SHORT)
    assert result.exit_code == 2 and "--overwrite replaces it" in result.stderr
    assert (tmp_path / "out.wav").read_text() == "mine"
    assert call(wav, "-o", tmp_path / "out.wav", *SHORT, "--overwrite").exit_code == 0
    assert "both to be read and to be written" in call(wav, "-o", wav, "--overwrite").stderr


def test_the_program(folder, wav, tmp_path, tokenizer):
    command = [sys.executable, "-m", "mel_llm.cli", "continue", wav, "--model", folder, *SHORT]
    environment = {**ENVIRONMENT}
    result = subprocess.run(
        [*command, "-o", "out.wav", "--stream"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and soundfile.info(tmp_path / "out.wav").duration == pytest.approx(0.2)
    model, processor = build_tiny(tokenizer)  # which only reads
    for part in (model, processor):
        part.save_pretrained(tmp_path / "reads")
    result = call(wav, "-o", tmp_path / "x.wav", "--model", tmp_path / "reads")
    assert result.exit_code == 2 and "only reads" in result.stderr
