"""Questions about recordings: training on them, asking them, and counting the right answers."""

import copy
import csv
import json

import pytest
import soundfile
import torch
import transformers
from conftest import ROOT, load_script
from test_evaluate_asr_script import Listener, words
from test_registration import run
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, Seq2SeqTrainingArguments

from mel_llm import create_model_card
from mel_llm.evaluation import AnswerAccuracy, ClipEvaluation, load_clip_set, make_answerer, make_compute_metrics
from mel_llm.evaluation.answer_accuracy import score_answers, wilson_interval
from mel_llm.training import (
    SpecAugment,
    SpeechDataset,
    SpeechSource,
    SpeechTrainer,
    TranscriptionCollator,
    load_source,
)


SCRIPT = str(ROOT / "scripts" / "evaluate_understanding.py")
QUESTION = "Is it long?"


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate_understanding")


def write_table(path, rows: list[dict]) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def sounds(speech_clips, tmp_path_factory):
    """Six recordings in a folder, with one more table of questions about them."""
    place = tmp_path_factory.mktemp("sounds")
    for index, clip in enumerate(speech_clips[:6]):
        soundfile.write(place / f"{index}.wav", clip["array"], 16000)
    seconds = sorted(clip["duration"] for clip in speech_clips[:6])
    rows = [
        {"file_name": f"{i}.wav", "question": QUESTION, "answer": "yes" if clip["duration"] > seconds[2] else "no"}
        for i, clip in enumerate(speech_clips[:6])
    ]
    write_table(place / "questions.csv", rows)
    return place


def evaluate(script, *arguments):
    evaluation, parsed, *more = script.prepare(list(arguments))
    is_complete = script.report(evaluation.run(), evaluation, parsed, *more)
    with open(f"{parsed.output_dir}/results.json", encoding="utf-8") as file:
        return json.load(file), is_complete


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "right", "choices", "match", "is_correct"),
    [
        ("Happy.", "happy", None, "exact", True),
        ("I think she is happy.", "happy", None, "exact", False),
        ("I think she is happy.", "happy", None, "contains", True),
        ("unhappy", "happy", None, "contains", False),
        ("Paris, France", "London|Paris", None, "contains", True),
        ("I think she is happy.", "happy", ["happy", "sad"], "exact", True),
        ("happy or sad", "happy", ["happy", "sad"], "exact", False),
        ("", "happy", ["happy", "sad"], "exact", False),
        ("It is New York!", "new york", ["York", "New York"], "exact", True),
        ("It is New York!", "york", ["York", "New York"], "exact", False),
        ("C++", "C++", ["C", "C++"], "exact", True),
    ],
)
def test_what_is_right(said, right, choices, match, is_correct):
    normalizer = "lower" if "+" in said else "lower_no_punctuation"
    (row,) = score_answers([said], [right], [choices], normalizer, match)
    assert row["correct"] is is_correct


def test_the_metric():
    metric = AnswerAccuracy()
    said = {"predictions": ["Yes!", "no", "perhaps", "no"], "references": ["yes", "no", "no", "yes"]}
    assert metric.compute(**said) == {"accuracy": 0.5}
    details = metric.compute(**said, choices=["yes", "no"], details=True)
    assert [row["chosen"] for row in details["answers"]] == ["yes", "no", None, "no"]
    assert details["low"] < 0.5 < details["high"]
    with pytest.raises(ValueError, match="is none of the choices"):
        metric.compute(**said, choices=["yes"])
    with pytest.raises(ValueError, match="is empty after normalisation"):
        metric.compute(predictions=["a"], references=["..."])
    with pytest.raises(ValueError, match="`match` must be one of"):
        metric.compute(**said, match="roughly")


def test_the_interval():
    """Wilson's, against values of his formula as others print them."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0, 0) is None


# --- data, and training ------------------------------------------------------------------------------------------------


def test_sources_may_ask(sounds, tmp_path):
    data = load_source(SpeechSource(str(sounds / "questions.csv")))
    assert data["instruction"] == [QUESTION] * 6 and set(data["text"]) == {"yes", "no"}
    rows = [{"file_name": str(sounds / "0.wav"), "text": "hello", "question": "Who?", "answer": "she", "mood": "calm"}]
    table = write_table(tmp_path / "both.csv", rows)
    data = load_source(SpeechSource(table))  # transcripts, as ever
    assert (data["text"][0], data["instruction"][0]) == ("hello", None)
    data = load_source(SpeechSource.parse(f"{table},text_column=answer,instruction_column=question"))
    assert (data["text"][0], data["instruction"][0]) == ("she", "Who?")
    data = load_source(SpeechSource.parse(f"{table},text_column=mood,instruction=How does she feel?"))
    assert (data["text"][0], data["instruction"][0]) == ("calm", "How does she feel?")
    with pytest.raises(ValueError, match="no column 'why'"):
        load_source(SpeechSource.parse(f"{table},text_column=answer,instruction_column=why"))
    with pytest.raises(ValueError, match="not both"):
        SpeechSource(table, instruction="Who?", instruction_column="question")


def test_class_labels_have_their_names(sounds, tmp_path):
    import datasets

    features = datasets.Features(
        {"audio": datasets.Value("string"), "label": datasets.ClassLabel(names=["calm", "angry"])}
    )
    rows = {"audio": [str(sounds / "0.wav"), str(sounds / "1.wav")], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "moods")
    data = load_source(SpeechSource(str(tmp_path / "moods"), instruction="How does she feel?"))
    assert data["text"] == ["angry", "calm"]


def test_batches_of_questions_are_chats(tiny, speech_clips):
    _, processor = tiny
    clips = [clip["array"] for clip in speech_clips[:3]]
    examples = [
        {"audio": clips[0], "text": "yes", "instruction": QUESTION, "augment_seed": 3},
        {"audio": clips[1], "text": "what she says", "instruction": None},
        {"audio": clips[2], "text": "no", "instruction": QUESTION},
    ]
    collator = TranscriptionCollator(processor)
    batch = collator(examples)
    row = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "audio", "audio": clips[0]}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": "yes"},
        ],
        output_labels=True,
    )
    length = row["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], row["input_ids"][0])
    assert torch.equal(batch["labels"][0, :length], row["labels"][0])
    # Without a question, the tokens of a batch of transcripts
    plain = TranscriptionCollator(processor)(examples[1:2])
    labels = batch["labels"][1]
    assert torch.equal(labels[labels != -100], plain["labels"][0])
    prefix, suffix = processor.default_prompt_ids()
    ids = batch["input_ids"][1].tolist()
    first = (labels != -100).long().argmax()
    assert ids[: len(prefix)] == prefix and ids[first - len(suffix) : first] == suffix

    later = TranscriptionCollator(processor, features_later=True)
    waiting = later(examples)
    assert (waiting["labels"] != -100).sum() == (batch["labels"] != -100).sum()  # what the Trainer counts
    finished = later.finish(waiting)
    assert finished.keys() == batch.keys()
    assert all(torch.equal(finished[name], batch[name]) for name in batch)
    masked = TranscriptionCollator(processor, spec_augment=SpecAugment())(examples)
    changed = (masked["input_features"] != batch["input_features"]).flatten(1).any(1)
    assert changed.tolist() == [True, False, False]


def test_evaluation_does_not_show_the_answers(tiny, sounds, tmp_path):
    """What the trainer generates is what the model answers to the question alone."""
    model, processor = tiny
    dataset = SpeechDataset(load_source(SpeechSource(str(sounds / "questions.csv"))))
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, predict_with_generate=True, generation_max_length=5,
        remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SpeechTrainer(
        model,
        arguments,
        eval_dataset=dataset,
        data_collator=TranscriptionCollator(processor),
        processing_class=processor,
        compute_metrics=make_compute_metrics(processor),
    )
    output = trainer.predict(dataset)
    answerer = make_answerer_of(model, processor)
    expected = answerer.run([dataset[i]["audio"] for i in range(6)], [QUESTION] * 6)
    ids = [row[row != -100] for row in output.predictions]
    assert [processor.decode(row, skip_special_tokens=True).strip() for row in ids] == expected
    labels = [row[row != -100] for row in output.label_ids]
    assert [processor.decode(row, skip_special_tokens=True) for row in labels] == dataset.data["text"]
    assert output.metrics["test_loss"] > 0 and "test_wer" in output.metrics


def make_answerer_of(model, processor):
    from mel_llm.evaluation import Answerer

    answerer = Answerer.__new__(Answerer)
    answerer.model, answerer.processor, answerer.is_mel_llm = model, processor, True
    answerer.device, answerer.system_prompt, answerer.generate_kwargs = "cpu", None, {"max_new_tokens": 5}
    return answerer


@pytest.mark.slow
def test_a_model_learns_to_answer(script, sounds, speech_clips, tmp_path, monkeypatch):
    """Trained by the script on questions and transcripts of the same recordings, and then asked by the other script."""
    rows = [{"file_name": str(sounds / f"{i}.wav"), "text": clip["text"]} for i, clip in enumerate(speech_clips[:2])]
    transcripts = write_table(tmp_path / "transcripts.csv", rows)
    questions = str(sounds / "questions.csv")
    train = load_script("train")
    argv = ["--train_data", questions, transcripts, "--eval_data", questions, "--output_dir", str(tmp_path / "model")]
    argv += ["--text_config", json.dumps({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96})]
    argv += ["--audio_config", json.dumps({"conv_channels": 8, "hidden_size": 32})]
    argv += "--num_train_epochs 100 --per_device_train_batch_size 8 --learning_rate 3e-3 --use_cpu --seed 1".split()
    argv += "--report_to none --disable_tqdm true --save_strategy no --lr_scheduler_type constant".split()
    train.train(train.prepare(argv))
    summary = json.loads((tmp_path / "model" / "training_summary.json").read_text())
    assert summary["metrics"]["eval_wer"] == 0

    argv = words(tmp_path / "out", "--data", questions, "--model", tmp_path / "model", "--choices", "labels")
    results, is_complete = evaluate(script, *argv)
    (of_set,) = results["models"][0]["sets"]
    totals = of_set["totals"]
    assert is_complete and totals["accuracy"]["value"] == 1 and totals["accuracy"]["low"] < 0.7
    assert totals["majority"] == 0.5 and set(totals["classes"]) == {"yes", "no"} and totals["unweighted"] == 1
    assert totals["confusion"] == {"no": {"no": 3}, "yes": {"yes": 3}} and totals["unmatched"] == 0
    assert of_set["answers"][0]["question"] == QUESTION

    monkeypatch.setattr("mel_llm.evaluation.clip_systems.ModelSystem.load", lambda self: pytest.fail("loaded"))
    assert evaluate(script, *argv)[0]["models"] == results["models"]  # resumed: nothing is asked again
    (scores,) = (tmp_path / "out" / "scores").rglob("*.json")
    card = create_model_card(tmp_path / "model", evaluations=[scores], overwrite=True)
    result = {result.metric_type: result for result in card.data.eval_results}["accuracy"]
    assert result.metric_value == 100 and result.task_type == "audio-text-to-text"


def test_questions_are_not_to_be_spoken(sounds, tmp_path):
    train = load_script("train")
    argv = [
        "--train_data",
        str(sounds / "questions.csv"),
        "--output_dir",
        str(tmp_path),
        "--tasks",
        "asr,tts",
        "--use_cpu",
    ]
    with pytest.raises(ValueError, match="has questions about its clips, which are for reading alone"):
        train.prepare(argv)


# --- the script --------------------------------------------------------------------------------------------------------


def test_another_question_is_asked_anew(sounds, tmp_path):
    clips = load_clip_set(str(sounds / "questions.csv"), text_columns=("answer",))
    assert clips.prompts == [QUESTION] * 6
    first = Listener()
    ClipEvaluation([clips], [first], tmp_path, warmup_steps=0).run()
    clips.prompts[2] = "Is it short?"
    second = Listener()
    ClipEvaluation([clips], [second], tmp_path, warmup_steps=0).run()
    assert len(first.heard) == 6 and second.heard == [round(16000 * clips.utterances[2].seconds)]


def test_functions_and_choices_in_the_data(script, sounds, tmp_path, monkeypatch):
    (tmp_path / "asker.py").write_text(
        "def answer(audio, rate, question):\n"
        "    assert rate == 16000 and question.endswith('Options: alto, bass.')\n"
        "    return 'A deep bass, I think.'\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = [
        {"audio": str(sounds / f"{i}.wav"), "instruction": "Which voice?", "label": label, "choices": "alto|bass"}
        for i, label in enumerate(["bass", "alto", "bass", "bass"])
    ]
    table = write_table(tmp_path / "voices.csv", rows)
    argv = words("out", "--data", table, "--model", "python:asker.answer", "--show_choices")
    results, _ = evaluate(script, *argv)
    totals = results["models"][0]["sets"][0]["totals"]
    assert totals["accuracy"]["value"] == 0.75 == totals["majority"] and totals["exact"] == 0
    assert totals["classes"]["alto"]["value"] == 0 and totals["unweighted"] == 0.5
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| asker.answer | voices.csv | 4 | 75.0 (30.1–95.4) | 50.0 | 75.0 | 0.0 | 0.0 |" in table
    assert "| asker.answer | voices.csv | alto | 1 | 0.0 (0.0–79.3) |" in table


def test_other_models_answer_through_their_templates(tokenizer, speech_clips, tmp_path):
    """A tiny Qwen2-Audio with random weights: the same alone and in a batch."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], special_tokens=True)
    template = (
        "{% for message in messages %}{{ message.role }}: {% for part in message.content %}{% if part.type == 'audio' %}"
        "<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    )
    extractor = transformers.WhisperFeatureExtractor()
    transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=template).save_pretrained(tmp_path)
    transformers.set_seed(0)
    audio = {
        "num_mel_bins": 80,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
    }
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **audio},
        text_config=text,
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    answerer = make_answerer(str(tmp_path), generate_kwargs={"max_new_tokens": 6}, system_prompt="Be brief.")
    answerer.load()
    clips, prompts = [clip["array"] for clip in speech_clips[:2]], ["Who speaks, and how does she feel?", "Who?"]
    together = answerer.run(clips, prompts)
    alone = [answerer.run([clip], [prompt])[0] for clip, prompt in zip(clips, prompts, strict=True)]
    assert together == alone and any(together)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {model}", "give --data"),
        ("--data {questions}", "give --model"),
        ("--model {model} --data {questions} --match roughly", "--match must be one of exact, contains"),
        ("--model {model} --data {questions} --choices maybe", "'yes' is none of the choices maybe"),
        ("--model {model} --data {tmp}/labels.csv", "0 has no question. Give --instruction"),
        ("--model {model} --data {tmp}/unanswered.csv", "1: its answer '' is empty"),
        (
            "--model {model} --data {tmp}/transcripts.csv",
            "none of the columns audio, text is called answer or answers or answer_text or label",
        ),
        ("--model {tmp}/nothing --data {questions}", "nothing"),
    ],
)
def test_what_a_user_can_mend_is_told_before_work(script, sounds, tiny_folder, tmp_path, arguments, message):
    audio = [str(sounds / f"{index}.wav") for index in range(2)]
    write_table(tmp_path / "labels.csv", [{"audio": audio[0], "label": "calm"}])
    write_table(tmp_path / "transcripts.csv", [{"audio": audio[0], "text": "hello"}])
    rows = [{"audio": name, "question": "Who?", "answer": text} for name, text in zip(audio, ("she", ""), strict=True)]
    write_table(tmp_path / "unanswered.csv", rows)
    places = {"model": tiny_folder, "questions": sounds / "questions.csv", "tmp": tmp_path}
    with pytest.raises((ValueError, OSError)) as caught:
        script.prepare(words(tmp_path / "out", *arguments.format(**places).split()))
    assert message in str(caught.value)


def test_the_command(sounds, tiny_folder, tmp_path):
    argv = words("out", "--data", sounds / "questions.csv", "--model", tiny_folder, "--max_new_tokens", "4")
    result = run(SCRIPT, *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "6 clips, 1 question." in result.stderr and "accuracy %" in result.stdout
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    processor = AutoProcessor.from_pretrained(tiny_folder)
    answerer = make_answerer(tiny_folder, generate_kwargs={"max_new_tokens": 4})
    answerer.load()
    clip = load_clip_set(str(sounds / "questions.csv"), text_columns=("answer",)).load(0, 16000)
    content = [{"type": "audio", "audio": clip}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    (raw,) = (tmp_path / "out" / "raw").rglob("MODEL_*.jsonl")
    first = json.loads(raw.read_text(encoding="utf-8").splitlines()[0])
    assert first["pred_text"] == processor.decode(ids[0], skip_special_tokens=True).strip()
