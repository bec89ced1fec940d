"""What a folder must be before it goes to the Hub: whole, loadable, without pickles or traces of this machine."""

import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .card_results import local_names
from .checkpoint_files import read_header, read_weights
from .model_card import CARD, metadata_problems


# Formats that run code when they are loaded, or may
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
# The Hub takes no larger file
MAX_FILE_BYTES = 50 * 1000**3
_ABSOLUTE = re.compile(r"(?:/|~[/\\]|[A-Za-z]:[\\/])[^\s/\\]+[/\\].*")
# What is in a tokenizer's vocabulary is no path
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_MAX_TEXT = 4 << 20
# What a repository of a model consists of; in its folders, nothing but sound and pictures
_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "*_config.json", "training_summary.json"),
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "results.json"),
    *("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "chat_template.json", "*.jinja"),
    *("*_mel_llm.py", "modeling_mel_llm_*.py", "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "CITATION.*"),
)
_FOLDERS = ("samples", "images", "assets", "media")
_RESULTS = ".eval_results"
_MEDIA = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".png", ".jpg", ".jpeg", ".webp", ".svg", ".gif")
_SECRETS = {
    "a token of the Hub (hf_...)": rb"hf_[A-Za-z0-9]{30,}",
    "a private key": rb"BEGIN [A-Z ]*PRIVATE KEY",
    "a token of GitHub": rb"gh[pousr]_[A-Za-z0-9]{36}",
    "a key of AWS": rb"(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])",
}
# What a training run writes beside its model, and the card is filled from
RECORDS = ("training_summary.json", "trainer_state.json")


def repository_files(folder: Path) -> list[Path]:
    """The files that a repository would consist of, sorted: all but hidden ones and folders. (The Hub shows results in `.eval_results`.)"""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name == _RESULTS)
        found += [Path(root, name) for name in sorted(names) if not name.startswith(".")]
    return found


def file_problems(
    folder: str | os.PathLike, max_file_bytes: int = MAX_FILE_BYTES, also: Sequence[str] = ()
) -> list[str]:
    """What is wrong with the files of a folder with a model or adapters, one line each; nothing is loaded.

    Args:
        folder: The folder.
        max_file_bytes (`int`): Files must not be larger.
        also: Patterns of files that may be there although models do not usually have them, such as `"losses.csv"` or
            `"figures/*.pdf"`.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    files = repository_files(folder)
    problems = []
    left = sorted({path.relative_to(folder).parts[0] for path in files if _is_left_behind(path.relative_to(folder))})
    if left:
        problems.append(f"what a run left behind does not belong to a model: {', '.join(left[:5])}")
    files = [path for path in files if path.relative_to(folder).parts[0] not in left]
    names = [path.relative_to(folder).as_posix() for path in files]
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        problems.append(f"files that may hold pickles, and weights belong in safetensors: {', '.join(pickles[:5])}")
    unusual = [name for name in names if not _belongs(name, also) and name not in pickles]
    if unusual:
        more = f" and {len(unusual) - 5} more" if len(unusual) > 5 else ""
        problems.append(
            f"files that are no part of a model, which anybody could read: {', '.join(unusual[:5])}{more}. Take them "
            "away, or name what is meant to be there with --also PATTERN"
        )
    for path, name in zip(files, names, strict=True):
        if path.is_symlink():
            problems.append(f"{name} is a link: put the file itself there")
            continue
        size = path.stat().st_size
        if size > max_file_bytes:
            problems.append(f"{name} has {size / 1e6:,.1f} MB, more than {max_file_bytes / 1e6:,.1f}")
        elif size == 0:
            problems.append(f"{name} is empty")
        else:
            problems += [f"{name} has {secret} in it: take it out, and revoke it" for secret in _secrets(path)]
    return [*problems, *_weights_problems(folder, names), *_card_problems(folder), *_trace_problems(folder, files)]


def _belongs(name: str, also: Sequence[str]) -> bool:
    """Whether a repository of a model may have a file of this name."""
    if any(fnmatchcase(name, pattern) for pattern in also):
        return True
    folder, _, base = name.rpartition("/")
    if folder == _RESULTS:
        return base.endswith((".yaml", ".yml"))
    if folder == "additional_chat_templates":
        return base.endswith(".jinja")
    is_media = base.lower().endswith(_MEDIA)
    if folder:
        return is_media and folder.split("/")[0] in _FOLDERS
    return is_media or any(fnmatchcase(base, pattern) for pattern in _FILES)


def _secrets(path: Path) -> list[str]:
    """What nobody else may read in a file, by kind: the message is no place for it either."""
    if path.suffix == ".safetensors" or path.name.lower().endswith(_MEDIA):
        return []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [kind for kind, pattern in _SECRETS.items() if re.search(pattern, content)]


def _is_left_behind(path: Path) -> bool:
    in_folder = len(path.parts) > 1 and path.parts[0].startswith(("checkpoint-", "__pycache__"))
    return in_folder or path.name.endswith((".partial", ".tmp", ".lock"))


def _weights_problems(folder: Path, names: list[str]) -> list[str]:
    problems = []
    is_adapter = "adapter_config.json" in names
    if "config.json" not in names and not is_adapter:
        return ["there is neither config.json nor adapter_config.json: this is no model"]
    stem = "adapter_model" if is_adapter else "model"
    try:
        weights = read_weights(folder, stem)
        if weights is None:
            problems.append(f"there is no {stem}.safetensors")
        expected = set() if weights is None else set(weights.files)
        for name in names:
            if name.endswith(".safetensors") and name not in expected:
                problems.append(f"{name} is no part of this model: remove it")
                read_header(folder / name)
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    if not {"processor_config.json", "preprocessor_config.json"} & set(names):
        problems.append("there is no processor: save it into the same folder")
    return problems


def _card_problems(folder: Path) -> list[str]:
    path = folder / CARD
    if not path.is_file():
        return [f"there is no {CARD}: mel_llm.create_model_card writes one"]
    return [f"{CARD}: {problem}" for problem in metadata_problems(path.read_text(encoding="utf-8"))]


def _trace_problems(folder: Path, files: list[Path]) -> list[str]:
    """Paths of this machine: nobody else has them, and they tell who worked where."""
    problems = []
    traces = {str(Path.home()), str(folder.resolve().parent), os.getcwd()} - {"/", "/root"}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if path.suffix not in (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".csv"):
            continue
        if path.name in _VOCABULARIES or path.stat().st_size > _MAX_TEXT:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [trace for trace in sorted(traces) if trace + os.sep in text]
        if path.suffix == ".json":
            try:
                content = json.loads(text)
            except ValueError as error:
                problems.append(f"{name} is not JSON: {error}")
                continue
            paths = [f"{name}: `{key}` is a path of this machine: {value}" for key, value in _paths(content)]
            if paths:
                way_out = "scripts/pack.py keeps only the last parts of such paths in the records of a run"
                problems += paths if len(paths) <= 5 else [*paths[:5], f"{name}: {len(paths) - 5} more paths"]
                problems += [f"{name}: {way_out}"] if path.name in RECORDS else []
                found = []
            base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
            if path.name == "adapter_config.json" and not _ABSOLUTE.fullmatch(str(base)):
                if not base or base.startswith(".") or os.path.exists(base):
                    problems.append(
                        f"{name}: `base_model_name_or_path` must be the base model's name on the Hub, got {base!r}"
                    )
        if found:
            problems.append(f"{name}: names a folder of this machine, {found[0]}")
    return problems


def _paths(value, key: str = "") -> Iterator[tuple[str, str]]:
    """Strings in a JSON document that are absolute paths, names of fields too, with the key that they stand under."""
    if isinstance(value, dict):
        for name, item in value.items():
            if _ABSOLUTE.fullmatch(str(name)):
                yield key or "a field", str(name)
                yield from _paths(item, key)
            else:
                yield from _paths(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, key)
    elif isinstance(value, str) and _ABSOLUTE.fullmatch(value):
        yield key, value


def without_paths(content):
    """A JSON document with the last part of every absolute path in it, values and names of fields; parts that are alike
    are numbered, so that what was different stays so."""
    names = local_names(path for _, path in _paths(content))

    def change(value):
        if isinstance(value, dict):
            return {names.get(key, key): change(item) for key, item in value.items()}
        if isinstance(value, list):
            return [change(item) for item in value]
        return names.get(value, value) if isinstance(value, str) else value

    return change(content)


def try_model(folder: str | os.PathLike, recording: str | os.PathLike, text: str = "This is a test.") -> dict:
    """Loads what is in a folder as its readers will, lets it transcribe a recording and, if it can, speak a text.

    Args:
        folder: A model or adapters, with its processor.
        recording: A few seconds of speech.
        text (`str`): What is spoken, for up to two seconds.

    Returns:
        `dict`: `model_class`, `transcript`, and for models that speak `seconds` of speech (of log-mel frames where
            there is no vocoder).

    Raises:
        ValueError: It does not load, lacks weights, or what it makes is not finite.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, AutoProcessor

    from . import load_audio

    folder = os.fspath(folder)
    is_adapter = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    try:
        if is_adapter:
            from peft import PeftConfig

            config = AutoConfig.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path)
        else:
            config = AutoConfig.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        speaks = getattr(config, "speech_config", None) is not None
        auto_class = AutoModelForTextToWaveform if speaks else AutoModelForSpeechSeq2Seq
        if is_adapter:
            from peft import PeftModel

            base = auto_class.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path)
            model = PeftModel.from_pretrained(base, folder)
        else:
            model, info = auto_class.from_pretrained(folder, output_loading_info=True)
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info.get(key):
                    raise ValueError(f"its weights have {key.replace('_', ' ')}: {sorted(map(str, info[key]))[0]}")
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"It does not load: {error}") from error
    model.eval()
    rate = processor.feature_extractor.sampling_rate
    ids = model.generate(**processor(audio=load_audio(recording, rate)).to(model.device))
    result = {
        "model_class": type(model.get_base_model() if is_adapter else model).__name__,
        "transcript": processor.decode(ids[0], skip_special_tokens=True).strip(),
    }
    if speaks:
        request = processor.apply_speech_request(text).to(model.device)
        output = model.generate(**request, seed=0, max_seconds=2.0, return_dict_in_generate=True)
        made = output.spectrogram[0] if output.audio is None else output.audio[0]
        if len(made) == 0 or not torch.isfinite(made).all():
            raise ValueError(f"It speaks {text!r} as {len(made)} samples that are not all finite.")
        result["seconds"] = len(made) / (config.audio_config.frame_rate if output.audio is None else rate)
    return result


_WITH_CODE = """
import sys, soundfile
from transformers import AutoConfig, pipeline
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
recogniser = pipeline("automatic-speech-recognition", model=sys.argv[1], trust_remote_code=True)
assert "mel_llm" not in sys.modules, "the repository's code imports the installed package"
audio, rate = soundfile.read(sys.argv[2], dtype="float32")
recogniser({"raw": audio, "sampling_rate": rate})
if getattr(config, "speech_config", None) is not None:
    speaker = pipeline("text-to-speech", model=sys.argv[1], trust_remote_code=True)
    speaker("Test.", forward_params={"max_seconds": 0.5, "seed": 0})
"""


def try_remote_code(folder: str | os.PathLike, recording: str | os.PathLike) -> None:
    """Loads and calls a folder with its own code, in a process that does not import this package.

    Raises:
        ValueError: It fails; with the last line of what it said.
    """
    import soundfile

    from . import load_audio

    with tempfile.TemporaryDirectory() as scratch:
        clip = os.path.join(scratch, "clip.wav")
        soundfile.write(clip, load_audio(recording), 16000)
        result = subprocess.run(
            [sys.executable, "-c", _WITH_CODE, os.fspath(folder), clip],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise ValueError(f"It does not run with the code in its folder: {lines[-1]}")


__all__ = [
    "MAX_FILE_BYTES",
    "PICKLES",
    "RECORDS",
    "file_problems",
    "repository_files",
    "try_model",
    "try_remote_code",
    "without_paths",
]
