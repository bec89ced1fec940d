"""Who listens: speech recognition as a function from a waveform and its rate (Hz) to text."""

from collections.abc import Callable

import numpy as np
import torch

from ..audio_utils_mel_llm import resample
from .plugins import PREFIX, describe_folder, load_callable


# `(waveform (samples,) float32, sampling rate in Hz) -> text`
Recognizer = Callable[[np.ndarray, int], str]

# What Whisper and models with CTC hear at once; longer recordings are cut
_WINDOW_SECONDS = 30.0


class PipelineRecognizer:
    """Any model that transformers' speech recognition pipeline takes, a Mel-LLM among them.

    Recordings of any length: a Mel-LLM's `transcribe` cuts at pauses; Whisper's own long-form decoding and, for CTC,
    overlapping windows are transformers'.

    Args:
        name (`str`): Folder or Hub name.
        language (`str`, *optional*): Language spoken, for models that can be told.
        device (`str`, *optional*): A GPU if there is one.

    Raises:
        OSError, ValueError: The model cannot be loaded, or cannot be told the language.
    """

    def __init__(self, name: str, language: str | None = None, device: str | None = None):
        from transformers import AutoProcessor, pipeline

        import mel_llm  # noqa: F401  registers our classes

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = pipeline("automatic-speech-recognition", model=name, device=device)
        self.model = self.pipeline.model
        self.language = language
        self.rate = self.pipeline.feature_extractor.sampling_rate
        # A Mel-LLM's; the pipeline does not keep it
        self.processor = AutoProcessor.from_pretrained(name) if hasattr(self.model, "transcribe") else None
        self.is_whisper = self.model.config.model_type == "whisper"
        if language is not None and self.processor is None:
            if not (self.is_whisper and getattr(self.model.generation_config, "is_multilingual", False)):
                raise ValueError(f"--asr_language: {name} cannot be told a language; leave it out.")
        self.description = f"{describe_folder(name)} {language or ''}".strip()

    def __call__(self, audio: np.ndarray, sampling_rate: int) -> str:
        audio = resample(audio, sampling_rate, self.rate)
        if self.processor is not None:
            return self.model.transcribe(audio, self.processor, language=self.language).text
        kwargs: dict = {}
        is_long = len(audio) > _WINDOW_SECONDS * self.rate
        if self.is_whisper:
            if is_long:
                kwargs["return_timestamps"] = True
            if self.language is not None:
                kwargs["generate_kwargs"] = {"language": self.language, "task": "transcribe"}
        elif is_long and self.pipeline.type.startswith("ctc"):
            kwargs.update(chunk_length_s=_WINDOW_SECONDS, stride_length_s=5.0)
        return self.pipeline({"raw": audio, "sampling_rate": self.rate}, **kwargs)["text"]


def load_recognizer(spec: str, language: str | None = None, device: str | None = None) -> Recognizer:
    """The recogniser that a command line names.

    Args:
        spec (`str`): Folder or Hub name of a model for transformers' pipeline, or `python:module.function` with
            `function(waveform, rate) -> str`: see [`load_callable`].
        language, device (*optional*): As for [`PipelineRecognizer`].

    Raises:
        ImportError, OSError, ValueError: It cannot be loaded; the message says why.
    """
    if spec.startswith(PREFIX):
        if language is not None:
            raise ValueError(f"--asr_language is for models of transformers; let {spec} choose its language itself.")
        return load_callable(spec, "--asr")
    return PipelineRecognizer(spec, language, device)


__all__ = ["PipelineRecognizer", "Recognizer", "load_recognizer"]
