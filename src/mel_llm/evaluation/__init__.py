"""Measuring transcripts: error rates and speed as `evaluate` metrics that work offline, and text normalisation."""

from .cer import CharacterErrorRate
from .normalizers import TEXT_NORMALIZERS, get_text_normalizer
from .rtfx import RealTimeFactor
from .trainer_metrics import make_compute_metrics
from .wer import WordErrorRate


__all__ = [
    "TEXT_NORMALIZERS",
    "CharacterErrorRate",
    "RealTimeFactor",
    "WordErrorRate",
    "get_text_normalizer",
    "make_compute_metrics",
]
