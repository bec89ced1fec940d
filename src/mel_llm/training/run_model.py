"""The model that a run of `scripts/train.py` trains: built anew, or gone on with, with what is new, random or frozen."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
    AutoTokenizer,
)

from ..configuration_mel_llm import MelLLMAudioConfig, MelLLMConfig, MelLLMSpeechConfig, MelLLMVocoderConfig
from ..conversion.text_llm import from_text_llm
from ..feature_extraction_mel_llm import MelLLMFeatureExtractor
from ..modeling_mel_llm import MelLLMAudioEmbedder, MelLLMCTCHead, MelLLMProjector
from ..modeling_mel_llm_continuation import MelLLMForSpeechContinuation
from ..modeling_mel_llm_speech import MelLLMForTextToSpeech
from ..sharing_mel_llm import WEIGHT_FILES, push_folder
from ..spelling import token_bytes
from ..vocoder_mel_llm import MelLLMVocoder
from .arguments import ModelArguments
from .command_line import goes_on, json_fields, layers_of, random_parts
from .lora import LORA_PRESETS, adapter_base, load_adapter, load_adapters, lora_config
from .sources import SPEAKING_TASKS
from .statistics import compute_feature_statistics
from .tokenizer import train_tokenizer
from .trainer import repo_of


# What these arguments ask for lies in a checkpoint once there is one
INSTRUCTIONS = ("transcription_instruction", "continuation_instruction", "qa_instruction")
NEW_MODELS_ONLY = ("gguf_file", "revision", "preset", "audio_config", "text_config", *INSTRUCTIONS, "random_init")
NEW_SPEECH_HEADS_ONLY = ("speech_preset", "speech_config")

# A model from scratch need not understand what it is asked, but must tell its tasks apart; reading is asked for by nothing
SHORT_INSTRUCTIONS = {
    "transcription_instruction": "",
    "continuation_instruction": "Continue.",
    "qa_instruction": "Answer.",
}


def load_or_build(model_args: ModelArguments, texts, tasks: list[str]):
    """The model and its processor, and whether the audio side is new. `texts` are the transcripts, for a tokenizer; the
    `tasks` say what the model must have."""
    speaks = not set(tasks).isdisjoint(SPEAKING_TASKS)
    model_class = {"model_class": MelLLMForSpeechContinuation} if goes_on(tasks) else {}
    instructions = {name: getattr(model_args, name) for name in INSTRUCTIONS}
    audio_fields = json_fields("audio_config", model_args.audio_config)
    unknown = audio_fields.keys() - MelLLMAudioConfig().to_dict().keys()
    if unknown:
        raise ValueError(f"--audio_config: MelLLMAudioConfig has no field {', '.join(sorted(unknown))}.")
    text_fields = json_fields("text_config", model_args.text_config)
    name = model_args.model_name_or_path
    if name is None:
        model_type = text_fields.get("model_type", "llama")
        unknown = text_fields.keys() - {*AutoConfig.for_model(model_type).to_dict(), "model_type"}
        if unknown:
            raise ValueError(f"--text_config: the config of {model_type!r} has no field {', '.join(sorted(unknown))}.")
        tokenizer = train_tokenizer(texts(), vocab_size=model_args.vocab_size)
        fields = {"vocab_size": len(tokenizer), "text_config": text_fields, "audio_config": audio_fields}
        side = {}
        if model_args.preset.startswith("spectron"):
            config = MelLLMConfig.from_preset(model_args.preset, **fields, speech_config=speech_fields(model_args))
            extractor = MelLLMFeatureExtractor.from_preset("spectron", num_mel_bins=config.audio_config.num_mel_bins)
            side = {"feature_extractor": extractor}
            if speaks:
                side["speech_config"] = config.speech_config
                side["vocoder_config"] = MelLLMVocoderConfig.from_feature_extractor(extractor)
        else:
            config = MelLLMConfig.from_preset(model_args.preset, **fields)
            if speaks:
                side = new_speech_side(model_args)
        model, processor = from_text_llm(
            config.text_config,
            tokenizer,
            audio_config=config.audio_config,
            **{name: SHORT_INSTRUCTIONS[name] if asked is None else asked for name, asked in instructions.items()},
            **model_class,
            **side,
        )
        return model, processor, True
    if text_fields or model_args.preset != ModelArguments.preset:
        name = "text_config" if text_fields else "preset"
        raise ValueError(f"--{name} is for models from scratch: leave --model_name_or_path out.")

    dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype, None)
    if dtype is None or not (dtype == "auto" or dtype.is_floating_point):
        raise ValueError(f"--dtype must be float32, bfloat16, float16 or auto, got {model_args.dtype!r}.")
    options = {"revision": model_args.revision} if model_args.revision else {}
    loading = {"dtype": dtype, **options}
    if model_args.attn_implementation:
        loading["attn_implementation"] = model_args.attn_implementation
    if model_args.gguf_file is None:
        if AutoConfig.from_pretrained(name, **options).model_type == MelLLMConfig.model_type:
            if audio_fields or any(asked is not None for asked in instructions.values()):
                raise ValueError(f"--audio_config and the instructions are for new models; {name} is one already.")
            processor = AutoProcessor.from_pretrained(name, **options)
            model = load_mel_llm(name, processor, model_args, tasks, loading)
            if model.token_bytes is not None:  # also of tokens that were added, and of checkpoints from before it
                model.token_bytes.set(token_bytes(processor.tokenizer, *model.token_bytes.table.shape))
            randomise(model, random_parts(model_args))
            return model, processor, False
    else:
        options["gguf_file"] = model_args.gguf_file
        loading["gguf_file"] = model_args.gguf_file
    if random_parts(model_args) - {"backbone"}:
        raise ValueError(f"--random_init: {name} is a language model, whose audio side is new and random in any case.")
    if model_args.random_init:
        if model_args.gguf_file is not None:
            raise ValueError("--random_init cannot read the config in a GGUF file: name a model with a config.json.")
        loading = {
            key: value for key, value in loading.items() if key != "revision" and (key, value) != ("dtype", "auto")
        }
        text_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **options), **loading)
    else:
        text_model = AutoModelForCausalLM.from_pretrained(name, **loading)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model, processor = from_text_llm(
        text_model,
        tokenizer,
        audio_config=audio_fields,
        **{name: asked for name, asked in instructions.items() if asked is not None},
        **model_class,
        **(new_speech_side(model_args) if speaks else {}),
    )
    return model, processor, True


def find_adapters(model_args: ModelArguments) -> tuple[str | None, ModelArguments]:
    """The folder of adapters to go on with, if `--model_name_or_path` is one, and the arguments with their base instead."""
    name = model_args.model_name_or_path
    path = Path(name or "") / "adapter_config.json"
    if name is None or not path.is_file():
        return None, model_args
    before = json.loads(path.read_text(encoding="utf-8"))
    if model_args.lora is None:
        raise ValueError(
            f"--model_name_or_path: {name} holds adapters. Go on with them by --lora, or merge them first: its command "
            "again, with --merge_lora."
        )
    if model_args.init_adapter is not None:
        raise ValueError(
            f"--init_adapter: {name} holds adapters itself, which training would go on with. Name its base instead: "
            f"--model_name_or_path {adapter_base(name)}."
        )
    preset = LORA_PRESETS.get(model_args.lora, {})
    for key, given in (("r", model_args.lora_r), ("lora_alpha", model_args.lora_alpha)):
        if before[key] != (asked := given or preset.get(key)):
            raise ValueError(f"--model_name_or_path: {name} has adapters with {key} {before[key]}, not {asked}.")
    return name, replace(model_args, model_name_or_path=adapter_base(name))


def speech_fields(model_args: ModelArguments) -> dict:
    fields = json_fields("speech_config", model_args.speech_config)
    unknown = fields.keys() - MelLLMSpeechConfig().to_dict().keys()
    if unknown:
        raise ValueError(f"--speech_config: MelLLMSpeechConfig has no field {', '.join(sorted(unknown))}.")
    return fields


def new_speech_side(model_args: ModelArguments, extractor: MelLLMFeatureExtractor | None = None) -> dict:
    """What a model needs beside the reading side to speak. New models get features with a frame for each hop."""
    fields = speech_fields(model_args)
    new = {"speech_config": MelLLMSpeechConfig.from_preset(model_args.speech_preset, **fields)}
    if extractor is None:
        extractor = MelLLMFeatureExtractor.from_preset("phi4")
        extractor.edge_padding = (extractor.win_length - extractor.hop_length) // 2
        new["feature_extractor"] = extractor
    # A trained one is put in when the model is there
    new["vocoder_config"] = MelLLMVocoderConfig.from_feature_extractor(extractor)
    return new


def randomise(model, parts: set[str]) -> None:
    """Gives parts of a Mel-LLM the weights that new ones have: the paper's random encoder, and everything random."""
    config, like = model.config, model.lm_head.weight
    if "backbone" in parts:
        attention = model.model.language_model.config._attn_implementation
        fresh = AutoModel.from_config(config.text_config, dtype=like.dtype, attn_implementation=attention)
        model.model.language_model = fresh.to(like.device)
        config.text_config = fresh.config
        torch.nn.init.normal_(model.lm_head.weight, std=getattr(config.text_config, "initializer_range", 0.02))
        model.tie_weights()
    embedder = model.model.audio_embedder
    if "encoder" in parts and embedder.encoder is None:
        raise ValueError("--random_init encoder: the model has no encoder.")
    if parts & {"encoder", "audio"}:
        fresh = MelLLMAudioEmbedder(embedder.config).to(like)
        if "audio" in parts:
            fresh.normalizer = embedder.normalizer  # measured, not learnt
            model.model.audio_embedder = fresh
            projector = MelLLMProjector(config.audio_config, config.text_config.hidden_size)
            model.model.multi_modal_projector = projector.to(like)
            if model.ctc_head is not None:
                model.ctc_head = MelLLMCTCHead(config).to(like)
                model._init_weights(model.ctc_head.proj)
        else:
            embedder.encoder = fresh.encoder


def load_mel_llm(name: str, processor, model_args: ModelArguments, tasks: list[str], loading: dict):
    """A Mel-LLM as it is; one that has only read so far gets a speech head if it is to speak."""
    options = {key: loading[key] for key in ("revision",) if key in loading}
    config = AutoConfig.from_pretrained(name, **options)
    speaks = not set(tasks).isdisjoint(SPEAKING_TASKS)
    is_speaker = config.speech_config is not None
    if speaks and not is_speaker:
        for key, value in new_speech_side(model_args, processor.feature_extractor).items():
            setattr(config, key, value)
    elif is_speaker:
        for key in NEW_SPEECH_HEADS_ONLY:
            if getattr(model_args, key) != getattr(ModelArguments, key):
                raise ValueError(f"--{key} is for new speech heads; {name} has one.")
    if goes_on(tasks) and not (config.continuation_suffix_ids or config.continuation_prefix_ids):
        # It is older than the task
        config.separator_ids = processor.separator_ids()
        config.continuation_prefix_ids, config.continuation_suffix_ids = processor.continuation_prompt_ids()
        config.qa_prefix_ids, config.qa_suffix_ids = processor.continuation_prompt_ids("qa")
    if goes_on(tasks) or MelLLMForSpeechContinuation.__name__ in (config.architectures or ()):
        return MelLLMForSpeechContinuation.from_pretrained(name, config=config, **loading)
    # A speech head that is not trained now must not be lost
    auto_class = AutoModelForTextToWaveform if speaks or is_speaker else AutoModelForSpeechSeq2Seq
    return auto_class.from_pretrained(name, config=config, **loading)


def load_vocoder(name: str) -> MelLLMVocoder:
    """A vocoder from its own folder or Hub repository, or that of a Mel-LLM that speaks, adapters with their base included.

    Raises:
        OSError: There is nothing of that name.
        ValueError: It is neither, or a Mel-LLM without a vocoder.
    """
    place = os.path.expanduser(name)
    if os.path.isfile(os.path.join(place, "adapter_config.json")):
        vocoder = AutoModelForTextToWaveform.from_pretrained(place).vocoder
    else:
        # transformers would take any model for the one that is asked for, and leave its weights aside
        fields = MelLLMConfig.get_config_dict(place)[0]
        kind = fields.get("model_type")
        if kind == MelLLMVocoderConfig.model_type:
            return MelLLMVocoder.from_pretrained(place)
        if kind != MelLLMConfig.model_type:
            raise ValueError(
                f"{name} is a model of the type {kind!r}, and no vocoder of this package. For a HiFi-GAN see "
                "`mel_llm.vocoder_mel_llm.load_hifigan`."
            )
        has_one = fields.get("vocoder_config") is not None and fields.get("speech_config") is not None
        vocoder = AutoModelForTextToWaveform.from_pretrained(place).vocoder if has_one else None
    if vocoder is None:
        raise ValueError(f"{name} is a Mel-LLM that has no vocoder.")
    return vocoder


def set_vocoder(model, processor, vocoder: str | None) -> None:
    """Gives a model that speaks the vocoder that is asked for; `None` leaves it its own."""
    if vocoder is None:
        return
    if not isinstance(model, MelLLMForTextToSpeech):
        raise ValueError("--vocoder is for models that speak: add --tasks tts.")
    wanted = MelLLMVocoderConfig.from_feature_extractor(processor.feature_extractor)
    if vocoder == "none":
        model.vocoder = model.config.vocoder_config = None
        return
    new = MelLLMVocoder(wanted) if vocoder == "griffin_lim" else load_vocoder(vocoder)
    ours, theirs = wanted.feature_config, MelLLMVocoderConfig.from_feature_extractor(new.extractor).feature_config
    if ours != theirs:
        differing = ", ".join(f"{key} {theirs[key]} (here {ours[key]})" for key in ours if ours[key] != theirs[key])
        raise ValueError(f"--vocoder: {vocoder} is for features with {differing}.")
    new.config._name_or_path = ""  # a folder of whoever trained it, in a config that is published
    model.vocoder, model.config.vocoder_config = new, new.config


def is_changed(model, model_args: ModelArguments) -> bool:
    """Whether a Mel-LLM was given a task, a speech head or another vocoder than it had where it was loaded from."""
    before = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.revision or "main")
    is_new_task = isinstance(model, MelLLMForSpeechContinuation) and (
        type(model).__name__ not in (before.architectures or ())
    )
    if model_args.random_init or is_new_task:
        return True
    return model_args.vocoder is not None or (before.speech_config is None) != (model.config.speech_config is None)


def has_statistics(model) -> bool:
    """Whether the normalisation was ever measured; a Mel-LLM that was only converted comes without."""
    normalizer = model.model.audio_embedder.normalizer
    return bool((normalizer.global_mean != 0).any() or (normalizer.global_invstd != 1).any())


def set_statistics(model, processor, examples, num_clips: int) -> None:
    """Measures the normalisation of a new model on clips spread over the data."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(len(examples), generator=generator)[:num_clips].tolist()
    features = (processor(audio=examples[place]["audio"])["input_features"][0] for place in places)
    model.model.set_feature_statistics(*compute_feature_statistics(features))


def finished_config_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError):
        return MelLLMConfig.model_type if not any(folder.iterdir()) else None


def push_base(folder, training_args) -> str:
    """Puts the model that adapters belong to on the Hub too, where those who load them find it; returns its name there."""
    if not training_args.should_save:
        return str(folder)
    repo = repo_of(training_args, "-base")
    push_folder(folder, repo, commit_message="Base model", delete_patterns=list(WEIGHT_FILES))
    return repo


def add_lora(
    model, processor, model_args: ModelArguments, training_args, needs_base: bool, adapters: str | None = None
):
    """The model with adapters: new ones, or those of a folder. They need a Mel-LLM to be adapters of; one that is new, or
    has new parts, is saved beside them."""
    from peft import PeftConfig, get_peft_model

    name = model.name_or_path
    if adapters is not None and needs_base:
        raise ValueError(
            f"--model_name_or_path: {adapters} holds adapters; merge them before the model gets new parts."
        )
    if needs_base:
        name = Path(training_args.output_dir) / "base"
        if name.exists() and finished_config_type(name) != MelLLMConfig.model_type:
            raise FileExistsError(
                f"{name}, where the untrained model goes, is something else. Choose another --output_dir."
            )
        if training_args.should_save:
            # Beside it first: the model may have been read from there, and its weights may still be
            partial = name.with_name(".base.partial")
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            shutil.rmtree(name, ignore_errors=True)
            os.replace(partial, name)
    if training_args.push_to_hub and not model_args.merge_lora and os.path.isdir(name):
        name = push_base(name, training_args)
    # The adapter's config names its base, from wherever it is loaded
    model.config._name_or_path = model.name_or_path = os.path.abspath(name) if os.path.isdir(name) else str(name)
    if adapters is not None:
        config = PeftConfig.from_pretrained(adapters)
        config.base_model_name_or_path = model.name_or_path
        if model_args.lora_dropout is not None:
            config.lora_dropout = model_args.lora_dropout
        return load_adapters(model, adapters, config=config, is_trainable=True)
    fields = {"r": model_args.lora_r, "lora_alpha": model_args.lora_alpha, "lora_dropout": model_args.lora_dropout}
    fields = {key: value for key, value in fields.items() if value is not None}
    # Layers that begin with somebody's adapters keep these; new adapters that are not trained are not made
    frozen = () if model_args.init_adapter or model_args.freeze_layers is None else frozen_layers(model, model_args)
    model = get_peft_model(model, lora_config(model, model_args.lora, frozen_layers=frozen, **fields))
    if model_args.init_adapter:
        load_adapter(model, model_args.init_adapter)
    return model


def frozen_layers(model, model_args: ModelArguments) -> list[int]:
    return layers_of(model_args.freeze_layers, model.config.text_config.num_hidden_layers)


__all__ = [
    "INSTRUCTIONS",
    "NEW_MODELS_ONLY",
    "NEW_SPEECH_HEADS_ONLY",
    "SHORT_INSTRUCTIONS",
    "add_lora",
    "find_adapters",
    "finished_config_type",
    "frozen_layers",
    "has_statistics",
    "is_changed",
    "load_mel_llm",
    "load_or_build",
    "load_vocoder",
    "new_speech_side",
    "push_base",
    "randomise",
    "set_statistics",
    "set_vocoder",
    "speech_fields",
]
