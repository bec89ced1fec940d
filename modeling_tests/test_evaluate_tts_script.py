"""scripts/evaluate_tts.py as a user runs it: whole, again, and with what is missing."""

import json
import shutil

import pytest
import soundfile
from conftest import ROOT, load_script
from test_evaluation_tts import folder  # noqa: F401  a fixture
from test_modeling_mel_llm_speech import build_speaking
from test_registration import run

from mel_llm import MelLLMFeatureExtractor, MelLLMVocoder, MelLLMVocoderConfig


SCRIPT = str(ROOT / "scripts" / "evaluate_tts.py")

JUDGE = """
import numpy as np

def listen(audio, rate):
    assert rate == 16000 and audio.dtype == np.float32
    return "please try again"

def embed(audio, rate):
    return np.abs(np.fft.rfft(audio, 512))[:64]
"""


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate_tts")


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("speaking") / "model"
    for part in build_speaking(tokenizer):
        part.save_pretrained(place)
    return str(place)


@pytest.mark.slow
def test_a_command_and_the_same_again(script, folder, model_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "judge.py").write_text(JUDGE)
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    kwargs = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1}
    config = MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="istft", vocoder_kwargs=kwargs)
    MelLLMVocoder(config).save_pretrained(tmp_path / "vocoder")
    words = f"--data {folder} --limit 3 --reference --copy-synthesis griffin_lim:2 vocoder --model {model_folder}"
    words += " --max_seconds 0.2 --asr python:judge.listen --speaker-encoder python:judge.embed --voice-from previous"
    words += " --output-dir out --device cpu --bootstrap_samples 100"
    first = run(SCRIPT, *words.split(), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "3 utterances, 3 of them recorded" in first.stderr
    lines = first.stdout.splitlines()
    assert len(lines) == 6 and "natural speech" in lines[2] and "Griffin-Lim, 2 iterations" in lines[3]
    assert "copy: vocoder" in lines[4] and model_folder in lines[5]

    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    environment = results["environment"]
    assert "--limit 3" in environment["command"] and environment["threads"] >= 1 and environment["date"]
    assert environment["versions"].keys() >= {"mel_llm", "torch", "transformers", "python"}
    assert results["arguments"]["seed"] == 0 and results["judges"]["asr"].startswith("judge.listen ")
    assert [len(system["utterances"]) for system in results["systems"]] == [3, 3, 3, 3]
    row = results["systems"][3]["utterances"][0]
    assert row["transcript"] == "please try again" and row["normalized"]["transcript"] == "please try again"
    assert set(results["systems"][3]["totals"]["wer"]) == {"value", "low", "high", "utterances"}
    assert first.stdout in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")

    sounds = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.wav")}
    assert len(sounds) == 9
    monkeypatch.chdir(tmp_path)
    evaluation, arguments = script.prepare(words.split())
    assert script.report(evaluation.run(), evaluation, arguments)
    assert capsys.readouterr().out == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.wav")} == sounds
    assert not list((tmp_path / "out").rglob(".partial*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to evaluate"),
        ("--reference --batch_size 0", "--batch_size must be at least 1"),
        ("--reference --temperature -1", "--temperature must be at least 0"),
        ("--reference --max_seconds 0", "--max_seconds must be more than 0"),
        ("--reference --stop_threshold 2", "--stop_threshold"),
        ("--reference --dtype float8", "--dtype must be"),
        ("--reference --normalizer shouting", "no text normalizer 'shouting'"),
        ("--reference --asr_language en", "--asr_language is for --asr"),
        ("--copy_synthesis griffin_lim:fast", "iterations must be a number"),
        ("--model {reading}", "only reads"),
        ("--copy_synthesis {reading}", "has no vocoder"),
        ("--model {speaking} --voice_from {wav}", "word for word"),
        ("--reference --voice_from nowhere.wav", "there is no 'nowhere.wav'"),
        ("--reference --mos nisqa", "--mos must be"),
        ("--model {speaking} --max_chars 3", "must be a whole number of at least 20"),
        ("--audio nowhere", "no folder 'nowhere'"),
    ],
)
def test_what_a_user_can_mend_is_told_in_a_line(
    script,
    folder,  # noqa: F811
    model_folder,
    tiny_folder,
    tmp_path,
    words,
    message,
):
    places = {"reading": tiny_folder, "speaking": model_folder, "wav": folder / "validation" / "clip0.wav"}
    argv = ["--data", str(folder), "--output_dir", str(tmp_path / "out"), *words.format(**places).split()]
    with pytest.raises((ValueError, OSError, ImportError)) as caught:
        script.prepare(argv)
    assert message in str(caught.value)


def test_texts_alone(script, model_folder, folder, tmp_path):  # noqa: F811
    """Spoken by a model, and by another program into files of these names."""
    texts = tmp_path / "texts.txt"
    texts.write_text("Please try again.\nGood bye to you.\n", encoding="utf-8")
    common = ["--data", str(texts), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(ValueError, match="2 of 2 texts have none"):
        script.prepare([*common, "--reference"])
    with pytest.raises(ValueError, match="no voice to compare with"):
        script.prepare([*common, "--model", model_folder, "--speaker_encoder", "resemblyzer"])
    with pytest.raises(ValueError, match=r"1 of 2 utterances have no file there; expected 0002\.wav"):
        files = tmp_path / "files"
        files.mkdir()
        shutil.copy(folder / "validation" / "clip0.wav", files / "0001.wav")
        script.prepare([*common, "--audio", str(files)])
    voice = ["--voice_from", str(folder / "validation" / "clip0.wav"), "--voice_text", "What is said there."]
    evaluation, arguments = script.prepare([*common, *voice, "--model", model_folder, "--max_seconds", "0.2"])
    assert script.report(evaluation.run(), evaluation, arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    (system,) = results["systems"]
    assert set(system["totals"]) == {"rtfx", "guarded"}
    assert [row["voice"] for row in system["utterances"]] == ["clip0.wav"] * 2
    for name in ("0001", "0002"):
        assert soundfile.info(tmp_path / "out" / system["folder"] / f"{name}.wav").samplerate == 16000
