"""scripts/evaluate_continuation.py and what it measures with: perplexity, answers, speech against its text."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, load_script, tiny_text_config
from test_continuation_data import model_and_processor  # noqa: F401  a fixture
from test_registration import run
from transformers import AutoModelForCausalLM

from mel_llm.evaluation import (
    LogPerplexity,
    QuestionAnsweringAccuracy,
    load_prompts,
    load_questions,
    summarize_continuations,
)
from mel_llm.evaluation.continuation_evaluation import split_written
from mel_llm.evaluation.question_answering import SpokenQuestion
from mel_llm.training import PromptCut


SCRIPT = str(ROOT / "scripts" / "evaluate_continuation.py")

JUDGE = """
import numpy as np

def listen(audio, rate):
    assert rate == 16000 and audio.dtype == np.float32
    return "please try again"

def embed(audio, rate):
    return np.abs(np.fft.rfft(audio, 512))[:64]
"""


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate_continuation")


@pytest.fixture(scope="module")
def model_folder(model_and_processor, tmp_path_factory):  # noqa: F811
    place = tmp_path_factory.mktemp("continuing") / "model"
    for part in model_and_processor:
        part.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def lm_folder(tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture
def recordings(speech_clips, tmp_path):
    """Three that are long enough and one that is not."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    chosen = [*sorted(speech_clips, key=lambda clip: -clip["duration"])[:3], speech_clips[7]]
    for number, clip in enumerate(chosen):
        soundfile.write(folder / f"r{number}.wav", clip["array"], 16000)
    return str(folder)


@pytest.fixture
def questions(speech_clips, tmp_path):
    for number in (1, 2):
        soundfile.write(tmp_path / f"q{number}.wav", speech_clips[number]["array"][: 8000 * number], 16000)
    rows = [
        {"id": "one", "question": "what to do", "answers": ["stop", "try again"], "audio": "q1.wav"},
        {"id": "two", "answer": "42", "audio": "q2.wav"},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    return str(tmp_path / "questions.json")


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_log_perplexity_is_that_of_the_model(lm_folder, tokenizer):
    metric = LogPerplexity(model=lm_folder, device="cpu", batch_size=2)
    texts = ["please try again", "no", "", "the conference is now being recorded"]
    result = metric.compute(predictions=texts, details=True)
    total = count = 0
    for text, row in zip(texts, result["utterances"], strict=True):
        if not text:
            assert row == {"nll": 0.0, "tokens": 0}
            continue
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        mean = metric.model(input_ids=ids, labels=ids).loss.item()
        assert row["tokens"] == ids.shape[1] - 1 and row["nll"] == pytest.approx(mean * row["tokens"], rel=1e-4)
        total, count = total + row["nll"], count + row["tokens"]
    assert result["nll_per_token"] == pytest.approx(total / count)
    assert result["nll_per_utterance"] == pytest.approx(total / 4)
    for text in texts:
        metric.add(prediction=text)
    assert metric.compute() == {key: result[key] for key in ("nll_per_token", "nll_per_utterance")}
    with pytest.raises(TypeError, match=r"predictions\[1\]"):
        metric.compute(predictions=["a", 3])


def test_texts_longer_than_the_context(lm_folder):
    """Each token once, with as much before it as fits."""
    metric = LogPerplexity(model=lm_folder, device="cpu")
    text = "please try again later " * 8
    (whole, count), = metric.score([text])  # fmt: skip
    metric.model.config.max_position_embeddings = 16
    (windowed, same), = metric.score([text])  # fmt: skip
    assert same == count > 16 and windowed != whole and windowed == pytest.approx(whole, rel=0.2)
    # The first window is as it was
    short = metric.tokenizer.decode(metric.tokenizer(text, add_special_tokens=False)["input_ids"][:15])
    (value, tokens), = metric.score([short])  # fmt: skip
    assert tokens <= 16 and value < windowed


def test_answers():
    accuracy = QuestionAnsweringAccuracy()
    result = accuracy.compute(
        predictions=["It was Neil Armstrong.", "the Moon", "forty two", "Parisian", ""],
        references=[["Buzz Aldrin", "Neil Armstrong"], ["moon"], "42", ["Paris"], ["x"]],
        details=True,
    )
    assert [row["correct"] for row in result["utterances"]] == [True, True, True, False, False]
    assert [row["exact"] for row in result["utterances"]] == [False, True, True, False, False]
    assert result["accuracy"] == 0.6 and result["exact_match"] == 0.4
    with pytest.raises(TypeError, match=r"references\[0\]"):
        accuracy.compute(predictions=["a"], references=[3])


def test_where_the_prompt_ends_in_a_text():
    text = "good morning please leave a message after the tone"
    assert split_written(text, "good morning please", "leave a message after the tone") == 3
    assert split_written(text, "god morning", "please leave message after tone") == 2
    assert split_written(text, text, "") == 9 and split_written(text, "", text) == 0
    assert split_written("", "a", "b") == 0


# --- what is asked --------------------------------------------------------------------------------------------------------


def test_questions_in_their_formats(questions, speech_clips, tmp_path):
    one, two = load_questions(questions)
    assert (one.id, one.text, one.answers) == ("one", "what to do", ["stop", "try again"]) and two.answers == ["42"]
    assert len(one.load_prompt(16000)) == 8000 and one.recording_key != two.recording_key
    # WebQuestions as it is published, spoken by somebody
    web = tmp_path / "web.json"
    web.write_text(json.dumps([{"utterance": "who", "targetValue": '(list (description "A B") (description C))'}] * 2))
    folder = tmp_path / "spoken"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="--qa_audio FOLDER"):
        load_questions(str(web))
    with pytest.raises(FileNotFoundError, match="question 1 is spoken in no file"):
        load_questions(str(web), str(folder))
    for number in (1, 2):
        soundfile.write(folder / f"{number}.wav", speech_clips[0]["array"], 16000)
    assert [(q.id, q.answers) for q in load_questions(str(web), str(folder))] == [
        ("0001", ["A B", "C"]),
        ("0002", ["A B", "C"]),
    ]
    # Numbers are not taken for ids, nor ids for numbers
    for name in ("0", "3"):
        soundfile.write(folder / f"{name}.wav", speech_clips[0]["array"], 16000)
    named = [{"id": number, "question": "who", "answer": 0} for number in (0, 3, 1)]
    (tmp_path / "named.json").write_text(json.dumps(named))
    found = load_questions(str(tmp_path / "named.json"), str(folder))
    assert [(q.id, q.audio.rpartition("/")[2], q.answers) for q in found] == [
        ("0", "0.wav", ["0"]),
        ("3", "3.wav", ["0"]),
        ("1", "1.wav", ["0"]),
    ]
    (tmp_path / "named.json").write_text(json.dumps([*named, {"id": 9, "question": "who", "answer": "me"}]))
    soundfile.write(folder / "4.wav", speech_clips[0]["array"], 16000)
    with pytest.raises(FileNotFoundError, match="question 9 is spoken in no file"):
        load_questions(str(tmp_path / "named.json"), str(folder))
    # A dataset as the Hub has them
    from datasets import Audio, Dataset

    rows = {
        "question": ["who"],
        "answer": ["me"],
        "audio": [{"array": speech_clips[0]["array"], "sampling_rate": 16000}],
    }
    Dataset.from_dict(rows).save_to_disk(tmp_path / "dataset")
    assert Audio  # the column is decoded by nobody but us
    (question,) = load_questions(str(tmp_path / "dataset"))
    assert question.answers == ["me"] and question.text == "who" and len(question.load_prompt(16000)) > 16000
    (tmp_path / "none.json").write_text(json.dumps([{"audio": "q1.wav", "answers": []}]))
    with pytest.raises(ValueError, match="has no answer"):
        load_questions(str(tmp_path / "none.json"))


def test_prompts_are_the_beginnings(recordings):
    prompts, short = load_prompts(recordings, PromptCut((2.0,)))
    assert len(prompts) == 3 and short == 1
    whole, _ = soundfile.read(f"{recordings}/{prompts[0].id}.wav", dtype="float32")
    parts = prompts[0].load_prompt(16000), prompts[0].load(16000)
    assert len(parts[0]) == 32000 and np.array_equal(np.concatenate(parts), whole)
    other, _ = load_prompts(recordings, PromptCut((1.0,)))
    assert other[0].recording_key != prompts[0].recording_key
    with pytest.raises(ValueError, match="no recording has room"):
        load_prompts(recordings, PromptCut((60.0,)))


def test_the_words_of_a_question_are_no_answer():
    items = [SpokenQuestion(name, "is it red or blue", ["red"]) for name in "abcdef"]
    apart = [{"text": f"Is it red or blue? {said}", "transcript": "", "continuation": said} for said in ("", "Red.")]
    texts = ("Is it red or blue?", "Is it red or blue? Red.", "It is red.", "")
    written = [*apart, *({"text": text, "transcript": None, "continuation": None} for text in texts)]
    rows = [
        {"id": item.id, "written": text, "scores": {"asr": {"transcript": "a red one"}}}
        for item, text in zip(items, written, strict=True)
    ]
    summary = summarize_continuations({"settings": {}, "utterances": rows}, items)
    assert [row["text_correct"] for row in summary["utterances"]] == [False, True, False, True, True, False]
    assert summary["totals"]["speech_accuracy"]["value"] == 1.0


def test_totals_are_of_what_was_said(recordings):
    """From records as an evaluation leaves them."""
    prompts, _ = load_prompts(recordings, PromptCut((2.0,)))
    audio = {"seconds": 2.0, "wall_seconds": 1.0, "threads": 1, "stopped": True}
    said = ["leave a message", "leave message", ""]
    rows = [
        {
            "id": item.id, "text": "", "audio": audio, "reference_seconds": 4.0,
            "written": {"text": "Good morning. Leave a message.", "continuation": None},
            "scores": {"asr": {"transcript": text}, "prompt": {"prompt_transcript": "good morning"}},
        }
        for item, text in zip(prompts, said, strict=True)
    ]  # fmt: skip
    rows[2]["written"] = {"text": "Good morning. Hello.", "continuation": "Hello."}
    result = {"name": "m", "settings": {}, "utterances": rows}
    totals = summarize_continuations(result, prompts, perplexity=lambda texts: [(10.0 * len(texts), 4)] * len(texts))[
        "totals"
    ]
    # 0 of 3, 1 of 3 and 1 of 1 words
    assert totals["text_speech_wer"]["value"] == pytest.approx(2 / 7)
    assert totals["wordless"]["value"] == pytest.approx(1 / 3)
    assert totals["nll_per_utterance"] == {"value": 20.0, "low": 20.0, "high": 20.0, "utterances": 2}
    assert totals["nll_per_token"]["value"] == 5.0 and totals["duration_ratio"]["value"] == 0.5
    assert totals["rtfx"]["value"] == 2.0 and totals["guarded"]["value"] == 0.0


# --- the script -----------------------------------------------------------------------------------------------------------


def test_a_command_and_the_same_again(
    script, recordings, questions, model_folder, lm_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    words = f"--data {recordings} --qa {questions} --model {model_folder} --text written skipped --reference --asr python:judge.listen "
    words += (
        f"--lm {lm_folder} --speaker-encoder python:judge.embed --max_seconds 0.2 --prompt_seconds 2 --device cpu "
    )
    words += "--bootstrap_samples 50 --output_dir out"
    assert script.report(*script.prepare(words.split()))
    printed = capsys.readouterr().out
    assert "natural continuation" in printed and "without text" in printed and "speaker similarity" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    natural, with_text, without = results["tasks"]["continuation"]
    assert natural["totals"]["similarity"]["utterances"] == 3 and "text_speech_wer" not in natural["totals"]
    assert with_text["totals"].keys() >= {
        "nll_per_token",
        "nll_per_utterance",
        "similarity",
        "wordless",
        "guarded",
        "rtfx",
    }
    assert "text_speech_wer" not in without["totals"] and "written" not in without["utterances"][0]
    row = with_text["utterances"][0]
    assert isinstance(row["written"]["text"], str) and row["prompt_transcript"] == "please try again"
    assert row["audio"]["seconds"] <= 0.25 and row["duration_ratio" if "duration_ratio" in row else "audio"]
    # What is heard is right for one question; who cannot write cannot be right in text
    with_text, without = results["tasks"]["qa"]
    assert with_text["totals"]["speech_accuracy"]["value"] == 0.5 and "text_accuracy" in with_text["totals"]
    assert "text_accuracy" not in without["totals"] and [row["speech_correct"] for row in without["utterances"]] == [
        True,
        False,
    ]
    assert results["environment"]["threads"] >= 1 and results["judges"]["lm"].startswith(lm_folder)
    assert "## Answers" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")

    # Again, nothing is made or scored
    sounds = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.wav")}
    assert len(sounds) == 6 + 4
    evaluations, perplexity, arguments = script.prepare(words.split())

    def nobody(*args, **kwargs):
        raise AssertionError("this was done already")

    for evaluation in evaluations.values():
        for system in evaluation.systems:
            if system.synthesises:
                system.make = nobody
        for judge in evaluation.judges:
            judge.score = nobody
    perplexity.metric.score = nobody
    assert script.report(evaluations, perplexity, arguments) and capsys.readouterr().out == printed
    assert sounds == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.wav")}


def test_the_command(recordings, model_folder, tmp_path):
    """Without judges; a prompt that is silent gives no speech, which is told."""
    soundfile.write(f"{recordings}/r9.wav", np.zeros(64000), 16000)
    words = f"--data {recordings} --model {model_folder} --max_seconds 0.2 --output_dir out --device cpu --limit 4"
    result = run(SCRIPT, *words.split(), cwd=tmp_path)
    assert "4 prompts of 3 s; 1 recordings are too short" in result.stderr
    assert result.returncode == 1 and "1 failed: r9" in result.stderr, result.stderr
    assert "4, 1 failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to go on with"),
        ("--data x", "nothing to evaluate"),
        ("--data x --model m --lm gpt", "--lm needs --asr"),
        ("--qa x --reference", "--reference and --audio are for --data"),
        ("--data x --model m --prompt_seconds 0", "prompt_seconds must be"),
        ("--data x --model m --qa_audio f", "--qa_audio is for --qa"),
        ("--data x --model m --text spoken", "--text must be written, skipped or both"),
        ("--data x --model m --max_seconds -1", "--max_seconds must be more than 0"),
    ],
)
def test_arguments_that_do_not_fit(script, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.prepare([*arguments.split(), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- the ablation ---------------------------------------------------------------------------------------------------------


def test_the_miniature_study_is_understood_and_told(script, tmp_path, monkeypatch, capsys):
    """Every argument of it is one of the scripts'; the page has a line for each variant, and one for the reference."""
    from transformers import HfArgumentParser

    from mel_llm.training.arguments import DataArguments, ModelArguments, SpeechTrainingArguments

    folder = ROOT / "scripts" / "ablations"
    study = load_script("ablations/spectron_ablation")
    calls = []
    total = {"value": 0.5, "low": 0.4, "high": 0.6, "utterances": 2}

    def call(name, arguments, log):
        output = tmp_path / arguments["output_dir"]
        calls.append((name, arguments))
        output.mkdir(parents=True, exist_ok=True)
        if name == "train.py":
            parser = HfArgumentParser((ModelArguments, DataArguments, SpeechTrainingArguments))
            *_, rest = parser.parse_args_into_dataclasses(
                [*study.words(arguments), "--use_cpu"], return_remaining_strings=True
            )
            assert not rest
            metrics = {"eval_continuation_text": 2.5, "eval_continuation_mean_error": 0.7}
            if arguments.get("text_loss_weight") == 0:
                metrics["eval_continuation_text"] = 0.0
            summary = {
                "metrics": metrics,
                "parameters": {"all": 1234567},
                "data": {"train": {"speech": {"continuation": {"num_clips": 9, "hours": 0.5}}}},
            }
            (output / "training_summary.json").write_text(json.dumps(summary))
            return
        names = {"output_dir", "data", "model", "text", "asr", "reference", *arguments}
        assert names <= {field for field in script.EvaluationArguments.__dataclass_fields__}
        natural = {"name": "natural continuation", "settings": {"kind": "reference"}, "totals": {"similarity": total}}
        systems = [natural] if arguments.get("reference") else []
        for kind in arguments["text"]:
            settings = {"kind": "continuation", "skip_text": kind == "skipped"}
            systems.append({"name": arguments["model"], "settings": settings, "totals": {"similarity": total}})
        systems = [{**system, "num_utterances": 2, "failed": []} for system in systems]
        (output / "results.json").write_text(
            json.dumps({"tasks": {"continuation": systems}, "judges": {"asr": "ours"}})
        )

    monkeypatch.setattr(study, "call", call)
    words = ["--train_data", "speech", "--eval_data", "speech", "--output_dir", str(tmp_path / "out"), "--reference"]
    study.main([str(folder / "spectron_miniature.yaml"), *words, "--asr", "python:judge.listen"])
    page = (tmp_path / "out" / "results.md").read_text()
    assert [name for name, _ in calls] == ["train.py", "evaluate_continuation.py"] * 5
    lines = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert lines.count("natural continuation") == 1 and lines.count("as described, text skipped") == 1
    assert (
        lines.count("no text loss") == lines.count("no encoder") == 2
        and "no intermediate text, text skipped" not in lines
    )
    assert "1,234,567 | – | 0.700" in page and "9 clips, 0.50 hours" in page and page in capsys.readouterr().out
    (tmp_path / "bad.yaml").write_text("variants: {a: {trian: {}}}")
    with pytest.raises(ValueError, match="has no trian"):
        study.main([str(tmp_path / "bad.yaml"), *words])
