"""From the raw transcripts of clips to error rates and speed with their confidence intervals, and a table."""

from collections.abc import Callable, Sequence

from ..card_results import cell
from .bootstrap import bootstrap_interval
from .cer import CharacterErrorRate
from .clip_sets import ClipSet
from .normalizers import get_text_normalizer
from .wer import WordErrorRate


# What the leaderboard leaves out beside empty references: so are stretches marked in TED-LIUM
_IGNORED = "ignore time segment in scoring"


def summarize_asr(
    result: dict,
    sets: Sequence[ClipSet],
    normalizer: str | Callable[[str], str] = "whisper",
    seed: int = 0,
    bootstrap_samples: int = 1000,
) -> dict:
    """What [`ClipEvaluation.run`] gave of one system, with totals for each set and over all.

    Clips whose reference is empty after normalisation, or `ignore time segment in scoring`, are left out of everything,
    as by the leaderboard. The parts of a recording with one transcript are put together before they are compared with it.

    Args:
        result (`dict`): Of one system.
        sets (`list[ClipSet]`): What it heard.
        normalizer (`str` or `Callable`, defaults to `"whisper"`): See [`get_text_normalizer`].
        seed, bootstrap_samples: As for [`bootstrap_interval`].

    Returns:
        The result, each set with `totals`: `wer`, `cer` (edits over units, all over all), `rtfx` (seconds of audio over
        seconds of processing), each `{"value", "low", "high"}` with its 95 % interval, the counts of edits, `left_out`,
        and `utterances`; and `mean_wer`, the plain mean over the sets, and `rtfx` over all clips. There is no `rtfx` where
        clips were timed on more than one machine.
    """
    options = {"num_samples": bootstrap_samples, "seed": seed}
    summaries = []
    for clip_set, of_set in zip(sets, result["sets"], strict=True):
        summary = _summarize_set(of_set["lines"], normalizer, options)
        summaries.append(
            {
                "name": clip_set.name,
                "dataset": clip_set.place,
                "config": clip_set.config,
                "split": clip_set.split,
                "failed": of_set["failed"],
                **summary,
            }
        )
    rates = [summary["totals"]["wer"]["value"] for summary in summaries if "wer" in summary["totals"]]
    mean_wer = sum(rates) / len(rates) if rates and len(rates) == len(summaries) else None
    timed = [line for summary in summaries for line in summary["utterances"]]
    failed = sum(len(summary["failed"]) for summary in summaries)
    speed = _speed(timed, options)
    return {**result, "sets": summaries, "mean_wer": mean_wer, "rtfx": speed, "num_failed": failed}


def _summarize_set(lines: list[dict], normalizer, options: dict) -> dict:
    normalize = get_text_normalizer(normalizer)
    counted = [line for line in lines if line["text"] != _IGNORED and normalize(line["text"]).strip()]
    totals: dict = {"num_utterances": len(counted), "left_out": len(lines) - len(counted)}
    totals["seconds"] = sum(line["duration"] for line in counted)
    rows = [dict(line) for line in counted]
    speed = _speed(rows, options)
    if speed is not None:
        totals["rtfx"] = speed
    texts = _join_sessions(rows)
    for metric in (WordErrorRate(normalizer=normalizer), CharacterErrorRate(normalizer=normalizer)):
        if not texts:
            break
        name, unit = metric.short_name, f"reference_{metric.unit}s"
        details = metric.compute(
            references=[text["text"] for text in texts],
            predictions=[text["pred_text"] for text in texts],
            details=True,
        )
        edits = [
            sum(pair[kind] for kind in ("substitutions", "deletions", "insertions")) for pair in details["utterances"]
        ]
        units = [pair[unit] for pair in details["utterances"]]
        low, high = bootstrap_interval(edits, units, **options) or (None, None)
        totals[name] = {"value": details[name], "low": low, "high": high}
        totals[name].update({kind: details[kind] for kind in ("substitutions", "deletions", "insertions", unit)})
        for text, pair in zip(texts, details["utterances"], strict=True):
            text[name] = pair[name]
            if metric.unit == "word":
                text["normalized"] = {"text": pair["reference"], "pred_text": pair["prediction"]}
    summary = {"totals": totals, "utterances": rows}
    if texts is not rows:
        summary["recordings"] = texts
        totals["num_recordings"] = len(texts)
    return summary


def _join_sessions(rows: list[dict]) -> list[dict]:
    """What is compared: each clip, or each recording that clips are the parts of."""
    if not any("parent_id" in row for row in rows):
        return rows
    parts: dict[str, list[dict]] = {}
    for row in rows:
        parts.setdefault(row.get("parent_id", row["id"]), []).append(row)
    joined = []
    for name, of_one in parts.items():
        of_one.sort(key=lambda row: row.get("chunk_index", 0))
        said = [row["pred_text"].strip() for row in of_one]
        joined.append(
            {"id": name, "text": of_one[0]["text"], "pred_text": " ".join(filter(None, said)), "parts": len(of_one)}
        )
    return joined


def _speed(lines: Sequence[dict], options: dict) -> dict | None:
    if len({line["timed_on"] for line in lines}) != 1:
        return None
    seconds, spent = [line["duration"] for line in lines], [line["time"] for line in lines]
    if not sum(spent):
        return None
    low, high = bootstrap_interval(seconds, spent, **options) or (None, None)
    return {"value": sum(seconds) / sum(spent), "low": low, "high": high, "timed_on": lines[0]["timed_on"]}


def compare_speed(summaries: Sequence[dict]) -> None:
    """Adds `speed_ratio` to each system: its speed over that of the first peer, over all clips of this run.

    There is none where one of the two was not timed on one machine, or the two on different ones.
    """
    peer = next((summary for summary in summaries if summary["is_peer"]), None)
    for summary in summaries:
        ours, theirs = summary["rtfx"], peer and peer["rtfx"]
        is_fair = ours is not None and theirs is not None and ours["timed_on"] == theirs["timed_on"]
        summary["speed_ratio"] = ours["value"] / theirs["value"] if is_fair else None


def asr_table(summaries: Sequence[dict], bounds: bool = True) -> str:
    """A Markdown table: a line for each system; the word error rate of each set, their mean, and the speed.

    Args:
        summaries: Of [`summarize_asr`], after [`compare_speed`].
        bounds (`bool`, defaults to `True`): 95 % intervals in brackets.
    """
    names = [of_set["name"] for of_set in summaries[0]["sets"]]
    counts = [of_set["totals"]["num_utterances"] for of_set in summaries[0]["sets"]]
    peer = next((summary["name"] for summary in summaries if summary["is_peer"]), None)
    headings = ["model", "parameters"]
    headings += [f"{name} ({count} clips), WER %" for name, count in zip(names, counts, strict=True)]
    headings += (["mean WER %"] if len(names) > 1 else []) + ["RTFx"] + ([f"speed / {peer}"] if peer else [])
    lines = [headings, ["---"] * len(headings)]
    for summary in summaries:
        row = [summary["name"], _millions(summary["num_parameters"])]
        for of_set in summary["sets"]:
            text = _figure(of_set["totals"].get("wer"), "{:.2f}", 100, bounds)
            row.append(text + (f", {len(of_set['failed'])} failed" if of_set["failed"] else ""))
        if len(names) > 1:
            row.append("–" if summary["mean_wer"] is None else f"{100 * summary['mean_wer']:.2f}")
        row.append(_figure(summary["rtfx"], "{:.3g}", 1, bounds))
        if peer:
            row.append("–" if summary["speed_ratio"] is None else f"{summary['speed_ratio']:.2f}")
        lines.append(row)
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines) + "\n"


def _figure(total: dict | None, pattern: str, scale: float, bounds: bool) -> str:
    if total is None:
        return "–"
    text = pattern.format(scale * total["value"])
    if not bounds or total["low"] is None:
        return text
    return f"{text} ({pattern.format(scale * total['low'])}–{pattern.format(scale * total['high'])})"


def _millions(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def card_results(summary: dict, of_set: dict, environment: dict, normalizer: str) -> dict:
    """The figures of one system on one set, in the form that [`create_model_card`] reads as one of its `evaluations`."""
    totals = of_set["totals"]
    metrics = {name: totals[name]["value"] for name in ("wer", "cer", "rtfx") if name in totals}
    notes = [f"Normaliser: {normalizer}. Corpus-level rates over {totals['num_utterances']} clips."]
    if totals.get("wer", {}).get("low") is not None:
        low, high = (100 * totals["wer"][side] for side in ("low", "high"))
        notes.append(f"95 % bootstrap interval of the WER: {low:.2f} to {high:.2f} %.")
    if of_set["failed"]:
        notes.append(f"{len(of_set['failed'])} clips failed and are not counted.")
    return {
        "model": summary["name"],
        "task": "automatic-speech-recognition",
        "metrics": metrics,
        "dataset": of_set["dataset"],
        "config": of_set["config"],
        "split": of_set["split"],
        "num_utterances": totals["num_utterances"],
        "environment": environment,
        "notes": notes,
    }


__all__ = ["asr_table", "card_results", "compare_speed", "summarize_asr"]
