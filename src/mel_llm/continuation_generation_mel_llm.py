"""Going on with a spoken prompt: text until its end, then speech, in one call and with one cache.

The order of the two is SPECTRON's (arXiv 2305.15255): the transcript of the prompt and the text of what follows come first,
and the speech is made from them. `skip_text=True` leaves them out, the comparison that the paper lacks. The loops are those of
reading (transformers' own) and of speaking; everything but the order is ours.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .generation_mel_llm import AudioBudgetCriteria, RepetitionLoopCriteria
from .speech_generation_mel_llm import SpeechStream, _SpeechOptions


logger = logging.get_logger(__name__)

_SPEECH_ARGUMENTS = ("temperature", "max_seconds", "min_seconds", "stop_threshold", "seed", "streamer")
TASKS = ("continuation", "qa")


@dataclass
class MelLLMContinuationGenerationOutput(ModelOutput):
    r"""
    Args:
        sequences (`torch.Tensor` of shape `(batch, tokens)`): The text of each row with its end, padded on the right; no
            tokens with `skip_text`.
        transcript (`list[torch.Tensor | None]`): Token ids `(tokens,)` of what is said in the prompt, where the model wrote
            `config.separator_ids` behind it; None where not, and `sequences` has all.
        continuation (`list[torch.Tensor | None]`): The same of what follows it.
        audio (`list[torch.Tensor]`): The waveform of what follows, `(samples,)`, float32; None for a model without a vocoder
            or with `return_text_only`.
        spectrogram (`list[torch.Tensor]`): Its log-mel frames, `(frames, num_mel_bins)`, in the feature extractor's units.
        stopped (`list[bool]`): Whether the model ended the speech by itself, and no guard did.
    """

    sequences: torch.Tensor | None = None
    transcript: list | None = None
    continuation: list | None = None
    audio: list | None = None
    spectrogram: list | None = None
    stopped: list | None = None


class MelLLMContinuationGenerationMixin:
    """`generate` for a Mel-LLM that goes on with what it hears; see [`MelLLMForSpeechContinuation`]."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """Goes on with a recording, or answers it: in text, then in speech.

        Without `input_features` it speaks `input_ids`, as [`MelLLMForTextToSpeech.generate`] does; with
        `task="transcribe"` it reads, as [`MelLLMForSpeechSeq2Seq.generate`] does, with that method's arguments.

        Args:
            input_features (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): What is heard; also the first
                positional argument.
            attention_mask or input_features_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 0 for padding on
                the right.
            input_ids (`torch.Tensor` of shape `(batch, tokens)`, *optional*): A prompt of your own with the places of the
                audio, and its `attention_mask`; then the frames' mask is `input_features_mask` alone.
            task (`str`, defaults to `"continuation"`): `"qa"` takes the config's prompt for spoken questions.
            return_text_only (`bool`, defaults to `False`): Write no speech.
            skip_text (`bool`, defaults to `False`): Go to the speech at once. A model does it as well as it was trained to,
                by examples without text.
            max_new_tokens (`int`, *optional*): The most tokens of text. By default
                `config.max_text_tokens_per_second` times the duration of prompt and continuation, and 16; at most
                `generation_config.max_new_tokens`.
            do_sample (`bool`, defaults to `False`): Draw the text instead of taking the likeliest token, with
                `text_temperature`, `top_k` and `top_p`.
            temperature (`float`, defaults to 1.0): Scales the variance of the speech's latent (a deterministic head has
                none), and that of a drawn text.
            text_temperature (`float`, *optional*): Of the text, if it is to be another.
            max_seconds, min_seconds (`float`, *optional*): Limits of the speech's duration. By default the longest is 2
                seconds and one for each `config.speech_config.min_tokens_per_second` tokens of what follows (of all text,
                where the model did not say what follows), and `config.audio_config.max_audio_seconds` with `skip_text`.
            stop_threshold (`float`, defaults to 0.5): Probability of the end at which the speech ends.
            seed (`int` or `list[int]`, *optional*): Makes what is drawn repeatable for each row, in any batch.
            text_streamer (*optional*): Of a single row: gets its token ids while they are written, first the prompt's as
                transformers' streamers expect: `TextStreamer(processor.tokenizer, skip_prompt=True)`.
            streamer (*optional*): Of a single row: gets its waveform piece by piece, `put((samples,))`, and `end()`.

        Returns:
            [`MelLLMContinuationGenerationOutput`]. A silent prompt (see `config.audio_config.silence_threshold`) has neither
            text nor speech, and a warning says so.

        Raises:
            ValueError: A prompt is shorter than one audio token or has no room in the language model, or an argument is
                unknown or out of range.
            RuntimeError: The model wrote NaN or infinity.
        """
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
            inputs, kwargs["input_features"] = None, inputs
        task = kwargs.pop("task", None)
        if task is None and kwargs.get("labels") is not None and kwargs.get("spectrogram_labels") is None:
            task = "transcribe"  # a batch of reading, whole, as `Seq2SeqTrainer` passes it
        if task == "transcribe" or kwargs.get("input_features") is None:
            if task in TASKS:
                raise ValueError(f"`task={task!r}` needs `input_features`: a recording to go on from.")
            return super().generate(inputs, generation_config, **kwargs)

        for name in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p"):
            value = getattr(generation_config, name, None)
            if value is not None and value != getattr(self.generation_config, name, None):
                kwargs.setdefault(name, value)
        features, mask, input_ids, prompt_mask = self._continuation_prompt(
            kwargs.pop("input_ids", None) if inputs is None else inputs,
            kwargs.pop("attention_mask", None),
            kwargs.pop("input_features"),
            kwargs.pop("input_features_mask", None),
            "continuation" if task is None else task,
        )
        options = _ContinuationOptions.take(kwargs)
        self._check_vocoder()
        if len(input_ids) != 1 and (options.speech.streamer is not None or options.text_streamer is not None):
            raise ValueError(
                f"`streamer` and `text_streamer` take one row at a time, got a batch of {len(input_ids)}."
            )
        seeds = options.speech.seeds(len(input_ids))
        self._check_prompt(features, mask, input_ids, prompt_mask)

        silent = self._silent_clips(features, mask) if len(features) == len(input_ids) else None
        if silent is None:
            return self._go_on(features, mask, input_ids, prompt_mask, seeds, options)
        logger.warning(
            f"{int(silent.sum())} of {len(silent)} prompts are silent: there is nothing to go on from, so they get neither "
            "text nor speech."
        )
        heard = (~silent).nonzero()[:, 0]
        output = None
        if len(heard):
            seeds = [seeds[row] for row in heard.tolist()]
            mask = None if mask is None else mask[heard]
            output = self._go_on(features[heard], mask, input_ids[heard], prompt_mask[heard], seeds, options)
        return self._with_empty_rows(output, heard.tolist(), len(silent), options)

    # --- the prompt -------------------------------------------------------------------------------------------------

    def _continuation_prompt(self, input_ids, attention_mask, input_features, input_features_mask, task: str):
        """Checked features with their mask, and the prompt with its own: the config's, or the caller's."""
        around = self._prompt_of(task)
        if input_ids is None and input_features_mask is None:
            input_features_mask = attention_mask
        features, mask = self.model._check_features(input_features, input_features_mask)
        features = features.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        if input_ids is None:
            return features, mask, *self._build_prompt(features, mask, around)
        input_ids = input_ids.to(self.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}. What masks the audio is `input_features_mask`."
            )
        return features, mask, input_ids, attention_mask.to(self.device).long()

    def _prompt_of(self, task: str) -> tuple[list[int], list[int]]:
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {', '.join(map(repr, TASKS))}, got {task!r}.")
        config = self.config
        if task == "qa":
            return config.qa_prefix_ids, config.qa_suffix_ids
        return config.continuation_prefix_ids, config.continuation_suffix_ids

    def _check_prompt(self, features, mask, input_ids, prompt_mask) -> None:
        """What cannot be gone on from is refused, and what the model does not know is told, before any work."""
        audio = self.config.audio_config
        lengths = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(-1)
        shortest, longest = int(lengths.min()), int(lengths.max()) / audio.frame_rate
        if shortest < audio.reduction_factor:
            raise ValueError(
                f"`input_features`: row {int(lengths.argmin())} has {shortest / audio.frame_rate:.3f} s of audio, less than one "
                f"audio token ({audio.reduction_factor / audio.frame_rate:.3f} s): there is nothing to go on from. Give it a "
                "second or more."
            )
        if longest > audio.max_audio_seconds:
            logger.warning_once(
                f"A prompt has {longest:.1f} s, but the model was trained on at most {audio.max_audio_seconds:g} s: expect "
                f"errors, or pass its last {audio.max_audio_seconds:g} s alone."
            )
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        num_tokens = int(prompt_mask.sum(-1).max())
        if limit is not None and num_tokens + 3 > limit:
            raise ValueError(
                f"The prompt has {num_tokens} tokens, but the language model was made for {limit}: there is no room for text "
                "or speech behind it. Take the last seconds of it alone."
            )

    # --- text, then speech ------------------------------------------------------------------------------------------

    def _go_on(self, features, mask, input_ids, prompt_mask, seeds, options: "_ContinuationOptions"):
        batch_size = len(input_ids)
        if options.skip_text:
            text = torch.full((batch_size, 0), -100, dtype=torch.long, device=input_ids.device)
            sequences = text
            begun = self._prefill_speech(features, mask, input_ids, prompt_mask, text)
        else:
            sequences, text, cache = self._write_text(features, mask, input_ids, prompt_mask, seeds, options)
        transcripts, continuations = zip(*[self._split(row[row != -100]) for row in text], strict=True)
        output = MelLLMContinuationGenerationOutput(
            sequences=sequences, transcript=list(transcripts), continuation=list(continuations)
        )
        if options.return_text_only:
            return output
        if not options.skip_text:
            ends = self._with_ends(text, sequences)
            begun = self._begin_speech(features, mask, input_ids, prompt_mask, text, ends, cache)

        parts = [row if part is None else part for row, part in zip(text, continuations, strict=True)]
        num_tokens = torch.stack([(part != -100).sum() for part in parts])
        speech = options.speech
        if options.skip_text and speech.max_seconds is None:
            num_tokens = num_tokens + self.config.audio_config.max_audio_seconds * (
                self.config.speech_config.min_tokens_per_second
            )
        # As with a voice: not all that is written need be spoken, so that nothing is known of the shortest
        least, most = speech.patch_limits(num_tokens, torch.ones_like(num_tokens), self._patch_seconds, self.config)
        most = most.clamp(max=self._room(int(begun[2].sum(-1).max())))
        least = torch.minimum(least, most)
        chance = self._chance(speech, seeds)
        sink = None if speech.streamer is None else SpeechStream(self, speech.streamer)
        frames, lengths, stopped = self._write_on(*begun, None, (least, most), chance, speech, sink)
        output.spectrogram, output.audio = self._finish_speech(frames, lengths, stopped, sink)
        output.stopped = stopped
        return output

    def _write_text(self, features, mask, input_ids, prompt_mask, seeds, options: "_ContinuationOptions"):
        """What the model wrote `(B, G)`, its text alone, padded with -100 `(B, G)`, and the cache, which has all but the last
        token."""
        num_prompt, device = input_ids.shape[1], input_ids.device
        budgets = self._text_budgets(features, mask, input_ids, prompt_mask, options)
        eos_ids = self._eos_token_ids(self.generation_config)
        end_ids = torch.tensor([self._pad_token_id(self.generation_config), *eos_ids], device=device)
        loops = RepetitionLoopCriteria(num_prompt, end_ids)
        processors = LogitsProcessorList()
        if options.do_sample:
            processors.append(_SeededSampling(seeds, options))
        cache = DynamicCache(config=self.config.text_config)
        sequences = super().generate(
            input_ids,
            attention_mask=prompt_mask,
            input_features=features,
            input_features_mask=mask,
            past_key_values=cache,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([AudioBudgetCriteria(budgets, num_prompt), loops]),
            streamer=options.text_streamer,
            # Drawing is a processor's affair here, so that a row's text does not depend on the others'
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=False,
            max_new_tokens=int(budgets.max()),
        )[:, num_prompt:]

        def lengths_of(rows: torch.Tensor) -> torch.Tensor:
            return rows.shape[1] - torch.isin(rows, end_ids).flip(1).long().cumprod(1).sum(1)

        sequences = self._cut_loops(sequences, lengths_of(sequences), self.generation_config, loops)
        places = torch.arange(sequences.shape[1], device=device)
        text = sequences.masked_fill(places >= lengths_of(sequences)[:, None], -100)
        return sequences, text, cache

    def _text_budgets(self, features, mask, input_ids, prompt_mask, options: "_ContinuationOptions") -> torch.Tensor:
        """The most tokens of text of each row, `(B,)`."""
        audio = self.config.audio_config
        if options.max_new_tokens is not None:
            budgets = torch.full((len(input_ids),), options.max_new_tokens, device=input_ids.device)
        else:
            num_frames = (input_ids == self.config.audio_token_id).sum(-1) * audio.reduction_factor
            seconds = options.speech.max_seconds or audio.max_audio_seconds
            budgets = self._audio_budgets(num_frames + round(seconds * audio.frame_rate))
            budgets = budgets.clamp(max=self.generation_config.max_new_tokens)
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None:  # with the end of text, "begin", and a patch
            budgets = torch.minimum(budgets, (limit - 3 - prompt_mask.sum(-1)).clamp(min=1))
        return budgets

    def _with_ends(self, text: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        """The token that ends each row's text, `(B, 1)`: the one that it wrote, or the usual one; -100 if there is none."""
        lengths = (text != -100).sum(-1, keepdim=True)
        usual = self.config.response_eos_token_id
        ends = torch.full_like(lengths, -100 if usual is None else usual)
        written = sequences.gather(1, lengths.clamp(max=sequences.shape[1] - 1))
        eos_ids = torch.tensor(self._eos_token_ids(self.generation_config), device=text.device)
        return torch.where((lengths < sequences.shape[1]) & torch.isin(written, eos_ids), written, ends)

    def _begin_speech(self, features, mask, input_ids, prompt_mask, text, ends, cache):
        """Goes on from the text's cache with what it lacks: the last token, the end of text and "begin". Returns what
        [`_prefill_speech`] does.

        Rows whose text ended before that of others have been fed padding, which is masked. Where that does not undo it, in
        windows and recurrent states, the sequence is read again without.
        """
        num_cached = text.shape[1] - 1
        lengths = (text != -100).sum(-1)
        ids = torch.cat([text[:, num_cached:], ends], dim=1)
        feed_mask = torch.cat([ids != -100, torch.ones_like(ends, dtype=torch.bool)], dim=1)
        keep = feed_mask.any(0)
        read = torch.arange(num_cached, device=text.device) < lengths[:, None]
        full = torch.cat([prompt_mask.bool(), read, feed_mask[:, keep]], dim=1).long()
        has_holes = not bool(full[:, input_ids.shape[1] :].all())
        is_plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        if has_holes and not is_plain:
            return self._prefill_speech(features, mask, input_ids, prompt_mask, torch.cat([text, ends], dim=1))
        embeds = self.get_input_embeddings()(ids.clamp(min=0))
        begin = self.speech_head.begin.to(embeds.dtype).expand(len(ids), 1, -1)
        embeds = torch.cat([embeds, begin], dim=1)[:, keep]
        position_ids = (full.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=None if bool(full.all()) else full,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1], position_ids[:, -1:], full, cache

    def _prefill_speech(self, features, mask, input_ids, prompt_mask, text):
        """Reads prompt, text and "begin". Returns the state at "begin" `(B, D)`, its position `(B, 1)`, the mask of what the
        cache has `(B, S)`, and the cache."""
        cache = DynamicCache(config=self.config.text_config)
        history = self.speech_head.begin.new_zeros(len(text), 0, self.config.text_config.hidden_size)
        speech_mask = torch.ones(len(text), 1, dtype=torch.bool, device=text.device)
        states, _, full, positions = self._closed_up_states(
            features, mask, input_ids, prompt_mask, text, history, speech_mask, cache
        )
        return states[:, -1], positions[:, -1:], full, cache

    def _split(self, text: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What stands before and behind the first separator in a row's text `(n,)`; None for both without one."""
        separator = self.config.separator_ids
        ids, size = text.tolist(), len(separator)
        for place in range(len(ids) - size + 1 if size else 0):
            if ids[place : place + size] == separator:
                return text[:place], text[place + size :]
        return None, None

    def _with_empty_rows(self, output, heard: list[int], batch_size: int, options: "_ContinuationOptions"):
        """The output of some rows, with nothing in the place of the others."""
        bins, device = self.config.audio_config.num_mel_bins, self.device
        silence = torch.zeros(0, device=device)
        has_audio = self.vocoder is not None and not options.return_text_only
        if output is None:
            for streamer in (options.text_streamer, options.speech.streamer):
                if streamer is not None:
                    streamer.end()
            output = MelLLMContinuationGenerationOutput(
                sequences=torch.zeros(0, 0, dtype=torch.long, device=device), transcript=[], continuation=[]
            )
        pad = self._pad_token_id(self.generation_config)
        sequences = output.sequences.new_full((batch_size, output.sequences.shape[1]), pad)
        sequences[heard] = output.sequences

        def spread(rows: list | None, empty) -> list:
            full = [empty] * batch_size
            for place, row in zip(heard, rows or [], strict=True):
                full[place] = row
            return full

        spoken = not options.return_text_only
        return MelLLMContinuationGenerationOutput(
            sequences=sequences,
            transcript=spread(output.transcript, None),
            continuation=spread(output.continuation, None),
            audio=spread(output.audio, silence) if has_audio else None,
            spectrogram=spread(output.spectrogram, torch.zeros(0, bins, device=device)) if spoken else None,
            stopped=spread(output.stopped, True) if spoken else None,
        )


class _SeededSampling(LogitsProcessor):
    """Draws the next token of each row with a generator of its own: noise is added that makes the greatest score a draw
    (Gumbel), so a row's text is that which it is alone."""

    def __init__(self, seeds: list[int], options: "_ContinuationOptions"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        if options.text_temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(options.text_temperature))
        if options.top_k is not None:
            self.warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None:
            self.warpers.append(TopPLogitsWarper(options.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = self.warpers(input_ids, scores.float())
        rows = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(rows).log().to(scores.device)


@dataclass
class _ContinuationOptions:
    """The arguments of `generate`, checked."""

    speech: _SpeechOptions
    return_text_only: bool = False
    skip_text: bool = False
    max_new_tokens: int | None = None
    do_sample: bool = False
    text_temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    text_streamer: object = None

    @classmethod
    def take(cls, kwargs: dict) -> "_ContinuationOptions":
        def number(name: str, kind, least, most, expected: str):
            value = kwargs.pop(name, None)
            if value is None:
                return None
            if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
            return value

        temperature = kwargs.get("temperature")
        for name in ("labels", "spectrogram_labels", "use_cache", "return_dict_in_generate"):
            kwargs.pop(name, None)  # of a training batch, or what is so anyway
        speech = _SpeechOptions.take({name: kwargs.pop(name, None) for name in _SPEECH_ARGUMENTS})
        options = cls(
            speech,
            return_text_only=bool(kwargs.pop("return_text_only", False)),
            skip_text=bool(kwargs.pop("skip_text", False)),
            max_new_tokens=number("max_new_tokens", Integral, 1, math.inf, "a whole number of at least 1"),
            do_sample=bool(kwargs.pop("do_sample", False)),
            top_k=number("top_k", Integral, 1, math.inf, "a whole number of at least 1"),
            top_p=number("top_p", Real, 1e-6, 1.0, "a number from 0 to 1"),
            text_streamer=kwargs.pop("text_streamer", None),
        )
        own = number("text_temperature", Real, 0.0, 1e6, "a number of at least 0")
        options.text_temperature = float(own if own is not None else 1.0 if temperature is None else temperature)
        if options.text_temperature == 0.0:
            options.do_sample = False
        if options.return_text_only and options.skip_text:
            raise ValueError("`return_text_only` and `skip_text` leave nothing to be written: pass one of them.")
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise ValueError(
                f"generate() of a continuation does not know the arguments {', '.join(unknown)}. For several takes of a "
                'prompt, repeat it in the batch; what reading takes goes with `task="transcribe"`.'
            )
        return options


__all__ = ["MelLLMContinuationGenerationMixin", "MelLLMContinuationGenerationOutput"]
