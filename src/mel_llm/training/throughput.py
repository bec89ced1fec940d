"""How fast a run trains and how much memory it takes, for its summary. Ours."""

import sys
import time
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback


class ThroughputMeter(TrainerCallback):
    r"""Seconds of audio trained per second, over all steps but the first, which warms up.

    Loading data is part of it; evaluating and saving are not. Nothing waits for the device until the result is asked for.

    Args:
        frame_rate (`float`): Mel frames per second.
    """

    def __init__(self, frame_rate: float):
        self.frame_rate = frame_rate
        self.steps, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.frames: torch.Tensor | int = 0
        self.pending: torch.Tensor | int = 0  # of the step that is under way
        self.mark: tuple[float, float] | None = None  # the clock, and CPU time of this process

    def add(self, inputs: dict[str, Any]) -> None:
        """Counts a batch that is trained on, to read, to speak or to go on with."""
        labels = inputs.get("labels")
        if labels is not None and labels.is_floating_point():
            self.pending = self.pending + (labels[..., 0] != -100).sum()
            return
        if "spectrogram_labels" in inputs:  # beside what is heard
            self.pending = self.pending + (inputs["spectrogram_labels"][..., 0] != -100).sum()
        features = inputs.get("input_features")
        mask = inputs.get("input_features_mask")
        if mask is None and "input_ids" not in inputs:
            mask = inputs.get("attention_mask")
        if mask is not None:
            self.pending = self.pending + mask.sum()
        elif features is not None:
            self.pending = self.pending + features.shape[0] * features.shape[1]

    def on_step_end(self, args, state, control, **kwargs):
        now = (time.perf_counter(), time.process_time())
        if self.mark is not None:
            self.steps += 1
            self.seconds += now[0] - self.mark[0]
            self.cpu_seconds += now[1] - self.mark[1]
            self.frames = self.frames + self.pending
        self.mark, self.pending = now, 0

    def _restart(self, *args, **kwargs):
        if self.mark is not None:
            self.mark = (time.perf_counter(), time.process_time())

    on_evaluate = on_save = _restart

    def result(self, world_size: int = 1) -> dict[str, Any]:
        """`audio_seconds_per_second`, of all processes together (`None` after a single step), and per second of CPU time, which
        on a busy machine says more of training on the CPU and nothing of training on a GPU; the `steps` that they were measured
        over; and peaks in bytes, the greatest of any process: `peak_memory` of the process, libraries and all (`None` where
        the system does not tell), and `peak_gpu_memory`, allocated by torch. All processes must ask."""
        audio_seconds = float(self.frames) / self.frame_rate
        speed = audio_seconds / self.seconds if self.seconds else None
        cpu_speed = audio_seconds / self.cpu_seconds if self.cpu_seconds else None  # of this process; they are alike
        on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0  # and not --use_cpu
        mine = (speed, peak_memory(), torch.cuda.max_memory_allocated() if on_gpu else None)
        parts = gather_object([mine]) if world_size > 1 else [mine]
        speeds, memory, gpu = ([value for value in values if value is not None] for values in zip(*parts, strict=True))
        return {
            "audio_seconds_per_second": round(sum(speeds), 3) if speeds else None,
            "audio_seconds_per_cpu_second": round(cpu_speed, 3) if cpu_speed else None,
            "steps": self.steps,
            "peak_memory": max(memory, default=None),
            "peak_gpu_memory": max(gpu, default=None),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "processes": world_size,
        }


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


__all__ = ["ThroughputMeter", "peak_memory"]
