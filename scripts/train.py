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
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import (
    set_seed,
)
from transformers.modelcard import extract_hyperparameters_from_trainer

import mel_llm
from mel_llm import (
    MelLLMForTextToSpeech,
    export_remote_code,
)
from mel_llm.card_results import local_name, local_names, source_keys
from mel_llm.evaluation import make_compute_metrics
from mel_llm.evaluation.clip_systems import short_name
from mel_llm.publishing import without_paths
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import (
    LORA_PRESETS,
    ContinuationCollator,
    PackedTranscriptionCollator,
    QACollator,
    RecordingConditions,
    SpeechDataset,
    SpeechSampler,
    SpeechStream,
    SpeechTeacher,
    SpeechTrainer,
    SpeedPerturbation,
    SynthesisCollator,
    TaskCollator,
    TokenCounter,
    TranscriptionCollator,
    VoiceWarp,
    add_alignment_head,
    check_alignment,
    check_packing,
    compile_layers,
    count_parameters,
    describe_trainable,
    freeze,
    freeze_layers,
    last_checkpoint,
    push_whole,
    remove_alignment_head,
    resume_stream,
    save_whole,
    trainable_table,
)
from mel_llm.training.arguments import DataArguments, ModelArguments, SpeechTrainingArguments
from mel_llm.training.command_line import parse_arguments, prompt_cut, spec_augment
from mel_llm.training.run_data import (
    EVALUATION,
    asks,
    budget_sampler,
    check_questions,
    clips_of,
    kinds_of,
    load_sources,
    mix_streams,
    mixing_weights,
    rows_of,
    select_all,
    set_workers,
    tasks_of,
    tell_unspellable,
)
from mel_llm.training.run_model import (
    NEW_MODELS_ONLY,
    NEW_SPEECH_HEADS_ONLY,
    add_lora,
    find_adapters,
    frozen_layers,
    has_statistics,
    is_changed,
    load_or_build,
    set_statistics,
    set_vocoder,
)
from mel_llm.whole_files import write_whole


logger = logging.getLogger("train")

SUMMARY = "training_summary.json"
AUGMENTATIONS = ("speed_factors", "spec_augment", "spec_augment_config", "conditions", "voice_warp", "voice_pairs")


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
        "vocoder": short_name(vocoder) if vocoder else vocoder,
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
        **({"teacher": describe_teacher(data_args)} if data_args.teacher else {}),
        **({"prompts": str(prompt_cut(data_args))} if "continuation" in data_args.tasks else {}),
    }


def describe_teacher(data_args: DataArguments) -> dict:
    return {
        "teacher": short_name(data_args.teacher),
        "teacher_weight": data_args.teacher_weight,
        "teacher_layer": data_args.teacher_layer,
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
    if streaming and data_args.teacher:
        raise ValueError("--teacher needs data that does not stream: the same clips again, whose states are kept.")
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
    teacher = None
    if data_args.teacher is not None:
        teacher = SpeechTeacher(
            data_args.teacher, data_args.teacher_cache, torch.bfloat16 if training_args.bf16 else torch.float32
        )
        if teacher.sampling_rate != rate:
            raise ValueError(
                f"--teacher: {data_args.teacher} hears {teacher.sampling_rate} Hz, and the model {rate} Hz."
            )
        if data_args.max_seconds > teacher.max_seconds:
            raise ValueError(
                f"--teacher: {data_args.teacher} hears clips of up to {teacher.max_seconds:g} s. Leave longer ones out: --max_seconds "
                f"{teacher.max_seconds:g}."
            )
        token_rate = model.config.audio_config.frame_rate / model.config.audio_config.reduction_factor
        teacher_rate = max(1, round(teacher.rate / token_rate))
        size, layer = teacher_rate * teacher.size, data_args.teacher_layer
        add_alignment_head(model, size, data_args.teacher_weight, layer, teacher.fingerprint)
    if checkpoint is not None and model_args.lora is None:
        check_alignment(checkpoint, model.alignment_head)
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
            teacher,
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
                kinds_of(selections, model.config.audio_config.ctc_weight > 0 or teacher is not None),
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
    speech_config = model.config.speech_config
    has_speller = speech_config is not None and speech_config.ctc_weight > 0
    spells_speech = has_speller and "tts" in data_args.tasks
    if has_speller and not spells_speech and model_args.speech_config != ModelArguments.speech_config:
        raise ValueError("--speech_config: `ctc_weight` is for speaking texts, --tasks tts.")
    if not streaming:
        tell_unspellable(selections, model.config, data_args.speed_factors)
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

    if training_args.compile_layers:
        compile_layers(model)

    later = data_args.features_on_device
    reading = {
        "processor": processor,
        "spec_augment": spec_augment(data_args),
        "features_later": later,
        "spell": audio_config.ctc_weight > 0,
        "voice_warp": VoiceWarp(processor.feature_extractor, data_args.voice_warp) if data_args.voice_warp else None,
        "teacher_rate": None if teacher is None else teacher_rate,
    }
    collators = {
        "asr": TranscriptionCollator(**reading),
        "tts": SynthesisCollator(processor, features_later=later, spell=spells_speech),
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
        text_dropout=training_args.text_dropout,
        history_sampling=training_args.history_sampling,
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
    remove_alignment_head(trainer.model)
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
    write_whole(Path(run.trainer.args.output_dir) / SUMMARY, json.dumps(without_paths(summary), indent=2) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # said at every start on a machine without a GPU
    with told_in_a_line("train.py"):  # what comes later keeps its traceback
        run = prepare(sys.argv[1:])
    if run is not None:
        train(run)
        accelerator = run.trainer.accelerator
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if not accelerator.is_main_process:
            # With nothing left to do. Taking the interpreter down aborts such a process now and then ("terminate called
            # without an active exception", from a thread of gloo), and the launcher takes that for a failed training.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
