"""Mean and deviation of log-mel features over a corpus, for the model's normalisation."""

from collections.abc import Iterable

import torch


def compute_feature_statistics(
    features: Iterable[torch.Tensor], min_std: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per mel bin over all frames, for `MelLLMModel.set_feature_statistics`.

    Args:
        features: `(frames, num_mel_bins)` of each clip, without padding.
        min_std (`float`, defaults to 1e-3): Least deviation returned; a bin that never changes has none.

    Returns:
        Two float32 tensors `(num_mel_bins,)`.

    Raises:
        ValueError: There are no frames, or they are not finite.
    """
    count, total, squares = 0, 0.0, 0.0
    for clip in features:
        clip = torch.as_tensor(clip, dtype=torch.float64)
        count += len(clip)
        total = total + clip.sum(0)
        squares = squares + clip.square().sum(0)
    if count == 0:
        raise ValueError("`features` is empty: statistics need at least one frame.")
    mean = total / count
    if not torch.isfinite(mean).all():
        raise ValueError("`features` has values that are not finite.")
    std = (squares / count - mean.square()).clamp(min=0.0).sqrt().clamp(min=min_std)
    return mean.float(), std.float()


__all__ = ["compute_feature_statistics"]
