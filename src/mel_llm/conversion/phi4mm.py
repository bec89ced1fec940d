"""Phi-4-multimodal becomes a Mel-LLM: as it is, with its speech encoder, or without one.

The paper (arXiv 2606.10231) builds on Phi-4-multimodal: same features, normalisation, convolution stem, projector, language
model and speech LoRA, and no Conformer. Which of the weights its models began with is known in part only: the LoRA was
either Phi-4-multimodal's or random (stated), the encoder of its baselines too (stated), and of stem and projector nothing
is said. So each of these parts can be taken over or made anew.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig

from ..configuration_mel_llm import MelLLMConfig
from ..modeling_mel_llm import MelLLMAudioEmbedder, MelLLMForSpeechSeq2Seq, MelLLMProjector
from ..processing_mel_llm import MelLLMProcessor
from .new_folder import check_new_folder, new_folder
from .phi4mm_config import audio_config, text_config
from .phi4mm_keys import PARTS, find_place
from .phi4mm_processor import build_processor
from .phi4mm_source import ADAPTER_FOLDER, Phi4MMSource, StoredTensor, TensorReader, read_json
from .text_llm import silence_threshold


ENCODERS = ("none", "conformer")
LORA_WAYS = ("merge", "adapter", "drop")

_NORMALIZER = "model.audio_embedder.normalizer."
_SLACK = 64 << 20  # bytes of tokenizer and the like, when free space is looked at


@dataclass
class ConversionPlan:
    """What is written from what, all of it checked against names and shapes, before anything is.

    `weights` has the weights of the Mel-LLM with where each comes from, `None` for what is made anew; `factors` the LoRA's A
    and B by the weight that they change; `dropped` the weights of the checkpoint that are not used, with the reason.
    """

    source: Phi4MMSource
    config: MelLLMConfig
    speech_lora: str
    seed: int
    dtype: torch.dtype | None
    shapes: dict[str, tuple[int, ...]]
    weights: dict[str, StoredTensor | None] = field(default_factory=dict)
    factors: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def dtype_of(self, target: str) -> torch.dtype:
        """The precision in which a weight is written. The normalisation is float32 in any model: see its class."""
        if target.startswith(_NORMALIZER):
            return torch.float32
        stored = self.weights[target]
        return self.dtype or (self.model_dtype if stored is None else stored.dtype)

    @property
    def model_dtype(self) -> torch.dtype:
        """That of most weights: in which the model is loaded unless its user says otherwise."""
        counts: Counter[torch.dtype] = Counter()
        for stored in filter(None, self.weights.values()):
            counts[stored.dtype] += stored.bytes
        return self.dtype or counts.most_common(1)[0][0]

    @property
    def bytes(self) -> int:
        """Of all that is written, but for small files."""
        names = list(self.weights)
        total = 0
        if self.speech_lora == "adapter":
            names += self.audio_weights
            for stored in (stored for pair in self.factors.values() for stored in pair.values()):
                total += math.prod(stored.shape) * (self.dtype or stored.dtype).itemsize
        return total + sum(math.prod(self.shapes[name]) * self.dtype_of(name).itemsize for name in names)

    @property
    def audio_weights(self) -> list[str]:
        """Names of what is trained whole beside a LoRA."""
        return [name for name in self.weights if name.startswith(("model.audio_embedder.", PARTS["projector"]))]

    def lines(self) -> Iterator[str]:
        """The mapping, a weight on each line."""
        used = {id(stored): target for target, stored in self.weights.items() if stored is not None}
        how = {"merge": "merged into", "adapter": "adapter of"}.get(self.speech_lora)
        for target, pair in self.factors.items():
            used.update((id(stored), f"{how} {target}") for stored in pair.values())
        for name, stored in sorted({**self.source.tensors, **self.source.replaced}.items(), key=lambda item: item[0]):
            what = used.get(id(stored)) or f"dropped: {self.dropped[name]}"
            yield f"{name} {str(stored.dtype).removeprefix('torch.')} {list(stored.shape)} -> {what}"
        for target, stored in self.weights.items():
            if stored is None:
                yield f"made anew {list(self.shapes[target])} -> {target}"

    def summary(self) -> Iterator[str]:
        """The same in numbers."""
        number = sum(math.prod(self.shapes[name]) for name in self.weights if not name.startswith(_NORMALIZER))
        yield f"{len(self.weights)} weights of the Mel-LLM, {number:,} parameters, {self.bytes / 1e9:.2f} GB"
        if self.factors:
            lora = self.source.lora
            yield f"speech LoRA of {len(self.factors)} weights, r = {lora.r}, alpha = {lora.alpha:g}: {self.speech_lora}"
        for part, start in PARTS.items():
            if count := sum(stored is None and name.startswith(start) for name, stored in self.weights.items()):
                yield f"{count} weights made anew: {part}"
        for reason, count in Counter(self.dropped.values()).most_common():
            yield f"{count} weights dropped: {reason}"


def plan_conversion(
    source: Phi4MMSource,
    processor: MelLLMProcessor,
    encoder: str = "none",
    speech_lora: str = "merge",
    random_init: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> ConversionPlan:
    """Decides about every weight, and checks that the Mel-LLM gets all of its own in the right shapes.

    Args:
        source: The checkpoint, see [`open_source`].
        processor: See [`build_processor`].
        encoder: `"none"` is Mel-LLM; `"conformer"` keeps the speech encoder, for the paper's baselines.
        speech_lora: `"merge"` adds the speech LoRA to the language model's weights, `"adapter"` keeps it apart, `"drop"`
            leaves it out.
        random_init: Parts that are made anew: `"stem"`, `"encoder"`, `"projector"`.
        dtype: Of what is written; that of each weight in the checkpoint by default.
        seed: Of what is made anew.

    Raises:
        ValueError: An argument is none of these, or the weights and the config do not agree.
    """
    for name, value, choices in (("encoder", encoder, ENCODERS), ("speech_lora", speech_lora, LORA_WAYS)):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    if unknown := sorted(set(random_init) - PARTS.keys()):
        raise ValueError(f"`random_init`: the parts are {', '.join(PARTS)}, got {unknown[0]!r}.")
    if "encoder" in random_init and encoder == "none":
        raise ValueError('`random_init`: there is no encoder to make anew with encoder="none".')

    config = _mel_llm_config(source, processor, encoder)
    with torch.device("meta"):
        model = MelLLMForSpeechSeq2Seq(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    plan = ConversionPlan(source, config, speech_lora, seed, dtype, shapes)
    _place_weights(plan, encoder, set(random_init))
    _check_weights(plan)
    _check_factors(plan)
    return plan


def _mel_llm_config(source: Phi4MMSource, processor: MelLLMProcessor, encoder: str) -> MelLLMConfig:
    extractor = processor.feature_extractor
    audio = audio_config(source.config, encoder, extractor.hop_length, extractor.sampling_rate)
    audio.silence_threshold = silence_threshold(extractor)
    prefix, suffix = processor.default_prompt_ids()
    speech_prefix, speech_suffix = processor.speech_prompt_ids()
    end = processor.response_eos_token_id()
    ends: list[int] = []
    path = source.folder / "generation_config.json"
    stored = read_json(path).get("eos_token_id") if path.is_file() else None
    for value in (stored, source.config.eos_token_id, end):
        ends += [index for index in (value if isinstance(value, list) else [value]) if index is not None]
    return MelLLMConfig(
        text_config=text_config(source.config),
        audio_config=audio,
        audio_token_id=processor.audio_token_id,
        prompt_prefix_ids=prefix,
        prompt_suffix_ids=suffix,
        speech_prefix_ids=speech_prefix,
        speech_suffix_ids=speech_suffix,
        bos_token_id=source.config.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=processor.tokenizer.pad_token_id,
        response_eos_token_id=end,
        tie_word_embeddings=bool(source.config.tie_word_embeddings),
    )


def _place_weights(plan: ConversionPlan, encoder: str, random_init: set[str]) -> None:
    unknown = []
    for name, stored in plan.source.tensors.items():
        place = find_place(name)
        if place is None:
            unknown.append(name)
        elif place.target is None:
            plan.dropped[name] = place.reason
        elif place.factor is not None and plan.speech_lora == "drop":
            plan.dropped[name] = "speech LoRA, not asked for"
        elif place.target == "lm_head.weight" and plan.config.tie_word_embeddings:
            plan.dropped[name] = "tied to the embeddings"
        elif place.target.startswith(PARTS["encoder"]) and encoder == "none":
            plan.dropped[name] = "Conformer"
        elif any(place.target.startswith(PARTS[part]) for part in random_init):
            plan.dropped[name] = "made anew"
        elif place.factor is not None:
            pair = plan.factors.setdefault(place.target, {})
            _put_once(pair, place.factor, stored, name)
        else:
            _put_once(plan.weights, place.target, stored, name)
    if unknown:
        raise ValueError(
            f"{plan.source.folder}: {len(unknown)} weights are not known as Phi-4-multimodal's, such as {unknown[0]}."
        )
    plan.dropped.update(dict.fromkeys(plan.source.replaced, f"replaced by {ADAPTER_FOLDER}"))
    for part in random_init:
        plan.weights.update({name: None for name in plan.shapes if name.startswith(PARTS[part])})
    # In the model's own order, which also decides about the order in which files are read
    plan.weights = {name: plan.weights[name] for name in [*plan.shapes, *plan.weights] if name in plan.weights}


def _put_once(places: dict, key: str, stored: StoredTensor, name: str) -> None:
    if key in places:
        raise ValueError(f"{stored.file} has {name}, and there is {places[key].name} for the same place already.")
    places[key] = stored


def _check_weights(plan: ConversionPlan) -> None:
    where = plan.source.folder
    if missing := [name for name in plan.shapes if name not in plan.weights]:
        raise ValueError(f"{where}: {len(missing)} weights are missing, such as that of {missing[0]}.")
    for name, stored in plan.weights.items():
        if name not in plan.shapes:
            raise ValueError(f"{where}: {stored.name} is not in a model with this config.json.")
        if stored is not None and stored.shape != plan.shapes[name]:
            raise ValueError(
                f"{where}: {stored.name} has the shape {list(stored.shape)}, and config.json makes it "
                f"{list(plan.shapes[name])}."
            )


def _check_factors(plan: ConversionPlan) -> None:
    where, lora = plan.source.folder, plan.source.lora
    if plan.speech_lora != "drop" and not plan.factors:
        raise ValueError(
            f"{where} has no speech LoRA, neither in its weights nor in {ADAPTER_FOLDER}. Name its folder with "
            '`adapter_dir`, or leave it out with speech_lora="drop".'
        )
    for target, pair in plan.factors.items():
        if target not in plan.shapes or len(plan.shapes[target]) != 2:
            raise ValueError(f"{where}: there is a LoRA of {target}, which is no matrix of the model.")
        if len(pair) != 2:
            raise ValueError(f"{where}: of the LoRA of {target}, only lora_{next(iter(pair))} is there.")
        rows, columns = plan.shapes[target]
        for factor, shape in (("A", (lora.r, columns)), ("B", (rows, lora.r))):
            if pair[factor].shape != shape:
                raise ValueError(
                    f"{where}: {pair[factor].name} has the shape {list(pair[factor].shape)}; with r = {lora.r} it is "
                    f"{list(shape)}."
                )
    if plan.speech_lora == "adapter":
        _adapted_layers(plan)


def _adapted_layers(plan: ConversionPlan) -> list[str]:
    """Names of the linear layers that have adapters: the same in every layer of the language model, as PEFT's config says
    them."""
    start = "model.language_model.layers."
    number = plan.config.text_config.num_hidden_layers
    counts = Counter(target.removesuffix(".weight").rsplit(".", 1)[-1] for target in plan.factors)
    if any(not target.startswith(start) for target in plan.factors) or set(counts.values()) != {number}:
        raise ValueError(
            f'{plan.source.folder}: the speech LoRA is not on the same matrices of every layer. Use speech_lora="merge".'
        )
    return sorted(counts)


# --- writing --------------------------------------------------------------------------------------------------------


def write_conversion(
    plan: ConversionPlan, processor: MelLLMProcessor, output_dir: Path, max_shard_size: str = "2GB"
) -> None:
    """Writes the model and its processor; with `speech_lora="adapter"`, the adapter, and the model in `base` below it.

    Weights are read one by one and written shard by shard, so that one shard is in memory at a time. Configs are written
    last, into a folder that has another name until all is there: nothing unfinished can be loaded.

    Raises:
        FileExistsError: There is something in `output_dir` already.
        OSError: There is not enough space.
    """
    check_new_folder(output_dir)
    parent = output_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if (free := shutil.disk_usage(parent).free) < plan.bytes + _SLACK:
        raise OSError(f"{parent} has {free / 1e9:.1f} GB free, and {plan.bytes / 1e9:.1f} GB are to be written.")
    with new_folder(output_dir) as partial, TensorReader() as read:
        folder = partial
        if plan.speech_lora == "adapter":
            folder = partial / "base"
            folder.mkdir()
            _write_adapter_weights(plan, read, partial)
        _write_weights(plan, read, folder, max_shard_size)
        processor.save_pretrained(folder)
        _write_configs(plan, folder)
        if plan.speech_lora == "adapter":
            processor.save_pretrained(partial)
            _adapter_config(plan, output_dir.absolute() / "base").save_pretrained(partial)


def _fresh_weights(plan: ConversionPlan) -> dict[str, torch.Tensor]:
    """Those that are made anew, as for a model from scratch."""
    names = [name for name, stored in plan.weights.items() if stored is None]
    if not names:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        embedder = MelLLMAudioEmbedder(plan.config.audio_config)
        projector = MelLLMProjector(plan.config.audio_config, plan.config.text_config.hidden_size)
    made = {f"model.audio_embedder.{name}": value for name, value in embedder.state_dict().items()}
    made.update({f"{PARTS['projector']}{name}": value for name, value in projector.state_dict().items()})
    return {name: made[name] for name in names}


def _read_weight(plan: ConversionPlan, read: TensorReader, name: str, fresh: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight as it is written, with the LoRA in it if that is to be merged."""
    stored, dtype = plan.weights[name], plan.dtype_of(name)
    value = fresh[name] if stored is None else read(stored)
    if name in plan.factors and plan.speech_lora == "merge":
        pair = plan.factors[name]
        factors = (read(pair[factor]).float() for factor in "BA")
        value = torch.addmm(value.float(), *factors, alpha=plan.source.lora.scaling)
    _check_finite(value := value.to(dtype), name, plan)
    return value.contiguous()


def _check_finite(value: torch.Tensor, name: str, plan: ConversionPlan) -> None:
    if not torch.isfinite(value).all():
        raise ValueError(f"{plan.source.folder}: {name} would hold values that are not finite in {value.dtype}.")


def _write_weights(plan: ConversionPlan, read: TensorReader, folder: Path, max_shard_size: str) -> None:
    empty = {name: torch.empty(plan.shapes[name], dtype=plan.dtype_of(name), device="meta") for name in plan.weights}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    fresh = _fresh_weights(plan)
    for file, names in split.filename_to_tensors.items():
        shard = {name: _read_weight(plan, read, name, fresh) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
        read.close()  # else all files would be mapped in the end
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_configs(plan: ConversionPlan, folder: Path) -> None:
    with torch.device("meta"):
        model = MelLLMForSpeechSeq2Seq(plan.config)
    generation: GenerationConfig = model.generation_config
    generation.save_pretrained(folder)
    plan.config.architectures = [MelLLMForSpeechSeq2Seq.__name__]
    plan.config.dtype = plan.model_dtype
    plan.config.save_pretrained(folder)


def _write_adapter_weights(plan: ConversionPlan, read: TensorReader, folder: Path) -> None:
    """As PEFT would save them: the LoRA, and whole what is trained beside it."""
    start = "base_model.model."
    fresh = _fresh_weights(plan)
    weights = {f"{start}{name}": _read_weight(plan, read, name, fresh) for name in plan.audio_weights}
    for target, pair in plan.factors.items():
        for factor, stored in pair.items():
            value = read(stored).to(plan.dtype or stored.dtype).contiguous()
            _check_finite(value, f"the LoRA of {target}", plan)
            weights[f"{start}{target.removesuffix('.weight')}.lora_{factor}.weight"] = value
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapter_config(plan: ConversionPlan, base: Path):
    from ..training.lora import lora_config

    with torch.device("meta"):
        model = MelLLMForSpeechSeq2Seq(plan.config)
    lora = plan.source.lora
    config = lora_config(
        model,
        "paper",
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=rf".*language_model\..*\.({'|'.join(_adapted_layers(plan))})",
    )
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    return config


__all__ = ["ENCODERS", "LORA_WAYS", "ConversionPlan", "build_processor", "plan_conversion", "write_conversion"]
