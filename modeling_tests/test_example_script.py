"""transformers' example script for Whisper, unchanged, on a Mel-LLM."""

import importlib.util
import json
import os
import re

import pytest
from conftest import ROOT
from test_registration import run
from test_training_data import write_folder


SCRIPT = os.environ.get("MEL_LLM_EXAMPLE_SCRIPT")


@pytest.mark.skipif(SCRIPT is None, reason="MEL_LLM_EXAMPLE_SCRIPT does not name run_speech_recognition_seq2seq.py")
@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="the script decodes with torchcodec")
def test_example_script(tiny_folder, speech_clips, tmp_path):
    write_folder(tmp_path / "recordings" / "train", speech_clips[:8])
    write_folder(tmp_path / "recordings" / "validation", speech_clips[:4])
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(), re.M | re.S)
    (tmp_path / "wer").mkdir()
    (tmp_path / "wer" / "wer.py").write_text(blocks[-1])
    result = run(
        *(
            "-m",
            "mel_llm",
            os.path.abspath(SCRIPT),
            "--model_name_or_path",
            tiny_folder,
            "--dataset_name",
            "./recordings",
        ),
        *("--text_column_name", "text", "--eval_split_name", "validation", "--do_train", "--do_eval"),
        *("--predict_with_generate", "--generation_max_length", "12", "--freeze_feature_encoder", "False"),
        *("--max_steps", "12", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4", "--use_cpu"),
        *("--output_dir", "out", "--report_to", "none"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_wer"] > 0 and metrics["train_loss"] > 0
