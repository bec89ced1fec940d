"""Mel-LLM, reading side: log-mel frames -> audio tokens -> decoder-only language model -> text.

Shapes use these letters: B batch, T mel frames, F mel bins, r frames per audio token, n = ceil(T / r) audio tokens,
L tokens of text and audio together, D width of the language model.

What follows the paper (arXiv 2606.10231, whose front end is Phi-4-multimodal's) and what is ours is said in each
docstring. There is no speech encoder unless a config asks for the paper's encoder baseline.
"""

import contextlib
import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, logging

from .configuration_mel_llm import MelLLMAudioConfig, MelLLMConfig
from .generation_mel_llm import MelLLMGenerationMixin
from .sharing_mel_llm import MelLLMSharingMixin, SafetensorsOnlyMixin
from .speller_mel_llm import MelLLMSpeller, spelling_loss


logger = logging.get_logger(__name__)

# Values that one step of the stem on the CPU may hold: beyond some 32 MB, what it costs to get memory from the system at
# every layer exceeds what the layer costs.
_CPU_BLOCK_VALUES = 1 << 22

# What a checkpoint may hold that a model which only reads has no place for
PARTS_BESIDE_READING = ("speech_head", "vocoder", "ctc_head", "token_bytes", "alignment_head")

# Bytes of text that are known of a token; the longest English words of large vocabularies have 20
_TOKEN_BYTES = 32


def _length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """`(B,)` lengths to a boolean mask `(B, size)`, true at the first `lengths[i]` places."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _mark_uniform_init(module: nn.Module) -> None:
    """Asks `_init_weights` for torch's own initialisation of the layers in `module`.

    It visits layers before the modules that hold them and sets each parameter once, so the layers must carry the wish.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer._uniform_init = True


def _pad_list(value, name: str) -> torch.Tensor | None:
    """Serving engines hand over clips of different lengths as a list of tensors; everyone else as one tensor."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(item, torch.Tensor) for item in value):
        return nn.utils.rnn.pad_sequence(list(value), batch_first=True)
    raise ValueError(f"`{name}` must be a tensor or a list of tensors, got {type(value).__name__}.")


class MelLLMFeatureNorm(nn.Module):
    """Global mean and variance normalisation per mel bin, `(x - mean) * invstd` ("MVN", paper).

    The statistics are part of the checkpoint. Until they are set they are 0 and 1; see
    [`MelLLMModel.set_feature_statistics`].
    """

    def __init__(self, config: MelLLMAudioConfig):
        super().__init__()
        self.register_buffer("global_mean", torch.zeros(config.num_mel_bins))
        self.register_buffer("global_invstd", torch.ones(config.num_mel_bins))

    def _apply(self, fn, *args, **kwargs):
        # Moves between devices but stays float32 when a model is cast: in bfloat16, means near 15 have steps of 0.06,
        # and what is lost would be lost in every checkpoint saved from then on.
        before = dict(self.named_buffers())
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            if (cast := getattr(self, name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(cast.device))
        return self

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        return (input_features.float() - self.global_mean.float()) * self.global_invstd.float()


class MelLLMConvSubsampling(nn.Module):
    """Phi-4-multimodal's "NeMoConv" stem: log2(r) depthwise-separable convolutions of stride 2 (paper).

    Parameters carry the names and shapes of `Phi4MultimodalAudioNemoConvSubsampling`, so its weights load as they
    are. An audio token sees its own r frames and the r - 1 frames before them, and nothing to the right.

    Unlike the original, positions beyond a clip's end are zeroed after every stage, as the convolution's own padding
    would be, so that a clip's tokens do not depend on how far its batch was padded (ours).
    """

    def __init__(self, config: MelLLMAudioConfig):
        super().__init__()
        channels = config.conv_channels
        self.num_stages = int(math.log2(config.reduction_factor))
        layers: list[nn.Module] = [
            nn.Conv2d(1, channels, kernel_size=3, stride=2, padding=1),
            ACT2FN[config.conv_activation],
        ]
        for _ in range(self.num_stages - 1):
            layers += [
                nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1, groups=channels),
                nn.Conv2d(channels, channels, kernel_size=1),
                ACT2FN[config.conv_activation],
            ]
        self.conv = nn.Sequential(*layers)
        num_bins = math.ceil(config.num_mel_bins / config.reduction_factor)
        self.flat_size = channels * num_bins
        self.values_per_token = channels * config.reduction_factor // 2 * math.ceil(config.num_mel_bins / 2)  # at most
        self.out = nn.Linear(self.flat_size, config.hidden_size)
        _mark_uniform_init(self)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """`(B, T, F)` features, zero beyond `lengths` (B,), to `(B, n, hidden_size)`."""
        symbolic = torch.compiler.is_compiling() or torch.jit.is_tracing()
        on_cpu = hidden_states.device.type == "cpu" and hidden_states.dtype != torch.float16  # which blocks slow down
        if on_cpu and not torch.is_grad_enabled() and not symbolic:
            return self.out(self._convolve_in_blocks(hidden_states, lengths))
        hidden_states = hidden_states.unsqueeze(1)
        if on_cpu:
            # In training some 3 times as fast; bfloat16 by autocast would take half of that away again
            hidden_states = hidden_states.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", enabled=False) if on_cpu and not symbolic else contextlib.nullcontext():
            for layer in self.conv:
                if isinstance(layer, nn.Conv2d):
                    hidden_states = layer(hidden_states)
                    if layer.stride == (2, 2) and lengths is not None:
                        lengths = (lengths + 1) // 2
                    continue
                mask = None if lengths is None else _length_mask(lengths, hidden_states.shape[2])[:, None, :, None]
                if on_cpu and not symbolic and isinstance(layer, nn.ReLU):
                    # In place, which a convolution's backward pass allows, and memory is what costs time here. No gradient
                    # comes back through ReLU where it is zero, so that none has to be masked.
                    if mask is not None:
                        hidden_states.detach().mul_(mask.to(hidden_states.dtype))
                    hidden_states = torch.relu_(hidden_states)
                else:
                    hidden_states = layer(hidden_states)
                    if mask is not None:
                        hidden_states = hidden_states * mask.to(hidden_states.dtype)
        return self.out(hidden_states.transpose(1, 2).flatten(2))

    def last_token(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, 2 * r, F)` features, or r where there are none before, to the last token alone, `(B, 1, hidden_size)`."""
        hidden_states = hidden_states.unsqueeze(1).to(memory_format=torch.channels_last)  # much faster for a batch
        hidden_states = self.conv(hidden_states)[:, :, -1:]
        return self.out(hidden_states.transpose(1, 2).flatten(2))

    def _convolve_in_blocks(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """The same clip by clip and block by block, `(B, n, channels * bins)`: nothing is spent on padding, and no layer's
        values leave the cache. 1.3 to 7 times as fast on two CPU cores; with gradients, all would have to be kept anyway.
        """
        r = 2**self.num_stages
        batch_size, num_frames = hidden_states.shape[:2]
        block = max(8, _CPU_BLOCK_VALUES // self.values_per_token)  # in tokens
        clip_lengths = [num_frames] * batch_size if lengths is None else lengths.tolist()
        output = hidden_states.new_zeros(batch_size, math.ceil(num_frames / r), self.flat_size)
        for clip, row, length in zip(hidden_states, output, clip_lengths, strict=True):
            for start in range(0, math.ceil(length / r), block):
                # One token more on the left takes the place of the zeros that pad each layer there
                extra = 1 if start else 0
                frames = clip[None, None, (start - extra) * r : min((start + block) * r, length)]
                tokens = self.conv(frames.to(memory_format=torch.channels_last)).transpose(1, 2).flatten(2)[0, extra:]
                row[start : start + len(tokens)] = tokens
        return output


class MelLLMConformerEncoder(nn.Module):
    """Phi-4-multimodal's Conformer blocks, built from transformers' own modules: the paper's encoder baselines.

    The blocks and their relative attention bias are taken over unchanged; only the mask is ours. The original adds
    its boolean mask to the attention scores as 0 or 1, which lets a clip see its batch's padding; here padding is
    excluded, which is the same for a clip on its own.
    """

    MAX_POSITIONS = 500  # longer audio is encoded in pieces of 500 tokens (40 s), as in the original

    def __init__(self, config: MelLLMAudioConfig):
        super().__init__()
        from transformers import Phi4MultimodalAudioConfig, Phi4MultimodalAudioModel

        fields = {
            "hidden_size": config.hidden_size,
            "ext_pw_out_channel": config.hidden_size,
            "depthwise_separable_out_channel": config.hidden_size,
            "input_size": config.num_mel_bins,
            "time_reduction": config.reduction_factor,
            # The original's own stem is built and thrown away below, so it may as well be narrow.
            "nemo_conv_channels": 1,
            **(config.encoder_config or {}),
        }
        # The attention bias is a float mask, which flash attention cannot take
        source = Phi4MultimodalAudioModel._from_config(Phi4MultimodalAudioConfig(**fields), attn_implementation="sdpa")
        self.relative_attention_bias_layer = source.relative_attention_bias_layer
        self.encoders = source.encoders
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """`(B, n, hidden_size)` with `lengths` (B,) valid tokens each, to the same shape."""
        batch_size, num_tokens, width = hidden_states.shape
        mask = None
        if lengths is not None:
            mask = _length_mask(lengths, num_tokens)
        if num_tokens > self.MAX_POSITIONS:
            if mask is None:
                mask = hidden_states.new_ones(batch_size, num_tokens, dtype=torch.bool)
            extra = -num_tokens % self.MAX_POSITIONS
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, extra))
            hidden_states = hidden_states.reshape(-1, self.MAX_POSITIONS, width)
            mask = nn.functional.pad(mask, (0, extra)).reshape(-1, self.MAX_POSITIONS)

        bias = self.relative_attention_bias_layer(hidden_states)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        for layer in self.encoders:
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(layer.__call__, hidden_states, bias)
            else:
                hidden_states = layer(hidden_states, bias)
        return hidden_states.reshape(batch_size, -1, width)[:, :num_tokens]


class MelLLMProjector(nn.Module):
    """Audio tokens to the width of the language model: Linear, GELU, Linear as in Phi-4-multimodal (paper), or one
    Linear."""

    def __init__(self, config: MelLLMAudioConfig, text_hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(config.embedder_size, text_hidden_size)
        if config.projector_type == "mlp":
            self.act = ACT2FN[config.projector_activation]
            self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)
        else:
            self.linear_2 = None
        self.dropout = nn.Dropout(config.projector_dropout)
        _mark_uniform_init(self)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear_1(hidden_states)
        if self.linear_2 is not None:
            hidden_states = self.linear_2(self.act(hidden_states))
        return self.dropout(hidden_states)


class MelLLMPreTrainedModel(SafetensorsOnlyMixin, MelLLMSharingMixin, PreTrainedModel):
    config: MelLLMConfig
    config_class = MelLLMConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("MelLLMAudioEmbedder",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("normalizer",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers does not restore the buffers that custom code keeps out of its checkpoints, because older custom
        # code wrote over loaded weights there. This code initialises as the library does, and some backbones (Falcon-H1)
        # have such buffers.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "_uniform_init", False):
            # torch's default, uniform in +-1/sqrt(fan_in): what the original stem was trained from. The normal
            # distribution of width 0.02 that transformers gives every layer would shrink the signal by 10^4.
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, MelLLMFeatureNorm):
            init.zeros_(module.global_mean)
            init.ones_(module.global_invstd)
        elif hasattr(module, "ext_pw_conv_1d") and hasattr(module, "b1"):  # the Conformer's gated convolution
            init.zeros_(module.b1)
            init.zeros_(module.b2)
        elif isinstance(module, MelLLMTokenBytes):
            init.zeros_(module.table)
        else:
            super()._init_weights(module)


class MelLLMAudioEmbedder(MelLLMPreTrainedModel):
    """Log-mel frames to audio tokens, before the projector: normalisation, stem, optional encoder.

    With `embedder_type="linear"`, or r = 1, the stem has no parameters: it lays r frames side by side and the
    projector does the rest (the paper's abstract; its 100 Hz variant).
    """

    config: MelLLMAudioConfig
    config_class = MelLLMAudioConfig
    input_modalities = ("audio",)

    def __init__(self, config: MelLLMAudioConfig):
        super().__init__(config)
        self.normalizer = MelLLMFeatureNorm(config)
        self.conv = MelLLMConvSubsampling(config) if config.has_conv else None
        self.encoder = MelLLMConformerEncoder(config) if config.encoder_type == "conformer" else None
        self.post_init()

    def forward(self, input_features: torch.Tensor, lengths: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """`(B, T, F)` features with `lengths` (B,) valid frames each, to `(B, n, config.embedder_size)` in `dtype`."""
        hidden_states = self.normalizer(input_features).to(dtype)
        if lengths is not None:
            # After the normalisation, so that padding is zero where it enters the stem, whatever it was before
            mask = _length_mask(lengths, hidden_states.shape[1])
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0.0)
        if self.conv is not None:
            hidden_states = self.conv(hidden_states, lengths)
        else:
            r = self.config.reduction_factor
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, -hidden_states.shape[1] % r))
            hidden_states = hidden_states.unflatten(1, (-1, r)).flatten(2)
        if self.encoder is not None:
            token_lengths = None if lengths is None else self.config.num_audio_tokens(lengths)
            hidden_states = self.encoder(hidden_states, token_lengths)
        return hidden_states


class MelLLMCTCHead(MelLLMSpeller):
    """Bytes of the transcript from the states of the audio tokens."""

    def __init__(self, config: MelLLMConfig):
        text_config, audio_config = config.text_config, config.audio_config
        super().__init__(text_config.hidden_size, audio_config.ctc_rate)
        self.layer = audio_config.ctc_layer or max(1, 2 * text_config.num_hidden_layers // 3)
        if self.layer > text_config.num_hidden_layers:
            raise ValueError(
                f"`ctc_layer` is {self.layer}, but the language model has {text_config.num_hidden_layers} layers."
            )

    def log_probs(self, hidden_states: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(B, L, D)` of rows whose audio tokens stand side by side at `places` `(B, L)`, to what is spelt at them,
        `(B, longest n * ctc_rate, 256)` in float32, and how many of these places each row has, `(B,)`."""
        places = places.to(hidden_states.device)
        counts = places.sum(-1)
        index = places.int().argmax(-1)[:, None] + torch.arange(int(counts.max()), device=places.device)
        index = index.clamp(max=hidden_states.shape[1] - 1)[..., None].expand(-1, -1, hidden_states.shape[-1])
        return self.forward(hidden_states.gather(1, index)).float().log_softmax(-1), counts * self.rate

    def loss(self, hidden_states: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """States and places as in `log_probs`, and bytes `(B, M)` padded with -100, to the loss of a byte `(B,)`: 0 for a
        row whose transcript has too many."""
        return spelling_loss(*self.log_probs(hidden_states, places), labels)


class MelLLMTokenBytes(nn.Module):
    """The text of each token of the language model, which decoding with the CTC head compares with what that spells.

    Beside the head and not in it: adapters hold the whole head, and need no copy of what their base has.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, _TOKEN_BYTES, dtype=torch.uint8))

    @torch.no_grad()
    def set(self, table: torch.Tensor) -> None:
        """Sets the texts, `(vocab_size, 32)`: `mel_llm.spelling.token_bytes(tokenizer, *model.token_bytes.table.shape)`. Needed
        again when tokens were added.

        Raises:
            ValueError: The shape is another one.
        """
        if table.shape != self.table.shape:
            raise ValueError(
                f"`table` must have the shape {tuple(self.table.shape)}, got {tuple(table.shape)}: a row for each token of "
                "the language model."
            )
        self.table.copy_(table)

    def resize(self, vocab_size: int) -> None:
        """Follows the language model to another number of tokens. New ones have no text, and are never written, until it is
        set."""
        new_rows = max(0, vocab_size - len(self.table))
        self.table = nn.functional.pad(self.table[:vocab_size], (0, 0, 0, new_rows))


@dataclass
class MelLLMModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Args:
        audio_hidden_states (`torch.Tensor` of shape `(num_audio_tokens, hidden_size)`, *optional*):
            The projected audio tokens that were put into the text.
    """

    audio_hidden_states: torch.Tensor | None = None


class MelLLMModel(MelLLMPreTrainedModel):
    """Audio embedder, projector and language model, without an output layer."""

    def __init__(self, config: MelLLMConfig):
        super().__init__(config)
        self.audio_embedder = MelLLMAudioEmbedder(config.audio_config)
        self.multi_modal_projector = MelLLMProjector(config.audio_config, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self._check_backbone()
        # Whether one decoding step compiles to one graph is for the backbone to say
        self._can_compile_fullgraph = self.language_model._can_compile_fullgraph
        self.post_init()

    def _check_backbone(self) -> None:
        model_type, width = self.config.text_config.model_type, self.config.text_config.hidden_size
        missing = {"inputs_embeds", "past_key_values"} - set(inspect.signature(self.language_model.forward).parameters)
        if missing:
            raise ValueError(
                f"`text_config`: {model_type!r} takes no {' and no '.join(sorted(missing))}, so it cannot read audio "
                "tokens and go on from them. Use a language model with attention and a key-value cache."
            )
        if (embedding_width := self.get_input_embeddings().weight.shape[-1]) != width:
            raise ValueError(
                f"`text_config`: this {model_type!r} embeds tokens in {embedding_width} dimensions but computes in "
                f"{width}; backbones that project between the two are not supported."
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def set_feature_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Sets the normalisation of the log-mel features from their `mean` and `std`, both `(num_mel_bins,)`.

        Raises:
            ValueError: A shape is wrong, or a value is not finite, or a deviation is not positive.
        """
        normalizer = self.audio_embedder.normalizer
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != normalizer.global_mean.shape or not torch.isfinite(value).all():
                raise ValueError(
                    f"`{name}` must hold {normalizer.global_mean.numel()} finite values, one per mel bin, "
                    f"got a tensor of shape {tuple(value.shape)}."
                )
        if (std <= 0).any():
            raise ValueError("`std` must be positive in every mel bin; a bin that never changes has no deviation.")
        with torch.no_grad():
            normalizer.global_mean.copy_(mean)
            normalizer.global_invstd.copy_(1.0 / std)

    def _check_features(
        self, input_features: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_features = _pad_list(input_features, "input_features")
        mask = _pad_list(mask, "input_features_mask")
        num_mel_bins = self.config.audio_config.num_mel_bins
        if input_features.ndim != 3 or input_features.shape[-1] != num_mel_bins or input_features.shape[1] == 0:
            raise ValueError(
                f"`input_features` must have the shape (batch, frames, {num_mel_bins}), got "
                f"{tuple(input_features.shape)}. MelLLMFeatureExtractor makes them."
            )
        if mask is None:
            return input_features, None
        if mask.shape != input_features.shape[:2]:
            raise ValueError(
                f"`input_features_mask` must have the shape (batch, frames) = {tuple(input_features.shape[:2])} of "
                f"`input_features`, got {tuple(mask.shape)}."
            )
        if not torch.compiler.is_compiling() and not mask[:, 0].all():
            raise ValueError(
                "`input_features_mask` is 0 at the first frame of a clip: audio is padded on the right, and a clip has "
                "at least one frame."
            )
        return input_features, mask

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Audio tokens as they enter the language model.

        Args:
            input_features (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): Log-mel features.
            input_features_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for frames of the clip, 0
                for padding on its right. A list of tensors, one per clip, is taken for either argument.
            attention_mask: The same mask under the name that [`MelLLMFeatureExtractor`] gives it.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` is `(batch, tokens,
            hidden_size)` with padding, `pooler_output` is `(all valid tokens, hidden_size)`, clip after clip.

        Raises:
            ValueError: The shapes do not fit each other or the config, or a clip is padded on the left.
        """
        mask = input_features_mask if input_features_mask is not None else attention_mask
        input_features, mask = self._check_features(input_features, mask)
        lengths = None if mask is None else mask.sum(-1)

        dtype = self.multi_modal_projector.linear_1.weight.dtype
        hidden_states = self.audio_embedder(input_features, lengths, dtype=dtype)
        hidden_states = self.multi_modal_projector(hidden_states)
        if lengths is None:
            valid = hidden_states.flatten(0, 1)
        else:
            token_lengths = self.config.audio_config.num_audio_tokens(lengths).to(hidden_states.device)
            valid = hidden_states[_length_mask(token_lengths, hidden_states.shape[1])]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=valid)

    def _merge_audio(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, audio_tokens: torch.Tensor
    ) -> torch.Tensor:
        is_audio = input_ids == self.config.audio_token_id
        if not torch.compiler.is_compiling() and (num_places := int(is_audio.sum())) != len(audio_tokens):
            raise ValueError(
                f"`input_ids` has {num_places} audio tokens (id {self.config.audio_token_id}) but `input_features` "
                f"makes {len(audio_tokens)}. Let MelLLMProcessor write them, with the model's "
                f"reduction_factor = {self.config.audio_config.reduction_factor}, and do not truncate the text."
            )
        audio_tokens = audio_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_audio[..., None].expand_as(inputs_embeds), audio_tokens)

    def _bidirectional_masks(
        self, input_ids, inputs_embeds, attention_mask, past_key_values, position_ids, token_lengths
    ):
        """Causal masks in which, besides, the audio tokens of one clip all see each other (ours)."""
        if "flash" in (self.language_model.config._attn_implementation or ""):
            raise ValueError(
                "`bidirectional_attention=True` needs attn_implementation sdpa, eager or flex_attention: flash attention "
                "takes no mask of this form."
            )
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError(
                "`attention_mask` must have the shape (batch, tokens) when audio is attended to both ways."
            )
        # The number of the clip for audio, -1 for text. By clip and not by run of audio tokens: two clips may touch.
        is_audio = input_ids == self.config.audio_token_id
        clips = torch.repeat_interleave(torch.arange(len(token_lengths), device=input_ids.device), token_lengths)
        blocks = torch.full_like(input_ids, -1).masked_scatter(is_audio, clips)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        blocks = nn.functional.pad(blocks, (int(past_length), 0), value=-1)
        return create_masks_for_generate(
            config=self.config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=blocks,
        )

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
        use_cache: bool | None = None,
        **kwargs,
    ) -> MelLLMModelOutputWithPast:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`): Text with `config.audio_token_id` in the place of
                each audio token.
            input_features (`torch.Tensor` of shape `(clips, frames, num_mel_bins)`, *optional*): The clips in the
                order in which they stand in the text; a text may have any number of them.
            input_features_mask (`torch.Tensor` of shape `(clips, frames)`, *optional*): 1 for frames of the clip, 0
                for padding on its right.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 1 for tokens, 0 for padding.

        Raises:
            ValueError: Audio tokens in the text and in the features differ in number; neither or both of `input_ids`
                and `inputs_embeds` are given; or what `get_audio_features` raises.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either `input_ids` or `inputs_embeds`, and not both.")
        if input_ids is None and input_features is not None:
            raise ValueError("`input_features` needs `input_ids`: `inputs_embeds` does not say where the audio goes.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        audio_tokens = None
        if input_features is not None:
            input_features, input_features_mask = self._check_features(input_features, input_features_mask)
            audio_tokens = self.get_audio_features(input_features, input_features_mask, return_dict=True).pooler_output
            inputs_embeds = self._merge_audio(input_ids, inputs_embeds, audio_tokens)
            if self.config.audio_config.bidirectional_attention:
                lengths = (
                    input_features.new_full(input_features.shape[:1], input_features.shape[1], dtype=torch.long)
                    if input_features_mask is None
                    else input_features_mask.sum(-1)
                )
                attention_mask = self._bidirectional_masks(
                    input_ids,
                    inputs_embeds,
                    attention_mask,
                    past_key_values,
                    position_ids,
                    self.config.audio_config.num_audio_tokens(lengths).to(input_ids.device),
                )
        elif input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            # A generated token is never the audio token, so single steps need not pay for looking
            if past_key_values is None and (input_ids == self.config.audio_token_id).any():
                raise ValueError("`input_ids` has audio tokens but there are no `input_features`.")

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return MelLLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            audio_hidden_states=audio_tokens,
        )


@dataclass
class MelLLMCausalLMOutputWithPast(ModelOutput):
    r"""
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Cross-entropy of the labels.
        ctc_loss (`torch.Tensor` of shape `()`, *optional*): Of the CTC head, not weighted.
        losses (`dict[str, torch.Tensor]`, *optional*): `"text"`, the cross-entropy, `"ctc"` and `"alignment"`, where several make the
            loss (without `"text"` where letters are all that is learnt); means over this batch, also where the loss is a part of a larger batch's.
        logits (`torch.Tensor` of shape `(batch, tokens, vocab_size)`): Scores of the next token.
        past_key_values (`Cache`, *optional*): Keys and values of the language model.
        audio_hidden_states (`torch.Tensor` of shape `(num_audio_tokens, hidden_size)`, *optional*): The projected
            audio tokens.
    """

    loss: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None
    losses: dict | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    audio_hidden_states: torch.Tensor | None = None


class MelLLMForSpeechSeq2Seq(MelLLMPreTrainedModel, MelLLMGenerationMixin):
    """Mel-LLM with an output layer over text: speech recognition, and anything else that a prompt asks of audio.

    Two ways to call it, for `forward` and `generate` alike:

    * as a language model, with `input_ids` in which the audio's places are marked, as [`MelLLMProcessor`] makes them;
    * as a speech recogniser, with `input_features` (and `labels` of the transcript alone), as Whisper is called. The
      default prompt is then put around the audio, and `generate` returns the transcript only. Stock clients -- the
      pipeline, `Seq2SeqTrainer`, `transformers serve` -- call it this way.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012  (the name and type are transformers')
    # A checkpoint that speaks too is read without a word about the rest
    _keys_to_ignore_on_load_unexpected = [rf"^{part}\." for part in PARTS_BESIDE_READING]  # noqa: RUF012
    # Checkpoints of before heads could be decoded with
    _keys_to_ignore_on_load_missing = [r"^token_bytes\."]  # noqa: RUF012

    def __init__(self, config: MelLLMConfig):
        super().__init__(config)
        self.model = MelLLMModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        self.ctc_head = self.token_bytes = None
        if config.audio_config.ctc_weight > 0:
            self.ctc_head = MelLLMCTCHead(config)
            self.token_bytes = MelLLMTokenBytes(text_config.vocab_size)
        # In training alone, and never in a config: see `mel_llm.training.alignment`
        self.alignment_head = None
        # What the cross-entropy counts in training beside the CTC head's loss; see `SpeechTrainer.ctc_only_steps`
        self.text_loss_weight = 1.0
        # Share of the transcript's tokens that are hidden in training; see `SpeechTrainer.text_dropout`
        self.text_dropout = 0.0
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        # Set here and not by name (`loss_type`): for a loss of that name the Trainer counts the tokens of a batch from
        # the second on, but the first token of a transcript given as labels is one to predict. For labels beside
        # `input_ids` both counts are the same, since an answer never comes first.
        self.loss_function = ForCausalLMLoss
        # Where the input embeddings lie depends on the backbone
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # Greedy, and long enough for any audio (which has a limit of its own, see `generate`): the pipeline would
        # otherwise take five beams and cut at 256 tokens. And nobody writes the placeholder of audio.
        self.generation_config.update(num_beams=1, max_new_tokens=1024, suppress_tokens=[config.audio_token_id])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.token_bytes is not None:
            self.token_bytes.resize(self.config.vocab_size)
        return embeddings

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`MelLLMModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def freeze_feature_encoder(self) -> None:
        """Freezes the audio embedder. Training scripts written for wav2vec2 and Whisper call it, often by default."""
        logger.warning_once(
            "freeze_feature_encoder: the audio embedder will not be trained. Mel-LLM has no pretrained encoder behind "
            "it, so this is right only when the embedder was trained before."
        )
        for parameter in self.model.audio_embedder.parameters():
            parameter.requires_grad = False

    def _output_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output layer as the backbone's own causal model would apply it: some backbones scale or cap scores."""
        config = self.config.text_config
        logits = self.lm_head(hidden_states)
        if (scale := getattr(config, "logits_scaling", None)) is not None:
            logits = (
                logits * scale if config.model_type.startswith("hyperclovax") else logits / scale
            )  # Granite divides
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):  # Cohere, Falcon-H1, ...
            if (scale := getattr(config, name, None)) is not None:
                logits = logits * scale
        for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma, RecurrentGemma
            if (cap := getattr(config, name, None)) is not None:
                logits = torch.tanh(logits / cap) * cap
        return logits

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
        labels: torch.LongTensor | None = None,
        transcript_bytes: torch.LongTensor | None = None,
        teacher_states: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MelLLMCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`, *optional*): Text with `config.audio_token_id` in the
                place of each audio token. Left out, the default prompt is put around each clip.
            input_features (`torch.Tensor` of shape `(clips, frames, num_mel_bins)`, *optional*): The clips in the
                order in which they stand in the text.
            input_features_mask (`torch.Tensor` of shape `(clips, frames)`, *optional*): 1 for frames of the clip, 0
                for padding on its right.
            attention_mask (`torch.Tensor`, *optional*): `(batch, tokens)` beside `input_ids`; `(batch, frames)`, and
                the same as `input_features_mask`, without.
            labels (`torch.Tensor`, *optional*): Beside `input_ids`, `(batch, tokens)` and aligned with them, -100 at
                places that do not count. Without, the transcript alone, `(batch, transcript tokens)`, padded on the
                right with -100; the end-of-text token is added where the tokenizer has not.
            transcript_bytes (`torch.Tensor` of shape `(batch, letters)`, *optional*): The transcript's bytes, 1 to 255, padded
                on the right with -100, for a model with a CTC head; only beside a transcript given as labels. See
                [`mel_llm.training.ctc_bytes`].
            teacher_states (`torch.Tensor` of shape `(batch, audio tokens, size)`, *optional*): What a teacher hears at each audio
                token, in training with an alignment head; only beside a transcript given as labels. See
                [`mel_llm.training.add_alignment_head`].
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Compute the logits of the last so many tokens (0
                for all), or of these positions.

        Returns:
            [`MelLLMCausalLMOutputWithPast`]: `logits` are `(batch, tokens, vocab_size)`; for a transcript given as
            labels without `input_ids`, `(batch, transcript tokens, vocab_size)`, aligned with `labels`.

        Raises:
            ValueError: As [`MelLLMModel.forward`]; `labels` without `input_ids` is padded on the left; or there are
                `input_features` and nothing else.
        """
        if input_ids is None and inputs_embeds is None and input_features is not None:
            mask = input_features_mask if input_features_mask is not None else attention_mask
            kwargs.pop("decoder_input_ids", None)  # made by stock collators; the labels say it all
            return self._forward_transcription(
                input_features, mask, labels, transcript_bytes, teacher_states, **kwargs
            )

        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._output_logits(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self._causal_output(loss, logits, outputs)

    @staticmethod
    def _causal_output(loss, logits, outputs: MelLLMModelOutputWithPast) -> MelLLMCausalLMOutputWithPast:
        return MelLLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio_hidden_states=outputs.audio_hidden_states,
        )

    def _forward_transcription(
        self, input_features, mask, labels, transcript_bytes=None, teacher_states=None, **kwargs
    ) -> MelLLMCausalLMOutputWithPast:
        """`forward` for audio and its transcript: default prompt, audio, transcript."""
        if labels is None:
            # Scores of nothing in particular would be returned here, and a caller that takes this for a CTC model
            # would read them as a transcript.
            raise ValueError(
                "`input_features` alone give the model nothing to score. Call `generate(input_features, ...)` for a "
                "transcript, or pass `labels` or `input_ids` as well. If a speech recognition pipeline raised this, it "
                "holds a PeftModel, which it takes for a CTC model: pass it the adapter's folder instead, or "
                "`peft_model.merge_and_unload()`. If the Trainer did, an option such as `label_smoothing_factor` or "
                "`compute_loss_func` took the labels away: those need batches with `input_ids`, as "
                "`processor.apply_chat_template(..., output_labels=True)` makes them."
            )
        input_features, mask = self.model._check_features(input_features, mask)
        prompt_ids, prompt_mask = self._build_prompt(input_features, mask)
        num_labels = labels.shape[1]
        labels = self._append_end_of_text(labels.to(prompt_ids.device))
        is_text = labels != -100
        spells = transcript_bytes is not None and self.ctc_head is not None
        aligns = teacher_states is not None and self.alignment_head is not None
        # Where the letters alone are learnt, what stands behind the audio would change nothing of them
        learns_text = bool(self.text_loss_weight) or not (spells and self.training)
        num_read = labels.shape[1] if learns_text else 0
        text = labels.masked_fill(~is_text, self.config.pad_token_id)[:, :num_read]
        if self.training and self.text_dropout:
            hidden = torch.rand(text.shape, device=text.device) < self.text_dropout
            text = text.masked_fill(hidden, self.config.pad_token_id)
        attention_mask = torch.cat([prompt_mask, is_text[:, :num_read].to(prompt_mask.dtype)], dim=1)
        wants_states = kwargs.pop("output_hidden_states", None)
        outputs = self.model(
            input_ids=torch.cat([prompt_ids, text], dim=1),
            input_features=input_features,
            input_features_mask=mask,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True if spells or aligns else wants_states,
            return_dict=True,
            **kwargs,
        )
        if kwargs.get("num_items_in_batch") is not None:
            # Counted before the ends of text were added; with none but empty transcripts it would be 0
            kwargs["num_items_in_batch"] = torch.as_tensor(kwargs["num_items_in_batch"]).clamp(min=1)
        loss = logits = None
        if learns_text:
            # The state at the prompt's last token predicts the first label, and so on
            logits = self._output_logits(outputs.last_hidden_state[:, prompt_ids.shape[1] - 1 : -1])
            loss = self.loss_function(
                logits=logits, labels=None, shift_labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            logits = logits[:, :num_labels]
        output = self._causal_output(loss, logits, outputs)
        if spells or aligns:
            weights = is_text.sum(-1)  # as the cross-entropy weighs the clips
            total = weights.sum() if kwargs.get("num_items_in_batch") is None else kwargs["num_items_in_batch"]
            total = torch.as_tensor(total, device=prompt_ids.device)
            places = prompt_ids == self.config.audio_token_id
            terms, parts = {}, []
            if loss is not None:
                terms["text"] = loss.detach()
                parts.append((self.text_loss_weight if self.training else 1.0) * loss)
            if spells:
                states = outputs.hidden_states[self.ctc_head.layer][:, : prompt_ids.shape[1]]
                ctc = self.ctc_head.loss(states, places, transcript_bytes.to(states.device))
                output.ctc_loss = (ctc * weights).sum() / total
                terms["ctc"] = output.ctc_loss.detach()
                parts.append(self.config.audio_config.ctc_weight * output.ctc_loss)
            if aligns:
                states = outputs.hidden_states[self.alignment_head.layer][:, : prompt_ids.shape[1]]
                alignment = self.alignment_head.loss(states, places, teacher_states) * (weights.sum() / total)
                terms["alignment"] = alignment.detach()
                parts.append(self.alignment_head.weight * alignment)
            output.loss = sum(parts)
            # Means of this batch, of whatever larger one it is a part
            share = total / weights.sum().clamp(min=1)
            output.losses = {name: term * share for name, term in terms.items()}
            output.hidden_states = outputs.hidden_states if wants_states else None
        return output

    def _append_end_of_text(self, labels: torch.Tensor) -> torch.Tensor:
        """Adds the end-of-text token to each row that lacks one: tokenizers of language models do not, and a model
        that never saw it never stops."""
        if self.config.response_eos_token_id is None:
            return labels
        is_text = labels != -100
        lengths = is_text.sum(-1)
        if not torch.equal(is_text, _length_mask(lengths, labels.shape[1])):
            raise ValueError(
                "`labels` without `input_ids` must be the transcript, padded on the right with -100. To mask parts of "
                "a text, pass `input_ids` with it."
            )
        labels = nn.functional.pad(labels, (0, 1), value=-100)
        last = labels.gather(1, (lengths - 1).clamp(min=0)[:, None])
        eos_ids = torch.tensor(self._eos_token_ids(self.generation_config), device=labels.device)
        has_eos = torch.isin(last, eos_ids) & (lengths > 0)[:, None]
        end = torch.where(has_eos, -100, self.config.response_eos_token_id)
        return labels.scatter(1, lengths[:, None], end)


__all__ = [
    "MelLLMAudioEmbedder",
    "MelLLMForSpeechSeq2Seq",
    "MelLLMModel",
    "MelLLMPreTrainedModel",
    "MelLLMProjector",
]
