"""What a CTC head spells: the letters of a transcript, as bytes. Ours."""

import unicodedata
from collections.abc import Iterable
from itertools import pairwise


def ctc_bytes(text: str) -> list[int]:
    """Letters, digits, apostrophes and single spaces of a text, in lower case, as the bytes of UTF-8."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    kept = "".join(
        letter if letter.isalnum() or letter == "'" or unicodedata.combining(letter) else " " for letter in text
    )
    return list(" ".join(kept.split()).encode())


def count_unspellable(texts: Iterable[str], num_places: Iterable[int]) -> int:
    """How many transcripts do not fit into the places that their clips have for letters, and are lost on CTC."""
    count = 0
    for text, places in zip(texts, num_places, strict=True):
        letters = ctc_bytes(text)
        # Between two equal letters there must be a blank
        count += len(letters) + sum(a == b for a, b in pairwise(letters)) > places
    return count


__all__ = ["count_unspellable", "ctc_bytes"]
