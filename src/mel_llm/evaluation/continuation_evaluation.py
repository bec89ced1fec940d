"""What goes on from a spoken prompt, or answers a spoken question: who does it, and how it is measured.

As SPECTRON was measured (arXiv 2305.15255): log-perplexity of the transcribed continuation, likeness of voice between prompt
and continuation, accuracy of answers. Its reviewers asked for two things that are here too: the word error rate between the
text that is written and the speech that follows it, and the same model without the text.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers.utils import logging

from ..training.continuation import PromptCut
from ..whole_files import write_whole
from .normalizers import get_text_normalizer
from .perplexity import LogPerplexity
from .plugins import describe_callable, fingerprint
from .question_answering import QuestionAnsweringAccuracy, SpokenQuestion
from .recognizers import Recognizer
from .speech_judges import SpeechJudge, _probe, _try, make_judges
from .speech_report import totals_of
from .speech_systems import EVALUATION_RATE, Speech, SpeechSystem
from .utterances import Utterance, load_utterances
from .voices import Voice
from .wer import WordErrorRate


logger = logging.get_logger(__name__)


# --- what is heard --------------------------------------------------------------------------------------------------------


@dataclass
class SpokenPrompt(Utterance):
    r"""A recording whose beginning is the prompt; the recording that others are compared with is what follows.

    Attributes:
        cut ([`PromptCut`]): Where it is cut: in the middle of a range.
    """

    cut: PromptCut = field(default_factory=PromptCut)

    @property
    def recording_key(self) -> str:
        return fingerprint([super().recording_key, str(self.cut)])

    def _parts(self, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
        audio = super().load(sampling_rate)
        place = self.cut.place(len(audio), sampling_rate)
        if place is None:
            raise ValueError(f"{self.id} is too short for a prompt of {self.cut}")
        return audio[:place], audio[place:]

    def load_prompt(self, sampling_rate: int) -> np.ndarray:
        """The beginning, `(samples,)`, float32."""
        return self._parts(sampling_rate)[0]

    def load(self, sampling_rate: int) -> np.ndarray:
        """What follows, `(samples,)`, float32."""
        return self._parts(sampling_rate)[1]


class PromptVoice(Voice):
    """The voice of a prompt, which the speech is compared with."""

    def __init__(self, item: SpokenPrompt | SpokenQuestion):
        super().__init__(item.id, None, "", item.recording_key)
        self.item = item

    def load(self, sampling_rate: int) -> np.ndarray:
        return self.item.load_prompt(sampling_rate)


def load_prompts(place: str, cut: PromptCut, split: str = "validation") -> tuple[list[SpokenPrompt], int]:
    """Recordings to go on with.

    Args:
        place, split: As for [`load_utterances`]; transcripts are not needed.
        cut ([`PromptCut`]): How much of each is the prompt.

    Returns:
        The prompts, and how many recordings were too short.

    Raises:
        ValueError: There are no recordings, or all are too short.
    """
    found = [utterance for utterance in load_utterances(place, split) if utterance.has_recording]
    if not found:
        raise ValueError(f"{place}: continuations need recordings, and there are none.")
    prompts = [SpokenPrompt(item.id, item.text, item.source, item.index, item.seconds, cut) for item in found]
    kept = [prompt for prompt in prompts if cut.range_of(_seconds(prompt)) is not None]
    if not kept:
        raise ValueError(f"{place}: no recording has room for a prompt of {cut} and what follows.")
    return kept, len(found) - len(kept)


def _seconds(prompt: SpokenPrompt) -> float:
    from ..training.report import clip_duration

    return clip_duration(prompt.source[prompt.index])


# --- who goes on ----------------------------------------------------------------------------------------------------------


class ContinuationModel(SpeechSystem):
    """A Mel-LLM that goes on with what it hears, or answers it.

    Args:
        model ([`MelLLMForSpeechContinuation`]), processor ([`MelLLMProcessor`]): The model, with a vocoder.
        name (`str`): In tables.
        description (`str`): Of its weights; see [`describe_folder`].
        task (`str`, defaults to `"continuation"`): Or `"qa"`.
        skip_text (`bool`, defaults to `False`): Let it speak without writing.
        seed (`int`, defaults to 0): Of every row.
        generate_kwargs: For `generate()`: `temperature`, `stop_threshold`, `max_seconds`, `min_seconds`.

    Raises:
        ValueError: It has no vocoder.
    """

    reads_recording = True

    def __init__(
        self,
        model,
        processor,
        name: str,
        description: str = "",
        task: str = "continuation",
        skip_text: bool = False,
        seed: int = 0,
        **generate_kwargs,
    ):
        if getattr(model, "vocoder", None) is None:
            raise ValueError(
                f"--model {name} has no vocoder (`config.vocoder_config` is None), so it makes no waveform."
            )
        self.model, self.processor = model.eval(), processor
        self.name = f"{name}, without text" if skip_text else name
        self.kwargs = {key: value for key, value in generate_kwargs.items() if value is not None}
        self.kwargs.update(task=task, skip_text=skip_text, seed=seed)
        dtype = str(model.dtype).removeprefix("torch.")
        self.settings = {"kind": "continuation", "weights": description, "dtype": dtype, **self.kwargs}
        self.writes = not skip_text

    def make(self, utterances: Sequence, voices: Sequence) -> list[Speech | Exception]:
        try:
            return self._speak(utterances)
        except (ValueError, RuntimeError, OSError) as error:  # one that does not fit must not cost the others
            if len(utterances) == 1:
                return [error]
            return [speech for item in utterances for speech in self.make([item], [None])]

    def _speak(self, items: Sequence) -> list[Speech]:
        rate = self.processor.feature_extractor.sampling_rate
        inputs = self.processor(audio=[item.load_prompt(rate) for item in items]).to(self.model.device)
        started = time.perf_counter()
        output = self.model.generate(**inputs, **self.kwargs)
        audio = [row.float().cpu().numpy() for row in output.audio]
        wall = time.perf_counter() - started
        total = max(1, sum(len(row) for row in audio))
        # All text and, where the model set them apart, what was heard and what follows
        written = self.processor.decode_continuation(output)
        return [
            Speech(
                row,
                self.model.config.sampling_rate,
                wall * len(row) / total,
                bool(output.stopped[index]),
                written[index] if self.writes else None,
            )
            for index, row in enumerate(audio)
        ]


# --- who listens ----------------------------------------------------------------------------------------------------------


def make_continuation_judges(
    items: Sequence, recognizer: Recognizer | None = None, speaker_encoder=None, mos=None
) -> list[SpeechJudge]:
    """The judges of prompts or questions, each tried on a second of sound.

    Raises:
        ValueError: One fails, or returns what it should not.
    """
    judges = make_judges(items, None, speaker_encoder, mos, mel_distance=False)
    if recognizer is None:
        return judges
    _try("recogniser", recognizer, _probe(items), lambda text: isinstance(text, str), "a text")
    description = describe_callable(recognizer)
    heard: dict[str, str] = {}  # a prompt is the same for every system

    def prompt(audio: np.ndarray, item, voice: Voice | None) -> dict:
        key = item.recording_key
        if key not in heard:
            heard[key] = recognizer(item.load_prompt(EVALUATION_RATE), EVALUATION_RATE)
        return {"prompt_transcript": heard[key]}

    writes = isinstance(items[0], SpokenPrompt)
    return [
        SpeechJudge(
            "asr",
            description,
            lambda *_: True,
            lambda *_: "",
            lambda audio, item, voice: {"transcript": recognizer(audio, EVALUATION_RATE)},
        ),
        SpeechJudge(
            "prompt",
            description,
            lambda system, item, voice: writes and getattr(system, "writes", False),
            lambda item, voice: item.recording_key,
            prompt,
        ),
        *judges,
    ]


# --- what came of it ------------------------------------------------------------------------------------------------------


def split_written(text: str, prompt: str, speech: str) -> int:
    """How many words of a text are of the prompt: where a cut makes the least edits between the one part and what was heard in
    the prompt, and the other and what was heard in the speech, together (ours: the texts that a model learns from are not cut).
    """
    words = text.split()
    before = _prefix_edits(words, prompt.split())
    behind = _prefix_edits(words[::-1], speech.split()[::-1])[::-1]
    return int(np.argmin(before + behind))


def _prefix_edits(words: list[str], other: list[str]) -> np.ndarray:
    """Edits between the first 0, 1, ... words and all of the other, `(words + 1,)`."""
    row = list(range(len(words) + 1))
    for place, word in enumerate(other, start=1):
        above, row = row, [place]
        for index, mine in enumerate(words):
            row.append(min(above[index + 1] + 1, row[index] + 1, above[index] + (mine != word)))
    return np.asarray(row)


def summarize_continuations(
    result: dict,
    items: Sequence,
    normalizer: str | Callable[[str], str] = "whisper",
    perplexity: "CachedPerplexity | None" = None,
    seed: int = 0,
    bootstrap_samples: int = 1000,
) -> dict:
    """What [`SpeechEvaluation.run`] gave of one system, with the figures of each prompt or question and totals.

    | total | what |
    |---|---|
    | `nll_per_utterance`, `nll_per_token` | see [`LogPerplexity`]; of speech in which a word was heard |
    | `wordless` | share of speech in which none was |
    | `similarity` | cosine of the speaker embeddings of prompt and speech |
    | `text_speech_wer` | word error rate of the speech, the text being the reference: of what follows the prompt, which is where the model set it apart, or else see [`split_written`] |
    | `text_accuracy`, `speech_accuracy` | see [`QuestionAnsweringAccuracy`]; a question that gave no speech is not answered |
    | `mos_...`, `duration_ratio`, `rtfx`, `guarded` | as in [`summarize_speech`] |

    Args:
        result (`dict`): Of one system.
        items: The prompts or questions.
        normalizer (`str` or `Callable`, defaults to `"whisper"`): For the error rate and for answers.
        perplexity (*optional*): Scores transcripts.
        seed, bootstrap_samples: As for [`bootstrap_interval`].
    """
    normalize = get_text_normalizer(normalizer)
    rows = [dict(row) for row in result["utterances"]]
    parts: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, above: float, below: float = 1.0) -> None:
        parts.setdefault(name, []).append((float(above), float(below)))

    for row in rows:
        for scores in row.pop("scores").values():
            row.update(scores)
    _answers(rows, items, normalizer, add)
    _written_and_said(rows, normalize, add)
    spoken = [row for row in rows if row.get("transcript", "").strip()]
    for row in rows:
        if "transcript" in row:
            add("wordless", not row["transcript"].strip())
    if perplexity is not None:
        for row, (value, tokens) in zip(spoken, perplexity([row["transcript"] for row in spoken]), strict=True):
            row["nll"], row["nll_tokens"] = value, tokens
            add("nll_per_utterance", value)
            add("nll_per_token", value, tokens)
    for row in rows:
        for name in [key for key in row if key == "similarity" or key == "mos" or key.startswith("mos_")]:
            add(name, row[name])
        audio = row.get("audio")
        if audio is None:
            continue
        if row.get("reference_seconds") and result["settings"].get("kind") != "reference":
            add("duration_ratio", audio["seconds"], row["reference_seconds"])
        if audio.get("wall_seconds"):
            add("rtfx", audio["seconds"], audio["wall_seconds"])
        if audio.get("stopped") is not None:
            add("guarded", not audio["stopped"])
    totals = totals_of(parts, seed, bootstrap_samples)
    if "rtfx" in totals:
        totals["rtfx"]["threads"] = sorted({row["audio"]["threads"] for row in rows if row.get("audio")})
    failed = [row["id"] for row in rows if "error" in row or row.get("judge_errors")]
    return {**result, "num_utterances": len(rows), "failed": failed, "totals": totals, "utterances": rows}


def _answers(rows: list[dict], items: Sequence, normalizer, add: Callable) -> None:
    asked = [(row, item) for row, item in zip(rows, items, strict=True) if isinstance(item, SpokenQuestion)]
    if not asked:
        return
    metric, normalize = QuestionAnsweringAccuracy(normalizer=normalizer), get_text_normalizer(normalizer)
    writes = any("written" in row for row, _ in asked)
    listened = any("transcript" in row for row, _ in asked)
    for row, item in asked:
        row["answers"] = item.answers
        written = row.get("written") or {}
        answer = written.get("continuation")
        if answer is None:  # not set apart: what is behind the question, whose own words are no answer
            question, answer = normalize(item.text).strip(), written.get("text", "")
            if question and f"{normalize(answer).strip()} ".startswith(f"{question} "):
                answer = normalize(answer).strip()[len(question) :]
        said = {"text": answer, "speech": row.get("transcript", "")}
        for kind, is_measured in (("text", writes), ("speech", listened)):
            if is_measured:
                row[f"{kind}_correct"] = bool(
                    metric.compute(predictions=[said[kind]], references=[item.answers])["accuracy"]
                )
                add(f"{kind}_accuracy", row[f"{kind}_correct"])


def _written_and_said(rows: list[dict], normalize: Callable[[str], str], add: Callable) -> None:
    """The error rate between the text and the speech of each row that has both."""
    pairs = []
    for row in rows:
        written = row.get("written")
        if written is None or "transcript" not in row:
            continue
        said = normalize(row["transcript"])
        if written["continuation"] is not None:
            expected = normalize(written["continuation"])
        else:
            words = normalize(written["text"])
            place = split_written(words, normalize(row.get("prompt_transcript", "")), said)
            expected = " ".join(words.split()[place:])
        pairs.append((row, expected, said))
    if not any(expected.strip() for _, expected, _ in pairs):
        return  # there is nothing to divide by
    metric = WordErrorRate(normalizer="none")
    details = metric.compute(
        references=[expected for _, expected, _ in pairs], predictions=[said for _, _, said in pairs], details=True
    )["utterances"]
    for (row, expected, said), counts in zip(pairs, details, strict=True):
        row["text_speech_wer"] = counts["wer"]
        row["compared"] = {"text": expected, "transcript": said}
        edits = counts["substitutions"] + counts["deletions"] + counts["insertions"]
        add("text_speech_wer", edits, counts["reference_words"])


class CachedPerplexity:
    """[`LogPerplexity.score`] that keeps its scores in a file, so that an evaluation that is gone on with has them."""

    def __init__(self, metric: LogPerplexity, path: Path):
        self.metric, self.path = metric, path
        self.description = metric.model_description

    def __call__(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        try:
            cache = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            cache = {}
        known = cache.setdefault(self.description, {})
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            known.update(zip(missing, self.metric.score(missing), strict=True))
            write_whole(self.path, json.dumps(cache, ensure_ascii=False) + "\n")
        return [tuple(known[text]) for text in texts]


__all__ = [
    "CachedPerplexity",
    "ContinuationModel",
    "PromptVoice",
    "SpokenPrompt",
    "load_prompts",
    "make_continuation_judges",
    "split_written",
    "summarize_continuations",
]
