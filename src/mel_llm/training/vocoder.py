"""Training of a neural vocoder: segments of speech, losses, discriminators, and a loop that can be interrupted.

Stated by papers: the multi-resolution spectral loss (Parallel WaveGAN, arXiv 1910.11480), mel L1 weighted 45, feature
matching weighted 2 and the multi-period discriminator (HiFi-GAN, arXiv 2010.05646), hinge losses and a multi-resolution
discriminator weighted less (Vocos, arXiv 2306.00814). Ours: the sizes, the steps without discriminators, and a batch that
is a function of the seed and the step alone, so that a resumed run needs nothing but weights and optimisers to repeat one
that was not interrupted.

Shapes use these letters: B batch, N samples, T mel frames, F mel bins.
"""

import csv
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers.utils import logging

from ..feature_extraction_mel_llm import MelLLMFeatureExtractor
from ..vocoder_mel_llm import MelLLMVocoder
from .dataset import SpeechDataset
from .trainer import last_checkpoint


logger = logging.get_logger(__name__)

_STATE, _LOG = "trainer_state.json", "losses.csv"
_COLUMNS = ("step", "loss", "spectral", "mel", "adversarial", "matching", "discriminator", "learning_rate", "eval_mel")


@dataclass
class VocoderTrainingArguments:
    """How a vocoder is trained."""

    output_dir: str = field(metadata={"help": "Checkpoints, the log and the trained vocoder go here."})
    max_steps: int = field(default=20_000, metadata={"help": "Steps in all."})
    batch_size: int = field(default=16, metadata={"help": "Segments in a batch."})
    segment_seconds: float = field(default=0.5, metadata={"help": "Length of a segment."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of AdamW, at first."})
    learning_rate_decay: float = field(default=0.97, metadata={"help": "What remains of it after 1000 steps."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Longer gradients are shortened to this."})
    mel_weight: float = field(default=45.0, metadata={"help": "Of the L1 between log-mels, in deviations per bin."})
    spectral_weight: float = field(default=10.0, metadata={"help": "Of the multi-resolution spectral loss."})
    matching_weight: float = field(default=2.0, metadata={"help": "Of the discriminators' feature matching."})
    adversarial_start: int = field(
        default=5000, metadata={"help": "Discriminators join at this step; at --max_steps or later, they never do."}
    )
    discriminator_channels: int = field(default=16, metadata={"help": "Channels of their first layers."})
    bf16: bool = field(default=False, metadata={"help": "Networks under autocast to bfloat16."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default a GPU if there is one."})
    seed: int = field(default=0, metadata={"help": "Of new weights and of the segments' places."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two rows of losses.csv."})
    eval_steps: int = field(default=500, metadata={"help": "Steps between two validations."})
    eval_clips: int = field(default=20, metadata={"help": "Validation clips, spread over the data."})
    save_steps: int = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})

    def __post_init__(self):
        positive = ("max_steps", "batch_size", "segment_seconds", "learning_rate", "learning_rate_decay")
        counts = ("discriminator_channels", "logging_steps", "eval_steps", "eval_clips", "save_steps")
        for name in (*positive, *counts, "max_grad_norm", "save_total_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be more than 0, got {getattr(self, name)}.")
        for name in ("mel_weight", "spectral_weight", "matching_weight", "adversarial_start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


# --- losses ---------------------------------------------------------------------------------------------------------


class SpectralLoss(nn.Module):
    """Spectral convergence plus L1 of log-magnitudes, averaged over resolutions (Parallel WaveGAN)."""

    def __init__(self, sizes: Sequence[int] = (256, 512, 1024, 2048)):
        super().__init__()
        self.sizes = tuple(sizes)

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Waveforms `(B, N)` to a scalar."""
        total = estimate.new_zeros(())
        for size in self.sizes:
            ours, theirs = magnitudes(estimate, size), magnitudes(target, size)
            # Over the batch and not row by row: a silent segment has no norm to divide by
            convergence = (theirs - ours).norm() / theirs.norm().clamp(min=1e-3)
            total = total + convergence + functional.l1_loss(ours.log(), theirs.log())
        return total / len(self.sizes)


def magnitudes(waveform: torch.Tensor, size: int) -> torch.Tensor:
    """STFT magnitudes `(B, size / 2 + 1, frames)` of `(B, N)`, never 0, so that their gradient exists."""
    window = torch.hann_window(size, device=waveform.device)
    spectrum = torch.stft(waveform, size, size // 4, window=window, return_complex=True, pad_mode="constant")
    return torch.view_as_real(spectrum).square().sum(-1).clamp(min=1e-7).sqrt()


class MelLoss(nn.Module):
    """L1 between log-mels as the vocoder's own feature extractor makes them, in deviations of each bin."""

    def __init__(self, extractor: MelLLMFeatureExtractor, std: torch.Tensor):
        super().__init__()
        self.extractor = extractor
        self.register_buffer("std", std)

    def forward(self, estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Waveforms `(B, N)` to a scalar."""
        with torch.no_grad():
            theirs = log_mel(target, self.extractor)
        return ((log_mel(estimate, self.extractor) - theirs) / self.std).abs().mean()


def log_mel(waveform: torch.Tensor, extractor: MelLLMFeatureExtractor) -> torch.Tensor:
    """Waveforms `(B, N)` to `(B, T, F)` as the feature extractor makes them, with gradients."""
    if extractor.edge_padding:
        waveform = functional.pad(waveform, (extractor.edge_padding, extractor.edge_padding), mode="reflect")
    return extractor._log_mel(functional.pad(waveform, (0, extractor.n_fft - extractor.win_length)))


# --- discriminators -------------------------------------------------------------------------------------------------


class _Discriminator(nn.Module):
    """Convolutions over an image of the waveform; gives the scores and what each layer made."""

    def __init__(self, in_channels: int, channels: int, kernel: tuple[int, int], stride: tuple[int, int]):
        super().__init__()
        widths = [in_channels, channels, 2 * channels, 4 * channels, 4 * channels]
        padding = (kernel[0] // 2, kernel[1] // 2)
        norm = nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(
            norm(nn.Conv2d(before, after, kernel, stride, padding)) for before, after in pairwise(widths)
        )
        self.score = norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0)))

    def image(self, waveform: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, waveform: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`(B, N)` to scores of any shape and the layers' outputs."""
        hidden_states, outputs = self.image(waveform), []
        for layer in self.layers:
            hidden_states = functional.leaky_relu(layer(hidden_states), 0.1)
            outputs.append(hidden_states)
        return self.score(hidden_states), outputs


class PeriodDiscriminator(_Discriminator):
    """The waveform in rows of `period` samples, looked at along time (HiFi-GAN)."""

    def __init__(self, period: int, channels: int):
        super().__init__(1, channels, (5, 1), (3, 1))
        self.period = period

    def image(self, waveform: torch.Tensor) -> torch.Tensor:
        waveform = functional.pad(waveform, (0, -waveform.shape[1] % self.period))
        return waveform.unflatten(1, (-1, self.period)).unsqueeze(1)


class ResolutionDiscriminator(_Discriminator):
    """The log-magnitudes of one STFT (the idea of UnivNet and Vocos)."""

    def __init__(self, size: int, channels: int):
        super().__init__(1, channels, (3, 5), (1, 2))
        self.size = size

    def image(self, waveform: torch.Tensor) -> torch.Tensor:
        return magnitudes(waveform, self.size).log().transpose(1, 2).unsqueeze(1)


class Discriminators(nn.ModuleList):
    """Five by period and three by resolution, the latter with a tenth of the weight (Vocos)."""

    def __init__(self, channels: int = 16):
        super().__init__(PeriodDiscriminator(period, channels) for period in (2, 3, 5, 7, 11))
        self.extend(ResolutionDiscriminator(size, channels) for size in (512, 1024, 2048))
        self.weights = [1.0] * 5 + [0.1] * 3

    def loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """What the discriminators learn from: hinge."""
        terms = []
        for discriminator, weight in zip(self, self.weights, strict=True):
            right, wrong = discriminator(real)[0].float(), discriminator(fake)[0].float()
            terms.append(weight * (functional.relu(1 - right).mean() + functional.relu(1 + wrong).mean()))
        return sum(terms) / sum(self.weights)

    def generator_loss(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the generator learns from: hinge, and the L1 between what the layers make of real and fake."""
        adversarial, matching = [], []
        for discriminator, weight in zip(self, self.weights, strict=True):
            with torch.no_grad():
                _, wanted = discriminator(real)
            score, made = discriminator(fake)
            adversarial.append(weight * functional.relu(1 - score.float()).mean())
            distances = [
                functional.l1_loss(ours.float(), theirs.float()) for ours, theirs in zip(made, wanted, strict=True)
            ]
            matching.append(weight * sum(distances) / len(distances))
        return sum(adversarial) / sum(self.weights), sum(matching) / sum(self.weights)


# --- data -----------------------------------------------------------------------------------------------------------


class SegmentSampler:
    """Batches of segments, each a function of the seed and the step.

    Clips are drawn with a chance in proportion to their length, so that every second is as likely as any other; of
    several sources, as their weights say. Clips shorter than a segment are followed by silence.
    """

    def __init__(self, clips: SpeechDataset, chances: torch.Tensor, num_samples: int, seed: int):
        self.clips, self.chances = clips, chances
        self.num_samples, self.seed = num_samples, seed

    def batch(self, step: int, size: int) -> torch.Tensor:
        """`(size, num_samples)`."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        places = torch.multinomial(self.chances, size, replacement=True, generator=generator)
        return torch.stack([self._segment(int(place), generator) for place in places])

    def _segment(self, place: int, generator: torch.Generator) -> torch.Tensor:
        audio = torch.from_numpy(self.clips[place]["audio"])
        # Drawn for short clips too, so that the draws that follow stay the same
        where = torch.rand((), generator=generator).item()
        start = int(where * max(0, len(audio) - self.num_samples + 1))
        segment = audio[start : start + self.num_samples]
        return functional.pad(segment, (0, self.num_samples - len(segment)))


# --- the loop -------------------------------------------------------------------------------------------------------


class VocoderTrainer:
    r"""Trains the generator of a [`MelLLMVocoder`].

    Args:
        vocoder: `"istft"` or `"hifigan"`.
        arguments: How.
        train: Where its segments come from.
        evaluation ([`SpeechDataset`], *optional*): Held-out clips.
        std (`torch.Tensor` of shape `(F,)`): Deviation of each mel bin, the unit of the mel loss.
        fingerprint (`dict`, *optional*): What a resumed run must have in common with its checkpoint beside the arguments
            that decide about the course of the training.
    """

    # Arguments that may change when a run goes on
    _FREE = ("output_dir", "max_steps", "device", "logging_steps", "eval_steps", "eval_clips", "save_steps")

    def __init__(
        self,
        vocoder: MelLLMVocoder,
        arguments: VocoderTrainingArguments,
        train: SegmentSampler,
        evaluation: SpeechDataset | None,
        std: torch.Tensor,
        fingerprint: dict | None = None,
    ):
        if vocoder.generator is None:
            raise ValueError("Griffin-Lim has nothing to train.")
        self.arguments = arguments
        self.device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.vocoder = vocoder.to(self.device)
        self.train_data, self.evaluation = train, evaluation
        self.fingerprint = {**self._course(), **(fingerprint or {})}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            self.discriminators = Discriminators(arguments.discriminator_channels).to(self.device)
        self.spectral = SpectralLoss().to(self.device)
        self.mel = MelLoss(vocoder.extractor, std).to(self.device)
        options = {"lr": arguments.learning_rate, "betas": (0.8, 0.99), "weight_decay": 0.01}
        self.optimizers = {
            "generator": torch.optim.AdamW(vocoder.generator.parameters(), **options),
            "discriminators": torch.optim.AdamW(self.discriminators.parameters(), **options),
        }
        self.step = 0
        self.num_skipped = 0  # steps whose gradients were not finite
        self.metrics: dict[str, float] = {}
        self.folder = Path(arguments.output_dir)

    def _course(self) -> dict:
        course = {key: value for key, value in asdict(self.arguments).items() if key not in self._FREE}
        course.pop("save_total_limit")
        return course

    # --- training ---

    def resume(self) -> None:
        """Goes back to the last complete checkpoint in the output folder, if there is one.

        Raises:
            ValueError: It is of a run with other arguments.
        """
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is not None:
            self.load(Path(checkpoint))
            logger.info(f"Going on from {checkpoint}.")

    def train(self) -> None:
        """From where it is, after [`resume`] perhaps, to the last step."""
        arguments = self.arguments
        self.folder.mkdir(parents=True, exist_ok=True)
        self._cut_log()
        self.vocoder.train()
        while self.step < arguments.max_steps:
            losses = self.train_step()
            last = self.step == arguments.max_steps
            evaluated = self.evaluation is not None and (last or self.step % arguments.eval_steps == 0)
            if evaluated:
                losses["eval_mel"] = self.metrics["eval_mel"] = self.evaluate()
            if evaluated or last or self.step % arguments.logging_steps == 0:
                self._log(losses)
            if last or self.step % arguments.save_steps == 0:
                self.save()

    def train_step(self) -> dict[str, float]:
        """One update of the generator and, once they have joined, of the discriminators."""
        arguments = self.arguments
        rate = arguments.learning_rate * arguments.learning_rate_decay ** (self.step / 1000)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.no_grad():
            real = self.train_data.batch(self.step, arguments.batch_size).to(self.device)
            spectrogram = log_mel(real, self.vocoder.extractor)
        with self._autocast():
            fake = self.vocoder.generator(spectrogram)
        size = min(real.shape[1], fake.shape[1])
        real, fake = real[:, :size], fake.float()[:, :size]
        losses = {"learning_rate": rate}
        adversarial = self.step >= arguments.adversarial_start
        if adversarial:
            with self._autocast():
                loss = self.discriminators.loss(real, fake.detach())
            self._update("discriminators", self.discriminators, loss)
            losses["discriminator"] = loss.item()
        terms = {"spectral": self.spectral(fake, real), "mel": self.mel(fake, real)}
        loss = arguments.spectral_weight * terms["spectral"] + arguments.mel_weight * terms["mel"]
        if adversarial:
            self.discriminators.requires_grad_(False)  # the generator's turn: nothing is spent on their gradients
            with self._autocast():
                terms["adversarial"], terms["matching"] = self.discriminators.generator_loss(real, fake)
            self.discriminators.requires_grad_(True)
            loss = loss + terms["adversarial"] + arguments.matching_weight * terms["matching"]
        self._update("generator", self.vocoder.generator, loss)
        self.step += 1
        losses.update({name: term.item() for name, term in terms.items()}, loss=loss.item())
        return losses

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16)

    def _update(self, name: str, module: nn.Module, loss: torch.Tensor) -> None:
        module.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.arguments.max_grad_norm)
        # The gradient of a magnitude does not exist where a made segment is silent to the last bit
        if torch.isfinite(norm):
            self.optimizers[name].step()
        else:
            self.num_skipped += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """The round trip's error on held-out clips: mean L1 between log-mels, in the feature extractor's units."""
        self.vocoder.eval()
        count = min(self.arguments.eval_clips, len(self.evaluation))
        places = [index * len(self.evaluation) // count for index in range(count)]
        errors = [round_trip_error(self.vocoder, self.evaluation[place]["audio"]) for place in places]
        self.vocoder.train()
        return sum(errors) / len(errors)

    # --- the log ---

    def _log(self, losses: dict[str, float]) -> None:
        path, is_new = self.folder / _LOG, not (self.folder / _LOG).exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow({"step": self.step, **{key: f"{value:.8g}" for key, value in losses.items()}})
        shown = "  ".join(f"{key} {losses[key]:.4g}" for key in _COLUMNS if key in losses and key != "learning_rate")
        logger.info(f"step {self.step}: {shown}")

    def _cut_log(self) -> None:
        """Rows of steps that the checkpoint does not have yet will be written again."""
        path = self.folder / _LOG
        if not path.exists():
            return
        with open(path, newline="", encoding="utf-8") as file:
            # An interrupted write may have left part of a row
            rows = [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]
        partial = path.with_suffix(".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= self.step)
        os.replace(partial, path)

    # --- checkpoints ---

    def save(self) -> None:
        """Writes a checkpoint; it has its name when it is complete."""
        final = self.folder / f"checkpoint-{self.step}"
        partial = self.folder / ".saving"
        shutil.rmtree(partial, ignore_errors=True)
        self.vocoder.save_pretrained(partial)
        tensors = {f"discriminators.{name}": value for name, value in self.discriminators.state_dict().items()}
        for kind, optimizer in self.optimizers.items():
            for index, entries in optimizer.state_dict()["state"].items():
                tensors.update({f"{kind}_optimizer.{index}.{name}": value for name, value in entries.items()})
        save_file(
            {name: value.contiguous().cpu() for name, value in tensors.items()}, partial / "training.safetensors"
        )
        state = {
            "global_step": self.step,
            "num_skipped": self.num_skipped,
            "metrics": self.metrics,
            "fingerprint": self.fingerprint,
        }
        (partial / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        steps = sorted(int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*") if _is_step(path))
        for step in steps[: -self.arguments.save_total_limit]:
            shutil.rmtree(self.folder / f"checkpoint-{step}")

    def load(self, checkpoint: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            ValueError: It is of a run with other arguments.
        """
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        before = state.get("fingerprint", {})
        for name, value in json.loads(json.dumps(self.fingerprint)).items():
            if before.get(name) != value:
                raise ValueError(
                    f"{checkpoint} is of a run with `{name}` {before.get(name)!r}, not {value!r}. Go on in its way, or "
                    "choose another output folder."
                )
        self.vocoder.load_state_dict(MelLLMVocoder.from_pretrained(checkpoint).state_dict())
        tensors = load_file(checkpoint / "training.safetensors")
        weights, entries = {}, {kind: {} for kind in self.optimizers}
        for name, value in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "discriminators":
                weights[rest] = value
            else:
                index, entry = rest.split(".")
                entries[kind.removesuffix("_optimizer")].setdefault(int(index), {})[entry] = value
        self.discriminators.load_state_dict(weights)
        for kind, optimizer in self.optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries[kind]})
        self.step, self.num_skipped = state["global_step"], state["num_skipped"]
        self.metrics = state["metrics"]


def _is_step(path: Path) -> bool:
    return path.name.removeprefix("checkpoint-").isdigit()


@torch.no_grad()
def round_trip_error(vocoder: MelLLMVocoder, audio) -> float:
    """Mean L1 between the log-mels of a clip `(N,)` and of what the vocoder makes of them, in the features' units."""
    extractor = vocoder.extractor

    def features(samples) -> torch.Tensor:
        return extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]

    spectrogram = features(audio)
    again = features(vocoder(spectrogram.to(vocoder.device))[0].cpu())
    size = min(spectrogram.shape[1], again.shape[1])
    return (spectrogram[:, :size] - again[:, :size]).abs().mean().item()


__all__ = [
    "Discriminators",
    "MelLoss",
    "SegmentSampler",
    "SpectralLoss",
    "VocoderTrainer",
    "VocoderTrainingArguments",
    "log_mel",
    "round_trip_error",
]
