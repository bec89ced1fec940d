"""What came of a study (scripts/study.py): tables beside the paper's numbers, and plots. Everything here is ours."""

import json
import os
import shlex
import statistics
from pathlib import Path

from mel_llm.card_results import local_name
from mel_llm.training import SPEAKING_TASKS
from mel_llm.whole_files import write_whole


BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
PAPER = (
    "The paper's numbers (arXiv 2606.10231) are averages over the sets of the Open ASR Leaderboard after some 64 thousand hours "
    "of speech, and its speeds are relative to its encoder baseline's; they are quoted from secondary notes on the paper, not "
    "from the paper itself."
)
# Title, key of a result, how it is written
COLUMNS = (
    ("WER (%)", "wer", "{:.1f}"),
    ("CER (%)", "cer", "{:.1f}"),
    ("cross-entropy", "text_loss", "{:.3f}"),
    ("CTC loss", "ctc_loss", "{:.3f}"),
    ("speech loss", "speech_loss", "{:.3f}"),
    ("hours of speech", "hours", "{:.2f}"),
    ("trained weights", "trained", "{:,}"),
    ("speed", "relative_speed", "{:.2f}×"),
    ("audio s per s", "speed", "{:.1f}"),
    ("audio s per CPU s", "cpu_speed", "{:.1f}"),
    ("memory (MiB)", "memory", "{:,.0f}"),
    ("GPU memory (MiB)", "gpu_memory", "{:,.0f}"),
)
PUBLISHED = (("paper: WER (%)", "wer", "{:.2f}"), ("paper: speed", "speed", "{:.2f}×"))


def result_of(folder: Path) -> dict:
    """The numbers of a run; those that there are. Error rates in percent, memory in MiB."""
    try:
        summary = json.loads((folder / "model" / "training_summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    metrics, resources = summary.get("metrics", {}), summary.get("resources") or {}

    def first(*names, scale=1.0):
        value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
        return None if value is None else scale * value

    def mebibytes(name):
        return None if resources.get(name) is None else resources[name] / 2**20

    speaks = any(f"eval_{task}_loss" in metrics for task in SPEAKING_TASKS)
    on_gpu = resources.get("peak_gpu_memory") is not None
    train = (summary.get("data") or {}).get("train") or {}
    result = {
        "wer": first("eval_asr_wer", "eval_wer", scale=100),
        "cer": first("eval_asr_cer", "eval_cer", scale=100),
        # Of a model that does not read, the loss is another one
        "text_loss": first("eval_asr_text", "eval_asr_loss", *([] if speaks else ["eval_loss"])),
        "ctc_loss": first("eval_asr_ctc"),
        "speech_loss": first("eval_tts_loss"),
        "hours": sum(report["hours"] for report in train.values()) if train else None,
        "trained": (summary.get("parameters") or {}).get("trained"),
        "speed": resources.get("audio_seconds_per_second"),
        "cpu_speed": None if on_gpu else resources.get("audio_seconds_per_cpu_second"),
        "memory": mebibytes("peak_memory"),
        "gpu_memory": mebibytes("peak_gpu_memory"),
    }
    result["device"] = resources.get("device", "cpu")
    return {name: value for name, value in result.items() if value is not None}


def in_short(model: Path) -> str:
    """The result of the run whose model lies there, in a few words."""
    return _short(result_of(model.parent))


def _short(result: dict) -> str:
    names = {
        "wer": "WER {:.1f} %",
        "text_loss": "cross-entropy {:.3f}",
        "ctc_loss": "CTC {:.3f}",
        "speech_loss": "speech {:.3f}",
    }
    return ", ".join(text.format(result[name]) for name, text in names.items() if name in result)


def command_line(config: Path, folder: Path, variables: dict[str, str]) -> str:
    """The command that makes the study again, without the folders of this machine."""

    def told(path) -> str:
        return local_name(str(path)) if os.path.isabs(path) or str(path).startswith("..") else str(path)

    root = Path(__file__).resolve().parents[1]
    if config.resolve().is_relative_to(root):
        config = config.resolve().relative_to(root)
    words = ["python", "scripts/study.py", told(config), "--output_dir", f"runs/{folder.name}"]
    for name, value in variables.items():
        words += ["--set", f"{name}={told(value)}"]
    return shlex.join(words)


def check_report(path: Path) -> None:
    """Refuses a file that the report has no place in, before there is a report."""
    if not path.is_file():
        if path.suffix != ".md":
            raise ValueError(f"--report: {path} must be a Markdown file, NAME.md.")
        return
    if _parts(path.read_text(encoding="utf-8")) is None:
        raise ValueError(
            f"--report: {path} needs the lines {BEGIN} and {END}, once and in this order; between them all is replaced."
        )


def _parts(text: str) -> tuple[str, str] | None:
    """What stands before and behind the marked part; `None` without one."""
    lines = text.split("\n")
    if lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        return None
    return "\n".join([*lines[: lines.index(BEGIN)], ""]), "\n".join(["", *lines[lines.index(END) + 1 :]])


def write(study, folder: Path, command: str, report: Path | None = None) -> Path:
    """Writes `report.md` and its plots into the study's folder, and the same into `report`, with the plots in `images`
    beside that. Returns where it is to be read."""
    records = {name: _record(run, folder) for name, run in study.runs.items()}
    results = {name: result_of(folder / name) if records[name]["status"] == "done" else {} for name in study.runs}
    tables = [(table, _rows(study, table, results)) for table in study.tables]
    text = _replace_in(folder / "report.md", _text(study, command, tables, results, records, folder, ""))
    if report is not None:
        (report.parent / "images").mkdir(parents=True, exist_ok=True)
        _replace_in(report, _text(study, command, tables, results, records, report.parent / "images", "images/"))
        return report
    return text


def _record(run, folder: Path) -> dict:
    """Of what the file says now: a figure of other arguments, or of another start, is not this run's."""
    try:
        record = json.loads((folder / run.name / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"status": "not run yet"}
    if (record["script"], record["arguments"]) != (run.script, run.arguments):
        return {"status": "was run with other arguments than the file has now"}
    if other := replaced_start(record, folder):
        return {"status": f"began with a model of {other} that is not there any more"}
    return record


def replaced_start(record: dict, folder: Path) -> str | None:
    """The run whose model this one began with, if that was trained again since, or deleted."""
    for other, began in record.get("needs", {}).items():
        try:
            now = json.loads((folder / other / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return other
        if now.get("began") != began:
            return other
    return None


def _replace_in(path: Path, text: str) -> Path:
    before, after = (_parts(path.read_text(encoding="utf-8")) if path.is_file() else None) or ("", "\n")
    write_whole(path, f"{before}{BEGIN}\n{text}\n{END}{after}")
    return path


def _rows(study, table: dict, results: dict) -> list[dict]:
    """The results of a table's rows, with `label`, `x`, `published` and the speed relative to the reference."""
    reference = results.get(table.get("speed_reference"), {})
    rows = []
    for row in table.get("rows") or []:
        result = dict(results.get(row.get("run"), {}))
        # By CPU time where both trained on the CPU: whatever else the machine did is not in it
        key = "cpu_speed" if "cpu_speed" in reference and "cpu_speed" in result else "speed"
        if reference.get(key) and result.get(key):
            result["relative_speed"] = result[key] / reference[key]
        label = row.get("label") or study.runs[row["run"]].title
        x = row.get("x", result.get("hours") if row.get("run") and table.get("x") else None)
        rows.append({**result, "label": label, "run": row.get("run"), "x": x, "published": row.get("published") or {}})
    return rows


def _text(study, command: str, tables, results: dict, records: dict, images: Path, prefix: str) -> str:
    done = [record for record in records.values() if record["status"] == "done"]
    lines = [f"## {study.title}", ""]
    if study.note:
        lines += [study.note.strip(), ""]
    lines += ["```bash", "".join(f"{key}={value} " for key, value in study.environment.items()) + command, "```", ""]
    lines += [_where(done, results), "", PAPER, ""]
    if unfinished := {name: record for name, record in records.items() if record["status"] != "done"}:
        lines += [f"**{len(unfinished)} of {len(records)} runs are missing below:**", ""]
        for name, record in unfinished.items():
            lines.append(f"* `{name}`: {record['status']}" + (f", {record['error']}" if record.get("error") else ""))
        lines.append("")
    for table, rows in tables:
        lines += [f"### {table.get('title', table['name'])}", ""]
        if table.get("text"):
            lines += [table["text"].strip(), ""]
        lines += [*_markdown(rows), ""]
        if table.get("x"):
            name = f"study-{study.config.stem}-{table['name']}.png"
            if _plot(images / name, study, table, rows):
                lines += [f"![{table.get('title', table['name'])}]({prefix}{name})", ""]
    others = [name for name in study.runs if results[name] and not _is_in(name, tables)]
    if others:
        lines += ["### What these began with", "", "| run | weights | result |", "|---|---|---|"]
        for name in others:
            lines.append(
                f"| {study.runs[name].title} | {results[name].get('trained', 0):,} | {_short(results[name])} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _is_in(name: str, tables) -> bool:
    return any(row["run"] == name for _, rows in tables for row in rows)


def _where(done: list[dict], results: dict) -> str:
    if not done:
        return "No run is finished yet."
    environments = [record["environment"] for record in done]
    dates = sorted(environment["date"] for environment in environments)
    machines = sorted({f"{e['cpu']}, {e['cores']} core{'s' * (e['cores'] != 1)}" for e in environments})
    machines += sorted({result["device"] for result in results.values() if result} - {"cpu"})
    versions = environments[-1]["versions"]
    minutes = sum(record["seconds"] for record in done) / 60
    costs = [record["cpu_seconds"] for record in done if record.get("cpu_seconds") is not None]
    cost = f" (a run cost {statistics.median(costs):.0f} s of CPU time, the median of {len(costs)})" if costs else ""
    return (
        f"{len(done)} runs in {minutes:.0f} minutes{cost}, {dates[0]} to {dates[-1]}; {'; '.join(machines)}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}. Speeds and memory are of these runs on this machine; "
        "compare them with each other only. Relative speeds are by the clock on a GPU, by CPU time on a CPU, which other "
        "programs on the machine change less."
    )


def _markdown(rows: list[dict]) -> list[str]:
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    published = [column for column in PUBLISHED if any(column[1] in row["published"] for row in rows)]
    header = ["", *(title for title, _, _ in columns), *(title for title, _, _ in published)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        cells = [text.format(row[key]) if key in row else "" for _, key, text in columns]
        cells += [text.format(row["published"][key]) if key in row["published"] else "" for _, key, text in published]
        lines.append(f"| {' | '.join([row['label'], *cells])} |")
    return lines


def _plot(path: Path, study, table: dict, rows: list[dict]) -> bool:
    """Draws what depends on x: our error rate, our losses, the paper's error rate. Whether there was anything to draw."""
    rows = sorted((row for row in rows if row["x"] is not None), key=lambda row: row["x"])
    panels = [
        ("here: WER (%)", {"": [(row["x"], row["wer"]) for row in rows if "wer" in row]}),
        (
            "here: validation loss",
            {
                label: [(row["x"], row[key]) for row in rows if key in row]
                for label, key in (("cross-entropy", "text_loss"), ("CTC", "ctc_loss"))
            },
        ),
        (
            "the paper: WER (%)",
            {"": [(row["x"], row["published"]["wer"]) for row in rows if "wer" in row["published"]]},
        ),
    ]
    panels = [(title, {label: points for label, points in lines.items() if points}) for title, lines in panels]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("The report has no plots: they need matplotlib (`pip install matplotlib`).")
        return False
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(title=title, xlabel=table["x"], xscale=table.get("scale", "linear"))
        axes.set_xticks(
            sorted({row["x"] for row in rows}), labels=[f"{x:.3g}" for x in sorted({row["x"] for row in rows})]
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    figure.suptitle(f"{table.get('title', table['name'])} ({study.title})")
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=90, format="png")
    os.replace(partial, path)
    return True
