"""The corpora asterisk-en, -es, -fr, -it and -ru: telephone prompts, each language read by one person.

From the Debian packages asterisk-core-sounds-XX-g722 (sound) and asterisk-core-sounds-XX (what is said). The tables beside
this file were made for version 1.6.1: `asterisk_cuts.tsv` says where the prompts of more than 29 s are cut, at pauses
between sentences, and `asterisk_left_out.tsv` which prompts are left out because what is written is not what is said, or
only part of it.
"""

import csv
import gzip
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mel_llm.whole_files import write_whole

from .attribution import ASTERISK, asterisk_attribution
from .corpus import METADATA, SAMPLING_RATE, SPLITS, new_corpus, write_clip, write_metadata
from .debian import find_packages, package_version, read_package
from .held_out import normalize_text, split_of


logger = logging.getLogger("prepare_data")

LANGUAGES = tuple(ASTERISK)
MAX_SECONDS = 29.0

_KNOWN_VERSION = "1.6.1-1"
_SILENT_PEAK = 0.01  # of full scale; the quietest spoken prompt has 0.1
# Their transcripts follow from the files' names and nobody compared them with the sound, but in English
_UNVERIFIED_FOLDERS = ("digits", "letters", "phonetic")
# Typing errors of the transcripts that are no other word
_ENGLISH_CORRECTIONS = {
    "umute": "unmute",
    "represenatives": "representatives",
    "Un-indentified": "Unidentified",
    "witheld": "withheld",
    "De-activated": "Deactivated",
    "fourtieth": "fortieth",
    "exclaimation-point": "exclamation point",
    "*": "star",
    "#": "pound",
}


@dataclass
class Prompt:
    """A recording with its text, before it is written: `audio` is `(samples,)`, int16."""

    name: str
    text: str
    audio: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLING_RATE


def prepare_asterisk(
    language: str,
    output_dir: Path,
    decode: Callable[[bytes], np.ndarray],
    debs: Path | None = None,
    suffix: str = ".flac",
) -> Path:
    """Writes the corpus of one language, whole or not at all.

    Args:
        language (`str`): One of [`LANGUAGES`].
        output_dir (`Path`): Gets a folder `asterisk-LANGUAGE`.
        decode: G.722 to `(samples,)`, int16; see [`find_g722_decoder`].
        debs (`Path`, *optional*): Folder with the two .deb files; downloaded by `apt-get` without.
        suffix (`str`, defaults to `".flac"`): `.flac`, `.ogg` (Opus) or `.wav`.

    Returns:
        The folder.

    Raises:
        FileExistsError: It is there already.
        ValueError, OSError: The packages are not to be had, or are not what they should be.
    """
    target = output_dir / f"asterisk-{language}"
    if target.exists():
        raise FileExistsError(f"{target} exists already. Remove it, or give another --output_dir.")
    with new_corpus(target) as partial:
        documents = f"asterisk-core-sounds-{language}"
        sounds = f"{documents}-g722"
        packages = find_packages([sounds, documents], debs, download_to=partial)
        version = package_version(packages[sounds])
        if version != _KNOWN_VERSION:
            logger.warning(f"{sounds} is {version}; what is known of the prompts is known of {_KNOWN_VERSION}.")
        transcripts = read_transcripts(packages[documents], language)
        speaker, recordings = read_recordings(packages[sounds])
        left_out: Counter[str] = Counter()
        prompts = select_prompts(language, transcripts, recordings, decode, left_out)
        rows = _write_prompts(language, prompts, partial, suffix, speaker, f"debian:{sounds}_{version}", left_out)
        licence = read_package(packages[sounds], "usr/share/doc/[^/]+/copyright")
        write_whole(partial / "LICENCE", b"\n".join(licence.values()))
        write_whole(partial / "ATTRIBUTION.md", asterisk_attribution(language, version, suffix))
        for package in partial.glob("*.deb"):
            package.unlink()
    counts = ", ".join(f"{split} {len(rows[split])}" for split in SPLITS)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    logger.info(f"{target}: {counts}. Left out: {reasons or 'nothing'}.")
    return target


def read_transcripts(package: Path, language: str) -> dict[str, str]:
    """Name of a prompt to its text as the package has it. The first of several lines with a name counts."""
    files = read_package(package, f"usr/share/doc/[^/]+/core-sounds-{language}.txt(.gz)?")
    if not files:
        raise ValueError(f"{package} has no transcripts core-sounds-{language}.txt.gz in it.")
    name, data = next(iter(files.items()))
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8-sig")
    transcripts: dict[str, str] = {}
    for line in text.splitlines():
        prompt, colon, said = line.partition(":")
        if colon and not line.startswith(";"):
            transcripts.setdefault(prompt.strip(), said.strip())
    return transcripts


def read_recordings(package: Path) -> tuple[str, dict[str, bytes]]:
    """The speaker, as the package calls its folder, and name of a prompt to G.722."""
    files = read_package(package, r"usr/share/asterisk/sounds/[^/]+/.+\.g722")
    speakers = {path.split("/")[4] for path in files}
    if len(speakers) != 1:
        raise ValueError(f"{package} should hold the prompts of one speaker, got {sorted(speakers)}.")
    speaker = speakers.pop()
    beginning = len(f"usr/share/asterisk/sounds/{speaker}/")
    return speaker, {path[beginning : -len(".g722")]: data for path, data in sorted(files.items())}


def select_prompts(
    language: str,
    transcripts: dict[str, str],
    recordings: dict[str, bytes],
    decode: Callable[[bytes], np.ndarray],
    left_out: Counter[str],
) -> Iterator[Prompt]:
    """What is speech with a transcript, in pieces of at most 29 s; `left_out` counts the rest by reason."""
    cuts, wrong = _read_cuts(language), _read_left_out(language)
    for name, data in recordings.items():
        text = clean_text(transcripts.get(name, ""), language)
        if name not in transcripts:
            left_out["without a transcript"] += 1
        elif not normalize_text(text):
            left_out["tones, silence and noises"] += 1
        elif name in wrong:
            left_out["whose transcript is not what is said"] += 1
        else:
            prompt = Prompt(name, text, decode(data))
            if not len(prompt.audio) or np.abs(prompt.audio.astype(np.int32)).max() < _SILENT_PEAK * 32768:
                left_out["tones, silence and noises"] += 1
            elif name in cuts:
                yield from _cut(prompt, cuts[name])
            elif prompt.seconds > MAX_SECONDS:
                left_out[f"longer than {MAX_SECONDS:.0f} s"] += 1
            else:
                yield prompt


def clean_text(text: str, language: str) -> str:
    """What is said, of what is written: without notes in brackets, ellipses and quotation marks around the whole."""
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", " ", text)
    text = re.sub(r"\.{3,}|…", " ", text)
    text = re.sub("[«»“”]", "", text)
    if language != "en" or text.count('"') % 2:  # one end of a quotation that has no other
        text = text.replace('"', "")
    if language == "en":
        for wrong, right in _ENGLISH_CORRECTIONS.items():
            text = text.replace(wrong, right)
    text = " ".join(text.split()).rstrip(" ,")
    # Letters of the alphabet stay as they are
    return text[:1].upper() + text[1:] if language == "en" and len(text) > 1 else text


def split_prompt_sentences(text: str) -> list[str]:
    """Sentences, numbered as in the table of cuts."""
    return re.split(r"(?<=[.!?])\s+", text)


def _cut(prompt: Prompt, cuts: list[dict[str, str]]) -> Iterator[Prompt]:
    sentences = split_prompt_sentences(prompt.text)
    for row in cuts:
        first, last = int(row["first_sentence"]), int(row["last_sentence"])
        begin, end = (round(float(row[key]) * SAMPLING_RATE) for key in ("begin", "end"))
        yield Prompt(
            f"{prompt.name}#part{first}", " ".join(sentences[first : last + 1]), prompt.audio[begin : end or None]
        )


def _write_prompts(
    language: str,
    prompts: Iterator[Prompt],
    folder: Path,
    suffix: str,
    speaker: str,
    origin: str,
    left_out: Counter[str],
) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        (folder / split).mkdir()
    for prompt in prompts:
        split = split_of(prompt.text, language)
        if split not in rows:
            left_out["reserved"] += 1
            continue
        file_name = f"{language}_{prompt.name.replace('/', '_').replace('#', '_')}{suffix}"
        write_clip(folder / split / file_name, prompt.audio)
        unverified = language != "en" and prompt.name.split("/")[0] in _UNVERIFIED_FOLDERS
        rows[split].append(
            {
                "file_name": file_name,
                "text": prompt.text,
                "speaker": speaker,
                "language": language,
                "duration": prompt.seconds,
                "source": f"{origin}/{prompt.name}{'?unverified' if unverified else ''}",
            }
        )
    for split, of_split in rows.items():
        write_metadata(folder / split, of_split)
        if not of_split:
            logger.warning(f"asterisk-{language}: {split} is empty ({METADATA} has no row).")
    return rows


def _read_table(name: str, language: str) -> list[dict[str, str]]:
    with open(Path(__file__).with_name(name), newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == language]


def _read_cuts(language: str) -> dict[str, list[dict[str, str]]]:
    cuts: dict[str, list[dict[str, str]]] = {}
    for row in _read_table("asterisk_cuts.tsv", language):
        cuts.setdefault(row["prompt"], []).append(row)
    return cuts


def _read_left_out(language: str) -> set[str]:
    return {row["prompt"] for row in _read_table("asterisk_left_out.tsv", language)}


__all__ = ["LANGUAGES", "clean_text", "prepare_asterisk", "split_prompt_sentences"]
