"""Waveform to log-mel: equal to the references, independent of the batch, and strict about what is audio."""

import copy
import json
import logging
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Phi4MultimodalFeatureExtractor, SpeechT5FeatureExtractor

from mel_llm.feature_extraction_mel_llm import PRESET_NAMES, MelLLMFeatureExtractor


RATE = 16000


@pytest.fixture
def extractor():
    return MelLLMFeatureExtractor()


@pytest.fixture(scope="module")
def waveforms(speech_clips):
    """Real speech of many lengths, longest last, with odd sample counts among them."""
    clips = sorted((clip["array"] for clip in speech_clips), key=len)
    return [clip[: len(clip) - 7 * index] for index, clip in enumerate(clips)]


@pytest.fixture
def fresh_warnings(caplog):
    """`warning_once` says nothing twice in a process."""
    logging.Logger.warning_once.cache_clear()
    return caplog


def noise(num_samples, seed=0, scale=0.1):
    return (np.random.default_rng(seed).standard_normal(num_samples) * scale).astype(np.float32)


def features_of(extractor, audio, **kwargs):
    return extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt", **kwargs)


class TestAgainstReferences:
    def test_phi4_single(self, extractor, waveforms):
        reference = Phi4MultimodalFeatureExtractor()
        for clip in waveforms:
            expected = reference(clip[None], sampling_rate=RATE, return_tensors="pt").audio_input_features
            torch.testing.assert_close(features_of(extractor, clip).input_features, expected, atol=1e-4, rtol=0)

    def test_phi4_batch(self, extractor, waveforms):
        expected = Phi4MultimodalFeatureExtractor()(waveforms, sampling_rate=RATE, return_tensors="pt")
        batch = features_of(extractor, waveforms)
        assert torch.equal(batch.attention_mask, expected.audio_attention_mask.long())
        valid = batch.attention_mask.bool()
        torch.testing.assert_close(
            batch.input_features[valid], expected.audio_input_features[valid], atol=1e-4, rtol=0
        )

    def test_hifigan16k_is_speecht5s_target(self, waveforms):
        extractor, reference = MelLLMFeatureExtractor.from_preset("hifigan16k"), SpeechT5FeatureExtractor()
        for clip in [*waveforms, noise(5), noise(300)]:
            expected = torch.from_numpy(reference._extract_mel_features(clip))
            torch.testing.assert_close(features_of(extractor, clip).input_features[0], expected, atol=1e-4, rtol=0)

    def test_spectron_hears_every_bin(self, waveforms, recwarn):
        extractor = MelLLMFeatureExtractor.from_preset("spectron")
        features = features_of(extractor, waveforms[-1]).input_features[0]
        assert features.shape == (len(waveforms[-1]) // 160, 128)
        assert (features.std(dim=0) > 0.1).all()  # an empty filter would be constant
        assert not [warning for warning in recwarn if "mel filter" in str(warning.message)]

    def test_silence_is_zero(self, extractor):
        features = features_of(extractor, np.zeros(RATE, np.float32)).input_features
        assert features.shape == (1, 98, 80)
        assert (features == 0).all()

    def test_nothing_below_the_floor(self, extractor, waveforms):
        assert features_of(extractor, [*waveforms, noise(9000, scale=1e-6)]).input_features.min() == 0

    def test_a_tone_lands_in_its_bin(self, extractor):
        """Independent of any reference implementation: Kaldi's mel is 1127 ln(1 + f / 700)."""
        for frequency in (440.0, 1000.0, 4000.0):
            tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE)
            mel = 1127 * np.log1p(np.array([frequency, 7690.0]) / 700)
            expected = mel[0] / (mel[1] / 81) - 1
            loudest = features_of(extractor, tone).input_features[0].mean(dim=0).argmax()
            assert abs(loudest - expected) <= 1

    def test_louder_by_a_factor_of_ten(self, extractor, waveforms):
        loud = waveforms[-1] / np.abs(waveforms[-1]).max()
        difference = features_of(extractor, loud).input_features - features_of(extractor, loud / 10).input_features
        heard = features_of(extractor, loud / 10).input_features > 0
        torch.testing.assert_close(
            difference[heard], torch.full_like(difference[heard], np.log(100)), atol=1e-3, rtol=0
        )


class TestBatching:
    @pytest.mark.parametrize("preset", PRESET_NAMES)
    def test_batch_is_bitwise_single(self, waveforms, preset):
        extractor = MelLLMFeatureExtractor.from_preset(preset)
        clips = [*waveforms, noise(3), noise(401), noise(20 * RATE)]
        batch = features_of(extractor, clips)
        for index, clip in enumerate(clips):
            alone = features_of(extractor, clip)
            frames = alone.input_features.shape[1]
            assert torch.equal(batch.input_features[index, :frames], alone.input_features[0])
            assert (batch.input_features[index, frames:] == 0).all()
            assert batch.attention_mask[index].sum() == frames == alone.attention_mask.sum()

    def test_padding_value_fills_padded_frames_only(self, waveforms):
        batch = features_of(MelLLMFeatureExtractor(padding_value=-3.0), [waveforms[0], waveforms[-1]])
        assert (batch.input_features[batch.attention_mask == 0] == -3).all()
        assert (batch.input_features[batch.attention_mask == 1] >= 0).all()

    def test_blocks_do_not_show(self, extractor, monkeypatch):
        clip = noise(5 * RATE + 77)
        expected = features_of(extractor, clip).input_features
        monkeypatch.setattr("mel_llm.feature_extraction_mel_llm._CPU_BLOCK_FRAMES", 37)
        torch.testing.assert_close(features_of(extractor, clip).input_features, expected, atol=1e-5, rtol=0)

    def test_accelerator_path_equals_cpu_path(self, extractor, waveforms, monkeypatch):
        """What runs on a GPU, run on the CPU."""
        expected = features_of(extractor, waveforms)
        monkeypatch.setattr(MelLLMFeatureExtractor, "_write_clip_by_clip", MelLLMFeatureExtractor._write_whole_batch)
        monkeypatch.setattr("mel_llm.feature_extraction_mel_llm._ACCELERATOR_BLOCK_FRAMES", 1000)
        batch = features_of(extractor, waveforms, pad_to_multiple_of=64)
        frames = expected.input_features.shape[1]
        torch.testing.assert_close(batch.input_features[:, :frames], expected.input_features, atol=1e-5, rtol=0)
        assert (batch.input_features[:, frames:] == 0).all()
        assert torch.equal(batch.attention_mask[:, :frames], expected.attention_mask)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @pytest.mark.parametrize("preset", PRESET_NAMES)
    def test_cuda_equals_cpu(self, waveforms, preset):
        extractor = MelLLMFeatureExtractor.from_preset(preset)
        expected = features_of(extractor, waveforms)
        batch = features_of(extractor, waveforms, device="cuda")
        assert batch.input_features.device.type == batch.attention_mask.device.type == "cuda"
        torch.testing.assert_close(batch.input_features.cpu(), expected.input_features, atol=1e-4, rtol=0)
        assert torch.equal(batch.attention_mask.cpu(), expected.attention_mask)
        as_arrays = extractor(waveforms, sampling_rate=RATE, device="cuda", return_tensors="np")
        assert isinstance(as_arrays.input_features, np.ndarray)

    def test_autocast_and_grad_mode_do_not_show(self, extractor):
        clip = torch.from_numpy(noise(RATE)).requires_grad_()
        expected = features_of(extractor, clip.detach()).input_features
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = features_of(extractor, clip).input_features
        assert torch.equal(features, expected) and not features.requires_grad

    def test_threads_share_one_extractor(self, extractor, waveforms):
        expected = features_of(extractor, waveforms).input_features
        results = []
        workers = [
            threading.Thread(target=lambda: results.append(features_of(extractor, waveforms))) for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 4 and all(torch.equal(result.input_features, expected) for result in results)

    def test_faster_than_phi4(self, extractor, waveforms):
        """Eight times on a quiet machine. The CPU time of one thread, so that a busy machine does not fail this."""
        reference, batch = Phi4MultimodalFeatureExtractor(), waveforms[-12:]

        def best(call):
            times = []
            for _ in range(4):
                start = time.thread_time()
                call(batch, sampling_rate=RATE, return_tensors="pt")
                times.append(time.thread_time() - start)
            return min(times)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert 3 * best(extractor) < best(reference)
        finally:
            torch.set_num_threads(threads)


class TestFrameCounts:
    @pytest.mark.parametrize("preset", PRESET_NAMES)
    def test_num_frames_is_what_comes_out(self, preset):
        extractor = MelLLMFeatureExtractor.from_preset(preset)
        lengths = [*range(1, 2000, 13), 159, 160, 161, 399, 400, 401, 559, 560, 561, 1023, 1024, 1279, 1280]
        mask = features_of(extractor, [noise(length) for length in lengths]).attention_mask
        assert mask.sum(dim=1).tolist() == [extractor.num_frames(length) for length in lengths]

    @settings(max_examples=60, deadline=None)
    @given(
        num_samples=st.integers(1, 40000),
        win_length=st.integers(1, 1024),
        hop_length=st.integers(16, 700),
        edge_padding=st.integers(0, 1024),
    )
    def test_any_framing(self, num_samples, win_length, hop_length, edge_padding):
        extractor = MelLLMFeatureExtractor(
            feature_size=8, n_fft=1024, win_length=win_length, hop_length=hop_length, edge_padding=edge_padding
        )
        features = features_of(extractor, noise(num_samples)).input_features
        assert features.shape == (1, extractor.num_frames(num_samples), 8)
        assert features.isfinite().all()

    def test_formula_of_the_paper(self, extractor):
        assert [extractor.num_frames(n) for n in (1, 400, 559, 560, RATE)] == [1, 1, 1, 2, (RATE - 400) // 160 + 1]

    def test_tensors_and_arrays(self, extractor):
        lengths = [1, 399, 400, 560, 123456]
        expected = [extractor.num_frames(length) for length in lengths]
        assert extractor.num_frames(torch.tensor(lengths)).tolist() == expected
        assert extractor.num_frames(torch.tensor(lengths)).dtype == torch.long
        assert extractor.num_frames(np.array(lengths)).tolist() == expected
        assert extractor.num_frames(np.int64(560)) == 2

    @settings(max_examples=40, deadline=None)
    @given(st.integers(160, 30000))
    def test_edge_padding_lines_frames_up_with_samples(self, num_samples):
        extractor = MelLLMFeatureExtractor(edge_padding=120)
        assert features_of(extractor, noise(num_samples)).input_features.shape[1] == num_samples // 160

    def test_short_clip_is_padded_with_zeros(self, extractor):
        clip = noise(123)
        padded = np.concatenate([clip, np.zeros(277, np.float32)])
        assert torch.equal(features_of(extractor, clip).input_features, features_of(extractor, padded).input_features)

    def test_incomplete_last_window_is_dropped(self, extractor):
        clip = noise(400 + 160 * 9 + 159)
        assert torch.equal(
            features_of(extractor, clip).input_features, features_of(extractor, clip[:-159]).input_features
        )


class TestPadding:
    def test_default_output(self, extractor, waveforms):
        """What run_speech_recognition_seq2seq.py relies on: no `return_tensors`, `[0]`, then `pad`."""
        output = extractor(waveforms[0], sampling_rate=RATE)
        assert list(output) == ["input_features", "attention_mask"]
        assert isinstance(output["input_features"], list) and isinstance(output["input_features"][0], np.ndarray)
        assert output["input_features"][0].shape == (extractor.num_frames(len(waveforms[0])), 80)

    def test_dtypes(self, extractor, waveforms):
        tensors = features_of(extractor, waveforms[:2])
        assert (tensors.input_features.dtype, tensors.attention_mask.dtype) == (torch.float32, torch.int64)
        arrays = extractor(waveforms[:2], sampling_rate=RATE, return_tensors="np")
        assert (arrays.input_features.dtype, arrays.attention_mask.dtype) == (np.float32, np.int64)

    def test_mask_can_be_left_out(self, extractor, waveforms):
        assert list(features_of(extractor, waveforms[0], return_attention_mask=False)) == ["input_features"]
        without = MelLLMFeatureExtractor(return_attention_mask=False)
        assert list(features_of(without, waveforms[0])) == ["input_features"]
        assert "attention_mask" in features_of(without, waveforms[0], return_attention_mask=True)

    def test_pad_of_singles_equals_batch(self, extractor, waveforms):
        batch = features_of(extractor, waveforms, pad_to_multiple_of=16)
        singles = [{"input_features": extractor(clip, sampling_rate=RATE)["input_features"][0]} for clip in waveforms]
        padded = extractor.pad(singles, return_tensors="pt", pad_to_multiple_of=16)
        assert torch.equal(padded["input_features"], batch["input_features"])
        assert torch.equal(padded["attention_mask"], batch["attention_mask"])
        assert padded["attention_mask"].dtype == torch.int64

    def test_pad_accepts_lists_and_keeps_masks(self, extractor):
        """As `datasets` hands cached features back."""
        rows = [{"input_features": np.ones((n, 80)).tolist(), "attention_mask": [1] * n} for n in (2, 5)]
        padded = extractor.pad(rows, return_tensors="np")
        assert padded["input_features"].shape == (2, 5, 80) and padded["input_features"].dtype == np.float32
        assert padded["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
        assert padded["attention_mask"].dtype == np.int64
        without_masks = extractor.pad([{"input_features": row["input_features"]} for row in rows], return_tensors="np")
        assert without_masks["attention_mask"].tolist() == padded["attention_mask"].tolist()
        assert without_masks["attention_mask"].dtype == np.int64

    def test_max_length(self, extractor, waveforms):
        full = features_of(extractor, waveforms[:2])
        frames = full.input_features.shape[1]
        longer = features_of(extractor, waveforms[:2], padding="max_length", max_length=frames + 9)
        assert torch.equal(longer.input_features[:, :frames], full.input_features)
        assert longer.input_features.shape[1] == frames + 9 and (longer.attention_mask[:, frames:] == 0).all()
        cut = features_of(extractor, waveforms[:2], padding="max_length", max_length=20, truncation=True)
        assert torch.equal(cut.input_features, full.input_features[:, :20])
        assert cut.attention_mask.tolist() == [[1] * 20] * 2
        with pytest.raises(ValueError, match="max_length=20.*truncation"):
            features_of(extractor, waveforms[:2], padding="max_length", max_length=20)

    def test_multiples_round_up(self, extractor, waveforms):
        lengths = {"longest": 320, "max_length": 56, "truncated": 56}
        frames = {
            "longest": features_of(extractor, noise(50560), pad_to_multiple_of=8),
            "max_length": features_of(
                extractor, noise(800), pad_to_multiple_of=8, padding="max_length", max_length=50
            ),
            "truncated": features_of(extractor, noise(50560), pad_to_multiple_of=8, max_length=50, truncation=True),
        }
        assert {name: batch.input_features.shape[1] for name, batch in frames.items()} == lengths
        assert [int(batch.attention_mask.sum()) for batch in frames.values()] == [314, 3, 56]

    def test_truncation_alone(self, extractor, waveforms):
        cut = features_of(extractor, [noise(800), waveforms[-1]], truncation=True, max_length=50)
        assert cut.attention_mask.sum(dim=1).tolist() == [3, 50]

    @pytest.mark.parametrize("kwargs", [{"truncation": True}, {"padding": "max_length"}])
    def test_max_length_is_needed(self, extractor, kwargs):
        with pytest.raises(ValueError, match="`max_length`"):
            features_of(extractor, noise(800), **kwargs)

    @pytest.mark.parametrize(
        "kwargs", [{"padding": "shortest"}, {"max_length": 0}, {"max_length": 2.5}, {"pad_to_multiple_of": -8}]
    )
    def test_bad_arguments(self, extractor, kwargs):
        with pytest.raises(ValueError, match="|".join([*kwargs, "PaddingStrategy"])):
            features_of(extractor, noise(800), **kwargs)

    def test_no_padding(self, extractor, waveforms):
        output = extractor(waveforms[:3], sampling_rate=RATE, padding=False)
        expected = [extractor.num_frames(len(clip)) for clip in waveforms[:3]]
        assert [len(row) for row in output["input_features"]] == expected
        assert [row.sum() for row in output["attention_mask"]] == expected
        assert features_of(extractor, [noise(800), noise(800, 1)], padding=False).input_features.shape == (2, 3, 80)

    def test_always_on_the_right(self, waveforms):
        expected = features_of(MelLLMFeatureExtractor(), waveforms[:3])
        extractor = MelLLMFeatureExtractor(padding_side="left")
        extractor.padding_side = "left"
        assert extractor.padding_side == "right"
        batch = features_of(extractor, waveforms[:3], padding_side="left")
        assert torch.equal(batch.input_features, expected.input_features)
        singles = [
            {"input_features": extractor(clip, sampling_rate=RATE)["input_features"][0]} for clip in waveforms[:3]
        ]
        padded = extractor.pad(singles, padding_side="left", return_tensors="pt")
        assert torch.equal(padded["input_features"], expected.input_features)

    def test_keywords(self, extractor):
        """A processor forwards what all components may take; a typo is still an error."""
        features_of(extractor, noise(800), padding_side="left", load_audio_backend="auto", device=None, padding=None)
        with pytest.raises(TypeError, match="paddin_g"):
            features_of(extractor, noise(800), paddin_g=True)


class TestInputs:
    def test_containers_and_dtypes(self, extractor):
        clip = noise(2000)
        expected = features_of(extractor, clip).input_features
        read_only = clip.copy()
        read_only.flags.writeable = False
        same = [
            clip.astype(np.float64),
            clip.astype(">f4"),
            torch.from_numpy(clip),
            torch.from_numpy(clip).double(),
            clip.tolist(),
            tuple(clip.tolist()),
            [clip],
            (clip,),
            [clip.tolist()],
            [torch.from_numpy(clip)],
            clip[None],
            np.repeat(clip, 2)[::2],
            clip[::-1].copy()[::-1],
            read_only,
        ]
        for audio in same:
            assert torch.equal(features_of(extractor, audio).input_features, expected)
        for rounded in (clip.astype(np.float16), torch.from_numpy(clip).bfloat16()):
            torch.testing.assert_close(features_of(extractor, rounded).input_features, expected, atol=1.0, rtol=0)

    def test_input_is_left_alone(self, extractor):
        clip = noise(2000)
        before = clip.copy()
        features_of(extractor, clip)
        assert np.array_equal(clip, before)

    def test_integers_are_scaled_by_their_range(self, extractor):
        pcm = (noise(4000) * 32768).astype(np.int16)
        expected = features_of(extractor, pcm.astype(np.float32) / 32768).input_features
        for audio in (pcm, torch.from_numpy(pcm), pcm.astype(np.int32) << 16, [pcm], pcm.astype(">i2")):
            assert torch.equal(features_of(extractor, audio).input_features, expected)
        silence = np.full(4000, 128, np.uint8)
        assert (features_of(extractor, silence).input_features == 0).all()

    def test_channels_are_averaged(self, extractor):
        left, right = noise(3000), noise(3000, 1)
        expected = features_of(extractor, (left + right) / 2).input_features
        for audio in (np.stack([left, right]), torch.tensor(np.stack([left, right])), [np.stack([left, right])]):
            assert torch.equal(features_of(extractor, audio).input_features, expected)

    @pytest.mark.parametrize(
        ("shape", "hint"),
        [
            ((3000, 2), "transpose"),
            ((12, 3000), "list of 1-D"),
            ((4, 4), "list of 1-D"),
            ((2, 3, 4000), "list of 1-D"),
        ],
    )
    def test_ambiguous_shapes(self, extractor, shape, hint):
        with pytest.raises(ValueError, match=f"raw_speech.*{hint}"):
            features_of(extractor, np.zeros(shape, np.float32))

    @pytest.mark.parametrize(
        "audio",
        [
            np.zeros(0, np.float32),
            [],
            [[]],
            [noise(500), np.zeros(0, np.float32)],
            np.zeros((2, 0), np.float32),
            np.array(0.5),
            [[0.1, 0.2], [0.1, [0.2]]],
            [0.1, [0.2]],
        ],
        ids=["empty", "no clips", "empty list", "empty in batch", "no samples", "scalar", "ragged clip", "mixed"],
    )
    def test_no_waveform(self, extractor, audio):
        with pytest.raises(ValueError, match="raw_speech"):
            features_of(extractor, audio)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
    def test_broken_samples_name_the_clip(self, extractor, value):
        broken = noise(500)
        broken[17] = value
        with pytest.raises(ValueError, match=r"raw_speech\[1\]"):
            features_of(extractor, [noise(500), broken])
        with pytest.raises(ValueError, match="`raw_speech`"):
            features_of(extractor, broken.astype(np.float64))

    @pytest.mark.parametrize(
        "audio",
        [
            None,
            "speech.wav",
            b"RIFF",
            True,
            0.5,
            {"array": noise(500), "sampling_rate": RATE},
            object(),
            ["speech.wav"],
            [None],
            [noise(500), "speech.wav"],
            np.zeros(500, np.complex64),
            np.zeros(500, bool),
            np.zeros(500, np.int64),
            np.zeros(500, object),
            torch.zeros(500, dtype=torch.bool),
        ],
        ids=lambda audio: str(getattr(audio, "dtype", audio))[:20],
    )
    def test_not_audio(self, extractor, audio):
        with pytest.raises(TypeError, match="raw_speech"):
            features_of(extractor, audio)

    def test_wrong_rate(self, extractor):
        with pytest.raises(ValueError, match=r"8000 Hz.*16000 Hz.*Resample"):
            extractor(noise(500), sampling_rate=8000)

    def test_features_are_finite_for_the_loudest_audio(self, extractor):
        for preset in PRESET_NAMES:
            extractor = MelLLMFeatureExtractor.from_preset(preset)
            assert features_of(extractor, noise(3000) * 2e9).input_features.isfinite().all()

    def test_hints(self, extractor, fresh_warnings):
        extractor(noise(500))
        extractor(noise(500) * 32768, sampling_rate=RATE)
        extractor(np.stack([noise(500)] * 2), sampling_rate=RATE)
        text = fresh_warnings.text
        assert "Pass `sampling_rate`" in text and "Integer samples" in text and "averaged as the channels" in text

    def test_fetch_audio(self, extractor, speech_clips, tmp_path):
        path, array = speech_clips[0]["path"], speech_clips[0]["array"]
        with open(path, "rb") as file:
            content = file.read()
        assert np.array_equal(extractor.fetch_audio(path), array)
        nested = extractor.fetch_audio([path, [content], array])
        assert np.array_equal(nested[0], array) and np.array_equal(nested[1][0], array) and nested[2] is array
        assert len(extractor.fetch_audio(path, sampling_rate=8000)) == -(-len(array) // 2)
        assert extractor.fetch_audio([0.1, 0.2]) == [0.1, 0.2]


class TestSerialisation:
    @pytest.mark.parametrize("preset", PRESET_NAMES)
    def test_round_trip(self, preset, tmp_path):
        extractor = MelLLMFeatureExtractor.from_preset(preset, padding_value=0.5, return_attention_mask=False)
        expected = features_of(extractor, noise(5000)).input_features
        extractor.save_pretrained(tmp_path)
        loaded = MelLLMFeatureExtractor.from_pretrained(tmp_path)
        assert loaded.to_dict() == extractor.to_dict()
        assert torch.equal(features_of(loaded, noise(5000)).input_features, expected)

    def test_json_is_small_and_plain(self, extractor):
        features_of(extractor, noise(5000))
        saved = json.loads(extractor.to_json_string())
        assert saved.pop("feature_extractor_type") == "MelLLMFeatureExtractor"
        assert all(value is None or isinstance(value, (bool, int, float, str)) for value in saved.values())
        assert MelLLMFeatureExtractor(**saved).to_dict() == extractor.to_dict()

    def test_override_on_load(self, extractor, tmp_path):
        extractor.save_pretrained(tmp_path)
        assert MelLLMFeatureExtractor.from_pretrained(tmp_path, num_mel_bins=40).num_mel_bins == 40
        assert MelLLMFeatureExtractor.from_pretrained(tmp_path, edge_padding=120).edge_padding == 120
        assert MelLLMFeatureExtractor.from_pretrained(tmp_path, padding_side="left").padding_side == "right"

    def test_copies_for_data_loader_workers(self, extractor):
        expected = features_of(extractor, noise(5000)).input_features
        pickled = pickle.dumps(extractor)
        assert len(pickled) < 2000  # no tables inside
        for twin in (pickle.loads(pickled), copy.deepcopy(extractor)):
            assert torch.equal(features_of(twin, noise(5000)).input_features, expected)

    def test_changed_attributes_take_effect(self, extractor):
        features_of(extractor, noise(5000))
        extractor.mel_max_frequency = 4000.0
        expected = MelLLMFeatureExtractor(mel_max_frequency=4000.0)
        assert torch.equal(
            features_of(extractor, noise(5000)).input_features, features_of(expected, noise(5000)).input_features
        )

    def test_names_of_the_bins(self):
        for extractor in (MelLLMFeatureExtractor(num_mel_bins=40), MelLLMFeatureExtractor(feature_size=40)):
            assert extractor.num_mel_bins == extractor.feature_size == 40
        with pytest.raises(ValueError, match=r"`feature_size` and `num_mel_bins`.*40 and 80"):
            MelLLMFeatureExtractor(feature_size=40, num_mel_bins=80)

    def test_presets(self):
        assert MelLLMFeatureExtractor.from_preset("phi4").to_dict() == MelLLMFeatureExtractor().to_dict()
        assert MelLLMFeatureExtractor.from_preset("spectron", num_mel_bins=64).num_mel_bins == 64
        with pytest.raises(ValueError, match="phi4, hifigan16k, spectron.*whisper"):
            MelLLMFeatureExtractor.from_preset("whisper")
        with pytest.raises(TypeError, match="hop_lenght"):
            MelLLMFeatureExtractor.from_preset("phi4", hop_lenght=200)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("feature_size", 0),
            ("feature_size", 10**9),
            ("num_mel_bins", "80"),
            ("sampling_rate", 0),
            ("sampling_rate", 16000.5),
            ("sampling_rate", None),
            ("padding_value", float("nan")),
            ("padding_value", None),
            ("hop_length", 0),
            ("hop_length", 1),
            ("hop_length", True),
            ("win_length", 513),
            ("win_length", -1),
            ("n_fft", 2**40),
            ("n_fft", 511.5),
            ("window_function", "hamming_window_2"),
            ("window_periodic", "yes"),
            ("preemphasis", 1.5),
            ("preemphasis", float("inf")),
            ("waveform_scale", 0.0),
            ("waveform_scale", 1e30),
            ("power", 3.0),
            ("mel_scale", "bark"),
            ("mel_norm", "area"),
            ("triangularize_in_mel_space", None),
            ("mel_min_frequency", -1.0),
            ("mel_min_frequency", 7690.0),
            ("mel_max_frequency", 8001.0),
            ("mel_max_frequency", "8000"),
            ("mel_floor", 0.0),
            ("log", "log2"),
            ("edge_padding", -1),
            ("edge_padding", 10**9),
        ],
    )
    def test_bad_constructor_arguments_are_named(self, name, value):
        label = "feature_size" if name == "num_mel_bins" else name
        with pytest.raises(ValueError, match=f"`{label}`.*{str(value).replace('+', '.')}"):
            MelLLMFeatureExtractor(**{name: value})

    def test_upper_frequency_defaults_to_half_the_rate(self):
        assert MelLLMFeatureExtractor(sampling_rate=8000, mel_max_frequency=None).mel_max_frequency == 4000


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
def test_memory_of_long_audio_is_bounded(extractor):
    """Half an hour needs its waveform twice, its features and one block, not all its frames (some 2 GB) at once."""

    def peak_mib():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

    clip = np.full(30 * 60 * RATE, 0.25, np.float32)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak becomes what is in use now
    before = peak_mib()
    features = features_of(extractor, clip).input_features
    grown = peak_mib() - before
    assert features.shape == (1, extractor.num_frames(len(clip)), 80)
    assert grown < 400, f"{grown:.0f} MiB for {(clip.nbytes + features.nbytes) / 2**20:.0f} MiB of input and output"
