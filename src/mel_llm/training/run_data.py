"""The clips that a run of `scripts/train.py` learns from: which of them, for which task, and in which order."""

import logging
from dataclasses import dataclass

import numpy as np

from ..card_results import source_keys
from ..configuration_mel_llm import MelLLMConfig
from ..evaluation.normalizers import get_text_normalizer
from .arguments import DataArguments, SpeechTrainingArguments
from .command_line import prompt_cut
from .continuation import select_answered, select_continuations
from .ctc import count_unspellable
from .dataset import SpeechDataset
from .report import select_clips
from .sources import SpeechSource, load_source
from .streaming import SpeechStream
from .token_budget import TokenBudgetSampler, TokenCounter


# What a run tells comes from the script, whichever module says it
logger = logging.getLogger("train")

EVALUATION = "Evaluation"


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


def tell_unspellable(selections: list[Selection], config: MelLLMConfig, speed_factors: list[float]) -> None:
    """Warns of clips that the CTC head of their task has no room to spell; of those to be read, when they are played at the
    fastest of the speeds."""
    audio, speech = config.audio_config, config.speech_config
    rates, fastest = {}, {"asr": max([1.0, *speed_factors]), "tts": 1.0}
    if audio.ctc_weight > 0:
        rates["asr"] = audio.frame_rate / audio.reduction_factor * audio.ctc_rate
    if speech is not None and speech.ctc_weight > 0:
        rates["tts"] = audio.frame_rate / config.speech_reduction_factor * speech.ctc_rate
    for selection in selections:
        task = selection.task
        if task not in rates:
            continue
        places = [int(seconds / fastest[task] * rates[task]) for seconds in selection.seconds]
        count = count_unspellable(selection.rows["text"], places)
        if count:
            at_speed = f" at speed {fastest[task]:g}" if fastest[task] > 1 else ""
            logger.warning(
                f"CTC learns nothing from {count} of {len(places)} clips of {selection.source.place}{at_speed}: they have more "
                f"letters than the {rates[task]:g} places a second that the head has. Raise `ctc_rate` in "
                f"--{'audio' if task == 'asr' else 'speech'}_config."
            )


def kinds_of(selections: list[Selection], spells: bool) -> list[str]:
    """What the clips of a batch have in common: the task; with a CTC head or a teacher (`spells`), from which batches with questions
    learn nothing, also whether there are any."""
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
        kinds_of(selections, counter.audio_config.ctc_weight > 0 or data_args.teacher is not None),
        counter.packed,
        training_args.world_size,
        training_args.process_index,
        (lambda epoch: data.partners(seconds, epoch)) if data_args.voice_pairs else None,
    )


__all__ = [
    "EVALUATION",
    "Selection",
    "asks",
    "budget_sampler",
    "check_questions",
    "clips_of",
    "kinds_of",
    "load_sources",
    "mix_streams",
    "mixing_weights",
    "rows_of",
    "select_all",
    "set_workers",
    "tasks_of",
    "tell_unspellable",
]
