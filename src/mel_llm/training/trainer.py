"""What the stock `Seq2SeqTrainer` needs to know about speech: the order of the clips, and features on the GPU."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainer, TrainerCallback

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

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if isinstance(self.train_dataset, SpeechDataset) and self.train_dataset.num_bad_clips:
            logs = {**logs, "bad_clips": self.train_dataset.num_bad_clips}
        super().log(logs, *args, **kwargs)


# All that a saved model or adapter may consist of
_MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors"),
    *("model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"),
)


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
    trainer.save_model(str(partial))  # all processes take part where the weights are sharded
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


__all__ = ["SpeechTrainer", "last_checkpoint", "save_whole"]
