"""In which order an epoch visits the clips: mixed by weight, similar lengths together, one kind to a batch."""

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import torch


class SpeechSampler(torch.utils.data.Sampler[tuple[int, int]]):
    r"""Yields `(epoch, index)` for [`SpeechDataset`].

    The order is a function of the seed and the epoch alone, so a run that is resumed sees what it would have seen. The
    epoch travels with the index because workers hold copies of the dataset that nobody could tell.

    Args:
        lengths (`Sequence[float]`): Seconds of each clip.
        sizes (`Sequence[int]`, *optional*): How many of the clips belong to each source, in their order.
        weights (`Sequence[float]`, *optional*): Share of each source in an epoch. An epoch then has as many clips as
            there are, some of them several times; each source is gone through evenly. By default every clip comes once.
        batch_size (`int`, *optional*): Group clips of similar length: the order is random, but 50 batches at a time are
            sorted by length and the batches then shuffled. `None` does not group.
        seed (`int`, defaults to 0): Of the order.
        kinds (`Sequence`, *optional*): What each source is, such as its task. The clips of a batch are then of one kind;
            the last batch of each kind is filled up with clips that have been in the epoch already.
        by_length (`bool`, defaults to `True`): `False` groups by kind alone.
        epoch_lengths (*optional*): Called with `lengths` and the epoch; the seconds of each example in it, where they
            differ from the clips': [`SpeechDataset.epoch_lengths`].

    Raises:
        ValueError: Sizes, weights or kinds do not fit together, or there are kinds and no `batch_size`.
    """

    MEGA_BATCH = 50

    def __init__(
        self,
        lengths: Sequence[float],
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        kinds: Sequence[Hashable] | None = None,
        by_length: bool = True,
        epoch_lengths: Callable[[Sequence[float], int], Sequence[float]] | None = None,
    ):
        self.lengths = self.clip_lengths = np.asarray(lengths, dtype=np.float64)
        self.epoch_lengths = epoch_lengths
        self.sizes = [len(self.lengths)] if sizes is None else list(sizes)
        if sum(self.sizes) != len(self.lengths):
            raise ValueError(f"`sizes` add up to {sum(self.sizes)}, but there are {len(self.lengths)} `lengths`.")
        if weights is not None and (len(weights) != len(self.sizes) or not all(weight > 0 for weight in weights)):
            raise ValueError(f"`weights` must be one positive number for each of {len(self.sizes)} sources.")
        if kinds is not None and (len(kinds) != len(self.sizes) or batch_size is None):
            raise ValueError(f"`kinds` must be one for each of {len(self.sizes)} sources, and need a `batch_size`.")
        self.counts = self._share(weights)
        self.is_weighted = weights is not None
        self.batch_size = batch_size
        self.seed = seed
        self.by_length = by_length
        names = [None] * len(self.sizes) if kinds is None else list(kinds)
        self.num_kinds = len(set(names))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.kind_of = np.repeat([numbers[name] for name in names], self.sizes)
        self.length = len(self.lengths)
        if self.num_kinds > 1:
            totals = [sum(c for c, name in zip(self.counts, names, strict=True) if name == kind) for kind in numbers]
            self.length = sum(-(-total // batch_size) * batch_size for total in totals)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        if self.epoch_lengths is not None:
            self.lengths = np.asarray(self.epoch_lengths(self.clip_lengths, self.epoch), dtype=np.float64)
        order = random.permutation(self._draw())
        if self.num_kinds > 1:
            order = self._separate(order, random)
        elif self.batch_size is not None and self.by_length:
            order = self._group(order, random)
        return iter([(self.epoch, int(index)) for index in order])

    def _share(self, weights: Sequence[float] | None) -> list[int]:
        """How many clips of each source an epoch has."""
        if weights is None:
            return self.sizes
        total = len(self.lengths)
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
        counts = np.floor(shares).astype(int)
        rest = np.argsort(counts - shares, kind="stable")[: total - counts.sum()]
        counts[rest] += 1
        return counts.tolist()

    def _draw(self) -> np.ndarray:
        """The clips of this epoch."""
        if not self.is_weighted:
            return np.arange(len(self.lengths))
        drawn, offset = [], 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            # The source's clips in random order, again and again; this epoch's stretch begins where the last one ended
            first = self.epoch * count
            rounds = range(first // size, -(-(first + count) // size)) if size else []
            cycle = [np.random.default_rng([self.seed, source, 1 + r]).permutation(size) for r in rounds]
            if cycle:
                start = first - rounds[0] * size
                drawn.append(offset + np.concatenate(cycle)[start : start + count])
            offset += size
        return np.concatenate(drawn)

    def _separate(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Batches of one kind each, the kinds in random order."""
        size, batches, first = self.batch_size, [], []
        for kind in range(self.num_kinds):
            own = order[self.kind_of[order] == kind]
            if len(own) == 0:
                continue
            own = np.resize(own, -(-len(own) // size) * size)  # which repeats
            if self.by_length:
                full, _ = self._by_length(own, random)
            else:
                full = np.split(own, len(own) // size)
            if self.epoch == 0:
                first.append(full.pop(self._longest(full)))
            batches += full
        batches = [batches[i] for i in random.permutation(len(batches))]
        return np.concatenate([*first, *batches])

    def _group(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        full, partial = self._by_length(order, random)
        if self.epoch == 0 and full:
            full.insert(0, full.pop(self._longest(full)))
        return np.concatenate([*full, *partial])

    def _by_length(self, order: np.ndarray, random: np.random.Generator) -> tuple[list, list]:
        """Full batches in random order, and those that are not full: these must come last, or every batch after them
        would be cut in another place."""
        size = self.batch_size
        mega = size * self.MEGA_BATCH
        batches = []
        for start in range(0, len(order), mega):
            chunk = order[start : start + mega]
            chunk = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        partial = [batch for batch in batches if len(batch) < size]
        full = [batch for batch in batches if len(batch) == size]
        return [full[i] for i in random.permutation(len(full))], partial

    def _longest(self, batches: list[np.ndarray]) -> int:
        """The batch that goes first: memory that does not suffice is to be told at the first step."""
        return max(range(len(batches)), key=lambda i: self.lengths[batches[i]].max())


__all__ = ["SpeechSampler"]
