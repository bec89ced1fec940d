"""LoRA presets: which layers of the language model get adapters, and what must be saved with them."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint_files import read_header
from ..modeling_mel_llm import MelLLMForSpeechSeq2Seq
from .freezing import find_layers


# Rank and scale of the paper; its dropout is Phi-4-multimodal's. "small" is ours.
LORA_PRESETS = {
    "paper": {"r": 320, "lora_alpha": 640, "lora_dropout": 0.01},
    "small": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
}

_NEW_MODULES = ("audio_embedder", "multi_modal_projector", "speech_head", "ctc_head")


def lora_config(
    model: MelLLMForSpeechSeq2Seq,
    preset: str = "small",
    new_token_ids: list[int] | None = None,
    frozen_layers: Sequence[int] = (),
    **overrides,
):
    r"""A `peft.LoraConfig` for a Mel-LLM: `get_peft_model(model, lora_config(model))`.

    Adapters go on every linear layer of the language model's attention and MLP blocks, whatever its family calls them
    (paper). The audio embedder with its normalisation, the projector, and the heads of a model that has any, are
    trained and saved whole: they are new, and nothing but the adapter's folder holds them.

    Args:
        model: The model that is to be trained.
        preset (`str`, defaults to `"small"`): `"paper"` is r=320, alpha=640; `"small"` is r=16, alpha=32 (ours).
        new_token_ids (`list[int]`, *optional*): Tokens whose embeddings are new too. Exactly their rows are trained and
            saved, not the whole matrix.
        frozen_layers (`Sequence[int]`, *optional*): Layers of the language model that get no adapters: the paper's ablation
            freezes the upper ones. A new adapter that is never trained changes nothing, so none is made.
        overrides: Fields of `LoraConfig`.

    Raises:
        ValueError: There is no such preset, a token id is outside of the vocabulary, or every layer is frozen.
    """
    from peft import LoraConfig

    if preset not in LORA_PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(LORA_PRESETS)}, got {preset!r}.")
    fields = {
        **LORA_PRESETS[preset],
        "target_modules": _target_pattern(model),
        "modules_to_save": [name for name in _NEW_MODULES if _has_module(model, name)],
        **overrides,
    }
    if frozen_layers:
        path, layers = find_layers(model)
        if set(frozen_layers) >= set(range(len(layers))):
            raise ValueError(
                "`frozen_layers` are all the layers, so there is nothing for LoRA to adapt. To train the audio side alone, "
                "leave LoRA out and freeze the language model."
            )
        numbers = "|".join(map(str, sorted(set(frozen_layers))))
        fields["exclude_modules"] = rf"(?:.*\.)?{re.escape(path)}\.(?:{numbers})\..*"
    if new_token_ids:
        size = model.get_input_embeddings().num_embeddings
        if not all(0 <= index < size for index in new_token_ids):
            raise ValueError(f"`new_token_ids` must be from 0 to {size - 1}, got {new_token_ids}.")
        fields.setdefault("trainable_token_indices", {_embedding_name(model): sorted(set(new_token_ids))})
    return LoraConfig(**fields)


def _has_module(model: nn.Module, name: str) -> bool:
    return any(path.rsplit(".", 1)[-1] == name for path, _ in model.named_modules())


def _target_pattern(model: MelLLMForSpeechSeq2Seq) -> str:
    """Matches the linear layers inside the blocks of the language model, and no layer of the audio embedder."""
    leaves = {
        name.rsplit(".", 1)[-1]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "." in name
    }
    return rf".*language_model\..*\.({'|'.join(sorted(leaves))})"


def _embedding_name(model: MelLLMForSpeechSeq2Seq) -> str:
    embeddings = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embeddings:
            return name
    raise ValueError(f"{type(model).__name__} has no module for its input embeddings.")


def load_adapter(model: nn.Module, folder: str) -> None:
    """Starts the LoRA adapters of `model` from those of another run, over whatever front end that one had (paper: the
    LoRA that Phi-4-multimodal learnt with its encoder is where Mel-LLM without one begins).

    Args:
        model: A `PeftModel` with adapters of the same rank.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`. The modules that were saved whole beside the
            adapters, the audio side, are not read.

    Raises:
        FileNotFoundError: There is no adapter in the folder.
        ValueError: It is for other layers or of another size, or scaled differently.
    """
    from safetensors.torch import load_file

    paths = [Path(folder) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {path.name} is not there.")
    theirs = json.loads(paths[0].read_text(encoding="utf-8"))
    ours = model.peft_config["default"]
    for name, default in (("r", None), ("lora_alpha", None), ("use_rslora", False), ("use_dora", False)):
        if theirs.get(name, default) != getattr(ours, name):
            raise ValueError(f"{folder} has adapters with {name} {theirs.get(name)}, not {getattr(ours, name)}.")
    weights = {name: value for name, value in load_file(paths[1]).items() if ".lora_" in name}
    parameters = {
        name.replace(".default.", "."): parameter for name, parameter in model.named_parameters() if ".lora_" in name
    }
    wrong = sorted(weights.keys() ^ parameters.keys())
    wrong = wrong or sorted(name for name in weights if weights[name].shape != parameters[name].shape)
    if wrong:
        raise ValueError(
            f"{folder} has adapters of another model than this: {len(wrong)} of {len(parameters)} differ, {wrong[0]} first."
        )
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def adapter_base(folder: str | Path) -> str:
    """The model that the adapters in a folder belong to: `base` beside them, unless they came without it; else what their
    config names, which after a move of the folder may be another model by now."""
    base = Path(folder) / "base"
    if (base / "config.json").is_file():
        return str(base)
    named = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if os.path.isabs(named) and not os.path.isdir(named):
        raise FileNotFoundError(
            f"{folder} has adapters of {named}, which is not there. If it was moved, write its place into "
            f"adapter_config.json as `base_model_name_or_path`, or put it beside the adapters as `base`."
        )
    return named


def load_adapters(model: nn.Module, folder: str | Path, **kwargs):
    """The model with the adapters in a folder. PEFT leaves out what has no place in the model; here that is refused.

    Args:
        model: Theirs: see [`adapter_base`].
        folder: Or their name on the Hub.
        kwargs: For `PeftModel.from_pretrained`.

    Raises:
        ValueError: They are of another model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    problem = f"{folder} has adapters of another model than the base that was found"
    try:
        model = PeftModel.from_pretrained(model, folder, **kwargs)
    except KeyError as error:
        raise ValueError(f"{problem}: they have no {error}.") from None
    path = Path(folder) / "adapter_model.safetensors"
    if path.is_file():
        stored, wanted = read_header(path).keys(), get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        # PEFT saves whole embeddings, too, where it thinks that they grew
        wrong = sorted(
            name for name in stored ^ wanted if not name.endswith(("embed_tokens.weight", "lm_head.weight"))
        )
        if wrong:
            raise ValueError(f"{problem}: {len(wrong)} weights differ, {wrong[0]} first.")
    return model


def freeze(model: nn.Module, patterns: list[str]) -> None:
    r"""Stops the training of parameters whose names match, for staged recipes and for ablations.

    Args:
        patterns: Regular expressions that are searched in parameter names: `language_model`,
            `layers\.(2[4-9]|3[01])\.`.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to train.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`freeze`: {pattern!r} is not a regular expression: {error}") from None
        matched = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            raise ValueError(f"`freeze`: no parameter's name matches {pattern!r}.")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`freeze`: with {patterns} nothing is left to train.")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all parameters; each tensor counts once, tied or not."""
    tensors: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    trainable = sum(parameter.numel() for parameter in tensors.values() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in tensors.values())


__all__ = [
    "LORA_PRESETS",
    "adapter_base",
    "count_parameters",
    "freeze",
    "load_adapter",
    "load_adapters",
    "lora_config",
]
