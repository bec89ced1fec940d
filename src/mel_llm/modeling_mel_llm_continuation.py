"""SPECTRON's task: a spoken prompt -> its transcript and the text that follows -> the spectrogram of what follows.

One sequence: [prompt with the audio] [transcript and continuation] [end of text] [begin] [patch 0] [patch 1] ...

The objective is that of the paper (arXiv 2305.15255): cross-entropy of transcript and continuation, and L1 + L2 of the
spectrogram and of its differences ([`MelLLMSpeechHead`] with `head_type="deterministic"`), all in one pass. The paper's
encoder is a Conformer behind a linear layer (`encoder_type="conformer"`, `projector_type="linear"`); without an encoder, and
with the VAE head of Mel-LLM, the same task is ours.

There, the state at the end of text predicts the first frame (inferred). Here it is the state at "begin", a learnt vector
that follows: so a prompt can be gone on with in speech alone, where there is no end of text, and one head and one loop write
the patches of every task (ours).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .continuation_generation_mel_llm import MelLLMContinuationGenerationMixin
from .modeling_mel_llm_speech import MelLLMForTextToSpeech
from .pipeline_mel_llm import register_pipeline


register_pipeline(replace=False)  # for a repository's code


@dataclass
class MelLLMContinuationOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.Tensor` of shape `()`): The objective.
        losses (`dict[str, torch.Tensor]`): Its terms, weighted: `"text"`, and those of [`MelLLMSpeechHead.loss`], as far as
            the batch has text and speech; `"loss"` is their sum, and `"mean_error"` is for the log alone.
        logits (`torch.Tensor` of shape `(batch, text tokens, vocab_size)`): Aligned with `labels`.
        spectrogram (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): Predicted under teacher forcing,
            normalised; zeros in rows without speech.
    """

    loss: torch.Tensor | None = None
    losses: dict | None = None
    logits: torch.Tensor | None = None
    spectrogram: torch.Tensor | None = None


class MelLLMForSpeechContinuation(MelLLMContinuationGenerationMixin, MelLLMForTextToSpeech):
    """Mel-LLM that goes on with what it hears, or answers it, in text and in speech; it also reads and speaks.

    * `forward(input_features, labels=text, spectrogram_labels=speech)` trains it; without `spectrogram_labels` everything is
      as for [`MelLLMForTextToSpeech`].
    * `generate(input_features)` goes on, see [`MelLLMContinuationGenerationMixin.generate`]; with `input_ids` alone it speaks
      them, and with `task="transcribe"` it reads.

    A checkpoint of any of the three classes loads as every other.
    """

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
        spectrogram_labels: torch.Tensor | None = None,
        transcript_bytes: torch.LongTensor | None = None,
        task: str = "continuation",
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        """As [`MelLLMForTextToSpeech.forward`]; with `spectrogram_labels`, a teacher-forced continuation.

        Args:
            input_features (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): What is heard.
            input_features_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for frames of the clip, 0 for
                padding on its right.
            input_ids (`torch.Tensor` of shape `(batch, tokens)`, *optional*): The prompt alone, with
                `config.audio_token_id` in the place of each audio token. Left out, the config's prompt for `task` is put
                around each clip.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): Of `input_ids`, 0 for padding on either
                side; without `input_ids` another name for `input_features_mask`.
            labels (`torch.Tensor` of shape `(batch, text tokens)`): What is said in the prompt and what follows, padded on
                the right with -100. The end-of-text token is added where the tokenizer has not. A row of only -100 goes to
                speech without any text; if it has no speech either, its text is empty.
            spectrogram_labels (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): Log-mel of what follows alone, not
                normalised, padded on the right with -100. A row of only -100 has a text and no speech.
            task (`str`, defaults to `"continuation"`): `"qa"` for the prompt of a spoken question.

        Returns:
            [`MelLLMContinuationOutput`].

        Raises:
            ValueError: Shapes do not fit each other, labels are padded elsewhere, or there is no such task.
        """
        if spectrogram_labels is None:
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
        if input_features is None or labels is None or labels.is_floating_point():
            raise ValueError(
                "`spectrogram_labels` go with `input_features`, the spoken prompt, and `labels`, the token ids of the text."
            )
        features, feature_mask, input_ids, prompt_mask = self._continuation_prompt(
            input_ids, attention_mask, input_features, input_features_mask, task
        )
        size = len(input_ids)
        if spectrogram_labels.ndim != 3 or spectrogram_labels.shape[1] == 0:
            raise ValueError(
                "`spectrogram_labels` must have the shape (batch, frames, num_mel_bins) with at least one frame, got "
                f"{tuple(spectrogram_labels.shape)}; a row of only -100 has no speech."
            )
        is_frame = (spectrogram_labels != -100).all(-1)
        frames = is_frame.sum(-1)
        speaks = frames > 0
        if len(labels) != size or len(spectrogram_labels) != size:
            raise ValueError(
                f"`labels` and `spectrogram_labels` must have a row for each of {size} prompts, got {len(labels)} and "
                f"{len(spectrogram_labels)}."
            )
        if speaks.any():
            self._check_spectrogram(
                spectrogram_labels[speaks], is_frame[speaks], frames[speaks], int(speaks.sum()), "spectrogram_labels"
            )
        text = self._continuation_text(labels.to(input_ids.device), speaks)
        target, lengths = self._whole_patches(self.normalize(spectrogram_labels), frames.clamp(min=1))
        lengths = lengths * speaks

        def states_behind(history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self._continuation_states(features, feature_mask, input_ids, prompt_mask, text, history, lengths)

        history = self._sampled_history(target, lambda past: states_behind(past)[1]) if speaks.any() else target
        text_states, speech_states = states_behind(history)

        terms: dict[str, torch.Tensor] = {}
        logits = self._output_logits(text_states)
        if (text != -100).any():
            cross_entropy = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), text.flatten(), ignore_index=-100
            )
            terms["text"] = self.config.text_loss_weight * cross_entropy
        spectrogram = target.new_zeros(size, target.shape[1], target.shape[2])
        mean_error = None
        if speaks.any():
            speech, written = self.speech_head.loss(speech_states[speaks], target[speaks], lengths[speaks])
            mean_error = speech.pop("mean_error")
            speech.pop("loss")
            terms.update(speech)
            spectrogram[speaks] = written
        if not terms:
            raise ValueError(
                "There is nothing to learn in this batch: no row of `labels` or `spectrogram_labels` has any."
            )
        loss = torch.stack(list(terms.values())).sum()
        losses = {**terms, "loss": loss} if mean_error is None else {**terms, "loss": loss, "mean_error": mean_error}
        return MelLLMContinuationOutput(
            loss=loss,
            losses={name: value.detach() for name, value in losses.items()},
            logits=logits[:, : labels.shape[1]],
            spectrogram=spectrogram[:, : spectrogram_labels.shape[1]],
        )

    def _continuation_text(self, labels: torch.Tensor, speaks: torch.Tensor) -> torch.Tensor:
        """The text with its end, `(B, L + 1)`; nothing in rows that go to speech without."""
        silent = (labels == -100).all(-1) & speaks
        return self._append_end_of_text(labels).masked_fill(silent[:, None], -100)

    def _continuation_states(self, features, feature_mask, input_ids, prompt_mask, text, frames, lengths):
        """Hidden states under teacher forcing: those that predict each token of `text` `(B, L, D)`, and those at "begin" and
        at each patch `(B, M + 1, D)`."""
        batch_size, num_prompt, num_text = len(input_ids), input_ids.shape[1], text.shape[1]
        r = self.speech_head.reduction_factor
        history = self._embed_history(frames, lengths)
        places = torch.arange(history.shape[1], device=text.device)
        patch_mask = places < ((lengths + r - 1) // r)[:, None]
        speech_mask = torch.cat([(lengths > 0)[:, None], patch_mask], dim=1)
        states, order, _, _ = self._closed_up_states(
            features, feature_mask, input_ids, prompt_mask, text, history, speech_mask
        )
        back = order.argsort(dim=1)
        states = states.gather(1, back[..., None].expand(-1, -1, states.shape[-1]))
        # The first token of the text is predicted by the last of the prompt, which need not stand beside it
        last = (torch.arange(num_prompt, device=text.device) * prompt_mask).argmax(-1)
        rows = torch.arange(batch_size, device=text.device)
        text_states = torch.cat(
            [states[rows, last][:, None], states[:, num_prompt : num_prompt + num_text - 1]], dim=1
        )
        return text_states, states[:, num_prompt + num_text :]

    def _closed_up_states(
        self, features, feature_mask, input_ids, prompt_mask, text, history, speech_mask, cache=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the language model over [prompt] [text] [begin] [history].

        Rows are closed up, so that all padding is on their right, or on their left where a `cache` is to be gone on with: a
        window of attention that slides over padding would see less of what is there.

        Args:
            text: `(B, L)`, token ids padded with -100.
            history: `(B, M, D)`.
            speech_mask: `(B, M + 1)`, of "begin" and of the history.

        Returns:
            States `(B, S, D)`, the order that the places were brought into, their mask and their positions `(B, S)`.
        """
        is_text = text != -100
        num_prompt, num_history = input_ids.shape[1], history.shape[1]
        ids = torch.cat([input_ids, text.masked_fill(~is_text, self.config.pad_token_id)], dim=1)
        embeds = self.get_input_embeddings()(ids)
        audio = self.get_audio_features(features, feature_mask, return_dict=True).pooler_output
        heard = self.model._merge_audio(input_ids, embeds[:, :num_prompt], audio)
        begin = self.speech_head.begin.to(embeds.dtype).expand(len(ids), 1, -1)
        embeds = torch.cat([heard, embeds[:, num_prompt:], begin, history.to(embeds.dtype)], dim=1)

        mask = torch.cat([prompt_mask.bool(), is_text, speech_mask.bool()], dim=1)
        order = (mask if cache is not None else ~mask).long().argsort(dim=1, stable=True)
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
        mask = mask.gather(1, order).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        attention_mask = None if bool(mask.all()) else mask
        if self.config.audio_config.bidirectional_attention:
            ids = nn.functional.pad(ids, (0, 1 + num_history), value=self.config.pad_token_id).gather(1, order)
            num_tokens = self._num_audio_tokens(features, feature_mask)
            attention_mask = self.model._bidirectional_masks(ids, embeds, mask, cache, position_ids, num_tokens)
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return outputs.last_hidden_state, order, mask, position_ids

    def _num_audio_tokens(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            lengths = features.new_full((len(features),), features.shape[1], dtype=torch.long)
        else:
            lengths = mask.sum(-1)
        return self.config.audio_config.num_audio_tokens(lengths).to(self.device)


__all__ = ["MelLLMContinuationOutput", "MelLLMForSpeechContinuation"]
