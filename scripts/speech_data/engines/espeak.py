"""espeak-ng: rules and formants. Everything it says is there; much of it is hard to understand."""

import io
from pathlib import Path

import numpy as np

from .base import EngineOptions, SpeechEngine, require_program, run_program


_WORDS_PER_MINUTE = 175  # its own default
_ACCENTS = ("en-us", "en-gb", "en-gb-x-rp")
_VARIANTS = ("", "+m1", "+m3", "+m7", "+f1", "+f2", "+f3", "+f5")


class EspeakEngine(SpeechEngine):
    """The command espeak-ng, in three accents and eight variants of each."""

    name = "espeak"

    def __init__(self, options: EngineOptions):
        self.program = require_program("espeak-ng", "espeak-ng")

    def voices(self) -> list[str]:
        return [accent + variant for accent in _ACCENTS for variant in _VARIANTS]

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        import soundfile

        rate = str(round(_WORDS_PER_MINUTE * speed))
        wav = run_program([self.program, "-v", voice, "-s", rate, "--stdin", "--stdout"], text)
        return soundfile.read(io.BytesIO(wav), dtype="int16")

    def licence_files(self) -> list[Path]:
        return [path for path in [Path("/usr/share/doc/espeak-ng/copyright")] if path.is_file()]


__all__ = ["EspeakEngine"]
