"""Preparing a Mel-LLM for training, and training it."""

from .augmentation import SpecAugment, SpeedPerturbation
from .collator import SynthesisCollator, TaskCollator, TranscriptionCollator
from .conditions import RecordingConditions, VoiceWarp
from .ctc import count_unspellable, ctc_bytes
from .dataset import SpeechDataset, stream_examples
from .freezing import describe_trainable, freeze_layers, trainable_table
from .lora import LORA_PRESETS, count_parameters, freeze, load_adapter, lora_config
from .report import DataReport, select_clips
from .sampler import SpeechSampler
from .sources import TASKS, SpeechSource, load_source
from .statistics import compute_feature_statistics
from .tokenizer import train_tokenizer
from .trainer import SpeechTrainer, last_checkpoint, push_whole, repo_of, save_whole
from .vocoder import SegmentSampler, VocoderTrainer, VocoderTrainingArguments, round_trip_error


__all__ = [
    "LORA_PRESETS",
    "TASKS",
    "DataReport",
    "RecordingConditions",
    "SegmentSampler",
    "SpecAugment",
    "SpeechDataset",
    "SpeechSampler",
    "SpeechSource",
    "SpeechTrainer",
    "SpeedPerturbation",
    "SynthesisCollator",
    "TaskCollator",
    "TranscriptionCollator",
    "VocoderTrainer",
    "VocoderTrainingArguments",
    "VoiceWarp",
    "compute_feature_statistics",
    "count_parameters",
    "count_unspellable",
    "ctc_bytes",
    "describe_trainable",
    "freeze",
    "freeze_layers",
    "last_checkpoint",
    "load_adapter",
    "load_source",
    "lora_config",
    "push_whole",
    "repo_of",
    "round_trip_error",
    "save_whole",
    "select_clips",
    "stream_examples",
    "train_tokenizer",
    "trainable_table",
]
