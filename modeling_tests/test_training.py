"""Training with stock tools, and real recordings read back without an error."""

import pytest
import torch
import transformers
from conftest import build_tiny, tiny_text_config
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from mel_llm import MelLLMConfig
from mel_llm.conversion import find_spare_token, from_text_llm
from mel_llm.training import (
    TranscriptionCollator,
    compute_feature_statistics,
    count_parameters,
    freeze,
    lora_config,
    train_tokenizer,
)


def examples_of(clips):
    return [{"audio": clip["array"], "text": clip["text"]} for clip in clips]


def arguments(folder, cls=TrainingArguments, **overrides):
    fields = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return cls(**{**fields, **overrides})


# --- the pieces ---------------------------------------------------------------------------------------------------------


def test_statistics(speech_clips, tiny):
    _, processor = tiny
    clips = [processor(clip["array"])["input_features"][0] for clip in speech_clips[:4]]
    mean, std = compute_feature_statistics(clips)
    frames = torch.cat(clips)
    torch.testing.assert_close(mean, frames.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(std, frames.std(0, correction=0), rtol=1e-4, atol=1e-4)
    assert compute_feature_statistics([torch.zeros(5, 80)])[1].min() > 0
    for bad in ([], [torch.zeros(0, 80)], [torch.full((2, 80), torch.nan)]):
        with pytest.raises(ValueError, match="features"):
            compute_feature_statistics(bad)


def test_tokenizer_writes_anything():
    tokenizer = train_tokenizer(["hello"], vocab_size=270)
    text = "Ünïcode, 数字 and \n🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["hello"], vocab_size=100)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (["<unused0>", "<unused1>"], "<unused0>"),
        (["<|endoftext10|>", "<|endoftext11|>"], "<|endoftext11|>"),
        ([], None),
    ],
)
def test_a_spare_token_is_reused_and_the_vocabulary_stays(special, expected):
    vocabulary = {"<s>": 0, "</s>": 1, "hello": 2, "Write": 3, "it.": 4, "\n": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(special, special_tokens=True)
    assert find_spare_token(tokenizer) == expected
    size = len(tokenizer)
    model, processor = from_text_llm(
        tiny_text_config(vocab_size=size), tokenizer, audio_config={"conv_channels": 8, "hidden_size": 16}
    )
    assert processor.audio_token == (expected or "<|audio|>")
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == (size if expected else size + 1)
    assert model.config.audio_token_id == processor.audio_token_id < model.config.vocab_size


def test_collator_batches(tiny, speech_clips):
    _, processor = tiny
    batch = TranscriptionCollator(processor)(examples_of(speech_clips[:3]))
    assert set(batch) == {"input_features", "attention_mask", "labels"}
    for row, clip in zip(batch["labels"], speech_clips, strict=False):
        assert processor.tokenizer.decode(row[row != -100]) == clip["text"] + "<|eos|>"


def test_from_text_llm_keeps_the_language_model(tokenizer):
    set_seed(3)
    text_model = AutoModelForCausalLM.from_config(tiny_text_config("qwen3")).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = text_model(input_ids=ids).logits
    model, _ = from_text_llm(text_model, tokenizer, audio_config={"conv_channels": 8, "hidden_size": 16})
    assert not model.training
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.model.language_model is text_model.model  # taken over, not copied
    with pytest.raises(ValueError, match="num_mel_bins"):
        from_text_llm(text_model, tokenizer, audio_config={"num_mel_bins": 40})


def test_from_text_llm_keeps_how_the_model_was_loaded(tokenizer):
    text_model = AutoModelForCausalLM.from_config(tiny_text_config(), attn_implementation="eager").to(torch.bfloat16)
    model, _ = from_text_llm(text_model, tokenizer, audio_config={"conv_channels": 8, "hidden_size": 16})
    assert model.config._attn_implementation == model.model.language_model.config._attn_implementation == "eager"
    kept = "model.audio_embedder.normalizer"
    assert {p.dtype for name, p in model.state_dict().items() if not name.startswith(kept)} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in model.state_dict().values())
    with torch.device("meta"):
        text_model = AutoModelForCausalLM.from_config(tiny_text_config())
    model, _ = from_text_llm(text_model, tokenizer, audio_config={"conv_channels": 8, "hidden_size": 16})
    assert model.num_parameters() > 0 and all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("whole_tied", "text_tied"), [(True, True), (True, False), (False, True), (False, False)])
def test_from_text_llm_takes_the_decoder_out_of_a_multimodal_model(tokenizer, tmp_path, whole_tied, text_tied):
    text = tiny_text_config("gemma3_text", tie_word_embeddings=text_tied).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=whole_tied)
    ).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = whole(input_ids=ids).logits
    model, _ = from_text_llm(whole, tokenizer, audio_config={"conv_channels": 8, "hidden_size": 16})
    assert type(model.model.language_model).__name__ == "Gemma3TextModel"
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_from_text_llm_refuses_what_it_cannot_take_over(tokenizer):
    peft = pytest.importorskip("peft")
    text_model = AutoModelForCausalLM.from_config(tiny_text_config())
    adapted = peft.get_peft_model(text_model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        from_text_llm(adapted, tokenizer)
    text_model = AutoModelForCausalLM.from_config(tiny_text_config())
    text_model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        from_text_llm(text_model, tokenizer)

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    with pytest.raises(ValueError, match="scores"):
        from_text_llm(Odd(tiny_text_config()), tokenizer, audio_config={"conv_channels": 8, "hidden_size": 16})


# --- Trainer ------------------------------------------------------------------------------------------------------------


def test_trainer_trains_saves_and_resumes(tiny, speech_clips, tmp_path):
    model, processor = tiny
    trainer = Trainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2),
        train_dataset=examples_of(speech_clips[:8]),
        eval_dataset=examples_of(speech_clips[8:12]),
        data_collator=TranscriptionCollator(processor),
        processing_class=processor,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert torch.isfinite(torch.tensor([float(loss) for loss in losses])).all()
    assert trainer.evaluate()["eval_loss"] > 0
    checkpoint = tmp_path / "checkpoint-4"
    assert AutoProcessor.from_pretrained(checkpoint).audio_token == processor.audio_token
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(checkpoint).eval()
    batch = TranscriptionCollator(processor)(examples_of(speech_clips[:2]))
    torch.testing.assert_close(loaded(**batch).loss, model.eval()(**batch).loss)
    resumed = Trainer(
        build_tiny(processor.tokenizer)[0],
        arguments(tmp_path, max_steps=5),
        train_dataset=examples_of(speech_clips[:8]),
        data_collator=TranscriptionCollator(processor),
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 5


@pytest.mark.parametrize("texts", [["Thirty", "No.", "Hello world.", "a"], ["a", "b", "c", "d"], ["", "", "", ""]])
@pytest.mark.parametrize("with_end", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_averages_over_the_tokens_that_there_are(
    tiny, speech_clips, tmp_path, texts, with_end, accumulation
):
    """The Trainer counts the tokens of a batch itself, and what it divides by must be what the model sums over."""
    model, processor = tiny
    examples = [{"audio": clip["array"], "text": text} for clip, text in zip(speech_clips, texts, strict=False)]
    collator = TranscriptionCollator(processor)
    expected = model(**collator(examples)).loss.item()

    def without_end(examples):  # as collators written for Whisper make labels
        batch = collator(examples)
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == processor.tokenizer.eos_token_id, -100)
        return batch

    trainer = Trainer(
        model.train(),
        arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=examples,
        data_collator=collator if with_end else without_end,
    )
    trainer.train()
    loss = float(trainer.state.log_history[0]["loss"])
    if with_end:
        assert loss == pytest.approx(expected, rel=1e-3)
    elif all(texts):
        assert expected < loss < 4 * expected  # the ends of text are summed but were not counted
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_statistics_are_saved_and_not_trained(tiny, tmp_path):
    model, _ = tiny
    assert not any("normalizer" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert loaded.model.audio_embedder.normalizer.global_mean[0] == 12


def test_seq2seq_trainer_never_sees_the_reference(tiny, speech_clips, tmp_path):
    model, processor = tiny
    seen = {}

    def compute_metrics(prediction):
        seen["predictions"] = prediction.predictions
        seen["longest"] = max((row != 0).sum() for row in prediction.predictions)  # the trainer pads
        return {"count": float(len(prediction.predictions))}

    trainer = Seq2SeqTrainer(
        model,
        arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=9),
        eval_dataset=examples_of(speech_clips[:4]),
        data_collator=TranscriptionCollator(processor),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_count"] == 4 and 0 < seen["longest"] <= 9
    swapped = [{**example, "text": "Something else."} for example in examples_of(speech_clips[:4])]
    before = seen["predictions"]
    trainer.evaluate(swapped)
    assert (seen["predictions"] == before).all()  # the labels of the batch had no part in what was written


def test_compute_metrics_on_logits(tiny, speech_clips, tmp_path):
    model, processor = tiny
    shapes = []
    trainer = Trainer(
        model,
        arguments(tmp_path),
        eval_dataset=examples_of(speech_clips[:3]),
        data_collator=TranscriptionCollator(processor),
        compute_metrics=lambda prediction: (
            shapes.append((prediction.predictions.shape[:2], prediction.label_ids.shape)) or {}
        ),
    )
    trainer.evaluate()
    assert shapes[0][0] == shapes[0][1]


# --- PEFT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_lora_trains_and_comes_back_with_the_new_modules(tiny_folder, speech_clips, tmp_path, task_type):
    peft = pytest.importorskip("peft")
    processor = AutoProcessor.from_pretrained(tiny_folder)
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        modules_to_save=["audio_embedder", "multi_modal_projector"],
        task_type=task_type,
    )
    model = peft.get_peft_model(base, config)
    touched = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("audio_embedder" in name for name in touched) and any("lora_A" in name for name in touched)
    assert not any("embed_tokens" in name or "lm_head" in name for name in touched)
    trainer = Trainer(
        model,
        arguments(tmp_path / "run", learning_rate=1e-2),
        train_dataset=examples_of(speech_clips[:8]),
        data_collator=TranscriptionCollator(processor),
    )
    trainer.train()
    model.eval()
    audio = processor(audio=[clip["array"] for clip in speech_clips[:2]])
    batch = TranscriptionCollator(processor)(examples_of(speech_clips[:2]))
    expected = model(**batch).loss
    tokens = model.generate(**audio, max_new_tokens=10)
    model.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder), tmp_path / "adapter"
    ).eval()
    others = [fresh.merge_and_unload()]
    # Before 5.18, transformers drops modules_to_save when a model is loaded from an adapter's folder (README)
    if Version(transformers.__version__) >= Version("5.18"):
        others.append(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "adapter").eval())
    for other in others:
        torch.testing.assert_close(other(**batch).loss, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.generate(**audio, max_new_tokens=10), tokens)


# --- reading real speech ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(speech_clips, tmp_path_factory):
    """A small model that has learnt a few recordings by heart."""
    clips = sorted(speech_clips, key=lambda clip: clip["duration"])[:8]
    set_seed(0)
    tokenizer = train_tokenizer([clip["text"] for clip in clips], vocab_size=300)
    small = MelLLMConfig.from_preset(
        "small",
        vocab_size=len(tokenizer),
        text_config={"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
        audio_config={"conv_channels": 32, "hidden_size": 128},
    )
    model, processor = from_text_llm(
        small.text_config, tokenizer, audio_config=small.audio_config, transcription_instruction=""
    )
    examples = examples_of(clips)
    features = [processor(example["audio"])["input_features"][0] for example in examples]
    model.model.set_feature_statistics(*compute_feature_statistics(features))
    folder = tmp_path_factory.mktemp("trained")
    Trainer(
        model,
        arguments(
            folder / "run", per_device_train_batch_size=4, max_steps=120, learning_rate=1e-3,
            lr_scheduler_type="cosine", warmup_steps=20, logging_steps=1000,
        ),
        train_dataset=examples,
        data_collator=TranscriptionCollator(processor),
    ).train()  # fmt: skip
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model"), clips


def test_recordings_learnt_are_read_without_an_error(trained):
    """WER 0 through the stock pipeline, batched and not, from the saved folder."""
    folder, clips = trained
    recogniser = pipeline("automatic-speech-recognition", model=folder)
    arrays = [clip["array"] for clip in clips]
    expected = [clip["text"] for clip in clips]
    assert [result["text"] for result in recogniser(arrays, batch_size=8)] == expected
    assert [recogniser(array)["text"] for array in arrays] == expected
    beams = recogniser(arrays, batch_size=4, generate_kwargs={"num_beams": 5})
    assert [result["text"] for result in beams] == expected


def test_it_listens(trained):
    """The words come from the sound: silence gives none, and each recording its own."""
    folder, clips = trained
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    quiet = [clip["array"] * 0.0 for clip in clips]
    texts = processor.batch_decode(model.generate(**processor(audio=quiet)), skip_special_tokens=True)
    assert texts == [""] * len(clips)
    louder = [clip["array"] * 1.1 for clip in clips]
    texts = processor.batch_decode(model.generate(**processor(audio=louder)), skip_special_tokens=True)
    assert texts == [clip["text"] for clip in clips]


def test_bfloat16_reads_the_same(trained):
    folder, clips = trained
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = model.generate(**processor(audio=[clip["array"] for clip in clips]))
    assert processor.batch_decode(ids, skip_special_tokens=True) == [clip["text"] for clip in clips]


def test_command_line(trained, tmp_path):
    from typer.testing import CliRunner

    from mel_llm.cli import app

    folder, clips = trained
    runner = CliRunner()
    result = runner.invoke(app, ["transcribe", clips[0]["path"], "--model", folder])
    assert result.exit_code == 0 and result.stdout.strip() == clips[0]["text"]
    broken = tmp_path / "broken.wav"
    broken.write_text("not audio")
    result = runner.invoke(app, ["transcribe", clips[0]["path"], str(broken), clips[1]["path"], "--model", folder])
    assert result.exit_code == 1
    assert clips[0]["text"] in result.stdout and clips[1]["text"] in result.stdout
    assert "broken.wav" in result.stderr
    for bad in (
        ["--model", "no-such-folder"],
        ["--model", folder, "--language", "xx"],
        ["--model", folder, "--device", "x"],
    ):
        result = runner.invoke(app, ["transcribe", clips[0]["path"], *bad])
        assert result.exit_code == 2 and "mel-llm: " in result.stderr and not result.stdout


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_lora_preset_covers_the_blocks_and_saves_what_is_new(tokenizer, speech_clips, tmp_path, family):
    text = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512} if family == "gpt2" else None
    model, processor = build_tiny(tokenizer, family, text=text)
    base = tmp_path / "base"
    model.save_pretrained(base)
    config = lora_config(model, "paper", r=4, lora_alpha=8)
    assert config.r == 4 and config.lora_dropout == 0.01
    peft_model = get_peft_model(model, config)
    adapted = {
        name.split(".")[-1] for name, module in peft_model.named_modules() if hasattr(module, "lora_A") and "." in name
    }
    expected = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
    }
    assert adapted == expected[family]
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert any("audio_embedder" in name for name in trainable) and any("projector" in name for name in trainable)
    assert not any("embed_tokens" in name or "wte" in name or "lm_head" in name for name in trainable)

    with torch.no_grad():  # everything that can train changes, and so do the statistics
        for name, parameter in peft_model.named_parameters():
            if name in trainable:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        peft_model.base_model.model.model.set_feature_statistics(torch.full((80,), 9.0), torch.full((80,), 2.0))
    inputs = processor(audio=speech_clips[0]["array"])
    labels = torch.tensor([[5, 6, 7]])
    expected_logits = peft_model.eval()(**inputs, labels=labels).logits
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForSpeechSeq2Seq.from_pretrained(base), str(tmp_path / "adapter")
    ).eval()
    torch.testing.assert_close(again(**inputs, labels=labels).logits, expected_logits)


def test_new_token_rows_are_trained_and_saved_and_no_others(tokenizer, speech_clips, tmp_path):
    model, processor = build_tiny(tokenizer)
    base = tmp_path / "base"
    model.save_pretrained(base)
    peft_model = get_peft_model(model, lora_config(model, new_token_ids=[300, 7]))
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    labels = torch.full_like(inputs["input_ids"], -100)
    inputs["input_ids"][:, -1], labels[:, -1] = 7, 300
    optimiser = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=1.0)
    before = peft_model.get_input_embeddings().weight.clone()
    peft_model.train()(**inputs, labels=labels).loss.backward()
    optimiser.step()
    peft_model.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < base.joinpath("model.safetensors").stat().st_size
    merged = (
        PeftModel.from_pretrained(AutoModelForSpeechSeq2Seq.from_pretrained(base), str(tmp_path / "adapter"))
        .merge_and_unload()
        .get_input_embeddings()
        .weight
    )
    changed = (merged - before).abs().sum(1).nonzero().flatten().tolist()
    assert set(changed) <= {7, 300} and 7 in changed
    with pytest.raises(ValueError, match="new_token_ids"):
        lora_config(AutoModelForSpeechSeq2Seq.from_pretrained(base), new_token_ids=[9999])


def test_freezing_by_name(tiny):
    model, _ = tiny
    before, total = count_parameters(model)
    assert before == total == sum(p.numel() for p in model.parameters())
    freeze(model, [r"layers\.1\.", "embed_tokens"])
    trainable, _ = count_parameters(model)
    assert 0 < trainable < total and not model.get_input_embeddings().weight.requires_grad
