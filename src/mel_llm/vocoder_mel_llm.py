"""Log-mel frames to a waveform. One interface: whole spectrograms by calling a vocoder, pieces by its `stream()`.

Both give the same samples, and an item of a batch the same as alone, because both go through the stream.
"""

import math

import torch
from torch import nn

from .configuration_mel_llm import MelLLMVocoderConfig
from .feature_extraction_mel_llm import MelLLMFeatureExtractor, _mel_filters, _window


# Griffin-Lim works on so many frames at a time, ...
_BLOCK_FRAMES = 64
# ... begins a little before them, where the waveform is known already, ...
_CONTEXT_FRAMES = 8
# ... and looks a little beyond them, so that the block's end is not a guess.
_LOOKAHEAD_FRAMES = 6
_MOMENTUM = 0.99
_MEL_INVERSION_STEPS = 32


class MelLLMVocoder(nn.Module):
    """Base of the vocoders.

    Attributes:
        hop_length (`int`): Samples per frame.
        sampling_rate (`int`): Hz of the waveform.
    """

    def __init__(self, config: MelLLMVocoderConfig):
        super().__init__()
        self.config = config
        self.extractor = MelLLMFeatureExtractor(**(config.feature_config or {}))
        self.hop_length = self.extractor.hop_length
        self.sampling_rate = self.extractor.sampling_rate

    def stream(self):
        """Something with `push(frames (n, num_mel_bins)) -> samples (m,)` and `finish() -> samples (m,)`."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, spectrogram: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Log-mel frames `(batch, frames, num_mel_bins)` in the feature extractor's units to waveforms `(batch, frames *
        hop_length)`, float32, zero behind `lengths` (frames, `(batch,)`).

        Raises:
            ValueError: The spectrogram has another shape.
        """
        bins = self.extractor.feature_size
        if spectrogram.ndim != 3 or spectrogram.shape[-1] != bins:
            raise ValueError(
                f"`spectrogram` must have the shape (batch, frames, {bins}), got {tuple(spectrogram.shape)}."
            )
        audio = spectrogram.new_zeros(len(spectrogram), spectrogram.shape[1] * self.hop_length, dtype=torch.float32)
        for index, frames in enumerate(spectrogram):
            stream = self.stream()
            length = len(frames) if lengths is None else int(lengths[index])
            samples = torch.cat([stream.push(frames[:length]), stream.finish()])
            audio[index, : len(samples)] = samples
        return audio


class GriffinLimVocoder(MelLLMVocoder):
    """Waveform whose spectrogram is nearest, by alternating projections (Griffin and Lim, 1984; with the momentum of
    Perraudin et al., 2013). No training and no weights, and the sound of it.

    Block by block, each begun with what is known of the waveform (as Zhu et al., 2006, do for real time), so that
    memory stays flat and a stream equals a whole.
    """

    def stream(self) -> "GriffinLimStream":
        return GriffinLimStream(self.extractor, self.config.num_iterations)


class GriffinLimStream:
    """See [`GriffinLimVocoder`]. `lookahead` frames must follow a block before it can be given out."""

    lookahead = _LOOKAHEAD_FRAMES

    def __init__(self, extractor: MelLLMFeatureExtractor, num_iterations: int):
        self.extractor, self.num_iterations = extractor, num_iterations
        self.frames: torch.Tensor | None = None  # (frames held, num_mel_bins)
        self.first = 0  # number of the first frame held
        self.num_frames = 0
        self.num_done = 0  # frames whose samples were given out
        self.tail: torch.Tensor | None = None  # samples given out, from the first frame held on
        self.generator = torch.Generator().manual_seed(0)

    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """`(n, num_mel_bins)` to as many samples as they complete, `(m,)`."""
        if len(frames):
            self.frames = frames if self.frames is None else torch.cat([self.frames, frames])
            self.num_frames += len(frames)
        ready = [self._empty()]
        while self.num_frames - self.num_done >= _BLOCK_FRAMES + _LOOKAHEAD_FRAMES:
            ready.append(self._block(self.num_done + _BLOCK_FRAMES, self.num_done + _BLOCK_FRAMES + _LOOKAHEAD_FRAMES))
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
        self.frames = self.frames[keep_from - self.first :]
        self.tail = everything[(keep_from - self.first) * hop :]
        self.first, self.num_done = keep_from, done
        return samples

    def _known(self, pad: int) -> torch.Tensor:
        """What of the waveform is known, beginning where the first frame held begins."""
        if self.tail is None:  # reflected padding at the very beginning: its length is given out with nothing
            return torch.zeros(pad, device=self.frames.device)
        # The first frame held begins `pad` samples before `tail`, in samples that are gone; their place is left empty
        return torch.cat([self.tail.new_zeros(pad), self.tail])

    def _iterate(self, magnitudes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        pad = self.extractor.edge_padding
        phase = 2 * math.pi * torch.rand(magnitudes.shape, generator=self.generator)
        spectrum = torch.polar(magnitudes, phase.to(magnitudes.device))
        previous = torch.zeros_like(spectrum)
        for _ in range(self.num_iterations):
            waveform = self._impose(self._to_waveform(spectrum), known, pad)
            rebuilt = self._to_spectrum(waveform, len(magnitudes))
            direction = rebuilt - (_MOMENTUM / (1 + _MOMENTUM)) * previous
            spectrum = magnitudes * direction / direction.abs().clamp(min=1e-12)
            previous = rebuilt
        return self._impose(self._to_waveform(spectrum), known, pad)

    @staticmethod
    def _impose(waveform: torch.Tensor, known: torch.Tensor, pad: int) -> torch.Tensor:
        size = min(len(known), len(waveform))
        if size > pad:
            waveform[pad:size] = known[pad:size]
        return waveform

    def _analysis_window(self, device) -> torch.Tensor:
        fe = self.extractor
        return _window(fe.window_function, fe.win_length, fe.window_periodic, fe.n_fft, 1.0, torch.float32, device)

    def _to_spectrum(self, waveform: torch.Tensor, num_frames: int) -> torch.Tensor:
        fe = self.extractor
        size = (num_frames - 1) * fe.hop_length + fe.n_fft
        waveform = nn.functional.pad(waveform, (0, max(0, size - len(waveform))))[:size]
        return torch.fft.rfft(waveform.unfold(0, fe.n_fft, fe.hop_length) * self._analysis_window(waveform.device))

    def _to_waveform(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Overlap-add with the window that makes analysis and synthesis least-squares inverses."""
        fe = self.extractor
        window = self._analysis_window(spectrum.device)
        frames = torch.fft.irfft(spectrum, n=fe.n_fft) * window
        size = (len(frames) - 1) * fe.hop_length + fe.n_fft

        def overlap_add(columns: torch.Tensor) -> torch.Tensor:
            shape = {"output_size": (1, size), "kernel_size": (1, fe.n_fft), "stride": (1, fe.hop_length)}
            return nn.functional.fold(columns.T[None], **shape)[0, 0, 0]

        weight = overlap_add(window.square().expand_as(frames))
        return overlap_add(frames) / weight.clamp(min=1e-3)


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
    """The vocoder that `config` names.

    Raises:
        ValueError: It cannot be built.
    """
    if config.vocoder_type == "griffin_lim":
        return GriffinLimVocoder(config)
    raise ValueError(f"`vocoder_type` {config.vocoder_type!r} cannot be built yet; 'griffin_lim' can.")


__all__ = ["GriffinLimStream", "GriffinLimVocoder", "MelLLMVocoder", "build_vocoder", "mel_to_magnitude"]
