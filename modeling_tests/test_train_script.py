"""scripts/train.py as a user runs it: whole and with LoRA, killed and started again, from folders and streams."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT, TINY_AUDIO, load_script, tiny_text_config
from packaging.version import Version
from peft import PeftModel
from test_training_data import write_folder
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

from mel_llm.training import last_checkpoint
from mel_llm.training.command_line import arguments_of


SCRIPT = str(ROOT / "scripts" / "train.py")
TEXT = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
SCRATCH = ["--text_config", json.dumps(TEXT), "--audio_config", json.dumps({"conv_channels": 8, "hidden_size": 32})]


@pytest.fixture(scope="module")
def script():
    return load_script("train")


@pytest.fixture
def folder(speech_clips, tmp_path):
    write_folder(tmp_path / "speech" / "train", speech_clips[:12])
    write_folder(tmp_path / "speech" / "validation", speech_clips[:4])
    return str(tmp_path / "speech")


def words(folder, output, *more):
    common = {
        "--train_data": folder,
        "--output_dir": str(output),
        "--per_device_train_batch_size": "4",
        "--learning_rate": "3e-3",
        "--logging_steps": "1",
        "--generation_max_length": "8",
        "--report_to": "none",
        "--disable_tqdm": "true",
    }
    cpu = [] if torch.cuda.is_available() else ["--use_cpu"]
    given = {word for word in more if word.startswith("--")}
    return [item for pair in common.items() if pair[0] not in given for item in pair] + cpu + list(more)


def launch(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(output) -> dict[int, float]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def train(script, *arguments):
    run = script.prepare([*arguments])
    script.train(run)
    return run


def test_full_fine_tuning(folder, speech_clips, tmp_path):
    output = tmp_path / "run"
    arguments = words(folder, output, *SCRATCH, "--eval_data", folder, "--num_train_epochs", "8", "--spec_augment")
    printed = finish(launch(SCRIPT, *arguments))
    assert "12 clips" in printed and "4 clips" in printed and "parameters are trained" in printed
    curve = losses(output)
    assert len(curve) == 24 and curve[24] < 0.8 * curve[1]
    summary = json.loads((output / "training_summary.json").read_text())
    assert {"eval_wer", "eval_cer", "train_loss"} <= summary["metrics"].keys()
    assert summary["data"]["train"]["speech"]["num_clips"] == 12

    assert not (output / "training_args.bin").exists() and not (output / ".saving").exists()
    recogniser = pipeline("automatic-speech-recognition", model=str(output))
    assert isinstance(recogniser(speech_clips[0]["array"])["text"], str)
    config = recogniser.model.config
    longest = max(clip["duration"] for clip in speech_clips[:12])
    assert config.audio_config.max_audio_seconds == pytest.approx(longest, abs=0.01)
    assert recogniser.model.model.audio_embedder.normalizer.global_mean.abs().min() > 1

    before = (output / "model.safetensors").stat().st_mtime_ns
    assert "trained already" in finish(launch(SCRIPT, *arguments))
    assert (output / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("epochs", "more"),
    [(10, ["--lora", "small"]), (5, ["--tasks", "asr,tts"])],
    ids=["lora", "joint"],
)
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(folder, tmp_path, epochs, more):
    """With everything random in it: order, dropout, speed perturbation, SpecAugment, workers, mixing by weight."""
    random = [
        *("--spec_augment", "--speed_factors", "0.9", "1.0", "1.1", "--dataloader_num_workers", "1"),
        *("--text_config", json.dumps({**TEXT, "attention_dropout": 0.2}), *SCRATCH[2:]),
        *("--train_data", f"{folder},weight=2", f"{folder},split=validation,weight=1"),
        *("--save_strategy", "steps", "--save_steps", "5", "--num_train_epochs", str(epochs), *more),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(launch(SCRIPT, *words(folder, whole, *random)))

    process = launch(SCRIPT, *words(folder, cut, *random), start_new_session=True)
    waited = time.time() + 120
    while last_checkpoint(cut) is None and time.time() < waited and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert last_checkpoint(cut) is not None and not (cut / "training_summary.json").exists()
    # What the kill may leave behind
    (cut / "checkpoint-999").mkdir()
    (cut / "checkpoint-999" / "config.json").write_text("{")
    (cut / "checkpoint-998").mkdir()
    (cut / "checkpoint-998" / "trainer_state.json").write_text('{"epoch": ')
    shutil.rmtree(cut / ".saving", ignore_errors=True)
    assert "Going on from" in finish(launch(SCRIPT, *words(folder, cut, *random)))
    assert losses(cut) == losses(whole) and len(losses(whole)) == 40


def test_lora_from_a_language_model_of_any_family(script, folder, speech_clips, tokenizer, tmp_path):
    """The backbone is one argument."""
    for family in ("qwen3", "gpt2"):
        base = tmp_path / family
        overrides = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512} if family == "gpt2" else {}
        AutoModelForCausalLM.from_config(tiny_text_config(family, **overrides)).save_pretrained(base)
        tokenizer.save_pretrained(base)
        output = tmp_path / f"{family}-lora"
        audio = ["--audio_config", json.dumps(TINY_AUDIO)]
        more = ["--model_name_or_path", str(base), "--lora", "small", "--num_train_epochs", "10", *audio]
        run = train(script, *words(folder, output, *more))
        curve = losses(output)
        assert curve[max(curve)] < curve[1]
        assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()

        trained = run.trainer.model.eval()
        inputs = run.processor(audio=speech_clips[0]["array"])
        expected = trained.generate(**inputs, max_new_tokens=8)
        again = PeftModel.from_pretrained(
            AutoModelForSpeechSeq2Seq.from_pretrained(str(output / "base")), str(output)
        ).eval()
        assert torch.equal(again.generate(**inputs, max_new_tokens=8), expected)
        if Version(transformers.__version__) >= Version("5.18"):  # before, modules_to_save are lost
            recogniser = pipeline("automatic-speech-recognition", model=str(output))
            text = recogniser(speech_clips[0]["array"], generate_kwargs={"max_new_tokens": 8})["text"]
            assert text == run.processor.decode(expected[0], skip_special_tokens=True)


def test_merged_lora_is_a_model_of_its_own(script, folder, speech_clips, tiny_folder, tmp_path):
    output = tmp_path / "merged"
    more = [
        "--model_name_or_path",
        tiny_folder,
        "--lora",
        "paper",
        "--lora_r",
        "4",
        "--merge_lora",
        "--max_steps",
        "3",
    ]
    train(script, *words(folder, output, *more))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(str(output))
    assert not (output / "adapter_config.json").exists() and not (output / "base").exists()
    before = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], before.state_dict()[name])
    processor = AutoProcessor.from_pretrained(str(output))
    model.generate(**processor(audio=speech_clips[0]["array"]), max_new_tokens=4)


def test_streams_are_mixed_and_end_with_the_steps(script, folder, tmp_path):
    data = [f"{folder},streaming=true,weight=3", f"{folder},split=validation,weight=1"]
    output = tmp_path / "stream"
    run = train(script, *words(folder, output, "--train_data", *data, "--max_steps", "6", *SCRATCH))
    assert run.trainer.state.global_step == 6 and (output / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="max_steps"):
        script.prepare(words(folder, tmp_path / "x", "--train_data", *data, *SCRATCH))


def test_features_on_the_device_are_those_of_the_workers(script, folder, tmp_path):
    curves = []
    for name, more in (("workers", []), ("device", ["--features_on_device"])):
        train(script, *words(folder, tmp_path / name, *SCRATCH, "--max_steps", "4", "--spec_augment", *more))
        curves.append(list(losses(tmp_path / name).values()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_bad_clips_do_not_stop_a_run(script, folder, tmp_path):
    with open(f"{folder}/train/metadata.csv", "a") as file:
        file.write("gone.wav,Gone.\n")
    path = f"{folder}/train/00.wav"
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:  # its header still announces all of it
        file.write(content[: len(content) // 2])
    run = train(script, *words(folder, tmp_path / "run", *SCRATCH, "--num_train_epochs", "2"))
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["data"]["train"]["speech"]["left_out"] == {"missing or not audio": 1}
    assert summary["skipped_in_training"] == {"unreadable": 1, "names": ["00.wav"]}
    assert run.trainer.state.global_step == 6


def test_a_file_of_arguments(script, folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train_data: [{folder}]\noutput_dir: {tmp_path / 'run'}\nmax_steps: 2\nuse_cpu: true\nreport_to: none\n"
        "text_config: {num_hidden_layers: 1, hidden_size: 64, intermediate_size: 96}\nlearning_rate: 1.0e-3\n"
    )
    model_args, data_args, training_args = script.parse_arguments([str(config), "--learning_rate", "0.5"])
    assert data_args.train_data == [folder] and json.loads(model_args.text_config)["num_hidden_layers"] == 1
    assert training_args.learning_rate == 0.5 and training_args.max_steps == 2 and training_args.use_cpu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_data", "./nowhere"], "no folder or manifest"),
        (["--max_seconds", "0.2"], "No clip of the Training data"),
        (["--text_config", "{"], "--text_config is not JSON"),
        (["--audio_config", '{"reduction": 4}'], "no field reduction"),
        (["--text_normalizer", "upper"], "no text normalizer"),
        (["--lora", "huge"], "`preset` must be one of"),
        (["--freeze", "nothing_like_this"], "no parameter's name matches"),
        (["--freeze", "."], "nothing is left to train"),
        (["--freeze", "("], "not a regular expression"),
        (["--text_config", '{"hiden_size": 8}'], "no field hiden_size"),
        (["--eval_strategy", "epoch"], "needs --eval_data"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--speed_factors", "9"], "0.5 to 2"),
    ],
)
def test_what_cannot_work_is_told_before_training(script, folder, tmp_path, arguments, message):
    scratch = [] if {"--text_config", "--audio_config"} & set(arguments) else SCRATCH
    model = ["--model_name_or_path", str(tmp_path)] if "--dtype" in arguments else scratch
    with pytest.raises((ValueError, OSError), match=message):
        script.prepare(words(folder, tmp_path / "run", *model, *arguments))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_model_in_the_way_is_not_overwritten(script, folder, tiny_folder, tmp_path):
    output = tmp_path / "mine"
    shutil.copytree(tiny_folder, output)
    with pytest.raises(FileExistsError, match="Choose another"):
        script.prepare(words(folder, output, *SCRATCH))


def test_user_errors_have_no_traceback(folder, tmp_path):
    process = launch(SCRIPT, *words("./nowhere", tmp_path / "run"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "train.py: There is no folder" in output and "Traceback" not in output


def test_merging_later_leaves_no_adapter_behind(script, folder, tiny_folder, tmp_path):
    """A stale adapter would be loaded on top of the merged weights."""
    output = tmp_path / "run"
    more = ["--model_name_or_path", tiny_folder, "--lora", "small"]
    train(script, *words(folder, output, *more, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"))
    assert (output / "adapter_config.json").is_file()
    (output / "notes.txt").write_text("mine")
    again = ["--model_name_or_path", str(output), "--lora", "small", "--init_adapter", str(output)]
    with pytest.raises(ValueError, match="holds adapters itself"):  # which would win without a word
        script.prepare(words(folder, tmp_path / "other", *again))
    before = json.loads((output / "training_summary.json").read_text())
    train(script, *words(folder, output, *more, "--max_steps", "2", "--merge_lora"))
    after = json.loads((output / "training_summary.json").read_text())
    assert after["metrics"]["train_loss"] == before["metrics"]["train_loss"] > 0
    assert after["resources"] == before["resources"] and after["length"]["merge_lora"]
    assert not list(output.glob("adapter*")) and (output / "model.safetensors").is_file()
    assert (output / "notes.txt").read_text() == "mine"


def test_a_run_goes_on_in_its_own_way(script, folder, tiny_folder, tmp_path):
    whole, lora = tmp_path / "whole", tmp_path / "lora"
    model = ["--model_name_or_path", tiny_folder, "--save_strategy", "steps", "--save_steps", "1"]
    train(script, *words(folder, whole, *model, "--max_steps", "1"))
    train(script, *words(folder, lora, *model, "--max_steps", "1", "--lora", "small"))
    for output, more, message in (
        (whole, ["--lora", "small"], "a whole model"),
        (lora, [], "adapters"),
        (lora, ["--lora", "small", "--lora_r", "4"], "rank 16, not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            script.prepare(words(folder, output, *model, "--max_steps", "3", *more))


def test_nothing_trained_is_nothing_saved(script, folder, tmp_path):
    output = tmp_path / "run"
    more = ["--per_device_train_batch_size", "64", "--dataloader_drop_last", "--max_steps", "2"]
    with pytest.raises(SystemExit, match="not one step"):
        train(script, *words(folder, output, *SCRATCH, *more))
    assert not (output / "model.safetensors").exists()


def test_the_best_error_rate_is_the_lowest(script, folder, tmp_path):
    arguments = words(folder, tmp_path, "--metric_for_best_model", "wer")
    assert script.parse_arguments(arguments)[2].greater_is_better is False
    assert arguments_of({"save_strategy": False, "eval_data": []}) == ["--save_strategy", "no"]
    with pytest.raises(SystemExit):
        script.parse_arguments(words(folder, tmp_path, "--merge_lora"))


def test_a_folder_called_base_is_not_overwritten(script, folder, tokenizer, tmp_path):
    base = tmp_path / "text-model"
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "run" / "base").mkdir(parents=True)
    (tmp_path / "run" / "base" / "config.json").write_text("precious")
    audio = ["--audio_config", json.dumps(TINY_AUDIO)]
    with pytest.raises(FileExistsError, match="something else"):
        script.prepare(words(folder, tmp_path / "run", "--model_name_or_path", str(base), "--lora", "small", *audio))
    assert (tmp_path / "run" / "base" / "config.json").read_text() == "precious"
