"""In whose voice each text is to be spoken, and to whom the speech is then compared."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..audio_utils_mel_llm import load_audio
from .utterances import Utterance


VOICE_CHOICES = ("none", "reference", "previous")


@dataclass
class Voice:
    r"""A recording of a speaker.

    Attributes:
        name (`str`): Its utterance's id, or its file.
        text (`str`, *optional*): What is said in it, word for word.
        source: The utterance or the file.
        key (`str`): Another one if the recording is.
    """

    name: str
    text: str | None
    source: "Utterance | str"
    key: str

    def load(self, sampling_rate: int) -> np.ndarray:
        """The recording, `(samples,)`, float32."""
        if isinstance(self.source, Utterance):
            return self.source.load(sampling_rate)
        return load_audio(self.source, sampling_rate=sampling_rate)


def choose_voices(
    utterances: Sequence[Utterance], choice: str = "none", text: str | None = None, needs_text: bool = True
) -> list[Voice | None]:
    """The voice of each utterance.

    Args:
        utterances: What is to be spoken.
        choice (`str`, defaults to `"none"`): `"none"`; `"reference"`, the text's own recording, so that the model hears
            the very words that it is to say; `"previous"`, the recording of the text before (for the first, the last one),
            for data of one speaker or sorted by speaker; or a file.
        text (`str`, *optional*): What is said in that file; by default what the `.txt` beside it says.
        needs_text (`bool`, defaults to `True`): Whether a model is to go on in that voice, which takes the words.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A recording or what is said in it is missing.
    """
    if choice != "none" and choice not in VOICE_CHOICES:
        return [_from_file(choice, text, needs_text)] * len(utterances)
    if text is not None:
        raise ValueError(f"--voice_text is for a file as --voice_from, got --voice_from {choice}.")
    if choice == "none":
        return [None] * len(utterances)
    if choice == "previous" and len(utterances) < 2:
        raise ValueError("--voice_from previous needs two utterances or more.")
    shift = choice == "previous"
    voices = [utterances[index - shift] for index in range(len(utterances))]
    for voice in voices:
        if not voice.has_recording or (needs_text and not voice.text):
            missing = "recording" if not voice.has_recording else "transcript"
            raise ValueError(f"--voice_from {choice}: {voice.id} has no {missing}.")
    return [Voice(voice.id, voice.text, voice, voice.recording_key) for voice in voices]


def _from_file(path: str, text: str | None, needs_text: bool) -> Voice:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"--voice_from must be {', '.join(VOICE_CHOICES)} or a recording; there is no {path!r}."
        )
    beside = file.with_suffix(".txt")
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8").strip()
    if needs_text and not (text or "").strip():
        raise ValueError(
            f"--voice_from {path}: say word for word what is said in it, with --voice_text or in {beside}."
        )
    load_audio(str(file))  # an error here and not after the model was loaded
    return Voice(file.name, text, str(file), hashlib.sha256(file.read_bytes()).hexdigest()[:8])


__all__ = ["VOICE_CHOICES", "Voice", "choose_voices"]
