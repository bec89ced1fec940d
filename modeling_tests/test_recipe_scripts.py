"""The shell script of the reader's recipe: which steps it takes, in which order, and what it goes on with. Nothing is trained here."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT


RECIPE = ROOT / "scripts" / "recipes" / "mel-llm-small-en.sh"
# In the place of Python: notes what it was called for, and leaves behind what such a call leaves
STUB = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec python3 "$@"; fi
[[ $1 != - ]] || { cat > /dev/null; exit; }
[[ $1 != torchrun ]] || shift
printf '%s ' "${0##*/}" "${1##*/}" "${@:2}" >> "$CALLS"; echo >> "$CALLS"
out=()
for ((i = 2; i <= $#; i++)); do
    if [[ ${!i} == --output_dir ]]; then j=$((i + 1)); out=("${!j}"); fi
done
[[ $1 != */pack.py ]] || out=("$3")
mkdir -p "${out[0]}"
if [[ $1 == */train.py ]]; then
    if [[ ${FAILS_AT:-none} == "$(basename "${out[0]}")" ]]; then mkdir -p "${out[0]}/checkpoint-200"; exit 3; fi
    touch "${out[0]}"/{training_summary,config}.json
else
    touch "${out[0]}/config.json"
fi
"""
STEPS = ["1-letters", "2-short", "3-all", "4-finer", "5-taught", "6-spliced"]


class Recipe:
    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        for name in ("python", "launcher"):
            (folder / name).write_text(STUB)
            (folder / name).chmod(0o755)
        for name in ("asterisk-en", "synth-en"):
            (folder / "speech" / name / "train").mkdir(parents=True)
            (folder / "speech" / name / "train" / "metadata.csv").write_text("file_name,text\n")

    def run(self, *arguments: str, **environment) -> subprocess.CompletedProcess:
        self.calls.write_text("")
        words = ["bash", str(RECIPE), str(self.folder / "speech"), str(self.folder / "out"), *arguments]
        variables = {**os.environ, "PYTHON": str(self.folder / "python"), "CALLS": str(self.calls), **environment}
        return subprocess.run(words, env=variables, capture_output=True, text=True, check=False)

    def trained(self) -> list[str]:
        """The steps that were begun, and with which program."""
        calls = [line.split() for line in self.calls.read_text().splitlines()]
        return [(call[0], Path(call[2]).stem) for call in calls if call[1] == "train.py"]

    def call(self, name: str, word: str) -> str:
        [line] = [line for line in self.calls.read_text().splitlines() if name in line and word in line]
        return line


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path)


def start_of(folder: Path) -> Path:
    start = folder / "given"
    start.mkdir()
    names = (
        "model.safetensors chat_template.jinja tokenizer.json config.json generation_config.json processor_config.json"
    )
    for name in [*names.split(), "training_summary.json"]:
        (start / name).write_text(name)
    return start


def test_all_steps_from_a_language_model(recipe):
    result = recipe.run("--seed", "3", LAUNCH=str(recipe.folder / "launcher") + " torchrun")
    assert result.returncode == 0, result.stderr
    assert recipe.trained() == [("launcher" if step > "5" else "python", step) for step in STEPS]
    assert "--seed 3" in recipe.call("train.py", "6-spliced.yaml")
    assert "more-" not in recipe.calls.read_text()  # there are none
    for name in ("asterisk", "synth"):
        call = recipe.call("prepare_data.py spliced", f"spliced-{name} ")
        assert f"--model {recipe.folder}/out/5-taught" in call and f"speech/{name}-en" in call
        assert f"out/spliced-{name},weight=" in recipe.call("train.py", "6-spliced.yaml")
    assert "6-spliced" in recipe.call("pack.py", "out/model")
    # The same command again does nothing
    assert recipe.run().returncode == 0 and recipe.calls.read_text() == ""


def test_more_voices_are_half_of_the_last_step(recipe):
    for name in ("more-a", "more-b"):
        (recipe.folder / "speech" / name).mkdir()
    assert recipe.run().returncode == 0
    call = recipe.call("train.py", "6-spliced.yaml")
    weights = [float(word.partition("weight=")[2].partition(",")[0]) for word in call.split() if "weight=" in word]
    assert "more-a/,weight=2.5" in call and "more-b/,weight=2.5" in call
    assert sum(weights) == 10


def test_an_interrupted_step_goes_on(recipe):
    assert recipe.run(FAILS_AT="4-finer").returncode == 3
    assert recipe.trained()[-1][1] == "4-finer"
    assert recipe.run().returncode == 0
    assert [step for _, step in recipe.trained()] == ["4-finer", "5-taught", "6-spliced"]


def test_a_model_that_is_given_has_the_last_step_alone(recipe):
    start = start_of(recipe.folder)
    assert recipe.run(START=str(start), FAILS_AT="6-spliced").returncode == 3
    assert (recipe.folder / "out/5-taught/model.safetensors").read_text() == "model.safetensors"
    assert recipe.run(START=str(start)).returncode == 0
    assert [step for _, step in recipe.trained()] == ["6-spliced"]


def test_what_was_trained_is_not_lost(recipe):
    start = start_of(recipe.folder)
    assert recipe.run(FAILS_AT="5-taught").returncode == 3
    result = recipe.run(START=str(start))
    assert result.returncode == 1 and "was begun without START" in result.stderr and recipe.calls.read_text() == ""
    (recipe.folder / "out/model").mkdir()
    (recipe.folder / "out/model/config.json").write_text("of before")
    result = recipe.run()
    assert result.returncode == 1 and "move it away" in result.stderr and recipe.calls.read_text() == ""
