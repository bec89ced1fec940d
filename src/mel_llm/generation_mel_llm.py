"""Decoding for speech recognition: the default prompt, a token budget from the audio's length, and the two guards.

Everything here is ours; the paper says nothing about decoding beyond the prompt of Phi-4-multimodal. The loop itself
is transformers' own `generate`, so greedy search, beams, sampling, assisted decoding and streamers work as ever.
"""

import copy
import math
from numbers import Real

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

from .ctc_decoding_mel_llm import CTCLogitsProcessor, CTCPrefixScorer
from .transcription_mel_llm import Transcription, transcribe


logger = logging.get_logger(__name__)

# Tokens that a transcript may have beyond its rate per second: a word or two in a clip of a few frames
_BUDGET_CONSTANT = 16

# A transcript that goes on with the same up to 16 tokens at least 12 times in a row, and that for at least 48 tokens, is
# a loop and not speech.
_LOOP_MAX_PERIOD = 16
_LOOP_MIN_REPEATS = 12
_LOOP_MIN_TOKENS = 48
# Looking at every step would cost a small model more than its own step
_LOOP_CHECK_EVERY = 8


# Of a generation config, what arguments of `generate` and the audio's budget decide
_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")


def _per_row(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Values per clip to values per row of a batch that beams or return sequences have widened."""
    return values.repeat_interleave(num_rows // len(values))


def _loop_period(tokens: torch.Tensor) -> torch.Tensor:
    """`(rows, length)` token ids to the period of the loop that each row ends in, `(rows,)`; 0 where there is none."""
    num_rows, length = tokens.shape
    found = torch.zeros(num_rows, dtype=torch.long, device=tokens.device)
    for period in range(1, _LOOP_MAX_PERIOD + 1):
        span = max(_LOOP_MIN_TOKENS, _LOOP_MIN_REPEATS * period)
        if span > length:
            break
        tail = tokens[:, length - span :]
        repeats = (tail[:, period:] == tail[:, :-period]).all(dim=1)
        found = torch.where((found == 0) & repeats, period, found)
    return found


class AudioBudgetCriteria(StoppingCriteria):
    """Ends each row when it has as many tokens as its own clip can hold, whatever the rest of the batch does."""

    def __init__(self, budgets: torch.Tensor, prompt_length: int):
        self.budgets = budgets  # (clips,)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return input_ids.shape[1] - self.prompt_length >= _per_row(self.budgets, len(input_ids))


class RepetitionLoopCriteria(StoppingCriteria):
    """Ends each row that repeats itself: see the constants above. `stopped` tells which rows those were."""

    def __init__(self, prompt_length: int, end_ids: torch.Tensor):
        self.prompt_length = prompt_length
        self.end_ids = end_ids  # a row that has ended goes on with these, which is no loop
        self.stopped: torch.Tensor | None = None
        self.checked_length = 0  # steps of assisted decoding may be longer than one token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        length = input_ids.shape[1] - self.prompt_length
        found = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if length >= max(_LOOP_MIN_TOKENS, self.checked_length + _LOOP_CHECK_EVERY):
            self.checked_length = length
            window = min(length, _LOOP_MIN_REPEATS * _LOOP_MAX_PERIOD)
            found = (_loop_period(input_ids[:, -window:]) > 0) & ~torch.isin(input_ids[:, -1], self.end_ids)
        self.stopped = found if self.stopped is None else self.stopped | found
        return found


class SilenceLogitsProcessor(LogitsProcessor):
    """Leaves the rows of silent clips only the end-of-text token: an empty transcript."""

    def __init__(self, silent: torch.Tensor, eos_token_id: int):
        self.silent = silent  # (clips,)
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        only_eos = torch.full_like(scores[:1], -math.inf)
        only_eos[:, self.eos_token_id] = 0.0
        return torch.where(_per_row(self.silent, len(scores))[:, None], only_eos, scores)


class MelLLMGenerationMixin(GenerationMixin):
    """`generate` for the two ways of calling a Mel-LLM; see [`MelLLMForSpeechSeq2Seq`]."""

    def _build_prompt(
        self,
        input_features: torch.Tensor,
        mask: torch.Tensor | None,
        around: tuple[list[int], list[int]] | None = None,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The default prompt around each clip, padded on the left: `input_ids` and `attention_mask`, `(B, L)`.

        A row is [padding, config.prompt_prefix_ids, n audio tokens, config.prompt_suffix_ids], or has the ids of `around`.
        """
        config = self.config
        device = input_features.device
        batch_size, num_frames = input_features.shape[:2]
        lengths = torch.full((batch_size,), num_frames, device=device) if mask is None else mask.sum(-1)
        num_tokens = config.audio_config.num_audio_tokens(lengths)
        longest = int(num_tokens.max())
        prefix, suffix = around or (config.prompt_prefix_ids, config.prompt_suffix_ids)
        row = torch.tensor([*prefix, *[config.audio_token_id] * longest, *suffix], device=device)
        # Prefix and audio move to the right by what a clip is shorter than the longest; the suffix stays
        position = torch.arange(len(row), device=device)
        shifted = position - (longest - num_tokens)[:, None]
        in_suffix = position >= len(row) - len(suffix)
        attention_mask = (shifted >= 0) | in_suffix
        input_ids = torch.where(in_suffix, row, row[shifted.clamp(min=0)])
        input_ids = input_ids.masked_fill(~attention_mask, config.pad_token_id)
        return input_ids, attention_mask.long()

    def _audio_budgets(self, num_frames: torch.Tensor) -> torch.Tensor:
        """The most tokens that a transcript of so many mel frames may have, `(clips,)`."""
        seconds = num_frames / self.config.audio_config.frame_rate
        return _BUDGET_CONSTANT + torch.ceil(seconds * self.config.max_text_tokens_per_second).long()

    def _silent_clips(self, input_features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which clips never rise above `config.audio_config.silence_threshold`, `(clips,)`; None if none does not."""
        threshold = self.config.audio_config.silence_threshold
        if threshold is None:
            return None
        level = input_features.float().mean(-1)
        if mask is not None:
            level = level.masked_fill(mask == 0, -math.inf)
        silent = level.amax(-1) < threshold
        return silent if silent.any() else None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs,
    ):
        """Writes text. Takes everything that [`~transformers.GenerationMixin.generate`] takes.

        * `generate(input_ids=..., input_features=..., input_features_mask=...)` continues a text with audio in it and
          returns it with its continuation, like any decoder-only model.
        * `generate(input_features, attention_mask=...)`, the features being `(batch, frames, num_mel_bins)`, puts the
          default prompt around each clip and returns the transcripts alone. Here `max_new_tokens` and `max_length`
          both count tokens of the transcript; each clip also has a budget of its own,
          `config.max_text_tokens_per_second` times its duration plus 16 tokens, unless `max_new_tokens` or
          `max_length` is an argument of the call; a transcript that falls into a loop ends there, and the loop is cut
          to its first round; a silent clip gives an empty transcript. Neither guard is at work with `min_new_tokens`.

        `ctc_decoding_weight=0.3`, from 0 to 1, has the CTC head of a model that has one weigh what is written, see
        [`~ctc_decoding_mel_llm.CTCLogitsProcessor`]; this is for the second way of calling, and
        `config.audio_config.ctc_decoding_weight` is its default there.

        A checkpoint whose `generation_config.json` asks for beams writes greedily with a `streamer`, which sees every token as it is
        written, unless `num_beams` is an argument of the call.

        Raises:
            ValueError: What the forward pass raises for features or masks of the wrong shape; or `ctc_decoding_weight` is out
                of range, given beside a text, or the model cannot be decoded with it.
        """
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
            inputs, kwargs["input_features"] = None, inputs
        generation_config = self._without_beams(generation_config, kwargs)
        audio_only = (
            inputs is None
            and kwargs.get("input_ids") is None
            and kwargs.get("inputs_embeds") is None
            and kwargs.get("input_features") is not None
        )
        if not audio_only:
            ids = kwargs.get("input_ids") if inputs is None else inputs
            has_audio = kwargs.get("input_features") is not None or kwargs.get("past_key_values") is not None
            if ids is not None and not has_audio and (ids == self.config.audio_token_id).any():
                # `forward` cannot tell: it is given an empty cache, which a draft model in assisted decoding fills too
                raise ValueError("`input_ids` has audio tokens but there are no `input_features`.")
            if kwargs.pop("ctc_decoding_weight", None):
                raise ValueError(
                    "`ctc_decoding_weight` is for transcripts: pass `input_features` without `input_ids`, and to "
                    "`transcribe` no `language` and no `prompt`, which make a chat of it. What is written in a chat need "
                    "not be what is said."
                )
            return super().generate(inputs, generation_config, logits_processor, stopping_criteria, **kwargs)

        for name in (
            "input_ids",
            "inputs_embeds",
            "labels",
            "transcript_bytes",
            "teacher_states",
            "decoder_input_ids",
        ):
            kwargs.pop(name, None)
        mask = kwargs.pop("attention_mask", None)
        feature_mask = kwargs.pop("input_features_mask", None)
        features, mask = self.model._check_features(
            kwargs.pop("input_features"), mask if feature_mask is None else feature_mask
        )
        ctc_weight = self._ctc_decoding_weight(kwargs.pop("ctc_decoding_weight", None))
        features = features.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        input_ids, attention_mask = self._build_prompt(features, mask)
        prompt_length = input_ids.shape[1]

        num_frames = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(-1)
        budgets = self._audio_budgets(num_frames).to(input_ids.device)
        limit_is_asked = kwargs.get("max_new_tokens") is not None or kwargs.get("max_length") is not None
        generation_config, budgets = self._transcript_lengths(generation_config, kwargs, budgets)
        self._warn_if_too_long(prompt_length + generation_config.max_new_tokens)
        stopping_criteria = StoppingCriteriaList(
            [*(stopping_criteria or []), AudioBudgetCriteria(budgets, prompt_length)]
        )
        logits_processor = LogitsProcessorList(logits_processor or [])
        loops = None
        eos_ids = self._eos_token_ids(generation_config)
        end_ids = torch.tensor([self._pad_token_id(generation_config), *eos_ids], device=input_ids.device)
        num_copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        heard = {"input_features": features, "input_features_mask": mask}
        goes_on = self._may_go_on(generation_config, kwargs)
        if ctc_weight or (goes_on and num_copies > 1):
            states, cache = self._read_prompts(input_ids, attention_mask, features, mask, spells=ctc_weight > 0)
            if ctc_weight:
                scorer, table = self._ctc_scorer(input_ids, states), self.token_bytes.table
                logits_processor.append(CTCLogitsProcessor(scorer, table, ctc_weight, prompt_length, eos_ids, end_ids))
            if goes_on and isinstance(cache, DynamicCache):
                if num_copies > 1:  # by the way that caches of every kind of layer have
                    cache.reorder_cache(torch.arange(len(input_ids), device=self.device).repeat_interleave(num_copies))
                heard = {"past_key_values": cache}
            del states, cache
        if not generation_config.min_new_tokens:  # who asks for a number of tokens, as benchmarks do, gets it
            loops = RepetitionLoopCriteria(prompt_length, end_ids)
            stopping_criteria.append(loops)
            silent = self._silent_clips(features, mask)
            if silent is not None and eos_ids:
                eos = self.config.response_eos_token_id
                logits_processor.append(SilenceLogitsProcessor(silent, eos if eos in eos_ids else eos_ids[0]))

        output = super().generate(
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            attention_mask=attention_mask,
            **heard,
            **kwargs,
        )
        as_dict = not isinstance(output, torch.Tensor)
        transcripts = (output["sequences"] if as_dict else output)[:, prompt_length:]
        lengths = transcripts.shape[1] - torch.isin(transcripts, end_ids).flip(1).long().cumprod(1).sum(1)
        if not limit_is_asked and (lengths >= _per_row(budgets, len(lengths))).any():
            logger.warning_once(
                "A transcript reached the most tokens that its audio was given and was cut there. Pass `max_new_tokens`, "
                "or raise `config.max_text_tokens_per_second` or `generation_config.max_new_tokens`, if it was right."
            )
        if loops is not None:
            transcripts = self._cut_loops(transcripts, lengths, generation_config, loops)
        if as_dict:
            output["sequences"] = transcripts
            return output
        return transcripts

    def transcribe(self, audio, processor, **kwargs) -> Transcription:
        """The transcript of a recording of any length, with segments and their times; see
        [`~transcription_mel_llm.transcribe`], which takes the same arguments."""
        return transcribe(self, processor, audio, **kwargs)

    def _without_beams(self, generation_config: GenerationConfig | None, kwargs: dict) -> GenerationConfig | None:
        """A generation config without the beams of the checkpoint beside a streamer, which the library refuses with them."""
        own = self.generation_config.num_beams
        config = self.generation_config if generation_config is None else generation_config
        is_asked = kwargs.get("num_beams") is not None or config.num_beams not in (None, own)
        if is_asked or kwargs.get("streamer") is None or (own or 1) == 1:
            return generation_config
        config = copy.deepcopy(config)
        config.num_beams = 1
        return config

    def _ctc_decoding_weight(self, asked: float | None) -> float:
        """What the letters count in decoding; where nobody asked, what the checkpoint says.

        Raises:
            ValueError: It is out of range, or this model cannot be decoded with it.
        """
        # Not in the generation config, which drops what the library does not know
        weight = self.config.audio_config.ctc_decoding_weight if asked is None else asked
        if not isinstance(weight, Real) or not 0 <= weight <= 1:
            raise ValueError(f"`ctc_decoding_weight` must be from 0 to 1, got {weight!r}.")
        if not weight:
            return 0.0
        if self.ctc_head is None:
            raise ValueError(
                "`ctc_decoding_weight` needs a model with a CTC head, which `audio_config.ctc_weight` above 0 gives a new model."
            )
        if not self.token_bytes.table.any():
            raise ValueError(
                "`ctc_decoding_weight`: this checkpoint was made before such models knew the texts of their tokens. Set them, "
                "with the package mel_llm installed: `model.token_bytes.set(mel_llm.spelling.token_bytes("
                "processor.tokenizer, *model.token_bytes.table.shape))`."
            )
        return float(weight)

    def _read_prompts(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: torch.Tensor,
        mask: torch.Tensor | None,
        spells: bool = True,
    ) -> tuple[torch.Tensor | None, Cache | None]:
        """Reads the prompts up to their last token, which the library needs to go on from, once for all beams: the states below
        the CTC head, for one that `spells`, and the cache. Audio at the end of a prompt is read as well."""
        end = -1 if self.config.prompt_suffix_ids else None
        attention_mask = attention_mask[:, :end]
        outputs = self.model(
            input_ids=input_ids[:, :end],
            input_features=features,
            input_features_mask=mask,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            output_hidden_states=spells,
            return_dict=True,
        )
        return outputs.hidden_states[self.ctc_head.layer] if spells else None, outputs.past_key_values

    @torch.no_grad()
    def get_ctc_log_probs(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The letters that the CTC head hears, at `ctc_rate` places in each audio token: to align a text with its sound, or to see
        what is heard before a language model has made words of it. Ours.

        Args:
            input_features (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`), attention_mask: What the processor makes of
                audio alone.
            input_features_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): The mask by its other name.

        Returns:
            Log-probabilities `(batch, places, 256)`, of the bytes 1 to 255 and of the blank, 0; and `(batch,)`, the places that each
            clip has.

        Raises:
            ValueError: The model has no CTC head, or what the forward pass raises for features of the wrong shape.
        """
        if self.ctc_head is None:
            raise ValueError(
                "This model has no CTC head (`config.audio_config.ctc_weight` is 0), so it spells nothing."
            )
        mask = attention_mask if input_features_mask is None else input_features_mask
        input_features, mask = self.model._check_features(input_features, mask)
        input_features, mask = input_features.to(self.device), None if mask is None else mask.to(self.device)
        input_ids, attention_mask = self._build_prompt(input_features, mask)
        states, _ = self._read_prompts(input_ids, attention_mask, input_features, mask)
        return self._ctc_log_probs(input_ids, states)

    def _ctc_log_probs(self, input_ids: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the CTC head hears in each clip, and how many places it has, of what [`_read_prompts`] returns."""
        return self.ctc_head.log_probs(states, input_ids[:, : states.shape[1]] == self.config.audio_token_id)

    def _ctc_scorer(self, input_ids: torch.Tensor, states: torch.Tensor) -> CTCPrefixScorer:
        """The letters that the CTC head finds in each clip, of what [`_read_prompts`] returns."""
        return CTCPrefixScorer(*self._ctc_log_probs(input_ids, states))

    def _may_go_on(self, generation_config: GenerationConfig, kwargs: dict) -> bool:
        """Whether generation can begin with what was read: nothing is asked for that must see the whole prompt or keeps a cache of its
        own, and the last token of the prompt is none of audio, which would need its features and all on its right."""
        own = (
            *("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens", "guidance_scale"),
            *("assistant_early_exit", "use_mtp", "penalty_alpha", "dola_layers"),
        )
        beside = ("past_key_values", "assistant_model", "custom_generate", "negative_prompt_ids")
        return (
            bool(self.config.prompt_suffix_ids)
            and generation_config.use_cache is not False
            and not generation_config.output_hidden_states
            and not generation_config.output_attentions
            and not any(getattr(generation_config, name, None) for name in own)
            and all(kwargs.get(name) is None for name in beside)
        )

    def _transcript_lengths(
        self, generation_config: GenerationConfig | None, kwargs: dict, budgets: torch.LongTensor
    ) -> tuple[GenerationConfig, torch.LongTensor]:
        """A generation config whose limits count tokens of the transcript, and the budget of each clip under them.
        Takes what belongs to the config out of `kwargs`."""
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        # What it does not say is as the model's own says: the library would see to that, but later
        for name, value in self.generation_config.to_dict().items():
            if name not in _LENGTHS and not name.startswith("_") and getattr(config, name, None) is None:
                setattr(config, name, value)

        def argument(name: str, total_name: str) -> int | None:
            new, total = kwargs.pop(name, None), kwargs.pop(total_name, None)
            return total if new is None else new

        def configured(name: str, total_name: str) -> int | None:
            new = getattr(config, name)
            return getattr(config, total_name) if new is None else new

        asked = argument("max_new_tokens", "max_length")
        least = argument("min_new_tokens", "min_length")
        least = (configured("min_new_tokens", "min_length") if least is None else least) or 0
        if asked is not None:
            # Who names a number in the call knows better than a rate
            budgets = torch.full_like(budgets, max(asked, least))
        else:
            budgets = budgets.clamp(min=least, max=configured("max_new_tokens", "max_length"))
        config.max_new_tokens = int(budgets.max())
        config.min_new_tokens = least or None
        config.max_length = config.min_length = None
        # The library wants its arguments in the config or beside it, not in both
        rest = config.update(**kwargs)
        kwargs.clear()
        kwargs.update(rest)
        return config, budgets

    def _warn_if_too_long(self, num_tokens: int) -> None:
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and num_tokens > limit:
            logger.warning_once(
                f"Audio, prompt and transcript may need {num_tokens} tokens, but the language model was made for "
                f"{limit}. Cut the audio into shorter pieces, or expect errors in the transcript."
            )

    def _cut_loops(
        self,
        sequences: torch.LongTensor,
        lengths: torch.LongTensor,
        generation_config: GenerationConfig,
        loops: RepetitionLoopCriteria,
    ) -> torch.LongTensor:
        """Keeps the first round of a loop that a transcript was stopped in, and pads the rest away."""
        # Beams change places as they grow, so there it is not known which of them the criteria stopped
        stopped = loops.stopped if (generation_config.num_beams or 1) == 1 else None
        cut = sequences
        for row, length in enumerate(lengths.tolist()):
            # One that the model ended by itself is the model's word; one cut off by its length is not
            ended = stopped is not None and not stopped[row] and length < sequences.shape[1]
            if length < _LOOP_MIN_TOKENS or ended:
                continue
            tokens = sequences[row, :length]
            period = int(_loop_period(tokens[None]))
            if period:
                same = (tokens[period:] == tokens[:-period]).flip(0).long().cumprod(0).sum()
                cut = cut.clone() if cut is sequences else cut
                cut[row, length - int(same) :] = self._pad_token_id(generation_config)
        return cut

    def _pad_token_id(self, generation_config: GenerationConfig) -> int:
        pad = generation_config.pad_token_id
        return self.config.pad_token_id if pad is None else pad

    def _eos_token_ids(self, generation_config: GenerationConfig) -> list[int]:
        eos = generation_config.eos_token_id
        eos = self.config.eos_token_id if eos is None else eos
        return [] if eos is None else torch.as_tensor(eos).flatten().tolist()

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        # The library takes `main_input_name` for the sequence that grows. Ours names the features, because the
        # pipeline passes audio under it; what grows is `input_ids`.
        if inputs is None:
            inputs = model_kwargs.pop("input_ids", None)
        if model_kwargs.get("inputs_embeds") is not None:
            model_kwargs["input_ids"] = self._maybe_initialize_input_ids_for_generation(
                inputs, bos_token_id, model_kwargs
            )
            return model_kwargs["inputs_embeds"], "inputs_embeds", model_kwargs
        model_kwargs.pop("inputs_embeds", None)
        inputs = self._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)
        return inputs, "input_ids", model_kwargs

    def _prepare_generated_length(self, generation_config, has_default_max_length, **kwargs):
        # The Seq2SeqTrainer leaves a `max_length` in the model's generation config. `max_new_tokens` wins over it, as it
        # should, and a warning at every evaluation step helps nobody.
        has_default_max_length = has_default_max_length or generation_config.max_new_tokens is not None
        return super()._prepare_generated_length(
            generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The library repeats every tensor row by row, but clips are not rows: a text may have several or none. Each of
        # its copies needs all of its clips, in their order.
        features = model_kwargs.pop("input_features", None)
        mask = model_kwargs.pop("input_features_mask", None)
        if features is not None and expand_size > 1:
            if input_ids is None:
                raise ValueError("Beams and several return sequences need `input_ids` to tell whose audio is whose.")
            num_frames = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(-1)
            ends = self.config.audio_config.num_audio_tokens(num_frames).cumsum(0).to(input_ids.device)
            row_ends = (input_ids == self.config.audio_token_id).sum(-1).cumsum(0)
            row_of_clip = torch.searchsorted(row_ends, ends)  # the row in whose audio tokens the clip ends
            clips = [torch.where(row_of_clip == row)[0].repeat(expand_size) for row in range(len(input_ids))]
            index = torch.cat(clips).to(features.device)
            features = features[index]
            mask = None if mask is None else mask[index.to(mask.device)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            model_kwargs.update(input_features=features, input_features_mask=mask)
        return input_ids, model_kwargs

    def _get_candidate_generator(self, *args, model_kwargs, assistant_model=None, **kwargs):
        # A draft model that only knows text reads the transcript so far, and placeholders where the audio is
        if assistant_model is not None and getattr(assistant_model, "main_input_name", None) != self.main_input_name:
            audio = ("input_features", "input_features_mask")
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in audio}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if self.config.audio_config.bidirectional_attention and model_inputs.get("input_features") is not None:
            # For a static cache the mask is already a causal one here; the model needs to make its own, with audio
            # attended to both ways, from the mask of padding.
            model_inputs["attention_mask"] = attention_mask
        return model_inputs


__all__ = ["AudioBudgetCriteria", "MelLLMGenerationMixin", "RepetitionLoopCriteria", "SilenceLogitsProcessor"]
