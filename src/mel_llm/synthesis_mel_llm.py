"""Texts of any length to speech: sentence by sentence, in one voice, with memory that does not grow with the text.

Everything here is ours.
"""

import re
from collections.abc import Callable, Iterator

import torch

from .speech_generation_mel_llm import MAX_TEXT_TOKENS, _SpeechOptions


# Behind the end of a sentence, with what closes it; or behind a blank line
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[」』”]*\s*|\n\s*\n")
# Where a sentence that is too long is cut, the best place first
_CLAUSE_ENDS = (r"[;:—–]\s*", r"[,，、]\s*", r"\s+")
_SHORT_CHARS = 12
PAUSE_SECONDS = 0.15
# What a voice is taken from when there is no recording of it: no more than that of the first sentences
_MAX_VOICE_SECONDS = 10.0
# Of a language model's free positions, what a sentence may take, so that its speech has the others
_TEXT_SHARE = 0.25
_LEAST_TEXT_TOKENS = 16


def split_sentences(text: str, max_chars: int = 200) -> list[str]:
    """Sentences, none longer than `max_chars` characters: longer ones are cut at clauses, then at words.

    Short ones are joined with their neighbour as long as they fit, since a word on its own is hardly spoken well.

    Raises:
        ValueError: There is nothing to be spoken, `text` is no string, or `max_chars` is less than 20.
    """
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {type(text).__name__}.")
    if not isinstance(max_chars, int) or max_chars < 20:
        raise ValueError(f"`max_chars` must be a whole number of at least 20, got {max_chars!r}.")
    pieces: list[str] = []
    start = 0
    for match in [*_SENTENCE_END.finditer(text), None]:
        sentence = " ".join(text[start : None if match is None else match.end()].split())
        start = 0 if match is None else match.end()
        if sentence:
            pieces += _cut(sentence, max_chars)
    joined: list[str] = []
    for piece in pieces:
        if joined and len(joined[-1]) < _SHORT_CHARS and len(joined[-1]) + len(piece) < max_chars:
            joined[-1] = f"{joined[-1]} {piece}"
        else:
            joined.append(piece)
    if not any(character.isalnum() for piece in joined for character in piece):
        raise ValueError("`text` has no word to be spoken.")
    return [piece for piece in joined if any(character.isalnum() for character in piece)]


def _cut(sentence: str, max_chars: int) -> list[str]:
    pieces, start = [], 0
    while len(sentence) - start > max_chars:
        window = sentence[
            start : start + max_chars + 1
        ]  # never the whole rest: that would take the square of the length
        place = max_chars
        for pattern in _CLAUSE_ENDS:
            ends = [match.end() for match in re.finditer(pattern, window)]
            ends = [end for end in ends if max_chars // 3 <= end <= max_chars]
            if ends:
                place = ends[-1]
                break
        pieces.append(window[:place].strip())
        start += place
        while start < len(sentence) and sentence[start].isspace():
            start += 1
    return [*pieces, sentence[start:]] if start < len(sentence) else pieces


class _PassOn:
    """A streamer for one of several sentences: hands samples on, but not that there are no more."""

    def __init__(self, streamer):
        self.put = streamer.put

    def end(self) -> None:
        pass


def iter_speech(
    model,
    processor,
    text: str,
    *,
    voice=None,
    voice_text: str | None = None,
    max_chars: int = 200,
    seed: int | None = None,
    streamer=None,
    on_sentence: Callable[[str, object], None] | None = None,
    **generate_kwargs,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Speaks a text of any length and gives out each sentence when it is spoken.

    Args:
        model ([`MelLLMForTextToSpeech`]), processor ([`MelLLMProcessor`]): A checkpoint that speaks.
        text (`str`): What to speak. Characters that cannot be spoken are left out, with a warning.
        voice, voice_text (*optional*): A recording and what is said in it, as for
            [`MelLLMProcessor.apply_speech_request`]. Without, the first sentence's voice is kept for the others, unless the
            model's `speech_config.keep_voice` is off.
        max_chars (`int`, defaults to 200): Longest piece in characters. It is cut again where the language model has
            no room for so many tokens and their speech.
        seed (`int`, *optional*): Makes the speech repeatable.
        streamer (*optional*): Gets the same samples piece by piece as they are made, pauses included: `put((samples,))`,
            and `end()` behind the last sentence.
        on_sentence (*optional*): Called with each sentence and its [`MelLLMSpeechGenerationOutput`], for the log-mel
            frames and for whether the model ended it by itself.
        generate_kwargs: For `generate()`: `temperature`, `stop_threshold`, ...; `max_seconds` is for each sentence.

    Returns:
        Iterator of the sentence and its waveform `(samples,)`, float32 on the CPU, a short pause behind it.

    Raises:
        ValueError: There is nothing to speak, the model has no vocoder, the voice leaves no room for text, or an argument
            is out of range. All of these come before anything is spoken.
    """
    sentences = split_sentences(processor.clean_speech_text(text), max_chars)
    if getattr(model, "vocoder", None) is None:
        raise ValueError("This model has no vocoder (`config.vocoder_config` is None), so it makes no waveform.")
    seed = _SpeechOptions.take({**generate_kwargs, "seed": seed}).seeds(1)[0]
    kept: tuple[str, torch.Tensor] | None = None  # what is said in the voice, and its frames (frames, num_mel_bins)
    if voice is not None or voice_text is not None:
        request = processor.apply_speech_request(sentences[0], voice=voice, voice_text=voice_text)
        kept = (processor.clean_speech_text(voice_text, "voice_text").strip(), request["voice_features"][0])
        if _room_for_text(model, processor, kept) < _LEAST_TEXT_TOKENS:
            raise ValueError(
                "`voice` and `voice_text` leave the language model no room for a sentence. Take a shorter one."
            )
    keeps_first = kept is None and model.config.speech_config.keep_voice
    frame_rate = model.config.audio_config.frame_rate
    pause = torch.zeros(round(PAUSE_SECONDS * model.config.sampling_rate))
    if streamer is not None:
        generate_kwargs["streamer"] = _PassOn(streamer)

    def spoken() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal kept
        waiting, number = sentences[::-1], 0
        while waiting:
            sentence = waiting.pop()
            if len(sentence) > 20 and _num_tokens(processor, sentence) > _room_for_text(model, processor, kept):
                waiting += split_sentences(sentence, max(20, len(sentence) // 2))[::-1]
                continue
            inputs = processor.apply_speech_request(sentence if kept is None else f"{kept[0]} {sentence}")
            if kept is not None:
                inputs["voice_features"] = kept[1][None]
            output = model.generate(
                **inputs.to(model.device),
                seed=(seed + number) % (1 << 63),
                return_dict_in_generate=True,
                **generate_kwargs,
            )
            number += 1
            frames = output.spectrogram[0]
            if keeps_first and kept is None and output.stopped[0] and len(frames) <= _MAX_VOICE_SECONDS * frame_rate:
                candidate = (sentence, frames)
                if (
                    len(frames) >= model.speech_head.reduction_factor
                    and _room_for_text(model, processor, candidate) >= _LEAST_TEXT_TOKENS
                ):
                    kept = candidate
            if on_sentence is not None:
                on_sentence(sentence, output)
            if streamer is not None:
                streamer.put(pause.clone())
            yield sentence, torch.cat([output.audio[0].cpu(), pause])
        if streamer is not None:
            streamer.end()

    return spoken()


def _num_tokens(processor, text: str) -> int:
    return processor.apply_speech_request(text)["input_ids"].shape[1]


def _room_for_text(model, processor, voice: tuple[str, torch.Tensor] | None) -> int:
    """How many tokens a sentence may have, so that it and its speech fit behind a voice."""
    num_voice = 0 if voice is None else _num_tokens(processor, voice[0])
    room = MAX_TEXT_TOKENS - num_voice
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None:
        num_patches = 0 if voice is None else len(voice[1]) // model.speech_head.reduction_factor
        num_prompt = len(model.config.speech_prefix_ids) + len(model.config.speech_suffix_ids) + 1
        room = min(room, int(_TEXT_SHARE * (limit - num_prompt - num_voice - num_patches)))
    return room


__all__ = ["iter_speech", "split_sentences"]
