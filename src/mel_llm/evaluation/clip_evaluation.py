"""Has clips heard, batch by batch, and keeps the raw texts with their times, so that what was done once is not done again."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from ..whole_files import write_whole
from .clip_sets import ClipSet, check_names, manifest_path
from .clip_systems import ClipSystem
from .environment import describe_environment


logger = logging.get_logger(__name__)

# What a clip that a model cannot take raises; running out of memory is none of them
_CLIP_ERRORS = (ValueError, TypeError, OSError, RuntimeError)
_FATAL = tuple(
    error for error in (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", None)) if error is not None
)


class ClipEvaluation:
    r"""All clips of all sets before all systems.

    In `output_dir/raw` each system has a folder, named by it and by a fingerprint of its settings. In it each set has a
    file `MODEL_..._DATASET_....jsonl` in the form of the Open ASR Leaderboard's manifests, a line for each clip:
    `audio_filepath`, `duration` (seconds), `time` (its share of its batch's seconds, all but reading the file),
    `text` (the reference, as it is), `pred_text` (what the system wrote, as it is); and ours, `id`, `key` (of the
    recording and the question) and `timed_on` (the machine). While a set is being done, its lines are in
    `.partial-...jsonl`, to which each batch is added when it is done.

    Args:
        sets, systems: What is heard, and by whom.
        output_dir: Where the files go.
        batch_size (`int`, defaults to 8): Clips that are heard at a time.
        sort_by_length (`bool`, defaults to `True`): Clips of a length together, the longest first, as the leaderboard's
            data is sorted; so memory that does not suffice is told at once. Without, in their order.
        warmup_steps (`int`, defaults to 1): Batches that each system hears before the first that is timed.
        interleave (`bool`, defaults to `True`): Every batch goes to all systems before the next does, so that their times
            are of the same moments; all are in memory. Without, one system after the other.
        device (`str`, defaults to `"cpu"`): Named in `timed_on`.

    Raises:
        ValueError: There is nothing to do, or something twice.
    """

    def __init__(
        self,
        sets: Sequence[ClipSet],
        systems: Sequence[ClipSystem],
        output_dir: str | os.PathLike,
        batch_size: int = 8,
        sort_by_length: bool = True,
        warmup_steps: int = 1,
        interleave: bool = True,
        device: str = "cpu",
    ):
        if not systems or not sets:
            raise ValueError("There is nothing to evaluate: name a model, and data.")
        if batch_size < 1 or warmup_steps < 0:
            raise ValueError(
                f"`batch_size` must be at least 1 and `warmup_steps` 0, got {batch_size}, {warmup_steps}."
            )
        check_names(sets)
        names = [system.folder_name for system in systems]
        if len(set(names)) < len(names):
            raise ValueError(f"The same model is named twice: {', '.join(system.name for system in systems)}.")
        self.sets, self.systems, self.folder = list(sets), list(systems), Path(output_dir)
        self.batch_size, self.sort_by_length = batch_size, sort_by_length
        self.warmup_steps, self.interleave = warmup_steps, interleave
        machine = describe_environment(device)
        threads = machine["threads"]
        self.timed_on = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}"
        self._warm: set[str] = set()
        self._worked: set[str] = set()

    def run(self) -> list[dict]:
        """Of each system `{"name", "settings", "folder", "num_parameters", "sets"}`, the last being for each set
        `{"lines": [...], "failed": {id: why}}`, the lines in the set's order, without those of clips that failed."""
        results = []
        groups = [self.systems] if self.interleave else [[system] for system in self.systems]
        for group in groups:
            sets = [self._run_set(clip_set, group) for clip_set in self.sets]
            for place, system in enumerate(group):
                record = self._describe(system)
                results.append({**record, "sets": [of_set[place] for of_set in sets]})
                if not self.interleave:
                    system.unload()
        return results

    def _describe(self, system: ClipSystem) -> dict:
        """What is known of a system, also from a run in which it was loaded."""
        path = self.folder / "raw" / system.folder_name / "system.json"
        record = {"name": system.name, "settings": system.settings, "is_peer": system.is_peer}
        record["folder"] = str(path.parent.relative_to(self.folder))
        if system.num_parameters is None and path.is_file():
            record["num_parameters"] = json.loads(path.read_text(encoding="utf-8")).get("num_parameters")
        else:
            record["num_parameters"] = system.num_parameters
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record, indent=2) + "\n")
        return record

    def _batches(self, clip_set: ClipSet) -> list[list[int]]:
        order = list(range(len(clip_set)))
        if self.sort_by_length:
            order.sort(key=lambda index: -clip_set.utterances[index].seconds)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _run_set(self, clip_set: ClipSet, systems: list[ClipSystem]) -> list[dict]:
        from tqdm.auto import tqdm

        files = [_RawFile(self.folder / "raw" / system.folder_name, system, clip_set) for system in systems]
        failed: list[dict[str, str]] = [{} for _ in systems]
        batches = self._batches(clip_set)
        missing = [[[index for index in batch if not file.has(index)] for batch in batches] for file in files]
        for system, of_system in zip(systems, missing, strict=True):
            if any(of_system):  # all before the first batch: what is wrong with the last is not told after hours
                system.load()
        total = sum(len(batch) for of_system in missing for batch in of_system)
        with tqdm(total=total, desc=clip_set.name, unit="clip", disable=None if total else True) as bar:
            for place in range(len(batches)):
                for system, file, of_system, errors in zip(systems, files, missing, failed, strict=True):
                    if of_system[place]:
                        self._warm_up(system, clip_set, batches)
                        lines = self._run_batch(system, clip_set, of_system[place], errors)
                        file.add(lines)
                        bar.update(len(of_system[place]))
        for file in files:
            file.finish()
        return [
            {"lines": [file.line(index) for index in range(len(clip_set)) if file.has(index)], "failed": errors}
            for file, errors in zip(files, failed, strict=True)
        ]

    def _warm_up(self, system: ClipSystem, clip_set: ClipSet, batches: list[list[int]]) -> None:
        """What the first calls allocate and compile is not the model's speed."""
        if system.folder_name in self._warm:
            return
        self._warm.add(system.folder_name)
        for step in range(self.warmup_steps):
            batch = batches[step % len(batches)]
            try:
                clips = [clip_set.load(index, system.sampling_rate) for index in batch]
                system.run(clips, [clip_set.prompts[index] for index in batch])
            except _FATAL:
                raise
            except _CLIP_ERRORS:
                continue  # it is told when the turn of this batch comes

    # --- one batch --------------------------------------------------------------------------------------------------

    def _run_batch(
        self, system: ClipSystem, clip_set: ClipSet, batch: list[int], errors: dict[str, str]
    ) -> list[dict]:
        clips, kept = [], []
        for index in batch:
            try:
                clips.append(clip_set.load(index, system.sampling_rate))
                kept.append(index)
            except _CLIP_ERRORS as error:  # its header could be read, but not the rest
                self._fail(clip_set, index, error, errors)
        if not kept:
            return []
        try:
            texts, seconds = self._timed(system, clip_set, kept, clips)
        except _FATAL:
            raise
        except _CLIP_ERRORS as error:  # one that does not fit must not cost the others
            return self._one_by_one(system, clip_set, kept, clips, errors, error)
        self._worked.add(system.folder_name)
        share = seconds / len(kept)
        return [
            self._line(system, clip_set, index, clip, text, share)
            for index, clip, text in zip(kept, clips, texts, strict=True)
        ]

    def _one_by_one(self, system, clip_set, batch, clips, errors, first_error) -> list[dict]:
        lines = []
        for index, clip in zip(batch, clips, strict=True):
            try:
                (text,), seconds = self._timed(system, clip_set, [index], [clip])
            except _FATAL:
                raise
            except _CLIP_ERRORS as error:
                self._fail(clip_set, index, error, errors)
                continue
            lines.append(self._line(system, clip_set, index, clip, text, seconds))
        if not lines and system.folder_name not in self._worked:
            raise first_error  # not a clip's fault
        self._worked.add(system.folder_name)
        return lines

    def _timed(self, system: ClipSystem, clip_set: ClipSet, batch: list[int], clips: list) -> tuple[list[str], float]:
        prompts = [clip_set.prompts[index] for index in batch]
        system.synchronize()
        started = time.perf_counter()
        texts = system.run(clips, prompts)
        system.synchronize()
        return texts, time.perf_counter() - started

    def _fail(self, clip_set: ClipSet, index: int, error: Exception, errors: dict[str, str]) -> None:
        name = clip_set.utterances[index].id
        errors[name] = f"{type(error).__name__}: {error}"
        logger.warning(f"{clip_set.name}: {name}: {errors[name]}")

    def _line(self, system, clip_set: ClipSet, index: int, clip, text: str, seconds: float) -> dict:
        utterance, session = clip_set.utterances[index], clip_set.sessions[index]
        line = {
            "audio_filepath": utterance.id,
            "duration": len(clip) / system.sampling_rate,
            "time": seconds,
            "text": utterance.text,
            "pred_text": text,
            "id": utterance.id,
            "key": clip_set.key(index),
            "timed_on": self.timed_on,
        }
        if session is not None:  # as the leaderboard's scorer wants them
            line["parent_id"], line["chunk_index"] = session
        return line


class _RawFile:
    """The lines of one system and one set: whole, or as far as they have come."""

    def __init__(self, folder: Path, system: ClipSystem, clip_set: ClipSet):
        folder.mkdir(parents=True, exist_ok=True)
        self.clip_set = clip_set
        self.path = manifest_path(folder, system.name, clip_set)
        self.partial = self.path.with_name(f".partial-{self.path.name}")
        self.lines: dict[str, dict] = {}
        for path in (self.path, self.partial):
            self.lines.update((line["id"], line) for line in _read_lines(path))
        self.keys: dict[int, str] = {}
        self.is_changed = self.partial.is_file()

    def _key(self, index: int) -> str:
        if index not in self.keys:
            self.keys[index] = self.clip_set.key(index)
        return self.keys[index]

    def has(self, index: int) -> bool:
        line = self.lines.get(self.clip_set.utterances[index].id)
        return line is not None and line["key"] == self._key(index)

    def line(self, index: int) -> dict:
        """With the reference as it is now: it may have been corrected since."""
        utterance = self.clip_set.utterances[index]
        line = {**self.lines[utterance.id], "text": utterance.text}
        if line != self.lines[utterance.id]:
            self.lines[utterance.id], self.is_changed = line, True
        return line

    def add(self, lines: list[dict]) -> None:
        self.lines.update((line["id"], line) for line in lines)
        self.is_changed = True
        with open(self.partial, "a", encoding="utf-8") as file:
            # A line that an interruption cut short stays one that is passed over
            file.write("\n" + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def finish(self) -> None:
        """All lines in the set's order into the file; then those of clips that this run left out."""
        present = [index for index in range(len(self.clip_set)) if self.has(index)]
        lines = [self.line(index) for index in present]
        if not self.is_changed:
            return
        ids = {line["id"] for line in lines}
        lines += [line for name, line in self.lines.items() if name not in ids]
        write_whole(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.partial.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            line = json.loads(text)
            if isinstance(line, dict) and line.keys() >= {"id", "key", "pred_text", "time", "duration"}:
                lines.append(line)
        except ValueError:
            continue  # empty, or cut short
    return lines


__all__ = ["ClipEvaluation"]
