"""How far a figure could have come out otherwise with other utterances of the kind."""

import numpy as np


_BLOCK_CELLS = 1 << 22


def bootstrap_interval(
    numerators, denominators=None, level: float = 0.95, num_samples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a ratio of sums over utterances (Efron 1979; for error rates Bisani and Ney
    2004).

    Args:
        numerators (`(utterances,)`): The errors of each, or its score.
        denominators (`(utterances,)`, *optional*): The words of each. By default 1: then the ratio is the mean.
        level (`float`, defaults to 0.95): Share of the resampled ratios inside.
        num_samples (`int`, defaults to 1000): How often as many utterances are drawn, with replacement.
        seed (`int`, defaults to 0): The same interval again for the same numbers.

    Returns:
        Both ends; `None` for fewer than two utterances.

    Raises:
        ValueError: Lengths differ, or an argument is out of range.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.ones_like(numerators) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise ValueError(f"As many of one as of the other, got {numerators.shape} and {denominators.shape}.")
    if not 0 < level < 1 or num_samples < 1:
        raise ValueError(
            f"`level` must be between 0 and 1 and `num_samples` at least 1, got {level} and {num_samples}."
        )
    count = len(numerators)
    if count < 2:
        return None
    generator, ratios = np.random.default_rng(seed), []
    block = max(1, _BLOCK_CELLS // count)
    for start in range(0, num_samples, block):
        drawn = generator.integers(count, size=(min(block, num_samples - start), count))
        above, below = numerators[drawn].sum(axis=1), denominators[drawn].sum(axis=1)
        ratios.append(above[below > 0] / below[below > 0])  # a sample of empty references has no rate
    ratios = np.concatenate(ratios)
    if not len(ratios):
        return None
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


__all__ = ["bootstrap_interval"]
