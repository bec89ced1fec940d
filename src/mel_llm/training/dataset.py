"""Speech for the Trainer: decoded by soundfile when it is needed, bad clips skipped, reported and counted."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..audio_utils_mel_llm import load_audio
from .augmentation import SpeedPerturbation, example_seed
from .conditions import RecordingConditions
from .sources import SPEAKING_TASKS
from .teacher import SpeechTeacher


logger = logging.get_logger(__name__)

# What a clip that cannot be read raises: no file, no permission, no audio, not what it says. Anything else is a bug.
CLIP_ERRORS = (OSError, ValueError, TypeError, RuntimeError)

_MAX_BAD_IN_A_ROW = 100


def load_clip(audio: dict, sampling_rate: int, offset: float | None, duration: float | None) -> np.ndarray:
    """A whole file; or, where there is an `offset`, the part of it from there on that is `duration` seconds long."""
    if offset is None:
        return load_audio(audio, sampling_rate=sampling_rate)
    return load_audio(audio, sampling_rate=sampling_rate, offset=offset, duration=duration)


def answer_of(row: dict[str, Any], sampling_rate: int) -> dict[str, Any]:
    """What a spoken question's example has beside the question."""
    spoken = row.get("answer_audio")
    return {
        "answer": row["answers"][0],
        "answer_audio": None if spoken is None else load_audio(spoken, sampling_rate=sampling_rate),
    }


def _by_speaker(data) -> dict[str, list[int]]:
    """The clips of each speaker who has several, of those that are to be spoken."""
    names = data["speaker"] if "speaker" in data.column_names else []
    tasks = data["task"] if "task" in data.column_names else [None] * len(names)
    places: dict[str, list[int]] = {}
    for index, (name, task) in enumerate(zip(names, tasks, strict=True)):
        if name is not None and task in (None, "tts"):
            places.setdefault(name, []).append(index)
    return {name: indices for name, indices in places.items() if len(indices) > 1}


class SpeechDataset(torch.utils.data.Dataset):
    r"""Decoded examples of a dataset with the columns of `mel_llm.training.sources`.

    `dataset[index]` is `{"audio": (samples,), "text": str}`, with `task` and `instruction` where the row has one, and for the
    task `qa` `answer` and `answer_audio` (None where nobody spoke it); with `augment_seed` as well when it is asked for with
    an epoch, `dataset[epoch, index]`, as [`SpeechSampler`] does. A clip that cannot be read is reported by name, once, and
    the next one of its task that can takes its place, so that a batch never shrinks and a run never stops because of it.

    Args:
        data: Rows with `audio`, `text` and perhaps `origin`, `speaker` and `task`.
        sampling_rate (`int`, defaults to 16000): Hz to decode to.
        speed, conditions (*optional*): Change the clips that are asked for with an epoch, but for those of the tasks
            that learn voices and sound as they are, all but `asr`: [`SpeedPerturbation`], [`RecordingConditions`].
        seed (`int`, defaults to 0): Of the augmentation.
        voice_pairs (`float`, defaults to 0.0): Share of the clips to be spoken that follow another clip of the same
            speaker, in one example of at most `max_seconds`: so a model learns to go on in a voice that it is given.
        teacher ([`SpeechTeacher`], *optional*): Listens to the clips that are to be read and are asked for with an epoch, before
            they are changed: `teacher_states` `(states, size)` are in the examples then.

    Raises:
        ValueError: There is no data, or there are to be pairs and no speaker has two clips.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        sampling_rate: int = 16000,
        speed: SpeedPerturbation | None = None,
        seed: int = 0,
        conditions: RecordingConditions | None = None,
        voice_pairs: float = 0.0,
        max_seconds: float = 30.0,
        teacher: SpeechTeacher | None = None,
    ):
        if len(data) == 0:
            raise ValueError("`data` is empty: there is nothing to train on or to evaluate.")
        self.voice_pairs, self.max_seconds = voice_pairs, max_seconds
        self.of_speaker = _by_speaker(data) if voice_pairs > 0 else {}
        if voice_pairs > 0 and not self.of_speaker:
            raise ValueError("`voice_pairs`: no speaker has two clips. The data needs a column that says who speaks.")
        self.data = data
        self._tasks = np.asarray(data["task"]) if "task" in getattr(data, "column_names", ()) else None
        self.sampling_rate = sampling_rate
        self.changes = [change for change in (speed, conditions) if change is not None]
        self.seed = seed
        self.teacher = teacher
        # Shared with the workers that decode, so that the process that reports knows what they met
        self._bad = torch.zeros(len(data), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} clips")
        index %= len(self)
        for place in itertools.islice(self._from(index), _MAX_BAD_IN_A_ROW):
            if self._bad[place]:
                continue
            row = self.data[place]
            try:
                return self._example(row, epoch, place)
            except CLIP_ERRORS as error:
                self._bad[place] = 1
                logger.warning(f"Skipped a clip that cannot be read: {row.get('origin') or place}: {error}")
        raise RuntimeError(
            f"{_MAX_BAD_IN_A_ROW} clips in a row, or all, could not be read (the warnings above name them): check the "
            "data before training goes on."
        )

    def _from(self, index: int) -> Iterator[int]:
        """A clip, and behind it all others of its task: a batch is of one."""
        for place in itertools.chain(range(index, len(self)), range(index)):
            if self._tasks is None or self._tasks[place] == self._tasks[index]:
                yield place

    def _example(self, row: dict[str, Any], epoch: int | None, index: int) -> dict[str, Any]:
        audio = load_clip(row["audio"], self.sampling_rate, row.get("offset"), row.get("duration"))
        example = {"audio": audio, "text": row["text"]}
        if row.get("instruction") is not None:
            example["instruction"] = row["instruction"]
        task = row.get("task")
        if task is not None:
            example["task"] = task
        if task == "qa":
            example.update(answer_of(row, self.sampling_rate))
        if epoch is not None:
            example["augment_seed"] = example_seed(self.seed, epoch, index)
            if self.teacher is not None and task in (None, "asr") and "instruction" not in example:
                example["teacher_states"] = self.teacher(audio)
            for change in self.changes if task not in SPEAKING_TASKS else ():
                example["audio"] = change(example["audio"], self.sampling_rate, example["augment_seed"])
            if self.voice_pairs > 0 and task in (None, "tts"):
                example = self._behind_another(example, row, index)
        return example

    def _behind_another(self, example: dict[str, Any], row: dict[str, Any], index: int) -> dict[str, Any]:
        """By chance, another clip of the speaker in front, in sound and text."""
        other = self._partner(row.get("speaker"), index, example["augment_seed"])
        if other is None or self._bad[other]:
            return example
        before = self.data[other]
        try:
            audio = load_clip(before["audio"], self.sampling_rate, before.get("offset"), before.get("duration"))
        except CLIP_ERRORS:
            return example  # it is reported when its own turn comes
        if len(audio) + len(example["audio"]) > self.max_seconds * self.sampling_rate:
            return example
        text = f"{before['text'].strip()} {example['text'].strip()}"
        example.pop("teacher_states", None)  # of this clip alone
        return {**example, "audio": np.concatenate([audio, example["audio"]]), "text": text}

    def _partner(self, speaker: str | None, index: int, augment_seed: int) -> int | None:
        others = self.of_speaker.get(speaker, ())
        random = np.random.default_rng(augment_seed)
        chance, place = random.random(), int(random.integers(max(1, len(others))))
        if chance >= self.voice_pairs or len(others) < 2:
            return None
        return others[place] if others[place] != index else others[(place + 1) % len(others)]

    def partners(self, lengths: Sequence[float], epoch: int) -> dict[int, int]:
        """Which clips have another one in front of them in an epoch, and which; `lengths` are the clips' seconds."""
        if not self.of_speaker:
            return {}
        tasks = self.data["task"] if "task" in self.data.column_names else [None] * len(self)
        pairs = {}
        for index, (speaker, task) in enumerate(zip(self.data["speaker"], tasks, strict=True)):
            if task not in (None, "tts"):
                continue
            other = self._partner(speaker, index, example_seed(self.seed, epoch, index))
            if other is not None and lengths[index] + lengths[other] <= self.max_seconds:
                pairs[index] = other
        return pairs

    def epoch_lengths(self, lengths: Sequence[float], epoch: int) -> Sequence[float]:
        """Seconds of each example in an epoch, of the clips' own: more where another clip goes before it."""
        longer = list(lengths)
        for index, other in self.partners(lengths, epoch).items():
            longer[index] += lengths[other]
        return longer

    @property
    def num_bad_clips(self) -> int:
        """How many clips could not be read so far, in this process and its workers."""
        return int(self._bad.sum())

    def bad_clips(self) -> list[str]:
        """Their names."""
        return [self.data[int(i)].get("origin") or str(int(i)) for i in torch.where(self._bad)[0]]


__all__ = ["CLIP_ERRORS", "SpeechDataset", "answer_of", "load_clip"]
