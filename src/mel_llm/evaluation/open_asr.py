"""The sets of the Open ASR Leaderboard, where they are on the Hub, and its form of results.

As in huggingface/open_asr_leaderboard on 2026-08-21 (`transformers/submit_jobs_whisper.sh`, `normalizer/data_utils.py`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ..training.sources import TEXT_COLUMNS, SpeechSource
from ..whole_files import write_whole
from .clip_sets import ClipSet, load_clip_set


LEADERBOARD = "hf-audio/open-asr-leaderboard"
_OLD = "hf-audio/esb-datasets-test-only-sorted"
_CHUNKED = "ArtificialAnalysis/Earnings22-Cleaned-AA-chunked"
_CHUNKED_PARENT = "ArtificialAnalysis/Earnings22-Cleaned-AA"


@dataclass(frozen=True)
class BenchmarkSet:
    """A set: its name, where it is, and the id of its task in `.eval_results` files, where one is known."""

    name: str
    place: str
    config: str | None
    split: str = "test"
    task_id: str | None = None


def _sets(place: str, *rows: tuple) -> tuple[BenchmarkSet, ...]:
    return tuple(BenchmarkSet(name, place, config, split, task) for name, config, split, task in rows)


_LIBRISPEECH = (
    ("librispeech test.clean", "librispeech", "test.clean", "librispeech_clean_wer"),
    ("librispeech test.other", "librispeech", "test.other", "librispeech_other_wer"),
    ("spgispeech", "spgispeech", "test", "spgispeech_wer"),
)
# As first published; the names of tasks are those of models' files of April 2026
_RAW = (
    ("ami", "ami", "test", "ami_wer"),
    ("earnings22", "earnings22", "test", "earnings22_wer"),
    ("gigaspeech", "gigaspeech", "test", "gigaspeech_wer"),
)
BENCHMARKS: dict[str, tuple[BenchmarkSet, ...]] = {
    # The seven public English sets of the average since 2026
    "open_asr": (
        *_sets(LEADERBOARD, ("ami_cleaned", "ami_cleaned", "test", None)),
        BenchmarkSet("earnings22_cleaned_aa_chunked", _CHUNKED, "earnings22_cleaned_aa_chunked"),
        *_sets(LEADERBOARD, ("gigaspeech_cleaned", "gigaspeech_cleaned", "test", None), *_LIBRISPEECH),
        *_sets(LEADERBOARD, ("voxpopuli_cleaned_aa", "voxpopuli_cleaned_aa", "test", None)),
    ),
    # The same corpora before their references were cleaned
    "open_asr_raw": _sets(LEADERBOARD, *_RAW, *_LIBRISPEECH, ("voxpopuli", "voxpopuli", "test", "voxpopuli_wer")),
    # The eight sets with TED-LIUM on which rates were published until May 2026, sorted by length
    "esb": _sets(
        _OLD,
        *_RAW,
        *_LIBRISPEECH,
        ("tedlium", "tedlium", "test", "tedlium_wer"),
        ("voxpopuli", "voxpopuli", "test", "voxpopuli_wer"),
    ),
    # Whole talks and calls
    "open_asr_longform": _sets(
        "hf-audio/asr-leaderboard-longform",
        ("longform earnings21", "earnings21", "test", None),
        ("longform earnings22", "earnings22", "test", None),
    ),
}


def load_benchmark(
    name: str, folder: str | Path, subsets: list[str] | None = None, max_samples: int | None = None
) -> list[ClipSet]:
    """The sets of a benchmark, downloaded where they are not in the cache.

    Args:
        name (`str`): One of `BENCHMARKS`.
        folder: Where a manifest goes, for the set that is put together of two datasets.
        subsets (`list[str]`, *optional*): Only the sets of these names.
        max_samples (`int`, *optional*): As for [`load_clip_set`].

    Raises:
        ValueError: There is no such benchmark, or set in it.
        OSError: The Hub cannot be reached.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}.")
    known = {entry.name: entry for entry in BENCHMARKS[name]}
    unknown = [subset for subset in subsets or [] if subset not in known]
    if unknown:
        raise ValueError(f"--subsets: {name} has no set {unknown[0]!r}; it has {', '.join(known)}.")
    entries = [known[subset] for subset in subsets] if subsets else list(known.values())
    sets = []
    for entry in entries:
        source = SpeechSource(entry.place, entry.split, entry.config)
        if entry.place == _CHUNKED:
            source = SpeechSource(str(_write_chunked_manifest(Path(folder), entry.split)), entry.split)
        try:
            loaded = load_clip_set(source, max_samples=max_samples, benchmark=entry.name)
        except (ConnectionError, FileNotFoundError) as error:
            raise OSError(
                f"{entry.place}, {entry.config}, {entry.split} cannot be loaded from the Hub: {error}"
            ) from None
        loaded.place, loaded.config = entry.place, entry.config
        sets.append(loaded)
    return sets


def _write_chunked_manifest(folder: Path, split: str) -> Path:
    """The transcripts of whole calls stand in a dataset of their own, and the sound of their parts beside the table."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    parents = load_dataset(_CHUNKED_PARENT, split=split)
    column = next(name for name in TEXT_COLUMNS if name in parents.column_names)
    texts = {row["id"]: row[column] for row in parents.select_columns(["id", column])}
    chunks = load_dataset(_CHUNKED, split=split).select_columns(["file_name", "parent_id", "chunk_index"])
    missing = sorted(set(chunks["parent_id"]) - set(texts))
    if missing:
        raise ValueError(f"{_CHUNKED_PARENT} has no transcript of {missing[0]}, which {_CHUNKED} has parts of.")
    root = Path(snapshot_download(_CHUNKED, repo_type="dataset", allow_patterns=["audio/*"]))
    rows = [
        {
            "audio": str(root / "audio" / row["file_name"]),
            "text": texts[row["parent_id"]],
            "parent_id": row["parent_id"],
            "chunk_index": row["chunk_index"],
        }
        for row in chunks
    ]
    path = folder / "earnings22_cleaned_aa_chunked.jsonl"
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def eval_results(summary: dict, benchmark: str, date: str, source_url: str | None = None, notes: str | None = None):
    """The content of `.eval_results/open_asr_leaderboard.yaml` of a model's repository: a list of dicts.

    `mean_wer` and `rtfx` are there only if every set of the benchmark was heard. Sets for whose task the leaderboard has
    published no name are left out.

    Args:
        summary (`dict`): Of [`summarize_asr`].
        benchmark (`str`): One of `BENCHMARKS`.
        date (`str`): ISO 8601.
        source_url, notes (`str`, *optional*): Where the figures come from, and how they were made.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    heard = {of_set["name"]: of_set["totals"] for of_set in summary["sets"]}
    values = {}
    if all(entry.name in heard for entry in BENCHMARKS[benchmark]):
        if summary["mean_wer"] is not None:
            values["mean_wer"] = 100 * summary["mean_wer"]
        if summary["rtfx"] is not None:
            values["rtfx"] = summary["rtfx"]["value"]
    for entry in BENCHMARKS[benchmark]:
        if entry.task_id is not None and "wer" in heard.get(entry.name, {}):
            values[entry.task_id] = 100 * heard[entry.name]["wer"]["value"]
    entries = [
        EvalResultEntry(
            dataset_id=LEADERBOARD, task_id=task, value=round(value, 2), date=date, source_url=source_url, notes=notes
        )
        for task, value in values.items()
    ]
    return eval_result_entries_to_yaml(entries)


__all__ = ["BENCHMARKS", "LEADERBOARD", "BenchmarkSet", "eval_results", "load_benchmark"]
