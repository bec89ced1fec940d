"""How good a recording sounds, guessed by a network without a reference."""

import importlib.metadata
from collections.abc import Callable

import numpy as np

from ..audio_utils_mel_llm import resample
from .plugins import PREFIX, load_callable


# `(waveform (samples,) float32, sampling rate in Hz) -> a score, or several by name`
MOSPredictor = Callable[[np.ndarray, int], "float | dict[str, float]"]

_RATE = 16000


class DNSMOS:
    """DNSMOS P.835 and P.808 (arXiv 2110.01763), from the package speechmos, which carries its weights; 1 to 5.

    Made to judge noise suppression: `sig` is the speech, `bak` the background, `ovrl` both, `p808` the overall score of an
    earlier network. It looks at windows of nine seconds; shorter recordings are repeated.

    Raises:
        ImportError: The package, or one that it needs, is missing.
    """

    def __init__(self):
        try:
            from speechmos import dnsmos
        except ImportError as error:  # the package does not declare what it needs
            raise ImportError(
                f'--mos dnsmos: {error}. This package\'s extra `tts-eval` brings it: `pip install -e ".[tts-eval]"` in a clone.'
            ) from error
        self._run = dnsmos.run
        self.description = f"speechmos {importlib.metadata.version('speechmos')} dnsmos"

    def __call__(self, audio: np.ndarray, sampling_rate: int) -> dict[str, float]:
        audio = np.clip(resample(audio, sampling_rate, _RATE), -1.0, 1.0)  # it refuses what resampling overshoots
        scores = self._run(audio, _RATE)
        return {name: float(scores[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")}


def load_mos(spec: str) -> MOSPredictor:
    """The predictor that a command line names: `dnsmos`, or `python:module.function` with `function(waveform, rate)` that
    returns a number, or a dict of them.

    Raises:
        ImportError, ValueError: It cannot be loaded; the message says why.
    """
    if spec == "dnsmos":
        return DNSMOS()
    if not spec.startswith(PREFIX):
        raise ValueError(f"--mos must be dnsmos or {PREFIX}module.function, got {spec!r}.")
    return load_callable(spec, "--mos")


__all__ = ["DNSMOS", "MOSPredictor", "load_mos"]
