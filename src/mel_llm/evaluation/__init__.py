"""Measuring transcripts and speech: error rates and speed as `evaluate` metrics that work offline, text normalisation, and
the evaluation of models that transcribe and of models that speak."""

from .answer_accuracy import AnswerAccuracy
from .answer_report import answer_tables, summarize_answers
from .answer_systems import Answerer, make_answerer
from .asr_report import asr_table, compare_speed, summarize_asr
from .bootstrap import bootstrap_interval
from .cer import CharacterErrorRate
from .clip_evaluation import ClipEvaluation
from .clip_sets import ClipSet, load_clip_set
from .clip_systems import ClipSystem, FunctionSystem, Transcriber, make_transcriber
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
from .open_asr import BENCHMARKS, eval_results, load_benchmark
from .perplexity import LogPerplexity
from .question_answering import QuestionAnsweringAccuracy, SpokenQuestion, load_questions
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
    "BENCHMARKS",
    "TEXT_NORMALIZERS",
    "AnswerAccuracy",
    "Answerer",
    "AudioFolder",
    "CharacterErrorRate",
    "ClipEvaluation",
    "ClipSet",
    "ClipSystem",
    "ContinuationModel",
    "CopySynthesis",
    "FunctionSystem",
    "LogPerplexity",
    "MelDistance",
    "ModelSpeech",
    "QuestionAnsweringAccuracy",
    "RealTimeFactor",
    "ReferenceSpeech",
    "SpeechEvaluation",
    "SpeechSystem",
    "SpokenPrompt",
    "SpokenQuestion",
    "Transcriber",
    "Utterance",
    "WordErrorRate",
    "answer_tables",
    "asr_table",
    "bootstrap_interval",
    "choose_voices",
    "compare_speed",
    "cosine_similarity",
    "eval_results",
    "get_text_normalizer",
    "load_benchmark",
    "load_clip_set",
    "load_mos",
    "load_prompts",
    "load_questions",
    "load_recognizer",
    "load_speaker_encoder",
    "load_utterances",
    "make_answerer",
    "make_compute_metrics",
    "make_continuation_judges",
    "make_judges",
    "make_transcriber",
    "speech_table",
    "summarize_answers",
    "summarize_asr",
    "summarize_continuations",
    "summarize_speech",
]
