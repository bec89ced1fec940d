"""Where the words of a clip are, so that it can be cut between them. Ours."""

import itertools

import numpy as np

from mel_llm.spelling import ctc_bytes

from .corpus import SAMPLING_RATE


# Nats that a letter may cost in the alignment of a clip, and in that of each of its words
_WORST_CLIP, _WORST_WORD = 0.7, 2.0
# Of the window in which loudness is measured where a cut is looked for, and of its steps
_WINDOW_SECONDS, _STEP_SECONDS = 0.016, 0.004


def align_letters(log_probs: np.ndarray, letters: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The likeliest places of letters.

    Args:
        log_probs (`np.ndarray` of shape `(places, 256)`): Of the CTC head; class 0 is the blank.
        letters (`list[int]`): Bytes, 1 to 255.

    Returns:
        The place at which each letter is spelt first, `(letters,)`, and its log-probability there; `None` if they do not fit.
    """
    if not len(log_probs) or not letters:
        return None
    labels = np.zeros(2 * len(letters) + 1, dtype=np.int64)
    labels[1::2] = letters
    skips = np.zeros(len(labels), dtype=bool)  # from one letter to the next, if it is another one, without a blank
    skips[3::2] = labels[3::2] != labels[1:-2:2]
    scores = np.full(len(labels), -np.inf)
    scores[:2] = log_probs[0, labels[:2]]
    steps = np.zeros((len(log_probs), len(labels)), dtype=np.int8)
    for place in range(1, len(log_probs)):
        ways = np.full((3, len(labels)), -np.inf)
        ways[0] = scores
        ways[1, 1:] = scores[:-1]
        ways[2, 2:] = np.where(skips[2:], scores[:-2], -np.inf)
        steps[place] = ways.argmax(0)
        scores = ways.max(0) + log_probs[place, labels]
    state = len(labels) - 1 - int(scores[-2:].argmax() == 0)
    if scores[state] == -np.inf:
        return None
    first = np.zeros(len(letters), dtype=np.int64)
    for place in range(len(log_probs) - 1, -1, -1):
        if state % 2:
            first[state // 2] = place
        state -= int(steps[place, state])
    return first, log_probs[first, letters]


def _quietest(audio: np.ndarray, start: int, end: int) -> int:
    """The sample of `audio` from `start` to `end` around which it is quietest."""
    half, step = round(_WINDOW_SECONDS * SAMPLING_RATE / 2), round(_STEP_SECONDS * SAMPLING_RATE)
    places = range(start, max(end, start + 1), step)
    return min(places, key=lambda place: float(np.square(audio[max(0, place - half) : place + half]).sum()))


def find_cuts(
    audio: np.ndarray, text: str, log_probs: np.ndarray, samples_per_place: float
) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """A clip's words, and the samples between which each is said: one more than there are words.

    A cut is where it is quietest between the last letter of a word and the first one of the next.

    Args:
        audio (`np.ndarray` of shape `(samples,)`), text (`str`): The clip, at 16 kHz, and what is said in it.
        log_probs (`np.ndarray` of shape `(places, 256)`): Of a CTC head, over all of the clip.
        samples_per_place (`float`): Of the clip, that one of those places stands for.

    Returns:
        `None` if the head does not hear the text, or not a word of it.
    """
    words: list[str] = []
    for word in text.split():  # what is not spoken, a dash for instance, belongs to the word before it
        if ctc_bytes(word) or not words:
            words.append(word)
        else:
            words[-1] += f" {word}"
    spelt = [ctc_bytes(word) for word in words]
    letters = [letter for word in spelt for letter in (32, *word)][1:]
    if not letters or not all(spelt) or letters != ctc_bytes(text):
        return None
    aligned = align_letters(log_probs, letters)
    if aligned is None or -aligned[1].mean() > _WORST_CLIP:
        return None
    ends = np.cumsum([len(word) + 1 for word in spelt])  # behind the space behind each word
    starts = [0, *ends[:-1]]
    if any(-aligned[1][start : end - 1].mean() > _WORST_WORD for start, end in zip(starts, ends, strict=True)):
        return None
    samples = (
        np.minimum(np.arange(len(log_probs) + 1) * samples_per_place, len(audio) - 1).round().astype(int).tolist()
    )
    between = [_quietest(audio, samples[aligned[0][end - 2] + 1], samples[aligned[0][end]]) for end in ends[:-1]]
    places = (0, *between, len(audio))
    return (tuple(words), places) if all(a < b for a, b in itertools.pairwise(places)) else None


__all__ = ["align_letters", "find_cuts"]
