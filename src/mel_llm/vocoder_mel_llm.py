"""Log-mel frames to a waveform. One interface: whole spectrograms by calling a vocoder, pieces by its `stream()`.

Three vocoders: Griffin-Lim, which needs no training; SpeechT5's HiFi-GAN (arXiv 2010.05646), what MELLE takes; and a small
Vocos (arXiv 2306.00814), `"istft"`. Both ways give the same samples, and an item of a batch the same as alone, because
both go through the stream.

Shapes use these letters: B batch, T mel frames, F mel bins, H hidden channels, N samples.
"""

import math
import os
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_NAME

from .configuration_mel_llm import MelLLMVocoderConfig
from .feature_extraction_mel_llm import MelLLMFeatureExtractor, _mel_filters, _window
from .modeling_mel_llm import MelLLMFeatureNorm
from .sharing_mel_llm import SafetensorsOnlyMixin


# Frames of a whole spectrogram that go into its stream at a time, so that an hour needs no more memory than a minute.
_PUSH_FRAMES = 512

# Griffin-Lim works on so many frames at a time, the first blocks being smaller so that a stream is heard soon, ...
_BLOCK_FRAMES = 64
_FIRST_BLOCK_FRAMES = 16
# ... begins a little before them, where the waveform is known already, ...
_CONTEXT_FRAMES = 8
# ... and looks a little beyond them, so that the block's end is not a guess.
_LOOKAHEAD_FRAMES = 6
_MOMENTUM = 0.99
_MEL_INVERSION_STEPS = 32

_ISTFT_DEFAULTS = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 6, "kernel_size": 7, "overlap": 4}
# 256 samples: microsoft/speecht5_hifigan's (its config class's defaults). 160: ours.
_HIFIGAN_RATES = {
    256: {"upsample_rates": [4, 4, 4, 4], "upsample_kernel_sizes": [8, 8, 8, 8]},
    160: {"upsample_rates": [8, 5, 4], "upsample_kernel_sizes": [16, 10, 8]},
}


class MelLLMVocoder(SafetensorsOnlyMixin, PreTrainedModel):
    """A vocoder of any type, alone in a checkpoint or as a part of a larger model.

    Attributes:
        hop_length (`int`): Samples per frame.
        sampling_rate (`int`): Hz of the waveform.
        extractor ([`MelLLMFeatureExtractor`]): Makes the frames that this vocoder inverts.
        generator (`nn.Module`, *optional*): The network, for training: `generator(spectrogram (B, T, F))` is the waveform
            `(B, T * hop_length)` with gradients. `None` for Griffin-Lim.
    """

    config: MelLLMVocoderConfig
    config_class = MelLLMVocoderConfig
    base_model_prefix = "vocoder"
    main_input_name = "spectrogram"
    _keep_in_fp32_modules_strict = ("normalizer",)
    # There is no attention in here; the larger model's is passed down to its parts and must not be refused
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MelLLMVocoderConfig):
        super().__init__(config)
        self.extractor = MelLLMFeatureExtractor(**(config.feature_config or {}))
        self.hop_length = self.extractor.hop_length
        self.sampling_rate = self.extractor.sampling_rate
        generators = {"griffin_lim": None, "hifigan": HifiGanGenerator, "istft": ISTFTGenerator}
        build = generators[config.vocoder_type]
        self.generator = None if build is None else build(config.vocoder_kwargs or {}, self.extractor)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MelLLMFeatureNorm):
            init.zeros_(module.global_mean)
            init.ones_(module.global_invstd)
        elif isinstance(module, ConvNeXtBlock):
            init.constant_(module.scale, module.initial_scale)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.generator is None:
            from safetensors.torch import save_file

            # transformers writes no file where there are no weights, and then finds none to load
            save_file({}, os.path.join(save_directory, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})

    # Griffin-Lim has no weights to look these up in
    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.generator is None else super().dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.generator is None else super().device

    @property
    def lookahead(self) -> int:
        """The most frames that must follow a frame before a stream gives its samples out."""
        return _BLOCK_FRAMES + _LOOKAHEAD_FRAMES - 1 if self.generator is None else self.generator.lookahead

    @torch.no_grad()
    def set_feature_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets the normalisation of a network's input to the features' mean and deviation `(F,)`.

        Raises:
            ValueError: This vocoder does not normalise.
        """
        if self.generator is None or not self.generator.normalizes:
            raise ValueError(f"A vocoder of this type ({self.config.vocoder_type!r}) or config does not normalise.")
        self.generator.set_feature_statistics(mean, std)

    def stream(self) -> "GriffinLimStream | HifiGanStream | ISTFTStream":
        """Something with `push(frames (n, F)) -> samples (m,)` and `finish() -> samples (m,)`.

        Together they give as many samples as [`forward`] does, and the same. What a stream holds does not grow.
        """
        if self.generator is None:
            return GriffinLimStream(self.extractor, self.config.num_iterations)
        return self.generator.stream()

    @torch.no_grad()
    def forward(self, spectrogram: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Log-mel frames `(B, T, F)` in the feature extractor's units to waveforms `(B, T * hop_length)`, float32, zero
        behind `lengths` (frames, `(B,)`).

        Clip by clip, so that nothing is spent on padding and neighbours cannot matter.

        Raises:
            ValueError: The spectrogram or the lengths have another shape, or a length is outside of the frames.
        """
        bins = self.extractor.feature_size
        if spectrogram.ndim != 3 or spectrogram.shape[-1] != bins:
            raise ValueError(
                f"`spectrogram` must have the shape (batch, frames, {bins}), got {tuple(spectrogram.shape)}."
            )
        batch_size, num_frames = spectrogram.shape[:2]
        sizes = [num_frames] * batch_size if lengths is None else torch.as_tensor(lengths).tolist()
        valid = isinstance(sizes, list) and len(sizes) == batch_size and all(0 <= size <= num_frames for size in sizes)
        if not valid:
            raise ValueError(f"`lengths` must be {batch_size} numbers from 0 to {num_frames}, got {sizes}.")
        audio = spectrogram.new_zeros(batch_size, num_frames * self.hop_length, dtype=torch.float32)
        for row, frames, size in zip(audio, spectrogram, sizes, strict=True):
            stream, place = self.stream(), 0
            pieces = frames[: int(size)].split(_PUSH_FRAMES) if size else ()
            for piece in (*pieces, None):
                samples = stream.finish() if piece is None else stream.push(piece)
                row[place : place + len(samples)] = samples
                place += len(samples)
        return audio


# --- Vocos ----------------------------------------------------------------------------------------------------------

# Gives a layer its input `(B, T, H)` with what lies before and behind it in time
_Extend = Callable[[int, torch.Tensor], torch.Tensor]


class ConvNeXtBlock(nn.Module):
    """A block of ConvNeXt over time, as in Vocos: depthwise convolution, norm, MLP, a learnt scale, and the residual.

    There is no padding in here: `(B, T + kernel_size - 1, H)` becomes `(B, T, H)`, the input being what
    [`ISTFTGenerator`] extended, with zeros or with the frames before and behind.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, kernel_size: int, lookahead: int, scale: float):
        super().__init__()
        self.behind = kernel_size - 1 - lookahead
        self.initial_scale = scale
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.scale = nn.Parameter(torch.full((hidden_size,), scale))

    def forward(self, extended: torch.Tensor) -> torch.Tensor:
        convolved = _convolve(self.conv, extended)
        residual = extended[:, self.behind : self.behind + convolved.shape[1]]
        return residual + self.scale * self.down(nn.functional.gelu(self.up(self.norm(convolved))))


class ISTFTGenerator(nn.Module):
    """Vocos: all layers at the rate of the frames, which become log-magnitude and phase for an inverse STFT.

    As published: the layers and their order, the head, the sum of windowed frames. Ours: the size; the window of whole
    hops; the frames' place, each centred where the feature extractor's frame is centred, so that the output has
    `T * hop_length` samples and nothing has to learn a shift; magnitudes up to the window's length instead of 100.
    """

    normalizes = True

    def __init__(self, kwargs: dict, extractor: MelLLMFeatureExtractor):
        super().__init__()
        sizes = {**_ISTFT_DEFAULTS, **kwargs}
        hidden_size, kernel_size = sizes["hidden_size"], sizes["kernel_size"]
        ahead = sizes.get("lookahead", kernel_size // 2)
        self.hop_length = extractor.hop_length
        self.n_fft = sizes["overlap"] * self.hop_length
        # How far into the sum of frames the waveform begins; at its very ends windows are too small to divide by
        centre = extractor.win_length // 2 - extractor.edge_padding
        margin = self.hop_length // 2
        self.trim = min(max(self.n_fft // 2 - centre, margin), self.n_fft - self.hop_length - margin)
        # (frames behind, frames ahead) of each convolution
        half = kernel_size // 2
        self.contexts = [(half, half)] + [(kernel_size - 1 - ahead, ahead)] * sizes["num_layers"]
        self.normalizer = MelLLMFeatureNorm(extractor)
        self.embed = nn.Conv1d(extractor.feature_size, hidden_size, kernel_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        scale = 1 / sizes["num_layers"]
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(hidden_size, sizes["intermediate_size"], kernel_size, ahead, scale)
            for _ in range(sizes["num_layers"])
        )
        self.final_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.head = nn.Linear(hidden_size, self.n_fft + 2)

    @property
    def lookahead(self) -> int:
        return sum(ahead for _, ahead in self.contexts) + -(-self.trim // self.hop_length)

    def set_feature_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.normalizer.global_mean.copy_(mean)
        self.normalizer.global_invstd.copy_(1 / std)

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        frames = self.to_frames(spectrogram, self._pad)
        waveform = overlap_add(frames, self.hop_length) / self.envelope(frames)
        return waveform[:, self.trim : self.trim + frames.shape[1] * self.hop_length]

    def stream(self) -> "ISTFTStream":
        return ISTFTStream(self)

    def to_frames(self, spectrogram: torch.Tensor, extend: _Extend) -> torch.Tensor:
        """`(B, T, F)` to windowed pieces of waveform `(B, T', n_fft)`; `extend` decides about T'."""
        hidden_states = self.normalizer(spectrogram).to(self.embed.weight.dtype)
        hidden_states = self.norm(_convolve(self.embed, extend(0, hidden_states)))
        for index, block in enumerate(self.blocks, start=1):
            hidden_states = block(extend(index, hidden_states))
        # From here in float32, also under autocast: the phase's error is the waveform's
        coefficients = self.head(self.final_norm(hidden_states)).float()
        if coefficients.shape[1] == 0:  # not every FFT library takes none
            return coefficients.new_zeros(len(coefficients), 0, self.n_fft)
        log_magnitude, phase = coefficients.chunk(2, dim=-1)
        magnitude = log_magnitude.clamp(max=math.log(self.n_fft)).exp()
        return torch.fft.irfft(torch.polar(magnitude, phase), n=self.n_fft) * self.window(phase.device)

    def window(self, device: torch.device) -> torch.Tensor:
        return _window("hann", self.n_fft, True, self.n_fft, 1.0, torch.float32, device)

    def envelope(self, frames: torch.Tensor) -> torch.Tensor:
        """What the windows of frames `(B, T, n_fft)` sum up to, `(1, N)`."""
        squares = self.window(frames.device).square().expand(1, frames.shape[1], -1)
        return overlap_add(squares, self.hop_length).clamp(min=1e-8)

    def _pad(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        behind, ahead = self.contexts[index]
        return nn.functional.pad(hidden_states, (0, 0, behind, ahead))


class ISTFTStream:
    """See [`ISTFTGenerator`]. Each convolution keeps the frames that its next output still needs, the inverse transform
    its unfinished samples: nothing is computed twice."""

    def __init__(self, generator: ISTFTGenerator):
        self.generator = generator
        self.held: list[torch.Tensor | None] = [None] * len(generator.contexts)  # (1, up to kernel_size - 1, H) each
        self.is_last = False
        self.unfinished: torch.Tensor | None = None  # (2, n_fft - hop_length): sums of frames, and of windows
        self.num_frames = 0
        self.num_samples = 0  # given out
        self.num_trimmed = 0

    @torch.no_grad()
    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """`(n, F)` to as many samples as they complete, `(m,)`."""
        self.num_frames += len(frames)
        return self._push(frames)

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """The rest: with it, `frames * hop_length` samples were given out."""
        if self.num_frames == 0:
            return torch.zeros(0, device=self.generator.head.weight.device)
        self.is_last = True
        bins = self.generator.embed.in_channels
        samples = self._push(self.held[0].new_zeros(0, bins, dtype=torch.float32))
        rest = self._trim(self.unfinished[0] / self.unfinished[1].clamp(min=1e-8))
        missing = self.num_frames * self.generator.hop_length - self.num_samples
        self.num_samples += missing
        return torch.cat([samples, rest[:missing]])

    def _push(self, frames: torch.Tensor) -> torch.Tensor:
        generator = self.generator
        pieces = generator.to_frames(frames[None], self._extend)
        if pieces.shape[1] == 0:
            return pieces.new_zeros(0)
        windows = generator.window(pieces.device).square().expand_as(pieces)
        sums = overlap_add(torch.cat([pieces, windows]), generator.hop_length)
        if self.unfinished is not None:
            sums[:, : self.unfinished.shape[1]] += self.unfinished
        size = pieces.shape[1] * generator.hop_length
        self.unfinished = sums[:, size:].clone()  # a view would keep the rest alive
        samples = self._trim(sums[0, :size] / sums[1, :size].clamp(min=1e-8))
        self.num_samples += len(samples)
        return samples

    def _extend(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        behind, ahead = self.generator.contexts[index]
        held = self.held[index]
        if held is None:  # the zeros before the beginning
            held = hidden_states.new_zeros(1, behind, hidden_states.shape[-1])
        parts = [held, hidden_states]
        if self.is_last:
            parts.append(hidden_states.new_zeros(1, ahead, hidden_states.shape[-1]))
        extended = torch.cat(parts, dim=1)
        keep = min(behind + ahead, extended.shape[1])
        self.held[index] = extended[:, extended.shape[1] - keep :].clone()
        return extended

    def _trim(self, samples: torch.Tensor) -> torch.Tensor:
        """Without the samples that lie before the waveform's beginning."""
        surplus = min(self.generator.trim - self.num_trimmed, len(samples))
        self.num_trimmed += surplus
        return samples[surplus:]


def _convolve(conv: nn.Conv1d, extended: torch.Tensor) -> torch.Tensor:
    """`(B, T, H)` to `(B, T - kernel_size + 1, H')`, to nothing where that is less than one frame."""
    if extended.shape[1] < conv.kernel_size[0]:
        return extended.new_zeros(len(extended), 0, conv.out_channels)
    return conv(extended.transpose(1, 2)).transpose(1, 2)


def overlap_add(frames: torch.Tensor, hop_length: int) -> torch.Tensor:
    """The sum of frames `(B, T, n)` that begin `hop_length` samples apart, n being whole hops: `(B, (T - 1) * hop + n)`."""
    hops = frames.unflatten(-1, (-1, hop_length))  # (B, T, overlap, hop)
    overlap = hops.shape[2]
    # Frame t's part j belongs to hop t + j
    parts = (nn.functional.pad(hops[:, :, j], (0, 0, j, overlap - 1 - j)) for j in range(overlap))
    return sum(parts).flatten(1)


# --- HiFi-GAN -------------------------------------------------------------------------------------------------------


class HifiGanGenerator(nn.Module):
    """`SpeechT5HifiGan` of transformers, as it is; what is ours is its stream.

    Where the kernel and the rate of an upsampling are not both odd or both even, the original makes a few samples too
    many at the end; these are cut off.
    """

    def __init__(self, kwargs: dict, extractor: MelLLMFeatureExtractor):
        super().__init__()
        from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

        hop_length = extractor.hop_length
        if "upsample_rates" not in kwargs and hop_length not in _HIFIGAN_RATES:
            raise ValueError(
                f"HiFi-GAN has no default for a hop of {hop_length} samples: give `upsample_rates` that multiply to it "
                "and `upsample_kernel_sizes` in `vocoder_kwargs`."
            )
        fields = {**_HIFIGAN_RATES.get(hop_length, {}), **kwargs}
        product = math.prod(fields["upsample_rates"])
        if product != hop_length:
            raise ValueError(
                f"HiFi-GAN's `upsample_rates` {fields['upsample_rates']} make {product} samples of a frame, but the "
                f"features have a hop of {hop_length}."
            )
        config = SpeechT5HifiGanConfig(
            **fields, model_in_dim=extractor.feature_size, sampling_rate=extractor.sampling_rate
        )
        if config.upsample_initial_channel >> len(config.upsample_rates) == 0:
            raise ValueError(
                f"HiFi-GAN halves its channels {len(config.upsample_rates)} times, and nothing would be left of "
                f"`upsample_initial_channel` {config.upsample_initial_channel}."
            )
        self.hop_length = hop_length
        self.model = SpeechT5HifiGan(config)
        self.behind, self.ahead = hifigan_context(config)

    @property
    def lookahead(self) -> int:
        return self.ahead

    @property
    def normalizes(self) -> bool:
        return self.model.config.normalize_before

    def set_feature_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.model.mean.copy_(mean)
        self.model.scale.copy_(std)

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        waveform = self.model(spectrogram.to(self.model.conv_pre.weight.dtype))
        return waveform[:, : spectrogram.shape[1] * self.hop_length].float()

    def stream(self) -> "HifiGanStream":
        return HifiGanStream(self)


def hifigan_context(config) -> tuple[int, int]:
    """How many frames before and behind a frame its samples depend on, from a `SpeechT5HifiGanConfig`."""
    first, last = 0, math.prod(config.upsample_rates) - 1  # the frame's samples, followed back through the layers
    first, last = first - 3, last + 3  # conv_post
    reach = max(
        sum(kernel // 2 * dilation + kernel // 2 for dilation in dilations)
        for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    )
    for rate, kernel in zip(reversed(config.upsample_rates), reversed(config.upsample_kernel_sizes), strict=True):
        first, last = first - reach, last + reach
        # Input i of a transposed convolution goes to outputs i * rate - padding + (0 ... kernel - 1)
        padding = (kernel - rate) // 2
        first, last = -((kernel - 1 - padding - first) // rate), (last + padding) // rate
    return 3 - first, last + 3  # conv_pre


class HifiGanStream:
    """See [`HifiGanGenerator`]. Pieces overlap by the network's whole context, so that their middles are exact; a stream
    of few frames at a time computes that context again and again."""

    def __init__(self, generator: HifiGanGenerator):
        self.generator = generator
        self.frames: torch.Tensor | None = None  # (frames held, F)
        self.first = 0  # number of the first frame held
        self.num_frames = 0
        self.num_done = 0  # frames whose samples were given out

    @torch.no_grad()
    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """`(n, F)` to as many samples as they complete, `(m,)`."""
        self.frames = frames if self.frames is None else torch.cat([self.frames, frames])
        self.num_frames += len(frames)
        return self._give(self.num_frames - self.generator.ahead)

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """The rest: with it, `frames * hop_length` samples were given out."""
        return self._give(self.num_frames)

    def _give(self, stop: int) -> torch.Tensor:
        generator, hop = self.generator, self.generator.hop_length
        if stop <= self.num_done:
            return torch.zeros(0, device=generator.model.conv_pre.weight.device)
        waveform = generator(self.frames[None])[0]
        samples = waveform[(self.num_done - self.first) * hop : (stop - self.first) * hop]
        keep_from = max(self.first, stop - generator.behind)
        self.frames = self.frames[keep_from - self.first :].clone()
        self.first, self.num_done = keep_from, stop
        return samples


def load_hifigan(
    checkpoint: str | os.PathLike, feature_extractor: MelLLMFeatureExtractor | None = None, **kwargs
) -> MelLLMVocoder:
    """A vocoder with the weights of a `SpeechT5HifiGan` checkpoint, such as microsoft/speecht5_hifigan.

    Args:
        checkpoint: Folder or Hub name.
        feature_extractor ([`MelLLMFeatureExtractor`], *optional*): The features that it was trained on; the preset
            `hifigan16k` when not given.
        kwargs: For `SpeechT5HifiGan.from_pretrained`.

    Raises:
        ValueError: The checkpoint has another hop, rate or number of mel bins than the features.
    """
    from transformers import SpeechT5HifiGan

    extractor = feature_extractor or MelLLMFeatureExtractor.from_preset("hifigan16k")
    model = SpeechT5HifiGan.from_pretrained(checkpoint, **kwargs)
    there = (model.config.model_in_dim, model.config.sampling_rate)
    if there != (extractor.feature_size, extractor.sampling_rate):
        raise ValueError(
            f"{checkpoint} is for {there[0]} mel bins at {there[1]} Hz, but the features have {extractor.feature_size} "
            f"at {extractor.sampling_rate} Hz."
        )
    names = ("leaky_relu_slope", "normalize_before", "initializer_range", "upsample_initial_channel")
    lists = ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes")
    fields = {name: getattr(model.config, name) for name in (*names, *lists)}
    vocoder = MelLLMVocoder(
        MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="hifigan", vocoder_kwargs=fields)
    )
    vocoder.generator.model = model
    return vocoder.eval()


# --- Griffin-Lim ----------------------------------------------------------------------------------------------------


class GriffinLimStream:
    """Waveform whose spectrogram is nearest, by alternating projections (Griffin and Lim, 1984; with the momentum of
    Perraudin et al., 2013). No training and no weights, and the sound of it.

    Block by block, each begun with what is known of the waveform (as Zhu et al., 2006, do for real time), so that
    memory stays flat and a stream equals a whole.
    """

    def __init__(self, extractor: MelLLMFeatureExtractor, num_iterations: int):
        self.extractor, self.num_iterations = extractor, num_iterations
        self.frames: torch.Tensor | None = None  # (frames held, num_mel_bins)
        self.first = 0  # number of the first frame held
        self.num_frames = 0
        self.num_done = 0  # frames whose samples were given out
        self.block_size = _FIRST_BLOCK_FRAMES  # of the next block
        self.tail: torch.Tensor | None = None  # samples given out, from the first frame held on
        self.generator = torch.Generator().manual_seed(0)

    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """`(n, num_mel_bins)` to as many samples as they complete, `(m,)`."""
        if len(frames):
            self.frames = frames if self.frames is None else torch.cat([self.frames, frames])
            self.num_frames += len(frames)
        ready = [self._empty()]
        while self.num_frames >= self.num_done + self.block_size + _LOOKAHEAD_FRAMES:
            ready.append(
                self._block(self.num_done + self.block_size, self.num_done + self.block_size + _LOOKAHEAD_FRAMES)
            )
            self.block_size = min(2 * self.block_size, _BLOCK_FRAMES)
        return torch.cat(ready)

    def finish(self) -> torch.Tensor:
        """The rest: with it, `frames * hop_length` samples were given out."""
        if self.num_frames == self.num_done:
            return self._empty()
        return self._block(self.num_frames, self.num_frames)

    def _empty(self) -> torch.Tensor:
        return torch.zeros(0, device=None if self.frames is None else self.frames.device)

    def _block(self, done: int, seen: int) -> torch.Tensor:
        """Samples up to frame `done`, estimated from the frames up to `seen`."""
        hop, pad = self.extractor.hop_length, self.extractor.edge_padding
        # By blocks, too: in other sizes, products differ in their last digits, and the iterations make much of that
        magnitudes = mel_to_magnitude(self.frames[: seen - self.first], self.extractor)
        # Samples are counted from the beginning of the first frame held, which lies `pad` before its own samples
        known = self._known(pad)
        estimate = self._iterate(magnitudes, known)
        begin, end = len(known), (done - self.first) * hop + pad
        estimate = nn.functional.pad(estimate, (0, max(0, end - len(estimate))))
        samples = estimate[begin:end]
        everything = samples if self.tail is None else torch.cat([self.tail, samples])
        keep_from = max(self.first, done - _CONTEXT_FRAMES)
        # Copies: views would keep all of what was pushed alive
        self.frames = self.frames[keep_from - self.first :].clone()
        self.tail = everything[(keep_from - self.first) * hop :].clone()
        self.first, self.num_done = keep_from, done
        return samples

    def _known(self, pad: int) -> torch.Tensor:
        """What of the waveform is known, beginning where the first frame held begins."""
        if self.tail is None:  # reflected padding at the very beginning: its length is given out with nothing
            return torch.zeros(pad, device=self.frames.device)
        # The first frame held begins `pad` samples before `tail`, in samples that are gone; their place is left empty
        return torch.cat([self.tail.new_zeros(pad), self.tail])

    def _iterate(self, magnitudes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        fe, pad = self.extractor, self.extractor.edge_padding
        window = _window(
            fe.window_function, fe.win_length, fe.window_periodic, fe.n_fft, 1.0, torch.float32, magnitudes.device
        )
        # The window that makes analysis and synthesis least-squares inverses, and what its squares sum up to
        weight = self._overlap_add(window.square().expand(len(magnitudes), -1)).clamp(min=1e-3)
        phase = 2 * math.pi * torch.rand(magnitudes.shape, generator=self.generator)
        spectrum = torch.polar(magnitudes, phase.to(magnitudes.device))
        previous = None
        for _ in range(self.num_iterations):
            waveform = self._impose(self._to_waveform(spectrum, window, weight), known, pad)
            rebuilt = torch.fft.rfft(waveform.unfold(0, fe.n_fft, fe.hop_length) * window)
            if previous is None:
                direction = rebuilt
            else:
                direction = torch.sub(rebuilt, previous, alpha=_MOMENTUM / (1 + _MOMENTUM))
            # Twice as fast as abs(), which guards against squares that overflow
            squares = torch.addcmul(direction.real.square(), direction.imag, direction.imag)
            spectrum = direction * (magnitudes * squares.clamp_(min=1e-24).rsqrt_())
            previous = rebuilt
        return self._impose(self._to_waveform(spectrum, window, weight), known, pad)

    @staticmethod
    def _impose(waveform: torch.Tensor, known: torch.Tensor, pad: int) -> torch.Tensor:
        size = min(len(known), len(waveform))
        if size > pad:
            waveform[pad:size] = known[pad:size]
        return waveform

    def _to_waveform(self, spectrum: torch.Tensor, window: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._overlap_add(torch.fft.irfft(spectrum, n=self.extractor.n_fft) * window).div_(weight)

    def _overlap_add(self, frames: torch.Tensor) -> torch.Tensor:
        """The sum of frames `(n, n_fft)` that begin a hop apart, `((n - 1) * hop_length + n_fft,)`."""
        hop, n_fft = self.extractor.hop_length, self.extractor.n_fft
        overlap = -(-n_fft // hop)
        hops = nn.functional.pad(frames, (0, overlap * hop - n_fft)).unflatten(-1, (overlap, hop))
        total = frames.new_zeros(len(frames) + overlap - 1, hop)
        for part in range(overlap):  # what `fold` does, in a fifth of its time
            total[part : part + len(frames)] += hops[:, part]
        return total.flatten()[: (len(frames) - 1) * hop + n_fft]


def mel_to_magnitude(log_mel: torch.Tensor, extractor: MelLLMFeatureExtractor) -> torch.Tensor:
    """Log-mel frames `(n, num_mel_bins)` to magnitudes of the waveform's spectrum, `(n, n_fft / 2 + 1)`, float32.

    Non-negative least squares by multiplicative updates (Lee and Seung, 2000). Pre-emphasis is undone here, bin by bin,
    and values at the floor are silence.
    """
    fe = extractor
    device = log_mel.device
    filters = _mel_filters(
        fe.n_fft // 2 + 1,
        fe.feature_size,
        fe.mel_min_frequency,
        fe.mel_max_frequency,
        fe.sampling_rate,
        fe.mel_norm,
        fe.mel_scale,
        fe.triangularize_in_mel_space,
        torch.float32,
        device,
    )
    log_mel = log_mel.float()
    # Scaled back first: what follows then computes with numbers near 1
    log_scale = fe.power * math.log(fe.waveform_scale)
    natural = log_mel * (math.log(10.0) if fe.log == "log10" else 1.0)
    mel = (natural - log_scale).clamp(max=40.0).exp()
    mel = mel * (natural > math.log(fe.mel_floor) + 1e-4)
    weights = filters.sum(0).clamp(min=1e-12)
    spectrum = (mel / weights) @ filters.T / filters.sum(1).clamp(min=1e-3)
    numerator = mel @ filters.T
    for _ in range(_MEL_INVERSION_STEPS):
        spectrum = spectrum * numerator / ((spectrum @ filters) @ filters.T).clamp(min=1e-20)
    magnitude = spectrum if fe.power == 1.0 else spectrum.clamp(min=0).sqrt()
    if fe.preemphasis:
        omega = torch.linspace(0, math.pi, fe.n_fft // 2 + 1, device=device)
        gain = (1 - fe.preemphasis * torch.polar(torch.ones_like(omega), -omega)).abs()
        magnitude = magnitude / gain.clamp(min=0.05)  # below some 80 Hz there is no speech to bring back
    return magnitude


def build_vocoder(config: MelLLMVocoderConfig) -> MelLLMVocoder:
    """The vocoder that `config` names, with new weights where it has any.

    Raises:
        ValueError: It cannot be built.
    """
    return MelLLMVocoder(config)


__all__ = ["GriffinLimStream", "MelLLMVocoder", "build_vocoder", "load_hifigan", "mel_to_magnitude"]
