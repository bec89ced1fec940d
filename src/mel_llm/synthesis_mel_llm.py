"""Texts of any length to speech: sentence by sentence, in one voice, with memory that does not grow with the text.

Everything here is ours.
"""

import re
from collections.abc import Iterator

import torch


# Behind the end of a sentence, with what closes it; or behind a blank line
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])[」』”]*\s*|\n\s*\n")
# Where a sentence that is too long is cut, the best place first
_CLAUSE_ENDS = (r"[;:—–]\s*", r"[,，、]\s*", r"\s+")
_SHORT_CHARS = 12
_PAUSE_SECONDS = 0.15
# What a voice is taken from when there is no recording of it: no more than that of the first sentences
_MAX_VOICE_SECONDS = 10.0


def split_sentences(text: str, max_chars: int = 200) -> list[str]:
    """Sentences, none longer than `max_chars` characters: longer ones are cut at clauses, then at words.

    Short ones are joined with their neighbour as long as they fit, since a word on its own is hardly spoken well.

    Raises:
        ValueError: There is nothing to be spoken, or `max_chars` is less than 20.
    """
    if max_chars < 20:
        raise ValueError(f"`max_chars` must be at least 20, got {max_chars}.")
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
    pieces = []
    while len(sentence) > max_chars:
        place = max_chars
        for pattern in _CLAUSE_ENDS:
            ends = [match.end() for match in re.finditer(pattern, sentence[: max_chars + 1])]
            ends = [end for end in ends if max_chars // 3 <= end <= max_chars]
            if ends:
                place = ends[-1]
                break
        pieces.append(sentence[:place].strip())
        sentence = sentence[place:].strip()
    return [*pieces, sentence] if sentence else pieces


def iter_speech(
    model,
    processor,
    text: str,
    *,
    voice=None,
    voice_text: str | None = None,
    max_chars: int = 200,
    seed: int | None = None,
    **generate_kwargs,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Speaks a text of any length and gives out each sentence when it is spoken.

    Args:
        model ([`MelLLMForTextToSpeech`]), processor ([`MelLLMProcessor`]): A checkpoint that speaks.
        text (`str`): What to speak.
        voice, voice_text (*optional*): A recording and what is said in it, as for
            [`MelLLMProcessor.apply_speech_request`]. Without, the first sentence's voice is kept for the others.
        max_chars (`int`, defaults to 200): Longest piece in characters.
        seed (`int`, *optional*): Makes the speech repeatable.
        generate_kwargs: For `generate()`: `temperature`, `stop_threshold`, ...; `max_seconds` is for each sentence.

    Returns:
        Iterator of the sentence and its waveform `(samples,)`, float32 on the CPU, a short pause behind it.

    Raises:
        ValueError: There is nothing to speak, the model has no vocoder, or an argument is out of range.
    """
    sentences = split_sentences(text, max_chars)
    if model.vocoder is None:
        raise ValueError("This model has no vocoder (`config.vocoder_config` is None), so it makes no waveform.")
    seed = int(torch.randint(1 << 62, ())) if seed is None else seed
    request = {} if voice is None and voice_text is None else {"voice": voice, "voice_text": voice_text}
    kept: tuple[str, torch.Tensor] | None = None
    frame_rate = model.config.audio_config.frame_rate
    pause = torch.zeros(round(_PAUSE_SECONDS * model.config.sampling_rate))

    def spoken() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal kept
        for number, sentence in enumerate(sentences):
            if kept is None:
                inputs = processor.apply_speech_request(sentence, **request)
            else:
                inputs = processor.apply_speech_request(f"{kept[0]} {sentence}")
                inputs["voice_features"] = kept[1][None]
            output = model.generate(
                **inputs.to(model.device), seed=seed + number, return_dict_in_generate=True, **generate_kwargs
            )
            frames = output.spectrogram[0]
            if not request and kept is None and output.stopped[0] and len(frames) <= _MAX_VOICE_SECONDS * frame_rate:
                if len(frames) >= model.config.audio_config.reduction_factor:
                    kept = (sentence, frames)
            yield sentence, torch.cat([output.audio[0].cpu(), pause])

    return spoken()


__all__ = ["iter_speech", "split_sentences"]
