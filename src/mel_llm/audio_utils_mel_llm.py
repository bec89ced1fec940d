"""From anything that holds audio to a mono float32 waveform.

soundfile decodes and soxr resamples; neither torchcodec nor ffmpeg is needed. Both are imported where they are used,
because this module is also remote code of a Hub repository and must load without them.
"""

import base64
import binascii
import contextlib
import importlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch


# A waveform, or where to find one: see `load_audio`.
AudioSource = Any

# What a folder is searched for
AUDIO_EXTENSIONS = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc")

MAX_CHANNELS = 8
# No audio device or telephone line is outside these (Hz). A lower rate in a forged header would make resampling
# inflate a small file without bound.
MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 1_000, 768_000

_MAX_PEAK = 2.0**31  # 32-bit integers passed as floats; nothing louder is audio, and features would overflow
_BLOCK_SAMPLES = 1 << 18
_UNKNOWN_LENGTH = 1 << 48  # libsndfile says "for ever" of a FLAC that was written to a pipe
_READ_SAMPLES = 1 << 12  # decoded in one call: what a decoder that meets damage throws away
_DOWNLOAD_TIMEOUT_S = 30.0
_FORMATS = (
    "Formats that are read: WAV, FLAC, OGG (Vorbis or Opus), MP3, AIFF. Convert video containers and others such as "
    "mp4, m4a, webm, aac or wma first, e.g. `ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav`."
)


class TruncatedAudioError(ValueError):
    """The file breaks off, or is damaged, before the end that it announces. What precedes was readable."""


def to_mono_float(audio: "np.ndarray | torch.Tensor | list[float]", name: str = "audio") -> np.ndarray:
    """Check one waveform and return it as mono float32.

    Integers of a sound file (uint8, int16, int32) are scaled by their full range, floats are taken as they are, and so
    are the numbers of a Python list. Two dimensions are `(channels, samples)` and averaged; every other layout is
    refused, since averaging the wrong axis would give silent nonsense.

    Args:
        audio (`np.ndarray`, `torch.Tensor` or `list[float]`): `(samples,)` or `(channels, samples)` with up to 8 channels.
        name (`str`): What error messages call it.

    Returns:
        `np.ndarray`: `(samples,)`, float32, at least one sample, all finite. No copy is made where none is needed.

    Raises:
        TypeError: It is no array of real numbers.
        ValueError: It is empty, has a shape other than the above, or holds NaN, infinity or values beyond 32 bits.
    """
    array = _to_numpy(audio, name)
    if array.size == 0:
        raise ValueError(f"`{name}` is empty: got shape {array.shape}, needs at least one sample.")
    array = _scale_to_float(array, name, scale_integers=isinstance(audio, (np.ndarray, torch.Tensor)))
    if array.ndim == 2:
        _check_channels_first(array.shape, name)
        array = array.mean(axis=0)
    elif array.ndim != 1:
        raise ValueError(
            f"`{name}` must have shape (samples,) or (channels, samples), got {array.shape}. "
            "Pass a batch as a list of 1-D arrays."
        )
    low, high = float(array.min()), float(array.max())  # both are NaN where any value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"`{name}` contains NaN or infinite values. Repair or drop this audio.")
    if max(-low, high) > _MAX_PEAK:
        raise ValueError(f"`{name}` has a peak of {max(-low, high):.3g}, beyond 32-bit integers: this is no waveform.")
    return np.ascontiguousarray(array)


def _to_numpy(audio: Any, name: str) -> np.ndarray:
    if isinstance(audio, torch.Tensor):
        audio = audio.detach().cpu()
        return (audio.float() if audio.dtype == torch.bfloat16 else audio).numpy()
    if isinstance(audio, np.ndarray):
        return audio
    if isinstance(audio, (list, tuple)):
        try:
            return np.asarray(audio)
        except ValueError as error:
            raise ValueError(f"`{name}` is a ragged or mixed sequence, not one waveform: {error}") from error
    raise TypeError(
        f"`{name}` must be a NumPy array, a torch tensor or a list of floats, got {type(audio).__name__}. "
        "Read files, URLs and bytes with `mel_llm.load_audio`."
    )


def _scale_to_float(array: np.ndarray, name: str, scale_integers: bool) -> np.ndarray:
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "f" or (kind in "iu" and not scale_integers):
        with np.errstate(over="ignore"):  # too large for float32: infinity, which is refused later
            return array.astype(np.float32, copy=False)
    if kind == "i" and bits in (16, 32):
        return array.astype(np.float32) / 2.0 ** (bits - 1)
    if kind == "u" and bits == 8:  # 8-bit WAV: silence is 128
        return (array.astype(np.float32) - 128.0) / 128.0
    raise TypeError(
        f"`{name}` must hold real samples (float16/32/64, int16, int32 or uint8), got dtype {array.dtype}. "
        "Convert other integers to floats in [-1, 1] yourself."
    )


def _check_channels_first(shape: tuple[int, ...], name: str) -> None:
    """Only a shape that cannot be read in another way is taken as `(channels, samples)`."""
    channels, samples = shape
    if channels == 1 or channels <= MAX_CHANNELS < samples:
        return
    if samples <= MAX_CHANNELS < channels:
        hint = "This looks like (samples, channels): transpose it."
    else:
        hint = "Pass a batch as a list of 1-D arrays, e.g. `list(array)`."
    raise ValueError(
        f"`{name}` has shape {shape}; two dimensions are read as (channels, samples) with at most {MAX_CHANNELS} "
        f"channels and more than {MAX_CHANNELS} samples. {hint}"
    )


def resample(array: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample a mono waveform with soxr's high-quality filter, sample for sample what `transformers` does.

    Args:
        array (`np.ndarray`): `(samples,)`.
        from_rate (`int`): Its sampling rate in Hz.
        to_rate (`int`): The wanted sampling rate in Hz.

    Returns:
        `np.ndarray`: `(ceil(samples * to_rate / from_rate),)`, float32; peaks may overshoot the input's a little.

    Raises:
        ImportError: soxr is not installed and the rates differ.
        ValueError: A rate is outside 1 to 768 kHz, or `array` is no waveform (see `to_mono_float`).
    """
    from_rate, to_rate = check_sampling_rate(from_rate, "from_rate"), check_sampling_rate(to_rate, "to_rate")
    array = to_mono_float(array, "array")
    return array if from_rate == to_rate else _join(_resample_blocks(_slices(array), from_rate, to_rate))


def check_sampling_rate(rate: Any, name: str = "sampling_rate") -> int:
    """Return `rate` (Hz) as an int, or raise a `ValueError` that calls it `name`."""
    is_whole = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool) and rate % 1 == 0
    if not is_whole or not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
        raise ValueError(
            f"`{name}` must be a whole number of Hz from {MIN_SAMPLING_RATE} to {MAX_SAMPLING_RATE}, got {rate!r}."
        )
    return int(rate)


def _resample_blocks(blocks: Iterable[np.ndarray], from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    """Mono float32 blocks at the new rate, `ceil(samples * to_rate / from_rate)` samples in all."""
    if from_rate == to_rate:
        yield from blocks
        return
    stream = _require("soxr").ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ")
    num_samples, num_resampled = 0, 0
    for block in blocks:
        num_samples += len(block)
        resampled = stream.resample_chunk(block)
        num_resampled += len(resampled)
        yield resampled
    missing = -(-num_samples * to_rate // from_rate) - num_resampled  # ceil
    rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:missing]
    yield np.pad(rest, (0, missing - len(rest)))


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + _BLOCK_SAMPLES] for i in range(0, len(array), _BLOCK_SAMPLES))


def _join(blocks: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def _regroup(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `size`, of which only the last may be shorter."""
    held, num_held = [], 0
    for block in blocks:
        while num_held + len(block) >= size:
            held.append(block[: size - num_held])
            block = block[size - num_held :]
            yield held[0] if len(held) == 1 else np.concatenate(held)
            held, num_held = [], 0
        if len(block):
            held.append(block)
            num_held += len(block)
    if held:
        yield np.concatenate(held)


def load_audio(
    source: AudioSource, sampling_rate: int = 16000, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Read audio from wherever it is, as a mono waveform at the rate that is asked for.

    Files are WAV, FLAC, OGG (Vorbis or Opus), MP3 or AIFF. They are decoded, down-mixed and resampled block by block.
    An Ogg file that was cut off is not recognised as such: what is there is returned.

    Args:
        source: One of
            - a path (`str` or `os.PathLike`), an `http(s)://` URL or a `data:...;base64,` URI,
            - the `bytes` of a file, or a binary file object (read from its beginning, left open),
            - an array, tensor or list of floats that is already at `sampling_rate`,
            - a tuple `(array, sampling_rate)`,
            - a dict as `datasets` gives it: `array` and `sampling_rate`, or `bytes` and/or `path`.
        sampling_rate (`int`, defaults to 16000): The wanted rate in Hz.
        offset (`float`, defaults to 0.0): Where to start, in seconds.
        duration (`float`, *optional*): How many seconds to read at most; by default everything.

    Returns:
        `np.ndarray`: `(samples,)`, float32, nominally in [-1, 1] (float files and resampling may overshoot).

    Raises:
        FileNotFoundError, IsADirectoryError: The path is not a file.
        ConnectionError: The URL could not be fetched.
        ImportError: soundfile or soxr is needed and missing.
        TypeError: `source` is none of the above.
        ValueError: The content is empty, truncated ([`TruncatedAudioError`]) or not audio that can be read; or an
            argument is out of range.
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    if not (math.isfinite(offset) and offset >= 0):
        raise ValueError(f"`offset` must be at least 0 seconds, got {offset}.")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"`duration` must be more than 0 seconds or None, got {duration}.")
    held = _held_array(source, sampling_rate)
    if held is not None:
        array, rate = held
        start, count = _span(len(array), rate, offset, duration, "source")
        return resample(array[start : start + count], rate, sampling_rate)
    with _open(_from_dict(source)) as (file, name):
        return _join(_decode(file, name, sampling_rate, offset, duration))


def stream_audio(source: AudioSource, sampling_rate: int = 16000, block_seconds: float = 10.0) -> Iterator[np.ndarray]:
    """Read audio block by block, so that a recording of hours needs no more memory than a block.

    The blocks, joined, are what [`load_audio`] returns. A stream that cannot seek and a URL are copied into a temporary
    file first: formats say at their end, or all over, what a decoder needs to begin.

    Args:
        source: As for [`load_audio`]; what is handed over as an array or as bytes is in memory already.
        sampling_rate (`int`, defaults to 16000): The wanted rate in Hz.
        block_seconds (`float`, defaults to 10.0): Length of each block but the last, in seconds.

    Returns:
        Iterator of `np.ndarray`: `(samples,)`, float32.

    Raises:
        TruncatedAudioError: The file breaks off. Raised after everything that could be read has been given out.
        ValueError, OSError, ImportError, TypeError: As [`load_audio`], at once for the arguments and at the first
            `next()` for the source.
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    if not (math.isfinite(block_seconds) and block_seconds > 0):
        raise ValueError(f"`block_seconds` must be more than 0 seconds, got {block_seconds}.")
    return _stream(source, sampling_rate, max(1, round(block_seconds * sampling_rate)))


def _stream(source: AudioSource, sampling_rate: int, block_samples: int) -> Iterator[np.ndarray]:
    held = _held_array(source, sampling_rate)
    if held is not None:
        array, rate = held
        yield from _regroup(_resample_blocks(_slices(array), rate, sampling_rate), block_samples)
        return
    with _open(_from_dict(source)) as (file, name):
        yield from _decode(file, name, sampling_rate, block_samples=block_samples)


def _held_array(source: AudioSource, sampling_rate: int) -> tuple[np.ndarray, int] | None:
    """The mono waveform of a source that is an array, and its rate in Hz; None for a source that must be read."""
    source = _from_dict(source)
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], (int, float)):
        array, rate = source
        return to_mono_float(array, "source"), check_sampling_rate(rate, "source[1]")
    if isinstance(source, (np.ndarray, torch.Tensor, list)):
        return to_mono_float(source, "source"), sampling_rate
    return None


def _from_dict(source: AudioSource) -> AudioSource:
    """What a dict of `datasets` holds; anything else as it is."""
    if not isinstance(source, dict):
        return source
    if source.get("array") is not None:
        if source.get("sampling_rate") is None:
            raise ValueError(f"An audio dict with `array` needs `sampling_rate` (Hz) too, got keys {sorted(source)}.")
        return source["array"], source["sampling_rate"]
    if source.get("bytes") is not None:
        return source["bytes"]
    if source.get("path") is not None:
        return source["path"]
    raise ValueError(
        f"An audio dict needs `array` and `sampling_rate`, `bytes`, or `path`; got keys {sorted(source)}."
    )


def _span(num_samples: int, rate: int, offset: float, duration: float | None, name: str) -> tuple[int, int]:
    """First sample and number of samples of the part that is asked for."""
    start = round(offset * rate)
    if start >= num_samples:
        raise ValueError(f"`offset` {offset} s is at or behind the end of {name} ({num_samples / rate:.3f} s).")
    available = num_samples - start
    return start, available if duration is None else min(available, max(1, round(duration * rate)))


@contextlib.contextmanager
def _open(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a seekable binary file and the name that errors give it."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as file:
            _download(source, file)
            yield file, source
    elif isinstance(source, str) and source.startswith("data:"):
        yield io.BytesIO(_decode_data_uri(source)), source[:40] + "..."
    elif isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file, os.fspath(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source), f"<{len(source)} bytes>"
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = str(getattr(source, "name", repr(source)))
        if source.seekable():
            yield source, name
        else:
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(source, file)
                yield file, name
    else:
        raise TypeError(
            "`source` must be a path, an http(s) URL, a data: URI, bytes, a binary file, an array, (array, rate) or an "
            f"audio dict, got {type(source).__name__}."
        )


def _download(url: str, file: BinaryIO) -> None:
    from huggingface_hub.utils import get_session

    try:
        with get_session().stream("GET", url, follow_redirects=True, timeout=_DOWNLOAD_TIMEOUT_S) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except Exception as error:
        raise ConnectionError(f"Could not fetch {url}: {error}") from error


def _decode_data_uri(uri: str) -> bytes:
    header, separator, payload = uri.partition(",")
    if not separator or not header.endswith(";base64"):
        raise ValueError(f"A data: URI must look like `data:audio/wav;base64,...`, got {uri[:40]!r}.")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"The data: URI {uri[:40]!r} does not hold valid base64: {error}") from error


def _decode(
    file: BinaryIO,
    name: str,
    sampling_rate: int,
    offset: float = 0.0,
    duration: float | None = None,
    block_samples: int = _BLOCK_SAMPLES,
) -> Iterator[np.ndarray]:
    soundfile = _require("soundfile")
    damage = _missing_bytes(file, name)
    try:
        audio = soundfile.SoundFile(file)
    except (
        soundfile.LibsndfileError,
        TypeError,
    ) as error:  # TypeError: a name in .raw, which says nothing of its rate
        # libsndfile's own text names a Python object and often calls a truncated file one of unknown format
        reason = getattr(error, "error_string", str(error))
        raise ValueError(f"{name} is not audio that can be read, or is truncated ({reason}) {_FORMATS}") from error
    with audio:
        rate = check_sampling_rate(audio.samplerate, f"sampling rate of {name}")
        if audio.frames == 0:
            raise ValueError(f"{name} holds no audio: it has 0 samples.")
        start, count = _span(audio.frames, rate, offset, duration, name)
        reader = _MonoReader(audio, start, count)
        for block in _regroup(_resample_blocks(reader, rate, sampling_rate), block_samples):
            yield to_mono_float(block, name)
    damage = damage or reader.damage
    # Only now, behind the resampler's last samples: whoever streams keeps what there was
    if damage:
        raise TruncatedAudioError(f"{name} is truncated: {damage}.")


class _MonoReader:
    """Iterates over `count` samples of an open `soundfile.SoundFile` from `start` on, averaged over its channels.

    It ends where the file breaks off, and `damage` then says so.
    """

    def __init__(self, audio: Any, start: int, count: int):
        self.audio, self.start, self.count = audio, start, count
        self.damage: str | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        found = 0
        error_type = _require("soundfile").LibsndfileError
        try:
            self.audio.seek(self.start)
            # soundfile seeks to where it is after every read, which fails at the end of a FLAC that was streamed or
            # broke off, and takes what was read with it
            self.audio.seekable = lambda: False
            while found < self.count:
                block, error = self._read_block(min(self.count - found, _BLOCK_SAMPLES), error_type)
                found += len(block)
                if len(block):
                    yield np.ascontiguousarray(block.mean(axis=1) if block.shape[1] > 1 else block[:, 0])
                if error is not None:
                    raise error
                if len(block) == 0:
                    break
        except error_type as error:
            self.damage = f"{self.count} samples announced, {found} found ({error.error_string.rstrip('.')})"
        if self.count >= _UNKNOWN_LENGTH:
            return
        if self.count - found > 0.05 * self.count:  # MP3 announces its length with some slack
            self.damage = self.damage or f"{self.count} samples announced, {found} found"

    def _read_block(self, size: int, error_type: type) -> tuple[np.ndarray, Exception | None]:
        """`(samples, channels)` and the error, if any, behind which nothing can be read."""
        block, found = np.empty((size, self.audio.channels), np.float32), 0
        while found < size:
            try:
                part = self.audio.read(out=block[found : found + _READ_SAMPLES])
            except error_type as error:
                return block[:found], error
            if len(part) == 0:
                break
            found += len(part)
        return block[:found], None


def _missing_bytes(file: BinaryIO, name: str) -> str | None:
    """Refuses an empty file, and finds a WAV that is shorter than it says, which libsndfile would read in silence."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    header = file.read(12)
    file.seek(0)
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes).")
    if header[:4] == b"RIFF" and header[8:] == b"WAVE":
        announced = int.from_bytes(header[4:8], "little") + 8
        if size < announced < 0x7FF00000:  # programs that write to a pipe put 2 or 4 GB there
            return f"{announced} bytes announced, {size} found"
    return None


def _require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"Reading and resampling audio needs {module}: `pip install soundfile soxr`.") from error
