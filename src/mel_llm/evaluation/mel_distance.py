"""How far a recording is from another of the same words: mel-cepstral distortion and log-mel distance, time-warped."""

import math

import numpy as np
import torch

from ..feature_extraction_mel_llm import MelLLMFeatureExtractor
from .time_warping import time_warp


_NUM_CEPSTRA = 13
_DECIBELS = 10.0 / math.log(10.0)


def mel_cepstra(log_mel: np.ndarray, num_coefficients: int = _NUM_CEPSTRA) -> np.ndarray:
    """Mel cepstra 1 to `num_coefficients` of frames of natural log mel power `(frames, num_mel_bins)`, without 0, the
    loudness: `(frames, num_coefficients)`.

    Scaled as the cosine series of the log amplitude is, `log |H(w)| = c_0 + sum_k c_k cos(k w)`, so that the distortion
    below is in decibels.
    """
    bins = log_mel.shape[1]
    places = (np.arange(bins) + 0.5) * math.pi / bins
    cosines = np.cos(np.outer(places, np.arange(1, num_coefficients + 1)))
    return np.asarray(log_mel, dtype=np.float64) @ cosines / bins


class MelDistance:
    """Distances between two recordings of the same words, over the frames that time warping puts together.

    * `mcd`, in dB: the mean over the path of `10 / ln 10 * sqrt(2 * sum (c_k - c'_k)^2)` over the mel cepstra 1 to 13
      (Kubichek 1993). The cepstra are those of the 80 log-mel bins here, not of a vocoder's analysis (WORLD, SPTK): figures
      of other programs are another scale.
    * `mel_l1`: the mean absolute difference of the log-mel bins over the same path, each bin in its own standard deviation
      over speech like the reference.

    The path is that of the cepstra; silence at the ends counts.

    Args:
        std (`np.ndarray` of shape `(80,)`): Deviation of each bin; see [`compute_feature_statistics`].
    """

    def __init__(self, std: "np.ndarray | torch.Tensor"):
        self.extractor = self.new_extractor()
        self.std = np.asarray(std, dtype=np.float64)
        if self.std.shape != (self.extractor.num_mel_bins,) or not (self.std > 0).all():
            raise ValueError(f"`std` must be {self.extractor.num_mel_bins} numbers above 0, got {self.std.shape}.")

    @staticmethod
    def new_extractor() -> MelLLMFeatureExtractor:
        """The features that are compared, the same for every model: 80 bins, 10 ms, 16 kHz."""
        return MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)

    def features(self, audio: np.ndarray) -> np.ndarray:
        """Log-mel frames `(frames, 80)` of a waveform `(samples,)` at 16 kHz."""
        rate = self.extractor.sampling_rate
        return np.asarray(self.extractor(audio, sampling_rate=rate, return_tensors="np")["input_features"][0])

    def __call__(self, audio: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`{"mcd": dB, "mel_l1": deviations}` of two waveforms `(samples,)` at 16 kHz."""
        spoken, real = self.features(audio), self.features(reference)
        spoken_cepstra, real_cepstra = mel_cepstra(spoken), mel_cepstra(real)
        path = time_warp(spoken_cepstra, real_cepstra)
        difference = spoken_cepstra[path[:, 0]] - real_cepstra[path[:, 1]]
        distortion = _DECIBELS * np.sqrt(2.0 * np.square(difference).sum(axis=1))
        deviation = np.abs(spoken[path[:, 0]] - real[path[:, 1]]) / self.std
        return {"mcd": float(distortion.mean()), "mel_l1": float(deviation.mean())}


__all__ = ["MelDistance", "mel_cepstra"]
