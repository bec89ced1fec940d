"""Batches by a budget of tokens instead of a number of clips: as many clips as fit, of similar length (ours).

What the language model computes on is what counts: the audio tokens, the prompt around them and the text. A budget keeps
memory and the work of a step even where clips are of very different lengths, and no step waits for one with more to do.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

import numpy as np

from ..configuration_mel_llm import MelLLMConfig
from ..processing_mel_llm import MelLLMProcessor
from .sampler import SpeechSampler


class TokenCounter:
    r"""How many tokens of the language model a clip takes in training.

    Args:
        processor: Its feature extractor and tokenizer count.
        config: The model's, with the prompts and the reduction factor.
        slowest (`float`, defaults to 1.0): The smallest factor of speed perturbation: clips may become so much longer.
        packed (`Collection[str]`, defaults to none): Tasks whose batches are one row, without padding.
    """

    def __init__(
        self, processor: MelLLMProcessor, config: MelLLMConfig, slowest: float = 1.0, packed: Collection[str] = ()
    ):
        self.processor = processor
        self.extractor, self.tokenizer = processor.feature_extractor, processor.tokenizer
        self.audio_config, self.slowest, self.packed = config.audio_config, min(1.0, slowest), frozenset(packed)
        # Beside the transcript its end and, in padded batches, the place that the model keeps for one; beside a text to
        # speak the place where speech begins
        self.prompts = {
            "asr": len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids) + (1 if "asr" in packed else 2),
            "tts": len(config.speech_prefix_ids) + len(config.speech_suffix_ids) + 1,
        }
        self._asking: dict[str, int] = {}

    def audio(self, seconds: Sequence[float], task: str = "asr") -> np.ndarray:
        """Audio tokens of clips that are so many seconds long, `(clips,)`; of speech to be written, patches."""
        slowest = self.slowest if task == "asr" else 1.0  # what is to be spoken is not changed
        samples = np.ceil(np.asarray(seconds, dtype=np.float64) / slowest * self.extractor.sampling_rate)
        return self.audio_config.num_audio_tokens(self.extractor.num_frames(samples.astype(np.int64)))

    def text(
        self, texts: Sequence[str], task: str = "asr", instructions: Sequence[str | None] | None = None
    ) -> np.ndarray:
        """Tokens of the texts with the prompt of the task around them, `(clips,)`; with what is asked instead, where there
        are `instructions`."""
        counts = [
            len(ids)
            for start in range(0, len(texts), 10_000)
            for ids in self.tokenizer(list(texts[start : start + 10_000]), add_special_tokens=False)["input_ids"]
        ]
        prompts = [self.prompts[task] if asked is None else self._asked(asked) for asked in instructions or [None]]
        return np.asarray(counts, dtype=np.int64) + np.asarray(prompts, dtype=np.int64)

    def _asked(self, instruction: str) -> int:
        """Tokens of a chat about a clip, but for its audio and the answer's own."""
        if instruction not in self._asking:
            # What is behind the answer's end, such as the end of a line, is not packed
            behind = 1 if "asr" in self.packed else 1 + self._closing
            self._asking[instruction] = sum(map(len, self.processor.prompt_ids(instruction))) + behind
        return self._asking[instruction]

    @functools.cached_property
    def _closing(self) -> int:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        labels = self.processor.apply_chat_template(chat, output_labels=True)["labels"][0]
        return len(labels) - 1 - int((labels != -100).nonzero()[-1])


def batch_tokens(audio: Sequence[int], text: Sequence[int], packed: bool = False) -> int:
    """The tokens that a batch of clips with so many audio and text tokens computes on: all of its padded rectangle, whose
    audio and text are padded each for itself, or, packed, just its clips' own."""
    if packed:
        return int(sum(audio) + sum(text))
    return len(audio) * int(max(audio) + max(text))


class TokenBudgetSampler(SpeechSampler):
    r"""Yields lists of `(epoch, index)`, the batches of one process, for `DataLoader(batch_sampler=...)`.

    Each batch has as many clips, of one kind and of similar length, as the budget allows. Which ones, and in which order,
    is a function of the seed and the epoch alone. Every process gets the same number of batches in every epoch, and the
    processes' batches of a step are of one kind; to come out even, some batches are halved. A clip that is beyond the
    budget gets a batch of its own: `scripts/train.py` refuses such clips before training.

    Args:
        audio_tokens, text_tokens (`Sequence[int]`): Of each clip; the text's with the prompt. See [`TokenCounter`].
        max_tokens (`int`): The budget of a batch.
        sizes, weights, seed, kinds: As for [`SpeechSampler`]. Where sources are weighted, epochs draw differently; one that
            needs more batches than the first one leaves the surplus out.
        packed (`Collection`, defaults to none): Kinds whose batches are one row without padding; `[None]` without `kinds`.
        world_size (`int`, defaults to 1), rank (`int`, defaults to 0): Processes, and which one this is.
        partners (*optional*): Called with the epoch; which clips go in front of others in it, as
            [`SpeechDataset.partners`] says.

    Raises:
        ValueError: As [`SpeechSampler`]; or the budget is no positive number.
    """

    ATTEMPTS = 8

    def __init__(
        self,
        audio_tokens: Sequence[int],
        text_tokens: Sequence[int],
        max_tokens: int,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        kinds: Sequence[Hashable] | None = None,
        packed: Collection[Hashable] = (),
        world_size: int = 1,
        rank: int = 0,
        partners: Callable[[int], dict[int, int]] | None = None,
    ):
        self.audio, self.text = np.asarray(audio_tokens, dtype=np.int64), np.asarray(text_tokens, dtype=np.int64)
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
        super().__init__(self.audio + self.text, sizes, weights, 1 if kinds is not None else None, seed, kinds)
        names = [None] if kinds is None else list(dict.fromkeys(kinds))
        self.is_packed = [name in packed for name in names]
        self.max_tokens, self.world_size, self.rank, self.partners = max_tokens, world_size, rank, partners
        # Counted in the first epoch, with a little room for others where they draw differently
        room = 1.05 if self.is_weighted or partners is not None else 1.02
        self.num_steps = []
        order = np.random.default_rng([seed, 0]).permutation(self._draw())
        audio, text = self._tokens_of(0)
        for kind in range(self.num_kinds):
            own = order[self.kind_of[order] == kind]
            fewest = len(self._sorted(own, audio, text, kind))
            first = len(self._fit(self._in_waves(own, audio, text, fewest), audio, text, kind))
            self.num_steps.append(-(-max(fewest, int(room * first)) // world_size) if len(own) else 0)

    def __len__(self) -> int:
        return sum(self.num_steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([[(self.epoch, int(i)) for i in step[self.rank]] for step in self.steps()])

    def steps(self) -> list[list[np.ndarray]]:
        """The batches of all processes, step by step, in this epoch."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self._draw())
        audio, text = self._tokens_of(self.epoch)
        first, steps = [], []
        for kind, count in enumerate(self.num_steps):
            own = order[self.kind_of[order] == kind]
            if count == 0:
                continue
            batches = self._batches(own, audio, text, kind, count * self.world_size, random)
            grouped = [batches[i : i + self.world_size] for i in range(0, len(batches), self.world_size)]
            if self.epoch == 0:  # memory that does not suffice is to be told at the first step
                longest = max(range(count), key=lambda i: max((audio + text)[batch].max() for batch in grouped[i]))
                first.append(grouped.pop(longest))
            steps += grouped
        return [*first, *(steps[i] for i in random.permutation(len(steps)))]

    def _tokens_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        pairs = {} if self.partners is None else self.partners(epoch)
        if not pairs:
            return self.audio, self.text
        audio, text = self.audio.copy(), self.text.copy()
        behind, front = np.array(list(pairs)), np.array(list(pairs.values()))
        audio[behind] += self.audio[front]
        text[behind] += self.text[front]
        return audio, text

    def _batches(self, own, audio, text, kind: int, count: int, random: np.random.Generator) -> list[np.ndarray]:
        """Exactly `count` batches of these clips."""
        fewest = len(self._sorted(own, audio, text, kind))
        for _ in range(self.ATTEMPTS):
            batches = self._fit(self._in_waves(own, audio, text, fewest), audio, text, kind)
            if len(batches) <= count:
                break
            own = random.permutation(own)
        else:
            batches = self._sorted(own, audio, text, kind)
        if len(batches) > count:  # possible only where this epoch has other clips than the first one
            kept = np.sort(random.permutation(len(batches))[:count])
            batches = [batches[i] for i in kept]
        while len(batches) < count:
            most = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[most]
            if len(batch) == 1:  # fewer clips than processes: some see the same
                batches += [batches[i % len(batches)] for i in range(count - len(batches))]
                break
            batches[most : most + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        return batches

    def _sorted(self, own, audio, text, kind: int) -> list[np.ndarray]:
        return self._fit(own[np.lexsort((text[own], audio[own]))], audio, text, kind)

    def _in_waves(self, own, audio, text, num_batches: int) -> np.ndarray:
        """Stretches of random clips, sorted by length up and down in turn: no batch has the ends of two stretches in it."""
        size = max(1, self.MEGA_BATCH * len(own) // max(1, num_batches))
        stretches = [own[start : start + size] for start in range(0, len(own), size)]
        ordered = [part[np.lexsort((text[part], audio[part]))] for part in stretches]
        return (
            np.concatenate([part[::-1] if i % 2 == 0 else part for i, part in enumerate(ordered)]) if ordered else own
        )

    def _fit(self, order, audio, text, kind: int) -> list[np.ndarray]:
        """Cuts an order into batches, each as long as the budget allows."""
        packed = self.is_packed[kind]
        batches, start, total, most_audio, most_text = [], 0, 0, 0, 0
        for place, (a, t) in enumerate(zip(audio[order].tolist(), text[order].tolist(), strict=True)):
            total, most_audio, most_text = total + a + t, max(most_audio, a), max(most_text, t)
            size = total if packed else (place + 1 - start) * (most_audio + most_text)
            if size > self.max_tokens and place > start:
                batches.append(order[start:place])
                start, total, most_audio, most_text = place, a + t, a, t
        if start < len(order):
            batches.append(order[start:])
        return batches


__all__ = ["TokenBudgetSampler", "TokenCounter", "batch_tokens"]
