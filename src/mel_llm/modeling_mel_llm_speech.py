"""Mel-LLM, writing side: text -> decoder-only language model -> mel patches -> waveform.

One sequence: [text prompt] [begin] [patch 0] [patch 1] ... The state at "begin" predicts patch 0, the state at patch t
predicts patch t + 1, and each state also says whether the speech is over. The paper (arXiv 2606.10231, §"TTS") states the
objective and its weights; the layout of the sequence, the prompt and the guards of generation are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple, logging

from .configuration_mel_llm import MelLLMConfig
from .modeling_mel_llm import MelLLMForSpeechSeq2Seq
from .speech_generation_mel_llm import MelLLMSpeechGenerationMixin
from .speech_heads_mel_llm import MelLLMSpeechHead


logger = logging.get_logger(__name__)


@dataclass
class MelLLMSpeechOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.Tensor` of shape `()`): The objective.
        losses (`dict[str, torch.Tensor]`): Its terms, weighted, and `"mean_error"`; see [`MelLLMSpeechHead.loss`].
        spectrogram (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): Predicted under teacher forcing,
            normalised.
    """

    loss: torch.Tensor | None = None
    losses: dict | None = None
    spectrogram: torch.Tensor | None = None


class MelLLMForTextToSpeech(MelLLMSpeechGenerationMixin, MelLLMForSpeechSeq2Seq):
    """Mel-LLM that speaks, and still reads: one backbone with a head over text and one over mel patches.

    * `forward(input_ids, attention_mask, labels=spectrogram)`, the labels being log-mel frames `(batch, frames,
      num_mel_bins)` padded with -100, trains it to speak; everything else is as for [`MelLLMForSpeechSeq2Seq`].
    * `generate(input_ids)` speaks; with `input_features` it reads, as that class does.

    A checkpoint of either class loads as the other: what is missing is initialised (with a warning), what is not needed
    is passed over.
    """

    accepts_loss_kwargs = False  # the mean over frames is of each batch; the Trainer averages over accumulation steps
    _keys_to_ignore_on_load_unexpected = [r"^alignment_head\."]  # noqa: RUF012

    def __init__(self, config: MelLLMConfig):
        if config.speech_config is None:
            raise ValueError(
                "`config.speech_config` is None: this checkpoint only reads. To train it to speak, pass one, "
                'e.g. `from_pretrained(..., speech_config=MelLLMSpeechConfig.from_preset("small"))`.'
            )
        super().__init__(config)
        self.speech_head = MelLLMSpeechHead(config)
        # Share of the history that is the model's own in training; see `SpeechTrainer.history_sampling`
        self.history_sampling = 0.0
        self.vocoder = None
        if config.vocoder_config is not None:
            from .vocoder_mel_llm import build_vocoder

            self.vocoder = build_vocoder(config.vocoder_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MelLLMSpeechHead):
            init.normal_(module.begin, std=self.config.audio_config.initializer_range)
            # The latent is the patch at first, and the post-net changes nothing
            init.zeros_(module.residual[-1].weight)
            init.zeros_(module.residual[-1].bias)
            init.zeros_(module.num_updates)
            if module.postnet is not None:
                init.zeros_(module.postnet.convs[-1].weight)
                init.zeros_(module.postnet.convs[-1].bias)

    # --- history ----------------------------------------------------------------------------------------------------

    def _embed_history(
        self, frames: torch.Tensor, lengths: torch.Tensor | None, generator: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Normalised frames `(B, T, F)` as tokens of the history `(B, M, D)`, with the dropout that is always on."""
        return self._history_dropout(self._embed_history_tokens(frames, lengths), generator)

    def _embed_history_tokens(self, frames: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        dtype = self.model.multi_modal_projector.linear_1.weight.dtype
        embedder, head = self.model.audio_embedder, self.speech_head
        r = head.reduction_factor
        if lengths is not None:
            mask = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
            frames = frames.masked_fill(~mask[..., None], 0.0)
        frames = nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % r)).to(dtype)
        if head.prenet is not None:
            return head.prenet(frames.unflatten(1, (-1, r)).flatten(2))
        if embedder.conv is not None:
            hidden_states = embedder.conv(frames, lengths)
        else:
            hidden_states = frames.unflatten(1, (-1, r)).flatten(2)
        return self.model.multi_modal_projector(hidden_states)

    def _history_dropout(self, tokens: torch.Tensor, generators: list[torch.Generator] | None) -> torch.Tensor:
        rate = self.config.speech_config.history_dropout
        if rate == 0.0:
            return tokens
        if rate == 1.0:
            return torch.zeros_like(tokens)
        if generators is None:
            kept = torch.rand(tokens.shape, device=tokens.device) >= rate
        else:  # a row's dropout must not depend on its neighbours
            rows = [torch.rand(tokens.shape[1:], generator=generator) for generator in generators]
            kept = torch.stack(rows).to(tokens.device) >= rate
        return tokens * kept / (1.0 - rate)

    def normalize(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """Log-mel frames `(..., num_mel_bins)` as the feature extractor makes them, to mean 0 and deviation 1."""
        return self.model.audio_embedder.normalizer(spectrogram)

    def denormalize(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """The inverse of [`normalize`], float32."""
        normalizer = self.model.audio_embedder.normalizer
        return spectrogram.float() / normalizer.global_invstd.float() + normalizer.global_mean.float()

    # --- training ---------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        transcript_bytes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        """As [`MelLLMForSpeechSeq2Seq.forward`]; with floating-point `labels`, teacher-forced speech.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`): The text to speak; the prompt of the config is put
                around it.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 for padding, on either side.
            labels (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): Its log-mel spectrogram, not normalised,
                padded on the right with -100.
            transcript_bytes (`torch.Tensor` of shape `(batch, letters)`, *optional*): The text's letters for the CTC term of
                `speech_config.ctc_weight`, as [`mel_llm.training.ctc_bytes`] makes them, padded with -100.

        Returns:
            [`MelLLMSpeechOutput`].

        Raises:
            ValueError: The labels have another shape, or none but padding in a row.
        """
        if labels is None or not labels.is_floating_point():
            return super().forward(
                input_ids=input_ids,
                input_features=input_features,
                input_features_mask=input_features_mask,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                transcript_bytes=transcript_bytes,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if input_ids is None:
            raise ValueError("A spectrogram as `labels` needs `input_ids`: the text that is spoken in it.")
        mask = (labels != -100).all(-1)
        lengths = mask.sum(-1)
        self._check_spectrogram(labels, mask, lengths, len(input_ids))
        target, lengths = self._whole_patches(self.normalize(labels), lengths)
        hidden_states = self._teacher_forced_states(input_ids, attention_mask, target, lengths)
        losses, spectrogram = self.speech_head.loss(hidden_states, target, lengths, transcript_bytes)
        return MelLLMSpeechOutput(
            loss=losses["loss"],
            losses={name: value.detach() for name, value in losses.items()},
            spectrogram=spectrogram[:, : labels.shape[1]],
        )

    def _whole_patches(self, frames: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each clip up to the end of its last patch, by its last frame again and again, and zeros beyond (ours).

        Generation writes whole patches; a last patch that was partly empty in training would be another than those
        that it sees there, and the end would be missed.
        """
        r = self.speech_head.reduction_factor
        size = -(-frames.shape[1] // r) * r
        places = torch.arange(size, device=frames.device).expand(len(frames), -1)
        index = torch.minimum(places, lengths[:, None] - 1)
        frames = frames.gather(1, index[..., None].expand(-1, -1, frames.shape[-1]))
        lengths = (lengths + r - 1) // r * r
        return frames.masked_fill((places >= lengths[:, None])[..., None], 0.0), lengths

    def _check_spectrogram(self, labels, mask, lengths, num_texts: int, name: str = "labels") -> None:
        bins = self.config.audio_config.num_mel_bins
        if labels.ndim != 3 or labels.shape[-1] != bins or len(labels) != num_texts:
            raise ValueError(
                f"`{name}` must have the shape (batch, frames, {bins}) for {num_texts} texts, got {tuple(labels.shape)}."
            )
        if (lengths == 0).any() or not (
            mask == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])
        ).all():
            raise ValueError(f"`{name}` must have at least one frame a row, and be padded on the right with -100.")

    def _teacher_forced_states(self, input_ids, attention_mask, target, lengths) -> torch.Tensor:
        """States at "begin" and at each patch, `(B, M + 1, D)`."""
        frames = self._sampled_history(
            target, lambda history: self._states_behind(input_ids, attention_mask, history, lengths)
        )
        return self._states_behind(input_ids, attention_mask, frames, lengths)

    def _sampled_history(
        self, target: torch.Tensor, states_behind: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The target's frames `(B, T, F)` with the share `history_sampling` of their patches, in training, replaced by what the
        model writes; `states_behind(frames)` are its states `(B, M + 1, D)` with these behind them."""
        frames = target
        if self.training and self.history_sampling > 0:
            # Twice in half of the batches: what is written behind what was written is farther off
            for _ in range(1 + int(torch.rand(()) < 0.5)):
                with torch.no_grad():
                    frames = self._with_own_patches(states_behind(frames)[:, :-1], target)
            # Autocast keeps the weights that it cast; older releases of torch also those that it cast without gradients
            torch.clear_autocast_cache()
        return frames

    def _with_own_patches(self, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The target with a share of its patches replaced by what the model writes at `states` `(B, M, D)`."""
        own = self.speech_head.sample(states.flatten(0, 1), self._noise(states)).unflatten(0, states.shape[:2])
        taken = torch.rand(states.shape[:2], device=target.device) < self.history_sampling
        patches = target.unflatten(1, (-1, self.speech_head.reduction_factor))
        return torch.where(taken[..., None, None], own.to(target.dtype), patches).flatten(1, 2)

    def _noise(self, states: torch.Tensor) -> torch.Tensor | None:
        """What a patch behind each state `(B, M, D)` is drawn with, `(B * M, r * F)`."""
        head = self.speech_head
        size = head.reduction_factor * head.num_mel_bins
        return torch.randn(states.shape[0] * states.shape[1], size, device=states.device) if head.is_random else None

    def _states_behind(self, input_ids, attention_mask, frames, lengths) -> torch.Tensor:
        """States at "begin" and at each patch of a history of normalised frames, `(B, M + 1, D)`."""
        text, text_mask = self._speech_prompt(input_ids, attention_mask)
        history = self._embed_history(frames, lengths)
        begin = self.speech_head.begin.to(history.dtype).expand(len(text), 1, -1)
        embeds = self.get_input_embeddings()(text)
        inputs_embeds = torch.cat([embeds, begin.to(embeds.dtype), history.to(embeds.dtype)], dim=1)
        places = torch.arange(history.shape[1], device=text.device)
        r = self.speech_head.reduction_factor
        patch_mask = places < ((lengths + r - 1) // r)[:, None]
        mask = torch.cat([text_mask, text_mask.new_ones(len(text), 1), patch_mask.to(text_mask.dtype)], dim=1)
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )
        return outputs.last_hidden_state[:, text.shape[1] :]

    def _speech_prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The text between the config's prompt ids, with its mask, `(B, L)`; padding stays where it was."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)

        def column(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            block = torch.tensor(ids, dtype=torch.long, device=input_ids.device).expand(len(input_ids), -1)
            return block, torch.ones_like(block)

        prefix, prefix_mask = column(self.config.speech_prefix_ids)
        suffix, suffix_mask = column(self.config.speech_suffix_ids)
        ids = torch.cat([prefix, input_ids, suffix], dim=1)
        return ids, torch.cat([prefix_mask, attention_mask.long(), suffix_mask], dim=1)


__all__ = ["MelLLMForTextToSpeech", "MelLLMSpeechOutput"]
