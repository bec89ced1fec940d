"""scripts/pack.py: half the size, the same model."""

import json
import shutil

import pytest
import torch
from conftest import build_tiny, load_script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoder, MelLLMVocoderConfig


@pytest.fixture(scope="module")
def script():
    return load_script("pack")


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1}
    model, processor = build_tiny(
        tokenizer,
        feature_extractor=extractor,
        speech_config=MelLLMSpeechConfig.from_preset("small", head_hidden_size=16, postnet_channels=8),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(
            extractor, vocoder_type="istft", vocoder_kwargs=sizes
        ),
    )
    model.model.set_feature_statistics(torch.full((80,), 12.3456789), torch.full((80,), 2.3456789))
    folder = tmp_path_factory.mktemp("run")
    model.config.text_config._name_or_path = "/home/ada/llm"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "training_summary.json").write_text('{"setup": {"train_data": [{"place": "/home/ada/my speech"}]}}')
    return folder


def test_a_packed_model_is_half_as_large_and_says_the_same(script, run, speech_clips, tmp_path, capsys):
    folder = tmp_path / "hub_cards" / "small"
    script.pack(run, folder, torch.bfloat16, "100KB")
    assert "MiB of weights" in capsys.readouterr().out and not list(folder.parent.glob(".*"))
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(shards) > 2 and sum(shards) < 0.56 * (run / "model.safetensors").stat().st_size
    summary = json.loads((folder / "training_summary.json").read_text())
    assert "/home/ada" in (run / "config.json").read_text() and "/home/ada" not in (folder / "config.json").read_text()
    assert summary == {"setup": {"train_data": [{"place": "my speech"}]}}

    packed, whole = (AutoModelForTextToWaveform.from_pretrained(path) for path in (folder, run))
    assert {parameter.dtype for parameter in packed.parameters()} == {torch.float32}
    before = dict(whole.named_buffers())
    for name, value in packed.named_buffers():
        assert torch.equal(value, before[name]), name
    for (name, new), old in zip(packed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-2, atol=1e-6, msg=name)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(audio=speech_clips[0]["array"])
    scores = [
        model(**inputs, labels=torch.tensor([[5, 6, 7]])).logits.softmax(-1)
        for model in (AutoModelForSpeechSeq2Seq.from_pretrained(folder), whole)
    ]
    torch.testing.assert_close(*scores, rtol=0.2, atol=0.02)
    assert torch.isfinite(packed.generate(**processor.apply_speech_request("Hello."), max_seconds=0.2)).all()

    with pytest.raises(FileExistsError, match="has a model in it already"):
        script.pack(run, folder, torch.bfloat16, "100KB")


def test_a_model_that_shall_only_read_leaves_its_voice_behind(script, run, speech_clips, tmp_path):
    folder = tmp_path / "reader"
    script.pack(run, folder, torch.float32, "15MB", reads_only=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MelLLMForSpeechSeq2Seq"]
    assert config.get("speech_config") is None and config.get("vocoder_config") is None
    weights = load_file(folder / "model.safetensors")
    assert weights and not any(name.startswith(("speech_head.", "vocoder.")) for name in weights)
    inputs = AutoProcessor.from_pretrained(folder)(audio=speech_clips[0]["array"])
    ids = [
        AutoModelForSpeechSeq2Seq.from_pretrained(path).generate(**inputs, max_new_tokens=8) for path in (folder, run)
    ]
    assert torch.equal(*ids)


def test_a_model_that_goes_on_stays_one(script, run, tmp_path):
    """The class that is saved tells programs what it was trained for."""
    model = AutoModelForPreTraining.from_pretrained(run)
    model.save_pretrained(tmp_path / "run")
    AutoProcessor.from_pretrained(run).save_pretrained(tmp_path / "run")
    script.pack(tmp_path / "run", tmp_path / "whole", torch.bfloat16, "15MB")
    script.pack(tmp_path / "run", tmp_path / "voice", torch.bfloat16, "15MB", speaks_only=True)
    classes = [AutoConfig.from_pretrained(tmp_path / name).architectures for name in ("whole", "voice")]
    assert classes == [["MelLLMForSpeechContinuation"], ["MelLLMForTextToSpeech"]]


def test_a_model_that_shall_only_speak_leaves_behind_what_taught_it(script, tokenizer, tmp_path):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    speech = MelLLMSpeechConfig.from_preset("small", head_hidden_size=16, postnet_channels=8, ctc_weight=1.0)
    model, processor = build_tiny(
        tokenizer,
        audio_config={"ctc_weight": 0.3, "ctc_decoding_weight": 0.5},
        feature_extractor=extractor,
        speech_config=speech,
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2),
    )
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    script.pack(tmp_path / "run", tmp_path / "speaker", torch.float32, "15MB", speaks_only=True)
    weights = load_file(tmp_path / "speaker" / "model.safetensors")
    assert any(name.startswith("speech_head.") for name in weights)
    assert not any(name.startswith(("ctc_head.", "token_bytes.", "speech_head.speller.")) for name in weights)
    request = processor.apply_speech_request("Hello.")
    audio = [
        AutoModelForTextToWaveform.from_pretrained(tmp_path / name).generate(**request, max_seconds=0.3, seed=1)
        for name in ("run", "speaker")
    ]
    torch.testing.assert_close(*audio)
    script.pack(tmp_path / "run", tmp_path / "reader", torch.float32, "15MB", reads_only=True)
    with pytest.raises(ValueError, match="has no speech head"):
        script.pack(tmp_path / "reader", tmp_path / "x", torch.float32, "15MB", speaks_only=True)


def test_a_vocoder_that_was_trained_later_is_packed_with_a_voice(script, run, tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 2}
    extractor = AutoProcessor.from_pretrained(run).feature_extractor
    config = MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="istft", vocoder_kwargs=sizes)
    vocoder = MelLLMVocoder(config).eval()
    vocoder.save_pretrained(tmp_path / "vocoder")
    monkeypatch.chdir(tmp_path)
    script.pack(run, tmp_path / "voice", torch.float32, "15MB", vocoder="vocoder")
    packed = AutoModelForTextToWaveform.from_pretrained(tmp_path / "voice")
    config = json.loads((tmp_path / "voice" / "config.json").read_text())
    assert not config["vocoder_config"].get("_name_or_path")  # a folder of whoever packed it
    request = AutoProcessor.from_pretrained(run).apply_speech_request("Hello.")
    output = packed.generate(**request, max_seconds=0.3, seed=1, return_dict_in_generate=True)
    torch.testing.assert_close(output.audio[0], vocoder(output.spectrogram[0][None])[0])

    other = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=0)
    MelLLMVocoder(MelLLMVocoderConfig.from_feature_extractor(other)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is for features with edge_padding 0"):
        script.pack(run, tmp_path / "x", torch.float32, "15MB", vocoder=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="--vocoder: what is packed of .* does not speak"):
        script.pack(run, tmp_path / "x", torch.float32, "15MB", vocoder="griffin_lim", reads_only=True)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_a_card_gets_its_model(script, run, tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("mine")
    script.pack(run, tmp_path / "card", torch.float16, "5GB")
    assert (tmp_path / "card" / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "card" / "config.json").read_text())["dtype"] == "float32"


def change_weights(run, folder, change):
    shutil.copytree(run, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lose_the_speech_head(weights):
    for name in [name for name in weights if "speech_head" in name]:
        del weights[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_the_speech_head, "missing keys, such as .*speech_head"),
        (lambda weights: weights.update({"model.more": torch.zeros(2)}), "1 unexpected keys, such as .*more"),
        (lambda weights: weights["model.language_model.norm.weight"].fill_(torch.nan), "not finite: .*norm.weight"),
        (lambda weights: weights["model.language_model.norm.weight"].fill_(1e6), "float16 cannot hold .*norm.weight"),
    ],
    ids=["missing", "unexpected", "nan", "overflow"],
)
def test_a_damaged_run_is_not_packed_as_a_whole_model(script, run, tmp_path, change, message):
    damaged = change_weights(run, tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=message):
        script.pack(damaged, tmp_path / "x", torch.float16, "5GB")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_what_cannot_be_packed_is_told(script, run, tmp_path):
    adapters = tmp_path / "adapters"
    shutil.copytree(run, adapters)
    (adapters / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="--merge_lora"):
        script.pack(adapters, tmp_path / "x", torch.bfloat16, "5GB")
    with pytest.raises(OSError):
        script.pack(tmp_path / "nowhere", tmp_path / "x", torch.bfloat16, "5GB")
    assert not (tmp_path / "x").exists()


def test_beams_of_what_is_published(script, run, tmp_path):
    script.pack(run, tmp_path / "beams", torch.float32, "15MB", reads_only=True, num_beams=3)
    script.pack(run, tmp_path / "own", torch.float32, "15MB", reads_only=True)
    beams = [
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / name).generation_config.num_beams
        for name in ("beams", "own")
    ]
    assert beams == [3, 1]
    with pytest.raises(ValueError, match="--num_beams must be at least 1"):
        script.pack(run, tmp_path / "none", torch.float32, "15MB", num_beams=0)
    assert not (tmp_path / "none").exists()


def test_pieces_of_what_is_published(script, run, tmp_path):
    arguments = script.parse_arguments([str(run), str(tmp_path / "short"), "--max_audio_seconds", "8"])
    script.pack(run, tmp_path / "short", torch.float32, "15MB", max_audio_seconds=arguments.max_audio_seconds)
    script.pack(run, tmp_path / "own", torch.float32, "15MB")
    lengths = [
        AutoConfig.from_pretrained(place).audio_config.max_audio_seconds
        for place in (tmp_path / "short", tmp_path / "own", run)
    ]
    assert lengths[0] == 8 != lengths[1] == lengths[2]
    with pytest.raises(ValueError, match="--max_audio_seconds must be at least 1"):
        script.pack(run, tmp_path / "none", torch.float32, "15MB", max_audio_seconds=0.5)
