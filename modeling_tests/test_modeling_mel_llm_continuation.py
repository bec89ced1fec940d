"""SPECTRON's objective and what feeds it: each term against its equation, lengths, tasks, and one checkpoint for all classes."""

import copy

import pytest
import torch
from conftest import build_tiny
from transformers import AutoModelForPreTraining, AutoModelForSpeechSeq2Seq, Trainer, TrainingArguments

from mel_llm import (
    MelLLMAudioConfig,
    MelLLMConfig,
    MelLLMFeatureExtractor,
    MelLLMForSpeechContinuation,
    MelLLMForTextToSpeech,
    MelLLMSpeechConfig,
    MelLLMVocoderConfig,
)
from mel_llm.speech_heads_mel_llm import delta_loss, reconstruction_loss


# What a test may have: the paper's form, and ours (no encoder, the VAE head, patches of the reading side's stem)
SPECTRON = {"head_hidden_size": 32, "prenet_hidden_size": 16}
OURS = {"history_dropout": 0.0, "postnet_layers": 2, "postnet_channels": 16, "head_hidden_size": 32}
CONFORMER = {
    "encoder_type": "conformer",
    "projector_type": "linear",
    "encoder_config": {"num_blocks": 1, "num_attention_heads": 4, "intermediate_size": 32, "kernel_size": 3},
}


def build_continuing(tokenizer, family="llama", preset="spectron", audio=None, vocoder=False, text=None, **speech):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    model, processor = build_tiny(
        tokenizer,
        family,
        audio_config=audio,
        text=text,
        feature_extractor=extractor,
        model_class=MelLLMForSpeechContinuation,
        continuation_instruction="Go.",  # so short that a small window still reaches the audio
        speech_config=MelLLMSpeechConfig.from_preset(
            preset, **{**(SPECTRON if preset == "spectron" else OURS), **speech}
        ),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=4) if vocoder else None,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that what begins at zero has a say
        for parameter in model.speech_head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval(), processor


@pytest.fixture(scope="module")
def continuing(tokenizer):
    return build_continuing(tokenizer)


def batch_of(seed: int = 0) -> dict:
    """Three prompts: with text and speech, with text alone, with speech alone."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 40, 80, generator=generator) * 3 + 12
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 22:] = 0
    speech = torch.randn(3, 13, 80, generator=generator) * 3 + 12
    speech[1], speech[2, 6:] = -100.0, -100.0
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [-100] * 4])
    return {
        "input_features": features,
        "input_features_mask": mask,
        "labels": labels,
        "spectrogram_labels": speech,
    }


def row_of(batch: dict, row: int) -> dict:
    """One row, without any padding."""
    frames = int(batch["input_features_mask"][row].sum())
    tokens = max(1, int((batch["labels"][row] != -100).sum()))
    spoken = max(1, int((batch["spectrogram_labels"][row] != -100).all(-1).sum()))
    return {
        "input_features": batch["input_features"][row : row + 1, :frames],
        "labels": batch["labels"][row : row + 1, :tokens],
        "spectrogram_labels": batch["spectrogram_labels"][row : row + 1, :spoken],
    }


# --- the terms (method: L_s, L_f, L_t of the paper) ---------------------------------------------------------------------


TRUTH = torch.tensor([[[1.0, 2.0, 0.0], [3.0, 1.0, 1.0], [0.0, 0.0, 4.0], [2.0, 2.0, 2.0]]])
GUESS = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 3.0, 1.0], [1.0, 0.0, 4.0], [2.0, 0.0, 2.0]]])


def one_two(truth, guess):
    """L_{1+2} of the paper."""
    return ((truth - guess).abs() + (truth - guess).square()).sum()


def test_the_spectrogram_term():
    """Errors -1 0 1 | 0 2 0 | 1 0 0 | 0 -2 0: L1 is 7 and L2 is 11, over four frames."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert reconstruction_loss(GUESS, TRUTH, mask).item() == pytest.approx((7 + 11) / 4)


def test_the_difference_terms_by_hand():
    """Of the errors above: neighbouring bins differ by 1 1 | 2 -2 | -1 0 | -2 2, frames one apart by 1 2 -1 | 1 -2 0 |
    -1 -2 0."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    of_bins = (1 + 1 + 2 + 2 + 1 + 0 + 2 + 2) + (1 + 1 + 4 + 4 + 1 + 0 + 4 + 4)
    of_frames = (1 + 2 + 1 + 1 + 2 + 1 + 2) + (1 + 4 + 1 + 1 + 4 + 1 + 4)
    assert delta_loss(GUESS, TRUTH, mask, 1).item() == pytest.approx(of_bins / 4 + of_frames / 3)


@pytest.mark.parametrize("lags", [1, 2, 3, 7])
def test_the_difference_terms_are_the_equations(lags):
    """Delta_k of time z[1:T-k] - z[k:T], not differences of differences; each a mean over its frames."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    expected = one_two(TRUTH[..., :-1] - TRUTH[..., 1:], GUESS[..., :-1] - GUESS[..., 1:]) / 4
    for k in range(1, min(lags, 3) + 1):  # of four frames, none are further apart
        expected += one_two(TRUTH[:, :-k] - TRUTH[:, k:], GUESS[:, :-k] - GUESS[:, k:]) / (4 - k)
    assert delta_loss(GUESS, TRUTH, mask, lags).item() == pytest.approx(expected.item())


def test_padding_is_in_no_term():
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 3), value=50.0) for x in (GUESS, TRUTH)]
    mask = torch.arange(7)[None] < 4
    whole = torch.ones(1, 4, dtype=torch.bool)
    assert delta_loss(*padded, mask, 2).item() == pytest.approx(delta_loss(GUESS, TRUTH, whole, 2).item())
    assert reconstruction_loss(*padded, mask).item() == reconstruction_loss(GUESS, TRUTH, whole).item()


def test_the_whole_objective(continuing):
    """Cross-entropy over transcript and continuation with its end, L_s + L_f + L_t and the stop, from the states alone."""
    model, _ = continuing
    row = row_of(batch_of(), 0)
    output = model(**row)
    text = torch.cat([row["labels"], torch.tensor([[model.config.response_eos_token_id]])], dim=1)
    target = model.normalize(row["spectrogram_labels"])
    scale = model.config.speech_config.loss_scale
    error = output.spectrogram - target
    expected = {
        "before": scale * one_two(target, output.spectrogram) / 13,
        "delta": scale * (one_two(error[..., 1:], error[..., :-1]) / 13)
        + scale * sum(one_two(error[:, k:], error[:, :-k]) / (13 - k) for k in (1, 2)),
    }
    for name, value in expected.items():
        assert output.losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert set(output.losses) == {"text", "before", "delta", "stop", "loss", "mean_error"}
    terms = [output.losses[name] for name in ("text", "before", "delta", "stop")]
    assert output.loss.item() == pytest.approx(sum(terms).item(), rel=1e-6)
    # the logits are those of the labels' own places; the end of text has one more
    likelihood = output.logits.log_softmax(-1).gather(2, text[:, :-1, None])[..., 0]
    ids, _ = model._build_prompt(row["input_features"], None, model._prompt_of("continuation"))
    both = torch.cat([ids, text], dim=1)
    plain = AutoModelForSpeechSeq2Seq.from_config(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    scores = plain(input_ids=both, input_features=row["input_features"]).logits[:, ids.shape[1] - 1 : -1]
    expected = torch.nn.functional.cross_entropy(scores[0], text[0])
    assert output.losses["text"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert likelihood.sum().item() == pytest.approx(
        scores.log_softmax(-1).gather(2, text[..., None])[0, :-1].sum().item(), rel=1e-5
    )


def test_the_text_weighs_what_the_config_says(continuing):
    model, _ = continuing
    model, row = copy.deepcopy(model), row_of(batch_of(), 0)
    before = model(**row).losses
    model.config.text_loss_weight = 0.25
    after = model(**row).losses
    assert after["text"].item() == pytest.approx(before["text"].item() / 4)
    assert after["delta"].item() == before["delta"].item()


# --- rows and padding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("form", ["spectron", "conformer", "ours", "bidirectional"])
def test_a_batch_is_its_rows(tokenizer, family, form):
    """Padding changes nothing, also for windows of attention (16 tokens here), wherever it lies."""
    audio = {"conformer": CONFORMER, "bidirectional": {"bidirectional_attention": True}}.get(form, {})
    model, _ = build_continuing(tokenizer, family, "small" if form == "ours" else "spectron", audio)
    batch = batch_of()
    together = model(**batch)
    for row in range(3):
        alone = model(**row_of(batch, row))
        frames, tokens = alone.spectrogram.shape[1], alone.logits.shape[1]
        torch.testing.assert_close(together.spectrogram[row, :frames], alone.spectrogram[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.logits[row, :tokens], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_what_a_row_learns(continuing):
    """Text and speech, text alone, speech alone; an empty text without speech is learnt as such."""
    model, _ = continuing
    batch = batch_of()
    both, text, speech = (model(**row_of(batch, row)).losses for row in range(3))
    assert {"text", "stop"} < set(both)
    assert set(text) == {"text", "loss"}
    assert "text" not in speech and "stop" in speech
    nothing = {**row_of(batch, 1), "labels": torch.full((1, 1), -100)}
    end = model(**nothing).losses
    assert set(end) == {"text", "loss"} and end["text"] > 0
    # a batch of both kinds: the mean over its tokens, and over its frames
    two = model(**{name: value[1:] for name, value in batch.items()}).losses
    assert two["text"].item() == pytest.approx(text["text"].item(), rel=1e-4)
    assert two["delta"].item() == pytest.approx(speech["delta"].item(), rel=1e-4)


def test_speech_depends_on_the_prompt_and_on_the_text(continuing):
    model, _ = continuing
    row = row_of(batch_of(), 0)
    before = model(**row).spectrogram
    other_text = {**row, "labels": row["labels"].flip(1)}
    other_prompt = {**row, "input_features": row["input_features"].flip(1)}
    for changed in (other_text, other_prompt):
        assert (model(**changed).spectrogram - before).abs().max() > 1e-3
    later = row["spectrogram_labels"].clone()
    later[:, 7:] += 1.0
    after = model(**{**row, "spectrogram_labels": later}).spectrogram
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=0, atol=1e-5)  # frame 7 sees frames up to 6
    assert (after[:, 8] - before[:, 8]).abs().max() > 1e-3


def test_the_history_may_be_the_models_own_in_training(tokenizer):
    """As for speaking texts; the text, which stands before, is learnt as ever."""
    model, _ = build_continuing(tokenizer)
    r = model.speech_head.reduction_factor
    batch = batch_of()
    histories = []
    embed = model._embed_history
    model._embed_history = lambda frames, lengths: histories.append(frames) or embed(frames, lengths)
    recorded = model(**batch)
    whole = recorded.spectrogram.shape[1] // r
    model.history_sampling = 0.5
    assert torch.equal(model(**batch).loss, recorded.loss)  # an evaluation has none of it
    recording, written = (
        frames[0, : whole * r].unflatten(0, (-1, r)) for frames in (histories[0], recorded.spectrogram)
    )
    shares = []
    for seed in range(6):
        histories.clear()
        model.train()
        torch.manual_seed(seed)
        output = model(**batch)
        output.loss.backward()
        assert len(histories) in (2, 3)  # once, or twice on end
        torch.testing.assert_close(output.losses["text"], recorded.losses["text"])
        first = histories[1][0, : whole * r].unflatten(0, (-1, r))
        own = (first != recording).flatten(1).any(-1)
        torch.testing.assert_close(first[own], written[own], rtol=1e-4, atol=1e-4)
        shares.append(own.float().mean().item())
    assert 0.2 < sum(shares) / len(shares) < 0.8


def test_gradients_reach_every_part(tokenizer):
    model, _ = build_continuing(tokenizer, audio=CONFORMER)
    model.train()
    model(**row_of(batch_of(), 0)).loss.backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not [name for name in silent if "relative_attention_bias" not in name], silent


def test_a_prompt_of_ones_own(continuing):
    """`input_ids` with the places of the audio, padded on either side; it is the config's where it has the same tokens."""
    model, _ = continuing
    row = row_of(batch_of(), 0)
    expected = model(**row)
    prompt, _ = model._build_prompt(row["input_features"], None, model._prompt_of("continuation"))
    for left, right in ((0, 0), (3, 0), (0, 2)):
        ids = torch.nn.functional.pad(prompt, (left, right), value=0)
        mask = torch.nn.functional.pad(torch.ones_like(prompt), (left, right))
        output = model(input_ids=ids, attention_mask=mask, **row)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert model(**row, task="qa").loss != expected.loss


def test_frames_and_audio_tokens_have_rates_of_their_own(tokenizer):
    """4 frames to an audio token, 1 or 2 to a step of speech, and the last patch is filled."""
    model, _ = build_continuing(tokenizer, reduction_factor=2)
    assert model.config.audio_config.reduction_factor == 4 and model.speech_head.reduction_factor == 2
    row = row_of(batch_of(), 0)
    assert model(**row).spectrogram.shape == (1, 13, 80)
    with pytest.raises(ValueError, match="share_embed"):
        MelLLMConfig.from_preset("small", speech_config=MelLLMSpeechConfig(reduction_factor=1))
    with pytest.raises(ValueError, match="reduction_factor"):
        MelLLMSpeechConfig(reduction_factor=3)
    same = MelLLMConfig.from_preset("small", speech_config=MelLLMSpeechConfig(reduction_factor=4))
    assert same.speech_reduction_factor == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": None}, "`labels`, the token ids"),
        ({"input_features": None}, "go with `input_features`"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "a row for each of 1 prompts, got 2"),
        ({"spectrogram_labels": torch.zeros(1, 0, 80)}, "at least one frame"),
        ({"spectrogram_labels": torch.zeros(1, 5, 40)}, r"\(batch, frames, 80\)"),
        ({"labels": torch.tensor([[-100, 5]])}, "padded on the right"),
        ({"task": "sing"}, "'continuation', 'qa', got 'sing'"),
    ],
)
def test_what_does_not_fit_is_told(continuing, change, message):
    model, _ = continuing
    with pytest.raises(ValueError, match=message):
        model(**{**row_of(batch_of(), 0), **change})


# --- one checkpoint -----------------------------------------------------------------------------------------------------


def test_every_class_loads_the_checkpoint(tokenizer, tmp_path, speech_clips):
    model, processor = build_continuing(tokenizer, vocoder=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    row = row_of(batch_of(), 0)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(again) is MelLLMForSpeechContinuation
    assert again(**row).loss.item() == pytest.approx(model(**row).loss.item(), rel=1e-5)
    inputs = processor(audio=speech_clips[0]["array"])
    reads = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=4)
    assert torch.equal(reads, again.generate(**inputs, max_new_tokens=4, task="transcribe"))
    text = processor.apply_speech_request("Yes.")
    speaks = MelLLMForTextToSpeech.from_pretrained(tmp_path).generate(**text, max_new_tokens=4, seed=1)
    torch.testing.assert_close(speaks, again.generate(**text, max_new_tokens=4, seed=1))
    assert again.transcribe(speech_clips[0]["path"], processor, max_new_tokens=4).segments[0].text == processor.decode(
        reads[0], skip_special_tokens=True
    )


def test_the_stock_trainer_trains_it(tokenizer, tmp_path):
    model, _ = build_continuing(tokenizer, "llama", "small", kl_warmup_steps=1)
    batch = batch_of()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    before = model(**batch).loss.item()
    trainer.train()
    assert model.eval()(**batch).loss.item() < 0.8 * before


# --- presets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, backbone", [("spectron-350m", 350), ("spectron-1b", 1000)])
def test_the_papers_sizes(name, backbone):
    config = MelLLMConfig.from_preset(name)
    with torch.device("meta"):
        model = MelLLMForSpeechContinuation(config)

    def millions(module):
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    assert millions(model.model.language_model) == pytest.approx(backbone, rel=0.05)
    assert millions(model.model.audio_embedder.encoder) == pytest.approx(600, rel=0.05)
    assert config.audio_config.num_mel_bins == MelLLMFeatureExtractor.from_preset("spectron").num_mel_bins == 128
    assert model.speech_head.reduction_factor == 1 and not model.speech_head.is_random
    assert config.speech_config.delta_weight == 1.0 and model.speech_head.postnet is None
    assert model.speech_head.prenet.layers[0].out_features < config.audio_config.num_mel_bins * 8
    assert MelLLMConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_the_small_preset_learns(tokenizer):
    config = MelLLMConfig.from_preset(
        "spectron-small",
        vocab_size=64,
        audio_config={"encoder_type": "none", "num_mel_bins": 80},
        speech_config={"delta_lags": 1},
        text_config={"num_hidden_layers": 1},
    )
    assert config.audio_config.encoder_config is None and config.speech_config.delta_lags == 1
    model = MelLLMForSpeechContinuation(config)
    model.model.set_feature_statistics(torch.full((80,), 12.0), torch.full((80,), 3.0))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch_of()).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="spectron-small"):
        MelLLMConfig.from_preset("spectron")
    assert MelLLMAudioConfig().encoder_type == "none"
