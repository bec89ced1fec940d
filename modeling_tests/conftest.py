"""What the tests share: real speech that lies in the repository, and tiny models built from configs."""

import csv
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import set_seed

import mel_llm
from mel_llm.conversion import from_text_llm
from mel_llm.training import train_tokenizer


ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"

# One of each family whose masks, caches or embeddings differ
BACKBONES = ("llama", "qwen3", "phi3", "gemma3_text", "mistral")


# The modules that take longest (pytest --durations). Started first, so that none is left when the other processes are done.
LONG = (
    "train_script modeling_mel_llm_speech continuation_generation documentation train_vocoder_script compilation "
    "transcription_mel_llm distributed benchmark study_script benchmark_tts streaming"
).split()


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "network" in item.keywords and os.environ.get("HF_HUB_OFFLINE") == "1":
            item.add_marker(pytest.mark.skip(reason="needs the network"))


@pytest.fixture(scope="session")
def speech_clips() -> list[dict]:
    """Recordings of a human voice with their transcripts, 16 kHz."""
    folder = ROOT / "demo_clips"
    clips = []
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            path = folder / row["file_name"]
            array, rate = soundfile.read(path, dtype="float32")
            assert rate == 16000
            clips.append({"array": array, "text": row["text"], "path": str(path), "duration": len(array) / rate})
    assert len(clips) >= 12
    return clips


@pytest.fixture(scope="session")
def tokenizer(speech_clips):
    return train_tokenizer([clip["text"] for clip in speech_clips] * 4, vocab_size=320)


def tiny_text_config(model_type: str = "llama", vocab_size: int = 320, **overrides):
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Wide enough that random models do not write the same token for ever
        "initializer_range": 0.2,
    }
    if model_type == "gemma3_text":
        fields.update(sliding_window=16, query_pre_attn_scalar=16)
    if model_type == "mistral":
        fields.update(sliding_window=16)
    return mel_llm.MelLLMConfig._build_text_config({"model_type": model_type, **fields, **overrides})


def load_script(name: str):
    """The module of `scripts/NAME.py`, as it is without being run."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TINY_AUDIO = {"reduction_factor": 4, "conv_channels": 8, "hidden_size": 32}


def build_tiny(tokenizer, model_type: str = "llama", audio_config: dict | None = None, text: dict | None = None, **kw):
    """A tiny random model with its processor, normalised as if trained on speech."""
    set_seed(0)
    model, processor = from_text_llm(
        tiny_text_config(model_type, **(text or {})),
        tokenizer,
        audio_config={**TINY_AUDIO, **(audio_config or {})},
        transcription_instruction="Write it.",
        **kw,
    )
    bins = model.config.audio_config.num_mel_bins
    model.model.set_feature_statistics(torch.full((bins,), 12.0), torch.full((bins,), 3.0))
    return model.eval(), processor


@pytest.fixture
def tiny(tokenizer):
    return build_tiny(tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory) -> str:
    """A saved tiny model with its processor."""
    folder = tmp_path_factory.mktemp("tiny") / "mel-llm-tiny"
    model, processor = build_tiny(tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
