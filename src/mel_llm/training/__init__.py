"""Preparing a Mel-LLM for training, and training it."""

from ..spelling import ctc_bytes
from .alignment import AlignmentHead, add_alignment_head, check_alignment, remove_alignment_head
from .augmentation import SpecAugment, SpeedPerturbation
from .collator import SynthesisCollator, TaskCollator, TranscriptionCollator
from .compilation import compile_layers, without_compiled_layers
from .conditions import RecordingConditions, VoiceWarp
from .continuation import ContinuationCollator, PromptCut, QACollator, select_answered, select_continuations
from .ctc import count_unspellable
from .dataset import SpeechDataset
from .freezing import describe_trainable, freeze_layers, trainable_table
from .lora import LORA_PRESETS, count_parameters, freeze, load_adapter, lora_config
from .packing import PackedTranscriptionCollator, check_packing, pack_chats, pack_transcripts
from .report import DataReport, select_clips
from .sampler import SpeechSampler
from .sources import SPEAKING_TASKS, TASKS, SpeechSource, load_source
from .statistics import compute_feature_statistics
from .streaming import SpeechStream
from .teacher import SpeechTeacher, TeacherError, fit_states
from .token_budget import TokenBudgetSampler, TokenCounter, batch_tokens
from .tokenizer import train_tokenizer
from .trainer import SpeechTrainer, last_checkpoint, push_whole, repo_of, resume_stream, save_whole
from .vocoder import SegmentSampler, VocoderTrainer, VocoderTrainingArguments, round_trip_error


__all__ = [
    "LORA_PRESETS",
    "SPEAKING_TASKS",
    "TASKS",
    "AlignmentHead",
    "ContinuationCollator",
    "DataReport",
    "PackedTranscriptionCollator",
    "PromptCut",
    "QACollator",
    "RecordingConditions",
    "SegmentSampler",
    "SpecAugment",
    "SpeechDataset",
    "SpeechSampler",
    "SpeechSource",
    "SpeechStream",
    "SpeechTeacher",
    "SpeechTrainer",
    "SpeedPerturbation",
    "SynthesisCollator",
    "TaskCollator",
    "TeacherError",
    "TokenBudgetSampler",
    "TokenCounter",
    "TranscriptionCollator",
    "VocoderTrainer",
    "VocoderTrainingArguments",
    "VoiceWarp",
    "add_alignment_head",
    "batch_tokens",
    "check_alignment",
    "check_packing",
    "compile_layers",
    "compute_feature_statistics",
    "count_parameters",
    "count_unspellable",
    "ctc_bytes",
    "describe_trainable",
    "fit_states",
    "freeze",
    "freeze_layers",
    "last_checkpoint",
    "load_adapter",
    "load_source",
    "lora_config",
    "pack_chats",
    "pack_transcripts",
    "push_whole",
    "remove_alignment_head",
    "repo_of",
    "resume_stream",
    "round_trip_error",
    "save_whole",
    "select_answered",
    "select_clips",
    "select_continuations",
    "train_tokenizer",
    "trainable_table",
    "without_compiled_layers",
]
