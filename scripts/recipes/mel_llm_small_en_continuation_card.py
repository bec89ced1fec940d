"""Writes the card of hub_cards/mel-llm-small-en-continuation: what its files do not know, beside what they do.

    python scripts/recipes/mel_llm_small_en_continuation_card.py hub_cards/mel-llm-small-en-continuation \\
        docs/measured/mel-llm-small-en-continuation

The second folder has what the evaluation scripts left: continuation.json (scripts/evaluate_continuation.py), results.json
(scripts/evaluate_tts.py) and scores/*.json (scripts/evaluate_asr.py), with their commands, and prompts/*.flac, the beginnings of
recordings that the samples go on with.
"""

import shutil
from pathlib import Path

from mel_llm_small_en_card import MORE, REAL, SYNTHETIC, more_of_joe
from recipe_card import write_card
from transformers import pipeline

from mel_llm import MelLLMProcessor


DATA = [SYNTHETIC, more_of_joe("joe-a"), more_of_joe("joe-b")]
READERS_MORE = [row for row in MORE if row["name"] in ("more-voices", "more-flite", "more-espeak")]
READERS = "What the earlier form of mel-llm-small-en, to which this model goes back, had learnt from: " + " ".join(
    f"{row['name']} ({row['license']}): {row['attribution']}" for row in (REAL, SYNTHETIC, *READERS_MORE)
)
DESCRIPTION = (
    "A small language model that speaks: it reads English texts aloud, and it goes on with what it hears. It is the voice of the demo of "
    "the package `mel_llm`. Texts go in letter by letter, log-mel frames come out eight at a time, and a small vocoder, which was trained "
    "on nine hours of this voice (by spectral losses alone, 6000 steps) and is a part of the model, makes them sound. To go on, it writes down the beginning of a sentence, invents the rest, and speaks "
    "what it invented, in one pass of decoding: SPECTRON's task (arXiv 2305.15255) in this package's own form, without a speech "
    'encoder and with Mel-LLM\'s VAE head. It also reads the voice it speaks in (`task="transcribe"`). It began as an earlier form of '
    "`mel-llm-small-en`, the reader of the same package: six layers of SmolLM2-135M-Instruct that had learnt to hear. **It is in training and no voice to rely on**: "
    "CPUs had some six core-hours for it, with fifteen hours of one synthetic voice to speak in. It shows that all three tasks can be trained from end to "
    "end with little, how far that little takes them, and is a place to go on from. (What is said of its training below is the last of seven "
    "phases; the others are in `docs/results.md` of the package.)"
)
INTENDED_USE = "Trying the package and its tasks out on a laptop; a starting point for further training; tests."
LIMITS = (
    "* **Words.** When it reads aloud it mumbles, repeats or leaves out words, most of all in long sentences; and what it says of what it "
    "invented is not always what it wrote. The error rates tell how often.\n"
    "* **One voice**, that of a synthesiser, Piper's en_US-joe-medium, at 16 kHz: it hears that voice best, and goes on in it whoever begins. "
    "Voice prompts were no part of its training.\n"
    "* **Texts.** It has heard novels, the Bible, dictionaries of two kinds and sentences about times, sums and journeys; numbers in "
    "digits and abbreviations it has hardly heard.\n"
    "* **What it invents makes little sense.** Six layers that know letters and no words have learnt English from twenty thousand sentences "
    "of these kinds. What is written down of the prompt is often wrong, too.\n"
    "* **Prompts** of 1 to 3.5 seconds, which may end within a word, are what it was trained on.\n"
    "* **It answers no questions.** There were none in its training."
)
SENTENCES = (
    "Please enter your number, followed by the pound key.",
    "The total comes to twenty dollars and fifteen cents.",
    "She was very glad to see him, and asked him to sit down.",
)


def add_samples(folder: Path, measured: Path) -> list[dict]:
    """In the model's folder: sentences that it reads aloud, and what it makes of each prompt, of all that there are."""
    speaker = pipeline("text-to-speech", model=str(folder), device="cpu")
    continuer = pipeline("speech-continuation", model=str(folder), device="cpu")
    processor = MelLLMProcessor.from_pretrained(folder)
    target = folder / "samples"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()

    def save(name: str, said: dict) -> str:
        place = f"samples/{name}.flac"
        processor.save_audio(said["audio"].squeeze(), str(folder / place), sampling_rate=said["sampling_rate"])
        return place

    samples = []
    for number, text in enumerate(SENTENCES, start=1):
        said = speaker(text, forward_params={"seed": 0})
        samples.append({"path": save(f"spoken-{number}", said), "text": f"read aloud: {text}"})
    for prompt in sorted((measured / "prompts").glob("*.flac")):
        shutil.copyfile(prompt, target / prompt.name)
        said = continuer(str(prompt), seed=0)
        samples.append({"path": f"samples/{prompt.name}", "text": "a prompt, of synth-en, split test"})
        told = f"what the model makes of it. It writes: {said['text']}"
        samples.append({"path": save(f"{prompt.stem}-continued", said), "text": told})
    return samples


def details(folder: Path, measured: Path) -> dict:
    return {
        "description": DESCRIPTION,
        "pipeline_tag": "text-to-speech",
        "data": DATA,
        "attribution": READERS,
        "samples": add_samples(folder, measured),
        "evaluations": [
            measured / "continuation.json",
            measured / "results.json",
            *sorted(measured.glob("scores/*.json")),
        ],
        "intended_use": INTENDED_USE,
        "limits": LIMITS,
    }


if __name__ == "__main__":
    write_card(__file__, __doc__.splitlines()[0], "what the evaluation scripts left, and prompts", details)
