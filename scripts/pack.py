"""Makes the folder of a Hub repository out of a trained model: weights of 16 bits, in small files.

    python scripts/pack.py runs/small hub_cards/mel-llm-small-en
    python scripts/pack.py runs/voice hub_cards/my-voice --speaks_only --vocoder runs/vocoder
    python scripts/push.py hub_cards/mel-llm-small-en --repo ORG/mel-llm-small-en --dry-run

The weights are stored in --dtype and computed with in float32 when the model is loaded (`dtype=` of `from_pretrained`
decides otherwise). The card is not written here: see docs/cards.md.
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
    PreTrainedModel,
)

import mel_llm
from mel_llm.publishing import RECORDS, without_paths
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import count_parameters
from mel_llm.training.run_model import set_vocoder


# What a model needs for reading, or for learning to speak, and not for speaking
_BESIDE_SPEAKING = ("ctc_head.", "token_bytes.", "speech_head.speller.")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pack.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a whole model: the --output_dir of scripts/train.py")
    parser.add_argument("folder", type=Path, help="a new folder, or one without a model in it")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--max_shard_size", default="15MB", help="of each file of weights")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--reads_only", action="store_true", help="leave out the speech head and the vocoder, if any")
    what.add_argument(
        "--speaks_only",
        action="store_true",
        help="leave out the CTC heads: speaking does without, but further training has them no more",
    )
    parser.add_argument(
        "--vocoder",
        help="a trained vocoder, a model that speaks with one, griffin_lim or none, in the place of the run's own",
    )
    parser.add_argument(
        "--num_beams",
        type=int,
        help="beams that transcripts are written with where nobody asks; by default the run's own",
    )
    parser.add_argument(
        "--max_audio_seconds",
        type=float,
        help="longest pieces that recordings are cut into; by default the run's own, which are its longest clips. What was trained on few "
        "clips of that length hears shorter pieces better",
    )
    return parser.parse_args(argv)


def load(run: Path, reads_only: bool = False, speaks_only: bool = False) -> PreTrainedModel:
    """The model, with all heads that it has; or, with `reads_only`, with what it needs to transcribe, or with `speaks_only`
    with what it needs to speak.

    Raises:
        ValueError: There are only adapters, or the weights are not all there, are not finite, or are another model's; or a
            model that shall speak has no speech head.
    """
    if (run / "adapter_config.json").is_file():
        raise ValueError(f"{run} holds adapters. Train with --merge_lora, or merge them, to pack a whole model.")
    config = AutoConfig.from_pretrained(run)
    if config.model_type != mel_llm.MelLLMConfig.model_type:
        raise ValueError(f"{run} holds a {config.model_type!r} and no Mel-LLM.")
    if reads_only:
        config.speech_config = config.vocoder_config = None
    if speaks_only:
        if config.speech_config is None:
            raise ValueError(f"--speaks_only: {run} has no speech head.")
        config.audio_config.ctc_weight = config.audio_config.ctc_decoding_weight = 0.0
        config.speech_config.ctc_weight = 0.0
    goes_on = mel_llm.MelLLMForSpeechContinuation.__name__ in (config.architectures or ()) and not speaks_only
    if config.speech_config is None:
        auto_class = AutoModelForSpeechSeq2Seq
    else:  # the same weights; the class that is saved tells what it is for
        auto_class = AutoModelForPreTraining if goes_on else AutoModelForTextToWaveform
    model, info = auto_class.from_pretrained(run, config=config, dtype=torch.float32, output_loading_info=True)
    # transformers makes up what is missing and goes on
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(what) or ()))
        if what == "unexpected_keys" and speaks_only:
            keys = [key for key in keys if not key.startswith(_BESIDE_SPEAKING)]
        if keys:
            raise ValueError(
                f"{run} is damaged: its weights have {len(keys)} {what.replace('_', ' ')}, such as {keys[0]}."
            )
    check_finite(model, f"{run} has weights that are not finite")
    return model


def check_finite(model: PreTrainedModel, problem: str) -> None:
    """Raises `ValueError` with the name of the first tensor that holds an infinity or a NaN."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{problem}: {name}.")


def pack(
    run: Path,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str,
    vocoder: str | None = None,
    num_beams: int | None = None,
    max_audio_seconds: float | None = None,
    **parts: bool,
) -> None:
    """Saves the model of `run` in `folder`, all at once at the end.

    Args:
        num_beams (`int`, *optional*): Of the generation config that is saved; left out, the run's own.
        max_audio_seconds (`float`, *optional*): Of the longest piece that recordings are cut into; left out, the run's own.
        vocoder (`str`, *optional*): Folder or Hub name of one, `"griffin_lim"` or `"none"`; left out, the run's own.

    Raises:
        FileExistsError: There is a model in the folder already.
        ValueError: See [`load`], whose `parts` of the model are saved; or the vocoder is for other features, or for a model
            that does not speak; or `num_beams` or `max_audio_seconds` is less than 1.
    """
    for name, value in (("num_beams", num_beams), ("max_audio_seconds", max_audio_seconds)):
        if value is not None and not 1 <= value < math.inf:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if folder.exists() and (
        not folder.is_dir() or any(folder.glob("*.safetensors")) or (folder / "config.json").exists()
    ):
        raise FileExistsError(f"{folder} has a model in it already, or is no folder. Choose another.")
    model, processor = load(run, **parts), AutoProcessor.from_pretrained(run)
    if vocoder is not None and model.config.speech_config is None:
        raise ValueError(f"--vocoder: what is packed of {run} does not speak.")
    set_vocoder(model, processor, vocoder)
    if num_beams is not None:
        model.generation_config.num_beams = num_beams
    if max_audio_seconds is not None:
        model.config.audio_config.max_audio_seconds = max_audio_seconds
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    # Buffers too: the normalisation of features is needed with all its digits, and is small
    buffers = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
    model.to(dtype)
    check_finite(model, f"{dtype} cannot hold the weights of {run}, choose another --dtype")
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    processor.save_pretrained(partial)
    clean_config(partial / "config.json")
    for name in RECORDS:
        if (run / name).is_file():
            content = without_paths(json.loads((run / name).read_text(encoding="utf-8")))
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    # The weights last: a folder with a config but without weights is refused, the other way round it is misread
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, folder / path.name)
    partial.rmdir()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {count_parameters(model)[1]:,} parameters, {size / 2**20:.1f} MiB of weights in {dtype}.")


def clean_config(path: Path) -> None:
    """The dtype in a config is the one that weights are loaded in; and folders of this machine are nobody else's business."""

    def change(value):
        if not isinstance(value, dict):
            return value
        kept = {key: item for key, item in value.items() if key != "_name_or_path" or not os.path.isabs(str(item))}
        return {key: "float32" if key in ("dtype", "torch_dtype") else change(item) for key, item in kept.items()}

    path.write_text(
        json.dumps(change(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    arguments = parse_arguments(sys.argv[1:])
    with told_in_a_line("pack.py", (OSError, ValueError, SafetensorError)):
        dtype = getattr(torch, arguments.dtype)
        parts = {"reads_only": arguments.reads_only, "speaks_only": arguments.speaks_only}
        settings = {name: getattr(arguments, name) for name in ("vocoder", "num_beams", "max_audio_seconds")}
        pack(arguments.run, arguments.folder, dtype, arguments.max_shard_size, **settings, **parts)
