"""What the stock `Seq2SeqTrainer` needs to know about speech: the order of the clips, and features on the GPU."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, TrainerCallback

from ..modeling_mel_llm_speech import MelLLMSpeechOutput
from .collator import TaskCollator
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

    The stock trainers train a Mel-LLM too; this one adds mixing by weight and by task, grouping by length, augmentation
    that a resumed run repeats exactly, and in the log the count of clips that could not be read (`bad_clips`) and the
    terms of the losses (`asr_loss`, `tts_loss`, `tts_kl`, ...).

    In evaluation, clips that are to be spoken give a loss alone, always with the same noise.

    Args:
        train_sampler ([`SpeechSampler`], *optional*): Order of a [`SpeechDataset`].
        ctc_only_steps (`int`, defaults to 0): Steps at first in which the CTC head's loss is all that is learnt from
            reading: on little data a language model recites the transcripts before it has begun to listen (ours).
        kwargs: For `Seq2SeqTrainer`.
    """

    def __init__(self, *args, train_sampler: SpeechSampler | None = None, ctc_only_steps: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.ctc_only_steps = ctc_only_steps
        self.train_sampler = train_sampler
        self._terms = _Means()
        if train_sampler is not None:
            self.add_callback(_SetEpoch(train_sampler))

    def _get_train_sampler(self, train_dataset=None):
        if self.train_sampler is not None and (train_dataset is None or train_dataset is self.train_dataset):
            return self.train_sampler
        return super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "raw_speech" in inputs and hasattr(self.data_collator, "finish"):
            inputs = self.data_collator.finish(inputs, device=self.args.device)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            ctc_loss = outputs.get("ctc_loss")
            if ctc_loss is not None and self.state.global_step < self.ctc_only_steps:
                config = self.accelerator.unwrap_model(self.model).config
                loss = config.audio_config.ctc_weight * ctc_loss
            self._terms.add(_terms_of(outputs))
            if isinstance(self.data_collator, TaskCollator) and not _is_spoken(inputs):
                self._terms.add({"asr_loss": loss.detach()})
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        inputs = self._prepare_inputs(inputs)
        if not _is_spoken(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys, **gen_kwargs)
        return loss, None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        terms = _Means()
        # The stock trainer keeps nothing but the loss
        hook = self.model.register_forward_hook(lambda module, inputs, outputs: terms.add(_terms_of(outputs)))
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            hook.remove()
        for name, value in terms.take().items():
            # `eval_tts_kl` also where the clips to be spoken are a dataset of their own, "eval_tts"
            task, _, term = name.partition("_")
            prefix = metric_key_prefix if metric_key_prefix.endswith(f"_{task}") else f"{metric_key_prefix}_{task}"
            output.metrics.setdefault(f"{prefix}_{term}", value)
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = {**logs, **self._terms.take()}
        if isinstance(self.train_dataset, SpeechDataset) and self.train_dataset.num_bad_clips:
            logs = {**logs, "bad_clips": self.train_dataset.num_bad_clips}
        super().log(logs, *args, **kwargs)


def _is_spoken(inputs: dict[str, Any]) -> bool:
    labels = inputs.get("labels")
    return labels is not None and labels.is_floating_point()


def _terms_of(outputs) -> dict[str, torch.Tensor]:
    """The terms of a loss, by the names that they have in the log."""
    terms = outputs.get("losses") if isinstance(outputs, dict) else None
    task = "tts" if isinstance(outputs, MelLLMSpeechOutput) else "asr"
    return {f"{task}_{name}": value for name, value in (terms or {}).items()}


class _Means:
    """Running means by name, which wait for the device only when they are taken."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
            self.counts[name] += 1

    def take(self) -> dict[str, float]:
        """The means since the last time."""
        means = {name: round(value.item() / self.counts[name], 6) for name, value in self.sums.items()}
        self.sums, self.counts = {}, Counter()
        return means


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
