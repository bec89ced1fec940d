"""From raw answers to accuracies with their confidence intervals, by class, and tables."""

from collections import Counter
from collections.abc import Callable, Sequence

from ..card_results import cell
from .answer_accuracy import score_answers, wilson_interval
from .clip_sets import ClipSet


# More labels than this, or nearly as many as clips, are no classes
_MAX_CLASSES = 50


def summarize_answers(
    result: dict,
    sets: Sequence[ClipSet],
    normalizer: str | Callable[[str], str] = "lower_no_punctuation",
    match: str = "exact",
) -> dict:
    """What [`ClipEvaluation.run`] gave of one system, with totals for each set.

    Args:
        result (`dict`): Of one system.
        sets (`list[ClipSet]`): What it was asked about.
        normalizer, match: As for [`score_answers`].

    Returns:
        The result, each set with `totals`: `accuracy` as `{"value", "low", "high"}` (Wilson's 95 % interval), `exact`
        (the share of answers that are a right one to the letter), `majority` (the accuracy of saying the most frequent
        answer always), and where there are choices `unmatched` (the share of answers that chose none). Where answers are
        classes, also `unweighted` (the mean of the classes' accuracies) and `classes`, and `confusion`, what was chosen
        for each class and how often. `answers` has every one.
    """
    summaries = []
    for clip_set, of_set in zip(sets, result["sets"], strict=True):
        places = {utterance.id: index for index, utterance in enumerate(clip_set.utterances)}
        lines = of_set["lines"]
        offered = [clip_set.choices[places[line["id"]]] for line in lines]
        texts = [line["pred_text"] for line in lines], [line["text"] for line in lines]
        scored = score_answers(*texts, offered, normalizer, match)
        rows = [
            {**line, "question": clip_set.prompts[places[line["id"]]], **score}
            for line, score in zip(lines, scored, strict=True)
        ]
        summaries.append(
            {
                "name": clip_set.name,
                "dataset": clip_set.place,
                "config": clip_set.config,
                "split": clip_set.split,
                "failed": of_set["failed"],
                "totals": _totals(rows, any(entry is not None for entry in offered)),
                "answers": rows,
            }
        )
    failed = sum(len(summary["failed"]) for summary in summaries)
    return {**result, "sets": summaries, "num_failed": failed}


def _totals(rows: list[dict], has_choices: bool) -> dict:
    totals: dict = {"num_utterances": len(rows)}
    if not rows:
        return totals
    labels = Counter(row["label"] for row in rows)
    totals["accuracy"] = _accuracy(rows)
    totals["exact"] = sum(row["exact"] for row in rows) / len(rows)
    totals["majority"] = max(labels.values()) / len(rows)
    if has_choices:
        totals["unmatched"] = sum(row["chosen"] is None for row in rows) / len(rows)
    if 1 < len(labels) <= min(_MAX_CLASSES, len(rows) / 2):
        of_class = {label: [row for row in rows if row["label"] == label] for label in sorted(labels)}
        totals["classes"] = {label: {**_accuracy(of), "num_utterances": len(of)} for label, of in of_class.items()}
        totals["unweighted"] = sum(entry["value"] for entry in totals["classes"].values()) / len(of_class)
        totals["confusion"] = {
            label: dict(Counter(str(row["chosen"]) for row in of).most_common()) for label, of in of_class.items()
        }
    return totals


def _accuracy(rows: list[dict]) -> dict:
    hits = sum(row["correct"] for row in rows)
    low, high = wilson_interval(hits, len(rows))
    return {"value": hits / len(rows), "low": low, "high": high}


def answer_tables(summaries: Sequence[dict]) -> str:
    """Markdown: a line for each model and set; and where answers are classes, one for each class."""
    headings = [
        "model",
        "data",
        "clips",
        "accuracy %",
        "mean of classes %",
        "most frequent %",
        "exact %",
        "no choice %",
    ]
    lines = [headings, ["---"] * len(headings)]
    classes = [["model", "data", "class", "clips", "accuracy %"], ["---"] * 5]
    for summary in summaries:
        for of_set in summary["sets"]:
            totals = of_set["totals"]
            count = str(totals["num_utterances"])
            count += f", {len(of_set['failed'])} failed" if of_set["failed"] else ""
            shares = (totals.get(name) for name in ("unweighted", "majority", "exact", "unmatched"))
            lines.append(
                [summary["name"], of_set["name"], count, _figure(totals.get("accuracy")), *map(_share, shares)]
            )
            for label, entry in totals.get("classes", {}).items():
                count = str(entry["num_utterances"])
                classes.append([summary["name"], of_set["name"], label, count, _figure(entry)])
    tables = [lines] + ([classes] if len(classes) > 2 else [])
    return "\n".join(
        "".join("| " + " | ".join(cell(value) for value in line) + " |\n" for line in table) for table in tables
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _figure(total: dict | None) -> str:
    if total is None:
        return "–"
    return f"{100 * total['value']:.1f} ({100 * total['low']:.1f}–{100 * total['high']:.1f})"


__all__ = ["answer_tables", "summarize_answers"]
