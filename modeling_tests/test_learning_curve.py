"""scripts/learning_curve.py: the numbers and the picture of a training, from what it logged."""

import csv
import json

import pytest
from conftest import load_script
from PIL import Image


@pytest.fixture(scope="module")
def script():
    return load_script("learning_curve")


def write_run(folder, history):
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return str(folder)


def test_the_phases_of_a_training_follow_each_other(script, tmp_path):
    reading = write_run(
        tmp_path / "reading",
        [
            {"step": 10, "epoch": 0.5, "loss": 3.0, "asr_ctc": 2.5, "grad_norm": 9.0, "learning_rate": 1e-3},
            {"step": 20, "epoch": 1.0, "loss": 2.0, "asr_ctc": 1.5, "learning_rate": 5e-4},
            {"step": 20, "epoch": 1.0, "eval_loss": 2.5, "eval_wer": 0.4, "eval_runtime": 3.0},
            {"step": 20, "epoch": 1.0, "train_loss": 2.5, "train_runtime": 60.0, "total_flos": 1.0},
        ],
    )
    joint = write_run(
        tmp_path / "joint", [{"step": 5, "epoch": 0.25, "loss": 1.0, "tts_mel": 0.5, "learning_rate": 1e-4}]
    )
    output = tmp_path / "curves" / "small"
    script.main([reading, joint, "--output", str(output)])

    rows = list(csv.DictReader((tmp_path / "curves" / "small.csv").open()))
    assert [(row["run"], row["step"], row["epoch"]) for row in rows] == [
        ("reading", "10", "0.5"),
        ("reading", "20", "1.0"),
        ("joint", "25", "1.25"),
    ]
    assert rows[1]["loss"] == "2.0" and rows[1]["eval_wer"] == "0.4" and rows[2]["tts_mel"] == "0.5"
    assert not {"grad_norm", "eval_runtime", "train_loss", "total_flos"} & rows[0].keys()
    with Image.open(tmp_path / "curves" / "small.png") as image:
        assert image.size == (1200, 400)  # losses, and error rates

    with pytest.raises(FileExistsError, match="--overwrite"):
        script.main([reading, "--output", str(output)])
    script.main([reading, "--output", str(output), "--overwrite"])
    assert len((tmp_path / "curves" / "small.csv").read_text().splitlines()) == 3


def test_many_terms_have_a_picture_for_each_task(script, tmp_path):
    names = [
        f"{task}_{term}"
        for task in ("asr", "tts", "continuation")
        for term in ("a", "b", "c", "d", "e", "f", "g", "h")
    ]
    run = write_run(tmp_path / "run", [{"step": step, **dict.fromkeys(names, 1.0 / step)} for step in (10, 20)])
    script.main([run, "--output", str(tmp_path / "all")])
    with Image.open(tmp_path / "all.png") as image:
        assert image.size == (3 * 800, 400)
    titles = [title for title, _ in script._by_task({**dict.fromkeys(names), "eval_tts_a": None})]
    assert titles == ["loss: asr", "loss: tts", "loss: continuation"]


def test_a_training_that_goes_on_later_has_one_curve(script, tmp_path):
    """The logs of what was before may be gone; the table is there."""
    reading, joint = (
        write_run(
            tmp_path / name,
            [{"step": step, "epoch": step / 7, "loss": 3.3, f"asr_{name}": 1 / step} for step in (5, 7)],
        )
        for name in ("reading", "joint")
    )
    script.main([reading, joint, "--output", str(tmp_path / "whole")])
    script.main([reading, "--output", str(tmp_path / "curve")])
    script.main([str(tmp_path / "curve.csv"), joint, "--output", str(tmp_path / "curve"), "--overwrite"])
    assert (tmp_path / "curve.csv").read_text() == (tmp_path / "whole.csv").read_text()
    for text in ("", "a,b\n1,2\n", "run,step\nx,y\n"):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(ValueError, match=r"other.csv is not a table of learning_curve.py"):
            script.main([str(tmp_path / "other.csv"), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("history", [[], [{"step": 1, "epoch": 1.0, "train_runtime": 2.0}]])
def test_a_run_without_a_log_is_told(script, tmp_path, history):
    run = write_run(tmp_path / "run", history)
    with pytest.raises(ValueError, match="has no log of a training"):
        script.main([run, "--output", str(tmp_path / "out")])
    (tmp_path / "run" / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="has no log of a training"):
        script.main([run, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out.csv").exists() and not (tmp_path / "out.png").exists()
