"""How a checkpoint is shared: its weights as safetensors, its files in one commit, and, if wanted, its code beside them.

With the code in the repository ("remote code"), `Auto...from_pretrained(..., trust_remote_code=True)` loads the model
where this package is not installed; where it is, the code in the repository is never run.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar


if TYPE_CHECKING:
    # transformers finds the files of remote code by reading the `from .module import` lines of a class's own file, of the
    # files that they name, and so on, whether or not they are ever run. These make that set the same, and whole, from
    # whichever class it begins: what is saved as one kind of model can be loaded as every other kind.
    from .modeling_mel_llm_continuation import MelLLMForSpeechContinuation  # noqa: F401
    from .processing_mel_llm import MelLLMProcessor  # noqa: F401


# What `auto_map` in a checkpoint's configuration files says: which class of which file an Auto class is to load
AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_mel_llm.MelLLMConfig",
    "AutoModel": "modeling_mel_llm.MelLLMModel",
    "AutoModelForPreTraining": "modeling_mel_llm_continuation.MelLLMForSpeechContinuation",
    "AutoModelForSpeechSeq2Seq": "modeling_mel_llm.MelLLMForSpeechSeq2Seq",
    "AutoModelForMultimodalLM": "modeling_mel_llm.MelLLMForSpeechSeq2Seq",
    "AutoModelForTextToWaveform": "modeling_mel_llm_speech.MelLLMForTextToSpeech",
    "AutoFeatureExtractor": "feature_extraction_mel_llm.MelLLMFeatureExtractor",
    "AutoProcessor": "processing_mel_llm.MelLLMProcessor",
}
# The same in the files of a processor
_PROCESSOR_MAP = {name: AUTO_MAP[name] for name in ("AutoFeatureExtractor", "AutoProcessor")}

# All that the weights in a folder may consist of. Whatever of these a newly saved model does not have is left over from
# another one, and transformers would load it: a whole file before shards, adapters on top of either.
WEIGHT_FILES = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
)

# The same for a processor: what transformers 4 wrote, or another tokenizer has, would be read with what is new
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


def _code_files() -> list[Path]:
    """The files that remote code consists of: this one and all that it reaches by relative imports."""
    from transformers.dynamic_module_utils import get_relative_import_files

    return sorted({Path(path).resolve() for path in (__file__, *get_relative_import_files(__file__))})


class MelLLMSharingMixin:
    """`save_pretrained` and `push_to_hub` with the code beside the files, for models and processors.

    Once asked for with `remote_code=True` (or by [`export_remote_code`], or by the checkpoint that it was loaded from),
    the code comes with every later save, those of the `Trainer` too, until `remote_code=False`.
    """

    # What of a repository goes when this is pushed and does not have it
    _replaced_files: ClassVar[tuple[str, ...]] = ()

    @property
    def _is_processor(self) -> bool:
        return hasattr(self, "feature_extractor")

    def _code_bearer(self) -> Any:
        """The part whose `auto_map` is saved and loaded again, and so remembers."""
        return self.feature_extractor if self._is_processor else self.config

    def _set_remote_code(self, remote_code: bool | None) -> None:
        bearer = self._code_bearer()
        if remote_code is None:
            remote_code = getattr(bearer, "auto_map", None) is not None
        # transformers copies the files for a processor or a config that has an `_auto_class`
        saver = self if self._is_processor else bearer
        if not remote_code:
            saver._auto_class = None
            for part in (bearer, self):  # transformers leaves it in a processor too
                part.__dict__.pop("auto_map", None)
            if (tokenizer := getattr(self, "tokenizer", None)) is not None:
                tokenizer.init_kwargs.pop("auto_map", None)
            return
        if f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}" not in AUTO_MAP.values():
            raise ValueError(
                f"`remote_code`: {type(self).__name__} is not one of this package's classes that Auto classes load. For "
                "a class of your own, call its `register_for_auto_class()`."
            )
        saver._auto_class = "AutoProcessor" if self._is_processor else "AutoConfig"
        bearer.auto_map = dict(_PROCESSOR_MAP if self._is_processor else AUTO_MAP)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, remote_code: bool | None = None, **kwargs):
        """As in transformers, and:

        Args:
            remote_code (`bool`, *optional*): Save this package's code beside the files, for those who load them with
                `trust_remote_code=True` instead of the package. By default as last time.
        """
        if remote_code is not None or getattr(self._code_bearer(), "auto_map", None) is not None:
            self._set_remote_code(remote_code)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        remote_code: bool | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
    ):
        """Uploads this to the Hub in one commit, as in transformers; see [`push_folder`] for the other arguments.

        Weights that the repository has of another model (one file where there are shards now, an adapter), or files of
        another tokenizer, go with the same commit.

        Args:
            repo_id (`str`): `"user/name"`, or `"name"` for one of your own. It is created if it does not exist.
            remote_code (`bool`, *optional*): As in [`save_pretrained`].
            max_shard_size (`int` or `str`, *optional*): Of a model: largest file of weights, such as `"5GB"`.
            tags (`list[str]`, *optional*): Tags for the model card.

        Returns:
            `CommitInfo`

        Raises:
            HfHubHTTPError: The Hub refuses; the message says what to do.
            ConnectionError: The upload broke off. Nothing was committed.
        """
        from transformers.utils.hub import create_and_tag_model_card

        repo_id = prepare_repo(repo_id, private=private, token=token, revision=revision, create_pr=create_pr)
        card = create_and_tag_model_card(repo_id, tags, token=token)
        kind = "processor" if self._is_processor else "model"
        with tempfile.TemporaryDirectory() as folder:
            shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.save_pretrained(folder, remote_code=remote_code, **shards)
            card.save(os.path.join(folder, "README.md"))
            return push_folder(
                folder,
                repo_id,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {kind}",
                commit_description=commit_description,
                delete_patterns=list(self._replaced_files),
            )


class SafetensorsOnlyMixin:
    """Models whose weights are read from safetensors: nothing that a pickle could hide is ever unpickled."""

    _replaced_files: ClassVar[tuple[str, ...]] = WEIGHT_FILES

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = None, **kwargs):
        """As in transformers, except that weights must be safetensors unless `use_safetensors=False` says otherwise.

        Raises:
            ValueError: The index of a folder's shards names files that are not in the folder itself.
        """
        use_safetensors = True if use_safetensors is None else use_safetensors
        _check_shard_names(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=use_safetensors, **kwargs)


def _check_shard_names(folder: Any, subfolder: str) -> None:
    """transformers joins them to the folder's name as they are. (Of a repository on the Hub, nothing else can be had.)"""
    if not isinstance(folder, str | os.PathLike) or not os.path.isdir(folder):
        return
    for path in Path(folder, subfolder).glob("*.index*.json"):  # a `variant` stands in the middle
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not an index of weights: {error}") from error
        for name in names:
            if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(f"{path} names weights outside of its folder: {name!r}.")


# --- the Hub --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Says what can be done when the Hub refuses."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        advice = {
            401: "Log in with `hf auth login`, or pass a `token` that may write; they are made at "
            "https://huggingface.co/settings/tokens.",
            403: f"Your token may not write to {repo_id!r}. Use a token with write permission, or a `repo_id` in your "
            "own namespace.",
            404: f"There is no {repo_id!r} that this token can see. Check its name, the `revision`, and the token.",
            412: "Somebody else pushed in the meantime. Push again.",
        }.get(error.response.status_code, "Push again; what was uploaded whole is not sent twice.")
        error.append_to_message(f"\n{advice}")
        raise


def prepare_repo(
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Makes sure that there is such a repository, with a branch `revision`, and returns its full name.

    Raises:
        HfHubHTTPError: The Hub refuses; the message says what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    delete_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
):
    """Uploads the files of a folder in one commit: readers see the old files or the new ones.

    (Beyond 250 files, `huggingface_hub` with Xet makes several commits.)

    Args:
        folder: What to upload.
        repo_id (`str`): An existing repository; [`prepare_repo`] makes one.
        token (`bool` or `str`, *optional*): A token that may write; the one that `hf auth login` saved by default.
        revision (`str`, *optional*): The branch; `"main"` by default.
        create_pr (`bool`, defaults to `False`): Open a pull request instead.
        commit_message (`str`), commit_description (`str`, *optional*): Title and text of the commit.
        delete_patterns (`list[str]`, *optional*): Files of the repository that go, unless the folder has them.
        ignore_patterns (`list[str]`, *optional*): Files of the folder that stay behind.

    Returns:
        `CommitInfo`

    Raises:
        HfHubHTTPError: The Hub refuses; the message says what to do.
        ConnectionError: The upload broke off. The message says whether anything was committed.
        NotADirectoryError: There is no such folder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not os.path.isdir(folder):
        raise NotADirectoryError(f"`folder`: there is no folder {os.fspath(folder)!r}.")
    api = HfApi(token=token)
    before = _head(api, repo_id, revision)
    try:
        with _explained(repo_id):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
                delete_patterns=delete_patterns or None,
                ignore_patterns=ignore_patterns,
            )
    except (HfHubHTTPError, ValueError, TypeError):  # refused, by the Hub or before anything was sent
        raise
    except Exception as error:  # of the HTTP library, which has changed names between versions of huggingface_hub
        causes = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        reason = " ".join(str(cause) for cause in causes)
        after = _head(api, repo_id, revision)
        again = "Push again; what was uploaded whole is not sent twice."
        if before is None or after is None or create_pr:
            state = f"and whether the repository has it is not known: {reason} Look there, or push again."
        elif after == before:
            state = f"and the repository is as it was: {reason} {again}"
        else:
            state = f"but the repository has a new commit, {after[:7]}: {reason} If it is not this one: {again}"
        raise ConnectionError(f"The upload to {repo_id!r} broke off, {state}") from error


def _head(api, repo_id: str, revision: str | None) -> str | None:
    """The commit that the branch is at; `None` if nobody says."""
    try:
        return api.repo_info(repo_id, revision=revision).sha
    except Exception:  # this is for a message only
        return None


# --- remote code ----------------------------------------------------------------------------------------------------


def export_remote_code(target) -> None:
    """Puts this package's code beside a checkpoint, so that it loads with `trust_remote_code=True` where the package is
    not installed.

    Args:
        target: A folder with a checkpoint: the code is copied into it and named in its configuration files, each of
            which appears whole. Or a model or a processor: from now on the code comes with whatever it saves or pushes
            (and so with the checkpoints of a `Trainer`).

    Raises:
        ValueError: It is neither, or the folder holds an adapter, whose base model carries the code.
    """
    if isinstance(target, MelLLMSharingMixin):
        target._set_remote_code(True)
        return
    if hasattr(target, "get_base_model"):  # PEFT
        export_remote_code(target.get_base_model())
        return
    if not isinstance(target, str | os.PathLike):
        raise ValueError(f"`target` must be a folder, a Mel-LLM model or its processor, got {type(target).__name__}.")
    folder = Path(target)
    maps = {
        "config.json": AUTO_MAP,
        "processor_config.json": _PROCESSOR_MAP,
        "preprocessor_config.json": _PROCESSOR_MAP,
    }
    maps["tokenizer_config.json"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    found = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in maps if (folder / name).is_file()
    }
    if found.get("config.json", {}).get("model_type", "mel_llm") != "mel_llm" or not found.keys() - {
        "tokenizer_config.json"
    }:
        adapter = (folder / "adapter_config.json").is_file()
        reason = "holds an adapter: export the code of its base model" if adapter else "is not a folder with a Mel-LLM"
        raise ValueError(f"`target` {str(folder)!r} {reason}.")
    for path in _code_files():
        _replace(folder / path.name, path.read_bytes())
    for name, fields in found.items():
        fields["auto_map"] = {**(fields.get("auto_map") or {}), **maps[name]}
        if isinstance(fields.get("feature_extractor"), dict):
            fields["feature_extractor"]["auto_map"] = dict(_PROCESSOR_MAP)
        _replace(folder / name, (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


__all__ = ["export_remote_code", "prepare_repo", "push_folder"]
