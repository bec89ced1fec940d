"""Measures transcription as the Open ASR Leaderboard does: word error rate and speed, of a Mel-LLM and of its peers.

    python scripts/evaluate_asr.py --model runs/first --data recordings --output_dir runs/evaluation
    python scripts/evaluate_asr.py --model runs/first --peer openai/whisper-base --peer_language en \\
        --data recordings,split=test noisy.jsonl --batch_size 16 --output_dir runs/evaluation
    python scripts/evaluate_asr.py --model ORG/NAME --benchmark open_asr --batch_size 128 --dtype bfloat16 \\
        --compile default --output_dir runs/leaderboard

The same command, started again, transcribes only what is missing; with another --normalizer it only scores. In
--output_dir are raw/ with what the models wrote, scores/ with the figures of each model and set (for model cards),
results.json with everything, results.md with the table and, for a benchmark, .eval_results for the Hub.
"""

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from mel_llm.evaluation.asr_report import asr_table, card_results, compare_speed, summarize_asr
from mel_llm.evaluation.clip_evaluation import ClipEvaluation
from mel_llm.evaluation.clip_scripts import (
    ClipArguments,
    main,
    make_evaluation,
    write_results,
)
from mel_llm.evaluation.clip_sets import load_clip_set
from mel_llm.evaluation.clip_systems import make_transcriber
from mel_llm.evaluation.environment import describe_environment
from mel_llm.evaluation.open_asr import BENCHMARKS, eval_results, load_benchmark
from mel_llm.whole_files import claim_folder, write_whole


logger = logging.getLogger("evaluate")


@dataclass
class AsrArguments(ClipArguments):
    """Who transcribes what. Hyphens and underscores in names are the same."""

    benchmark: str | None = field(
        default=None, metadata={"help": f"Sets of the Open ASR Leaderboard, from the Hub: {', '.join(BENCHMARKS)}."}
    )
    subsets: list[str] = field(default_factory=list, metadata={"help": "Only these sets of the benchmark."})
    language: str | None = field(
        default=None, metadata={"help": "Spoken in the clips: told to each --model that can be told."}
    )
    peer_language: str | None = field(
        default=None, metadata={"help": "The same for each --peer; the leaderboard tells multilingual Whisper en."}
    )
    long_form: str = field(
        default="cut",
        metadata={
            "help": "Clips longer than a Mel-LLM's max_audio_seconds: cut at pauses (cut), or heard whole (never), as by "
            "the leaderboard's script."
        },
    )


def prepare(argv: list[str]) -> tuple:
    """Everything that can go wrong before anything is transcribed: what is quick to find out first."""
    parser = HfArgumentParser(AsrArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    if bool(arguments.data) == (arguments.benchmark is not None):
        raise ValueError("Give --data or --benchmark, one of them: what is to be transcribed.")
    if arguments.subsets and arguments.benchmark is None:
        raise ValueError("--subsets is for --benchmark, which is not given.")
    if arguments.compile is not None and not arguments.device.startswith("cuda"):
        logger.warning("--compile: transformers compiles decoding on a GPU only; here only the cache becomes static.")
    normalizer = arguments.load_normalizer()
    folder = claim_folder(arguments.output_dir)
    options = {**arguments.model_options, "long_form": arguments.long_form, "batch_size": arguments.batch_size}
    ours = {"revision": arguments.revision, "language": arguments.language}
    systems = [make_transcriber(name, **options, **ours) for name in arguments.model]
    systems += [
        make_transcriber(name, is_peer=True, **options, language=arguments.peer_language) for name in arguments.peer
    ]
    if arguments.benchmark is None:
        sets = [load_clip_set(source, arguments.split, arguments.max_samples) for source in arguments.data]
    else:
        sets = load_benchmark(arguments.benchmark, folder, arguments.subsets, arguments.max_samples)
    for clip_set in sets:
        if not any(normalizer[0](utterance.text).strip() for utterance in clip_set.utterances):
            raise ValueError(f"{clip_set.name}: no reference is left after --normalizer {arguments.normalizer}.")
        logger.info(f"{clip_set.name}: {len(clip_set)} clips, {clip_set.seconds / 3600:.2f} hours.")
    return make_evaluation(arguments, sets, systems), arguments, normalizer


def report(results: list[dict], evaluation: ClipEvaluation, arguments: AsrArguments, normalizer: tuple) -> bool:
    """Writes and prints what came of it; whether everything was transcribed."""
    function, described = normalizer
    summaries = [
        summarize_asr(result, evaluation.sets, function, arguments.seed, arguments.bootstrap_samples)
        for result in results
    ]
    compare_speed(summaries)
    environment = describe_environment(arguments.device)
    whole = {
        "environment": environment,
        "arguments": asdict(arguments),
        "normalizer": described,
        "intervals": f"95 % percentile bootstrap over clips, {arguments.bootstrap_samples} samples, seed {arguments.seed}",
        "models": summaries,
    }
    folder = Path(arguments.output_dir)
    remarks = [
        f"Batches of {arguments.batch_size}, {'sorted by length' if arguments.sort_by_length else 'in their order'}, "
        f"{arguments.warmup_steps} to warm up; normaliser {described}. RTFx: seconds of audio over seconds of features, "
        "decoding and detokenizing, without reading the files."
    ]
    write_results(folder, whole, asr_table(summaries), remarks)
    for summary, system in zip(summaries, evaluation.systems, strict=True):
        write_scores(folder, summary, system.folder_name, evaluation, arguments, environment, described)
        if summary["num_failed"]:
            logger.warning(f"{summary['name']}: {summary['num_failed']} clips failed; results.json says why.")
    logger.info(f"Everything is in {folder / 'results.json'}.")
    return not any(summary["num_failed"] for summary in summaries)


def write_scores(folder: Path, summary: dict, name: str, evaluation, arguments, environment: dict, normalizer: str):
    """A JSON for each set, as model cards take them, and what the Hub takes of a benchmark."""
    scores = folder / "scores" / name
    scores.mkdir(parents=True, exist_ok=True)
    for clip_set, of_set in zip(evaluation.sets, summary["sets"], strict=True):
        if "wer" in of_set["totals"]:
            figures = card_results(summary, of_set, environment, normalizer)
            write_whole(scores / f"{clip_set.file_name}.json", json.dumps(figures, indent=2) + "\n")
    if arguments.benchmark is not None and not arguments.max_samples and not summary["num_failed"]:
        date = environment["date"].split()[0]
        notes = (
            f"{environment['gpu'] or environment['cpu']}, batch size {arguments.batch_size}, normaliser {normalizer}"
        )
        entries = eval_results(summary, arguments.benchmark, date, notes=notes)
        if entries:
            place = scores / ".eval_results"
            place.mkdir(exist_ok=True)
            write_whole(place / "open_asr_leaderboard.yaml", yaml.safe_dump(entries, sort_keys=False))


if __name__ == "__main__":
    disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main("evaluate_asr.py", prepare, report)
