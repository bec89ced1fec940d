"""What `scripts/evaluate_asr.py` and `scripts/evaluate_understanding.py` share: arguments, errors, files of results."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..script_errors import interruption_goes_on, told_in_a_line
from ..whole_files import write_whole
from .clip_evaluation import ClipEvaluation
from .clip_sets import ClipSet
from .clip_systems import COMPILE_MODES, DTYPES, ClipSystem
from .environment import heading_of
from .normalizers import TEXT_NORMALIZERS, get_text_normalizer
from .plugins import PREFIX, describe_callable, load_callable


logger = logging.getLogger("evaluate")


@dataclass
class ClipArguments:
    """Who hears what. Hyphens and underscores in names are the same."""

    output_dir: str = field(metadata={"help": "Where raw texts, scores and results go."})
    model: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders (of adapters too) or Hub names of models, or python:module.function."},
    )
    peer: list[str] = field(
        default_factory=list,
        metadata={"help": "The same, to compare with: the speeds are given as ratios to the first one's."},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sources as scripts/train.py takes them, PLACE[,key=value]...: folders, manifests, datasets of the Hub."
        },
    )
    split: str = field(default="test", metadata={"help": "Of --data, where the source names none."})
    max_samples: int | None = field(default=None, metadata={"help": "Only the first so many clips of each set."})
    batch_size: int = field(default=8, metadata={"help": "Clips that are heard at a time."})
    sort_by_length: bool = field(
        default=True, metadata={"help": "Clips of a length together, as the leaderboard's data is sorted."}
    )
    warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Batches heard before the first that is timed; by default 10 on a GPU, as the leaderboard, else 1."
        },
    )
    interleave: bool = field(
        default=True,
        metadata={
            "help": "Each batch goes to all models in turn, so that their times can be compared; all are in memory. "
            "--no_interleave has one model after the other."
        },
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": f"Of models: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of models: sdpa, eager, flash_attention_2, flex_attention."}
    )
    compile: str | None = field(
        default=None, metadata={"help": f"Compile models: {', '.join(COMPILE_MODES)}. Needs a GPU to be of use."}
    )
    revision: str | None = field(default=None, metadata={"help": "Of the --model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that models bring along."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "The most tokens of a text; by default what each model brings."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beam search; by default what each model brings."})
    normalizer: str = field(
        default="whisper",
        metadata={
            "help": f"Of texts before they are compared: {', '.join(TEXT_NORMALIZERS)}, or python:module.function."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the confidence intervals."})
    bootstrap_samples: int = field(default=1000, metadata={"help": "Of the confidence intervals."})

    def __post_init__(self):
        for name in ("batch_size", "bootstrap_samples", "max_samples", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"--warmup_steps must be at least 0, got {self.warmup_steps}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.compile is not None and self.compile not in COMPILE_MODES:
            raise ValueError(f"--compile must be one of {', '.join(COMPILE_MODES)}, got {self.compile!r}.")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        is_gpu = self.device.startswith("cuda")
        if is_gpu and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: torch sees no GPU here.")
        if self.warmup_steps is None:
            self.warmup_steps = 10 if is_gpu else 1
        if not self.model and not self.peer:
            raise ValueError("There is nothing to evaluate: give --model.")

    @property
    def model_options(self) -> dict:
        """For [`ModelSystem`]."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "compile_mode": self.compile,
            "trust_remote_code": self.trust_remote_code,
            "generate_kwargs": {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams},
        }

    def load_normalizer(self) -> tuple[Callable[[str], str], str]:
        """The function, and what it is called in results.

        Raises:
            ImportError, ValueError: There is none of that name.
        """
        if not self.normalizer.startswith(PREFIX):
            return get_text_normalizer(self.normalizer), self.normalizer
        function = load_callable(self.normalizer, "--normalizer")
        if not isinstance(function("a"), str):
            raise ValueError(f"--normalizer {self.normalizer} must return a text, got {type(function('a')).__name__}.")
        return function, describe_callable(function)


def make_evaluation(arguments: ClipArguments, sets: list[ClipSet], systems: list[ClipSystem]) -> ClipEvaluation:
    """The evaluation that the arguments ask for."""
    return ClipEvaluation(
        sets,
        systems,
        arguments.output_dir,
        arguments.batch_size,
        arguments.sort_by_length,
        arguments.warmup_steps,
        arguments.interleave,
        arguments.device,
    )


def write_results(folder: Path, whole: dict, table: str, remarks: list[str]) -> None:
    """`results.json` and `results.md`, and the table on standard output."""
    heading = [*heading_of(whole["environment"], whole["intervals"]), *remarks]
    write_whole(folder / "results.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "results.md", "\n\n".join([*heading, table]))
    print(table, end="")


def main(name: str, prepare: Callable, report: Callable) -> None:
    """Runs a script: `prepare(argv)` to what is to be done and all that `report` needs beside its results; then that.

    What the user can mend is told in a line. The exit status is 0, or 1 if some clips failed, 2 is the parser's, and 130
    that of an interruption.
    """
    with told_in_a_line(name):
        evaluation, arguments, *more = prepare(sys.argv[1:])
    try:
        with interruption_goes_on(logger):
            results = evaluation.run()
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"{name}: out of memory ({str(error).splitlines()[0]}). Give a smaller --batch_size or --no_interleave; what is "
            "done is kept."
        )
    except (OSError, SafetensorError) as error:  # weights that cannot be read, a disk that is full
        sys.exit(f"{name}: {error}")
    sys.exit(0 if report(results, evaluation, arguments, *more) else 1)


__all__ = [
    "ClipArguments",
    "main",
    "make_evaluation",
    "write_results",
]
