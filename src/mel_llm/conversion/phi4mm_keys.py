"""Where each weight of a Phi-4-multimodal checkpoint goes in a Mel-LLM.

Two layouts are known, and one table serves both: transformers' (`Phi4MultimodalForCausalLM`), and that of the code which
microsoft/Phi-4-multimodal-instruct was published with, where the language model's weights lie in `base_layer` beside the
LoRA of speech and vision. The renamings are those of transformers' own conversion script.
"""

import re
from dataclasses import dataclass


_AUDIO = r"model\.embed_tokens_extend\.audio_embed\."
_LINEAR = r"(?P<linear>self_attn\.(?:qkv|o)_proj|mlp\.(?:gate_up|down)_proj)"

# Groups of weights that a conversion may leave out or make anew, by the beginning of their names in a Mel-LLM
PARTS = {
    "stem": "model.audio_embedder.conv.",
    "encoder": "model.audio_embedder.encoder.",
    "projector": "model.multi_modal_projector.",
}

# Source name -> name in a Mel-LLM
_KEPT = (
    (r"lm_head\.weight", r"lm_head.weight"),
    (r"model\.(embed_tokens|norm)\.weight", r"model.language_model.\1.weight"),
    (
        r"model\.layers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight",
        r"model.language_model.layers.\1.\2.weight",
    ),
    (
        rf"model\.layers\.(?P<layer>\d+)\.{_LINEAR}(?:\.base_layer)?\.weight",
        r"model.language_model.layers.\g<layer>.\g<linear>.weight",
    ),
    (rf"{_AUDIO}encoder\.encoder_embedding\.(global_mean|global_invstd)", r"model.audio_embedder.normalizer.\1"),
    (rf"{_AUDIO}encoder\.embed\.(conv\.\d+|out)\.(weight|bias)", r"model.audio_embedder.conv.\1.\2"),
    (
        rf"{_AUDIO}encoder\.relative_attention_bias_layer\.bias_values\.weight",
        r"model.audio_embedder.encoder.relative_attention_bias_layer.bias_values.weight",
    ),
    (
        rf"{_AUDIO}encoder\.encoders\.(\d+)\.self_attn\.(?:linear_)?(q|k|v)(?:_proj)?\.(weight|bias)",
        r"model.audio_embedder.encoder.encoders.\1.self_attn.\2_proj.\3",
    ),
    (
        rf"{_AUDIO}encoder\.encoders\.(\d+)\.self_attn\.(?:linear_out|o_proj)\.(weight|bias)",
        r"model.audio_embedder.encoder.encoders.\1.self_attn.o_proj.\2",
    ),
    (
        rf"{_AUDIO}encoder\.encoders\.(\d+)\.feed_forward_(in|out)\.(?:net\.0\.linear|gate_up_proj)\.(weight|bias)",
        r"model.audio_embedder.encoder.encoders.\1.feed_forward_\2.gate_up_proj.\3",
    ),
    (
        rf"{_AUDIO}encoder\.encoders\.(\d+)\.feed_forward_(in|out)\.(?:net\.2|down_proj)\.(weight|bias)",
        r"model.audio_embedder.encoder.encoders.\1.feed_forward_\2.down_proj.\3",
    ),
    (
        rf"{_AUDIO}encoder\.encoders\.(\d+)\."
        r"((?:conv|feed_forward_in|feed_forward_out)\.layer_norm|layer_norm(?:_att)?|conv\.(?:glu\.)?ext_pw_conv_1d"
        r"|conv\.dw_sep_conv_1d\.(?:dw|pw)_conv)\.(weight|bias)",
        r"model.audio_embedder.encoder.encoders.\1.\2.\3",
    ),
    (
        rf"{_AUDIO}encoder\.encoders\.(\d+)\.conv\.glu\.(b1|b2)",
        r"model.audio_embedder.encoder.encoders.\1.conv.glu.\2",
    ),
    (
        rf"{_AUDIO}(?:up_proj_for_speech|audio_projection\.speech\.0)\.(weight|bias)",
        r"model.multi_modal_projector.linear_1.\1",
    ),
    (
        rf"{_AUDIO}(?:down_proj_for_speech|audio_projection\.speech\.2)\.(weight|bias)",
        r"model.multi_modal_projector.linear_2.\1",
    ),
)

# What a Mel-LLM has no place for, and why
_DROPPED = (
    (r"model\.embed_tokens_extend\.image_embed\..*", "vision encoder and its projector"),
    (
        rf"{_AUDIO}(?:(?:up|down)_proj_for_vision_speech|audio_projection\.vision\.[02])\.(?:weight|bias)",
        "projector of audio beside images",
    ),
    (r"model\.(?:.*\.)?rotary_emb\.\w*inv_freq", "computed from the config"),
)

# `NAME` is there where several adapters share a checkpoint
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<name>\w+))?\.weight")


@dataclass(frozen=True)
class Place:
    """Where a weight goes: its name in a Mel-LLM, or why it is dropped. For a LoRA factor (`"A"` or `"B"`), `target` is the
    weight that it changes."""

    target: str | None
    reason: str | None = None
    factor: str | None = None


def find_place(key: str) -> Place | None:
    """The place of a weight by its name in the checkpoint; `None` for a name that no Phi-4-multimodal has."""
    if (lora := _LORA.fullmatch(key)) is not None:
        if lora["name"] == "vision":
            return Place(None, "vision LoRA")
        place = find_place(f"{lora['module']}.weight") if lora["name"] in (None, "speech") else None
        return place if place is None or place.target is None else Place(place.target, factor=lora["factor"])
    for pattern, target in _KEPT:
        if (match := re.fullmatch(pattern, key)) is not None:
            return Place(match.expand(target))
    for pattern, reason in _DROPPED:
        if re.fullmatch(pattern, key):
            return Place(None, reason)
    return None


__all__ = ["PARTS", "Place", "find_place"]
