"""Trains the variants that a YAML file names, measures them, and writes one table.

    python scripts/ablations/spectron_ablation.py scripts/ablations/spectron_miniature.yaml --train_data speech \\
        --eval_data speech --asr openai/whisper-base.en --lm openai-community/gpt2 --speaker_encoder resemblyzer \\
        --output_dir runs/ablation --page ablation.md

Each variant is a run of scripts/train.py and one of scripts/evaluate_continuation.py, whose arguments are in the file. Given
again, the command goes on: what is trained is not trained again, and what is measured is not measured again.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from mel_llm.card_results import without_local_paths
from mel_llm.evaluation.environment import describe_environment
from mel_llm.evaluation.speech_report import speech_table
from mel_llm.whole_files import write_whole


SCRIPTS = Path(__file__).resolve().parents[1]
_KNOWN = {"title", "notes", "train", "evaluate", "variants"}


def words(arguments: dict) -> list[str]:
    """Arguments by name as words of a command line."""
    found = []
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        found += [f"--{name}", *map(str, values)]
    return found


def read_study(path: str) -> dict:
    """The file, checked.

    Raises:
        ValueError: It is not what this script takes.
    """
    study = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(study, dict) or set(study) - _KNOWN or not isinstance(study.get("variants"), dict):
        raise ValueError(f"{path} must hold {', '.join(sorted(_KNOWN))}, with arguments by name.")
    for name, variant in study["variants"].items():
        unknown = set(variant or {}) - {"train", "evaluate", "text"}
        if unknown:
            raise ValueError(
                f"{path}: the variant {name!r} has no {', '.join(sorted(unknown))}; it has train, evaluate, text."
            )
    return study


def call(script: str, arguments: dict, log: Path) -> None:
    """Runs a script, its output into a file.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, str(SCRIPTS / script), *words(arguments)]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{shlex.join(command)}\n")
        file.flush()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"{script} failed with exit code {code}; {log} says why.")


def run_variant(name: str, variant: dict, study: dict, arguments, folder: Path, reference: bool) -> dict:
    """Trains and measures one variant.

    Returns:
        `dict`: its name, what training measured at its end, its systems' totals, and who judged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, measured = folder / "model", folder / "evaluation"
    training = {
        **study.get("train", {}),
        **(variant.get("train") or {}),
        "train_data": arguments.train_data,
        "eval_data": arguments.eval_data,
        "output_dir": str(model),
    }
    call("train.py", training, folder / "train.log")
    evaluation = {
        **study.get("evaluate", {}),
        **(variant.get("evaluate") or {}),
        "data": arguments.eval_data,
        "model": str(model),
        "text": variant.get("text") or ["written"],
        "output_dir": str(measured),
        **{key: getattr(arguments, key) for key in ("asr", "lm", "speaker_encoder") if getattr(arguments, key)},
    }
    if reference:
        evaluation["reference"] = "true"
    call("evaluate_continuation.py", evaluation, folder / "evaluate.log")
    summary = json.loads((model / "training_summary.json").read_text(encoding="utf-8"))
    systems = json.loads((measured / "results.json").read_text(encoding="utf-8"))
    return {
        "name": name,
        "metrics": summary["metrics"],
        "parameters": summary["parameters"]["all"],
        "data": summary["data"],
        "systems": systems["tasks"]["continuation"],
        "judges": systems["judges"],
    }


def training_table(results: list[dict]) -> str:
    """What teacher forcing gives on the evaluation data: comparable where the objective is not."""
    lines = [
        ["variant", "parameters", "cross-entropy of the text", "mean error of the frames"],
        ["---"] * 4,
    ]
    for result in results:
        metrics = result["metrics"]
        text, error = (metrics.get(f"eval_continuation_{key}") for key in ("text", "mean_error"))
        lines.append(
            [
                result["name"],
                f"{result['parameters']:,}",
                "–" if not text else f"{text:.3f}",
                "–" if error is None else f"{error:.3f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def generation_table(results: list[dict]) -> str:
    rows = []
    for result in results:
        is_both = sum(system["settings"].get("kind") != "reference" for system in result["systems"]) > 1
        for system in result["systems"]:
            is_reference = system["settings"].get("kind") == "reference"
            skipped = is_both and system["settings"].get("skip_text")
            name = system["name"] if is_reference else result["name"] + (", text skipped" if skipped else "")
            totals = {key: value for key, value in system["totals"].items() if key != "rtfx"}
            rows.append({**system, "name": name, "totals": totals})
    return speech_table(rows)


def page(study: dict, results: list[dict], arguments: list[str]) -> str:
    """The page; `arguments` are those of the command line that made it."""
    environment = describe_environment()
    versions = environment["versions"]
    trained = next(iter(results[0]["data"]["train"].values()))
    clips = trained.get("continuation", trained)
    seed = study.get("train", {}).get("seed", 42)
    command = without_local_paths(shlex.join(["python", "scripts/ablations/spectron_ablation.py", *arguments]))
    parts = [
        f"# {study['title']}",
        "Made by `scripts/ablations/spectron_ablation.py`; do not edit.",
        study.get("notes", ""),
        f"```bash\n{command}\n```",
        f"{environment['date']}, {environment['cpu']}, {environment['threads']} thread{'s' if environment['threads'] != 1 else ''}, no GPU, seed {seed}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}. {clips['num_clips']} clips, {clips['hours']:.2f} hours; "
        f"{study['train'].get('max_steps')} steps of {study['train'].get('per_device_train_batch_size')}. "
        + " ".join(f"{name}: {text}." for name, text in results[0]["judges"].items()),
        "## Under teacher forcing",
        "On the evaluation data. The mean error is of frames normalised to deviation 1.",
        training_table(results),
        "## What is said",
        "In brackets: 95 % bootstrap intervals over prompts. One training run for each variant: what separates two runs of "
        "the same variant with other seeds is not in these intervals.",
        generation_table(results),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="The YAML file.")
    parser.add_argument("--train_data", required=True, help="As scripts/train.py takes it.")
    parser.add_argument("--eval_data", required=True, help="The same; by default of the split 'validation'.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Gets a folder for each variant.")
    parser.add_argument("--page", type=Path, help="The Markdown page; by default results.md in --output_dir.")
    parser.add_argument("--asr", help="As scripts/evaluate_continuation.py takes it, and so are the next two.")
    parser.add_argument("--lm")
    parser.add_argument("--speaker_encoder")
    parser.add_argument("--reference", action="store_true", help="Measure the recordings' own continuations, too.")
    arguments = parser.parse_args(argv)
    study = read_study(arguments.study)
    results = []
    for number, (name, variant) in enumerate(study["variants"].items(), start=1):
        print(f"{number} of {len(study['variants'])}: {name}", flush=True)
        folder = arguments.output_dir / re.sub(r"\W+", "_", name).strip("_")
        # What really followed is the same for all
        reference = arguments.reference and number == 1
        results.append(run_variant(name, variant or {}, study, arguments, folder, reference))
    text = page(study, results, argv)
    write_whole(arguments.page or arguments.output_dir / "results.md", text)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"spectron_ablation.py: {error}")
