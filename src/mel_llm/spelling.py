"""What a CTC head spells of a transcript, and the text of each token that a transcript may be written in. Ours."""

import logging
import re

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .ctc_decoding_mel_llm import plain_letters


logger = logging.getLogger(__name__)

_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}


def ctc_bytes(text: str) -> list[int]:
    """Letters, digits, apostrophes and single spaces of a text, in lower case, as the bytes of UTF-8."""
    return list(" ".join(plain_letters(text).split()).encode())


def token_bytes(tokenizer: PreTrainedTokenizerBase, num_tokens: int, width: int) -> torch.Tensor:
    """What each token adds to a text, in UTF-8, for decoding with a CTC head. Special tokens add nothing.

    Args:
        tokenizer: The tokenizer of the language model.
        num_tokens (`int`): Rows of the model's embeddings, which may be more than the tokenizer has tokens.
        width (`int`): Bytes that are kept of a token; longer ones, which are counted in a warning, lose their end.

    Returns:
        `torch.Tensor` of shape `(num_tokens, width)`, uint8, with 0 behind the bytes.

    Raises:
        ValueError: The tokenizer has no token with a letter in it.
    """
    special = set(tokenizer.all_special_ids)
    tokens = sorted(token for token in tokenizer.get_vocab().values() if token < num_tokens and token not in special)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Decoded behind a word, a token shows the space that it begins with
    anchor = next((token for token in tokens if tokenizer.decode([token], **options).strip().isalnum()), None)
    if anchor is None:
        raise ValueError("`tokenizer` has no token with a letter in it, so nothing can be spelt with it.")
    start = len(tokenizer.decode([anchor], **options))
    texts = tokenizer.batch_decode([[anchor, token] for token in tokens], **options)
    added = tokenizer.added_tokens_decoder
    table = torch.zeros(num_tokens, width, dtype=torch.uint8)
    num_cut = 0
    for token, text in zip(tokens, texts, strict=True):
        if token in added:
            data = added[token].content.encode()
        elif "\ufffd" in text:  # a part of a character is no text by itself
            data = _raw_bytes(tokenizer.convert_ids_to_tokens(token))
        else:
            data = text[start:].encode()
        data = data.replace(b"\0", b" ")
        if len(data) > width:
            num_cut += 1
            data = data[:width].decode(errors="ignore").encode()  # not inside a character
        table[token, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    if num_cut:
        logger.warning(
            f"{num_cut} tokens are longer than {width} bytes. Decoding with the CTC head knows the beginnings of them."
        )
    return table


def _raw_bytes(token: str) -> bytes:
    """The bytes of a token that is no text by itself: `<0xE6>`, or written in the alphabet that GPT-2 gave to bytes."""
    if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(match[1])
    return bytes(_BYTE_OF[letter] for letter in token) if set(token) <= _BYTE_OF.keys() else token.encode()


__all__ = ["ctc_bytes", "token_bytes"]
