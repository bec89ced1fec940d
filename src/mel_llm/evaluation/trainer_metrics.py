"""Error rates for `Seq2SeqTrainer`."""

import math
from collections.abc import Callable

import numpy as np
from transformers import EvalPrediction

from ..processing_mel_llm import MelLLMProcessor
from .cer import CharacterErrorRate
from .normalizers import get_text_normalizer
from .wer import WordErrorRate


def make_compute_metrics(
    processor: MelLLMProcessor, normalizer: str | Callable[[str], str] = "whisper"
) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`: `{"wer": ratio, "cer": ratio}`.

    Args:
        processor: Its tokenizer decodes predictions and labels, without special tokens.
        normalizer (`str` or `Callable`, defaults to `"whisper"`): See [`get_text_normalizer`].

    Raises:
        ValueError: The normaliser is unknown; when called, the predictions are logits, or the labels are missing.
    """
    tokenizer = processor.tokenizer
    normalize = get_text_normalizer(normalizer)
    metrics = [WordErrorRate(normalizer=normalizer), CharacterErrorRate(normalizer=normalizer)]

    def decode(ids: np.ndarray) -> list[str]:
        # The Trainer pads with -100, which no tokenizer can decode. Left out and not replaced by the padding token, so
        # that a tokenizer without one will do.
        rows = [row[row != -100].tolist() for row in np.asarray(ids)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        ids = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if np.ndim(ids) != 2 or not np.issubdtype(np.asarray(ids).dtype, np.integer):
            raise ValueError(
                "The predictions are not token ids `(examples, tokens)`: error rates need `Seq2SeqTrainer` and "
                "`Seq2SeqTrainingArguments(predict_with_generate=True)`."
            )
        if prediction.label_ids is None:
            raise ValueError("There are no labels to compare the predictions with.")
        texts = {"predictions": decode(ids), "references": decode(prediction.label_ids)}
        if not any(normalize(text).strip() for text in texts["references"]):
            # Not an error: a run must not end here because its evaluation set holds nothing but fillers
            return {"wer": math.nan, "cer": math.nan}
        return {name: value for metric in metrics for name, value in metric.compute(**texts).items()}

    return compute_metrics


__all__ = ["make_compute_metrics"]
