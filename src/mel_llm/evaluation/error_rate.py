"""What the word and the character error rate share: everything but the unit."""

from collections.abc import Callable
from typing import ClassVar

import evaluate
from datasets import Features, Value

from .base import SpeechMetric
from .normalizers import get_text_normalizer


try:
    import jiwer
except ImportError as error:
    raise ImportError(
        "The error rates need the package jiwer: `pip install evaluate jiwer`, or this package's extra `train`."
    ) from error


_INPUTS = """
Args:
    predictions (`list[str]`): What the model wrote.
    references (`list[str]`): What was said.
    normalizer (`str` or `Callable`, *optional*): Applied to both; by default the one given to the constructor.
    details (`bool`, defaults to `False`): Also return the numbers of substitutions, deletions, insertions and units in
        the references, and under `utterances` the same for each pair with its normalised texts.
"""


class ErrorRate(SpeechMetric):
    """Edits over the units (words, characters) of the references, both summed over the corpus.

    Args:
        normalizer (`str` or `Callable`, defaults to `"whisper"`): See [`get_text_normalizer`]. `"whisper"` is for
            English.
        kwargs: As in [`SpeechMetric`].
    """

    compute_arguments = ("normalizer", "details")

    short_name: ClassVar[str]  # of the result
    unit: ClassVar[str]  # in the names of the details
    _description: ClassVar[str]

    def __init__(self, *, normalizer: str | Callable[[str], str] = "whisper", **kwargs):
        get_text_normalizer(normalizer)  # an unknown one is told here, not after hours of transcription
        self.normalizer = normalizer
        super().__init__(**kwargs)

    def _align(self, references: list[str], predictions: list[str]) -> jiwer.WordOutput | jiwer.CharacterOutput:
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation="",
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
            reference_urls=["https://github.com/jitsi/jiwer"],
        )

    def compute(
        self,
        *,
        predictions=None,
        references=None,
        normalizer: str | Callable[[str], str] | None = None,
        details: bool = False,
        **kwargs,
    ) -> dict | None:
        """The error rate over what is passed here and everything added since the last call.

        A pair whose reference is empty after normalisation adds its insertions and nothing to the length.

        Raises:
            TypeError: A text, or what the normaliser makes of one, is not a string; or an argument that no metric of this package has.
            ValueError: There are no pairs; not as many predictions as references; all references together are empty
                after normalisation, so that there is nothing to divide by; or an unknown normaliser.
        """
        # Looked up before the parent class consumes what was added
        normalize = get_text_normalizer(self.normalizer if normalizer is None else normalizer)
        return super().compute(
            predictions=predictions, references=references, normalizer=normalize, details=details, **kwargs
        )

    def _compute(self, predictions: list[str], references: list[str], normalizer, details: bool) -> dict:
        references, predictions = ([normalizer(text) for text in texts] for texts in (references, predictions))
        for text in references + predictions:
            if not isinstance(text, str):  # jiwer's transformations, for one, return lists of words
                raise TypeError(f"The normalizer must return a string, got {type(text).__name__}.")
        if not any(text.strip() for text in references):
            raise ValueError(
                f"The {self.unit} error rate of {len(references)} pairs is not defined: their references are empty "
                "after normalisation."
            )
        output = self._align(references, predictions)
        length = output.hits + output.substitutions + output.deletions
        edits = output.substitutions + output.deletions + output.insertions
        result = {self.short_name: edits / length}
        if details:
            result.update(
                {
                    "substitutions": output.substitutions,
                    "deletions": output.deletions,
                    "insertions": output.insertions,
                    f"reference_{self.unit}s": length,
                    "utterances": [
                        self._utterance(*pair)
                        for pair in zip(references, predictions, output.references, output.alignments, strict=True)
                    ],
                }
            )
        return result

    def _utterance(self, reference: str, prediction: str, units: list[str], alignment: list) -> dict:
        """The details of one pair; its rate is `None` if the reference is empty."""
        counts = {"substitutions": 0, "deletions": 0, "insertions": 0}
        for chunk in alignment:
            if chunk.type != "equal":
                # One of the two spans is empty, or both are of the same length
                span = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[{"substitute": "substitutions", "delete": "deletions", "insert": "insertions"}[chunk.type]] += (
                    span
                )
        return {
            self.short_name: sum(counts.values()) / len(units) if units else None,
            **counts,
            f"reference_{self.unit}s": len(units),
            "prediction": prediction,
            "reference": reference,
        }


__all__ = ["ErrorRate"]
