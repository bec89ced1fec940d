"""Streams: shuffled, divided among processes and workers, and gone on with exactly."""

import copy
import itertools
import json
import os
import shutil
import signal
import time
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from test_train_script import SCRATCH, SCRIPT, finish, folder, launch, losses, script, words  # noqa: F401  (fixtures)

from mel_llm.training import (
    PackedTranscriptionCollator,
    SpeechSource,
    SpeechStream,
    SpeedPerturbation,
    TokenCounter,
    TranscriptionCollator,
    last_checkpoint,
    load_source,
)


@pytest.fixture(scope="module")
def table(speech_clips, tmp_path_factory):
    """Forty rows that name short clips in four parquet files, as a dataset of the Hub is stored."""
    import soundfile

    place = tmp_path_factory.mktemp("parquet")
    rows = []
    for index in range(40):
        path = place / f"{index:02}.wav"
        soundfile.write(path, speech_clips[index % 12]["array"][: 1600 + 1600 * (index % 7)], 16000)
        rows.append({"audio": str(path), "text": f"text {index}"})
    for part in range(4):
        Dataset.from_list(rows[10 * part : 10 * part + 10]).to_parquet(place / f"train-{part:05}.parquet")
    return place


def source(table, **options) -> IterableDataset:
    return load_source(SpeechSource(str(table), streaming=True, **options))


def stream_of(table, **options) -> SpeechStream:
    return SpeechStream(source(table), **{"batch_size": 3, "buffer_size": 8, **options})


def texts(items) -> list[list[str]]:
    return [[example["text"] for example in batch] for batch, _ in items]


def test_a_pass_has_every_clip_once_in_another_order_and_otherwise_augmented(table):
    stream = stream_of(table, batch_size=1, speed=SpeedPerturbation((0.8, 1.25)))
    items = list(islice(stream, 120))
    passes = [items[start : start + 40] for start in (0, 40, 80)]
    orders = [[batch[0]["text"] for batch, _ in one] for one in passes]
    assert all(sorted(order) == sorted(f"text {i}" for i in range(40)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != [f"text {i}" for i in range(40)]
    seeds = [{batch[0]["text"]: batch[0]["augment_seed"] for batch, _ in one} for one in passes]
    assert all(seeds[0][text] != seeds[1][text] for text in seeds[0])
    lengths = [{batch[0]["text"]: len(batch[0]["audio"]) for batch, _ in one} for one in passes]
    assert lengths[0] != lengths[1]
    again = texts(islice(stream_of(table, batch_size=1, speed=SpeedPerturbation((0.8, 1.25))), 120))
    assert again == texts(items)
    assert texts(islice(stream_of(table, batch_size=1, seed=1), 40)) != texts(items[:40])
    assert texts(islice(stream_of(table, batch_size=40, buffer_size=0), 1)) == [[f"text {i}" for i in range(40)]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_goes_on_exactly_from_any_batch(table, world_size):
    """Four shards: two processes have two each, of three each keeps a third of the rows."""
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "speed": SpeedPerturbation((0.8, 1.25))}
        whole = list(islice(stream_of(table, **options), 40))
        for stop in range(1, 31):
            stream = stream_of(table, **options)
            state = json.loads(json.dumps(whole[stop - 1][1]))
            stream.trained_on(state)
            rest = list(islice(stream, 3))
            assert texts(rest) == texts(whole[stop : stop + 3]), (rank, stop)
            for (ours, _), (theirs, _) in zip(rest, whole[stop:], strict=False):
                assert all(np.array_equal(a["audio"], b["audio"]) for a, b in zip(ours, theirs, strict=True))


def test_a_release_of_datasets_that_does_not_come_back_is_made_good(table, monkeypatch):
    """As releases before 5.2 do: they lose rows where a file's rows were read in batches."""
    whole = list(islice(stream_of(table), 20))
    kept = IterableDataset.load_state_dict
    monkeypatch.setattr(IterableDataset, "load_state_dict", lambda self, state: kept(self, None))
    for stop in (1, 5, 15):
        stream = stream_of(table)
        stream.trained_on(whole[stop - 1][1])
        assert texts(islice(stream, 3)) == texts(whole[stop : stop + 3]), stop
    other = SpeechStream(source(table, exclude="text:text 1*"), 3, buffer_size=8)
    other.trained_on(whole[4][1])
    with pytest.raises(RuntimeError, match="other rows than when the run was stopped"):
        next(iter(other))


def test_processes_divide_a_pass(table):
    for world_size in (2, 3):
        parts = []
        for rank in range(world_size):
            items = islice(stream_of(table, batch_size=1, rank=rank, world_size=world_size), 40)
            parts.append([batch[0]["text"] for batch, state in items if state["pass"] == 0])
        assert sorted(text for part in parts for text in part) == sorted(f"text {i}" for i in range(40))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", ["mixed", "filtered", "one file"])
def test_mixtures_and_filters_go_on_exactly(script, table, kind, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        "datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )  # when a mixture is left early
    if kind == "mixed":
        sources = [SpeechSource(str(table), weight=3, streaming=True), SpeechSource(str(table), weight=1)]
        data = script.mix_streams(sources, [load_source(one) for one in sources], seed=0)
    elif kind == "filtered":
        data = source(table, exclude="text:text 1*")
    else:
        data = load_source(SpeechSource(str(table / "train-00000.parquet"), streaming=True))
    whole = list(islice(SpeechStream(data, 3, buffer_size=5), 30))
    for stop in (1, 4, 9, 17, 26):
        stream = SpeechStream(copy.deepcopy(data), 3, buffer_size=5)
        stream.trained_on(json.loads(json.dumps(whole[stop - 1][1], default=lambda value: value.tolist())))
        assert texts(islice(stream, 4)) == texts(whole[stop : stop + 4]), stop


def test_a_pass_is_not_changed_by_a_worker_that_begins_the_next(table):
    stream = stream_of(table)
    (first, _), (second, _) = stream._open(0, 0, 1, None), stream._open(1, 0, 1, None)
    assert first.epoch != second.epoch and stream.stream.epoch == 0


def test_a_budget_of_tokens_for_a_stream(table, tiny):
    model, processor = tiny
    counter = TokenCounter(processor, model.config)
    stream = stream_of(table, max_tokens=300, counter=counter)
    batches = list(islice(stream, 12))

    def size_of(batch) -> int:
        made = TranscriptionCollator(processor)(batch)
        ids, _ = model._build_prompt(made["input_features"], made["attention_mask"])
        return len(batch) * (ids.shape[1] + made["labels"].shape[1] + 1)

    for (batch, _), (following, _) in itertools.pairwise(batches):
        assert size_of(batch) <= 300 < size_of([*batch, following[0]])
    again = stream_of(table, max_tokens=300, counter=counter)
    again.trained_on(batches[4][1])
    assert texts(islice(again, 6)) == texts(batches[5:11])
    packed = TokenCounter(processor, model.config, packed=["asr"])
    more = list(islice(stream_of(table, max_tokens=300, counter=packed), 12))
    assert sum(len(batch) for batch, _ in more) > sum(len(batch) for batch, _ in batches)
    with pytest.raises(ValueError, match="max_batch_tokens. is 20, but a clip of 30 s"):
        stream_of(table, max_tokens=20, counter=counter, max_seconds=30.0)


def test_what_cannot_be_used_is_left_out_and_counted(table, tmp_path):
    shutil.copytree(table, tmp_path / "copy")
    rows = [{"audio": str(tmp_path / "copy" / f"{i:02}.wav"), "text": "" if i == 2 else f"text {i}"} for i in range(6)]
    (tmp_path / "copy" / "01.wav").write_bytes(b"RIFF")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = load_source(SpeechSource(str(tmp_path / "rows.jsonl"), streaming=True))
    stream = SpeechStream(data, 1, max_seconds=0.55, buffer_size=0)  # the sixth clip has 0.6 s
    assert texts(islice(stream, 3)) == [["text 0"], ["text 3"], ["text 4"]]
    assert stream.counts.tolist() == [1, 1]
    assert [example["text"] for example in stream.take(9)] == ["text 0", "text 3", "text 4"]
    assert "augment_seed" not in stream.take(1)[0]
    with pytest.raises(RuntimeError, match="no clip that can be used in a whole pass"):
        next(iter(SpeechStream(data, 1, min_seconds=5.0)))
    with pytest.raises(RuntimeError, match="no rows for process 7"):
        next(iter(SpeechStream(data, 1, rank=7, world_size=8)))


def test_a_place_of_another_reading_is_refused(table, tmp_path):
    stream = stream_of(table)
    for _, state in islice(stream, 4):
        stream.trained_on(state)
    stream.save_state(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["stream_state_0.json"]
    again = stream_of(table)
    again.load_state(tmp_path, 0, 4, 10)
    assert again.batches == 4
    for other, workers, batches, message in (
        (stream_of(table, seed=3), 0, 4, "seed was 0 and is 3"),
        (stream_of(table, batch_size=2), 0, 4, "batch_size was 3 and is 2"),
        (stream_of(table), 1, 4, "dataloader_num_workers was 0 and is 1"),
        (stream_of(table), 0, 8, "gradient_accumulation_steps"),
        (stream_of(table, rank=1, world_size=2), 0, 4, "stream_state_1.json is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state(tmp_path, workers, batches, 10)


def test_questions_in_a_stream_count_with_the_budget(table, tiny):
    model, processor = tiny
    asked = "Which emotion is in this voice, and what else is heard in the room around it?"
    for packed in ((), ("asr",)):
        counter = TokenCounter(processor, model.config, packed=packed)
        stream = SpeechStream(
            source(table, text_column="text", instruction=asked), buffer_size=8, max_tokens=400, counter=counter
        )
        batches = [batch for batch, _ in islice(stream, 6)]
        assert all(example["instruction"] == asked for batch in batches for example in batch)
        collator = TranscriptionCollator(processor)
        if packed:
            collator = PackedTranscriptionCollator(processor, config=model.config)
        sizes = [collator(batch)["input_ids"].numel() for batch in batches]
        assert max(sizes) <= 400 and np.mean(sizes) > 200 and len(batches[0]) > 1
    with pytest.raises(ValueError, match="max_tokens. is for asr, tts, not for 'qa'"):
        stream_of(table, max_tokens=400, counter=counter, task="qa")


# --- in the training script -----------------------------------------------------------------------------------------


def stream_words(folder, output, *more):  # noqa: F811
    data = [f"{folder},streaming=true,weight=2", f"{folder},split=validation,weight=1"]
    random = ["--spec_augment", "--speed_factors", "0.9", "1.0", "1.1", "--shuffle_buffer", "4"]
    steps = ["--max_steps", "24", "--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "9"]
    return words(folder, output, *SCRATCH, "--train_data", *data, *random, *steps, *more)


@pytest.mark.parametrize(
    "more",
    [
        ["--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"],
        ["--max_batch_tokens", "900", "--packing"],
    ],
    ids=["workers", "packed"],
)
def test_a_stream_that_was_killed_goes_on_as_if_nothing_had_happened(folder, tmp_path, more):  # noqa: F811
    """Over several passes: 24 steps see the sixteen rows many times."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = launch(SCRIPT, *stream_words(folder, whole, *more))
    process = launch(SCRIPT, *stream_words(folder, cut, *more), start_new_session=True)
    waited = time.time() + 120
    while time.time() < waited and process.poll() is None:
        if (last_checkpoint(cut) or "").endswith(("-10", "-15", "-20")):
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert last_checkpoint(cut) is not None and not (cut / "training_summary.json").exists()
    assert "Going on from" in finish(launch(SCRIPT, *stream_words(folder, cut, *more)))
    finish(uninterrupted)
    assert losses(cut) == losses(whole) and len(losses(whole)) == 24
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert max(entry.get("stream_passes", 0) for entry in log) >= 2


def test_what_a_stream_cannot_do_is_told_before_training(script, folder, tmp_path):  # noqa: F811
    data = ["--train_data", f"{folder},streaming=true", *SCRATCH, "--max_steps", "2"]
    for more, message in (
        (["--save_strategy", "epoch"], "A stream has no epochs"),
        (["--max_batch_tokens", "20"], "a clip of 30 s takes"),
        (["--min_seconds", "29"], "not one clip that can be used"),
        (["--tasks", "tts", "--train_data", f"{data[1]},text_column=text,instruction=Who?"], "for reading alone"),
    ):
        with pytest.raises(ValueError, match=message):
            script.prepare(words(folder, tmp_path / "run", *data, *more))
    run = script.prepare(words(folder, tmp_path / "run", *data, "--dataloader_num_workers", "40"))
    assert run.trainer.args.dataloader_num_workers == 12  # a shard for each row of a small folder
    data[-1] = "1"
    steps = ["--save_strategy", "steps", "--save_steps", "1"]
    script.train(script.prepare(words(folder, tmp_path / "run", *data, *steps)))
    with pytest.raises(ValueError, match="seed was 42 and is 7.*ignore_data_skip"):
        script.prepare(words(folder, tmp_path / "run", *data[:-1], "2", "--seed", "7"))
    anew = ["--seed", "7", "--ignore_data_skip"]
    script.train(script.prepare(words(folder, tmp_path / "run", *data[:-1], "2", *anew)))
    assert len(losses(tmp_path / "run")) == 2
