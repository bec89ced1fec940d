"""The CTC head: its loss against torch's on its own, its place in the objective, and runs that begin with it alone."""

import json

import pytest
import torch
from conftest import build_tiny
from test_train_script import SCRATCH, TEXT, folder, losses, script, train, words  # noqa: F401  (fixtures among them)
from transformers import AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform

from mel_llm import MelLLMForSpeechSeq2Seq
from mel_llm.training import TranscriptionCollator, count_unspellable, ctc_bytes


CTC = ["--audio_config", json.dumps({**json.loads(SCRATCH[3]), "ctc_weight": 0.5, "ctc_rate": 4}), *SCRATCH[:2]]


@pytest.fixture(scope="module")
def spelling(tokenizer):
    return build_tiny(tokenizer, audio_config={"ctc_weight": 0.5, "ctc_rate": 2})


def batch_of(processor, clips):
    return TranscriptionCollator(processor, spell=True)(
        [{"audio": clip["array"], "text": clip["text"]} for clip in clips]
    )


def test_letters_of_a_transcript():
    assert bytes(ctc_bytes("  It’s 5 o'clock, HERE!\n")).decode() == "it's 5 o'clock here"
    assert bytes(ctc_bytes("Größe 東京?")).decode() == "grösse 東京"
    assert ctc_bytes("...") == [] and 0 not in ctc_bytes("a\0b")
    assert count_unspellable(["hello", "hello", "abc"], [6, 5, 3]) == 1  # the two l need a blank between them


def test_the_loss_is_that_of_each_clip_alone(spelling, speech_clips):
    """Prompts of different lengths, padded on the left, and letters padded on the right."""
    model, processor = spelling
    clips = speech_clips[:3]
    batch = batch_of(processor, clips)
    together = model(**batch)
    expected, weights = [], []
    for clip in clips:
        single = batch_of(processor, [clip])
        output = model(**single, output_hidden_states=True)
        ids, _ = model._build_prompt(single["input_features"], single["attention_mask"])
        states = output.hidden_states[1][0, : ids.shape[1]][ids[0] == model.config.audio_token_id]  # 2 layers: below 1
        scores = (states @ model.ctc_head.proj.weight.T + model.ctc_head.proj.bias).reshape(-1, 256).log_softmax(-1)
        letters = torch.tensor(ctc_bytes(clip["text"]))
        sizes = torch.tensor([len(scores)]), torch.tensor([len(letters)])
        loss = torch.nn.functional.ctc_loss(scores[:, None], letters[None], *sizes, reduction="sum") / len(letters)
        torch.testing.assert_close(output.ctc_loss, loss, rtol=1e-4, atol=1e-5)
        expected.append(loss)
        weights.append((single["labels"] != -100).sum())
    weights = torch.stack(weights).float()
    torch.testing.assert_close(
        together.ctc_loss, (torch.stack(expected) * weights).sum() / weights.sum(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(together.loss, together.losses["text"] + 0.5 * together.losses["ctc"])
    assert together.hidden_states is None
    # Two halves of a batch, as in gradient accumulation, add up to the whole
    count = weights.sum().long()
    halves = [batch_of(processor, clips[:1]), batch_of(processor, clips[1:])]
    total = sum(model(**half, num_items_in_batch=count).ctc_loss for half in halves)
    torch.testing.assert_close(total, together.ctc_loss, rtol=1e-4, atol=1e-5)


def test_where_letters_are_all_that_is_learnt_no_text_is_read(tokenizer, speech_clips, monkeypatch):
    """The same letters and gradients as beside the text, which is left out of what is computed."""
    model, processor = build_tiny(tokenizer, audio_config={"ctc_weight": 0.5, "ctc_rate": 2})
    batch = batch_of(processor, speech_clips[:2])
    model.train()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    both = model(**batch)
    expected = gradients(0.5 * both.ctc_loss)
    model.text_loss_weight = 0.0
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    alone = model(**batch)
    assert lengths == [model._build_prompt(batch["input_features"], batch["attention_mask"])[0].shape[1]]
    assert list(alone.losses) == ["ctc"] and alone.logits is None
    torch.testing.assert_close(alone.ctc_loss, both.ctc_loss)
    torch.testing.assert_close(alone.loss, 0.5 * both.ctc_loss)
    found = gradients(alone.loss)
    assert found.keys() == expected.keys() and any(name.startswith("ctc_head") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    model.eval()  # an evaluation measures both
    assert model(**batch).losses.keys() == {"text", "ctc"}


def test_hidden_words_are_hidden_in_training_alone(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer)
    batch = TranscriptionCollator(processor)(
        [{"audio": clip["array"], "text": clip["text"]} for clip in speech_clips[:4]]
    )
    read = []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    model(**batch)
    model.text_dropout = 0.5
    seen = model(**batch).logits
    model.train()
    torch.manual_seed(0)
    hidden = model(**batch)
    start = model._build_prompt(batch["input_features"], batch["attention_mask"])[0].shape[1]
    assert torch.equal(read[0], read[1])
    before, after = read[1][:, start:], read[2][:, start:]
    assert torch.equal(read[1][:, :start], read[2][:, :start]) and not torch.equal(seen, hidden.logits)
    changed = before != after
    assert (after[changed] == model.config.pad_token_id).all()
    assert 0.3 < changed.sum() / (batch["labels"] != -100).sum() < 0.7
    # What is to be written stays the same, and so does how many tokens the model may attend to
    loss = torch.nn.functional.cross_entropy(hidden.logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(hidden.loss, loss)


def test_a_run_hides_words(script, folder, tmp_path, monkeypatch):  # noqa: F811
    shares = []
    forward = MelLLMForSpeechSeq2Seq.forward
    monkeypatch.setattr(
        MelLLMForSpeechSeq2Seq,
        "forward",
        lambda self, *args, **kwargs: (
            shares.append((self.training, self.text_dropout)) or forward(self, *args, **kwargs)
        ),
    )
    train(script, *words(folder, tmp_path / "run", *SCRATCH, "--text_dropout", "0.25", "--max_steps", "2"))
    assert (True, 0.25) in shares and (True, 0.0) not in shares


def test_without_letters_nothing_changes(spelling, tiny, speech_clips):
    model, processor = spelling
    batch = batch_of(processor, speech_clips[:2])
    letters = batch.pop("transcript_bytes")
    assert model(**batch).ctc_loss is None
    plain, _ = tiny
    assert plain.ctc_head is None and plain(**batch, transcript_bytes=letters).ctc_loss is None
    tokens = [model.generate(**batch, **more, max_new_tokens=4) for more in ({}, {"transcript_bytes": letters})]
    assert torch.equal(*tokens)


def test_a_transcript_that_does_not_fit_is_worth_nothing(spelling, speech_clips):
    model, processor = spelling
    batch = batch_of(processor, speech_clips[:1])
    batch["transcript_bytes"] = torch.full((1, 5000), 97)
    output = model(**batch)
    assert output.ctc_loss == 0 and torch.isfinite(output.loss)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_a_run_begins_with_letters_alone(script, folder, tmp_path, caplog):  # noqa: F811
    output = tmp_path / "run"
    more = ["--ctc_only_steps", "3", "--num_train_epochs", "10", "--eval_data", folder, "--eval_strategy", "epoch"]
    train(script, *words(folder, output, *CTC, *more))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = {entry["step"]: entry for entry in history if "loss" in entry}
    for step, entry in steps.items():
        text = 0.0 if step <= 3 else entry["asr_text"]
        assert entry["loss"] == pytest.approx(text + 0.5 * entry["asr_ctc"], rel=1e-3), step
    assert steps[30]["asr_ctc"] < 0.8 * steps[1]["asr_ctc"]
    evaluations = [entry["eval_asr_ctc"] for entry in history if "eval_asr_ctc" in entry]
    assert evaluations[-1] < evaluations[0] and any("eval_wer" in entry for entry in history)

    model = AutoModelForSpeechSeq2Seq.from_pretrained(str(output))
    assert model.ctc_head.proj.weight.abs().sum() > 0
    # It becomes a model that speaks, and goes on spelling
    speaker = tmp_path / "speaker"
    arguments = ["--model_name_or_path", str(output), "--tasks", "asr,tts", "--max_steps", "2"]
    train(script, *words(folder, speaker, *arguments))
    assert AutoModelForTextToWaveform.from_pretrained(str(speaker)).ctc_head is not None


def test_adapters_hold_the_head(script, folder, tmp_path, tokenizer):  # noqa: F811
    build_model, processor = build_tiny(tokenizer, audio_config={"ctc_weight": 0.5, "ctc_rate": 4})
    build_model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    output = tmp_path / "lora"
    more = ["--model_name_or_path", str(tmp_path / "base"), "--lora", "small", "--max_steps", "3", "--merge_lora"]
    train(script, *words(folder, output, *more))
    trained = AutoModelForSpeechSeq2Seq.from_pretrained(str(output))
    assert not torch.equal(trained.ctc_head.proj.weight, build_model.ctc_head.proj.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SCRATCH, "--ctc_only_steps", "5"], "needs a CTC head"),
        (["--audio_config", '{"ctc_weight": 0.3, "ctc_layer": 9}', *SCRATCH[:2]], "has 2 layers"),
        (["--audio_config", '{"ctc_weight": -1}', *SCRATCH[:2]], "`ctc_weight`"),
    ],
)
def test_what_cannot_work_is_told(script, folder, tmp_path, arguments, message):  # noqa: F811
    assert TEXT["num_hidden_layers"] == 2
    with pytest.raises(ValueError, match=message):
        script.prepare(words(folder, tmp_path / "run", *arguments))


def test_clips_with_more_letters_than_places_are_counted(script, folder, tmp_path, caplog):  # noqa: F811
    slow = json.dumps({**json.loads(SCRATCH[3]), "ctc_weight": 0.5, "reduction_factor": 16, "ctc_rate": 4})
    arguments = ["--audio_config", slow, *SCRATCH[:2]]
    script.logger.addHandler(caplog.handler)
    script.prepare(words(folder, tmp_path / "run", *arguments))
    assert "CTC learns nothing" not in caplog.text
    script.prepare(words(folder, tmp_path / "fast", *arguments, "--speed_factors", "0.9", "2.0"))
    script.logger.removeHandler(caplog.handler)
    assert "of 12 clips" in caplog.text and "at speed 2: " in caplog.text and "the 25 places a second" in caplog.text
