"""Waveforms to bytes of the formats that OpenAI's speech endpoint has, piece by piece as they are made.

soundfile encodes all of them; this keeps what it writes, and keeps streams free of what cannot be known beforehand.
"""

import io
import struct

import numpy as np


# Name in the request: media type, soundfile's format and subtype, and the rates that the format can have (None: any)
_FORMATS: dict[str, tuple[str, str, str, tuple[int, ...] | None]] = {
    "mp3": ("audio/mpeg", "MP3", "MPEG_LAYER_III", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "opus": ("audio/ogg", "OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
    "flac": ("audio/flac", "FLAC", "PCM_16", None),
    "wav": ("audio/wav", "WAV", "PCM_16", None),
    # Without a header there is nothing to name the rate, and clients know only OpenAI's
    "pcm": ("audio/pcm", "RAW", "PCM_16", (24000,)),
}
FORMATS = {name: media_type for name, (media_type, *_) in _FORMATS.items()}
_UNKNOWN_SIZE = 0xFFFFFFFF


class _Sink(io.RawIOBase):
    """A file that is written from its beginning to its end; `take` empties it. What a format's library would go back to
    correct in the header of a stream has been sent by then, and is left as it is."""

    def __init__(self):
        self._position = self._end = 0
        self._fresh = bytearray()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        return self._position

    def write(self, data) -> int:
        data = bytes(data)
        fresh = data[max(0, self._end - self._position) :]
        self._fresh += fresh
        self._position += len(data)
        self._end = max(self._end, self._position)
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._fresh)
        self._fresh.clear()
        return data


class AudioEncoder:
    """Encodes mono float32 samples.

    Args:
        name (`str`): One of `FORMATS`.
        sampling_rate (`int`): Hz of the samples; they are resampled where the format cannot have it.
        stream (`bool`): Give out bytes as they come. A streamed `wav` or `flac` does not say how long it is, since that
            is not known when its first bytes are sent. Otherwise all bytes come from `finish`, with a complete header.

    Raises:
        ValueError: There is no such format, or this build of libsndfile lacks it.
    """

    def __init__(self, name: str, sampling_rate: int, stream: bool = True):
        import soundfile
        import soxr

        check_format(name)
        _, container, subtype, rates = _FORMATS[name]
        self.sampling_rate = sampling_rate
        if rates is not None and sampling_rate not in rates:
            self.sampling_rate = min((rate for rate in rates if rate >= sampling_rate), default=rates[-1])
        self._resampler = None
        if self.sampling_rate != sampling_rate:
            self._resampler = soxr.ResampleStream(sampling_rate, self.sampling_rate, 1, dtype="float32")
        self._sink = _Sink() if stream else io.BytesIO()
        self._header = b""
        more = {}
        if name == "wav" and stream:  # soundfile's header would say that it is empty
            container, self._header = "RAW", _wav_header(self.sampling_rate)
        if name == "mp3":  # players tell the length of a stream from its bit rate, so that must not change
            more = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
        self._file = soundfile.SoundFile(
            self._sink,
            "w",
            samplerate=self.sampling_rate,
            channels=1,
            format=container,
            subtype=subtype,
            endian="LITTLE" if container == "RAW" else None,
            **more,
        )

    def push(self, samples: np.ndarray) -> bytes:
        """Bytes that are ready after `(samples,)` more; often none yet."""
        self._write(samples, last=False)
        return self._take()

    def finish(self) -> bytes:
        """The last bytes."""
        if self._resampler is not None:
            self._write(np.zeros(0, np.float32), last=True)
        self._file.close()
        return self._take() if isinstance(self._sink, _Sink) else self._sink.getvalue()

    def _write(self, samples: np.ndarray, last: bool) -> None:
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples, last=last)
        if len(samples):
            self._file.write(np.clip(samples, -1.0, 1.0))

    def _take(self) -> bytes:
        if not isinstance(self._sink, _Sink):
            return b""
        header, self._header = self._header, b""
        return header + self._sink.take()


def check_format(name: str) -> None:
    """Raises `ValueError` for a format that cannot be written here."""
    import soundfile

    if name not in FORMATS:
        raise ValueError(f"`response_format` must be one of {', '.join(FORMATS)}, got {name!r}.")
    _, container, subtype, _ = _FORMATS[name]
    if not soundfile.check_format(container, subtype):
        raise ValueError(
            f"`response_format` {name!r} needs a newer libsndfile than {soundfile.__libsndfile_version__} here."
        )


def _wav_header(sampling_rate: int) -> bytes:
    """16 bit, mono, of unknown length."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", _UNKNOWN_SIZE, b"WAVE") + form + struct.pack("<4sI", b"data", _UNKNOWN_SIZE)


__all__ = ["FORMATS", "AudioEncoder", "check_format"]
