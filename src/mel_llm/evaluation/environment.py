"""Where and with what a figure was measured."""

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers


def describe_environment(device: str = "cpu") -> dict:
    """Command, date, versions and hardware, for a results file."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    import mel_llm

    versions = {
        "mel_llm": mel_llm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("numpy", "jiwer", "whisper-normalizer", "resemblyzer", "speechmos", "onnxruntime"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
    }


def heading_of(environment: dict, intervals: str, seed: int | None = None) -> list[str]:
    """The paragraphs above a table of results: the command; and date, hardware and versions, with what is in brackets."""
    threads, versions = environment["threads"], environment["versions"]
    return [
        f"`{environment['command']}`",
        f"{environment['date']}, {environment['cpu']}, {threads} thread{'s' if threads != 1 else ''}, "
        f"{environment['gpu'] or 'no GPU'}{'' if seed is None else f', seed {seed}'}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}. In brackets: {intervals}.",
    ]


__all__ = ["describe_environment", "heading_of"]
