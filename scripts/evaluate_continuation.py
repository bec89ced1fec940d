"""Measures models that go on with speech or answer it (SPECTRON): what they say, in whose voice, and whether they are right.

    python scripts/evaluate_continuation.py --data recordings,split=test --model runs/spectron --text written skipped \\
        --reference --asr openai/whisper-base.en --lm openai-community/gpt2-medium --speaker_encoder resemblyzer \\
        --output_dir runs/continuations
    python scripts/evaluate_continuation.py --qa fixie-ai/llama-questions --model runs/spectron --asr openai/whisper-base.en \\
        --output_dir runs/answers
    python scripts/evaluate_continuation.py --qa webquestions-test.json --qa_audio spoken --model runs/spectron \\
        --asr openai/whisper-base.en --output_dir runs/answers

The same command, started again, makes and scores only what is missing. In --output_dir are results.json with everything,
results.md with the tables, and for each system a folder with the sound, the text and the scores of each prompt.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoProcessor, HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from mel_llm import MelLLMForSpeechContinuation
from mel_llm.evaluation import (
    AudioFolder,
    ContinuationModel,
    LogPerplexity,
    ReferenceSpeech,
    SpeechEvaluation,
    get_text_normalizer,
    load_mos,
    load_prompts,
    load_questions,
    load_recognizer,
    load_speaker_encoder,
    make_continuation_judges,
    speech_table,
    summarize_continuations,
)
from mel_llm.evaluation.continuation_evaluation import CachedPerplexity, PromptVoice
from mel_llm.evaluation.environment import describe_environment, heading_of
from mel_llm.evaluation.plugins import describe_folder
from mel_llm.script_errors import interruption_goes_on, told_in_a_line
from mel_llm.training import PromptCut
from mel_llm.whole_files import claim_folder, write_whole


logger = logging.getLogger("evaluate_continuation")

_TITLES = {"continuation": "Continuations", "qa": "Answers"}


@dataclass
class EvaluationArguments:
    """Who goes on with what, and who listens. Hyphens and underscores in names are the same."""

    output_dir: str = field(metadata={"help": "Where results, sound and scores go."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Recordings whose beginnings are prompts, as scripts/train.py takes them, PLACE[,key=value]..., by "
            "default of the split 'validation'. Transcripts are not needed."
        },
    )
    qa: str | None = field(
        default=None,
        metadata={
            "help": "Spoken questions: a json, jsonl, csv or tsv with `audio`, `answers` and perhaps `question`, "
            "WebQuestions' own files (with --qa_audio), or a dataset such as fixie-ai/llama-questions."
        },
    )
    qa_audio: str | None = field(
        default=None, metadata={"help": "Folder with the questions' recordings, named by id or number, for --qa FILE."}
    )
    model: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub names of Mel-LLMs that go on."})
    text: list[str] = field(
        default_factory=lambda: ["written"],
        metadata={
            "help": "written: models write, then speak; skipped: they speak at once; both words measure each model twice."
        },
    )
    reference: bool = field(default=False, metadata={"help": "Measure the recordings' own continuations, too."})
    audio: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders with another program's continuation of each prompt, ID.wav or another ending."},
    )
    prompt_seconds: float = field(
        default=3.0, metadata={"help": "How much of each recording is its prompt (paper: 3)."}
    )
    prompt_fraction: float | None = field(default=None, metadata={"help": "The same as a share of each recording."})
    min_continuation_seconds: float = field(
        default=0.5, metadata={"help": "Recordings with less behind are left out."}
    )
    max_question_seconds: float | None = field(
        default=None, metadata={"help": "Leave longer questions out (paper, WebQuestions: what fits into 3 s)."}
    )
    asr: str | None = field(
        default=None,
        metadata={
            "help": "Who writes down what is said: folder or Hub name of a model for the speech recognition pipeline, or "
            "python:module.function, called with a waveform (samples,) and its rate in Hz."
        },
    )
    asr_language: str | None = field(default=None, metadata={"help": "Language spoken, for models that can be told."})
    lm: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of the language model for log-perplexities (paper: GPT-2, we believe)."},
    )
    normalizer: str = field(
        default="whisper", metadata={"help": "Of texts and transcripts; see mel_llm.evaluation.TEXT_NORMALIZERS."}
    )
    speaker_encoder: str | None = field(
        default=None, metadata={"help": "resemblyzer, or python:module.function that returns a vector."}
    )
    mos: str | None = field(
        default=None, metadata={"help": "dnsmos, or python:module.function that returns a number or a dict of them."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of models; 0 takes the mean."})
    stop_threshold: float | None = field(default=None, metadata={"help": "Of models; see docs/tts.md."})
    max_seconds: float | None = field(default=None, metadata={"help": "Longest speech."})
    min_seconds: float | None = field(default=None, metadata={"help": "Shortest speech."})
    seed: int = field(default=0, metadata={"help": "Of the speech, and of the confidence intervals."})
    batch_size: int = field(default=8, metadata={"help": "Prompts that a model goes on with at a time."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many prompts, or questions."})
    bootstrap_samples: int = field(default=1000, metadata={"help": "Of the confidence intervals."})
    keep_audio: bool = field(default=True, metadata={"help": "Keep the speech that was made."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "Of models: auto, float32, bfloat16 or float16."})

    def __post_init__(self):
        if self.data is None and self.qa is None:
            raise ValueError("There is nothing to go on with: give --data, recordings, or --qa, spoken questions.")
        for name in ("batch_size", "bootstrap_samples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must be at least 0, got {self.temperature}.")
        for name in ("max_seconds", "min_seconds", "max_question_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} must be more than 0, got {value}.")
        for name in ("lm", "asr_language"):
            if getattr(self, name) is not None and self.asr is None:
                raise ValueError(f"--{name} needs --asr, which writes down what is said.")
        if not self.text or set(self.text) - {"written", "skipped"} or len(set(self.text)) < len(self.text):
            raise ValueError(f"--text must be written, skipped or both, got {' '.join(self.text)}.")
        if self.qa_audio is not None and self.qa is None:
            raise ValueError("--qa_audio is for --qa, which is not given.")
        if self.data is None and (self.reference or self.audio):
            raise ValueError("--reference and --audio are for --data: nobody has spoken the answers.")
        if not (self.model or self.reference or self.audio):
            raise ValueError("There is nothing to evaluate: give --model, --reference or --audio.")
        if self.qa is not None and not self.model:
            raise ValueError("--qa needs --model: who is to answer.")
        get_text_normalizer(self.normalizer)
        self.cut()
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def cut(self) -> PromptCut:
        fraction = None if self.prompt_fraction is None else (self.prompt_fraction,)
        return PromptCut((self.prompt_seconds,), fraction, self.min_continuation_seconds)


def load_models(arguments: EvaluationArguments) -> list[tuple]:
    models = []
    for name in arguments.model:
        model = MelLLMForSpeechContinuation.from_pretrained(name, dtype=arguments.dtype).to(arguments.device)
        if MelLLMForSpeechContinuation.__name__ not in (model.config.architectures or ()):
            logger.warning(f"--model {name} was not trained to go on with speech: expect nonsense.")
        models.append((model, AutoProcessor.from_pretrained(name), name, describe_folder(name)))
    return models


def systems_of(task: str, models: list[tuple], arguments: EvaluationArguments) -> list:
    systems: list = []
    if task == "continuation":
        systems += [ReferenceSpeech("natural continuation")] if arguments.reference else []
        systems += [AudioFolder(folder) for folder in arguments.audio]
    options = {key: getattr(arguments, key) for key in ("temperature", "stop_threshold", "max_seconds", "min_seconds")}
    for model in models:
        for skip_text in [kind == "skipped" for kind in arguments.text]:
            systems.append(ContinuationModel(*model, task=task, skip_text=skip_text, seed=arguments.seed, **options))
    return systems


def load_items(arguments: EvaluationArguments) -> dict[str, list]:
    """What is gone on with, and what is answered."""
    items: dict[str, list] = {}
    if arguments.data is not None:
        prompts, short = load_prompts(arguments.data, arguments.cut())
        items["continuation"] = prompts[: arguments.limit]
        logger.info(f"{len(items['continuation'])} prompts of {arguments.cut()}; {short} recordings are too short.")
    if arguments.qa is not None:
        questions = load_questions(arguments.qa, arguments.qa_audio)
        total, longest = len(questions), arguments.max_question_seconds
        if longest is not None:
            questions = [item for item in questions if len(item.load_prompt(8000)) <= longest * 8000]
            if not questions:
                raise ValueError(f"--max_question_seconds: no question is spoken in {longest:g} s.")
        items["qa"] = questions[: arguments.limit]
        logger.info(f"{len(items['qa'])} questions; {total - len(questions)} are too long.")
    return items


def prepare(argv: list[str]) -> tuple[dict[str, SpeechEvaluation], CachedPerplexity | None, EvaluationArguments]:
    """Everything that can go wrong before anything is spoken: what is quick to find out first."""
    parser = HfArgumentParser(EvaluationArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    folder = claim_folder(arguments.output_dir)
    items = load_items(arguments)
    models = load_models(arguments)
    listen = (
        None if arguments.asr is None else load_recognizer(arguments.asr, arguments.asr_language, arguments.device)
    )
    encoder = None
    if arguments.speaker_encoder is not None:
        encoder = load_speaker_encoder(arguments.speaker_encoder, arguments.device)
    mos = None if arguments.mos is None else load_mos(arguments.mos)
    perplexity = None
    if arguments.lm is not None:
        metric = LogPerplexity(model=arguments.lm, device=arguments.device, batch_size=arguments.batch_size)
        perplexity = CachedPerplexity(metric, folder / "perplexity.json")
    evaluations = {}
    for task, chosen in items.items():
        is_prompt = task == "continuation"
        judges = make_continuation_judges(chosen, listen, encoder if is_prompt else None, mos)
        evaluations[task] = SpeechEvaluation(
            chosen,
            [PromptVoice(item) if is_prompt else None for item in chosen],
            systems_of(task, models, arguments),
            judges,
            folder / task,
            arguments.batch_size,
            arguments.keep_audio,
        )
    return evaluations, perplexity, arguments


def report(
    evaluations: dict[str, SpeechEvaluation], perplexity: CachedPerplexity | None, arguments: EvaluationArguments
) -> bool:
    """Runs what is missing, writes and prints what came of it; whether everything was spoken and scored."""
    environment = describe_environment(arguments.device)
    whole: dict = {"environment": environment, "arguments": asdict(arguments), "judges": {}, "tasks": {}}
    whole["intervals"] = (
        f"95 %, percentile bootstrap over prompts, {arguments.bootstrap_samples} samples, seed {arguments.seed}"
    )
    pages, failed = [], []
    for task, evaluation in evaluations.items():
        summarize = partial(
            summarize_continuations,
            items=evaluation.utterances,
            normalizer=arguments.normalizer,
            perplexity=perplexity if task == "continuation" else None,
            seed=arguments.seed,
            bootstrap_samples=arguments.bootstrap_samples,
        )
        summaries = [summarize(result) for result in evaluation.run()]
        whole["tasks"][task] = summaries
        whole["judges"] |= {judge.name: judge.description for judge in evaluation.judges if judge.name != "prompt"}
        pages += [f"## {_TITLES[task]}", speech_table(summaries)]
        failed += [(summary["name"], summary["failed"]) for summary in summaries if summary["failed"]]
    if perplexity is not None:
        whole["judges"]["lm"] = perplexity.description
    folder = Path(arguments.output_dir)
    write_whole(folder / "results.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    heading = [
        *heading_of(environment, "95 % bootstrap intervals", arguments.seed),
        *(f"{name}: {description}" for name, description in whole["judges"].items()),
    ]
    write_whole(folder / "results.md", "\n\n".join([*heading, *pages]))
    print("\n\n".join(pages), end="")
    for name, ids in failed:
        logger.warning(f"{name}: {len(ids)} failed: {', '.join(ids[:10])}")
    logger.info(f"Everything is in {folder / 'results.json'}.")
    return not failed


if __name__ == "__main__":
    disable_progress_bar()
    with told_in_a_line("evaluate_continuation.py"):
        prepared = prepare(sys.argv[1:])
    with interruption_goes_on(logger):
        complete = report(*prepared)
    sys.exit(0 if complete else 1)
