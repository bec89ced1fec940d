"""Makes a Mel-LLM of Phi-4-multimodal: of transformers' layout or of the published one, with or without the speech encoder.

    python scripts/convert_phi4mm.py microsoft/Phi-4-multimodal-instruct --dry-run
    python scripts/convert_phi4mm.py microsoft/Phi-4-multimodal-instruct --output_dir runs/mel-llm-phi4
    python scripts/convert_phi4mm.py FOLDER --output_dir runs/baseline --encoder conformer --speech_lora adapter

`scripts/train.py --model_name_or_path` goes on with what comes out. See docs/conversion.md.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers.utils import logging

from mel_llm.conversion import build_processor, check_new_folder, open_source, plan_conversion, write_conversion
from mel_llm.conversion.phi4mm import ENCODERS, LORA_WAYS, PARTS
from mel_llm.conversion.phi4mm_source import HUB_FILES, HUB_IGNORED, hub_tensors
from mel_llm.script_errors import told_in_a_line


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert_phi4mm.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a Phi-4-multimodal")
    parser.add_argument("--output_dir", type=Path, help="a new folder")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument("--encoder", default="none", choices=ENCODERS, help="none is Mel-LLM, conformer the baseline")
    parser.add_argument(
        "--speech_lora",
        default="merge",
        choices=LORA_WAYS,
        help="merge it into the language model, keep it as an adapter of PEFT, or leave it out",
    )
    parser.add_argument("--adapter_dir", type=Path, help="another speech LoRA than the model's own, as PEFT saves it")
    parser.add_argument(
        "--random_init", nargs="+", default=[], choices=list(PARTS), help="parts to make anew instead of taking over"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is made anew")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--max_shard_size", default="2GB", help="of each file of weights, and so of memory")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="list where each weight goes, write nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.output_dir is None and not arguments.dry_run:
        parser.error("--output_dir is needed, unless for --dry-run.")
    return arguments


def find_folder(model: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded if it is on the Hub, with its weights or without.

    Raises:
        OSError: It is neither here nor there.
    """
    if os.path.isdir(model):
        return Path(model)
    ignored = [*HUB_IGNORED, *([] if weights else ["*.safetensors"])]
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=ignored)
    except HFValidationError:
        raise FileNotFoundError(f"{model} is neither a folder nor a name on the Hub.") from None
    return Path(path)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()  # of the library, about configs that were written so
    if arguments.output_dir is not None:
        check_new_folder(arguments.output_dir)
    place = find_folder(arguments.model, arguments.revision, weights=not arguments.dry_run)
    remote = None  # a dry run needs no more than the first bytes of each file
    if arguments.dry_run and not os.path.isdir(arguments.model):
        remote = hub_tensors(arguments.model, arguments.revision, place)
    source = open_source(place, arguments.adapter_dir, remote)
    processor = build_processor(source)
    plan = plan_conversion(
        source,
        processor,
        encoder=arguments.encoder,
        speech_lora=arguments.speech_lora,
        random_init=arguments.random_init,
        dtype=None if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        seed=arguments.seed,
    )
    if arguments.dry_run:
        print(*plan.lines(), sep="\n")
    print(*plan.summary(), sep="\n")
    if not arguments.dry_run:
        write_conversion(plan, processor, arguments.output_dir, arguments.max_shard_size)
        print(f"The Mel-LLM is in {arguments.output_dir}.")


if __name__ == "__main__":
    with told_in_a_line("convert_phi4mm.py"):
        main(sys.argv[1:])
