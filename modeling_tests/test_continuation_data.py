"""SPECTRON's data: clips cut into prompt and continuation, spoken questions, and both as tasks of a run."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny
from test_joint_training import SPEECH, log_history
from test_train_script import SCRATCH, losses, script, train, words  # noqa: F401  (fixtures among them)
from transformers import AutoProcessor

from mel_llm import MelLLMFeatureExtractor, MelLLMForSpeechContinuation, MelLLMSpeechConfig, MelLLMVocoderConfig
from mel_llm.training import (
    ContinuationCollator,
    PromptCut,
    QACollator,
    SpeechDataset,
    SpeechSource,
    SpeechStream,
    TaskCollator,
    load_source,
    select_answered,
    select_clips,
    select_continuations,
)
from mel_llm.training.sources import read_answers
from mel_llm.training.throughput import ThroughputMeter


SPOKEN = ["--tasks", "continuation,qa", *SCRATCH, *SPEECH, "--prompt_seconds", "1"]


@pytest.fixture(scope="module")
def model_and_processor(tokenizer):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    return build_tiny(
        tokenizer,
        feature_extractor=extractor,
        speech_config=MelLLMSpeechConfig.from_preset("small", head_hidden_size=16, postnet_channels=8),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2),
        model_class=MelLLMForSpeechContinuation,
    )


def write(folder, clips, questions=()):
    """A folder of clips, and one of questions with answers beside it, as the Hub's have them."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        columns = ["question_audio", "question", "answer", "answer_audio"] if questions else ["file_name", "text"]
        rows.writerow(columns)
        for number, clip in enumerate(clips):
            soundfile.write(folder / f"{number}.wav", clip["array"], 16000)
            row = [f"{number}.wav", clip["text"]]
            if questions:
                answer = questions[number]
                soundfile.write(folder / f"answer{number}.wav", answer["array"], 16000)
                row += [answer["text"], "" if number == 1 else f"answer{number}.wav"]  # one that nobody spoke
            rows.writerow(row)
    return str(folder)


@pytest.fixture
def recordings(speech_clips, tmp_path):
    return write(tmp_path / "recordings", speech_clips[:10])


@pytest.fixture
def questions(speech_clips, tmp_path):
    return write(tmp_path / "questions", speech_clips[8:12], speech_clips[12:16])


# --- where clips are cut ------------------------------------------------------------------------------------------------


def test_prompts_are_as_long_as_asked_for():
    assert PromptCut().place(16000 * 10, 16000, seed=3) == 48000
    assert PromptCut().place(16000 * 3, 16000) is None
    ranged = PromptCut((2.0, 4.0))
    places = [ranged.place(16000 * 10, 16000, seed) for seed in range(200)]
    assert 32000 <= min(places) < 35000 and 61000 < max(places) <= 64000
    assert places == [ranged.place(16000 * 10, 16000, seed) for seed in range(200)]
    assert ranged.place(16000 * 10, 16000) == 48000
    # A short clip keeps its continuation
    assert all(ranged.place(48000, 16000, seed) <= 40000 for seed in range(50))
    assert PromptCut(fraction=(0.25,)).place(40000, 16000, seed=1) == 10000
    assert PromptCut(fraction=(0.5,)).min_clip_seconds == 1.0 and PromptCut((2.0,)).min_clip_seconds == 2.5


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": ()},
        {"seconds": (4.0, 2.0)},
        {"fraction": (1.0,)},
        {"seconds": (0.0,)},
        {"min_continuation_seconds": 0},
    ],
)
def test_cuts_that_cannot_be(fields):
    with pytest.raises(ValueError, match="must be"):
        PromptCut(**fields)


def test_clips_without_room_are_counted(recordings, speech_clips):
    selected = select_clips(load_source(SpeechSource(recordings)), None)
    data, seconds, report = select_continuations(*selected, PromptCut())
    kept = [clip for clip in speech_clips[:10] if clip["duration"] >= 3.5]
    assert [row["text"] for row in data] == [clip["text"] for clip in kept] and 0 < len(kept) < 10
    assert seconds == pytest.approx([clip["duration"] for clip in kept])
    assert report.left_out == {"too short for a prompt of 3 s and 0.5 s behind it": 10 - len(kept)}
    assert report.num_clips == len(kept)


# --- batches ------------------------------------------------------------------------------------------------------------


def test_the_text_is_whole_and_the_sound_is_cut(model_and_processor, speech_clips):
    model, processor = model_and_processor
    clips = [clip for clip in speech_clips if clip["duration"] > 3.6][:3]
    examples = [{"audio": clip["array"], "text": clip["text"]} for clip in clips]
    batch = ContinuationCollator(processor)(examples)
    written = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert written == [clip["text"] for clip in clips]
    assert batch["input_features_mask"].sum(-1).tolist() == [300] * 3
    lengths = [(len(clip["array"]) - 48000) // 160 for clip in clips]
    assert (batch["spectrogram_labels"] != -100).all(-1).sum(-1).tolist() == lengths
    # The two parts, in the features' units, without a sample of the other
    behind = processor(audio=[clips[0]["array"][48000:]])["input_features"][0]
    assert torch.equal(batch["spectrogram_labels"][0, : lengths[0]], behind)
    output = model(**batch)
    assert torch.isfinite(output.loss) and {"text", "mel"} & set(output.losses)
    meter = ThroughputMeter(100.0)
    meter.add(batch)
    assert int(meter.pending) == 3 * 300 + sum(lengths)  # heard, and spoken

    later = ContinuationCollator(processor, features_later=True)
    assert all(torch.equal(value, batch[key]) for key, value in later.finish(later(examples)).items())


def test_a_transcript_of_several_lines_has_no_separator(model_and_processor):
    model, processor = model_and_processor
    whole = torch.tensor(processor.continuation_text_ids("One two.\r\n Three\n"))
    assert model._split(whole) == (None, None) and processor.tokenizer.decode(whole) == "One two. Three"
    parts = model._split(torch.tensor(processor.continuation_text_ids("Who\nis it?", "Me\nand you.")))
    assert [processor.tokenizer.decode(part) for part in parts] == ["Who is it?", "Me\nand you."]


def test_texts_are_dropped_in_training_only(model_and_processor, speech_clips):
    model, processor = model_and_processor
    clip = max(speech_clips, key=lambda clip: clip["duration"])
    collator = ContinuationCollator(processor, skip_text_probability=0.5)
    examples = [{"audio": clip["array"], "text": clip["text"], "augment_seed": seed} for seed in range(60)]
    dropped = (collator(examples)["labels"] == -100).all(-1)
    assert 15 <= dropped.sum() <= 45
    assert not (collator([{**example, "augment_seed": None} for example in examples])["labels"] == -100).all(-1).any()
    every = ContinuationCollator(processor, skip_text_probability=1.0)(examples[:2])
    output = model(**every)
    assert torch.isfinite(output.loss) and "text" not in output.losses
    with pytest.raises(ValueError, match="share from 0 to 1"):
        ContinuationCollator(processor, skip_text_probability=2.0)


def test_questions_and_answers(model_and_processor, questions, speech_clips):
    model, processor = model_and_processor
    data = load_source(SpeechSource(questions))
    assert data[0]["answers"] == [speech_clips[12]["text"]] and data[1]["answer_audio"] is None
    rows, seconds, _ = select_answered(*select_clips(data, processor.tokenizer))
    spoken = [speech_clips[8 + i]["duration"] + (speech_clips[12 + i]["duration"] if i != 1 else 0) for i in range(4)]
    assert seconds == pytest.approx(spoken)
    dataset = SpeechDataset(rows.add_column("task", ["qa"] * 4))
    separator = model.config.separator_ids
    # Every text may go, but not where nothing else is to be learnt
    collator = QACollator(processor, skip_text_probability=1.0)
    assert collator([dataset[0, i] for i in range(3)])["labels"].ne(-100).any(-1).tolist() == [False, True, False]
    batch = QACollator(processor)([dataset[i] for i in range(3)])
    ids = batch["labels"][0]
    ids = ids[ids != -100].tolist()
    place = ids.index(separator[0])
    assert processor.tokenizer.decode(ids[:place]) == speech_clips[8]["text"]
    assert processor.tokenizer.decode(ids[place + len(separator) :]) == speech_clips[12]["text"]
    has_speech = (batch["spectrogram_labels"] != -100).all(-1).any(-1)
    assert has_speech.tolist() == [True, False, True] and batch["task"] == "qa"
    assert torch.isfinite(model(**batch).loss)
    later = TaskCollator({"qa": QACollator(processor, features_later=True)})
    made = later.finish(later([dataset[i] for i in range(3)]))
    assert made.keys() == batch.keys() and torch.equal(made["spectrogram_labels"], batch["spectrogram_labels"])
    # Another prompt than that of a continuation
    without = {key: value for key, value in batch.items() if key != "task"}
    assert not torch.equal(model(**batch).logits, model(**without).logits)


def test_columns_of_answers_can_be_named(questions, tmp_path):
    text = (tmp_path / "questions" / "metadata.csv").read_text()
    (tmp_path / "questions" / "metadata.csv").write_text(
        text.replace("question_audio,question,answer,answer_audio", "asked,q,reply,said", 1)
    )
    options = "audio_column=asked,text_column=q,answer_column=reply,answer_audio_column=said,task=qa"
    data = load_source(SpeechSource.parse(f"{questions},{options}"))
    assert data[0]["answers"] and soundfile.info(data[0]["answer_audio"]["path"]).frames > 0
    with pytest.raises(ValueError, match="answer_column"):
        load_source(SpeechSource.parse(f"{questions},audio_column=asked,text_column=q,task=qa"))


def test_answers_are_read_as_they_are_published():
    assert read_answers("Paris") == ["Paris"] and read_answers(["Paris", " ", "paris"]) == ["Paris", "paris"]
    assert read_answers('["a", "b"]') == ["a", "b"] and read_answers("[sic] a") == ["[sic] a"]
    webquestions = '(list (description "Jazmyn Bieber") (description Jaxon))'
    assert read_answers(webquestions) == ["Jazmyn Bieber", "Jaxon"]
    assert read_answers({"text": ["a", "b"], "answer_start": [1, 2]}) == ["a", "b"]
    assert read_answers({"value": "a", "aliases": ["A", "a."]}) == ["a", "A", "a."]
    assert read_answers(None) == [] and read_answers(1912) == ["1912"]


def test_a_question_that_cannot_be_read_is_replaced_by_a_question(questions, recordings, tmp_path):
    from datasets import concatenate_datasets

    asked, told = load_source(SpeechSource(questions)), load_source(SpeechSource(recordings))
    rows = concatenate_datasets(
        [asked.add_column("task", ["qa"] * len(asked)), told.add_column("task", ["continuation"] * len(told))]
    )
    (tmp_path / "questions" / "3.wav").write_bytes(b"no sound")
    dataset = SpeechDataset(rows)
    assert dataset[3]["task"] == "qa" and dataset[3]["text"] == dataset[0]["text"]
    assert dataset[4]["task"] == "continuation" and "answer" not in dataset[4]


def test_questions_can_stream(questions):
    data = load_source(SpeechSource(questions)).to_iterable_dataset()
    examples = SpeechStream(data, buffer_size=0, task="qa").take(9)
    assert len(examples) == 4 and examples[1]["answer_audio"] is None and len(examples[0]["answer_audio"]) > 8000
    assert all(example["answer"] for example in examples)


# --- training -----------------------------------------------------------------------------------------------------------


def test_one_run_of_all_tasks(script, recordings, questions, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    more = ["--tasks", "asr,tts,continuation,qa", *SPOKEN[2:], "--skip_text_probability", "0.2"]
    more += ["--train_data", recordings, questions, "--max_steps", "12"]
    more += ["--eval_data", f"{recordings},split=train", f"{questions},split=train"]
    run = train(script, *words(recordings, output, *more, "--remote_code"))
    assert isinstance(run.trainer.data_collator, TaskCollator)
    tasks = run.trainer.train_dataset.data["task"]
    # Answered questions are for qa alone; clips of less than 1.5 s have no room for prompt and continuation
    assert tasks.count("qa") == 4 and tasks.count("asr") == tasks.count("tts") == 10 > tasks.count("continuation") > 5
    log = log_history(output)
    names = {name for entry in log for name in entry}
    assert {"asr_loss", "tts_loss", "continuation_text", "continuation_loss", "qa_text", "qa_loss"} <= names
    assert {"eval_continuation_loss", "eval_qa_loss", "eval_asr_wer", "eval_tts_loss"} <= names
    summary = json.loads((output / "training_summary.json").read_text())
    assert summary["data"]["train"]["recordings"]["continuation"]["left_out"] and summary["setup"]["prompts"] == "1 s"
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["MelLLMForSpeechContinuation"]
    model = MelLLMForSpeechContinuation.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    prompt = processor(audio=np.random.default_rng(0).standard_normal(16000).astype(np.float32))
    spoken = model.generate(**prompt, task="qa", max_seconds=0.2, max_new_tokens=4)
    assert len(spoken.audio) == 1 and spoken.sequences.shape[1] <= 4
    assert processor.continuation_prompt_ids("qa") == (model.config.qa_prefix_ids, model.config.qa_suffix_ids)


def stopped_at(whole, cut, step: int) -> None:
    """What a run that was killed leaves: a checkpoint and no more."""
    shutil.copytree(whole / f"checkpoint-{step}", cut / f"checkpoint-{step}")
    if (whole / "base").is_dir():
        shutil.copytree(whole / "base", cut / "base")


@pytest.mark.parametrize(
    "more",
    [["--packing"], ["--features_on_device"], ["--lora", "small", "--freeze_layers", "1", "--packing"]],
    ids=["packed", "device", "adapters"],
)
def test_questions_about_clips_and_spoken_ones_in_one_run(script, recordings, questions, tmp_path, more):  # noqa: F811
    """All that a source can be, and all tasks; stopped, it goes on exactly. Reading is evaluated on questions alone."""
    asked = f"{recordings},task=asr,text_column=text,instruction=Is it long?"
    data = ["--train_data", recordings, asked, questions, "--eval_data", f"{asked},split=train"]
    steps = ["--max_steps", "8", "--save_steps", "4", "--save_strategy", "steps", "--save_total_limit", "9"]
    common = ["--tasks", "asr,tts,continuation,qa", *SPOKEN[2:], *data, *steps, *more, "--spec_augment"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = train(script, *words(recordings, whole, *common))
    rows = run.trainer.train_dataset.data
    pairs = set(zip(rows["task"], rows["instruction"], strict=True))
    assert pairs == {("asr", None), ("asr", "Is it long?"), ("tts", None), ("continuation", None), ("qa", None)}
    names = {name for entry in log_history(whole) for name in entry}
    assert {"asr_loss", "eval_asr_loss", "eval_asr_wer"} <= names and "eval_tts_loss" not in names
    stopped_at(whole, cut, 4)
    train(script, *words(recordings, cut, *common))
    assert losses(cut) == losses(whole) and len(losses(cut)) == 8
    summary = json.loads((cut / "training_summary.json").read_text())
    assert summary["metrics"]["eval_asr_wer"] > 0 and summary["setup"]["eval_data"][0]["asks"]
    assert list(summary["data"]["train"]) == ["recordings", "recordings (2)", "questions"]
    assert "continuation" in summary["data"]["train"]["recordings"]
    card = (cut / "README.md").read_text()
    assert "answers to questions about the recordings" in card and "model-index" not in card
    assert "| `recordings`, split train, task asr | 10 |" in card and "| `questions`, split train | 4 |" in card


def test_a_source_of_no_use_for_a_task_has_no_share_in_it(script, recordings, questions, speech_clips, tmp_path):  # noqa: F811
    short = write(tmp_path / "short", [{**clip, "array": clip["array"][:12000]} for clip in speech_clips[:4]])
    more = ["--tasks", "asr,continuation,qa", *SPOKEN[2:], "--task_weights", "1", "2", "1"]
    run = script.prepare(words(recordings, tmp_path / "run", *more, "--train_data", short, recordings, questions))
    assert run.reports["train"][short]["continuation"]["num_clips"] == 0
    order = [index for _, index in run.trainer.train_sampler]
    tasks = np.array(run.trainer.train_dataset.data["task"])[order]
    assert np.mean(tasks == "continuation") == pytest.approx(0.5, abs=0.1)


def test_a_ctc_head_has_batches_of_transcripts(script, recordings, tmp_path):  # noqa: F811
    """Beside questions, from which it learns nothing."""
    asked = f"{recordings},text_column=text,instruction=Is it long?"
    ctc = [*SCRATCH[:2], "--audio_config", '{"conv_channels": 8, "hidden_size": 32, "ctc_weight": 0.3}']
    more = ["--train_data", recordings, asked, *ctc]
    for size in (["--per_device_train_batch_size", "2"], ["--max_batch_tokens", "400"]):
        run = script.prepare(words(recordings, tmp_path / "run", *more, *size))
        asks = [batch.get("transcript_bytes") is None for batch in run.trainer.get_train_dataloader()]
        assert sum(asks) == len(asks) / 2 >= 2
    for name, value in (("--ctc_only_steps", "2"), ("--label_smoothing_factor", "0.1")):
        with pytest.raises(ValueError, match=f"{name} is for"):
            script.prepare(words(recordings, tmp_path / "run", *more, name, value))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_without_any_text(script, recordings, tmp_path, accumulation):  # noqa: F811
    """Small ones can lack it by chance: the log must not count on it."""
    more = ["--tasks", "continuation", *SPOKEN[2:], "--skip_text_probability", "1", "--max_steps", "2"]
    more += ["--gradient_accumulation_steps", str(accumulation)]
    train(script, *words(recordings, tmp_path / "run", *more))
    log = [entry for entry in log_history(tmp_path / "run") if "loss" in entry]
    assert all("continuation_text" not in entry for entry in log) and len(log) == 2
    assert [entry["loss"] for entry in log] == pytest.approx([entry["continuation_loss"] for entry in log], rel=1e-3)


@pytest.mark.parametrize("task", ["continuation", "qa"])
def test_streams_of_every_task_go_on(script, recordings, questions, tmp_path, task):  # noqa: F811
    place = questions if task == "qa" else recordings
    more = ["--tasks", task, *SPOKEN[2:], "--train_data", f"{place},streaming=true", "--skip_text_probability", "0.3"]
    more += ["--max_steps", "6", "--save_steps", "3", "--save_strategy", "steps", "--shuffle_buffer", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(script, *words(place, whole, *more))
    stopped_at(whole, cut, 3)
    train(script, *words(place, cut, *more))
    assert losses(cut) == losses(whole) and len(losses(cut)) == 6


def test_a_reader_learns_to_go_on(script, recordings, tiny_folder, tmp_path):  # noqa: F811
    """One that was saved before there was such a task; with adapters, and the base that they need."""
    from mel_llm import MelLLMForSpeechSeq2Seq

    place = tmp_path / "reader"
    reader = MelLLMForSpeechSeq2Seq.from_pretrained(tiny_folder)
    for name in (
        "continuation_prefix_ids",
        "continuation_suffix_ids",
        "qa_prefix_ids",
        "qa_suffix_ids",
        "separator_ids",
    ):
        setattr(reader.config, name, [])
    reader.save_pretrained(place)
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(place)
    output = tmp_path / "run"
    more = [
        "--tasks",
        "continuation",
        *SPEECH,
        "--model_name_or_path",
        str(place),
        "--lora",
        "small",
        "--max_steps",
        "2",
    ]
    run = train(script, *words(recordings, output, *more, "--prompt_fraction", "0.3", "0.5"))
    assert len(run.trainer.train_dataset) == 10
    base = MelLLMForSpeechContinuation.from_pretrained(output / "base")
    assert base.config.continuation_suffix_ids and base.config.speech_config is not None


def test_spectrons_own_form(script, recordings, tmp_path):  # noqa: F811
    encoder = {"hidden_size": 32, "num_blocks": 1, "num_attention_heads": 2, "intermediate_size": 32}
    audio = {"conv_channels": 8, "hidden_size": 32, "encoder_config": {**encoder, "kernel_size": 3}}
    more = ["--preset", "spectron-small", "--tasks", "continuation", *SCRATCH[:2], "--audio_config", json.dumps(audio)]
    more += ["--speech_config", json.dumps({"head_hidden_size": 16, "prenet_hidden_size": 8}), "--max_steps", "2"]
    more += ["--text_loss_weight", "0"]
    run = train(script, *words(recordings, tmp_path / "run", *more, "--prompt_seconds", "1", "2"))
    config = run.trainer.model.config
    assert config.audio_config.encoder_type == "conformer" and config.audio_config.num_mel_bins == 128
    assert config.speech_config.head_type == "deterministic" and config.speech_reduction_factor == 1
    assert run.processor.feature_extractor.num_mel_bins == 128
    log = log_history(tmp_path / "run")
    assert config.text_loss_weight == 0 and all(entry["continuation_text"] == 0 for entry in log if "loss" in entry)
    assert np.isfinite([entry["loss"] for entry in log_history(tmp_path / "run") if "loss" in entry]).all()


def test_streams_are_cut_too(script, recordings, tmp_path):  # noqa: F811
    more = ["--tasks", "continuation", *SPOKEN[2:], "--train_data", f"{recordings},streaming=true", "--max_steps", "2"]
    run = train(script, *words(recordings, tmp_path / "run", *more, "--features_on_device"))
    assert run.stream_counts[1] >= 1  # shorter than a prompt and what follows


def test_speech_alone(script, recordings, tmp_path):  # noqa: F811
    more = ["--tasks", "continuation", *SPOKEN[2:], "--skip_text_probability", "1", "--max_steps", "2"]
    more += ["--eval_data", f"{recordings},split=train"]
    train(script, *words(recordings, tmp_path / "run", *more))
    log = log_history(tmp_path / "run")
    trained = [entry for entry in log if "loss" in entry]
    assert len(trained) == 2 and all("continuation_text" not in entry for entry in trained)
    assert all(entry["continuation_loss"] == pytest.approx(entry["loss"], rel=1e-3) for entry in trained)
    assert any("eval_continuation_before" in entry and "eval_continuation_text" not in entry for entry in log)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "qa", *SPOKEN[2:]], "has no answers|none of the columns"),
        (
            ["--tasks", "continuation", *SPOKEN[2:-1], "30"],
            "No clip of the Training data is left to use for continuation",
        ),
    ],
)
def test_what_cannot_work_is_told_before_training(script, recordings, tmp_path, arguments, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        script.prepare(words(recordings, tmp_path / "run", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "continuation", "--prompt_seconds", "4", "2"], "--prompt_seconds must be"),
        (["--tasks", "qa", "--max_batch_tokens", "500"], "not of continuation and qa"),
        (["--tasks", "asr,continuation", "--max_batch_tokens", "500"], "not of continuation and qa"),
        (["--tasks", "continuation,qa", "--packing"], "--packing is for reading"),
        (["--tasks", "asr", "--prompt_fraction", "0.5"], "--prompt_fraction is for --tasks continuation"),
        (["--tasks", "continuation", "--skip_text_probability", "1.5"], "--skip_text_probability must be"),
        (["--tasks", "asr", "--text_loss_weight", "0"], "--text_loss_weight must be at least 0, and is for --tasks"),
        (["--tasks", "qa", "--speed_factors", "0.9"], "--speed_factors is for reading"),
        (["--tasks", "continuation", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor is for tokens"),
    ],
)
def test_arguments_that_do_not_fit(script, recordings, tmp_path, arguments, message, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        script.prepare(words(recordings, tmp_path / "run", *arguments))
    assert message in capsys.readouterr().err
