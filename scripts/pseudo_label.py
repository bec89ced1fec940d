"""Writes transcripts for speech that has none, with any recogniser, into a folder that scripts/train.py trains on.

    python scripts/pseudo_label.py --data recordings --asr openai/whisper-base.en --output_dir labelled
    python scripts/pseudo_label.py --data openslr/librispeech_asr,config=clean,split=train.100,streaming=true \\
        --asr runs/recogniser --output_dir labelled --min_confidence -0.3
    python scripts/train.py --train_data labelled --tasks continuation --output_dir runs/spectron

Recordings of any length are cut at their pauses. The same command, started again, goes on where it was interrupted;
with another --min_confidence, it only writes another metadata.csv. Nothing of somebody else is overwritten.
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError
from transformers import HfArgumentParser

from mel_llm.card_results import local_name
from mel_llm.script_errors import interruption_goes_on, told_in_a_line
from mel_llm.training import SpeechSource, load_source
from mel_llm.training.pseudo_labels import Labeler, PseudoLabels


logger = logging.getLogger("pseudo_label")


@dataclass
class LabellingArguments:
    """What is listened to, and who listens. Hyphens and underscores in names are the same."""

    data: str = field(
        metadata={
            "help": "Speech as scripts/train.py takes it, PLACE[,key=value]..., by default of the split 'train'. Transcripts "
            "are not looked at: audio files in a folder are enough."
        }
    )
    asr: str = field(
        metadata={
            "help": "Folder or Hub name of a model for the speech recognition pipeline (a Mel-LLM, Whisper, CTC, ...), or "
            "python:module.function, called with a waveform (samples,) and its rate in Hz."
        }
    )
    output_dir: str = field(metadata={"help": "A new folder, or one to go on with."})
    asr_language: str | None = field(default=None, metadata={"help": "Language spoken, for models that can be told."})
    min_confidence: float | None = field(
        default=None,
        metadata={"help": "Leave out pieces below this mean log-probability of a token: 0 is certain, -0.3 is 0.74."},
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "Longest piece; by default what the recogniser knows, 30 s for most."}
    )
    min_seconds: float = field(default=0.5, metadata={"help": "Shorter pieces are left out."})
    in_place: bool = field(
        default=False, metadata={"help": "Name stretches of the recordings instead of copying them into --output_dir."}
    )
    batch_size: int = field(default=8, metadata={"help": "Pieces that are transcribed at a time."})
    shard: str | None = field(
        default=None,
        metadata={"help": "I/N: only every N-th recording from the I-th on, I from 1; each with a folder."},
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many recordings."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "Of the recogniser: auto, float32, bfloat16 or float16."})

    def __post_init__(self):
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("--batch_size and --limit must be at least 1.")
        for name in ("max_seconds", "min_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"--{name} must be a number of seconds, got {value}.")
        if self.max_seconds is not None and self.max_seconds < 1:
            raise ValueError(f"--max_seconds must be at least 1, got {self.max_seconds}.")

    def part(self) -> tuple[int, int]:
        """The first recording and the step."""
        if self.shard is None:
            return 0, 1
        first, _, count = self.shard.partition("/")
        if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
            raise ValueError(f"--shard must be I/N with I from 1 to N, got {self.shard!r}.")
        return int(first) - 1, int(count)


def prepare(argv: list[str]) -> tuple[PseudoLabels, object]:
    """Everything that can go wrong before anything is transcribed, and the recordings."""
    parser = HfArgumentParser(LabellingArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    first, step = arguments.part()
    source = SpeechSource.parse(arguments.data)
    data = load_source(source, "train", needs_text=False)
    if arguments.in_place and not Path(source.place).expanduser().exists():
        raise ValueError("--in_place is for recordings that are files on this machine; leave it out.")
    labeler = Labeler(arguments.asr, arguments.asr_language, arguments.device, arguments.dtype)
    longest = labeler.max_seconds if arguments.max_seconds is None else arguments.max_seconds
    is_local = os.path.exists(os.path.expanduser(arguments.asr))
    settings = {
        "model": local_name(arguments.asr) if is_local else arguments.asr,
        "model_state": labeler.description,
        "data": arguments.data,
        "language": arguments.asr_language,
        "dtype": arguments.dtype,
        "shard": arguments.shard,
    }
    labels = PseudoLabels(
        arguments.output_dir,
        source.place,
        settings,
        labeler,
        arguments.min_confidence,
        longest,
        arguments.min_seconds,
        arguments.in_place,
        arguments.batch_size,
    )
    if labels.labels:
        count = sum(len(pieces) for pieces in labels.labels.values())
        logger.info(f"Going on: {count} pieces of {len(labels.labels)} recordings are transcribed.")
    return labels, islice(data, first, arguments.limit and first + arguments.limit * step, step)


def report(summary: dict, labels: PseudoLabels) -> None:
    logger.info(
        f"{summary['recordings']} recordings, {summary['pieces']} pieces, {summary['seconds'] / 3600:.2f} hours; "
        f"{summary['transcribed']} pieces transcribed now."
    )
    left_out = summary["pieces"] - summary["kept"]
    reason = "" if labels.min_confidence is None else f" or with a confidence below {labels.min_confidence:g}"
    if left_out:
        logger.info(f"{left_out} left out: without a word{reason}.")
    logger.info(f"{summary['kept']} pieces, {summary['kept_seconds'] / 3600:.2f} hours, are in {labels.folder}.")
    if summary["failed"]:
        logger.warning(
            f"{len(summary['failed'])} recordings could not be read: {', '.join(list(summary['failed'])[:10])}"
        )


if __name__ == "__main__":
    mendable = (OSError, ValueError, TypeError, ImportError, SafetensorError)
    with told_in_a_line("pseudo_label.py", mendable), interruption_goes_on(logger):
        labels, rows = prepare(sys.argv[1:])
        summary = labels.run(rows)
    report(summary, labels)
    sys.exit(1 if summary["failed"] else 0)
