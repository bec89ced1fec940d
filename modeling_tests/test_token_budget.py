"""Batches by a budget of tokens: full, never beyond it, the same number for every process and epoch."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import build_tiny
from test_train_script import SCRATCH, SCRIPT, finish, folder, launch, losses, script, words  # noqa: F401  (fixtures)

from mel_llm.training import (
    PackedTranscriptionCollator,
    SpeechDataset,
    SpeechSource,
    SynthesisCollator,
    TokenBudgetSampler,
    TokenCounter,
    TranscriptionCollator,
    batch_tokens,
    last_checkpoint,
    load_source,
)


def lengths(count: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(10, 376, count), random.integers(8, 60, count)


def batches_of(sampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert all(number == epoch for batch in batches for number, _ in batch)
    return [[index for _, index in batch] for batch in batches]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_full_and_never_beyond_the_budget(packed):
    audio, text = lengths()
    sampler = TokenBudgetSampler(audio, text, 4000, packed=[None] if packed else [])
    for epoch in range(4):
        batches = batches_of(sampler, epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(2000))
        sizes = [batch_tokens(audio[batch], text[batch], packed) for batch in batches]
        assert max(sizes) <= 4000 and np.mean(sizes) > 0.9 * 4000
        assert len(batches) == len(sampler)
        spread = [int(audio[batch].max() - audio[batch].min()) for batch in batches]
        assert np.mean(spread) < 40  # of 366
    # Without a budget, the longest clips say how many fit
    assert len(batches) < 2000 / (4000 // 434)


def test_the_order_is_of_the_seed_and_the_epoch_alone():
    audio, text = lengths(500)
    sampler, again = TokenBudgetSampler(audio, text, 2000), TokenBudgetSampler(audio, text, 2000)
    first, second = batches_of(sampler, 0), batches_of(sampler, 1)
    assert batches_of(again, 1) == second and batches_of(again, 0) == first and first != second
    # Not only the batches are shuffled, but the clips in them too
    assert len({frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}) < len(first) // 4
    assert batches_of(TokenBudgetSampler(audio, text, 2000, seed=1)) != first
    longest = int((audio + text).argmax())
    assert longest in first[0]  # memory that does not suffice is told at the first step


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_process_has_as_many_batches_of_the_same_kind(world_size):
    audio, text = lengths(301)
    kinds = {"asr": range(200), "tts": range(200, 301)}
    options = {"sizes": [200, 101], "kinds": ["asr", "tts"], "packed": ["asr"], "world_size": world_size}
    samplers = [TokenBudgetSampler(audio, text, 3000, **options, rank=rank) for rank in range(world_size)]
    for epoch in range(3):
        steps = list(zip(*(batches_of(sampler, epoch) for sampler in samplers), strict=True))
        assert len(steps) == len(samplers[0])
        seen = [index for step in steps for batch in step for index in batch]
        assert sorted(seen) == list(range(301))
        for step in steps:
            assert any(all(set(batch) <= set(clips) for batch in step) for clips in kinds.values())
            for batch in step:
                assert batch_tokens(audio[batch], text[batch], batch[0] < 200) <= 3000


def test_few_clips_and_long_ones():
    sampler = TokenBudgetSampler([10, 10, 500], [5, 5, 5], 100, world_size=2)
    assert [sorted(map(sorted, map(list, step))) for step in sampler.steps()] == [[[0, 1], [2]]]
    alone = [TokenBudgetSampler([10], [5], 100, world_size=4, rank=rank) for rank in range(4)]
    assert [batches_of(one) for one in alone] == [[[0]]] * 4
    with pytest.raises(ValueError, match="at least 1"):
        TokenBudgetSampler([10], [5], 0)


def test_weights_and_partners_keep_the_number_of_batches():
    audio, text = lengths(400)
    sampler = TokenBudgetSampler(audio, text, 2500, [100, 300], [3.0, 1.0])
    counts = [len(batches_of(sampler, epoch)) for epoch in range(5)]
    assert set(counts) == {len(sampler)}
    share = np.mean([index < 100 for batch in batches_of(sampler, 2) for index in batch])
    assert share == pytest.approx(0.75, abs=0.05)

    def partners(epoch):
        return {index: (index + 1 + epoch) % 400 for index in range(0, 400, 2)}

    paired = TokenBudgetSampler(audio, text, 2500, partners=partners)
    for epoch in range(3):
        a, t = audio.copy(), text.copy()
        for index, other in partners(epoch).items():
            a[index], t[index] = a[index] + audio[other], t[index] + text[other]
        batches = batches_of(paired, epoch)
        assert len(batches) == len(paired)
        assert max(batch_tokens(a[batch], t[batch]) for batch in batches) <= 2500
        assert len({index for batch in batches for index in batch}) > 380


def test_the_counter_counts_what_the_model_computes_on(tokenizer, folder, speech_clips):  # noqa: F811
    model, processor = build_tiny(tokenizer, speech_config={})
    counter = TokenCounter(processor, model.config)
    dataset = SpeechDataset(load_source(SpeechSource(folder)))
    examples = [dataset[index] for index in range(4)]
    seconds, texts = [len(one["audio"]) / 16000 for one in examples], [one["text"] for one in examples]
    widths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    with torch.no_grad():
        for task, collator in (("asr", TranscriptionCollator(processor)), ("tts", SynthesisCollator(processor))):
            model(**collator(examples))
            assert widths.pop() == batch_tokens(counter.audio(seconds, task), counter.text(texts, task))
        packed = PackedTranscriptionCollator(processor, config=model.config)(examples)
        model(**packed)
    counter = TokenCounter(processor, model.config, packed=["asr"])
    assert widths.pop() == batch_tokens(counter.audio(seconds), counter.text(texts), packed=True)
    assert packed["input_ids"].shape[0] == 1
    hook.remove()
    slow = TokenCounter(processor, model.config, slowest=0.5)
    assert slow.audio([1.0])[0] == counter.audio([2.0])[0] and slow.audio([1.0], "tts")[0] == counter.audio([1.0])[0]


def test_the_counter_counts_what_is_asked(tokenizer, folder, speech_clips):  # noqa: F811
    model, processor = build_tiny(tokenizer)
    dataset = SpeechDataset(load_source(SpeechSource(folder)))
    examples = [dataset[index] for index in range(4)]
    asked = ["Who?", None, "Which emotion is in this voice, and what else is heard in the room around it?", "Who?"]
    examples = [{**one, "instruction": text} for one, text in zip(examples, asked, strict=True)]
    seconds, texts = [len(one["audio"]) / 16000 for one in examples], [one["text"] for one in examples]
    for packed in ((), ("asr",)):
        counter = TokenCounter(processor, model.config, packed=packed)
        counts = counter.text(texts, "asr", asked)
        assert counts[2] > counter.text(texts)[2] + 10
        collator = (
            PackedTranscriptionCollator(processor, config=model.config) if packed else TranscriptionCollator(processor)
        )
        size, budget = collator(examples)["input_ids"].numel(), counter.audio(seconds)
        budget = batch_tokens(budget, counts, packed=bool(packed))
        assert size == budget if packed else 0.8 * budget < size <= budget
        for place in (0, 2, 3):
            alone = collator(examples[place : place + 1])["input_ids"].numel()
            assert alone == counter.audio(seconds)[place] + counts[place]


# --- in the training script -----------------------------------------------------------------------------------------


def test_a_run_with_a_budget_that_was_killed_goes_on_exactly(folder, tmp_path):  # noqa: F811
    random = [
        *("--spec_augment", "--speed_factors", "0.9", "1.0", "1.1", "--dataloader_num_workers", "1", *SCRATCH),
        *("--train_data", f"{folder},weight=2", f"{folder},split=validation,weight=1", "--tasks", "asr,tts"),
        *("--save_strategy", "steps", "--save_steps", "5", "--num_train_epochs", "6"),
        *("--max_batch_tokens", "900", "--packing"),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = launch(SCRIPT, *words(folder, whole, *random))
    process = launch(SCRIPT, *words(folder, cut, *random), start_new_session=True)
    waited = time.time() + 120
    while last_checkpoint(cut) is None and time.time() < waited and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert last_checkpoint(cut) is not None and not (cut / "training_summary.json").exists()
    finish(launch(SCRIPT, *words(folder, cut, *random)))
    finish(uninterrupted)
    assert losses(cut) == losses(whole) and len(losses(whole)) > 20


def test_two_processes_share_the_batches(folder, tmp_path):  # noqa: F811
    common = [*SCRATCH, "--use_cpu", "--num_train_epochs", "2", "--max_batch_tokens", "600"]
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    finish(launch(*accelerate, SCRIPT, *words(folder, tmp_path / "two", *common)))
    state = json.loads((tmp_path / "two" / "trainer_state.json").read_text())
    assert state["epoch"] == 2.0 and len(losses(tmp_path / "two")) == state["max_steps"] > 2


def test_a_clip_beyond_the_budget_is_told_before_training(script, folder, tmp_path):  # noqa: F811
    for more, message in (
        (["--max_batch_tokens", "60"], r"12 clips need more by themselves, \d\d.wav|more by themselves, .*wav \d+"),
        (["--max_batch_tokens", "0"], None),
        (["--packing", "--tasks", "tts"], None),
        (["--packing", "--label_smoothing_factor", "0.1"], None),
    ):
        with pytest.raises(SystemExit if message is None else ValueError, match=message):
            script.prepare(words(folder, tmp_path / "run", *SCRATCH, *more))
