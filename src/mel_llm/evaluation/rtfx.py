"""Speed of a recogniser."""

import math
from collections.abc import Iterable

import evaluate
from datasets import Features, Value

from .base import SpeechMetric, as_list


_INPUTS = """
Args:
    audio_seconds (`float` or `list[float]`): Durations of the audio.
    processing_seconds (`float` or `list[float]`): What transcribing it took, wall-clock; as many as `audio_seconds`.
    details (`bool`, defaults to `False`): Also return the two sums.
"""


class RealTimeFactor(SpeechMetric):
    """The inverse real-time factor, `{"rtfx": ratio}`: seconds of audio transcribed in one second, all over all.

    More is faster; 1 is as fast as one speaks. An entry is whatever was timed as a whole: a clip, a batch, or the run.
    """

    compute_arguments = ("details",)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Inverse real-time factor: seconds of audio over seconds of processing.",
            citation="",
            inputs_description=_INPUTS,
            features=Features({"audio_seconds": Value("float64"), "processing_seconds": Value("float64")}),
        )

    def _check_column(self, name: str, values) -> list[float]:
        if not isinstance(values, (Iterable, str)) or getattr(values, "ndim", None) == 0:
            values = [values]  # one batch or run
        seconds = []
        for index, value in enumerate(as_list(name, values)):
            try:
                if isinstance(value, (str, bytes, bool)):
                    raise TypeError
                seconds.append(float(value))
            except (TypeError, ValueError):
                message = f"`{name}[{index}]` must be a number of seconds, got {type(value).__name__}."
                raise TypeError(message) from None
            if not (math.isfinite(seconds[-1]) and seconds[-1] >= 0):
                raise ValueError(f"`{name}[{index}]` must be a finite number of seconds, not negative; got {value}.")
        return seconds

    def _compute(self, audio_seconds: list[float], processing_seconds: list[float], details: bool = False) -> dict:
        audio, processing = math.fsum(audio_seconds), math.fsum(processing_seconds)
        if processing == 0:
            raise ValueError("The real-time factor of no processing time is not defined.")
        result = {"rtfx": audio / processing}
        if details:
            result.update(audio_seconds=audio, processing_seconds=processing)
        return result


__all__ = ["RealTimeFactor"]
