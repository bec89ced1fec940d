"""What a stranger's checkpoint or recording may not do: run code, read elsewhere, take the memory, or never end."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT, build_tiny
from hub_client import Client, ClientError
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

import mel_llm
from mel_llm.training import lora_config


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


# --- nothing is unpickled -----------------------------------------------------------------------------------------------


def test_weights_are_safetensors_or_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    with pytest.raises(OSError, match="safetensors"):
        mel_llm.MelLLMModel.from_pretrained(folder)
    # asked for, they are read, but by a reader that runs nothing
    AutoModelForSpeechSeq2Seq.from_pretrained(folder, use_safetensors=False)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "fired")))
    with pytest.raises(Exception):  # noqa: B017  (torch's, of whatever kind)
        AutoModelForSpeechSeq2Seq.from_pretrained(folder, use_safetensors=False)
    assert not (tmp_path / "fired").exists()


def test_other_pickles_beside_the_weights_are_not_read(folder, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / name)))
    AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    mel_llm.MelLLMProcessor.from_pretrained(folder)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_adapters_run_nothing(tiny, tiny_folder, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    get_peft_model(model, lora_config(model, "small")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "fired")))
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    with pytest.raises(Exception):  # noqa: B017  (torch's or peft's)
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not (tmp_path / "fired").exists()


def test_a_vocoder_is_safetensors_too(tmp_path):
    mel_llm.MelLLMVocoder(mel_llm.MelLLMVocoderConfig()).save_pretrained(tmp_path)
    mel_llm.MelLLMVocoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        mel_llm.MelLLMVocoder.from_pretrained(tmp_path)


def test_no_code_is_made_of_data():
    """No eval, no exec, no pickle, no unsafe YAML anywhere in the package and its scripts."""
    banned = {"eval", "exec", "compile", "__import__"}
    banned_attributes = {"unsafe_load", "full_load", "loads_pickle", "load_pickle"}
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else None
                assert name not in banned, f"{path.name}:{node.lineno} calls {name}"
                if isinstance(node.func, ast.Attribute):
                    assert node.func.attr not in banned_attributes, f"{path.name}:{node.lineno}"
                    if node.func.attr == "load" and ast.unparse(node.func.value) in ("torch", "yaml", "np", "numpy"):
                        raise AssertionError(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "marshal", "shelve", "dill"}, path.name


# --- nothing is read elsewhere ------------------------------------------------------------------------------------------


def test_no_field_of_ours_is_a_path():
    """If one is added, it must be kept inside of the checkpoint's folder."""
    for kind in (
        mel_llm.MelLLMConfig,
        mel_llm.MelLLMAudioConfig,
        mel_llm.MelLLMSpeechConfig,
        mel_llm.MelLLMVocoderConfig,
    ):
        own = set(kind.__annotations__)
        assert not [name for name in own if any(word in name for word in ("path", "file", "url", "folder", "_dir"))]


def test_saved_tokens_are_not_left_in_a_checkpoint(folder):
    """What is saved says nothing of where it was loaded from, apart from an adapter's base."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    model.save_pretrained(folder)
    assert str(folder.parent) not in (folder / "config.json").read_text()


# --- sizes --------------------------------------------------------------------------------------------------------------

HUGE = [
    ("audio_config", "hidden_size", 1 << 20),
    ("audio_config", "conv_channels", 10**9),
    ("audio_config", "num_mel_bins", 10**6),
    ("text_config", "num_hidden_layers", 10**9),
    ("text_config", "hidden_size", 1 << 30),
    ("text_config", "vocab_size", 10**12),
    ("text_config", "intermediate_size", 1 << 40),
    ("text_config", "max_position_embeddings", 1 << 50),
    ("speech_config", "postnet_layers", 10**6),
    ("speech_config", "postnet_channels", 1 << 20),
    ("speech_config", "prenet_hidden_size", 1 << 20),
    ("speech_config", "min_tokens_per_second", 1e-300),
    (None, "max_text_tokens_per_second", 1e300),
]


@pytest.mark.parametrize("part, name, value", HUGE)
def test_a_size_beyond_reason_is_refused_by_name(folder, part, name, value):
    config = json.loads((folder / "config.json").read_text())
    if part == "speech_config":
        config[part] = {}
    (config if part is None else config[part])[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=name):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mel_llm.MelLLMAudioConfig(conv_channels=16384, num_mel_bins=1024, hidden_size=16384),
        lambda: mel_llm.MelLLMSpeechConfig(postnet_channels=16384, postnet_kernel_size=255),
        lambda: mel_llm.MelLLMAudioConfig(
            encoder_type="conformer", hidden_size=16384, conv_channels=8, encoder_config={"num_blocks": 256}
        ),
        lambda: mel_llm.MelLLMVocoderConfig(
            vocoder_type="istft", vocoder_kwargs={"hidden_size": 8192, "intermediate_size": 32768, "num_layers": 64}
        ),
        lambda: mel_llm.MelLLMVocoderConfig(
            vocoder_type="hifigan",
            vocoder_kwargs={
                "upsample_initial_channel": 8192,
                "resblock_kernel_sizes": [255] * 16,
                "resblock_dilation_sizes": [[1] * 16] * 16,
            },
        ),
    ],
)
def test_sizes_that_are_too_much_together(make):
    with pytest.raises(ValueError, match="together"):
        make()


@pytest.mark.parametrize("fields", [{"num_blocks": 10**9}, {"kernel_size": 10**6}, {"hidden_size": 1 << 30}])
def test_an_encoder_beyond_reason(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        mel_llm.MelLLMAudioConfig(encoder_type="conformer", encoder_config=fields)


def test_real_models_are_within_the_bounds():
    mel_llm.MelLLMConfig()  # the paper's
    largest = {"vocab_size": 262144, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    mel_llm.MelLLMConfig(
        text_config={"model_type": "llama", **largest, "num_attention_heads": 128, "max_position_embeddings": 1 << 24},
        audio_token_id=3,
    )
    mel_llm.MelLLMAudioConfig(encoder_type="conformer", encoder_config={"num_blocks": 24})


# --- fuzz ---------------------------------------------------------------------------------------------------------------

# Runs in a process of its own whose memory is limited: what asks for too much fails there, and is reported here.
FUZZ = """
import copy, io, json, os, random, resource, shutil, time, warnings
import numpy as np, torch, transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoFeatureExtractor, AutoProcessor, logging
import mel_llm

warnings.simplefilter("ignore")
logging.disable_progress_bar()
logging.set_verbosity_error()

HOSTILE = [
    0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**40, 10**30, 10**400, -(2**63), 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"),
    True, False, None, "", "a", "1", "../../../etc/passwd", "a" * 10_000, "{{ 1 }}", "__class__", [], [0], [1, 2],
    [10**9] * 50, ["x"], [[1]], {}, {"a": 1}, {"model_type": "llama"}, [None],
]

def places(tree, path=()):
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield (*path, key)
        if isinstance(tree[key], (dict, list)) and tree[key]:
            yield from places(tree[key], (*path, key))

PARTS = {
    "audio_config": mel_llm.MelLLMAudioConfig, "speech_config": mel_llm.MelLLMSpeechConfig,
    "vocoder_config": mel_llm.MelLLMVocoderConfig,
}

LIBRARY = {"feature_extractor_type", "processor_class", "feature_extractor", "text_config"}

def is_ours(path):
    "Whether it is a field of this package, not one that every configuration of transformers has, or the language model's"
    kind = PARTS.get(path[0])
    if kind is not None:
        return len(path) == 1 or path[1] in kind.__annotations__
    if path[0] == "feature_extractor" or "feature_extractor" in base:  # a processor's
        return path[-1] not in LIBRARY
    return path[0] in mel_llm.MelLLMConfig.__annotations__ and path[0] not in LIBRARY

def mutate(tree, rng, ours=None):
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not tree:
            break
        found = [path for path in places(tree) if ours is None or is_ours(path) == ours]
        path = rng.choice(found or list(places(tree)))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        kind = rng.random()
        if kind < 0.1 and isinstance(parent, dict):
            del parent[path[-1]]
        elif kind < 0.15 and isinstance(parent, dict):
            parent["unknown_" + str(rng.random())] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind < 0.4 and isinstance(parent[path[-1]], int):
            parent[path[-1]] = parent[path[-1]] * rng.choice([2, 10, 1000, 2**20]) + rng.choice([-1, 0, 1])
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(HOSTILE))
    return tree

def memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))

def fuzz(action, case, rng, count, seconds, accepted):
    "What went wrong: (number, what was tried, what came), at most `seconds` for everything"
    problems, outcomes = [], {"fine": 0, "refused": 0}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory() + (3 << 30), limits[1]))
    begin = time.monotonic()
    try:
        for number in range(count):
            if time.monotonic() - begin > seconds:
                break
            value = case(rng)
            start = time.monotonic()
            try:
                action(value)
                outcomes["fine"] += 1
            except accepted as error:
                outcomes["refused"] += 1
                if not str(error).strip():
                    problems.append((number, repr(value)[:2000], f"{type(error).__name__} without a message"))
            except BaseException as error:
                import traceback
                problems.append((number, repr(value)[:2000], "".join(traceback.format_exception(error)[-4:])))
            if time.monotonic() - start > 10:
                problems.append((number, repr(value)[:2000], f"took {time.monotonic() - start:.1f} s"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return [problems[:8], outcomes]

refusals = (ValueError, OSError, StrictDataclassError)
"""


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory, tokenizer):
    home = tmp_path_factory.mktemp("fuzz")
    model, processor = build_tiny(tokenizer)
    config = model.config
    config.speech_config = mel_llm.MelLLMSpeechConfig.from_preset("small", postnet_layers=1, head_hidden_size=8)
    config.vocoder_config = mel_llm.MelLLMVocoderConfig.from_feature_extractor(
        processor.feature_extractor,
        vocoder_type="istft",
        vocoder_kwargs={"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "overlap": 4},
    )
    mel_llm.MelLLMForTextToSpeech(config).save_pretrained(home / "base")
    processor.save_pretrained(home / "base")
    with Client(home, package=True) as client:
        client(FUZZ)
        yield client


def report(answer) -> dict:
    problems, outcomes = answer
    assert not problems, "\n\n".join(f"case {number}: {value}\n{what}" for number, value, what in problems)
    return outcomes


@pytest.mark.parametrize("ours", [True, False])
def test_fuzzed_configs(fuzzer, ours):
    """Whatever config.json says, it is refused with a message, or the model is built and loaded within a bounded memory.

    What is wrong in transformers' own fields comes out as whatever error its code runs into; in ours, as a `ValueError`.
    """
    outcomes = report(
        fuzzer(
            """
base = json.load(open("base/config.json"))
shutil.copytree("base", "config", dirs_exist_ok=True)

def action(value):
    json.dump(value, open("config/config.json", "w"))
    try:
        mel_llm.MelLLMForTextToSpeech.from_pretrained("config")
    except RuntimeError as error:
        # how transformers says that the weights have another shape than the config; out of memory is one too
        if "allocate" in str(error) or "memory" in str(error):
            raise
        raise ValueError(str(error)) from error

rng = random.Random(0)
accepted = refusals if ours else (*refusals, AttributeError, TypeError, LookupError, ArithmeticError, AssertionError)
result = fuzz(action, lambda rng: mutate(base, rng, ours), rng, 200, 12, accepted)
""",
            ours=ours,
        )
    )
    assert outcomes["refused"] > 30 and outcomes["fine"] > 10, outcomes


@pytest.mark.parametrize("ours", [True, False])
def test_fuzzed_processors(fuzzer, ours):
    """The same for the processor and its feature extractor, which then works on audio."""
    outcomes = report(
        fuzzer(
            """
base = json.load(open("base/processor_config.json"))
shutil.copytree("base", "processor", dirs_exist_ok=True)
samples = np.sin(np.arange(4000, dtype=np.float32))

def action(value):
    json.dump(value, open("processor/processor_config.json", "w"))
    processor = AutoProcessor.from_pretrained("processor")
    extractor = processor.feature_extractor
    features = extractor(samples, sampling_rate=extractor.sampling_rate)["input_features"][0]
    assert features.shape[1] == extractor.feature_size and features.shape[0] <= 1 + 3 * 16384 + len(samples)
    processor.default_prompt_ids()

rng = random.Random(1)
accepted = refusals if ours else (*refusals, AttributeError, TypeError, LookupError)
result = fuzz(action, lambda rng: mutate(base, rng, ours), rng, 200, 10, accepted)
""",
            ours=ours,
        )
    )
    assert outcomes["refused"] > 30 and (outcomes["fine"] > 10 or not ours), outcomes


@pytest.mark.parametrize("kind", ["flip", "cut", "splice"])
def test_fuzzed_audio(fuzzer, kind):
    """Mutated WAV, FLAC, OGG, MP3 and AIFF: decoded, or refused with a message."""
    files = sorted(str(path) for path in DATA.iterdir() if path.suffix in mel_llm.audio_utils_mel_llm.AUDIO_EXTENSIONS)
    assert {Path(name).suffix for name in files} >= {".wav", ".flac", ".mp3"}
    outcomes = report(
        fuzzer(
            """
sources = [data for data in (open(name, "rb").read()[:200_000] for name in files) if data]

def case(rng):
    data = bytearray(rng.choice(sources))
    for _ in range(rng.choice([1, 2, 8, 64])):
        place = rng.randrange(min(len(data), rng.choice([64, 512, len(data)])))
        if kind == "flip":
            data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == "cut":
            del data[place : place + rng.choice([1, 4, 100, len(data)])]
        else:
            other = rng.choice(sources)
            start = rng.randrange(len(other))
            data[place:place] = other[start : start + rng.choice([4, 100, 5000])]
        data = data or bytearray(b"RIFF")
    return bytes(data)

def action(data):
    array = mel_llm.load_audio(data)
    assert array.dtype == np.float32 and array.ndim == 1 and np.isfinite(array).all()
    assert array.size <= 64 * 8 * (len(data) + 1000), (array.size, len(data))

rng = random.Random(2)
result = fuzz(action, case, rng, 300, 5, refusals)
""",
            files=files,
            kind=kind,
        )
    )
    assert outcomes["refused"] > 20, outcomes


def test_the_fuzzer_notices(fuzzer):
    """Memory beyond the limit, another kind of error and an error without words are found."""
    for body in ("torch.zeros(1 << 34)", "{}['missing']", "raise ValueError('')"):
        problems, _ = fuzzer(
            f"def action(value):\n    {body}\nresult = fuzz(action, lambda rng: 0, random.Random(0), 1, 5, refusals)"
        )
        assert len(problems) == 1, body


def test_a_shard_index_names_files_of_its_folder(folder, tmp_path):
    """`model.safetensors.index.json` that points elsewhere gives nothing that could be read from there."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights, tmp_path / "elsewhere.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere"):
        AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    index["weight_map"] = dict.fromkeys(weights, str(tmp_path / "elsewhere.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="elsewhere"):
        AutoModelForSpeechSeq2Seq.from_pretrained(folder)


def test_errors_cross_the_process(fuzzer):
    with pytest.raises(ClientError, match="a message"):
        fuzzer("raise ValueError('a message')")
