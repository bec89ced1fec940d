"""The command line of `scripts/train.py`: what it takes, and what does not go together."""

import json
import math
import os
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..conversion.prune import parse_layers
from .arguments import DataArguments, ModelArguments, SpeechTrainingArguments
from .augmentation import SpecAugment
from .continuation import PromptCut
from .sources import SPEAKING_TASKS, TASKS


DESCRIPTION = "Trains a Mel-LLM on speech with transcripts: to read it, to speak it, to go on with it or to answer it."
RANDOM_PARTS = ("backbone", "encoder", "audio")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, SpeechTrainingArguments]:
    """The command line; what it says comes after, and wins over, a file that it begins with."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SpeechTrainingArguments), description=DESCRIPTION)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        try:
            values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{argv[0]} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{argv[0]} must hold arguments by name, got a {type(values).__name__}.")
        argv = [*arguments_of(values), *argv[1:]]
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    if training_args.output_dir is None:
        parser.error("--output_dir is needed: the folder for checkpoints and the trained model.")
    if training_args.hub_token:
        # Out of the arguments, which the Trainer pickles into every checkpoint and uploads
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if model_args.lora is None:
        for name in ("merge_lora", "lora_r", "lora_alpha", "lora_dropout", "init_adapter"):
            if getattr(model_args, name):
                parser.error(f"--{name} needs --lora.")
    for name in ("audio_config", "text_config", "speech_config"):
        json_fields(name, getattr(model_args, name))
    unknown = random_parts(model_args) - set(RANDOM_PARTS)
    if unknown:
        parser.error(f"--random_init: choose of {', '.join(RANDOM_PARTS)}, got {', '.join(sorted(unknown))}.")
    if model_args.random_init and model_args.model_name_or_path is None:
        parser.error("--random_init is for parts of --model_name_or_path; a model from scratch is random.")
    if model_args.freeze_layers is not None:
        layers_of(model_args.freeze_layers, 10**6)
    weight = model_args.text_loss_weight
    if weight is not None and not (0 <= weight < math.inf and goes_on(tasks_in(data_args))):
        parser.error("--text_loss_weight must be at least 0, and is for --tasks continuation and qa.")
    if not data_args.train_data:
        parser.error("--train_data is needed: a folder, a manifest or a dataset of the Hub; several can be mixed.")
    data_args.tasks = tasks_in(data_args)
    if not data_args.tasks or set(data_args.tasks) - set(TASKS) or len(set(data_args.tasks)) < len(data_args.tasks):
        parser.error(f"--tasks must be one or several of {', '.join(TASKS)}, got {' '.join(data_args.tasks)}.")
    weights = data_args.task_weights
    if weights and (len(weights) != len(data_args.tasks) or not all(0 < weight < math.inf for weight in weights)):
        parser.error(f"--task_weights must be a positive number for each of {', '.join(data_args.tasks)}.")
    spoken = [task for task in data_args.tasks if task in SPEAKING_TASKS]
    if spoken and training_args.label_smoothing_factor:
        parser.error(f"--label_smoothing_factor is for tokens, and --tasks {spoken[0]} has spectrograms for labels.")
    if not 0 <= data_args.voice_pairs <= 1 or (data_args.voice_pairs and "tts" not in data_args.tasks):
        parser.error("--voice_pairs is a share from 0 to 1, for --tasks tts.")
    if "asr" not in data_args.tasks:
        for name in ("spec_augment", "speed_factors", "conditions", "voice_warp"):
            if getattr(data_args, name):
                parser.error(
                    f"--{name} is for reading: it would change the voices and the sound that --tasks {spoken[0]} learns."
                )
    try:
        spec_augment(data_args)
    except ValueError as error:
        parser.error(str(error))
    try:
        prompt_cut(data_args)
        if not 0 <= data_args.skip_text_probability <= 1:
            raise ValueError("skip_text_probability must be a share from 0 to 1.")
    except ValueError as error:
        parser.error(f"--{error}")
    for name, tasks in (("prompt_fraction", {"continuation"}), ("skip_text_probability", {"continuation", "qa"})):
        if getattr(data_args, name) and tasks.isdisjoint(data_args.tasks):
            parser.error(f"--{name} is for --tasks {','.join(sorted(tasks))}.")
    if not 0.0 <= training_args.history_sampling <= 1.0:
        parser.error(f"--history_sampling must be from 0 to 1, got {training_args.history_sampling:g}.")
    if training_args.history_sampling and not spoken:
        parser.error(f"--history_sampling is for speaking: --tasks {', '.join(SPEAKING_TASKS)}.")
    if not 0.0 <= training_args.text_dropout < 1.0:
        parser.error(f"--text_dropout must be at least 0 and less than 1, got {training_args.text_dropout:g}.")
    if training_args.text_dropout and ("asr" not in data_args.tasks or data_args.packing):
        parser.error("--text_dropout is for reading (--tasks asr) without --packing.")
    if data_args.teacher and ("asr" not in data_args.tasks or data_args.packing or model_args.lora):
        parser.error("--teacher is for reading (--tasks asr), of a whole model (no --lora), without --packing.")
    if not 0 < data_args.teacher_weight < math.inf:
        parser.error(f"--teacher_weight must be more than 0, got {data_args.teacher_weight:g}.")
    for name in ("teacher_cache", "teacher_layer"):
        if getattr(data_args, name) is not None and not data_args.teacher:
            parser.error(f"--{name} needs --teacher.")
    check_batching(parser, data_args, training_args)
    return model_args, data_args, training_args


def check_batching(parser: HfArgumentParser, data_args: DataArguments, training_args: SpeechTrainingArguments) -> None:
    if data_args.max_batch_tokens is not None and data_args.max_batch_tokens < 1:
        parser.error(f"--max_batch_tokens must be at least 1, got {data_args.max_batch_tokens}.")
    if data_args.packing and "asr" not in data_args.tasks:
        parser.error("--packing is for reading: add asr to --tasks.")
    if data_args.packing and training_args.label_smoothing_factor:
        parser.error("--label_smoothing_factor does not go with --packing.")
    if data_args.max_batch_tokens is not None and goes_on(data_args.tasks):
        parser.error("--max_batch_tokens counts the tokens of --tasks asr and tts, not of continuation and qa.")
    for name in ("packing", "max_batch_tokens"):
        if getattr(data_args, name) and training_args.n_gpu > 1:
            parser.error(f"--{name} needs a process for each GPU: torchrun --nproc_per_node {training_args.n_gpu} ...")
        if getattr(data_args, name) and training_args.auto_find_batch_size:
            parser.error(f"--{name} and --auto_find_batch_size both decide what a batch is: leave one of them out.")


def tasks_in(data_args: DataArguments) -> list[str]:
    return [task.strip() for entry in data_args.tasks for task in entry.split(",")]


def prompt_cut(data_args: DataArguments) -> PromptCut:
    """Where clips are cut for continuation."""
    return PromptCut(data_args.prompt_seconds, data_args.prompt_fraction or None, data_args.min_continuation_seconds)


def arguments_of(values: dict) -> list[str]:
    """The entries of a file as words of a command line."""
    words = []
    for key, value in values.items():
        if value is None or value == []:
            continue
        if value is False and key.endswith("_strategy"):  # YAML reads `no` as false
            value = "no"
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{key}", *map(str, items)]
    return words


def json_fields(name: str, text: str) -> dict:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is not JSON: {error}. Got {text!r}.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"--{name} must be a JSON object, got {text!r}.")
    return fields


def spec_augment(data_args: DataArguments) -> SpecAugment | None:
    """What masks the features of training clips, if anything does.

    Raises:
        ValueError: A field is unknown or out of range, or there are fields without `--spec_augment`.
    """
    given = json_fields("spec_augment_config", data_args.spec_augment_config)
    unknown = given.keys() - {field.name for field in fields(SpecAugment)}
    if unknown:
        raise ValueError(f"--spec_augment_config: SpecAugment has no field {', '.join(sorted(unknown))}.")
    if given and not data_args.spec_augment:
        raise ValueError("--spec_augment_config needs --spec_augment.")
    try:
        return SpecAugment(**given) if data_args.spec_augment else None
    except ValueError as error:
        raise ValueError(f"--spec_augment_config: {error}") from None


def random_parts(model_args: ModelArguments) -> set[str]:
    return {part.strip() for part in (model_args.random_init or "").split(",") if part.strip()}


def layers_of(text: str, num_layers: int) -> list[int]:
    try:
        return parse_layers(text, num_layers)
    except ValueError as error:
        raise ValueError(f"--freeze_layers: {error}") from None


def goes_on(tasks: list[str]) -> bool:
    """Whether what is learnt takes SPECTRON's model."""
    return not {"continuation", "qa"}.isdisjoint(tasks)


__all__ = [
    "RANDOM_PARTS",
    "arguments_of",
    "check_batching",
    "goes_on",
    "json_fields",
    "layers_of",
    "parse_arguments",
    "prompt_cut",
    "random_parts",
    "spec_augment",
    "tasks_in",
]
