"""scripts/estimate_memory.py: what it says of a step is what a step takes."""

import json
import weakref

import pytest
import torch
from conftest import build_tiny, load_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mel_llm import MelLLMConfig


@pytest.fixture(scope="module")
def script():
    return load_script("estimate_memory")


class Living(TorchDispatchMode):
    """The most bytes of tensors that live at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return output


def estimated(script, config, args, training, checkpointing) -> dict:
    rows = script.rows_of(config, args, training)[2]
    return next(row for row in rows if row["checkpointing"] == checkpointing)


@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_a_real_step(script, training, checkpointing):
    """On the CPU in float32; every tensor that lives is counted. Stated tolerance: 5 %."""
    text = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 256}
    config = MelLLMConfig.from_preset("small", vocab_size=300, text_config=text)
    options = ["--sharding", "none", "--gpus", "1", "--dtype", "float32", "--lora_r", "8"]
    args = script.parse([*options, "--audio_seconds", "32", "--clip_seconds", "8"])
    row = estimated(script, config, args, training, checkpointing)
    with Living() as living:
        script.run_step(config, args, training, checkpointing, "cpu")
    peak = living.peak
    assert row["total"] == pytest.approx(peak, rel=0.05)
    assert row["activations"] > 0.25 * peak  # so that they are tested too


@pytest.mark.cuda
@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_that_of_a_step_on_a_gpu(script, training, checkpointing):
    config = MelLLMConfig.from_preset("small", text_config={"num_hidden_layers": 12, "hidden_size": 1024})
    args = script.parse(["--sharding", "none", "--gpus", "1", "--audio_seconds", "240"])
    row = estimated(script, config, args, training, checkpointing)
    assert script.measure(config, args, training, checkpointing)["peak"] == pytest.approx(row["total"], rel=0.20)


def test_parameters_and_operations_are_counted(script, tokenizer):
    """Against the model itself, and against 6 operations for each weight and token (2 forward, 4 backward)."""
    config = MelLLMConfig.from_preset("small")
    args = script.parse(["--sharding", "none", "--gpus", "1"])
    sizes, step, _ = script.rows_of(config, args, "full")
    model = script.build(config, "full", None, torch.float32, "cpu")
    assert sizes.trained == sum(parameter.numel() for parameter in model.parameters()) and sizes.frozen == 0
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    assert step.backward_flops == pytest.approx(2 * step.forward_flops, rel=0.1)
    assert step.forward_flops > 2 * layers * step.tokens
    # In LoRA the frozen weights have no gradient: two thirds of the work and some for the adapters
    _, adapted, _ = script.rows_of(config, script.parse(["--lora_r", "4"]), "lora")
    assert adapted.backward_flops < 0.8 * step.backward_flops
    assert adapted.flops(True) > adapted.flops(False)


def test_sharding_divides_what_it_says(script):
    sizes = script.Sizes(trained=1000, frozen=0, largest_layer=10, outside=50)

    def of(sharding, gpus):
        return script.state_bytes(sizes, sharding, gpus, itemsize=2, master=True)

    assert of("none", 1) == {"weights": 6000, "gradients": 4000, "optimizer": 8000}
    for name in ("zero1", "zero2"):
        assert of(name, 8)["weights"] == of(name, 1)["weights"] == 2000
        assert of(name, 8)["optimizer"] == of(name, 1)["optimizer"] / 8 == 1500
    assert of("zero1", 8)["gradients"] == 2000 + 500 and of("zero2", 8)["gradients"] == 250 + 500
    assert of("fsdp2", 8) == {"weights": 500 + 140, "gradients": 500 + 40, "optimizer": 1000}
    assert of("fsdp2", 1)["weights"] == 4000


def test_the_table_of_the_paper_s_model(script, tmp_path, capsys):
    """3.8 B parameters, from the config alone."""
    path = tmp_path / "figures.json"
    options = ["--training", "full", "--sharding", "none", "zero2", "--gpus", "1", "8", "--json", str(path)]
    script.main(options)
    printed = capsys.readouterr().out
    figures = json.loads(path.read_text())["full"]
    assert 3.7e9 < figures["sizes"]["trained"] < 4.0e9
    rows = {(row["sharding"], row["gpus"], row["checkpointing"]): row for row in figures["rows"]}
    # Weights, gradients and Adam in float32, and a copy in bfloat16: 18 bytes a parameter
    one = rows["none", 1, False]
    assert one["total"] - one["activations"] == 18 * figures["sizes"]["trained"]
    assert rows["zero2", 8, True]["total"] < 0.4 * rows["zero2", 1, True]["total"]
    assert rows["zero2", 8, True]["activations"] < 0.5 * rows["zero2", 8, False]["activations"]
    assert "| zero2 | 8 | on |" in printed and "3,861 M of 3,861 M" in printed


def test_a_folder_with_nothing_but_a_config(script, tokenizer, tmp_path, capsys):
    build_tiny(tokenizer, "gemma3_text")[0].config.save_pretrained(tmp_path)
    script.main(["--model_name_or_path", str(tmp_path), "--gpus", "2", "--lora_r", "4"])
    printed = capsys.readouterr().out
    assert "LoRA r=4" in printed and "full fine-tuning" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip_seconds", "90"], "--clip_seconds 90 is more than --audio_seconds 60"),
        (["--utilisation", "2"], "--utilisation must be"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--preset", "huge"], "--preset must be one of paper, small"),
        (["--audio_seconds", "-1"], "--audio_seconds must be a positive number"),
        (["--json", "nowhere/x.json"], "there is no folder"),
    ],
)
def test_what_makes_no_sense_is_refused(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_real_step_needs_a_gpu(script):
    if torch.cuda.is_available():
        assert script.parse(["--measure"]).measure
        return
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        script.main(["--preset", "small", "--measure"])
