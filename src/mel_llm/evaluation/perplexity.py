"""How likely a text is to a language model: the semantic quality of transcribed continuations."""

from collections.abc import Sequence
from typing import Any

import evaluate
import torch
from datasets import Features, Value

from .base import SpeechMetric
from .plugins import describe_folder


_INPUTS = """
Args:
    predictions (`list[str]`): The texts.
    details (`bool`, defaults to `False`): Also return, under `utterances`, for each text its negative log-likelihood and
        its number of tokens.
"""


class LogPerplexity(SpeechMetric):
    """The negative log-likelihood of texts (natural logarithm) under any causal language model.

    SPECTRON (arXiv 2305.15255) transcribes continuations and reports their log-perplexity, from memory under GPT-2 and with
    values above 100, which no document at hand confirms. How it sums them up is not known to us. So there are two results:

    * `nll_per_token`: of all texts together, over all their tokens; `exp` of it is the usual perplexity.
    * `nll_per_utterance`: the mean over texts of what a whole text has. It grows with the length, and is of the size of
      those numbers; that it is theirs is our guess.

    Texts are taken as they are, each for itself, behind the model's token for the beginning (GPT-2: `<|endoftext|>`). For a
    tokenizer without one, the first token of a text is not scored. A text without tokens counts 0 in the second result.

    Args:
        model (`str` or `tuple`): Folder or Hub name of a causal language model, or the model and its tokenizer.
        device (`str`, *optional*): A GPU if there is one.
        batch_size (`int`, defaults to 8): Texts at a time.
        kwargs: As in [`SpeechMetric`].

    Raises:
        OSError, ValueError: The model cannot be loaded.
    """

    compute_arguments = ("details",)

    def __init__(self, *, model: str | tuple[Any, Any], device: str | None = None, batch_size: int = 8, **kwargs):
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.model = AutoModelForCausalLM.from_pretrained(model)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model_description = describe_folder(model)
        else:
            self.model, self.tokenizer = model
            self.model_description = type(self.model).__name__
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.model.eval().to(device)
        self.batch_size = batch_size
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Negative log-likelihood of texts under a causal language model, per token and per text.",
            citation="",
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("string")}),
        )

    def _compute(self, predictions: list[str], details: bool = False) -> dict:
        scored = self.score(predictions)
        tokens = sum(count for _, count in scored)
        total = sum(value for value, _ in scored)
        result: dict = {
            "nll_per_token": total / tokens if tokens else None,
            "nll_per_utterance": total / len(scored),
        }
        if details:
            result["utterances"] = [{"nll": value, "tokens": count} for value, count in scored]
        return result

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """The negative log-likelihood of each text, and how many of its tokens were scored.

        A text longer than the model's context is scored in windows, each with half a window before it.
        """
        begin = self.tokenizer.bos_token_id
        rows = []
        for text in texts:
            ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"] if text.strip() else []
            rows.append(ids if begin is None or not ids else [begin, *ids])
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        results: dict[int, tuple[float, int]] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, value in zip(batch, self._score_batch([rows[index] for index in batch]), strict=True):
                results[index] = (value, max(0, len(rows[index]) - 1))
        return [results[index] for index in range(len(rows))]

    def _score_batch(self, rows: list[list[int]]) -> list[float]:
        longest = max(len(row) for row in rows)
        if longest < 2:
            return [0.0] * len(rows)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            return [self._score_windows(row, limit) if len(row) > 1 else 0.0 for row in rows]
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[place, : len(row)] = 1
        return (self._losses(ids, mask) * mask[:, 1:].cpu()).sum(-1).tolist()

    def _score_windows(self, row: list[int], limit: int) -> float:
        total, scored = 0.0, 1
        while scored < len(row):
            end = min(len(row), scored + (limit // 2 if scored > 1 else limit - 1))
            start = max(0, end - limit)
            ids = torch.tensor([row[start:end]])
            total += float(self._losses(ids, torch.ones_like(ids))[0, scored - start - 1 :].sum())
            scored = end
        return total

    def _losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1].float()
        return -logits.log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0].cpu().double()


__all__ = ["LogPerplexity"]
