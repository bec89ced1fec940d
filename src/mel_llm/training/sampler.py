"""In which order an epoch visits the clips: mixed by weight, similar lengths together."""

from collections.abc import Iterator, Sequence

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
    """

    MEGA_BATCH = 50

    def __init__(
        self,
        lengths: Sequence[float],
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.sizes = [len(self.lengths)] if sizes is None else list(sizes)
        if sum(self.sizes) != len(self.lengths):
            raise ValueError(f"`sizes` add up to {sum(self.sizes)}, but there are {len(self.lengths)} `lengths`.")
        if weights is not None and (len(weights) != len(self.sizes) or not all(weight > 0 for weight in weights)):
            raise ValueError(f"`weights` must be one positive number for each of {len(self.sizes)} sources.")
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self._draw())
        if self.batch_size is not None:
            order = self._group(order, random)
        return iter([(self.epoch, int(index)) for index in order])

    def _draw(self) -> np.ndarray:
        """The clips of this epoch, `len(self)` of them."""
        if self.weights is None:
            return np.arange(len(self))
        shares = self.weights / self.weights.sum() * len(self)
        counts = np.floor(shares).astype(int)
        rest = np.argsort(counts - shares, kind="stable")[: len(self) - counts.sum()]
        counts[rest] += 1
        drawn, offset = [], 0
        for source, (size, count) in enumerate(zip(self.sizes, counts, strict=True)):
            # The source's clips in random order, again and again; this epoch's stretch begins where the last one ended
            first = self.epoch * count
            rounds = range(first // size, -(-(first + count) // size)) if size else []
            cycle = [np.random.default_rng([self.seed, source, 1 + r]).permutation(size) for r in rounds]
            if cycle:
                start = first - rounds[0] * size
                drawn.append(offset + np.concatenate(cycle)[start : start + count])
            offset += size
        return np.concatenate(drawn)

    def _group(self, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
        size = self.batch_size
        mega = size * self.MEGA_BATCH
        batches = []
        for start in range(0, len(order), mega):
            chunk = order[start : start + mega]
            chunk = chunk[np.argsort(-self.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        # A batch that is not full must come last, or every batch after it would be cut in another place
        partial = [batch for batch in batches if len(batch) < size]
        full = [batch for batch in batches if len(batch) == size]
        full = [full[i] for i in random.permutation(len(full))]
        if self.epoch == 0 and full:
            # The longest first: memory that does not suffice is to be told at the first step
            longest = max(range(len(full)), key=lambda i: self.lengths[full[i]].max())
            full.insert(0, full.pop(longest))
        return np.concatenate([*full, *partial])


__all__ = ["SpeechSampler"]
