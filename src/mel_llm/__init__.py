"""Mel-LLM and SPECTRON in Hugging Face transformers: language models that read and write spectrograms.

Importing this package is all it takes for `AutoModelForSpeechSeq2Seq`, `AutoProcessor`, `pipeline(...)`, `Trainer`
and PEFT to work with a Mel-LLM checkpoint.
"""

from .audio_utils_mel_llm import load_audio, stream_audio
from .configuration_mel_llm import MelLLMAudioConfig, MelLLMConfig, MelLLMSpeechConfig, MelLLMVocoderConfig
from .feature_extraction_mel_llm import MelLLMFeatureExtractor
from .modeling_mel_llm import MelLLMForSpeechSeq2Seq, MelLLMModel, MelLLMPreTrainedModel
from .modeling_mel_llm_speech import MelLLMForTextToSpeech
from .processing_mel_llm import MelLLMProcessor
from .registration import register
from .synthesis_mel_llm import iter_speech, split_sentences
from .transcription_mel_llm import Segment, Transcription, split_audio, transcribe
from .vocoder_mel_llm import MelLLMVocoder


__version__ = "0.1.0"

register()

__all__ = [
    "MelLLMAudioConfig",
    "MelLLMConfig",
    "MelLLMFeatureExtractor",
    "MelLLMForSpeechSeq2Seq",
    "MelLLMForTextToSpeech",
    "MelLLMModel",
    "MelLLMPreTrainedModel",
    "MelLLMProcessor",
    "MelLLMSpeechConfig",
    "MelLLMVocoder",
    "MelLLMVocoderConfig",
    "Segment",
    "Transcription",
    "iter_speech",
    "load_audio",
    "register",
    "split_audio",
    "split_sentences",
    "stream_audio",
    "transcribe",
]
