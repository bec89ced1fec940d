"""Draws how trainings went, and keeps the numbers: NAME.csv and NAME.png from what scripts/train.py left.

    python scripts/learning_curve.py runs/small --output docs/curves/small
    python scripts/learning_curve.py runs/reading runs/joint --output docs/curves/small   # one after the other
    python scripts/learning_curve.py docs/curves/small.csv runs/more --output docs/curves/small --overwrite   # gone on with

A run is its --output_dir, one of its checkpoints, or a folder that scripts/pack.py made of it: what is read is
trainer_state.json. A .csv of this script stands for the runs in it. Needs matplotlib. Nothing is overwritten without --overwrite.
"""

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path

from mel_llm.script_errors import told_in_a_line
from mel_llm.whole_files import write_whole


# Of every row, and no curves
_PLACE = ("run", "step", "epoch", "learning_rate")
# The names of more would not fit beside a picture
_MOST_CURVES = 20
# What the Trainer logs of its own speed
_LEFT_OUT = ("grad_norm", "total_flos", "runtime", "per_second", "memory", "train_loss")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="learning_curve.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="several are the phases of one training, in their order")
    parser.add_argument("--output", type=Path, required=True, help="NAME of NAME.csv and NAME.png")
    parser.add_argument("--overwrite", action="store_true", help="replace them")
    return parser.parse_args(argv)


def read_log(run: Path) -> list[dict]:
    """What a run logged, a row for each step: losses and their terms, and the evaluations' with `eval_` before them.

    Raises:
        OSError, ValueError: There is no trainer_state.json, or nothing in it.
    """
    path = run / "trainer_state.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} has no log of a training.") from None
    rows: dict[int, dict] = {}
    for entry in history:
        kept = {
            name: value
            for name, value in entry.items()
            if isinstance(value, int | float) and not any(part in name for part in _LEFT_OUT)
        }
        if kept.keys() - {"step", "epoch"}:
            rows.setdefault(entry["step"], {}).update(kept)
    if not rows:
        raise ValueError(f"{path} has no log of a training.")
    return [rows[step] for step in sorted(rows)]


def read_table(path: Path) -> list[dict]:
    """The rows that this script has written before.

    Raises:
        OSError, ValueError: There is no such file, or it is none of this script's.
    """
    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    try:
        rows = [
            {
                "run": row.pop("run"),
                "step": int(row.pop("step")),
                **{name: float(value) for name, value in row.items() if value},
            }
            for row in table
        ]
    except (KeyError, TypeError, ValueError):
        rows = []
    if not rows:
        raise ValueError(f"{path} is not a table of learning_curve.py.")
    return rows


def read_runs(runs: list[Path]) -> list[dict]:
    """The rows of several phases, with steps and epochs counted through, and the phase's name."""
    rows, steps, epochs = [], 0, 0.0
    for run in runs:
        log = read_table(run) if run.suffix == ".csv" else [{"run": run.name, **row} for row in read_log(run)]
        rows += [
            {**row, "step": row["step"] + steps, "epoch": round(row.get("epoch", 0.0) + epochs, 4)} for row in log
        ]
        steps, epochs = rows[-1]["step"], rows[-1]["epoch"]
    return rows


def curves_of(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Points `(step, value)` of each curve, in the order in which they first appear."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _PLACE:
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def table(rows: list[dict]) -> str:
    names = [*_PLACE, *curves_of(rows)]
    names = [name for name in names if any(name in row for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw(rows: list[dict]) -> bytes:
    """A PNG: the terms of the loss in one picture, or where they are many in one for each task, error rates in another; phases are
    parted by lines."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    curves = curves_of(rows)
    rates = {name: points for name, points in curves.items() if name.split("_")[-1] in ("wer", "cer")}
    losses = {name: points for name, points in curves.items() if name not in rates}
    terms = {name: points for name, points in losses.items() if name not in ("loss", "eval_loss")}
    panels = [(title, lines) for title, lines in (*_by_task(terms or losses), ("error rate", rates)) if lines]
    starts = list({row["run"]: row["step"] for row in reversed(rows)}.values())  # of the phases
    many = (
        max(len(lines) for _, lines in panels) > 6
    )  # they have more colours, and their names stand beside the picture
    figure = Figure(figsize=((8 if many else 6) * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if many:
            axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for name, points in lines.items():
            marker = "." if name.startswith("eval_") else None
            axes.plot(*_with_gaps(points, starts), marker=marker, label=name)
        for start in starts if len(starts) > 1 else ():
            axes.axvline(start, color="gray", linewidth=0.8, linestyle=":")
        # The first steps of a phase would leave no room for all others
        values = sorted(value for points in lines.values() for _, value in points)
        axes.set(
            xlabel="step",
            ylabel=title,
            xlim=(0, rows[-1]["step"]),
            ylim=(0, 1.1 * values[int(0.98 * (len(values) - 1))]),
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()


def _by_task(terms: dict[str, list]) -> list[tuple[str, dict[str, list]]]:
    """Titles and curves: `asr_ctc` and `eval_asr_ctc` are of one task."""
    if len(terms) <= _MOST_CURVES:
        return [("loss", terms)]
    tasks: dict[str, dict[str, list]] = {}
    for name, points in terms.items():
        tasks.setdefault(name.removeprefix("eval_").split("_")[0], {})[name] = points
    return [(f"loss: {task}", lines) for task, lines in tasks.items()]


def _with_gaps(points: list[tuple[int, float]], starts: list[int]) -> tuple[list[float], list[float]]:
    """Steps and values, with a gap where a whole phase lies between two of them that has no value."""
    steps, values = [], []
    for step, value in points:
        if steps and sum(steps[-1] < start <= step for start in starts) > 1:
            steps.append(math.nan)
            values.append(math.nan)
        steps.append(step)
        values.append(value)
    return steps, values


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    numbers, picture = (arguments.output.with_name(f"{arguments.output.name}.{end}") for end in ("csv", "png"))
    for path in (numbers, picture):
        if path.exists() and not arguments.overwrite:
            raise FileExistsError(f"{path} exists already: pass --overwrite, or name another --output.")
    rows = read_runs(arguments.runs)
    image = draw(rows)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    write_whole(numbers, table(rows))
    write_whole(picture, image)
    print(f"{numbers} and {picture.name}: {len(rows)} rows, {rows[-1]['step']} steps.")


if __name__ == "__main__":
    with told_in_a_line("learning_curve.py"):
        main(sys.argv[1:])
