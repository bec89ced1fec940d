"""`import mel_llm` is enough; and the ways to get it imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

import mel_llm


def run(*arguments: str, cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        timeout=300,
    )


def test_public_names():
    # a name that disappears breaks somebody
    assert set(mel_llm.__all__) == {
        "MelLLMAudioConfig",
        "MelLLMConfig",
        "MelLLMFeatureExtractor",
        "MelLLMForSpeechContinuation",
        "MelLLMForSpeechSeq2Seq",
        "MelLLMForTextToSpeech",
        "MelLLMModel",
        "MelLLMPreTrainedModel",
        "MelLLMProcessor",
        "MelLLMSpeechConfig",
        "MelLLMVocoder",
        "MelLLMVocoderConfig",
        "Segment",
        "SpeechContinuationPipeline",
        "Transcription",
        "create_model_card",
        "export_remote_code",
        "iter_speech",
        "load_audio",
        "register",
        "split_audio",
        "split_sentences",
        "stream_audio",
        "transcribe",
    }
    assert all(hasattr(mel_llm, name) for name in mel_llm.__all__)


def test_auto_classes(tiny_folder):
    assert type(AutoConfig.from_pretrained(tiny_folder)) is mel_llm.MelLLMConfig
    assert type(AutoFeatureExtractor.from_pretrained(tiny_folder)) is mel_llm.MelLLMFeatureExtractor
    assert type(AutoProcessor.from_pretrained(tiny_folder)) is mel_llm.MelLLMProcessor
    assert AutoTokenizer.from_pretrained(tiny_folder).eos_token == "<|eos|>"
    assert type(AutoModel.from_pretrained(tiny_folder)) is mel_llm.MelLLMModel
    assert type(AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)) is mel_llm.MelLLMForSpeechSeq2Seq
    assert type(AutoModelForMultimodalLM.from_pretrained(tiny_folder)) is mel_llm.MelLLMForSpeechSeq2Seq
    config = mel_llm.MelLLMConfig.from_preset("small")
    assert type(AutoModelForSpeechSeq2Seq.from_config(config)) is mel_llm.MelLLMForSpeechSeq2Seq
    # the test of the Open ASR Leaderboard's script
    assert type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def test_registering_again_changes_nothing():
    before = len(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING)
    mel_llm.register()
    mel_llm.register()
    assert len(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING) == before


def test_import_beside_another_plugin_and_twice():
    code = """
import sys
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, LlamaConfig, LlamaForCausalLM
class OtherConfig(LlamaConfig):
    model_type = "other_plugin"
AutoConfig.register("other_plugin", OtherConfig)
AutoModelForSpeechSeq2Seq.register(OtherConfig, type("Other", (LlamaForCausalLM,), {"config_class": OtherConfig}))
import mel_llm
for name in [name for name in sys.modules if name.startswith("mel_llm")]:
    del sys.modules[name]
import mel_llm
config = mel_llm.MelLLMConfig.from_preset("small")
assert type(AutoConfig.for_model("mel_llm")) is mel_llm.MelLLMConfig
model = AutoModelForSpeechSeq2Seq.from_config(config)
assert type(model) is mel_llm.MelLLMForSpeechSeq2Seq, type(model)
print("fine")
"""
    result = run("-c", code)
    assert result.stdout.strip() == "fine", result.stderr


def test_saved_folder_gives_identical_tokens_in_a_fresh_process(tiny_folder, speech_clips):
    paths = [clip["path"] for clip in speech_clips[:3]]
    code = f"""
import mel_llm, torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
processor = AutoProcessor.from_pretrained({tiny_folder!r})
model = AutoModelForSpeechSeq2Seq.from_pretrained({tiny_folder!r}).eval()
print(model.generate(**processor(audio={paths!r}), max_new_tokens=20).tolist())
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    processor = AutoProcessor.from_pretrained(tiny_folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    assert result.stdout.strip() == str(model.generate(**processor(audio=paths), max_new_tokens=20).tolist())


def test_it_works_without_torchaudio(tmp_path, tiny_folder, speech_clips):
    # as on a machine where torchaudio was never installed, or does not match torch
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n.split('.')[0] == 'torchaudio' else find(n, *a)\n"
        "sys.modules['torchaudio'] = None\n"
    )
    code = f"""
import mel_llm, sys
from transformers import pipeline
recogniser = pipeline("automatic-speech-recognition", model={tiny_folder!r})
print(type(recogniser(mel_llm.load_audio({speech_clips[0]["path"]!r}), generate_kwargs=dict(max_new_tokens=3))["text"]))
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    result = run("-c", code, PYTHONPATH=path)
    assert result.stdout.strip() == "<class 'str'>", result.stderr


def test_core_modules_can_be_remote_code():
    """design: flat siblings that import nothing but torch, transformers, numpy and the standard library at the top."""
    import ast

    folder = Path(mel_llm.__file__).parent
    allowed = {"torch", "transformers", "numpy", *sys.stdlib_module_names}
    core = sorted(folder.glob("*_mel_llm.py"))
    assert len(core) >= 6
    for path in core:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert names <= allowed, f"{path.name} imports {names - allowed} at the top"
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    assert node.level == 1 and node.module and "." not in node.module, (
                        f"{path.name}: from .{node.module}"
                    )
                    assert (folder / f"{node.module}.py") in core, (
                        f"{path.name} imports {node.module}, which is no core module"
                    )
                else:
                    assert node.module.split(".")[0] in allowed, f"{path.name} imports {node.module} at the top"


# --- python -m mel_llm --------------------------------------------------------------------------------------------------


def test_a_script_that_knows_nothing_of_the_package(tmp_path, tiny_folder, speech_clips):
    (tmp_path / "neighbour.py").write_text("WORD = 'neighbour'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from neighbour import WORD\n"
        "from transformers import AutoModelForSpeechSeq2Seq\n"
        "if __name__ == '__main__':\n"
        "    print(WORD, sys.argv[1:], type(AutoModelForSpeechSeq2Seq.from_pretrained(sys.argv[1])).__name__)\n"
    )
    result = run("-m", "mel_llm", str(script), tiny_folder, "--flag")
    assert result.stdout.strip() == f"neighbour {[tiny_folder, '--flag']} MelLLMForSpeechSeq2Seq", result.stderr


def test_other_ways_to_run():
    assert "python -m mel_llm" in run("-m", "mel_llm", "--help").stdout
    assert run("-m", "mel_llm").returncode == 2
    result = run("-m", "mel_llm", "no_such_script.py")
    assert result.returncode != 0 and "no_such_script.py" in result.stderr
    result = run("-m", "mel_llm", "-m", "json.tool", "--help")
    assert result.returncode == 0 and "json" in result.stdout.lower()
    # The commands of mel-llm, for those who have no such program on the PATH; the others are transformers'
    result = run("-m", "mel_llm", "continue", "nowhere.wav", "--text-only", "--model", "nowhere")
    assert result.returncode == 2 and "nowhere" in result.stderr and "No such command" not in result.stderr
    assert "mel_llm continue" in run("-m", "mel_llm", "continue", "--help").stdout
    assert "No such command" in run("-m", "mel_llm", "sing").stderr


@pytest.mark.cuda
def test_cuda_gives_the_tokens_of_the_cpu(tiny_folder, speech_clips):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    audio = processor(audio=[clip["array"] for clip in speech_clips[:4]])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    expected = model.generate(**audio, max_new_tokens=20)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    actual = model.to("cuda").generate(**audio.to("cuda"), max_new_tokens=20)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.cuda
def test_cuda_bfloat16_agrees_within_its_precision(tiny_folder, speech_clips):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    inputs = processor.apply_transcription_request([clip["array"] for clip in speech_clips[:4]])
    full = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()(**inputs).logits
    half = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder, dtype=torch.bfloat16, device_map="cuda").eval()
    mask = inputs["attention_mask"].bool()
    actual = half(**inputs.to("cuda")).logits.float().cpu()
    assert (actual - full)[mask].abs().mean() < 0.05 * full[mask].std()
