"""Configuration of Mel-LLM: the audio front end, the text backbone, and (optionally) the speech head and the vocoder.

This is the first module that both the installed package and a Hub repository's remote code import, so it is also the
place that announces the model to the two static name tables that clients of transformers consult (see the end).

Where each default comes from is said field by field: "paper" is what the Mel-LLM paper or the model it builds on
states, "ours" is a choice of this package.
"""

import difflib
import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto


if TYPE_CHECKING:
    from .sharing_mel_llm import AUTO_MAP  # noqa: F401  (see there: whoever copies this file copies all)


# What a config.json from anybody may ask for at most. Far above any real model, far below what would exhaust a machine's
# memory through one mistyped digit.
_MAX_SIZE = 1 << 20
_MAX_WIDTH = 1 << 14
_MAX_MEL_BINS = 1024
_MAX_WEIGHTS = 1 << 30  # of one layer of ours, or of a vocoder: 4 GB in float32
# The same for the language model, by the names that transformers gives its sizes. The largest open models have some 130
# layers of width 18k, tables of 262k tokens and 10M positions.
_MAX_TEXT_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": _MAX_WIDTH,
    "max_position_embeddings": 1 << 26,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "n_routed_experts": 4096,
}
_MAX_TEXT_WEIGHTS = 1 << 34


def _fail(owner: str, name: str, value: Any, expected: str) -> None:
    raise ValueError(f"{owner}: `{name}` must be {expected}, got {value!r}.")


def _check_int(config: PreTrainedConfig, name: str, minimum: int = 1, maximum: int = _MAX_SIZE) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        _fail(type(config).__name__, name, value, f"an integer from {minimum} to {maximum}")


def _check_number(
    config: PreTrainedConfig, name: str, minimum: float = -math.inf, maximum: float = math.inf, optional: bool = False
) -> None:
    value = getattr(config, name)
    if optional and value is None:
        return
    # By comparison: math.isfinite() fails for the integers that JSON can hold
    is_number = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not is_number or not minimum <= value <= maximum:
        _fail(type(config).__name__, name, value, f"a finite number from {minimum} to {maximum}")


def _check_choice(config: PreTrainedConfig, name: str, choices: tuple) -> None:
    value = getattr(config, name)
    # `value not in choices` alone would let True pass for 1
    if isinstance(value, bool) or value not in choices:
        _fail(type(config).__name__, name, value, f"one of {', '.join(map(repr, choices))}")


def _check_bool(config: PreTrainedConfig, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, bool):
        _fail(type(config).__name__, name, value, "True or False")


def _is_size(value: Any, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and 1 <= len(value) <= 16 and all(_is_size(item, 1, 256) for item in value)


def _check_weights(config: PreTrainedConfig, names: str, number: int, maximum: int = _MAX_WEIGHTS) -> None:
    """Refuses sizes that are possible one by one, but not together."""
    if number > maximum:
        raise ValueError(
            f"{type(config).__name__}: {names} would make {number:,} weights together; at most {maximum:,} are allowed."
        )


def _check_token_ids(config: PreTrainedConfig, name: str, vocab_size: int) -> None:
    """A token id, or for the end of text a list of them; `None` where there is none."""
    value = getattr(config, name)
    if value is None:
        return
    many = isinstance(value, list | tuple) and name == "eos_token_id"
    ids = value if many else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        _fail(type(config).__name__, name, value, f"a token id from 0 to {vocab_size - 1}")


def _check_unknown(config: PreTrainedConfig, kwargs: dict) -> None:
    """Refuses fields that are not there but look like one that is. Other unknown fields are kept, as in any config."""
    known = [name for name in type(config).__dataclass_fields__ if not name.startswith("_")]
    for name in kwargs:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close and not hasattr(PreTrainedConfig, name):
            raise ValueError(f"{type(config).__name__}: there is no `{name}`; did you mean `{close[0]}`?")


class MelLLMAudioConfig(PreTrainedConfig):
    r"""The way from log-mel frames to tokens of the language model.

    Args:
        num_mel_bins (`int`, defaults to 80): Mel bins per frame (paper).
        sampling_rate (`int`, defaults to 16000): Hz of the waveform that the frames were made from (paper).
        hop_length (`int`, defaults to 160): Samples between two frames; `sampling_rate / hop_length` frames a second
            (paper: 100 Hz).
        embedder_type (`str`, defaults to `"conv"`): `"conv"` is the depthwise-separable convolution stem of
            Phi-4-multimodal ("NeMoConv", paper); `"linear"` stacks `reduction_factor` frames and leaves the rest to
            the projector (the abstract's plain linear patches).
        reduction_factor (`int`, defaults to 8): Frames per audio token, a power of two up to 16. 8 gives 12.5 tokens
            a second (paper); 1 disables the convolution, as in the paper's 100 Hz variant.
        conv_channels (`int`, defaults to 1024): Channels of the convolutions (paper).
        conv_activation (`str`, defaults to `"relu"`): Activation between the convolutions (paper).
        hidden_size (`int`, defaults to 1024): Width of the stem's output (paper).
        projector_type (`str`, defaults to `"mlp"`): `"mlp"` is Linear, activation, Linear (paper); `"linear"` one
            Linear.
        projector_activation (`str`, defaults to `"gelu"`): Activation inside the projector (paper).
        projector_dropout (`float`, defaults to 0.0): Dropout on the projected tokens (Phi-4-multimodal's `embd_pdrop`).
        encoder_type (`str`, defaults to `"none"`): `"none"` is Mel-LLM. `"conformer"` puts Phi-4-multimodal's speech
            encoder between stem and projector: the paper's encoder baselines.
        encoder_config (`dict`, *optional*): Fields of `Phi4MultimodalAudioConfig` for `encoder_type="conformer"`.
        bidirectional_attention (`bool`, defaults to `False`): Let the audio tokens of one clip see each other in both
            directions inside the language model (ours; the paper's attention is causal).
        ctc_weight (`float`, defaults to 0.0): With more than 0, the states of the audio tokens also spell the transcript,
            byte by byte, through a CTC head, and this times its loss joins the cross-entropy where `transcript_bytes` are given
            (ours; a push to listen that the cross-entropy lacks on little data).
        ctc_layer (`int`, *optional*): Layers of the language model below that head; two thirds of them when not given.
        ctc_rate (`int`, defaults to 1): Letters that the head may write for an audio token. English has some 15 a second.
        ctc_decoding_weight (`float`, defaults to 0.0): What the head counts in writing transcripts, from 0 to 1, beside the
            language model; see [`~ctc_decoding_mel_llm.CTCLogitsProcessor`] (ours). An argument of `generate()` too.
        max_source_positions (`int`, defaults to 3750): Most audio tokens that one clip is expected to have (300 s at
            the default rate). Serving engines plan their memory with it; longer clips are not refused (ours).
        max_audio_seconds (`float`, defaults to 30.0): Longest piece that the model was trained on, in seconds, from 1
            on. Long-form transcription cuts audio into pieces of at most this; longer clips passed to `generate()`
            are not refused (ours).
        silence_threshold (`float`, *optional*): A clip whose loudest frame has a mean log-mel below this is silent:
            `generate()` gives it an empty transcript. In the units of the features, so it depends on how they are
            made; [`mel_llm.conversion.from_text_llm`] sets it for its feature extractor. `None` turns it off (ours).
        initializer_range (`float`, defaults to 0.02): Standard deviation for modules without an initialisation of
            their own.
    """

    model_type = "mel_llm_audio"
    base_config_key = "audio_config"

    num_mel_bins: int = 80
    sampling_rate: int = 16000
    hop_length: int = 160
    embedder_type: str = "conv"
    reduction_factor: int = 8
    conv_channels: int = 1024
    conv_activation: str = "relu"
    hidden_size: int = 1024
    projector_type: str = "mlp"
    projector_activation: str = "gelu"
    projector_dropout: float = 0.0
    encoder_type: str = "none"
    encoder_config: dict | None = None
    bidirectional_attention: bool = False
    ctc_weight: float = 0.0
    ctc_layer: int | None = None
    ctc_rate: int = 1
    ctc_decoding_weight: float = 0.0
    max_source_positions: int = 3750
    max_audio_seconds: float = 30.0
    silence_threshold: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in ("sampling_rate", "hop_length"):
            _check_int(self, name)
        _check_int(self, "num_mel_bins", maximum=_MAX_MEL_BINS)
        for name in ("conv_channels", "hidden_size"):
            _check_int(self, name, maximum=_MAX_WIDTH)
        _check_int(self, "max_source_positions", maximum=1 << 30)
        _check_choice(self, "embedder_type", ("conv", "linear"))
        _check_number(self, "ctc_weight", 0.0)
        _check_int(self, "ctc_rate", maximum=16)
        if self.ctc_layer is not None:
            _check_int(self, "ctc_layer", maximum=1 << 16)
        _check_number(self, "ctc_decoding_weight", 0.0, 1.0)
        if self.ctc_decoding_weight and not self.ctc_weight:
            _fail(
                type(self).__name__,
                "ctc_decoding_weight",
                self.ctc_decoding_weight,
                "0 without a head: ctc_weight is 0",
            )
        _check_choice(self, "reduction_factor", (1, 2, 4, 8, 16))
        _check_choice(self, "projector_type", ("mlp", "linear"))
        _check_choice(self, "encoder_type", ("none", "conformer"))
        _check_number(self, "projector_dropout", 0.0, 1.0)
        _check_number(self, "max_audio_seconds", 1.0, 86400.0)
        _check_number(self, "silence_threshold", optional=True)
        _check_number(self, "initializer_range", 0.0)
        _check_bool(self, "bidirectional_attention")
        for name in ("conv_activation", "projector_activation"):
            _check_choice(self, name, tuple(ACT2FN))
        if self.encoder_type == "conformer" and not self.has_conv:
            _fail(
                type(self).__name__,
                "encoder_type",
                self.encoder_type,
                '"none" unless `embedder_type="conv"` and `reduction_factor` >= 2 (the encoder follows the convolution)',
            )
        if self.has_conv:
            flat_size = self.conv_channels * math.ceil(self.num_mel_bins / self.reduction_factor)
            _check_weights(self, "`conv_channels`, `num_mel_bins` and `hidden_size`", flat_size * self.hidden_size)
        if self.encoder_type == "none" and self.encoder_config is not None:
            _fail(type(self).__name__, "encoder_config", self.encoder_config, 'None while `encoder_type="none"`')
        if self.encoder_config is not None:
            from transformers import Phi4MultimodalAudioConfig

            fields = Phi4MultimodalAudioConfig().to_dict()
            if not isinstance(self.encoder_config, dict) or not self.encoder_config.keys() <= fields.keys():
                _fail(
                    type(self).__name__,
                    "encoder_config",
                    self.encoder_config,
                    "a dict of fields of Phi4MultimodalAudioConfig",
                )
            self._check_encoder_sizes({**fields, **self.encoder_config})
        _check_unknown(self, kwargs)
        super().__post_init__(**kwargs)

    def _check_encoder_sizes(self, fields: dict) -> None:
        limits = dict.fromkeys(
            ("intermediate_size", "num_attention_heads", "ext_pw_out_channel", "bias_max_distance"), _MAX_WIDTH
        )
        limits.update(nemo_conv_channels=_MAX_WIDTH, kernel_size=255, num_blocks=256, depthwise_multiplier=16)
        for name, most in limits.items():
            if not _is_size(fields[name], 1, most):
                _fail(
                    type(self).__name__, "encoder_config", fields[name], f"a dict whose `{name}` is from 1 to {most}"
                )
        for name in (
            "hidden_size",
            "ext_pw_out_channel",
            "depthwise_separable_out_channel",
            "input_size",
            "time_reduction",
        ):
            own = {"input_size": self.num_mel_bins, "time_reduction": self.reduction_factor}.get(
                name, self.hidden_size
            )
            if self.encoder_config.get(name, own) != own:
                _fail(
                    type(self).__name__,
                    "encoder_config",
                    self.encoder_config,
                    f"a dict whose `{name}` is {own}, if any",
                )
        width = 8 * self.hidden_size + 3 * fields["intermediate_size"]
        _check_weights(
            self, "the sizes in `encoder_config`", fields["num_blocks"] * self.hidden_size * width, 16 * _MAX_WEIGHTS
        )

    @property
    def has_conv(self) -> bool:
        """Whether the stem convolves; without it, frames are stacked and go to the projector as they are."""
        return self.embedder_type == "conv" and self.reduction_factor > 1

    @property
    def embedder_size(self) -> int:
        """Width of what the stem hands to the projector."""
        return self.hidden_size if self.has_conv else self.reduction_factor * self.num_mel_bins

    @property
    def frame_rate(self) -> float:
        """Mel frames per second."""
        return self.sampling_rate / self.hop_length

    def num_audio_tokens(self, num_frames):
        """Audio tokens for a number of frames: `ceil(frames / reduction_factor)`, for an `int` or a tensor (paper)."""
        return (num_frames + self.reduction_factor - 1) // self.reduction_factor


class MelLLMSpeechConfig(PreTrainedConfig):
    r"""The head that writes mel patches. A checkpoint without one only reads.

    The defaults are the objective that the Mel-LLM paper states (KL 0.05, flux 0.5, stop 1.0, dropout 0.5); the sizes
    are those of MELLE, whose head it is; the reduction factor is the audio config's, which the paper leaves open.

    Args:
        head_type (`str`, defaults to `"vae"`): `"vae"` (Mel-LLM), `"sigma_vae"` or `"deterministic"` (SPECTRON).
        reduction_factor (`int`, *optional*): Frames that are written at a time, a power of two up to 16; the audio config's
            when not given, and no other with `share_embed`. SPECTRON writes frame by frame, 1, whatever its encoder does.
        head_hidden_size (`int`, defaults to 256): Width of the residual MLP (MELLE).
        postnet_layers (`int`, defaults to 5), postnet_channels (`int`, defaults to 256), postnet_kernel_size (`int`,
            defaults to 5): The convolutional post-net (MELLE); 0 layers leave it out.
        history_dropout (`float`, defaults to 0.5): Dropout on the embedded history, in training and inference (paper).
        share_embed (`bool`, defaults to `True`): Embed the history with the reading side's stem (ours) instead of a
            pre-net of its own.
        prenet_hidden_size (`int`, defaults to 256): Width of that pre-net; SPECTRON's is a bottleneck.
        kl_weight (`float`, defaults to 0.05), kl_prior (`str`, defaults to `"target"`), kl_warmup_steps (`int`,
            defaults to 10000): The KL term: weight (paper), prior N(target, I) (MELLE) or `"standard"` N(0, I), and
            steps at weight 0 (MELLE).
        flux_weight (`float`, defaults to 0.5), flux_type (`str`, defaults to `"absolute"`): The spectrogram flux term:
            weight (paper), and `"absolute"` (MELLE) or `"clipped"` (ours).
        stop_weight (`float`, defaults to 1.0), stop_positive_weight (`float`, defaults to 100.0): The stop term
            (paper; MELLE).
        delta_weight (`float`, defaults to 0.0), delta_lags (`int`, defaults to 2): SPECTRON's difference terms: of
            neighbouring bins, and of frames 1 to `delta_lags` apart.
        ctc_weight (`float`, defaults to 0.0), ctc_rate (`int`, defaults to 1): A CTC loss of the text's letters on the states
            that predict patches, and the letters that each has room for (ours): to say which letters come, a state must find
            its place in the text. In training alone; 0 leaves it out. Not scaled by `loss_scale`.
        loss_scale (`float`, defaults to 1.0): Factor of the rest of the objective (ours); 1 / `num_mel_bins` brings its sums
            over bins to the size of a cross-entropy, for training both directions in one run.
        min_tokens_per_second (`float`, defaults to 1.5): Speech is cut after this: a text of n tokens may take
            2 seconds and n over this (ours).
        max_silence_seconds (`float`, defaults to 2.0): Speech that has been silent for so long is over (ours).
        keep_voice (`bool`, defaults to `True`): In a text of several sentences, the first one's speech is the voice prompt of the
            others; off for a model of one voice, which was taught no prompts (ours).
    """

    model_type = "mel_llm_speech"
    base_config_key = "speech_config"
    # "paper" is the objective as published, with what it leaves open taken from MELLE; "small" is ours: flux that
    # cannot run away, a warm-up as short as a small run, and a loss of the size of a cross-entropy.
    PRESETS: ClassVar[dict[str, dict]] = {
        "paper": {},
        "small": {
            "head_hidden_size": 256,
            "postnet_layers": 3,
            "postnet_channels": 128,
            "history_dropout": 0.2,
            "kl_warmup_steps": 200,
            "flux_type": "clipped",
            "loss_scale": 1 / 80,
        },
        # SPECTRON (arXiv 2305.15255): frame by frame, a bottleneck pre-net, L1 + L2 of the frames and of their differences,
        # nothing random. Unconfirmed or ours: the widths, two lags, the scale of the loss, no dropout, and the stop head,
        # since the paper's stop rule is not known.
        "spectron": {
            "head_type": "deterministic",
            "reduction_factor": 1,
            "share_embed": False,
            "prenet_hidden_size": 256,
            "head_hidden_size": 1024,
            "postnet_layers": 0,
            "history_dropout": 0.0,
            "delta_weight": 1.0,
            "delta_lags": 2,
            "loss_scale": 1 / 128,
        },
    }

    head_type: str = "vae"
    reduction_factor: int | None = None
    head_hidden_size: int = 256
    postnet_layers: int = 5
    postnet_channels: int = 256
    postnet_kernel_size: int = 5
    history_dropout: float = 0.5
    share_embed: bool = True
    prenet_hidden_size: int = 256
    kl_weight: float = 0.05
    kl_prior: str = "target"
    kl_warmup_steps: int = 10000
    flux_weight: float = 0.5
    flux_type: str = "absolute"
    stop_weight: float = 1.0
    stop_positive_weight: float = 100.0
    delta_weight: float = 0.0
    delta_lags: int = 2
    ctc_weight: float = 0.0
    ctc_rate: int = 1
    loss_scale: float = 1.0
    min_tokens_per_second: float = 1.5
    max_silence_seconds: float = 2.0
    keep_voice: bool = True

    def __post_init__(self, **kwargs):
        _check_choice(self, "head_type", ("vae", "sigma_vae", "deterministic"))
        if self.reduction_factor is not None:
            _check_choice(self, "reduction_factor", (1, 2, 4, 8, 16))
        for name in ("head_hidden_size", "postnet_channels", "prenet_hidden_size"):
            _check_int(self, name, maximum=_MAX_WIDTH)
        for name in ("postnet_kernel_size", "delta_lags"):
            _check_int(self, name, maximum=255)
        _check_int(self, "postnet_layers", minimum=0, maximum=64)
        _check_int(self, "kl_warmup_steps", minimum=0, maximum=1 << 31)
        _check_bool(self, "share_embed")
        _check_bool(self, "keep_voice")
        _check_choice(self, "kl_prior", ("target", "standard"))
        _check_choice(self, "flux_type", ("absolute", "clipped"))
        _check_number(self, "history_dropout", 0.0, 1.0)
        for name in (
            "kl_weight",
            "flux_weight",
            "stop_weight",
            "stop_positive_weight",
            "delta_weight",
            "ctc_weight",
            "loss_scale",
        ):
            _check_number(self, name, 0.0)
        _check_int(self, "ctc_rate", maximum=16)
        # A text of n tokens takes n over the first, so a tiny one would be speech for ever
        _check_number(self, "min_tokens_per_second", 0.01, 1000.0)
        _check_number(self, "max_silence_seconds", 0.0, 86400.0)
        if self.postnet_kernel_size % 2 == 0:
            _fail(type(self).__name__, "postnet_kernel_size", self.postnet_kernel_size, "odd")
        size = self.postnet_channels**2 * self.postnet_kernel_size
        _check_weights(self, "`postnet_channels` and `postnet_kernel_size`", size)
        _check_unknown(self, kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MelLLMSpeechConfig":
        """`"paper"`, `"small"` (ours) or `"spectron"`, with `overrides`.

        Raises:
            ValueError: There is no preset of that name.
        """
        if name not in cls.PRESETS:
            _fail(cls.__name__, "name", name, f"one of {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **overrides})


class MelLLMVocoderConfig(PreTrainedConfig):
    r"""What turns mel frames into a waveform. Which vocoder is the checkpoint's choice; the paper has HiFi-GAN.

    Args:
        vocoder_type (`str`, defaults to `"griffin_lim"`): `"griffin_lim"` needs no training. `"hifigan"` is transformers'
            `SpeechT5HifiGan` (what MELLE takes). `"istft"` is a small Vocos (arXiv 2306.00814): the fastest, and
            trained by `scripts/train_vocoder.py`.
        feature_config (`dict`, *optional*): Arguments of the [`MelLLMFeatureExtractor`] whose frames it inverts;
            [`from_feature_extractor`] takes them from one. That extractor's defaults when not given.
        num_iterations (`int`, defaults to 32): Iterations of Griffin-Lim.
        vocoder_kwargs (`dict`, *optional*): What a neural vocoder is built from.
            For `"istft"`, whole numbers (all ours; the paper's model is several times as large): `hidden_size` (256),
            `intermediate_size` (768), `num_layers` (6), `kernel_size` (7, odd), `lookahead` (half the kernel, as in the
            paper: frames that each layer but the first sees ahead; less of it starts a stream sooner) and `overlap` (4:
            hops in a window of the inverse transform).
            For `"hifigan"`, fields of `SpeechT5HifiGanConfig`. `upsample_rates` must multiply to the hop length; those
            for 256 (the `hifigan16k` features) are microsoft/speecht5_hifigan's, those for 160 (`phi4`) ours.

    Raises:
        ValueError: A field has a value that no vocoder can be built from; the message names the field.
    """

    model_type = "mel_llm_vocoder"
    base_config_key = "vocoder_config"
    # What of a feature extractor decides about its frames
    FEATURE_FIELDS: ClassVar[tuple[str, ...]] = (
        "feature_size",
        "sampling_rate",
        "hop_length",
        "win_length",
        "n_fft",
        "window_function",
        "window_periodic",
        "preemphasis",
        "waveform_scale",
        "power",
        "mel_scale",
        "mel_norm",
        "triangularize_in_mel_space",
        "mel_min_frequency",
        "mel_max_frequency",
        "mel_floor",
        "log",
        "edge_padding",
    )

    # Name, least and largest value; what is not given is the vocoder's to choose
    ISTFT_SIZES: ClassVar[dict[str, tuple[int, int]]] = {
        "hidden_size": (1, 8192),
        "intermediate_size": (1, 32768),
        "num_layers": (1, 64),
        "kernel_size": (1, 63),
        "lookahead": (0, 31),
        "overlap": (2, 16),
    }

    vocoder_type: str = "griffin_lim"
    feature_config: dict | None = None
    num_iterations: int = 32
    vocoder_kwargs: dict | None = None

    def __post_init__(self, **kwargs):
        _check_choice(self, "vocoder_type", ("griffin_lim", "hifigan", "istft"))
        if self.feature_config is not None:
            unknown = not isinstance(self.feature_config, dict) or set(self.feature_config) - set(self.FEATURE_FIELDS)
            if unknown:
                fields = ", ".join(self.FEATURE_FIELDS)
                _fail(type(self).__name__, "feature_config", self.feature_config, f"a dict with keys among {fields}")
        _check_int(self, "num_iterations", maximum=1000)
        self._check_vocoder_kwargs()
        _check_unknown(self, kwargs)
        super().__post_init__(**kwargs)

    def _check_vocoder_kwargs(self) -> None:
        fields = self.vocoder_kwargs
        if fields is None:
            return

        def fail(expected: str) -> None:
            _fail(type(self).__name__, "vocoder_kwargs", fields, expected)

        if not isinstance(fields, dict):
            fail("a dict or None")
        if self.vocoder_type == "griffin_lim" and fields:
            fail("empty for Griffin-Lim, which is not built from anything")
        if self.vocoder_type == "istft":
            self._check_istft(fields, fail)
        if self.vocoder_type == "hifigan":
            self._check_hifigan(fields, fail)

    def _check_istft(self, fields: dict, fail: Callable[[str], None]) -> None:
        if unknown := sorted(set(fields) - set(self.ISTFT_SIZES)):
            fail(f"without {', '.join(unknown)}; an iSTFT vocoder has {', '.join(self.ISTFT_SIZES)}")
        for name, value in fields.items():
            least, most = self.ISTFT_SIZES[name]
            if not _is_size(value, least, most):
                fail(f"a dict whose `{name}` is an integer from {least} to {most}")
        kernel_size = fields.get("kernel_size", 7)
        if kernel_size % 2 == 0:
            fail("a dict whose `kernel_size` is odd")
        if fields.get("lookahead", 0) > kernel_size // 2:
            fail(f"a dict whose `lookahead` is at most half the kernel, {kernel_size // 2}")
        hidden_size, intermediate_size = fields.get("hidden_size", 256), fields.get("intermediate_size", 768)
        number = hidden_size * (2 * intermediate_size * fields.get("num_layers", 6) + _MAX_MEL_BINS * kernel_size)
        _check_weights(self, "the sizes in `vocoder_kwargs`", number)

    def _check_hifigan(self, fields: dict, fail: Callable[[str], None]) -> None:
        for name in ("model_in_dim", "sampling_rate"):
            if name in fields:
                fail(f"without `{name}`, which the features decide")
        if not _is_size(fields.get("upsample_initial_channel", 512), 1, 8192):
            fail("a dict whose `upsample_initial_channel` is an integer from 1 to 8192")
        lists = ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes")
        for name in lists:
            value = fields.get(name, [1])
            rows = value if name == "resblock_dilation_sizes" and value != [1] else [value]
            valid = isinstance(rows, list | tuple) and len(rows) <= 16 and all(map(_is_size_list, rows))
            if not valid:
                fail(f"a dict whose `{name}` has at most 16 integers from 1 to 256 in a list")
        if any(size % 2 == 0 for size in fields.get("resblock_kernel_sizes", ())):
            fail("a dict whose `resblock_kernel_sizes` are odd")
        for first, second in (lists[:2], lists[2:]):
            if (first in fields) != (second in fields) or len(fields.get(first, ())) != len(fields.get(second, ())):
                fail(f"a dict with `{first}` and `{second}` of one length, or neither")
        for rate, kernel in zip(fields.get(lists[0], ()), fields.get(lists[1], ()), strict=True):
            if kernel < rate:
                fail("a dict whose `upsample_kernel_sizes` are at least the `upsample_rates`")
        channels, number = fields.get("upsample_initial_channel", 512), 0
        blocks = list(zip(fields.get(lists[2], ([3] * 3)), fields.get(lists[3], ([1] * 3,) * 3), strict=True))
        for kernel in fields.get(lists[1], ([8] * 4)):  # each stage halves the channels
            number += channels * channels // 2 * kernel
            channels //= 2
            number += sum(2 * channels**2 * size * len(dilations) for size, dilations in blocks)
        _check_weights(self, "the sizes in `vocoder_kwargs`", number)

    @classmethod
    def from_feature_extractor(cls, feature_extractor, **kwargs) -> "MelLLMVocoderConfig":
        """The config of a vocoder for the frames of `feature_extractor`."""
        fields = {name: getattr(feature_extractor, name) for name in cls.FEATURE_FIELDS}
        return cls(feature_config=fields, **kwargs)


def _phi4_mini_text_config() -> PreTrainedConfig:
    """The paper's backbone, Phi-4-Mini. Its LongRoPE factors come with its checkpoint, so this stays at 4k positions."""
    return AutoConfig.for_model(
        "phi3",
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=[199999, 200020],
        pad_token_id=199999,
    )


# Phi-4-multimodal marks the place of audio with the spare token <|endoftext11|>
_PHI4_AUDIO_TOKEN_ID = 200011


# Fields of the config that hold the tokens of prompts
_ID_LISTS = (
    *("prompt_prefix_ids", "prompt_suffix_ids", "speech_prefix_ids", "speech_suffix_ids"),
    *("continuation_prefix_ids", "continuation_suffix_ids", "qa_prefix_ids", "qa_suffix_ids", "separator_ids"),
)


# SPECTRON's language models: PaLM-2's recipe is not public, so these are Llama's layers at the stated sizes (350M for its
# semantic and acoustic results, 1B for question answering). Widths, depths and the vocabulary are ours.
_SPECTRON_BACKBONES = {
    "spectron-350m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "spectron-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}
# Its encoder: 600M of Conformer (stated), 24 blocks of width 1024 with 8 heads, kernel 5 and 4 times fewer tokens than
# frames (USM's, unconfirmed), built from Phi-4-multimodal's blocks, whose width inside is chosen to meet the stated size.
_SPECTRON_ENCODER = {"num_blocks": 24, "num_attention_heads": 8, "kernel_size": 5, "intermediate_size": 2688}
_SMALL_BACKBONE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class MelLLMConfig(PreTrainedConfig):
    r"""Configuration of a Mel-LLM. `MelLLMConfig()` is the paper's model.

    Args:
        audio_config (`MelLLMAudioConfig` or `dict`, *optional*): From log-mel frames to audio tokens.
        text_config (`PreTrainedConfig` or `dict`, *optional*): Any decoder-only model that `AutoModel` knows; a dict
            names its `model_type`. Phi-4-Mini by default (paper).
        speech_config (`MelLLMSpeechConfig` or `dict`, *optional*): The speech head; `None` for a model that only reads.
        vocoder_config (`MelLLMVocoderConfig` or `dict`, *optional*): The vocoder; `None` for a model without one.
        audio_token_id (`int`, *optional*): The token whose place in the text an audio token takes. Must be given
            unless `text_config` is left out.
        prompt_prefix_ids (`list[int]`), prompt_suffix_ids (`list[int]`): Token ids around the audio in the default
            prompt. The model has no tokenizer, and stock speech recognition clients pass it nothing but audio, so the
            default prompt lies here; [`MelLLMProcessor.default_prompt_ids`] makes it from the tokenizer's template.
        speech_prefix_ids (`list[int]`), speech_suffix_ids (`list[int]`): Token ids around the text that is to be spoken;
            [`MelLLMProcessor.speech_prompt_ids`] makes them.
        continuation_prefix_ids (`list[int]`), continuation_suffix_ids (`list[int]`): Token ids around a recording that is to
            be gone on with; [`MelLLMProcessor.continuation_prompt_ids`] makes them.
        qa_prefix_ids (`list[int]`), qa_suffix_ids (`list[int]`): The same around a spoken question.
        separator_ids (`list[int]`): Token ids between what is said in the recording and what follows it, in texts where
            that is known: the end of a line. A model that never saw them writes one text.
        text_loss_weight (`float`, defaults to 1.0): What the cross-entropy counts beside the speech head's objective, in
            the training of [`MelLLMForSpeechContinuation`] (paper: as much; a `loss_scale` changes the other side).
        max_text_tokens_per_second (`float`, defaults to 40.0): Transcripts made from audio alone are cut after this
            many tokens per second of audio plus a constant of 16. English is spoken at some 4 tokens (words) to 20
            (characters) a second, Cyrillic in bytes at up to 35 (ours).
        pad_token_id, bos_token_id, eos_token_id: As in any config; taken from `text_config` when not given.
        response_eos_token_id (`int`, *optional*): The token that ends the model's answer: appended to transcripts in
            training. When not given, `eos_token_id`, or the last of several (the end of the assistant's turn in
            Phi-4's and Llama 3's configs).
        decoder_start_token_id (`int`, *optional*): Not used by the model. Training scripts written for Whisper ask
            for it; the beginning-of-sequence id when not given.
        lm_head_bias (`bool`, defaults to `False`): Whether the output layer has a bias, as that of Phi-2 or GPT-J.
        tie_word_embeddings (`bool`, *optional*): Whether the output layer shares the input embeddings; taken from
            `text_config` when not given.

    Raises:
        ValueError: A field has a value that no model can be built from; the message names the field.

    Example:

    ```python
    >>> from mel_llm import MelLLMConfig

    >>> config = MelLLMConfig.from_preset("small", vocab_size=512, audio_token_id=3, eos_token_id=2)
    >>> config.audio_config.num_audio_tokens(100)
    25
    ```
    """

    model_type = "mel_llm"
    sub_configs: ClassVar[dict] = {
        "audio_config": MelLLMAudioConfig,
        "text_config": AutoConfig,
        "speech_config": MelLLMSpeechConfig,
        "vocoder_config": MelLLMVocoderConfig,
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "audio_hidden_states",
        "ctc_loss",
        "losses",
        "spectrogram",
    ]
    PRESETS: ClassVar[tuple[str, ...]] = ("paper", "small", "spectron-350m", "spectron-1b", "spectron-small")

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    vocoder_config: dict | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    prompt_prefix_ids: list[int] | None = None
    prompt_suffix_ids: list[int] | None = None
    speech_prefix_ids: list[int] | None = None
    speech_suffix_ids: list[int] | None = None
    continuation_prefix_ids: list[int] | None = None
    continuation_suffix_ids: list[int] | None = None
    qa_prefix_ids: list[int] | None = None
    qa_suffix_ids: list[int] | None = None
    separator_ids: list[int] | None = None
    text_loss_weight: float = 1.0
    max_text_tokens_per_second: float = 40.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    response_eos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    lm_head_bias: bool = False
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.audio_token_id is None:
            self.audio_token_id = _PHI4_AUDIO_TOKEN_ID
        self.text_config = self._build_text_config(self.text_config)
        self.audio_config = self._build_sub_config("audio_config", MelLLMAudioConfig, default=True)
        self.speech_config = self._build_sub_config("speech_config", MelLLMSpeechConfig)
        self.vocoder_config = self._build_sub_config("vocoder_config", MelLLMVocoderConfig)
        self._check_vocoder()

        vocab_size = self.text_config.vocab_size
        if self.audio_token_id is None:
            _fail(type(self).__name__, "audio_token_id", None, "given together with `text_config`")
        _check_int(self, "audio_token_id", minimum=0, maximum=vocab_size - 1)
        for name in _ID_LISTS:
            ids = getattr(self, name) or []
            valid = isinstance(ids, list | tuple) and all(
                isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids
            )
            if not valid:
                _fail(type(self).__name__, name, ids, f"a list of token ids from 0 to {vocab_size - 1}")
            setattr(self, name, list(ids))
        _check_number(self, "max_text_tokens_per_second", 0.0, 1000.0)
        _check_number(self, "text_loss_weight", 0.0)
        if self.speech_config is not None:
            _ = self.speech_reduction_factor

        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, self._inherited_ids(name))
            _check_token_ids(self, name, vocab_size)
        eos_ids = self.eos_token_id if isinstance(self.eos_token_id, list | tuple) else [self.eos_token_id]
        if self.response_eos_token_id is None:
            self.response_eos_token_id = eos_ids[-1]
        if self.pad_token_id is None:
            self.pad_token_id = 0 if eos_ids[0] is None else eos_ids[0]  # masked wherever it stands
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id if self.bos_token_id is not None else eos_ids[0]
        for name in ("response_eos_token_id", "decoder_start_token_id"):
            _check_token_ids(self, name, vocab_size)
        _check_bool(self, "lm_head_bias")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        _check_bool(self, "tie_word_embeddings")
        _check_unknown(self, kwargs)
        super().__post_init__(**kwargs)

    def _inherited_ids(self, name: str) -> int | list[int] | None:
        """The text config's ids, as far as they are in its vocabulary: a shrunken config keeps its family's."""
        value = getattr(self.text_config, name, None)
        if isinstance(value, list | tuple):
            return [i for i in value if 0 <= i < self.text_config.vocab_size] or None
        return value if isinstance(value, int) and 0 <= value < self.text_config.vocab_size else None

    @staticmethod
    def _build_text_config(value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        if value is None:
            return _phi4_mini_text_config()
        if isinstance(value, dict):
            fields = dict(value)
            model_type = fields.pop("model_type", None)
            if not isinstance(model_type, str):
                _fail("MelLLMConfig", "text_config", value, 'a dict with a "model_type" such as "llama"')
            try:
                value = AutoConfig.for_model(model_type, **fields)
            except ValueError as error:
                raise ValueError(f"MelLLMConfig: `text_config` cannot be built: {error}") from error
        # Duck-typed on purpose: remote code loads this module more than once, so classes differ by identity.
        if not hasattr(value, "to_dict"):
            _fail("MelLLMConfig", "text_config", value, "a config or a dict")
        # A multimodal backbone's config (Gemma 3, Llama 4, ...) carries the language model's as a part.
        value = value.get_text_config(decoder=True)
        is_encoder = value.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
            value, "is_decoder", False
        )
        if not hasattr(value, "vocab_size") or getattr(value, "is_encoder_decoder", False) or is_encoder:
            _fail("MelLLMConfig", "text_config", value.model_type, "the config of a decoder-only language model")
        MelLLMConfig._check_text_sizes(value)
        return value

    @staticmethod
    def _check_text_sizes(text_config: PreTrainedConfig) -> None:
        sizes = {name: getattr(text_config, name, None) for name in _MAX_TEXT_SIZES}
        for name, value in sizes.items():
            required = name in ("vocab_size", "hidden_size", "num_hidden_layers")
            if isinstance(value, int) or required:
                if not _is_size(value, 1 if required else 0, _MAX_TEXT_SIZES[name]):
                    expected = f"one whose `{name}` is an integer up to {_MAX_TEXT_SIZES[name]}"
                    _fail("MelLLMConfig", "text_config", value, expected)
        for name in ("vocab_size", "intermediate_size"):
            if isinstance(sizes[name], int):
                number = sizes["hidden_size"] * sizes[name]
                _check_weights(text_config, f"`hidden_size` and `{name}`", number, _MAX_TEXT_WEIGHTS)

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(..., speech_config={...})` sets the dict when the config is there
        if isinstance(value, dict) and name in ("audio_config", "speech_config", "vocoder_config"):
            value = self.sub_configs[name](**{key: item for key, item in value.items() if key != "model_type"})
        super().__setattr__(name, value)

    def _check_vocoder(self) -> None:
        """A vocoder for other features would make sound all the same, of another length and pitch."""
        if self.vocoder_config is None:
            return
        features = self.vocoder_config.feature_config or {}
        names = {"sampling_rate": "sampling_rate", "hop_length": "hop_length", "feature_size": "num_mel_bins"}
        for theirs, ours in names.items():
            # What is not said is the extractor's default, which is the audio config's
            value, wanted = features.get(theirs, getattr(MelLLMAudioConfig, ours)), getattr(self.audio_config, ours)
            if value != wanted:
                _fail(type(self).__name__, "vocoder_config", f"features with {theirs} {value}", f"for {ours} {wanted}")

    def _build_sub_config(self, name: str, config_class: type, default: bool = False) -> PreTrainedConfig | None:
        value = getattr(self, name)
        if value is None:
            return config_class() if default else None
        if isinstance(value, dict):
            return config_class(**{key: item for key, item in value.items() if key != "model_type"})
        if getattr(value, "model_type", None) != config_class.model_type:
            _fail(type(self).__name__, name, value, f"a {config_class.__name__} or a dict of its fields")
        return value

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MelLLMConfig":
        """A ready configuration.

        * `"paper"`: Mel-LLM as published.
        * `"small"`: trains on a CPU (ours).
        * `"spectron-350m"`, `"spectron-1b"`: SPECTRON (arXiv 2305.15255) at the sizes of its language models, with its 600M
          encoder. What is not known of it is said beside the values in the code of this file, and in docs/spectron.md.
        * `"spectron-small"`: its form at a size that trains on a CPU (ours).

        Args:
            name (`str`): One of `MelLLMConfig.PRESETS`.
            overrides: Fields of the config to replace. But for `"paper"`, also `vocab_size` and any field of the Llama
                backbone's config through `text_config` (a dict), of the audio config through `audio_config`, and for
                SPECTRON of the speech config through `speech_config`.

        Raises:
            ValueError: There is no preset of that name.
        """
        if name == "paper":
            return cls(**overrides)
        if name not in cls.PRESETS:
            raise ValueError(
                f"MelLLMConfig.from_preset: `name` must be one of {', '.join(cls.PRESETS)}, got {name!r}."
            )
        is_spectron = name.startswith("spectron")
        # 32k pieces of text: PaLM-2's 256k would be most of the 350M
        vocab_size = overrides.pop("vocab_size", 32000 if name in _SPECTRON_BACKBONES else 512)
        special = {key: overrides.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text_config = {
            "model_type": "llama",
            "vocab_size": vocab_size,
            **_SPECTRON_BACKBONES.get(name, _SMALL_BACKBONE),
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            **{key: value for key, value in special.items() if value is not None},
            **(overrides.pop("text_config", None) or {}),
        }
        audio_config = {"reduction_factor": 4, "conv_channels": 64, "hidden_size": 256}
        if is_spectron:
            # 128 bins, a Conformer and one linear layer behind it are stated
            audio_config.update(num_mel_bins=128, projector_type="linear", encoder_type="conformer")
            encoder = {"num_blocks": 4, "num_attention_heads": 4, "kernel_size": 5, "intermediate_size": 512}
            if name in _SPECTRON_BACKBONES:
                audio_config.update(conv_channels=512, hidden_size=1024)
                encoder = _SPECTRON_ENCODER
            audio_config["encoder_config"] = encoder
            small = {} if name in _SPECTRON_BACKBONES else {"head_hidden_size": 256, "prenet_hidden_size": 64}
            speech = overrides.pop("speech_config", None) or {}
            if isinstance(speech, dict):
                speech = MelLLMSpeechConfig.from_preset("spectron", **{**small, **speech})
            overrides["speech_config"] = speech
        changes = overrides.pop("audio_config", None) or {}
        if changes.get("encoder_type", "conformer") == "none":
            audio_config.pop("encoder_config", None)
        overrides.setdefault("audio_token_id", text_config["vocab_size"] - 1)
        return cls(text_config=text_config, audio_config={**audio_config, **changes}, **overrides)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        return self.text_config

    @property
    def speech_reduction_factor(self) -> int:
        """Mel frames that the speech head writes at a time.

        Raises:
            ValueError: The speech config has another than the audio config, whose stem embeds what was written.
        """
        own, reads = self.speech_config.reduction_factor, self.audio_config.reduction_factor
        if own is not None and own != reads and self.speech_config.share_embed:
            raise ValueError(
                f"MelLLMSpeechConfig: `reduction_factor` is {own}, but the history is embedded by the reading side's stem, for "
                f"{reads} frames: `share_embed` must be False."
            )
        return reads if own is None else own

    @property
    def sampling_rate(self) -> int:
        """Hz of the waveforms that the model makes; the text-to-speech pipeline looks for it here."""
        return self.audio_config.sampling_rate

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value


# `AutoModelFor....register` fills the mappings keyed by config class, but two clients look into the static tables of
# names instead: the speech recognition pipeline (which would otherwise take the model for a CTC one and return
# garbage without an error) and `transformers serve`. Only keys of known config types are ever walked, so an entry
# here has no other effect.
for _names in (
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
):
    _names.setdefault(MelLLMConfig.model_type, "MelLLMForSpeechSeq2Seq")


# The task of the pipeline too, for a repository's code: the config is what `pipeline()` loads before it looks for the task.
# Where nobody has asked for a pipeline, none of it is imported.
if "transformers.pipelines" in sys.modules:
    from .pipeline_mel_llm import register_pipeline

    register_pipeline(replace=False)


__all__ = ["MelLLMAudioConfig", "MelLLMConfig", "MelLLMSpeechConfig", "MelLLMVocoderConfig"]
