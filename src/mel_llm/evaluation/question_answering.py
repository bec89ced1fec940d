"""Whether an answer is right, and the questions to ask: WebQuestions, LLaMA-Questions, or your own."""

import hashlib
import os
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import evaluate
import numpy as np
from datasets import Features, List, Value

from ..audio_utils_mel_llm import AUDIO_EXTENSIONS, AudioSource, load_audio
from ..training.sources import AUDIO_COLUMNS, SpeechSource, load_source, read_answers, read_rows
from .base import SpeechMetric, as_list
from .normalizers import get_text_normalizer
from .plugins import fingerprint


_TABLES = (".csv", ".tsv", ".json", ".jsonl")
_QUESTION_KEYS = ("question", "utterance", "text")
_ANSWER_KEYS = ("answers", "answer", "targetValue")

_INPUTS = """
Args:
    predictions (`list[str]`): What was answered.
    references (`list[list[str]]`): The answers that are right, for each question; a string is a list of one.
    normalizer (`str` or `Callable`, *optional*): Applied to both; by default the one given to the constructor.
    details (`bool`, defaults to `False`): Also return, under `utterances`, whether each is right.
"""


class QuestionAnsweringAccuracy(SpeechMetric):
    """The share of questions that are answered, `{"accuracy", "exact_match"}`.

    `accuracy`: one of the right answers stands in the answer, word for word and after normalisation, as speech models' answers
    on WebQuestions and LLaMA-Questions are commonly judged, since they speak in sentences. `exact_match`: it is all of the
    answer, articles aside. An answer that normalisation leaves nothing of (such as "?") is only compared as a whole.

    How SPECTRON's authors judged an answer is not known to us beyond its being an accuracy.

    Args:
        normalizer (`str` or `Callable`, defaults to `"whisper"`): See [`get_text_normalizer`]: it brings numbers into one
            form. `"whisper"` is for English.
        kwargs: As in [`SpeechMetric`].
    """

    compute_arguments = ("normalizer", "details")

    def __init__(self, *, normalizer: str | Callable[[str], str] = "whisper", **kwargs):
        get_text_normalizer(normalizer)
        self.normalizer = normalizer
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of questions whose answer holds one of the right ones.",
            citation="",
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _check_column(self, name: str, values) -> list:
        if name != "references":
            return super()._check_column(name, values)
        values = [[value] if isinstance(value, str) else value for value in as_list(name, values)]
        for index, value in enumerate(values):
            if not isinstance(value, (list, tuple)) or not all(isinstance(answer, str) for answer in value):
                raise TypeError(f"`references[{index}]` must be a list of strings, got {value!r}.")
        return [list(value) for value in values]

    def compute(self, *, predictions=None, references=None, normalizer=None, details: bool = False, **kwargs):
        """The accuracy over what is passed here and everything added since the last call.

        Raises:
            TypeError: An answer is not a string, or an argument that no metric of this package has.
            ValueError: There are no questions, not as many predictions as references, or an unknown normaliser.
        """
        normalize = get_text_normalizer(self.normalizer if normalizer is None else normalizer)
        return super().compute(
            predictions=predictions, references=references, normalizer=normalize, details=details, **kwargs
        )

    def _compute(self, predictions: list[str], references: list[list[str]], normalizer, details: bool) -> dict:
        rows = []
        for prediction, answers in zip(predictions, references, strict=True):
            rows.append(
                {
                    "correct": any(contains_answer(prediction, answer, normalizer) for answer in answers),
                    "exact": any(_bare(prediction, normalizer) == _bare(answer, normalizer) for answer in answers),
                }
            )
        result: dict = {
            "accuracy": sum(row["correct"] for row in rows) / len(rows),
            "exact_match": sum(row["exact"] for row in rows) / len(rows),
        }
        return {**result, "utterances": rows} if details else result


def _bare(text: str, normalize: Callable[[str], str]) -> list[str]:
    """The words without articles and without punctuation that the normaliser left."""
    text = normalize(text).lower().translate(str.maketrans("", "", string.punctuation))
    words = [word for word in text.split() if word not in ("a", "an", "the")]
    return words or text.split()


def contains_answer(prediction: str, answer: str, normalize: Callable[[str], str]) -> bool:
    """Whether the words of the answer stand in the prediction, one after the other."""
    said, wanted = _bare(prediction, normalize), _bare(answer, normalize)
    if not wanted:
        return said == wanted and prediction.strip() == answer.strip()
    return any(said[place : place + len(wanted)] == wanted for place in range(len(said) - len(wanted) + 1))


@dataclass
class SpokenQuestion:
    r"""A question, spoken, with the answers that are right.

    Attributes:
        id (`str`): Fit for a file name, and no other's of the same list.
        text (`str`): The question, or empty.
        answers (`list[str]`): Any of them is right.
        audio: What [`load_audio`] takes.
    """

    id: str
    text: str
    answers: list[str] = field(default_factory=list)
    audio: AudioSource = None

    # As utterances have them; there is no recording of an answer to compare with
    has_recording = False

    @property
    def recording_key(self) -> str:
        """Another one if the question's recording is."""
        source = self.audio if not isinstance(self.audio, dict) else self.audio.get("bytes") or self.audio.get("path")
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()[:8]
        stat = os.stat(source)
        return fingerprint([self.id, stat.st_size, stat.st_mtime_ns])

    def load_prompt(self, sampling_rate: int) -> np.ndarray:
        """The question, `(samples,)`, float32."""
        return load_audio(self.audio, sampling_rate=sampling_rate)


def load_questions(place: str, audio_folder: str | None = None, split: str = "test") -> list[SpokenQuestion]:
    """Spoken questions.

    Args:
        place (`str`): A table (json, jsonl, csv, tsv) with `question` (WebQuestions' own files: `utterance`), `answers` or
            `answer` (there: `targetValue`) and a column of audio files, relative to it; `id` names a row. Or a dataset in any
            form that [`SpeechSource`] takes, such as `fixie-ai/llama-questions`, with its options.
        audio_folder (`str`, *optional*): Where the questions are spoken, for tables without such a column: files named by the
            rows' `id`, or, where no file is named by one, by their number from 1 (as those of LLaMA-Questions are).
        split (`str`, defaults to `"test"`): Of a dataset, unless the source names one.

    Raises:
        FileNotFoundError: There is no such file or folder, or a question is spoken nowhere.
        ValueError: A row has no answer, two have the same `id`, or there are none.
    """
    source = SpeechSource.parse(place)
    path = Path(source.place).expanduser()
    if path.suffix in _TABLES and path.is_file():
        questions = _from_table(path, source, audio_folder)
    else:
        if audio_folder is not None:
            raise ValueError("--qa_audio is for tables; a dataset has its audio itself.")
        questions = _from_dataset(source, split)
    if not questions:
        raise ValueError(f"{source.place}: there are no questions in it.")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{source.place}: two questions have the id {question.id!r}.")
        seen.add(question.id)
        if not question.answers:
            raise ValueError(f"{source.place}: {question.id} has no answer.")
    return questions


def _from_table(path: Path, source: SpeechSource, audio_folder: str | None) -> list[SpokenQuestion]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(read_rows(file, path))
    folder = None if audio_folder is None else Path(audio_folder).expanduser()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"--qa_audio: there is no folder {audio_folder!r}.")
    files = {} if folder is None else {f.stem: f for f in folder.iterdir() if f.suffix.lower() in AUDIO_EXTENSIONS}
    ids = ["" if row.get("id") is None else str(row["id"]) for row in rows]
    # One way for all rows: the number of one may be the id of another
    by_id = any(name in files for name in ids)
    questions = []
    for number, (row, name) in enumerate(zip(rows, ids, strict=True), start=1):
        text = _first(row, (source.text_column,) if source.text_column else _QUESTION_KEYS) or ""
        answers = read_answers(_first(row, (source.answer_column,) if source.answer_column else _ANSWER_KEYS))
        if folder is None:
            cell = _first(row, (source.audio_column,) if source.audio_column else AUDIO_COLUMNS)
            if not cell:
                raise FileNotFoundError(
                    f"{path}, question {number} names no recording. Have the questions spoken, one file each (`mel-llm "
                    "speak`, or any other voice), and name the folder: --qa_audio FOLDER with 1.wav, 2.wav, ..."
                )
            file = path.parent / str(cell.get("path") if isinstance(cell, dict) else cell)
        else:
            names = [stem for stem in ([name] if by_id else [str(number), str(number).zfill(4)]) if stem in files]
            if not names:
                raise FileNotFoundError(f"--qa_audio: question {name or number} is spoken in no file there.")
            file = files[names[0]]
        if not file.is_file():
            raise FileNotFoundError(f"{path}, question {number}: there is no file {file}.")
        questions.append(
            SpokenQuestion(_file_name(name or str(number).zfill(4)), str(text).strip(), answers, str(file))
        )
    return questions


def _from_dataset(source: SpeechSource, split: str) -> list[SpokenQuestion]:
    source = replace(source, task="qa")  # a question and an answer could be about the recording as well
    try:
        data = load_source(source, split, needs_text=False)
    except FileNotFoundError as error:
        if "not divided into splits" not in str(error):
            raise
        data = load_source(source, "train", needs_text=False)
    if "answers" not in (data.column_names or ()):
        raise ValueError(f"{source.place} has no column of answers. Name it: {source.place},answer_column=...")
    return [
        SpokenQuestion(str(number).zfill(4), row["text"].strip(), row["answers"], row["audio"])
        for number, row in enumerate(data, start=1)
    ]


def _first(row: dict, names: Iterable[str]):
    return next((row[name] for name in names if row.get(name) or row.get(name) == 0), None)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:80].strip(".") or "_"


__all__ = ["QuestionAnsweringAccuracy", "SpokenQuestion", "contains_answer", "load_questions"]
