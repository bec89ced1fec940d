"""Where speech with transcripts comes from: local folders, manifests, datasets of the Hub.

Everything becomes a dataset of `datasets` with the columns `audio` (path and/or bytes, never decoded here), `text`,
`duration` (seconds, or None where nobody wrote it down), `offset` (seconds into the file, where the clip is a part of one;
else None), `speaker` (or None where nobody says), `instruction` (what is asked about the clip; None where its transcript
is wanted) and `origin`, the name that messages give the clip. Spoken questions have two more: `answers` (texts, of which the
first is the one to learn) and `answer_audio`, as `audio`, or None. Local files are listed by this module because
`load_dataset("audiofolder")` needs torchcodec even to list them.
"""

import csv
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..audio_utils_mel_llm import AUDIO_EXTENSIONS


logger = logging.get_logger(__name__)

# Reading speech, writing it, and SPECTRON's: going on with it, and answering it
TASKS = ("asr", "tts", "continuation", "qa")
# What is learnt there is how voices and rooms sound, which must be left as it is
SPEAKING_TASKS = ("tts", "continuation", "qa")
AUDIO_COLUMNS = ("audio", "audio_filepath", "file_name", "path", "file", "wav", "question_audio")
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text", "raw_transcription")
ANSWER_COLUMNS = ("answer", "answers", "answer_text")
ANSWER_AUDIO_COLUMNS = ("answer_audio", "answer_audio_filepath", "answer_file_name")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id", "voice")
# What is asked about a clip; its answer then is in the place of the transcript
INSTRUCTION_COLUMNS = ("instruction", "question")
REPLY_COLUMNS = (*ANSWER_COLUMNS, "label")
COLUMNS = ("audio", "text", "duration", "offset", "speaker", "instruction", "origin")

_METADATA_FILES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
_MANIFESTS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


@dataclass
class SpeechSource:
    r"""One source of training or evaluation data, as `scripts/train.py` takes it.

    On the command line a source is written `PLACE[,key=value]...`, the keys being the fields below:
    `recordings`, `recordings,weight=2`, `openslr/librispeech_asr,config=clean,split=train.100,streaming=true`.

    Args:
        place (`str`): A folder, a manifest (csv, tsv, jsonl, parquet) or the name of a dataset of the Hub. A folder holds
            `metadata.csv` (or `.tsv`, `.jsonl`) with the columns `file_name` and `text`, at its top or in one folder
            for each split, as `audiofolder` datasets do; or pairs `NAME.wav`, `NAME.txt`; or a dataset written by
            `save_to_disk`.
        split (`str`, *optional*): Which part of it; by default what the caller asks for.
        config (`str`, *optional*): Configuration of a dataset of the Hub.
        weight (`float`, *optional*): Share of the examples that come from here, relative to the other sources.
        streaming (`bool`, defaults to `False`): Read a dataset of the Hub while it is downloaded.
        audio_column, text_column, speaker_column (`str`, *optional*): Found by their usual names when not given.
        instruction_column (`str`, *optional*): What is asked in writing about each clip; `text_column` then holds the
            answers. Found by itself in data with a column `instruction` or `question`, one of answers, and none of
            transcripts, unless the clips are spoken questions.
        instruction (`str`, *optional*): The same for all clips. Without either, the transcript is wanted.
        answer_column, answer_audio_column (`str`, *optional*): For clips that are spoken questions, whose own columns are
            those for audio and text; found by their usual names too, `answer` and `answer_audio`. Data whose only text is
            a column `question` holds spoken questions if one of these is named, it has recordings of answers or
            `question_audio`, or `task=qa`.
        exclude (`str`, *optional*): `COLUMN:PATTERN`; rows whose column matches the shell pattern are left out.
        revision (`str`, *optional*): Revision of a dataset of the Hub.
        task (`str`, *optional*): The one task that it is for, `asr`, `tts`, `continuation` or `qa`. By default every
            task of the run that it can serve: `qa` where there are answers, and where not, or where `qa` is not learnt,
            all others.
        fraction (`float`, *optional*), hours (`float`, *optional*): Only this share of its usable clips, or clips of about
            so many hours. Which ones is decided by their names and texts, so a smaller part lies within a larger one, on
            any machine and for any seed.

    Raises:
        ValueError: A field has a value that it cannot have.
    """

    place: str
    split: str | None = None
    config: str | None = None
    weight: float | None = None
    streaming: bool = False
    audio_column: str | None = None
    text_column: str | None = None
    speaker_column: str | None = None
    instruction_column: str | None = None
    instruction: str | None = None
    answer_column: str | None = None
    answer_audio_column: str | None = None
    exclude: str | None = None
    revision: str | None = None
    task: str | None = None
    fraction: float | None = None
    hours: float | None = None

    def __post_init__(self):
        if not self.place:
            raise ValueError("A data source needs a folder, a manifest or the name of a dataset.")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.place}: `weight` must be more than 0, got {self.weight}.")
        if self.task not in (None, *TASKS):
            raise ValueError(f"{self.place}: `task` must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if self.instruction is not None and self.instruction_column is not None:
            raise ValueError(f"{self.place}: give `instruction` or `instruction_column`, not both.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"{self.place}: `fraction` must be more than 0 and at most 1, got {self.fraction}.")
        if self.hours is not None and not 0 < self.hours < float("inf"):
            raise ValueError(f"{self.place}: `hours` must be more than 0, got {self.hours}.")
        if self.fraction is not None and self.hours is not None:
            raise ValueError(f"{self.place}: give a `fraction` or `hours`, not both.")
        if self.streaming and (self.fraction is not None or self.hours is not None):
            raise ValueError(f"{self.place}: a stream has no `fraction` and no `hours`; it ends with --max_steps.")
        if self.exclude is not None and ":" not in self.exclude:
            raise ValueError(f"{self.place}: `exclude` must be COLUMN:PATTERN, got {self.exclude!r}.")

    @classmethod
    def parse(cls, text: str) -> "SpeechSource":
        """Reads `PLACE[,key=value]...`."""
        place, *options = text.split(",")
        known = {field.name for field in fields(cls)} - {"place"}
        values: dict[str, Any] = {}
        for option in options:
            key, separator, value = option.partition("=")
            if not separator or key not in known:
                raise ValueError(
                    f"Data source {text!r}: {option!r} is not understood. Write PLACE,key=value,... with the keys "
                    f"{', '.join(sorted(known))}; a place cannot have a comma in its name."
                )
            values[key] = value
        for key in {"weight", "fraction", "hours"} & values.keys():
            try:
                values[key] = float(values[key])
            except ValueError:
                raise ValueError(f"Data source {text!r}: `{key}` must be a number.") from None
        if "streaming" in values:
            choices = {"true": True, "1": True, "false": False, "0": False}
            if values["streaming"].lower() not in choices:
                raise ValueError(f"Data source {text!r}: `streaming` must be true or false.")
            values["streaming"] = choices[values["streaming"].lower()]
        return cls(place, **values)


def load_source(
    source: SpeechSource,
    split: str = "train",
    text_normalizer: Callable[[str], str] | None = None,
    needs_text: bool = True,
    text_columns: Sequence[str] | None = None,
    keep: Sequence[str] = (),
):
    """The dataset of one source.

    Args:
        source: Where it is.
        split (`str`, defaults to `"train"`): Used when the source names none.
        text_normalizer: Applied to each transcript.
        needs_text (`bool`, defaults to `True`): Whether there must be transcripts. Without, missing ones are empty, and
            audio files in a folder need no `.txt` beside them.
        text_columns: Usual names of the column with the texts, if they are no transcripts.
        keep: Columns that stay as they are, where there are any of these names.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` for a source that streams, with the columns of this module.

    Raises:
        FileNotFoundError: A path, a split or its metadata is not there.
        ValueError: A column is missing, or a row of the metadata cannot be read.
    """
    split = source.split or split
    if os.path.exists(source.place) or source.place.startswith((".", "~", os.sep)):
        path = Path(source.place).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"There is no folder or manifest {str(path)!r}.")
        dataset = _load_local(source, path, split, needs_text)
    else:
        dataset = _load_from_hub(source, split)
    return _standardise(dataset, source, text_normalizer, needs_text, text_columns, keep)


# --- local ----------------------------------------------------------------------------------------------------------


def _load_local(source: SpeechSource, path: Path, split: str, needs_text: bool):
    from datasets import Dataset, load_from_disk

    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = load_from_disk(str(path))
        if not hasattr(saved, "column_names") or isinstance(saved.column_names, dict):
            _check_split(source, split, list(saved))
            saved = saved[split]
        return saved
    parquet = [path] if path.suffix == ".parquet" else _parquet_files(path, split)
    if parquet:
        from datasets import load_dataset

        files = {split: [str(file) for file in parquet]}
        return load_dataset("parquet", data_files=files, split=split, streaming=source.streaming)
    rows = list(_local_rows(path, split, needs_text, source))
    if not rows:
        raise ValueError(f"{path}: no clips{' with transcripts' if needs_text else ''} found.")
    columns = {key: None for row in rows for key in row}  # in their order
    dataset = Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    return dataset.to_iterable_dataset(num_shards=min(64, len(rows))) if source.streaming else dataset


def _parquet_files(path: Path, split: str) -> list[Path]:
    """Those of a folder in the form of the Hub's datasets, without metadata of another kind."""
    if not path.is_dir() or any(path.rglob("metadata.*")):
        return []
    names = _SPLIT_NAMES.get(split, (split,))
    files = sorted(path.rglob("*.parquet"))
    of_split = [file for file in files if file.name.startswith(names) or file.parent.name in names]
    if files and not of_split and split != "train":
        raise FileNotFoundError(f"{path} has no parquet files of the split {split!r}.")
    return of_split or files


def _local_rows(path: Path, split: str, needs_text: bool, source: SpeechSource) -> Iterator[dict[str, Any]]:
    """Rows of strings, the audio column being an absolute path."""
    path = Path(os.path.abspath(path))
    if path.is_file():
        if path.suffix not in _MANIFESTS:
            raise ValueError(f"{path} is no manifest: it must end in {', '.join(_MANIFESTS)}.")
        yield from _read_metadata(path, source)
        return
    folder = _split_folder(path, split)
    metadata = [folder / name for name in _METADATA_FILES if (folder / name).is_file()]
    if metadata:
        yield from _read_metadata(metadata[0], source)
        return
    for file in sorted(folder.rglob("*")):
        transcript = file.with_suffix(".txt")
        if file.suffix.lower() not in AUDIO_EXTENSIONS:
            continue
        if transcript.is_file():
            yield {"audio": str(file), "text": transcript.read_text(encoding="utf-8").strip()}
        elif not needs_text:
            yield {"audio": str(file), "text": ""}


def _split_folder(path: Path, split: str) -> Path:
    for name in _SPLIT_NAMES.get(split, (split,)):
        if (path / name).is_dir():
            return path / name
    if any((path / name).is_dir() for names in _SPLIT_NAMES.values() for name in names):
        there = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise FileNotFoundError(f"{path} has no split {split!r}; it has the folders {', '.join(there)}.")
    if split != "train":
        raise FileNotFoundError(f"{path} is not divided into splits, so it has no {split!r}; it counts as 'train'.")
    return path


def _as_string(cell: Any) -> str | None:
    """A list as JSON, which `read_answers` reads again."""
    return None if cell is None else json.dumps(cell) if isinstance(cell, list) else str(cell)


def _read_metadata(path: Path, source: SpeechSource) -> Iterator[dict[str, Any]]:
    """Rows of strings. Read as text: a reader that guesses types makes a number of the transcript "42" and nothing of
    "NA". Files are named relative to the table."""
    audio = source.audio_column
    answer_audio = ANSWER_AUDIO_COLUMNS if source.answer_audio_column is None else (source.answer_audio_column,)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(read_rows(file, path), start=1):
                if audio is None:  # the first row decides for all
                    audio = next((name for name in AUDIO_COLUMNS if row.get(name)), None)
                value = None if audio is None else row.get(audio)
                if isinstance(value, dict):
                    value = value.get("path")
                if not value:
                    columns = ", ".join(AUDIO_COLUMNS) if audio is None else audio
                    raise ValueError(
                        f"{path}, row {number}: no file is named in {columns}. The row has {', '.join(map(str, row))}."
                    )
                strings = {key: _as_string(cell) for key, cell in row.items()}
                spoken = {key: str(path.parent / str(row[key])) for key in answer_audio if row.get(key)}
                yield {**strings, **spoken, audio: str(path.parent / str(value))}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not written in UTF-8: {error}") from None


def read_rows(file, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a csv, tsv, json or jsonl file that is open, as they are written; messages name its `path`.

    Raises:
        ValueError: A row is not what its file is called.
    """
    if path.suffix in (".csv", ".tsv"):
        # Tab-separated files have no quoting: a quotation mark there belongs to the transcript
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        reader = csv.DictReader(file, **dialect)
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more cells than columns ({row[None]}). In a csv file, quote texts "
                    "with commas in them."
                )
            yield row
        return
    text = file.read() if path.suffix == ".json" else ""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must hold a list of JSON objects.")
        yield from rows
    else:
        yield from _json_lines(text.splitlines() if text else file, path)


def _json_lines(file, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON (one object a line): {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}.")
        yield row


# --- the Hub --------------------------------------------------------------------------------------------------------


def _load_from_hub(source: SpeechSource, split: str):
    from datasets import load_dataset

    return load_dataset(source.place, source.config, split=split, streaming=source.streaming, revision=source.revision)


def _check_split(source: SpeechSource, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise FileNotFoundError(f"{source.place} has no split {split!r}; it has {', '.join(splits)}.")


# --- the same columns for all ---------------------------------------------------------------------------------------


def _standardise(
    dataset,
    source: SpeechSource,
    text_normalizer: Callable[[str], str] | None,
    needs_text: bool,
    text_columns: Sequence[str] | None = None,
    keep: Sequence[str] = (),
):
    from datasets import Audio, ClassLabel, Features, List, Value

    names = dataset.column_names
    if names is None:  # a stream whose features nobody declared
        names = list(next(iter(dataset)))
    audio = _find_column(source, names, "audio_column", AUDIO_COLUMNS)
    is_spoken = _is_spoken_question(source, names)
    instruction = source.instruction_column
    if instruction is not None:
        _find_column(source, names, "instruction_column", ())
    elif source.instruction is None and not is_spoken:
        # Data with transcripts beside its questions is read for them, unless answers are asked for or columns named
        has_answers = source.text_column is None and set(TEXT_COLUMNS).isdisjoint(names)
        has_answers = has_answers and not set(REPLY_COLUMNS).isdisjoint(names)
        if has_answers or text_columns is not None:
            instruction = next((name for name in INSTRUCTION_COLUMNS if name in names), None)
    is_asked = instruction is not None or source.instruction is not None
    if text_columns is None:
        text_columns = REPLY_COLUMNS if is_asked else (*TEXT_COLUMNS, "question")
    has_text = needs_text or source.text_column is not None or not set(text_columns).isdisjoint(names)
    text = _find_column(source, names, "text_column", tuple(text_columns)) if has_text else None
    answer, answer_audio = (None, None) if is_asked else _answer_columns(source, names)
    has_speaker = source.speaker_column is not None or not set(SPEAKER_COLUMNS).isdisjoint(names)
    speaker = _find_column(source, names, "speaker_column", SPEAKER_COLUMNS) if has_speaker else None
    for name in (audio, answer_audio):
        if name is not None and isinstance((dataset.features or {}).get(name), Audio):
            dataset = dataset.cast_column(name, Audio(decode=False))
    if source.exclude is not None:
        column, pattern = source.exclude.split(":", 1)
        if column not in names:
            raise ValueError(f"{source.place}: `exclude` names no column {column!r}; there are {', '.join(names)}.")
        kept = dataset.filter(_NotMatching(pattern), input_columns=[column])
        if not source.streaming and len(kept) == len(dataset):
            logger.warning(f"{source.place}: `exclude={source.exclude}` matches no row.")
        dataset = kept

    file = {"bytes": Value("binary"), "path": Value("string")}
    answers = {} if answer is None else {"answers": List(Value("string")), "answer_audio": file}
    features = Features(
        {
            "audio": file,
            "text": Value("string"),
            "duration": Value("float64"),
            "offset": Value("float64"),
            "speaker": Value("string"),
            "instruction": Value("string"),
            "origin": Value("string"),
            **answers,
        }
    )
    declared = dataset.features or {}
    kept = tuple(name for name in keep if name in names and name not in features)
    features.update({name: declared[name] for name in kept if name in declared})
    label = declared.get(text)
    row_to_columns = _ToColumns(
        source.place,
        audio,
        text,
        speaker,
        text_normalizer,
        instruction,
        source.instruction,
        tuple(label.names) if isinstance(label, ClassLabel) else (),
        kept,
        answer,
        answer_audio,
    )
    kwargs: dict[str, Any] = {"with_indices": True, "remove_columns": list(names), "features": features}
    if not source.streaming:
        kwargs["desc"] = f"Listing {source.place}"
        if dataset.cache_files:  # what is derived from a user's folder does not belong into it
            kwargs["cache_file_name"] = os.path.join(tempfile.mkdtemp(prefix="mel-llm-"), "rows.arrow")
    return dataset.map(row_to_columns, **kwargs)


def _find_column(source: SpeechSource, names: list[str], option: str, usual: tuple[str, ...]) -> str:
    asked = getattr(source, option)
    if asked is not None and asked not in names:
        raise ValueError(f"{source.place}: there is no column {asked!r} (`{option}`); there are {', '.join(names)}.")
    found = asked or next((name for name in usual if name in names), None)
    if found is None:
        raise ValueError(
            f"{source.place}: none of the columns {', '.join(names)} is called {' or '.join(usual)}. Name one: "
            f"{source.place},{option}=..."
        )
    return found


def _is_spoken_question(source: SpeechSource, names: list[str]) -> bool:
    """Whether the clips are questions themselves, where a column `question` could also ask about them."""
    named = source.task == "qa" or source.answer_column is not None or source.answer_audio_column is not None
    return named or not {"question_audio", *ANSWER_AUDIO_COLUMNS}.isdisjoint(names)


def _answer_columns(source: SpeechSource, names: list[str]) -> tuple[str | None, str | None]:
    """The columns of the answers' texts and of their recordings; `None` where there are none."""
    wants = source.task == "qa" or source.answer_column is not None or source.answer_audio_column is not None
    if not wants and set(ANSWER_COLUMNS).isdisjoint(names):
        return None, None
    text = _find_column(source, names, "answer_column", ANSWER_COLUMNS)
    has_audio = source.answer_audio_column is not None or not set(ANSWER_AUDIO_COLUMNS).isdisjoint(names)
    return text, _find_column(source, names, "answer_audio_column", ANSWER_AUDIO_COLUMNS) if has_audio else None


# Classes and not closures, so that `datasets` can tell by their content whether its cache still holds.
@dataclass
class _NotMatching:
    pattern: str

    def __call__(self, value: Any) -> bool:
        return not fnmatch(str(value), self.pattern)


@dataclass
class _ToColumns:
    place: str
    audio: str
    text: str | None
    speaker: str | None
    text_normalizer: Callable[[str], str] | None
    instruction_column: str | None = None
    instruction: str | None = None
    label_names: tuple[str, ...] = ()  # of a class label, which is kept as a number
    kept: tuple[str, ...] = ()
    answer: str | None = None
    answer_audio: str | None = None

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        audio, text = _as_file(row[self.audio]), None if self.text is None else row[self.text]
        if self.label_names and isinstance(text, int):
            text = self.label_names[text] if 0 <= text < len(self.label_names) else None
        if isinstance(text, list):  # answers any of which is right
            text = "|".join(map(str, text))
        instruction = self.instruction if self.instruction_column is None else row[self.instruction_column]
        speaker = None if self.speaker is None else row[self.speaker]
        name = audio.get("path") or f"row {index}"
        return {
            **{name: row[name] for name in self.kept},
            "audio": audio,
            "text": self._written(text),
            "duration": _seconds(row.get("duration")),
            "offset": _seconds(row.get("offset")),
            # A name means somebody only within its source
            "speaker": None if speaker in (None, "") else f"{self.place}: {speaker}",
            "instruction": str(instruction).strip() or None if instruction is not None else None,
            "origin": name if os.path.isabs(name) else f"{self.place}: {name}",
            **({} if self.answer is None else self._answers(row)),
        }

    def _written(self, text: Any) -> str:
        text = "" if text is None else str(text)
        return text if self.text_normalizer is None else self.text_normalizer(text)

    def _answers(self, row: dict[str, Any]) -> dict[str, Any]:
        answers = read_answers(row[self.answer])
        audio = None if self.answer_audio is None else row[self.answer_audio]
        return {
            "answers": [self._written(answer) for answer in answers],
            "answer_audio": None if audio in (None, "") else _as_file(audio),
        }


def _as_file(audio: Any) -> dict[str, Any]:
    """What a cell says of a recording, as `{"bytes", "path"}`."""
    if isinstance(audio, str):
        return {"bytes": None, "path": audio}
    if audio.get("array") is not None:
        return {"bytes": _wav_bytes(audio["array"], audio["sampling_rate"]), "path": audio.get("path")}
    return {"bytes": audio.get("bytes"), "path": audio.get("path")}


def read_answers(cell: Any) -> list[str]:
    """The answers that a cell holds: one text; a list, also one written in JSON, as the text files of this module hand
    it over; the dict of SQuAD (`text`) or TriviaQA (`value`, `aliases`); or the `(list (description "..."))` of
    WebQuestions' own files. Empty ones are left out."""
    if isinstance(cell, dict):
        found = [cell.get(name) for name in ("value", "text", "aliases")]
        return [answer for part in found if part is not None for answer in read_answers(part)]
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            pass
    if isinstance(cell, str) and cell.startswith("(list"):
        cell = [quoted or bare for quoted, bare in re.findall(r'\(description (?:"([^"]*)"|([^()]*))\)', cell)]
    cells = cell if isinstance(cell, (list, tuple)) else [cell]
    return [str(answer).strip() for answer in cells if answer is not None and str(answer).strip()]


def _seconds(value: Any) -> float | None:
    """A number that somebody wrote down, or None if it is none: then the file's header tells."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _wav_bytes(samples: Any, sampling_rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples, dtype=np.float32).T, sampling_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


__all__ = [
    "ANSWER_COLUMNS",
    "AUDIO_COLUMNS",
    "COLUMNS",
    "REPLY_COLUMNS",
    "SPEAKING_TASKS",
    "TASKS",
    "TEXT_COLUMNS",
    "SpeechSource",
    "load_source",
    "read_answers",
]
