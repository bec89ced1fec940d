"""scripts/benchmark_tts.py runs, compares equal work, and writes what it measured."""

import importlib.util
import json
import os
import sys

import pytest
import torch
from conftest import ROOT
from test_registration import run


SCRIPT = ROOT / "scripts" / "benchmark_tts.py"


@pytest.fixture(scope="module")
def benchmark():
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(SCRIPT.parent))  # where its sibling is, as for any script
    spec = importlib.util.spec_from_file_location("benchmark_tts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_tts"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    sys.path.remove(str(SCRIPT.parent))
    for name in {"benchmark", "benchmark_tts"} - before:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_quick_run_has_every_section_and_its_markdown(benchmark, tmp_path):
    result = run(str(SCRIPT), "--quick", "--threads", "1", "--output-dir", str(tmp_path / "new"))
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "new")) == ["benchmarks_tts.json", "benchmarks_tts.md"]
    results = json.loads((tmp_path / "new" / "benchmarks_tts.json").read_text(encoding="utf-8"))
    assert set(results) == {"environment", "goals", *benchmark.SECTIONS}
    assert results["environment"]["command"] == "python scripts/benchmark_tts.py --quick --threads 1"
    assert str(tmp_path) not in json.dumps(results)
    assert [run["batch_size"] for run in results["steps"]] == [1, 2]
    assert {run["vocoder"] for run in results["speech"]} == set(benchmark.SPEAKING_VOCODERS)
    for speech in results["speech"]:
        assert 0 < speech["first_audio_ms"]["median"] / 1000 <= max(speech["seconds"]["stream"])
    short, long = (results["memory"]["cases"][f"istft:{minutes:g}"] for minutes in results["memory"]["minutes"])
    assert short["peak_mib"] >= short["before_mib"] > 0 and long["audio_seconds"] >= short["audio_seconds"] > 5
    markdown = (tmp_path / "new" / "benchmarks_tts.md").read_text(encoding="utf-8")
    assert markdown == benchmark.render(results)
    assert all(goal["text"] in markdown for goal in results["goals"])


def test_published_benchmarks_are_whole_and_of_one_run(benchmark):
    results = json.loads((ROOT / "docs" / "benchmarks_tts.json").read_text(encoding="utf-8"))
    assert set(results) == {"environment", "goals", *benchmark.SECTIONS}
    assert "--quick" not in results["environment"]["command"] and results["environment"]["threads"] == 2
    assert (ROOT / "docs" / "benchmarks_tts.md").read_text(encoding="utf-8") == benchmark.render(results)
    assert results["goals"] == benchmark.goals(results)


def test_the_backbone_takes_as_many_steps_with_the_same_prompt(benchmark, monkeypatch):
    plan = benchmark.Plan.quick(threads=1, rounds=1, seed=0)
    model, processor = benchmark.build(plan, benchmark.read_clips(), 4, None)
    inputs = processor.apply_speech_request(list(benchmark.TEXTS[:2]))
    calls, forward = [], model.model.language_model.forward

    def count(**kwargs):
        calls.append(kwargs["inputs_embeds"].shape)
        return forward(**kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", count)
    benchmark.step_backbone(model, inputs, 5)
    alone, calls[:] = list(calls), []
    model.generate(**inputs, **benchmark.fixed(5, 0))
    assert calls == alone and len(calls) == 5


def test_a_listener_that_waits(benchmark):
    """Half a second at 0.1 s, half at 0.4 s in time, a second at 1.5 s: 0.4 s too late."""
    listener = benchmark.Listener()
    listener.parts = [(0.1, 8000), (0.4, 8000), (1.5, 16000)]
    assert listener.stall(16000) == pytest.approx(0.4)


@pytest.mark.parametrize("arguments", [["--quick"], ["--only", "steps"], ["--repeats", "0"], ["--threads", "0"]])
def test_arguments_that_make_no_sense_are_refused(benchmark, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.parse_arguments(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
