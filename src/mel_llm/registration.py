"""Makes the Auto classes of transformers know Mel-LLM. Importing `mel_llm` runs it; running it again changes nothing.

The two static tables of names that clients also consult are filled by `configuration_mel_llm`, which a Hub
repository's remote code imports as well.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from .configuration_mel_llm import MelLLMConfig
from .feature_extraction_mel_llm import MelLLMFeatureExtractor
from .modeling_mel_llm import MelLLMForSpeechSeq2Seq, MelLLMModel
from .modeling_mel_llm_continuation import MelLLMForSpeechContinuation
from .modeling_mel_llm_speech import MelLLMForTextToSpeech
from .pipeline_mel_llm import register_pipeline
from .processing_mel_llm import MelLLMProcessor


def register() -> None:
    """Registers the configuration, the models, the feature extractor and the processor with the Auto classes, and the task
    "speech-continuation" with `pipeline`."""
    AutoConfig.register(MelLLMConfig.model_type, MelLLMConfig, exist_ok=True)
    AutoFeatureExtractor.register(MelLLMConfig, MelLLMFeatureExtractor, exist_ok=True)
    AutoProcessor.register(MelLLMConfig, MelLLMProcessor, exist_ok=True)
    AutoModel.register(MelLLMConfig, MelLLMModel, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(MelLLMConfig, MelLLMForSpeechSeq2Seq, exist_ok=True)
    # Not among the text-to-spectrogram models: for those the pipeline downloads a vocoder
    AutoModelForTextToWaveform.register(MelLLMConfig, MelLLMForTextToSpeech, exist_ok=True)
    AutoModelForMultimodalLM.register(MelLLMConfig, MelLLMForSpeechSeq2Seq, exist_ok=True)
    # The model with all of its heads; transformers has no Auto class for its task
    AutoModelForPreTraining.register(MelLLMConfig, MelLLMForSpeechContinuation, exist_ok=True)
    register_pipeline()


__all__ = ["register"]
