"""Two processes on the CPU: data parallel training through `accelerate launch`, and FSDP2's sharding of the model."""

import json

import pytest
from conftest import ROOT
from test_train_script import SCRATCH, finish, folder, launch, losses, words  # noqa: F401  (folder is a fixture)


CTC = ["--audio_config", json.dumps({**json.loads(SCRATCH[3]), "ctc_weight": 0.5, "ctc_rate": 4})]


@pytest.mark.parametrize(
    "more", [[], ["--lora", "small"], [*CTC, "--ctc_only_steps", "4"]], ids=["full", "lora", "letters"]
)
def test_two_processes_train_as_one_with_twice_the_batch(folder, tmp_path, more):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    common = [
        *SCRATCH,
        "--num_train_epochs",
        "3",
        "--use_cpu",
        "--eval_data",
        folder,
        "--group_by_length",
        "false",
        *more,
    ]
    script = str(ROOT / "scripts" / "train.py")
    finish(launch(script, *words(folder, one, "--per_device_train_batch_size", "4", *common)))
    # --multi_gpu is accelerate's word for several processes on one machine; the script's --use_cpu keeps them there
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    finish(launch(*accelerate, script, *words(folder, two, "--per_device_train_batch_size", "2", *common)))
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (one, two)]
    terms = [[entry["asr_ctc"] for entry in log if "asr_ctc" in entry] for log in logs]
    assert terms[1] == pytest.approx(terms[0], rel=1e-3) and len(terms[0]) == (9 if "--ctc_only_steps" in more else 0)
    assert len(losses(two)) == 9 and losses(two) == pytest.approx(losses(one), rel=1e-3)
    metrics = [json.loads((path / "training_summary.json").read_text())["metrics"] for path in (one, two)]
    assert metrics[0]["eval_wer"] == pytest.approx(metrics[1]["eval_wer"])


SHARDED = """
import torch, torch.distributed as dist
from conftest import build_tiny
from mel_llm.training import train_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

dist.init_process_group("gloo")
rank = dist.get_rank()
tokenizer = train_tokenizer(["hello world"], vocab_size=320)
whole, _ = build_tiny(tokenizer)
sharded, _ = build_tiny(tokenizer)
sharded.load_state_dict(whole.state_dict())
mesh = init_device_mesh("cpu", (2,))
for module in list(sharded.modules()):
    if type(module).__name__ in sharded._no_split_modules:
        fully_shard(module, mesh=mesh)
fully_shard(sharded, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

generator = torch.Generator().manual_seed(1)
features = torch.randn(4, 50, 80, generator=generator) + 12
labels = torch.randint(4, 300, (4, 6), generator=generator)
mine = slice(2 * rank, 2 * rank + 2)
optimisers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, sharded)]
for _ in range(3):
    expected = whole.train()(input_features=features, labels=labels).loss
    loss = sharded.train()(input_features=features[mine], labels=labels[mine]).loss
    expected.backward()
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-4, atol=1e-4)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
for (name, ours), (_, theirs) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
    torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-3, atol=1e-4, msg=name)
ids = sharded.eval().generate(features[:1], max_new_tokens=4)
assert torch.equal(ids, whole.eval().generate(features[:1], max_new_tokens=4))
if rank == 0:
    print("sharded training equals whole training")
dist.destroy_process_group()
"""


def test_fsdp2_shards_train_as_the_whole_model(tmp_path, monkeypatch):
    """accelerate turns FSDP on for GPUs only, so this drives the same `fully_shard` over gloo by itself."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT / 'modeling_tests'}")
    arguments = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    assert "sharded training equals whole training" in finish(launch(*arguments, str(tmp_path / "sharded.py")))
