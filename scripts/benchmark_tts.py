"""Compares the speed and memory of speech generation with its own bare backbone, with the clock, and with other vocoders.

    python scripts/benchmark_tts.py                                    # all; writes docs/benchmarks_tts.{json,md}
    python scripts/benchmark_tts.py --only steps --output-dir /tmp     # one section, somewhere else

As in benchmark.py, cases take turns, round after round, and are compared within a round. Weights are random: the number
of patches to write is given, so speed does not depend on them.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark import (
    ROOT,
    SIZES,
    _environment_line,
    _overhead,
    _percent,
    _table,
    environment_of,
    load_average,
    measure,
    peak_memory,
    positive,
    ratio,
    read_clips,
    say,
    write,
)
from transformers import DynamicCache, LlamaConfig, set_seed
from transformers.utils import logging

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoder, MelLLMVocoderConfig
from mel_llm.conversion import from_text_llm
from mel_llm.synthesis_mel_llm import iter_speech
from mel_llm.training import compute_feature_statistics, train_tokenizer


# SmolLM2-135M's layers, six of its thirty, and a vocabulary of 16384: 31 M parameters
BACKBONES = {
    "small": {
        "text": {**SIZES["small"]["text"], "num_hidden_layers": 6},
        "kv_heads": 3,
        "vocab_size": 16384,
        "audio": {"conv_channels": 128, "hidden_size": 576},
    },
    "tiny": SIZES["tiny"],
}
VOCODERS = {
    "griffin_lim": ("Griffin-Lim, 32 iterations", "griffin_lim", None),
    "istft": ("iSTFT, its default size", "istft", None),
    "istft_sooner": ('iSTFT, `"lookahead": 1`', "istft", {"lookahead": 1}),
    "hifigan": ("HiFi-GAN, its default size", "hifigan", None),
    "hifigan_small": ("HiFi-GAN, 128 channels", "hifigan", {"upsample_initial_channel": 128}),
}
SPEAKING_VOCODERS = ("griffin_lim", "istft")
TEXTS = (
    "You have reached a number that is not in service.",
    "Please hang up and try your call again.",
    "Yes, it is.",
    "If you need help, hang up and then dial your operator, or stay on the line.",
)
LONG_TEXT = "You have reached a number that is not in service, so please hang up. "

# The goals
MOST_OVER_BACKBONE, LEAST_TIMES_REAL_TIME, MOST_FIRST_AUDIO_MS, MOST_GROWTH_MIB = 1.2, 6.0, 150.0, 10.0


@dataclass
class Plan:
    """What to measure, and how much of it. `device`, `dtype` and `feature_rounds` are what `environment_of` writes down."""

    threads: int
    rounds: int
    seed: int
    size: str = "small"
    patches: int = 64
    reduction_factors: tuple[int, ...] = (4, 8)
    batch_sizes: tuple[int, ...] = (1, 8)
    speech_seconds: float = 6.0
    vocoders: tuple[str, ...] = tuple(VOCODERS)
    long_minutes: tuple[float, ...] = (1.0, 10.0)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    feature_rounds: int = 0

    @classmethod
    def quick(cls, **fields) -> "Plan":
        """Every function once or twice with almost no work: for the tests."""
        return cls(
            size="tiny",
            patches=4,
            reduction_factors=(4,),
            batch_sizes=(1, 2),
            speech_seconds=0.6,
            vocoders=("griffin_lim", "istft"),
            long_minutes=(0.02, 0.05),
            **{**fields, "rounds": 2},
        )


# --- models ----------------------------------------------------------------------------------------------------------


def make_vocoder_config(name: str, extractor: MelLLMFeatureExtractor) -> MelLLMVocoderConfig:
    _, kind, kwargs = VOCODERS[name]
    return MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type=kind, vocoder_kwargs=kwargs)


def build(plan: Plan, clips: list[dict], reduction_factor: int, vocoder: str | None, size: str | None = None):
    """A speaking model with random weights that is never silent and never stops, and its processor."""
    set_seed(plan.seed)
    shape = BACKBONES[size or plan.size]
    tokenizer = train_tokenizer([clip["text"] for clip in clips], vocab_size=320)
    text_config = LlamaConfig(
        **shape["text"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    model, processor = from_text_llm(
        text_config,
        tokenizer,
        audio_config={**shape["audio"], "reduction_factor": reduction_factor},
        feature_extractor=extractor,
        speech_config=MelLLMSpeechConfig.from_preset("small", max_silence_seconds=86400.0),
        vocoder_config=None if vocoder is None else make_vocoder_config(vocoder, extractor),
    )
    model.to(plan.dtype)
    if model.vocoder is not None:
        model.vocoder.float()
    features = [processor(audio=clip["audio"])["input_features"][0] for clip in clips[:4]]
    model.model.set_feature_statistics(*compute_feature_statistics(features))
    return model.eval(), processor


def millions(module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)


# --- steps -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_backbone(model, inputs: dict, steps: int) -> None:
    """The language model alone: the same prompt and padding, then one embedding after the other with a cache."""
    ids, mask = model._speech_prompt(inputs["input_ids"], inputs["attention_mask"])
    language_model = model.model.language_model
    is_padded = not bool(mask.all())
    embeds = language_model.get_input_embeddings()(ids)
    begin = model.speech_head.begin.expand(len(ids), 1, -1)
    embeds, mask = torch.cat([embeds, begin], dim=1), torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.text_config)
    for step in range(steps):
        if step:
            position_ids = position_ids[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        output = language_model(
            inputs_embeds=embeds,
            attention_mask=mask if is_padded else None,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        embeds = output.last_hidden_state[:, -1:]


def steps_section(plan: Plan, clips: list[dict]) -> list[dict]:
    runs = []
    for factor in plan.reduction_factors:
        model, processor = build(plan, clips, factor, None)
        for number in plan.batch_sizes:
            say(f"steps: r = {factor}, batch of {number}")
            inputs = processor.apply_speech_request([TEXTS[index % len(TEXTS)] for index in range(number)])

            def speak(temperature: float, model=model, inputs=inputs, factor=factor) -> None:
                output = model.generate(**inputs, **fixed(plan.patches, plan.seed), temperature=temperature)
                if any(len(frames) != plan.patches * factor for frames in output.spectrogram):
                    raise RuntimeError("Another number of patches was written than was asked for.")

            cases = {
                "backbone": lambda model=model, inputs=inputs: step_backbone(model, inputs, plan.patches),
                "mean": lambda speak=speak: speak(0.0),
                "sampled": lambda speak=speak: speak(1.0),
            }
            timings = measure(cases, plan.rounds, plan.device)
            per_second = {name: round(plan.patches / statistics.median(times), 2) for name, times in timings.items()}
            runs.append(
                {
                    "reduction_factor": factor,
                    "batch_size": number,
                    "patches": plan.patches,
                    "backbone_million_parameters": millions(model.model.language_model),
                    "other_million_parameters": round(millions(model) - millions(model.model.language_model), 2),
                    "steps_per_second": per_second,
                    "ratio": {case: ratio(timings, case, "backbone") for case in ("mean", "sampled")},
                    "seconds": timings,
                }
            )
    return runs


def fixed(patches: int, seed: int) -> dict:
    """Arguments with which just so many patches are spoken. Each step still asks whether it is the last."""
    limits = {"max_new_tokens": patches, "max_seconds": 1e4, "stop_threshold": 1.0}
    return {**limits, "seed": seed, "return_dict_in_generate": True}


# --- speech ----------------------------------------------------------------------------------------------------------


class Listener:
    """A streamer that writes down when it got how much: `[(seconds since the call, samples), ...]`."""

    def __init__(self):
        self.start, self.parts = time.perf_counter(), []

    def put(self, samples: torch.Tensor) -> None:
        self.parts.append((time.perf_counter() - self.start, len(samples)))

    def end(self) -> None:
        pass

    def stall(self, rate: int) -> float:
        """Seconds for which a player that begins with the first samples would have nothing to play."""
        plays_until, stalled = self.parts[0][0], 0.0
        for arrival, samples in self.parts:
            stalled += max(0.0, arrival - plays_until)
            plays_until = max(plays_until, arrival) + samples / rate
        return stalled


def speech_section(plan: Plan, clips: list[dict]) -> list[dict]:
    """One text at a time, from the call to the waveform; whole, and as a stream."""
    runs = []
    for factor in plan.reduction_factors:
        for vocoder in SPEAKING_VOCODERS:
            say(f"speech: r = {factor}, {vocoder}")
            model, processor = build(plan, clips, factor, vocoder)
            inputs = processor.apply_speech_request(TEXTS[0])
            patches = round(plan.speech_seconds * model.config.audio_config.frame_rate / factor)
            arguments = fixed(patches, plan.seed)
            listeners: list[Listener] = []
            samples: set[int] = set()

            def whole(model=model, inputs=inputs, arguments=arguments, samples=samples) -> None:
                samples.add(len(model.generate(**inputs, **arguments).audio[0]))

            def stream(model=model, inputs=inputs, arguments=arguments, listeners=listeners) -> None:
                listeners.append(Listener())
                model.generate(**inputs, **arguments, streamer=listeners[-1])

            timings = measure({"whole": whole, "stream": stream}, plan.rounds, plan.device)
            heard = {sum(size for _, size in listener.parts) for listener in listeners}
            if heard != samples or len(samples) != 1:
                raise RuntimeError(f"The stream has {heard} samples, the whole {samples}.")
            rate = model.config.sampling_rate
            seconds = samples.pop() / rate
            measured = listeners[1:]  # the first was the warm-up
            first = [1000 * listener.parts[0][0] for listener in measured]
            runs.append(
                {
                    "reduction_factor": factor,
                    "vocoder": vocoder,
                    "audio_seconds": round(seconds, 2),
                    "times_real_time": {name: spread([seconds / time for time in timings[name]]) for name in timings},
                    "first_audio_ms": spread(first),
                    "first_piece_ms": round(1000 * measured[0].parts[0][1] / rate, 1),
                    "stall_ms": spread([1000 * listener.stall(rate) for listener in measured]),
                    "seconds": {**timings, "first_audio": [round(value / 1000, 5) for value in first]},
                }
            )
    return runs


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    figures = {"median": median, "low": low, "high": high, "least": min(values), "most": max(values)}
    return {name: round(float(value), 3) for name, value in figures.items()}


# --- vocoders --------------------------------------------------------------------------------------------------------


def vocoders_section(plan: Plan, clips: list[dict]) -> dict:
    """The same frames of recorded speech to waveforms."""
    say("vocoders")
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    samples = int(plan.speech_seconds * extractor.sampling_rate)
    audio = torch.cat([torch.as_tensor(clip["audio"]) for clip in clips])[:samples]
    frames = extractor(audio.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    set_seed(plan.seed)
    vocoders = {name: MelLLMVocoder(make_vocoder_config(name, extractor)).eval() for name in plan.vocoders}
    cases: dict[str, Callable] = {name: lambda vocoder=vocoder: vocoder(frames) for name, vocoder in vocoders.items()}
    timings = measure(cases, plan.rounds, plan.device)
    seconds = frames.shape[1] * extractor.hop_length / extractor.sampling_rate
    return {
        "audio_seconds": round(seconds, 2),
        "million_parameters": {name: millions(vocoder) for name, vocoder in vocoders.items()},
        "lookahead_frames": {name: vocoder.lookahead for name, vocoder in vocoders.items()},
        "times_real_time": {name: spread([seconds / time for time in times]) for name, times in timings.items()},
        "times_as_fast_as_griffin_lim": {name: ratio(timings, "griffin_lim", name) for name in vocoders},
        "seconds": timings,
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_section(plan: Plan, options: list[str]) -> dict:
    """Each length in a process of its own."""
    cases = {}
    for vocoder in SPEAKING_VOCODERS:
        for minutes in plan.long_minutes:
            say(f"memory: {minutes:g} minutes, {vocoder}")
            name = f"{vocoder}:{minutes:g}"
            command = [sys.executable, str(Path(__file__).resolve()), *options, "--memory-case", name]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode != 0:
                raise RuntimeError(f"The memory of {name} could not be measured: {process.stderr}")
            cases[name] = json.loads(process.stdout.splitlines()[-1])
    return {"minutes": list(plan.long_minutes), "cases": cases}


def memory_case(plan: Plan, name: str, clips: list[dict]) -> dict:
    """Speaks a long text sentence by sentence. The model is tiny, so that nothing hides what the length adds."""
    vocoder, minutes = name.split(":")
    model, processor = build(plan, clips, 8, vocoder, size="tiny")
    spoken: list[float] = []

    def speak(seconds: float) -> None:
        spoken.append(0.0)
        # Each sentence stops by itself after five seconds, so the first one's voice goes before the others
        limits = {"min_seconds": 5.0, "max_seconds": 20.0, "stop_threshold": 1e-30}
        sentences = max(1, round(seconds / 5))
        for _, audio in iter_speech(model, processor, LONG_TEXT * sentences, max_chars=80, seed=plan.seed, **limits):
            spoken[-1] += len(audio) / model.config.sampling_rate

    figures = peak_memory(lambda: speak(10), lambda: speak(60 * float(minutes)), plan.device)
    return {**figures, "audio_seconds": round(spoken[-1], 1)}


# --- goals -----------------------------------------------------------------------------------------------------------


def goals(results: dict) -> list[dict]:
    """What was aimed at, and whether the medians are there."""
    found = []

    def add(goal: str, value: float, met: bool, text: str) -> None:
        found.append({"goal": goal, "value": value, "text": text, "met": met})

    for run in results.get("steps") or []:
        for case, label in (("mean", "temperature 0"), ("sampled", "sampled")):
            value = run["ratio"][case]["median"]
            where = f"r = {run['reduction_factor']}, batch of {run['batch_size']}, {label}"
            add(
                f"A step within 20 % of the bare backbone's ({where})",
                value,
                value <= MOST_OVER_BACKBONE,
                _percent(value),
            )
    for run in results.get("speech") or []:
        where = f"r = {run['reduction_factor']}, {VOCODERS[run['vocoder']][0]}"
        value = run["times_real_time"]["whole"]["median"]
        add(f"6 times faster than real time ({where})", value, value >= LEAST_TIMES_REAL_TIME, f"{value:.1f}×")
        value = run["first_audio_ms"]["median"]
        add(f"First audio within 150 ms ({where})", value, value <= MOST_FIRST_AUDIO_MS, f"{value:.0f} ms")
    if "memory" in results:
        for vocoder in SPEAKING_VOCODERS:
            value = growth(results["memory"], vocoder)
            short, long = results["memory"]["minutes"]
            goal = f"Memory flat from {short:g} to {long:g} minutes of speech ({VOCODERS[vocoder][0]})"
            add(goal, value, value <= MOST_GROWTH_MIB, f"{value:+.1f} MiB")
    return found


def growth(memory: dict, vocoder: str) -> float:
    """MiB by which the longest speech takes more than the shortest."""
    short, long = (memory["cases"][f"{vocoder}:{minutes:g}"] for minutes in memory["minutes"])
    return round((long["peak_mib"] - long["before_mib"]) - (short["peak_mib"] - short["before_mib"]), 2)


# --- Markdown --------------------------------------------------------------------------------------------------------


def render(results: dict) -> str:
    """The Markdown, made from the JSON and nothing else."""
    environment = results["environment"]
    parts = [
        "# Benchmarks of speech generation",
        "Made by `scripts/benchmark_tts.py`; [benchmarks_tts.json](benchmarks_tts.json) has every timing of every round. "
        "Do not edit. How reading compares is in [benchmarks.md](benchmarks.md).",
        f"```bash\n{environment['command']}\n```",
        _environment_line(environment),
        "Cases take turns, round after round, and each is divided by its peer of the same round; given are the median "
        "and, in brackets, the middle half of the rounds. Where there is no peer but the clock, a busy machine makes the "
        "figure worse. Weights are random, and how much is to be spoken is given.",
    ]
    if results["goals"]:
        rows = [[goal["goal"], goal["text"], "yes" if goal["met"] else "**no**"] for goal in results["goals"]]
        parts += ["## Goals", _table(["goal", "measured", "met"], rows)]
    renderers = {
        "steps": _render_steps,
        "speech": _render_speech,
        "vocoders": _render_vocoders,
        "memory": _render_memory,
    }
    for name, renderer in renderers.items():
        if name in results:
            parts += renderer(results[name])
    return "\n\n".join(parts) + "\n"


def _render_steps(runs: list[dict]) -> list[str]:
    rows = [
        [
            f"{run['reduction_factor']}",
            f"{run['batch_size']}",
            f"{run['steps_per_second']['backbone']:.0f}",
            f"{run['steps_per_second']['backbone'] * run['reduction_factor'] / 100:.1f}",
            _overhead(run["ratio"]["mean"]),
            _overhead(run["ratio"]["sampled"]),
        ]
        for run in runs
    ]
    sizes = ", ".join(
        f"{run['other_million_parameters']} M with r = {run['reduction_factor']}"
        for run in runs
        if run["batch_size"] == 1
    )
    return [
        "## Steps",
        f"`generate` of {runs[0]['patches']} patches, one a step, without a vocoder, against the same language model "
        f"({runs[0]['backbone_million_parameters']} M parameters) taking as many steps after the same prompt, with a cache, "
        "its own output embedded as the next input. What `generate` has besides, a head, a post-net and the stem and "
        f"projector that embed each patch, is {sizes}. In the larger batch, prompts differ in length and are padded.",
        "No speech can be written faster than the backbone alone steps; what that is beside real time, with 100 frames a "
        "second, is given too.",
        _table(
            [
                "r",
                "batch",
                "backbone's steps/s",
                "that is, times real time",
                "more time at temperature 0",
                "more time, sampled",
            ],
            rows,
        ),
    ]


def _range(value: dict, form: str) -> str:
    return f"**{value['median']:{form}}** ({value['low']:{form}} to {value['high']:{form}})"


def _render_speech(runs: list[dict]) -> list[str]:
    rows = [
        [
            f"{run['reduction_factor']}",
            VOCODERS[run["vocoder"]][0],
            _range(run["times_real_time"]["whole"], ".1f"),
            _range(run["times_real_time"]["stream"], ".1f"),
            _range(run["first_audio_ms"], ".0f"),
            f"{run['first_piece_ms']:.0f}",
            f"{run['stall_ms']['median']:.0f}",
        ]
        for run in runs
    ]
    head = ["r", "vocoder", "times real time", "as a stream", "first audio, ms", "its length, ms", "stalls, ms"]
    return [
        "## Speech",
        f"One text, {runs[0]['audio_seconds']:g} s of speech, from the call of `generate` to the waveform: seconds of speech "
        "a second; after how long a streamer gets its first samples, and how much they are; and for how long in all a "
        "player that begins with them at once would have nothing to play.",
        _table(head, rows),
    ]


def _render_vocoders(run: dict) -> list[str]:
    rows = [
        [
            VOCODERS[name][0],
            f"{run['million_parameters'][name]:.2f} M",
            f"{run['lookahead_frames'][name]}",
            _range(run["times_real_time"][name], ".1f"),
            f"{run['times_as_fast_as_griffin_lim'][name]['median']:.2f}×",
        ]
        for name in run["times_real_time"]
    ]
    return [
        "## Vocoders",
        f"{run['audio_seconds']:g} s of recorded speech, as frames of 10 ms, to a waveform. The neural ones have random "
        "weights: this is their speed. Lookahead is how many frames a stream waits for, at most.",
        _table(["vocoder", "parameters", "lookahead", "times real time", "as fast as Griffin-Lim"], rows),
    ]


def _render_memory(memory: dict) -> list[str]:
    rows = []
    for vocoder in SPEAKING_VOCODERS:
        cases = [memory["cases"][f"{vocoder}:{minutes:g}"] for minutes in memory["minutes"]]
        taken = [f"{case['peak_mib'] - case['before_mib']:.1f} MiB" for case in cases]
        rows.append([VOCODERS[vocoder][0], *taken, f"{growth(memory, vocoder):+.1f} MiB"])
    case = cases[-1]
    held = case["audio_seconds"] * 16000 * 4 / 2**20
    return [
        "## Memory of long texts",
        "`iter_speech`, sentence by sentence in the first one's voice, with a tiny model, each case in a process of its own: "
        "peak of the resident memory less what was there before, after two sentences that let libraries load. The longest "
        f"waveform alone would be {held:.1f} MiB.",
        _table(["vocoder", *(f"{minutes:g} minutes" for minutes in memory["minutes"]), "growth"], rows),
    ]


# --- the run ---------------------------------------------------------------------------------------------------------

SECTIONS = ("steps", "speech", "vocoders", "memory")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--threads", type=positive, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds")
    parser.add_argument("--output-dir", type=Path, help="where benchmarks_tts.json and .md go (default: docs/)")
    parser.add_argument("--only", choices=SECTIONS, help="run one section; needs --output-dir")
    parser.add_argument("--seed", type=int, default=0, help="of weights and speech")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of models; vocoders: float32"
    )
    parser.add_argument("--quick", action="store_true", help="hardly any work, for the tests; needs --output-dir")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (options.only or options.quick) and options.output_dir is None and options.memory_case is None:
        parser.error("--only and --quick need --output-dir: docs/ is for whole runs.")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    torch.set_num_threads(options.threads)
    fields = {
        "threads": options.threads,
        "rounds": options.repeats,
        "seed": options.seed,
        "dtype": getattr(torch, options.dtype),
    }
    return Plan.quick(**fields) if options.quick else Plan(**fields)


def main() -> None:
    options = parse_arguments()
    logging.set_verbosity_error()
    plan, clips = make_plan(options), read_clips()
    if options.memory_case:
        print(json.dumps(memory_case(plan, options.memory_case, clips)))
        return
    folder = options.output_dir or ROOT / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    # Where the files go is not part of what was measured
    given = [text for text in sys.argv[1:] if not text.startswith("--output-dir") and text != str(options.output_dir)]
    # How threads wait for each other matters much on a busy machine
    waiting = [f"{name}={os.environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
    environment = environment_of(plan, shlex.join([*waiting, "python", "scripts/benchmark_tts.py", *given]))
    del environment["feature_rounds"]
    environment["load_before"], start = load_average(), time.monotonic()
    shared = ["--threads", str(plan.threads), "--seed", str(plan.seed), *["--quick"] * options.quick]
    sections: dict[str, Callable] = {
        "steps": lambda: steps_section(plan, clips),
        "speech": lambda: speech_section(plan, clips),
        "vocoders": lambda: vocoders_section(plan, clips),
        "memory": lambda: memory_section(plan, shared),
    }
    results = {name: section() for name, section in sections.items() if options.only in (None, name)}
    environment["load_after"] = load_average()
    environment["minutes"] = round((time.monotonic() - start) / 60, 2)
    results = {"environment": environment, "goals": goals(results), **results}
    write(folder / "benchmarks_tts.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write(folder / "benchmarks_tts.md", render(results))
    say(f"Wrote {folder / 'benchmarks_tts.json'} and {folder / 'benchmarks_tts.md'}.")


if __name__ == "__main__":
    main()
