"""Where speech that is evaluated comes from: people, a vocoder, a model, a folder of files."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..audio_utils_mel_llm import AUDIO_EXTENSIONS, load_audio
from ..synthesis_mel_llm import iter_speech, split_sentences
from .plugins import fingerprint
from .utterances import Utterance
from .voices import Voice


# At which every judge hears everything
EVALUATION_RATE = 16000


@dataclass
class Speech:
    r"""A text, spoken.

    Attributes:
        audio (`np.ndarray` of shape `(samples,)`), sampling_rate (`int`): The waveform, and its rate in Hz.
        wall_seconds (`float`, *optional*): What making it took; in a batch, its share by duration.
        stopped (`bool`, *optional*): Whether the model ended the speech by itself, and no guard did.
        written (`dict`, *optional*): What the model wrote before it spoke; JSON's types.
    """

    audio: np.ndarray
    sampling_rate: int
    wall_seconds: float | None = None
    stopped: bool | None = None
    written: dict | None = None


class SpeechSystem:
    """One row of the table.

    Attributes:
        name (`str`): In tables and, with the settings' fingerprint, of its folder.
        settings (`dict`): Everything that its speech depends on but the text and the voice; JSON's types.
        synthesises (`bool`): Whether speech is made, kept and timed, or is there already.
        is_reference (`bool`): Whether it is the reference itself, to which it is not compared.
        reads_recording (`bool`): Whether its speech depends on the recording and not on the text.
    """

    name: str
    settings: dict
    synthesises = True
    is_reference = False
    reads_recording = False

    @property
    def folder_name(self) -> str:
        slug = "".join(char if char.isalnum() or char in "-." else "_" for char in self.name)[-60:].strip("._")
        return f"{slug or 'system'}-{fingerprint(self.settings)}"

    def check(self, utterances: Sequence[Utterance]) -> None:
        """Raises a `ValueError` if something is missing that `make` will need."""

    def make(self, utterances: Sequence[Utterance], voices: Sequence[Voice | None]) -> list[Speech | Exception]:
        """The speech of each, or what went wrong with it."""
        results: list[Speech | Exception] = []
        for utterance in utterances:
            try:
                results.append(self._make_one(utterance))
            except (OSError, ValueError, RuntimeError) as error:
                results.append(error)
        return results

    def _make_one(self, utterance: Utterance) -> Speech:
        raise NotImplementedError


def _need_recordings(name: str, utterances: Sequence[Utterance]) -> None:
    missing = [utterance.id for utterance in utterances if not utterance.has_recording]
    if missing:
        raise ValueError(
            f"{name} needs recordings; {len(missing)} of {len(utterances)} texts have none ({missing[0]})."
        )


class ReferenceSpeech(SpeechSystem):
    """The reference recordings: the bound that no system is expected to pass."""

    synthesises = False
    is_reference = True

    def __init__(self, name: str = "natural speech"):
        self.name, self.settings = name, {"kind": "reference"}

    def check(self, utterances: Sequence[Utterance]) -> None:
        _need_recordings("--reference", utterances)

    def _make_one(self, utterance: Utterance) -> Speech:
        return Speech(utterance.load(EVALUATION_RATE), EVALUATION_RATE)


class CopySynthesis(SpeechSystem):
    """Log-mel frames of the reference through a vocoder: the bound for models that use this vocoder.

    Args:
        vocoder ([`MelLLMVocoder`]): With the features that it inverts.
        name (`str`): In tables.
        description (`str`): Of its weights; see [`describe_folder`].
    """

    reads_recording = True

    def __init__(self, vocoder, name: str, description: str = ""):
        self.vocoder, self.name = vocoder.eval(), name
        config = {key: getattr(vocoder.config, key) for key in ("vocoder_type", "vocoder_kwargs", "feature_config")}
        if vocoder.generator is None:
            config["num_iterations"] = vocoder.config.num_iterations
        self.settings = {"kind": "copy", "weights": description, **config}

    def check(self, utterances: Sequence[Utterance]) -> None:
        _need_recordings("--copy_synthesis", utterances)

    def _make_one(self, utterance: Utterance) -> Speech:
        rate, extractor = self.vocoder.sampling_rate, self.vocoder.extractor
        audio = utterance.load(rate)
        frames = extractor(audio, sampling_rate=rate, return_tensors="pt")["input_features"].to(self.vocoder.device)
        started = time.perf_counter()
        copy = self.vocoder(frames)[0].cpu().numpy()
        return Speech(copy, rate, wall_seconds=time.perf_counter() - started)


class AudioFolder(SpeechSystem):
    """Files that another program made, one for each utterance, named by its id (`ID.wav`, `ID.flac`, ...).

    Raises:
        FileNotFoundError: There is no such folder.
    """

    synthesises = False

    def __init__(self, folder: str, name: str | None = None):
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"--audio: there is no folder {folder!r}.")
        self.name, self.settings = name or folder, {"kind": "audio", "folder": str(path.absolute())}
        self.folder = path
        self.files = {file.stem: file for file in sorted(path.rglob("*")) if file.suffix.lower() in AUDIO_EXTENSIONS}

    def check(self, utterances: Sequence[Utterance]) -> None:
        missing = [utterance.id for utterance in utterances if utterance.id not in self.files]
        if missing:
            raise ValueError(
                f"--audio {self.folder}: {len(missing)} of {len(utterances)} utterances have no file there; expected "
                f"{missing[0]}.wav, and so on."
            )

    def _make_one(self, utterance: Utterance) -> Speech:
        return Speech(load_audio(str(self.files[utterance.id]), sampling_rate=EVALUATION_RATE), EVALUATION_RATE)


class ModelSpeech(SpeechSystem):
    """A Mel-LLM that speaks: texts as they are, in batches, and longer ones sentence by sentence, as in [`iter_speech`].

    Args:
        model ([`MelLLMForTextToSpeech`]), processor ([`MelLLMProcessor`]): The model, with a vocoder.
        name (`str`): In tables.
        description (`str`): Of its weights; see [`describe_folder`].
        seed (`int`, defaults to 0): Of every text.
        max_chars (`int`, defaults to 200): Texts of more characters are cut.
        generate_kwargs: For `generate()`: `temperature`, `stop_threshold`, `max_seconds`, `min_seconds`.

    Raises:
        ValueError: It has no vocoder.
    """

    def __init__(
        self,
        model,
        processor,
        name: str,
        description: str = "",
        seed: int = 0,
        max_chars: int = 200,
        **generate_kwargs,
    ):
        if getattr(model, "vocoder", None) is None:
            raise ValueError(
                f"--model {name} has no vocoder (`config.vocoder_config` is None), so it makes no waveform."
            )
        self.model, self.processor, self.name = model.eval(), processor, name
        self.kwargs = {key: value for key, value in generate_kwargs.items() if value is not None}
        self.seed, self.max_chars = seed, max_chars
        split_sentences("a", max_chars)  # raises if that is too few
        dtype = str(model.dtype).removeprefix("torch.")
        self.settings = {"kind": "model", "weights": description, "seed": seed, "max_chars": max_chars, "dtype": dtype}
        self.settings.update(self.kwargs)
        self._is_warm = False

    def check(self, utterances: Sequence[Utterance]) -> None:
        for utterance in utterances:
            try:
                split_sentences(utterance.text, self.max_chars)
            except ValueError as error:
                raise ValueError(f"--model {self.name}: {utterance.id} cannot be spoken: {error}") from None

    def make(self, utterances: Sequence[Utterance], voices: Sequence[Voice | None]) -> list[Speech | Exception]:
        pairs = list(zip(utterances, voices, strict=True))
        is_long = [len(utterance.text) > self.max_chars for utterance in utterances]
        short = [pair for pair, long in zip(pairs, is_long, strict=True) if not long]
        spoken = iter(self._speak(short) if short else [])
        return [self._try_long(*pair) if long else next(spoken) for pair, long in zip(pairs, is_long, strict=True)]

    def _speak(self, pairs: list) -> list[Speech | Exception]:
        try:
            return self._speak_batch(pairs)
        except (ValueError, RuntimeError, OSError) as error:  # one that does not fit must not cost the others
            if len(pairs) == 1:
                return [error]
            return [speech for pair in pairs for speech in self._speak([pair])]

    def _request(self, voice: Voice | None) -> dict:
        if voice is None:
            return {}
        return {"voice": voice.load(self.processor.feature_extractor.sampling_rate), "voice_text": voice.text}

    def _speak_batch(self, pairs: list) -> list[Speech]:
        request: dict = {}
        if pairs[0][1] is not None:
            requests = [self._request(voice) for _, voice in pairs]
            request = {key: [item[key] for item in requests] for key in ("voice", "voice_text")}
        inputs = self.processor.apply_speech_request([utterance.text for utterance, _ in pairs], **request)
        inputs = inputs.to(self.model.device)
        self._warm_up(inputs)
        started = time.perf_counter()
        output = self.model.generate(**inputs, seed=self.seed, return_dict_in_generate=True, **self.kwargs)
        audio = [row.float().cpu().numpy() for row in output.audio]
        wall = time.perf_counter() - started
        total = sum(len(row) for row in audio)
        rate = self.model.config.sampling_rate
        return [
            Speech(row, rate, wall * len(row) / total, stopped)
            for row, stopped in zip(audio, output.stopped, strict=True)
        ]

    def _try_long(self, utterance: Utterance, voice: Voice | None) -> Speech | Exception:
        stopped: list[bool] = []
        try:
            request = self._request(voice)
            started = time.perf_counter()
            sentences = iter_speech(
                self.model,
                self.processor,
                utterance.text,
                max_chars=self.max_chars,
                seed=self.seed,
                on_sentence=lambda sentence, output: stopped.extend(output.stopped),
                **request,
                **self.kwargs,
            )
            audio = torch.cat([samples for _, samples in sentences]).numpy()
        except (ValueError, RuntimeError, OSError) as error:
            return error
        wall = time.perf_counter() - started
        return Speech(audio, self.model.config.sampling_rate, wall, all(stopped))

    def _warm_up(self, inputs) -> None:
        """What the first call of all allocates and compiles is not the model's speed."""
        if not self._is_warm:
            self.model.generate(**inputs, **{**self.kwargs, "max_seconds": 0.2, "min_seconds": None, "seed": 0})
            self._is_warm = True


__all__ = [
    "EVALUATION_RATE",
    "AudioFolder",
    "CopySynthesis",
    "ModelSpeech",
    "ReferenceSpeech",
    "Speech",
    "SpeechSystem",
]
