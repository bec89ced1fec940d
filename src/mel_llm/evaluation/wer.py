"""Word error rate."""

import jiwer

from .error_rate import ErrorRate


class WordErrorRate(ErrorRate):
    """Substituted, deleted and inserted words over the words of the references, `{"wer": ratio}`.

    Words are what whitespace separates. The ratio is over the corpus, as `evaluate.load("wer")` has it, and not the mean
    over the utterances; it exceeds 1 if more is inserted than was said. Takes the arguments of [`ErrorRate`].
    """

    short_name = "wer"
    unit = "word"
    _description = "Word error rate: edits over the words of the references, after text normalisation."

    def _align(self, references: list[str], predictions: list[str]) -> jiwer.WordOutput:
        # jiwer takes a single tab or line break for a part of a word
        return jiwer.process_words(
            *([" ".join(text.split()) for text in texts] for texts in (references, predictions))
        )


__all__ = ["WordErrorRate"]
