"""Examples of audio and transcript to training batches."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..processing_mel_llm import MelLLMProcessor
from .augmentation import SpecAugment


@dataclass
class TranscriptionCollator:
    r"""Batches for `Trainer` and `Seq2SeqTrainer` in Whisper's form: features, and the transcript alone as labels.

    The model puts its default prompt around them, so that nothing of the reference is seen when
    `predict_with_generate` calls `generate` with the same batch. Each transcript ends with the token that ends an
    answer.

    Args:
        processor: Its feature extractor and tokenizer are used.
        audio_column, text_column: Keys of an example; its audio is anything that the processor takes.
        spec_augment ([`SpecAugment`], *optional*): Masks the features of examples that have an `augment_seed`, as those
            that [`SpeechDataset`] makes for training do.
        features_later (`bool`, defaults to `False`): Leave the waveforms in the batch, for [`SpeechTrainer`] to make
            the features on the model's device.
    """

    processor: MelLLMProcessor
    audio_column: str = "audio"
    text_column: str = "text"
    spec_augment: SpecAugment | None = None
    features_later: bool = False

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A list of examples to `input_features` `(batch, frames, num_mel_bins)`, `attention_mask` `(batch, frames)`
        and `labels` `(batch, tokens)`, padded on the right with -100."""
        audio = [example[self.audio_column] for example in examples]
        seeds = [example.get("augment_seed") for example in examples]
        batch = {"raw_speech": audio, "augment_seeds": seeds} if self.features_later else self.features(audio, seeds)
        # The model would add the end itself, but then the Trainer, which averages over tokens, would not count it
        ids = [
            torch.tensor(
                [
                    *self.processor.tokenizer(example[self.text_column], add_special_tokens=False)["input_ids"],
                    self._end,
                ]
            )
            for example in examples
        ]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        return batch

    @functools.cached_property
    def _end(self) -> int:
        return self.processor.response_eos_token_id()

    def features(
        self, audio: list, seeds: list[int | None], device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """Clips to `input_features` and `attention_mask`, on the CPU or on `device`; masked where there is a seed."""
        batch = dict(self.processor(audio=audio, **({} if device is None else {"device": device})))
        if self.spec_augment is not None:
            lengths = batch["attention_mask"].sum(dim=1).tolist()
            for features, length, seed in zip(batch["input_features"], lengths, seeds, strict=True):
                if seed is not None:
                    features[:length] = self.spec_augment(features[:length], seed)
        return batch


__all__ = ["TranscriptionCollator"]
