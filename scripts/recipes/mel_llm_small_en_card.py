"""Writes the card of hub_cards/mel-llm-small-en: what its files do not know, beside what they do.

    python scripts/recipes/mel_llm_small_en_card.py hub_cards/mel-llm-small-en docs/measured/mel-llm-small-en

The second folder has results.json and the model's scores/*.json, as scripts/evaluate_asr.py left them; its command is on the card.
"""

import csv
import json
import shutil
from pathlib import Path

from recipe_card import HELD_OUT, TEXTS, write_card
from transformers import pipeline

from mel_llm import load_audio


REAL = {
    "name": "asterisk-en",
    "license": "CC-BY-SA-3.0",
    "attribution": "English core sounds of Asterisk 1.6.1, © 2003-2010 Allison Smith (http://www.theivrvoice.com); financial "
    "contributions: Digium, Inc. Decoded from G.722; some transcripts corrected.",
}
SYNTHETIC = {
    "name": "synth-en",
    "license": "those of the engines",
    "attribution": "Synthetic speech of Kokoro-82M v1.0 (Apache-2.0), Piper's en_US-joe-medium (CC0), Flite 2.2's slt, awb and kal16 "
    f"(CMU's permissive licence) and espeak-ng 1.51 (its output is free), {TEXTS}",
}
VOICES = (
    "Piper's en_US-libritts_r-medium, 904 voices of LibriTTS-R (https://www.openslr.org/141, Koizumi et al. 2023; CC BY 4.0 by "
    "the name of the voice, whose own card was not at hand)"
)
SPLICED = [
    {
        "name": f"spliced-{row['name'].removesuffix('-en')}",
        "license": row["license"],
        "attribution": f"Words of the clips of {row['name']}, put together to sentences that nobody said. {row['attribution']}",
    }
    for row in (REAL, SYNTHETIC)
]
# A folder of clips of the 904 voices for each of the seeds 5, 7 and 8
MORE = [
    {"name": f"more-{engine}", "license": licence, "attribution": f"Synthetic speech of {voices}, {TEXTS}"}
    for engine, licence, voices in (
        *((name, "CC-BY-4.0", VOICES) for name in ("voices", "voices-7", "voices-8")),
        ("flite", "CMU's permissive licence", "Flite 2.2's slt, awb and kal16"),
        ("espeak", "free", "espeak-ng 1.51"),
    )
]


def more_of_joe(name: str) -> dict:
    return {
        "name": name,
        "license": "CC0",
        "attribution": "Synthetic speech of Piper's en_US-joe-medium (its data is CC0), spoken without chance (--piper_variation 0), "
        + TEXTS,
    }


DESCRIPTION = (
    "A small language model that writes down English speech, and the model that the demo of the package `mel_llm` comes with. "
    "Six layers of SmolLM2-135M-Instruct (0-2 and 27-29), with 4000 of its tokens, read log-mel frames at 25 audio tokens a "
    "second. **It is in training and no recogniser to rely on**: CPUs had some thirteen core-hours for it, from the bare language "
    "model, with almost only synthetic speech. It shows that the method and the training of the package work, how far that "
    "little takes them, and is a place to go on from. (What is said of its training below is the last of thirteen phases, the third at this "
    "token rate; the others are in `docs/results.md` of the package. In the last two the states of its audio tokens also learnt to predict "
    "those of Whisper base's encoder (MIT), which is no part of it.)"
)
INTENDED_USE = (
    "Trying the package out on a laptop; a starting point for further training; tests. Where transcripts matter, use another "
    "recogniser."
)
LIMITS = (
    "* **Voices.** All real speech in the training data is 14 minutes of one woman, a professional speaker; the real recordings in "
    "the table are hers, too. On other people, accents, rooms, noise and spontaneous speech it fails more often than in the table.\n"
    "* **It invents.** Where it does not understand, it writes words that nobody said, as language models do; the letters that its "
    "CTC head hears have a say in what it writes (`ctc_decoding_weight` in `config.json`), which makes that rarer.\n"
    "* **Words.** Its texts are telephone prompts, novels, the Bible and dictionaries of two kinds; names and recent words come "
    "out as something near.\n"
    "* **Numbers** are written as in the training data, mostly as words; capitals and punctuation are often wrong.\n"
    "* **As a language model** it can do nothing else: the layers that were taken away took that with them.\n"
    "* **It does not speak**; its sibling `mel-llm-small-en-continuation` does."
)
PEERS = {"judge.Whisper": "Whisper base (faster-whisper 1.2.1, int8, beam 5)"}
SAMPLES = ("en_vm-rec-temp", "en_conf-hasjoin", "en_privacy-to-blacklist-last-caller")


def add_samples(folder: Path) -> list[dict]:
    """Copies some recordings that the model was not trained on into its folder, and tells what it writes of each."""
    recogniser = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    target = folder / "samples"
    target.mkdir(exist_ok=True)
    with open(HELD_OUT / "metadata.csv", newline="", encoding="utf-8") as file:
        texts = {row["file_name"]: row["text"] for row in csv.DictReader(file)}
    samples = []
    for name in (f"{stem}.flac" for stem in SAMPLES):
        shutil.copyfile(HELD_OUT / name, target / name)
        heard = recogniser(load_audio(HELD_OUT / name))["text"]
        samples.append({"path": f"samples/{name}", "text": f"{texts[name]} It writes: {heard}"})
    return samples


def describe_peers(results: Path) -> str:
    """The error rates of other systems in the same evaluation, in a sentence."""
    sentences = []
    for system in json.loads(results.read_text(encoding="utf-8"))["models"]:
        if system["is_peer"]:
            rates = [f"{100 * part['totals']['wer']['value']:.2f} % on {part['name']}" for part in system["sets"]]
            sentences.append(
                f"{PEERS.get(system['name'], system['name'])} has error rates of {' and '.join(rates)} there."
            )
    return " ".join(sentences)


def details(folder: Path, measured: Path) -> dict:
    return {
        "description": DESCRIPTION,
        "data": [REAL, SYNTHETIC, *SPLICED, *MORE, more_of_joe("joe-a")],
        "samples": add_samples(folder),
        "evaluations": sorted(measured.glob("scores/*.json")),
        "intended_use": f"{INTENDED_USE} {describe_peers(measured / 'results.json')}",
        "limits": LIMITS,
    }


if __name__ == "__main__":
    write_card(__file__, __doc__.splitlines()[0], "results.json and scores/ of scripts/evaluate_asr.py", details)
