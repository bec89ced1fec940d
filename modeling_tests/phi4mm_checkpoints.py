"""Phi-4-multimodal checkpoints for the tests: tiny random ones in both layouts, and the published sizes without weights."""

import json
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from mel_llm.training import train_tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|endoftext10|>", "<|endoftext11|>", "<|assistant|>", "<|end|>", "<|user|>"),
    "<|system|>",
)
LORA_TARGETS = r".*\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"

# The published config.json, in its own layout, without what no weight depends on
PUBLISHED = {
    "architectures": ["Phi4MMForCausalLM"],
    "model_type": "phi4mm",
    "audio_processor": {
        "config": {
            "activation": "swish",
            "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
            "attention_dim": 1024,
            "attention_heads": 16,
            "batch_norm": False,
            "bias_in_glu": True,
            "causal": True,
            "chunk_size": -1,
            "cnn_layer_norm": True,
            "conv_activation": "swish",
            "conv_glu_type": "swish",
            "depthwise_multiplier": 1,
            "depthwise_seperable_out_channel": 1024,
            "dropout_rate": 0.0,
            "encoder_embedding_config": {"input_size": 80},
            "ext_pw_kernel_size": 1,
            "ext_pw_out_channel": 1024,
            "input_layer": "nemo_conv",
            "input_size": 80,
            "kernel_size": 3,
            "left_chunk": 18,
            "linear_units": 1536,
            "nemo_conv_settings": {"conv_channels": 1024},
            "num_blocks": 24,
            "relative_attention_bias_args": {"t5_bias_max_distance": 500, "type": "t5"},
            "time_reduction": 8,
        },
        "name": "cascades",
    },
    "auto_map": {
        "AutoConfig": "configuration_phi4mm.Phi4MMConfig",
        "AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 199999,
    "embd_layer": {
        "audio_embd_layer": {
            "compression_rate": 8,
            "downsample_rate": 1,
            "embedding_cls": "audio",
            "enable_gradient_checkpointing": True,
            "projection_cls": "mlp",
            "use_conv_downsample": False,
            "use_qformer": False,
        },
        "embedding_cls": "image_audio",
        "image_embd_layer": {"crop_size": 448, "embedding_cls": "tune_image", "projection_cls": "mlp"},
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 48,
        "long_factor": [1.0 + index for index in range(48)],  # not the published values: their number is what counts
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "speech_lora": {"dp": 0.01, "lora_alpha": 640, "r": 320},
    "vision_lora": {"dp": 0.0, "lora_alpha": 512, "r": 256},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 200064,
}


def phi4_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = train_tokenizer(texts, vocab_size=300).backend_tokenizer
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    end = SPECIAL_TOKENS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end, chat_template=CHAT_TEMPLATE
    )


def tiny_config(tokenizer, **overrides) -> Phi4MultimodalConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    fields = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": 512,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]},
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|endoftext|>"], ids["<|end|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "audio_config": {
            "hidden_size": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "nemo_conv_channels": 8,
            "bias_max_distance": 500,
            "audio_token_id": ids["<|endoftext11|>"],
            "initializer_range": 0.2,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_token_id": ids["<|endoftext10|>"],
        },
    }
    return Phi4MultimodalConfig(**{**fields, **overrides})


def tiny_model(tokenizer, **overrides) -> Phi4MultimodalForCausalLM:
    """With random values everywhere, also where fresh models have 0 or 1."""
    set_seed(0)
    model = Phi4MultimodalForCausalLM(tiny_config(tokenizer, **overrides)).eval()
    encoder = model.model.embed_tokens_extend.audio_embed.encoder
    encoder.encoder_embedding.global_mean.copy_(12 + torch.randn(80))
    encoder.encoder_embedding.global_invstd.copy_(0.3 + 0.1 * torch.rand(80))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 or name.endswith((".b1", ".b2")):
                value.add_(0.1 * torch.randn_like(value))
    return model


def add_speech_lora(model: Phi4MultimodalForCausalLM, r: int = 6, lora_alpha: int = 12, **kwargs):
    """The same model with a random LoRA of speech (in place)."""
    set_seed(1)
    fields = {"target_modules": LORA_TARGETS, "init_lora_weights": False, "lora_dropout": 0.01, **kwargs}
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, **fields)).eval()


def _save_processor(tokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    Phi4MultimodalFeatureExtractor().save_pretrained(folder)


def save_transformers(model, tokenizer, folder: Path) -> Path:
    """As transformers saves it: the LoRA in `speech-lora`."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder / "speech-lora")
        with model.disable_adapter():
            base = model.get_base_model()
            weights = {
                name.replace(".base_layer", ""): value.contiguous()
                for name, value in base.state_dict().items()
                if ".lora_" not in name and name != "lm_head.weight"
            }
        if not base.config.tie_word_embeddings:
            weights["lm_head.weight"] = base.lm_head.weight.detach().clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        base.config.architectures = ["Phi4MultimodalForCausalLM"]
        base.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    _save_processor(tokenizer, folder)
    return folder


_TO_ORIGINAL = (
    (r"(encoders\.\d+\.feed_forward_(?:in|out))\.gate_up_proj", r"\1.net.0.linear"),
    (r"(encoders\.\d+\.feed_forward_(?:in|out))\.down_proj", r"\1.net.2"),
    (r"(encoders\.\d+\.self_attn)\.(q|k|v)_proj", r"\1.linear_\2"),
    (r"(encoders\.\d+\.self_attn)\.o_proj", r"\1.linear_out"),
    (r"up_proj_for_speech", r"audio_projection.speech.0"),
    (r"down_proj_for_speech", r"audio_projection.speech.2"),
    (r"up_proj_for_vision_speech", r"audio_projection.vision.0"),
    (r"down_proj_for_vision_speech", r"audio_projection.vision.2"),
    (r"image_embed\.global_img_feature_extensor", r"image_embed.glb_GN"),
    (r"image_embed\.sub_img_feature_extensor", r"image_embed.sub_GN"),
    (r"image_embed\.img_projection_up", r"image_embed.img_projection.0"),
    (r"image_embed\.img_projection_down", r"image_embed.img_projection.2"),
    (r"(layers\.\d+\.(?:self_attn\.(?:qkv|o)_proj|mlp\.(?:gate_up|down)_proj))\.weight", r"\1.base_layer.weight"),
)


def original_name(name: str) -> str:
    """A name in transformers' layout as it is in the published one."""
    for pattern, replacement in _TO_ORIGINAL:
        name = re.sub(rf"(?<![a-z_]){pattern}", replacement, name)
    return name


def original_config(config: Phi4MultimodalConfig, r: int = 6, lora_alpha: int = 12) -> dict:
    """The published config.json with the sizes of another one."""
    fields = json.loads(json.dumps(PUBLISHED))
    audio, given = fields["audio_processor"]["config"], config.audio_config
    audio["attention_dim"] = audio["ext_pw_out_channel"] = audio["depthwise_seperable_out_channel"] = given.hidden_size
    audio["attention_heads"], audio["linear_units"] = given.num_attention_heads, given.intermediate_size
    audio["num_blocks"], audio["nemo_conv_settings"] = given.num_blocks, {"conv_channels": given.nemo_conv_channels}
    audio["relative_attention_bias_args"]["t5_bias_max_distance"] = given.bias_max_distance
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings", "bos_token_id")
    fields.update({name: getattr(config, name) for name in (*names, "pad_token_id", "tie_word_embeddings")})
    fields["eos_token_id"] = config.eos_token_id[0]
    rope = config.rope_parameters
    fields["rope_scaling"] = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
    fields["speech_lora"] = {"dp": 0.01, "lora_alpha": lora_alpha, "r": r}
    return fields


def save_original(model, tokenizer, folder: Path, shards: int = 3) -> Path:
    """As the published repository has it: both LoRAs beside the weights, in shards."""
    base = model.get_base_model()
    weights = {
        original_name(name.replace(".base_layer", "")): value.detach().clone().contiguous()
        for name, value in base.state_dict().items()
        if ".lora_" not in name and name != "lm_head.weight"
    }
    for name, value in get_peft_model_state_dict(model).items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        letter = factor[0]
        weights[f"{module}.lora_{letter}.speech.weight"] = value.clone()
        weights[f"{module}.lora_{letter}.vision.weight"] = torch.randn_like(value)
    folder.mkdir(parents=True, exist_ok=True)
    names, places = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]  # factors and their matrices in different files
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    peft = model.peft_config["default"]
    config = original_config(base.config, peft.r, peft.lora_alpha)
    (folder / "config.json").write_text(json.dumps(config))
    ids = {"eos_token_id": base.config.eos_token_id[::-1], "bos_token_id": base.config.bos_token_id}
    (folder / "generation_config.json").write_text(json.dumps({**ids, "pad_token_id": base.config.pad_token_id}))
    _save_processor(tokenizer, folder)
    features = {"audio_compression_rate": 8, "audio_downsample_rate": 1, "audio_feat_stride": 1, "dynamic_hd": 36}
    (folder / "preprocessor_config.json").write_text(json.dumps(features))
    return folder
