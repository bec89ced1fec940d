"""Asks models about recordings, through their chat templates, and counts the right answers.

    python scripts/evaluate_understanding.py --model runs/emotions --data recordings,text_column=emotion \\
        --instruction "Which emotion is in this voice?" --choices labels --output_dir runs/evaluation
    python scripts/evaluate_understanding.py --model runs/answers --data questions.jsonl --match contains \\
        --output_dir runs/evaluation

Data has a column `question` (or `instruction`; or --instruction asks the same of all), one `answer` (or `label`;
`text_column=` names another; several right answers have | between them), and perhaps `choices`. The same command, started
again, asks only what is missing. In --output_dir are raw/ with what the models answered, scores/ with the figures of
each model and set (for model cards), results.json with everything and results.md with the tables.
"""

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from mel_llm.evaluation.answer_accuracy import MATCHES, SEPARATOR, score_answers
from mel_llm.evaluation.answer_report import answer_tables, summarize_answers
from mel_llm.evaluation.answer_systems import make_answerer
from mel_llm.evaluation.clip_evaluation import ClipEvaluation
from mel_llm.evaluation.clip_scripts import (
    ClipArguments,
    main,
    make_evaluation,
    write_results,
)
from mel_llm.evaluation.clip_sets import ClipSet, load_clip_set
from mel_llm.evaluation.environment import describe_environment
from mel_llm.training.sources import REPLY_COLUMNS, SpeechSource
from mel_llm.whole_files import claim_folder, write_whole


logger = logging.getLogger("evaluate")

_LABELS = "labels"


@dataclass
class UnderstandingArguments(ClipArguments):
    """Who is asked what. Hyphens and underscores in names are the same."""

    instruction: str | None = field(default=None, metadata={"help": "Asked of every clip that has no question."})
    choices: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What every answer is one of, where the data has no column `choices`; `labels` takes all answers in it."
        },
    )
    show_choices: bool = field(default=False, metadata={"help": "Name the choices behind the question."})
    match: str = field(
        default="exact",
        metadata={"help": "Without choices: exact, or contains, where the right answer may stand in a sentence."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "A message of the role system, before."})
    normalizer: str = field(
        default="lower_no_punctuation",
        metadata={"help": "Of answers before they are compared; see mel_llm.evaluation.TEXT_NORMALIZERS."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.match not in MATCHES:
            raise ValueError(f"--match must be one of {', '.join(MATCHES)}, got {self.match!r}.")
        if not self.data:
            raise ValueError("There is nothing to ask about: give --data.")
        if self.max_new_tokens is None:
            self.max_new_tokens = 64


def load_questions(spec: str, arguments: UnderstandingArguments, normalize) -> ClipSet:
    """A set in which every clip has a question and an answer, which is one of the choices if there are any."""
    clips = load_clip_set(SpeechSource.parse(spec), arguments.split, arguments.max_samples, text_columns=REPLY_COLUMNS)
    if any(session is not None for session in clips.sessions):
        raise ValueError(f"{clips.name}: `parent_id` and `chunk_index` are for transcripts, and not for answers.")
    clips.prompts = [prompt or arguments.instruction for prompt in clips.prompts]
    answers = [utterance.text for utterance in clips.utterances]
    if arguments.choices and not any(clips.choices):
        choices = arguments.choices
        if choices == [_LABELS]:
            parts = (part.strip() for answer in answers for part in answer.split(SEPARATOR))
            choices = sorted({part for part in parts if part})
        clips.choices = [choices] * len(clips)
    for utterance, prompt, choices in zip(clips.utterances, clips.prompts, clips.choices, strict=True):
        if prompt is None:
            raise ValueError(
                f"{clips.name}: {utterance.id} has no question. Give --instruction, or a column: "
                f"{spec},instruction_column=..."
            )
        try:
            score_answers([""], [utterance.text], [choices], normalize, arguments.match)
        except ValueError as error:
            raise ValueError(
                f"{clips.name}: {utterance.id}: {str(error).replace('`references[0]`', 'its answer')}"
            ) from None
    if arguments.show_choices:
        clips.prompts = [
            prompt if choices is None else f"{prompt} Options: {', '.join(choices)}."
            for prompt, choices in zip(clips.prompts, clips.choices, strict=True)
        ]
    return clips


def prepare(argv: list[str]) -> tuple:
    """Everything that can go wrong before anything is asked: what is quick to find out first."""
    parser = HfArgumentParser(UnderstandingArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    normalizer = arguments.load_normalizer()
    claim_folder(arguments.output_dir)
    options = {**arguments.model_options, "batch_size": arguments.batch_size, "system_prompt": arguments.system_prompt}
    systems = [make_answerer(name, **options, revision=arguments.revision) for name in arguments.model]
    systems += [make_answerer(name, is_peer=True, **options) for name in arguments.peer]
    sets = [load_questions(spec, arguments, normalizer[0]) for spec in arguments.data]
    for clips in sets:
        num_questions = len(set(clips.prompts))
        logger.info(f"{clips.name}: {len(clips)} clips, {num_questions} question{'s' if num_questions > 1 else ''}.")
    return make_evaluation(arguments, sets, systems), arguments, normalizer


def report(results: list[dict], evaluation: ClipEvaluation, arguments, normalizer: tuple) -> bool:
    """Writes and prints what came of it; whether everything was answered."""
    function, described = normalizer
    summaries = [summarize_answers(result, evaluation.sets, function, arguments.match) for result in results]
    environment = describe_environment(arguments.device)
    whole = {
        "environment": environment,
        "arguments": asdict(arguments),
        "normalizer": described,
        "intervals": "95 % Wilson intervals",
        "models": summaries,
    }
    folder = Path(arguments.output_dir)
    write_results(folder, whole, answer_tables(summaries), [f"Normaliser {described}; match: {arguments.match}."])
    for summary, system in zip(summaries, evaluation.systems, strict=True):
        scores = folder / "scores" / system.folder_name
        scores.mkdir(parents=True, exist_ok=True)
        for clips, of_set in zip(evaluation.sets, summary["sets"], strict=True):
            if "accuracy" in of_set["totals"]:
                figures = card_figures(summary, of_set, environment)
                write_whole(scores / f"{clips.file_name}.json", json.dumps(figures, indent=2) + "\n")
        if summary["num_failed"]:
            logger.warning(f"{summary['name']}: {summary['num_failed']} clips failed; results.json says why.")
    logger.info(f"Everything is in {folder / 'results.json'}.")
    return not any(summary["num_failed"] for summary in summaries)


def card_figures(summary: dict, of_set: dict, environment: dict) -> dict:
    """As `create_model_card` takes them."""
    totals = of_set["totals"]
    low, high = (100 * totals["accuracy"][side] for side in ("low", "high"))
    return {
        "model": summary["name"],
        "task": "audio-text-to-text",
        "metrics": {"accuracy": totals["accuracy"]["value"]},
        "dataset": of_set["dataset"],
        "config": of_set["config"],
        "split": of_set["split"],
        "num_utterances": totals["num_utterances"],
        "environment": environment,
        "notes": [
            f"95 % interval of the accuracy: {low:.1f} to {high:.1f} %. Always the most frequent answer: "
            f"{100 * totals['majority']:.1f} %."
        ],
    }


if __name__ == "__main__":
    disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main("evaluate_understanding.py", prepare, report)
