"""What the stock `Seq2SeqTrainer` needs to know about speech: the order of the clips, and features on the GPU; and how
what it trained is saved and pushed as a whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from transformers import Seq2SeqTrainer, TrainerCallback, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..model_card import CARD, create_model_card
from ..modeling_mel_llm import MelLLMForSpeechSeq2Seq
from ..modeling_mel_llm_continuation import MelLLMForSpeechContinuation
from ..modeling_mel_llm_speech import MelLLMSpeechOutput
from ..sharing_mel_llm import PROCESSOR_FILES, WEIGHT_FILES, prepare_repo, push_folder
from ..speech_heads_mel_llm import MelLLMSpeechHead
from .collator import TaskCollator
from .compilation import without_compiled_layers
from .dataset import SpeechDataset
from .lora import count_parameters
from .sampler import SpeechSampler
from .streaming import STATE_KEY, SpeechStream, StreamCollator
from .throughput import ThroughputMeter
from .token_budget import TokenBudgetSampler


logger = logging.get_logger(__name__)


class _SetEpoch(TrainerCallback):
    """accelerate wraps samplers in one another when a run on several processes is resumed, and then does not reach
    the innermost."""

    def __init__(self, sampler: SpeechSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class _CountUpdates(TrainerCallback):
    """Tells the speech head of each update: it sees forward passes, of which gradient accumulation makes several."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.heads = [module for module in model.modules() if isinstance(module, MelLLMSpeechHead)]
        for head in self.heads:
            head.counts_passes, head.num_passes = False, 0

    def on_step_end(self, args, state, control, **kwargs):
        for head in self.heads:
            head.num_updates += int(head.num_passes > 0)  # none where all batches were to be read
            head.num_passes = 0

    def on_train_end(self, args, state, control, **kwargs):
        for head in self.heads:
            head.counts_passes = True


class _SetAids(TrainerCallback):
    """Tells the model what of it is hidden, its own, or not learnt yet, in training; see [`SpeechTrainer`]."""

    def __init__(self, text_dropout: float, history_sampling: float, ctc_only_steps: int):
        self.text_dropout, self.history_sampling, self.ctc_only_steps = text_dropout, history_sampling, ctc_only_steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.models = [module for module in model.modules() if isinstance(module, MelLLMForSpeechSeq2Seq)]
        for module in self.models:
            module.text_dropout, module.history_sampling = self.text_dropout, self.history_sampling

    def on_step_begin(self, args, state, control, **kwargs):
        for module in self.models:
            module.text_loss_weight = float(state.global_step >= self.ctc_only_steps)


class SpeechTrainer(Seq2SeqTrainer):
    r"""`Seq2SeqTrainer` that follows a [`SpeechSampler`] and can make features on the model's device.

    The stock trainers train a Mel-LLM too; this one adds mixing by weight and by task, grouping by length, augmentation
    that a resumed run repeats exactly, and in the log the count of clips that could not be read (`bad_clips`) and the
    terms of the losses (`asr_loss`, `tts_loss`, `tts_kl`, `continuation_text`, ...).

    In evaluation, clips that are to be spoken, gone on with or answered give a loss alone, always with the same noise.

    A [`SpeechStream`] as `train_dataset` makes its own batches, and each checkpoint says where in it the run was.

    Args:
        train_sampler ([`SpeechSampler`], *optional*): Order of a [`SpeechDataset`]; a [`TokenBudgetSampler`] also says what
            a batch is, in the place of `per_device_train_batch_size`.
        history_sampling (`float`, defaults to 0.0): Share of the patches that a model which learns to speak has behind it which
            are what it would have written itself, in the place of the recording's, as in generation (scheduled sampling, Bengio
            et al., 2015; ours). Costs a forward pass more, and in half of the batches two.
        train_collator (*optional*): Makes the batches for training, where they are others than those for evaluation:
            [`PackedTranscriptionCollator`].
        ctc_only_steps (`int`, defaults to 0): Steps at first in which the CTC head's loss is all that is learnt from
            reading: on little data a language model recites the transcripts before it has begun to listen (ours).
        text_dropout (`float`, defaults to 0.0): Share of a transcript's tokens that the model does not see while it learns to
            write the next ones, against the same (ours). Answers to questions are always seen.
        kwargs: For `Seq2SeqTrainer`.
    """

    def __init__(
        self,
        *args,
        train_sampler: SpeechSampler | None = None,
        ctc_only_steps: int = 0,
        text_dropout: float = 0.0,
        history_sampling: float = 0.0,
        train_collator=None,
        **kwargs,
    ):
        if not 0.0 <= history_sampling <= 1.0:
            raise ValueError(f"`history_sampling` must be from 0 to 1, got {history_sampling}.")
        super().__init__(*args, **kwargs)
        if self.args.label_names is None:
            # All that forward() calls so, by default, and no loss for batches that lack one of them: of the tasks of
            # SPECTRON's model some have no `spectrogram_labels`
            self.label_names = ["labels"]
        if history_sampling and self.is_fsdp_enabled and isinstance(self.data_collator, TaskCollator):
            raise ValueError(
                "`history_sampling` does not go with FSDP and several tasks: processes would wait for each other's weights in different "
                "numbers of passes. Train one task, or use DDP."
            )
        self.train_sampler = train_sampler
        self.train_collator = train_collator
        self._terms = _Means()
        self.add_callback(_CountUpdates())
        self.add_callback(_SetAids(text_dropout, history_sampling, ctc_only_steps))
        self.meter = ThroughputMeter(self.model.config.audio_config.frame_rate)
        self.add_callback(self.meter)
        if train_sampler is not None:
            self.add_callback(_SetEpoch(train_sampler))

    def _get_train_sampler(self, train_dataset=None):
        if self.train_sampler is not None and (train_dataset is None or train_dataset is self.train_dataset):
            return self.train_sampler
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self):
        """Batches for training. Those of a [`SpeechStream`] or a [`TokenBudgetSampler`] are this process's own already."""
        is_stream = isinstance(self.train_dataset, SpeechStream)
        collator = self.data_collator if self.train_collator is None else self.train_collator
        if is_stream:
            options = {"batch_size": None, "collate_fn": StreamCollator(collator)}
        elif isinstance(self.train_sampler, TokenBudgetSampler):
            options = {"batch_sampler": self.train_sampler, "collate_fn": collator}
        else:
            evaluation, self.data_collator = self.data_collator, collator
            try:
                return super().get_train_dataloader()
            finally:
                self.data_collator = evaluation
        args = self.args
        return torch.utils.data.DataLoader(
            self.train_dataset,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            **options,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        stream = self.train_dataset
        if isinstance(stream, SpeechStream) and resume_from_checkpoint and not self.args.ignore_data_skip:
            folder = resume_from_checkpoint
            if not isinstance(folder, str | os.PathLike):
                folder = last_checkpoint(self.args.output_dir)
            if folder is not None:
                resume_stream(stream, folder, self.args)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if STATE_KEY in inputs:
            self.train_dataset.trained_on(inputs.pop(STATE_KEY))
        in_training = self.model.training and self.train_collator is not None
        collator = self.train_collator if in_training else self.data_collator
        if "raw_speech" in inputs and hasattr(collator, "finish"):
            inputs = collator.finish(inputs, device=self.args.device)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        weight = _weight(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self.meter.add(inputs)
            self._terms.add(_terms_of(outputs, inputs), weight)
            if isinstance(self.data_collator, TaskCollator) and not _is_spoken(inputs):
                self._terms.add({"asr_loss": loss.detach()}, weight)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        inputs = self._prepare_inputs(inputs)
        if not _is_spoken(inputs):
            if "input_ids" in inputs and inputs.get("labels") is not None:
                return self._answer_step(model, inputs, prediction_loss_only, ignore_keys, gen_kwargs)
            if any(isinstance(module, MelLLMForSpeechContinuation) for module in model.modules()):
                # It would go on with what it hears
                gen_kwargs = {**(gen_kwargs or getattr(self, "_gen_kwargs", {})), "task": "transcribe"}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys, **gen_kwargs)
        return loss, None, None

    def _answer_step(self, model, inputs, prediction_loss_only: bool, ignore_keys, gen_kwargs: dict):
        """Loss, answers and right answers of chats: the stock trainer would show the model what it is to answer."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        asked = {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        if any(isinstance(module, MelLLMForSpeechContinuation) for module in model.modules()):
            asked["task"] = "transcribe"  # it would go on with what it hears
        limits = [asked.pop(name, None) for name in ("max_new_tokens", "max_length")]
        rows = [row[row != -100] for row in inputs["labels"]]
        # The answer alone counts; one that is much longer than the right one is wrong already
        limit = next((value for value in limits if value is not None), max(map(len, rows)) + 16)
        prompts, mask = _prompts_of(inputs, self.processing_class.tokenizer.pad_token_id)
        features = {name: inputs[name] for name in ("input_features", "input_features_mask")}
        kwargs = {name: value for name, value in asked.items() if value is not None}
        ids = self.model.generate(input_ids=prompts, attention_mask=mask, **features, **kwargs, max_new_tokens=limit)
        return loss, ids[:, prompts.shape[1] :], pad_sequence(rows, batch_first=True, padding_value=-100)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        terms = _Means()
        # The stock trainer keeps nothing but the loss
        hook = self.model.register_forward_hook(
            lambda module, args, kwargs, outputs: terms.add(_terms_of(outputs, kwargs), _weight(kwargs)),
            with_kwargs=True,
        )
        try:
            with without_compiled_layers(self.model):
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            hook.remove()
        for name, value in terms.take(self.args.world_size).items():
            # `eval_tts_kl` also where the clips to be spoken are a dataset of their own, "eval_tts"
            task, _, term = name.partition("_")
            prefix = metric_key_prefix if metric_key_prefix.endswith(f"_{task}") else f"{metric_key_prefix}_{task}"
            output.metrics.setdefault(f"{prefix}_{term}", value)
        return output

    def init_hf_repo(self, *args, **kwargs) -> None:
        # With its branch, which the first upload needs, and with words about what to do if the Hub refuses
        if self.is_world_process_zero():
            repo_of(self.args)
        super().init_hf_repo(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = {**logs, **self._terms.take(self.args.world_size)}
        if isinstance(self.train_dataset, SpeechDataset) and self.train_dataset.num_bad_clips:
            logs = {**logs, "bad_clips": self.train_dataset.num_bad_clips}
        if isinstance(self.train_dataset, SpeechStream) and "loss" in logs:
            logs = {**logs, "stream_passes": self.train_dataset.num_passes}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # PEFT writes a README, or into the one that is there: with the path of the base model on this machine
        folder = Path(output_dir or self.args.output_dir)
        card = folder / CARD
        before = card.read_bytes() if card.is_file() else None
        super().save_model(output_dir, _internal_call)
        if isinstance(self.train_dataset, SpeechStream) and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            # Before `trainer_state.json`, without which a checkpoint does not count
            folder.mkdir(parents=True, exist_ok=True)
            self.train_dataset.save_state(folder, self.args.dataloader_num_workers)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            card.unlink(missing_ok=True) if before is None else card.write_bytes(before)
            if folder == Path(
                self.args.output_dir
            ):  # what goes to the Hub has no pickle, which nobody should have to trust
                (folder / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """Writes the model's card, as [`mel_llm.create_model_card`] does, into `args.output_dir`.

        A card that somebody wrote or edited is left alone. Arguments are as for
        [`~transformers.Trainer.create_model_card`] (`tasks`, `dataset` and `dataset_args` have no place on this card);
        others go to [`mel_llm.create_model_card`].
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        trained, total = count_parameters(model)
        record = {
            "hyperparameters": extract_hyperparameters_from_trainer(self),
            "parameters": {"trained": trained, "all": total},
            "state": {name: getattr(self.state, name) for name in ("global_step", "epoch", "log_history")},
        }
        datasets = [dataset_tags] if isinstance(dataset_tags, str) else list(dataset_tags or [])
        data = kwargs.pop("data", [{"name": name} for name in datasets])
        try:
            create_model_card(
                self.args.output_dir,
                name=model_name,
                repo_id=getattr(self, "hub_model_id", None),
                language=language,
                license=license,
                tags=[tags] if isinstance(tags, str) else list(tags or []),
                base_model=finetuned_from,
                data=data,
                training=record,
                config=model.config,
                **kwargs,
            )
        except FileExistsError as error:
            logger.warning(f"{error} The card is left as it is.")


def resume_stream(stream: SpeechStream, folder: str | os.PathLike, args: TrainingArguments) -> None:
    """Sets a stream to where it was in a checkpoint.

    Raises:
        ValueError: See [`SpeechStream.load_state`].
    """
    step = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    accumulated = args.gradient_accumulation_steps
    stream.load_state(folder, args.dataloader_num_workers, step * accumulated, args.max_steps * accumulated)


def _is_spoken(inputs: dict[str, Any]) -> bool:
    labels = inputs.get("labels")
    return "spectrogram_labels" in inputs or (labels is not None and labels.is_floating_point())


def _prompts_of(inputs: dict[str, Any], pad_token_id: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands before the first label of each chat, padded on the left as for `generate`, and its mask."""
    rows = [
        ids[mask.bool()][: int((labels[mask.bool()] != -100).long().argmax())]
        for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True)
    ]
    pad = {"batch_first": True, "padding_side": "left"}
    masks = pad_sequence([torch.ones_like(row) for row in rows], **pad)
    return pad_sequence(rows, padding_value=pad_token_id or 0, **pad), masks


def _terms_of(outputs, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The terms of a loss, by the names that they have in the log."""
    terms = outputs.get("losses") if isinstance(outputs, dict) else None
    task = "tts" if isinstance(outputs, MelLLMSpeechOutput) else "asr"
    if "spectrogram_labels" in inputs:
        task = inputs.get("task", "continuation")
    return {f"{task}_{name}": value for name, value in (terms or {}).items()}


def _weight(inputs: dict[str, Any]) -> torch.Tensor | int:
    """What a batch counts in means over batches: its tokens, or its frames, as in the losses themselves; or its examples,
    where each term counts something else."""
    if "spectrogram_labels" in inputs:
        return len(inputs["spectrogram_labels"])
    return (inputs["labels"] != -100).sum() if inputs.get("labels") is not None else 1


class _Means:
    """Weighted means by name, which wait for the device, and for other processes, only when they are taken."""

    def __init__(self):
        self.sums: dict[str, tuple] = {}  # of values, of weights

    def add(self, values: dict[str, torch.Tensor], weight: torch.Tensor | int) -> None:
        for name, value in values.items():
            total, weights = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.detach() * weight, weights + weight)

    def take(self, world_size: int) -> dict[str, float]:
        """The means since the last time; all processes must ask."""
        mine = {name: (float(total), float(weights)) for name, (total, weights) in self.sums.items()}
        self.sums = {}
        parts = gather_object([mine]) if world_size > 1 else [mine]
        names = dict.fromkeys(name for part in parts for name in part)
        pairs = {name: [part[name] for part in parts if name in part] for name in names}
        return {name: round(sum(t for t, _ in pair) / sum(w for _, w in pair), 6) for name, pair in pairs.items()}


# All that a saved model or adapter may consist of
_MODEL_FILES = ("config.json", "generation_config.json", *WEIGHT_FILES)
# What of a run's folder is no part of the model, and, last, what the Trainer has put into a repository of it
_RUN_FILES = ("checkpoint-*", "base/*", ".*", "_*", "training_args.bin")


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in `folder` that was written to its end, or `None`.

    The Trainer writes `trainer_state.json` last, so a checkpoint without a whole one was interrupted and is passed over.
    """
    steps = {}
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            steps[int(step)] = path
    for step in sorted(steps, reverse=True):
        try:
            json.loads((steps[step] / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ended before it was opened, or while it was being written
            continue
        return str(steps[step])
    return None


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
        delete_patterns=[*WEIGHT_FILES, *PROCESSOR_FILES, "base/*", "training_args.bin"],
        ignore_patterns=list(_RUN_FILES),
    )


__all__ = ["SpeechTrainer", "last_checkpoint", "push_whole", "repo_of", "resume_stream", "save_whole"]
