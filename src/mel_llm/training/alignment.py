"""A head by which the language model learns to hear what a speech encoder hears (representation alignment).

Ours: Mel-LLM has no encoder, and gets none. In training alone, the states of the audio tokens predict those of a frozen
encoder, which say more about every moment than the transcript does. Related: AuRA (arXiv 2606.11033) distils an encoder into
a language model layer by layer, MELA-TTS (arXiv 2509.14784) aligns a speaking one.
"""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..modeling_mel_llm import MelLLMForSpeechSeq2Seq


class AlignmentHead(nn.Module):
    """States of the audio tokens to those of a teacher.

    Args:
        width (`int`): Of the language model's states.
        size (`int`): Of what the teacher has for an audio token.
        layer (`int`): Layers of the language model below the head.
        weight (`float`): What its loss counts beside the others.
        fingerprint (`str`, defaults to ""): Of the teacher, 16 hexadecimal digits; kept in checkpoints.
    """

    def __init__(self, width: int, size: int, layer: int, weight: float, fingerprint: str = ""):
        super().__init__()
        self.layer, self.weight = layer, weight
        # What lies between the layers of a language model is not normalised, and large
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, size)
        self.register_buffer("teacher", torch.tensor(list(bytes.fromhex(fingerprint or "0" * 16)), dtype=torch.uint8))

    def loss(self, hidden_states: torch.Tensor, places: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        """The share of the teacher's variance in the batch that is not predicted, about 1 at first; 0 for a single token.

        Args:
            hidden_states: `(B, L, width)`.
            places: `(B, L)`, true at the audio tokens, which stand side by side in each row.
            teacher_states: `(B, n, size)`, padded on the right where a clip has fewer tokens than n.
        """
        places = places.to(hidden_states.device)
        counts = places.sum(-1)
        inside = torch.arange(teacher_states.shape[1], device=places.device) < counts[:, None]
        targets = teacher_states.to(places.device)[inside].float()
        predicted = self.proj(self.norm(hidden_states[places].to(self.proj.weight.dtype))).float()
        if len(targets) < 2:  # which has no variance
            return 0.0 * predicted.sum()
        # The teacher's values have means and deviations of their own, a few of them huge
        variance, mean = torch.var_mean(targets, dim=0, correction=0)
        return nn.functional.mse_loss(predicted, (targets - mean) / (variance + 1e-5).sqrt())


def add_alignment_head(
    model: MelLLMForSpeechSeq2Seq, size: int, weight: float, layer: int | None = None, fingerprint: str = ""
) -> AlignmentHead:
    """Gives a model that learns to read a head for a teacher whose states are `size` wide for an audio token.

    Args:
        layer (`int`, *optional*): Layers of the language model below it; the CTC head's, or two thirds of them.
        fingerprint (`str`, defaults to ""): The teacher's, by which a run is known that goes on with another.

    Raises:
        ValueError: There are fewer layers, or `weight` is not positive.
    """
    num_layers = model.config.text_config.num_hidden_layers
    if layer is None:
        layer = max(1, 2 * num_layers // 3) if model.ctc_head is None else model.ctc_head.layer
    if not 1 <= layer <= num_layers:
        raise ValueError(f"`layer` must be from 1 to {num_layers}, the layers of the language model, got {layer}.")
    if not 0 < weight < float("inf"):
        raise ValueError(f"`weight` must be more than 0, got {weight}.")
    head = AlignmentHead(model.config.text_config.hidden_size, size, layer, weight, fingerprint)
    model.alignment_head = head.to(model.lm_head.weight)
    return model.alignment_head


def remove_alignment_head(model: nn.Module) -> None:
    """Takes the head away again: what is trained needs it no more."""
    for module in model.modules():
        if isinstance(module, MelLLMForSpeechSeq2Seq):
            module.alignment_head = None


def check_alignment(checkpoint: str | os.PathLike, head: AlignmentHead | None) -> None:
    """Refuses to go on from a checkpoint of a run that had another teacher, or none, or one where this has none.

    Raises:
        ValueError: With what to do.
    """
    before = None
    for path in Path(checkpoint).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if "alignment_head.teacher" in file.keys():
                before = file.get_tensor("alignment_head.teacher")
    if (before is None) != (head is None):
        raise ValueError(
            f"{checkpoint} is of a run {'without' if before is None else 'with'} a teacher (--teacher). Go on in its way, or choose "
            "another --output_dir."
        )
    if head is not None and not torch.equal(before, head.teacher.cpu()):
        raise ValueError(
            f"{checkpoint} is of a run with another --teacher. Go on with it, or choose another --output_dir."
        )


__all__ = ["AlignmentHead", "add_alignment_head", "check_alignment", "remove_alignment_head"]
