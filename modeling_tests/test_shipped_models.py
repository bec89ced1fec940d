"""The models in hub_cards: small, whole and described, and they still write what their figures were measured on."""

import csv
import json

import pytest
import torch
from conftest import ROOT, load_script
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, pipeline

from mel_llm import MelLLMProcessor, load_audio
from mel_llm.evaluation import WordErrorRate
from mel_llm.model_card import is_generated, metadata_problems
from mel_llm.publishing import file_problems


SHIPPED = sorted(path.parent for path in (ROOT / "hub_cards").glob("*/config.json"))
SPEAKERS = [folder for folder in SHIPPED if AutoConfig.from_pretrained(folder).speech_config is not None]
READERS = [folder for folder in SHIPPED if folder not in SPEAKERS]
CONTINUERS = [
    folder for folder in SPEAKERS if "MelLLMForSpeechContinuation" in AutoConfig.from_pretrained(folder).architectures
]
MEASURED = ROOT / "docs" / "measured"
HELD_OUT = ROOT / "held_out_clips"


def held_out_clips() -> list[dict]:
    with open(HELD_OUT / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def own_system(systems: list[dict], folder) -> dict:
    """Of what was measured, the model itself and not what its vocoder makes of recordings."""
    return next(system for system in systems if system["name"] == f"hub_cards/{folder.name}")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_a_repository_is_complete_and_small(folder):
    assert file_problems(folder, max_file_bytes=15 * 2**20) == []
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 64 * 2**20
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert metadata_problems(card) == [] and is_generated(card)
    for part in ("base_model:", "license:", "pipeline_tag:", "model-index:", "attribution"):
        assert part in card, part
    _, info = AutoModelForSpeechSeq2Seq.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("folder", READERS + CONTINUERS, ids=lambda path: path.name)
def test_the_figures_of_a_card_are_those_that_were_measured(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    files = sorted((MEASURED / folder.name).glob("scores/*.json"))
    assert files
    for path in files:
        scores = json.loads(path.read_text(encoding="utf-8"))
        assert f"{100 * scores['metrics']['wer']:.2f}" in card, path.name
        assert scores["environment"]["command"] in card, path.name


@pytest.mark.parametrize("folder", SPEAKERS, ids=lambda path: path.name)
def test_the_figures_of_a_voice_are_those_that_were_measured(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((MEASURED / folder.name / "results.json").read_text(encoding="utf-8"))
    assert results["environment"]["command"] in card
    totals = own_system(results["systems"], folder)["totals"]
    for name, pattern, scale in (("wer", "{:.1f}", 100), ("similarity", "{:.3f}", 1), ("mos_ovrl", "{:.2f}", 1)):
        assert pattern.format(scale * totals[name]["value"]) in card, name


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_the_summaries_tell_the_same_figures(folder):
    """What is first seen of a model, in two tables and a paragraph that people write."""
    measured = json.loads((MEASURED / folder.name / "results.json").read_text(encoding="utf-8"))
    if folder in SPEAKERS:
        rates = [own_system(measured["systems"], folder)["totals"]["wer"]["value"]]
    else:
        own = own_system(measured["models"], folder)
        rates = [part["totals"]["wer"]["value"] for part in own["sets"]]
    overview = (ROOT / "hub_cards" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in overview.splitlines() if line.startswith(f"| [{folder.name}]"))
    for place in (row, (ROOT / "README.md").read_text(encoding="utf-8")):
        for rate in rates:
            assert f" {100 * rate:.1f} %" in place


@pytest.mark.parametrize("folder", SPEAKERS, ids=lambda path: path.name)
def test_a_voice_speaks_as_it_was_measured(folder):
    """On another machine the last digits differ, and with them the sound; not how long it is, and that it ends."""
    results = json.loads((MEASURED / folder.name / "results.json").read_text(encoding="utf-8"))
    system = own_system(results["systems"], folder)
    arguments = results["arguments"]
    rows = [
        row for row in system["utterances"] if row["audio"]["stopped"] and len(row["text"]) <= arguments["max_chars"]
    ][:8]
    assert rows
    model = AutoModelForTextToWaveform.from_pretrained(folder).eval()
    processor = MelLLMProcessor.from_pretrained(folder)
    request = processor.apply_speech_request([row["text"] for row in rows])
    options = {
        name: arguments[name] for name in ("seed", "temperature", "stop_threshold", "max_seconds", "min_seconds")
    }
    options = {name: value for name, value in options.items() if value is not None}
    output = model.generate(**request, **options, return_dict_in_generate=True)
    assert sum(output.stopped) >= len(rows) - 1
    now = sum(len(audio) for audio in output.audio) / 16000
    assert now == pytest.approx(sum(row["audio"]["seconds"] for row in rows), rel=0.15)
    assert all(audio.std() > 0.01 for audio in output.audio)


@pytest.mark.parametrize("folder", CONTINUERS, ids=lambda path: path.name)
def test_the_figures_of_continuations_are_those_that_were_measured(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((MEASURED / folder.name / "continuation.json").read_text(encoding="utf-8"))
    assert results["environment"]["command"] in card
    totals = own_system(results["tasks"]["continuation"], folder)["totals"]
    table = card.split("### Continuations", 1)[1].split("```", 1)[0]
    row = next(line for line in table.splitlines() if line.startswith("| this model |"))
    for name, pattern, scale in (("text_speech_wer", "| {:.2f} (", 100), ("nll_per_token", "| {:.2f} (", 1)):
        assert pattern.format(scale * totals[name]["value"]) in row, name


@pytest.mark.parametrize("folder", CONTINUERS, ids=lambda path: path.name)
def test_prompts_are_gone_on_with_as_the_card_tells(folder):
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    prompts = sorted((MEASURED / folder.name / "prompts").glob("*.flac"))
    assert len(prompts) >= 3
    speaker = pipeline("speech-continuation", model=str(folder), device="cpu")
    said = [speaker(str(prompt), seed=0) for prompt in prompts]
    # In another batch, on another machine: a text may take another turn, most of them not
    told = [any(line.endswith(f" It writes: {result['text']}") for line in lines) for result in said]
    assert sum(told) >= len(said) - 1
    for result in said:
        audio = result["audio"].squeeze()
        assert len(result["text"]) > 10 and audio.std() > 0.01
        assert 0.2 < len(audio) / result["sampling_rate"] < 12


@pytest.mark.parametrize("folder", READERS, ids=lambda path: path.name)
def test_the_held_out_recordings_are_heard_as_they_were_measured(folder):
    """In another batch, on another machine, some later version: a word may differ, the error rate must not."""
    rows = held_out_clips()
    recogniser = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    texts = [
        result["text"]
        for result in recogniser([load_audio(HELD_OUT / row["file_name"]) for row in rows], batch_size=7)
    ]
    then = {}
    for path in (MEASURED / folder.name).glob("raw/*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            clip = json.loads(line)
            then[clip["id"]] = clip["pred_text"]
    before = [then[row["file_name"].removesuffix(".flac")] for row in rows]
    rate = WordErrorRate(normalizer="whisper")
    references = [row["text"] for row in rows]
    now, measured = (rate.compute(predictions=list(made), references=references)["wer"] for made in (texts, before))
    assert now <= measured + 0.05
    assert sum(new == old for new, old in zip(texts, before, strict=True)) >= len(rows) - 3


def test_the_demo_hears_what_its_model_never_heard(capsys, monkeypatch, tmp_path):
    demo = load_script("demo")
    if demo.MODEL not in SHIPPED:
        pytest.skip("no trained model is shipped yet")
    monkeypatch.setattr(demo, "SPEECH", tmp_path / "speech.wav")
    demo.main([])
    output = capsys.readouterr().out
    rows = held_out_clips()
    assert all(row["text"] in output for row in rows) and f"over {len(rows)} recordings" in output
    assert "The model was not trained on these recordings" in output
    assert (tmp_path / "speech.wav").is_file() == (demo.SPEAKER in SPEAKERS)

    demo.main([str(HELD_OUT / rows[0]["file_name"])])
    assert rows[0]["file_name"] in capsys.readouterr().out


def test_the_demo_trains_a_model_when_asked(capsys, monkeypatch, tmp_path):
    demo = load_script("demo")
    monkeypatch.setattr(demo, "TRAINED", tmp_path / "demo" / "mel-llm-demo")
    monkeypatch.setattr(demo, "read_clips", lambda folder, read=demo.read_clips: read(folder)[:2])
    torch.manual_seed(0)
    monkeypatch.setattr(demo, "MODEL", tmp_path / "nowhere")
    for more in (["--train"], ["--retrain"], []):  # the last because there is no other model
        demo.main(["--epochs", "1", *more])
        output = capsys.readouterr().out
        assert "The model was trained on these same recordings" in output and "over 2 recordings" in output
        assert ("Trained in" in output) == (more == ["--retrain"] or not (tmp_path / "seen").exists())
        (tmp_path / "seen").touch()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.wav"], "There is no file 'nowhere.wav'"),
        (["--model", "nowhere"], "There is no model in 'nowhere'"),
        (["--train", "--model", "nowhere"], "leave --model out"),
        (["--output", __file__], "exists already: name another --output"),
    ],
)
def test_what_the_demo_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        load_script("demo").parse_arguments(arguments)
    assert message in capsys.readouterr().err
