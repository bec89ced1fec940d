"""Long recordings to text: cut where it is quiet, transcribe the pieces in batches, join what they say.

Everything here is ours; the paper transcribes utterances. Pieces do not overlap, so no word is said twice, and what is
left out is digital silence only, so none is lost.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.utils import logging

from .audio_utils_mel_llm import AudioSource, TruncatedAudioError, check_sampling_rate, stream_audio


logger = logging.get_logger(__name__)

_FRAME_SECONDS = 0.02

# Frames below this RMS hold no sound: 10 steps of a 16-bit recording. Conservative: a quiet room is 20 dB above it
_SILENCE_DBFS = -70.0
_SKIPPED_SILENCE_FRAMES = 50  # 1 s; a shorter silence stays where it is
_KEPT_SILENCE_FRAMES = 10  # 0.2 s of a longer one, beside the sound

# Inside words, before a t or a k, it is quiet for up to some 0.12 s
_MIN_PAUSE_SECONDS = 0.15
_MAX_PAUSE_SECONDS = 1.0  # a longer pause is no better
_QUIET_PLACE_SECONDS = 0.16  # where there is no pause, the quietest place of this length is cut
# A place one search range away from where a cut is wanted must have a pause longer by this
_DISTANCE_COST_SECONDS = 0.3

# Scripts that put no spaces between words: CJK with its punctuation and full-width forms, kana, Thai, Lao, Burmese, Khmer
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff00-\uff9f\U00020000-\U0003134f]"
)


@dataclass
class AudioPiece:
    """A stretch of a recording: `samples` `(n,)`, float32, from `start` to `end` seconds."""

    start: float
    end: float
    samples: np.ndarray


@dataclass
class Segment:
    """What is said from `start` to `end` seconds. The times are those of the sound in a piece, not of an aligner."""

    start: float
    end: float
    text: str


@dataclass
class Transcription:
    """A whole transcript. `duration` is that of the audio in seconds; `warning` says what is missing if it was
    `truncated`."""

    text: str
    segments: list[Segment] = field(default_factory=list)
    duration: float = 0.0
    truncated: bool = False
    warning: str | None = None


# --- cutting ------------------------------------------------------------------------------------------------------------


def split_audio(
    blocks: Iterable[np.ndarray], sampling_rate: int = 16000, max_seconds: float = 30.0
) -> Iterator[AudioPiece]:
    """Cuts a stream of audio into pieces at its pauses. Holds one and a half times `max_seconds` and one block.

    A cut falls into the middle of a pause in the second half of the longest possible piece, by preference a long one
    and a late one; where there is no pause, into the quietest place. What remains at the end is cut near its middle, so
    that no piece of a word or two is left. Pieces do not overlap. They leave out stretches of digital silence (below
    -70 dBFS) of at least one second, but for 0.2 s beside the sound, and pieces of nothing else.

    Args:
        blocks: Mono float32 waveforms `(samples,)` that follow each other, as [`stream_audio`] gives them.
        sampling_rate (`int`, defaults to 16000): Hz.
        max_seconds (`float`, defaults to 30.0): Longest piece, at least 1.

    Returns:
        Iterator of [`AudioPiece`].

    Raises:
        ValueError: An argument is out of range.
        TruncatedAudioError: `blocks` raised it; the pieces of what there was come first.
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    if not (math.isfinite(max_seconds) and max_seconds >= 1):
        raise ValueError(f"`max_seconds` must be at least 1 second, got {max_seconds}.")
    size = 10 * sampling_rate  # however long the caller's blocks are, only a window of them is looked at
    blocks = (block[i : i + size] for block in blocks for i in range(0, len(block), size))
    return _split(blocks, sampling_rate, int(max_seconds * sampling_rate))


def _split(blocks: Iterator[np.ndarray], rate: int, longest: int) -> Iterator[AudioPiece]:
    window = longest + longest // 2  # with so much in sight, what remains behind a cut is known not to be tiny
    audio, position = np.zeros(0, np.float32), 0  # what is held, and its place in the recording
    ended, truncation = False, None
    after_silence = False  # whether silence was dropped in front of what is held
    while not ended or len(audio):
        held, num_held = [audio], len(audio)
        while not ended and num_held <= window:
            try:
                held.append(next(blocks))
                num_held += len(held[-1])
            except StopIteration:
                ended = True
            except TruncatedAudioError as error:
                ended, truncation = True, error
        audio = np.concatenate(held)
        begin, end = _sounding_part(audio, rate, after_silence)
        if end == 0 and not ended:  # silence so far; some of it may belong to what comes
            size = round(_FRAME_SECONDS * rate)
            begin = max(0, len(audio) // size * size - _KEPT_SILENCE_FRAMES * size)
            after_silence = after_silence or begin > 0
        audio, position = audio[begin : end if ended else None], position + begin
        if len(audio) <= window and not ended:
            continue
        after_silence = False
        # Never more than the window, so that cuts do not depend on the caller's blocks
        cut = _cut_place(audio[: window + 1], rate, longest)
        begin, end = _sounding_part(audio[:cut], rate)
        if end:
            piece = audio[begin:end].copy()  # a view would keep all that is held
            yield AudioPiece((position + begin) / rate, (position + end) / rate, piece)
        audio, position = audio[cut:], position + cut
    if truncation is not None:
        raise truncation


def _frame_power(audio: np.ndarray, rate: int) -> np.ndarray:
    """Mean power of each frame without its constant part, `(ceil(samples / frame length),)`; the last may be short."""
    if len(audio) == 0:
        return np.zeros(0)
    size = round(_FRAME_SECONDS * rate)
    num_whole = len(audio) // size
    power = audio[: num_whole * size].reshape(num_whole, size).var(axis=1, dtype=np.float64)
    rest = audio[num_whole * size :]
    return np.append(power, np.var(rest, dtype=np.float64)) if len(rest) else power


def _decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, 1e-12))


def _sounding_part(audio: np.ndarray, rate: int, after_silence: bool = False) -> tuple[int, int]:
    """First sample, and the one behind the last, without long silence at either end; (0, 0) if there is only silence.

    `after_silence` says that silence precedes, so that any of it at the beginning belongs to a long one.
    """
    sounding = np.flatnonzero(_decibels(_frame_power(audio, rate)) >= _SILENCE_DBFS)
    if len(sounding) == 0:
        return 0, 0
    size = round(_FRAME_SECONDS * rate)
    first, last = int(sounding[0]), int(sounding[-1]) + 1  # frames
    long_enough = _KEPT_SILENCE_FRAMES if after_silence else _SKIPPED_SILENCE_FRAMES
    begin = first - _KEPT_SILENCE_FRAMES if first >= long_enough else 0
    is_long = len(audio) - last * size >= _SKIPPED_SILENCE_FRAMES * size
    return begin * size, (last + _KEPT_SILENCE_FRAMES) * size if is_long else len(audio)


def _quiet_threshold(levels: np.ndarray) -> float:
    """The level (dB) below which a frame is no speech: nearer to the quiet than to the loud, or 40 dB below the loud."""
    quiet, loud = np.percentile(levels, (5, 99))
    return max(quiet + 0.3 * (loud - quiet), loud - 40)


def _cut_place(audio: np.ndarray, rate: int, longest: int) -> int:
    """How many samples the next piece should have."""
    num_samples = len(audio)
    if num_samples <= longest:
        return num_samples
    if num_samples <= longest + longest // 2:  # the last two pieces
        first, last = max(num_samples - longest, num_samples // 4), min(longest, num_samples - num_samples // 4)
        wanted = num_samples / 2
    else:
        first, last = longest // 2, longest
        wanted = last
    size = round(_FRAME_SECONDS * rate)
    power = _frame_power(audio, rate)
    levels = _decibels(power)
    begin, end = -(-first // size), last // size
    best_score, place = -math.inf, None
    for pause_begin, pause_end in _runs(levels[begin:end] < _quiet_threshold(levels)):
        seconds = (pause_end - pause_begin) * size / rate
        middle = (begin + (pause_begin + pause_end) / 2) * size
        score = min(seconds, _MAX_PAUSE_SECONDS) - _DISTANCE_COST_SECONDS * abs(middle - wanted) / (last - first)
        if seconds >= _MIN_PAUSE_SECONDS and score > best_score:
            best_score, place = score, int(middle)
    if place is not None:
        return place
    width = min(round(_QUIET_PLACE_SECONDS / _FRAME_SECONDS), max(1, end - begin))
    sums = np.convolve(power[begin:end], np.ones(width), mode="valid")
    if len(sums) == 0:  # a search range shorter than a frame
        return last
    return min(last, int((begin + int(sums.argmin()) + width / 2) * size))


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """`(begin, end)` of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _spoken_span(piece: AudioPiece, rate: int) -> tuple[float, float]:
    """Seconds at which the sound in a piece begins and ends, for display."""
    levels = _decibels(_frame_power(piece.samples, rate))
    loud = np.flatnonzero(levels >= _quiet_threshold(levels))
    start = piece.start + float(loud[0]) * _FRAME_SECONDS
    end = piece.start + float(loud[-1] + 1) * _FRAME_SECONDS
    return start, min(piece.end, end)


# --- transcribing -------------------------------------------------------------------------------------------------------


def iter_segments(
    model,
    processor,
    audio: AudioSource,
    *,
    language: str | None = None,
    prompt: str | None = None,
    batch_size: int = 8,
    max_segment_seconds: float | None = None,
    on_progress: Callable[[float], None] | None = None,
    **generate_kwargs,
) -> Iterator[Segment]:
    """Transcribes a recording of any length and gives out each segment when its batch is done.

    At most `batch_size` pieces, and what [`split_audio`] holds, are in memory.

    Args:
        model ([`MelLLMForSpeechSeq2Seq`]): Also one with adapters of PEFT. If it is in training mode, it is put into
            evaluation mode for each batch and back.
        processor ([`MelLLMProcessor`]): Its processor.
        audio: What [`load_audio`] takes: a path, a URL, bytes, a file, an array, ...
        language (`str`, *optional*), prompt (`str`, *optional*): As for
            [`MelLLMProcessor.apply_transcription_request`]. The request is then a chat for `generate()`, so the
            guards against loops and silence are not at work; each piece still has its token budget.
        batch_size (`int`, defaults to 8): Pieces that are transcribed together.
        max_segment_seconds (`float`, *optional*): Longest piece; `config.audio_config.max_audio_seconds` by default.
        on_progress (*optional*): Called with the seconds of the recording that are done, after each batch.
        generate_kwargs: For `generate()`. `max_new_tokens` counts for each piece, in the place of its budget.

    Returns:
        Iterator of [`Segment`], in the order of time and without overlap. Pieces without text give none.

    Raises:
        TruncatedAudioError: The audio breaks off; the segments of what there was come first.
        ValueError: An argument is out of range, or `generate_kwargs` do not give one transcript per piece.
        OSError, ImportError, TypeError: See [`load_audio`].
    """
    rate = processor.feature_extractor.sampling_rate
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
    if max_segment_seconds is None:
        max_segment_seconds = model.config.audio_config.max_audio_seconds
    blocks = audio.blocks() if isinstance(audio, _CountedAudio) else stream_audio(audio, rate)
    pieces = split_audio(blocks, rate, max_segment_seconds)

    def segments() -> Iterator[Segment]:
        for batch, truncation in _batches(pieces, batch_size):
            if batch:
                clips = [piece.samples for piece in batch]
                texts = transcribe_clips(model, processor, clips, language, prompt, generate_kwargs)
                for piece, text in zip(batch, texts, strict=True):
                    if text:
                        yield Segment(*_spoken_span(piece, rate), text)
                if on_progress is not None:
                    on_progress(batch[-1].end)
            if truncation is not None:
                raise truncation

    return segments()


def transcribe(
    model,
    processor,
    audio: AudioSource,
    *,
    on_segment: Callable[[Segment], None] | None = None,
    **kwargs,
) -> Transcription:
    """Transcribes a recording of any length.

    What precedes the place where a file breaks off is transcribed, with a warning and `truncated=True`.

    Args:
        on_segment (*optional*): Called with each [`Segment`] when its batch is done.
        kwargs: All else, `model`, `processor` and `audio` too, is as for [`iter_segments`].

    Returns:
        [`Transcription`]: The texts of the segments are joined by spaces, but for scripts that have none.

    Raises:
        ValueError, OSError, ImportError, TypeError: As [`iter_segments`]. A truncated file raises only if none of it
            can be read.
    """
    rate = processor.feature_extractor.sampling_rate
    recording = _CountedAudio(audio, rate)
    segments, warning = [], None
    try:
        for segment in iter_segments(model, processor, recording, **kwargs):
            segments.append(segment)
            if on_segment is not None:
                on_segment(segment)
    except TruncatedAudioError as error:
        if not recording.num_samples:
            raise
        warning = str(error)
        logger.warning(f"{warning} What precedes was transcribed.")
    text = join_texts(segment.text for segment in segments)
    return Transcription(text, segments, recording.num_samples / rate, warning is not None, warning)


def join_texts(texts: Iterable[str]) -> str:
    """Texts that follow each other as one: with a space between them, or with none inside a script that has none."""
    joined = ""
    for text in (text.strip() for text in texts):
        if joined and text and not (_UNSPACED.match(joined[-1]) and _UNSPACED.match(text[0])):
            joined += " "
        joined += text
    return joined


def _batches(pieces: Iterator[AudioPiece], size: int) -> Iterator[tuple[list[AudioPiece], TruncatedAudioError | None]]:
    """Lists of up to `size` pieces; the last comes with the error that ended them, if one did."""
    while True:
        batch: list[AudioPiece] = []
        try:
            for piece in itertools.islice(pieces, size):
                batch.append(piece)
        except TruncatedAudioError as error:
            yield batch, error
            return
        if not batch:
            return
        yield batch, None


def transcribe_clips(
    model, processor, clips: list[np.ndarray], language: str | None, prompt: str | None, generate_kwargs: dict
) -> list[str]:
    """The transcript of each waveform of a batch."""
    kwargs = dict(generate_kwargs)
    prompt_length, budgets = 0, None
    if language is None and prompt is None:
        inputs = processor(audio=clips, sampling_rate=processor.feature_extractor.sampling_rate)
    else:
        inputs = processor.apply_transcription_request(clips, language=language, prompt=prompt)
        prompt_length = inputs["input_ids"].shape[1]
        if kwargs.get("max_new_tokens") is None and kwargs.get("max_length") is None:
            # For `generate` this is a chat, which may go on to the checkpoint's limit, whatever the audio's length
            budgets = _token_budgets(model, inputs["input_features_mask"].sum(-1), kwargs.get("generation_config"))
            kwargs["max_new_tokens"] = max(budgets)
    if hasattr(model, "_continuation_prompt"):  # which would go on with what it hears
        kwargs.setdefault("task", "transcribe")
    with _evaluation_mode(model):
        output = model.generate(**inputs.to(model.device), **kwargs)
    rows = (output if isinstance(output, torch.Tensor) else output["sequences"])[:, prompt_length:].tolist()
    if len(rows) != len(clips):
        raise ValueError(f"`generate` returned {len(rows)} transcripts of {len(clips)} pieces; one of each is needed.")
    if budgets is not None:  # a short clip must not get the budget of a longer one beside it
        rows = [row[:budget] for row, budget in zip(rows, budgets, strict=True)]
    return processor.batch_decode(rows, return_format="transcription_only")


def _token_budgets(model, num_frames: torch.Tensor, generation_config) -> list[int]:
    """The most tokens that each clip may get, as in [`MelLLMGenerationMixin.generate`] with audio alone."""
    config = model.generation_config if generation_config is None else generation_config
    budgets = model._audio_budgets(num_frames)
    return (budgets if config.max_new_tokens is None else budgets.clamp(max=config.max_new_tokens)).tolist()


@contextlib.contextmanager
def _evaluation_mode(model) -> Iterator[None]:
    """Dropout is off inside, and exactly what was training before trains again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _CountedAudio:
    """Audio for [`iter_segments`] that tells afterwards how much of it could be read."""

    def __init__(self, audio: AudioSource, rate: int):
        self.audio, self.rate, self.num_samples = audio, rate, 0

    def blocks(self) -> Iterator[np.ndarray]:
        for block in stream_audio(self.audio, self.rate):
            self.num_samples += len(block)
            yield block


__all__ = ["AudioPiece", "Segment", "Transcription", "iter_segments", "join_texts", "split_audio", "transcribe"]
