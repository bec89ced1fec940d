"""Joint decoding: what the language model would write, weighed against what the CTC head spells.

Ours, after the hybrid CTC/attention decoding of Watanabe et al. (2017, https://doi.org/10.1109/JSTSP.2017.2763455). The
language model stands in the place of the attention decoder. It writes tokens and the head spells letters, so the score of a
token is that of its letters, one after the other. A language model that learnt from little speech goes on with what it has
read; the head cannot, and knows how much of the audio is spelt.
"""

import codecs
import functools
import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import LogitsProcessor


# Tokens that are weighed at each step: the likeliest of the language model, some that spell the beginning of as many
# letters as the head hears next, and the ends of text
_NUM_CANDIDATES = 16
_NUM_HEARD = 12
_LETTERS_HEARD = 8
# All letters are looked at for all places of so many texts in one go: 1.5 MB for each text of 30 s at 25 places a
# second
_ROWS_AT_ONCE = 32
# What a token that the head rules out gets, in nats: a finite number leaves something to choose where all are ruled out
_RULED_OUT = -1e3
# The least that a letter is worth at a place, and what a beginning is worth at most that some letter of has no place
_NO_CHANCE = -1e4
_IMPOSSIBLE = _NO_CHANCE / 2
# A place where everything is so much less likely than at the likeliest, in nats, is done with
_DONE_WITH = 100.0
# Tokens without a letter that may follow each other, as `.`, a space and `"`: the head has nothing against more of them
_MAX_PARTED = 3
_SPACE = ord(" ")


def plain_letters(text: str) -> str:
    """What is spelt of a text: letters, digits and apostrophes, in lower case; a space for each other character."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return "".join(
        letter if letter.isalnum() or letter == "'" or unicodedata.combining(letter) else " " for letter in text
    )


@functools.lru_cache(maxsize=1 << 16)
def _letters_of(data: bytes) -> tuple[bytes, bytes]:
    """The letters of a piece of UTF-8, and the bytes at its end that are only a part of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(data)
    return plain_letters(text).encode(), decoder.getstate()[0]


@functools.lru_cache(maxsize=4)
def _read_tokens(table: bytes, width: int) -> tuple[list[bytes], dict[bytes, list[int]]]:
    """The text of each token, from a table with `width` bytes for each; and letters to the tokens that add them to a text. A
    space ahead counts, behind not; tokens without letters are under `b""`."""
    texts = [table[start : start + width].rstrip(b"\0") for start in range(0, len(table), width)]
    tokens: dict[bytes, list[int]] = {}
    for token, text in enumerate(texts):
        letters, incomplete = _letters_of(text)
        if text and not incomplete:
            tokens.setdefault(letters.rstrip(), []).append(token)
    return texts, tokens


@functools.lru_cache(maxsize=4)
def _read_capitals(table: bytes, width: int) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Tokens that have a capital behind a small letter in them, that begin with a capital, and that end with a small letter."""
    inside, first, last = set(), set(), set()
    for token, data in enumerate(_read_tokens(table, width)[0]):
        text = data.decode(errors="ignore")
        if any(before.islower() and letter.isupper() for before, letter in pairwise(text)):
            inside.add(token)
        if text[:1].isupper():
            first.add(token)
        if text[-1:].islower():
            last.add(token)
    return frozenset(inside), frozenset(first), frozenset(last)


@dataclass
class _Prefixes:
    """Beginnings of texts, `(N,)` of them, and the ways to align them with the audio."""

    spelling: torch.Tensor  # (N, places + 1 - first), log: paths through the first places that end in the last letter
    resting: torch.Tensor  # the same of paths that end in a blank
    score: torch.Tensor  # (N,), log: that what is said begins with these letters
    last: torch.Tensor  # (N,), the last letter; 0 when there is none
    parted: list[int]  # tokens without letters since the last one: with any, a space comes before the next letter
    rest: list[bytes]  # the bytes of a character that is not whole yet
    first: int  # places that all of the texts are past, which the paths leave out

    def take(self, index: Iterable[int]) -> "_Prefixes":
        return _Prefixes.pick([self], index)

    @staticmethod
    def pick(parts: list["_Prefixes"], index: Iterable[int]) -> "_Prefixes":
        """Some of several, which are counted one after the other."""
        index = list(index)
        rows = torch.tensor(index, device=parts[0].score.device)
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])[rows]
            for name in ("spelling", "resting", "score", "last")
        }
        parted = [count for part in parts for count in part.parted]
        rest = [data for part in parts for data in part.rest]
        kept = {"parted": [parted[i] for i in index], "rest": [rest[i] for i in index]}
        return _Prefixes(**tensors, **kept, first=parts[0].first)

    def trimmed(self) -> "_Prefixes":
        """The same without the places that all texts are past: what is spelt next comes behind them."""
        reached = torch.logaddexp(self.spelling, self.resting)
        passed = reached < reached.amax(1, keepdim=True) - _DONE_WITH
        num_passed = int(passed.long().cumprod(1).sum(1).min())
        # A place is left, if nothing more can be spelt in it
        num_passed = max(0, min(num_passed, self.spelling.shape[1] - 2))
        paths = {name: getattr(self, name)[:, num_passed:] for name in ("spelling", "resting")}
        return replace(self, **paths, first=self.first + num_passed)


class CTCPrefixScorer:
    """How likely it is, by the CTC head, that what is said in a clip begins with given letters.

    Args:
        log_probs (`torch.Tensor` of shape `(clips, places, 256)`): Of the letters at each place; class 0 is the blank.
        num_places (`torch.Tensor` of shape `(clips,)`): Places that each clip has.
    """

    def __init__(self, log_probs: torch.Tensor, num_places: torch.Tensor):
        if log_probs.device.type == "mps":  # which has no float64
            log_probs = log_probs.cpu()
        # Sums over hundreds of places, whose differences matter
        log_probs = log_probs.double().clamp(min=_NO_CHANCE)
        num_places = num_places.to(log_probs.device)
        behind = torch.arange(log_probs.shape[1], device=log_probs.device) >= num_places[:, None]
        log_probs = log_probs.masked_fill(behind[..., None], _NO_CHANCE)
        log_probs[..., 0].masked_fill_(behind, 0.0)  # blanks alone behind the end of a clip
        self.log_probs, self.probs = log_probs, log_probs.exp()
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
            rest=[b""] * len(clips),
            first=0,
        )

    def _spell(self, clips: torch.Tensor, prefixes: _Prefixes, letters: torch.Tensor) -> _Prefixes:
        """Each text with one more of the `letters` `(N,)`."""
        # Where a letter may begin: after a blank, or at once if it is another one than the last
        again = (letters == prefixes.last)[:, None]
        before = torch.logaddexp(prefixes.spelling.masked_fill(again, -math.inf), prefixes.resting)
        # spelling[t] = (spelling[t - 1] + before[t - 1]) * p[t], and the like for blanks, as sums over where it began
        first = prefixes.first
        sums = self.sums[clips, first:, letters]
        spelling = sums[:, 1:] + (before - sums)[:, :-1].logcumsumexp(1)
        blanks = self.sums[clips, first:, 0]
        spelling = torch.nn.functional.pad(spelling, (1, 0), value=-math.inf)
        resting = blanks[:, 1:] + (spelling - blanks)[:, :-1].logcumsumexp(1)
        return _Prefixes(
            spelling=spelling,
            resting=torch.nn.functional.pad(resting, (1, 0), value=-math.inf),
            score=(before[:, :-1] + self.log_probs[clips, first:, letters]).logsumexp(1),
            last=letters,
            parted=[0] * len(clips),
            rest=[b""] * len(clips),
            first=first,
        )

    def advance(self, clips: torch.Tensor, prefixes: _Prefixes, parents: list[int], texts: list[bytes]) -> _Prefixes:
        """Beginnings that go on.

        Args:
            clips (`torch.Tensor` of shape `(N,)`), prefixes: The beginnings, and what clips they are of.
            parents (`list[int]`), texts (`list[bytes]`): Which of them each text, `(M,)` of them in UTF-8, goes on with. It
                may end, and so the next one begin, inside a character.
        """
        prefixes = prefixes.trimmed()
        last, parted = prefixes.last.tolist(), [prefixes.parted[parent] for parent in parents]
        spelt, rest = [], []
        for row, (parent, text) in enumerate(zip(parents, texts, strict=True)):
            plain, incomplete = _letters_of(prefixes.rest[parent] + text)
            rest.append(incomplete)
            letters, is_parted = bytearray(), parted[row] > 0
            for letter in plain:
                if letter == _SPACE:
                    is_parted = True
                    continue
                if is_parted and (last[parent] or letters):
                    letters.append(_SPACE)
                is_parted = False
                letters.append(letter)
            if letters:
                parted[row] = int(is_parted)
            elif plain:
                parted[row] += 1
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
        result = _Prefixes.pick(levels, (place[key] for key in spelt))
        result.parted, result.rest = parted, rest
        open_ended = [row for row in range(len(texts)) if parted[row] or rest[row]]
        if open_ended:
            of_clips = clips[[parents[row] for row in open_ended]]
            result.score[open_ended] = self._open_score(of_clips, result.take(open_ended))
        return result

    def _open_score(self, clips: torch.Tensor, prefixes: _Prefixes) -> torch.Tensor:
        """What the score becomes, `(N,)`, behind something that parts words or is a part of a character."""
        # Either a space and another word, or nothing more; at the beginning it says nothing
        spaced = self._spell(clips, prefixes, torch.full_like(prefixes.last, _SPACE))
        started = prefixes.last != 0
        score = torch.where(started, torch.logaddexp(spaced.score, self.ending(prefixes)), prefixes.score)
        for row, rest in enumerate(prefixes.rest):
            if rest:  # or a letter of several bytes, as which the head spells them
                clip, prefix = clips[row : row + 1], prefixes.take([row])
                for letter in (b" " if prefixes.parted[row] and started[row] else b"") + rest:
                    prefix = self._spell(clip, prefix, torch.tensor([letter], device=clips.device))
                score[row] = torch.logaddexp(score[row], prefix.score[0])
        return score

    def continuation(self, clips: torch.Tensor, prefixes: _Prefixes, length: int) -> list[bytes]:
        """For each text the letters that are likeliest next, one after the other."""
        texts: list[bytes] = []
        for part in torch.arange(len(clips), device=clips.device).split(_ROWS_AT_ONCE):
            begun, rows = prefixes.take(part.tolist()), part - part[0]
            probs = self.probs[clips[part], begun.first :]
            letters = []
            for _ in range(length):
                if letters:
                    begun = self._spell(clips[part], begun, letters[-1])
                before = torch.logaddexp(begun.spelling, begun.resting)[:, :-1]
                # Sums of products and not of logarithms, for which there are fast routines; what is too small for them would
                # not be chosen
                largest = before.amax(1, keepdim=True).clamp(min=_NO_CHANCE)
                scores = ((before - largest).exp()[:, None] @ probs)[:, 0]
                again = (begun.resting[:, :-1] - largest).exp()  # as in `_spell`
                scores[rows, begun.last] = (again * probs[rows, :, begun.last]).sum(1)
                scores[:, 0] = -1.0
                letters.append(scores.argmax(1))
            texts += map(bytes, torch.stack(letters, dim=1).tolist())
        return texts

    @staticmethod
    def ending(prefixes: _Prefixes) -> torch.Tensor:
        """How likely it is, `(N,)`, log, that these letters are all that is said."""
        return torch.logaddexp(prefixes.spelling[:, -1], prefixes.resting[:, -1])


class CTCLogitsProcessor(LogitsProcessor):
    """`(1 - weight) * log p(token | text, audio) + weight * log p_CTC(its letters | letters so far, audio)`.

    The likeliest 16 tokens of the language model are weighed, those that spell what the head hears next, and the ends of text;
    no other one can be written. A token without letters costs nothing in the second term, so a model that does not know what
    comes next would write commas in the place of what is said: such a token is for the language model alone to decide, and is
    written only if it is its likeliest. So is one that puts a capital behind a small letter, of which the head cannot tell.

    Args:
        scorer ([`CTCPrefixScorer`]): Of the clips.
        token_bytes (`torch.Tensor` of shape `(vocab_size, width)`, uint8): The text of each token, with 0 behind it.
        weight (`float`): From 0, the language model alone, to 1, the head alone.
        prompt_length (`int`): Tokens before the transcripts.
        eos_token_ids (`list[int]`): Each of them ends a transcript.
        end_ids (`torch.Tensor`): Those, and what a transcript is padded with behind its end.
    """

    def __init__(
        self,
        scorer: CTCPrefixScorer,
        token_bytes: torch.Tensor,
        weight: float,
        prompt_length: int,
        eos_token_ids: list[int],
        end_ids: torch.Tensor,
    ):
        self.scorer = scorer
        table = token_bytes.cpu().numpy()
        data, width = table.tobytes(), table.shape[1]
        self.token_texts, self.tokens_by_letters = _read_tokens(data, width)
        self.without_letters = frozenset(self.tokens_by_letters.get(b"", ()))
        self.capital_inside, self.capital_first, self.small_last = _read_capitals(data, width)
        self.weight = weight
        self.prompt_length = prompt_length
        self.eos_token_ids = torch.tensor(eos_token_ids, dtype=torch.long, device=end_ids.device)
        self.end_ids = end_ids
        # What the last step weighed: (clip, tokens of the transcript) to its place in `prefixes`
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}
        self.prefixes: _Prefixes | None = None

    def _texts_of(self, tokens: Iterable[int]) -> list[bytes]:
        return [self.token_texts[token] for token in tokens]

    def _find(self, clips: torch.Tensor, texts: list[tuple[int, ...]]) -> _Prefixes:
        """The prefixes of transcripts that the last step weighed; of others, from their first token on."""
        places = [self.known.get(key) for key in zip(clips.tolist(), texts, strict=True)]
        if None not in places:
            return self.prefixes.take(places)
        prefixes, every = self.scorer.start(clips), list(range(len(texts)))
        for tokens in zip(*texts, strict=True):
            prefixes = self.scorer.advance(clips, prefixes, every, self._texts_of(tokens))
        return prefixes

    def _heard(self, clips: torch.Tensor, prefixes: _Prefixes, others: torch.Tensor) -> torch.Tensor:
        """Tokens `(N, K)` that spell the beginning of what the head hears next, the longest first; `others` `(N, 1)` where a
        text has fewer of them."""
        found = []
        for row, letters in enumerate(self.scorer.continuation(clips, prefixes, _LETTERS_HEARD)):
            if prefixes.parted[row]:  # by a token that is written already
                letters = letters.lstrip(b" ")
            spelling = dict.fromkeys(letters[:length].rstrip() for length in range(len(letters), 0, -1))
            tokens = [token for part in spelling if part for token in self.tokens_by_letters.get(part, ())]
            found.append(tokens[:_NUM_HEARD])
        heard = others.repeat(1, max(map(len, found)))
        for row, tokens in enumerate(found):
            heard[row, : len(tokens)] = torch.tensor(tokens, dtype=heard.dtype, device=heard.device)
        return heard

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
        heard = self._heard(clips, prefixes, likeliest[:, :1])
        candidates = torch.cat([likeliest, heard, self.eos_token_ids.expand(len(rows), -1)], dim=1)  # (rows, K)
        num_candidates = candidates.shape[1]
        parents = [row for row in range(len(rows)) for _ in range(num_candidates)]
        tokens = candidates.flatten().tolist()
        texts_of_tokens = self._texts_of(tokens)
        longer = self.scorer.advance(clips, prefixes, parents, texts_of_tokens)
        spelt = longer.score - prefixes.score[parents]
        best = likeliest[:, 0].tolist()
        in_word = [bool(text) and text[-1] in self.small_last for text in texts]
        wrong = [
            not text  # special tokens, which are no part of what is said
            or count > _MAX_PARTED
            or (
                token != best[parent]
                and (
                    token in self.without_letters
                    or token in self.capital_inside
                    or (in_word[parent] and token in self.capital_first)
                )
            )
            for token, text, parent, count in zip(tokens, texts_of_tokens, parents, longer.parted, strict=True)
        ]
        spelt = spelt.masked_fill(torch.tensor(wrong, device=device), _RULED_OUT).view(len(rows), -1)
        ending = (self.scorer.ending(prefixes) - prefixes.score)[:, None]
        # A text that does not fit into its clip can only end
        full = (prefixes.score < _IMPOSSIBLE)[:, None]
        spelt, ending = spelt.masked_fill(full, _RULED_OUT), ending.masked_fill(full, 0.0)
        ends = torch.isin(candidates, self.eos_token_ids)
        spelt = torch.where(ends, ending.to(scores.device), spelt.to(scores.device))
        spelt = spelt.clamp(min=_RULED_OUT).to(log_probs.dtype)

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
