"""scripts/benchmark.py runs, compares equal work, and writes what it measured. How fast anything is depends on the
machine, so little is said here about that."""

import importlib.util
import json
import os
import sys

import pytest
import torch
from conftest import ROOT
from test_registration import run


SCRIPT = ROOT / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # dataclasses look their module up
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    del sys.modules["benchmark"]


@pytest.fixture
def plan(benchmark):
    return benchmark.make_plan(benchmark.parse_arguments(["--quick", "--device", "cpu", "--output-dir", "unused"]))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder that a quick run has written to."""
    folder = tmp_path_factory.mktemp("benchmark") / "new"
    result = run(str(SCRIPT), "--quick", "--device", "cpu", "--output-dir", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_quick_run_has_every_section(benchmark, quick):
    assert sorted(os.listdir(quick)) == ["benchmarks.json", "benchmarks.md"]  # and nothing half-written
    results = json.loads((quick / "benchmarks.json").read_text(encoding="utf-8"))
    assert set(results) == {"environment", "goals", "models", *benchmark.SECTIONS}
    environment = results["environment"]
    assert environment["command"] == "python scripts/benchmark.py --quick --device cpu"
    assert all(environment[key] for key in ("cpu", "cores", "threads", "torch", "transformers", "dtype", "date"))
    assert str(quick.parent) not in json.dumps(results)

    for features in results["features"]:
        assert features["max_difference_from_phi4"] < 1e-3  # equal work
        assert set(features["seconds"]) == set(benchmark.EXTRACTORS)
        assert all(len(seconds) == 3 for seconds in features["seconds"].values())
    for generation in results["generation"]:
        assert sum(generation["share"].values()) == pytest.approx(1.0, abs=1e-3)
        assert generation["audio_tokens"] > 0
    assert set(results["memory"]["cases"]) == {"features_mel_llm", "generate_backbone", "generate_mel_llm"}
    assert all(case["peak_mib"] >= case["before_mib"] > 0 for case in results["memory"]["cases"].values())
    assert results["training"]["label_tokens"] > 0
    assert results["throughput"] == {"not_measured": "no CUDA GPU at hand"}


@pytest.mark.slow
def test_markdown_is_made_from_the_json(benchmark, quick):
    results = json.loads((quick / "benchmarks.json").read_text(encoding="utf-8"))
    markdown = (quick / "benchmarks.md").read_text(encoding="utf-8")
    assert markdown == benchmark.render(results)
    for features in results["features"]:
        assert all(f"{ratio['median']:.2f}×" in markdown for ratio in features["times_as_fast_as"].values())
    for generation in results["generation"]:
        assert all(f"{100 * (ratio['median'] - 1):+.1f} %" in markdown for ratio in generation["ratio"].values())
    assert "Not measured: no CUDA GPU at hand." in markdown
    assert results["environment"]["command"] in markdown


def test_published_benchmarks_are_whole_and_of_one_run(benchmark):
    results = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    assert set(results) == {"environment", "goals", "models", *benchmark.SECTIONS}
    assert "--quick" not in results["environment"]["command"]
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == benchmark.render(results)
    assert results["goals"] == benchmark.goals(results)


def test_features_are_faster_than_phi4s(benchmark):
    # Measured as 4 to 10 times as fast; half of that and less is left to a busy machine
    clips = [clip["audio"] for clip in benchmark.read_clips()]
    cases = {name: case for name, case in benchmark.feature_cases("cpu").items() if name in ("mel_llm", "phi4")}
    assert benchmark.difference_from_phi4(cases, clips) < 1e-3
    calls = {name: lambda call=call: call(clips) for name, call in cases.items()}
    ratio = benchmark.ratio(benchmark.measure(calls, 5, "cpu"), "phi4", "mel_llm")
    assert ratio["of_fastest"] > 1.5


def test_throughput_runs_on_a_cpu_too(benchmark, plan):
    """All of the GPU's section but what is the GPU's own."""
    clips = benchmark.read_clips()
    runs = benchmark.throughput_section(plan, benchmark.Models(plan, clips), clips)
    assert [run["batch_size"] for run in runs] == [1, 2]
    assert all(rtfx > 0 for run in runs for rtfx in run["rtfx"].values())
    assert "RTFx, eager" in benchmark._render_throughput({"throughput": runs})[-1]


@pytest.mark.cuda
def test_quick_run_on_a_gpu(tmp_path):
    result = run(str(SCRIPT), "--quick", "--device", "cuda", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert all(case["device"] == "cuda" for case in results["memory"]["cases"].values() if "failed" not in case)
    assert {run["device"] for run in results["features"]} == {"cpu", "cuda"}
    assert isinstance(results["throughput"], list)


def test_mel_llm_and_backbone_get_the_same_prompt_and_share_weights(benchmark, plan):
    clips = benchmark.read_clips()
    models = benchmark.Models(plan, clips)
    assert models.mel_llm.lm_head.weight.data_ptr() == models.backbone.lm_head.weight.data_ptr()
    assert models.mel_llm.model.language_model is models.backbone.model
    inputs = models.inputs(benchmark.utterances(clips, 2, 1.0))
    is_audio = inputs["audio"]["input_ids"] == models.mel_llm.config.audio_token_id
    assert is_audio.any() and not (inputs["text"]["input_ids"] == models.mel_llm.config.audio_token_id).any()
    assert torch.equal(inputs["text"]["input_ids"][~is_audio], inputs["audio"]["input_ids"][~is_audio])


def test_measure_takes_turns(benchmark):
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = benchmark.measure(cases, 3, "cpu")
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(seconds) == 3 for seconds in timings.values())
    ratio = benchmark.ratio({"ours": [2.0, 4.0, 9.0], "peer": [1.0, 1.0, 3.0]}, "ours", "peer")
    assert ratio == {"median": 3.0, "low": 2.5, "high": 3.5, "of_fastest": 2.0}


def test_files_are_written_whole_or_not_at_all(benchmark, tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(TypeError):
        benchmark.write(tmp_path / "file", None)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"
    benchmark.write(tmp_path / "file", "after")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "after"


@pytest.mark.parametrize("arguments", [["--quick"], ["--only", "features"], ["--repeats", "0"], ["--size", "huge"]])
def test_arguments_that_make_no_sense_are_refused(benchmark, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.parse_arguments(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
