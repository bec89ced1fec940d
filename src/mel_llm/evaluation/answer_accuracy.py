"""Whether answers about recordings are right: emotion, gender, kind of sound, spoken questions.

Ours: the paper says nothing about such tasks.
"""

import math
import re
from collections.abc import Callable, Sequence
from statistics import NormalDist

import evaluate
from datasets import Features, Value

from .base import SpeechMetric
from .normalizers import get_text_normalizer


# How an answer without choices is compared
MATCHES = ("exact", "contains")
# Between answers any of which is right
SEPARATOR = "|"

_INPUTS = """
Args:
    predictions (`list[str]`): What the model answered.
    references (`list[str]`): What is right; several answers that are have `|` between them.
    choices (`list[str]`, *optional*): What every answer is one of.
    match (`str`, defaults to `"exact"`): Without choices, `"exact"`, or `"contains"`: the right answer's words somewhere.
    normalizer (`str` or `Callable`, *optional*): Applied to all; by default the one given to the constructor.
    details (`bool`, defaults to `False`): Also return `low` and `high` (Wilson's 95 % interval), `exact`, and under
        `answers` what was made of each.
"""


def score_answers(
    predictions: Sequence[str],
    references: Sequence[str],
    choices: Sequence[Sequence[str] | None],
    normalizer: str | Callable[[str], str] = "lower_no_punctuation",
    match: str = "exact",
) -> list[dict]:
    """What is made of each answer.

    Of choices, the one that the answer is, or else the only one whose words are in the answer, was chosen; of choices
    within another, the longer one. Where several are, or none is, none was chosen, and the answer is wrong.

    Args:
        predictions, references: As for [`AnswerAccuracy`].
        choices: Of each, or `None`.
        normalizer (`str` or `Callable`, defaults to `"lower_no_punctuation"`): See [`get_text_normalizer`].
        match (`str`, defaults to `"exact"`): As for [`AnswerAccuracy`].

    Returns:
        A list of `{"correct", "exact", "label", "chosen"}`: whether it is right, and equal to a right answer; the first
        right answer; the choice, or without choices the answer, all normalised.

    Raises:
        ValueError: A reference is empty after normalisation or none of its choices, or an unknown `match`.
    """
    if match not in MATCHES:
        raise ValueError(f"`match` must be one of {', '.join(MATCHES)}, got {match!r}.")
    normalize = get_text_normalizer(normalizer)
    rows = []
    for index, (prediction, reference, offered) in enumerate(zip(predictions, references, choices, strict=True)):
        said = normalize(prediction).strip()
        right = [text for text in (normalize(part).strip() for part in reference.split(SEPARATOR)) if text]
        if not right:
            raise ValueError(f"`references[{index}]` {reference!r} is empty after normalisation.")
        chosen = said
        if offered is not None:
            options = list(dict.fromkeys(normalize(option).strip() for option in offered))
            right = [text for text in right if text in options]
            if not right:
                raise ValueError(f"`references[{index}]` {reference!r} is none of the choices {', '.join(offered)}.")
            chosen = _choice(said, options)
        is_exact = said in right
        is_correct = chosen in right
        if offered is None and match == "contains":
            is_correct = any(_has_words(said, text) for text in right)
        rows.append({"correct": is_correct, "exact": is_exact, "label": right[0], "chosen": chosen})
    return rows


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _choice(said: str, options: Sequence[str]) -> str | None:
    if said in options:
        return said
    found = [option for option in options if option and _has_words(said, option)]
    found = [option for option in found if not any(o != option and _has_words(o, option) for o in found)]
    return found[0] if len(found) == 1 else None


def wilson_interval(hits: int, count: int, level: float = 0.95) -> tuple[float, float] | None:
    """Wilson's score interval (1927) of a share: unlike the bootstrap's, not a point where all or none are right.

    Args:
        hits, count (`int`): How many, of how many.
        level (`float`, defaults to 0.95): Of confidence.

    Returns:
        Both ends; `None` of nothing.
    """
    if not count:
        return None
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


class AnswerAccuracy(SpeechMetric):
    """Right answers over all, `{"accuracy": ratio}`.

    Args:
        normalizer (`str` or `Callable`, defaults to `"lower_no_punctuation"`): See [`get_text_normalizer`].
        kwargs: As in [`SpeechMetric`].
    """

    compute_arguments = ("normalizer", "details", "choices", "match")

    def __init__(self, *, normalizer: str | Callable[[str], str] = "lower_no_punctuation", **kwargs):
        get_text_normalizer(normalizer)
        self.normalizer = normalizer
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of answers: right ones over all, after text normalisation.",
            citation="",
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        normalizer: str | Callable[[str], str] | None = None,
        details: bool = False,
        choices: Sequence[str] | None = None,
        match: str = "exact",
    ) -> dict:
        rules = self.normalizer if normalizer is None else normalizer
        answers = score_answers(predictions, references, [choices] * len(predictions), rules, match)
        hits = sum(answer["correct"] for answer in answers)
        result: dict = {"accuracy": hits / len(answers)}
        if details:
            result["low"], result["high"] = wilson_interval(hits, len(answers))
            result["exact"] = sum(answer["exact"] for answer in answers) / len(answers)
            result["answers"] = answers
        return result


__all__ = ["MATCHES", "AnswerAccuracy", "score_answers", "wilson_interval"]
