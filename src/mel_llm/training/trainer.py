"""What the stock `Seq2SeqTrainer` needs to know about speech: the order of the clips, and features on the GPU; and how
what it trained is saved and pushed as a whole."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainer, TrainerCallback, TrainingArguments

from ..sharing_mel_llm import WEIGHT_FILES, prepare_repo, push_folder
from .collator import TranscriptionCollator
from .dataset import SpeechDataset
from .sampler import SpeechSampler


class _SetEpoch(TrainerCallback):
    """accelerate wraps samplers in one another when a run on several processes is resumed, and then does not reach
    the innermost."""

    def __init__(self, sampler: SpeechSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class SpeechTrainer(Seq2SeqTrainer):
    r"""`Seq2SeqTrainer` that follows a [`SpeechSampler`] and can make features on the model's device.

    The stock trainers train a Mel-LLM too; this one adds mixing by weight, grouping by length, augmentation that a
    resumed run repeats exactly, and the count of clips that could not be read (`bad_clips` in the log).

    Args:
        train_sampler ([`SpeechSampler`], *optional*): Order of a [`SpeechDataset`].
        kwargs: For `Seq2SeqTrainer`.
    """

    def __init__(self, *args, train_sampler: SpeechSampler | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_sampler = train_sampler
        if train_sampler is not None:
            self.add_callback(_SetEpoch(train_sampler))

    def _get_train_sampler(self, train_dataset=None):
        if self.train_sampler is not None and (train_dataset is None or train_dataset is self.train_dataset):
            return self.train_sampler
        return super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "raw_speech" in inputs and isinstance(self.data_collator, TranscriptionCollator):
            inputs = dict(inputs)
            seeds = inputs.pop("augment_seeds")
            inputs.update(self.data_collator.features(inputs.pop("raw_speech"), seeds, device=self.args.device))
        return super()._prepare_inputs(inputs)

    def init_hf_repo(self, *args, **kwargs) -> None:
        # With its branch, which the first upload needs, and with words about what to do if the Hub refuses
        if self.is_world_process_zero():
            repo_of(self.args)
        super().init_hf_repo(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if isinstance(self.train_dataset, SpeechDataset) and self.train_dataset.num_bad_clips:
            logs = {**logs, "bad_clips": self.train_dataset.num_bad_clips}
        super().log(logs, *args, **kwargs)


# All that a saved model or adapter may consist of
_MODEL_FILES = ("config.json", "generation_config.json", *WEIGHT_FILES)
# What of a run's folder is no part of the model, and, last, what the Trainer has put into a repository of it
_RUN_FILES = ("checkpoint-*", "base/*", ".*", "_*", "training_args.bin")


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in `folder` that was written to its end, or `None`.

    The Trainer writes `trainer_state.json` last, so a checkpoint without one was interrupted and is passed over.
    """
    complete = {}
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and (path / "trainer_state.json").is_file():
            complete[int(step)] = str(path)
    return complete[max(complete)] if complete else None


def save_whole(trainer: Seq2SeqTrainer, processor, folder: str | os.PathLike) -> None:
    """Saves the model and its processor into `folder`: each file appears when it is complete.

    A model or an adapter that is there already is replaced, and what is left over of it goes: a model beside an adapter
    that is not its own would be loaded with it. Other files stay.
    """
    folder = Path(folder)
    partial = folder / ".saving"
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    # All processes take part where the weights are sharded. Not a user's call, which would push the unfinished folder.
    trainer.save_model(str(partial), _internal_call=True)
    if not trainer.args.should_save:
        return
    processor.save_pretrained(partial)
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to trust
    # The weights last: a folder with a config but without weights is refused, the other way round it is misread
    fresh = sorted(partial.iterdir(), key=lambda path: path.suffix in (".safetensors", ".bin"))
    names = {path.name for path in fresh}
    for pattern in _MODEL_FILES:
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()
    for path in fresh:
        os.replace(path, folder / path.name)
    partial.rmdir()


def repo_of(args: TrainingArguments, suffix: str = "") -> str:
    """The full name of the repository that a run pushes to, or of one beside it; it exists from now on.

    Raises:
        HfHubHTTPError: The Hub refuses; the message says what to do.
    """
    name = (args.hub_model_id or Path(args.output_dir).absolute().name) + suffix
    revision = None if suffix else args.hub_revision
    return prepare_repo(name, private=args.hub_private_repo, token=args.hub_token, revision=revision)


def push_whole(folder: str | os.PathLike, args: TrainingArguments) -> None:
    """Pushes what [`save_whole`] left in `folder`, in one commit in which left-over weights go, to the run's repository.

    Raises:
        HfHubHTTPError, ConnectionError: See [`mel_llm.sharing_mel_llm.push_folder`]. What is in the folder stays.
    """
    push_folder(
        folder,
        repo_of(args),
        token=args.hub_token,
        revision=args.hub_revision,
        commit_message="End of training",
        delete_patterns=[*WEIGHT_FILES, "base/*", "training_args.bin"],
        ignore_patterns=list(_RUN_FILES),
    )


__all__ = ["SpeechTrainer", "last_checkpoint", "push_whole", "repo_of", "save_whole"]
