"""Writes the card of hub_cards/mel-llm-small-en-continuation: what its files do not know, beside what they do.

    python scripts/recipes/mel_llm_small_en_continuation_card.py hub_cards/mel-llm-small-en-continuation \\
        docs/measured/mel-llm-small-en-continuation

The second folder has what the evaluation scripts left: continuation.json (scripts/evaluate_continuation.py), results.json
(scripts/evaluate_tts.py) and scores/*.json (scripts/evaluate_asr.py), with their commands, and prompts/*.flac, the beginnings of
recordings that the samples go on with.
"""

import shutil
from pathlib import Path

from mel_llm_small_en_card import SYNTHETIC
from mel_llm_small_en_tts_card import DATA, READERS
from recipe_card import write_card
from transformers import pipeline

from mel_llm import MelLLMProcessor


DESCRIPTION = (
    "A small language model that goes on with what it hears: it writes down the beginning of a sentence, invents the rest, and speaks "
    "what it invented, in one pass of decoding. It is SPECTRON's task (arXiv 2305.15255) in this package's own form, without a speech "
    "encoder and with Mel-LLM's VAE head, and the smallest model that does it here. It began as `mel-llm-small-en-tts`, the voice of the same "
    'package, and still speaks texts (`generate(input_ids)`) and reads (`task="transcribe"`). **It shows that the task can be trained '
    "from end to end with little, and is nothing to rely on**: one CPU core had an hour and a half for it, with fifteen hours of one "
    "synthetic voice."
)
INTENDED_USE = "Trying the task out on a laptop; a starting point for further training; tests."
LIMITS = (
    "* **One voice**, that of a synthesiser, Piper's en_US-joe-medium: it hears that voice best, and goes on in it whoever begins.\n"
    "* **What it says makes little sense.** Six layers that know letters and no words have learnt English from twenty thousand sentences "
    "of novels, the Bible, dictionaries of two kinds and telephone prompts. What is written down of the prompt is often wrong, too.\n"
    "* **The speech is not always the text**: see the error rate between the two.\n"
    "* **Prompts** of 1 to 3.5 seconds, which may end within a word, are what it was trained on.\n"
    "* **It answers no questions.** There were none in its training."
)


def add_samples(folder: Path, measured: Path) -> list[dict]:
    """Goes on with each prompt, in the model's folder: all that there are, in their order."""
    speaker = pipeline("speech-continuation", model=str(folder), device="cpu")
    processor = MelLLMProcessor.from_pretrained(folder)
    target = folder / "samples"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    samples = []
    for prompt in sorted((measured / "prompts").glob("*.flac")):
        shutil.copyfile(prompt, target / prompt.name)
        said = speaker(str(prompt), seed=0)
        name = f"samples/{prompt.stem}-continued.flac"
        processor.save_audio(said["audio"].squeeze(), str(folder / name), sampling_rate=said["sampling_rate"])
        samples.append({"path": f"samples/{prompt.name}", "text": "a prompt, of synth-en, split test"})
        samples.append({"path": name, "text": f"what the model makes of it. It writes: {said['text']}"})
    return samples


def details(folder: Path, measured: Path) -> dict:
    return {
        "description": DESCRIPTION,
        "pipeline_tag": "audio-to-audio",
        "data": [DATA[0] | {"license": SYNTHETIC["license"], "attribution": SYNTHETIC["attribution"]}, *DATA[1:]],
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
