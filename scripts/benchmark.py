"""Compares speed and memory with peers from transformers, on the same audio and in the same run.

    python scripts/benchmark.py                                     # everything; writes docs/benchmarks.{json,md}
    python scripts/benchmark.py --only features --output-dir /tmp   # one section, somewhere else

Every case is run in turn with its peers, round after round, and compared with them in the same round only: on a machine
that does other things besides, ratios hold and times do not. No network and no trained weights are needed; speed does
not depend on what the weights are, because the number of tokens to write is given.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessor,
    Phi4MultimodalFeatureExtractor,
    WhisperFeatureExtractor,
    set_seed,
)
from transformers.utils import logging

from mel_llm import MelLLMFeatureExtractor, load_audio
from mel_llm.conversion import from_text_llm
from mel_llm.training import compute_feature_statistics, train_tokenizer


ROOT = Path(__file__).resolve().parents[1]
RATE = 16000

# Backbones by their shape, all of them Llamas, and the stem that is put before each: in the paper a light one
# of 1024 channels stands before 3.8 billion parameters, and before a backbone a hundred times smaller it would not be
# light. What the paper's stem costs is measured besides.
SIZES = {
    "tiny": {
        "text": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
        "kv_heads": 2,
        "vocab_size": 512,
        "audio": {"conv_channels": 8, "hidden_size": 32},
    },
    "small": {  # SmolLM2-135M with 12 of its 30 layers
        "text": {"num_hidden_layers": 12, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9},
        "kv_heads": 3,
        "vocab_size": 49152,
        "audio": {"conv_channels": 128, "hidden_size": 576},
    },
    "135m": {  # SmolLM2-135M
        "text": {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9},
        "kv_heads": 3,
        "vocab_size": 49152,
        "audio": {"conv_channels": 128, "hidden_size": 576},
    },
    "1b": {  # Llama-3.2-1B
        "text": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
        "kv_heads": 8,
        "vocab_size": 128256,
        "audio": {},
    },
}

EXTRACTORS = {
    "mel_llm": "MelLLMFeatureExtractor",
    "phi4": "Phi4MultimodalFeatureExtractor",
    "whisper_30s": 'WhisperFeatureExtractor, padding="max_length" (its default, 30 s)',
    "whisper_longest": 'WhisperFeatureExtractor, padding="longest"',
}


@dataclass
class Plan:
    """What to measure, and how much of it."""

    device: str
    dtype: torch.dtype
    threads: int
    rounds: int
    size: str
    seed: int
    feature_rounds: int
    feature_clips: tuple[int, ...] = (1, 32)
    audio_seconds: float = 10.0
    batch_sizes: tuple[int, ...] = (1, 8)
    training_batch_size: int = 4
    throughput_batch_sizes: tuple[int, ...] = (1, 16, 128)
    new_tokens: int = 64
    paper_stem: bool = True
    memory_cases: tuple[str, ...] | None = None  # of MEMORY_CASES; None: all

    @classmethod
    def quick(cls, **fields) -> "Plan":
        """Every function once or twice with almost no work: for the tests."""
        return cls(
            feature_rounds=3,
            feature_clips=(1, 4),
            audio_seconds=1.0,
            batch_sizes=(1, 2),
            training_batch_size=2,
            throughput_batch_sizes=(1, 2),
            new_tokens=4,
            paper_stem=False,
            memory_cases=("features_mel_llm", "generate_backbone", "generate_mel_llm"),
            **{**fields, "rounds": 2, "size": "tiny"},
        )


# --- audio -----------------------------------------------------------------------------------------------------------


def read_clips() -> list[dict]:
    folder = ROOT / "demo_clips"
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return [{"audio": load_audio(folder / row["file_name"]), "text": row["text"]} for row in csv.DictReader(file)]


def cycle(clips: list, number: int) -> list:
    return [clips[index % len(clips)] for index in range(number)]


def utterances(clips: list[dict], number: int, seconds: float) -> list[np.ndarray]:
    """Recordings joined to `number` stretches of speech: the first is `seconds` long, the others down to half of it,
    so that a batch has padding."""
    speech = np.concatenate([clip["audio"] for clip in clips])
    samples = [int(seconds * RATE * (1 - index / (2 * number))) for index in range(number)]
    return [np.resize(np.roll(speech, -sum(samples[:index])), size) for index, size in enumerate(samples)]


def seconds_of(waveforms: list[np.ndarray]) -> float:
    return round(sum(map(len, waveforms)) / RATE, 2)


# --- measuring -------------------------------------------------------------------------------------------------------


def synchronise(device: str) -> None:
    """Waits until the device has done its work; the CPU always has."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(cases: dict[str, Callable], rounds: int, device: str, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each case in each round. The order changes from round to round, so that no case always has the caches
    that the same other one left."""
    names = list(cases)
    for name in names * warm_up:
        cases[name]()
    timings: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            synchronise(device)
            start = time.perf_counter()
            cases[name]()
            synchronise(device)
            timings[name].append(round(time.perf_counter() - start, 7))
    return timings


def ratio(timings: dict[str, list[float]], case: str, peer: str) -> dict[str, float]:
    """How many times as long `case` takes as `peer`, round by round: the median, and the middle half of the rounds."""
    pairs = [ours / theirs for ours, theirs in zip(timings[case], timings[peer], strict=True)]
    low, median, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    return {
        "median": round(float(median), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "of_fastest": round(min(timings[case]) / min(timings[peer]), 4),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- features --------------------------------------------------------------------------------------------------------


def feature_cases(device: str) -> dict[str, Callable]:
    """Extractors as their constructors make them, called for tensors."""
    ours, phi4, whisper = MelLLMFeatureExtractor(), Phi4MultimodalFeatureExtractor(), WhisperFeatureExtractor()
    common = {"sampling_rate": RATE, "return_tensors": "pt", "device": device}
    return {
        "mel_llm": lambda audio: ours(audio, **common),
        "phi4": lambda audio: phi4(audio, **common),
        "whisper_30s": lambda audio: whisper(audio, **common),
        "whisper_longest": lambda audio: whisper(audio, padding="longest", **common),
    }


def difference_from_phi4(cases: dict[str, Callable], waveforms: list[np.ndarray]) -> float:
    """Greatest difference between our features and Phi-4's over all frames of all clips: is it the same work?"""
    ours, theirs = cases["mel_llm"](waveforms), cases["phi4"](waveforms)["audio_input_features"]
    if ours["input_features"].shape != theirs.shape:
        raise RuntimeError(f"Features have the shapes {ours['input_features'].shape} and {theirs.shape}.")
    mask = ours["attention_mask"].bool()
    return (ours["input_features"] - theirs.to(mask.device))[mask].abs().max().item()


def features_section(plan: Plan, clips: list[dict]) -> list[dict]:
    """One run for each device, number of threads and number of clips."""
    settings = [("cpu", threads) for threads in sorted({1, plan.threads})]
    if plan.device != "cpu":
        settings.append((plan.device, plan.threads))
    runs = []
    for device, threads in settings:
        torch.set_num_threads(threads)
        for number in plan.feature_clips:
            say(f"features: {number} clip(s) on {device} with {threads} thread(s)")
            waveforms = cycle([clip["audio"] for clip in clips], number)
            cases, failed = feature_cases(device), {}
            for name in ("phi4", "whisper_30s", "whisper_longest"):
                try:
                    cases[name](waveforms)
                except RuntimeError as error:
                    if device == "cpu":
                        raise
                    failed[name] = str(error).splitlines()[0]  # a peer that this device is too much for
                    del cases[name]
            calls = {name: lambda call=call: call(waveforms) for name, call in cases.items()}  # noqa: B023
            timings = measure(calls, plan.feature_rounds, device)
            runs.append(
                {
                    "device": device,
                    "threads": threads,
                    "clips": number,
                    "audio_seconds": seconds_of(waveforms),
                    "max_difference_from_phi4": difference_from_phi4(cases, waveforms) if "phi4" in cases else None,
                    "times_as_fast_as": {name: ratio(timings, name, "mel_llm") for name in cases if name != "mel_llm"},
                    "failed": failed,
                    "seconds": timings,
                }
            )
    torch.set_num_threads(plan.threads)
    return runs


# --- models ----------------------------------------------------------------------------------------------------------


class ForcedTokens(LogitsProcessor):
    """Makes a model write given tokens: random weights write the same word for ever, and the guard against that would
    end the text."""

    def __init__(self, ids: list[int], prompt_length: int):
        self.ids, self.prompt_length = ids, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.prompt_length]] = 0.0
        return forced


class Models:
    """A bare language model, and Mel-LLMs around that very model: the weights are shared, not copied."""

    def __init__(self, plan: Plan, clips: list[dict]):
        set_seed(plan.seed)
        size = SIZES[plan.size]
        self.tokenizer = train_tokenizer([clip["text"] for clip in clips], vocab_size=320)
        text_config = LlamaConfig(
            **size["text"],
            num_key_value_heads=size["kv_heads"],
            vocab_size=size["vocab_size"],
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.plan = plan
        self.backbone = AutoModelForCausalLM.from_config(text_config, dtype=plan.dtype).to(plan.device).eval()
        self.mel_llm, self.processor = self._around_backbone(size["audio"], clips)
        # The same model, if its stem is the paper's already
        with_paper_stem = plan.paper_stem and size["audio"]
        self.paper_stem = self._around_backbone({}, clips)[0] if with_paper_stem else None

    def _around_backbone(self, audio_config: dict, clips: list[dict]):
        model, processor = from_text_llm(self.backbone, self.tokenizer, audio_config=dict(audio_config))
        features = [processor(audio=clip["audio"])["input_features"][0] for clip in clips[:4]]
        model.model.set_feature_statistics(*compute_feature_statistics(features))
        return model.eval(), processor

    def describe(self) -> dict:
        def millions(module) -> float:
            return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)

        def stem(model) -> float:
            return round(millions(model.model.audio_embedder) + millions(model.model.multi_modal_projector), 2)

        return {
            "size": self.plan.size,
            "layers": self.backbone.config.num_hidden_layers,
            "hidden_size": self.backbone.config.hidden_size,
            "vocab_size": self.backbone.config.vocab_size,
            "reduction_factor": self.mel_llm.config.audio_config.reduction_factor,
            "conv_channels": self.mel_llm.config.audio_config.conv_channels,
            "backbone_million_parameters": millions(self.backbone),
            "audio_million_parameters": stem(self.mel_llm),
            "paper_stem_million_parameters": None if self.paper_stem is None else stem(self.paper_stem),
        }

    def features(self, waveforms: list[np.ndarray]) -> dict[str, torch.Tensor]:
        extractor = self.processor.feature_extractor
        return dict(extractor(waveforms, sampling_rate=RATE, return_tensors="pt", device=self.plan.device))

    def inputs(self, waveforms: list[np.ndarray]) -> dict[str, dict]:
        """The same prompt twice: with audio, and with random text tokens in the audio's places."""
        features = self.features(waveforms)
        ids, mask = self.mel_llm._build_prompt(features["input_features"], features["attention_mask"])
        generator = torch.Generator().manual_seed(self.plan.seed)
        words = torch.randint(4, self.backbone.config.vocab_size, ids.shape, generator=generator).to(ids.device)
        text = torch.where(ids == self.mel_llm.config.audio_token_id, words, ids)
        audio = {
            "input_features": features["input_features"],
            "input_features_mask": features["attention_mask"],
        }
        return {
            "text": {"input_ids": text, "attention_mask": mask},
            "audio": {"input_ids": ids, "attention_mask": mask, **audio},
            "audio_only": audio,
        }


def generate(model, inputs: dict, new_tokens: int, forced: LogitsProcessor | None = None, **options) -> None:
    """Writes just so many tokens, or raises."""
    if forced is not None:  # as everybody calls it, with the guards at work
        options["logits_processor"] = [forced]
    else:
        options["min_new_tokens"] = new_tokens
    # What generates from audio alone returns no prompt
    prompt_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **options)
    if ids.shape[1] - prompt_length != new_tokens:
        raise RuntimeError(f"{ids.shape[1] - prompt_length} tokens were written instead of {new_tokens}.")


# --- generation ------------------------------------------------------------------------------------------------------


def generation_section(plan: Plan, models: Models, clips: list[dict]) -> list[dict]:
    return [generation_run(plan, models, utterances(clips, number, plan.audio_seconds)) for number in plan.batch_sizes]


@torch.no_grad()
def generation_run(plan: Plan, models: Models, waveforms: list[np.ndarray]) -> dict:
    say(f"generation: batch of {len(waveforms)}")
    backbone, mel_llm, paper = models.backbone, models.mel_llm, models.paper_stem
    inputs, new_tokens = models.inputs(waveforms), plan.new_tokens
    text, audio, audio_only = inputs["text"], inputs["audio"], inputs["audio_only"]
    prompt_length = text["input_ids"].shape[1]
    words = np.random.default_rng(plan.seed).permutation(np.arange(4, backbone.config.vocab_size))[:new_tokens]
    forced = ForcedTokens(words.tolist(), prompt_length)
    last = {"use_cache": True, "logits_to_keep": 1}
    cases = {
        "backbone_generate": lambda: generate(backbone, text, new_tokens),
        "generate": lambda: generate(mel_llm, audio, new_tokens),
        "generate_audio_only": lambda: generate(mel_llm, audio_only, new_tokens),
        "backbone_generate_forced": lambda: generate(backbone, text, new_tokens, forced),
        "generate_guarded": lambda: generate(mel_llm, audio_only, new_tokens, forced),
        "backbone_prefill": lambda: backbone(**text, **last),
        "prefill": lambda: mel_llm(**audio, **last),
        "features": lambda: models.features(waveforms),
        "embedder": lambda: mel_llm.get_audio_features(**audio_only),
    }
    if paper is not None:
        cases["generate_paper_stem"] = lambda: generate(paper, audio_only, new_tokens)
        cases["embedder_paper_stem"] = lambda: paper.get_audio_features(**audio_only)
    timings = measure(cases, plan.rounds, plan.device)

    overheads = {
        "generate": "backbone_generate",
        "generate_audio_only": "backbone_generate",
        "generate_guarded": "backbone_generate_forced",
        "generate_paper_stem": "backbone_generate",
        "prefill": "backbone_prefill",
    }
    median = {name: statistics.median(seconds) for name, seconds in timings.items()}
    split = {
        "features": median["features"],
        "embedder": median["embedder"],
        "prefill": median["backbone_prefill"],
        # A step cannot be timed from outside without slowing it down
        "decode": max(0.0, median["generate_audio_only"] - median["embedder"] - median["backbone_prefill"]),
    }
    total = sum(split.values())
    return {
        "batch_size": len(waveforms),
        "audio_seconds": seconds_of(waveforms),
        "prompt_tokens": prompt_length,
        "audio_tokens": int((audio["input_ids"] == mel_llm.config.audio_token_id).sum()),
        "new_tokens": new_tokens,
        "ratio": {case: ratio(timings, case, peer) for case, peer in overheads.items() if case in timings},
        "share": {name: round(seconds / total, 4) for name, seconds in split.items()},
        "seconds": timings,
    }


# --- training --------------------------------------------------------------------------------------------------------


def training_section(plan: Plan, models: Models, clips: list[dict]) -> dict:
    """Forward and backward of one batch; all parameters are trained."""
    say(f"training: batch of {plan.training_batch_size}")
    backbone, mel_llm = models.backbone, models.mel_llm
    inputs = models.inputs(utterances(clips, plan.training_batch_size, plan.audio_seconds))
    prompt_length = inputs["text"]["input_ids"].shape[1]
    texts = [" ".join(clip["text"] for clip in cycle(clips[index:] + clips[:index], 2)) for index in range(len(clips))]
    labels = transcripts(models.tokenizer, cycle(texts, plan.training_batch_size), plan.device)

    def whole(prompt: dict) -> dict:
        """Prompt, transcript and its end as one text, of which the transcript counts."""
        is_text = labels != -100
        answer = labels.masked_fill(~is_text, mel_llm.config.pad_token_id)
        ignored = torch.full_like(prompt["input_ids"], -100)
        return {
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], answer], dim=1),
            "attention_mask": torch.cat([prompt["attention_mask"], is_text.long()], dim=1),
            "labels": torch.cat([ignored, labels], dim=1),
            "use_cache": False,
        }

    text, audio = whole(inputs["text"]), whole(inputs["audio"])
    kept = labels.shape[1] + 1  # the last token of the prompt predicts the first of the transcript
    text_kept = {**text, "labels": text["labels"][:, -kept:], "logits_to_keep": kept}
    # The model adds the end itself
    without_end = labels.masked_fill(labels == mel_llm.config.response_eos_token_id, -100)[:, :-1]

    def step(model, batch: dict) -> Callable:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(**batch).loss.backward()

        return run

    cases = {
        "backbone": step(backbone, text),
        "mel_llm": step(mel_llm, audio),
        "backbone_transcript_logits": step(backbone, text_kept),
        "mel_llm_transcript_logits": step(mel_llm, {**inputs["audio_only"], "labels": without_end}),
    }
    backbone.train(), mel_llm.train()
    timings = measure(cases, plan.rounds, plan.device)
    backbone.eval(), mel_llm.eval()
    mel_llm.zero_grad(set_to_none=True)
    return {
        "batch_size": plan.training_batch_size,
        "tokens": text["input_ids"].shape[1],
        "prompt_tokens": prompt_length,
        "label_tokens": int((labels != -100).sum()),
        "ratio": {
            "all_logits": ratio(timings, "mel_llm", "backbone"),
            "transcript_logits": ratio(timings, "mel_llm_transcript_logits", "backbone_transcript_logits"),
            "transcript_logits_to_all": ratio(timings, "mel_llm_transcript_logits", "mel_llm"),
        },
        "seconds": timings,
    }


def transcripts(tokenizer, texts: list[str], device: str) -> torch.LongTensor:
    """`(texts, tokens)` with an end-of-text token each, padded on the right with -100."""
    rows = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(device)


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY_CASES = {
    **{f"features_{name}": label for name, label in EXTRACTORS.items()},
    "generate_backbone": "bare backbone",
    "generate_mel_llm": "Mel-LLM",
    "generate_paper_stem": "Mel-LLM with the paper's stem",
}


def memory_section(plan: Plan, options: list[str]) -> dict:
    """Each case in a process of its own: memory that one case has freed would be there for the next."""
    results = {}
    for name in plan.memory_cases or MEMORY_CASES:
        paper_stem_differs = plan.paper_stem and SIZES[plan.size]["audio"]
        if name == "generate_paper_stem" and not paper_stem_differs:
            continue
        say(f"memory: {name}")
        command = [sys.executable, str(Path(__file__).resolve()), *options, "--memory-case", name]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            error = (process.stderr.strip().splitlines() or ["no message"])[-1]
            if plan.device == "cpu" or name.endswith("mel_llm"):
                raise RuntimeError(f"The memory of {name} could not be measured: {process.stderr}")
            results[name] = {"failed": error}
        else:
            results[name] = json.loads(process.stdout.splitlines()[-1])
    return {"feature_clips": plan.feature_clips[-1], "batch_size": plan.batch_sizes[-1], "cases": results}


def memory_case(plan: Plan, name: str, clips: list[dict]) -> dict:
    """What one call needs beyond what was there before it. A small call goes first: libraries load lazily."""
    if name.startswith("features_"):
        call = feature_cases(plan.device)[name.removeprefix("features_")]
        waveforms = cycle([clip["audio"] for clip in clips], plan.feature_clips[-1])
        return peak_memory(lambda: call(waveforms[:1]), lambda: call(waveforms), plan.device)
    models = Models(plan, clips)
    waveforms = utterances(clips, plan.batch_sizes[-1], plan.audio_seconds)
    inputs = models.inputs(waveforms)
    model, prompt = {
        "generate_backbone": (models.backbone, inputs["text"]),
        "generate_mel_llm": (models.mel_llm, inputs["audio_only"]),
        "generate_paper_stem": (models.paper_stem, inputs["audio_only"]),
    }[name]
    first = {key: value[:1, :] for key, value in prompt.items()}
    return peak_memory(
        lambda: generate(model, first, 2), lambda: generate(model, prompt, plan.new_tokens), plan.device
    )


def peak_memory(warm_up: Callable, call: Callable, device: str) -> dict:
    warm_up()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        after = torch.cuda.max_memory_allocated()
    else:
        before = reset_peak_rss()
        call()
        after = peak_rss()
    return {"before_mib": round(before / 2**20, 2), "peak_mib": round(after / 2**20, 2), "device": device}


def reset_peak_rss() -> int:
    """Makes what the process holds now its peak, where the system allows; returns the peak in bytes from then on."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass
    return peak_rss()


def peak_rss() -> int:
    """Bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- throughput ------------------------------------------------------------------------------------------------------


def throughput_section(plan: Plan, models: Models, clips: list[dict]) -> list[dict]:
    """Seconds of audio per second, from waveforms to tokens, with the growing cache and with a static one (for which
    transformers compiles the decoding step by itself on a GPU). Made for GPUs; runs anywhere."""
    runs = []
    for number in plan.throughput_batch_sizes:
        say(f"throughput: batch of {number}")
        waveforms = utterances(clips, number, plan.audio_seconds)

        def transcribe(waveforms=waveforms, **options) -> None:
            features = models.features(waveforms)
            generate(models.mel_llm, features, plan.new_tokens, **options)

        cases = {"eager": transcribe, "static": lambda call=transcribe: call(cache_implementation="static")}
        # Twice, because the first call compiles and the second may compile again for shapes that have changed
        timings = measure(cases, plan.rounds, plan.device, warm_up=2)
        audio = seconds_of(waveforms)
        runs.append(
            {
                "batch_size": number,
                "audio_seconds": audio,
                "new_tokens": plan.new_tokens,
                "rtfx": {name: round(audio / statistics.median(seconds), 2) for name, seconds in timings.items()},
                "static_to_eager": ratio(timings, "static", "eager"),
                "seconds": timings,
            }
        )
    return runs


# --- goals -----------------------------------------------------------------------------------------------------------


def goals(results: dict) -> list[dict]:
    """What was aimed at, and whether the medians are there."""
    found = []

    def add(goal: str, value: float, met: bool, text: str) -> None:
        found.append({"goal": goal, "value": value, "text": text, "met": met})

    for run in results.get("features") or []:
        where = f"{run['clips']} clip{'s'[: run['clips'] > 1]}, {_device(run)}"
        for peer, least, goal in (
            ("phi4", 4.0, "4 times as fast as Phi-4's extractor"),
            ("whisper_30s", 4.0, "4 times as fast as Whisper's with its default padding"),
            ("whisper_longest", 1.0, "no slower than Whisper's without padding to 30 s"),
        ):
            if peer in run["times_as_fast_as"]:
                value = run["times_as_fast_as"][peer]["median"]
                add(f"Features {goal} ({where})", value, value >= least, f"{value:.2f}×")
    for run in results.get("generation") or []:
        for case, label in (("prefill", "Prefill"), ("generate_audio_only", "`generate`")):
            value = run["ratio"][case]["median"]
            add(
                f"{label} within 5 % of the bare backbone (batch of {run['batch_size']})",
                value,
                value <= 1.05,
                f"{_percent(value)}",
            )
    return found


# --- Markdown --------------------------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return f"{100 * (value - 1):+.1f} %"


def _device(run: dict) -> str:
    if run["device"] != "cpu":
        return run["device"]
    return f"{run['threads']} thread{'s'[: run['threads'] > 1]}"


def _times(value: dict | None) -> str:
    return "failed" if value is None else f"**{value['median']:.2f}×** ({value['low']:.2f} to {value['high']:.2f})"


def _overhead(value: dict | None) -> str:
    if value is None:
        return "—"
    return f"**{_percent(value['median'])}** ({_percent(value['low'])} to {_percent(value['high'])})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(results: dict) -> str:
    """The Markdown, made from the JSON and nothing else."""
    environment = results["environment"]
    parts = [
        "# Benchmarks",
        "Made by `scripts/benchmark.py`; [benchmarks.json](benchmarks.json) has every timing of every round. Do not edit. "
        "Speech generation has [a page of its own](benchmarks_tts.md).",
        f"```bash\n{environment['command']}\n```",
        _environment_line(environment),
        "Everything is a comparison with a peer **in the same run**: cases take turns, round after round, and each is "
        "divided by its peer of the same round. Given are the median of these ratios and, in brackets, the middle half "
        "of the rounds; where that is wide, the machine was busy and the figure is that uncertain. Absolute times are in "
        "the JSON and say little about another machine. Weights are random: speed does not depend on them, as the "
        "number of tokens to write is given.",
    ]
    if results["goals"]:
        rows = [[goal["goal"], goal["text"], "yes" if goal["met"] else "**no**"] for goal in results["goals"]]
        parts += ["## Goals", _table(["goal", "measured", "met"], rows)]
    renderers = {
        "features": _render_features,
        "generation": _render_generation,
        "memory": _render_memory,
        "training": _render_training,
        "throughput": _render_throughput,
    }
    for name, renderer in renderers.items():
        if name in results:
            parts += renderer(results)
    return "\n\n".join(parts) + "\n"


def _environment_line(environment: dict) -> str:
    where = f"{environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads"
    if environment["gpu"]:
        where += f", {environment['gpu']}"
    before, after = (", ".join(f"{load:.1f}" for load in environment[key]) for key in ("load_before", "load_after"))
    more = f" ({environment['feature_rounds']} for features)" if "feature_rounds" in environment else ""
    return (
        f"{environment['date']}, {where}; torch {environment['torch']}, transformers {environment['transformers']}, "
        f"Python {environment['python']}; models in {environment['dtype']}, seed {environment['seed']}, "
        f"{environment['rounds']} rounds{more}. Load of the machine (1, 5, 15 "
        f"minutes; the benchmark itself included) before: {before}; after: {after}. The run took "
        f"{environment['minutes']:.1f} minutes."
    )


def _render_features(results: dict) -> list[str]:
    peers = [name for name in EXTRACTORS if name != "mel_llm"]
    rows, differences, failures = [], [], set()
    for run in results["features"]:
        rows.append(
            [
                _device(run),
                f"{run['clips']} ({run['audio_seconds']:.0f} s)",
                *(_times(run["times_as_fast_as"].get(name)) for name in peers),
            ]
        )
        if run["max_difference_from_phi4"] is not None:
            differences.append(run["max_difference_from_phi4"])
        failures |= {f"{EXTRACTORS[name]} on {run['device']}: {error}" for name, error in run["failed"].items()}
    text = [
        "## Features",
        "How many times as fast as the peer `MelLLMFeatureExtractor` turns waveforms in memory into a padded batch of "
        "tensors (above 1 is faster). All extractors are as their constructors make them.",
        _table(["on", "clips", "Phi-4's", "Whisper's, 30 s", "Whisper's, longest"], rows),
        f"The work is that of Phi-4's extractor: over all frames of all clips, the features of the two differ by "
        f"{max(differences):.1e} at most."
        if differences
        else "Phi-4's extractor did not run.",
        "Phi-4's extractor and ours compute the FFT in float64, Whisper's in float32. For one clip there is no padding to "
        "save, so what is left is how the same arithmetic is done; in a batch, ours spends nothing on padding.",
    ]
    if failures:
        text.append("Failed: " + "; ".join(sorted(failures)) + ".")
    return text


def _render_generation(results: dict) -> list[str]:
    model = results["models"]
    labels = {
        "prefill": "prefill (one forward pass over the prompt)",
        "generate": "`generate` with `input_ids` and features",
        "generate_audio_only": "`generate` with features alone",
        "generate_guarded": "the same with the guards against loops and silence at work",
        "generate_paper_stem": "`generate` with features alone, the paper's stem",
    }
    runs = results["generation"]
    sizes = [
        f"batch of {run['batch_size']} ({run['audio_seconds']:.0f} s of audio, prompt of {run['prompt_tokens']} tokens)"
        for run in runs
    ]
    used = [case for case in labels if case in runs[0]["ratio"]]
    rows = [[labels[case], *(_overhead(run["ratio"].get(case)) for run in runs)] for case in used]
    # How much of it is the new layers' own work
    for case, label in (("embedder", "stem and projector"), ("embedder_paper_stem", "the paper's stem and projector")):
        if case in runs[0]["seconds"]:
            parts_of_prefill = [ratio(run["seconds"], case, "backbone_prefill")["median"] for run in runs]
            rows.append(
                [f"{label} on their own, beside the prefill", *(f"{100 * part:.1f} %" for part in parts_of_prefill)]
            )
    parts = {
        "features": "features",
        "embedder": "embedder and projector",
        "prefill": "prefill of the backbone",
        "decode": f"decoding ({runs[0]['new_tokens']} tokens)",
    }
    shares = [[label, *(f"{100 * run['share'][name]:.1f} %" for run in runs)] for name, label in parts.items()]
    stem = ""
    if model["paper_stem_million_parameters"] is not None:
        stem = (
            f" The paper's stem of 1024 channels ({model['paper_stem_million_parameters']} M parameters with its "
            "projector) is made for a backbone of 3.8 billion parameters. Its cost does not shrink with the backbone, so "
            "before one this small it is no longer light: take fewer `conv_channels` there."
        )
    return [
        "## Prefill and decoding",
        f"What Mel-LLM adds to its own backbone: a Llama of {model['layers']} layers, {model['hidden_size']} wide, with "
        f"{model['vocab_size']} tokens ({model['backbone_million_parameters']} M parameters), and before it a stem of "
        f"{model['conv_channels']} channels with r = {model['reduction_factor']} ({model['audio_million_parameters']} M "
        "parameters with its projector). The peer is `LlamaForCausalLM` with the very same weights and a prompt of the "
        "same length and padding, in which text stands in the place of audio; both write "
        f"{runs[0]['new_tokens']} tokens greedily. 0 % is as fast as the bare backbone. Features are not part of it "
        "here." + stem,
        _table(["more time than the bare backbone", *sizes], rows),
        "Where the time of a transcription goes, from waveform to tokens (decoding is what `generate` leaves after the "
        "others are subtracted):",
        _table(["part", *(f"batch of {run['batch_size']}" for run in runs)], shares),
    ]


def _render_memory(results: dict) -> list[str]:
    memory = results["memory"]

    def rows(prefix: str, peers_of: str) -> list[list[str]]:
        cases = {name: case for name, case in memory["cases"].items() if name.startswith(prefix)}
        base = cases[peers_of]
        found = []
        for name, case in cases.items():
            if "failed" in case:
                found.append([MEMORY_CASES[name], "failed", ""])
                continue
            taken, reference = (item["peak_mib"] - item["before_mib"] for item in (case, base))
            compared = f"{taken / reference:.2f}×" if reference > 0 else "—"
            found.append([MEMORY_CASES[name], f"{taken:.1f} MiB", compared])
        return found

    kind = "memory allocated on the GPU" if results["environment"]["device"] != "cpu" else "resident memory"
    return [
        "## Peak memory",
        f"Each case in a process of its own: peak of the {kind} during the call less what was there before it, after a "
        "small call that lets libraries load. One call is measured, not many: small differences are noise.",
        _table(
            [f"features of {memory['feature_clips']} clips", "more memory", "relative to ours"],
            rows("features_", "features_mel_llm"),
        ),
        _table(
            [f"`generate`, batch of {memory['batch_size']}", "more memory", "relative to the backbone"],
            rows("generate_", "generate_backbone"),
        ),
    ]


def _render_training(results: dict) -> list[str]:
    run = results["training"]
    rows = [
        ["`input_ids` and `labels`, logits of all tokens", _overhead(run["ratio"]["all_logits"])],
        [
            "transcripts as `labels` (as for Whisper), logits of these alone",
            _overhead(run["ratio"]["transcript_logits"]),
        ],
    ]
    return [
        "## Training step",
        f"Forward and backward of a batch of {run['batch_size']} with {run['tokens']} tokens a row ("
        f"{run['prompt_tokens']} of them prompt and audio), all parameters trained. The peer is the bare backbone with as "
        "many tokens and, in the second row, `logits_to_keep` for the transcripts.",
        _table(["labels", "more time than the bare backbone"], rows),
        f"With the logits of the transcripts alone, a step of Mel-LLM takes {_times(run['ratio']['transcript_logits_to_all'])} "
        "the time of one with all logits.",
    ]


def _render_throughput(results: dict) -> list[str]:
    text = ["## Throughput on a GPU"]
    runs = results["throughput"]
    if not isinstance(runs, list):
        return [*text, f"Not measured: {runs['not_measured']}."]
    rows = [
        [
            str(run["batch_size"]),
            f"{run['audio_seconds']:.0f} s",
            f"{run['rtfx']['eager']:.0f}",
            f"{run['rtfx']['static']:.0f}",
        ]
        for run in runs
    ]
    return [
        *text,
        f"Seconds of audio transcribed per second (RTFx), from waveforms to {runs[0]['new_tokens']} tokens per clip, "
        "features included. Weights are random, so this is speed and says nothing of accuracy.",
        _table(["batch", "audio", "RTFx, eager", "RTFx, static cache and compiled decoding"], rows),
    ]


# --- the run ---------------------------------------------------------------------------------------------------------

SECTIONS = ("features", "generation", "memory", "training", "throughput")


def environment_of(plan: Plan, command: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": cores,
        "threads": plan.threads,
        "gpu": torch.cuda.get_device_name() if plan.device.startswith("cuda") else None,
        "device": plan.device,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seed": plan.seed,
        "rounds": plan.rounds,
        "feature_rounds": plan.feature_rounds,
    }


def load_average() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else []


def run_sections(plan: Plan, sections: tuple[str, ...], options: list[str]) -> dict:
    clips = read_clips()
    results: dict = {}
    if "features" in sections:
        results["features"] = features_section(plan, clips)
    if "memory" in sections:
        results["memory"] = memory_section(plan, options)
    if {"generation", "training"} & set(sections) or ("throughput" in sections and plan.device.startswith("cuda")):
        models = Models(plan, clips)
        results["models"] = models.describe()
    if "generation" in sections:
        results["generation"] = generation_section(plan, models, clips)
    if "training" in sections:
        results["training"] = training_section(plan, models, clips)
    if "throughput" in sections:
        if plan.device.startswith("cuda"):
            results["throughput"] = throughput_section(plan, models, clips)
        else:
            results["throughput"] = {"not_measured": "no CUDA GPU at hand"}
    return results


def write(path: Path, text: str) -> None:
    """The whole file or nothing of it."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the models are (default: cuda if there is one)"
    )
    parser.add_argument("--threads", type=positive, help="torch's threads on the CPU (default: torch's own choice)")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; features take three times as many")
    parser.add_argument("--size", choices=SIZES, help="of the backbone (default: small on the CPU, 1b on a GPU)")
    parser.add_argument("--output-dir", type=Path, help="where benchmarks.json and benchmarks.md go (default: docs/)")
    parser.add_argument("--only", choices=SECTIONS, help="run one section; needs --output-dir")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the random tokens")
    parser.add_argument("--quick", action="store_true", help="hardly any work, for the tests; needs --output-dir")
    parser.add_argument("--memory-case", choices=MEMORY_CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (options.only or options.quick) and options.output_dir is None and options.memory_case is None:
        parser.error("--only and --quick need --output-dir: docs/ is for whole runs.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here.")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    fields = {
        "device": device,
        "dtype": torch.float32 if device == "cpu" or options.quick else torch.bfloat16,
        "threads": torch.get_num_threads(),
        "rounds": options.repeats,
        "size": options.size or ("small" if device == "cpu" else "1b"),
        "seed": options.seed,
    }
    return Plan.quick(**fields) if options.quick else Plan(feature_rounds=3 * options.repeats, **fields)


def main() -> None:
    options = parse_arguments()
    logging.set_verbosity_error()
    plan = make_plan(options)
    if options.memory_case:
        print(json.dumps(memory_case(plan, options.memory_case, read_clips())))
        return
    folder = options.output_dir or ROOT / "docs"
    folder.mkdir(parents=True, exist_ok=True)

    # Where the files go is not part of what was measured
    shared = ["--device", plan.device, "--threads", str(plan.threads), "--size", plan.size, "--seed", str(plan.seed)]
    shared += ["--quick"] * options.quick
    given = [text for text in sys.argv[1:] if not text.startswith("--output-dir") and text != str(options.output_dir)]
    environment = environment_of(plan, shlex.join(["python", "scripts/benchmark.py", *given]))
    environment["load_before"], start = load_average(), time.monotonic()
    results = run_sections(plan, (options.only,) if options.only else SECTIONS, shared)
    environment["load_after"] = load_average()
    environment["minutes"] = round((time.monotonic() - start) / 60, 2)
    results = {"environment": environment, "goals": goals(results), **results}

    write(folder / "benchmarks.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write(folder / "benchmarks.md", render(results))
    say(f"Wrote {folder / 'benchmarks.json'} and {folder / 'benchmarks.md'}.")


if __name__ == "__main__":
    main()
