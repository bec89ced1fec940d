"""A speech encoder that training listens beside: its states of a clip, made once and kept (ours)."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


class TeacherError(Exception):
    """The teacher could not listen to a clip that could be read: no fault of the clip."""


class SpeechTeacher:
    r"""The last states of a frozen speech encoder, of clips as they are: without noise, masks and other changes of training.

    A clip's states are made when it is first asked for. With a `cache` they are kept there, in a file for each clip in 16
    bits, and later passes, runs and processes read them: an encoder of 20 million parameters then costs less than one pass
    over the data, where it would cost a third of every step. It listens on the CPU, where clips are decoded.

    Args:
        name (`str`): Folder or Hub name of a Whisper (whose encoder is used, on the clip alone and not on 30 s of it and
            silence), or of an encoder of waveforms such as wav2vec 2.0, HuBERT or WavLM.
        cache (*optional*): A folder. It may be shared by runs, and by teachers.
        dtype (`torch.dtype`, defaults to `torch.float32`): What is computed in.

    Attributes:
        size (`int`): Width of a state.
        rate (`float`): States a second.
        max_seconds (`float`): Longest clip that it hears.
        fingerprint (`str`): Of its weights, its features and the dtype.

    Raises:
        ValueError: The model is no such encoder.
        OSError: There is no such model.
    """

    def __init__(self, name: str, cache: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32):
        config = AutoConfig.from_pretrained(name)
        self.is_whisper = config.model_type == "whisper"
        hears_waveforms = hasattr(config, "inputs_to_logits_ratio")
        if self.is_whisper or hears_waveforms:
            self.extractor = AutoFeatureExtractor.from_pretrained(name)
            hears_waveforms = hears_waveforms and self.extractor.model_input_names[0] == "input_values"
        if not self.is_whisper and not hears_waveforms:
            raise ValueError(
                f"{name} is a model of the type {config.model_type!r}. A teacher is a Whisper, or an encoder of waveforms such as "
                "wav2vec 2.0, HuBERT or WavLM."
            )
        model = AutoModel.from_pretrained(name, dtype=torch.float32)
        self.encoder = (model.get_encoder() if self.is_whisper else model).eval().requires_grad_(False)
        self.dtype = dtype
        self.sampling_rate = self.extractor.sampling_rate
        if self.is_whisper:
            self.rate = self.sampling_rate / (2 * self.extractor.hop_length)
            self.positions = self.encoder.embed_positions.weight.detach().clone()
            self.max_seconds = len(self.positions) / self.rate
        else:
            self.rate, self.max_seconds = self.sampling_rate / config.inputs_to_logits_ratio, float("inf")
        self.cache = None if cache is None else Path(cache)
        digest = hashlib.sha256(f"{dtype} {self.extractor.to_json_string()}".encode())
        for key, weight in sorted(self.encoder.state_dict().items()):
            digest.update(key.encode() + weight.contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.size = self._listen(np.zeros(self.sampling_rate, dtype=np.float32)).shape[-1]

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """A clip `(samples,)` at `sampling_rate` to its states, `(states, size)` in float16.

        Raises:
            TeacherError: It cannot; Whisper, for instance, where the clip is longer than what it was made for (30 s).
        """
        try:
            return self._listen(audio) if self.cache is None else self._remembered(audio)
        except (OSError, ValueError, RuntimeError) as error:
            raise TeacherError(
                f"The teacher could not listen to a clip of {len(audio) / self.sampling_rate:.1f} s: {error}"
            ) from error

    def _remembered(self, audio: np.ndarray) -> np.ndarray:
        key = hashlib.sha256(np.ascontiguousarray(audio)).hexdigest()[:40]
        path = self.cache / self.fingerprint / key[:2] / f"{key[2:]}.safetensors"
        try:
            return load_file(path)["states"]
        except (OSError, SafetensorError, KeyError):  # not there, or broken off
            states = self._listen(audio)
        try:
            self._keep(states, path)
        except OSError as error:  # what is not kept is made again
            logger.warning_once(f"The teacher's states are not kept from now on: {error}")
            self.cache = None
        return states

    @staticmethod
    def _keep(states: np.ndarray, path: Path) -> None:
        """Whole or not at all, whoever else writes it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}-{os.getpid()}.partial")
        try:
            partial.write_bytes(save({"states": np.ascontiguousarray(states)}))
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @torch.no_grad()
    def _listen(self, audio: np.ndarray) -> np.ndarray:
        # Whisper's would make 30 s of any clip
        options = {"padding": "longest", "truncation": False} if self.is_whisper else {}
        inputs = self.extractor(audio, sampling_rate=self.sampling_rate, return_tensors="pt", **options)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            if self.is_whisper:
                features = inputs["input_features"]
                features = nn.functional.pad(features, (0, features.shape[-1] % 2))
                states = self._encode(features)
            else:
                states = self.encoder(inputs["input_values"]).last_hidden_state
        return states[0].to(torch.float16).numpy()

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        # The encoder takes inputs of its full length alone, so it is given one that is as short as the clip
        num_places, most = features.shape[-1] // 2, len(self.positions)
        if num_places > most:
            raise ValueError(
                f"`teacher`: a clip of {num_places / self.rate:.1f} s is longer than the {most / self.rate:.0f} s that this Whisper "
                "hears. Leave longer ones out: --max_seconds."
            )
        self.encoder.config.max_source_positions = num_places
        self.encoder.embed_positions = nn.Embedding.from_pretrained(self.positions[:num_places])
        return self.encoder(features).last_hidden_state


def fit_states(states: np.ndarray | torch.Tensor, num_tokens: int, rate: int) -> torch.Tensor:
    """A clip's states `(states, size)`, stretched to `rate` for each of its audio tokens, `(num_tokens, rate * size)`: also
    where the clip has been played faster or slower since."""
    states = torch.as_tensor(states).float().T[None]
    states = nn.functional.interpolate(states, size=num_tokens * rate, mode="linear", align_corners=False)
    return states[0].T.reshape(num_tokens, -1)


__all__ = ["SpeechTeacher", "TeacherError", "fit_states"]
