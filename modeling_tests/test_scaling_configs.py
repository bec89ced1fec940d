"""The configs for several GPUs: read by the libraries they are for, and run on the CPU as far as those can."""

import importlib.util
import json

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from test_train_script import SCRATCH, finish, folder, launch, losses, words  # noqa: F401  (folder is a fixture)


CONFIGS = ROOT / "scripts" / "configs"
SCRIPT = str(ROOT / "scripts" / "train.py")


def with_accelerate(name: str) -> list[str]:
    return ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / name), "--num_processes", "2"]


def test_configs_are_what_the_libraries_read():
    for path in CONFIGS.glob("*.yaml"):
        config = load_config_from_file(str(path)).to_dict()
        written = yaml.safe_load(path.read_text())
        assert {key: config[key] for key in ("distributed_type", "num_processes")} == {
            key: written[key] for key in ("distributed_type", "num_processes")
        }
    fsdp = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    # With sharded ones, nothing would be saved at the end that from_pretrained reads
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    for stage in (1, 2):
        config = yaml.safe_load((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
        settings = json.loads((ROOT / config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == stage


def test_the_script_runs_under_the_fsdp2_config(folder, tmp_path):  # noqa: F811
    """accelerate shards on GPUs only: on the CPU this is the command and data parallel training; test_distributed.py
    holds the sharding itself."""
    common = [*SCRATCH, "--use_cpu", "--max_steps", "3", "--max_batch_tokens", "500", "--packing"]
    launcher = [*with_accelerate("fsdp2.yaml"), "--mixed_precision", "no", "--main_process_port", "0"]
    finish(launch(*launcher, SCRIPT, *words(folder, tmp_path / "run", *common)))
    assert len(losses(tmp_path / "run")) == 3 and (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, which is optional")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_trains_as_data_parallel_training_does_and_goes_on(folder, tmp_path, stage, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(ROOT)  # the YAML names its JSON from here
    common = [*SCRATCH, "--use_cpu", "--max_steps", "6", "--save_steps", "3", "--max_batch_tokens", "500", "--packing"]
    plain = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    finish(launch(*plain, SCRIPT, *words(folder, tmp_path / "plain", *common)))
    deep = [*with_accelerate(f"deepspeed_zero{stage}.yaml"), "--main_process_port", "0"]
    finish(launch(*deep, SCRIPT, *words(folder, tmp_path / "deep", *common)))
    expected = losses(tmp_path / "plain")
    assert len(expected) == 6 and losses(tmp_path / "deep") == pytest.approx(expected, rel=1e-3)
    # As if the run had been killed after its first checkpoint
    for path in (tmp_path / "deep").iterdir():
        if path.is_file():
            path.unlink()
    for path in sorted((tmp_path / "deep" / "checkpoint-6").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "deep" / "checkpoint-6").rmdir()
    assert "Going on from" in finish(launch(*deep, SCRIPT, *words(folder, tmp_path / "deep", *common)))
    assert losses(tmp_path / "deep") == pytest.approx(expected, rel=1e-3)
