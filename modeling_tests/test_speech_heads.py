"""Each term of the speech objective against values worked out by hand, and the gradients that it sends."""

import math

import pytest
import torch
from conftest import build_tiny

from mel_llm import MelLLMSpeechConfig
from mel_llm.speech_heads_mel_llm import (
    MelLLMPostNet,
    MelLLMSpeechHead,
    delta_loss,
    flux_loss,
    kl_loss,
    optimal_sigma_loss,
    reconstruction_loss,
    stop_loss,
)


# Two clips of three and two frames with two bins
TARGET = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 3.0], [9.0, 9.0]]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def prediction(*frames):
    return torch.tensor(frames, requires_grad=True)


@pytest.fixture
def guess():
    return prediction([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 3.0], [0.0, 0.0]])


def test_reconstruction(guess):
    """Errors 1, 2 and 1: L1 is 4 and L2 is 6, over five frames."""
    loss = reconstruction_loss(guess, TARGET, MASK)
    assert loss.item() == pytest.approx((4 + 6) / 5)
    loss.backward()
    assert not guess.grad[1, 2].any() and guess.grad[0, 1, 1].item() == pytest.approx((-1 - 4) / 5)


def test_kl_to_the_target_and_to_zero(guess):
    log_variance = torch.full_like(TARGET, math.log(0.25))
    constant = 10 * 0.5 * (0.25 - 1 - math.log(0.25))  # of ten valid values
    assert kl_loss(guess, log_variance, TARGET, MASK).item() == pytest.approx((constant + 0.5 * 6) / 5)
    squares = 1 + 1 + 4 + 0 + 0 + 1 + 0 + 1 + 0 + 9
    assert kl_loss(guess, log_variance, None, MASK).item() == pytest.approx((constant + 0.5 * squares) / 5)
    assert kl_loss(TARGET, torch.zeros_like(TARGET), TARGET, MASK).item() == 0


def test_flux(guess):
    """From the second frame on: |mean_t - y_{t-1}|, with minus, over the three frames that have one before."""
    absolute = (1 + 0) + (2 + 1) + (1 + 2)
    assert flux_loss(guess, TARGET, MASK, clipped=False).item() == pytest.approx(-absolute / 3)
    change = (min(1, 1) + min(0, 2)) + (min(2, 2) + min(1, 1)) + (min(1, 1) + min(2, 2))
    assert flux_loss(guess, TARGET, MASK, clipped=True).item() == pytest.approx(-change / 3)


def test_clipped_flux_does_not_reward_running_away():
    far = TARGET + 100
    assert flux_loss(far, TARGET, MASK, clipped=False) < -100
    real = (TARGET[:, 1:] - TARGET[:, :-1]).abs()
    most = (real.sum(-1) * MASK[:, 1:]).sum() / 3
    assert flux_loss(far, TARGET, MASK, clipped=True).item() == pytest.approx(-most.item())


def test_optimal_sigma(guess):
    """At the best deviation the likelihood is log sigma + log(2 pi e) / 2 for each value."""
    sigma = math.sqrt(6 / 10)
    soft = -6 + math.log1p(math.exp(math.log(sigma) + 6))
    expected = 6 / (2 * math.exp(2 * soft)) / 5 + 2 * (soft + 0.5 * math.log(2 * math.pi))
    assert optimal_sigma_loss(guess, TARGET, MASK).item() == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(2 * (math.log(sigma) + 0.5 * math.log(2 * math.pi * math.e)), abs=0.02)
    optimal_sigma_loss(guess, TARGET, MASK).backward()
    assert torch.isfinite(guess.grad).all() and not guess.grad[1, 2].any()


def test_stop():
    logits = torch.zeros(2, 4)
    logits[0, 3] = 2.0
    lengths = torch.tensor([3, 1])  # patches; the state behind the last one says stop
    nothing = math.log(2)
    positive = 5 * (math.log1p(math.exp(-2.0)) + nothing)
    expected = (3 * nothing + 1 * nothing + positive) / 6
    assert stop_loss(logits, lengths, 5.0).item() == pytest.approx(expected, rel=1e-5)


def test_delta(guess):
    """Error (0, 1), (0, -2), (0, 0) and (-1, 0), (0, 0): differences over bins, and over time with lags 1 and 2."""
    bins = (1 + 1) + (2 + 4) + 0 + (1 + 1) + 0
    lag_1 = (3 + 9) + (2 + 4) + (1 + 1)
    lag_2 = 1 + 1
    expected = bins / 5 + lag_1 / 3 + lag_2 / 1
    assert delta_loss(guess, TARGET, MASK, lags=2).item() == pytest.approx(expected)


def make_head(tokenizer, **speech):
    model, _ = build_tiny(tokenizer)
    model.config.speech_config = MelLLMSpeechConfig(**speech)
    return MelLLMSpeechHead(model.config)


def test_terms_add_up_with_their_weights_and_the_warm_up(tokenizer):
    torch.manual_seed(0)
    head = make_head(tokenizer, kl_warmup_steps=2, kl_weight=0.5, flux_weight=0.25, stop_weight=3.0, loss_scale=0.1)
    hidden, target = torch.randn(2, 4, 64), torch.randn(2, 11, 80)
    for step in range(4):
        terms, spectrogram = head.loss(hidden, target, torch.tensor([11, 6]))
        named = {name: value for name, value in terms.items() if name not in ("loss", "mean_error")}
        assert set(named) == {"before", "after", "kl", "flux", "stop"}
        assert sum(value.item() for value in named.values()) == pytest.approx(terms["loss"].item(), rel=1e-5)
        assert (terms["kl"].item() == 0) == (step < 2)
        assert spectrogram.shape == (2, 12, 80)
    assert head.num_updates == 4
    head.eval().loss(hidden, target, torch.tensor([11, 6]))
    assert head.num_updates == 4


def test_states_spell_what_is_said_in_them(tokenizer):
    """Two patches with two places each, all sure of their letters: "ab" fits them, and other letters cost what they are
    unlikely."""
    head = make_head(tokenizer, ctc_weight=2.0, ctc_rate=2, loss_scale=0.1).eval()
    hidden, target, lengths = torch.zeros(2, 3, 64), torch.zeros(2, 8, 80), torch.tensor([8, 8])
    with torch.no_grad():
        head.speller.proj.weight.zero_()
        scores = torch.full((2, 256), -100.0)
        scores[0, ord("a")] = scores[1, ord("b")] = scores[1, 0] = 0.0  # an a, and a b half of the time
        head.speller.proj.bias.copy_(scores.flatten())
    # "abab" must take the b twice; "aba" one of two (the other place empty); per letter, and weighted
    letters = torch.tensor([[*b"abab"], [*b"aba", -100]])
    terms, _ = head.loss(hidden, target, lengths, letters)
    first, second = 2 * math.log(2) / 4, 2 * math.log(2) / 3
    assert terms["ctc"].item() == pytest.approx(2.0 * (first + second) / 2, rel=1e-4)
    without, _ = head.loss(hidden, target, lengths)
    assert "ctc" not in without
    assert terms["loss"].item() == pytest.approx(without["loss"].item() + terms["ctc"].item(), rel=1e-4)
    assert make_head(tokenizer).speller is None


@pytest.mark.parametrize("head_type", ["vae", "sigma_vae", "deterministic"])
def test_every_parameter_gets_a_gradient(tokenizer, head_type):
    head = make_head(tokenizer, head_type=head_type, kl_warmup_steps=0, share_embed=True)
    terms, _ = head.loss(torch.randn(2, 4, 64), torch.randn(2, 12, 80), torch.tensor([12, 5]))
    terms["loss"].backward()
    without = [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert without == ["begin"]  # the model puts it into the sequence
    assert ("kl" in terms) == (head_type != "deterministic")


def test_a_clips_loss_does_not_depend_on_its_batch(tokenizer):
    head = make_head(tokenizer, head_type="deterministic").eval()
    hidden, target = torch.randn(2, 6, 64), torch.randn(2, 18, 80)
    both, frames = head.loss(hidden, target, torch.tensor([18, 7]))
    target[1, 7:] = 50.0
    again, other = head.loss(hidden, target, torch.tensor([18, 7]))
    assert both["loss"].item() == pytest.approx(again["loss"].item(), rel=1e-5)
    alone, single = head.loss(hidden[1:, :3], target[1:, :7], torch.tensor([7]))
    torch.testing.assert_close(single[0, :7], other[1, :7])
    torch.testing.assert_close(frames[1, :7], other[1, :7])
    assert torch.isfinite(alone["loss"])


def test_the_postnet_looks_no_farther_than_it_says():
    torch.manual_seed(0)
    net = MelLLMPostNet(8, num_layers=3, channels=16, kernel_size=5)
    assert net.context == 6
    frames = torch.randn(1, 40, 8)
    changed = frames.clone()
    changed[0, 20] += 5
    moved = (net(frames) - net(changed)).abs().sum(-1)[0].nonzero().flatten()
    assert moved.min() == 14 and moved.max() == 26


def test_presets():
    paper = MelLLMSpeechConfig.from_preset("paper")
    assert (paper.kl_weight, paper.flux_weight, paper.stop_weight, paper.history_dropout) == (0.05, 0.5, 1.0, 0.5)
    assert paper.flux_type == "absolute" and paper.loss_scale == 1.0
    assert MelLLMSpeechConfig.from_preset("small", head_type="deterministic").flux_type == "clipped"
    with pytest.raises(ValueError, match="paper, small"):
        MelLLMSpeechConfig.from_preset("large")
