"""Speaks, listens and writes down, utterance by utterance, so that what was done once is not done again."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..audio_utils_mel_llm import load_audio, resample
from ..whole_files import write_whole
from .plugins import fingerprint
from .speech_judges import SpeechJudge
from .speech_systems import EVALUATION_RATE, Speech, SpeechSystem
from .utterances import Utterance
from .voices import Voice


logger = logging.get_logger(__name__)


class SpeechEvaluation:
    r"""All utterances by all systems before all judges.

    In `output_dir`, each system has a folder, named by it and by a fingerprint of everything its speech depends on, so
    that another seed, or a model that was trained on, replaces nothing. In it each utterance has `ID.json`, the scores
    with the judges they are from, and where speech is made also `ID.wav`. Every file appears whole or not at all.

    Args:
        utterances, voices: What is spoken, and in which voice: see [`load_utterances`] and [`choose_voices`].
        systems (`list[SpeechSystem]`): Who speaks.
        judges (`list[SpeechJudge]`): Who listens: see [`make_judges`].
        output_dir: Where the files go.
        batch_size (`int`, defaults to 8): Texts that a model speaks at a time.
        keep_audio (`bool`, defaults to `True`): Whether speech that was made is kept when it is scored.

    Raises:
        ValueError: Something is missing, or two systems are the same.
        FileExistsError: The folder holds the results of other texts.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        voices: Sequence[Voice | None],
        systems: Sequence[SpeechSystem],
        judges: Sequence[SpeechJudge],
        output_dir: str | os.PathLike,
        batch_size: int = 8,
        keep_audio: bool = True,
    ):
        if not systems:
            raise ValueError("There is nothing to evaluate: name a model, --copy_synthesis, --audio or --reference.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        names = [system.folder_name for system in systems]
        if len(set(names)) < len(names):
            raise ValueError(f"The same system is named twice: {', '.join(system.name for system in systems)}.")
        for system in systems:
            system.check(utterances)
        self.utterances, self.voices = list(utterances), list(voices)
        self.systems, self.judges = list(systems), list(judges)
        self.folder, self.batch_size, self.keep_audio = Path(output_dir), batch_size, keep_audio
        self._claim_folder()

    def _claim_folder(self) -> None:
        """Ids are not enough to tell that results are of the same texts."""
        mark = self.folder / "texts.json"
        texts = {utterance.id: utterance.text for utterance in self.utterances}
        self.folder.mkdir(parents=True, exist_ok=True)
        if mark.is_file():
            there = json.loads(mark.read_text(encoding="utf-8"))
            if any(there.get(key, text) != text for key, text in texts.items()):
                raise FileExistsError(f"{self.folder} holds results of other texts. Choose another --output_dir.")
            texts = {**there, **texts}
        write_whole(mark, json.dumps(texts, indent=2, ensure_ascii=False) + "\n")

    def run(self) -> list[dict]:
        """The records of each system, `{"name", "settings", "folder", "utterances": [...]}`, in the order that was given."""
        from tqdm.auto import tqdm

        results = []
        # Texts of a length together: a batch takes as long as its longest
        order = sorted(range(len(self.utterances)), key=lambda index: len(self.utterances[index].text))
        for system in self.systems:
            folder = self.folder / system.folder_name
            folder.mkdir(exist_ok=True)
            write_whole(folder / "system.json", json.dumps({"name": system.name, **system.settings}, indent=2) + "\n")
            records: dict[int, dict] = {}
            with tqdm(total=len(order), desc=system.name, unit="utterance", disable=None) as bar:
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    records.update(zip(batch, self._process(system, folder, batch), strict=True))
                    bar.update(len(batch))
            rows = [self._row(index, records[index]) for index in range(len(self.utterances))]
            results.append(
                {
                    "name": system.name,
                    "settings": system.settings,
                    "folder": system.folder_name,
                    "utterances": rows,
                }
            )
        return results

    def _row(self, index: int, record: dict) -> dict:
        """A record with the scores of these judges only, by their names."""
        keys = {judge.name: score_key(judge, self.utterances[index], self.voices[index]) for judge in self.judges}
        scores = {name: record["scores"][key] for name, key in keys.items() if key in record["scores"]}
        return {**record, "scores": scores}

    def _measure_recording(self, record: dict, utterance: Utterance) -> bool:
        """The reference's duration into the record, if it is not there or of another recording; whether it was not."""
        key = utterance.recording_key
        if not utterance.has_recording or record.get("recording") == key:
            return False
        record["recording"] = key
        record["reference_seconds"] = len(utterance.load(EVALUATION_RATE)) / EVALUATION_RATE
        return True

    # --- one batch --------------------------------------------------------------------------------------------------

    def _process(self, system: SpeechSystem, folder: Path, batch: list[int]) -> list[dict]:
        records: dict[int, dict] = {}
        missing = []
        for index in batch:
            record = self._read(system, folder, index)
            if record is None:
                missing.append(index)
            else:
                records[index] = record
        if missing:
            made = system.make(
                [self.utterances[index] for index in missing], [self.voices[index] for index in missing]
            )
            for index, speech in zip(missing, made, strict=True):
                records[index] = self._keep(system, folder, index, speech)
        for index in batch:
            self._judge(system, folder, index, records[index])
        return [records[index] for index in batch]

    def _paths(self, folder: Path, index: int) -> tuple[Path, Path]:
        name = self.utterances[index].id
        return folder / f"{name}.json", folder / f"{name}.wav"

    def _key(self, system: SpeechSystem, index: int) -> str:
        utterance, voice = self.utterances[index], self.voices[index]
        if system.reads_recording:
            return fingerprint(utterance.recording_key)
        return fingerprint([utterance.text] + ([] if voice is None else [voice.key, voice.text]))

    def _read(self, system: SpeechSystem, folder: Path, index: int) -> dict | None:
        """What an earlier run wrote down, if it still holds; `None` if the speech must be made (or read) again."""
        path, audio_path = self._paths(folder, index)
        if not system.synthesises:
            return None  # its sound is read anyway, and tells whether the scores hold
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            holds = record["audio"]["key"] == self._key(system, index)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not holds:
            return None
        if audio_path.is_file():
            is_same = hashlib.sha256(audio_path.read_bytes()).hexdigest() == record["audio"]["sha256"]
            return record if is_same else None
        return None if self.keep_audio or self._unscored(system, index, record) else record

    def _keep(self, system: SpeechSystem, folder: Path, index: int, speech: Speech | Exception) -> dict:
        """Writes speech that was made into its file; then the record."""
        utterance = self.utterances[index]
        path, audio_path = self._paths(folder, index)
        voice = self.voices[index]
        record = {"id": utterance.id, "text": utterance.text, "voice": None if voice is None else voice.name}
        if isinstance(speech, Exception):
            logger.warning(f"{system.name}: {utterance.id}: {speech}")
            return {**record, "error": f"{type(speech).__name__}: {speech}", "scores": {}}
        if speech.written is not None:
            record["written"] = speech.written
        audio = np.asarray(speech.audio, dtype=np.float32)
        if not np.isfinite(audio).all() or not len(audio):
            error = "ValueError: the speech is empty or not finite"
            logger.warning(f"{system.name}: {utterance.id}: {error}")
            return {**record, "error": error, "scores": {}}
        if system.synthesises:
            write_audio(audio_path, audio, speech.sampling_rate)
            sha256 = hashlib.sha256(audio_path.read_bytes()).hexdigest()
        else:
            sha256 = hashlib.sha256(audio.tobytes()).hexdigest()
        record["audio"] = {
            "key": self._key(system, index),
            "sha256": sha256,
            "seconds": len(audio) / speech.sampling_rate,
            "sampling_rate": speech.sampling_rate,
            "peak": float(np.abs(audio).max()),
            "wall_seconds": speech.wall_seconds,
            "threads": None if speech.wall_seconds is None else torch.get_num_threads(),
            "stopped": speech.stopped,
        }
        record["scores"] = {}
        if not system.synthesises:
            record["scores"] = _scores_of(path, sha256)
        write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return record

    def _unscored(self, system: SpeechSystem, index: int, record: dict) -> list[tuple[str, SpeechJudge]]:
        utterance, voice = self.utterances[index], self.voices[index]
        judges = [judge for judge in self.judges if judge.applies(system, utterance, voice)]
        keyed = [(score_key(judge, utterance, voice), judge) for judge in judges]
        return [(key, judge) for key, judge in keyed if key not in record["scores"]]

    def _judge(self, system: SpeechSystem, folder: Path, index: int, record: dict) -> None:
        path, audio_path = self._paths(folder, index)
        utterance, voice = self.utterances[index], self.voices[index]
        errors = {}
        has_changed = "error" not in record and self._measure_recording(record, utterance)
        unscored = [] if "error" in record else self._unscored(system, index, record)
        if unscored:
            try:
                audio = self._hear(system, audio_path, utterance)
            except (OSError, ValueError) as error:
                unscored, errors = [], {"audio": f"{type(error).__name__}: {error}"}
        for key, judge in unscored:
            try:
                record["scores"][key] = judge.score(audio, utterance, voice)
            except Exception as error:  # one recording that a judge chokes on must not end a night's work
                logger.warning(f"{system.name}: {utterance.id}: {judge.name}: {error}")
                errors[judge.name] = f"{type(error).__name__}: {error}"
        if unscored or has_changed:
            write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        record["judge_errors"] = errors  # not written down: the next run tries again
        if system.synthesises and not self.keep_audio and not errors:
            audio_path.unlink(missing_ok=True)

    def _hear(self, system: SpeechSystem, audio_path: Path, utterance: Utterance) -> np.ndarray:
        """What judges are given: mono at their rate, in [-1, 1]."""
        if system.synthesises:  # as it was written: the same in the run that made it and in a later one
            audio = load_audio(str(audio_path), sampling_rate=EVALUATION_RATE)
        else:
            (speech,) = system.make([utterance], [None])
            if isinstance(speech, Exception):
                raise speech
            audio = resample(speech.audio, speech.sampling_rate, EVALUATION_RATE)
        return np.clip(audio, -1.0, 1.0)


def score_key(judge: SpeechJudge, utterance: Utterance, voice: Voice | None) -> str:
    """Under which a record keeps a score: other judges' scores stay beside it."""
    return f"{judge.name} {fingerprint([judge.description, judge.key(utterance, voice)])}"


def _scores_of(path: Path, sha256: str) -> dict:
    """Scores of an earlier run of the same sound."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["scores"] if record["audio"]["sha256"] == sha256 else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_audio(path: Path, audio: np.ndarray, sampling_rate: int) -> None:
    """Writes a 16-bit WAV that appears whole or not at all; what is louder than 1 is clipped."""
    import soundfile

    partial = path.with_name(f".partial-{path.name}")
    soundfile.write(partial, audio, sampling_rate)
    os.replace(partial, path)


__all__ = ["SpeechEvaluation", "score_key", "write_audio"]
