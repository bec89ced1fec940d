"""Text normalisation, the same for training labels and for metrics."""

import re
import unicodedata
from collections.abc import Callable
from functools import cache


# What is spelling, not punctuation, between two letters: apostrophe, Catalan's middle dot, Hebrew's geresh and gershayim
_INSIDE_WORDS = "'·׳״"
# Other characters that people and tools write for an apostrophe between two letters
_APOSTROPHES = str.maketrans("’ʼ", "''")
# The joiners are part of the spelling in Persian and in Indic scripts, after a letter or a vowel sign, and glue between
# emojis; the other format characters cannot be seen
_JOINERS = "\u200c\u200d"
# Ask for another glyph of the same character, as of a heart in colour
_VARIATION_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def _unchanged(text: str) -> str:
    return text


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _without_invisible(text: str) -> str:
    """The text without what nobody sees or says, which would count as an edit or, left over alone, as a word."""
    if text.isascii():
        return text
    kept = []
    for char in _VARIATION_SELECTORS.sub("", text):
        if unicodedata.category(char) != "Cf":
            kept.append(char)
        elif char in _JOINERS and kept and unicodedata.category(kept[-1])[0] in "LM":
            kept.append(char)
    return "".join(kept)


def _lower_no_punctuation(text: str) -> str:
    text = unicodedata.normalize("NFC", text.lower())
    # Before neighbours are looked at: an invisible character beside an apostrophe must not count as one
    text = _without_invisible(text).translate(_APOSTROPHES)

    def of_a_word(index: int) -> bool:
        # Letters, marks (vowel signs) and numbers
        return 0 <= index < len(text) and unicodedata.category(text[index])[0] in "LMN"

    kept = []
    for index, char in enumerate(text):
        if char in _INSIDE_WORDS:
            keep = of_a_word(index - 1) and of_a_word(index + 1)
        else:
            keep = unicodedata.category(char)[0] not in "PS"
        kept.append(char if keep else " ")
    # Composed again, since a character that went may have stood between a letter and its accent
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def _whisper() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise ImportError(_MISSING.format(name="whisper")) from error
    normalize = EnglishTextNormalizer()

    def whisper(text: str) -> str:
        # Whisper's rules know contractions by the straight apostrophe only: "don’t" would become "don t". And they leave
        # a lone "." behind at the end of "wait...", which would count as a word.
        text = _without_invisible(text).translate(_APOSTROPHES)
        return normalize(re.sub(r"\.{2,}|…", " ", text)).strip()

    return whisper


def _whisper_basic() -> Callable[[str], str]:
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
    except ImportError as error:
        raise ImportError(_MISSING.format(name="whisper_basic")) from error
    normalize = BasicTextNormalizer()

    def whisper_basic(text: str) -> str:
        return normalize(_without_invisible(text)).strip()

    return whisper_basic


_MISSING = (
    'The text normalizer "{name}" needs the package whisper-normalizer: `pip install whisper-normalizer`. '
    "This package's extra `train` brings everything that training and evaluation use."
)
_FACTORIES = {
    "none": lambda: _unchanged,
    "lower": lambda: _lower,
    "lower_no_punctuation": lambda: _lower_no_punctuation,
    "whisper": _whisper,
    "whisper_basic": _whisper_basic,
}

TEXT_NORMALIZERS = tuple(_FACTORIES)


@cache  # Whisper's reads a list of 1700 spellings
def _build(name: str) -> Callable[[str], str]:
    return _FACTORIES[name]()


def get_text_normalizer(name: str | Callable[[str], str]) -> Callable[[str], str]:
    r"""The function that brings texts which say the same into the same form.

    | name | what it does |
    |---|---|
    | `"none"` | returns the text unchanged |
    | `"lower"` | lower case, runs of whitespace to one space |
    | `"lower_no_punctuation"` | that, in Unicode's NFC, with a space for punctuation and symbols; any script. Apostrophes inside words stay, as `'`. Good for training labels; spell out `%`, `$` and `&` first, because they go too, and so does the point in `3.5` |
    | `"whisper"` | English: Whisper's, with numbers as digits, American spelling, contractions and titles written out, no fillers, nothing in brackets. Runs of dots are removed and apostrophes made straight first, which Whisper's own does not do |
    | `"whisper_basic"` | Whisper's for other languages: lower case, and a space for every symbol, punctuation and mark, nothing in brackets. Accents of Latin letters survive, but the vowel signs of Indic scripts are marks: with those, words fall apart. Use `"lower_no_punctuation"` there |

    Whisper's rules are those of appendix C of [its paper](https://arxiv.org/abs/2212.04356), in the package
    `whisper-normalizer`. They are for measuring: what they write is not what anybody would want to read.

    Args:
        name: One of `TEXT_NORMALIZERS`, or a function from text to text, which is returned as it is.

    Raises:
        ImportError: The name is one of Whisper's and the package is not installed.
        ValueError: There is no normaliser of that name.
    """
    if callable(name):
        return name
    if name not in TEXT_NORMALIZERS:
        raise ValueError(f"There is no text normalizer {name!r}; there are {', '.join(TEXT_NORMALIZERS)}.")
    return _build(name)


__all__ = ["TEXT_NORMALIZERS", "get_text_normalizer"]
