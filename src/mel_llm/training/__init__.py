"""Preparing a Mel-LLM for training, and training it."""

from .collator import TranscriptionCollator
from .statistics import compute_feature_statistics
from .tokenizer import train_tokenizer


__all__ = ["TranscriptionCollator", "compute_feature_statistics", "train_tokenizer"]
