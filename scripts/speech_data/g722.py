"""G.722, the wideband codec of telephone exchanges, to 16 kHz waveforms."""

import shutil
import subprocess
from collections.abc import Callable

import numpy as np


SAMPLING_RATE = 16000


def find_g722_decoder() -> Callable[[bytes], np.ndarray]:
    """ffmpeg's decoder, or else that of the Python package G722. Both take the 64 kbit/s of a file to `(samples,)`, int16.

    Raises:
        ImportError: There is neither; says what to install.
    """
    program = shutil.which("ffmpeg") or _bundled_ffmpeg()
    if program is not None:
        return lambda data: _decode_with_ffmpeg(program, data)
    try:
        from G722 import G722
    except ImportError:
        raise ImportError(
            "Decoding G.722 needs ffmpeg (`apt-get install ffmpeg`, or `pip install imageio-ffmpeg`), or `pip install "
            "G722`."
        ) from None

    # A decoder remembers what came before, so each file gets a new one
    return lambda data: np.asarray(G722(SAMPLING_RATE, 64000).decode(data), dtype=np.int16)


def _bundled_ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:  # the package without its program
        return None


def _decode_with_ffmpeg(program: str, data: bytes) -> np.ndarray:
    command = [program, "-nostdin", "-v", "error", "-f", "g722", "-i", "pipe:0"]
    command += ["-f", "s16le", "-ac", "1", "-ar", str(SAMPLING_RATE), "pipe:1"]
    result = subprocess.run(command, input=data, capture_output=True)
    if result.returncode:
        raise ValueError(f"ffmpeg could not decode G.722: {result.stderr.decode(errors='replace').strip()}")
    return np.frombuffer(result.stdout, dtype="<i2")


__all__ = ["SAMPLING_RATE", "find_g722_decoder"]
