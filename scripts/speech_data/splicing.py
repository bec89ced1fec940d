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

from mel_llm import load_audio
from mel_llm.spelling import ctc_bytes

from .corpus import SAMPLING_RATE, read_metadata, write_clip, write_metadata
from .held_out import split_of


logger = logging.getLogger(__name__)

# Nats that a letter may cost in the alignment of a clip, and in that of each of its words
_WORST_CLIP, _WORST_WORD = 0.7, 2.0
_FADE_SECONDS = 0.008
# Of the window in which loudness is measured where a cut is looked for, and of its steps
_WINDOW_SECONDS, _STEP_SECONDS = 0.016, 0.004
_PAUSES = 0.4, (0.05, 0.3)  # how often there is a pause between two parts, and of how many seconds
_MAX_WORDS = 8
# Of a speaker with more clips than that, so many are cut: more would make nothing else of him
_CLIPS_OF_A_SPEAKER = 400
# Draws for one clip: after so many there is nothing that fits
_PATIENCE = 200


@dataclass(frozen=True)
class Cut:
    """A clip and where it can be cut: `places[i]` and `places[i + 1]` are the samples between which the word `i` is said."""

    path: Path
    words: tuple[str, ...]
    places: tuple[int, ...]
    row: dict[str, str]


# --- where words are ----------------------------------------------------------------------------------------------------


def align_letters(log_probs: np.ndarray, letters: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The likeliest places of letters.

    Args:
        log_probs (`np.ndarray` of shape `(places, 256)`): Of the CTC head; class 0 is the blank.
        letters (`list[int]`): Bytes, 1 to 255.

    Returns:
        The place at which each letter is spelt first, `(letters,)`, and its log-probability there; `None` if they do not fit.
    """
    labels = np.zeros(2 * len(letters) + 1, dtype=np.int64)
    labels[1::2] = letters
    skips = np.zeros(len(labels), dtype=bool)  # from one letter to the next, if it is another one, without a blank
    skips[3::2] = labels[3::2] != labels[1:-2:2]
    scores = np.full(len(labels), -np.inf)
    scores[:2] = log_probs[0, labels[:2]]
    steps = np.zeros((len(log_probs), len(labels)), dtype=np.int8)
    for place in range(1, len(log_probs)):
        ways = np.full((3, len(labels)), -np.inf)
        ways[0] = scores
        ways[1, 1:] = scores[:-1]
        ways[2, 2:] = np.where(skips[2:], scores[:-2], -np.inf)
        steps[place] = ways.argmax(0)
        scores = ways.max(0) + log_probs[place, labels]
    state = len(labels) - 1 - int(scores[-2:].argmax() == 0)
    if scores[state] == -np.inf:
        return None
    first = np.zeros(len(letters), dtype=np.int64)
    for place in range(len(log_probs) - 1, -1, -1):
        if state % 2:
            first[state // 2] = place
        state -= int(steps[place, state])
    return first, log_probs[first, letters]


def _quietest(audio: np.ndarray, start: int, end: int) -> int:
    """The sample of `audio` from `start` to `end` around which it is quietest."""
    half, step = round(_WINDOW_SECONDS * SAMPLING_RATE / 2), round(_STEP_SECONDS * SAMPLING_RATE)
    places = range(start, max(end, start + 1), step)
    return min(places, key=lambda place: float(np.square(audio[max(0, place - half) : place + half]).sum()))


def find_cuts(audio: np.ndarray, text: str, log_probs: np.ndarray) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """A clip's words, and the samples between which each is said: one more than there are words.

    A cut is where it is quietest between the last letter of a word and the first one of the next.

    Args:
        audio (`np.ndarray` of shape `(samples,)`), text (`str`): The clip, at 16 kHz, and what is said in it.
        log_probs (`np.ndarray` of shape `(places, 256)`): Of a CTC head, over all of the clip.

    Returns:
        `None` if the head does not hear the text, or not a word of it.
    """
    words: list[str] = []
    for word in text.split():  # what is not spoken, a dash for instance, belongs to the word before it
        if ctc_bytes(word) or not words:
            words.append(word)
        else:
            words[-1] += f" {word}"
    spelt = [ctc_bytes(word) for word in words]
    letters = [letter for word in spelt for letter in (32, *word)][1:]
    if not letters or not all(spelt) or letters != ctc_bytes(text):
        return None
    aligned = align_letters(log_probs, letters)
    if aligned is None or -aligned[1].mean() > _WORST_CLIP:
        return None
    ends = np.cumsum([len(word) + 1 for word in spelt])  # behind the space behind each word
    starts = [0, *ends[:-1]]
    if any(-aligned[1][start : end - 1].mean() > _WORST_WORD for start, end in zip(starts, ends, strict=True)):
        return None
    samples = len(audio) / len(log_probs)
    between = [
        _quietest(audio, round((aligned[0][end - 2] + 1) * samples), round(aligned[0][end] * samples))
        for end in ends[:-1]
    ]
    places = (0, *between, len(audio))
    return (tuple(words), places) if all(a < b for a, b in itertools.pairwise(places)) else None


def cut_corpus(folder: Path, model, processor, batch_size: int = 16) -> list[Cut]:
    """The clips of a corpus's `train` split that the model's CTC head hears well enough to know where each word is: of each
    speaker up to 400, from all over the corpus."""
    by_speaker: dict[str, list[dict[str, str]]] = {}
    for row in read_metadata(folder / "train"):
        if float(row["duration"]) <= model.config.audio_config.max_audio_seconds:
            by_speaker.setdefault(row.get("speaker") or "", []).append(row)
    rows = [row for of_one in by_speaker.values() for row in of_one[:: -(-len(of_one) // _CLIPS_OF_A_SPEAKER)]]
    rows.sort(key=lambda row: float(row["duration"]))  # clips of one length waste nothing
    cuts = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        clips = [load_audio(folder / "train" / row["file_name"], SAMPLING_RATE) for row in batch]
        heard = model.get_ctc_log_probs(**processor(audio=clips, sampling_rate=SAMPLING_RATE))
        for row, audio, log_probs, count in zip(batch, clips, *heard, strict=True):
            found = find_cuts(audio, row["text"], log_probs[:count].float().numpy())
            if found is not None:
                cuts.append(Cut(folder / "train" / row["file_name"], *found, row))
    logger.info(f"{folder}: {len(cuts)} of {len(rows)} clips can be cut.")
    return cuts


# --- clips --------------------------------------------------------------------------------------------------------------


def _faded(part: np.ndarray, at_start: bool, at_end: bool) -> np.ndarray:
    ramp = np.linspace(0, 1, min(round(_FADE_SECONDS * SAMPLING_RATE), len(part)), dtype=np.float32)
    part = part.copy()
    if at_start:
        part[: len(ramp)] *= ramp
    if at_end:
        part[len(part) - len(ramp) :] *= ramp[::-1]
    return part


def splice(cuts: list[Cut], seconds: float, generator: np.random.Generator) -> tuple[np.ndarray, str] | None:
    """A clip of parts of a speaker's clips, until it has so many `seconds`, and its text; `None` if that is a text of validation or
    test, or it came to one part alone."""
    parts: list[np.ndarray] = []
    words: list[str] = []
    length = num_parts = 0
    ends = np.cumsum([len(cut.words) for cut in cuts])  # each word begins a part as often as any other
    while length < seconds * SAMPLING_RATE:
        cut = cuts[int(np.searchsorted(ends, generator.integers(ends[-1]), side="right"))]
        first = int(generator.integers(len(cut.words)))
        last = min(len(cut.words), first + 1 + int(generator.integers(_MAX_WORDS)))
        audio = load_audio(cut.path, SAMPLING_RATE)[cut.places[first] : cut.places[last]]
        parts.append(_faded(audio, at_start=first > 0, at_end=last < len(cut.words)))
        share, (shortest, longest) = _PAUSES
        if generator.random() < share:
            pause = round(generator.uniform(shortest, longest) * SAMPLING_RATE)
            parts.append(np.zeros(pause, dtype=np.float32))
            length += pause
        words += cut.words[first:last]
        length += len(audio)
        num_parts += 1
    text = " ".join(words)
    if num_parts < 2 or split_of(text, cuts[0].row.get("language") or "en") != "train":
        return None
    return np.concatenate(parts), text


def _plan(
    cuts: list[Cut], hours: float, seconds: tuple[float, float], seed: int
) -> Iterator[tuple[Cut, np.ndarray, str]]:
    """Clips, each with a cut that says of whom it is. Every speaker speaks as often as every other."""
    by_speaker: dict[str, list[Cut]] = {}
    for cut in cuts:
        by_speaker.setdefault(cut.row.get("speaker") or "", []).append(cut)
    speakers = [of_one for of_one in by_speaker.values() if len(of_one) > 1]
    if not speakers:
        raise ValueError(
            "No speaker has two clips in which the model hears where the words are. Give more, or another --model."
        )
    made, failed, generator = 0, 0, np.random.default_rng(seed)
    while made < hours * 3600 * SAMPLING_RATE:
        of_one = speakers[generator.integers(len(speakers))]
        found = splice(of_one, generator.uniform(*seconds), generator)
        failed = failed + 1 if found is None else 0
        if failed == _PATIENCE:
            raise ValueError(f"{_PATIENCE} clips in a row would have been one part, or a text of validation or test.")
        if found is not None:
            made += len(found[0])
            yield of_one[0], *found


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
        hours (`float`), seconds: How much there shall be, and of what lengths: each clip has at least as many seconds as are drawn.
        seed (`int`), suffix (`str`): Of what is drawn; of the files.

    Raises:
        ValueError, FileExistsError: The model has no CTC head, a corpus none of what is needed, or there is something at `target`.
    """
    if target.exists():
        raise FileExistsError(f"--output_dir: {target} is there already. Give a new folder.")
    model, processor = (
        AutoModelForSpeechSeq2Seq.from_pretrained(model_name).eval(),
        AutoProcessor.from_pretrained(model_name),
    )
    cuts = [cut for corpus in corpora for cut in cut_corpus(corpus, model, processor)]
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    clips = partial / "train"
    clips.mkdir(parents=True)
    rows = []
    for cut, audio, text in _plan(cuts, hours, seconds, seed):
        name = f"spliced_{len(rows):06}{suffix}"
        write_clip(clips / name, audio)
        source = f"spliced:{cut.row.get('source', '')}"
        row = {"file_name": name, "text": text, "duration": len(audio) / SAMPLING_RATE, "source": source}
        rows.append({**row, "speaker": cut.row.get("speaker", ""), "language": cut.row.get("language", "")})
    write_metadata(clips, rows)
    _write_attribution(partial, corpora)
    partial.rename(target)
    logger.info(f"{target}: {len(rows)} clips, {sum(row['duration'] for row in rows) / 3600:.2f} h.")


def _write_attribution(folder: Path, corpora: list[Path]) -> None:
    """What was cut is passed on under its own terms, which lie beside each corpus or all of them."""
    text = "# Attribution: parts of other clips, put together\n\nNobody said these sentences: words were cut out of the clips below and joined.\n"
    places = [place for corpus in corpora for place in (corpus, corpus.parent)]
    attributions = [place / "ATTRIBUTION.md" for place in places if (place / "ATTRIBUTION.md").is_file()]
    for file in dict.fromkeys(attributions):
        text += "\n" + file.read_text(encoding="utf-8")
    for corpus in corpora:
        for place, name in itertools.product((corpus, corpus.parent), ("LICENCE", "LICENCES")):
            source, target = place / name, folder / f"{name}.{corpus.name}"
            if source.is_file():
                shutil.copyfile(source, target)
            elif source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
    (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


__all__ = ["Cut", "align_letters", "cut_corpus", "find_cuts", "make_spliced", "splice"]
