"""How much memory a training step takes on each GPU, and how fast it may go: from a config, without weights or a GPU.

    python scripts/estimate_memory.py                                  # the paper's model, LoRA r=320 and full fine-tuning
    python scripts/estimate_memory.py --training lora --gpus 1 8 --audio_seconds 120 --json estimate.json
    python scripts/estimate_memory.py --model_name_or_path runs/small --training full --sharding none --measure

The model is built on the meta device and one step of it is run there: parameters, saved activations and floating-point
operations are counted, not guessed. What is assumed, and printed with the table: attention keeps what flash attention and
sdpa keep (no matrix of scores); all clips of a batch are of one length; gradients of several micro-batches are added up;
the GPU reaches --utilisation of its peak in what it computes (recomputation included), and communication is hidden.
Not in the figures: the CUDA context (about 0.5 GiB) and fragmentation. --measure takes a real step and compares.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig

from mel_llm import MelLLMConfig, MelLLMForSpeechSeq2Seq
from mel_llm.modeling_mel_llm import MelLLMModel
from mel_llm.training import LORA_PRESETS, count_parameters, lora_config
from mel_llm.whole_files import write_whole


SHARDINGS = ("none", "zero1", "zero2", "fsdp2")
# Dense bfloat16 operations a second, and memory in GiB, as their makers state them
GPUS = {
    "A100-40GB": (312e12, 40),
    "A100-80GB": (312e12, 80),
    "L40S": (362e12, 48),
    "H100": (989e12, 80),
    "H200": (989e12, 141),
}
GIB = 2**30
ADAM_BYTES = 8  # two float32 values for each parameter
_ATTENTION = "mel_llm_estimate"


@dataclass
class Step:
    """One micro-batch: clips of one length in bytes and floating-point operations."""

    clips: int
    seconds: float  # of audio, all clips
    tokens: int  # of the language model, all clips
    layer_bytes: list[int]  # what each decoder layer saves for the backward pass
    layer_input_bytes: int  # what gradient checkpointing keeps of each instead
    layer_largest: int  # the largest tensor of a layer: the backward pass has its gradient beside it
    other_bytes: int  # what is saved outside of the layers
    other_largest: int  # the largest tensor of it
    loss_bytes: int  # beside it, at the moment of the loss: scores of the vocabulary and their gradient
    forward_flops: float
    layer_flops: float  # of the forward pass, in the layers
    backward_flops: float

    def activations(self, checkpointing: bool) -> int:
        if not checkpointing:
            return sum(self.layer_bytes) + self.other_bytes + self.loss_bytes
        kept = self.layer_input_bytes * len(self.layer_bytes) + self.other_bytes
        # The most is there at the loss, or while a layer that was computed again, or the audio side, is gone back through
        in_layer = max(self.layer_bytes, default=0) + self.layer_largest
        return max(kept + max(self.loss_bytes, in_layer), self.other_bytes + self.other_largest)

    def flops(self, checkpointing: bool) -> float:
        return self.forward_flops + self.backward_flops + (self.layer_flops if checkpointing else 0.0)


@dataclass
class Sizes:
    """Parameters: how many, and of which kind."""

    trained: int
    frozen: int
    largest_layer: int  # of a decoder layer
    outside: int  # of the decoder layers


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values, the output and a number for each row."""

    flops = 0.0

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        rows = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        _Attention.flops += _attention_flops(query, key)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _ = ctx.saved_tensors
        _Attention.flops += 2.5 * _attention_flops(query, key)  # five products of matrices for two
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention_flops(query: torch.Tensor, key: torch.Tensor) -> float:
    batch, heads, length, width = query.shape
    return 4.0 * batch * heads * length * key.shape[2] * width / 2  # half: it is causal


def _attend(module, query, key, value, attention_mask, **kwargs):
    return _Attention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)  # and no masks: making them looks at values


def build(config: MelLLMConfig, training: str, lora_r: int | None, dtype: torch.dtype, device: str):
    """The model, random or on the meta device, with adapters where they are asked for."""
    implementation = _ATTENTION if device == "meta" else None
    config = type(config).from_dict(config.to_dict())
    with torch.device(device):
        model = MelLLMForSpeechSeq2Seq._from_config(config, dtype=dtype, attn_implementation=implementation)
        if training == "lora":
            from peft import get_peft_model

            scale = {} if lora_r is None else {"r": lora_r, "lora_alpha": 2 * lora_r}
            options = lora_config(model, "paper", lora_dropout=0.0, **scale)
            model = get_peft_model(model, options, autocast_adapter_dtype=False)
    return model.train()


def inner_of(model) -> MelLLMForSpeechSeq2Seq:
    return next(module for module in model.modules() if isinstance(module, MelLLMForSpeechSeq2Seq))


def decoder_layers(model) -> torch.nn.ModuleList:
    backbone = inner_of(model).model.language_model
    count = backbone.config.num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"The layers of {type(backbone).__name__} were not found: this backbone cannot be estimated.")


def sizes_of(model) -> Sizes:
    trained, total = count_parameters(model)
    layers = [count_parameters(layer)[1] for layer in decoder_layers(model)]
    return Sizes(trained, total - trained, max(layers), total - sum(layers))


def lengths(config: MelLLMConfig, seconds: float, text_rate: float) -> tuple[int, int, int]:
    """Frames, audio tokens and text tokens of a clip."""
    frames = max(1, round(seconds * config.audio_config.frame_rate))
    return frames, config.audio_config.num_audio_tokens(frames), max(1, math.ceil(seconds * text_rate)) + 1


def loss_of(model, config: MelLLMConfig, clips: int, frames: int, num_audio: int, num_text: int, device: str):
    """The loss of one micro-batch, as `MelLLMForSpeechSeq2Seq` computes it of clips of one length; that class itself looks
    at values, which the meta device has not."""
    inner = inner_of(model)
    core: MelLLMModel = inner.model
    prompt = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
    features = torch.zeros(clips, frames, config.audio_config.num_mel_bins, device=device)
    ids = torch.zeros(clips, prompt + num_text, dtype=torch.long, device=device)
    labels = torch.zeros(clips, num_text, dtype=torch.long, device=device)
    projector = core.multi_modal_projector
    audio = core.audio_embedder(features, None, dtype=projector.linear_1.weight.dtype)
    embeds = torch.cat([projector(audio), core.get_input_embeddings()(ids)], dim=1)
    positions = torch.arange(embeds.shape[1], device=device)[None]
    states = core.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    logits = inner._output_logits(states[:, -num_text:])
    return inner.loss_function(logits=logits, labels=None, shift_labels=labels, vocab_size=config.vocab_size)


@contextmanager
def saved_by_layer(model):
    """Bytes of each tensor that is saved for the backward pass, by layer (-1: outside), parameters not counted; and the most
    bytes of a layer's input."""
    own = {parameter.untyped_storage()._cdata for parameter in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.UntypedStorage] = {}
    saved: dict[int, list[int]] = defaultdict(list)
    inputs: list[int] = [0]
    current = [-1]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage  # kept, or another could get its number
            saved[current[0]].append(storage.nbytes())
        return tensor

    def enter(number):
        def hook(module, args, kwargs):
            current[0] = number
            hidden_states = args[0] if args else kwargs["hidden_states"]
            inputs[0] = max(inputs[0], hidden_states.numel() * hidden_states.element_size())

        return hook

    def leave(module, args, output):
        current[0] = -1

    hooks = []
    for number, layer in enumerate(decoder_layers(model)):
        hooks += [layer.register_forward_pre_hook(enter(number), with_kwargs=True), layer.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved, inputs
    finally:
        for hook in hooks:
            hook.remove()


def count_step(model, config: MelLLMConfig, clips: int, clip_seconds: float, text_rate: float) -> Step:
    """One micro-batch on the meta device."""
    frames, num_audio, num_text = lengths(config, clip_seconds, text_rate)
    prompt = len(config.prompt_prefix_ids) + len(config.prompt_suffix_ids)
    _Attention.flops = 0.0
    with saved_by_layer(model) as (saved, inputs), FlopCounterMode(display=False) as forward:
        loss = loss_of(model, config, clips, frames, num_audio, num_text, "meta")
    attention = _Attention.flops
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    attention_backward = _Attention.flops - attention
    model.zero_grad()
    layers = decoder_layers(model)
    itemsize = next(inner_of(model).model.language_model.parameters()).element_size()
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1)
    tokens = clips * (num_audio + num_text + prompt)
    return Step(
        clips=clips,
        seconds=clips * clip_seconds,
        tokens=tokens,
        layer_bytes=[sum(saved[number]) for number in range(len(layers))],
        layer_input_bytes=inputs[0],
        layer_largest=max((max(saved[number], default=0) for number in range(len(layers))), default=0),
        other_bytes=sum(saved[-1]),
        other_largest=max(saved[-1], default=0),
        # The scores in the model's precision and the gradients of both; their logarithms are among what is saved
        loss_bytes=clips * num_text * config.vocab_size * (4 + itemsize),
        forward_flops=forward.get_total_flops() + attention,
        layer_flops=2.0 * weights * tokens + attention,
        backward_flops=backward.get_total_flops() + attention_backward,
    )


def state_bytes(sizes: Sizes, sharding: str, gpus: int, itemsize: int, master: bool) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser states on each GPU.

    Args:
        itemsize (`int`): Bytes of a value of the weights that the model computes with.
        master (`bool`): Whether trained parameters are float32 beside a model that computes in 16 bits.
    """
    trained, frozen = sizes.trained, sizes.frozen
    kept = 4 if master else itemsize  # of a trained parameter
    adam = ADAM_BYTES if kept == 4 else 2 * kept
    if sharding == "none":
        # autocast keeps a copy of trained float32 weights in 16 bits while it needs them
        copies = itemsize * trained if master and itemsize < 4 else 0
        return {
            "weights": frozen * itemsize + trained * kept + copies,
            "gradients": trained * kept * (2 if gpus > 1 else 1),  # DistributedDataParallel has buckets of its own
            "optimizer": trained * adam,
        }
    if sharding in ("zero1", "zero2"):
        # DeepSpeed computes in 16 bits, with float32 weights and states divided, and adds its share up in float32
        gradients = trained * itemsize / (gpus if sharding == "zero2" else 1)
        return {
            "weights": (frozen + trained) * itemsize,
            "gradients": gradients + trained * 4 / gpus,
            "optimizer": trained * (4 + ADAM_BYTES) / gpus,
        }
    # FSDP2: all is divided; two layers, and what is outside of the layers, are there whole while they are needed
    gathered = (2 * sizes.largest_layer + sizes.outside) * itemsize if gpus > 1 else 0
    return {
        "weights": (frozen * itemsize + trained * kept) / gpus + gathered,
        "gradients": trained * kept / gpus + (sizes.largest_layer * 4 if gpus > 1 else 0),
        "optimizer": trained * adam / gpus,
    }


def estimate(model, config: MelLLMConfig, args, sharding: str, gpus: int, checkpointing: bool, step: Step) -> dict:
    """One row of the table, in bytes and seconds."""
    itemsize = torch.finfo(args.dtype).bits // 8
    # Adapters and full fine-tuning with --bf16 alone train float32 weights; only weights that are 16 bits are not
    row = state_bytes(sizes_of(model), sharding, gpus, itemsize, master=not args.pure)
    row["activations"] = step.activations(checkpointing)
    row["total"] = sum(row.values())
    time = step.flops(checkpointing) / (args.utilisation * args.peak)
    return {
        "sharding": sharding,
        "gpus": gpus,
        "checkpointing": checkpointing,
        **row,
        "seconds_per_step": time,
        "audio_seconds_per_second_per_gpu": step.seconds / time,
        "fits": row["total"] <= 0.92 * args.gpu_memory * GIB,
    }


def measure(config: MelLLMConfig, args, training: str, checkpointing: bool) -> dict:
    """The peak of a real step on the GPU at hand, without sharding: the second micro-batch of an update that is not the
    first, as the estimate supposes.

    Raises:
        ValueError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--measure needs a CUDA GPU.")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run_step(config, args, training, checkpointing, "cuda")
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, **result}


def run_step(config: MelLLMConfig, args, training: str, checkpointing: bool, device: str) -> dict:
    """Two updates of two micro-batches each on random weights; how long the last took."""
    import time

    weights = args.dtype if args.pure else torch.float32
    model = build(config, training, args.lora_r, weights, device)
    if training == "lora" and not args.pure:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(args.dtype)
    if checkpointing:
        inner_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    sizes = lengths(config, args.clip_seconds, args.text_tokens_per_second)
    needs_cast = not args.pure and args.dtype != torch.float32
    started = 0.0
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(2):
            with torch.autocast(device, args.dtype) if needs_cast else nullcontext():
                loss = loss_of(model, config, args.clips, *sizes, device)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started}


# --- the command ----------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", default="paper", help=f"{' or '.join(MelLLMConfig.PRESETS)} (default: paper, 3.8 B)"
    )
    parser.add_argument(
        "--model_name_or_path", help="in its place: folder or Hub name of a Mel-LLM; its config is enough"
    )
    parser.add_argument("--training", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--lora_r", type=int, help=f"rank (default: the paper's, {LORA_PRESETS['paper']['r']})")
    parser.add_argument("--sharding", nargs="+", default=list(SHARDINGS), choices=SHARDINGS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--dtype", default="bfloat16", help="what the model computes in: bfloat16, float16 or float32")
    parser.add_argument(
        "--pure", action="store_true", help="trained weights, too, are in --dtype, without float32 ones"
    )
    parser.add_argument(
        "--audio_seconds", type=float, default=60.0, help="of a micro-batch, on each GPU (default: 60)"
    )
    parser.add_argument("--clip_seconds", type=float, default=15.0, help="of each clip (default: 15)")
    parser.add_argument("--text_tokens_per_second", type=float, default=4.0, help="of transcripts (default: 4)")
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--gpu", default="H100", choices=sorted(GPUS), help="its peak and memory (default: H100)")
    parser.add_argument("--peak_flops", type=float, help="operations a second in --dtype, of another GPU")
    parser.add_argument("--gpu_memory", type=float, help="GiB, of another GPU")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the peak that is reached (default: 0.4)"
    )
    parser.add_argument("--json", help="write the figures to this file as well")
    parser.add_argument("--measure", action="store_true", help="take a real step on this machine's GPU and compare")
    args = parser.parse_args(argv)
    if args.dtype not in ("bfloat16", "float16", "float32"):
        parser.error(f"--dtype must be bfloat16, float16 or float32, got {args.dtype!r}.")
    args.dtype = getattr(torch, args.dtype)
    for name in ("audio_seconds", "clip_seconds", "text_tokens_per_second", "lora_r", "peak_flops", "gpu_memory"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            parser.error(f"--{name} must be a positive number, got {value}.")
    if not 0 < args.utilisation <= 1:
        parser.error(f"--utilisation must be more than 0 and at most 1, got {args.utilisation}.")
    if min(args.gpus) < 1:
        parser.error(f"--gpus must be at least 1, got {min(args.gpus)}.")
    if args.clip_seconds > args.audio_seconds:
        parser.error(f"--clip_seconds {args.clip_seconds:g} is more than --audio_seconds {args.audio_seconds:g}.")
    if args.preset not in MelLLMConfig.PRESETS:
        parser.error(f"--preset must be one of {', '.join(MelLLMConfig.PRESETS)}, got {args.preset!r}.")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {str(Path(args.json).absolute().parent)!r}.")
    args.peak = args.peak_flops or GPUS[args.gpu][0]
    args.gpu_memory = args.gpu_memory or GPUS[args.gpu][1]
    args.clips = max(1, int(args.audio_seconds // args.clip_seconds))
    return args


def load_config(args: argparse.Namespace) -> MelLLMConfig:
    if args.model_name_or_path is None:
        return MelLLMConfig.from_preset(args.preset)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if config.model_type != MelLLMConfig.model_type:
        raise ValueError(f"--model_name_or_path: {args.model_name_or_path} is a {config.model_type!r} and no Mel-LLM.")
    return config


def rows_of(config: MelLLMConfig, args: argparse.Namespace, training: str) -> tuple[Sizes, Step, list[dict]]:
    model = build(config, training, args.lora_r, args.dtype, "meta")
    step = count_step(model, config, args.clips, args.clip_seconds, args.text_tokens_per_second)
    rows = []
    for sharding in args.sharding:
        for gpus in args.gpus:
            for checkpointing in args.checkpointing:
                rows.append(estimate(model, config, args, sharding, gpus, checkpointing == "on", step))
    return sizes_of(model), step, rows


def table(training: str, sizes: Sizes, step: Step, rows: list[dict], args: argparse.Namespace) -> str:
    title = "full fine-tuning" if training == "full" else f"LoRA r={args.lora_r or LORA_PRESETS['paper']['r']}"
    lines = [
        f"{title}: {sizes.trained / 1e6:,.0f} M of {(sizes.trained + sizes.frozen) / 1e6:,.0f} M parameters are trained; a "
        f"micro-batch of {step.clips} clips, {step.seconds:g} s, {step.tokens:,} tokens",
        "",
        "| sharding | GPUs | checkpointing | weights | gradients | optimiser | activations | GiB on each GPU | "
        f"fits {args.gpu_memory:g} GiB | s of audio / s / GPU |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        parts = [f"{row[name] / GIB:.1f}" for name in ("weights", "gradients", "optimizer", "activations", "total")]
        lines.append(
            f"| {row['sharding']} | {row['gpus']} | {'on' if row['checkpointing'] else 'off'} | {' | '.join(parts)} | "
            f"{'yes' if row['fits'] else 'no'} | {row['audio_seconds_per_second_per_gpu']:,.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    args = parse(argv)
    config = load_config(args)
    if args.measure and not torch.cuda.is_available():
        raise ValueError("--measure needs a CUDA GPU.")
    figures = {"arguments": {k: str(v) if isinstance(v, torch.dtype) else v for k, v in vars(args).items()}}
    precision = str(args.dtype).removeprefix("torch.")
    print(
        f"Estimated on the meta device: {precision}"
        f"{'' if args.pure else ', trained weights and Adam in float32'}; {args.peak / 1e12:g} TFLOP/s x "
        f"{args.utilisation:g}.\n"
    )
    for training in args.training:
        sizes, step, rows = rows_of(config, args, training)
        print(table(training, sizes, step, rows, args) + "\n")
        figures[training] = {"sizes": asdict(sizes), "step": asdict(step), "rows": rows}
        if args.measure:
            for checkpointing in args.checkpointing:
                found = measure(config, args, training, checkpointing == "on")
                model = build(config, training, args.lora_r, args.dtype, "meta")
                expected = estimate(model, config, args, "none", 1, checkpointing == "on", step)
                figures[training][f"measured_{checkpointing}"] = found
                print(
                    f"Measured on {torch.cuda.get_device_name()}, checkpointing {checkpointing}: "
                    f"{found['peak'] / GIB:.2f} GiB (estimated {expected['total'] / GIB:.2f}), utilisation "
                    f"{2 * step.flops(checkpointing == 'on') / found['seconds'] / args.peak:.2f}\n"
                )
    if args.json:
        write_whole(Path(args.json), json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"estimate_memory.py: {error}")
