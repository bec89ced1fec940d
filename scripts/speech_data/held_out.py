"""What must never be trained on: the texts of validation and test, and the voices that only tests hear.

The texts are kept as hashes, so that the list is small and gives no test sentence away. It was made from the corpora that
this project's figures are measured on; `reserved` texts are in none of their splits, and in no corpus made here either.
"""

import hashlib
import re
import unicodedata
from functools import cache
from pathlib import Path


_TABLE = Path(__file__).with_name("held_out.tsv")

# Words of a voice's name, in any engine: Kokoro's bf_isabella and am_fenrir, and the speakers rms and ked of CMU and
# Festival, whose recordings are also inside voices of Piper
HELD_OUT_VOICES = frozenset({"isabella", "fenrir", "rms", "ked", "kdlpc16k"})


def normalize_text(text: str) -> str:
    """What two texts have in common that are said alike: no case, no accents, no punctuation."""
    text = unicodedata.normalize("NFKD", text).casefold()
    text = "".join(character for character in text if not unicodedata.combining(character))
    return " ".join(re.findall(r"[^\W_]+", re.sub(r"['’`]", "", text)))


def text_hash(text: str) -> str:
    """16 hexadecimal digits that are the same for texts that are said alike."""
    return hashlib.sha256(normalize_text(text).encode("utf-8")).hexdigest()[:16]


@cache
def _held_out_texts() -> dict[tuple[str, str], str]:
    """`(language, hash)` to `validation`, `test` or `reserved`."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()[1:]
    return {(language, digest): split for language, split, digest in (line.split("\t") for line in lines)}


def split_of(text: str, language: str) -> str:
    """The split that a text belongs to: `validation`, `test`, `reserved`, or `train` for every other one.

    Args:
        text (`str`): As it is written; see [`normalize_text`] for what does not matter.
        language (`str`): Two letters, or a longer tag that begins with them.
    """
    return _held_out_texts().get((language.lower()[:2], text_hash(text)), "train")


def is_held_out_voice(name: str) -> bool:
    """Whether one of the words that a voice's name is made of is that of a voice kept for tests."""
    return not HELD_OUT_VOICES.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


__all__ = ["HELD_OUT_VOICES", "is_held_out_voice", "normalize_text", "split_of", "text_hash"]
