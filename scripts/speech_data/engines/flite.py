"""Flite: the small engine of Carnegie Mellon University, with the voices of Debian's package."""

import tempfile
from pathlib import Path

import numpy as np

from .base import EngineMissing, EngineOptions, SpeechEngine, require_program, run_program


# kal is kal16 at 8 kHz, and awb_time can only tell the time
_UNFIT = ("kal", "awb_time")


class FliteEngine(SpeechEngine):
    """The command flite."""

    name = "flite"

    def __init__(self, options: EngineOptions):
        self.program = require_program("flite", "flite")

    def voices(self) -> list[str]:
        words = run_program([self.program, "-lv"]).decode().partition(":")[2].split()
        voices = sorted({word for word in words if word not in _UNFIT})
        if not voices:
            raise EngineMissing("flite lists no voices of its own: install Debian's package flite")
        return voices

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        import soundfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"  # it cannot write to a pipe
            command = [self.program, "-voice", voice, "--setf", f"duration_stretch={1 / speed:.4f}"]
            run_program([*command, "-t", text, "-o", str(path)])
            return soundfile.read(path, dtype="int16")

    def speaker(self, voice: str) -> str:
        return f"flite_cmu_us_{voice}"

    def licence_files(self) -> list[Path]:
        return [path for path in [Path("/usr/share/doc/flite/copyright")] if path.is_file()]


__all__ = ["FliteEngine"]
