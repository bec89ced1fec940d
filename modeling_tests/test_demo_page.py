"""The demo page: what it does without gradio, and, where gradio is installed, through its client."""

import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny
from typer.testing import CliRunner

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoderConfig
from mel_llm.cli import app
from mel_llm.demo_page import Demo, build_page, mel_image


@pytest.fixture
def speaking(tokenizer):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    speech = MelLLMSpeechConfig(head_hidden_size=16, postnet_layers=1, postnet_channels=8, prenet_hidden_size=16)
    vocoder = MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2)
    return build_tiny(tokenizer, feature_extractor=extractor, speech_config=speech, vocoder_config=vocoder)


@pytest.fixture
def recording(speech_clips, tmp_path) -> str:
    path = tmp_path / "recording.wav"
    soundfile.write(path, speech_clips[0]["array"], 16000)
    return str(path)


def test_the_text_appears_token_by_token_and_ends_as_the_pipeline_has_it(tiny, recording, speech_clips):
    model, processor = tiny
    steps = list(Demo(model, processor).listen(recording))
    texts = [text for _, text, _ in steps]
    ids = model.generate(**processor(audio=speech_clips[0]["array"]))
    expected = processor.decode(ids[0], skip_special_tokens=True).strip()
    assert texts[0] == "" and texts[-1] == expected
    assert len(set(texts)) > 3  # it grew
    image, _, status = steps[-1]
    frames = processor(audio=speech_clips[0]["array"])["input_features"].shape[1]
    assert image.shape[0] == 3 * 80 and image.shape[1] % frames == 0
    assert f"{len(speech_clips[0]['array']) / 16000:.1f} s" in status and "audio tokens" in status


def test_long_recordings_go_piece_by_piece(tiny, speech_clips, tmp_path):
    model, processor = tiny
    model.config.audio_config.max_audio_seconds = 2.0
    pause = np.zeros(8000, np.float32)
    audio = np.concatenate([part for clip in speech_clips[:3] for part in (clip["array"], pause)])
    path = tmp_path / "stereo.flac"
    soundfile.write(path, np.stack([audio, audio], 1), 44100)  # whatever the rate and the channels
    places = [status for _, _, status in Demo(model, processor).listen(path) if " to " in status]
    assert len(dict.fromkeys(places)) >= 2


def test_what_the_page_cannot_take_is_said(tiny, recording, tmp_path):
    demo = Demo(*tiny, max_seconds=1.0)
    with pytest.raises(ValueError, match="no recording yet"):
        next(demo.listen(None))
    with pytest.raises(ValueError, match="up to 1 seconds"):
        next(demo.listen(recording))
    (tmp_path / "notes.txt").write_text("no sound")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        next(demo.listen(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="only listens"):
        next(demo.speak("Hello."))
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    *_, (_, text, status) = demo.listen(tmp_path / "silence.wav")
    assert text == "" and "no sound" in status


def test_a_visitor_who_goes_ends_the_decoding(tiny, recording, monkeypatch):
    model, processor = tiny
    model.config.max_text_tokens_per_second = 200.0  # and no end-of-text: it would write hundreds of tokens
    lengths, generate = [], model.generate

    def counted(**kwargs):
        ids = generate(eos_token_id=-1, **kwargs)
        lengths.append(ids.shape[1])
        return ids

    monkeypatch.setattr(model, "generate", counted)
    before = threading.active_count()
    steps = Demo(model, processor).listen(recording)
    while not next(steps)[1]:
        pass
    steps.close()
    assert threading.active_count() == before and len(lengths) == 1 and lengths[0] < 100


def test_errors_of_the_model_reach_the_page(tiny, recording, monkeypatch):
    model, processor = tiny

    def generate(*args, **kwargs):
        raise ValueError("out of paper")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ValueError, match="out of paper"):
        list(Demo(model, processor).listen(recording))


def test_it_speaks_sentence_by_sentence(speaking):
    demo = Demo(*speaking)
    speaking[0].config.speech_config.min_tokens_per_second = 30.0
    text = "This is the first sentence. And this is another one."
    steps = list(demo.speak(text, 0.5, 3))
    assert [step[0] is None for step in steps[:-1]] == [True] * (len(steps) - 1) and len(steps) == 4
    (rate, samples), image, status = steps[-1]
    assert rate == 16000 and samples.dtype == np.int16 and len(samples) > 1600 and "synthetic" in status
    assert image.ndim == 3
    (_, again), _, _ = list(demo.speak(text, 0.5, 3))[-1]
    assert np.array_equal(samples, again)


@pytest.mark.parametrize(
    ("text", "seed", "message"),
    [
        ("  ", 0, "no text yet"),
        (None, 0, "no text yet"),
        ("...", 0, "no word"),
        ("a" * 30, 0, "up to 20 characters"),
        ("Hello.", -1, "whole number"),
        ("Hello.", 0.5, "whole number"),
    ],
)
def test_texts_that_cannot_be_spoken(speaking, text, seed, message):
    with pytest.raises(ValueError, match=message):
        next(Demo(*speaking, max_chars=20).speak(text, 1.0, seed))


def test_pictures_show_time_pitch_and_level():
    frames = torch.zeros(50, 8)
    frames[25:, 7] = 5.0  # loud, high and late
    image = mel_image(frames)
    assert image.dtype == np.uint8 and image.shape[1] >= 50
    assert image[0, -1].sum() > 600 and image[-1, -1].sum() < 100 and image[0, 0].sum() < 100
    assert mel_image(np.random.default_rng(0).normal(size=(60000, 80))).shape[1] <= 1600
    assert np.isfinite(mel_image(torch.full((3, 80), 2.0))).all()
    with pytest.raises(ValueError, match="frames"):
        mel_image(torch.zeros(0, 80))


def test_the_command_says_what_it_lacks(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MEL_LLM_MODEL", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for arguments, message in [
        ([], "no model"),
        (["--model", tiny_folder], "pip install gradio"),
    ]:
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert result.exit_code == 2 and message in result.stderr


def test_building_the_page_without_gradio(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="pip install"):
        build_page(Demo(*tiny))


@pytest.fixture
def client(speaking):
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `demo`)")
    from gradio_client import Client

    speaking[0].config.speech_config.min_tokens_per_second = 30.0
    page = build_page(Demo(*speaking, max_seconds=20))
    page.queue(max_size=2, default_concurrency_limit=1)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    assert "127.0.0.1" in url
    try:
        yield Client(url, verbose=False)
    finally:
        page.close()


def test_recordings_do_not_stay_and_uploads_have_a_limit(speaking, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `demo`)")
    from mel_llm import cli_demo, demo_page

    demo, launched = Demo(*speaking, max_seconds=20), {}
    page = build_page(demo)
    assert page.delete_cache == (600, 3600)
    monkeypatch.setattr(page, "launch", lambda **options: launched.update(options) or (None, "http://x", None))
    monkeypatch.setattr(page, "block_thread", lambda: None)
    monkeypatch.setattr(demo_page, "build_page", lambda *args: page)
    cli_demo._serve(demo, "mel", "127.0.0.1", 0, 2, False)
    assert 20 * 48000 * 8 < launched["max_file_size"] < 20 * 48000 * 8 + (2 << 20)


def test_the_page_through_gradios_client(client, recording):
    from gradio_client import handle_file

    _, text, status = client.predict(handle_file(recording), api_name="/transcribe")
    assert isinstance(text, str) and "audio tokens" in status
    sound, _, status = client.predict("Hello there.", 1.0, 0, api_name="/speak")
    assert soundfile.info(sound).frames > 0 and "synthetic" in status
    with pytest.raises(Exception, match="no recording yet"):
        client.predict(None, api_name="/transcribe")
