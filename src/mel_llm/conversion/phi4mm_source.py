"""A Phi-4-multimodal checkpoint on disk, looked at through its headers: which weights there are, and what is wrong."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_safetensors_file_metadata
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import Phi4MultimodalConfig

from ..checkpoint_files import read_header, read_weights
from .phi4mm_config import LoraSettings, original_lora_settings, read_config


# transformers' layout has the LoRAs in folders of their own, and so has the published repository, beside its own layout
ADAPTER_FOLDER = "speech-lora"
# Of the published repository, everything that is read
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.safetensors")
HUB_IGNORED = ("vision-lora/*",)

Tensors = dict[str, "StoredTensor"]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A weight in a file: `name` there, its precision and shape."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Phi4MMSource:
    """What a conversion reads.

    `tensors` are all weights by their names in the checkpoint; those of a LoRA in a folder of its own are among them, as
    `MODULE.lora_A.speech.weight`. `replaced` are LoRA weights of the checkpoint that such a folder stands in for.
    """

    folder: Path
    fields: dict[str, Any]
    config: Phi4MultimodalConfig
    tensors: dict[str, StoredTensor]
    lora: LoraSettings | None
    replaced: dict[str, StoredTensor] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """Raises `ValueError` for a file that is no JSON object, and `FileNotFoundError` with what it was wanted for."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return value


def open_source(
    folder: Path, adapter_dir: Path | None = None, read_tensors: Callable[[Path, str], Tensors | None] | None = None
) -> Phi4MMSource:
    """Looks at a checkpoint; reads headers only.

    Args:
        folder: With `config.json` and weights in safetensors, in one file or in shards with an index.
        adapter_dir: The speech LoRA as PEFT saves one. By default that in the weights, else in `speech-lora`.
        read_tensors: Where weights are looked up, for those that are not on this machine: [`hub_tensors`].

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: It is another model's, or a file is damaged, missing, or does not agree with the others.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    path = folder / "config.json"
    fields = read_json(path)
    config = read_config(fields, str(path))
    read_tensors = read_tensors or _read_tensors
    tensors = read_tensors(folder, "model")
    if tensors is None:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f": only pickled ones ({pickled[0]}), which are not read" if pickled else ""
        raise FileNotFoundError(f"{folder} has no weights in safetensors{hint}.")

    inside = {name: tensor for name, tensor in tensors.items() if ".lora_" in name and ".vision." not in name}
    replaced: dict[str, StoredTensor] = {}
    lora = None
    if adapter_dir is None and not inside and (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
        adapter_dir = folder / ADAPTER_FOLDER
    if adapter_dir is not None:
        lora, factors = _read_adapter(adapter_dir, read_tensors)
        replaced = {name: tensors.pop(name) for name in inside}
        tensors.update(factors)
    elif inside:
        lora = original_lora_settings(fields, str(path))
    return Phi4MMSource(folder, fields, config, tensors, lora, replaced)


def _stored(file: Path, name: str, dtype: str, shape: Sequence[int]) -> StoredTensor:
    if dtype not in _DTYPES:
        raise ValueError(f"{file.name} has {name} in {dtype}; quantized weights are not converted.")
    return StoredTensor(file, name, _DTYPES[dtype], tuple(shape))


def _read_tensors(folder: Path, stem: str) -> Tensors | None:
    try:
        weights = read_weights(folder, stem)
        if weights is None:
            return None
        return {
            name: _stored(folder / file, name, entry["dtype"], entry["shape"])
            for file in weights.files
            for name, entry in read_header(folder / file).items()
        }
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: {error}") from None


def hub_tensors(repo: str, revision: str | None, root: Path) -> Callable[[Path, str], Tensors | None]:
    """Looks weights up on the Hub, in the first bytes of the files that belong into `root` and its folders."""

    def read(folder: Path, stem: str) -> Tensors | None:
        index = folder / f"{stem}.safetensors.index.json"
        files = [f"{stem}.safetensors"]
        if index.is_file():
            try:
                files = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError):
                raise ValueError(f"{repo}: {index.name} is not an index of weights.") from None
        tensors = {}
        for file in files:
            path = folder / file
            try:
                metadata = parse_safetensors_file_metadata(repo, path.relative_to(root).as_posix(), revision=revision)
            except EntryNotFoundError:
                if not index.is_file():
                    return None
                raise ValueError(f"{repo}: {index.name} names {file}, which is not there.") from None
            for name, entry in metadata.tensors.items():
                tensors[name] = _stored(path, name, entry.dtype, entry.shape)
        return tensors

    return read


def _read_adapter(folder: Path, read_tensors: Callable[[Path, str], Tensors | None]) -> tuple[LoraSettings, Tensors]:
    fields = read_json(folder / "adapter_config.json")
    where = folder / "adapter_config.json"
    unknown = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if fields.get(name)]
    if fields.get("peft_type") != "LORA" or unknown or fields.get("bias", "none") != "none":
        what = ", ".join(unknown) or f"peft_type {fields.get('peft_type')!r}, bias {fields.get('bias')!r}"
        raise ValueError(f"{where}: only a plain LoRA is converted, not one with {what}.")
    try:
        settings = LoraSettings(
            int(fields["r"]),
            float(fields["lora_alpha"]),
            float(fields.get("lora_dropout") or 0.0),
            bool(fields.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} must say `r` and `lora_alpha`.") from None
    tensors = read_tensors(folder, "adapter_model")
    if tensors is None:
        raise FileNotFoundError(f"{folder} has no adapter_model.safetensors.")
    factors = {}
    for name, tensor in tensors.items():
        module, dot, end = name.removeprefix("base_model.model.").partition(".lora_")
        factor = end.split(".")[0]
        if not dot or factor not in ("A", "B"):
            raise ValueError(f"{tensor.file} has {name}, which is no LoRA weight.")
        factors[f"{module}.lora_{factor}.speech.weight"] = tensor
    return settings, factors


class TensorReader:
    """Reads weights one by one out of files that are mapped into memory, and stay so until `close()`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def __call__(self, tensor: StoredTensor) -> torch.Tensor:
        if tensor.file not in self._files:
            self._files[tensor.file] = self._stack.enter_context(safe_open(tensor.file, framework="pt"))
        return self._files[tensor.file].get_tensor(tensor.name)


__all__ = ["ADAPTER_FOLDER", "Phi4MMSource", "StoredTensor", "TensorReader", "hub_tensors", "open_source", "read_json"]
