"""Phi-4-multimodal to Mel-LLM: the same scores as the source, whole or not at all, and every weight accounted for."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script
from hub_client import Client, ClientError
from hub_server import HubServer
from peft import PeftModel, get_peft_model
from phi4mm_checkpoints import (
    LORA_TARGETS,
    PUBLISHED,
    add_speech_lora,
    original_name,
    phi4_tokenizer,
    save_original,
    save_transformers,
    tiny_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train_script import folder, script, train, words  # noqa: F401
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    pipeline,
)

import mel_llm
from mel_llm import MelLLMFeatureExtractor, MelLLMForSpeechSeq2Seq
from mel_llm.conversion import Phi4MMSource, open_source, plan_conversion
from mel_llm.conversion.phi4mm_config import original_lora_settings, read_config
from mel_llm.conversion.phi4mm_source import StoredTensor
from mel_llm.training import lora_config


LAYOUTS = {"transformers": save_transformers, "original": save_original}


@pytest.fixture(scope="module")
def converter():
    return load_script("convert_phi4mm")


@pytest.fixture(scope="module")
def phi4_words(speech_clips):
    return phi4_tokenizer([clip["text"] for clip in speech_clips] * 4)


@pytest.fixture(scope="module")
def checkpoints(phi4_words, tmp_path_factory) -> SimpleNamespace:
    """The same random model with its speech LoRA, in both layouts, and loaded."""
    model = add_speech_lora(tiny_model(phi4_words))
    place = tmp_path_factory.mktemp("phi4mm")
    return SimpleNamespace(
        model=model, **{name: save(model, phi4_words, place / name) for name, save in LAYOUTS.items()}
    )


@pytest.fixture
def copies(checkpoints, tmp_path):
    """Both checkpoints, to be damaged."""
    return SimpleNamespace(
        **{name: Path(shutil.copytree(getattr(checkpoints, name), tmp_path / name)) for name in LAYOUTS}
    )


def convert(converter, source, output, *more) -> Path:
    converter.main([str(source), "--output_dir", str(output), *more])
    return output


def phi4_inputs(tokenizer, clips: list, text: str) -> dict:
    """As Phi-4-multimodal's processor makes them: one prompt for each clip, padded on the left."""
    extractor = Phi4MultimodalFeatureExtractor()
    batch = extractor([clip["array"] for clip in clips], sampling_rate=16000, return_tensors="pt")
    prompts = [text.replace("<|audio_1|>", "<|endoftext11|>" * size) for size in batch["audio_embed_sizes"].tolist()]
    return {**tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"), **batch}


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


PROMPT = "<|user|><|audio_1|>Transcribe the audio clip into text.<|end|><|assistant|>"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("speech_lora", ["merge", "adapter", "drop"])
@torch.no_grad()
def test_scores_are_those_of_the_source(
    converter, checkpoints, phi4_words, speech_clips, tmp_path, layout, speech_lora
):
    arguments = ("--encoder", "conformer", "--speech_lora", speech_lora)
    output = convert(converter, getattr(checkpoints, layout), tmp_path / "out", *arguments)
    model, info = AutoModelForSpeechSeq2Seq.from_pretrained(
        output / "base" if speech_lora == "adapter" else output, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if speech_lora == "adapter":
        model = PeftModel.from_pretrained(model, output)
    model.eval()
    source = checkpoints.model
    if speech_lora == "drop":
        source.disable_adapter_layers()
    try:
        processor = AutoProcessor.from_pretrained(output)
        for clip in speech_clips[:3]:
            theirs = phi4_inputs(phi4_words, [clip], PROMPT + clip["text"])
            ours = processor(
                audio=clip["array"],
                text=PROMPT.replace("<|audio_1|>", processor.audio_token) + clip["text"],
                sampling_rate=16000,
            )
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
            expected = source(**theirs).logits
            assert expected.std() > 0.1  # a model whose scores depend on what it is given
            torch.testing.assert_close(model(**ours).logits, expected, rtol=0, atol=1e-4)
        # Text alone, also where LongRoPE takes its other factors (512 tokens here, 4096 in the published model)
        for length in (20, 700):
            ids = torch.arange(length)[None] % 290
            torch.testing.assert_close(model(input_ids=ids).logits, source(input_ids=ids).logits, rtol=0, atol=1e-4)
    finally:
        source.enable_adapter_layers()


@torch.no_grad()
def test_scores_beside_other_clips_are_those_of_a_clip_alone(
    converter, checkpoints, phi4_words, speech_clips, tmp_path
):
    """The source lets a clip see its batch's padding, so the source is asked clip by clip."""
    output = convert(converter, checkpoints.original, tmp_path / "out", "--encoder", "conformer")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(output).eval()
    clips = sorted(speech_clips, key=lambda clip: clip["duration"])[::5][:3]
    batch = phi4_inputs(phi4_words, clips, PROMPT)
    ours = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "input_features": batch["audio_input_features"],
        "input_features_mask": batch["audio_attention_mask"],
    }
    logits = model(**ours, position_ids=positions(batch["attention_mask"])).logits
    for row, clip in enumerate(clips):
        expected = checkpoints.model(**phi4_inputs(phi4_words, [clip], PROMPT)).logits[0]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_pipeline_transcribes_as_the_source_would(converter, checkpoints, phi4_words, speech_clips, tmp_path):
    output = convert(converter, checkpoints.transformers, tmp_path / "out", "--encoder", "conformer")
    recogniser = pipeline("automatic-speech-recognition", model=str(output))
    config = recogniser.model.generation_config
    assert set(config.eos_token_id) == set(checkpoints.model.config.eos_token_id)
    clip = speech_clips[0]
    theirs = phi4_inputs(phi4_words, [clip], PROMPT)
    suppressed = [phi4_words.convert_tokens_to_ids("<|endoftext11|>")]
    # Step by step and without a cache, for whatever class it is
    ids, written = theirs.pop("input_ids"), []
    theirs.pop("attention_mask")
    for _ in range(12):
        scores = checkpoints.model(input_ids=ids, **theirs).logits[0, -1]
        scores[suppressed] = -torch.inf
        written.append(int(scores.argmax()))
        ids = torch.cat([ids, torch.tensor([[written[-1]]])], dim=1)
    text = recogniser(clip["array"], generate_kwargs={"max_new_tokens": 12})["text"]
    ends = [place for place, index in enumerate(written) if index in config.eos_token_id]
    assert text == phi4_words.decode(written[: ends[0] if ends else None], skip_special_tokens=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompt_tokenizer_and_features_are_phi4s(converter, checkpoints, phi4_words, speech_clips, tmp_path, layout):
    output = convert(converter, getattr(checkpoints, layout), tmp_path / "out")
    processor, config = AutoProcessor.from_pretrained(output), mel_llm.MelLLMConfig.from_pretrained(output)
    assert processor.audio_token == "<|endoftext11|>"
    audio_id, end_id = (phi4_words.convert_tokens_to_ids(token) for token in ("<|endoftext11|>", "<|end|>"))
    assert config.audio_token_id == audio_id and config.response_eos_token_id == end_id
    ids = phi4_words(PROMPT.replace("<|audio_1|>", "<|endoftext11|>"))["input_ids"]
    assert [*config.prompt_prefix_ids, audio_id, *config.prompt_suffix_ids] == ids
    text = speech_clips[0]["text"]
    assert processor.tokenizer(text)["input_ids"] == phi4_words(text)["input_ids"]

    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "audio", "audio": speech_clips[0]["array"]},
                {"type": "text", "text": "Transcribe the audio clip into text."},
            ],
        },
        {"role": "assistant", "content": text},
    ]
    batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, output_labels=True)
    labels = batch["labels"][0][batch["labels"][0] != -100]
    # Phi-4's template ends a conversation twice, and so do the answers that it is fine-tuned on
    assert labels.tolist() == [*phi4_words(text)["input_ids"], end_id, phi4_words.eos_token_id]

    arrays = [clip["array"] for clip in speech_clips[:3]]
    theirs = Phi4MultimodalFeatureExtractor()(arrays, sampling_rate=16000, return_tensors="pt")
    ours = processor.feature_extractor(arrays, sampling_rate=16000, return_tensors="pt")
    assert processor.feature_extractor.edge_padding == 0
    assert torch.equal(ours["attention_mask"].bool(), theirs["audio_attention_mask"])
    valid = theirs["audio_attention_mask"]
    torch.testing.assert_close(ours["input_features"][valid], theirs["audio_input_features"][valid], rtol=0, atol=2e-4)
    # With padding at the edges, the inner frames are the same: they begin 120 samples earlier
    padded = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    shifted = padded(arrays[0][120:], sampling_rate=16000, return_tensors="pt")["input_features"][0]
    inner = theirs["audio_input_features"][0, 1 : len(shifted) - 1]
    torch.testing.assert_close(shifted[1 : 1 + len(inner)], inner, rtol=0, atol=2e-4)


@torch.no_grad()
def test_without_the_encoder_stem_and_projector_remain(converter, checkpoints, speech_clips, tmp_path):
    output = convert(converter, checkpoints.transformers, tmp_path / "out")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(output).eval()
    assert model.config.audio_config.encoder_type == "none" and model.model.audio_embedder.encoder is None
    processor = AutoProcessor.from_pretrained(output)
    features = processor(audio=speech_clips[0]["array"], sampling_rate=16000)["input_features"]
    source = checkpoints.model.get_base_model().model.embed_tokens_extend.audio_embed
    hidden, _ = source.encoder.embed(source.encoder.encoder_embedding(features), None)
    expected = source.down_proj_for_speech(torch.nn.functional.gelu(source.up_proj_for_speech(hidden)))
    torch.testing.assert_close(model.get_audio_features(features).pooler_output, expected[0], rtol=1e-4, atol=1e-4)
    assert isinstance(
        pipeline("automatic-speech-recognition", model=str(output))(speech_clips[0]["array"])["text"], str
    )


@pytest.mark.parametrize("encoder", ["none", "conformer"])
@torch.no_grad()
def test_the_adapter_is_one_of_pefts(converter, checkpoints, speech_clips, tmp_path, encoder):
    output = convert(
        converter, checkpoints.original, tmp_path / "out", "--encoder", encoder, "--speech_lora", "adapter"
    )
    merged = convert(converter, checkpoints.original, tmp_path / "merged", "--encoder", encoder)
    processor = AutoProcessor.from_pretrained(output)
    inputs = processor(audio=speech_clips[0]["array"], text=f"{processor.audio_token} Hello.", sampling_rate=16000)
    expected = AutoModelForSpeechSeq2Seq.from_pretrained(merged).eval()(**inputs).logits

    base = AutoModelForSpeechSeq2Seq.from_pretrained(output / "base")
    adapted = PeftModel.from_pretrained(base, output).eval()
    torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, expected, rtol=0, atol=1e-5)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(output).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert isinstance(
        pipeline("automatic-speech-recognition", model=str(output))(speech_clips[0]["array"])["text"], str
    )

    # To the last name what PEFT itself saves of the same kind
    fresh = AutoModelForSpeechSeq2Seq.from_pretrained(output / "base")
    get_peft_model(fresh, lora_config(fresh, "paper", r=6, lora_alpha=12)).save_pretrained(tmp_path / "peft")
    theirs, ours = (
        {name: value.shape for name, value in load_file(place / "adapter_model.safetensors").items()}
        for place in (tmp_path / "peft", output)
    )
    assert ours == theirs
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (6, 12, 0.01)
    assert sorted(config["modules_to_save"]) == ["audio_embedder", "multi_modal_projector"]


def test_training_goes_on(converter, checkpoints, script, folder, tmp_path):  # noqa: F811
    """With the adapter itself, as the paper does; with new adapters on what was merged; and with everything."""
    adapter = convert(converter, checkpoints.original, tmp_path / "adapter", "--speech_lora", "adapter")
    merged = convert(converter, checkpoints.original, tmp_path / "merged")
    lora = ["--lora", "paper", "--lora_r", "6", "--lora_alpha", "12"]
    factor = "base_model.model.model.language_model.layers.0.self_attn.qkv_proj.lora_B.weight"
    for source, more in ((adapter, lora), (merged, lora), (merged, [])):
        output = tmp_path / f"run-{source.name}-{len(more)}"
        arguments = words(folder, output, "--model_name_or_path", str(source), "--max_steps", "2", *more)
        train(script, *arguments)
        model = AutoModelForSpeechSeq2Seq.from_pretrained(output)
        assert isinstance(model, MelLLMForSpeechSeq2Seq)
        if more:
            before, after = (
                load_file(adapter / "adapter_model.safetensors"),
                load_file(output / "adapter_model.safetensors"),
            )
            change = (after[factor] - before[factor]).abs().max()
            # Two steps from where it was, or from 0
            assert change > 0 and (change < 0.05 if source is adapter else after[factor].abs().max() < 0.05)
            stem = "base_model.model.model.audio_embedder.conv.out.weight"
            assert not torch.equal(after[stem], before[stem])
    assert json.loads((tmp_path / "run-adapter-6" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(adapter / "base")
    # The same command with more steps goes on from the checkpoint, also where adapter and base were moved meanwhile
    moved = adapter.rename(tmp_path / "moved")
    longer = words(folder, tmp_path / "run-adapter-6", "--model_name_or_path", str(moved), "--max_steps", "3", *lora)
    assert train(script, *longer).trainer.state.global_step == 3
    adapter = moved
    for wrong, what in (([], "--lora"), (["--lora", "paper"], "320")):
        with pytest.raises(ValueError, match=what):
            script.prepare(
                words(folder, tmp_path / "wrong", "--model_name_or_path", str(adapter), "--max_steps", "2", *wrong)
            )


def published_source(layout: str) -> Phi4MMSource:
    """All weights of the published size by name and shape; there are no files."""
    config = read_config(PUBLISHED, "config.json")
    with torch.device("meta"):
        model = Phi4MultimodalForCausalLM(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name, (rows, columns) in [
        item for item in shapes.items() if re.fullmatch(LORA_TARGETS + r"\.weight", item[0])
    ]:
        if ".audio_embed." in name or ".image_embed." in name:
            continue
        for lora, rank in (("speech", 320), ("vision", 256)):
            module = name.removesuffix(".weight")
            shapes[f"{module}.lora_A.{lora}.weight"] = (rank, columns)
            shapes[f"{module}.lora_B.{lora}.weight"] = (rows, rank)
    if layout == "original":
        shapes = {original_name(name): shape for name, shape in shapes.items()}
    tensors = {name: StoredTensor(Path("x"), name, torch.bfloat16, shape) for name, shape in shapes.items()}
    return Phi4MMSource(Path("x"), PUBLISHED, config, tensors, original_lora_settings(PUBLISHED, "config.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoder", ["none", "conformer"])
def test_every_weight_of_the_published_size_has_its_place(phi4_words, layout, encoder):
    source = published_source(layout)
    if layout == "original":
        assert "model.layers.31.mlp.gate_up_proj.base_layer.weight" in source.tensors
        assert "model.embed_tokens_extend.audio_embed.encoder.encoders.23.self_attn.linear_out.bias" in source.tensors
    processor = mel_llm.MelLLMProcessor(
        MelLLMFeatureExtractor.from_preset("phi4"), phi4_words, audio_token="<|endoftext11|>"
    )
    plan = plan_conversion(source, processor, encoder=encoder, speech_lora="adapter")
    count = {
        part: sum(torch.Size(plan.shapes[name]).numel() for name in plan.weights if name.startswith(start))
        for part, start in mel_llm.conversion.phi4mm.PARTS.items()
    }
    assert count["stem"] == 12_616_704 and count["projector"] == 12_589_056
    assert (count["encoder"] > 400e6) == (encoder == "conformer")
    factors = sum(torch.Size(tensor.shape).numel() for pair in plan.factors.values() for tensor in pair.values())
    assert len(plan.factors) == 4 * 32 and round(factors / 1e6, 1) == 461.4
    used = len(plan.weights) + 2 * len(plan.factors) + len(plan.dropped)
    assert used == len(source.tensors)
    text = plan.config.text_config
    assert text.model_type == "phi3" and text.rope_parameters["rope_type"] == "longrope"
    assert text.rope_parameters["partial_rotary_factor"] == 0.75 and text.max_position_embeddings == 131072
    assert (text.num_attention_heads, text.num_key_value_heads, plan.config.tie_word_embeddings) == (24, 8, True)


def test_dry_run_lists_every_weight_and_writes_nothing(converter, checkpoints, tmp_path, capsys):
    before = sorted(checkpoints.original.iterdir())
    converter.main([str(checkpoints.original), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split(" ")[0] for line in lines if " -> " in line}
    index = json.loads((checkpoints.original / "model.safetensors.index.json").read_text())["weight_map"]
    assert listed == index.keys()
    name = "model.layers.1.self_attn.qkv_proj"
    assert (
        f"{name}.base_layer.weight float32 [128, 64] -> model.language_model.layers.1.self_attn.qkv_proj.weight"
        in lines
    )
    assert any(line.startswith(f"{name}.lora_A.vision") and "dropped: vision LoRA" in line for line in lines)
    assert any("weights dropped: Conformer" in line for line in lines)
    assert sorted(checkpoints.original.iterdir()) == before and not list(tmp_path.iterdir())


def test_a_model_of_the_hub(converter, checkpoints, tmp_path, capsys):
    """A dry run reads the first bytes of the weights only; a conversion leaves out what it has no use for."""
    (tmp_path / "home").mkdir()
    with HubServer() as hub, Client(tmp_path / "home", hub.endpoint) as client:
        client(f"import sys\nsys.path.insert(0, {str(ROOT / 'scripts')!r})\nimport convert_phi4mm")
        for layout in LAYOUTS:
            root = getattr(checkpoints, layout)
            files = {
                path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
            }
            hub.put(f"alice/{layout}", {**files, "vision-lora/adapter_model.safetensors": b"x", "code.py": b"x"})
            client(f"convert_phi4mm.main(['alice/{layout}', '--dry-run'])")
            converter.main([str(root), "--dry-run"])
            listed = capsys.readouterr().out
            assert listed in client.output and "merged into" in listed
        snapshots = [path.name for path in (tmp_path / "home").rglob("*") if "snapshots" in path.parts]
        assert "config.json" in snapshots and not any(name.endswith(".safetensors") for name in snapshots)
        client("convert_phi4mm.main(['alice/transformers', '--output_dir', folder])", folder=str(tmp_path / "out"))
        asked = " ".join(path for _, path, _ in hub.requests)
        assert "model.safetensors" in asked and "vision-lora/adapter_model" not in asked and "code.py" not in asked

        del files["model-00002-of-00003.safetensors"]
        hub.put("alice/cut", files)
        for more in (["--dry-run"], ["--output_dir", str(tmp_path / "cut")]):
            with pytest.raises(ClientError, match="names model-00002-of-00003.safetensors, which is not there"):
                client(f"convert_phi4mm.main(['alice/cut', *{more}])")
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").config.model_type == "mel_llm"


def test_shards_dtype_and_untied_embeddings(converter, phi4_words, tmp_path):
    model = add_speech_lora(tiny_model(phi4_words, tie_word_embeddings=False))
    source = save_transformers(model, phi4_words, tmp_path / "source")
    output = convert(converter, source, tmp_path / "out", "--dtype", "bfloat16", "--max_shard_size", "50KB")
    assert len(list(output.glob("model-*.safetensors"))) > 2
    loaded, info = AutoModelForSpeechSeq2Seq.from_pretrained(output, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dtypes = {name: value.dtype for name, value in loaded.state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        f"model.audio_embedder.normalizer.{name}" for name in ("global_mean", "global_invstd")
    }
    head = model.get_base_model().lm_head.weight
    assert torch.equal(loaded.lm_head.weight, head.to(torch.bfloat16))
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    statistics = model.get_base_model().model.embed_tokens_extend.audio_embed.encoder.encoder_embedding
    assert torch.equal(loaded.model.audio_embedder.normalizer.global_mean, statistics.global_mean)


def test_one_shard_is_in_memory_at_a_time(converter, checkpoints, tmp_path, monkeypatch):
    previous, sizes, save = [], [], mel_llm.conversion.phi4mm.save_file

    def watched(tensors, path, **kwargs):
        assert not any(reference() is not None for reference in previous)
        previous[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        sizes.append((len(tensors), sum(tensor.nbytes for tensor in tensors.values())))
        save(tensors, path, **kwargs)

    monkeypatch.setattr("mel_llm.conversion.phi4mm.save_file", watched)
    convert(converter, checkpoints.original, tmp_path / "out", "--max_shard_size", "100KB")
    assert len(sizes) > 3 and all(number == 1 or size <= 100_000 for number, size in sizes)


def test_parts_that_are_made_anew(converter, checkpoints, tmp_path):
    more = ("--encoder", "conformer", "--random_init", "encoder", "projector")
    first, again = (convert(converter, checkpoints.original, tmp_path / name, *more) for name in "ab")
    other = convert(converter, checkpoints.original, tmp_path / "c", *more, "--seed", "1")
    plain = convert(converter, checkpoints.original, tmp_path / "d", *more[:2])
    first, again, other, plain = (load_file(place / "model.safetensors") for place in (first, again, other, plain))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        new = name.startswith(("model.audio_embedder.encoder.", "model.multi_modal_projector."))
        if value.ndim > 1 and not name.endswith((".b1", ".b2")):
            assert torch.equal(value, plain[name]) != new and torch.equal(value, other[name]) != new
    # The signal goes through it as through one from scratch
    assert 0.05 < first["model.multi_modal_projector.linear_1.weight"].std() < 0.15


def test_another_speech_lora(converter, checkpoints, phi4_words, speech_clips, tmp_path):
    """One from a folder stands in for the one in the weights; the same matrices need not have one in every layer."""
    one_layer = r".*\.layers\.1\.self_attn\.qkv_proj"
    model = add_speech_lora(tiny_model(phi4_words), r=4, lora_alpha=2, target_modules=one_layer, use_rslora=True)
    model.save_pretrained(tmp_path / "lora")
    more = ("--encoder", "conformer", "--adapter_dir", str(tmp_path / "lora"))
    output = convert(converter, checkpoints.original, tmp_path / "out", *more)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        ours = AutoModelForSpeechSeq2Seq.from_pretrained(output).eval()(input_ids=ids).logits
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="not on the same matrices of every layer"):
        convert(converter, checkpoints.original, tmp_path / "adapter", *more, "--speech_lora", "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_template_for_lists_of_parts_and_renamed_tokens(converter, copies, tmp_path):
    """As the revision for transformers has them: `<|audio|>`, and a template that takes content in parts alone."""
    for path in (copies.transformers / "tokenizer.json", copies.transformers / "tokenizer_config.json"):
        text = path.read_text().replace('"<|audio|>"', '"<|sound|>"').replace("<|endoftext11|>", "<|audio|>")
        path.write_text(text)
    (copies.transformers / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part['text'] }}{% endfor %}<|end|>{% endfor %}"
    )
    output = convert(converter, copies.transformers, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(output)
    config = mel_llm.MelLLMConfig.from_pretrained(output)
    assert processor.audio_token == "<|audio|>"
    text = processor.tokenizer.decode([*config.prompt_prefix_ids, config.audio_token_id, *config.prompt_suffix_ids])
    assert text == PROMPT.replace("<|audio_1|>", "<|audio|>")


# --- bad input ------------------------------------------------------------------------------------------------------


def edit(path: Path, **fields) -> None:
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def rewrite(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


FIRST_SHARD = "model-00001-of-00003.safetensors"
NORM, QKV = "model.norm.weight", "model.layers.0.self_attn.qkv_proj"
DAMAGES = {
    "a shard is missing": (lambda c: (c.original / FIRST_SHARD).unlink(), "original", FIRST_SHARD),
    "a file is cut off": (
        lambda c: os.truncate(c.transformers / "model.safetensors", 5000),
        "transformers",
        "model.safetensors is no safetensors file, or only its beginning",
    ),
    "a shard is cut off": (
        lambda c: os.truncate(c.original / FIRST_SHARD, (c.original / FIRST_SHARD).stat().st_size - 7),
        "original",
        f"{FIRST_SHARD} has",
    ),
    "a pointer of git": (
        lambda c: (c.original / FIRST_SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "original",
        "git lfs pull",
    ),
    "no weights": (
        lambda c: (c.transformers / "model.safetensors").unlink(),
        "transformers",
        "no weights in safetensors",
    ),
    "no config": (lambda c: (c.transformers / "config.json").unlink(), "transformers", "has no config.json"),
    "a broken config": (lambda c: (c.original / "config.json").write_text("{"), "original", "is not JSON"),
    "another model": (
        lambda c: LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(c.transformers),
        "transformers",
        "got 'llama' (LlamaForCausalLM)",
    ),
    "another class": (
        lambda c: edit(c.transformers / "config.json", architectures=["Phi4MultimodalModel"]),
        "transformers",
        "Phi4MultimodalModel",
    ),
    "quantized": (
        lambda c: edit(c.transformers / "config.json", quantization_config={"quant_method": "fp8"}),
        "transformers",
        "is quantized",
    ),
    "another size": (
        lambda c: edit(c.transformers / "config.json", intermediate_size=128),
        "transformers",
        "model.layers.0.mlp.gate_up_proj.weight has the shape [192, 64], and config.json makes it [256, 64]",
    ),
    "a layer too many": (
        lambda c: edit(c.transformers / "config.json", num_hidden_layers=1),
        "transformers",
        "model.layers.1",
    ),
    "a weight is missing": (
        lambda c: rewrite(c.transformers / "model.safetensors", without(NORM)),
        "transformers",
        "missing, such as that of model.language_model.norm.weight",
    ),
    "an unknown weight": (
        lambda c: rewrite(
            c.transformers / "model.safetensors", lambda t: {**t, "model.extra.weight": t[NORM].clone()}
        ),
        "transformers",
        "such as model.extra.weight",
    ),
    "half a LoRA": (
        lambda c: rewrite(
            c.transformers / "speech-lora" / "adapter_model.safetensors",
            without(f"base_model.model.{QKV}.lora_B.weight"),
        ),
        "transformers",
        "only lora_A is there",
    ),
    "another rank": (
        lambda c: edit(c.original / "config.json", speech_lora={"r": 8, "lora_alpha": 16}),
        "original",
        "with r = 8",
    ),
    "a LoRA without settings": (
        lambda c: edit(c.original / "config.json", speech_lora=None),
        "original",
        "`speech_lora`",
    ),
    "no LoRA": (lambda c: shutil.rmtree(c.transformers / "speech-lora"), "transformers", "no speech LoRA"),
    "a DoRA": (
        lambda c: edit(c.transformers / "speech-lora" / "adapter_config.json", use_dora=True),
        "transformers",
        "use_dora",
    ),
    "no tokenizer": (lambda c: (c.original / "tokenizer.json").unlink(), "original", "has no tokenizer.json"),
    "no place for audio": (
        lambda c: (c.original / "tokenizer.json").write_text(
            re.sub(r"<\|(endoftext11|audio)\|>", r"<|x\1|>", (c.original / "tokenizer.json").read_text())
        ),
        "original",
        "the place of audio",
    ),
    "other features": (
        lambda c: edit(c.original / "preprocessor_config.json", audio_feat_stride=2),
        "original",
        "audio_feat_stride 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_named_before_anything_is_written(converter, copies, tmp_path, damage):
    spoil, layout, message = DAMAGES[damage]
    spoil(copies)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as error:
        convert(converter, getattr(copies, layout), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_values_that_the_precision_cannot_hold(converter, copies, tmp_path):
    rewrite(copies.transformers / "model.safetensors", lambda tensors: {**tensors, NORM: tensors[NORM] * 1e6})
    with pytest.raises(ValueError, match="model.language_model.norm.weight would hold values that are not finite"):
        convert(converter, copies.transformers, tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_what_is_there_stays(converter, checkpoints, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(converter, checkpoints.original, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name on the Hub"):
        convert(converter, "/no/such/folder", tmp_path / "new")
    with pytest.raises(SystemExit):
        converter.parse_arguments(["x"])
    with pytest.raises(ValueError, match="no encoder to make anew"):
        convert(converter, checkpoints.original, tmp_path / "new", "--random_init", "encoder")


KILLED = """
import os, sys
import convert_phi4mm
from mel_llm.conversion import phi4mm
save, calls = phi4mm.save_file, []
def save_file(*arguments, **kwargs):
    save(*arguments, **kwargs)
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os._exit(9)
phi4mm.save_file = save_file
convert_phi4mm.main(sys.argv[2:])
"""


def test_a_killed_conversion_leaves_nothing_that_loads(converter, checkpoints, tmp_path):
    """At the worst moment: all weights are there, those of the adapter and those of its base."""
    arguments = [str(checkpoints.original), "--output_dir", str(tmp_path / "out"), "--speech_lora", "adapter"]
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    died = subprocess.run([sys.executable, "-c", KILLED, "2", *arguments], env={**os.environ, "PYTHONPATH": path})
    assert died.returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    for place in (tmp_path / ".out.partial", tmp_path / ".out.partial" / "base"):
        assert [path.suffix for path in place.iterdir() if path.is_file()] == [".safetensors"]
        with pytest.raises((OSError, ValueError)):
            AutoModelForSpeechSeq2Seq.from_pretrained(place)
    converter.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")


def test_the_tokenizer_of_the_original_runs_no_code(converter, copies, tmp_path):
    """Beside its config.json, which names code, transformers would ask whether to run it."""
    (copies.original / "tokenization_evil.py").write_text("raise SystemExit('ran')")
    edit(copies.original / "config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    output = convert(converter, copies.original, tmp_path / "out")
    assert isinstance(AutoTokenizer.from_pretrained(output)("hello")["input_ids"], list)
    assert open_source(copies.original).lora.scaling == 2.0
