"""vLLM serves Mel-LLM with the tokens of transformers' greedy search, offline and behind its OpenAI server.

vLLM brings a torch of its own, so it seldom lives beside the one that the tests run with. MEL_LLM_VLLM_PYTHON names a
Python that has it (docs/serving.md says how to make one); everything but the stub test is skipped without.
"""

import base64
import concurrent.futures
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT, build_tiny
from test_serve import running_server

import mel_llm


# Heads of a size that vLLM's attention has kernels for
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


def test_the_entry_point_registers_all_architectures(monkeypatch):
    registered = {}
    stub = types.ModuleType("vllm")
    stub.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    module, function = entry_point().split(":")
    getattr(importlib.import_module(module), function)()
    classes = (mel_llm.MelLLMForSpeechSeq2Seq, mel_llm.MelLLMForTextToSpeech, mel_llm.MelLLMForSpeechContinuation)
    assert set(registered) == {kind.__name__ for kind in classes}
    (target,) = set(registered.values())
    source = Path(importlib.util.find_spec(target.split(":")[0]).origin).read_text(encoding="utf-8")
    assert f"class {target.split(':')[1]}(" in source


def entry_point() -> str:
    # Python 3.10 has no tomllib
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^\[project\.entry-points\."vllm\.general_plugins"\]\nmel_llm = "(.+)"$', text, re.M)[1]


@pytest.fixture(scope="module")
def vllm_python() -> str:
    python = os.environ.get("MEL_LLM_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
    if python is None:
        pytest.skip("vLLM is not installed here; MEL_LLM_VLLM_PYTHON may name a Python that has it")
    return python


@pytest.fixture(scope="module")
def vllm_environment(tmp_path_factory) -> dict:
    """What makes the package, and its entry point, known to that Python without installing it there."""
    folder = tmp_path_factory.mktemp("installed")
    metadata = folder / "mel_llm-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mel-llm\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\nmel_llm = {entry_point()}\n")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def save_tiny(tokenizer, family: str, folder: Path):
    model, processor = build_tiny(tokenizer, family, text=SMALL)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def answer(model, inputs, num_tokens: int) -> list[int]:
    ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def whole(text: str) -> str:
    """Without bytes at the end that make no character: transformers writes them as signs, vLLM waits for the rest."""
    return text.rstrip("\ufffd").strip()


OFFLINE = """
import json, sys
import soundfile
from vllm import LLM, SamplingParams

def main():
    task = json.load(open(sys.argv[1]))
    clips = [soundfile.read(path, dtype="float32") for path in task["paths"]]
    llm = LLM(model=task["model"], dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=4,
              limit_mm_per_prompt={"audio": 2})
    sampling = SamplingParams(temperature=0, max_tokens=task["num_tokens"])
    def ask(requests):
        return [list(output.outputs[0].token_ids) for output in llm.generate(requests, sampling)]
    requests = [{"prompt": task["prompt"], "multi_modal_data": {"audio": clip}} for clip in clips]
    result = {
        "together": ask(requests),
        "alone": [ask([request])[0] for request in requests],
        "two": ask([{"prompt": task["two"], "multi_modal_data": {"audio": clips[:2]}}])[0],
        "text": ask([task["text"]])[0],
    }
    json.dump(result, open(sys.argv[2], "w"))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_offline_tokens_are_those_of_transformers(vllm_python, vllm_environment, tokenizer, speech_clips, tmp_path):
    model, processor = save_tiny(tokenizer, "llama", tmp_path / "model")
    clips = speech_clips[:4]
    parts = [{"type": "audio"}, {"type": "audio"}, {"type": "text", "text": "Which one?"}]
    two = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    task = {
        "model": str(tmp_path / "model"),
        "paths": [clip["path"] for clip in clips],
        "prompt": processor.apply_transcription_request([None], tokenize=False)[0],
        "two": two,
        "text": "Please hang up.",
        "num_tokens": 24,
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "offline.py").write_text(OFFLINE)
    run = subprocess.run(
        [vllm_python, "offline.py", "task.json", "result.json"],
        cwd=tmp_path,
        env=vllm_environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())

    expected = [answer(model, processor.apply_transcription_request(clip["array"]), 24) for clip in clips]
    assert len({tuple(ids) for ids in expected}) > 1  # the model does listen
    assert result["together"] == expected and result["alone"] == expected
    both = processor(text=two, audio=[clip["array"] for clip in clips[:2]])
    assert result["two"] == answer(model, both, 24)
    assert result["text"] == answer(model, processor(text=task["text"]), 24)


@pytest.mark.slow
def test_openai_server(vllm_python, vllm_environment, tokenizer, speech_clips, tmp_path):
    openai = pytest.importorskip("openai")
    model, processor = save_tiny(tokenizer, "qwen3", tmp_path / "model")
    command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "model")]
    options = ["--served-model-name", "mel", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    with running_server([*command, *options], tmp_path, env=vllm_environment, seconds=400) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)

        def transcribe(clip, **more):
            with open(clip["path"], "rb") as file:
                return client.audio.transcriptions.create(
                    model="mel", file=file, extra_body={"max_completion_tokens": 16}, **more
                )

        def expected(inputs) -> str:
            return whole(processor.tokenizer.decode(answer(model, inputs, 16), skip_special_tokens=True))

        def request(clip, **more):
            return processor.apply_transcription_request(clip["array"], **more)

        clips = speech_clips[:4]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            texts = [whole(result.text) for result in pool.map(transcribe, clips)]
        assert texts == [expected(request(clip)) for clip in clips] and len(set(texts)) > 1
        asked = {"language": "en", "prompt": "Names: Ada."}
        assert whole(transcribe(clips[0], **asked).text) == expected(request(clips[0], **asked))
        pieces = [chunk.choices[0]["delta"].get("content", "") for chunk in transcribe(clips[0], stream=True)]
        assert whole("".join(pieces)) == texts[0]
        for wrong, word in (({"language": "xx"}, "language"), ({"prompt": processor.audio_token}, "prompt")):
            with pytest.raises(openai.BadRequestError, match=word):
                transcribe(clips[0], **wrong)
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(model="mel", file=("a.wav", b"no audio"))

        data = base64.b64encode(Path(clips[0]["path"]).read_bytes()).decode()
        sound = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
        question = {"type": "text", "text": "What is said?"}
        messages = [{"role": "user", "content": [sound, question]}]
        reply = client.chat.completions.create(model="mel", messages=messages, max_tokens=16, temperature=0)
        parts = [{"type": "audio", "audio": clips[0]["array"]}, question]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert whole(reply.choices[0].message.content) == expected(inputs)
