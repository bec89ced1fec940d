"""A text language model becomes an untrained Mel-LLM: new audio embedder and projector, everything else kept."""

import copy
import re

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_mel_llm import MelLLMAudioConfig, MelLLMConfig
from ..feature_extraction_mel_llm import MelLLMFeatureExtractor
from ..modeling_mel_llm import (
    MelLLMAudioEmbedder,
    MelLLMCTCHead,
    MelLLMForSpeechSeq2Seq,
    MelLLMProjector,
    MelLLMTokenBytes,
)
from ..modeling_mel_llm_speech import MelLLMForTextToSpeech
from ..processing_mel_llm import MelLLMProcessor
from ..speech_heads_mel_llm import MelLLMSpeechHead
from ..spelling import token_bytes
from ..vocoder_mel_llm import build_vocoder


# Special tokens that models keep in reserve, by family. Reusing one leaves the vocabulary, and with it every adapter
# and every server that checks sizes, as it was.
_SPARE_TOKENS = (
    r"<\|audio\|>",
    r"<\|reserved_special_token_\d+\|>",  # Llama 3
    r"<\|endoftext11\|>",  # Phi-4, whose multimodal sibling has its audio there
    r"<\|endoftext1\d\|>",
    r"<\|placeholder\d+\|>",  # Phi-3
    r"<unused\d+>",  # Gemma
    r"<SPECIAL_\d+>",  # Mistral
    r"\[control_\d+\]",  # Mistral
    r"<\|fim_pad\|>",  # Qwen
    r"<empty_output>",  # SmolLM2
)


def find_spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token of the tokenizer that no text uses, to stand for audio; `None` if it keeps none in reserve."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    in_use = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    for pattern in _SPARE_TOKENS:
        for token in special:
            if re.fullmatch(pattern, token) and token not in in_use:
                return token
    return None


# White noise of this level and below counts as silence: the hiss of a muted microphone, below any speech
_SILENCE_DBFS = -72.0


def silence_threshold(feature_extractor: MelLLMFeatureExtractor) -> float:
    """The greatest mean log-mel that the frames of one second of such noise have, in this extractor's units."""
    noise = torch.randn(feature_extractor.sampling_rate, generator=torch.Generator().manual_seed(0))
    features = feature_extractor(
        noise * 10 ** (_SILENCE_DBFS / 20), sampling_rate=feature_extractor.sampling_rate, return_tensors="pt"
    )["input_features"]
    return round(features.mean(-1).max().item(), 2)


def from_text_llm(
    text_model: PreTrainedModel | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    audio_config: MelLLMAudioConfig | dict | None = None,
    feature_extractor: MelLLMFeatureExtractor | None = None,
    transcription_instruction: str | None = None,
    continuation_instruction: str | None = None,
    qa_instruction: str | None = None,
    speech_instruction: str | None = None,
    chat_template: str | None = None,
    model_class: type[MelLLMForSpeechSeq2Seq] | None = None,
    **config_overrides,
) -> tuple[MelLLMForSpeechSeq2Seq, MelLLMProcessor]:
    r"""Builds a Mel-LLM around a text language model, with its processor.

    Args:
        text_model: A causal language model, whose modules are taken over (not copied); or its config, for a model
            with random weights.
        tokenizer: Its tokenizer. Gets a padding token if it has none, and the token `<|audio|>` if it has no special
            token to spare.
        audio_config: Fields of [`MelLLMAudioConfig`]; the paper's by default. A `silence_threshold` that is not given
            is set to the level of white noise at -72 dBFS (ours); a model's config takes `None` afterwards.
        feature_extractor: By default the one that fits the audio config (the paper's features).
        transcription_instruction (`str`, *optional*): What the default prompt asks for. An empty string suits a model
            that is trained from scratch for nothing else.
        continuation_instruction (`str`, *optional*), qa_instruction (`str`, *optional*): The same of the prompts for what is
            to be gone on with, and for spoken questions.
        speech_instruction (`str`, *optional*): What stands before a text that is to be spoken.
        chat_template (`str`, *optional*): For the processor; made from the tokenizer's by default.
        model_class (`type`, *optional*): [`MelLLMForSpeechContinuation`] for a model that goes on with what it hears.
        config_overrides: Fields of [`MelLLMConfig`]; with a `speech_config`, the model is a
            [`MelLLMForTextToSpeech`], which speaks too.

    Returns:
        The model, untrained where it is new, and the processor. Normalisation statistics of the features are not set:
        see [`MelLLMModel.set_feature_statistics`].

    Raises:
        ValueError: The tokenizer has no end-of-sequence token, a config is not valid, or the language model is of a
            kind that cannot be taken over.
    """
    if tokenizer.eos_token is None:
        raise ValueError("`tokenizer` has no end-of-sequence token, so the model could never end a transcript.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    audio_token = find_spare_token(tokenizer)
    if audio_token is None:
        audio_token = "<|audio|>"
        tokenizer.add_tokens([audio_token], special_tokens=True)

    if audio_config is None:
        audio_config = MelLLMAudioConfig()
    elif isinstance(audio_config, dict):
        audio_config = MelLLMAudioConfig(**audio_config)
    else:
        audio_config = copy.deepcopy(audio_config)  # completed below, and the caller's is the caller's
    if feature_extractor is None:
        feature_extractor = MelLLMFeatureExtractor.from_preset("phi4")
    for name in ("num_mel_bins", "sampling_rate", "hop_length"):
        ours, theirs = getattr(audio_config, name), getattr(feature_extractor, name)
        if ours != theirs:
            raise ValueError(f"`audio_config` has {name} {ours}, but `feature_extractor` has {theirs}.")
    if audio_config.silence_threshold is None:
        audio_config.silence_threshold = silence_threshold(feature_extractor)
    instructions = {
        "transcription_instruction": transcription_instruction,
        "continuation_instruction": continuation_instruction,
        "qa_instruction": qa_instruction,
        "speech_instruction": speech_instruction,
    }
    processor = MelLLMProcessor(
        feature_extractor,
        tokenizer,
        chat_template=chat_template,
        audio_token=audio_token,
        reduction_factor=audio_config.reduction_factor,
        **{name: value for name, value in instructions.items() if value is not None},
    )

    if isinstance(text_model, PreTrainedConfig):
        text_model = AutoModelForCausalLM.from_config(text_model)
    forget_gguf(text_model)
    decoder, head = _decoder_and_head(text_model)
    if text_model.get_input_embeddings().num_embeddings < len(tokenizer):
        text_model.resize_token_embeddings(len(tokenizer))
        decoder, head = _decoder_and_head(text_model)

    prefix, suffix = processor.default_prompt_ids()
    speech_prefix, speech_suffix = processor.speech_prompt_ids()
    continuation_prefix, continuation_suffix = processor.continuation_prompt_ids()
    qa_prefix, qa_suffix = processor.continuation_prompt_ids("qa")
    generation_config = text_model.generation_config
    fields = {
        "eos_token_id": tokenizer.eos_token_id if generation_config is None else generation_config.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "response_eos_token_id": processor.response_eos_token_id(),
        "prompt_prefix_ids": prefix,
        "prompt_suffix_ids": suffix,
        "speech_prefix_ids": speech_prefix,
        "speech_suffix_ids": speech_suffix,
        "continuation_prefix_ids": continuation_prefix,
        "continuation_suffix_ids": continuation_suffix,
        "qa_prefix_ids": qa_prefix,
        "qa_suffix_ids": qa_suffix,
        "separator_ids": processor.separator_ids(),
        # What the weights are, not what a config says: a multimodal model's parts may disagree
        "tie_word_embeddings": head.weight is text_model.get_input_embeddings().weight,
        **config_overrides,
    }
    if fields["eos_token_id"] is None:
        fields["eos_token_id"] = tokenizer.eos_token_id
    # A model's own end tokens need not contain the one that its tokenizer's template closes an answer with
    ends = fields["eos_token_id"] if isinstance(fields["eos_token_id"], list) else [fields["eos_token_id"]]
    if fields["response_eos_token_id"] not in ends:
        fields["eos_token_id"] = [*ends, fields["response_eos_token_id"]]
    attn_implementation = decoder.config._attn_implementation  # which a config that takes it in resets
    config = MelLLMConfig(
        text_config=decoder.config,  # the model's own, so that changes reach it
        audio_config=audio_config,
        audio_token_id=processor.audio_token_id,
        lm_head_bias=head.bias is not None,
        **fields,
    )
    config._attn_implementation = attn_implementation

    # Without memory for a second language model; what is new is then made where the language model is
    if model_class is None:
        model_class = MelLLMForSpeechSeq2Seq if config.speech_config is None else MelLLMForTextToSpeech
    with torch.device("meta"):
        model = model_class(config)
    model.model.language_model = decoder
    model.lm_head = head
    with head.weight.device:
        model.model.audio_embedder = MelLLMAudioEmbedder(model.model.audio_embedder.config)
        model.model.multi_modal_projector = MelLLMProjector(config.audio_config, config.text_config.hidden_size)
        if model.ctc_head is not None:
            model.ctc_head = MelLLMCTCHead(config)
            model._init_weights(model.ctc_head.proj)
            model.token_bytes = MelLLMTokenBytes(config.vocab_size)
            model.token_bytes.set(token_bytes(tokenizer, *model.token_bytes.table.shape))
        if config.speech_config is not None:
            model.speech_head = MelLLMSpeechHead(config)
            for module in model.speech_head.modules():
                model._init_weights(module)
        if config.vocoder_config is not None and config.speech_config is not None:
            model.vocoder = build_vocoder(config.vocoder_config)
    if config.speech_config is not None:
        model.speech_head.to(text_model.dtype)
    if model.ctc_head is not None:
        model.ctc_head.to(text_model.dtype)
    model.model.audio_embedder.to(text_model.dtype)
    model.model.multi_modal_projector.to(text_model.dtype)
    _check_same_scores(model, text_model)
    return model.train(text_model.training), processor


def language_model_of(model: MelLLMForSpeechSeq2Seq) -> PreTrainedModel:
    """The causal language model in a Mel-LLM, with weights of its own: what [`from_text_llm`] makes another Mel-LLM of."""
    decoder, head = model.model.language_model, model.lm_head
    config = copy.deepcopy(decoder.config)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    text_model = AutoModelForCausalLM.from_config(config, dtype=head.weight.dtype)
    its_decoder, its_head = _decoder_and_head(text_model)
    its_decoder.load_state_dict(decoder.state_dict())
    its_head.load_state_dict(head.state_dict())
    if text_model.generation_config is not None:
        text_model.generation_config.eos_token_id = model.config.eos_token_id
    return text_model


# What a reader may change when its ears go along: how many frames are a token, and how many letters are spelt at each
TOKEN_RATE_FIELDS = frozenset({"reduction_factor", "ctc_rate"})
# What makes a token of so many frames: behind the stem's stages, of which the last ones may be missing or new
_OF_THE_TOKEN_RATE = ("conv.out.", "conv.conv.")


def take_ears(model: MelLLMForSpeechSeq2Seq, other: MelLLMForSpeechSeq2Seq) -> None:
    """Gives a Mel-LLM what another has learnt of sound: normalisation, stem, projector and CTC head.

    At another `reduction_factor` the stages of a convolutional stem that both have go along, and what makes a token of their output
    stays new; at another `ctc_rate` a token spells what the middle places of the other's spelt. It has to be trained then.

    Raises:
        ValueError: They are of other sizes, or of another `reduction_factor` without a convolutional stem, of which hardly anything
            could go along. Nothing has been changed then.
    """
    ours, theirs = model.config.audio_config, other.config.audio_config
    its_fields = theirs.to_dict()
    differing = {key for key, value in ours.to_dict().items() if value != its_fields.get(key)}
    # The threshold is one that a new model gets where there was none
    if differing - {"silence_threshold"} - TOKEN_RATE_FIELDS:
        raise ValueError(
            f"`other` has another audio config, so that its weights do not fit: {', '.join(sorted(differing))}."
        )
    has_other_rate = "reduction_factor" in differing
    if has_other_rate and not (ours.has_conv and theirs.has_conv):
        raise ValueError(
            f"`other` has {theirs.reduction_factor} frames in a token and the model {ours.reduction_factor}, which only a "
            "convolutional stem can go over to."
        )
    may_differ = _OF_THE_TOKEN_RATE if has_other_rate else ()
    parts = [
        (model.model.audio_embedder, other.model.audio_embedder, may_differ),
        (model.model.multi_modal_projector, other.model.multi_modal_projector, ()),
    ]
    taken = [(module, _what_fits(module, source.state_dict(), rest)) for module, source, rest in parts]
    if model.ctc_head is not None:
        new_rate, rate = model.ctc_head.rate, other.ctc_head.rate
        places = (torch.arange(new_rate) + (rate - new_rate) // 2).clamp(0, rate - 1)
        spelt = {
            name: value.unflatten(0, (rate, -1))[places].flatten(0, 1)
            for name, value in other.ctc_head.state_dict().items()
        }
        taken.append((model.ctc_head, _what_fits(model.ctc_head, spelt)))
    for module, weights in taken:
        module.load_state_dict(weights)
    ours.silence_threshold = theirs.silence_threshold


def _what_fits(module: nn.Module, weights: dict[str, torch.Tensor], may_differ: tuple[str, ...] = ()) -> dict:
    """All weights of a module: those given and, of those whose names begin with `may_differ`, its own where they do not fit."""
    ours = module.state_dict()
    fitting = {name: value for name, value in weights.items() if name in ours and value.shape == ours[name].shape}
    misfits = [
        name for name in ours.keys() | weights.keys() if name not in fitting and not name.startswith(may_differ)
    ]
    if misfits:
        raise ValueError(f"`other` is of another size, so that its weights do not fit: {', '.join(sorted(misfits))}.")
    return ours | fitting


def forget_gguf(text_model: PreTrainedModel) -> None:
    """Weights read from a GGUF file are ordinary ones by now, but still called quantized: nobody would train them."""
    quantization = getattr(text_model.config, "quantization_config", None)
    fields = quantization if isinstance(quantization, dict) or quantization is None else quantization.to_dict()
    if fields is None or "gguf" not in str(fields.get("quant_method")).lower():
        return
    del text_model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(text_model, name):
            setattr(text_model, name, False if name == "is_quantized" else None)


def _decoder_and_head(text_model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear]:
    """The decoder and the output layer of a causal language model, also of one that is a part of a multimodal model."""
    if not isinstance(text_model, PreTrainedModel) or getattr(text_model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`text_model` must be a transformers model or config without adapters, got {type(text_model).__name__}. Merge them into "
            "the model first: `peft_model.merge_and_unload()`."
        )
    if text_model.config.model_type == "phi4_multimodal":
        raise ValueError(
            "`text_model` is a Phi-4-multimodal, which scripts/convert_phi4mm.py converts with its audio side."
        )
    text_config = text_model.config.get_text_config(decoder=True)
    head = text_model.get_output_embeddings()
    if type(text_config) in MODEL_MAPPING and isinstance(head, nn.Linear):
        classes = MODEL_MAPPING[type(text_config)]
        for module in text_model.modules():
            if isinstance(module, classes):
                return module, head
    raise ValueError(
        f"`text_model`: no decoder with a linear output layer found in {type(text_model).__name__}. Load it with "
        "AutoModelForCausalLM."
    )


@torch.no_grad()
def _check_same_scores(model: MelLLMForSpeechSeq2Seq, text_model: PreTrainedModel) -> None:
    """Some language models scale or change their scores in ways of their own; one that we do not know would be wrong
    from then on without a word."""
    device = model.lm_head.weight.device
    if device.type == "meta":
        return
    ids = torch.tensor([[i for i in range(5) if i != model.config.audio_token_id]], device=device)
    training = text_model.training
    ours = model.eval()(input_ids=ids, use_cache=False).logits
    theirs = text_model.eval()(input_ids=ids, use_cache=False).logits
    text_model.train(training)
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"`text_model`: {type(text_model).__name__} makes its scores from its states in a way that Mel-LLM does not "
            "know, so it cannot be taken over."
        )


__all__ = [
    "TOKEN_RATE_FIELDS",
    "find_spare_token",
    "forget_gguf",
    "from_text_llm",
    "language_model_of",
    "take_ears",
]
