"""Augmentation of training data, by torchaudio: speed perturbation of waveforms, SpecAugment of features.

Each example is changed by a random generator of its own, seeded with the run's seed, the epoch and the example. What an
example becomes depends neither on the number of workers nor on what came before it, so a training run that was
interrupted goes on exactly as it would have.
"""

import functools
import importlib
from dataclasses import dataclass

import numpy as np
import torch


def torchaudio_module(module: str):
    """`torchaudio.<module>`, with an error that says what to install."""
    try:
        return importlib.import_module(f"torchaudio.{module}")
    except ImportError as error:
        raise ImportError(
            "Augmentation needs torchaudio of the same release as torch: `pip install torchaudio`."
        ) from error


@functools.lru_cache(maxsize=32)  # the resampling filter is the expensive part
def _speed_transform(sampling_rate: int, factor: float):
    return torchaudio_module("transforms").Speed(sampling_rate, factor)


@dataclass(frozen=True)
class SpeedPerturbation:
    """Plays a clip faster or slower, pitch and all (Ko et al., 2015).

    Args:
        factors: One of them is chosen for each clip; 1.1 makes it shorter and higher.

    Raises:
        ValueError: There are no factors, or one is not from 0.5 to 2.
    """

    factors: tuple[float, ...] = (0.9, 1.0, 1.1)

    def __post_init__(self):
        if not self.factors or not all(0.5 <= factor <= 2.0 for factor in self.factors):
            raise ValueError(f"`factors` of speed must be from 0.5 to 2, got {self.factors}.")
        if any(factor != 1.0 for factor in self.factors):
            torchaudio_module("transforms")  # missing is to be told now and not in a worker

    def __call__(self, waveform: np.ndarray, sampling_rate: int, seed: int) -> np.ndarray:
        """`(samples,)` to `(samples / factor,)`, float32."""
        factor = self.factors[int(np.random.default_rng(seed).integers(len(self.factors)))]
        if factor == 1.0:
            return waveform
        changed, _ = _speed_transform(sampling_rate, factor)(torch.from_numpy(np.ascontiguousarray(waveform)))
        return changed.numpy()


@dataclass(frozen=True)
class SpecAugment:
    """Masks stretches of time and bands of mel bins (Park et al., 2019).

    The masked places get the clip's mean of their mel bin. The defaults are the "LD" policy, with the time masks
    limited to a fifth of the clip so that short commands keep their words (ours).

    Args:
        num_time_masks, max_time_frames: How many stretches, and the most frames that one has.
        num_freq_masks, max_freq_bins: How many bands, and the most mel bins that one has.
        max_time_share: The most of a clip that one stretch has.
    """

    num_time_masks: int = 2
    max_time_frames: int = 100
    num_freq_masks: int = 2
    max_freq_bins: int = 27
    max_time_share: float = 0.2

    def __post_init__(self):
        for name in ("num_time_masks", "max_time_frames", "num_freq_masks", "max_freq_bins"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
        if not isinstance(self.max_time_share, (int, float)) or not 0.0 < self.max_time_share <= 1.0:
            raise ValueError(f"`max_time_share` must be more than 0 and at most 1, got {self.max_time_share!r}.")
        torchaudio_module("transforms")

    def __call__(self, features: torch.Tensor, seed: int) -> torch.Tensor:
        """`(frames, num_mel_bins)` of one clip, without padding, to the same shape."""
        # The functional, because the transform applies `p` to the bands too
        mask_along_axis = torchaudio_module("functional").mask_along_axis
        mean = features.mean(dim=0)
        masked = (features - mean).T  # (num_mel_bins, frames)
        devices = [features.device] if features.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for _ in range(self.num_time_masks):
                masked = mask_along_axis(masked, self.max_time_frames, 0.0, axis=1, p=self.max_time_share)
            for _ in range(self.num_freq_masks):
                masked = mask_along_axis(masked, self.max_freq_bins, 0.0, axis=0)
        return masked.T + mean


def example_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one example in one epoch, from 0 to 2^63."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


__all__ = ["SpecAugment", "SpeedPerturbation", "example_seed", "torchaudio_module"]
