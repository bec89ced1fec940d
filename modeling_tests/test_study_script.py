"""scripts/study.py as a user runs it: checked before it starts, interrupted and started again, with runs that fail."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, load_script
from test_training_data import write_folder
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq


SCRIPT = ROOT / "scripts" / "study.py"
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
# What every study here has; a test changes what it is about
STUDY = {
    "title": "A tiny study",
    "note": "Of nothing.",
    "variables": {"speech": None},
    "environment": {"OMP_NUM_THREADS": 1},
    "base": {
        "train_data": ["${speech}"],
        "eval_data": ["${speech}"],
        "model_name_or_path": "${runs.text-lm}",
        "audio_config": {"conv_channels": 4, "hidden_size": 16, "ctc_weight": 0.3, "ctc_rate": 8},
        "transcription_instruction": "",
        "lora": "small",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "generation_max_length": 8,
        "save_strategy": False,  # as YAML reads `no`
        "report_to": "none",
        "use_cpu": True,
    },
    "runs": {
        "text-lm": {
            "script": "train_text_lm.py",
            "arguments": {"texts": ["${speech}/train/metadata.csv"], "text_config": TINY, "max_steps": 2, "use_cpu": True},
        },
        "broken": {"arguments": {"max_seconds": 0.2}},
        "after-broken": {"arguments": {"init_adapter": "${runs.broken}"}},
        "whole": {"title": "the whole", "arguments": {"audio_config": {"reduction_factor": 4}}},
    },
    "tables": [
        {
            "name": "all",
            "title": "All of it",
            "x": "hours",
            "speed_reference": "whole",
            "rows": [
                {"run": "whole", "x": 1, "published": {"wer": 7.12, "speed": 1.57}},
                {"run": "broken", "x": 2},
                {"label": "somebody else", "published": {"wer": 7.44}},
            ],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    yield load_script("study")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def speech(speech_clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "speech"
    write_folder(folder / "train", speech_clips[:6])
    write_folder(folder / "validation", speech_clips[6:8])
    return folder


def written(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def words(config, folder, speech, *more):
    return [str(config), "--output_dir", str(folder), "--set", f"speech={speech}", *more]


def record(folder, name):
    return json.loads((folder / name / "run.json").read_text())


@pytest.fixture(scope="module")
def finished(script, speech, tmp_path_factory):
    """A study that was interrupted in its first run, which nobody could wait for, and started again with a shorter one: its
    file, its folder and what the second start returned; and what lay there in between."""
    home = tmp_path_factory.mktemp("study")
    folder = home / "runs"
    endless = {**STUDY["runs"]["text-lm"]["arguments"], "max_steps": 10**6}
    config = written(home, runs={**STUDY["runs"], "text-lm": {"script": "train_text_lm.py", "arguments": endless}})
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words(config, folder, speech)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    log = folder / "text-lm" / "log.txt"
    waited = time.time() + 120
    while not (log.is_file() and log.stat().st_size) and time.time() < waited and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    between = {
        "said": said,
        "code": process.returncode,
        "status": record(folder, "text-lm")["status"],
        "models": [str(path) for path in folder.rglob("config.json")],
    }
    code = script.main(words(written(home), folder, speech))
    return config, folder, code, between


def test_an_interruption_leaves_nothing_that_loads(finished):
    _, _, _, between = finished
    assert between["code"] == 1 and "interrupted" in between["said"] and "Traceback" not in between["said"]
    assert between["status"] == "interrupted" and between["models"] == []
    # A training that outlived it would still keep others out, and the second start would have been refused


def test_a_failure_stops_only_what_needs_its_model(finished):
    _, folder, code, _ = finished
    assert code == 1
    status = {name: record(folder, name)["status"] for name in STUDY["runs"]}
    assert status == {"text-lm": "done", "broken": "failed", "after-broken": "left out", "whole": "done"}
    assert "No clip of the Training data is left" in record(folder, "broken")["error"]
    assert "No clip of the Training data is left" in (folder / "broken" / "log.txt").read_text()
    assert not (folder / "broken" / "model" / "config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(folder / "text-lm" / "model").config.num_hidden_layers == 2
    # A field of a config that a run changes leaves the others as they are
    audio = AutoModelForSpeechSeq2Seq.from_pretrained(folder / "whole" / "model" / "base").config.audio_config
    assert audio.reduction_factor == 4 and audio.conv_channels == 4


def test_the_report_has_what_was_measured_beside_what_was_published(finished):
    _, folder, _, _ = finished
    text = (folder / "report.md").read_text()
    summary = json.loads((folder / "whole" / "model" / "training_summary.json").read_text())
    header, line = (
        next(row for row in text.splitlines() if row.startswith(start)) for start in ("|  |", "| the whole |")
    )
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["WER (%)"] == f"{100 * summary['metrics']['eval_wer']:.1f}"
    assert cells["CTC loss"] == f"{summary['metrics']['eval_asr_ctc']:.3f}"
    assert cells["cross-entropy"] == f"{summary['metrics']['eval_asr_text']:.3f}"
    assert cells["trained weights"] == f"{summary['parameters']['trained']:,}"
    assert (
        cells["speed"] == "1.00×"
        and float(cells["audio s per CPU s"]) > 0
        and float(cells["memory (MiB)"].replace(",", "")) > 50
    )
    assert cells["paper: WER (%)"] == "7.12" and cells["paper: speed |"] == "1.57× |"
    assert "| somebody else |" in text and "7.44" in text
    assert "2 runs in " in text and "s of CPU time" in text and record(folder, "whole")["cpu_seconds"] > 1
    assert "2 of 4 runs are missing" in text and "`after-broken`: left out" in text and "A tiny study" in text
    assert "secondary notes" in text
    assert "--set speech=speech" in text and str(folder) not in text  # no folder of this machine
    assert (folder / "study-study-all.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_of_speech_is_no_cross_entropy(script, tmp_path):
    speaks, both = tmp_path / "speaks", tmp_path / "both"
    for run, metrics in (
        (speaks, {"eval_loss": 1.5, "eval_tts_loss": 1.5}),
        (both, {"eval_tts_loss": 1.25, "eval_asr_loss": 9.0, "eval_asr_text": 3.0, "eval_asr_wer": 0.5}),
    ):
        (run / "model").mkdir(parents=True)
        (run / "model" / "training_summary.json").write_text(json.dumps({"metrics": metrics}))
    assert script.study_report.result_of(speaks) == {"speech_loss": 1.5, "device": "cpu"}
    result = script.study_report.result_of(both)
    assert (result["wer"], result["text_loss"], result["speech_loss"]) == (50.0, 3.0, 1.25)
    (speaks / "model" / "training_summary.json").write_text(
        json.dumps({"metrics": {"eval_loss": 2.0, "eval_qa_loss": 2.0}})
    )
    assert "text_loss" not in script.study_report.result_of(speaks)
    assert script.study_report.in_short(both / "model") == "WER 50.0 %, cross-entropy 3.000, speech 1.250"


def test_what_is_done_is_not_done_again(script, finished, speech, capsys):
    config, folder, _, _ = finished
    before = {name: (folder / name / "log.txt").stat().st_size for name in ("text-lm", "whole")}
    assert script.main(words(config, folder, speech, "--only", "whole")) == 0
    said = capsys.readouterr().out
    assert "text-lm: done before" in said and "whole: done before" in said and "broken" not in said
    assert before == {name: (folder / name / "log.txt").stat().st_size for name in before}


def test_other_arguments_for_a_run_that_is_done_are_refused(script, finished, speech, tmp_path):
    _, folder, _, _ = finished
    config = written(tmp_path, base={**STUDY["base"], "learning_rate": 1e-3})
    with pytest.raises(ValueError, match="whole was run with other arguments.*learning_rate None, now 0.001"):
        script.main(words(config, folder, speech))


def test_no_figure_of_another_run_is_reported(script, finished, speech, tmp_path):
    """Of arguments that were changed, or of a model whose beginnings were made anew."""
    _, done, _, _ = finished
    folder = tmp_path / "runs"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = written(tmp_path, base={**STUDY["base"], "learning_rate": 1e-3})
    assert script.main(words(config, folder, speech, "--report-only")) == 0
    text = (folder / "report.md").read_text()
    assert "`whole`: was run with other arguments" in text and "7.12" in text and "trained weights" not in text

    config = written(tmp_path)
    assert script.main(words(config, folder, speech, "--report-only")) == 0
    assert "trained weights" in (folder / "report.md").read_text()
    shutil.rmtree(folder / "text-lm")
    with pytest.raises(ValueError, match="whole began with a model of text-lm that is not there any more"):
        script.main(words(config, folder, speech))
    assert script.main(words(config, folder, speech, "--only", "text-lm")) == 0
    text = (folder / "report.md").read_text()
    assert "`whole`: began with a model of text-lm" in text and "`text-lm`" not in text


def test_two_at_once_are_refused(script, finished, speech):
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such lock")
    config, folder, _, _ = finished
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another study.py, or a training that one started"):
            script.main(words(config, folder, speech))


def test_the_report_goes_between_its_marks(script, finished, speech, tmp_path):
    config, folder, _, _ = finished
    page = tmp_path / "study.md"
    page.write_text("# Mine, `<!-- study: begin -->`\n\n<!-- study: begin -->\nold\n<!-- study: end -->\n\nThe end.\n")
    for _ in range(2):
        assert script.main(words(config, folder, speech, "--report-only", "--report", str(page))) == 0
    text = page.read_text()
    assert text.startswith("# Mine, ") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert text.count("All of it") == 3 - 1 and "](images/study-study-all.png)" in text  # its heading and its picture
    assert (tmp_path / "images" / "study-study-all.png").is_file()
    page.write_text("# Mine, without a place for it\n")
    with pytest.raises(ValueError, match="--report.*needs the lines"):
        script.main(words(config, folder, speech, "--report-only", "--report", str(page)))
    assert page.read_text() == "# Mine, without a place for it\n"


def test_a_dry_run_prints_every_command_and_writes_nothing(script, speech, tmp_path, capsys):
    assert script.main(words(written(tmp_path), tmp_path / "runs", speech, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert all(f"# {name}: " in said for name in STUDY["runs"]) and said.count("train.py ") == 3
    assert f"--model_name_or_path {tmp_path}/runs/text-lm/model" in said and "--save_strategy no" in said
    assert not (tmp_path / "runs").exists()


def run_of(**arguments):
    return {**STUDY["runs"], "one": {"arguments": arguments}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": run_of(freeze_layers="L1-2")}, r"run one: freeze_layers: 'L1-2' names layer 2, but the layers are 0 to 1"),
        ({"runs": run_of(freeze_layers="upper")}, "run one: --freeze_layers: Layers are written"),
        ({"runs": run_of(lerning_rate=1)}, "run one: .*lerning_rate"),
        ({"runs": run_of(max_steps="many")}, "run one: .*max_steps.*many"),
        ({"runs": run_of(lora=None, merge_lora=True)}, "run one: --merge_lora needs --lora"),
        ({"runs": run_of(random_init="decoder")}, "run one: --random_init"),
        ({"runs": run_of(audio_config="{")}, "run one: --audio_config is not JSON"),
        ({"runs": run_of(train_data=["${speech},fraction=3"])}, "run one: .*at most 1, got 3"),
        ({"runs": run_of(train_data=["${speech},text_column=words"])}, "run one: .*no column 'words'"),
        ({"runs": run_of(train_data=["${speech},split=test"])}, "run one: .*no split 'test'"),
        ({"runs": run_of(train_data=["${sound}"])}, "run one: there is no variable or run 'sound'"),
        ({"runs": run_of(init_adapter="${runs.two}")}, "run one: there is no variable or run 'runs.two'"),
        ({"runs": {"whole": STUDY["runs"]["whole"]}}, "no variable or run 'runs.text-lm'"),
        ({"runs": {"whole": {}, "text-lm": STUDY["runs"]["text-lm"]}}, "whole needs the model of text-lm, which does not come"),
        ({"runs": {**STUDY["runs"], "a/b": {}}}, "'a/b' cannot be a run's name"),
        ({"runs": {**STUDY["runs"], "one": {"argument": {}}}}, "run one has no argument; there are title"),
        ({"runs": {**STUDY["runs"], "one": {"script": "push.py"}}}, "`script` must be one of"),
        ({"runs": {}}, "has no runs"),
        ({"steps": 3}, "has no steps"),
        ({"variables": {}}, "--set speech: .* has no such variable"),
        ({"variables": {"speech": None, "model": None}}, "needs a value for model: --set model="),
        ({"tables": [{"name": "t", "rows": [{"run": "nobody"}]}]}, "table t: there is no run 'nobody'"),
        ({"tables": [{"name": "t", "rows": [{"run": "whole", "published": {"wr": 1}}]}]}, "published has no wr"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_the_first_run(script, speech, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        script.main(words(written(tmp_path, **changes), tmp_path / "runs", speech))
    assert not (tmp_path / "runs").exists()


def test_data_that_cannot_be_used_is_told_before_the_first_run(script, speech, tmp_path):
    with pytest.raises(ValueError, match="no folder or manifest .*nowhere"):
        script.main(words(written(tmp_path), tmp_path / "runs", tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    for split, rows in (("train", [["file_name", "words"], ["a.wav", "b"]]), ("validation", [["file_name", "text"]])):
        (empty / split).mkdir(parents=True)
        with open(empty / split / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    runs = {"one": {"arguments": {"model_name_or_path": None, "text_config": TINY, "lora": None}}}
    config = written(tmp_path, runs=runs, tables=[])
    with pytest.raises(ValueError, match="run one: .*none of the columns file_name, words is called text"):
        script.main(words(config, tmp_path / "runs", empty))
    base = {**STUDY["base"], "train_data": [str(speech)]}
    with pytest.raises(ValueError, match="run one: .*no clips with transcripts found"):
        script.main(words(written(tmp_path, runs=runs, base=base, tables=[]), tmp_path / "runs", empty))
    assert not (tmp_path / "runs").exists()


def test_two_runs_of_one_name_are_told(script, speech, tmp_path):
    config = tmp_path / "study.yaml"
    config.write_text("variables: {speech: null}\nruns:\n  one: {}\n  one: {title: again}\n")
    with pytest.raises(ValueError, match="'one' is there twice"):
        script.main(words(config, tmp_path / "runs", speech))


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts" / "studies").glob("*.yaml")))
def test_the_studies_in_the_repository_are_valid(script, speech, tmp_path, name, capsys):
    for corpus in ("asterisk-en", "synth-en"):
        shutil.copytree(speech, tmp_path / "corpora" / corpus)
        for metadata in (tmp_path / "corpora" / corpus).glob("*/metadata.csv"):
            head, *rows = metadata.read_text().splitlines()
            metadata.write_text("\n".join([f"{head},speaker", *(f"{row},piper" for row in rows)]) + "\n")
    config = ROOT / "scripts" / "studies" / name
    variable = {"paper.yaml": "phi4", "small.yaml": "backbone"}.get(name)
    more = [] if variable is None else ["--set", f"{variable}={tmp_path / 'model'}"]
    assert script.main(words(config, tmp_path / "runs", tmp_path / "corpora", *more, "--dry-run")) == 0
    content = yaml.safe_load(config.read_text())
    said = capsys.readouterr().out
    assert f"# {len(content['runs'])} runs, all arguments are valid." in said
    if name == "small.yaml":
        return
    # Every comparison of the paper is there, with the paper's numbers
    published = {
        row["published"]["wer"] for table in content["tables"] for row in table["rows"] if row.get("published")
    }
    assert {5.61, 6.97, 7.12, 7.44, 6.58, 6.71, 7.21, 8.02, 7.40, 7.43, 7.77, 7.94} <= published


def test_bad_texts_are_told(script, tmp_path):
    import train_text_lm

    for content, message in (("a,b\n1,2\n", "no column is called text"), ("text\n\n", "has no sentence")):
        (tmp_path / "metadata.csv").write_text(content)
        arguments = ["--texts", str(tmp_path / "metadata.csv"), "--output_dir", str(tmp_path / "out")]
        with pytest.raises(ValueError, match=message):
            train_text_lm.train(train_text_lm.parse_arguments(arguments))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        train_text_lm.train(train_text_lm.parse_arguments(arguments))
