"""Trains a Mel-LLM on speech with transcripts: to read it, to speak it, to go on with it or to answer it, or several.

    python scripts/train.py --train_data recordings --output_dir runs/first --num_train_epochs 20
    python scripts/train.py --train_data recordings --output_dir runs/lora --lora small \\
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct
    python scripts/train.py --train_data recordings --output_dir runs/both --tasks asr,tts
    python scripts/train.py --train_data recordings questions --output_dir runs/spectron --tasks continuation,qa
    python scripts/train.py config.yaml --learning_rate 1e-4

`--model_name_or_path` is the backbone: a causal language model to build a Mel-LLM around, or a Mel-LLM to go on with.
The arguments are those below and all of transformers' Seq2SeqTrainingArguments; a YAML or JSON file of them may come
first. The same command, started again, goes on from the last complete checkpoint in --output_dir. What comes out loads
with `pipeline("automatic-speech-recognition", model=OUTPUT_DIR)`, and "text-to-speech" if it has learnt to speak, once
`mel_llm` is imported; --push_to_hub uploads it.
"""

import importlib.metadata
import json
import logging
import math
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
    AutoTokenizer,
    HfArgumentParser,
    set_seed,
)
from transformers.modelcard import extract_hyperparameters_from_trainer

import mel_llm
from mel_llm import (
    MelLLMAudioConfig,
    MelLLMConfig,
    MelLLMFeatureExtractor,
    MelLLMForSpeechContinuation,
    MelLLMForTextToSpeech,
    MelLLMSpeechConfig,
    MelLLMVocoder,
    MelLLMVocoderConfig,
    export_remote_code,
)
from mel_llm.card_results import local_name, local_names, source_keys
from mel_llm.conversion import from_text_llm, parse_layers
from mel_llm.evaluation import get_text_normalizer, make_compute_metrics
from mel_llm.modeling_mel_llm import MelLLMAudioEmbedder, MelLLMCTCHead, MelLLMProjector
from mel_llm.publishing import without_paths
from mel_llm.sharing_mel_llm import WEIGHT_FILES, push_folder
from mel_llm.training import (
    LORA_PRESETS,
    SPEAKING_TASKS,
    TASKS,
    ContinuationCollator,
    PackedTranscriptionCollator,
    PromptCut,
    QACollator,
    RecordingConditions,
    SpecAugment,
    SpeechDataset,
    SpeechSampler,
    SpeechSource,
    SpeechStream,
    SpeechTrainer,
    SpeedPerturbation,
    SynthesisCollator,
    TaskCollator,
    TokenBudgetSampler,
    TokenCounter,
    TranscriptionCollator,
    VoiceWarp,
    check_packing,
    compute_feature_statistics,
    count_parameters,
    count_unspellable,
    describe_trainable,
    freeze,
    freeze_layers,
    last_checkpoint,
    load_adapter,
    load_source,
    lora_config,
    push_whole,
    repo_of,
    resume_stream,
    save_whole,
    select_answered,
    select_clips,
    select_continuations,
    train_tokenizer,
    trainable_table,
)
from mel_llm.training.arguments import DataArguments, ModelArguments, SpeechTrainingArguments
from mel_llm.training.lora import adapter_base, load_adapters


logger = logging.getLogger("train")

SUMMARY = "training_summary.json"
EVALUATION = "Evaluation"
RANDOM_PARTS = ("backbone", "encoder", "audio")
AUGMENTATIONS = ("speed_factors", "spec_augment", "conditions", "voice_warp", "voice_pairs")

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


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, SpeechTrainingArguments]:
    """The command line; what it says comes after, and wins over, a file that it begins with."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, SpeechTrainingArguments), description=__doc__.splitlines()[0]
    )
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
        prompt_cut(data_args)
        if not 0 <= data_args.skip_text_probability <= 1:
            raise ValueError("skip_text_probability must be a share from 0 to 1.")
    except ValueError as error:
        parser.error(f"--{error}")
    for name, tasks in (("prompt_fraction", {"continuation"}), ("skip_text_probability", {"continuation", "qa"})):
        if getattr(data_args, name) and tasks.isdisjoint(data_args.tasks):
            parser.error(f"--{name} is for --tasks {','.join(sorted(tasks))}.")
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


def random_parts(model_args: ModelArguments) -> set[str]:
    return {part.strip() for part in (model_args.random_init or "").split(",") if part.strip()}


def layers_of(text: str, num_layers: int) -> list[int]:
    try:
        return parse_layers(text, num_layers)
    except ValueError as error:
        raise ValueError(f"--freeze_layers: {error}") from None


# --- data -----------------------------------------------------------------------------------------------------------


def load_sources(specs: list[str], split: str, data_args: DataArguments) -> tuple[list[SpeechSource], list]:
    sources = [SpeechSource.parse(spec) for spec in specs]
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError(f"Give all sources of the split {split!r} a weight, or none of them: {specs}.")
    normalizer = None if data_args.text_normalizer == "none" else get_text_normalizer(data_args.text_normalizer)
    return sources, [load_source(source, split, normalizer) for source in sources]


def mix_streams(sources: list[SpeechSource], datasets_: list, seed: int):
    """One stream of all sources, those that do not stream among them."""
    from datasets import interleave_datasets

    streams = [
        data if hasattr(data, "n_shards") else data.to_iterable_dataset(num_shards=min(8, len(data)))
        for data in datasets_
    ]
    if len(streams) == 1:
        return streams[0]
    weights = [source.weight or 1.0 for source in sources]
    return interleave_datasets(
        streams,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def set_workers(stream: SpeechStream, training_args: SpeechTrainingArguments) -> None:
    """No more workers than there are shards for them: one without would wait for ever."""
    most = stream.max_workers()
    if training_args.dataloader_num_workers > most:
        logger.warning(f"--dataloader_num_workers is {most}: the stream has no more shards for each process.")
        training_args.dataloader_num_workers = most
    if stream.stream.n_shards % training_args.world_size:
        logger.warning(
            f"The stream's {stream.stream.n_shards} shards cannot be divided evenly among {training_args.world_size} "
            "processes: each reads all of it and keeps its share of the rows."
        )


@dataclass
class Selection:
    """The clips of one source that are kept, for one task."""

    source: SpeechSource
    task: str
    rows: object  # datasets.Dataset
    seconds: list[float]


def select_all(sources, datasets_, processor, data_args: DataArguments, what: str) -> tuple[list[Selection], dict]:
    """What is kept of each source, for each task that it serves, and the reports."""
    selections, reports = [], {}
    keys = source_keys(source.place for source in sources)
    for source, data, key in zip(sources, datasets_, keys, strict=True):
        selected, seconds, report = select_clips(
            data,
            processor.tokenizer,
            data_args.min_seconds,
            data_args.max_seconds,
            data_args.max_tokens,
            source.fraction,
            source.hours,
        )
        logger.info(f"{what} data from {source.place}: {report}")
        reports[key] = report.to_dict()
        for task in tasks_of(source, data, data_args.tasks):
            rows, lengths = selected, seconds
            if task in ("continuation", "qa"):
                if task == "qa":
                    rows, lengths, narrower = select_answered(selected, seconds, report, data_args.max_seconds)
                else:
                    rows, lengths, narrower = select_continuations(selected, seconds, report, prompt_cut(data_args))
                logger.info(f"Of these, for {task}: {narrower}")
                reports[key][task] = narrower.to_dict()
            rows = rows.add_column("task", [task] * len(lengths))
            selections.append(Selection(source, task, rows, lengths))
    for task in data_args.tasks:
        of_task = [selection for selection in selections if selection.task == task]
        if what == EVALUATION and not of_task and len(data_args.tasks) > 1:
            logger.warning(f"--eval_data has no source for {task}, which is not evaluated.")
        elif not any(selection.seconds for selection in of_task):
            raise ValueError(f"No clip of the {what} data is left to use for {task}; the reasons are above.")
    # A source may be of no use for one of the tasks, and has no share in it then
    return [selection for selection in selections if selection.seconds], reports


def asks(data) -> bool:
    """Whether there are questions about the clips; of a stream its beginning tells."""
    asked = (row["instruction"] for row in data.take(100)) if hasattr(data, "n_shards") else data["instruction"]
    return any(one is not None for one in asked)


def check_questions(sources: list[SpeechSource], datasets_: list, tasks: list[str], ctc_only_steps: int) -> None:
    for source, data in zip(sources, datasets_, strict=True):
        served = tasks_of(source, data, tasks)
        if (served == ["asr"] and not ctc_only_steps) or not asks(data):
            continue
        if served != ["asr"]:
            raise ValueError(
                f"{source.place} has questions about its clips, which are for reading alone: write {source.place},task=asr; "
                f"or, if the clips are spoken questions, {source.place},task=qa."
            )
        raise ValueError(
            f"{source.place} has questions about its clips, of which the CTC head learns nothing: --ctc_only_steps is for "
            "transcripts alone. Train on these first."
        )


def tasks_of(source: SpeechSource, data, tasks: list[str]) -> list[str]:
    """The tasks that a source serves: its own; else, of those that are learnt, `qa` alone where there are answers, and
    where there are none all others."""
    if source.task:
        return [source.task]
    if "qa" not in tasks or tasks == ["qa"]:
        return tasks
    answered = "answers" in (data.column_names or ())
    return [task for task in tasks if (task == "qa") == answered]


def tell_unspellable(selections: list[Selection], audio_config: MelLLMAudioConfig) -> None:
    rate = audio_config.frame_rate / audio_config.reduction_factor * audio_config.ctc_rate
    for selection in selections:
        places = [int(seconds * rate) for seconds in selection.seconds]
        count = count_unspellable(selection.rows["text"], places) if selection.task == "asr" else 0
        if count:
            logger.warning(
                f"CTC learns nothing from {count} of {len(places)} clips of {selection.source.place}: they have more letters "
                f"than the {rate:g} places a second that the head has. Raise `ctc_rate` in --audio_config."
            )


def kinds_of(selections: list[Selection], spells: bool) -> list[str]:
    """What the clips of a batch have in common: the task; with a CTC head (`spells`), which learns nothing from batches with
    questions, also whether there are any."""
    return [
        f"{selection.task}, asked" if spells and asks(selection.rows) else selection.task for selection in selections
    ]


def rows_of(selections: list[Selection]):
    from datasets import concatenate_datasets

    return concatenate_datasets([selection.rows for selection in selections])


def clips_of(rows):
    return zip(rows["origin"], rows["offset"], strict=True)


def mixing_weights(selections: list[Selection], data_args: DataArguments) -> list[float] | None:
    """The share of each selection in an epoch; `None` if every clip comes once for each of its tasks."""
    by_source = selections[0].source.weight is not None
    if not by_source and not data_args.task_weights:
        return None
    task_weights = dict(zip(data_args.tasks, data_args.task_weights or [1.0] * len(data_args.tasks), strict=True))
    # Within a task, as the sources' weights say, else as the clips come
    shares = [selection.source.weight if by_source else len(selection.seconds) for selection in selections]
    totals = {task: 0.0 for task in data_args.tasks}
    for selection, share in zip(selections, shares, strict=True):
        totals[selection.task] += share
    return [
        task_weights[selection.task] * share / totals[selection.task]
        for selection, share in zip(selections, shares, strict=True)
    ]


def budget_sampler(
    selections: list[Selection],
    data: SpeechDataset,
    counter: TokenCounter,
    data_args: DataArguments,
    training_args: SpeechTrainingArguments,
) -> TokenBudgetSampler:
    """Batches by --max_batch_tokens.

    Raises:
        ValueError: A clip is beyond the budget by itself.
    """
    audio = [counter.audio(selection.seconds, selection.task) for selection in selections]
    text = [
        counter.text(selection.rows["text"], selection.task, selection.rows["instruction"]) for selection in selections
    ]
    audio_tokens, text_tokens = np.concatenate(audio), np.concatenate(text)
    total = audio_tokens + text_tokens
    if total.max() > data_args.max_batch_tokens:
        row = data.data[int(total.argmax())]
        raise ValueError(
            f"--max_batch_tokens {data_args.max_batch_tokens}: {int((total > data_args.max_batch_tokens).sum())} clips need "
            f"more by themselves, {row['origin']} {total.max()}. Raise it, or leave them out with --max_seconds or "
            "--max_tokens."
        )
    seconds = [length for selection in selections for length in selection.seconds]
    return TokenBudgetSampler(
        audio_tokens,
        text_tokens,
        data_args.max_batch_tokens,
        [len(selection.seconds) for selection in selections],
        mixing_weights(selections, data_args),
        training_args.seed,
        kinds_of(selections, counter.audio_config.ctc_weight > 0),
        counter.packed,
        training_args.world_size,
        training_args.process_index,
        (lambda epoch: data.partners(seconds, epoch)) if data_args.voice_pairs else None,
    )


# --- model ----------------------------------------------------------------------------------------------------------


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


def goes_on(tasks: list[str]) -> bool:
    """Whether what is learnt takes SPECTRON's model."""
    return not {"continuation", "qa"}.isdisjoint(tasks)


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
    new = MelLLMVocoder(wanted) if vocoder == "griffin_lim" else MelLLMVocoder.from_pretrained(vocoder)
    ours, theirs = wanted.feature_config, MelLLMVocoderConfig.from_feature_extractor(new.extractor).feature_config
    if ours != theirs:
        differing = ", ".join(f"{key} {theirs[key]} (here {ours[key]})" for key in ours if ours[key] != theirs[key])
        raise ValueError(f"--vocoder: {vocoder} is for features with {differing}.")
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


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trainer that is ready to start, and what is to be told about it at the end."""

    trainer: SpeechTrainer
    processor: mel_llm.MelLLMProcessor
    checkpoint: str | None
    setup: dict
    merge_lora: bool
    length: dict
    reports: dict[str, dict]
    stream_counts: torch.Tensor | None


def length_of(training_args: SpeechTrainingArguments, model_args: ModelArguments, data_args: DataArguments) -> dict:
    vocoder = model_args.vocoder
    return {
        "num_train_epochs": training_args.num_train_epochs,
        "max_steps": training_args.max_steps,
        "lora": model_args.lora,
        "merge_lora": model_args.merge_lora,
        "tasks": data_args.tasks,
        # Written beside the model, and compared by the next start: without the folders of this machine
        "vocoder": local_name(vocoder) if vocoder and os.path.exists(os.path.expanduser(vocoder)) else vocoder,
        # Only where there is something to tell, so that runs from before are still known as finished
        **({"freeze_layers": model_args.freeze_layers} if model_args.freeze_layers else {}),
    }


def describe_setup(model_args: ModelArguments, data_args: DataArguments, sources, eval_sources) -> dict:
    """What the run began with, for its summary and the model's card."""

    def described(sources, split):
        named = ("place", "config", "weight", "task", "streaming", "fraction", "hours")
        return [
            {key: getattr(source, key) for key in named}
            | {"split": source.split or split, "is_local": os.path.exists(os.path.expanduser(source.place))}
            for source in sources
        ]

    name = model_args.model_name_or_path
    return {
        "model_name_or_path": name,
        "model_is_local": name is None or os.path.exists(os.path.expanduser(name)),
        "train_data": described(sources, "train"),
        "eval_data": described(eval_sources, "validation"),
        **({"random_init": model_args.random_init} if model_args.random_init else {}),
        **({"init_adapter": model_args.init_adapter} if model_args.init_adapter else {}),
        "wer_normalizer": data_args.wer_normalizer,
        "augmentation": {name: getattr(data_args, name) for name in AUGMENTATIONS},
        **({"prompts": str(prompt_cut(data_args))} if "continuation" in data_args.tasks else {}),
    }


def check_checkpoint(checkpoint: str, model_args: ModelArguments) -> None:
    """Refuses to go on with a LoRA run without adapters of the same kind, and the other way round."""
    path = Path(checkpoint) / "adapter_config.json"
    if path.is_file() != (model_args.lora is not None):
        kind = "adapters (--lora)" if path.is_file() else "a whole model"
        raise ValueError(
            f"{checkpoint} is of a run that trained {kind}. Go on in its way, or choose another --output_dir."
        )
    if model_args.lora is not None:
        before = json.loads(path.read_text(encoding="utf-8"))
        asked = {"r": model_args.lora_r or LORA_PRESETS.get(model_args.lora, {}).get("r")}
        if before["r"] != asked["r"]:
            raise ValueError(f"{checkpoint} has adapters of rank {before['r']}, not {asked['r']}.")


def check_frozen(checkpoint: str, model, model_args: ModelArguments) -> None:
    """Refuses to go on with adapters in other layers."""
    if model_args.lora is None:
        return
    before = json.loads((Path(checkpoint) / "adapter_config.json").read_text(encoding="utf-8")).get("exclude_modules")
    if before != model.peft_config["default"].exclude_modules:
        raise ValueError(
            f"{checkpoint} has adapters in other layers than --freeze_layers {model_args.freeze_layers} leaves. Go on in its "
            "way, or choose another --output_dir."
        )


def finished_length(folder: str) -> dict | None:
    """How long the run in this folder was to be, if it came to its end."""
    try:
        return json.loads((Path(folder) / SUMMARY).read_text(encoding="utf-8"))["length"]
    except (OSError, ValueError, KeyError):
        return None


def prepare(argv: list[str]) -> Run | None:
    """Everything that can go wrong before training; `None` if there is nothing to do."""
    model_args, data_args, training_args = parse_arguments(argv)
    logging.basicConfig(
        format="%(message)s", stream=sys.stderr, level=logging.INFO if training_args.should_save else logging.WARNING
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None or checkpoint.lower() in ("true", "1"):
        checkpoint = last_checkpoint(training_args.output_dir)
    if finished_length(training_args.output_dir) == length_of(training_args, model_args, data_args):
        if training_args.push_to_hub and training_args.should_save:
            push_whole(training_args.output_dir, training_args)  # the run that trained it may have failed to
        logger.info(
            f"{training_args.output_dir} is trained already. Ask for more --num_train_epochs or --max_steps to go on, or "
            "choose another --output_dir."
        )
        return None
    if checkpoint is not None:
        check_checkpoint(checkpoint, model_args)
        logger.info(f"Going on from {checkpoint}.")
    elif any((Path(training_args.output_dir) / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileExistsError(
            f"{training_args.output_dir} holds a model and no checkpoint to go on from. Choose another --output_dir."
        )
    set_seed(training_args.seed)

    sources, train_data = load_sources(data_args.train_data, "train", data_args)
    eval_sources, eval_data = load_sources(data_args.eval_data, "validation", data_args)
    for source in [*sources, *eval_sources]:
        if source.task is not None and source.task not in data_args.tasks:
            raise ValueError(f"{source.place} is for {source.task}, which is not among --tasks.")
    for source, data in zip([*sources, *eval_sources], [*train_data, *eval_data], strict=True):
        if "qa" in tasks_of(source, data, data_args.tasks) and "answers" not in (data.column_names or ()):
            raise ValueError(
                f"{source.place} has no answers to learn --tasks qa from. Name their column: {source.place},"
                f"answer_column=...; or, if the clips are spoken questions, write {source.place},task=qa."
            )
    check_questions(sources, train_data, data_args.tasks, training_args.ctc_only_steps)
    check_questions(eval_sources, eval_data, data_args.tasks, 0)
    if training_args.label_smoothing_factor and not all(asks(data) for data in train_data):
        raise ValueError("--label_smoothing_factor is for questions about recordings: transcripts are learnt without.")
    streaming = any(source.streaming for source in sources)
    if streaming and data_args.voice_pairs:
        raise ValueError("--voice_pairs needs data that does not stream: another clip of the speaker must be at hand.")
    if streaming and len(data_args.tasks) > 1:
        raise ValueError("A stream is for one task at a time: give --tasks one of them, or data that does not stream.")
    if streaming and "epoch" in (training_args.save_strategy, training_args.eval_strategy):
        raise ValueError("A stream has no epochs: --save_strategy and --eval_strategy must be steps or no.")
    if streaming and training_args.auto_find_batch_size:
        raise ValueError("--auto_find_batch_size is for data that does not stream: try --max_batch_tokens.")
    if streaming and training_args.max_steps <= 0:
        raise ValueError("A stream has no length: say how long to train with --max_steps.")
    if any(source.streaming for source in eval_sources):
        raise ValueError("--eval_data cannot stream: every evaluation needs the same clips.")
    if training_args.eval_strategy != "no" and not eval_sources:
        raise ValueError("--eval_strategy needs --eval_data.")
    if data_args.features_on_device and training_args.dataloader_num_workers == 0 and not torch.cuda.is_available():
        logger.info("--features_on_device: there is no GPU, so features are made on the CPU, in this process.")

    setup = describe_setup(model_args, data_args, sources, eval_sources)
    for described, data in zip(setup["eval_data"], eval_data, strict=True):
        described["asks"] = asks(data)  # its error rates are of answers
    if checkpoint is not None:
        # What began as something else is a Mel-LLM by now, with a tokenizer and a normalisation of its own
        base = Path(training_args.output_dir) / "base"
        began_with = str(base) if base.is_dir() else model_args.model_name_or_path
        model_args = replace(
            model_args,
            model_name_or_path=checkpoint if model_args.lora is None else began_with,
            **{name: getattr(ModelArguments, name) for name in (*NEW_MODELS_ONLY, *NEW_SPEECH_HEADS_ONLY)},
        )
    adapters, model_args = find_adapters(model_args)
    model, processor, is_new = load_or_build(model_args, lambda: transcripts(train_data), data_args.tasks)
    if data_args.packing:
        check_packing(model)
    set_vocoder(model, processor, model_args.vocoder)
    if model_args.text_loss_weight is not None:
        model.config.text_loss_weight = model_args.text_loss_weight
    if isinstance(model, MelLLMForTextToSpeech):
        if model.vocoder is not None:
            model.vocoder.requires_grad_(False)
        if training_args.ddp_find_unused_parameters is None:  # a batch is of one task, and one head has no part in it
            training_args.ddp_find_unused_parameters = True
    rate = processor.feature_extractor.sampling_rate
    speed = SpeedPerturbation(tuple(data_args.speed_factors)) if data_args.speed_factors else None
    conditions = RecordingConditions() if data_args.conditions else None
    slowest = min(data_args.speed_factors, default=1.0)
    counter = TokenCounter(processor, model.config, slowest, ["asr"] if data_args.packing else [])
    reports: dict[str, dict] = {}
    sampler = counts = eval_set = None
    if streaming:
        (task,), cut = data_args.tasks, prompt_cut(data_args)
        train_set = SpeechStream(
            mix_streams(sources, train_data, training_args.seed),
            training_args.train_batch_size,
            rate,
            speed,
            training_args.seed,
            data_args.min_seconds if task != "continuation" else max(data_args.min_seconds, cut.min_clip_seconds),
            data_args.max_seconds,
            data_args.shuffle_buffer,
            conditions,
            training_args.process_index,
            training_args.world_size,
            data_args.max_batch_tokens,
            counter,
            task,
            # By what tells sources apart, without the folders of this machine
            {"sources": [f"{source.config}:{source.split}:{source.weight}" for source in sources]},
        )
        set_workers(train_set, training_args)
        counts = train_set.counts
        if checkpoint is not None and not training_args.ignore_data_skip:
            resume_stream(train_set, checkpoint, training_args)
        longest = data_args.max_seconds
        is_untrained = is_new or not has_statistics(model)
        measured = train_set.take(min(200, data_args.statistics_clips)) if is_untrained else []
        if is_untrained and not measured:
            raise ValueError("The stream has not one clip that can be used: check the data and its limits.")
    else:
        selections, reports["train"] = select_all(sources, train_data, processor, data_args, "Training")
        train_set = measured = SpeechDataset(
            rows_of(selections),
            rate,
            speed,
            training_args.seed,
            conditions,
            data_args.voice_pairs,
            data_args.max_seconds,
        )
        lengths = [seconds for selection in selections for seconds in selection.seconds]
        if data_args.max_batch_tokens is not None:
            sampler = budget_sampler(selections, train_set, counter, data_args, training_args)
        else:
            sampler = SpeechSampler(
                lengths,
                [len(selection.seconds) for selection in selections],
                mixing_weights(selections, data_args),
                training_args.train_batch_size * training_args.world_size,
                training_args.seed,
                kinds_of(selections, model.config.audio_config.ctc_weight > 0),
                data_args.group_by_length,
                train_set.epoch_lengths if data_args.voice_pairs else None,
            )
        longest = max(lengths)
    if eval_sources:
        chosen, reports["eval"] = select_all(eval_sources, eval_data, processor, data_args, EVALUATION)
        eval_sets = {
            task: SpeechDataset(rows_of([selection for selection in chosen if selection.task == task]), rate)
            for task in data_args.tasks
            if any(selection.task == task for selection in chosen)
        }
        if not streaming:
            trained = set(clips_of(train_set.data))
            setup["eval_clips_trained_on"] = sum(clip in trained for clip in clips_of(rows_of(chosen)))
        eval_set = eval_sets if len(data_args.tasks) > 1 else eval_sets[data_args.tasks[0]]

    audio_config = model.config.audio_config
    if is_new or not has_statistics(model):
        set_statistics(model, processor, measured, data_args.statistics_clips)
        audio_config.max_audio_seconds = max(1.0, float(longest))  # what the config takes
    else:
        audio_config.max_audio_seconds = max(audio_config.max_audio_seconds, float(longest))
    if training_args.ctc_only_steps and audio_config.ctc_weight == 0:
        raise ValueError("--ctc_only_steps needs a CTC head: --audio_config '{\"ctc_weight\": 0.3}'.")
    if audio_config.ctc_weight > 0 and not streaming:
        tell_unspellable(selections, audio_config)
    if model_args.remote_code:
        export_remote_code(model)
        export_remote_code(processor)
    frozen = [] if model_args.freeze_layers is None else frozen_layers(model, model_args)
    if model_args.lora is not None:
        needs_base = is_new or is_changed(model, model_args)
        model = add_lora(model, processor, model_args, training_args, needs_base, adapters)
    if model_args.freeze:
        freeze(model, model_args.freeze)
    if frozen:
        freeze_layers(model, frozen)
    if checkpoint is not None:
        check_frozen(checkpoint, model, model_args)
    logger.info(trainable_table(describe_trainable(model)))
    logger.info("{:,} of {:,} parameters are trained.".format(*count_parameters(model)))

    later = data_args.features_on_device
    reading = {
        "processor": processor,
        "spec_augment": SpecAugment() if data_args.spec_augment else None,
        "features_later": later,
        "spell": audio_config.ctc_weight > 0,
        "voice_warp": VoiceWarp(processor.feature_extractor, data_args.voice_warp) if data_args.voice_warp else None,
    }
    collators = {
        "asr": TranscriptionCollator(**reading),
        "tts": SynthesisCollator(processor, features_later=later),
        "continuation": ContinuationCollator(
            processor, prompt_cut(data_args), data_args.skip_text_probability, features_later=later
        ),
        "qa": QACollator(processor, data_args.skip_text_probability, features_later=later),
    }
    collator = TaskCollator(collators) if len(data_args.tasks) > 1 else collators[data_args.tasks[0]]
    train_collator = None
    if data_args.packing:
        packing = {**collators, "asr": PackedTranscriptionCollator(**reading, config=model.config)}
        train_collator = TaskCollator(packing) if len(data_args.tasks) > 1 else packing["asr"]
    compute_metrics = None  # without generation there are no transcripts to compare
    if eval_sources and training_args.predict_with_generate and "asr" in data_args.tasks:
        compute_metrics = make_compute_metrics(processor, data_args.wer_normalizer)
    trainer = SpeechTrainer(
        model,
        training_args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=compute_metrics,
        train_sampler=sampler,
        ctc_only_steps=training_args.ctc_only_steps,
        train_collator=train_collator,
    )
    length = length_of(training_args, model_args, data_args)
    return Run(trainer, processor, checkpoint, setup, model_args.merge_lora, length, reports, counts)


def transcripts(datasets_: list):
    for data in datasets_:
        rows = data.take(10_000) if hasattr(data, "n_shards") else data
        for row in rows:
            yield row["text"]
            yield from (row.get("answers") or [])[:1]


def train(run: Run) -> None:
    trainer, folder = run.trainer, run.trainer.args.output_dir
    metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
    resources = trainer.meter.result(trainer.args.world_size)
    if trainer.state.global_step == 0:
        sys.exit(
            "train.py: not one step was trained, so nothing is saved: fewer clips than a batch (--dataloader_drop_last), or "
            "a stream without a clip that can be read."
        )
    if trainer.eval_dataset is not None:
        metrics = {**metrics, **trainer.evaluate()}
    if was_over(
        run.checkpoint, trainer.state.max_steps
    ):  # now it is only merged: what training cost and came to is still true
        metrics, resources = with_earlier_figures(metrics, resources, folder)
    parameters, trainable = count_parameters(trainer.model), describe_trainable(trainer.model)
    if run.merge_lora:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    save_whole(trainer, run.processor, folder)
    trainer.save_state()
    if trainer.args.should_save:
        write_summary(run, metrics, parameters, trainable, resources)
        trainer.create_model_card()
        logger.info(f"The trained model is in {folder}.")
        if trainer.args.push_to_hub:
            push(run)


def was_over(checkpoint: str | None, max_steps: int) -> bool:
    """Whether a run had its last step before this start."""
    if checkpoint is None:
        return False
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        return state["global_step"] >= max_steps
    except (OSError, ValueError, KeyError):
        return False


def with_earlier_figures(metrics: dict, resources: dict, folder: str) -> tuple[dict, dict]:
    """The figures of the training whose summary lies in the folder, if one does, in the place of one without a step."""
    try:
        before = json.loads((Path(folder) / SUMMARY).read_text(encoding="utf-8"))
        earlier = {name: value for name, value in before["metrics"].items() if name.startswith("train_")}
        return {**metrics, **earlier}, before["resources"]
    except (OSError, ValueError, KeyError):
        return metrics, resources


def push(run: Run) -> None:
    trainer = run.trainer
    if trainer.push_in_progress is not None:
        trainer.push_in_progress.wait_until_done()
    try:
        push_whole(trainer.args.output_dir, trainer.args)
    except OSError as error:
        sys.exit(f"train.py: {error}\nThe model is trained and saved; the same command, given again, only pushes it.")
    logger.info(f"It is on the Hub as {trainer.hub_model_id}.")


def without_places(setup: dict, reports: dict) -> tuple[dict, dict]:
    """What the run began with and its reports, with the last parts of local paths: the summary goes to the Hub."""
    sources = [*setup["train_data"], *setup["eval_data"]]
    names = {source["place"]: source["place"] for source in sources}
    names |= local_names(source["place"] for source in sources if source["is_local"])
    named = {
        kind: [{**source, "place": names[source["place"]]} for source in setup[kind]]
        for kind in ("train_data", "eval_data")
    }
    began = setup["model_name_or_path"]
    named["model_name_or_path"] = local_name(began) if began and setup["model_is_local"] else began
    for kind in reports:
        keys, shown = (source_keys(one["place"] for one in of[f"{kind}_data"]) for of in (setup, named))
        new = dict(zip(keys, shown, strict=True))
        reports = {**reports, kind: {new[key]: report for key, report in reports[kind].items()}}
    return {**setup, **named}, reports


def write_summary(
    run: Run, metrics: dict, parameters: tuple[int, int], trainable: list[dict], resources: dict
) -> None:
    """What was trained, on what and with which result, beside the model."""
    train_set = run.trainer.train_dataset
    if run.stream_counts is not None:
        skipped = {"unreadable": int(run.stream_counts[0]), "outside of the limits": int(run.stream_counts[1])}
    else:
        skipped = {"unreadable": train_set.num_bad_clips, "names": train_set.bad_clips()[:100]}
    if skipped["unreadable"]:
        logger.warning(
            f"{skipped['unreadable']} clips could not be read while training (in all passes) and were left out."
        )
    setup, reports = without_places(run.setup, run.reports)
    summary = {
        "length": run.length,
        "setup": {**setup, "hyperparameters": extract_hyperparameters_from_trainer(run.trainer)},
        "metrics": metrics,
        "data": reports,
        "skipped_in_training": skipped,
        "parameters": {"trained": parameters[0], "all": parameters[1], "parts": trainable},
        "resources": resources,
        "versions": {
            "mel_llm": mel_llm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({"peft": importlib.metadata.version("peft")} if run.length["lora"] else {}),
        },
    }
    path = Path(run.trainer.args.output_dir) / SUMMARY
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(without_paths(summary), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # said at every start on a machine without a GPU
    try:
        run = prepare(sys.argv[1:])
    except (
        OSError,
        ValueError,
        TypeError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    ) as error:  # what the user can mend; what comes later keeps its traceback
        if os.environ.get("MEL_LLM_DEBUG"):
            raise
        sys.exit(f"train.py: {error}")
    if run is not None:
        train(run)
