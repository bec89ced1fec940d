"""The Open ASR Leaderboard's own script, unchanged, on a Mel-LLM; and its scorer on what ours writes."""

import importlib.util
import json
import os

import pytest
import torch
from conftest import ROOT
from test_registration import run
from test_training_data import write_folder


CLONE = os.environ.get("MEL_LLM_LEADERBOARD")
_NEEDED = ("torchcodec", "kaldialign", "num2words", "regex")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(
        CLONE is None, reason="MEL_LLM_LEADERBOARD does not name a clone of huggingface/open_asr_leaderboard"
    ),
    pytest.mark.skipif(bool(_MISSING), reason=f"the leaderboard's code needs {', '.join(_MISSING)}"),
]

# `evaluate.load("wer")` reads this file where the Hub cannot be reached
WER = """
import mel_llm.evaluation


class WER(mel_llm.evaluation.WordErrorRate):
    def __init__(self, **kwargs):
        super().__init__(normalizer="none", **kwargs)

    def _compute(self, *args, **kwargs):
        return super()._compute(*args, **kwargs)["wer"]
"""

# The script knows GPUs only. Without one, its device 0 is the CPU, and its CUDA events are a clock.
NO_GPU = """
import runpy, sys, time
import torch
from transformers.feature_extraction_utils import BatchFeature


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def without_numbers(to):
    return lambda self, *args, **kwargs: to(self, *["cpu" if isinstance(a, int) else a for a in args], **kwargs)


torch.cuda.synchronize, torch.cuda.Event = lambda device=None: None, Event
torch.nn.Module.to, BatchFeature.to = without_numbers(torch.nn.Module.to), without_numbers(BatchFeature.to)

import mel_llm  # all that a Mel-LLM needs

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--torch_compile", "default"]], ids=["eager", "compiled"])
def test_the_leaderboards_script(tiny_folder, speech_clips, tmp_path, more):
    write_folder(tmp_path / "recordings" / "test", speech_clips[:6])
    (tmp_path / "wer").mkdir()
    (tmp_path / "wer" / "wer.py").write_text(WER)
    (tmp_path / "no_gpu.py").write_text(NO_GPU)
    path = os.pathsep.join([CLONE, str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    options = ["--batch_size", "4", "--max_new_tokens", "8"]
    script = os.path.join(CLONE, "transformers", "run_eval.py")
    theirs = run(
        *(["-m", "mel_llm"] if torch.cuda.is_available() else ["no_gpu.py"]),
        *(script, "--model_id", tiny_folder, "--dataset_path", "./recordings", "--dataset", "default"),
        *("--split", "test", "--device", "0", "--dtype", "float32", "--warmup_steps", "1", *options, *more),
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    rate = float(theirs.stdout.split("WER: ")[1].split(" %")[0])
    (manifest,) = (tmp_path / "results").glob("*.jsonl")
    texts = [json.loads(line)["pred_text"].strip() for line in manifest.read_text().splitlines()]

    ours = run(
        *(str(ROOT / "scripts" / "evaluate_asr.py"), "--model", tiny_folder, "--data", "recordings"),
        *("--output_dir", "ours", "--normalizer", "python:normalizer.EnglishTextNormalizer", "--dtype", "float32"),
        *options,
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert ours.returncode == 0, ours.stderr
    model = json.loads((tmp_path / "ours" / "results.json").read_text())["models"][0]
    totals = model["sets"][0]["totals"]
    (raw,) = (tmp_path / "ours" / "raw").rglob("MODEL_*.jsonl")
    assert [json.loads(line)["pred_text"] for line in raw.read_text().splitlines()] == texts
    assert round(100 * totals["wer"]["value"], 2) == pytest.approx(rate, abs=0.011)

    score = "from normalizer import eval_utils; eval_utils.score_results('ours/raw', 'mel-llm-tiny')"
    scored = run("-c", score, cwd=tmp_path, PYTHONPATH=path)
    assert f"WER = {100 * totals['wer']['value']:.2f} %" in scored.stdout, scored.stderr
    assert f"RTFx = {totals['rtfx']['value']:.2f}" in scored.stdout
