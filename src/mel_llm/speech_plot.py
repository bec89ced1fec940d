"""A picture of speech, mel above waveform, in memory that does not grow with its length. Everything here is ours."""

import math
import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

from .cli_common import give_usual_rights


_MAX_COLUMNS = 2000  # even, and more than a picture has pixels


class SpeechPlot:
    """Collects sentences and draws them.

    Each column of the picture keeps the mean of some mel frames and the extremes of their samples. When there are too
    many columns, neighbours are merged.

    Args:
        extractor ([`MelLLMFeatureExtractor`]): Makes such frames.
    """

    def __init__(self, extractor):
        self.extractor = extractor
        self.floor = math.log(extractor.mel_floor) / (math.log(10.0) if extractor.log == "log10" else 1.0)
        self.frames_per_column = 1
        self.mel = np.zeros((0, extractor.num_mel_bins), np.float32)  # (columns, bins)
        self.envelope = np.zeros((0, 2), np.float32)  # (columns, lowest and highest sample)
        self.held_mel, self.held_samples = self.mel, np.zeros(0, np.float32)  # not a whole column yet

    def add(self, spectrogram: torch.Tensor, audio: torch.Tensor, pause_seconds: float = 0.0) -> None:
        """A sentence: its log-mel frames `(frames, num_mel_bins)` and waveform `(samples,)`, and a pause behind it."""
        hop = self.extractor.hop_length
        mel = spectrogram.float().numpy()
        pause = round(pause_seconds * self.extractor.sampling_rate / hop)
        mel = np.concatenate([mel, np.full((pause, mel.shape[1]), self.floor, np.float32)])
        samples = audio.float().numpy()[: len(mel) * hop]
        samples = np.pad(samples, (0, len(mel) * hop - len(samples)))
        mel, samples = np.concatenate([self.held_mel, mel]), np.concatenate([self.held_samples, samples])
        while len(mel) >= self.frames_per_column:
            columns = min(len(mel) // self.frames_per_column, _MAX_COLUMNS - len(self.mel))
            frames = columns * self.frames_per_column
            means = mel[:frames].reshape(columns, -1, mel.shape[1]).mean(1)
            blocks = samples[: frames * hop].reshape(columns, -1)
            self.mel = np.concatenate([self.mel, means])
            self.envelope = np.concatenate([self.envelope, np.stack([blocks.min(1), blocks.max(1)], axis=1)])
            mel, samples = mel[frames:], samples[frames * hop :]
            if len(self.mel) == _MAX_COLUMNS:
                self.mel = self.mel.reshape(-1, 2, self.mel.shape[1]).mean(1)
                pairs = self.envelope.reshape(-1, 2, 2)
                self.envelope = np.stack([pairs[..., 0].min(1), pairs[..., 1].max(1)], axis=1)
                self.frames_per_column *= 2
        self.held_mel, self.held_samples = mel, samples

    @property
    def seconds(self) -> float:
        """The time that the columns span."""
        return len(self.mel) * self.frames_per_column * self.extractor.hop_length / self.extractor.sampling_rate

    def save(self, path: str | os.PathLike, marks: Sequence[float] = (), title: str | None = None) -> None:
        """Draws the PNG, which appears whole or not at all; with lines at `marks`, in seconds, and a title.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: There is nothing to draw.
        """
        try:
            from matplotlib.figure import Figure  # without pyplot: no window, and nothing stays in memory
        except ImportError as error:
            raise ImportError("A plot needs matplotlib: `pip install matplotlib`.") from error
        if len(self.mel) == 0:
            raise ValueError("There is nothing to draw.")
        figure = Figure(figsize=(10, 5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        extent = (0.0, self.seconds, 0, self.mel.shape[1])
        image = upper.imshow(self.mel.T, origin="lower", aspect="auto", extent=extent)
        upper.set(ylabel="mel bin")
        for seconds in marks:
            upper.axvline(seconds, color="white", linewidth=1.5)
            lower.axvline(seconds, color="black", linewidth=1.0)
        if title:
            upper.set_title(title, fontsize=9, loc="left", wrap=True, parse_math=False)
        figure.colorbar(image, ax=upper, label=f"{self.extractor.log} of the mel spectrum")
        times = (np.arange(len(self.envelope)) + 0.5) * self.seconds / len(self.envelope)
        lower.fill_between(times, self.envelope[:, 0], self.envelope[:, 1], linewidth=0.5, edgecolor="C0")
        lower.set(xlabel="time (s)", ylabel="waveform", xlim=(0.0, self.seconds), ylim=(-1.05, 1.05))
        folder, name = os.path.split(os.path.abspath(path))
        handle, partial = tempfile.mkstemp(suffix=os.path.splitext(name)[1], prefix=".partial-", dir=folder)
        os.close(handle)
        try:
            figure.savefig(partial, dpi=100)
            give_usual_rights(partial)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


__all__ = ["SpeechPlot"]
