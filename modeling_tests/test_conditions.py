"""Augmentation towards other rooms, lines and voices: what it does to sound, and that seeds decide about it alone."""

import numpy as np
import pytest
import torch
from test_train_script import SCRATCH, folder, losses, script, train, words  # noqa: F401  (fixtures among them)

from mel_llm import MelLLMFeatureExtractor
from mel_llm.training import RecordingConditions, SpecAugment, VoiceWarp
from mel_llm.training.command_line import spec_augment
from mel_llm.training.conditions import coloured_noise


RATE = 16000
SILENT = {"noise_chance": 0.0, "room_chance": 0.0, "band_chance": 0.0, "max_gain_db": 0.0}


@pytest.fixture(scope="module")
def clip(speech_clips):
    return speech_clips[0]["array"]


def power_in(audio, low, high):
    spectrum = np.abs(np.fft.rfft(audio)) ** 2
    frequency = np.fft.rfftfreq(len(audio), 1 / RATE)
    return spectrum[(frequency >= low) & (frequency < high)].sum()


def test_a_seed_decides(clip):
    conditions = RecordingConditions()
    changed = [conditions(clip, RATE, seed) for seed in range(20)]
    assert all(np.array_equal(conditions(clip, RATE, seed), changed[seed]) for seed in range(20))
    assert all(audio.shape == clip.shape and audio.dtype == np.float32 for audio in changed)
    assert all(np.isfinite(audio).all() and np.abs(audio).max() <= 1.0 for audio in changed)
    assert len({audio.tobytes() for audio in changed}) == 20
    np.testing.assert_allclose(RecordingConditions(**SILENT)(clip, RATE, 0), clip, atol=1e-6)
    for empty in (np.zeros(0, np.float32), np.zeros(100, np.float32)):
        assert np.array_equal(conditions(empty, RATE, 0), empty)


def test_noise_is_as_loud_as_it_says(clip):
    for snr in (0.0, 20.0):
        noisy = RecordingConditions(**{**SILENT, "noise_chance": 1.0}, min_snr_db=snr, max_snr_db=snr)(clip, RATE, 3)
        # The level is restored, so the speech in it is found by projection
        scale = (noisy @ clip) / (clip @ clip)
        noise = noisy - scale * clip
        assert 10 * np.log10((scale * clip) @ (scale * clip) / (noise @ noise)) == pytest.approx(snr, abs=0.5)
    white, brown = (coloured_noise(RATE, exponent, 0).numpy() for exponent in (0.0, 2.0))
    assert power_in(white, 4000, 8000) == pytest.approx(power_in(white, 0, 4000), rel=0.2)
    assert power_in(brown, 4000, 8000) < 0.05 * power_in(brown, 0, 4000)


def test_a_telephone_has_no_treble_and_a_room_an_echo(clip):
    band = RecordingConditions(**{**SILENT, "band_chance": 1.0})
    shares = [power_in(band(clip, RATE, seed), 7500, 8000) / power_in(clip, 7500, 8000) for seed in range(10)]
    assert all(share < 0.5 for share in shares)
    room = RecordingConditions(**{**SILENT, "room_chance": 1.0})
    click = np.zeros(RATE, np.float32)
    click[1000] = 0.5
    heard = room(click, RATE, 1)
    assert np.abs(heard).argmax() == 1000 and np.abs(heard[:1000]).max() < 1e-4
    early, late = np.abs(heard[1001:2000]).mean(), np.abs(heard[10000:]).mean()
    assert early > 0 and late < 0.01 * early


def test_the_gain_stays_within_its_range(clip):
    quiet = clip * 0.1
    gains = [
        np.sqrt(
            (RecordingConditions(**{**SILENT, "max_gain_db": 6.0})(quiet, RATE, seed) ** 2).mean() / (quiet**2).mean()
        )
        for seed in range(20)
    ]
    assert 0.5 < min(gains) < 0.8 and 1.2 < max(gains) < 2.0


def test_a_warped_voice_moves_its_frequencies():
    extractor = MelLLMFeatureExtractor.from_preset("phi4")

    def features(frequency):
        tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE)
        return extractor(tone.astype(np.float32), sampling_rate=RATE, return_tensors="pt")["input_features"][0]

    warp = VoiceWarp(extractor, 0.3)
    for factor in (0.8, 1.2):
        warped = warp.warp(features(1000), factor).mean(0).argmax()
        assert abs(int(warped) - int(features(1000 * factor).mean(0).argmax())) <= 1
    same = features(1000)
    torch.testing.assert_close(warp.warp(same, 1.0), same, atol=1e-3, rtol=1e-4)
    assert torch.equal(warp(same, 5), warp(same, 5)) and not torch.equal(warp(same, 5), warp(same, 6))
    assert torch.isfinite(warp.warp(same, 1.3)).all() and torch.isfinite(warp.warp(same, 0.7)).all()


def test_what_is_out_of_range_is_told():
    for fields in ({"noise_chance": 2.0}, {"min_snr_db": 40.0}, {"max_room_seconds": 0.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            RecordingConditions(**fields)
    with pytest.raises(ValueError, match="max_warp"):
        VoiceWarp(MelLLMFeatureExtractor(), 0.9)


def test_how_much_is_masked_is_for_the_command_line(script, folder, tmp_path, capsys):  # noqa: F811
    def masks(*more):
        return spec_augment(script.parse_arguments(words(folder, tmp_path, *more))[1])

    assert masks() is None and masks("--spec_augment") == SpecAugment()
    fields = '{"max_time_share": 0.05, "num_freq_masks": 1}'
    assert masks("--spec_augment", "--spec_augment_config", fields) == SpecAugment(
        max_time_share=0.05, num_freq_masks=1
    )
    for given, message in (
        (["--spec_augment_config", fields], "needs --spec_augment"),
        (["--spec_augment", "--spec_augment_config", '{"share": 1}'], "no field share"),
        (["--spec_augment", "--spec_augment_config", '{"max_time_share": 2}'], "max_time_share"),
        (
            ["--spec_augment", "--spec_augment_config", '{"max_time_share": null}'],
            "--spec_augment_config: `max_time_share`",
        ),
        (
            ["--spec_augment", "--spec_augment_config", '{"max_freq_bins": true}'],
            "--spec_augment_config: `max_freq_bins`",
        ),
        (["--spec_augment", "--spec_augment_config", "[1]"], "error: --spec_augment_config must be a JSON object"),
    ):
        with pytest.raises(SystemExit):
            masks(*given)
        assert message in capsys.readouterr().err


def test_training_with_all_of_it(script, folder, tmp_path):  # noqa: F811
    more = [
        "--conditions",
        "--voice_warp",
        "0.15",
        "--speed_factors",
        "0.9",
        "1.1",
        "--spec_augment",
        "--spec_augment_config",
        '{"max_time_share": 0.1}',
        "--max_steps",
        "3",
    ]
    curves = []
    for name, extra in (("workers", ["--dataloader_num_workers", "1"]), ("device", ["--features_on_device"])):
        train(script, *words(folder, tmp_path / name, *SCRATCH, *more, *extra))
        curves.append(list(losses(tmp_path / name).values()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    train(script, *words(folder, tmp_path / "plain", *SCRATCH, "--max_steps", "3"))
    assert list(losses(tmp_path / "plain").values()) != pytest.approx(curves[0], rel=1e-4)
