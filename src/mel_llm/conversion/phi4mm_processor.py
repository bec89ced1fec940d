"""Tokenizer, features and prompt of a Phi-4-multimodal checkpoint, as a Mel-LLM's processor."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..feature_extraction_mel_llm import MelLLMFeatureExtractor
from ..processing_mel_llm import MelLLMProcessor
from .phi4mm_source import Phi4MMSource, read_json


# The place of audio: what the published tokenizer calls it, and transformers'
_AUDIO_TOKENS = ("<|endoftext11|>", "<|audio|>")

# Phi-4's, for checkpoints whose files have none, or one that takes no text with audio tokens in it
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
_FEATURE_FIELDS = (
    *("feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis"),
    *("mel_min_frequency", "mel_max_frequency"),
)


def build_processor(source: Phi4MMSource) -> MelLLMProcessor:
    """A processor with the checkpoint's tokenizer, Phi-4's prompts and features, and its place for audio.

    Raises:
        FileNotFoundError: The checkpoint has no tokenizer.
        ValueError: The tokenizer or the features do not fit the model.
    """
    tokenizer = _load_tokenizer(source.folder)
    audio_token = _audio_token(source, tokenizer)
    options = {"audio_token": audio_token, "reduction_factor": source.config.audio_config.time_reduction}
    extractor = _feature_extractor(source)
    try:
        processor = MelLLMProcessor(extractor, tokenizer, **options)
        processor.default_prompt_ids()
        if tokenizer.chat_template is not None:
            return processor
    except Exception:  # whatever a template written for lists of parts does with text
        pass
    tokenizer.chat_template = _CHAT_TEMPLATE
    processor = MelLLMProcessor(extractor, tokenizer, **options)
    processor.default_prompt_ids()
    return processor


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json.")
    with tempfile.TemporaryDirectory() as copy:
        # Alone: beside the original config.json, transformers would ask to run the code that it names
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(copy)
        except (OSError, ValueError, KeyError):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(copy)
    if tokenizer.eos_token is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _audio_token(source: Phi4MMSource, tokenizer: PreTrainedTokenizerBase) -> str:
    vocab_size = source.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{source.folder}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}.")
    if source.fields["model_type"] == "phi4_multimodal":
        index = source.config.audio_config.audio_token_id
        token = tokenizer.convert_ids_to_tokens(index) if 0 <= index < len(tokenizer) else None
        if token is None:
            raise ValueError(f"{source.folder}: the tokenizer has no token {index}, the model's place of audio.")
        return token
    vocab = tokenizer.get_vocab()  # in the original layout, the id lies in the code
    for token in _AUDIO_TOKENS:
        if token in vocab:
            return token
    raise ValueError(f"{source.folder}: the tokenizer has no {' and no '.join(_AUDIO_TOKENS)}, the place of audio.")


def _feature_fields(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            nested = content.get("audio_processor")  # where transformers 5 keeps all of a processor in one file
            fields.update(nested if isinstance(nested, dict) else content)
    return fields


def _feature_extractor(source: Phi4MMSource) -> MelLLMFeatureExtractor:
    fields, audio = _feature_fields(source.folder), source.config.audio_config
    fixed = {
        "audio_compression_rate": audio.time_reduction,
        "audio_downsample_rate": audio.downsample_rate,
        "audio_feat_stride": 1,
        "feature_size": audio.input_size,
    }
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{source.folder}: the features have {name} {fields[name]!r}, the model needs {value}.")
    given = {name: fields[name] for name in _FEATURE_FIELDS if fields.get(name) is not None}
    return MelLLMFeatureExtractor.from_preset("phi4", **{"feature_size": audio.input_size, **given})


__all__ = ["build_processor"]
