"""Speaking: the loop that writes mel patches, with its guards, and audio as it is made.

The loop is not transformers' own, which chooses among tokens. Everything here is ours but the stop rule (sigmoid > 0.5,
MELLE) and the dropout on the history, which stays on (paper).
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging


logger = logging.get_logger(__name__)

# A longest duration that fits any text: this, and a rate per token from the config
_MAX_SECONDS_CONSTANT = 2.0
_MAX_SECONDS = 86_400.0
# No sentence has more; a text that has would be spoken for a quarter of an hour in one go
MAX_TEXT_TOKENS = 2048
_LONG_TEXT = "Speak it sentence by sentence, with `mel_llm.iter_speech` or the command `mel-llm speak`"
# Random numbers are drawn for so many steps at a time: their number must not depend on the batch or on what is said
_DRAWN_STEPS = 16
# A stream's vocoder gets each patch until it is heard, then so many frames, twice as many each time, and at most ...
_FIRST_PUSH_FRAMES = 8
_MOST_PUSH_FRAMES = 64
# Speech that has been loud (mean level over bins above this, in deviations from the training data's mean) ...
_LOUD_LEVEL = 0.0
# ... is silent below this, and this much of a silence that was too long is kept
_SILENT_LEVEL = -1.0
_KEPT_SILENCE_SECONDS = 0.3


@dataclass
class MelLLMSpeechGenerationOutput(ModelOutput):
    r"""
    Args:
        audio (`list[torch.Tensor]`): The waveform of each text, `(samples,)`, float32; None for a model without a
            vocoder.
        spectrogram (`list[torch.Tensor]`): Its log-mel frames, `(frames, num_mel_bins)`, in the feature extractor's
            units.
        stopped (`list[bool]`): Whether the model ended the speech by itself, and no guard did.
    """

    audio: list | None = None
    spectrogram: list | None = None
    stopped: list | None = None


class MelLLMSpeechGenerationMixin:
    """`generate` for a Mel-LLM that speaks; see [`MelLLMForTextToSpeech`]."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """Speaks `input_ids`; given audio, reads it as [`MelLLMForSpeechSeq2Seq.generate`] does.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`): The text to speak, without any prompt.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 for padding.
            voice_features (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`, *optional*): Log-mel frames of a
                recording whose voice is to go on. `input_ids` must then begin with what is said in it, as
                [`MelLLMProcessor.apply_speech_request`] writes them.
            voice_features_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 0 for padding on the right.
            temperature (`float`, defaults to 1.0): Scales the variance of the latent; 0 takes the mean.
            max_seconds, min_seconds (`float`, *optional*): Limits of the duration. By default the longest is 2 seconds
                and one for each `config.speech_config.min_tokens_per_second` tokens, and the shortest that of a text
                read at `config.max_text_tokens_per_second`.
            max_new_tokens (`int`, *optional*): The most patches. (The model's own generation config, which is about
                text, has no say here.)
            do_sample (`bool`, *optional*): `False` is `temperature=0`.
            stop_threshold (`float`, defaults to 0.5): Probability of the end at which the speech ends.
            seed (`int` or `list[int]`, *optional*): Makes the speech of each text repeatable, in any batch; of one for
                all texts, or one for each. Without, each text has another, and so has each take of one.
            streamer (*optional*): Gets the waveform of a single text piece by piece, `put((samples,))`, and `end()`.
            return_dict_in_generate (`bool`, defaults to `False`): Return a [`MelLLMSpeechGenerationOutput`].

        Returns:
            Waveforms `(batch, samples)`, zero behind their ends; or the dict.

        Raises:
            ValueError: There is no text, the text has more than 2048 tokens or is with the voice too long for the language
                model (see [`iter_speech`]), or an argument is unknown or out of range.
            RuntimeError: The model wrote NaN or infinity.
        """
        is_audio = isinstance(inputs, torch.Tensor) and inputs.is_floating_point()
        if is_audio or kwargs.get("input_features") is not None or kwargs.get("inputs_embeds") is not None:
            return super().generate(inputs, generation_config, **kwargs)
        self._take_from(generation_config, kwargs)
        options = _SpeechOptions.take(kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        attention_mask = kwargs.pop("attention_mask", None)
        voice, voice_mask = kwargs.pop("voice_features", None), kwargs.pop("voice_features_mask", None)
        unknown = sorted(name for name, value in kwargs.items() if value is not None and name != "use_cache")
        if unknown:
            raise ValueError(
                f"generate() of speech does not know the arguments {', '.join(unknown)}. For several takes of a text, repeat it "
                "in the batch."
            )
        self._check_text(input_ids, attention_mask)
        self._check_vocoder()
        if options.streamer is not None and len(input_ids) != 1:
            raise ValueError(f"`streamer` takes one text at a time, got a batch of {len(input_ids)}.")
        sink = None if options.streamer is None else SpeechStream(self, options.streamer)
        frames, lengths, stopped = self._write_patches(input_ids, attention_mask, voice, voice_mask, options, sink)
        rows, audio = self._finish_speech(frames, lengths, stopped, sink)
        if options.return_dict:
            return MelLLMSpeechGenerationOutput(audio=audio, spectrogram=rows, stopped=stopped)
        if audio is None:
            raise ValueError(
                "This model has no vocoder (`config.vocoder_config` is None), so it makes no waveform. Pass "
                "`return_dict_in_generate=True` for the spectrogram."
            )
        return torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)

    def _finish_speech(self, frames, lengths, stopped: list[bool], sink) -> tuple[list, list | None]:
        """What [`_write_on`] wrote to log-mel frames of each row, and its waveform where there is a vocoder."""
        if not torch.isfinite(frames).all():
            raise RuntimeError(
                f"The model wrote a spectrogram with NaN or infinity in it; its weights are {self.dtype}. Try float32."
            )
        if not all(stopped):
            logger.warning_once(
                "The model did not end all speech by itself: a limit of the time or of silence did. See `stopped` of "
                "`generate(..., return_dict_in_generate=True)`."
            )
        if sink is not None:
            spectrogram, audio = sink.finish(int(lengths[0]))
        else:
            spectrogram = self._finish_spectrogram(frames, lengths)
            audio = None if self.vocoder is None else self._to_audio(spectrogram, lengths)
        return [row[: int(length)] for row, length in zip(spectrogram, lengths, strict=True)], audio

    def _take_from(self, generation_config, kwargs: dict) -> None:
        """What a caller's own config says about speech. The model's is about text, as far as it says the same."""
        said = {
            name: getattr(generation_config, name, None) for name in ("max_new_tokens", "temperature", "do_sample")
        }
        if said["do_sample"] is False and said["temperature"] == 1.0:
            # The library's defaults, which the pipelines of its older versions write out (5.16 did): nobody asked for them
            said["do_sample"] = said["temperature"] = None
        for name, value in said.items():
            if value is not None and value != getattr(self.generation_config, name, None):
                kwargs.setdefault(name, value)

    def _check_vocoder(self) -> None:
        audio = self.config.audio_config
        wanted = (audio.sampling_rate, audio.hop_length, audio.num_mel_bins)
        if self.vocoder is None:
            return
        extractor = self.vocoder.extractor
        there = (extractor.sampling_rate, extractor.hop_length, extractor.feature_size)
        if there != wanted:
            raise ValueError(
                f"`model.vocoder` is for {there[0]} Hz, a hop of {there[1]} samples and {there[2]} mel bins, but the model writes "
                f"{wanted[0]} Hz, {wanted[1]} and {wanted[2]}: it needs a vocoder for its own features."
            )

    def _check_text(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError("There is no text to speak: `input_ids` must be (batch, tokens) with at least one token.")
        if attention_mask is not None and (attention_mask.sum(-1) == 0).any():
            raise ValueError("There is no text to speak in one of the rows of `input_ids`.")
        if input_ids.shape[1] > MAX_TEXT_TOKENS:
            raise ValueError(
                f"The text has {input_ids.shape[1]} tokens, more than the {MAX_TEXT_TOKENS} that are spoken in one go. "
                f"{_LONG_TEXT}."
            )

    def _write_patches(self, input_ids, attention_mask, voice, voice_mask, options: "_SpeechOptions", sink):
        """Speaks a text: see [`_write_on`] for what is returned."""
        device = self.device
        input_ids = input_ids.to(device)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
        text, mask = self._speech_prompt(input_ids, attention_mask)
        batch_size, num_tokens = len(text), attention_mask.sum(-1)
        chance = self._chance(options, options.seeds(batch_size))

        history, previous, num_voice = self._voice_history(voice, voice_mask, batch_size, chance.for_voice())
        begin = self.speech_head.begin.expand(batch_size, 1, -1)
        embeds = self.get_input_embeddings()(text)
        inputs_embeds = torch.cat([embeds, begin.to(embeds.dtype), history.to(embeds.dtype)], dim=1)
        places = torch.arange(history.shape[1], device=device)
        mask = torch.cat([mask, mask.new_ones(batch_size, 1), (places < num_voice[:, None]).to(mask.dtype)], dim=1)
        least, most = options.patch_limits(num_tokens, num_voice, self._patch_seconds, self.config)
        most = most.clamp(max=self._room(int(mask.sum(-1).max())))

        cache = DynamicCache(config=self.config.text_config)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        last = text.shape[1] + num_voice
        hidden = outputs.last_hidden_state[torch.arange(batch_size, device=device), last]
        position = position_ids.gather(1, last[:, None])
        return self._write_on(hidden, position, mask, cache, previous, (least, most), chance, options, sink)

    @property
    def _patch_seconds(self) -> float:
        return self.speech_head.reduction_factor / self.config.audio_config.frame_rate

    def _chance(self, options: "_SpeechOptions", seeds: list[int]) -> "_Chance":
        return _Chance(self, seeds, self.speech_head.is_random and options.temperature > 0)

    def _write_on(self, hidden, position, mask, cache, previous, limits, chance, options: "_SpeechOptions", sink):
        """Writes patches behind a sequence whose keys and values are in `cache`.

        Args:
            hidden: `(B, D)`, the state that predicts the first patch.
            position: `(B, 1)`, where that state stands.
            mask: `(B, size)`, 0 for what of the cache is padding.
            previous: `(B, r, F)`, the patch before the first, or None.
            limits: The fewest and the most patches of each row, both `(B,)`.

        Returns:
            Frames `y'` `(B, T, F)`, normalised, how many of each row count, and whether the model ended it itself.
        """
        least, most = limits
        batch_size, device, most_steps = len(hidden), hidden.device, int(most.max())
        dtype = self.get_input_embeddings().weight.dtype
        # One mask for all steps; without padding there is none, which saves making one for each layer type and step
        is_padded = not bool(mask.all())
        size = mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(batch_size, most_steps)], dim=1) if is_padded else None
        ended = torch.zeros(batch_size, dtype=torch.bool, device=device)
        by_itself = ended.clone()
        lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        silence = _SilenceGuard(batch_size, self.config.speech_config.max_silence_seconds, self._patch_seconds, device)
        patches: list[torch.Tensor] = []
        for step in range(most_steps):
            stop = torch.sigmoid(self.speech_head.stop(hidden)[:, 0].float()) > options.stop_threshold
            stop &= (step >= least) & ~ended
            by_itself |= stop
            ended |= stop | (step >= most)
            noise, kept = chance.draw()
            # Also where all have ended just now: that patch counts nowhere, and the device is asked once a step only
            patch = self.speech_head.sample(hidden, noise, options.temperature).float()
            patches.append(patch)
            lengths += ~ended
            speaks = ~ended
            ended |= silence.is_over(patch, ended)
            if sink is not None and speaks[0]:
                sink.put(patch[0], is_surplus=int(silence.silent[0]) > silence.kept)
            if step + 1 == most_steps or ended.all():
                break
            token = self._embed_patch(patch, previous)
            token = token if kept is None else token * kept.to(token.dtype)
            previous = patch
            position = position + 1
            size += 1
            outputs = self.model.language_model(
                inputs_embeds=token.to(dtype),
                attention_mask=mask[:, :size] if is_padded else None,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            hidden = outputs.last_hidden_state[:, -1]
        r = self.speech_head.reduction_factor
        lengths = (lengths - silence.surplus()).clamp(min=1) * r
        frames = torch.stack(patches, dim=1).flatten(1, 2)
        return frames[:, : int(lengths.max())], lengths, by_itself.tolist()

    def _room(self, num_tokens: int) -> int:
        """How many patches the language model has positions for."""
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is None:
            return 1 << 30
        if num_tokens >= limit:
            raise ValueError(
                f"Text and voice have {num_tokens} tokens, but the language model was made for {limit}. {_LONG_TEXT}, or "
                "take a shorter voice."
            )
        return limit - num_tokens

    def _voice_history(self, voice, voice_mask, batch_size: int, generators):
        """Tokens of the voice prompt, its last patch for the stem's context, and how many tokens each row has."""
        if voice is None:
            empty = self.speech_head.begin.new_zeros(batch_size, 0, self.config.text_config.hidden_size)
            return empty, None, torch.zeros(batch_size, dtype=torch.long, device=self.device)
        voice, voice_mask = self.model._check_features(voice.to(self.device), voice_mask)
        r = self.speech_head.reduction_factor
        num_frames = torch.full((len(voice),), voice.shape[1]) if voice_mask is None else voice_mask.sum(-1)
        num_patches = num_frames.to(self.device) // r  # whole patches only: what follows must not begin inside one
        if len(voice) != batch_size or (num_patches == 0).any():
            raise ValueError(
                f"`voice_features` must have a row for each of {batch_size} texts, with at least {r} frames in each, got "
                f"{tuple(voice.shape)}."
            )
        frames = self.normalize(voice)
        history = self._embed_history(frames, num_patches * r, generators)[:, : int(num_patches.max())]
        patches = frames[:, : history.shape[1] * r].unflatten(1, (-1, r))
        previous = patches[torch.arange(batch_size, device=self.device), num_patches - 1]
        return history, previous, num_patches

    def _embed_patch(self, patch: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """The newest patch `(B, r, F)` as a token `(B, 1, D)`, without dropout. Shared with the reading side, the stem
        looks back into the patch before."""
        conv = self.model.audio_embedder.conv
        if self.speech_head.prenet is not None or conv is None:
            return self._embed_history_tokens(patch, None)
        frames = patch if previous is None else torch.cat([previous, patch], dim=1)
        return self.model.multi_modal_projector(conv.last_token(frames.to(conv.out.weight.dtype)))

    def _finish_spectrogram(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Post-net and de-normalisation: `(B, T, F)`, normalised, to log-mel."""
        mask = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
        dtype = self.speech_head.stop.weight.dtype
        return self.denormalize(self.speech_head.refine(frames.to(dtype), mask))

    def _to_audio(self, spectrogram: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        audio = self.vocoder(spectrogram, lengths).float()
        hop = self.config.audio_config.hop_length
        return [row[: int(length) * hop] for row, length in zip(audio, lengths, strict=True)]


@dataclass
class _SpeechOptions:
    """The arguments of `generate` that are about speech, checked."""

    temperature: float = 1.0
    max_seconds: float | None = None
    min_seconds: float | None = None
    max_patches: int | None = None
    stop_threshold: float = 0.5
    seed: int | list[int] | None = None
    streamer: object = None
    return_dict: bool = False

    @classmethod
    def take(cls, kwargs: dict) -> "_SpeechOptions":
        def number(name: str, default=None, kind=Real):
            value = kwargs.pop(name, None)
            if value is None:
                return default
            if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
                what = "a whole number" if kind is Integral else "a finite number"
                raise ValueError(f"`{name}` must be {what}, got {value!r}.")
            return value

        do_sample = kwargs.pop("do_sample", None)
        if do_sample is False and (kwargs.get("temperature") or 0.0) != 0.0:
            raise ValueError(f"`do_sample=False` is `temperature=0`, but `temperature` is {kwargs['temperature']}.")
        seed = kwargs.pop("seed", None)
        for item in seed if isinstance(seed, list | tuple) else [seed]:
            if item is not None and (not isinstance(item, Integral) or isinstance(item, bool)):
                raise ValueError(f"`seed` must be a whole number, or a list of one for each text, got {seed!r}.")
        options = cls(
            temperature=float(number("temperature", 0.0 if do_sample is False else 1.0)),
            max_seconds=number("max_seconds"),
            min_seconds=number("min_seconds"),
            max_patches=number("max_new_tokens", None, Integral),
            stop_threshold=number("stop_threshold", 0.5),
            seed=seed,
            streamer=kwargs.pop("streamer", None),
            return_dict=bool(kwargs.pop("return_dict_in_generate", False)),
        )
        if options.temperature < 0:
            raise ValueError(f"`temperature` must be at least 0, got {options.temperature}.")
        for name in ("max_seconds", "min_seconds"):
            value = getattr(options, name)
            if value is not None and not 0 < value <= _MAX_SECONDS:
                raise ValueError(f"`{name}` must be more than 0 seconds and at most a day, got {value}.")
        if None not in (options.min_seconds, options.max_seconds) and options.min_seconds > options.max_seconds:
            raise ValueError(
                f"`min_seconds` ({options.min_seconds}) must not be more than `max_seconds` ({options.max_seconds})."
            )
        if options.max_patches is not None and options.max_patches < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {options.max_patches}.")
        if not 0.0 < options.stop_threshold <= 1.0:
            raise ValueError(f"`stop_threshold` must be more than 0 and at most 1, got {options.stop_threshold}.")
        return options

    def seeds(self, batch_size: int) -> list[int]:
        """Of each row: the one that is given for all, or different ones."""
        if self.seed is None:
            first = int(torch.randint(1 << 62, ()))
            return [first + row for row in range(batch_size)]
        seeds = list(self.seed) if isinstance(self.seed, list | tuple) else [self.seed] * batch_size
        if len(seeds) != batch_size:
            raise ValueError(f"`seed` has {len(seeds)} numbers for {batch_size} texts.")
        return [int(seed) % (1 << 63) for seed in seeds]

    def patch_limits(self, num_tokens, num_voice, patch_seconds: float, config) -> tuple[torch.Tensor, torch.Tensor]:
        """The fewest and the most patches of each row. Tokens that are said in the voice prompt are not to be spoken,
        but how many they are is not known here; they only make the limits wider."""
        most = _MAX_SECONDS_CONSTANT + num_tokens / config.speech_config.min_tokens_per_second
        least = num_tokens / max(config.max_text_tokens_per_second, 1e-3) * (num_voice == 0)
        if self.max_seconds is not None:
            most = torch.full_like(most, self.max_seconds)
        if self.min_seconds is not None:
            least = torch.full_like(most, self.min_seconds)
        # A little less, for quotients such as 0.3 / 0.01, which are a little more than whole
        most = (most / patch_seconds - 1e-4).ceil().long().clamp(min=1)
        if self.max_patches is not None:
            most = most.clamp(max=self.max_patches)
        least = (least / patch_seconds).floor().long().clamp(min=1)  # no text is spoken in no time
        return torch.minimum(least, most), most


class _Chance:
    """What is random in the speech of a text: the latent's noise and the dropout on the history.

    Each row of a batch gets the numbers of its seed, so a text's speech is that which it is alone. They are drawn on the
    CPU, for many steps at a time, and once for rows of one seed.
    """

    def __init__(self, model, seeds: list[int], is_random: bool):
        head, self.rate = model.speech_head, model.config.speech_config.history_dropout
        unique = list(dict.fromkeys(seeds))
        self.generators = [torch.Generator().manual_seed(seed) for seed in unique]
        self.rows = [unique.index(seed) for seed in seeds] if len(unique) > 1 else None
        # Of its own: how much a voice takes depends on the longest in the batch
        voice_seeds = [int(torch.randint(1 << 62, (), generator=generator)) for generator in self.generators]
        self.voice_seeds = [voice_seeds[unique.index(seed)] for seed in seeds]
        self.latent_size = head.reduction_factor * head.num_mel_bins if is_random else 0
        self.width = model.config.text_config.hidden_size if self.rate else 0
        self.device = model.device
        self.noise: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.step = 0

    def for_voice(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.voice_seeds]

    def draw(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of the next step: noise `(B or 1, r * F)`, and what the history's token is to be multiplied by, `(B or 1, 1,
        D)`; None for what is not random."""
        step, self.step = self.step % _DRAWN_STEPS, self.step + 1
        if step == 0 and self.latent_size:
            shape = (_DRAWN_STEPS, self.latent_size)
            self.noise = self._spread([torch.randn(shape, generator=generator) for generator in self.generators])
        if step == 0 and self.width:
            drawn = [torch.rand(_DRAWN_STEPS, self.width, generator=generator) for generator in self.generators]
            kept = [(row >= self.rate) / max(1.0 - self.rate, 1e-9) for row in drawn]
            self.kept = self._spread(kept)[:, :, None]
        return tuple(None if drawn is None else drawn[step] for drawn in (self.noise, self.kept))

    def _spread(self, drawn: list[torch.Tensor]) -> torch.Tensor:
        """What each seed drew, `(steps, n)`, to the rows: `(steps, B or 1, n)` on the device."""
        by_row = torch.stack(drawn, dim=1)
        return (by_row if self.rows is None else by_row[:, self.rows]).to(self.device)


class _SilenceGuard:
    """Ends speech that has fallen silent: a Gaussian around a silent frame finds no way out of the silence."""

    def __init__(self, batch_size: int, max_seconds: float, patch_seconds: float, device):
        self.limit = max(1, round(max_seconds / patch_seconds))
        self.kept = round(_KEPT_SILENCE_SECONDS / patch_seconds)
        self.spoken = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.silent = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.ended = self.spoken.clone()

    def is_over(self, patch: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        level = patch.mean(dim=(1, 2))
        self.spoken |= level > _LOUD_LEVEL
        silent = torch.where(level < _SILENT_LEVEL, self.silent + 1, 0)
        self.silent = torch.where(ended, self.silent, silent)
        over = ~ended & self.spoken & (self.silent >= self.limit)
        self.ended |= over
        return over

    def surplus(self) -> torch.Tensor:
        """Patches of silence to be cut from each row."""
        return torch.where(self.ended, self.silent - self.kept, 0).clamp(min=0)


class SpeechStream:
    """Frames to audio as they are written: post-net and vocoder with just the context that each needs."""

    def __init__(self, model, streamer):
        if model.vocoder is None:
            raise ValueError("`streamer` needs a vocoder, and `config.vocoder_config` is None.")
        self.model, self.streamer = model, streamer
        self.vocoder = model.vocoder.stream()
        self.context = model.speech_head.context
        self.held: torch.Tensor | None = None  # frames that later ones still need, or that still need later ones
        self.waiting: list[torch.Tensor] = []  # frames that are not in `held` yet
        self.num_waiting = 0
        self.surplus: list[torch.Tensor] = []  # silence that will not be heard if nothing follows
        self.num_dropped = 0  # frames before `held`
        self.num_done = 0  # frames that went to the vocoder
        self.push_size = 1  # frames that are worth going there
        self.spectrogram: list[torch.Tensor] = []
        self.audio: list[torch.Tensor] = []

    def put(self, patch: torch.Tensor, is_surplus: bool = False) -> None:
        """One patch, `(r, F)`, normalised."""
        if is_surplus:
            self.surplus.append(patch)
            return
        fresh, self.surplus = [*self.surplus, patch], []
        self.waiting += fresh
        self.num_waiting += sum(map(len, fresh))
        if self.num_waiting >= self.push_size:
            self._hold()
            self._send(self.num_dropped + len(self.held) - self.context)

    def finish(self, num_frames: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The speech has `num_frames` in all. Returns it: log-mel frames `(1, T, F)`, and the waveform in a list."""
        self.waiting += self.surplus
        self._hold()
        self.held = self.held[: num_frames - self.num_dropped]
        self._send(num_frames)
        self._put_audio(self.vocoder.finish())
        self.streamer.end()
        return torch.cat(self.spectrogram)[None], [torch.cat(self.audio)]

    def _hold(self) -> None:
        self.held = torch.cat([*([] if self.held is None else [self.held]), *self.waiting])
        self.waiting, self.num_waiting = [], 0

    def _send(self, stop: int) -> None:
        if stop <= self.num_done:
            return
        dtype = self.model.speech_head.stop.weight.dtype
        refined = self.model.speech_head.refine(self.held[None].to(dtype))[0]
        fresh = self.model.denormalize(refined[self.num_done - self.num_dropped : stop - self.num_dropped])
        self.spectrogram.append(fresh)
        self._put_audio(self.vocoder.push(fresh))
        self.num_done = stop
        surplus = max(0, self.num_done - self.context - self.num_dropped)
        self.held, self.num_dropped = self.held[surplus:], self.num_dropped + surplus

    def _put_audio(self, samples: torch.Tensor) -> None:
        if len(samples):
            samples = samples.float()
            self.audio.append(samples)
            self.streamer.put(samples.cpu())
            # A listener has something to hear while more is computed at a time, which is cheaper
            self.push_size = min(max(2 * self.push_size, _FIRST_PUSH_FRAMES), _MOST_PUSH_FRAMES)


__all__ = ["MelLLMSpeechGenerationMixin", "MelLLMSpeechGenerationOutput", "SpeechStream"]
