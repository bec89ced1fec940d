"""Augmentation towards what users bring: other microphones, rooms and lines, and other voices.

As in `augmentation`, what an example becomes is a function of its seed alone. The published ideas are named; the values
are ours.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from ..feature_extraction_mel_llm import MelLLMFeatureExtractor
from .augmentation import torchaudio_module


# Telephones let through this, in Hz
_TELEPHONE = (300.0, 3400.0)


@dataclass(frozen=True)
class RecordingConditions:
    """Noise, a room, a narrow band and another level, each by chance.

    Args:
        noise_chance: Of coloured noise, between white and brown, `min_snr_db` to `max_snr_db` below the speech.
        room_chance: Of the echo of a room: noise that decays within 0.1 to `max_room_seconds` (to -60 dB).
        band_chance: Of a narrow band: a telephone's, or all below 2 kHz to 7 kHz.
        max_gain_db: The level is changed by up to this, either way; nothing is clipped.

    Raises:
        ValueError: A chance is not from 0 to 1, or a range is empty.
    """

    noise_chance: float = 0.5
    min_snr_db: float = 5.0
    max_snr_db: float = 30.0
    room_chance: float = 0.3
    max_room_seconds: float = 0.5
    band_chance: float = 0.3
    max_gain_db: float = 10.0

    def __post_init__(self):
        for name in ("noise_chance", "room_chance", "band_chance"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be from 0 to 1, got {getattr(self, name)}.")
        if self.min_snr_db > self.max_snr_db:
            raise ValueError(f"`min_snr_db` {self.min_snr_db} is more than `max_snr_db` {self.max_snr_db}.")
        if self.max_room_seconds < 0.1 or self.max_gain_db < 0:
            raise ValueError("`max_room_seconds` must be at least 0.1 and `max_gain_db` at least 0.")
        torchaudio_module("functional")

    def __call__(self, waveform: np.ndarray, sampling_rate: int, seed: int) -> np.ndarray:
        """`(samples,)` to the same shape, float32."""
        random = np.random.default_rng(seed)
        # All are drawn, whatever is used, so that a chance that is changed does not change the rest
        chances, choices = random.random(4), random.random(6)
        noise_seed, echo_seed = random.integers(1 << 62, size=2)
        audio = torch.from_numpy(np.array(waveform, dtype=np.float32))
        level = audio.square().mean().sqrt()
        if len(audio) == 0 or level == 0:
            return audio.numpy()
        if chances[0] < self.room_chance:
            audio = _in_a_room(audio, sampling_rate, self._between(0.1, self.max_room_seconds, choices[0]), echo_seed)
        if chances[1] < self.noise_chance:
            snr = self._between(self.min_snr_db, self.max_snr_db, choices[1])
            noise = coloured_noise(len(audio), 2.0 * choices[2], noise_seed)
            audio = torchaudio_module("functional").add_noise(audio, noise, torch.tensor(float(snr)))
        if chances[2] < self.band_chance:
            audio = _in_a_band(audio, sampling_rate, choices[3], choices[4])
        gain = float(10 ** (self._between(-self.max_gain_db, self.max_gain_db, choices[5]) / 20))
        audio = audio * (gain * level / audio.square().mean().sqrt().clamp(min=1e-8))
        return (audio / audio.abs().max().clamp(min=1.0)).numpy()

    @staticmethod
    def _between(low: float, high: float, share: float) -> float:
        return low + (high - low) * share


def coloured_noise(num_samples: int, exponent: float, seed: int) -> torch.Tensor:
    """Noise `(samples,)` whose power falls with frequency^exponent: 0 is white, 1 pink, 2 brown."""
    white = torch.randn(num_samples, generator=torch.Generator().manual_seed(int(seed)))
    spectrum = torch.fft.rfft(white)
    frequency = torch.arange(len(spectrum)).clamp(min=1 + len(spectrum) // 200)  # below 40 Hz or so it stays level
    return torch.fft.irfft(spectrum * frequency ** (-exponent / 2), n=num_samples)


def _in_a_room(audio: torch.Tensor, sampling_rate: int, seconds: float, seed: int) -> torch.Tensor:
    size = max(2, round(seconds * sampling_rate))
    generator = torch.Generator().manual_seed(int(seed))
    decay = torch.exp(-math.log(1000.0) * torch.arange(size) / size)
    echo = torch.randn(size, generator=generator) * decay
    echo[0] = 0.0
    # As strong as the direct sound at most
    echo *= torch.rand((), generator=generator) / echo.square().sum().sqrt()
    echo[0] = 1.0
    return torchaudio_module("functional").fftconvolve(audio, echo)[: len(audio)]


def _in_a_band(audio: torch.Tensor, sampling_rate: int, kind: float, share: float) -> torch.Tensor:
    functional = torchaudio_module("functional")
    if kind < 0.5:
        low, high = _TELEPHONE
    else:
        low, high = None, 2000.0 * 3.5**share
    for _ in range(2):  # steeper
        if high < 0.45 * sampling_rate:
            audio = functional.lowpass_biquad(audio, sampling_rate, high)
        if low is not None:
            audio = functional.highpass_biquad(audio, sampling_rate, low)
    return audio


@dataclass(frozen=True)
class VoiceWarp:
    """Stretches the frequency axis of log-mel features, as a longer or shorter vocal tract would (Jaitly and Hinton,
    2013). With speed perturbation, which also moves the pitch, few voices become many.

    Args:
        extractor ([`MelLLMFeatureExtractor`]): Made the features.
        max_warp: Frequencies become up to this much higher or lower; 0.1 is usual, and twice that still a voice.

    Raises:
        ValueError: `max_warp` is not from 0 to 0.5.
    """

    extractor: MelLLMFeatureExtractor = field(repr=False)
    max_warp: float = 0.15

    def __post_init__(self):
        if not 0.0 <= self.max_warp <= 0.5:
            raise ValueError(f"`max_warp` must be from 0 to 0.5, got {self.max_warp}.")

    def __call__(self, features: torch.Tensor, seed: int) -> torch.Tensor:
        """`(frames, num_mel_bins)` of one clip to the same shape."""
        factor = 1.0 + self.max_warp * (2.0 * np.random.default_rng(seed).random() - 1.0)
        return self.warp(features, factor)

    def warp(self, features: torch.Tensor, factor: float) -> torch.Tensor:
        """What was at a frequency f is then at `factor * f`, up to near the top, where the axis ends as before."""
        bins = features.shape[-1]
        low, high = (_mel(torch.tensor(float(f))) for f in self._range())
        mels = low + (high - low) * (torch.arange(bins) + 1) / (bins + 1)  # the bins' centres
        nyquist = self.extractor.sampling_rate / 2
        target = _hertz(mels)
        knee = 0.8 * nyquist * min(factor, 1.0)
        above = nyquist - (nyquist - knee / factor) * (nyquist - target) / (nyquist - knee)
        source = torch.where(target <= knee, target / factor, above)
        place = ((_mel(source) - low) / (high - low) * (bins + 1) - 1).clamp(0, bins - 1).to(features.device)
        left = place.floor().long().clamp(max=bins - 2)
        share = (place - left).to(features.dtype)
        return features[:, left] * (1 - share) + features[:, left + 1] * share

    def _range(self) -> tuple[float, float]:
        high = self.extractor.mel_max_frequency
        return self.extractor.mel_min_frequency, self.extractor.sampling_rate / 2 if high is None else high


def _mel(hertz: torch.Tensor) -> torch.Tensor:
    # HTK's scale; Slaney's differs by less than the step between two bins where voices differ
    return 2595.0 * torch.log10(1.0 + hertz / 700.0)


def _hertz(mel: torch.Tensor) -> torch.Tensor:
    return 700.0 * (10 ** (mel / 2595.0) - 1.0)


__all__ = ["RecordingConditions", "VoiceWarp", "coloured_noise"]
