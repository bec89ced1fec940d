"""The configuration of a Phi-4-multimodal checkpoint, in either layout, and the Mel-LLM's that follows from it."""

import copy
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, Phi4MultimodalAudioConfig, Phi4MultimodalConfig, PreTrainedConfig

from ..configuration_mel_llm import MelLLMAudioConfig, MelLLMConfig


# Phi-4-multimodal's language model is Phi-4-Mini, whose class in transformers is Phi3's
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_act", "initializer_range"),
    *("max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps", "use_cache", "sliding_window"),
    *("tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_ENCODER_FIELDS = (
    *("intermediate_size", "num_blocks", "num_attention_heads", "activation", "dropout_rate", "ext_pw_out_channel"),
    *("depthwise_separable_out_channel", "depthwise_multiplier", "kernel_size", "conv_activation", "conv_glu_type"),
    *("bias_max_distance", "bias_symmetric", "initializer_range"),
)

# Original layout: name of an audio field in transformers, and its path in the published config
_AUDIO_PATHS = {
    "hidden_size": ("attention_dim",),
    "num_attention_heads": ("attention_heads",),
    "intermediate_size": ("linear_units",),
    "nemo_conv_channels": ("nemo_conv_settings", "conv_channels"),
    "bias_max_distance": ("relative_attention_bias_args", "t5_bias_max_distance"),
    "depthwise_separable_out_channel": ("depthwise_seperable_out_channel",),  # as it is published
}
# ... and what transformers' classes, and ours after them, take for granted
_AUDIO_FIXED = {
    "input_layer": "nemo_conv",
    "causal": True,
    "batch_norm": False,
    "bias_in_glu": True,
    "ext_pw_kernel_size": 1,
}
_EMBEDDER_FIXED = {"use_qformer": False, "use_conv_downsample": False, "projection_cls": "mlp"}

# What one forward pass of the speech encoder spans, and what most of Phi-4-multimodal's training clips are within (inferred)
_MAX_AUDIO_SECONDS = 40.0


@dataclass(frozen=True)
class LoraSettings:
    """Rank and scale of the speech LoRA; the weights are changed by `scaling * B @ A`."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


def read_config(fields: dict[str, Any], where: str) -> Phi4MultimodalConfig:
    """The config of a checkpoint from its `config.json`, in transformers' layout or the original one.

    Raises:
        ValueError: It is another model's, is quantized, or asks for parts that Phi-4-multimodal's classes in transformers do
            not have. `where` names the file.
    """
    model_type, architectures = fields.get("model_type"), fields.get("architectures") or []
    known = {"phi4_multimodal": "Phi4MultimodalForCausalLM", "phi4mm": "Phi4MMForCausalLM"}
    if model_type == MelLLMConfig.model_type:
        raise ValueError(f"{where}: this is a Mel-LLM already.")
    if model_type not in known or (architectures and known[model_type] not in architectures):
        found = repr(model_type) + (f" ({', '.join(map(str, architectures))})" if architectures else "")
        raise ValueError(
            f"{where}: expected a Phi-4-multimodal, with the architecture {' or '.join(known.values())}, got {found}. "
            "Text models are converted by scripts/convert_text_llm.py."
        )
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{where}: the checkpoint is quantized; convert the one that it was made from.")
    if model_type == "phi4mm":
        fields = {**fields, "audio_config": _original_audio_fields(fields, where)}
    names = {*Phi4MultimodalConfig.__dataclass_fields__, "rope_scaling", "rope_theta", "partial_rotary_factor"}
    config = Phi4MultimodalConfig(**{name: copy.deepcopy(fields[name]) for name in names & fields.keys()})
    audio = config.audio_config
    if audio.downsample_rate != 1 or audio.chunk_size != -1:
        raise ValueError(
            f"{where}: `downsample_rate` {audio.downsample_rate} and `chunk_size` {audio.chunk_size} of the audio encoder "
            "are not supported; Phi-4-multimodal has 1 and -1."
        )
    return config


def _original_audio_fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        given, embedder = fields["audio_processor"]["config"], fields["embd_layer"]["audio_embd_layer"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{where}: `audio_processor` and `embd_layer` of the original layout are not there."
        ) from None
    for values, fixed in ((given, _AUDIO_FIXED), (embedder, _EMBEDDER_FIXED)):
        for name, value in fixed.items():
            if values.get(name, value) != value:
                raise ValueError(f"{where}: `{name}` must be {value!r} as in Phi-4-multimodal, got {values[name]!r}.")
    audio = {name: given[name] for name in Phi4MultimodalAudioConfig.__dataclass_fields__ if name in given}
    for name, path in _AUDIO_PATHS.items():
        value = given
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            audio[name] = value
    return {**audio, "downsample_rate": embedder.get("downsample_rate", 1)}


def original_lora_settings(fields: dict[str, Any], where: str) -> LoraSettings:
    """The settings of the speech LoRA whose weights lie in the checkpoint itself.

    Raises:
        ValueError: The config does not say them.
    """
    values = fields.get("speech_lora")
    try:
        return LoraSettings(int(values["r"]), float(values["lora_alpha"]), float(values.get("dp", 0.0)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{where}: the weights have a speech LoRA, but `speech_lora` with its `r` and `lora_alpha` is {values!r}."
        ) from None


def text_config(source: Phi4MultimodalConfig) -> PreTrainedConfig:
    """The language model alone."""
    fields = {name: copy.deepcopy(getattr(source, name)) for name in _TEXT_FIELDS}
    if getattr(source, "head_dim", None) is not None:
        fields["head_dim"] = source.head_dim
    return AutoConfig.for_model("phi3", **fields)


def audio_config(source: Phi4MultimodalConfig, encoder: str, hop_length: int, sampling_rate: int) -> MelLLMAudioConfig:
    """The audio side, with the Conformer (`encoder="conformer"`) or without (`"none"`)."""
    audio = source.audio_config
    fields = {name: getattr(audio, name) for name in _ENCODER_FIELDS}
    return MelLLMAudioConfig(
        num_mel_bins=audio.input_size,
        sampling_rate=sampling_rate,
        hop_length=hop_length,
        reduction_factor=audio.time_reduction,
        conv_channels=audio.nemo_conv_channels,
        conv_activation=audio.nemo_activation,
        hidden_size=audio.hidden_size,
        projector_dropout=source.embd_pdrop,
        encoder_type=encoder,
        encoder_config=fields if encoder == "conformer" else None,
        max_audio_seconds=_MAX_AUDIO_SECONDS,
        initializer_range=audio.initializer_range,
    )


__all__ = ["LoraSettings", "audio_config", "original_lora_settings", "read_config", "text_config"]
