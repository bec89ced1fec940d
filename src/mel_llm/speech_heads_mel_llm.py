"""Speech heads: from hidden states of the language model to mel patches, and the objective that trains them.

Letters: B batch, M patches, r frames per patch, F mel bins, D width of the language model. All mel values are
normalised (mean 0, deviation 1 per bin; [`MelLLMFeatureNorm`]).

The form of the head is stated for Mel-LLM (latent by a linear layer, reparameterisation, residual MLP, convolutional
post-net, stop head; L1 + L2, KL, flux and stop terms with their weights); what is behind the words is MELLE's (arXiv
2407.08551), whose head it is. A patch of r frames has one latent of F * r dimensions.
"""

import itertools
import math

import torch
from torch import nn

from .configuration_mel_llm import MelLLMConfig
from .speller_mel_llm import MelLLMSpeller, spelling_loss


_LOG_VARIANCE_RANGE = (-12.0, 4.0)  # keeps exp() finite at the beginning of training (ours)


def masked_frame_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over bins, mean over the frames in `mask`: `(B, T, F)` and `(B, T)` to `()`.

    The published balance of the terms is that of sums; a mean over bins would need another weight of the stop term.
    """
    return (values.sum(-1) * mask).sum() / mask.sum().clamp(min=1)


def reconstruction_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`|y - y'|_1 + |y - y'|_2^2` (MELLE's L_reg, for one of its two outputs)."""
    difference = prediction - target
    return masked_frame_mean(difference.abs() + difference.square(), mask)


def kl_loss(
    mean: torch.Tensor, log_variance: torch.Tensor, target: torch.Tensor | None, mask: torch.Tensor
) -> torch.Tensor:
    """KL of N(mean, variance) to N(target, I) (MELLE), or to N(0, I) where `target` is None."""
    shift = mean if target is None else mean - target
    return masked_frame_mean(0.5 * (log_variance.exp() + shift.square() - 1.0 - log_variance), mask)


def flux_loss(mean: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, clipped: bool) -> torch.Tensor:
    """Spectrogram flux: `-|mean_t - y_{t-1}|_1`, which rewards change from the frame before (MELLE).

    Only the KL term resists it, and the residual MLP can undo any shift of the mean, so at the published weights the
    mean runs away from the mel. `clipped` limits the reward to the change that there really is, `|y_t - y_{t-1}|`
    (ours). The first frame of a clip has none before it.
    """
    change = (mean[:, 1:] - target[:, :-1]).abs()
    if clipped:
        change = torch.minimum(change, (target[:, 1:] - target[:, :-1]).abs())
    return -masked_frame_mean(change, mask[:, 1:])


def optimal_sigma_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood under a Gaussian whose one deviation is the best for the batch (Rybkin et al., 2021).

    `log sigma` is kept above -6 by a soft clip, as in their code. Its place in Mel-LLM is not known; off by default.
    """
    squares = (prediction - target).square() * mask[..., None]
    count = (mask.sum() * target.shape[-1]).clamp(min=1)
    log_sigma = 0.5 * (squares.sum() / count).clamp(min=1e-12).log()
    log_sigma = -6.0 + nn.functional.softplus(log_sigma + 6.0)
    likelihood = squares / (2 * (2 * log_sigma).exp()) + (log_sigma + 0.5 * math.log(2 * math.pi)) * mask[..., None]
    return masked_frame_mean(likelihood, mask)


def delta_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, lags: int) -> torch.Tensor:
    """L1 + L2 of the differences between neighbouring bins and between frames 1 to `lags` apart (SPECTRON: L_f + L_t).

    Differences of two frames count where the later one is valid; each term is a mean over those, as the frames' own is
    (the paper's reduction is not known).
    """
    error = prediction - target
    steps = error[..., 1:] - error[..., :-1]
    total = masked_frame_mean(steps.abs() + steps.square(), mask)
    for lag in range(1, min(lags, error.shape[1] - 1) + 1):
        steps = error[:, lag:] - error[:, :-lag]
        total = total + masked_frame_mean(steps.abs() + steps.square(), mask[:, lag:])
    return total


def stop_loss(logits: torch.Tensor, num_patches: torch.Tensor, positive_weight: float) -> torch.Tensor:
    """Binary cross-entropy of "stop" at the state behind the last patch against all before it, mean over the states.

    `logits` `(B, M + 1)`; `num_patches` `(B,)`.
    """
    places = torch.arange(logits.shape[1], device=logits.device)
    target = (places == num_patches[:, None]).to(logits.dtype)
    mask = places <= num_patches[:, None]
    weight = torch.tensor(positive_weight, dtype=logits.dtype, device=logits.device)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    return (loss * mask).sum() / mask.sum()


class MelLLMPostNet(nn.Module):
    """Convolutions over time that correct a spectrogram: `y'' = y' + PostNet(y')` (MELLE).

    Tanh between the layers. Normalisation is per frame, over channels, so that neither a batch's padding nor what is
    still to come changes a frame that lies far enough behind (ours; batch normalisation is usual).
    """

    def __init__(self, num_bins: int, num_layers: int, channels: int, kernel_size: int):
        super().__init__()
        sizes = [num_bins, *[channels] * (num_layers - 1), num_bins]
        self.convs = nn.ModuleList(
            nn.Conv1d(before, after, kernel_size, padding=kernel_size // 2)
            for before, after in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(max(0, num_layers - 1)))
        # Frames on either side that a frame depends on
        self.context = num_layers * (kernel_size // 2)

    def forward(self, frames: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, T, F)`, with a boolean `mask` `(B, T)` of valid frames, to `(B, T, F)`."""
        hidden_states = frames
        for index, conv in enumerate(self.convs):
            if mask is not None:  # beyond the end is zero at every layer, as beyond the tensor
                hidden_states = hidden_states * mask[..., None].to(hidden_states.dtype)
            hidden_states = conv(hidden_states.transpose(1, 2)).transpose(1, 2)
            if index < len(self.norms):
                hidden_states = torch.tanh(self.norms[index](hidden_states))
        return frames + hidden_states


class MelLLMSpeechPrenet(nn.Module):
    """Patches to the width of the language model by an MLP with dropout (MELLE), where the history does not share the
    reading side's stem."""

    def __init__(self, patch_size: int, hidden_size: int, output_size: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(patch_size, hidden_size), nn.Linear(hidden_size, hidden_size)])
        self.out = nn.Linear(hidden_size, output_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, M, r * F)` to `(B, M, D)`."""
        for layer in self.layers:
            patches = torch.relu(layer(patches))
        return self.out(patches)


class MelLLMSpeechHead(nn.Module):
    """The head of the language model that writes mel patches; `config.speech_config` says which.

    * `"vae"` (Mel-LLM): mean and log-variance, a sample of it, residual MLP.
    * `"sigma_vae"`: the same with the optimal-sigma likelihood in the place of L1 + L2, prior N(0, I).
    * `"deterministic"` (SPECTRON): the mean alone, without KL and flux.
    """

    def __init__(self, config: MelLLMConfig):
        super().__init__()
        speech, width = config.speech_config, config.text_config.hidden_size
        self.config = speech
        self.num_mel_bins = config.audio_config.num_mel_bins
        self.reduction_factor = config.speech_reduction_factor
        patch_size = self.reduction_factor * self.num_mel_bins
        self.is_random = speech.head_type != "deterministic"
        # What the first patch is predicted from; a vector of the head and not a token, so that no vocabulary changes
        self.begin = nn.Parameter(torch.empty(width))
        self.prenet = None
        if not speech.share_embed:
            self.prenet = MelLLMSpeechPrenet(patch_size, speech.prenet_hidden_size, width)
        self.latent = nn.Linear(width, 2 * patch_size if self.is_random else patch_size)
        self.residual = nn.Sequential(
            nn.Linear(patch_size, speech.head_hidden_size),
            nn.Tanh(),
            nn.Linear(speech.head_hidden_size, speech.head_hidden_size),
            nn.Tanh(),
            nn.Linear(speech.head_hidden_size, patch_size),
        )
        self.stop = nn.Linear(width, 1)
        self.postnet = None
        if speech.postnet_layers:
            self.postnet = MelLLMPostNet(
                self.num_mel_bins, speech.postnet_layers, speech.postnet_channels, speech.postnet_kernel_size
            )
        self.speller = MelLLMSpeller(width, speech.ctc_rate) if speech.ctc_weight > 0 else None
        # Training steps so far, for the warm-up of the KL term; kept in the checkpoint, so a resumed run goes on
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        # Forward passes stand for them unless somebody who knows better counts, as SpeechTrainer does
        self.counts_passes, self.num_passes = True, 0

    @property
    def context(self) -> int:
        """Frames on either side that a frame of [`refine`] depends on."""
        return 0 if self.postnet is None else self.postnet.context

    def refine(self, frames: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Post-net, if there is one: `(B, T, F)` to the same."""
        return frames if self.postnet is None else self.postnet(frames, mask)

    def distribution(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(..., D)` to mean and log-variance of the latent, `(..., r * F)`; None where nothing is random."""
        if not self.is_random:
            return self.latent(hidden_states), None
        mean, log_variance = self.latent(hidden_states).float().chunk(2, dim=-1)
        return mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """`y' = z + MLP(z)`, `(..., r * F)`."""
        latent = latent.to(self.residual[0].weight.dtype)
        return latent + self.residual(latent)

    def sample(
        self, hidden_states: torch.Tensor, noise: torch.Tensor | None = None, temperature: float = 1.0
    ) -> torch.Tensor:
        """`(B, D)` to patches `(B, r, F)`.

        Args:
            noise (`torch.Tensor` of shape `(B, r * F)`, *optional*): Standard normal; the mean is taken without.
            temperature (`float`, defaults to 1.0): Scales the variance; 1 is faithful, 0 is the mean.
        """
        if self.is_random and noise is not None and temperature > 0:
            mean, log_variance = self.distribution(hidden_states)
            mean = mean + math.sqrt(temperature) * (0.5 * log_variance).exp() * noise.to(mean.dtype)
        else:  # the mean's half of the layer is all that is needed
            size = self.reduction_factor * self.num_mel_bins
            mean = nn.functional.linear(hidden_states, self.latent.weight[:size], self.latent.bias[:size])
        return self.decode(mean).unflatten(-1, (self.reduction_factor, self.num_mel_bins))

    def loss(
        self,
        hidden_states: torch.Tensor,
        target: torch.Tensor,
        lengths: torch.Tensor,
        letters: torch.Tensor | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """All terms of the objective, weighted, and the spectrogram that they were computed of.

        Args:
            hidden_states: `(B, M + 1, D)`: state t predicts patch t, and the last one of a clip its end.
            target: `(B, T, F)` with T at most M * r.
            lengths: `(B,)`, frames.
            letters: `(B, letters)`, bytes of the text padded with -100, for the CTC term; left out without them.

        Returns:
            A dict of scalars that add up to the loss, with their sum under `"loss"` and, for the log alone,
            `"mean_error"`, the distance of the latent's mean from the mel (see [`flux_loss`]); and `y''`,
            `(B, M * r, F)`.
        """
        config, r = self.config, self.reduction_factor
        num_patches = (lengths + r - 1) // r
        size = (hidden_states.shape[1] - 1) * r
        target = nn.functional.pad(target, (0, 0, 0, size - target.shape[1])).float()
        mask = torch.arange(size, device=target.device) < lengths[:, None]

        mean, log_variance = self.distribution(hidden_states[:, :-1])
        latent = mean
        if log_variance is not None and self.training:
            latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        before = self._frames(self.decode(latent)).float()
        after = self.refine(before.to(hidden_states.dtype), mask).float()
        mean = self._frames(mean).float()

        terms: dict[str, torch.Tensor] = {}
        reconstruct = optimal_sigma_loss if config.head_type == "sigma_vae" else reconstruction_loss
        terms["before"] = reconstruct(before, target, mask)
        if self.postnet is not None:
            terms["after"] = reconstruct(after, target, mask)
        if log_variance is not None:
            standard = config.kl_prior == "standard" or config.head_type == "sigma_vae"
            kl = kl_loss(mean, self._frames(log_variance), None if standard else target, mask)
            terms["kl"] = self._kl_weight() * kl
            if config.flux_weight:
                terms["flux"] = config.flux_weight * flux_loss(mean, target, mask, config.flux_type == "clipped")
        if config.delta_weight:
            terms["delta"] = config.delta_weight * delta_loss(after, target, mask, config.delta_lags)
        logits = self.stop(hidden_states)[..., 0].float()
        terms["stop"] = config.stop_weight * stop_loss(logits, num_patches, config.stop_positive_weight)
        # Sums over bins are large beside a cross-entropy; this brings them to its size, whatever the number of bins
        terms = {name: config.loss_scale * term for name, term in terms.items()}
        if self.speller is not None and letters is not None:
            # A state that is to say which letters come has to find its place in the text. Of the size already
            log_probs = self.speller(hidden_states[:, :-1]).float().log_softmax(-1)
            losses = spelling_loss(log_probs, num_patches * config.ctc_rate, letters.to(log_probs.device))
            terms["ctc"] = config.ctc_weight * losses.mean()
        terms["loss"] = torch.stack(list(terms.values())).sum()
        terms["mean_error"] = masked_frame_mean((mean - target).abs(), mask).detach() / target.shape[-1]
        if self.training and torch.is_grad_enabled():
            self.num_passes += 1
            if self.counts_passes:
                self.num_updates += 1
        return terms, after

    def _frames(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, M, r * F)` to `(B, M * r, F)`."""
        return patches.unflatten(-1, (self.reduction_factor, self.num_mel_bins)).flatten(1, 2)

    def _kl_weight(self) -> float | torch.Tensor:
        if self.config.head_type == "sigma_vae":
            return 1.0  # both terms are log-likelihoods, so their balance is given
        warm = self.num_updates >= self.config.kl_warmup_steps
        return self.config.kl_weight * warm.to(torch.float32)


__all__ = [
    "MelLLMPostNet",
    "MelLLMSpeechHead",
    "MelLLMSpeechPrenet",
    "delta_loss",
    "flux_loss",
    "kl_loss",
    "masked_frame_mean",
    "optimal_sigma_loss",
    "reconstruction_loss",
    "stop_loss",
]
