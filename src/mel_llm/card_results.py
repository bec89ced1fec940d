"""Results of evaluations, from the JSON files that evaluation scripts and metrics write, for a model card."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult


ASR, TTS, GOES_ON = "automatic-speech-recognition", "text-to-speech", "audio-to-audio"

# What a number is called, how it is written, and what it is multiplied by, in the table and in the metadata
_METRICS = {
    "wer": ("WER, %", "{:.2f}", 100),
    "cer": ("CER, %", "{:.2f}", 100),
    "accuracy": ("accuracy, %", "{:.2f}", 100),
    "similarity": ("speaker similarity", "{:.3f}", 1),
    "mcd": ("MCD, dB", "{:.2f}", 1),
    "mel_l1": ("mel L1", "{:.3f}", 1),
    "duration_ratio": ("duration ratio", "{:.3f}", 1),
    "rtfx": ("times real time", "{:.1f}", 1),
    "guarded": ("ended by a guard, %", "{:.1f}", 100),
    "text_speech_wer": ("WER of speech to its text, %", "{:.2f}", 100),
    "wordless": ("without a word, %", "{:.1f}", 100),
    "text_accuracy": ("answered in text, %", "{:.1f}", 100),
    "speech_accuracy": ("answered in speech, %", "{:.1f}", 100),
    "nll_per_utterance": ("log-perplexity", "{:.1f}", 1),
    "nll_per_token": ("log-perplexity of a token", "{:.2f}", 1),
    "loss": ("loss", "{:.4f}", 1),
}
_RATES = ("wer", "cer", "guarded")
# How good it is, in the metadata; the others depend on the machine or say nothing by themselves
_PUBLISHED = (
    "wer",
    "cer",
    "accuracy",
    "similarity",
    "mcd",
    "mel_l1",
    "text_speech_wer",
    "text_accuracy",
    "speech_accuracy",
)
# Of a training run: how long something took is no result of the model
_NO_RESULT = re.compile(r"(runtime|_per_second|epoch|model_preparation_time|mem_|jit_compilation)")
_LOCAL_PATH = re.compile(r"(?<![\w.:/~\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s,'\"=:/\\]+[/\\])*([^\s,'\"=:/\\]+)")
# What a command should not have held: the Hub's tokens, and the values of options that are named after one
_SECRET = re.compile(
    r"\bhf_\w{8,}|(--?(?:\w+[-_])*(?:token|api[-_]?key|password|secret)(?:\s+|=))[^\s-]\S*", re.IGNORECASE
)
# Texts, or spoken questions: a file has no splits
_FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv")
# An error rate above this is a percentage, or of another thing
_MOST_ERRORS = 3.0


@dataclass
class Score:
    """One number, as it was measured (error rates as ratios); `low` and `high` bound its interval."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def heading(self) -> str:
        if self.metric.startswith("mos_"):
            return f"MOS {self.metric.removeprefix('mos_')}"
        return _METRICS.get(self.metric, (self.metric.replace("_", " "),))[0]

    @property
    def text(self) -> str:
        _, pattern, scale = _METRICS.get(self.metric, ("", "{:.4g}" if abs(self.value) < 1 else "{:.2f}", 1))
        text = pattern.format(scale * self.value)
        if self.low is None or self.high is None:
            return text
        return f"{text} ({pattern.format(scale * self.low)} to {pattern.format(scale * self.high)})"

    @property
    def published(self) -> float:
        return round(_METRICS.get(self.metric, ("", "", 1))[2] * self.value, 4)


@dataclass
class Evaluation:
    """What was measured on one set of data: rows of (system, scores), and where the numbers come from."""

    task: str  # as the Hub calls it
    dataset: str
    rows: list[tuple[str, str, list[Score]]]  # name, number of utterances as text, scores
    config: str | None = None
    split: str | None = None
    is_local: bool = True
    place: str | None = None  # of the data, in full: what is on no card, but tells two folders of one name apart
    own: int | None = 0  # the row of the card's model
    command: str | None = None
    notes: list[str] = field(default_factory=list)
    # Numbers on what the model was trained on are shown, but not published as results
    is_published: bool = True
    heading: str | None = None  # of its table, before what it was measured on; by default as the task is

    def __post_init__(self):
        if self.heading is None:
            self.heading = {TTS: "Speech", GOES_ON: "Continuations"}.get(self.task, "Transcripts")

    @property
    def title(self) -> str:
        parts = [self.dataset, *(f"{name} {value}" for name, value in (("config", self.config),) if value)]
        return ", ".join([*parts, *([f"split {self.split}"] if self.split else [])])

    def eval_results(self) -> list[EvalResult]:
        """The numbers of the card's model, for the metadata's `model-index`."""
        if self.own is None or not self.is_published:
            return []
        return [
            EvalResult(
                task_type=self.task,
                # The Hub and its library hold results of one type, config and split to be of one set of data
                dataset_type=self.dataset,
                dataset_name=self.title,
                dataset_config=self.config,
                dataset_split=self.split,
                metric_type=score.metric,
                metric_name=score.heading,
                metric_value=score.published,
            )
            for score in self.rows[self.own][2]
            if score.metric in _PUBLISHED or score.metric.startswith("mos")
        ]


def local_name(place: str) -> str:
    """A path without the folders that are nobody else's business."""
    return os.path.basename(os.path.normpath(place.replace("\\", "/"))) or place


def local_names(places: Iterable[str]) -> dict[str, str]:
    """The last part of each path; where several end alike, the later ones get a number: `speech`, `speech-2`."""
    names: dict[str, str] = {}
    for place in places:
        if place not in names:
            name = wanted = local_name(place)
            number = 1
            while name in names.values():
                number += 1
                name = f"{wanted}-{number}"
            names[place] = name
    return names


def source_keys(places: Iterable[str]) -> list[str]:
    """What the reports of data sources are kept under: their places; of one that is named again, as for another
    configuration or split of it, with a number: `org/speech`, `org/speech (2)`."""
    counts: dict[str, int] = {}
    keys = []
    for place in places:
        counts[place] = counts.get(place, 0) + 1
        keys.append(place if counts[place] == 1 else f"{place} ({counts[place]})")
    return keys


def without_local_paths(text: str) -> str:
    """A command line without the folders of its machine, and without keys: `/home/me/speech,split=test` is
    `speech,split=test`, and `--hub_token hf_abc` is `--hub_token ...`."""
    return _LOCAL_PATH.sub(lambda match: match.group(1), _SECRET.sub(lambda match: f"{match.group(1) or ''}...", text))


def is_hub_id(name: str | None) -> bool:
    """Whether it is written as the name of a repository of the Hub, `ORG/NAME`, and is no folder here."""
    return bool(name) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]*[\w-]", name) is not None and not os.path.exists(name)


def read_evaluations(source, model_name: str) -> list[Evaluation]:
    r"""The evaluations of one source.

    Args:
        source (`str`, `os.PathLike` or `dict`): A JSON file, its content, or a dict with `file` and what the file does
            not say: `dataset`, `config`, `split`, `task`, `command`, `notes`. Three forms are known: what
            `scripts/evaluate_tts.py` writes; `{"metrics": {"wer": 0.1, ...}, "dataset": ..., "command": ...}`; and the
            bare numbers of a metric's `compute()` or of the Trainer's `evaluate()`.
        model_name (`str`): Tells which of several systems is the card's model.

    Raises:
        ValueError: It is no JSON, has no numbers, has a rate that is none, or does not say on what they were measured.
        OSError: The file cannot be read.
    """
    given = dict(source) if isinstance(source, dict) else {"file": source}
    label = "an entry of `evaluations`"
    if "file" in given:
        path = Path(given.pop("file"))
        label = str(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
        given = {**content, **given}
    arguments = given.get("arguments") or {}
    if isinstance(given.get("systems"), list):
        return [_systems_evaluation(given, label, model_name, _Measured(TTS, arguments.get("data")))]
    if isinstance(given.get("tasks"), dict):
        told = {
            "continuation": _Measured(GOES_ON, arguments.get("data")),
            "qa": _Measured(GOES_ON, arguments.get("qa"), split="test", heading="Answers"),
        }
        found = [task for task in told if given["tasks"].get(task)]
        if not found:
            raise ValueError(f"{label} has no numbers: `tasks` has neither continuations nor answers.")
        if len(found) > 1 and (several := [key for key in ("dataset", "config", "split") if key in given]):
            raise ValueError(f"{label} has continuations and answers, which cannot be told one `{several[0]}`.")
        return [
            _systems_evaluation({**given, "systems": given["tasks"][task]}, label, model_name, told[task])
            for task in found
        ]
    numbers = given.get("metrics")
    if numbers is None:
        numbers = {key.removeprefix("eval_"): value for key, value in given.items()}
    scores = scores_of(numbers)
    if not scores:
        raise ValueError(f"{label} has no numbers: expected error rates, such as `wer`, by name.")
    for score in scores:
        if score.metric in _RATES and not 0 <= score.value <= _MOST_ERRORS:
            raise ValueError(
                f"{label}: `{score.metric}` is {score.value:g}; a rate is a ratio, 0.125 for 12.5 %, and not above "
                f"{_MOST_ERRORS:g}."
            )
    dataset = given.get("dataset")
    if isinstance(dataset, dict):
        given = {**dataset, **given}
        dataset = dataset.get("name")
    if not isinstance(dataset, str) or not dataset:
        raise ValueError(
            f'{label} does not say what it was measured on: pass {{"file": ..., "dataset": NAME, "split": ...}}.'
        )
    hub_id = is_hub_id(dataset)
    evaluation = Evaluation(
        task=given.get("task") or ASR,
        dataset=dataset if hub_id else local_name(dataset),
        rows=[("this model", str(given.get("num_utterances") or ""), scores)],
        config=given.get("config"),
        split=given.get("split"),
        is_local=not hub_id,
        place=dataset,
        command=given.get("command") or (given.get("environment") or {}).get("command"),
        notes=[*_environment(given.get("environment")), *_as_list(given.get("notes"))],
    )
    return [evaluation]


def scores_of(numbers: dict) -> list[Score]:
    """The numbers among the values, but for times and counts; error rates first."""
    scores = [
        Score(name, float(value))
        for name, value in numbers.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and not _NO_RESULT.search(name)
        and not name.startswith("num_")
        and name not in ("substitutions", "deletions", "insertions", "reference_words", "reference_characters")
    ]
    order = list(_METRICS)
    return sorted(scores, key=lambda score: order.index(score.metric) if score.metric in order else len(order))


@dataclass
class _Measured:
    """What a script measures: the Hub's name of the task, the data that it was given and their default split, and the heading
    where it is not the task's."""

    task: str
    data: str | None
    split: str = "validation"
    heading: str | None = None


def _systems_evaluation(given: dict, label: str, model_name: str, measured: _Measured) -> Evaluation:
    """Of several systems, with bounds and judges."""
    systems = given["systems"]
    kinds = [(system.get("settings") or {}).get("kind", "model") for system in systems]
    own = [index for index, kind in enumerate(kinds) if kind in ("model", "continuation")]
    if len(own) > 1:
        own = [index for index in own if local_name(str(systems[index].get("name"))) == local_name(model_name)]
    if len(own) != 1:
        names = ", ".join(str(system.get("name")) for system in systems)
        raise ValueError(f"{label} does not tell which of its systems is {model_name}: {names}.")
    place, *options = str(given.get("dataset") or measured.data or "").split(",")
    if not place:
        raise ValueError(f"{label} does not say what it was measured on: its `arguments` have no data.")
    options = dict(option.split("=", 1) for option in options if "=" in option)
    hub_id = is_hub_id(place)
    rows = []
    for index, system in enumerate(systems):
        scores = [
            Score(name, total["value"], total.get("low"), total.get("high"))
            for name, total in (system.get("totals") or {}).items()
            if total.get("value") is not None
        ]
        if index == own[0] and not scores:
            raise ValueError(f"{label} has no numbers for {system.get('name')}.")
        count = str(system.get("num_utterances", ""))
        if system.get("failed"):
            count += f", {len(system['failed'])} failed"
        name = "this model" if index == own[0] else without_local_paths(str(system.get("name")))
        rows.append((name, count, scores))
    environment = given.get("environment")
    judges = [f"{name}: {without_local_paths(str(text))}" for name, text in (given.get("judges") or {}).items()]
    intervals = [f"In brackets: {given['intervals']}."] if given.get("intervals") else []
    return Evaluation(
        task=measured.task,
        dataset=place if hub_id else local_name(place),
        rows=rows,
        config=given.get("config") or options.get("config"),
        split=given.get("split") or options.get("split") or (None if place.endswith(_FILES) else measured.split),
        is_local=not hub_id,
        place=place,
        own=own[0],
        command=given.get("command") or (environment or {}).get("command"),
        notes=[*_environment(environment), *judges, *intervals, *_as_list(given.get("notes"))],
        heading=measured.heading,
    )


def _environment(environment: dict | None) -> list[str]:
    """Date and hardware in a line."""
    if not environment:
        return []
    threads = environment.get("threads")
    versions = environment.get("versions") or {}
    parts = [
        environment.get("date"),
        environment.get("gpu") or environment.get("cpu"),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else None,
        *(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions),
    ]
    return [", ".join(str(part) for part in parts if part)]


def _as_list(value) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def results_table(evaluation: Evaluation) -> str:
    """A Markdown table: a line for each system, a column for each number that one of them has."""
    names = list(dict.fromkeys(score.metric for _, _, scores in evaluation.rows for score in scores))
    headings = {score.metric: score.heading for _, _, scores in evaluation.rows for score in scores}
    counted = any(count for _, count, _ in evaluation.rows)
    lines = [["", *(["utterances"] if counted else []), *(headings[name] for name in names)]]
    lines.append(["---"] * len(lines[0]))
    for name, count, scores in evaluation.rows:
        by_name = {score.metric: score.text for score in scores}
        lines.append([cell(name), *([count] if counted else []), *(by_name.get(key, "–") for key in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value) -> str:
    """A text inside a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def table(headings: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


__all__ = [
    "ASR",
    "GOES_ON",
    "TTS",
    "Evaluation",
    "Score",
    "cell",
    "is_hub_id",
    "local_name",
    "local_names",
    "read_evaluations",
    "results_table",
    "scores_of",
    "table",
    "without_local_paths",
]
