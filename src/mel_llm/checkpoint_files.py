"""What the files of a saved model are, told from their headers: no tensor is loaded."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


# What begins every pointer that git keeps in the place of a large file
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: numbers of parameters, bytes, the precisions, the most frequent first, and the files."""

    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]


def read_header(path: Path) -> dict[str, dict]:
    """The tensors of a safetensors file: `dtype`, `shape` and `data_offsets` by name.

    Raises:
        ValueError: It is no safetensors file, or less or more than its header announces.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if size >= 8 and (start + file.read(len(_LFS_POINTER))).startswith(_LFS_POINTER):
            raise ValueError(
                f"{path.name} is the pointer of a file that is kept in git LFS, not the file: git lfs pull."
            )
        length = int.from_bytes(start, "little")
        if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path.name} is no safetensors file, or only its beginning ({size} bytes).")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ValueError(f"{path.name} is no safetensors file: its header cannot be read.") from None
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes, and its header announces {8 + length + end}.")
    return header


def read_weights(folder: Path, stem: str = "model") -> Weights | None:
    """The weights `STEM.safetensors`, or the shards that `STEM.safetensors.index.json` names; `None` if there are none.

    Raises:
        ValueError: A file is damaged, or the index and the shards do not agree.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index.name} is not an index of weights.") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{index.name} names {missing[0]}, which is not there.")
    elif (folder / f"{stem}.safetensors").is_file():
        places, names = None, [f"{stem}.safetensors"]
    else:
        return None
    parameters, dtypes, found = 0, Counter(), {}
    for name in names:
        for tensor, entry in read_header(folder / name).items():
            found[tensor] = name
            if "F" in entry["dtype"]:  # counters are no parameters
                parameters += math.prod(entry["shape"])
                dtypes[entry["dtype"]] += math.prod(entry["shape"])
    if places is not None and found != places:
        wrong = sorted(set(found.items()) ^ set(places.items()))[0][0]
        raise ValueError(f"{index.name} and its shards do not agree on {wrong}.")
    size = sum((folder / name).stat().st_size for name in names)
    return Weights(parameters, size, tuple(name for name, _ in dtypes.most_common()), tuple(names))


__all__ = ["Weights", "read_header", "read_weights"]
