"""Examples of audio and transcript to training batches."""

from dataclasses import dataclass

import torch

from ..processing_mel_llm import MelLLMProcessor


@dataclass
class TranscriptionCollator:
    r"""Batches for `Trainer` and `Seq2SeqTrainer` in Whisper's form: features, and the transcript alone as labels.

    The model puts its default prompt around them, so that nothing of the reference is seen when
    `predict_with_generate` calls `generate` with the same batch. Each transcript ends with the token that ends an
    answer.

    Args:
        processor: Its feature extractor and tokenizer are used.
        audio_column, text_column: Keys of an example; its audio is anything that the processor takes.
    """

    processor: MelLLMProcessor
    audio_column: str = "audio"
    text_column: str = "text"

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """A list of examples to `input_features` `(batch, frames, num_mel_bins)`, `attention_mask` `(batch, frames)`
        and `labels` `(batch, tokens)`, padded on the right with -100."""
        batch = self.processor(audio=[example[self.audio_column] for example in examples])
        # The model would add the end itself, but then the Trainer, which averages over tokens, would not count it
        end = self.processor.response_eos_token_id()
        ids = [
            torch.tensor(
                [*self.processor.tokenizer(example[self.text_column], add_special_tokens=False)["input_ids"], end]
            )
            for example in examples
        ]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(
            [row.long() for row in ids], batch_first=True, padding_value=-100
        )
        return dict(batch)


__all__ = ["TranscriptionCollator"]
