"""Mel-LLM in vLLM: its Transformers backend runs the network, this adds transcription and what the backend leaves out.

The backend builds [`MelLLMModel`] with vLLM's attention inside and asks it for audio tokens; prompts, features and
places of audio come from [`MelLLMProcessor`]. So there is no second implementation of the model here. Written for vLLM
0.32; see docs/serving.md for what works.
"""

import math
from types import SimpleNamespace

from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.interfaces import SupportsTranscription
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.model_executor.models.whisper import ISO639_1_SUPPORTED_LANGS
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processor import cached_processor_from_config

from ..modeling_mel_llm import PARTS_BESIDE_READING, MelLLMForSpeechSeq2Seq
from ..processing_mel_llm import LANGUAGES


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class MelLLMForVLLM(TransformersMultiModalForCausalLM, SupportsTranscription):
    """A Mel-LLM that reads, for `LLM(...)`, `vllm serve`, and its transcription endpoint.

    Raises:
        ValueError: The checkpoint attends to audio in both directions, which vLLM's cache cannot.
    """

    supported_languages = {code: name for code, name in LANGUAGES.items() if code in ISO639_1_SUPPORTED_LANGS}  # noqa: RUF012

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        if config.audio_config.bidirectional_attention:
            raise ValueError(
                "This Mel-LLM attends to audio in both directions (`audio_config.bidirectional_attention`), and vLLM only "
                "to what precedes. Serve it with `python -m mel_llm serve`."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.ignore_unexpected_prefixes += [f"{part}." for part in PARTS_BESIDE_READING]
        if hasattr(self, "logits_processor"):  # scaled and capped in `compute_logits`, for every family that we know
            self.logits_processor.scale, self.logits_processor.soft_cap = 1.0, None

    def compute_logits(self, hidden_states):
        """Scores as `MelLLMForSpeechSeq2Seq` makes them. Nobody writes the placeholder of audio."""
        logits = super().compute_logits(hidden_states)
        if logits is None:  # gathered on another rank
            return None
        stub = SimpleNamespace(config=self.config, lm_head=lambda scores: scores)
        logits = MelLLMForSpeechSeq2Seq._output_logits(stub, logits)
        logits[:, self.config.audio_token_id] = -math.inf
        return logits

    @classmethod
    def get_speech_to_text_config(cls, model_config: ModelConfig, task_type: str) -> SpeechToTextConfig:
        """Longer audio is cut by vLLM where it is quiet, into pieces that the model was trained on."""
        audio = model_config.hf_config.audio_config
        return SpeechToTextConfig(
            max_audio_clip_s=max(1, math.floor(audio.max_audio_seconds)), sample_rate=audio.sampling_rate
        )

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> TokensPrompt:
        """The prompt of [`MelLLMProcessor.apply_transcription_request`], token for token.

        Raises:
            ValueError: The task is not to transcribe, the language is not known, or the prompt has the token in it that
                marks the place of audio.
        """
        if stt_params.task_type != "transcribe":
            raise ValueError(f"Mel-LLM transcribes; {stt_params.task_type!r} is for models that were trained to.")
        processor = cached_processor_from_config(stt_params.model_config)
        words = [stt_params.request_prompt, stt_params.hotwords]
        (text,) = processor.apply_transcription_request(
            [None],
            language=stt_params.language,
            prompt=" ".join(word.strip() for word in words if word and word.strip()) or None,
            tokenize=False,
        )
        if text.count(processor.audio_token) != 1:
            raise ValueError(f"`prompt` must not have {processor.audio_token!r} in it: that marks the place of audio.")
        return TokensPrompt(
            prompt_token_ids=processor._tokenize(text, first=True), multi_modal_data={"audio": stt_params.audio}
        )

    @classmethod
    def get_num_audio_tokens(
        cls, audio_duration_s: float, stt_config: SpeechToTextConfig, model_config: ModelConfig
    ) -> int:
        audio = model_config.hf_config.audio_config
        return audio.num_audio_tokens(max(1, math.ceil(audio_duration_s * audio.frame_rate)))

    @classmethod
    def post_process_output(cls, text: str) -> str:
        return text.strip()

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Not used: the chat template of the processor writes the token, which depends on the tokenizer."""
        return None


__all__ = ["MelLLMForVLLM"]
