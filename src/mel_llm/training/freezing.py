"""Layers of the language model that are kept as they are, and a table of what of a model is trained. Ours; that the upper
layers can be frozen at little cost is the paper's ablation."""

import re
from collections.abc import Sequence

from torch import nn


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks of the language model, whatever its family calls them, and their name in `model`.

    Raises:
        ValueError: Its blocks do not lie in one list.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.model.language_model
    count = decoder.config.num_hidden_layers
    for name, module in inner.named_modules():
        if name.startswith("model.language_model.") and isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"{type(decoder).__name__} does not keep its {count} layers in one list.")


def freeze_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Stops the training of layers of the language model, with the adapters in them, if any.

    Raises:
        ValueError: There is no such layer, or nothing is left to train.
    """
    path, blocks = find_layers(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ValueError(f"`layers` must be from 0 to {len(blocks) - 1}, got {layer}.")
        blocks[layer].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`layers`: with {path} {list(layers)} frozen nothing is left to train.")


def describe_trainable(model: nn.Module) -> list[dict]:
    """What of a model is trained: `{"part", "parameters", "trained"}` for each part, neighbouring layers that are alike
    in one row, adapters apart from the layers that they are in. A tied weight counts once, where it is first."""
    path, _ = find_layers(model)
    counts: dict[tuple[str, int | None], list[int]] = {}  # part and layer: all, trained
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps the untrained twin of what it saves whole
            continue
        name = re.sub(r"^base_model\.model\.", "", name)
        layer = None
        if name.startswith(f"{path}."):
            layer = int(name[len(path) + 1 :].split(".", 1)[0])
            part = "adapters in layers" if ".lora_" in name else path.removeprefix("model.")
        else:
            pieces = re.sub(r"\.modules_to_save\.\w+", "", name).removeprefix("model.").split(".")
            is_divided = pieces[0] == "language_model" or pieces[:2] == ["audio_embedder", "encoder"]
            part = ".".join(pieces[: 2 if is_divided else 1])
        count = counts.setdefault((part, layer), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad

    rows: list[dict] = []
    order = {part: place for place, part in enumerate(dict.fromkeys(part for part, _ in counts))}
    for (part, layer), count in sorted(counts.items(), key=lambda item: (order[item[0][0]], item[0][1] or 0)):
        last = rows[-1] if rows else {}
        if layer is not None and (last.get("part"), last.get("count"), last.get("to")) == (part, count, layer - 1):
            last["to"] = layer
        else:
            rows.append({"part": part, "from": layer, "to": layer, "count": count})
    return [_summed(row) for row in rows]


def _summed(row: dict) -> dict:
    if row["from"] is None:
        return {"part": row["part"], "parameters": row["count"][0], "trained": row["count"][1]}
    size = row["to"] - row["from"] + 1
    numbers = str(row["from"]) if size == 1 else f"{row['from']}-{row['to']}"
    return {
        "part": f"{row['part']} {numbers}",
        "parameters": size * row["count"][0],
        "trained": size * row["count"][1],
    }


def trainable_table(rows: list[dict]) -> str:
    """[`describe_trainable`] as lines of text."""
    total = {"part": "all", **{key: sum(row[key] for row in rows) for key in ("parameters", "trained")}}
    width = max(len(row["part"]) for row in [*rows, total])
    lines = [f"{'part':{width}}  {'parameters':>15}  {'trained':>15}"]
    lines += [f"{row['part']:{width}}  {row['parameters']:>15,}  {row['trained']:>15,}" for row in [*rows, total]]
    return "\n".join(lines)


__all__ = ["describe_trainable", "find_layers", "freeze_layers", "trainable_table"]
