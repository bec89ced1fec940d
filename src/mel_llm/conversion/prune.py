"""A language model made smaller before it becomes a Mel-LLM: fewer layers, fewer tokens. Ours."""

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")


def parse_layers(text: str, num_layers: int | None = None) -> list[int]:
    """`"0-5,28,29"` to the numbers; `"L0-5"` is the same, and `"24-"` goes up to the last of `num_layers`.

    Args:
        text: Layers, counted from 0, and ranges of them, both ends included.
        num_layers (`int`, *optional*): How many there are. Without it, what is written is taken on trust.

    Raises:
        ValueError: It is not written so, a range runs backwards, or a layer is not there.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*[Ll]?(\d{1,6})\s*(-\s*(?:[Ll]?(\d{1,6})\s*)?)?", part)
        if match is None or (match[2] and not match[3] and num_layers is None):
            raise ValueError(f"Layers are written 0-5,28,29; got {text!r}.")
        first = int(match[1])
        last = first if not match[2] else int(match[3]) if match[3] else num_layers - 1
        if num_layers is not None and max(first, last) >= num_layers:
            raise ValueError(f"{text!r} names layer {max(first, last)}, but the layers are 0 to {num_layers - 1}.")
        if last < first:
            raise ValueError(f"Layers are written 0-5,28,29; {part.strip()!r} runs backwards.")
        layers += range(first, last + 1)
    return layers


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A causal language model of the given layers of another, in their order.

    Raises:
        ValueError: A layer does not exist or is named twice, or the model does not call its layers `layers`.
    """
    config = copy.deepcopy(model.config)
    count = config.num_hidden_layers
    layers = list(layers)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"`layers` must be different numbers from 0 to {count - 1}, got {layers}.")
    weights = model.state_dict()
    if {int(match[2]) for name in weights if (match := _LAYER.search(name))} != set(range(count)):
        raise ValueError(f"`model`: {type(model).__name__} does not have its {count} layers under the name `layers`.")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count:  # one entry a layer, such as `layer_types`
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    place = {layer: new for new, layer in enumerate(layers)}
    kept = {}
    for name, value in weights.items():
        match = _LAYER.search(name)
        if match is None:
            kept[name] = value
        elif int(match[2]) in place:
            kept[f"{name[: match.start(2)]}{place[int(match[2])]}{name[match.end(2) :]}"] = value
    smaller = type(model)(config).to(model.dtype)
    smaller.load_state_dict(kept)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def prune_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], vocab_size: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, and its tokenizer, with the tokens that occur most in `texts`.

    Bytes and special tokens stay, so that any text can still be written, if in more tokens. A text all of whose tokens
    stay is tokenized as before.

    Args:
        model: Changed in place: its embeddings and its output layer get fewer rows.
        tokenizer: A fast tokenizer with byte-pair encoding, as Llama 3, Qwen, SmolLM and GPT-2 have.
        texts: What the model is to write and to read, its prompts among them.
        vocab_size (`int`): The most tokens.

    Raises:
        ValueError: The tokenizer is of another kind, or `vocab_size` is less than the bytes and special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = None if backend is None else json.loads(backend.to_str())
    if state is None or state["model"]["type"] != "BPE":
        raise ValueError(f"`tokenizer`: only byte-pair encoding can be pruned, got {type(tokenizer).__name__}.")
    vocab: dict[str, int] = state["model"]["vocab"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["model"]["merges"]]
    kept = _choose_tokens(tokenizer, vocab, merges, state["added_tokens"], texts, vocab_size)

    old_ids = sorted(kept.values())
    new_id = {old: new for new, old in enumerate(old_ids)}
    state["model"]["vocab"] = {token: new_id[old] for token, old in vocab.items() if token in kept}
    state["model"]["merges"] = [[a, b] for a, b in merges if a in kept and b in kept and a + b in kept]
    for entry in state["added_tokens"]:
        entry["id"] = new_id[entry["id"]]
    smaller = _rebuild(tokenizer, state, new_id)

    index = torch.tensor(old_ids)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    embeddings.weight = torch.nn.Parameter(embeddings.weight.detach()[index].clone())
    embeddings.num_embeddings = head.out_features = len(old_ids)
    head.weight = embeddings.weight if tied else torch.nn.Parameter(head.weight.detach()[index].clone())
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.detach()[index].clone())
    if embeddings.padding_idx is not None:
        embeddings.padding_idx = new_id.get(embeddings.padding_idx)
    model.config.vocab_size = model.vocab_size = len(old_ids)
    for config in filter(None, (model.config, model.generation_config)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, list):
                setattr(config, name, [new_id[old] for old in value if old in new_id] or None)
            elif value is not None:
                setattr(config, name, new_id.get(value))
    return model, smaller


def _choose_tokens(tokenizer, vocab, merges, added, texts, vocab_size: int) -> dict[str, int]:
    """The tokens that stay, with their ids: special ones, bytes, then the most frequent with what they are merged from."""
    made = {a + b for a, b in merges}
    kept = {token: index for token, index in vocab.items() if token not in made}  # the alphabet
    kept.update({entry["content"]: entry["id"] for entry in added})
    if len(kept) > vocab_size:
        raise ValueError(f"`vocab_size` must be at least {len(kept)}, the bytes and special tokens; got {vocab_size}.")
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    token_of = {index: token for token, index in vocab.items()}
    rank = {pair: place for place, pair in enumerate(merges)}
    for index, _ in counts.most_common():
        token = token_of.get(index)
        if token is None or token in kept:
            continue
        needed = [part for part in _parts(token, rank) if part not in kept]
        if len(kept) + len(needed) <= vocab_size:
            kept.update({part: vocab[part] for part in needed})
    return kept


def _parts(token: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """All tokens that the encoding of a token goes through, itself the last."""
    pieces, made = list(token), []
    while len(pieces) > 1:
        place = min(range(len(pieces) - 1), key=lambda i: rank.get((pieces[i], pieces[i + 1]), len(rank)))
        if (pieces[place], pieces[place + 1]) not in rank:
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        made.append(pieces[place])
    return made


def _rebuild(tokenizer: PreTrainedTokenizerBase, state: dict, new_id: dict[int, int]) -> PreTrainedTokenizerBase:
    """The tokenizer again, from its files with another vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):  # said in tokenizer.json too
            (Path(folder) / name).unlink(missing_ok=True)
        if state.get("post_processor"):
            state["post_processor"] = _renumber(state["post_processor"], new_id)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            entries = config["added_tokens_decoder"].items()
            config["added_tokens_decoder"] = {str(new_id[int(old)]): entry for old, entry in entries}
        path.write_text(json.dumps(config), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _renumber(value, new_id: dict[int, int]):
    """The ids of the special tokens that a post-processor adds."""
    if isinstance(value, dict):
        return {
            key: [new_id[old] for old in item] if key == "ids" else _renumber(item, new_id)
            for key, item in value.items()
        }
    return [_renumber(item, new_id) for item in value] if isinstance(value, list) else value


__all__ = ["keep_layers", "parse_layers", "prune_vocabulary"]
