"""What every engine can do."""

import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


_TIMEOUT_S = 120.0


class EngineMissing(Exception):
    """An engine cannot be used here; the message says what to install."""


@dataclass(frozen=True)
class EngineOptions:
    """Where engines find what is not where they look.

    Args:
        piper_voices: Voices of Piper, `NAME.onnx` with `NAME.onnx.json` beside it.
        piper_variation (`float`, defaults to 1.0): How much of its voices' chance is left: with 0 a voice says a text in one
            way only.
        kokoro_model (`Path`, *optional*): Kokoro-82M v1.0 as ONNX.
        kokoro_voices (`Path`, *optional*): Folder of `VOICE.bin`, or one `.npz` with all.
        kokoro_mixtures (`int`, defaults to 0): New voices that are mixed of two of these.
    """

    piper_voices: tuple[Path, ...] = field(default=())
    piper_variation: float = 1.0
    kokoro_model: Path | None = None
    kokoro_voices: Path | None = None
    kokoro_mixtures: int = 0


class SpeechEngine(ABC):
    """Speaks English texts. Made anew in each process that speaks.

    Raises:
        EngineMissing: When it is made, if it is not installed.
    """

    name: str

    @abstractmethod
    def __init__(self, options: EngineOptions): ...

    @abstractmethod
    def voices(self) -> list[str]:
        """Names of its voices, always in the same order."""

    @abstractmethod
    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """A waveform `(samples,)`, int16 or float in [-1, 1], and its rate in Hz. `speed` 1.2 is a fifth faster.

        Raises:
            Exception: Whatever goes wrong with this text; the clip is left out.
        """

    def speaker(self, voice: str) -> str:
        """What a corpus calls the voice."""
        return f"{self.name}_{voice}"

    def licence_files(self) -> list[Path]:
        """Licences of program and voices, as far as they lie here."""
        return []


def require_program(program: str, package: str) -> str:
    """Path of a program, or the error that says which Debian package has it."""
    path = shutil.which(program)
    if path is None:
        raise EngineMissing(f"the program {program} is not installed: `apt-get install {package}`")
    return path


def run_program(command: list[str], text: str = "") -> bytes:
    """What a program writes to its standard output.

    Raises:
        ValueError: It failed; with its own last words.
    """
    result = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, timeout=_TIMEOUT_S)
    if result.returncode:
        words = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"{command[0]} failed: {words[-1] if words else result.returncode}")
    return result.stdout


__all__ = ["EngineMissing", "EngineOptions", "SpeechEngine", "require_program", "run_program"]
