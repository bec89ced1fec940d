"""G.722, the wideband codec of telephone exchanges, to 16 kHz waveforms."""

import importlib
import shutil
import subprocess
from collections.abc import Callable

import numpy as np


SAMPLING_RATE = 16000

_PACKET_BYTES = 8000  # one second


def find_g722_decoder() -> Callable[[bytes], np.ndarray]:
    """PyAV's decoder, that of the Python package G722, or the program ffmpeg, in this order; what they give is the same.

    Returns:
        A function that takes the 64 kbit/s of a file to `(samples,)`, int16.

    Raises:
        ImportError: There is none; says what to install.
    """
    # A program that is started for every prompt takes many times as long as a library
    for module, decode in (("av", _decode_with_av), ("G722", _decode_with_g722)):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return decode
    program = shutil.which("ffmpeg") or _bundled_ffmpeg()
    if program is None:
        raise ImportError(
            "Decoding G.722 needs `pip install av`, `pip install G722` or ffmpeg (`apt-get install ffmpeg`)."
        )
    return lambda data: _decode_with_ffmpeg(program, data)


def _decode_with_av(data: bytes) -> np.ndarray:
    import av

    # A decoder remembers what came before, so each file gets a new one
    codec = av.CodecContext.create("g722", "r")
    codec.sample_rate, codec.layout = SAMPLING_RATE, "mono"
    packets = (av.Packet(data[i : i + _PACKET_BYTES]) for i in range(0, len(data), _PACKET_BYTES))
    frames = [frame.to_ndarray().reshape(-1) for packet in packets for frame in codec.decode(packet)]
    return np.concatenate([np.zeros(0, np.int16), *frames])


def _decode_with_g722(data: bytes) -> np.ndarray:
    from G722 import G722

    return np.asarray(G722(SAMPLING_RATE, 64000).decode(data), dtype=np.int16)


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
