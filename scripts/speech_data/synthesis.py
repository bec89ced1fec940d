"""More speech from texts: which voice says what at which speed, and the loop that makes it and can be interrupted.

The plan is a function of seed, voices and texts alone. Its clips are numbered, made in any order by several processes, and
kept in the order of their numbers, so that neither the number of processes nor an interruption changes what comes out.
"""

import json
import logging
import signal
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mel_llm.audio_utils_mel_llm import resample, to_mono_float
from mel_llm.whole_files import write_whole

from .attribution import synthesis_attribution
from .clip_faults import clip_fault
from .corpus import SAMPLING_RATE, write_clip, write_metadata
from .engines import EngineMissing, EngineOptions, SpeechEngine, make_engine
from .held_out import is_held_out_voice
from .texts import Sentence


logger = logging.getLogger("prepare_data")

JOURNAL = "synthesis.jsonl"
_SAVE_EVERY = 100  # clips between two versions of metadata.csv
_PATIENCE = 50  # clips that fail one after another before there is something wrong with all


# --- voices -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """A voice of an engine, and what the corpus calls it."""

    engine: str
    name: str
    speaker: str


def available_engines(names: list[str], options: EngineOptions) -> dict[str, SpeechEngine]:
    """Those that can be used here; what the others lack is told.

    Raises:
        ValueError: None can, or an engine does not exist.
    """
    engines, missing = {}, []
    for name in dict.fromkeys(names):
        try:
            engines[name] = make_engine(name, options)
        except EngineMissing as error:
            missing.append(f"{name}: {error}.")
            logger.warning(f"Goes on without {missing[-1]}")
    if not engines:
        raise ValueError(f"--engines: none can be used here. {' '.join(missing)}")
    return engines


def choose_voices(engines: dict[str, SpeechEngine], patterns: list[str]) -> list[Voice]:
    """The voices that are to speak.

    Args:
        engines: By name.
        patterns: `VOICE` or `ENGINE:VOICE`, with `*` for any letters; none is all voices. Voices that are kept for tests
            are never among those that a `*` stands for.

    Raises:
        ValueError: A voice is kept for tests, or there is no such voice.
    """
    for pattern in patterns:
        if "*" not in pattern and is_held_out_voice(pattern):
            raise ValueError(f"--voices: {pattern} is kept for tests and must not be synthesised with.")
    voices, held_out, used = [], [], set()
    for name, engine in engines.items():
        for voice in engine.voices():
            matching = [p for p in patterns if fnmatchcase(voice, p) or fnmatchcase(f"{name}:{voice}", p)]
            used.update(matching)
            if patterns and not matching:
                continue
            speaker = engine.speaker(voice)
            if is_held_out_voice(f"{voice} {speaker}"):
                held_out.append(f"{name}:{voice}")
            else:
                voices.append(Voice(name, voice, speaker))
    unknown = [pattern for pattern in patterns if pattern not in used]
    if unknown:
        known = ", ".join(f"{name}: {', '.join(engine.voices())}" for name, engine in engines.items())
        raise ValueError(f"--voices: there is no {', '.join(unknown)}. There are {known}.")
    if held_out:
        logger.info(f"Kept for tests, and left out: {', '.join(held_out)}.")
    if not voices:
        raise ValueError("--voices: all of them are kept for tests.")
    return voices


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedClip:
    """Clip `index` of a plan."""

    index: int
    sentence: Sentence
    voice: Voice
    speed: float

    @property
    def stem(self) -> str:
        engine = self.voice.engine.rpartition(".")[2].rpartition(":")[2]
        return f"{engine}_{self.index:06d}"


@dataclass(frozen=True)
class SynthesisPlan:
    """Every voice speaks as often as every other, every sentence is spoken before one is spoken again, and no voice says
    one twice.

    Args:
        sentences, voices: What is said, and by whom.
        seed (`int`): Of the choice.
        min_speed, max_speed (`float`): Each clip has a speed from this range.
    """

    sentences: tuple[Sentence, ...] = field(repr=False)
    voices: tuple[Voice, ...]
    seed: int = 0
    min_speed: float = 0.9
    max_speed: float = 1.1

    def __post_init__(self):
        if not 0.5 <= self.min_speed <= self.max_speed <= 2.0:
            raise ValueError(f"--speeds must be two numbers from 0.5 to 2, got {self.min_speed} {self.max_speed}.")

    def __len__(self) -> int:
        return len(self.sentences) * len(self.voices)

    def __getitem__(self, index: int) -> PlannedClip:
        if not 0 <= index < len(self):
            raise IndexError(index)
        # The voices take turns; each time through the sentences they begin one later, and so with a sentence that is new
        # to them
        time, place = divmod(index, len(self.sentences))
        share = np.random.default_rng([self.seed, 2, index]).random()
        return PlannedClip(
            index,
            self.sentences[_order(self.seed, 0, len(self.sentences))[place]],
            self.voices[_order(self.seed, 1, len(self.voices))[(place + time) % len(self.voices)]],
            round(self.min_speed + share * (self.max_speed - self.min_speed), 3),
        )


@lru_cache(maxsize=8)
def _order(seed: int, kind: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, kind]).permutation(size)


# --- one clip, in the process that makes it -----------------------------------------------------------------------------

_engines: dict[str, SpeechEngine] = {}


def _speak(clip: PlannedClip, options: EngineOptions) -> tuple[np.ndarray | None, str | None]:
    """`(samples,)`, float32, at 16 kHz; or None and what was wrong."""
    try:
        if clip.voice.engine not in _engines:
            _engines[clip.voice.engine] = make_engine(clip.voice.engine, options)
        spoken, rate = _engines[clip.voice.engine].speak(clip.sentence.text, clip.voice.name, clip.speed)
        if not len(spoken):
            return None, "nothing was spoken"
        audio = resample(to_mono_float(np.asarray(spoken), "speech"), rate, SAMPLING_RATE)
    except Exception as error:  # of a program that is not ours, with a text that it cannot say
        return None, f"{type(error).__name__}: {error}"
    fault = clip_fault(audio, clip.sentence.text, clip.speed)
    return (None, fault) if fault else (np.clip(audio, -1.0, 1.0), None)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _speakers(engines: dict[str, SpeechEngine], options: EngineOptions, workers: int) -> Iterator:
    """A function that has a clip made and returns a `Future`."""
    if workers <= 1:
        _engines.clear()
        _engines.update(engines)

        def at_once(clip: PlannedClip) -> Future:
            future: Future = Future()
            future.set_result(_speak(clip, options))
            return future

        yield at_once
        _engines.clear()
        return
    # Not forked: engines have threads
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_interrupts_to_the_parent)
    try:
        yield lambda clip: pool.submit(_speak, clip, options)
    except BrokenProcessPool:
        raise OSError("A process that speaks died, perhaps for want of memory. Try fewer --workers.") from None
    finally:
        pool.shutdown(cancel_futures=True)


# --- all of them --------------------------------------------------------------------------------------------------------


class Synthesis:
    """A folder that is being filled.

    `synthesis.jsonl` has a line for each clip of the plan that was tried, written behind its file; `train/metadata.csv`
    is made from it. A line that an interruption cut off is made again.

    Args:
        plan ([`SynthesisPlan`]): Whose clips are made, in its order.
        folder (`Path`): Where they go.
        settings (`dict`): What another run must have in common to go on in this folder.
        suffix (`str`): `.ogg`, `.flac` or `.wav`.

    Raises:
        ValueError: The folder holds something else.
    """

    def __init__(self, plan: SynthesisPlan, folder: Path, settings: dict, suffix: str = ".ogg"):
        self.plan, self.folder, self.suffix = plan, folder, suffix
        self.clips = folder / "train"
        self.journal = folder / JOURNAL
        voices = [f"{voice.engine}:{voice.name}" for voice in plan.voices]
        speeds = [plan.min_speed, plan.max_speed]
        self.settings = {**settings, "seed": plan.seed, "speeds": speeds, "suffix": suffix, "voices": voices}
        self.records = self._read_journal()

    @property
    def rows(self) -> list[dict]:
        return [record["row"] for record in self.records if "row" in record]

    @property
    def seconds(self) -> float:
        return sum(row["duration"] for row in self.rows)

    def run(self, hours: float, engines: dict[str, SpeechEngine], options: EngineOptions, workers: int = 1) -> None:
        """Makes clips until there are `hours` of them in all.

        Raises:
            ValueError: The plan has no more clips, or clip after clip fails.
        """
        wanted = hours * 3600
        seconds, failed = self.seconds, 0
        if self.records:
            logger.info(f"{self.folder}: goes on after {len(self.rows)} clips, {seconds / 3600:.2f} h.")
        self.clips.mkdir(parents=True, exist_ok=True)
        if not self.journal.exists():
            write_whole(self.journal, json.dumps(self.settings) + "\n")
        try:
            with open(self.journal, "a", encoding="utf-8") as journal:
                with _speakers(engines, options, workers) as speak:
                    pending: deque[tuple[PlannedClip, Future]] = deque()
                    index = len(self.records)
                    while seconds < wanted and (pending or index < len(self.plan)):
                        while index < len(self.plan) and len(pending) < (4 * workers if workers > 1 else 1):
                            clip = self.plan[index]
                            pending.append((clip, speak(clip)))
                            index += 1
                        clip, future = pending.popleft()
                        record = self._keep(clip, *future.result())
                        journal.write(json.dumps(record, ensure_ascii=False) + "\n")
                        journal.flush()
                        self.records.append(record)
                        seconds += record["row"]["duration"] if "row" in record else 0.0
                        failed = failed + 1 if "fault" in record else 0
                        if failed >= _PATIENCE:
                            raise ValueError(
                                f"{failed} clips failed one after another, the last because {record['fault']} "
                                f"({clip.voice.engine}, {clip.voice.name}, {clip.sentence.text!r})."
                            )
                        if len(self.records) % _SAVE_EVERY == 0:
                            self._save()
                            logger.info(f"{len(self.rows)} clips, {seconds / 3600:.2f} of {hours} h")
        finally:
            self._save()
            self._write_licences(engines)
        self._report()
        if seconds < wanted:
            raise ValueError(
                f"{self.folder}: every voice has said every text, and that is {seconds / 3600:.2f} h and not {hours}. "
                "Give more texts or voices."
            )

    def _read_journal(self) -> list[dict]:
        if not self.journal.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"--output_dir: {self.folder} holds something else. Give an empty or a new folder.")
            return []
        data = self.journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # what follows was cut off
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0] != self.settings:
            there = lines[0] if lines else {}
            keys = [key for key in {**there, **self.settings} if there.get(key) != self.settings.get(key)]
            raise ValueError(
                f"--output_dir: {self.folder} was begun with other {', '.join(keys)}. Give the same, or a new folder."
            )
        if len(whole) < len(data):
            with open(self.journal, "rb+") as file:
                file.truncate(len(whole))
        records: list[dict] = []
        for record in lines[1:]:
            row = record.get("row")
            if record["index"] != len(records):
                raise ValueError(f"{self.journal} is damaged: clip {len(records)} is missing.")
            if row is not None and not (self.clips / row["file_name"]).is_file():
                raise ValueError(
                    f"{self.clips / row['file_name']} is missing. Restore it, or give a new --output_dir."
                )
            records.append(record)
        return records

    def _keep(self, clip: PlannedClip, audio: np.ndarray | None, fault: str | None) -> dict:
        if audio is None:
            return {"index": clip.index, "voice": clip.voice.speaker, "fault": fault}
        name = clip.stem + self.suffix
        write_clip(self.clips / name, audio)
        engine = clip.voice.engine.rpartition(":")[2]
        row = {
            "file_name": name,
            "text": clip.sentence.text,
            "speaker": clip.voice.speaker,
            "language": "en",
            "duration": round(len(audio) / SAMPLING_RATE, 4),
            "source": f"synth:{engine} text={clip.sentence.source}",
        }
        return {"index": clip.index, "speed": clip.speed, "row": row}

    def _save(self) -> None:
        write_metadata(self.clips, self.rows)
        voices: dict[str, list[str]] = {}
        for voice in self.plan.voices:
            voices.setdefault(voice.engine, []).append(voice.name)
        licences = Counter(f"{sentence.source}: {sentence.licence}" for sentence in self.plan.sentences)
        texts = f"{len(self.plan.sentences)} sentences"
        write_whole(self.folder / "ATTRIBUTION.md", synthesis_attribution(voices, texts, sorted(licences)))

    def _write_licences(self, engines: dict[str, SpeechEngine]) -> None:
        folder = self.folder / "LICENCES"
        for name, engine in engines.items():
            for number, file in enumerate(engine.licence_files()):
                folder.mkdir(exist_ok=True)
                label = name.rpartition(":")[2]
                write_whole(folder / f"{label}{number or ''}.{file.name}", file.read_bytes())

    def _report(self) -> None:
        faults = Counter(f"{record['voice']}: {record['fault']}" for record in self.records if "fault" in record)
        for fault, count in faults.most_common(10):
            logger.warning(f"{count} left out, {fault}")
        speakers = Counter(row["speaker"] for row in self.rows)
        logger.info(
            f"{self.clips}: {len(self.rows)} clips, {self.seconds / 3600:.3f} h, {len(speakers)} voices; "
            f"{sum(faults.values())} left out."
        )


__all__ = ["JOURNAL", "PlannedClip", "Synthesis", "SynthesisPlan", "Voice", "available_engines", "choose_voices"]
