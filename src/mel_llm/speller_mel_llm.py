"""Letters from states of the language model, several to a state, and the CTC loss of them. Ours.

Used on both sides: the states of audio tokens spell what is heard, and states that predict patches what is said next.
"""

import torch
from torch import nn


class MelLLMSpeller(nn.Module):
    """Bytes of a text from states, `rate` places to each; class 0 is the blank.

    Args:
        width (`int`): Of the states.
        rate (`int`): Places for letters that a state has.
    """

    def __init__(self, width: int, rate: int):
        super().__init__()
        self.rate = rate
        self.proj = nn.Linear(width, 256 * rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., n, D)` states to scores `(..., n * rate, 256)`."""
        return self.proj(hidden_states).unflatten(-1, (self.rate, 256)).flatten(-3, -2)


def spelling_loss(log_probs: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The CTC loss of a byte, `(B,)`: 0 for a row whose text has too many for its places.

    Args:
        log_probs: `(B, places, 256)`, float32.
        counts: `(B,)`, how many places each row has.
        labels: `(B, M)`, bytes padded with -100.
    """
    sizes = (labels != -100).sum(-1)
    losses = nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        labels.clamp(min=0),
        counts,
        sizes,
        reduction="none",
        zero_infinity=True,
    )
    return losses / sizes.clamp(min=1)


__all__ = ["MelLLMSpeller", "spelling_loss"]
