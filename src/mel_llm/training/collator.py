"""Examples of audio and transcript to training batches, for reading and for speaking."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..processing_mel_llm import MelLLMProcessor
from ..spelling import ctc_bytes
from .augmentation import SpecAugment
from .conditions import VoiceWarp
from .teacher import fit_states


def _letters(texts: list[str]) -> torch.Tensor:
    """What CTC spells of the texts, `(batch, letters)`, padded with -100."""
    letters = [torch.tensor(ctc_bytes(text), dtype=torch.long) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(letters, batch_first=True, padding_value=-100)


@dataclass
class TranscriptionCollator:
    r"""Batches for `Trainer` and `Seq2SeqTrainer` in Whisper's form: features, and the transcript alone as labels.

    The model puts its default prompt around them, so that nothing of the reference is seen when
    `predict_with_generate` calls `generate` with the same batch. Each transcript ends with the token that ends an
    answer.

    Examples may also ask something else about their audio (emotion, gender, what is heard, what is meant: ours). A batch
    with such examples is in the form of a chat, as `apply_chat_template(..., output_labels=True)` makes it, the text being
    the answer; examples without a question are asked for the transcript there, in the very tokens of the default prompt.

    Args:
        processor: Its feature extractor and tokenizer are used.
        audio_column, text_column: Keys of an example; its audio is anything that the processor takes.
        instruction_column: Key of what is asked about the audio; missing or `None` for the transcript.
        spec_augment ([`SpecAugment`], *optional*): Masks the features of examples that have an `augment_seed`, as those
            that [`SpeechDataset`] makes for training do.
        voice_warp ([`VoiceWarp`], *optional*): Changes the voices in them, before that.
        teacher_rate (`int`, *optional*): States of a teacher for each audio token. `teacher_states` `(batch, audio tokens,
            teacher_rate * size)` are made of the examples' own, where all of a batch have some, for a model with an alignment
            head; not in chats.
        features_later (`bool`, defaults to `False`): Leave the waveforms in the batch, for [`SpeechTrainer`] to make
            the features on the model's device.
        spell (`bool`, defaults to `False`): Add `transcript_bytes` `(batch, letters)` for a model with a CTC head.
    """

    processor: MelLLMProcessor
    audio_column: str = "audio"
    text_column: str = "text"
    spec_augment: SpecAugment | None = None
    features_later: bool = False
    spell: bool = False
    voice_warp: VoiceWarp | None = None
    instruction_column: str = "instruction"
    teacher_rate: int | None = None

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A list of examples to `input_features` `(batch, frames, num_mel_bins)`, `attention_mask` `(batch, frames)`
        and `labels` `(batch, tokens)`, padded on the right with -100; of a batch with questions to `input_ids`,
        `attention_mask` and `labels` `(batch, tokens)`, `input_features` and `input_features_mask` `(batch, frames)`."""
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
        batch = {
            "raw_speech": [example[self.audio_column] for example in examples],
            "augment_seeds": [example.get("augment_seed") for example in examples],
            "labels": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100),
        }
        instructions = [example.get(self.instruction_column) for example in examples]
        if any(instruction is not None for instruction in instructions):
            batch["instructions"] = instructions
            batch["answers"] = [example[self.text_column] for example in examples]
        elif self.spell:
            batch["transcript_bytes"] = _letters([example[self.text_column] for example in examples])
        if self.teacher_rate and "instructions" not in batch:
            states = [example.get("teacher_states") for example in examples]
            if all(state is not None for state in states):
                batch["teacher_states"] = states
        return batch if self.features_later else self.finish(batch)

    @functools.cached_property
    def _end(self) -> int:
        return self.processor.response_eos_token_id()

    def finish(self, batch: dict[str, Any], device: torch.device | str | None = None) -> dict[str, Any]:
        """Makes features of a batch's waveforms, on the CPU or on `device`; masked where there is a seed."""
        batch = dict(batch)
        audio, seeds = batch.pop("raw_speech"), batch.pop("augment_seeds")
        options = {} if device is None else {"device": device}
        if "instructions" in batch:
            features = self._chats(audio, batch.pop("instructions"), batch.pop("answers"), options)
            batch.pop("labels")  # counted by the Trainer; those of the chat are the same ones in their places
        else:
            features = dict(self.processor(audio=audio, **options))
        changes = [change for change in (self.voice_warp, self.spec_augment) if change is not None]
        if changes:
            frames = features.get("input_features_mask", features["attention_mask"])
            lengths = frames.sum(dim=1).tolist()
            for row, length, seed in zip(features["input_features"], lengths, seeds, strict=True):
                for change in changes if seed is not None else ():
                    row[:length] = change(row[:length], seed)
        if "teacher_states" in batch:
            lengths = features["attention_mask"].sum(dim=1).tolist()
            counts = [-(-length // self.processor.reduction_factor) for length in lengths]
            states = zip(batch["teacher_states"], counts, strict=True)
            batch["teacher_states"] = torch.nn.utils.rnn.pad_sequence(
                [fit_states(state, count, self.teacher_rate) for state, count in states], batch_first=True
            )
        return {**batch, **features}

    def _chats(self, audio: list, instructions: list[str | None], answers: list[str], options: dict) -> dict[str, Any]:
        conversations = []
        for clip, instruction, answer in zip(audio, instructions, answers, strict=True):
            asked = self.processor.transcription_instruction if instruction is None else instruction
            content = [{"type": "audio", "audio": clip}, *([{"type": "text", "text": asked}] if asked else [])]
            conversations.append([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])
        return dict(self.processor.apply_chat_template(conversations, output_labels=True, processor_kwargs=options))


@dataclass
class SynthesisCollator:
    r"""Batches for `Trainer` that teach [`MelLLMForTextToSpeech`] to speak: the text, and its spectrogram as labels.

    Args:
        processor: Its feature extractor and tokenizer are used.
        audio_column, text_column: Keys of an example; its audio is anything that the processor takes.
        features_later (`bool`, defaults to `False`): Leave the waveforms in the batch, for [`SpeechTrainer`] to make
            the features on the model's device.
        spell (`bool`, defaults to `False`): Add `transcript_bytes` `(batch, letters)` for a speech head with a CTC term.
    """

    processor: MelLLMProcessor
    audio_column: str = "audio"
    text_column: str = "text"
    features_later: bool = False
    spell: bool = False

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A list of examples to `input_ids` and `attention_mask` `(batch, tokens)`, and `labels` `(batch, frames,
        num_mel_bins)`, padded on the right with -100."""
        # Not as a request, which refuses texts without words: one strange clip must not end a run
        texts = [example[self.text_column] for example in examples]
        batch = self.processor.speech_tokens(texts)
        if self.spell:
            batch["transcript_bytes"] = _letters(texts)
        batch["raw_speech"] = [example[self.audio_column] for example in examples]
        return batch if self.features_later else self.finish(batch)

    def finish(self, batch: dict[str, Any], device: torch.device | str | None = None) -> dict[str, Any]:
        """Makes spectrograms of a batch's waveforms, on the CPU or on `device`."""
        batch = dict(batch)
        options = {} if device is None else {"device": device}
        features = self.processor(audio=batch.pop("raw_speech"), **options)
        padding = features["attention_mask"] == 0
        return {**batch, "labels": features["input_features"].masked_fill(padding[..., None], -100.0)}


@dataclass
class TaskCollator:
    r"""The collator of each task, for examples that say which one they are for, all of a batch the same.

    Args:
        collators (`dict`): By the `task` of an example: `"asr"`, `"tts"`, `"continuation"` or `"qa"`.
    """

    collators: dict[str, Callable[[list[dict]], dict[str, Any]]]

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A batch as the task's collator makes it.

        Raises:
            ValueError: The examples are for several tasks: [`SpeechSampler`] takes `kinds` to keep them apart.
        """
        tasks = {example["task"] for example in examples}
        if len(tasks) != 1:
            raise ValueError(f"A batch must be of one task, got {sorted(tasks)}. Pass `kinds` to SpeechSampler.")
        task = tasks.pop()
        batch = self.collators[task](examples)
        return {"task": task, **batch} if "raw_speech" in batch else batch

    def finish(self, batch: dict[str, Any], device: torch.device | str | None = None) -> dict[str, Any]:
        """Makes features of a batch's waveforms, on the CPU or on `device`."""
        batch = dict(batch)
        return self.collators[batch.pop("task")].finish(batch, device)


__all__ = ["SynthesisCollator", "TaskCollator", "TranscriptionCollator"]
