"""What a CTC head spells: the letters of a transcript, and of each token that a transcript may be written in. Ours."""

import re
import unicodedata

import torch
from transformers import PreTrainedTokenizerBase


def _plain(text: str) -> str:
    """Letters, digits and apostrophes, in lower case; a space for each other character."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return "".join(
        letter if letter.isalnum() or letter == "'" or unicodedata.combining(letter) else " " for letter in text
    )


def ctc_bytes(text: str) -> list[int]:
    """Letters, digits, apostrophes and single spaces of a text, in lower case, as the bytes of UTF-8."""
    return list(" ".join(_plain(text).split()).encode())


def token_letters(tokenizer: PreTrainedTokenizerBase, num_tokens: int, width: int) -> torch.Tensor:
    """What each token adds to the letters of a text, for decoding with a CTC head.

    A space stands for anything that parts words, also at either end: the letters of a text are those of its tokens one
    after the other, without double spaces and spaces at the ends. Special tokens have none. Of tokens that hold parts of a
    character the bytes are taken as they are, so an upper-case letter beyond ASCII that is split is not made lower.

    Args:
        tokenizer: The tokenizer of the language model.
        num_tokens (`int`): Rows of the model's embeddings, which may be more than the tokenizer has tokens.
        width (`int`): Bytes that are kept of a token.

    Returns:
        `torch.Tensor` of shape `(num_tokens, width)`, uint8, with 0 behind the bytes.
    """
    # Decoded behind a letter, a token shows the space that it begins with
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    count = min(num_tokens, len(tokenizer))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    start = len(tokenizer.decode(anchor, **options))
    texts = tokenizer.batch_decode([[*anchor, token] for token in range(count)], **options)
    special = set(tokenizer.all_special_ids)
    letters = torch.zeros(num_tokens, width, dtype=torch.uint8)
    for token, text in enumerate(texts):
        if token in special:
            continue
        if "\ufffd" in text:
            spelt = _part_of_character(tokenizer.convert_ids_to_tokens(token))
        else:
            spelt = re.sub(" +", " ", _plain(text[start:])).encode()
        spelt = spelt[:width]
        letters[token, : len(spelt)] = torch.tensor(list(spelt), dtype=torch.uint8)
    return letters


def _part_of_character(token: str) -> bytes:
    """The bytes of a token that is no text by itself: `<0xE6>`, or written in the alphabet that GPT-2 gave to bytes."""
    if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(match[1])
    bytes_of = _gpt2_alphabet()
    found = bytes(bytes_of[letter] for letter in token if letter in bytes_of)
    # Where it has whole characters as well, they are spelt as elsewhere
    return re.sub(b" +", b" ", re.sub(rb"[^a-z0-9'\x80-\xff]", b" ", found.lower()))


def _gpt2_alphabet() -> dict[str, int]:
    """Visible characters stand for themselves, the other bytes for the characters from 256 on, in their order."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{chr(byte): byte for byte in visible}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


__all__ = ["ctc_bytes", "token_letters"]
