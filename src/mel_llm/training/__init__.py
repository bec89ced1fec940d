"""Preparing a Mel-LLM for training, and training it."""

from .augmentation import SpecAugment, SpeedPerturbation
from .collator import SynthesisCollator, TaskCollator, TranscriptionCollator
from .conditions import RecordingConditions, VoiceWarp
from .continuation import ContinuationCollator, PromptCut, QACollator, select_answered, select_continuations
from .ctc import count_unspellable, ctc_bytes
from .dataset import SpeechDataset, stream_examples
from .lora import LORA_PRESETS, count_parameters, freeze, lora_config
from .report import DataReport, select_clips
from .sampler import SpeechSampler
from .sources import SPEAKING_TASKS, TASKS, SpeechSource, load_source
from .statistics import compute_feature_statistics
from .tokenizer import train_tokenizer
from .trainer import SpeechTrainer, last_checkpoint, push_whole, repo_of, save_whole
from .vocoder import SegmentSampler, VocoderTrainer, VocoderTrainingArguments, round_trip_error


__all__ = [
    "LORA_PRESETS",
    "SPEAKING_TASKS",
    "TASKS",
    "ContinuationCollator",
    "DataReport",
    "PromptCut",
    "QACollator",
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
    "freeze",
    "last_checkpoint",
    "load_source",
    "lora_config",
    "push_whole",
    "repo_of",
    "round_trip_error",
    "save_whole",
    "select_answered",
    "select_clips",
    "select_continuations",
    "stream_examples",
    "train_tokenizer",
]
