"""Whether two recordings are of one voice: embeddings of speakers, and the cosine between them."""

import importlib.metadata
import warnings
from collections.abc import Callable

import numpy as np
import torch

from ..audio_utils_mel_llm import resample
from .plugins import PREFIX, load_callable


# `(waveform (samples,) float32, sampling rate in Hz) -> embedding (size,)`
SpeakerEncoder = Callable[[np.ndarray, int], np.ndarray]

_RATE = 16000
_MIN_SECONDS = 0.1


class ResemblyzerEncoder:
    """The GE2E encoder (arXiv 1710.10467) of the package resemblyzer, which carries its weights; 256 numbers.

    As the package does it: louder to -30 dBFS, long silences taken out. Where its voice detector hears nothing, the whole
    recording is embedded.

    Raises:
        ImportError: The package, or one that it needs, is missing.
    """

    def __init__(self, device: str | None = None):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # where it imports from scipy
                from resemblyzer import VoiceEncoder, normalize_volume, trim_long_silences
                from resemblyzer.hparams import audio_norm_target_dBFS
        except ImportError as error:
            raise ImportError(
                f"--speaker_encoder resemblyzer: {error}. Install this package's extra `tts-eval`, "
                '`pip install -e ".[tts-eval]"` in a clone, and `pip install --no-deps resemblyzer`.'
            ) from error
        self._normalize = lambda audio: normalize_volume(audio, audio_norm_target_dBFS, increase_only=True)
        self._trim = trim_long_silences
        self.encoder = VoiceEncoder(device or ("cuda" if torch.cuda.is_available() else "cpu"), verbose=False)
        self.description = f"resemblyzer {importlib.metadata.version('resemblyzer')}"

    def __call__(self, audio: np.ndarray, sampling_rate: int) -> np.ndarray:
        audio = resample(audio, sampling_rate, _RATE)
        if not audio.any():
            raise ValueError("the recording is silent")
        audio = np.clip(self._normalize(audio), -1.0, 1.0).astype(np.float32)
        trimmed = self._trim(audio) if len(audio) >= _MIN_SECONDS * _RATE else audio
        return self.encoder.embed_utterance(trimmed if len(trimmed) >= _MIN_SECONDS * _RATE else audio)


def load_speaker_encoder(spec: str, device: str | None = None) -> SpeakerEncoder:
    """The encoder that a command line names: `resemblyzer`, or `python:module.function` with `function(waveform, rate) ->
    (size,)`.

    Raises:
        ImportError, ValueError: It cannot be loaded; the message says why.
    """
    if spec == "resemblyzer":
        return ResemblyzerEncoder(device)
    if not spec.startswith(PREFIX):
        raise ValueError(f"--speaker_encoder must be resemblyzer or {PREFIX}module.function, got {spec!r}.")
    return load_callable(spec, "--speaker_encoder")


def cosine_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """The cosine between two embeddings `(size,)`, from -1 to 1.

    Raises:
        ValueError: Their shapes differ, or one is zero or not finite.
    """
    first, second = (np.asarray(vector, dtype=np.float64) for vector in (first, second))
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"Embeddings must be vectors of one size, got the shapes {first.shape} and {second.shape}.")
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    if not np.isfinite(norms) or norms == 0:
        raise ValueError("An embedding is zero or not finite.")
    return float(np.clip(first @ second / norms, -1.0, 1.0))


__all__ = ["ResemblyzerEncoder", "SpeakerEncoder", "cosine_similarity", "load_speaker_encoder"]
