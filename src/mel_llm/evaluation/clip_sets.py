"""Recordings with what is said in them, or with questions and answers about them, as sets to be evaluated on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..card_results import is_hub_id, local_name
from ..training.sources import SpeechSource
from .clip_systems import file_slug, short_name
from .plugins import fingerprint
from .utterances import Utterance, load_recordings


# Rows of which several make up a recording with one transcript (`parent_id`), and their order in it
SESSION_COLUMNS = ("parent_id", "chunk_index")


@dataclass
class ClipSet:
    r"""Clips of one dataset and split.

    Attributes:
        place (`str`): Folder, manifest or name of a dataset of the Hub.
        split, config (`str`, *optional*): Which part of it.
        utterances (`list[Utterance]`): The clips and their reference texts.
        prompts (`list`): What is asked about each; `None` where its transcript is wanted.
        sessions (`list`): `(recording, place in it)` of each clip that is a part of one with a common transcript, or
            `None`.
        choices (`list`): What each answer is one of, or `None`.
        benchmark (`str`, *optional*): Name of the set on the leaderboard: see `mel_llm.evaluation.open_asr`.
    """

    place: str
    split: str | None = None
    config: str | None = None
    utterances: list[Utterance] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    sessions: list[tuple[str, int] | None] = field(default_factory=list)
    choices: list[list[str] | None] = field(default_factory=list)
    benchmark: str | None = None

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def is_local(self) -> bool:
        return not is_hub_id(self.place)

    @property
    def name(self) -> str:
        """In tables."""
        if self.benchmark is not None:
            return self.benchmark
        place = local_name(self.place) if self.is_local else self.place
        return " ".join(part for part in (place, self.config, self.split) if part)

    @property
    def file_name(self) -> str:
        """`PLACE_CONFIG_SPLIT`, as the leaderboard names its files; of local data with a fingerprint of where it lies."""
        place = self.place
        if self.is_local:
            place = f"{local_name(place)}-{fingerprint(os.path.abspath(os.path.expanduser(place)))}"
        return "_".join(file_slug(part) for part in (place, self.config, self.split) if part)

    @property
    def seconds(self) -> float:
        return sum(utterance.seconds for utterance in self.utterances)

    def load(self, index: int, sampling_rate: int) -> np.ndarray:
        """A clip, `(samples,)`, float32."""
        return self.utterances[index].load(sampling_rate)

    def key(self, index: int) -> str:
        """Another one if the recording is, or what is asked about it."""
        return fingerprint([self.utterances[index].recording_key, self.prompts[index]])


def load_clip_set(
    source: SpeechSource | str,
    split: str = "test",
    max_samples: int | None = None,
    text_columns: Sequence[str] | None = None,
    benchmark: str | None = None,
) -> ClipSet:
    """The clips of a source, with their texts.

    Args:
        source ([`SpeechSource`] or `str`): Where they are, or that as `PLACE[,key=value]...`.
        split (`str`, defaults to `"test"`): Unless the source names one. A folder without splits is read whole.
        max_samples (`int`, *optional*): Only the first so many, and what else belongs to a recording that they begin.
        text_columns: Usual names of the column with the texts, if they are no transcripts.
        benchmark (`str`, *optional*): Name of the set on a leaderboard.

    Raises:
        FileNotFoundError: There is no such file, folder or split.
        ValueError: There is no column of texts or no text in it, no clip, or one that cannot be read; the message names
            it.
    """
    if isinstance(source, str):
        source = SpeechSource.parse(source)
    kept_columns = (*SESSION_COLUMNS, "choices")
    try:
        utterances, found = load_recordings(source, split, text_columns=text_columns, keep=kept_columns)
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # what `datasets` says of an empty split, naming no dataset
            raise
        utterances = []
    if not utterances:
        raise ValueError(f"{source.place}: the split {source.split or split!r} is empty: it has no clips.")
    data = utterances[0].source.remove_columns("audio")[:]
    sessions: list = [None] * len(utterances)
    if all(name in data for name in SESSION_COLUMNS):
        columns = (data[name] for name in SESSION_COLUMNS)
        sessions = [(str(parent), int(index)) for parent, index in zip(*columns, strict=True)]
    # A transcript of a whole recording needs the whole recording
    begun = {session[0] for session in sessions[:max_samples] if session is not None}
    kept = [
        index
        for index, session in enumerate(sessions)
        if max_samples is None or index < max_samples or (session is not None and session[0] in begun)
    ]
    utterances = [utterances[index] for index in kept]
    if not any(utterance.text for utterance in utterances):
        raise ValueError(
            f"{source.place}: none of the {len(utterances)} clips has a text to compare with. Is another column meant? "
            f"{source.place},text_column=..."
        )
    return ClipSet(
        place=source.place,
        split=found,
        config=source.config,
        utterances=utterances,
        prompts=[data["instruction"][index] for index in kept],
        sessions=[sessions[index] for index in kept],
        choices=[split_choices(data["choices"][index]) if "choices" in data else None for index in kept],
        benchmark=benchmark,
    )


def split_choices(cell) -> list[str] | None:
    """The entries of a list, or of a text with `|` between them."""
    if cell is None or cell == "":
        return None
    entries = cell.split("|") if isinstance(cell, str) else list(cell)
    return [str(entry).strip() for entry in entries if str(entry).strip()]


def check_names(sets: Sequence[ClipSet]) -> None:
    """Refuses two sets of one name.

    Raises:
        ValueError: There are two.
    """
    names = [clip_set.file_name for clip_set in sets]
    for clip_set in sets:
        if names.count(clip_set.file_name) > 1:
            raise ValueError(f"{clip_set.name} is given twice.")


def manifest_path(folder: Path, model_name: str, clip_set: ClipSet) -> Path:
    """Where the raw texts of a model go: named so that the leaderboard's own scorer finds them."""
    return folder / f"MODEL_{file_slug(short_name(model_name))}_DATASET_{clip_set.file_name}.jsonl"


__all__ = ["ClipSet", "check_names", "load_clip_set", "manifest_path", "split_choices"]
