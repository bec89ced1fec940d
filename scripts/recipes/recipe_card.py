"""What the scripts have in common that write the cards of this repository's models."""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

from mel_llm import create_model_card
from mel_llm.script_errors import told_in_a_line


HELD_OUT = Path(__file__).resolve().parents[2] / "held_out_clips"
_LICENSE = "LICENSE-CC-BY-SA-3.0.txt"
TEXTS = (
    "of texts by Jane Austen, of the King James Bible, Bierce's Devil's Dictionary and the Jargon File (public domain), and of "
    "templates (CC0)."
)


def write_card(script: str, about: str, measured: str, details: Callable[[Path, Path], dict]) -> None:
    """Runs a script that writes a card: `FOLDER`, of the model, and `MEASURED`, of what was measured.

    Args:
        script, about, measured: Its file, what it does, and what the second folder holds.
        details: Of both folders, what [`create_model_card`] is told beside what the models have in common. It may put
            samples into the first.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument("measured", type=Path, help=measured)
    arguments = parser.parse_args()
    with told_in_a_line(Path(script).name):
        # All of them have learnt from recordings under this licence, the later ones by way of the first
        shutil.copyfile(HELD_OUT / _LICENSE, arguments.folder / _LICENSE)
        create_model_card(
            arguments.folder,
            name=Path(script).stem.removesuffix("_card").replace("_", "-"),
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            language="en",
            license="cc-by-sa-3.0",
            **details(arguments.folder, arguments.measured),
        )
    print(f"{arguments.folder / 'README.md'} is written.")
