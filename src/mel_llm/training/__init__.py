"""Preparing a Mel-LLM for training, and training it."""

from .augmentation import SpecAugment, SpeedPerturbation
from .collator import TranscriptionCollator
from .dataset import SpeechDataset, stream_examples
from .lora import LORA_PRESETS, count_parameters, freeze, lora_config
from .report import DataReport, select_clips
from .sampler import SpeechSampler
from .sources import SpeechSource, load_source
from .statistics import compute_feature_statistics
from .tokenizer import train_tokenizer
from .trainer import SpeechTrainer, last_checkpoint, push_whole, repo_of, save_whole
from .vocoder import SegmentSampler, VocoderTrainer, VocoderTrainingArguments, round_trip_error


__all__ = [
    "LORA_PRESETS",
    "DataReport",
    "SegmentSampler",
    "SpecAugment",
    "SpeechDataset",
    "SpeechSampler",
    "SpeechSource",
    "SpeechTrainer",
    "SpeedPerturbation",
    "TranscriptionCollator",
    "VocoderTrainer",
    "VocoderTrainingArguments",
    "compute_feature_statistics",
    "count_parameters",
    "freeze",
    "last_checkpoint",
    "load_source",
    "lora_config",
    "push_whole",
    "repo_of",
    "round_trip_error",
    "save_whole",
    "select_clips",
    "stream_examples",
    "train_tokenizer",
]
