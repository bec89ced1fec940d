"""A pushed Mel-LLM in a process that does not have this package, and a repository with code where the package is.

`scripts/test.sh --oldest` runs this beside the oldest transformers too.
"""

import ast
import json
import shutil

import pytest
import soundfile
import transformers
from conftest import build_tiny
from hub_client import Client, ClientError
from hub_server import HubServer
from peft import get_peft_model
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, Trainer, TrainingArguments

import mel_llm
from mel_llm.sharing_mel_llm import AUTO_MAP
from mel_llm.training import lora_config


SETUP = """
import importlib, json, os, sys
import numpy as np, torch, transformers
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoModelForPreTraining,
    AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, AutoProcessor, AutoTokenizer, logging, pipeline,
)
logging.disable_progress_bar()
autos = {
    kind.__name__: kind for kind in (
        AutoConfig, AutoFeatureExtractor, AutoProcessor, AutoModel, AutoModelForSpeechSeq2Seq,
        AutoModelForMultimodalLM, AutoModelForPreTraining, AutoModelForTextToWaveform,
    )
}
"""


def speaking(tokenizer):
    """A tiny model that reads and speaks, with its processor and a vocoder."""
    model, processor = build_tiny(tokenizer)
    config = model.config
    config.speech_config = mel_llm.MelLLMSpeechConfig.from_preset("small", postnet_layers=1, head_hidden_size=8)
    config.vocoder_config = mel_llm.MelLLMVocoderConfig.from_feature_extractor(processor.feature_extractor)
    config.speech_prefix_ids, config.speech_suffix_ids = processor.speech_prompt_ids()
    return mel_llm.MelLLMForTextToSpeech(config).eval(), processor


@pytest.fixture(scope="module")
def with_code(tokenizer, tmp_path_factory):
    """A folder as `save_pretrained(..., remote_code=True)` leaves it; its name is no Python name."""
    folder = tmp_path_factory.mktemp("code") / "mel-llm.v1"
    model, processor = speaking(tokenizer)
    model.save_pretrained(folder, remote_code=True)
    processor.save_pretrained(folder, remote_code=True)
    return folder


@pytest.fixture(scope="module")
def hub(with_code):
    with HubServer() as hub:
        files = {path.name: path.read_bytes() for path in with_code.iterdir()}
        hub.put("alice/code-1.5b", files, private=True)
        yield hub


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """A process without the package."""
    with Client(tmp_path_factory.mktemp("stranger"), hub.endpoint, "hf_alice", package=False) as client:
        with pytest.raises(ClientError, match="No module named 'mel_llm'"):
            client("import mel_llm")
        client(SETUP)
        yield client


@pytest.fixture(scope="module")
def expected(with_code, speech_clips):
    """What the package makes of a clip."""
    processor = AutoProcessor.from_pretrained(with_code)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(with_code).eval()
    return model.generate(**processor(audio=speech_clips[0]["array"]), max_new_tokens=8).tolist()


@pytest.fixture(scope="module")
def wav(speech_clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("wav") / "speech.wav"
    soundfile.write(path, speech_clips[0]["array"], 16000, subtype="FLOAT")
    return str(path)


# --- what is exported ---------------------------------------------------------------------------------------------------


def test_all_that_the_code_needs_is_there(with_code):
    """What the files import from each other is there, and the classes that `auto_map` names are in them."""
    files = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in with_code.glob("*.py")}
    for name, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, f"{name}: from .{node.module}"
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert name in [node.name for node in files[module].body if isinstance(node, ast.ClassDef)]
    assert json.loads((with_code / "config.json").read_text())["auto_map"] == AUTO_MAP
    processor = json.loads((with_code / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == AUTO_MAP["AutoProcessor"]
    assert processor["feature_extractor"]["auto_map"]["AutoFeatureExtractor"] == AUTO_MAP["AutoFeatureExtractor"]
    assert json.loads((with_code / "tokenizer_config.json").read_text())["auto_map"]["AutoProcessor"]


def test_a_folder_gets_the_code_later(with_code, tokenizer, tmp_path):
    model, processor = speaking(tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    mel_llm.export_remote_code(tmp_path)
    mel_llm.export_remote_code(str(tmp_path))  # again changes nothing
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in with_code.iterdir())
    for name in names:
        if name.endswith(".py"):
            assert (tmp_path / name).read_bytes() == (with_code / name).read_bytes()
        if name in ("config.json", "tokenizer_config.json"):
            assert json.loads((tmp_path / name).read_text()) == json.loads((with_code / name).read_text())


def test_what_cannot_be_exported(tmp_path, tiny):
    with pytest.raises(ValueError, match="not a folder with a Mel-LLM"):
        mel_llm.export_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="not a folder with a Mel-LLM"):
        mel_llm.export_remote_code(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="base model"):
        mel_llm.export_remote_code(tmp_path)
    with pytest.raises(ValueError, match="`target`"):
        mel_llm.export_remote_code(3)

    class Mine(mel_llm.MelLLMForSpeechSeq2Seq):
        pass

    with pytest.raises(ValueError, match="register_for_auto_class"):
        Mine(tiny[0].config).save_pretrained(tmp_path, remote_code=True)


def test_the_code_comes_along_until_told_otherwise(with_code, tmp_path):
    """Fine-tuned and saved again, by hand or by the Trainer, the model is as loadable as it was."""
    model, processor = (
        mel_llm.MelLLMForTextToSpeech.from_pretrained(with_code),
        AutoProcessor.from_pretrained(with_code),
    )
    arguments = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
    Trainer(model, arguments, processing_class=processor).save_model()
    names = {path.name for path in with_code.iterdir()}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    model.save_pretrained(tmp_path / "without", remote_code=False)
    processor.save_pretrained(tmp_path / "without", remote_code=False)
    assert {path.name for path in (tmp_path / "without").iterdir()} == {n for n in names if not n.endswith(".py")}
    for path in (tmp_path / "without").glob("*config.json"):
        assert "auto_map" not in path.read_text()
    model.save_pretrained(tmp_path / "still")
    assert not list((tmp_path / "still").glob("*.py"))


def test_adapters_of_a_model_with_code(tiny, tmp_path):
    model = get_peft_model(tiny[0], lora_config(tiny[0], "small"))
    mel_llm.export_remote_code(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_mel_llm.py").is_file()


# --- without the package ------------------------------------------------------------------------------------------------


def test_without_trust_there_is_a_clear_refusal(with_code, stranger):
    for name in AUTO_MAP:
        for folder in (str(with_code), "alice/code-1.5b"):
            with pytest.raises(ClientError, match="trust_remote_code=True") as error:
                stranger("autos[name].from_pretrained(folder, trust_remote_code=False)", name=name, folder=folder)
            assert "ValueError" in error.value.kinds


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_every_auto_class(with_code, stranger, where):
    folder = str(with_code) if where == "folder" else "alice/code-1.5b"
    for name, reference in AUTO_MAP.items():
        module, kind = stranger(
            "loaded = autos[name].from_pretrained(folder, trust_remote_code=True)\n"
            "result = [type(loaded).__module__, type(loaded).__name__]",
            name=name,
            folder=folder,
        )
        assert module.startswith("transformers_modules.") and f"{module.rpartition('.')[2]}.{kind}" == reference


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_the_same_tokens(with_code, stranger, wav, expected, where):
    folder = str(with_code) if where == "folder" else "alice/code-1.5b"
    code = """
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True).eval()
result = model.generate(**processor(audio=wav), max_new_tokens=8).tolist()
"""
    assert stranger(code, folder=folder, wav=wav) == expected
    assert stranger("result = len(model.transcribe(wav, processor).segments)", wav=wav) >= 1


def test_the_pipelines(with_code, stranger, speech_clips, expected):
    processor = AutoProcessor.from_pretrained(with_code)
    code = """
recogniser = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
result = [recogniser.type, recogniser(np.array(samples, np.float32), generate_kwargs={"max_new_tokens": 8})["text"]]
"""
    samples = [float(sample) for sample in speech_clips[0]["array"]]
    kind, text = stranger(code, folder="alice/code-1.5b", samples=samples)
    # "ctc", which it falls back to for classes that it does not know, returns garbage without an error
    assert kind == "seq2seq"
    assert text == processor.decode(expected[0], skip_special_tokens=True)
    code = """
speaker = pipeline("text-to-speech", model=folder, trust_remote_code=True)
said = speaker("hello", generate_kwargs={"max_new_tokens": 3})
result = [type(speaker.model).__name__, said["sampling_rate"], int(np.asarray(said["audio"]).size)]
"""
    kind, rate, size = stranger(code, folder="alice/code-1.5b")
    assert kind == "MelLLMForTextToSpeech" and rate == 16000 and size > 0
    code = """
speaker = pipeline("speech-continuation", model=folder, trust_remote_code=True)
said = speaker(np.array(samples, np.float32), max_new_tokens=4, max_seconds=0.1)
result = [type(speaker.model).__name__, sorted(said), said["sampling_rate"], int(said["audio"].size)]
"""
    kind, names, rate, size = stranger(code, folder="alice/code-1.5b", samples=samples)
    assert kind == "MelLLMForSpeechContinuation" and rate == 16000 and size > 0
    assert names == ["audio", "continuation", "sampling_rate", "text", "transcript"]
    with pytest.raises(ClientError, match="trust_remote_code"):
        stranger(
            'pipeline("automatic-speech-recognition", model=folder, trust_remote_code=False)', folder=str(with_code)
        )


def test_saved_again_it_is_still_whole(with_code, stranger, tmp_path):
    """From whichever class: a folder saved as a recogniser still has the code of the speaker."""
    code = """
AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
for name in autos:
    if name not in ("AutoModelForTextToWaveform", "AutoModelForPreTraining"):  # whose weights a recogniser does not save
        autos[name].from_pretrained(target, trust_remote_code=True)
result = json.load(open(target + "/config.json"))["auto_map"]
"""
    assert stranger(code, folder="alice/code-1.5b", target=str(tmp_path / "again")) == AUTO_MAP
    assert {path.name for path in with_code.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}


def test_adapters_on_a_base_with_code(hub, stranger, with_code, wav, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(with_code).eval()
    processor = AutoProcessor.from_pretrained(with_code)
    model.name_or_path = model.config._name_or_path = "alice/code-1.5b"
    tuned = get_peft_model(model, lora_config(model, "small", init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path)
    hub.put("alice/adapter", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    expected = tuned.generate(**processor(audio=wav), max_new_tokens=8).tolist()
    code = """
from peft import PeftModel
processor = AutoProcessor.from_pretrained("alice/code-1.5b", trust_remote_code=True)
base = AutoModelForSpeechSeq2Seq.from_pretrained("alice/code-1.5b", trust_remote_code=True)
tuned = PeftModel.from_pretrained(base, "alice/adapter").eval()
result = tuned.generate(**processor(audio=wav), max_new_tokens=8).tolist()
"""
    assert stranger(code, wav=wav) == expected


def test_a_missing_file_is_named(with_code, stranger, tmp_path):
    folder = tmp_path / "incomplete"
    shutil.copytree(with_code, folder)
    (folder / "generation_mel_llm.py").unlink()
    with pytest.raises(ClientError, match="generation_mel_llm"):
        stranger("AutoModel.from_pretrained(folder, trust_remote_code=True)", folder=str(folder))


# --- with the package ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_package_wins(with_code, tmp_path, trust):
    """No question, and not one line of the copied code is run."""
    folder = tmp_path / "poisoned"
    shutil.copytree(with_code, folder)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('the copied code was run')\n")
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    for name in AUTO_MAP:
        loaded = getattr(transformers, name).from_pretrained(folder, **kwargs)
        assert type(loaded).__module__.startswith("mel_llm.")


def test_models_without_the_option_carry_no_code(tiny, tmp_path):
    for part in tiny:
        part.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert not [path for path in tmp_path.glob("*.json") if "auto_map" in path.read_text()]
