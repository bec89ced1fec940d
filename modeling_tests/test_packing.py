"""Sequence packing: clips in one row have the loss and the gradients that they have alone."""

import pytest
import torch
from conftest import BACKBONES, build_tiny, tiny_text_config
from peft import get_peft_model
from test_train_script import SCRATCH, folder, losses, script, train, words  # noqa: F401  (fixtures)

from mel_llm.conversion import from_text_llm
from mel_llm.training import (
    PackedTranscriptionCollator,
    TranscriptionCollator,
    check_packing,
    lora_config,
    pack_transcripts,
)


def examples_of(speech_clips):
    """Clips of different lengths, one of them very short, cut so that the test is fast."""
    lengths = (9000, 400, 24000, 16001)
    return [
        {"audio": clip["array"][:length], "text": clip["text"][: 5 + 7 * index]}
        for index, (clip, length) in enumerate(zip(speech_clips, lengths, strict=False))
    ]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_packed_is_unpadded(model, processor, examples) -> None:
    model.eval()  # without dropout, which is drawn for each place
    alone, unpadded = TranscriptionCollator(processor), []
    count = sum(int((alone([example])["labels"] != -100).sum()) for example in examples)
    for example in examples:
        loss = model(**alone([example]), num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        unpadded.append(loss.detach())
    expected = gradients(model)
    config = model.config
    batch = PackedTranscriptionCollator(processor, config=config)(examples)
    assert batch["input_ids"].shape == batch["position_ids"].shape and batch["labels"].shape == (1, count)
    assert len(batch["input_ids"]) == 1 and len(batch["input_features"]) == len(examples)
    output = model(**batch, num_items_in_batch=torch.tensor(count))
    output.loss.backward()
    torch.testing.assert_close(output.loss, sum(unpadded), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**batch).loss, sum(unpadded), rtol=1e-5, atol=1e-5)
    packed = gradients(model)
    assert packed.keys() == expected.keys() and len(packed) > 3
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # The test would see it: with the positions of one long row, the clips see each other
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    assert (model(**{**batch, "position_ids": positions}).loss - sum(unpadded)).abs() > 1e-4


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_is_unpadded(tokenizer, speech_clips, family, attention):
    """Among the backbones are some whose layers see a window of 16 tokens, which is less than a clip."""
    model, processor = build_tiny(tokenizer, family)
    model.set_attn_implementation(attention)
    assert_packed_is_unpadded(model, processor, examples_of(speech_clips))


@pytest.mark.parametrize("audio_config", [{"bidirectional_attention": True}, {"embedder_type": "linear"}])
def test_packed_is_unpadded_with_other_audio_sides(tokenizer, speech_clips, audio_config):
    model, processor = build_tiny(tokenizer, audio_config=audio_config)
    assert_packed_is_unpadded(model, processor, examples_of(speech_clips))


def with_questions(examples) -> list[dict]:
    """All but the first ask something, in more words from one to the next."""
    asked = ("Who?", "Which emotion is in this voice?", "What is heard here, in a word?")
    return [examples[0], *({**one, "instruction": text} for one, text in zip(examples[1:], asked, strict=True))]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_questions_are_packed_too(tokenizer, speech_clips, family):
    """The first clip, whose transcript is wanted, has the loss that it has in a batch without questions."""
    model, processor = build_tiny(tokenizer, family)
    examples = with_questions(examples_of(speech_clips))
    assert_packed_is_unpadded(model, processor, examples)
    later = PackedTranscriptionCollator(processor, config=model.config, features_later=True)
    waiting = later(examples)
    row = later.finish(waiting, device="cpu")
    assert (waiting["labels"] != -100).sum() == row["labels"].numel() == len(row["logits_to_keep"])
    ids = row["input_ids"][0]
    assert torch.equal(ids[row["logits_to_keep"] + 1], row["labels"][0])


def test_packed_is_unpadded_with_adapters_and_a_speech_head(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer, speech_config={})
    adapted = get_peft_model(model, lora_config(model, "small", lora_dropout=0.0))
    assert_packed_is_unpadded(adapted, processor, examples_of(speech_clips))


def test_gradient_checkpointing_keeps_the_borders(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer, text={"attention_dropout": 0.0})
    batch = PackedTranscriptionCollator(processor, config=model.config)(examples_of(speech_clips))
    model(**batch).loss.backward()
    expected = gradients(model)
    model.train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_row_is_clip_after_clip(tiny, speech_clips):
    model, processor = tiny
    config, examples = model.config, examples_of(speech_clips)[:2]
    batch = TranscriptionCollator(processor)(examples)
    row = pack_transcripts(batch, config)
    ids, places = row["input_ids"][0].tolist(), row["logits_to_keep"].tolist()
    clips = []
    for mask, target in zip(batch["attention_mask"], batch["labels"], strict=True):
        transcript = target[target != -100].tolist()
        audio = [config.audio_token_id] * config.audio_config.num_audio_tokens(int(mask.sum()))
        clips.append(([*config.prompt_prefix_ids, *audio, *config.prompt_suffix_ids], transcript))
    assert ids == [token for prompt, transcript in clips for token in [*prompt, *transcript]]
    assert row["labels"][0].tolist() == [token for _, transcript in clips for token in transcript]
    assert [ids[place + 1] for place in places] == row["labels"][0].tolist() == row["shift_labels"][0].tolist()
    with torch.no_grad():
        assert model(**row).logits.shape[1] == len(places)
    assert row["position_ids"][0].tolist() == [i for p, t in clips for i in range(len(p) + len(t))]
    assert row["use_cache"] is False


def test_backbones_in_which_clips_would_see_each_other_are_refused(tokenizer):
    text = tiny_text_config("falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16)
    hybrid, _ = from_text_llm(text, tokenizer, audio_config={"conv_channels": 8, "hidden_size": 32})
    with pytest.raises(ValueError, match="backbone 'falcon_h1'.*recurrent state"):
        check_packing(hybrid)
    alibi, _ = from_text_llm(
        tiny_text_config("bloom", n_layer=2, n_head=4), tokenizer, audio_config={"hidden_size": 32}
    )
    with pytest.raises(ValueError, match="backbone 'bloom'"):
        check_packing(alibi)
    with pytest.raises(ValueError, match="CTC head"):
        check_packing(build_tiny(tokenizer, audio_config={"ctc_weight": 0.3})[0])
    with pytest.raises(ValueError, match="for a Mel-LLM"):
        check_packing(torch.nn.Linear(2, 2))
    for family in BACKBONES:
        for dtype in (torch.float32, torch.bfloat16):
            model = build_tiny(tokenizer, family)[0].to(dtype).train()
            check_packing(model)
            assert model.training


def test_a_collator_that_cannot_pack_is_refused(tiny):
    model, processor = tiny
    with pytest.raises(ValueError, match="`config` is needed"):
        PackedTranscriptionCollator(processor)
    with pytest.raises(ValueError, match="CTC"):
        PackedTranscriptionCollator(processor, spell=True, config=model.config)


# --- in the training script -----------------------------------------------------------------------------------------


def test_a_packed_run_trains_as_a_padded_one(script, folder, tmp_path):  # noqa: F811
    """Same clips in the same batches: the losses are the same, and so is the evaluation."""
    curves, metrics = [], []
    for name, more in (("padded", []), ("packed", ["--packing"]), ("later", ["--packing", "--features_on_device"])):
        common = [*SCRATCH, "--num_train_epochs", "2", "--eval_data", folder, "--spec_augment"]
        run = train(script, *words(folder, tmp_path / name, *common, *more))
        curves.append(list(losses(tmp_path / name).values()))
        metrics.append(run.trainer.evaluate()["eval_loss"])
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-3) and metrics[1] == pytest.approx(metrics[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    ctc = ["--audio_config", '{"ctc_weight": 0.3, "conv_channels": 8, "hidden_size": 32}']
    with pytest.raises(ValueError, match="CTC head"):
        script.prepare(words(folder, tmp_path / "x", "--packing", *ctc))
