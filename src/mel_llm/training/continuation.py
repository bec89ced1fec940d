"""Examples for SPECTRON (arXiv 2305.15255): speech cut into a prompt and its continuation, and spoken questions with
their answers.

No alignment is needed: the text to learn is the whole transcript, of the prompt and of what follows (as the
paper's reviewers quote it). Where a clip is cut is the paper's 3 s by default; ranges, fractions, and dropping the text are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..processing_mel_llm import MelLLMProcessor
from .report import DataReport, clip_duration, describe


# Apart from the seeds of augmentation, so that where a clip is cut says nothing of whether its text is dropped
_CUT, _DROP = 1, 2


@dataclass
class PromptCut:
    r"""Where a clip ends to be a prompt and begins to be its continuation.

    Args:
        seconds (`Sequence[float]`, defaults to `(3.0,)`): Length of the prompt, or the least and the most, between which
            one is drawn for every clip and epoch.
        fraction (`Sequence[float]`, *optional*): The same as a share of each clip, in the place of `seconds`.
        min_continuation_seconds (`float`, defaults to 0.5): What must at least remain. Clips without room for the
            shortest prompt and this are of no use.

    Raises:
        ValueError: A number is out of range.
    """

    seconds: Sequence[float] = (3.0,)
    fraction: Sequence[float] | None = None
    min_continuation_seconds: float = 0.5

    def __post_init__(self):
        for name, values, limit in (("seconds", self.seconds, math.inf), ("fraction", self.fraction, 1.0)):
            if values is None:
                continue
            if len(values) not in (1, 2) or list(values) != sorted(values) or not all(0 < v < limit for v in values):
                raise ValueError(
                    f"prompt_{name} must be one number above 0{' and below 1' if limit == 1 else ''}, or the least and the "
                    f"most, got {list(values)}."
                )
        if not 0 < self.min_continuation_seconds < math.inf:
            raise ValueError(f"min_continuation_seconds must be above 0, got {self.min_continuation_seconds}.")

    @property
    def min_clip_seconds(self) -> float:
        """The shortest clip that is of use."""
        if self.fraction is None:
            return self.seconds[0] + self.min_continuation_seconds
        return self.min_continuation_seconds / (1 - self.fraction[0])

    def range_of(self, clip_seconds: float) -> tuple[float, float] | None:
        """The shortest and the longest prompt of a clip, in seconds; `None` if the clip is too short for any."""
        if self.fraction is None:
            low, high = self.seconds[0], self.seconds[-1]
        else:
            low, high = self.fraction[0] * clip_seconds, self.fraction[-1] * clip_seconds
        longest = clip_seconds - self.min_continuation_seconds
        return (low, min(high, longest)) if low <= longest + 1e-6 else None

    def place(self, num_samples: int, sampling_rate: int, seed: int | None = None) -> int | None:
        """How many samples of a clip are its prompt; `None` if it is too short. Without a `seed`, the middle of the
        range."""
        limits = self.range_of(num_samples / sampling_rate)
        if limits is None:
            return None
        share = 0.5 if seed is None else np.random.default_rng([seed, _CUT]).random()
        return round((limits[0] + share * (limits[1] - limits[0])) * sampling_rate)

    def __str__(self) -> str:
        if self.fraction is None:
            return f"{' to '.join(f'{value:g}' for value in self.seconds)} s"
        return f"{' to '.join(f'{value:g}' for value in self.fraction)} of each clip"


def select_continuations(data, seconds: list[float], report: DataReport, cut: PromptCut):
    """Leaves out the clips that have no room for a prompt and a continuation.

    Args:
        data, seconds, report: As [`select_clips`] returned them.
        cut: Where clips are cut.

    Returns:
        The same three, of what is left; the report says how many clips went.
    """
    kept = [index for index, length in enumerate(seconds) if cut.range_of(length) is not None]
    reason = f"too short for a prompt of {cut} and {cut.min_continuation_seconds:g} s behind it"
    return _keep(data, seconds, report, kept, {reason: len(seconds) - len(kept)})


def select_answered(data, seconds: list[float], report: DataReport, max_seconds: float = math.inf):
    """Leaves out the spoken questions without an answer, and those whose answer cannot be read or is too long.

    Args:
        data, seconds, report: As [`select_clips`] returned them; `data` has the columns of spoken questions.
        max_seconds (`float`): Longer answers are left out.

    Returns:
        The same three of what is left, the seconds being those of question and answer together.
    """
    kept, lengths, left_out = [], list(seconds), {}
    for index, row in enumerate(data):
        reason = None
        if not row["answers"]:
            reason = "without an answer"
        elif row["answer_audio"] is not None:
            try:
                answer = clip_duration({"audio": row["answer_audio"]})
                lengths[index] += answer
                reason = f"with an answer longer than {max_seconds:g} s" if answer > max_seconds else None
            except (OSError, ValueError) as error:
                reason = "whose answer is missing or not audio"
                report.unreadable.append(f"{row['origin']}: answer: {error}")
        if reason is None:
            kept.append(index)
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    return _keep(data, lengths, report, kept, left_out)


def _keep(data, seconds: list[float], report: DataReport, kept: list[int], left_out: dict[str, int]):
    left_out = {reason: count for reason, count in left_out.items() if count}
    if len(kept) < len(seconds):
        data, seconds = data.select(kept), [seconds[index] for index in kept]
    new = describe(seconds, [0] * len(seconds))
    new.tokens, new.tokens_per_second = report.tokens, report.tokens_per_second
    new.left_out, new.unreadable = {**report.left_out, **left_out}, report.unreadable
    return data, seconds, new


@dataclass
class ContinuationCollator:
    r"""Batches for `Trainer` that teach [`MelLLMForSpeechContinuation`] to write down a prompt and what follows it, and
    then to speak what follows.

    Args:
        processor: Its feature extractor and tokenizer are used.
        cut ([`PromptCut`]): Where each clip is cut. One that is too short for it all the same is cut in the middle, so that
            one strange clip does not end a run: [`select_continuations`] leaves such clips out beforehand.
        skip_text_probability (`float`, defaults to 0.0): Share of the examples in training that are without the text: the
            model then learns to go on without it, too (ours). With 1 there is none in evaluation either.
        audio_column, text_column: Keys of an example; its audio is a waveform `(samples,)` at the processor's rate.
        features_later (`bool`, defaults to `False`): Leave the waveforms in the batch, for [`SpeechTrainer`] to make
            the features on the model's device.

    Raises:
        ValueError: `skip_text_probability` is out of range.
    """

    processor: MelLLMProcessor
    cut: PromptCut = field(default_factory=PromptCut)
    skip_text_probability: float = 0.0
    audio_column: str = "audio"
    text_column: str = "text"
    features_later: bool = False

    def __post_init__(self):
        _check_share(self.skip_text_probability)

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """A list of examples to `input_features` `(batch, frames, num_mel_bins)` and `input_features_mask` `(batch,
        frames)` of the prompts, `labels` `(batch, tokens)`, the transcripts, padded on the right with -100 (a row of
        nothing else where the text is dropped), and `spectrogram_labels` `(batch, frames, num_mel_bins)`, the
        continuations, padded in the same way."""
        rate = self.processor.feature_extractor.sampling_rate
        prompts, continuations = [], []
        for example in examples:
            audio = np.asarray(example[self.audio_column], dtype=np.float32)
            place = self.cut.place(len(audio), rate, example.get("augment_seed"))
            place = len(audio) // 2 if place is None else place
            prompts.append(audio[:place])
            continuations.append(audio[place:])
        texts = [self.processor.continuation_text_ids(example[self.text_column]) for example in examples]
        batch = {
            "labels": _labels(texts, examples, self.skip_text_probability),
            "raw_speech": prompts,
            "raw_continuations": continuations,
        }
        return batch if self.features_later else self.finish(batch)

    def finish(self, batch: dict[str, Any], device: torch.device | str | None = None) -> dict[str, Any]:
        """Makes features of a batch's waveforms, on the CPU or on `device`."""
        return _finish(self.processor, batch, device)


@dataclass
class QACollator:
    r"""Batches for `Trainer` that teach [`MelLLMForSpeechContinuation`] to answer spoken questions: it hears the question,
    writes it down with the answer, and speaks the answer.

    Args:
        processor: Its feature extractor and tokenizer are used, and what it writes between question and answer.
        skip_text_probability (`float`, defaults to 0.0): As for [`ContinuationCollator`]. Examples whose answer nobody
            spoke keep their text: there is nothing else to learn from them.
        audio_column, text_column, answer_audio_column, answer_column: Keys of an example: the question, and the answer,
            whose audio may be None.
        features_later (`bool`, defaults to `False`): As for [`ContinuationCollator`].

    Raises:
        ValueError: `skip_text_probability` is out of range.
    """

    processor: MelLLMProcessor
    skip_text_probability: float = 0.0
    audio_column: str = "audio"
    text_column: str = "text"
    answer_audio_column: str = "answer_audio"
    answer_column: str = "answer"
    features_later: bool = False

    def __post_init__(self):
        _check_share(self.skip_text_probability)

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        """As [`ContinuationCollator`], with `task`, which asks for the prompt of a question; rows of `spectrogram_labels`
        without an answer's audio are -100 throughout."""
        texts = [
            self.processor.continuation_text_ids(example[self.text_column], example[self.answer_column])
            for example in examples
        ]
        spoken = [example[self.answer_audio_column] for example in examples]
        unspoken = [index for index, audio in enumerate(spoken) if audio is None]
        batch = {
            "labels": _labels(texts, examples, self.skip_text_probability, unspoken),
            "raw_speech": [np.asarray(example[self.audio_column], dtype=np.float32) for example in examples],
            "raw_continuations": spoken,
        }
        return batch if self.features_later else self.finish(batch)

    def finish(self, batch: dict[str, Any], device: torch.device | str | None = None) -> dict[str, Any]:
        """Makes features of a batch's waveforms, on the CPU or on `device`."""
        return {"task": "qa", **_finish(self.processor, batch, device)}


def _check_share(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"skip_text_probability must be a share from 0 to 1, got {value}.")


def _labels(texts: list[list[int]], examples: list[dict], skip_probability: float, kept=()) -> torch.Tensor:
    """Token ids `(batch, tokens)`, padded on the right with -100; nothing of a text that is dropped, which those of the
    rows `kept` are not. The model adds the end."""
    rows = []
    for index, (ids, example) in enumerate(zip(texts, examples, strict=True)):
        seed = example.get("augment_seed")
        chance = 1.0 if seed is None else np.random.default_rng([seed, _DROP]).random()
        # A model that learns no text at all is evaluated without, too
        dropped = index not in kept and (skip_probability == 1 or chance < skip_probability)
        rows.append(torch.tensor([-100] if dropped else ids, dtype=torch.long))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def _finish(processor: MelLLMProcessor, batch: dict[str, Any], device: torch.device | str | None) -> dict[str, Any]:
    batch = dict(batch)
    options = {} if device is None else {"device": device}
    prompts = processor(audio=batch.pop("raw_speech"), **options)
    spoken = batch.pop("raw_continuations")
    heard = [audio for audio in spoken if audio is not None]
    target = prompts["input_features"].new_full((len(spoken), 1, prompts["input_features"].shape[-1]), -100.0)
    if heard:
        features = processor(audio=heard, **options)
        padding = features["attention_mask"] == 0
        target = target.repeat(1, padding.shape[1], 1)
        rows = [index for index, audio in enumerate(spoken) if audio is not None]
        target[rows] = features["input_features"].masked_fill(padding[..., None], -100.0)
    return {
        **batch,
        "input_features": prompts["input_features"],
        "input_features_mask": prompts["attention_mask"],
        "spectrogram_labels": target,
    }


__all__ = ["ContinuationCollator", "PromptCut", "QACollator", "select_answered", "select_continuations"]
