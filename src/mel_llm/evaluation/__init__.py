"""Measuring transcripts and speech: error rates and speed as `evaluate` metrics that work offline, text normalisation, and
the evaluation of models that speak."""

from .bootstrap import bootstrap_interval
from .cer import CharacterErrorRate
from .continuation_evaluation import (
    ContinuationModel,
    SpokenPrompt,
    load_prompts,
    make_continuation_judges,
    summarize_continuations,
)
from .mel_distance import MelDistance
from .mos import load_mos
from .normalizers import TEXT_NORMALIZERS, get_text_normalizer
from .perplexity import LogPerplexity
from .question_answering import AnswerAccuracy, SpokenQuestion, load_questions
from .recognizers import load_recognizer
from .rtfx import RealTimeFactor
from .speaker_similarity import cosine_similarity, load_speaker_encoder
from .speech_evaluation import SpeechEvaluation
from .speech_judges import make_judges
from .speech_report import speech_table, summarize_speech
from .speech_systems import AudioFolder, CopySynthesis, ModelSpeech, ReferenceSpeech, SpeechSystem
from .trainer_metrics import make_compute_metrics
from .utterances import Utterance, load_utterances
from .voices import choose_voices
from .wer import WordErrorRate


__all__ = [
    "TEXT_NORMALIZERS",
    "AnswerAccuracy",
    "AudioFolder",
    "CharacterErrorRate",
    "ContinuationModel",
    "CopySynthesis",
    "LogPerplexity",
    "MelDistance",
    "ModelSpeech",
    "RealTimeFactor",
    "ReferenceSpeech",
    "SpeechEvaluation",
    "SpeechSystem",
    "SpokenPrompt",
    "SpokenQuestion",
    "Utterance",
    "WordErrorRate",
    "bootstrap_interval",
    "choose_voices",
    "cosine_similarity",
    "get_text_normalizer",
    "load_mos",
    "load_prompts",
    "load_questions",
    "load_recognizer",
    "load_speaker_encoder",
    "load_utterances",
    "make_compute_metrics",
    "make_continuation_judges",
    "make_judges",
    "speech_table",
    "summarize_continuations",
    "summarize_speech",
]
