"""Runs a study: many trainings that differ in a few arguments, and one report of them all.

    python scripts/study.py scripts/studies/miniature.yaml --output_dir runs/miniature --set speech=speech
    python scripts/study.py scripts/studies/paper.yaml --output_dir runs/paper --set phi4=runs/phi4 --set speech=corpora --dry-run
    python scripts/study.py scripts/studies/miniature.yaml --output_dir runs/miniature --set speech=speech \\
        --report-only --report docs/study.md

The YAML file names runs and their arguments (docs/study.md says how). All of them are checked before the first begins. They
run one after another, each in a folder of its own, OUTPUT_DIR/RUN/model, with what it printed in OUTPUT_DIR/RUN/log.txt. A
run that fails does not stop the others; what needs its model is left out. The same command, given again, leaves finished
runs alone, goes on with an interrupted one from its last checkpoint, and tries failed ones again. OUTPUT_DIR/report.md has
the tables, beside the paper's published numbers, and the plots.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import study_report
import torch
import yaml

from mel_llm import MelLLMConfig
from mel_llm.conversion import parse_layers
from mel_llm.evaluation.environment import describe_environment
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import SpeechSource, load_source
from mel_llm.whole_files import write_whole


HERE = Path(__file__).resolve().parent
STUDY_KEYS = ("title", "note", "variables", "environment", "launcher", "base", "runs", "tables")
RUN_KEYS = ("title", "script", "arguments")
TABLE_KEYS = ("name", "title", "text", "x", "scale", "speed_reference", "rows")
ROW_KEYS = ("run", "label", "x", "published")
PUBLISHED_KEYS = ("wer", "speed")
SCRIPTS = ("train.py", "train_text_lm.py")
RECORD = "run.json"
SUMMARY = "training_summary.json"


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the second of two runs of one name win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Names(string.Template):
    idpattern = r"[A-Za-z_][\w-]*(?:\.[\w.-]*\w)?"


@dataclass
class Run:
    """One training: `arguments` have `${runs.NAME}` where the model of another run goes."""

    name: str
    title: str
    script: str
    arguments: dict

    def needs(self) -> list[str]:
        return sorted(set(re.findall(r"\$\{runs\.([^}]+)\}", json.dumps(self.arguments))))


@dataclass
class Study:
    config: Path
    title: str
    note: str
    environment: dict[str, str]
    launcher: list[str]
    runs: dict[str, Run]
    tables: list[dict]


# --- reading the file -----------------------------------------------------------------------------------------------


def _only(what: str, values, known: tuple[str, ...]) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{what} must have names and values, got {values!r}.")
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"{what} has no {', '.join(unknown)}; there are {', '.join(known)}.")
    return values


def read_study(path: Path, given: dict[str, str]) -> Study:
    """Reads a study; `given` are the variables of the command line.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not what a study is; the message says where.
    """
    try:
        content = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    content = _only(str(path), content, STUDY_KEYS)
    variables = dict(content.get("variables") or {})
    if unknown := given.keys() - variables.keys():
        raise ValueError(f"--set {sorted(unknown)[0]}: {path} has no such variable; it has {', '.join(variables)}.")
    variables |= given
    if missing := [name for name, value in variables.items() if value is None]:
        raise ValueError(f"{path} needs a value for {missing[0]}: --set {missing[0]}=...")
    if not content.get("runs"):
        raise ValueError(f"{path} has no runs.")
    names = {key: str(value) for key, value in variables.items()}
    names |= {f"runs.{run}": f"${{runs.{run}}}" for run in content["runs"]}  # put in when they run

    def filled(value, where):
        if isinstance(value, dict):
            return {key: filled(item, where) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item, where) for item in value]
        if not isinstance(value, str):
            return value
        try:
            return _Names(value).substitute(names)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{where}: there is no variable or run {error} for {value!r}.") from None

    base = content.get("base") or {}
    runs: dict[str, Run] = {}
    for name, entry in content["runs"].items():
        if not re.fullmatch(r"[\w][\w.-]*", str(name)):
            raise ValueError(f"{path}: {name!r} cannot be a run's name: letters, digits, -, _ and . only.")
        where = f"{path}, run {name}"
        entry = _only(where, entry or {}, RUN_KEYS)
        script = entry.get("script", "train.py")
        if script not in SCRIPTS:
            raise ValueError(f"{where}: `script` must be one of {', '.join(SCRIPTS)}, got {script!r}.")
        own = entry.get("arguments") or {}
        arguments = filled(_merged(base, own) if script == "train.py" else own, where)
        run = Run(name, str(entry.get("title", name)), script, arguments)
        for other in run.needs():
            if other not in runs:
                raise ValueError(f"{where} needs the model of {other}, which does not come before it.")
        runs[name] = run
    tables = [_table(path, table, runs) for table in content.get("tables") or []]
    environment = {str(key): str(value) for key, value in (content.get("environment") or {}).items()}
    launcher = content.get("launcher") or []
    launcher = shlex.split(launcher) if isinstance(launcher, str) else [str(word) for word in launcher]
    return Study(
        path, str(content.get("title", path.stem)), str(content.get("note", "")), environment, launcher, runs, tables
    )


def _merged(base: dict, own: dict) -> dict:
    """A run's arguments over those of all; of a config, field by field. `null` takes one away."""
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        merged[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


def _table(path: Path, table: dict, runs: dict[str, Run]) -> dict:
    where = f"{path}, table {table.get('name') if isinstance(table, dict) else table}"
    _only(where, table, TABLE_KEYS)
    if not re.fullmatch(r"[\w-]+", str(table.get("name"))):
        raise ValueError(f"{where} needs a `name` of letters, digits, - and _.")
    if table.get("scale", "linear") not in ("linear", "log"):
        raise ValueError(f"{where}: `scale` must be linear or log, got {table['scale']!r}.")
    for row in table.get("rows") or []:
        _only(f"{where}, row {row}", row, ROW_KEYS)
        _only(f"{where}, row {row}, published", row.get("published") or {}, PUBLISHED_KEYS)
        if row.get("run") is None and row.get("label") is None:
            raise ValueError(f"{where}: the row {row} names neither a run nor a label.")
    for name in [row.get("run") for row in table.get("rows") or []] + [table.get("speed_reference")]:
        if name is not None and name not in runs:
            raise ValueError(f"{where}: there is no run {name!r}.")
    return table


# --- checking before anything runs ----------------------------------------------------------------------------------


def words_of(run: Run, folder: Path) -> list[str]:
    """The arguments of a run as words of a command line."""
    words = []
    for key, value in {**run.arguments, "output_dir": str(folder / run.name / "model")}.items():
        if value is False and key.endswith("_strategy"):  # YAML reads `no` as false
            value = "no"
        if (value is False and run.script != "train.py") or value == []:
            continue
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        items = [] if value is True and run.script != "train.py" else items
        words += [f"--{key}", *map(str, items)]
    return [re.sub(r"\$\{runs\.([^}]+)\}", lambda match: str(folder / match[1] / "model"), word) for word in words]


def command_of(study: Study, run: Run, folder: Path) -> list[str]:
    launcher = study.launcher if run.script == "train.py" and study.launcher else [sys.executable]
    return [*launcher, str(HERE / run.script), *words_of(run, folder)]


def check(study: Study, folder: Path, names: list[str], elsewhere: bool = False) -> list[str]:
    """Looks at every run before the first one begins; with `elsewhere`, one that is to run on another machine.

    Returns:
        What is not there (yet): folders of data and models. A run would stop at it.

    Raises:
        ValueError: A run has an argument that does not exist, or cannot be what it is, or was run with others before.
    """
    missing: dict[str, str] = {}  # what, and the first run that wants it
    looked_at: dict[tuple, str | None] = {}
    for name in names:
        run = study.runs[name]
        try:
            parsed = _parse(run, folder, elsewhere)
            if run.script == "train.py":
                _check_layers(study, run, parsed[0])
                problems = _check_places(run, parsed, looked_at)
            else:
                texts = [*parsed.texts, *parsed.eval_texts]
                problems = [f"there is no file {path}" for path in texts if not path.is_file()]
            for problem in problems:
                missing.setdefault(problem, name)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise ValueError(f"{study.config}, run {name}: {error}") from error
        record = read_record(folder / name)
        trained = any((folder / name / "model").glob("checkpoint-*")) or (folder / name / "model" / SUMMARY).is_file()
        if record is not None and trained and (other := study_report.replaced_start(record, folder)):
            raise ValueError(
                f"{folder / name} began with a model of {other} that is not there any more: it was trained again, or deleted. "
                f"Delete {folder / name}, too, or choose another --output_dir."
            )
        if record is not None and trained and (record["script"], record["arguments"]) != (run.script, run.arguments):
            raise ValueError(
                f"{folder / name} was run with other arguments than {study.config} has now: {_difference(record, run)}. Delete that "
                "folder, call the run something else, or choose another --output_dir."
            )
    return [f"{problem}, for {name}" for problem, name in missing.items()]


def _difference(record: dict, run: Run) -> str:
    if record["script"] != run.script:
        return f"script {record['script']}, now {run.script}"
    before, now = record["arguments"], run.arguments
    key = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
    return f"{key} {before.get(key)!r}, now {now.get(key)!r}"


def _parse(run: Run, folder: Path, elsewhere: bool):
    """What the script makes of the arguments; its own words where it refuses them."""
    script = importlib.import_module(run.script.removesuffix(".py"))
    words, said = words_of(run, folder), io.StringIO()
    if elsewhere and not torch.cuda.is_available() and "use_cpu" not in run.arguments:
        words.append("--use_cpu")  # transformers refuses precisions that the machine at hand does not have
    try:
        with contextlib.redirect_stderr(said):
            return script.parse_arguments(words)
    except SystemExit:
        lines = said.getvalue().strip().splitlines()
        raise ValueError(lines[-1].split("error: ", 1)[-1] if lines else "its arguments are refused") from None


def _num_layers(study: Study, arguments: dict, seen: int = 0) -> int | None:
    """Of the language model of a run; `None` where only the Hub knows."""
    start = arguments.get("model_name_or_path")
    match = re.fullmatch(r"\$\{runs\.([^}]+)\}", str(start))
    if match and seen < len(study.runs):
        return _num_layers(study, study.runs[match[1]].arguments, seen + 1)
    config = Path(str(start)).expanduser() / "config.json"
    if start is not None:
        if not config.is_file():
            return None
        fields = json.loads(config.read_text(encoding="utf-8"))
        return (fields.get("text_config") or fields).get("num_hidden_layers")
    fields = arguments.get("text_config") or {}
    fields = json.loads(fields) if isinstance(fields, str) else fields
    return fields.get("num_hidden_layers", MelLLMConfig.from_preset("small").text_config.num_hidden_layers)


def _check_layers(study: Study, run: Run, model_args) -> None:
    count = _num_layers(study, run.arguments)
    if model_args.freeze_layers is not None and count is not None:
        try:
            parse_layers(model_args.freeze_layers, count)
        except ValueError as error:
            raise ValueError(f"freeze_layers: {error}") from None


def _check_places(run: Run, parsed, looked_at: dict[tuple, str | None]) -> list[str]:
    """Folders that are not there. Data that lies here is read: a column that is missing or an empty split is an error."""
    model_args, data_args, _ = parsed
    problems = []
    for specs, split in ((data_args.train_data, "train"), (data_args.eval_data, "validation")):
        for spec in specs:
            if (spec, split) not in looked_at:
                looked_at[spec, split] = _look_at(SpeechSource.parse(spec), split)
            if looked_at[spec, split] is not None:
                problems.append(looked_at[spec, split])
    for name in ("model_name_or_path", "init_adapter"):
        place = getattr(model_args, name)
        if place is None or "${runs." in str(run.arguments.get(name)):
            continue
        if not Path(place).expanduser().is_dir() and not _may_be_on_the_hub(place):
            problems.append(f"there is no folder {place} ({name})")
    return problems


def _may_be_on_the_hub(place: str) -> bool:
    """Whether what is not here is written as the Hub's names are; then the run looks for it."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", place) is not None and not os.path.isdir(place.split("/")[0])


def _look_at(source: SpeechSource, split: str) -> str | None:
    path = Path(source.place).expanduser()
    if not path.exists():
        return None if _may_be_on_the_hub(source.place) else f"there is no folder or manifest {source.place}"
    import datasets

    datasets.disable_progress_bars()
    if len(load_source(source, split)) == 0:
        raise ValueError(f"{source.place}: the split {source.split or split!r} is empty.")
    return None


# --- running --------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict | None:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_record(folder: Path, record: dict) -> None:
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def alone(folder: Path):
    """Keeps others out of a study's folder; what is yielded, if anything, lets trainings keep them out that outlive this
    process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another study.py, or a training that one started, is at work there."
            ) from None
        yield (file.fileno(),)


def run_all(study: Study, folder: Path, names: list[str], lock: tuple[int, ...] = ()) -> list[str]:
    """Runs what is not finished; the names of the runs that failed or were left out."""
    failed: list[str] = []
    for number, name in enumerate(names, start=1):
        run, place = study.runs[name], folder / name
        head = f"[{number}/{len(names)}] {name}"
        record = read_record(place)
        if record is not None and record["status"] != "failed" and (place / "model" / SUMMARY).is_file():
            if record["status"] != "done":  # it came to its end just when this one was stopped
                write_record(place, {**record, "status": "done", "error": None})
            print(f"{head}: done before", flush=True)
            continue
        place.mkdir(parents=True, exist_ok=True)
        spent = record["seconds"] if record is not None and record["arguments"] == run.arguments else 0.0
        record = {"script": run.script, "arguments": run.arguments, "status": "running", "seconds": spent}
        if broken := [other for other in run.needs() if not (folder / other / "model" / SUMMARY).is_file()]:
            write_record(place, {**record, "status": "left out", "error": f"it needs {broken[0]}, which has no model"})
            print(f"{head}: left out, it needs {broken[0]}, which has no model", flush=True)
            failed.append(name)
            continue
        record |= {"status": "running", "error": None, "environment": describe_environment()}
        record["began"] = time.time_ns()
        record["needs"] = {other: (read_record(folder / other) or {}).get("began") for other in run.needs()}
        record["environment"].pop("command")
        write_record(place, record)
        print(f"{head}: {run.title} ...", end=" ", flush=True)
        started, cpu_before = time.monotonic(), _cpu_seconds()
        try:
            code = run_one(command_of(study, run, folder), place / "log.txt", study.environment, lock)
        except BaseException:
            # Stopped from outside: the next start goes on with it
            write_record(
                place, {**record, "status": "interrupted", "seconds": record["seconds"] + time.monotonic() - started}
            )
            print("interrupted", flush=True)
            raise
        record["seconds"] += time.monotonic() - started
        if cpu_before is not None and not spent:  # else a part of it is not known
            record["cpu_seconds"] = _cpu_seconds() - cpu_before
        if code == 0 and not (place / "model" / SUMMARY).is_file():
            code = "no summary"
        if code == 0:
            write_record(place, {**record, "status": "done"})
            print(f"done in {record['seconds']:.0f} s. {study_report.in_short(place / 'model')}", flush=True)
        else:
            reason = last_words(place / "log.txt")
            write_record(place, {**record, "status": "failed", "error": reason})
            print(f"FAILED ({code}): {reason} (see {place / 'log.txt'})", flush=True)
            failed.append(name)
    return failed


class Stop:
    """A signal's handler that can be asked to wait."""

    def __init__(self):
        self.waits = self.was_asked = False

    def __call__(self, signum, frame) -> None:
        self.was_asked = True
        if not self.waits:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def later(self):
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def check(self) -> None:
        if self.was_asked:
            raise KeyboardInterrupt


STOP = Stop()


def run_one(command: list[str], log: Path, environment: dict[str, str], lock: tuple[int, ...]) -> int:
    """Runs a command, with what it prints going to the end of `log`; it does not outlive this process's interruption."""
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = None
        try:
            with STOP.later():  # in the midst of starting it, nobody would know whom to end
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **environment},
                    pass_fds=lock,
                )
            STOP.check()
            return process.wait()
        except BaseException:
            if process is not None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            raise


def _cpu_seconds() -> float | None:
    """What all programs that this one started have cost so far, on all cores together."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def last_words(log: Path) -> str:
    """The last line that a run printed, which is what it died of."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


# --- the command ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a YAML file: scripts/studies/*.yaml, or one of your own")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="a folder for all runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the file, such as speech=FOLDER",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these runs, and what they need")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="check everything and print the commands, run nothing"
    )
    parser.add_argument(
        "--report-only", "--report_only", action="store_true", help="run nothing; report what there is"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help=f"a Markdown file whose part between {study_report.BEGIN} and {study_report.END} is replaced",
    )
    arguments = parser.parse_args(argv)
    for item in arguments.set:
        if "=" not in item:
            parser.error(f"--set is NAME=VALUE, got {item!r}.")
    if arguments.report is not None:
        study_report.check_report(arguments.report)
    return arguments


def chosen_runs(study: Study, only: list[str]) -> list[str]:
    """The runs that are asked for, and what they need, in their order."""
    if not only:
        return list(study.runs)
    wanted = list(only)
    for name in wanted:  # which grows
        if name not in study.runs:
            raise ValueError(f"--only: there is no run {name!r}; there are {', '.join(study.runs)}.")
        wanted += [other for other in study.runs[name].needs() if other not in wanted]
    return [name for name in study.runs if name in wanted]


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    given = dict(item.split("=", 1) for item in arguments.set)
    study = read_study(arguments.study, given)
    names, folder = chosen_runs(study, arguments.only), arguments.output_dir
    failed: list[str] = []
    if not arguments.report_only:
        missing = check(study, folder, names, elsewhere=arguments.dry_run)
        if arguments.dry_run:
            for name in names:
                print(f"# {name}: {study.runs[name].title}")
                prefix = "".join(f"{key}={shlex.quote(value)} " for key, value in study.environment.items())
                print(prefix + shlex.join(command_of(study, study.runs[name], folder)))
            for problem in missing:
                print(f"# not there yet: {problem}")
            print(f"# {len(names)} runs, all arguments are valid.")
            return 0
        if missing:
            raise ValueError("; ".join(missing))
        with alone(folder) as lock:
            failed = run_all(study, folder, names, lock)
    command = study_report.command_line(arguments.study, folder, given)
    path = study_report.write(study, folder, command, arguments.report)
    print(f"The report is {path}.")
    if failed:
        print(
            f"{len(failed)} of {len(names)} runs have no model: {', '.join(failed)}. Give the command again to retry."
        )
    return 1 if failed else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # no training outlives this process
        signal.signal(number, STOP)
    try:
        with told_in_a_line("study.py", (OSError, ValueError, TypeError, ImportError)):
            sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted. The same command goes on.")
