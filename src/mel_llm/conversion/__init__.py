"""Making a Mel-LLM out of other models."""

from .new_folder import check_new_folder, new_folder
from .phi4mm import ConversionPlan, plan_conversion, write_conversion
from .phi4mm_processor import build_processor
from .phi4mm_source import Phi4MMSource, open_source
from .prune import keep_layers, parse_layers, prune_vocabulary
from .text_llm import TOKEN_RATE_FIELDS, find_spare_token, forget_gguf, from_text_llm, language_model_of, take_ears


__all__ = [
    "TOKEN_RATE_FIELDS",
    "ConversionPlan",
    "Phi4MMSource",
    "build_processor",
    "check_new_folder",
    "find_spare_token",
    "forget_gguf",
    "from_text_llm",
    "keep_layers",
    "language_model_of",
    "new_folder",
    "open_source",
    "parse_layers",
    "plan_conversion",
    "prune_vocabulary",
    "take_ears",
    "write_conversion",
]
