"""The stock pipeline and the leaderboard's way of calling, on a tiny model with random weights.

What they write means nothing here; that every way of asking gives the same is what counts. Real transcripts are in
test_training.py.
"""

import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import DATA
from packaging.version import Version
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline


TASK = "automatic-speech-recognition"
SHORT = {"generate_kwargs": {"max_new_tokens": 8}}
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="transformers reads paths and bytes with the ffmpeg program"
)


@pytest.fixture(scope="module")
def recogniser(tiny_folder):
    return pipeline(TASK, model=tiny_folder)


@pytest.fixture(scope="module")
def expected(tiny_folder, speech_clips):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    texts = []
    for clip in speech_clips[:8]:
        ids = model.generate(**processor(audio=clip["array"]), max_new_tokens=8)
        texts.append(processor.decode(ids[0], skip_special_tokens=True))
    assert len(set(texts)) > 2
    return texts


def test_its_type_is_seq2seq(recogniser):
    # "ctc", which it falls back to for classes that it does not know, returns garbage without an error
    assert recogniser.type == "seq2seq"


def test_arrays_of_every_kind(recogniser, speech_clips, expected):
    array = speech_clips[0]["array"]
    forms = [
        array,
        array.astype(np.float64),
        torch.tensor(array),
        {"array": array, "sampling_rate": 16000},
        {"raw": array, "sampling_rate": 16000},
        np.stack([array, array]),
    ]
    for form in forms:
        assert recogniser(form, **SHORT) == {"text": expected[0]}


@needs_ffmpeg
def test_paths_and_bytes(recogniser, speech_clips, expected):
    path = speech_clips[0]["path"]
    assert recogniser(path, **SHORT)["text"] == expected[0]
    with open(path, "rb") as file:
        assert recogniser(file.read(), **SHORT)["text"] == expected[0]
    assert isinstance(recogniser(str(DATA / "stereo_44100.wav"), **SHORT)["text"], str)


def test_another_sampling_rate(recogniser, speech_clips):
    pytest.importorskip("torchaudio", reason="the pipeline resamples with torchaudio")
    array = speech_clips[0]["array"]
    result = recogniser({"array": array[::2].copy(), "sampling_rate": 8000}, **SHORT)
    assert set(result) == {"text"}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_lists_and_batches(recogniser, speech_clips, expected, batch_size):
    arrays = [clip["array"] for clip in speech_clips[:8]]
    results = recogniser(arrays, batch_size=batch_size, **SHORT)
    assert [result["text"] for result in results] == expected


def test_five_beams(recogniser, speech_clips):
    arrays = [clip["array"] for clip in speech_clips[:3]]
    kwargs = {"generate_kwargs": {"max_new_tokens": 8, "num_beams": 5}}
    together = [result["text"] for result in recogniser(arrays, batch_size=3, **kwargs)]
    assert together == [recogniser(array, **kwargs)["text"] for array in arrays]


def test_chunks(recogniser, speech_clips):
    long = np.concatenate([clip["array"] for clip in speech_clips[:6]])
    one = recogniser(long, chunk_length_s=5, **SHORT)["text"]
    assert one == recogniser(long, chunk_length_s=5, batch_size=4, **SHORT)["text"]
    assert recogniser(long, chunk_length_s=5, stride_length_s=(1, 1), **SHORT)["text"]


def test_defaults_are_greedy_and_bounded_by_the_audio(recogniser, speech_clips):
    assert recogniser.model.generation_config.num_beams == 1
    audio = recogniser.feature_extractor(speech_clips[0]["array"], sampling_rate=16000, return_tensors="pt")
    ids = recogniser.model.generate(**audio)
    assert 8 < ids.shape[1] <= 16 + 40 * (speech_clips[0]["duration"] + 1)
    assert recogniser(speech_clips[0]["array"])["text"] == recogniser.tokenizer.decode(
        ids[0], skip_special_tokens=True
    )


def test_the_shortest_audio_and_silence(recogniser):
    assert recogniser(np.zeros(10, np.float32))["text"] == ""
    assert recogniser(np.zeros(16000, np.float32))["text"] == ""
    assert isinstance(recogniser(np.random.default_rng(0).normal(size=10).astype(np.float32), **SHORT)["text"], str)


def test_bad_audio_is_an_error(recogniser):
    for bad in (np.zeros(0, np.float32), np.full(1600, np.nan, np.float32)):
        with pytest.raises(ValueError, match="raw_speech"):
            recogniser(bad)


def test_timestamps_are_refused_by_the_pipeline(recogniser, speech_clips):
    # a limit of the library for every model of this type; docs/transcription.md says so
    with pytest.raises(ValueError, match="timestamps"):
        recogniser(speech_clips[0]["array"], return_timestamps=True)


def test_bfloat16(tiny_folder, speech_clips):
    recogniser = pipeline(TASK, model=tiny_folder, dtype=torch.bfloat16)
    assert recogniser.model.dtype == torch.bfloat16
    results = recogniser([clip["array"] for clip in speech_clips[:3]], batch_size=2, **SHORT)
    assert all(isinstance(result["text"], str) for result in results)


def test_model_object(tiny, speech_clips):
    model, processor = tiny
    recogniser = pipeline(
        TASK, model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    assert recogniser.type == "seq2seq"
    assert isinstance(recogniser(speech_clips[0]["array"], **SHORT)["text"], str)


def test_peft_model_objects_are_refused_and_adapter_folders_work(tiny_folder, speech_clips, tmp_path):
    peft = pytest.importorskip("peft")
    processor = AutoProcessor.from_pretrained(tiny_folder)
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    config = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["audio_embedder", "multi_modal_projector"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config).eval()
    array = speech_clips[0]["array"]
    recogniser = pipeline(
        TASK, model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    # The pipeline takes a PeftModel for CTC. Garbage would come out; an error does.
    with pytest.raises(ValueError, match="PeftModel"):
        recogniser(array)
    ids = model.generate(**processor(audio=array), max_new_tokens=8)
    expected = processor.decode(ids[0], skip_special_tokens=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    # Before 5.18, transformers drops modules_to_save when a model is loaded from an adapter's folder (README)
    if Version(transformers.__version__) >= Version("5.18"):
        recogniser = pipeline(TASK, model=str(tmp_path))
        assert recogniser.type == "seq2seq"
        assert recogniser(array, **SHORT)["text"] == expected
    merged = model.merge_and_unload()
    recogniser = pipeline(
        TASK, model=merged, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    assert recogniser(array, **SHORT)["text"] == expected


# --- other stock clients ------------------------------------------------------------------------------------------------


def test_the_open_asr_leaderboards_way(tiny_folder, speech_clips, expected):
    """What transformers/run_eval.py of the Open ASR Leaderboard does, both branches."""
    processor = AutoProcessor.from_pretrained(tiny_folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    audios = [clip["array"] for clip in speech_clips[:4]]
    inputs = processor.apply_transcription_request(audios)
    out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=None)
    texts = processor.decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == expected[:4]
    inputs = processor(
        audios, sampling_rate=16000, return_tensors="pt", padding="longest", return_attention_mask=True, device="cpu"
    )
    out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=None)
    assert processor.decode(out, skip_special_tokens=True) == expected[:4]
