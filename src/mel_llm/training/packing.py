"""Sequence packing: the clips of a batch one after another in one row, instead of one below another with padding (ours).

Every clip counts its positions anew. That is how transformers recognises packed rows: it then makes masks in which a clip
sees nothing but itself (sdpa, eager, flex_attention), or hands the clips' borders to flash attention. So the loss and its
gradients are those of the clips on their own, which the tests hold to 1e-5, and which [`check_packing`] asks of a backbone
before training begins.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_mel_llm import MelLLMConfig
from ..modeling_mel_llm import MelLLMModel
from .collator import TranscriptionCollator


def pack_transcripts(batch: dict[str, Any], config: MelLLMConfig) -> dict[str, Any]:
    """One row of a batch as [`TranscriptionCollator`] makes it.

    Args:
        batch (`dict`): `input_features` `(clips, frames, num_mel_bins)`, `attention_mask` `(clips, frames)`, and `labels`
            `(clips, tokens)`, padded on the right with -100, each with its end.
        config: The model's: the default prompt lies there.

    Returns:
        `dict`: `input_ids` and `position_ids`, `(1, tokens of all clips)`; `input_features` and `input_features_mask`, which
        stay clip by clip; `logits_to_keep` `(transcript tokens,)`, the places that predict the transcripts, since scores of
        the vocabulary at all places would take more memory than everything else; `labels` and `shift_labels`,
        `(1, transcript tokens)`, both what is predicted there; and `use_cache=False`, since a cache would hide the borders.
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    device = labels.device
    prefix = torch.tensor(config.prompt_prefix_ids, dtype=torch.long, device=device)
    suffix = torch.tensor(config.prompt_suffix_ids, dtype=torch.long, device=device)
    ids, targets, positions, places, length = [], [], [], [], 0
    for num_audio, row in zip(config.audio_config.num_audio_tokens(mask.sum(-1)).tolist(), labels, strict=True):
        transcript = row[row != -100]
        audio = torch.full((num_audio,), config.audio_token_id, dtype=torch.long, device=device)
        clip = torch.cat([prefix, audio, suffix, transcript])
        ids.append(clip)
        targets.append(transcript)
        positions.append(torch.arange(len(clip), device=device))
        length += len(clip)
        places.append(torch.arange(length - len(transcript), length, device=device) - 1)
    return _packed(batch, mask, ids, targets, positions, places)


def pack_chats(batch: dict[str, Any]) -> dict[str, Any]:
    """The same of a batch with questions: `input_ids`, `attention_mask` and `labels` `(clips, tokens)`, and the clips'
    features. What stands behind the end of an answer, such as the end of a line, is left out: nothing depends on it."""
    ids, targets, positions, places, length = [], [], [], [], 0
    for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        row, labels = row[mask], labels[mask]
        answer = (labels != -100).nonzero()[:, 0]
        row = row[: int(answer[-1]) + 1]
        ids.append(row)
        targets.append(labels[answer])
        positions.append(torch.arange(len(row), device=row.device))
        places.append(length + answer - 1)
        length += len(row)
    return _packed(batch, batch["input_features_mask"], ids, targets, positions, places)


def _packed(batch: dict[str, Any], mask: torch.Tensor, ids, targets, positions, places) -> dict[str, Any]:
    targets = torch.cat(targets)[None]
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions)[None],
        "logits_to_keep": torch.cat(places),
        "labels": targets,
        "shift_labels": targets,
        "input_features": batch["input_features"],
        "input_features_mask": mask,
        "use_cache": False,
    }


@dataclass
class PackedTranscriptionCollator(TranscriptionCollator):
    r"""Batches for training, each of them one row: [`pack_transcripts`]. For [`SpeechTrainer`]'s `train_collator`, beside a
    [`TranscriptionCollator`] for evaluation, which generates and so needs the clips apart.

    Args:
        config ([`MelLLMConfig`]): The model's.
        kwargs: As for [`TranscriptionCollator`], but for `spell`: the CTC head's loss is not computed on packed rows.

    Raises:
        ValueError: There is no `config`, or `spell` is asked for.
    """

    config: MelLLMConfig | None = None

    def __post_init__(self):
        if self.config is None:
            raise ValueError("PackedTranscriptionCollator: `config` is needed, the model's: the prompt lies there.")
        if self.spell:
            raise ValueError(
                "PackedTranscriptionCollator: `spell` is for the CTC head, which packed rows do not train."
            )

    def finish(self, batch: dict[str, Any], device: torch.device | str | None = None) -> dict[str, Any]:
        """Makes features of a batch's waveforms, on the CPU or on `device`, and lays the clips one after another."""
        batch = super().finish(batch, device)
        place = batch["input_features"].device
        batch = {name: value.to(place) for name, value in batch.items()}
        return pack_chats(batch) if "input_ids" in batch else pack_transcripts(batch, self.config)


@torch.no_grad()
def check_packing(model: torch.nn.Module) -> None:
    """Asks the backbone itself: a short sequence behind another one must come out as it does on its own.

    Args:
        model: A Mel-LLM, with or without adapters.

    Raises:
        ValueError: It does not, as in backbones with a recurrent state or a convolution, or those that take no positions;
            or there is a CTC head.
    """
    inner = next((module for module in model.modules() if isinstance(module, MelLLMModel)), None)
    if inner is None:
        raise ValueError(f"`packing` is for a Mel-LLM, got {type(model).__name__}.")
    if inner.config.audio_config.ctc_weight > 0:
        raise ValueError(
            "`packing` does not go with a CTC head, whose loss is computed clip by clip: leave one of them out."
        )
    backbone, kind = inner.language_model, inner.config.text_config.model_type
    attention = backbone.config._attn_implementation or ""
    weight = inner.get_input_embeddings().weight
    if "flash" in attention:
        if inner.config.audio_config.bidirectional_attention:
            raise ValueError("`packing` with `bidirectional_attention` needs attn_implementation sdpa or eager.")
        if weight.device.type == "cpu":
            return  # which flash attention cannot be asked on; transformers hands it the borders
    generator = torch.Generator().manual_seed(0)
    first, second = 5, 7
    embeds = torch.randn(1, first + second, weight.shape[-1], generator=generator) * weight.float().std().cpu()
    embeds = embeds.to(weight.device, weight.dtype)
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None].to(weight.device)
    was_training = backbone.training
    backbone.eval()
    try:
        packed = backbone(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        alone = backbone(inputs_embeds=embeds[:, first:], position_ids=positions[:, first:], use_cache=False)
    except TypeError as error:
        raise ValueError(f"`packing`: the backbone {kind!r} takes no positions ({error}).") from None
    finally:
        backbone.train(was_training)
    packed, alone = packed[:, first:].float(), alone.last_hidden_state.float()
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.05
    if (packed - alone).abs().max() > tolerance * alone.abs().max():
        raise ValueError(
            f"`packing`: in the backbone {kind!r} (attention {attention or 'of its own'}) a clip would see the one before "
            "it, as in models with a recurrent state or a convolution. Leave packing out; --max_batch_tokens works."
        )


__all__ = ["PackedTranscriptionCollator", "check_packing", "pack_chats", "pack_transcripts"]
