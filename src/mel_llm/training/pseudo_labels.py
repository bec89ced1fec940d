"""Transcripts for speech that has none, written by a recogniser, as SPECTRON's authors labelled Libri-Light (arXiv
2305.15255). Cutting at pauses, the confidence and the way it is stored are ours."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from ..audio_utils_mel_llm import TruncatedAudioError, stream_audio
from ..evaluation.plugins import PREFIX, describe_callable
from ..evaluation.recognizers import PipelineRecognizer, load_recognizer
from ..transcription_mel_llm import split_audio, transcribe_clips
from ..whole_files import write_whole
from .dataset import CLIP_ERRORS, load_clip


logger = logging.get_logger(__name__)

JOURNAL, METADATA = "pseudo_labels.jsonl", "metadata.csv"
_COLUMNS = ("file_name", "text", "duration", "confidence", "model", "speaker", "recording", "start")
# Pieces at hand, of which those of a length are transcribed together
_BATCHES_AT_HAND = 8


# --- who listens ----------------------------------------------------------------------------------------------------------


class _Confidence:
    """The mean log-probability of the tokens that `generate` chooses, noted while it chooses them: to keep all scores would
    take a gigabyte for a large vocabulary."""

    def __init__(self, end_ids: Iterable[int], pad_id: int | None):
        self.end_ids, self.pad_id = list(end_ids), pad_id
        self.log_probs: torch.Tensor | None = None
        self.sums = self.counts = self.ended = None

    def see(self, scores: torch.Tensor) -> None:
        self.log_probs = scores.float().log_softmax(-1)
        if self.sums is None:
            self.sums, self.counts = self.log_probs.new_zeros(len(scores)), self.log_probs.new_zeros(len(scores))
            self.ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)

    def choose(self, tokens: torch.Tensor) -> None:
        tokens = tokens.to(self.log_probs.device)
        if self.pad_id is not None and self.pad_id not in self.end_ids:
            self.ended |= tokens == self.pad_id  # a row that something else has ended
        chosen = self.log_probs.gather(1, tokens[:, None])[:, 0]
        self.sums += torch.where(self.ended, 0.0, chosen)
        self.counts += (~self.ended).float()
        self.ended |= torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))

    def means(self) -> list[float]:
        return [] if self.sums is None else (self.sums / self.counts.clamp(min=1)).tolist()


class _SeeScores(LogitsProcessor):
    def __init__(self, confidence: _Confidence):
        self.confidence = confidence

    def __call__(self, input_ids, scores):
        self.confidence.see(scores)
        return scores


class _SeeChoice(StoppingCriteria):
    def __init__(self, confidence: _Confidence):
        self.confidence = confidence

    def __call__(self, input_ids, scores, **kwargs):
        self.confidence.choose(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Labeler:
    """A recogniser that takes a batch of clips and tells how sure it was.

    The confidence is the mean log-probability of the tokens that were chosen, greedily, with the end: 0 is certain. For
    CTC, of the places where the best path begins another letter. Of a Mel-LLM that is decoded with its CTC head it is what the
    language model alone makes of the tokens that both chose. A function has none (None).

    Args:
        spec (`str`): Folder or Hub name of a model for transformers' speech recognition pipeline, or
            `python:module.function`.
        language (`str`, *optional*): Language spoken, for models that can be told.
        device (`str`, *optional*): A GPU if there is one.
        dtype (`str`, defaults to `"auto"`): Of the weights.

    Raises:
        ImportError, OSError, ValueError: It cannot be loaded; the message says why.
    """

    def __init__(self, spec: str, language: str | None = None, device: str | None = None, dtype: str = "auto"):
        self.recognizer = load_recognizer(spec, language, device)
        self.description = describe_callable(self.recognizer)
        self.rate, self.max_seconds, self.has_confidence = 16000, 30.0, False
        if spec.startswith(PREFIX):
            self._kind = "function"
            return
        pipe = self.recognizer.pipeline
        if dtype != "auto":
            pipe.model.to(getattr(torch, dtype))
        self.rate = self.recognizer.rate
        if self.recognizer.processor is not None:
            self._kind = "mel_llm"
            self.max_seconds = pipe.model.config.audio_config.max_audio_seconds
        elif pipe.type == "ctc":
            self._kind = "ctc"
        else:  # with a language model beside CTC, the likeliest letters are not what is written
            self._kind = "generate" if pipe.model.can_generate() else "pipeline"
        self.has_confidence = self._kind in ("mel_llm", "ctc", "generate")

    @torch.no_grad()
    def __call__(self, clips: list[np.ndarray]) -> list[tuple[str, float | None]]:
        """Text and confidence of each waveform `(samples,)` at `rate` Hz."""
        if self._kind == "ctc":
            return self._ctc(clips)
        if not self.has_confidence:
            return [(self.recognizer(clip, self.rate).strip(), None) for clip in clips]
        pipe: Any = self.recognizer.pipeline
        config = pipe.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        confidence = _Confidence((end for end in ends if end is not None), config.pad_token_id)
        options = {
            "num_beams": 1,
            "do_sample": False,
            "logits_processor": LogitsProcessorList([_SeeScores(confidence)]),
            "stopping_criteria": StoppingCriteriaList([_SeeChoice(confidence)]),
        }
        recognizer: PipelineRecognizer = self.recognizer
        if self._kind == "mel_llm":
            texts = transcribe_clips(pipe.model, recognizer.processor, clips, recognizer.language, None, options)
        else:
            if recognizer.language is not None:
                options.update(language=recognizer.language, task="transcribe")
            ids = pipe.model.generate(**self._features(clips), **options)
            texts = pipe.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [(text.strip(), value) for text, value in zip(texts, confidence.means(), strict=True)]

    def _features(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        pipe = self.recognizer.pipeline
        # Whisper hears windows of 30 s, whatever is said
        padding = {} if self.recognizer.is_whisper else {"padding": True}
        inputs = pipe.feature_extractor(
            clips, sampling_rate=self.rate, return_tensors="pt", return_attention_mask=True, **padding
        )
        model = pipe.model
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _ctc(self, clips: list[np.ndarray]) -> list[tuple[str, float | None]]:
        pipe = self.recognizer.pipeline
        inputs = self._features(clips)
        if not getattr(pipe.feature_extractor, "return_attention_mask", True):
            inputs.pop("attention_mask", None)  # such models were trained on zeros behind the end, and without a mask
        log_probs = pipe.model(**inputs).logits.float().log_softmax(-1)
        values, ids = log_probs.max(-1)
        # Frames behind the end of a clip are padding
        lengths, longest = [len(clip) for clip in clips], max(len(clip) for clip in clips)
        places = [max(1, round(length * ids.shape[1] / longest)) for length in lengths]
        count = getattr(
            pipe.model, "_get_feat_extract_output_lengths", None
        )  # of wav2vec 2.0 and its kin, to the frame
        if count is not None and "input_values" in inputs:
            places = count(torch.tensor(lengths)).tolist()
        texts = pipe.tokenizer.batch_decode([row[:size] for row, size in zip(ids, places, strict=True)])
        blank = pipe.tokenizer.pad_token_id
        results = []
        for row, value, size, text in zip(ids, values, places, texts, strict=True):
            row = row[:size]
            begins = (row != blank) & torch.cat([row.new_ones(1, dtype=torch.bool), row[1:] != row[:-1]])
            chosen = value[:size][begins]
            results.append((text.strip(), float(chosen.mean()) if len(chosen) else float(value[:size].mean())))
        return results


# --- the run --------------------------------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """A stretch of a recording that waits for its transcript."""

    key: str
    number: int
    start: float
    samples: np.ndarray
    state: str | None


class PseudoLabels:
    r"""A folder that gets transcripts, and goes on where it was interrupted, at any time and in any way.

    * `pseudo_labels.jsonl` has a line for each piece that was transcribed, written when its batch is done.
    * `audio/` has the pieces, 16-bit FLAC; or none, with `in_place`.
    * `metadata.csv` is written at the end: `file_name, text, duration, confidence, model, speaker, recording, start`, of
      the pieces that are sure enough. With `in_place`, `audio_filepath` and `offset` in the place of `file_name`.

    Args:
        folder: Where the files go.
        place (`str`): What the recordings are from, for their names and for telling runs apart.
        settings (`dict`): Everything that the transcripts depend on, of JSON's types.
        labeler ([`Labeler`]): Who listens.
        min_confidence (`float`, *optional*): Pieces below are kept in the journal alone. Another one may be given later: it
            takes no transcribing.
        max_seconds, min_seconds (`float`): Of pieces; shorter ones are left out.
        in_place (`bool`, defaults to `False`): Name stretches of the recordings instead of copying them.

    Raises:
        FileExistsError: The folder holds something else, or its `metadata.csv` was edited.
        ValueError: An argument is out of range, or the recogniser has no confidence to compare.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        place: str,
        settings: dict[str, Any],
        labeler: Labeler,
        min_confidence: float | None = None,
        max_seconds: float = 30.0,
        min_seconds: float = 0.5,
        in_place: bool = False,
        batch_size: int = 8,
    ):
        if min_confidence is not None and not labeler.has_confidence:
            raise ValueError("--min_confidence: this recogniser does not tell how sure it is. Leave it out.")
        if batch_size < 1 or not 0 <= min_seconds < max_seconds:
            raise ValueError("`batch_size` must be at least 1, and `max_seconds` more than `min_seconds`.")
        self.folder, self.place, self.labeler = Path(folder), place, labeler
        self.min_confidence, self.min_seconds, self.max_seconds = min_confidence, min_seconds, max_seconds
        self.in_place, self.batch_size = in_place, batch_size
        settings = {**settings, "max_seconds": max_seconds, "min_seconds": min_seconds, "in_place": in_place}
        self.settings = json.loads(json.dumps(settings))
        self.labels: dict[str, dict[int, dict]] = {}  # by recording and number
        self.finished: dict[str, dict] = {}
        self.metadata_hashes: list[str] = []
        self.failed: dict[str, str] = {}
        self._read_journal()
        metadata = self.folder / METADATA
        if metadata.is_file() and _sha256(metadata.read_bytes()) not in self.metadata_hashes:
            raise FileExistsError(f"{metadata} was written or edited by somebody. Choose another --output_dir.")

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            if any(self.folder.iterdir()):
                raise FileExistsError(f"{self.folder} holds something else. Choose another --output_dir.")
            write_whole(path, json.dumps({"settings": self.settings}) + "\n")
            return
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = [json.loads(line) for line in data[:end].splitlines()]
        before = lines[0].get("settings") if lines else None
        if before != self.settings:
            names = sorted(
                key for key in {*(before or {}), *self.settings} if (before or {}).get(key) != self.settings.get(key)
            )
            raise FileExistsError(
                f"{self.folder} holds transcripts made with another {', '.join(names)}. Choose another --output_dir."
            )
        if end < len(data):  # the machine stopped while a line was written
            with open(path, "rb+") as file:
                file.truncate(end)
        for line in lines[1:]:
            if "metadata" in line:
                self.metadata_hashes.append(line["metadata"])
            elif "pieces" in line:
                self.finished[line["recording"]] = line
            else:
                self.labels.setdefault(line["recording"], {})[line["number"]] = line

    def _note(self, lines: Iterable[dict]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def run(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Transcribes what is not transcribed, and writes the metadata.

        Args:
            rows: With the columns of `mel_llm.training.sources`.

        Returns:
            `dict`: Counts and seconds: `recordings`, `pieces`, `kept`, `seconds`, `kept_seconds`, `transcribed`, `failed`.
        """
        from tqdm.auto import tqdm

        order: dict[str, dict] = {}
        waiting: list[_Piece] = []
        open_recordings: dict[str, dict] = {}  # cut to the end, with pieces that wait
        transcribed = 0
        for row in tqdm(rows, desc="Transcribing", unit="recording", disable=None):
            key = self._key(row, order)
            order[key] = row
            try:
                state = _state_of(row["audio"])
                self._check_state(key, state)
            except CLIP_ERRORS as error:
                self.finished.pop(key, None)
                self.failed[row["origin"]] = str(error)
                logger.warning(f"{row['origin']} is left out: {error}")
                continue
            if self._is_done(key, row):
                continue
            number, count, warning = 0, 0, None
            try:
                for piece in self._pieces(row):
                    if len(piece.samples) < self.min_seconds * self.labeler.rate:
                        continue
                    number, count = count, count + 1
                    start = round(piece.start, 4)
                    known = self.labels.get(key, {}).get(number)
                    if known is not None and known["start"] == start:
                        self._write_audio(key, known, piece.samples)
                        continue
                    waiting.append(_Piece(key, number, start, piece.samples, state))
                    if len(waiting) >= self.batch_size * _BATCHES_AT_HAND:
                        transcribed += self._transcribe(waiting)
                        self._close(open_recordings)
            except TruncatedAudioError as error:
                warning = str(error)
                logger.warning(f"{warning} What precedes is transcribed.")
            except CLIP_ERRORS as error:
                self.failed[row["origin"]] = str(error)
                logger.warning(f"{row['origin']} is left out: {error}")
                waiting = [piece for piece in waiting if piece.key != key]
                continue
            open_recordings[key] = {"recording": key, "pieces": count, "state": state}
            if warning:
                open_recordings[key]["warning"] = warning
        transcribed += self._transcribe(waiting)
        self._close(open_recordings)
        return {**self._write_metadata(order), "transcribed": transcribed, "failed": dict(self.failed)}

    def _key(self, row: dict[str, Any], seen: dict) -> str:
        """The recording's name within its source, and its place in it."""
        origin = row["origin"].removeprefix(f"{self.place}: ")
        place = os.path.abspath(os.path.expanduser(self.place))
        base = place if os.path.isdir(place) else os.path.dirname(place)
        key = os.path.relpath(origin, base) if os.path.isabs(origin) else origin
        if row.get("offset"):
            key += f"@{row['offset']:.12g}"
        if key in seen:
            raise ValueError(f"Two recordings are called {key!r}: their transcripts could not be told apart.")
        return key

    def _check_state(self, key: str, state: str | None) -> None:
        """Transcripts of one recording must not stand beside the sound of another of the same name."""
        lines = [*self.labels.get(key, {}).values(), *([self.finished[key]] if key in self.finished else [])]
        if any(line.get("state", state) != state for line in lines):
            raise ValueError(
                "the recording has changed since it was transcribed. Give it another name, or choose another --output_dir."
            )

    def _pieces(self, row: dict[str, Any]):
        rate = self.labeler.rate
        if row.get("offset") is None:
            blocks = stream_audio(row["audio"], rate)
        else:
            blocks = [load_clip(row["audio"], rate, row["offset"], row["duration"])]
        return split_audio(blocks, rate, max(1.0, self.max_seconds))

    def _transcribe(self, waiting: list[_Piece]) -> int:
        """Empties the list."""
        order = sorted(waiting, key=lambda piece: -len(piece.samples))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            lines = []
            for piece, (text, confidence) in zip(batch, self.labeler([p.samples for p in batch]), strict=True):
                line = {
                    "recording": piece.key,
                    "number": piece.number,
                    "start": piece.start,
                    "seconds": round(len(piece.samples) / self.labeler.rate, 4),
                    "text": " ".join(text.split()),
                    "confidence": None if confidence is None else round(confidence, 4),
                    "state": piece.state,
                }
                self._write_audio(piece.key, line, piece.samples)
                self.labels.setdefault(piece.key, {})[piece.number] = line
                lines.append(line)
            self._note(lines)
        count = len(waiting)
        waiting.clear()
        return count

    def _close(self, recordings: dict[str, dict]) -> None:
        """Notes the recordings whose pieces are all transcribed."""
        self._note(recordings.values())
        self.finished.update(recordings)
        recordings.clear()

    def _is_done(self, key: str, row: dict[str, Any]) -> bool:
        if key not in self.finished:
            return False
        labels = [self.labels[key][number] for number in range(self.finished[key]["pieces"])]
        return self.in_place or all(self._path(key, line).is_file() for line in labels if self._is_kept(line))

    def _is_kept(self, line: dict) -> bool:
        if not line["text"]:
            return False
        return self.min_confidence is None or line["confidence"] >= self.min_confidence

    def _path(self, key: str, line: dict) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        stem = re.sub(r"[^\w.-]+", "_", Path(key.partition("@")[0]).stem)[:60].strip(".") or "_"
        # A folder of a million files is slow on many systems
        return self.folder / "audio" / digest[:2] / f"{stem}-{digest}-{line['number']:05d}.flac"

    def _write_audio(self, key: str, line: dict, samples: np.ndarray) -> None:
        path = self._path(key, line)
        if self.in_place or not self._is_kept(line) or path.is_file():
            return
        import soundfile

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial-{path.name}")
        soundfile.write(partial, np.clip(samples, -1.0, 1.0), self.labeler.rate, format="FLAC", subtype="PCM_16")
        os.replace(partial, path)

    def _lines(self, order: dict[str, dict]) -> Iterator[tuple[str, dict, dict]]:
        for key, row in order.items():
            for number in range(self.finished.get(key, {"pieces": 0})["pieces"]):
                yield key, row, self.labels[key][number]

    def _write_metadata(self, order: dict[str, dict]) -> dict[str, Any]:
        summary = {"recordings": len(order), "pieces": 0, "kept": 0, "seconds": 0.0, "kept_seconds": 0.0}
        columns = [*_COLUMNS] if not self.in_place else ["audio_filepath", "offset", *_COLUMNS[1:]]
        file = io.StringIO(newline="")
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for key, row, line in self._lines(order):
            summary["pieces"] += 1
            summary["seconds"] += line["seconds"]
            if not self._is_kept(line):
                continue
            summary["kept"] += 1
            summary["kept_seconds"] += line["seconds"]
            speaker = (row.get("speaker") or "").removeprefix(f"{self.place}: ")
            table.writerow(
                {
                    "file_name": self._path(key, line).relative_to(self.folder).as_posix(),
                    "audio_filepath": os.path.abspath(row["audio"]["path"]) if row["audio"].get("path") else None,
                    "offset": round((row.get("offset") or 0.0) + line["start"], 4),
                    "text": line["text"],
                    "duration": line["seconds"],
                    "confidence": line["confidence"],
                    "model": self.settings.get("model"),
                    "speaker": speaker,
                    "recording": key,
                    "start": line["start"],
                }
            )
        content = file.getvalue().encode()
        path = self.folder / METADATA
        if not path.is_file() or path.read_bytes() != content:
            self._note([{"metadata": _sha256(content)}])  # first: what is there without a note is somebody else's
            write_whole(path, content)
        return summary


def _state_of(audio: dict[str, Any]) -> str | None:
    """Another one if another recording has come under the same name: of its size and its beginning, since a copy of a file
    has another time. None for what is neither a file nor bytes."""
    if audio.get("bytes") is not None:
        size, begin = len(audio["bytes"]), audio["bytes"][:65536]
    elif audio.get("path") and os.path.isfile(audio["path"]):
        size = os.path.getsize(audio["path"])
        with open(audio["path"], "rb") as file:
            begin = file.read(65536)
    else:
        return None
    return _sha256(str(size).encode() + begin)[:16]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


__all__ = ["Labeler", "PseudoLabels"]
