"""Layers that are not trained, what starts at random or from other adapters, and parts of the data: the paper's ablations."""

import itertools
import json

import pytest
import torch
from conftest import TINY_AUDIO, build_tiny, tiny_text_config
from peft import get_peft_model
from test_train_script import SCRATCH, folder, script, train, words  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

from mel_llm.conversion import parse_layers
from mel_llm.training import SpeechSource, describe_trainable, freeze_layers, lora_config, trainable_table
from mel_llm.training.report import select_clips
from mel_llm.training.sources import load_source


FOUR = {"num_hidden_layers": 4}


def trained_layers(model) -> set[int]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L24-31", list(range(24, 32))),
        ("24-31", list(range(24, 32))),
        ("L24-L31", list(range(24, 32))),
        ("L24-", list(range(24, 32))),
        ("24,25,30-31", [24, 25, 30, 31]),
        ("l0", [0]),
    ],
)
def test_layers_are_written_in_several_ways(text, expected):
    assert parse_layers(text, 32) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L24-32", "names layer 32, but the layers are 0 to 31"),
        ("40-", "names layer 40"),
        ("31-24", "runs backwards"),
        ("L", "are written"),
        ("24..31", "are written"),
        ("", "are written"),
    ],
)
def test_layers_that_are_not_there(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_layers_have_no_adapters(tokenizer, family):
    text = (
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "vocab_size": 320} if family == "gpt2" else FOUR
    )
    model, _ = build_tiny(tokenizer, family, text=text)
    peft_model = get_peft_model(model, lora_config(model, "small", frozen_layers=[2, 3]))
    adapters = {name.split(".lora_")[0] for name, _ in peft_model.named_parameters() if ".lora_" in name}
    layer = ".h." if family == "gpt2" else ".layers."
    assert {int(name.split(layer)[1].split(".")[0]) for name in adapters} == {0, 1}
    parts = {row["part"]: row for row in describe_trainable(peft_model)}
    assert parts["adapters in layers 0-1"]["trained"] == parts["adapters in layers 0-1"]["parameters"] > 0
    assert sum(row["trained"] for part, row in parts.items() if part.startswith("language_model")) == 0
    with pytest.raises(ValueError, match="all the layers"):
        lora_config(model, "small", frozen_layers=range(4))


def test_frozen_layers_do_not_move_and_the_table_says_so(tokenizer):
    model, _ = build_tiny(tokenizer, text=FOUR)
    freeze_layers(model, [1, 2, 3])
    assert trained_layers(model) == {0}
    rows = {row["part"]: row for row in describe_trainable(model)}
    assert rows["language_model.layers 1-3"]["trained"] == 0
    assert rows["language_model.layers 0"]["trained"] == rows["language_model.layers 0"]["parameters"]
    assert 3 * rows["language_model.layers 0"]["parameters"] == rows["language_model.layers 1-3"]["parameters"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["trained"] for row in rows.values()) == trained
    assert f"{trained:,}" in trainable_table(list(rows.values())).splitlines()[-1]
    with pytest.raises(ValueError, match="0 to 3, got 4"):
        freeze_layers(model, [4])


@pytest.mark.parametrize("lora", [[], ["--lora", "small"]], ids=["full", "lora"])
def test_frozen_layers_in_the_script(script, folder, tiny_folder, tmp_path, lora):  # noqa: F811
    output = tmp_path / "run"
    start = ["--model_name_or_path", tiny_folder, "--max_steps", "2", *lora]
    run = train(script, *words(folder, output, *start, "--freeze-layers", "L1-"))
    summary = json.loads((output / "training_summary.json").read_text())
    parts = {row["part"]: row["trained"] for row in summary["parameters"]["parts"]}
    assert sum(parts.values()) == summary["parameters"]["trained"] and summary["length"]["freeze_layers"] == "L1-"
    resources = summary["resources"]
    assert resources["audio_seconds_per_second"] > 0 and resources["steps"] == 1 and resources["peak_memory"] > 1e7
    before = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).state_dict()
    after = {name.removeprefix("base_model.model."): value for name, value in run.trainer.model.state_dict().items()}
    frozen = "model.language_model.layers.1.mlp.up_proj.weight"
    assert torch.equal(after[frozen], before[frozen])
    if lora:
        assert parts["adapters in layers 0"] > 0 and not any("layers.1" in name and "lora" in name for name in after)
    else:
        name = "model.language_model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(after[name], before[name])


def test_adapters_of_another_front_end_are_where_lora_begins(script, folder, tokenizer, tmp_path):  # noqa: F811
    """Also in layers that are frozen, which keep them as they are; and a stopped run goes on so."""
    base = tmp_path / "text"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encoder = {
        "encoder_type": "conformer",
        "encoder_config": {"num_blocks": 1, "intermediate_size": 32, "num_attention_heads": 2},
    }
    start = ["--model_name_or_path", str(base), "--lora", "small"]
    first = tmp_path / "with-encoder"
    train(
        script,
        *words(folder, first, *start, "--audio_config", json.dumps({**TINY_AUDIO, **encoder}), "--max_steps", "3"),
    )
    output = tmp_path / "without"
    more = [*start, "--audio_config", json.dumps(TINY_AUDIO), "--init_adapter", str(first), "--freeze_layers", "1"]
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    run = train(script, *words(folder, output, *more, *saving, "--max_steps", "2"))
    weights = {name: value for name, value in run.trainer.model.named_parameters() if ".lora_B" in name}
    from safetensors.torch import load_file

    began = load_file(first / "adapter_model.safetensors")
    for name, value in weights.items():
        same = torch.equal(value.detach(), began[name.replace(".default.", ".")])
        assert same == (".layers.1." in name) and value.abs().sum() > 0
    again = train(script, *words(folder, output, *more, *saving, "--max_steps", "3"))
    assert again.checkpoint is not None and again.trainer.state.global_step == 3
    with pytest.raises(ValueError, match="r 16, not 4"):
        script.prepare(words(folder, tmp_path / "x", *more, "--lora_r", "4", "--lora_alpha", "32"))
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        script.prepare(words(folder, tmp_path / "y", *more[:-4], "--init_adapter", str(base)))


def test_a_run_with_adapters_goes_on_in_the_same_layers(script, folder, tiny_folder, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    start = ["--model_name_or_path", tiny_folder, "--lora", "small", "--save_strategy", "steps", "--save_steps", "1"]
    train(script, *words(folder, output, *start, "--max_steps", "1", "--freeze_layers", "1"))
    with pytest.raises(ValueError, match="adapters in other layers than --freeze_layers 0"):
        script.prepare(words(folder, output, *start, "--max_steps", "2", "--freeze_layers", "0"))


def test_parts_that_begin_at_random(script, folder, tokenizer, tmp_path):  # noqa: F811
    encoder = {
        "encoder_type": "conformer",
        "encoder_config": {"num_blocks": 1, "intermediate_size": 32, "num_attention_heads": 2},
    }
    model, processor = build_tiny(tokenizer, audio_config=encoder)
    start = tmp_path / "start"
    model.save_pretrained(start)
    processor.save_pretrained(start)
    before = model.state_dict()

    def begun(part, *more):
        run = script.prepare(
            words(
                folder,
                tmp_path / part,
                "--model_name_or_path",
                str(start),
                "--random_init",
                part,
                "--max_steps",
                "1",
                *more,
            )
        )
        after = run.trainer.model.state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    changed = begun("encoder")
    assert changed and all(name.startswith("model.audio_embedder.encoder.") for name in changed)
    changed = begun("backbone")
    assert changed and all(name.startswith(("model.language_model.", "lm_head")) for name in changed)
    assert "model.language_model.embed_tokens.weight" in changed and "lm_head.weight" in changed
    changed = begun("audio")
    assert {name.split(".")[1] for name in changed} == {"audio_embedder", "multi_modal_projector"}
    assert not any("normalizer" in name for name in changed)
    # With adapters, what they belong to is kept beside them
    train(
        script,
        *words(folder, tmp_path / "run", "--model_name_or_path", str(start), "--random_init", "backbone,audio"),
        *("--lora", "small", "--max_steps", "1"),
    )
    kept = AutoModelForSpeechSeq2Seq.from_pretrained(str(tmp_path / "run" / "base")).state_dict()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(kept[name], before[name])


def test_a_language_model_begins_at_random(script, folder, tokenizer, tmp_path):  # noqa: F811
    text = AutoModelForCausalLM.from_config(tiny_text_config("llama"))
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    start = [
        "--model_name_or_path",
        str(tmp_path / "text"),
        "--audio_config",
        json.dumps(TINY_AUDIO),
        "--max_steps",
        "1",
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    for more, same in (([], True), (["--random_init", "backbone"], False)):
        run = script.prepare(words(folder, tmp_path / f"run-{same}", *start, *more))
        ours = run.trainer.model.state_dict()[name.replace("model.", "model.language_model.", 1)]
        assert torch.equal(ours, text.state_dict()[name]) == same
    with pytest.raises(ValueError, match="audio side is new"):
        script.prepare(words(folder, tmp_path / "x", *start, "--random_init", "encoder"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze_layers", "L1-7"], r"--freeze_layers: 'L1-7' names layer 7, but the layers are 0 to 1"),
        (["--freeze_layers", "top"], "--freeze_layers: Layers are written"),
        (["--freeze_layers", "0-1", "--freeze", "audio", "projector", "embed", "norm"], "nothing is left to train"),
    ],
)
def test_layers_that_cannot_be_frozen_are_told_before_training(script, folder, tmp_path, arguments, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        script.prepare(words(folder, tmp_path / "run", *SCRATCH, *arguments))
    assert not list(tmp_path.glob("run/*"))


def test_unknown_parts_are_told(script, folder, tiny_folder, tmp_path, capsys):  # noqa: F811
    for more in (["--random_init", "decoder", "--model_name_or_path", tiny_folder], ["--random_init", "backbone"]):
        with pytest.raises(SystemExit):
            script.prepare(words(folder, tmp_path / "run", *more))
        assert "--random_init" in capsys.readouterr().err


# --- parts of the data ----------------------------------------------------------------------------------------------


def chosen(folder, **part):  # noqa: F811
    rows, seconds, report = select_clips(load_source(SpeechSource(folder)), None, **part)
    assert report.num_clips == len(rows) == len(seconds)
    return list(rows["text"])


def test_a_smaller_part_lies_in_a_larger_one(folder, tmp_path):  # noqa: F811
    everything = chosen(folder)
    parts = [chosen(folder, fraction=share) for share in (0.1, 0.3, 0.5, 1.0)]
    assert [len(part) for part in parts] == [2, 4, 6, 12] and parts[-1] == everything
    for small, large in itertools.pairwise(parts):
        assert set(small) < set(large)
    assert [text for text in everything if text in parts[2]] == parts[2]  # in the order of the data
    (tmp_path / "speech").rename(tmp_path / "elsewhere")
    assert chosen(str(tmp_path / "elsewhere"), fraction=0.3) == parts[1]


def test_hours_are_met_as_well_as_whole_clips_can(folder):  # noqa: F811
    _, seconds, _ = select_clips(load_source(SpeechSource(folder)), None)
    for wanted in (sum(seconds) / 4, sum(seconds) / 2):
        _, part, report = select_clips(load_source(SpeechSource(folder)), None, hours=wanted / 3600)
        assert abs(sum(part) - wanted) <= max(seconds)
        assert report.left_out["beyond the part that is asked for"] == 12 - len(part)
    assert len(chosen(folder, hours=1000)) == 12 and len(chosen(folder, hours=1e-9)) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x,fraction=0", "`fraction` must be more than 0 and at most 1"),
        ("x,fraction=30", "at most 1, got 30"),
        ("x,fraction=some", "`fraction` must be a number"),
        ("x,hours=-1", "`hours` must be more than 0"),
        ("x,hours=1,fraction=0.1", "not both"),
        ("x,hours=1,streaming=true", "a stream has no `fraction` and no `hours`"),
    ],
)
def test_parts_that_make_no_sense(spec, message):
    with pytest.raises(ValueError, match=message):
        SpeechSource.parse(spec)


def test_a_part_of_the_data_in_the_script(script, folder, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    train(script, *words(folder, output, *SCRATCH, "--train_data", f"{folder},fraction=0.5", "--max_steps", "1"))
    summary = json.loads((output / "training_summary.json").read_text())
    assert summary["data"]["train"]["speech"]["num_clips"] == 6
    assert summary["setup"]["train_data"][0]["fraction"] == 0.5
