"""What is measured of an utterance: every judge by name, with what its score depends on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ..training.statistics import compute_feature_statistics
from .mel_distance import MelDistance
from .mos import MOSPredictor
from .plugins import describe_callable, fingerprint
from .recognizers import Recognizer
from .speaker_similarity import SpeakerEncoder, cosine_similarity
from .speech_systems import EVALUATION_RATE, SpeechSystem
from .utterances import Utterance
from .voices import Voice


# Recordings that the deviations of the mel bins are measured on
_STATISTICS_CLIPS = 500


@dataclass
class SpeechJudge:
    r"""One thing that is measured.

    Attributes:
        name (`str`): `"asr"`, `"speaker"`, `"mos"` or `"mel"`.
        description (`str`): Who measures; a score is taken from an earlier run only if this is the same.
        applies: `(system, utterance, voice) -> bool`.
        key: `(utterance, voice) -> str`: what else the score depends on, beside the sound.
        score: `(audio (samples,) at EVALUATION_RATE, utterance, voice) -> dict` of JSON's types.
    """

    name: str
    description: str
    applies: Callable[[SpeechSystem, Utterance, Voice | None], bool]
    key: Callable[[Utterance, Voice | None], str]
    score: Callable[[np.ndarray, Utterance, Voice | None], dict]


def make_judges(
    utterances: Sequence[Utterance],
    recognizer: Recognizer | None = None,
    speaker_encoder: SpeakerEncoder | None = None,
    mos: MOSPredictor | None = None,
    mel_distance: bool = True,
) -> list[SpeechJudge]:
    """The judges of an evaluation, each tried on a second of sound.

    Raises:
        ValueError: One fails, or returns what it should not.
    """
    probe = _probe(utterances)
    judges = []
    if recognizer is not None:
        _try("recogniser", recognizer, probe, lambda text: isinstance(text, str), "a text")
        judges.append(_asr(recognizer))
    if speaker_encoder is not None:
        _try("speaker encoder", speaker_encoder, probe, lambda vector: np.ndim(vector) == 1, "a vector")
        judges.append(_speaker(speaker_encoder))
    if mos is not None:
        _try("MOS predictor", mos, probe, _is_score, "a number or a dict of numbers")
        judges.append(_mos(mos))
    if mel_distance and any(utterance.has_recording for utterance in utterances):
        judges.append(_mel(utterances))
    return judges


def _probe(utterances: Sequence[Utterance]) -> np.ndarray:
    """A recording, or a second of quiet noise."""
    for utterance in utterances:
        if utterance.has_recording:
            return utterance.load(EVALUATION_RATE)
    return 0.01 * np.random.default_rng(0).standard_normal(EVALUATION_RATE).astype(np.float32)


def _try(what: str, function: Callable, probe: np.ndarray, is_right: Callable, expected: str) -> None:
    """A judge that cannot work is told before hours of synthesis."""
    try:
        result = function(probe, EVALUATION_RATE)
    except Exception as error:
        raise ValueError(f"The {what} {describe_callable(function)} fails: {type(error).__name__}: {error}") from error
    if not is_right(result):
        raise ValueError(
            f"The {what} {describe_callable(function)} must return {expected}, got {type(result).__name__}."
        )


def _is_score(result) -> bool:
    values = result.values() if isinstance(result, dict) else [result]
    return all(isinstance(value, (Real, np.number)) and not isinstance(value, bool) for value in values)


def _asr(recognizer: Recognizer) -> SpeechJudge:
    return SpeechJudge(
        "asr",
        describe_callable(recognizer),
        lambda system, utterance, voice: bool(utterance.text),
        lambda utterance, voice: "",
        lambda audio, utterance, voice: {"transcript": recognizer(audio, EVALUATION_RATE)},
    )


def _speaker(encoder: SpeakerEncoder) -> SpeechJudge:
    embeddings: dict[str, np.ndarray] = {}  # of a voice that many texts are spoken in, once

    def key(utterance: Utterance, voice: Voice | None) -> str:
        return utterance.recording_key if voice is None else voice.key

    def score(audio: np.ndarray, utterance: Utterance, voice: Voice | None) -> dict:
        place = key(utterance, voice)
        if place not in embeddings:
            target = utterance if voice is None else voice
            embeddings[place] = encoder(target.load(EVALUATION_RATE), EVALUATION_RATE)
        similarity = cosine_similarity(encoder(audio, EVALUATION_RATE), embeddings[place])
        return {"similarity": similarity, "to": utterance.id if voice is None else voice.name}

    def applies(system: SpeechSystem, utterance: Utterance, voice: Voice | None) -> bool:
        if voice is not None:
            return not (system.is_reference and voice.source is utterance)
        return utterance.has_recording and not system.is_reference

    return SpeechJudge("speaker", describe_callable(encoder), applies, key, score)


def _mos(predictor: MOSPredictor) -> SpeechJudge:
    def score(audio: np.ndarray, utterance: Utterance, voice: Voice | None) -> dict:
        result = predictor(audio, EVALUATION_RATE)
        named = {f"mos_{key}": value for key, value in result.items()} if isinstance(result, dict) else {"mos": result}
        scores = {key: float(value) for key, value in named.items()}
        if not all(math.isfinite(value) for value in scores.values()):
            raise ValueError(f"the score is not finite: {scores}")
        return scores

    return SpeechJudge("mos", describe_callable(predictor), lambda *_: True, lambda *_: "", score)


def _mel(utterances: Sequence[Utterance]) -> SpeechJudge:
    extractor = MelDistance.new_extractor()
    recorded = [utterance for utterance in utterances if utterance.has_recording]
    recorded = recorded[:: -(-len(recorded) // _STATISTICS_CLIPS)]  # spread over all
    features = (
        extractor(utterance.load(EVALUATION_RATE), sampling_rate=EVALUATION_RATE)["input_features"][0]
        for utterance in recorded
    )
    _, std = compute_feature_statistics(features, min_std=0.1)  # as for vocoders: of a bin that hardly changes
    distance = MelDistance(std)
    return SpeechJudge(
        "mel",
        f"MCD over cepstra 1 to 13 of 80 log-mel bins and mel L1 in deviations, warped {fingerprint(std.tolist())}",
        lambda system, utterance, voice: utterance.has_recording and not system.is_reference,
        lambda utterance, voice: utterance.recording_key,
        lambda audio, utterance, voice: distance(audio, utterance.load(EVALUATION_RATE)),
    )


__all__ = ["SpeechJudge", "make_judges"]
