"""Character error rate."""

import jiwer

from .error_rate import ErrorRate


class CharacterErrorRate(ErrorRate):
    """Substituted, deleted and inserted characters over the characters of the references, `{"cer": ratio}`.

    Characters are Unicode code points; the spaces between words are characters too, as in `evaluate.load("cer")`. The
    ratio is over the corpus. It is the one to use where words are not separated by spaces, as in Chinese, Japanese and
    Thai. Takes the arguments of [`ErrorRate`].
    """

    short_name = "cer"
    unit = "character"
    _description = "Character error rate: edits over the characters of the references, after text normalisation."

    def _align(self, references: list[str], predictions: list[str]) -> jiwer.CharacterOutput:
        return jiwer.process_characters(references, predictions)


__all__ = ["CharacterErrorRate"]
