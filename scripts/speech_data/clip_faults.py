"""What is wrong with a synthesised clip, if anything is."""

import numpy as np

from .corpus import SAMPLING_RATE


_SILENT_PEAK = 0.02
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.999, 0.001
# In 9207 clips of four engines at ordinary speeds it is 0.035 to 0.13 seconds per character; lone words take longer
_MIN_SECONDS_PER_CHARACTER, _MAX_SECONDS_PER_CHARACTER = 0.025, 0.2
_MORE_SECONDS = 1.0


def clip_fault(audio: np.ndarray, text: str, speed: float = 1.0) -> str | None:
    """Why a clip is unfit for training; `None` if it is fit.

    Args:
        audio (`np.ndarray`): `(samples,)`, float, at 16 kHz.
        text (`str`): What should be said in it.
        speed (`float`, defaults to 1.0): At which speed.
    """
    if not len(audio) or not np.isfinite(audio).all():
        return "it is empty or not finite"
    level = np.abs(audio)
    if level.max() < _SILENT_PEAK:
        return f"it is silent: its peak is {level.max():.4f} of full scale"
    clipped = float((level >= _CLIPPED_LEVEL).mean())
    if clipped > _CLIPPED_SHARE:
        return f"it is clipped: {clipped:.1%} of it is at full scale"
    seconds = len(audio) / SAMPLING_RATE * speed
    if not (
        _MIN_SECONDS_PER_CHARACTER * len(text) <= seconds <= _MAX_SECONDS_PER_CHARACTER * len(text) + _MORE_SECONDS
    ):
        return f"{seconds:.2f} s, at speed 1, are not plausible for {len(text)} characters"
    return None


__all__ = ["clip_fault"]
