"""Spectrograms back to sound."""

import pytest
import torch

from mel_llm import MelLLMFeatureExtractor, MelLLMVocoderConfig
from mel_llm.vocoder_mel_llm import build_vocoder, mel_to_magnitude


PRESETS = {"phi4": {"edge_padding": 120}, "hifigan16k": {}}


@pytest.fixture(params=PRESETS)
def front_end(request):
    extractor = MelLLMFeatureExtractor.from_preset(request.param, **PRESETS[request.param])
    return extractor, build_vocoder(MelLLMVocoderConfig.from_feature_extractor(extractor))


def features_of(extractor, clips) -> list[torch.Tensor]:
    return [extractor(clip, sampling_rate=16000, return_tensors="pt")["input_features"][0] for clip in clips]


def test_copy_synthesis_keeps_the_features(front_end, speech_clips):
    """Griffin-Lim errs by a tenth of the features' deviation; a phase, scale or filter that is wrong, by a whole one."""
    extractor, vocoder = front_end
    for clip in speech_clips[:3]:
        (features,) = features_of(extractor, [clip["array"]])
        audio = vocoder(features[None])
        assert audio.shape == (1, len(features) * extractor.hop_length) and torch.isfinite(audio).all()
        (again,) = features_of(extractor, [audio[0].numpy()])
        frames = min(len(again), len(features))
        error = (again[:frames] - features[:frames]).abs().mean() / features.std()
        assert error < 0.15
        level = audio.square().mean().sqrt() / torch.from_numpy(clip["array"]).square().mean().sqrt()
        assert 0.8 < level < 1.2


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_stream_is_the_whole(front_end, speech_clips, chunk):
    extractor, vocoder = front_end
    (features,) = features_of(extractor, [speech_clips[0]["array"]])
    stream = vocoder.stream()
    parts = [stream.push(features[i : i + chunk]) for i in range(0, len(features), chunk)]
    assert torch.equal(torch.cat([*parts, stream.finish()]), vocoder(features[None])[0])
    assert stream.num_done == len(features) and len(stream.frames) <= 2 * 64


def test_a_clip_is_the_same_in_any_batch(front_end, speech_clips):
    extractor, vocoder = front_end
    rows = features_of(extractor, [clip["array"] for clip in speech_clips[:3]])
    lengths = torch.tensor([len(row) for row in rows])
    audio = vocoder(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5.0), lengths)
    for row, samples, length in zip(rows, audio, lengths, strict=True):
        end = int(length) * extractor.hop_length
        assert torch.equal(samples[:end], vocoder(row[None])[0]) and not samples[end:].any()


def test_silence_stays_silent(front_end):
    extractor, vocoder = front_end
    (features,) = features_of(extractor, [torch.zeros(16000).numpy()])
    assert vocoder(features[None]).abs().max() < 1e-4


def test_the_joins_of_blocks_cannot_be_heard(front_end):
    """A steady tone stays one: no dip and no step where the blocks of 64 frames meet."""
    extractor, vocoder = front_end
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(4 * 16000) / 16000)
    (features,) = features_of(extractor, [tone.numpy()])
    audio = vocoder(features[None])[0][8000:-8000]
    levels = audio[: len(audio) // 800 * 800].reshape(-1, 800).square().mean(1).sqrt()
    assert levels.min() > 0.5 * levels.median() and levels.max() < 1.5 * levels.median()


def test_magnitudes_give_the_mel_back(front_end, speech_clips):
    extractor, _ = front_end
    (features,) = features_of(extractor, [speech_clips[1]["array"]])
    magnitude = mel_to_magnitude(features, extractor)
    assert (magnitude >= 0).all() and magnitude.shape == (len(features), extractor.n_fft // 2 + 1)


def test_errors():
    with pytest.raises(ValueError, match="cannot be built yet"):
        build_vocoder(MelLLMVocoderConfig(vocoder_type="hifigan"))
    with pytest.raises(ValueError, match="feature_config"):
        MelLLMVocoderConfig(feature_config={"hop": 160})
    with pytest.raises(ValueError, match=r"\(batch, frames, 80\)"):
        build_vocoder(MelLLMVocoderConfig())(torch.zeros(10, 80))
