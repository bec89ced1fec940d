"""`pipeline("speech-continuation")`: every form of audio, alone and in batches, through transformers' own door."""

import numpy as np
import pytest
import soundfile
import torch
from test_modeling_mel_llm_continuation import build_continuing
from test_registration import run
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

import mel_llm


OPTIONS = {"max_seconds": 0.2, "max_new_tokens": 8, "seed": 1, "stop_threshold": 1.0}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing") / "model"
    for part in build_continuing(tokenizer, vocoder=True):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def speaker(folder):
    return pipeline("speech-continuation", model=folder)


@pytest.fixture(scope="module")
def expected(speaker, speech_clips):
    output = speaker.model.generate(**speaker.processor(audio=speech_clips[0]["array"]), **OPTIONS)
    return {
        **speaker.processor.decode_continuation(output)[0],
        "audio": output.audio[0].numpy(),
        "sampling_rate": 16000,
    }


def assert_same(said: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert set(said) == {"text", "transcript", "continuation", "audio", "sampling_rate"}
    assert {name: said[name] for name in said if name != "audio"} == {
        name: expected[name] for name in expected if name != "audio"
    }
    assert isinstance(said["audio"], np.ndarray) and said["audio"].dtype == np.float32
    assert said["audio"].shape == expected["audio"].shape
    assert np.abs(said["audio"] - expected["audio"]).max() <= tolerance * np.abs(expected["audio"]).max()


def test_it_is_the_class_that_goes_on(speaker):
    assert type(speaker) is mel_llm.SpeechContinuationPipeline
    assert type(speaker.model) is mel_llm.MelLLMForSpeechContinuation


def test_audio_of_every_kind(speaker, speech_clips, expected, tmp_path):
    clip = speech_clips[0]
    for source in (
        clip["path"],
        open(clip["path"], "rb").read(),
        clip["array"],
        torch.from_numpy(clip["array"]),
        (clip["array"], 16000),
        {"array": clip["array"], "sampling_rate": 16000},
        {"raw": clip["array"], "sampling_rate": 16000},
    ):
        assert_same(speaker(source, **OPTIONS), expected)
    assert_same(speaker(clip["array"], generate_kwargs=OPTIONS), expected)
    soundfile.write(tmp_path / "8k.wav", clip["array"][::2], 8000)
    slow = speaker(str(tmp_path / "8k.wav"), **OPTIONS)
    samples, _ = soundfile.read(tmp_path / "8k.wav", dtype="float32")
    for array in (samples, torch.from_numpy(samples)):
        assert_same(speaker(array, sampling_rate=8000, **OPTIONS), slow)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lists_and_batches(speaker, speech_clips, expected, batch_size):
    sources = [speech_clips[index]["array"] for index in (0, 1, 2)]
    said = speaker([*sources, np.zeros(16000, np.float32)], batch_size=batch_size, **OPTIONS)
    # Griffin-Lim makes a thousandth of what were last digits
    assert_same(said[0], expected, 5e-3)
    for row, source in zip(said[:3], sources, strict=True):
        assert_same(row, speaker(source, **OPTIONS), 5e-3)
    assert said[3]["text"] == "" and said[3]["audio"].shape == (0,)
    many = speaker((source for source in sources), **OPTIONS)
    assert [row["text"] for row in many] == [row["text"] for row in said[:3]]


def test_options(speaker, speech_clips, expected):
    clip = speech_clips[0]["array"]
    text = speaker(clip, return_text_only=True, **OPTIONS)
    assert text["audio"] is None and text["text"] == expected["text"]
    assert speaker(clip, skip_text=True, **OPTIONS)["text"] == ""
    assert speaker(clip, question=True, **OPTIONS)["text"] != expected["text"]
    with pytest.raises(ValueError, match="does not know the arguments max_second;"):
        speaker(clip, max_second=1)
    with pytest.raises(ValueError, match="does not know the arguments num_beams"):
        speaker(clip, generate_kwargs={"num_beams": 3})
    with pytest.raises(ValueError, match="less than one audio token"):
        speaker(np.ones(410, np.float32) * 0.1)


def test_of_a_long_recording_the_last_seconds(speaker, speech_clips, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("mel_llm"), "propagate", True)
    monkeypatch.setattr(speaker.model.config.audio_config, "max_audio_seconds", 1.0)
    long = np.concatenate([clip["array"] for clip in speech_clips[:2]])
    said = speaker(long, **OPTIONS)
    assert "its last seconds are taken" in caplog.text
    features = speaker.processor(audio=long)["input_features"][:, -100:]
    output = speaker.model.generate(features, **OPTIONS)
    assert said["text"] == speaker.processor.decode_continuation(output)[0]["text"]


def test_models_that_cannot(tokenizer, speech_clips, folder):
    model, processor = build_continuing(tokenizer)
    silent = pipeline("speech-continuation", model=model, processor=processor)
    with pytest.raises(ValueError, match="no vocoder"):
        silent(speech_clips[0]["array"])
    assert silent(speech_clips[0]["array"], return_text_only=True, max_new_tokens=3)["audio"] is None
    with pytest.raises(ValueError, match="needs the model's `processor`"):
        mel_llm.SpeechContinuationPipeline(model=model)
    reader = mel_llm.MelLLMForSpeechSeq2Seq.from_pretrained(folder)
    with pytest.raises(ValueError, match="needs a MelLLMForSpeechContinuation, got MelLLMForSpeechSeq2Seq"):
        pipeline("speech-continuation", model=reader, processor=processor)


def test_a_model_that_never_learnt_it_is_told(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("mel_llm"), "propagate", True)
    pipeline("speech-continuation", model=folder)
    assert "expect nonsense" not in caplog.text
    mel_llm.MelLLMForTextToSpeech.from_pretrained(folder).save_pretrained(tmp_path)
    mel_llm.MelLLMProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    pipeline("speech-continuation", model=str(tmp_path))
    assert "is a MelLLMForTextToSpeech, which was not trained to go on" in caplog.text


def test_a_saved_pipeline_is_a_model_without_code(speaker, tmp_path, speech_clips, expected):
    speaker.save_pretrained(tmp_path)
    speaker.processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert_same(pipeline("speech-continuation", model=str(tmp_path))(speech_clips[0]["array"], **OPTIONS), expected)


def test_registering_again_changes_nothing(caplog):
    before = dict(PIPELINE_REGISTRY.supported_tasks)
    mel_llm.register()
    assert before == PIPELINE_REGISTRY.supported_tasks and "Overwriting" not in caplog.text


def test_a_fresh_process(folder, speech_clips):
    code = f"""
from transformers import pipeline
import mel_llm
said = pipeline("speech-continuation", model={folder!r})({speech_clips[0]["path"]!r}, max_seconds=0.1, max_new_tokens=3)
print(said["audio"].dtype, said["sampling_rate"])
"""
    result = run("-c", code)
    assert result.stdout.strip() == "float32 16000", result.stderr
