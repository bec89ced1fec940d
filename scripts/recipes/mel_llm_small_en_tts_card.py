"""Writes the card of hub_cards/mel-llm-small-en-tts: what its files do not know, beside what they do.

    python scripts/recipes/mel_llm_small_en_tts_card.py hub_cards/mel-llm-small-en-tts docs/measured/mel-llm-small-en-tts

The second folder has results.json, as scripts/evaluate_tts.py left it; its command is on the card. The samples are spoken here.
"""

from pathlib import Path

from mel_llm_small_en_card import MORE as READERS_MORE
from mel_llm_small_en_card import REAL
from mel_llm_small_en_card import SYNTHETIC as READERS_SYNTHETIC
from recipe_card import TEXTS, write_card
from transformers import pipeline

from mel_llm import MelLLMProcessor


VOICE = "Synthetic speech of Piper's en_US-joe-medium (its data is CC0)"
DATA = [
    {"name": "synth-en", "license": "CC0", "attribution": f"{VOICE}, {TEXTS}"},
    *(
        {
            "name": name,
            "license": "CC0",
            "attribution": f"{VOICE}, spoken without chance (--piper_variation 0), {TEXTS}",
        }
        for name in ("joe-a", "joe-b")
    ),
]
READERS = "What mel-llm-small-en, the reader that this model goes back to, had learnt from: " + " ".join(
    f"{row['name']} ({row['license']}): {row['attribution']}" for row in (REAL, READERS_SYNTHETIC, *READERS_MORE)
)
DESCRIPTION = (
    "A small language model that reads English texts aloud, and the voice of the demo of the package `mel_llm`. It began as "
    "`mel-llm-small-en`, the reader of the same package: six layers of SmolLM2-135M-Instruct that had learnt to hear. It writes log-mel "
    "frames, eight at a time, from texts letter by letter, and Griffin-Lim makes them sound. **It is in training and no voice to rely on**: two "
    "CPU cores had an hour and a half for it, with fifteen hours of one synthetic voice. It shows that the method and the training of the "
    "package work, how far that little takes them, and is a place to go on from. (What is said of its training below is the last of five "
    "phases; the others are in `docs/results.md` of the package.)"
)
INTENDED_USE = "Trying the package out on a laptop; a starting point for further training; tests."
LIMITS = (
    "* **Words.** It leaves out, repeats or mumbles words, most of all in long sentences, and says some that are not there.\n"
    "* **One voice**, that of a synthesiser, Piper's en_US-joe-medium; voice prompts were no part of its training.\n"
    "* **Sound.** 16 kHz, through Griffin-Lim, which one hears.\n"
    "* **Texts.** It has heard novels, the Bible, dictionaries of two kinds and sentences about times, sums and journeys; numbers in "
    "digits and abbreviations it has hardly heard.\n"
    "* **It does not read any more**: what its first form knew of that was not kept up.\n"
    "* **Further training** goes on without the CTC term that it learnt its place in a text by, whose head is not in these files."
)
SAMPLES = (
    "Please enter your number, followed by the pound key.",
    "The total comes to twenty dollars and fifteen cents.",
    "She was very glad to see him, and asked him to sit down.",
)


def add_samples(folder: Path) -> list[dict]:
    """Speaks some sentences into the model's folder."""
    speaker = pipeline("text-to-speech", model=str(folder), device="cpu")
    processor = MelLLMProcessor.from_pretrained(folder)
    target = folder / "samples"
    target.mkdir(exist_ok=True)
    samples = []
    for number, text in enumerate(SAMPLES, start=1):
        speech = speaker(text, forward_params={"seed": 0})
        name = f"samples/{number}.flac"
        processor.save_audio(speech["audio"].squeeze(), str(folder / name), sampling_rate=speech["sampling_rate"])
        samples.append({"path": name, "text": text})
    return samples


def details(folder: Path, measured: Path) -> dict:
    return {
        "description": DESCRIPTION,
        "data": DATA,
        "attribution": READERS,
        "samples": add_samples(folder),
        "evaluations": [measured / "results.json"],
        "intended_use": INTENDED_USE,
        "limits": LIMITS,
    }


if __name__ == "__main__":
    write_card(__file__, __doc__.splitlines()[0], "results.json of scripts/evaluate_tts.py", details)
