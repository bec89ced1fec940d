"""Writes the card of hub_cards/mel-llm-small-en: what its files do not know, beside what they do.

    python scripts/recipes/mel_llm_small_en_card.py hub_cards/mel-llm-small-en docs/measured/mel-llm-small-en/results.json

The evaluations are what scripts/evaluate_asr.py left; their commands are on the card.
"""

import argparse
from pathlib import Path

from mel_llm import create_model_card
from mel_llm.script_errors import told_in_a_line


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
    "(CMU's permissive licence) and espeak-ng 1.51 (its output is free), of texts by Jane Austen, of the King James Bible, Bierce's "
    "Devil's Dictionary and the Jargon File (public domain), and of templates (CC0).",
}
DESCRIPTION = (
    "A small language model that writes down English speech, and the model that the demo of the package `mel_llm` comes with. "
    "Six layers of SmolLM2-135M-Instruct (0-2 and 27-29), with 4000 of its tokens, read log-mel frames at 12.5 audio tokens a "
    "second. It was trained on two CPU cores in under two hours, on ten hours of mostly synthetic speech: it shows that the "
    "method and the training of the package work, and how far that little takes them."
)
INTENDED_USE = (
    "Trying the package out on a laptop; a starting point for fine-tuning on speech of your own; tests. Where transcripts "
    "matter, use a larger recogniser: the table has the error rates of Whisper beside this model's."
)
LIMITS = (
    "* **Voices.** All real speech in the training data is 14 minutes of one woman, a professional speaker; four synthetic voices "
    "make up 80 % of the rest. On other people, accents, rooms, noise and spontaneous speech it fails more often than not, and "
    "nothing of that is in the table.\n"
    "* **It invents.** Where it does not understand, it writes fluent words that nobody said, as language models do.\n"
    "* **Words.** Its texts are telephone prompts, novels, the Bible and dictionaries of two kinds; names and recent words come "
    "out as something near.\n"
    "* **Numbers** are written as in the training data, mostly as words.\n"
    "* **As a language model** it can do nothing else: the layers that were taken away took that with them."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument("evaluations", type=Path, nargs="+", help="results.json of scripts/evaluate_asr.py")
    arguments = parser.parse_args()
    create_model_card(
        arguments.folder,
        name="mel-llm-small-en",
        description=DESCRIPTION,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        language="en",
        license="cc-by-sa-3.0",
        data=[REAL, SYNTHETIC],
        evaluations=arguments.evaluations,
        intended_use=INTENDED_USE,
        limits=LIMITS,
    )
    print(f"{arguments.folder / 'README.md'} is written.")


if __name__ == "__main__":
    with told_in_a_line("mel_llm_small_en_card.py"):
        main()
