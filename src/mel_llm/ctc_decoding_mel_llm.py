"""Joint decoding: what the language model would write, weighed against what the CTC head spells.

Ours, after the hybrid CTC/attention decoding of Watanabe et al. (2017, https://doi.org/10.1109/JSTSP.2017.2763455). The
language model stands in the place of the attention decoder. It writes tokens and the head spells letters, so the score of a
token is that of its letters, one after the other. A language model that learnt from little speech goes on with what it has
read; the head cannot, and knows how much of the audio is spelt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from transformers import LogitsProcessor


# Tokens that are weighed at each step: the likeliest of the language model, and the ends of text
_NUM_CANDIDATES = 40
# What a token that the head rules out gets, in nats: a finite number leaves something to choose where all are ruled out
_RULED_OUT = -1e3
# Tokens without a letter that may follow each other, as in `."` and ` "`: the head has nothing against more of them
_MAX_PARTED = 2
_SPACE = ord(" ")


@dataclass
class _Prefixes:
    """Beginnings of texts, `(N,)` of them, and the ways to align them with the audio."""

    spelling: torch.Tensor  # (N, places + 1), log: paths through the first places that end in the last letter
    resting: torch.Tensor  # the same of paths that end in a blank
    score: torch.Tensor  # (N,), log: that what is said begins with these letters
    last: torch.Tensor  # (N,), the last letter; 0 when there is none
    parted: list[int]  # tokens without letters since the last one: with any, a space comes before the next letter

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "parted"}

    def take(self, index: Iterable[int]) -> "_Prefixes":
        index = list(index)
        rows = torch.tensor(index, device=self.score.device)
        taken = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return _Prefixes(**taken, parted=[self.parted[i] for i in index])

    @staticmethod
    def join(parts: list["_Prefixes"]) -> "_Prefixes":
        tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
        return _Prefixes(**tensors, parted=[count for part in parts for count in part.parted])


class CTCPrefixScorer:
    """How likely it is, by the CTC head, that what is said in a clip begins with given letters.

    Args:
        log_probs (`torch.Tensor` of shape `(clips, places, 256)`): Of the letters at each place; class 0 is the blank.
        num_places (`torch.Tensor` of shape `(clips,)`): Places that each clip has.
    """

    def __init__(self, log_probs: torch.Tensor, num_places: torch.Tensor):
        # Sums over hundreds of places, whose differences matter
        log_probs = log_probs.double().clamp(min=-1e4)
        behind = torch.arange(log_probs.shape[1], device=log_probs.device) >= num_places[:, None]
        log_probs = log_probs.masked_fill(behind[..., None], _RULED_OUT)
        log_probs[..., 0].masked_fill_(behind, 0.0)  # blanks alone behind the end of a clip
        self.log_probs = log_probs
        # sums[:, t] is that of the first t places
        self.sums = torch.nn.functional.pad(log_probs.cumsum(1), (0, 0, 1, 0))

    def start(self, clips: torch.Tensor) -> _Prefixes:
        """Texts with no letter yet of the `clips`, `(N,)`."""
        resting = self.sums[clips, :, 0]
        return _Prefixes(
            spelling=torch.full_like(resting, -math.inf),
            resting=resting,
            score=torch.zeros_like(resting[:, 0]),
            last=torch.zeros_like(clips),
            parted=[0] * len(clips),
        )

    def _spell(self, clips: torch.Tensor, prefixes: _Prefixes, letters: torch.Tensor) -> _Prefixes:
        """Each text with one more of the `letters` `(N,)`."""
        # Where a letter may begin: after a blank, or at once if it is another one than the last
        again = (letters == prefixes.last)[:, None]
        before = torch.logaddexp(prefixes.spelling.masked_fill(again, -math.inf), prefixes.resting)
        # spelling[t] = (spelling[t - 1] + before[t - 1]) * p[t], and the like for blanks, as sums over where it began
        sums = self.sums[clips, :, letters]
        spelling = sums[:, 1:] + (before - sums)[:, :-1].logcumsumexp(1)
        blanks = self.sums[clips, :, 0]
        spelling = torch.nn.functional.pad(spelling, (1, 0), value=-math.inf)
        resting = blanks[:, 1:] + (spelling - blanks)[:, :-1].logcumsumexp(1)
        return _Prefixes(
            spelling=spelling,
            resting=torch.nn.functional.pad(resting, (1, 0), value=-math.inf),
            score=(before[:, :-1] + self.log_probs[clips, :, letters]).logsumexp(1),
            last=letters,
            parted=[0] * len(clips),
        )

    def advance(self, clips: torch.Tensor, prefixes: _Prefixes, parents: list[int], texts: list[bytes]) -> _Prefixes:
        """Beginnings with more letters, a space in them standing for anything that parts words.

        Args:
            clips (`torch.Tensor` of shape `(N,)`), prefixes: The beginnings, and what clips they are of.
            parents (`list[int]`), texts (`list[bytes]`): Which of them each text, `(M,)` of them, goes on with.
        """
        last, parted = prefixes.last.tolist(), [prefixes.parted[parent] for parent in parents]
        spelt = []
        for row, (parent, text) in enumerate(zip(parents, texts, strict=True)):
            letters = bytearray()
            for letter in text:
                if letter == _SPACE:
                    parted[row] += 1
                    continue
                if parted[row] and (last[parent] or letters):
                    letters.append(_SPACE)
                parted[row] = 0
                letters.append(letter)
            spelt.append((parent, bytes(letters)))
        # Letter by letter, and what several texts begin with once
        place = {(parent, b""): parent for parent in range(len(clips))}
        levels, clips_of_level, start = [prefixes], clips, 0
        for length in range(1, max((len(letters) for _, letters in spelt), default=0) + 1):
            wanted = sorted({(parent, letters[:length]) for parent, letters in spelt if len(letters) >= length})
            before = [place[parent, letters[:-1]] - start for parent, letters in wanted]
            start += len(levels[-1].parted)
            place |= {key: start + i for i, key in enumerate(wanted)}
            clips_of_level = clips_of_level[before]
            letters = torch.tensor([letters[-1] for _, letters in wanted], device=clips.device)
            levels.append(self._spell(clips_of_level, levels[-1].take(before), letters))
        result = _Prefixes.join(levels).take(place[key] for key in spelt)
        result.parted = parted
        # Behind what parts words there is a space and another word, or nothing more
        open_ended = [row for row, letter in enumerate(result.last.tolist()) if parted[row] and letter]
        if open_ended:
            before = result.take(open_ended)
            spaced = self._spell(
                clips[[parents[row] for row in open_ended]], before, torch.full_like(before.last, _SPACE)
            )
            result.score[open_ended] = torch.logaddexp(spaced.score, self.ending(before))
        return result

    @staticmethod
    def ending(prefixes: _Prefixes) -> torch.Tensor:
        """How likely it is, `(N,)`, log, that these letters are all that is said."""
        return torch.logaddexp(prefixes.spelling[:, -1], prefixes.resting[:, -1])


class CTCLogitsProcessor(LogitsProcessor):
    """`(1 - weight) * log p(token | text, audio) + weight * log p_CTC(its letters | letters so far, audio)`.

    The likeliest 40 tokens of the language model are weighed, and the ends of text; no other one can be written.

    Args:
        scorer ([`CTCPrefixScorer`]): Of the clips.
        letters (`torch.Tensor` of shape `(vocab_size, width)`, uint8): Of each token, with 0 behind them.
        weight (`float`): From 0, the language model alone, to 1, the head alone.
        prompt_length (`int`): Tokens before the transcripts.
        eos_token_ids (`list[int]`): Each of them ends a transcript.
        end_ids (`torch.Tensor`): Those, and what a transcript is padded with behind its end.
    """

    def __init__(
        self,
        scorer: CTCPrefixScorer,
        letters: torch.Tensor,
        weight: float,
        prompt_length: int,
        eos_token_ids: list[int],
        end_ids: torch.Tensor,
    ):
        self.scorer = scorer
        self.letters = letters.cpu().numpy()
        self.weight = weight
        self.prompt_length = prompt_length
        self.eos_token_ids = torch.tensor(eos_token_ids, dtype=torch.long, device=end_ids.device)
        self.end_ids = end_ids
        # What the last step weighed: (clip, tokens of the transcript) to its place in `prefixes`
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}
        self.prefixes: _Prefixes | None = None

    def _letters_of(self, tokens: list[int]) -> list[bytes]:
        return [self.letters[token].tobytes().rstrip(b"\0") for token in tokens]

    def _find(self, clips: torch.Tensor, texts: list[tuple[int, ...]]) -> _Prefixes:
        """The prefixes of transcripts that the last step weighed; of others, from their first token on."""
        places = [self.known.get(key) for key in zip(clips.tolist(), texts, strict=True)]
        if self.prefixes is not None and None not in places:
            return self.prefixes.take(places)
        spelt = [b"".join(self._letters_of(text)) for text in texts]
        return self.scorer.advance(clips, self.scorer.start(clips), list(range(len(texts))), spelt)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        num_clips, num_rows = len(self.scorer.log_probs), len(input_ids)
        has_ended = (
            torch.isin(input_ids[:, -1], self.end_ids)
            if input_ids.shape[1] > self.prompt_length
            else torch.zeros(num_rows, dtype=torch.bool, device=input_ids.device)
        )
        rows = torch.where(~has_ended)[0]
        if len(rows) == 0:
            return scores
        device = self.scorer.log_probs.device
        clips = (rows // (num_rows // num_clips)).to(device)
        texts = [tuple(text) for text in input_ids[rows, self.prompt_length :].tolist()]
        prefixes = self._find(clips, texts)

        log_probs = scores[rows].log_softmax(-1)
        likeliest = log_probs.topk(min(_NUM_CANDIDATES, log_probs.shape[-1]))[1]
        candidates = torch.cat([likeliest, self.eos_token_ids.expand(len(rows), -1)], dim=1)  # (rows, K)
        num_candidates = candidates.shape[1]
        parents = [row for row in range(len(rows)) for _ in range(num_candidates)]
        tokens = candidates.flatten().tolist()
        letters = self._letters_of(tokens)
        longer = self.scorer.advance(clips, prefixes, parents, letters)
        spelt = longer.score - prefixes.score[parents]
        # Special tokens spell nothing, not even a space
        wrong = [not text or count > _MAX_PARTED for text, count in zip(letters, longer.parted, strict=True)]
        spelt = spelt.masked_fill(torch.tensor(wrong, device=device), _RULED_OUT)
        spelt = spelt.to(scores.device).view_as(candidates)
        ends = torch.isin(candidates, self.eos_token_ids)
        ending = (self.scorer.ending(prefixes) - prefixes.score).to(scores.device)
        spelt = torch.where(ends, ending[:, None], spelt).clamp(min=_RULED_OUT).to(log_probs.dtype)

        self.prefixes = longer
        self.known = {
            (clip, (*texts[place // num_candidates], token)): place
            for place, (clip, token) in enumerate(zip(clips[parents].tolist(), tokens, strict=True))
        }
        written = log_probs.gather(1, candidates)
        weighed = (1 - self.weight) * written + self.weight * spelt
        weighed = weighed.masked_fill(written == -math.inf, -math.inf)  # what may not be written, at any weight
        scores = scores.clone()
        scores[rows] = torch.full_like(log_probs, -math.inf).scatter(1, candidates, weighed)
        return scores


__all__ = ["CTCLogitsProcessor", "CTCPrefixScorer"]
