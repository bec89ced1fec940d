"""Compiled layers: the same losses, gradients, weights and transcripts as without."""

import shutil

import pytest
import torch
from conftest import build_tiny
from test_ctc import batch_of
from test_train_script import SCRATCH, folder, losses, script, train, words  # noqa: F401  (fixtures among them)
from torch._dynamo.utils import counters
from transformers import AutoModelForSpeechSeq2Seq

from mel_llm.training import SpeechTrainer, TranscriptionCollator, compile_layers, without_compiled_layers
from mel_llm.training.arguments import SpeechTrainingArguments


needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on a CPU",
)


@needs_a_compiler
def test_compiled_layers_compute_the_same(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer, audio_config={"ctc_weight": 0.5, "ctc_rate": 2})
    model.train()
    batches = [batch_of(processor, speech_clips[:2]), batch_of(processor, speech_clips[1:4])]

    def losses_and_gradients():
        values = []
        for batch in batches:
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            values += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return values

    expected, names = losses_and_gradients(), list(model.state_dict())
    compile_layers(model)
    torch.testing.assert_close(losses_and_gradients(), expected, rtol=1e-3, atol=1e-4)  # sums in another order
    assert list(model.state_dict()) == names


@needs_a_compiler
def test_a_compiled_run_leaves_a_model_like_any_other(script, folder, tmp_path):  # noqa: F811
    for name, more in (("plain", []), ("compiled", ["--compile_layers"])):
        train(script, *words(folder, tmp_path / name, *SCRATCH, "--max_steps", "2", *more))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    _, info = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "compiled", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@needs_a_compiler
def test_an_evaluation_compiles_nothing(tokenizer, speech_clips, tmp_path):
    """Transcribing would have every length of the cache compiled anew, which took longer than the evaluation itself."""
    model, processor = build_tiny(tokenizer)
    compile_layers(model)
    trainer = SpeechTrainer(
        model=model,
        args=SpeechTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", generation_max_length=12),
        eval_dataset=[{"audio": clip["array"], "text": clip["text"]} for clip in speech_clips[:2]],
        data_collator=TranscriptionCollator(processor),
        processing_class=processor,
    )
    torch.compiler.reset()  # what other tests compiled
    counters.clear()
    trainer.evaluate()
    assert not counters["frames"]
    model.train()(**batch_of(processor, speech_clips[:2])).loss.backward()
    assert counters["frames"]  # what the trainer trains is compiled


def test_what_else_is_compiled_stays_so_in_an_evaluation(tokenizer):
    """As flex attention, which without would hold every score of a long prefix."""
    model, _ = build_tiny(tokenizer)
    torch.compiler.reset()
    counters.clear()
    with without_compiled_layers(model):
        torch.compile(lambda values: values + 1, backend="eager")(torch.ones(2))
    assert counters["frames"]


def test_bfloat16_needs_no_gpu(tmp_path):
    """The same config of a run works on a GPU and without."""
    arguments = SpeechTrainingArguments(str(tmp_path), bf16=True, report_to="none")
    assert arguments.use_cpu == (not torch.accelerator.is_available())
    assert not SpeechTrainingArguments(str(tmp_path), report_to="none").use_cpu
