"""Mel-LLM and SPECTRON in Hugging Face transformers: language models that read and write spectrograms.

Importing this package is all it takes for `AutoModelForSpeechSeq2Seq`, `AutoProcessor`, `pipeline(...)`, `Trainer`
and PEFT to work with a Mel-LLM checkpoint.
"""

from .audio_utils_mel_llm import load_audio, stream_audio
from .configuration_mel_llm import MelLLMAudioConfig, MelLLMConfig, MelLLMSpeechConfig, MelLLMVocoderConfig
from .feature_extraction_mel_llm import MelLLMFeatureExtractor
from .model_card import create_model_card
from .modeling_mel_llm import MelLLMForSpeechSeq2Seq, MelLLMModel, MelLLMPreTrainedModel
from .modeling_mel_llm_continuation import MelLLMForSpeechContinuation
from .modeling_mel_llm_speech import MelLLMForTextToSpeech
from .pipeline_mel_llm import SpeechContinuationPipeline
from .processing_mel_llm import MelLLMProcessor
from .registration import register
from .sharing_mel_llm import export_remote_code
from .synthesis_mel_llm import iter_speech, split_sentences
from .transcription_mel_llm import Segment, Transcription, split_audio, transcribe
from .vocoder_mel_llm import MelLLMVocoder


__version__ = "0.1.0"

register()

__all__ = [
    "MelLLMAudioConfig",
    "MelLLMConfig",
    "MelLLMFeatureExtractor",
    "MelLLMForSpeechContinuation",
    "MelLLMForSpeechSeq2Seq",
    "MelLLMForTextToSpeech",
    "MelLLMModel",
    "MelLLMPreTrainedModel",
    "MelLLMProcessor",
    "MelLLMSpeechConfig",
    "MelLLMVocoder",
    "MelLLMVocoderConfig",
    "Segment",
    "SpeechContinuationPipeline",
    "Transcription",
    "create_model_card",
    "export_remote_code",
    "iter_speech",
    "load_audio",
    "register",
    "split_audio",
    "split_sentences",
    "stream_audio",
    "transcribe",
]
