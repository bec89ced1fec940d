"""New clips out of parts of others: words that a speaker said in one sentence, behind words of another one.

Ours, after the aligned data augmentation of Lam et al. (2021, https://arxiv.org/abs/2104.01393). Where there is little speech a
model learns its sentences by heart, and then what it hears matters little. Sentences that nobody ever said it can only hear.
"""

import itertools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from mel_llm import MelLLMConfig, load_audio

from .check import is_licence
from .corpus import METADATA, SAMPLING_RATE, new_corpus, read_metadata, write_clip, write_metadata
from .held_out import split_of
from .word_cuts import find_cuts


logger = logging.getLogger(__name__)

# Of a speaker with more clips than that, so many are cut: more would make nothing else of him
_CLIPS_OF_A_SPEAKER = 400
_MAX_WORDS = 8
_FADE_SECONDS = 0.008
_PAUSES = 0.4, (0.05, 0.3)  # how often there is a pause between two parts, and of how many seconds
# Draws for one clip: after so many there is nothing that fits
_PATIENCE = 200
_UNVERIFIED = "?unverified"


@dataclass(frozen=True)
class CutClip:
    """A clip and where it can be cut: `places[i]` and `places[i + 1]` are the samples between which the word `i` is said."""

    path: Path
    words: tuple[str, ...]
    places: tuple[int, ...]
    corpus: str
    speaker: str
    language: str
    source: str


# --- what there is ------------------------------------------------------------------------------------------------------


def _train_split(corpus: Path) -> Path:
    for folder in (corpus / "train", corpus):
        if (folder / METADATA).is_file():
            return folder
    raise FileNotFoundError(f"--corpora: {corpus} has no {METADATA}, neither in train/ nor at its top.")


def _seconds_of(row: dict[str, str], path: Path) -> float:
    """What the row says, or else the file."""
    import soundfile

    try:
        return float(row.get("duration") or soundfile.info(path).duration)
    except (ValueError, soundfile.LibsndfileError) as error:
        raise ValueError(f"--corpora: {path} has no duration that can be read: {error}") from None


def cut_corpus(corpus: Path, model, processor, batch_size: int = 16) -> list[CutClip]:
    """The clips of a corpus's `train` split that the model's CTC head hears well enough to know where each word is: of each
    speaker up to 400, from all over the corpus.

    Raises:
        FileNotFoundError, ValueError: The corpus has no such split, or a clip that cannot be read.
    """
    config = model.config.audio_config
    folder = _train_split(corpus)
    by_speaker: dict[str, list[tuple[float, dict[str, str]]]] = {}
    num_long = 0
    for row in read_metadata(folder):
        seconds = _seconds_of(row, folder / row["file_name"])
        if seconds > config.max_audio_seconds:
            num_long += 1
        elif row.get("text"):
            by_speaker.setdefault(row.get("speaker") or "", []).append((seconds, row))
    if "" in by_speaker:
        logger.warning(f"{corpus}: clips of no named speaker are taken for those of one.")
    chosen = []
    for of_one in by_speaker.values():
        places = np.linspace(0, len(of_one) - 1, min(len(of_one), _CLIPS_OF_A_SPEAKER)).round().astype(int)
        chosen += [of_one[place] for place in places]
    chosen.sort(key=lambda clip: clip[0])  # clips of one length waste nothing
    clips: list[CutClip] = []
    samples_per_place = config.hop_length * config.reduction_factor / config.ctc_rate
    for start in range(0, len(chosen), batch_size):
        rows = [row for _, row in chosen[start : start + batch_size]]
        paths = [folder / row["file_name"] for row in rows]
        audios = [load_audio(path, SAMPLING_RATE) for path in paths]
        heard = model.get_ctc_log_probs(**processor(audio=audios, sampling_rate=SAMPLING_RATE))
        for row, path, audio, log_probs, count in zip(rows, paths, audios, *heard, strict=True):
            found = find_cuts(audio, row["text"], log_probs[:count].float().cpu().numpy(), samples_per_place)
            if found is not None:
                kept = (row.get(name) or "" for name in ("speaker", "language", "source"))
                clips.append(CutClip(path, *found, corpus.name, *kept))
    too_long = (
        f"; {num_long} more are longer than the {config.max_audio_seconds:g} s that the model hears"
        if num_long
        else ""
    )
    logger.info(f"{corpus}: {len(clips)} of {len(chosen)} clips can be cut{too_long}.")
    return clips


# --- clips --------------------------------------------------------------------------------------------------------------


def _faded(part: np.ndarray, at_start: bool, at_end: bool) -> np.ndarray:
    ramp = np.linspace(0, 1, min(round(_FADE_SECONDS * SAMPLING_RATE), len(part)), dtype=np.float32)
    part = part.copy()
    if at_start:
        part[: len(ramp)] *= ramp
    if at_end:
        part[len(part) - len(ramp) :] *= ramp[::-1]
    return part


def splice(
    clips: list[CutClip], seconds: float, longest: float, generator: np.random.Generator
) -> tuple[np.ndarray, str, list[CutClip]] | None:
    """A clip of parts of a speaker's clips.

    Args:
        clips (`list[CutClip]`): What the speaker said.
        seconds (`float`), longest (`float`): Parts are added until there are so many seconds, and none with which there would be
            more than `longest`.

    Returns:
        The waveform `(samples,)`, its text, and the clips that it has parts of; `None` if it came to less than two parts, or the
        text is one of validation or test.
    """
    parts: list[np.ndarray] = []
    words: list[str] = []
    used: list[CutClip] = []
    length, most = 0, round(longest * SAMPLING_RATE)
    ends = np.cumsum([len(clip.words) for clip in clips])  # each word begins a part as often as any other
    while length < seconds * SAMPLING_RATE:
        clip = clips[int(np.searchsorted(ends, generator.integers(ends[-1]), side="right"))]
        first = int(generator.integers(len(clip.words)))
        last = min(len(clip.words), first + 1 + int(generator.integers(_MAX_WORDS)))
        while last > first and length + clip.places[last] - clip.places[first] > most:
            last -= 1
        if last == first:  # not a word more
            break
        audio = load_audio(clip.path, SAMPLING_RATE)[clip.places[first] : clip.places[last]]
        parts.append(_faded(audio, at_start=first > 0, at_end=last < len(clip.words)))
        words += clip.words[first:last]
        used.append(clip)
        length += len(audio)
        share, bounds = _PAUSES
        if generator.random() < share:
            pause = min(round(generator.uniform(*bounds) * SAMPLING_RATE), most - length)
            parts.append(np.zeros(pause, dtype=np.float32))
            length += pause
    text = " ".join(words)
    if len(used) < 2 or split_of(text, clips[0].language or "en") != "train":
        return None
    return np.concatenate(parts), text, used


def spliced_clips(
    clips: list[CutClip], hours: float, seconds: tuple[float, float], seed: int
) -> Iterator[tuple[np.ndarray, str, list[CutClip]]]:
    """What [`splice`] makes until there are so many hours. A clip has one speaker, of one corpus and language, and every speaker
    speaks as often as every other.

    Raises:
        ValueError: There is nothing to splice, or nothing that comes out may be used.
    """
    by_speaker: dict[tuple[str, str, str], list[CutClip]] = {}
    for clip in clips:
        by_speaker.setdefault((clip.corpus, clip.language, clip.speaker), []).append(clip)
    speakers = [of_one for of_one in by_speaker.values() if len(of_one) > 1]
    if not speakers:
        raise ValueError(
            "--corpora: no speaker has two clips in which the model hears where the words are. Give more, or another --model."
        )
    made = failed = 0
    generator = np.random.default_rng(seed)
    while made < hours * 3600 * SAMPLING_RATE:
        of_one = speakers[generator.integers(len(speakers))]
        found = splice(of_one, generator.uniform(*seconds), seconds[1], generator)
        failed = failed + 1 if found is None else 0
        if failed == _PATIENCE:
            raise ValueError(
                f"{_PATIENCE} clips in a row came to less than two parts, or to a text of validation or test. Give more --seconds, or "
                "more --corpora."
            )
        if found is not None:
            made += len(found[0])
            yield found


# --- a corpus of them ---------------------------------------------------------------------------------------------------


def _load(name: str):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(name).eval()
    if not isinstance(model.config, MelLLMConfig) or model.ctc_head is None:
        raise ValueError(
            f"--model: {name} is no Mel-LLM with a CTC head (`ctc_weight`), which would know where words are."
        )
    rate = model.config.audio_config.sampling_rate
    if rate != SAMPLING_RATE:
        raise ValueError(f"--model: {name} hears audio at {rate} Hz, and corpora are made at {SAMPLING_RATE}.")
    return model, AutoProcessor.from_pretrained(name)


def make_spliced(
    corpora: list[Path],
    target: Path,
    model_name: str,
    hours: float,
    seconds: tuple[float, float] = (2.0, 12.0),
    seed: int = 0,
    suffix: str = ".flac",
) -> None:
    """Writes a corpus of spliced clips, which appears whole or not at all.

    Args:
        corpora (`list[Path]`): Whose `train` splits are cut.
        target (`Path`): A new folder.
        model_name (`str`): A Mel-LLM with a CTC head, which knows where words are.
        hours (`float`), seconds: How much there shall be, and from how many to how many seconds a clip has.
        seed (`int`), suffix (`str`): Of what is drawn; of the files.

    Raises:
        ValueError, OSError: The model has no CTC head, a corpus none of what is needed, or there is something at `target`.
    """
    if target.exists():
        raise FileExistsError(f"--output_dir: {target} is there already. Give a new folder.")
    corpora = [corpus.resolve() for corpus in corpora]
    for corpus in corpora:
        _train_split(corpus)
    with new_corpus(target) as partial:
        _copy_licences(corpora, partial)
        model, processor = _load(model_name)
        clips = [clip for corpus in corpora for clip in cut_corpus(corpus, model, processor)]
        (partial / "train").mkdir()
        rows = []
        for audio, text, used in spliced_clips(clips, hours, seconds, seed):
            name = f"spliced_{len(rows):06}{suffix}"
            write_clip(partial / "train" / name, audio)
            is_unverified = any(clip.source.endswith(_UNVERIFIED) for clip in used)
            source = f"spliced:{used[0].corpus}{_UNVERIFIED if is_unverified else ''}"
            row = {"file_name": name, "text": text, "duration": len(audio) / SAMPLING_RATE, "source": source}
            rows.append({**row, "speaker": used[0].speaker, "language": used[0].language})
        write_metadata(partial / "train", rows)
    logger.info(f"{target}: {len(rows)} clips, {sum(row['duration'] for row in rows) / 3600:.2f} h.")


def _copy_licences(corpora: list[Path], folder: Path) -> None:
    """What is cut is passed on under its own terms: those that lie beside a corpus, or else beside all of them."""
    lines = [
        "# Attribution: parts of other clips, put together",
        "",
        "Nobody said these sentences. Words were cut out of clips of",
    ]
    for number, corpus in enumerate(corpora):
        places = ([file for file in sorted(place.iterdir()) if is_licence(file)] for place in (corpus, corpus.parent))
        found = next(filter(None, places), [])
        lines.append(f"\n* {corpus.name}, whose terms are in LICENCES/{number}-{corpus.name}.")
        if not found:
            lines[-1] = f"\n* {corpus.name}, of which no terms are known."
            logger.warning(
                f"{corpus}: there is no ATTRIBUTION.md or licence beside it; do not pass on what comes out."
            )
        for source in itertools.chain.from_iterable(
            sorted(file.rglob("*")) if file.is_dir() else [file] for file in found
        ):
            if source.is_file():
                top = corpus if source.is_relative_to(corpus) else corpus.parent
                copy = folder / "LICENCES" / f"{number}-{corpus.name}" / source.relative_to(top)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
    (folder / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


__all__ = ["CutClip", "cut_corpus", "make_spliced", "splice", "spliced_clips"]
