"""Transcripts that a CTC head has no room to spell. Ours."""

from collections.abc import Iterable
from itertools import pairwise

from ..spelling import ctc_bytes


def count_unspellable(texts: Iterable[str], num_places: Iterable[int]) -> int:
    """How many transcripts do not fit into the places that their clips have for letters, and are lost on CTC."""
    count = 0
    for text, places in zip(texts, num_places, strict=True):
        letters = ctc_bytes(text)
        # Between two equal letters there must be a blank
        count += len(letters) + sum(a == b for a, b in pairwise(letters)) > places
    return count


__all__ = ["count_unspellable"]
