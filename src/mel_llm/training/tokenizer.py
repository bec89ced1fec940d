"""A small tokenizer for models that are trained from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts: small, and able to write anything.

    Args:
        texts: What to learn the merges from.
        vocab_size (`int`, defaults to 512): At least 260: the bytes and four special tokens.

    Raises:
        ValueError: `vocab_size` is too small.
    """
    special_tokens = ["<|pad|>", "<|bos|>", "<|eos|>", "<|audio|>"]
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"`vocab_size` must be at least {least}, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
    )


__all__ = ["train_tokenizer"]
