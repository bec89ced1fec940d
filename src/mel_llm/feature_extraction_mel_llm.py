"""Waveform to log-mel frames: the only front end of the model, and nothing about text or models."""

import functools
import inspect
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, window_function
from transformers.processing_utils import AudioKwargs
from transformers.utils import PaddingStrategy, TensorType, logging

from .audio_utils_mel_llm import check_sampling_rate, load_audio, to_mono_float


logger = logging.get_logger(__name__)

# What differs from the constructor's defaults, by name.
PRESETS: dict[str, dict[str, Any]] = {
    # Mel-LLM (arXiv 2606.10231) keeps the front end of Phi-4-multimodal; equal to Phi4MultimodalFeatureExtractor.
    "phi4": {},
    # MELLE (arXiv 2407.08551), and the mel that SpeechT5's HiFi-GAN was trained on; 62.5 frames per second. MELLE
    # states rate, FFT, hop, bins, range and log10; the rest is SpeechT5FeatureExtractor's.
    "hifigan16k": {
        "hop_length": 256,
        "win_length": 1024,
        "n_fft": 1024,
        "window_function": "hann",
        "window_periodic": True,
        "preemphasis": 0.0,
        "waveform_scale": 1.0,
        "power": 1.0,
        "mel_scale": "slaney",
        "mel_norm": "slaney",
        "triangularize_in_mel_space": False,
        "mel_min_frequency": 80.0,
        "mel_max_frequency": 7600.0,
        "mel_floor": 1e-10,
        "log": "log10",
        "edge_padding": 512,
    },
    # SPECTRON (arXiv 2305.15255). 128 bins, 16 kHz and 10 ms come from a summary of the paper; 20-8000 Hz is
    # unconfirmed. All else is ours: window, FFT (512 points leave low mel filters empty), scale, floor, edge padding.
    "spectron": {
        "feature_size": 128,
        "n_fft": 1024,
        "window_function": "hann",
        "window_periodic": True,
        "preemphasis": 0.0,
        "waveform_scale": 1.0,
        "power": 1.0,
        "mel_scale": "htk",
        "triangularize_in_mel_space": False,
        "mel_min_frequency": 20.0,
        "mel_max_frequency": 8000.0,
        "mel_floor": 1e-5,
        "edge_padding": 120,
    },
}
PRESET_NAMES = tuple(PRESETS)

# Processors hand the same keywords to every component; these are understood elsewhere or fixed here.
_IGNORED_CALL_KWARGS = frozenset({"padding_side", *AudioKwargs.__annotations__})

_LOGARITHMS = {"ln": torch.log, "log10": torch.log10}
_SUSPICIOUS_PEAK = 100.0  # a float waveform this loud holds integer sample values

# Frames per step of the computation: bounds the memory of hour-long audio and keeps a step inside the CPU's cache.
_CPU_BLOCK_FRAMES = 1024
_ACCELERATOR_BLOCK_FRAMES = 1 << 15

# An untrusted preprocessor_config.json must not be able to ask for gigabytes.
_MAX_FFT, _MAX_MEL_BINS, _MAX_FRAMES_PER_SECOND = 16384, 1024, 1000


class MelLLMFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Log-mel features of speech. The defaults are those of Phi-4-multimodal, which the Mel-LLM paper builds on;
    `from_preset` has others. There is no normalisation here: mean and variance per bin belong to the model.

    A clip's features never depend on its neighbours in the batch: on the CPU they are the same to the last bit. Padding
    is always on the right, whatever `padding_side` says, because the model counts audio tokens from the first frame.

    Args:
        feature_size (`int`, *optional*, defaults to 80): Mel bins per frame; `num_mel_bins` is another name for it.
        sampling_rate (`int`, defaults to 16000): Rate of the waveforms in Hz. Other rates are refused, not converted.
        padding_value (`float`, defaults to 0.0): What frames beyond a clip's end hold.
        hop_length (`int`, defaults to 160): Samples from one frame to the next.
        win_length (`int`, defaults to 400): Samples per frame.
        n_fft (`int`, defaults to 512): FFT length in samples, at least `win_length`.
        window_function (`str`, defaults to `"hamming"`): `"hamming"`, `"hann"`, `"povey"` or `"boxcar"`.
        window_periodic (`bool`, defaults to `False`): Periodic instead of symmetric window.
        preemphasis (`float`, defaults to 0.97): Inside each frame, `x[t] - preemphasis * x[t - 1]`, where the first
            sample is its own predecessor. 0 turns it off.
        waveform_scale (`float`, defaults to 32768.0): The waveform in [-1, 1] is multiplied by it.
        power (`float`, defaults to 2.0): 2.0 for power, 1.0 for magnitude spectra.
        mel_scale (`str`, defaults to `"kaldi"`): `"kaldi"`, `"htk"` or `"slaney"`.
        mel_norm (`str`, *optional*): `"slaney"` divides each filter by its width.
        triangularize_in_mel_space (`bool`, defaults to `True`): Whether filters are triangles in mel or in Hz.
        mel_min_frequency (`float`, defaults to 0.0): Lower end of the first filter in Hz.
        mel_max_frequency (`float`, *optional*, defaults to 7690.0): Upper end of the last filter in Hz; `None` for half
            the sampling rate.
        mel_floor (`float`, defaults to 1.0): Mel values are clamped to at least this before the logarithm. With the
            defaults, silence is exactly 0 and nothing is below it.
        log (`str`, defaults to `"ln"`): `"ln"` or `"log10"`.
        edge_padding (`int`, defaults to 0): Samples of reflect padding at both ends. The paper has none; 120 makes
            frames equal to `samples // 160` with the defaults, so that a vocoder's output lines up (ours).
        return_attention_mask (`bool`, defaults to `True`): Whether calls return the mask unless told otherwise.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    model_input_names: ClassVar[list[str]] = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int | None = None,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        hop_length: int = 160,
        win_length: int = 400,
        n_fft: int = 512,
        window_function: str = "hamming",
        window_periodic: bool = False,
        preemphasis: float = 0.97,
        waveform_scale: float = 32768.0,
        power: float = 2.0,
        mel_scale: str = "kaldi",
        mel_norm: str | None = None,
        triangularize_in_mel_space: bool = True,
        mel_min_frequency: float = 0.0,
        mel_max_frequency: float | None = 7690.0,
        mel_floor: float = 1.0,
        log: str = "ln",
        edge_padding: int = 0,
        return_attention_mask: bool = True,
        num_mel_bins: int | None = None,
        **kwargs: Any,
    ) -> None:
        if feature_size is not None and num_mel_bins is not None and feature_size != num_mel_bins:
            raise ValueError(
                f"`feature_size` and `num_mel_bins` are two names of one number, got {feature_size} and {num_mel_bins}."
            )
        feature_size = next((size for size in (feature_size, num_mel_bins) if size is not None), 80)
        super().__init__(
            feature_size=_whole("feature_size", feature_size, 1, _MAX_MEL_BINS),
            sampling_rate=check_sampling_rate(sampling_rate),
            padding_value=_real("padding_value", padding_value, -1e30, 1e30),  # a float32
            return_attention_mask=bool(return_attention_mask),
            **kwargs,
        )
        self.n_fft = _whole("n_fft", n_fft, 2, _MAX_FFT)
        self.win_length = _whole("win_length", win_length, 1, self.n_fft, "n_fft")
        shortest_hop = math.ceil(self.sampling_rate / _MAX_FRAMES_PER_SECOND)
        self.hop_length = _whole("hop_length", hop_length, shortest_hop, _MAX_FFT)
        self.edge_padding = _whole("edge_padding", edge_padding, 0, self.n_fft, "n_fft")
        self.window_function = _one_of("window_function", window_function, ("hamming", "hann", "povey", "boxcar"))
        self.window_periodic = _one_of("window_periodic", window_periodic, (True, False))
        self.preemphasis = _real("preemphasis", preemphasis, 0.0, 1.0)
        # 2**16 is also where the spectrum of the loudest accepted waveform still fits into float32
        self.waveform_scale = _real("waveform_scale", waveform_scale, 1e-6, 65536.0)
        self.power = _one_of("power", power, (1.0, 2.0))
        self.mel_scale = _one_of("mel_scale", mel_scale, ("kaldi", "htk", "slaney"))
        self.mel_norm = _one_of("mel_norm", mel_norm, (None, "slaney"))
        self.triangularize_in_mel_space = _one_of(
            "triangularize_in_mel_space", triangularize_in_mel_space, (True, False)
        )
        nyquist = self.sampling_rate / 2
        if mel_max_frequency is None:
            mel_max_frequency = nyquist
        self.mel_max_frequency = _real("mel_max_frequency", mel_max_frequency, 1.0, nyquist, "sampling_rate / 2")
        self.mel_min_frequency = _real("mel_min_frequency", mel_min_frequency, 0.0, self.mel_max_frequency)
        if self.mel_min_frequency == self.mel_max_frequency:
            raise ValueError(
                f"`mel_min_frequency` must be below `mel_max_frequency`, got {mel_min_frequency} Hz for both."
            )
        self.mel_floor = _real("mel_floor", mel_floor, 1e-30, 1e30)
        self.log = _one_of("log", log, tuple(_LOGARITHMS))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MelLLMFeatureExtractor":
        """Build one of the known front ends.

        Args:
            name (`str`): `"phi4"` (Mel-LLM), `"hifigan16k"` (MELLE and SpeechT5's HiFi-GAN) or `"spectron"` (SPECTRON;
                partly unconfirmed, see `PRESETS`).
            overrides: Constructor arguments that differ from the preset.

        Raises:
            TypeError: An override is no constructor argument.
            ValueError: There is no preset of that name, or an argument is out of its range.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(PRESET_NAMES)}, got {name!r}.")
        if "num_mel_bins" in overrides:
            overrides["feature_size"] = overrides.pop("num_mel_bins")
        unknown = sorted(set(overrides) - set(inspect.signature(cls).parameters))
        if unknown:
            raise TypeError(f"from_preset() got unexpected keyword arguments: {', '.join(unknown)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # `from_pretrained(folder, num_mel_bins=...)` overrides saved keys only, and the saved key is `feature_size`
        if "num_mel_bins" in kwargs:
            kwargs["feature_size"] = kwargs.pop("num_mel_bins")
        return super().from_dict(feature_extractor_dict, **kwargs)

    @property
    def num_mel_bins(self) -> int:
        """Mel bins per frame; the same number as `feature_size`."""
        return self.feature_size

    @property
    def padding_side(self) -> str:
        """Always `"right"`. Setting it is ignored: a processor may hand on what was meant for the tokenizer."""
        return "right"

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        if side != "right":
            logger.warning_once(
                f"`padding_side={side!r}` does not apply to audio, which is always padded on the right."
            )

    def num_frames(self, num_samples: "int | torch.Tensor | np.ndarray") -> "int | torch.Tensor | np.ndarray":
        """Frames that a clip of `num_samples` (at least 1) samples has; at least one, of any shape that goes in."""
        beyond_first = num_samples + 2 * self.edge_padding - self.win_length
        if isinstance(beyond_first, (int, np.integer)):
            return max(int(beyond_first), 0) // self.hop_length + 1
        return beyond_first.clip(min=0) // self.hop_length + 1

    def __call__(
        self,
        raw_speech: "np.ndarray | torch.Tensor | Sequence[float] | Sequence[np.ndarray] | Sequence[torch.Tensor]",
        sampling_rate: int | None = None,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | TensorType | None = None,
        return_attention_mask: bool | None = None,
        device: "str | torch.device | None" = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Compute the log-mel frames of one clip or of a list of clips.

        Args:
            raw_speech: A waveform `(samples,)` as NumPy array, torch tensor or list of floats; a single
                `(channels, samples)` array, which is averaged to mono; or a list of these as a batch. Floats are
                expected in [-1, 1]; int16, int32 and uint8 arrays are scaled by their full range. A matrix is never
                taken for a batch. Clips shorter than one window are padded with zeros to one frame.
            sampling_rate (`int`, *optional*): Rate of `raw_speech` in Hz, for checking.
            padding (`bool` or `str`, defaults to `True`): `True` or `"longest"`; `"max_length"`; `False` for none.
            max_length (`int`, *optional*): In frames, for `padding="max_length"` and `truncation`.
            truncation (`bool`, defaults to `False`): Drop frames beyond `max_length`.
            pad_to_multiple_of (`int`, *optional*): In frames; rounds the padded length and `max_length` up.
            return_tensors (`str`, *optional*): `"pt"`, `"np"`, or `None` for lists of one NumPy array per clip.
            return_attention_mask (`bool`, *optional*): Defaults to the constructor's value, `True` there.
            device (`str` or `torch.device`, defaults to `"cpu"`): Where to compute. On the CPU clip by clip, so that no
                work is spent on padding; elsewhere the padded batch at once, and with `"pt"` the results stay there.
            kwargs: `padding_side` and other keywords that processors forward to every component are ignored.

        Returns:
            [`BatchFeature`] with
            - **input_features** `(batch, frames, num_mel_bins)`, float32.
            - **attention_mask** `(batch, frames)`, int64, 1 on the frames of the clip.

        Raises:
            TypeError: `raw_speech` is no audio, or a keyword is unknown.
            ValueError: Wrong sampling rate; empty, non-finite or ambiguous audio; contradictory padding arguments.
        """
        unknown = sorted(set(kwargs) - _IGNORED_CALL_KWARGS)
        if unknown:
            raise TypeError(f"{type(self).__name__}() got unexpected keyword arguments: {', '.join(unknown)}")
        self._check_rate_of_input(sampling_rate)
        waveforms = [self._pad_waveform(clip) for clip in _split_into_clips(raw_speech)]
        lengths = [(len(waveform) - self.n_fft) // self.hop_length + 1 for waveform in waveforms]
        lengths, total = _plan_padding(lengths, padding, max_length, truncation, pad_to_multiple_of)

        device = torch.device("cpu" if device is None else device)
        shape = (len(waveforms), max(lengths) if total is None else total, self.feature_size)
        features = torch.full(shape, self.padding_value, dtype=torch.float32, device=device)
        write = self._write_clip_by_clip if device.type == "cpu" else self._write_whole_batch
        write(waveforms, lengths, features)

        data = {"input_features": features, "attention_mask": _frame_mask(lengths, features).long()}
        if not (self.return_attention_mask if return_attention_mask is None else return_attention_mask):
            del data["attention_mask"]
        return _to_batch_feature(data, None if total is not None else lengths, return_tensors)

    def pad(
        self,
        processed_features: Any,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """
        Pad features that were computed one by one; see [`SequenceFeatureExtractor.pad`] for the arguments.

        Args:
            processed_features: Most often a list of `{"input_features": (frames, num_mel_bins)}`.
            padding_side: Ignored; always right.

        Returns:
            [`BatchFeature`] with `input_features (batch, frames, num_mel_bins)` and, unless turned off, `attention_mask
            (batch, frames)` in int64.
        """
        batch = super().pad(
            processed_features,
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )
        mask = batch.get("attention_mask")  # int32 upstream
        if isinstance(mask, torch.Tensor):
            batch["attention_mask"] = mask.long()
        elif isinstance(mask, np.ndarray) and mask.dtype != object:
            batch["attention_mask"] = mask.astype(np.int64)
        elif mask is not None:
            batch["attention_mask"] = [np.asarray(row, dtype=np.int64) for row in mask]
        return batch

    def fetch_audio(self, audio_url_or_urls: Any, sampling_rate: int | None = None) -> Any:
        """Read paths, URLs, `data:` URIs, bytes and audio dicts with `load_audio`; pass waveforms through as they are.

        Args:
            audio_url_or_urls: One source or a (nested) list of sources.
            sampling_rate (`int`, *optional*): Wanted rate in Hz; defaults to the feature extractor's.

        Returns:
            A waveform `(samples,)`, or a list of waveforms for a list.
        """
        source = audio_url_or_urls
        if isinstance(source, (str, os.PathLike, bytes, dict)):
            return load_audio(source, sampling_rate or self.sampling_rate)
        if isinstance(source, (list, tuple)) and not (source and isinstance(source[0], (int, float))):
            return [self.fetch_audio(item, sampling_rate) for item in source]
        return source

    def _check_rate_of_input(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning_once(
                f"Pass `sampling_rate` to `{type(self).__name__}()`: without it a waveform at another rate than "
                f"{self.sampling_rate} Hz gives wrong features in silence."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`raw_speech` is at {sampling_rate} Hz, but this feature extractor needs {self.sampling_rate} Hz. "
                f"Resample it first, e.g. `mel_llm.load_audio((array, {sampling_rate}), {self.sampling_rate})`."
            )

    def _pad_waveform(self, clip: np.ndarray) -> np.ndarray:
        """Reflect padding at the ends, zeros up to one window, and zeros that let the last frame span a whole FFT."""
        if self.edge_padding:
            clip = np.pad(clip, self.edge_padding, mode="reflect")
        return np.pad(clip, (0, max(0, self.win_length - len(clip)) + self.n_fft - self.win_length))

    def _write_clip_by_clip(self, waveforms: list[np.ndarray], lengths: list[int], out: torch.Tensor) -> None:
        for row, waveform, length in zip(out, waveforms, lengths, strict=True):
            self._write_log_mel(torch.from_numpy(waveform)[None], row[None, :length], _CPU_BLOCK_FRAMES)

    def _write_whole_batch(self, waveforms: list[np.ndarray], lengths: list[int], out: torch.Tensor) -> None:
        """One transfer and few launches; what this computes beyond a clip's end is overwritten."""
        block_frames = max(1, _ACCELERATOR_BLOCK_FRAMES // len(waveforms))
        self._write_log_mel(_stack(waveforms).to(out.device), out[:, : max(lengths)], block_frames)
        out.masked_fill_(~_frame_mask(lengths, out)[..., None], self.padding_value)

    def _write_log_mel(self, waveforms: torch.Tensor, out: torch.Tensor, block_frames: int) -> None:
        """Fill `out (batch, frames, num_mel_bins)` from padded `waveforms (batch, samples)`, block by block."""
        num_frames = out.shape[1]
        for start in range(0, num_frames, block_frames):
            stop = min(start + block_frames, num_frames)
            samples = waveforms[:, start * self.hop_length : (stop - 1) * self.hop_length + self.n_fft]
            out[:, start:stop] = self._log_mel(samples)

    def _log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """Log-mel frames `(batch, frames, num_mel_bins)` of `samples (batch, samples)`, which they cover exactly.

        Like the reference, pre-emphasis is in float32 and the FFT in float64: in float32 the quiet bins beside loud
        ones lose their digits. The product with the mel filters is as precise as the device allows: not under autocast,
        and not in TF32, which training scripts turn on for GPUs but which leaves float64 alone.
        """
        device = samples.device
        real = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        window = _window(
            self.window_function,
            self.win_length,
            self.window_periodic,
            self.n_fft,
            self.waveform_scale,
            real,
            device,
        )
        filters = _mel_filters(
            self.n_fft // 2 + 1,
            self.feature_size,
            self.mel_min_frequency,
            self.mel_max_frequency,
            self.sampling_rate,
            self.mel_norm,
            self.mel_scale,
            self.triangularize_in_mel_space,
            torch.float32 if device.type == "cpu" else real,
            device,
        )
        emphasised = samples
        if self.preemphasis:
            emphasised = samples.clone()
            emphasised[:, 1:] -= self.preemphasis * samples[:, :-1]
        frames = emphasised.to(real).unfold(-1, self.n_fft, self.hop_length) * window
        if self.preemphasis:
            # The first sample of a frame is its own predecessor, not the last sample of the hop before.
            first = samples[:, :: self.hop_length][:, : frames.shape[1]]
            frames[..., 0] = (first - self.preemphasis * first).to(real) * window[0]
        # Seven digits are enough from here on, and float32 is faster; so is this sum than `abs() ** 2`.
        parts = torch.view_as_real(torch.fft.rfft(frames).to(torch.complex64))
        spectrum = parts[..., 0].square().addcmul_(parts[..., 1], parts[..., 1])
        if self.power == 1.0:
            spectrum = spectrum.sqrt_()
        with torch.autocast(device.type, enabled=False):
            mel = spectrum.to(filters.dtype) @ filters
        return _LOGARITHMS[self.log](mel.clamp_(min=self.mel_floor))


# Derived tables are functions of plain numbers and cached here instead of on the instance, so that a feature extractor
# stays small to pickle for data-loader workers, has nothing to hide from its JSON, and can never hold a stale table.
@functools.lru_cache(maxsize=32)
def _window(
    name: str, length: int, periodic: bool, n_fft: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`(n_fft,)`, the window followed by zeros: it cuts the frame out, scales it and pads it for the FFT at once."""
    window = np.zeros(n_fft)
    window[:length] = window_function(length, name, periodic=periodic) * scale
    return torch.from_numpy(window).to(device, dtype)


@functools.lru_cache(maxsize=32)
def _mel_filters(
    num_frequency_bins: int,
    num_mel_bins: int,
    min_frequency: float,
    max_frequency: float,
    sampling_rate: int,
    norm: str | None,
    mel_scale: str,
    triangularize_in_mel_space: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """`(num_frequency_bins, num_mel_bins)`"""
    filters = mel_filter_bank(
        num_frequency_bins=num_frequency_bins,
        num_mel_filters=num_mel_bins,
        min_frequency=min_frequency,
        max_frequency=max_frequency,
        sampling_rate=sampling_rate,
        norm=norm,
        mel_scale=mel_scale,
        triangularize_in_mel_space=triangularize_in_mel_space,
    )
    return torch.from_numpy(np.ascontiguousarray(filters)).to(device, dtype)


def _split_into_clips(raw_speech: Any) -> list[np.ndarray]:
    """One mono float32 array per clip."""
    if isinstance(raw_speech, (list, tuple)) and len(raw_speech) == 0:
        raise ValueError("`raw_speech` is an empty list: pass at least one clip.")
    if isinstance(raw_speech, (list, tuple)) and isinstance(raw_speech[0], (list, tuple, np.ndarray, torch.Tensor)):
        clips = [to_mono_float(clip, f"raw_speech[{index}]") for index, clip in enumerate(raw_speech)]
    else:
        if getattr(raw_speech, "ndim", 1) == 2 and raw_speech.shape[0] > 1:
            logger.warning_once(
                "`raw_speech` has two dimensions: its rows are averaged as the channels of one clip. "
                "Pass a batch as a list of 1-D arrays."
            )
        clips = [to_mono_float(raw_speech, "raw_speech")]
    if any(max(-clip.min(), clip.max()) > _SUSPICIOUS_PEAK for clip in clips):
        logger.warning_once(
            f"`raw_speech` has floats beyond {_SUSPICIOUS_PEAK:g}, where [-1, 1] is expected. Integer samples must be "
            "passed in their integer dtype or divided by their full range."
        )
    return clips


def _plan_padding(
    lengths: list[int],
    padding: bool | str | PaddingStrategy | None,
    max_length: int | None,
    truncation: bool | str | None,
    pad_to_multiple_of: int | None,
) -> tuple[list[int], int | None]:
    """Frames to keep of each clip, and frames of the padded batch (`None` for no padding)."""
    strategy = {True: PaddingStrategy.LONGEST, None: PaddingStrategy.LONGEST, False: PaddingStrategy.DO_NOT_PAD}.get(
        padding, padding
    )
    strategy = PaddingStrategy(strategy)
    multiple = 1 if pad_to_multiple_of is None else _whole("pad_to_multiple_of", pad_to_multiple_of, 1)
    truncate = truncation not in (None, False, "do_not_truncate")
    if max_length is not None:
        max_length = _round_up(_whole("max_length", max_length, 1), multiple)
    elif truncate or strategy == PaddingStrategy.MAX_LENGTH:
        raise ValueError("`max_length` (frames) is needed with `truncation=True` or `padding='max_length'`.")
    if truncate:
        lengths = [min(length, max_length) for length in lengths]
    if strategy == PaddingStrategy.DO_NOT_PAD:
        return lengths, None
    if strategy == PaddingStrategy.LONGEST:
        return lengths, _round_up(max(lengths), multiple)
    if max(lengths) > max_length:
        raise ValueError(
            f"A clip has {max(lengths)} frames, more than `max_length={max_length}`: raise it or pass `truncation=True`."
        )
    return lengths, max_length


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _frame_mask(lengths: list[int], features: torch.Tensor) -> torch.Tensor:
    """`(batch, frames)`, true on the frames of each clip."""
    frames = torch.arange(features.shape[1], device=features.device)
    return frames[None, :] < torch.tensor(lengths, device=features.device)[:, None]


def _stack(waveforms: list[np.ndarray]) -> torch.Tensor:
    """`(batch, samples)`, zeros on the right."""
    stacked = torch.zeros(len(waveforms), max(map(len, waveforms)), device="cpu")
    for row, waveform in zip(stacked, waveforms, strict=True):
        row[: len(waveform)] = torch.from_numpy(waveform)
    return stacked


def _to_batch_feature(
    data: dict[str, torch.Tensor], lengths: list[int] | None, return_tensors: str | TensorType | None
) -> BatchFeature:
    """Tensors, arrays or lists of arrays, as asked; cut to `lengths` where given."""
    if return_tensors is None or TensorType(return_tensors) != TensorType.PYTORCH:
        data = {key: value.cpu().numpy() for key, value in data.items()}
    if lengths is not None:
        data = {key: [row[:length] for row, length in zip(value, lengths, strict=True)] for key, value in data.items()}
    elif return_tensors is None:
        data = {key: list(value) for key, value in data.items()}
    return BatchFeature(data, tensor_type=return_tensors)


def _whole(name: str, value: Any, minimum: int, maximum: int | None = None, limit: str | None = None) -> int:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}" + (f" (`{limit}`)" if limit else "")
        raise ValueError(f"`{name}` must be a whole number of at least {minimum}{upper}, got {value!r}.")
    return int(value)


def _real(
    name: str, value: Any, minimum: float | None = None, maximum: float | None = None, limit: str | None = None
) -> float:
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    # By comparison: math.isfinite() fails for the integers that JSON can hold
    if not is_real or not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        upper = f"{maximum:g}" + (f" (`{limit}`)" if limit else "")
        raise ValueError(f"`{name}` must be from {minimum:g} to {upper}, got {value!r}.")
    return float(value)


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return choices[choices.index(value)]


__all__ = ["PRESET_NAMES", "MelLLMFeatureExtractor"]
