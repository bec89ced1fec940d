"""Making a Mel-LLM out of other models."""

from .prune import keep_layers, parse_layers, prune_vocabulary
from .text_llm import find_spare_token, from_text_llm


__all__ = ["find_spare_token", "from_text_llm", "keep_layers", "parse_layers", "prune_vocabulary"]
