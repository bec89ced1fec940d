"""Trains a neural vocoder on speech; transcripts are not needed.

    python scripts/train_vocoder.py --train_data recordings --eval_data recordings --output_dir runs/vocoder
    python scripts/train_vocoder.py --train_data recordings --output_dir runs/small --max_steps 2000 --batch_size 8
    python scripts/train_vocoder.py --train_data recordings --output_dir runs/tuned --model_name_or_path runs/vocoder

The arguments are those below and `mel_llm.training.VocoderTrainingArguments`. The same command, started again, goes on from
the last complete checkpoint in --output_dir, with the losses that it would have had. What comes out loads with
`MelLLMVocoder.from_pretrained(OUTPUT_DIR)`.
"""

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, set_seed
from transformers.utils.logging import disable_progress_bar

import mel_llm
from mel_llm import MelLLMFeatureExtractor, MelLLMVocoder, MelLLMVocoderConfig
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import (
    SegmentSampler,
    SpeechDataset,
    SpeechSource,
    VocoderTrainer,
    VocoderTrainingArguments,
    compute_feature_statistics,
    count_parameters,
    last_checkpoint,
    load_source,
    select_clips,
)
from mel_llm.training.run_model import load_vocoder
from mel_llm.whole_files import write_whole


logger = logging.getLogger("train_vocoder")

SUMMARY = "training_summary.json"


@dataclass
class VocoderArguments:
    """What is trained, and on what. A source is PLACE[,key=value]...: see `mel_llm.training.SpeechSource`."""

    train_data: list[str] = field(metadata={"help": "Sources: folders, manifests, Hub datasets. Only audio is used."})
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "The same, by default of the split 'validation'."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A vocoder to go on with, or a model that speaks, for its. Left out: a new one, as the arguments below say."
        },
    )
    vocoder_type: str = field(default="istft", metadata={"help": "New ones only: istft or hifigan."})
    vocoder_kwargs: str = field(
        default="{}", metadata={"help": "New ones only: `MelLLMVocoderConfig.vocoder_kwargs` in JSON."}
    )
    feature_preset: str = field(
        default="phi4",
        metadata={"help": "New ones only: which features it inverts (phi4, with --edge_padding 120; hifigan16k)."},
    )
    edge_padding: int | None = field(
        default=None,
        metadata={
            "help": "New ones only: of the features. By default 120 for phi4, so that frames are samples / 160."
        },
    )
    min_seconds: float = field(default=0.1, metadata={"help": "Shorter clips are left out."})
    max_seconds: float = field(default=60.0, metadata={"help": "Longer clips are left out."})
    statistics_clips: int = field(
        default=500, metadata={"help": "Clips that the deviation of each mel bin is measured on."}
    )


def build(arguments: VocoderArguments, seed: int) -> tuple[MelLLMVocoder, bool]:
    """The vocoder, and whether it is new."""
    if arguments.model_name_or_path is not None:
        for name in ("vocoder_type", "vocoder_kwargs", "feature_preset", "edge_padding"):
            if getattr(arguments, name) != getattr(VocoderArguments, name):
                raise ValueError(f"--{name} is for new vocoders; {arguments.model_name_or_path} is one.")
        return load_vocoder(arguments.model_name_or_path), False
    try:
        fields = json.loads(arguments.vocoder_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--vocoder_kwargs is not JSON: {error}. Got {arguments.vocoder_kwargs!r}.") from None
    padding = arguments.edge_padding
    if padding is None and arguments.feature_preset == "phi4":
        padding = 120
    overrides = {} if padding is None else {"edge_padding": padding}
    extractor = MelLLMFeatureExtractor.from_preset(arguments.feature_preset, **overrides)
    set_seed(seed)
    config = MelLLMVocoderConfig.from_feature_extractor(
        extractor, vocoder_type=arguments.vocoder_type, vocoder_kwargs=fields
    )
    return MelLLMVocoder(config), True


def load_clips(specs: list[str], split: str, arguments: VocoderArguments, sampling_rate: int, what: str):
    """The clips of all sources, the chance of each, and a report on each source."""
    from datasets import concatenate_datasets

    sources = [SpeechSource.parse(spec) for spec in specs]
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError(f"Give all sources of the {what} data a weight, or none of them: {specs}.")
    if any(source.streaming for source in sources):
        raise ValueError(f"The {what} data cannot stream: segments are drawn from all clips.")
    kept, chances, reports = [], [], {}
    for source in sources:
        data = load_source(source, split, needs_text=False)
        rows, seconds, report = select_clips(data, None, arguments.min_seconds, arguments.max_seconds)
        logger.info(f"{what} data from {source.place}: {report.num_clips} clips, {report.hours:.2f} hours")
        for reason, count in report.left_out.items():
            logger.warning(f"  left out: {count} {reason}")
        reports[source.place] = report.to_dict()
        if not seconds:
            continue
        kept.append(rows)
        chance = torch.tensor(seconds, dtype=torch.float64)
        chances.append(chance if source.weight is None else source.weight * chance / chance.sum())
    if not kept:
        raise ValueError(f"No clip of the {what} data is left to use; the reasons are above.")
    return SpeechDataset(concatenate_datasets(kept), sampling_rate), torch.cat(chances), reports


def feature_statistics(clips: SpeechDataset, extractor: MelLLMFeatureExtractor, num_clips: int):
    """Mean and deviation of each mel bin, on clips spread over the data."""
    places = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))[:num_clips].tolist()
    # Bins above what a recording holds hardly change; in units of a tiny deviation they would be all that matters
    rate = extractor.sampling_rate
    features = (extractor(clips[place]["audio"], sampling_rate=rate)["input_features"][0] for place in places)
    return compute_feature_statistics(features, min_std=0.1)


def prepare(argv: list[str]) -> tuple[VocoderTrainer, dict] | None:
    """Everything that can go wrong before training; `None` if there is nothing to do."""
    parser = HfArgumentParser((VocoderArguments, VocoderTrainingArguments), description=__doc__.splitlines()[0])
    arguments, training = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    folder = Path(training.output_dir)
    if finished_steps(folder) == training.max_steps:
        logger.info(f"{folder} is trained already. Ask for more --max_steps, or choose another --output_dir.")
        return None
    if last_checkpoint(folder) is None and (folder / "config.json").is_file():
        raise FileExistsError(f"{folder} holds a model and no checkpoint to go on from. Choose another --output_dir.")

    vocoder, is_new = build(arguments, training.seed)
    if vocoder.generator is None:
        raise ValueError("Griffin-Lim has nothing to train: choose --vocoder_type istft or hifigan.")
    extractor = vocoder.extractor
    num_samples = round(training.segment_seconds * extractor.sampling_rate / extractor.hop_length)
    num_samples *= extractor.hop_length  # whole frames
    if num_samples < 2 * extractor.n_fft:
        least = 2 * extractor.n_fft / extractor.sampling_rate
        raise ValueError(f"--segment_seconds must be at least {least:.3f} with these features.")
    rate = extractor.sampling_rate
    clips, chances, train_reports = load_clips(arguments.train_data, "train", arguments, rate, "Training")
    reports = {"train": train_reports}
    evaluation = None
    if arguments.eval_data:
        evaluation, _, reports["eval"] = load_clips(arguments.eval_data, "validation", arguments, rate, "Validation")
    mean, std = feature_statistics(clips, extractor, arguments.statistics_clips)
    if is_new and vocoder.generator.normalizes:
        vocoder.set_feature_statistics(mean, std)
    logger.info("{:,} of {:,} parameters are trained.".format(*count_parameters(vocoder)))
    names = ("vocoder_type", "vocoder_kwargs", "feature_config")
    fingerprint = {name: getattr(vocoder.config, name) for name in names}
    fingerprint.update(num_clips=len(clips), train_data=arguments.train_data)
    sampler = SegmentSampler(clips, chances, num_samples, training.seed)
    trainer = VocoderTrainer(vocoder, training, sampler, evaluation, std, fingerprint)
    trainer.resume()
    return trainer, reports


def finished_steps(folder: Path) -> int | None:
    """How many steps the run in this folder was to have, if it came to its end."""
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["arguments"]["max_steps"]
    except (OSError, ValueError, KeyError):
        return None


def save(trainer: VocoderTrainer, reports: dict) -> None:
    """The vocoder into the output folder, each file when it is complete, the weights after the config; then the summary."""
    folder = trainer.folder
    partial = folder / ".saving"
    trainer.vocoder.save_pretrained(partial)
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, folder / path.name)
    partial.rmdir()
    clips = trainer.train_data.clips
    if clips.num_bad_clips:
        logger.warning(f"{clips.num_bad_clips} clips could not be read while training and were left out.")
    summary = {
        "arguments": asdict(trainer.arguments),
        "metrics": trainer.metrics,
        "data": reports,
        "skipped_in_training": {"unreadable": clips.num_bad_clips, "names": clips.bad_clips()[:100]},
        "skipped_steps": trainer.num_skipped,
        "versions": {
            "mel_llm": mel_llm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    logger.info(f"The trained vocoder is in {folder}.")


if __name__ == "__main__":
    disable_progress_bar()  # one for each checkpoint
    with told_in_a_line("train_vocoder.py"):
        prepared = prepare(sys.argv[1:])
    if prepared is not None:
        trainer, reports = prepared
        trainer.train()
        save(trainer, reports)
