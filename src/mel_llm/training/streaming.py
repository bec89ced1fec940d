"""Streams of speech: shuffled, divided among processes and workers, and gone on with exactly where a run was stopped.

`datasets` remembers where it is in a stream, but not what lies in its shuffle buffer: resumed, it loses that. So the buffer
is ours. It shuffles one stretch of rows after another; where a run is, is then told by the place at which the stretch
began and by how many of its rows were given out. The rows are read again, the clips are not decoded again.

A stream has no end here: after its last row it begins anew, in another order and with other augmentation.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..whole_files import write_whole
from .augmentation import SpeedPerturbation, example_seed
from .conditions import RecordingConditions
from .dataset import CLIP_ERRORS, answer_of, load_clip
from .sources import SPEAKING_TASKS
from .token_budget import TokenCounter, batch_tokens


logger = logging.get_logger(__name__)

STATE_KEY = "stream_state"  # in a batch


class SpeechStream(torch.utils.data.IterableDataset):
    r"""Batches of decoded examples from a `datasets.IterableDataset`, without end; for [`SpeechTrainer`].

    Each item is a batch: a list of examples as [`SpeechDataset`] makes them, and where the stream is after it. Clips that
    cannot be read are named in a warning and left out, and so are those outside of the limits in seconds.

    Args:
        stream: With the columns of `mel_llm.training.sources`.
        batch_size (`int`, defaults to 1): Clips of a batch.
        sampling_rate (`int`, defaults to 16000): Hz to decode to.
        speed, conditions (*optional*): Change the clips, in every pass in another way.
        seed (`int`, defaults to 0): Of the order and of the augmentation.
        min_seconds, max_seconds (`float`): Clips outside are left out.
        buffer_size (`int`, defaults to 1000): Rows (not yet decoded) that are shuffled at a time; 0 keeps the order.
        rank (`int`, defaults to 0), world_size (`int`, defaults to 1): Which of how many processes this is. Each gets
            shards of its own where their number is a multiple of the processes', else every so manieth row.
        max_tokens (`int`, *optional*): A budget for each batch in place of `batch_size`; clips come in their order, and
            one beyond the budget is left out. Needs `counter`.
        counter ([`TokenCounter`], *optional*): Counts the tokens.
        task (`str`, defaults to `"asr"`): What the clips are for, one of `TASKS`. `qa` needs answers, and gives them; the limits are the questions'.
        settings (`dict`, *optional*): What else must be the same for a run to go on with its place in the stream.

    Attributes:
        counts (`torch.Tensor`): `(unreadable, outside of the limits)`, shared with the workers.

    Raises:
        ValueError: `max_tokens` cannot hold a clip of `max_seconds`, or has no `counter`.
    """

    def __init__(
        self,
        stream,
        batch_size: int = 1,
        sampling_rate: int = 16000,
        speed: SpeedPerturbation | None = None,
        seed: int = 0,
        min_seconds: float = 0.0,
        max_seconds: float = float("inf"),
        buffer_size: int = 1000,
        conditions: RecordingConditions | None = None,
        rank: int = 0,
        world_size: int = 1,
        max_tokens: int | None = None,
        counter: TokenCounter | None = None,
        task: str = "asr",
        settings: dict[str, Any] | None = None,
    ):
        self.stream, self.batch_size, self.sampling_rate, self.seed = stream, batch_size, sampling_rate, seed
        self.changes = [change for change in (speed, conditions) if change is not None]
        self.min_seconds, self.max_seconds, self.buffer_size = min_seconds, max_seconds, buffer_size
        self.rank, self.world_size = rank, world_size
        self.max_tokens, self.counter, self.task = max_tokens, counter, task
        if max_tokens is not None:
            if counter is None:
                raise ValueError("SpeechStream: `max_tokens` needs a `counter`.")
            if task not in counter.prompts:
                raise ValueError(f"SpeechStream: `max_tokens` is for {', '.join(counter.prompts)}, not for {task!r}.")
            if np.isfinite(max_seconds):
                needed = int(counter.audio([max_seconds], task)[0]) + counter.prompts[task]
                if needed > max_tokens:
                    raise ValueError(
                        f"`max_batch_tokens` is {max_tokens}, but a clip of {max_seconds:g} s takes {needed} tokens and its "
                        "transcript more. Raise it, or lower `max_seconds`."
                    )
        self.settings = dict(settings or {})
        self.counts = torch.zeros(2, dtype=torch.long).share_memory_()
        self.states: dict[int, dict] = {}  # by worker, after the last batch of each that was trained on
        self.batches = 0  # trained on
        self._skipped = 0
        self.is_finished = False

    # --- workers ----------------------------------------------------------------------------------------------------

    def max_workers(self) -> int:
        """The most processes that can decode for this one: a worker needs a shard of its own."""
        shards = self.stream.n_shards
        return shards // self.world_size if shards % self.world_size == 0 else shards

    # --- reading ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[list[dict], dict] | None]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        # In the place of what was trained on before the run was stopped, which the Trainer skips: the workers take turns
        yield from (None for _ in range(worker, self._skipped, num_workers))
        if self.is_finished:
            return
        batch: list[dict] = []
        sizes: list[tuple[int, int]] = []
        after: dict = {}
        for example, size, place in self._examples(self.states.get(worker)):
            if self.max_tokens is not None:
                if batch and batch_tokens(*zip(*sizes, size, strict=True), packed=self._packed) > self.max_tokens:
                    yield batch, {"worker": worker, **after}
                    batch, sizes = [], []
                sizes.append(size)
            batch.append(example)
            after = place
            if self.max_tokens is None and len(batch) == self.batch_size:
                yield batch, {"worker": worker, **after}
                batch = []

    @property
    def _packed(self) -> bool:
        return self.task in self.counter.packed

    def _size(self, example: dict) -> tuple[int, int]:
        """Audio and text tokens."""
        counter = self.counter
        samples = len(example["audio"])  # as augmented, so no more is to be added for the slowest speed
        audio = counter.audio_config.num_audio_tokens(counter.extractor.num_frames(samples))
        return audio, int(counter.text([example["text"]], self.task, [example.get("instruction")])[0])

    def take(self, count: int) -> list[dict]:
        """The first `count` examples of all processes' stream, not augmented; fewer where there are not so many."""
        from itertools import islice

        rows = self._rows(None, rank=0, world_size=1, passes=1)
        examples = (self._example(row, None) for row, _ in rows)
        return list(islice((example for example in examples if example is not None), count))

    def _examples(self, state: dict | None) -> Iterator[tuple[dict, tuple[int, int] | None, dict]]:
        """Examples, their tokens where there is a budget, and the state of the stream after each."""
        num_pass, given = None, True
        for row, place in self._rows(state, self.rank, self.world_size):
            if place["pass"] != num_pass:
                if not given:
                    raise RuntimeError(
                        f"The stream gave process {self.rank} no clip that can be used in a whole pass: "
                        f"{int(self.counts[0])} could not be read (the warnings above name them), {int(self.counts[1])} "
                        "were without a transcript or outside of the limits. Check the data, --min_seconds and "
                        "--max_seconds."
                    )
                num_pass, given = place["pass"], False
            example = self._example(row, num_pass)
            if example is None:
                continue
            size = None if self.max_tokens is None else self._size(example)
            if size is not None and sum(size) > self.max_tokens:
                self.counts[1] += 1
                logger.warning(f"Skipped a clip that needs more than --max_batch_tokens by itself: {row['origin']}")
                continue
            given = True
            yield example, size, place

    def _example(self, row: dict[str, Any], num_pass: int | None) -> dict[str, Any] | None:
        """A decoded example, augmented if there is a pass; or None, which is counted."""
        text, origin = row["text"], row["origin"]
        if not text or (self.task == "qa" and not row.get("answers")):
            self.counts[1] += 1
            return None
        try:
            waveform = load_clip(row["audio"], self.sampling_rate, row["offset"], row["duration"])
            answer = answer_of(row, self.sampling_rate) if self.task == "qa" else {}
        except CLIP_ERRORS as error:
            self.counts[0] += 1
            logger.warning(f"Skipped a clip that cannot be read: {origin}: {error}")
            return None
        if not self.min_seconds * self.sampling_rate <= len(waveform) <= self.max_seconds * self.sampling_rate:
            self.counts[1] += 1
            return None
        example = {"audio": waveform, "text": text, **answer}
        if row["instruction"] is not None:
            example["instruction"] = row["instruction"]
        if num_pass is not None:
            # By content: the place in a stream depends on the worker that reads it
            example["augment_seed"] = example_seed(self.seed, num_pass, zlib.crc32(f"{origin}\0{text}".encode()))
            for change in self.changes if self.task not in SPEAKING_TASKS else ():
                waveform = change(waveform, self.sampling_rate, example["augment_seed"])
            example["audio"] = np.asarray(waveform, dtype=np.float32)
        return example

    def _rows(
        self, state: dict | None, rank: int, world_size: int, passes: int | None = None
    ) -> Iterator[tuple[dict, dict]]:
        """Shuffled rows, each with the state of the stream after it: the pass, the number of the stretch in it, where
        the stretch began (None: with the pass), a number that tells its rows from others, and how many were given out."""
        state = state or {"pass": 0, "stretch": 0, "start": None, "given": 0, "check": None}
        num_pass, stretch, start, given, check = (state[key] for key in ("pass", "stretch", "start", "given", "check"))
        size = max(1, self.buffer_size)
        while passes is None or num_pass < passes:
            source, rows = self._open(num_pass, rank, world_size, start)
            current = _take(rows, size)
            if check is not None and _check(current) != check:
                # Not every release of `datasets` comes back to where it was (5.2 does). The rows before are read again.
                logger.warning(
                    "`datasets` did not come back to its place in the stream: the pass is read again up to there. A newer "
                    "release may do better."
                )
                source, rows = self._open(num_pass, rank, world_size, None)
                for _ in range(stretch * size):
                    next(rows, None)
                current = _take(rows, size)
                if _check(current) != check:
                    raise RuntimeError(
                        "The stream has other rows than when the run was stopped, so it cannot go on where it was. "
                        "--ignore_data_skip begins it anew with the weights of the checkpoint."
                    )
            if not current and stretch == 0:
                raise RuntimeError(
                    f"The stream has no rows for process {rank}: it has {self.stream.n_shards} shards for {world_size} "
                    "processes and their workers. Use fewer."
                )
            while current:
                # The next stretch is read while this one is given out: both together are never more than the buffer
                upcoming_start, check = source.state_dict(), _check(current)
                order = np.random.default_rng([self.seed, num_pass, stretch]).permutation(len(current))
                upcoming: list[dict] = []
                for place, index in enumerate(order):
                    upcoming += _take(rows, 1)
                    row, current[index] = current[index], None
                    if place >= given:
                        after = {"pass": num_pass, "stretch": stretch, "start": start, "check": check}
                        yield row, {**after, "given": place + 1}
                if len(current) == size:
                    upcoming += _take(rows, size - len(upcoming))
                current, start, given, stretch = upcoming, upcoming_start, 0, stretch + 1
            num_pass, stretch, start, given, check = num_pass + 1, 0, None, 0, None

    def _open(self, num_pass: int, rank: int, world_size: int, start: dict | None) -> tuple[Any, Iterator[dict]]:
        """The stream of a process in a pass, and its rows from a place on."""
        from datasets.distributed import split_dataset_by_node

        # For one process, too: the epoch of a dataset lies in memory that all workers share, and each is in a pass of its
        # own. What is made here has one for itself.
        source = split_dataset_by_node(self.stream, rank, world_size)
        if self.buffer_size:
            # Of all processes alike: they divide the shards among them in this order
            source.set_epoch(1 + int(np.random.SeedSequence([self.seed, num_pass]).generate_state(1)[0]) // 2)
        source.load_state_dict(start)
        return source, iter(source)

    # --- stopping and going on --------------------------------------------------------------------------------------

    def trained_on(self, state: dict[str, Any]) -> None:
        """Told of the state that came with a batch when it is trained on."""
        state = dict(state)
        self.states[state.pop("worker")] = state
        self.batches += 1

    @property
    def num_passes(self) -> int:
        """Whole passes through the stream that are behind every worker of this process."""
        return min((state["pass"] for state in self.states.values()), default=0)

    def _identity(self, num_workers: int) -> dict[str, Any]:
        """What decides which batch comes when."""
        values = {
            "world_size": self.world_size,
            "dataloader_num_workers": num_workers,
            "shards": self.stream.n_shards,
            "task": self.task,
            "seed": self.seed,
            "shuffle_buffer": self.buffer_size,
            "min_seconds": self.min_seconds,
            "max_seconds": None if np.isinf(self.max_seconds) else self.max_seconds,
            "max_batch_tokens": self.max_tokens,
            **({"batch_size": self.batch_size} if self.max_tokens is None else {"packing": self._packed}),
            **self.settings,
        }
        return json.loads(json.dumps(values))

    def save_state(self, folder: str | os.PathLike, num_workers: int) -> None:
        """Writes where this process is in the stream into a checkpoint."""
        path = Path(folder) / _state_file(self.rank)
        content = {
            "of": self._identity(num_workers),
            "batches": self.batches,
            "workers": {str(worker): state for worker, state in self.states.items()},
        }
        write_whole(path, json.dumps(content, default=_plain))

    def load_state(self, folder: str | os.PathLike, num_workers: int, num_batches: int, max_batches: int) -> None:
        """Goes on from a checkpoint.

        Args:
            folder: The checkpoint.
            num_workers (`int`): Of the data loader.
            num_batches (`int`): How many the Trainer takes for trained on, and will skip.
            max_batches (`int`): How many it is to train on in all.

        Raises:
            ValueError: The checkpoint does not say where the stream was, or is of a run that read it in another way.
        """
        folder = Path(folder)
        anew = "--ignore_data_skip begins the stream anew with the weights of the checkpoint."
        try:
            content = json.loads((folder / _state_file(self.rank)).read_text(encoding="utf-8"))
            before, states = content["of"], {int(key): state for key, state in content["workers"].items()}
        except (OSError, ValueError, KeyError, AttributeError):
            raise ValueError(
                f"{folder} does not say where process {self.rank} was in the stream ({_state_file(self.rank)} is missing "
                f"or broken). {anew}"
            ) from None
        now = self._identity(num_workers)
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            was = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in sorted(differing))
            raise ValueError(
                f"{folder} is of a run that read its stream in another way: {was}. Set it back; or {anew}"
            )
        if content["batches"] != num_batches:
            raise ValueError(
                f"{folder} had trained on {content['batches']} batches and not {num_batches}: was "
                f"--gradient_accumulation_steps another? Set it back; or {anew}"
            )
        self.states, self.batches = states, content["batches"]
        self.is_finished = num_batches >= max_batches
        self._skipped = 0 if self.is_finished else num_batches


class StreamCollator:
    """Makes the batches of a [`SpeechStream`], each with the stream's state after it."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, item: tuple[list[dict], dict] | None) -> dict[str, Any] | None:
        if item is None:
            return None
        examples, state = item
        return {**self.collator(examples), STATE_KEY: state}


def _state_file(rank: int) -> str:
    return f"stream_state_{rank}.json"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a state of the stream holds a {type(value).__name__}")


def _check(rows: list[dict]) -> int:
    return zlib.crc32("\0".join(f"{row['origin']}\0{row['text']}" for row in rows).encode())


def _take(rows: Iterator[dict], count: int) -> list[dict]:
    taken = []
    for _ in range(count):
        row = next(rows, None)
        if row is None:
            break
        taken.append(row)
    return taken


__all__ = ["SpeechStream", "StreamCollator"]
