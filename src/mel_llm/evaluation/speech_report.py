"""From the scores of utterances to totals with their confidence intervals, and a table."""

from collections.abc import Callable, Sequence

from .bootstrap import bootstrap_interval
from .cer import CharacterErrorRate
from .wer import WordErrorRate


# Name in the results -> heading, format, and what it is multiplied by in the table
_COLUMNS = {
    "text_accuracy": ("answered in text, %", "{:.1f}", 100),
    "speech_accuracy": ("answered in speech, %", "{:.1f}", 100),
    "nll_per_utterance": ("log-perplexity, per utterance", "{:.1f}", 1),
    "nll_per_token": ("per token", "{:.2f}", 1),
    "text_speech_wer": ("WER of speech to its text, %", "{:.1f}", 100),
    "wer": ("WER, %", "{:.1f}", 100),
    "cer": ("CER, %", "{:.1f}", 100),
    "similarity": ("speaker similarity", "{:.3f}", 1),
    "mos": ("MOS", "{:.2f}", 1),
    "mcd": ("MCD, dB", "{:.2f}", 1),
    "mel_l1": ("mel L1", "{:.3f}", 1),
    "duration_ratio": ("duration ratio", "{:.3f}", 1),
    "rtfx": ("× real time", "{:.1f}", 1),
    "guarded": ("ended by a guard, %", "{:.1f}", 100),
    "wordless": ("without a word, %", "{:.1f}", 100),
}


def summarize_speech(
    result: dict, normalizer: str | Callable[[str], str] = "whisper", seed: int = 0, bootstrap_samples: int = 1000
) -> dict:
    """What [`SpeechEvaluation.run`] gave of one system, with the figures of each utterance and totals.

    Totals are ratios of sums over the utterances where both are sums (error rates, durations, speed), else means. Each is
    `{"value", "low", "high", "utterances"}`; the 95 % interval is `None` for a single utterance.

    Args:
        result (`dict`): Of one system.
        normalizer (`str` or `Callable`, defaults to `"whisper"`): For the error rates: see [`get_text_normalizer`].
        seed, bootstrap_samples: As for [`bootstrap_interval`].
    """
    rows = [dict(row) for row in result["utterances"]]
    parts: dict[str, list[tuple[float, float]]] = {}
    _error_rates(rows, normalizer, parts)
    for row in rows:
        scores, audio = row.pop("scores"), row.get("audio")
        row.update(scores.get("asr", {}))
        row.update(scores.get("speaker", {}))
        row.update(scores.get("mos", {}))
        row.update(scores.get("mel", {}))
        for name in (*scores.get("mos", {}), "similarity", "mcd", "mel_l1"):
            if row.get(name) is not None:
                parts.setdefault(name, []).append((row[name], 1.0))
        if audio is None:
            continue
        if row.get("reference_seconds"):
            row["duration_ratio"] = audio["seconds"] / row["reference_seconds"]
            parts.setdefault("duration_ratio", []).append((audio["seconds"], row["reference_seconds"]))
        if audio.get("wall_seconds"):
            row["rtfx"] = audio["seconds"] / audio["wall_seconds"]
            parts.setdefault("rtfx", []).append((audio["seconds"], audio["wall_seconds"]))
        if audio.get("stopped") is not None:
            parts.setdefault("guarded", []).append((float(not audio["stopped"]), 1.0))
    if result["settings"].get("kind") == "reference":
        parts.pop("duration_ratio", None)
    totals = totals_of(parts, seed, bootstrap_samples)
    threads = sorted({row["audio"]["threads"] for row in rows if row.get("audio", {}).get("threads")})
    if "rtfx" in totals:
        totals["rtfx"]["threads"] = threads
    failed = [row["id"] for row in rows if "error" in row or row.get("judge_errors")]
    return {**result, "num_utterances": len(rows), "failed": failed, "totals": totals, "utterances": rows}


def totals_of(parts: dict[str, list[tuple[float, float]]], seed: int = 0, bootstrap_samples: int = 1000) -> dict:
    """Ratios of sums with their intervals, of the numerator and the denominator of each utterance; none where there is
    nothing to divide by."""
    totals = {}
    for name, pairs in parts.items():
        above, below = zip(*pairs, strict=True)
        if not sum(below):
            continue
        interval = bootstrap_interval(above, below, num_samples=bootstrap_samples, seed=seed)
        low, high = interval or (None, None)
        totals[name] = {"value": sum(above) / sum(below), "low": low, "high": high, "utterances": len(pairs)}
    return totals


def _error_rates(rows: Sequence[dict], normalizer, parts: dict) -> None:
    """Adds the rates of each row that was listened to, and its edits and units to `parts`."""
    heard = [row for row in rows if "asr" in row["scores"]]
    for metric in (WordErrorRate(normalizer=normalizer), CharacterErrorRate(normalizer=normalizer)):
        name = metric.short_name
        texts = [row["text"] for row in heard], [row["scores"]["asr"]["transcript"] for row in heard]
        if not any(metric_text.strip() for metric_text in map(_normalizer_of(metric), texts[0])):
            continue  # there is nothing to divide by
        details = metric.compute(references=texts[0], predictions=texts[1], details=True)["utterances"]
        for row, counts in zip(heard, details, strict=True):
            edits = counts["substitutions"] + counts["deletions"] + counts["insertions"]
            units = counts[f"reference_{metric.unit}s"]
            row[name] = counts[name]
            row[f"{name}_counts"] = {
                key: counts[key] for key in ("substitutions", "deletions", "insertions", f"reference_{metric.unit}s")
            }
            if metric.unit == "word":
                row["normalized"] = {"text": counts["reference"], "transcript": counts["prediction"]}
            parts.setdefault(name, []).append((float(edits), float(units)))


def _normalizer_of(metric) -> Callable[[str], str]:
    from .normalizers import get_text_normalizer

    return get_text_normalizer(metric.normalizer)


def speech_table(summaries: Sequence[dict]) -> str:
    """A Markdown table: a line for each system, a column for each figure that one of them has; 95 % intervals behind."""
    present = [name for summary in summaries for name in summary["totals"]]
    names = [name for name in _COLUMNS if name in present and name != "mos"]
    mos = list(dict.fromkeys(name for name in present if name == "mos" or name.startswith("mos_")))
    place = next(
        (index + 1 for index, name in reversed(list(enumerate(names))) if name in ("wer", "cer", "similarity")), 0
    )
    names[place:place] = mos
    threads = sorted(
        {count for summary in summaries for count in summary["totals"].get("rtfx", {}).get("threads", [])}
    )
    headings = []
    for name in names:
        heading = _COLUMNS[name][0] if name in _COLUMNS else f"MOS {name.removeprefix('mos_')}"
        if name == "rtfx" and threads:
            heading += f", {'/'.join(map(str, threads))} thread{'s' if threads != [1] else ''}"
        headings.append(heading)
    lines = [["system", "utterances", *headings], ["---"] * (len(names) + 2)]
    for summary in summaries:
        count = str(summary["num_utterances"])
        if summary["failed"]:
            count += f", {len(summary['failed'])} failed"
        lines.append(
            [summary["name"].replace("|", "\\|"), count, *(_cell(name, summary["totals"].get(name)) for name in names)]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(name: str, total: dict | None) -> str:
    if total is None:
        return "–"
    _, pattern, scale = _COLUMNS.get(name, _COLUMNS["mos"])
    value = pattern.format(scale * total["value"])
    if total["low"] is None:
        return value
    return f"{value} ({pattern.format(scale * total['low'])}–{pattern.format(scale * total['high'])})"


__all__ = ["speech_table", "summarize_speech", "totals_of"]
