"""Who listens to clips and writes something down: models of transformers, a Mel-LLM among them, and functions."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from ..card_results import local_name
from ..training.lora import adapter_base, load_adapters
from ..transcription_mel_llm import transcribe_clips
from .plugins import PREFIX, describe_callable, describe_folder, fingerprint, load_callable


# In the order in which the Open ASR Leaderboard's script looks for a model's class
_AUTO_CLASSES = (
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "AutoModelForSpeechSeq2Seq"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "AutoModelForMultimodalLM"),
    ("MODEL_FOR_CTC_MAPPING", "AutoModelForCTC"),
    ("MODEL_FOR_RNNT_MAPPING", "AutoModelForRNNT"),
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# What Whisper hears at once
_WHISPER_SECONDS = 30.0
# At which functions are given the audio
_CALLABLE_RATE = 16000


class ClipSystem:
    """One row of the table.

    Attributes:
        name (`str`): In tables and file names.
        settings (`dict`): Everything that its texts and its speed depend on but the machine; JSON's types.
        sampling_rate (`int`): Hz of the clips that it is given.
        is_peer (`bool`): Whether it is there to be compared with.
        num_parameters (`int`, *optional*): Known once it is loaded.
    """

    name: str
    settings: dict
    sampling_rate: int = _CALLABLE_RATE
    is_peer: bool = False
    num_parameters: int | None = None

    @property
    def folder_name(self) -> str:
        return f"{file_slug(short_name(self.name))[-60:].strip('._-') or 'system'}-{fingerprint(self.settings)}"

    def load(self) -> None:
        """Makes it ready, if it is not; called before the first batch."""

    def unload(self) -> None:
        """Gives its memory back."""

    def run(self, clips: Sequence[np.ndarray], prompts: Sequence[str | None]) -> list[str]:
        """What it writes of each clip `(samples,)`, as it writes it."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Waits until all that was asked of the device is done."""


def file_slug(name: str) -> str:
    """A name as the leaderboard's files have it, `org-model`, without what file systems do not like."""
    return "".join(char if char.isalnum() or char in "-._" else "-" for char in name)


def short_name(name: str) -> str:
    """A model's name on the Hub, or the last part of its folder's path."""
    return local_name(name) if os.path.exists(os.path.expanduser(name)) else name


class FunctionSystem(ClipSystem):
    """A function `(waveform (samples,), rate in Hz) -> text`; clips one after the other, at 16 kHz.

    Args:
        spec (`str`): `python:module.function`: see [`load_callable`].
        is_peer (`bool`, defaults to `False`): Whether it is there to be compared with.
    """

    def __init__(self, spec: str, is_peer: bool = False):
        self.name, self.is_peer = spec.removeprefix(PREFIX), is_peer
        self.function = load_callable(spec, "--peer" if is_peer else "--model")
        self.settings = {"kind": "function", "function": describe_callable(self.function)}

    def run(self, clips, prompts) -> list[str]:
        return [str(self.function(clip, self.sampling_rate)) for clip in clips]


class ModelSystem(ClipSystem):
    """A model of transformers that is loaded when it is needed; its config and processor at once.

    Args:
        name (`str`): Folder or Hub name; also of adapters of PEFT.
        device (`str`): `cpu`, `cuda`, `cuda:1`, ...
        dtype (`str`, defaults to `"auto"`): One of [`DTYPES`].
        attn_implementation (`str`, *optional*): As for `from_pretrained`.
        compile_mode (`str`, *optional*): One of [`COMPILE_MODES`]: a static cache and a compiled decoding step for models
            that generate, the whole forward pass for others.
        revision (`str`, *optional*), trust_remote_code (`bool`, defaults to `False`): As for `from_pretrained`.
        language (`str`, *optional*): Spoken in the clips; told to models that can be told.
        generate_kwargs (`dict`, *optional*): For `generate()`.
        is_peer (`bool`, defaults to `False`): Whether it is there to be compared with.

    Raises:
        OSError, ValueError: There is no such model, or none of its kind is known.
    """

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        compile_mode: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        language: str | None = None,
        generate_kwargs: dict | None = None,
        is_peer: bool = False,
        **more_settings,
    ):
        import mel_llm  # noqa: F401  registers our classes

        if dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if compile_mode is not None and compile_mode not in COMPILE_MODES:
            raise ValueError(f"--compile must be one of {', '.join(COMPILE_MODES)}, got {compile_mode!r}.")
        self.name, self.is_peer, self.device, self.dtype = name, is_peer, device, dtype
        self.attn_implementation, self.compile_mode, self.language = attn_implementation, compile_mode, language
        self.hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.generate_kwargs = {key: value for key, value in (generate_kwargs or {}).items() if value is not None}
        if os.path.isabs(os.path.expanduser(name)) and not os.path.isdir(os.path.expanduser(name)):
            raise FileNotFoundError(f"There is no folder {name}.")
        self.base = _base_of_adapters(name, revision)
        self.config = transformers.AutoConfig.from_pretrained(self.base or name, **self._hub_of(self.base or name))
        self.auto_class = _auto_class(self.config, name)
        self.processor = transformers.AutoProcessor.from_pretrained(name, **self.hub)
        extractor = getattr(self.processor, "feature_extractor", None) or getattr(
            self.processor, "audio_processor", None
        )
        self.sampling_rate = getattr(extractor, "sampling_rate", None) or self.sampling_rate
        self.is_mel_llm = self.config.model_type == "mel_llm"
        self.is_whisper = self.config.model_type == "whisper"
        self.model = None
        self.settings = {
            "kind": "peer" if is_peer else "model",
            "weights": describe_folder(name),
            "base": None if self.base is None else describe_folder(self.base),
            "revision": getattr(self.config, "_commit_hash", None)
            or revision,  # what a Hub name stands for may change
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "compile": compile_mode,
            "language": language,
            **self.generate_kwargs,
            **more_settings,
        }

    def _hub_of(self, name: str) -> dict:
        return self.hub if name == self.name else {"trust_remote_code": self.hub["trust_remote_code"]}

    def load(self) -> None:
        if self.model is not None:
            return
        options = {"dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        name = self.base or self.name
        model = self.auto_class.from_pretrained(name, **options, **self._hub_of(name))
        if self.base is not None:
            # Not `from_pretrained` of the adapters' folder, which before transformers 5.18 loses `modules_to_save`
            model = load_adapters(model, self.name, revision=self.hub["revision"])
        self.model = model.to(self.device).eval()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if self.compile_mode is not None:
            self._compile()

    def _compile(self) -> None:
        if self.model.can_generate():
            self.generate_kwargs["compile_config"] = transformers.CompileConfig(
                mode=self.compile_mode, fullgraph=False
            )
            self.model.generation_config.cache_implementation = "static"
        else:
            self.model = torch.compile(self.model, mode=self.compile_mode)

    def unload(self) -> None:
        self.model = None
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _generate(self, inputs, **kwargs) -> torch.Tensor:
        output = self.model.generate(**self._to_device(inputs), **{**self.generate_kwargs, **kwargs})
        return output if isinstance(output, torch.Tensor) else output.sequences

    def _to_device(self, inputs):
        return inputs.to(self.device, dtype=self.model.dtype)


class Transcriber(ModelSystem):
    """A model that writes down what is said: any of transformers' speech recognition classes.

    A Mel-LLM gets the audio alone, as the pipeline gives it, so that its token budgets and its guards are at work. Clips
    that are longer than `config.audio_config.max_audio_seconds` go, one after the other, through `transcribe`, which cuts
    them at pauses, unless `long_form` is `"never"`: then all are heard whole, as by the leaderboard's script. Whisper hears
    batches with a clip of more than 30 seconds in its own long form; all others hear every clip whole.

    Args:
        long_form (`str`, defaults to `"cut"`): `"cut"` or `"never"`.
        batch_size (`int`, defaults to 8): Of pieces of long clips; and what a compiled model's batches are filled up to.
        args, kwargs: As for [`ModelSystem`].
    """

    def __init__(self, *args, long_form: str = "cut", batch_size: int = 8, **kwargs):
        if long_form not in ("cut", "never"):
            raise ValueError(f"--long_form must be cut or never, got {long_form!r}.")
        super().__init__(*args, batch_size=batch_size, long_form=long_form, **kwargs)
        self.long_form, self.batch_size = long_form, batch_size
        self.requests = None if self.is_mel_llm else getattr(self.processor, "apply_transcription_request", None)

    @torch.no_grad()
    def run(self, clips, prompts) -> list[str]:
        clips, num_clips = list(clips), len(clips)
        if self.compile_mode is not None:  # another batch size would be compiled anew
            clips += [clips[-1]] * (self.batch_size - num_clips)
        if self.is_mel_llm:
            texts = self._run_mel_llm(clips)
        elif not self.model.can_generate():
            texts = self._run_ctc(clips)
        elif self.requests is not None:
            inputs = self.requests(**self._request(clips))
            ids = self._generate(inputs)[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        else:
            texts = self._run_generation(clips)
        return [text.strip() for text in texts[:num_clips]]

    def _run_mel_llm(self, clips: list[np.ndarray]) -> list[str]:
        longest = self.config.audio_config.max_audio_seconds * self.sampling_rate
        is_long = [self.long_form == "cut" and len(clip) > longest for clip in clips]
        short = [clip for clip, long in zip(clips, is_long, strict=True) if not long]
        texts = iter(())
        if short:
            texts = iter(
                transcribe_clips(self.model, self.processor, short, self.language, None, self.generate_kwargs)
            )
        return [self._run_long(clip) if long else next(texts) for clip, long in zip(clips, is_long, strict=True)]

    def _run_long(self, clip: np.ndarray) -> str:
        kwargs = {"language": self.language, "batch_size": self.batch_size, **self.generate_kwargs}
        return self.model.transcribe((clip, self.sampling_rate), self.processor, **kwargs).text

    def _run_ctc(self, clips: list[np.ndarray]) -> list[str]:
        # Whether it takes a mask of the padding, its extractor knows
        inputs = self.processor(clips, sampling_rate=self.sampling_rate, padding="longest", return_tensors="pt")
        logits = self.model(**self._to_device(inputs)).logits
        if hasattr(self.processor, "decoder"):  # with a language model
            return list(self.processor.batch_decode(logits.float().cpu().numpy()).text)
        ids = logits.argmax(-1)
        num_frames = getattr(self.model, "_get_feat_extract_output_lengths", None)
        if num_frames is not None and "input_values" in inputs:  # what is heard in the padding is not said in the clip
            for row, clip in zip(ids, clips, strict=True):
                row[int(num_frames(torch.tensor(len(clip)))) :] = self.processor.tokenizer.pad_token_id
        # Special tokens are the blank and the word boundary: the tokenizer needs them to tell double letters
        return self.processor.batch_decode(ids)

    def _run_generation(self, clips: list[np.ndarray]) -> list[str]:
        options, kwargs = {"padding": "longest", "return_attention_mask": True}, {}
        if self.is_whisper:
            if max(map(len, clips)) > _WHISPER_SECONDS * self.sampling_rate:
                options["truncation"], kwargs["return_timestamps"] = False, True
            else:
                options["padding"] = "max_length"  # it was trained on windows of 30 seconds
            if getattr(self.model.generation_config, "is_multilingual", False):
                kwargs["task"] = "transcribe"
                if self.language is not None:
                    kwargs["language"] = self.language
        inputs = self.processor(clips, sampling_rate=self.sampling_rate, return_tensors="pt", **options)
        return self.processor.batch_decode(self._generate(inputs, **kwargs), skip_special_tokens=True)

    def _request(self, clips: list[np.ndarray]) -> dict:
        """The arguments of `apply_transcription_request`, which are not the same for all models."""
        known = inspect.signature(self.requests).parameters
        more = {"language": self.language, "sampling_rate": self.sampling_rate, "model_id": self.name}
        more["format"] = ["wav"] * len(clips)
        return {"audio": clips} | {key: value for key, value in more.items() if key in known and value is not None}


def _base_of_adapters(name: str, revision: str | None) -> str | None:
    """The model that adapters belong to; `None` for what is no adapter."""
    from transformers.utils import find_adapter_config_file

    file = find_adapter_config_file(name, revision=revision)
    if file is None:
        return None
    return adapter_base(Path(file).parent)


def _auto_class(config, name: str):
    remote = getattr(config, "auto_map", None) or {}
    for mapping, auto_class in _AUTO_CLASSES:
        # Not all of them are in every release of transformers
        if type(config) in getattr(transformers, mapping, ()) or auto_class in remote:
            return getattr(transformers, auto_class)
    raise ValueError(
        f"{name} is a {config.model_type!r}, and transformers has no class of that kind that transcribes."
    )


def make_transcriber(spec: str, is_peer: bool = False, **options) -> ClipSystem:
    """What `--model` or `--peer` names.

    Args:
        spec (`str`): Folder or Hub name of a model, or `python:module.function`: see [`FunctionSystem`].
        is_peer (`bool`, defaults to `False`): Whether it is there to be compared with.
        options: For [`Transcriber`].

    Raises:
        ImportError, OSError, ValueError: It cannot be found; the message says why.
    """
    if spec.startswith(PREFIX):
        return FunctionSystem(spec, is_peer)
    return Transcriber(spec, is_peer=is_peer, **options)


__all__ = ["COMPILE_MODES", "DTYPES", "ClipSystem", "FunctionSystem", "ModelSystem", "Transcriber", "make_transcriber"]
