"""Model cards: what they say comes from files, and what the Hub reads in them is valid."""

import json
import re
import shutil
from pathlib import Path

import pytest
import soundfile
import transformers
from conftest import build_tiny
from huggingface_hub import HfApi, ModelCard, RepoUrl, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import get_peft_model
from test_train_script import SCRATCH, script, train, words  # noqa: F401
from test_train_script import folder as recordings  # noqa: F401

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoderConfig, create_model_card
from mel_llm.card_results import local_names, without_local_paths
from mel_llm.model_card import is_generated, metadata_problems
from mel_llm.publishing import without_paths
from mel_llm.training import lora_config


REPORT = {"num_clips": 357, "hours": 0.2283, "left_out": {"shorter than 0.1 s": 3}}
SUMMARY = {
    "length": {"num_train_epochs": 12, "max_steps": -1, "lora": None, "merge_lora": False, "tasks": ["asr"]},
    "setup": {
        "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model_is_local": False,
        "train_data": [
            {"place": "/home/ada/speech/prompts", "split": "train", "is_local": True, "streaming": False},
            {"place": "openslr/librispeech_asr", "split": "train.100", "is_local": False, "streaming": True},
        ],
        "eval_data": [{"place": "/home/ada/speech/prompts", "split": "validation", "is_local": True}],
        "eval_clips_trained_on": 0,
        "wer_normalizer": "whisper",
        "hyperparameters": {"learning_rate": 0.0003, "train_batch_size": 8, "eval_batch_size": 8, "seed": 42},
    },
    "metrics": {"eval_wer": 0.1234, "eval_loss": 1.5, "eval_runtime": 33.0, "train_loss": 2.0},
    "data": {"train": {"/home/ada/speech/prompts": REPORT}, "eval": {"/home/ada/speech/prompts": {"num_clips": 40}}},
    "parameters": {"trained": 1000, "all": 2000},
    "versions": {"torch": "2.11.0"},
}
STATE = {"global_step": 540, "epoch": 12.0, "log_history": [{"step": 10, "loss": 6.0}, {"step": 540, "loss": 3.16}]}
# As scripts/evaluate_tts.py writes them
SPEECH = {
    "environment": {"command": "python scripts/evaluate_tts.py --data /home/ada/speech,split=test", "threads": 1}
    | {"date": "2026-11-21 10:00 UTC", "cpu": "x86", "gpu": None, "versions": {"torch": "2.11.0"}},
    "arguments": {"data": "/home/ada/speech,split=test"},
    "judges": {"asr": "whisper-base"},
    "intervals": "95 %",
    "systems": [
        {"name": "recordings", "settings": {"kind": "reference"}, "num_utterances": 60, "failed": []}
        | {"totals": {"wer": {"value": 0.012, "low": 0.01, "high": 0.02, "utterances": 60}}},
        {"name": "runs/tts", "settings": {"kind": "model"}, "num_utterances": 60, "failed": ["u7"]}
        | {
            "totals": {
                "wer": {"value": 0.25, "low": 0.2, "high": 0.3},
                "rtfx": {"value": 8.4, "low": None, "high": None},
            }
        },
    ],
}


@pytest.fixture
def model_folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "my-mel-llm")


@pytest.fixture(scope="module")
def speaking_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaking") / "my-speaker"
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    speech = MelLLMSpeechConfig(head_hidden_size=16, postnet_layers=1, postnet_channels=8, min_tokens_per_second=50.0)
    vocoder = MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2)
    model, processor = build_tiny(tokenizer, feature_extractor=extractor, speech_config=speech, vocoder_config=vocoder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def read(folder) -> tuple[str, dict]:
    """The text of a card and its metadata, as the Hub's own library reads them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert metadata_problems(text) == []
    card = ModelCard.load(folder / "README.md")
    data = metadata_load(folder / "README.md")
    assert card.data.to_dict() == data
    return text, data


def test_what_is_not_known_is_not_said(model_folder):
    create_model_card(model_folder)
    text, data = read(model_folder)
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "automatic-speech-recognition"
    assert not {"license", "language", "base_model", "datasets", "model-index", "metrics"} & data.keys()
    assert "Not measured" in text and "not recorded" in text and "**not stated**" in text
    assert "WER" not in text and "hours" not in text
    # What the files do tell
    assert "25 a second" in text and "80 bins" in text and "llama: layers 2, width 64" in text
    assert "2606.10231" in text and "2305.15255" in text


def test_the_training_run_is_told_from_its_files(model_folder):
    (model_folder / "training_summary.json").write_text(json.dumps(SUMMARY))
    (model_folder / "trainer_state.json").write_text(json.dumps(STATE))
    create_model_card(
        model_folder,
        repo_id="ada/reader",
        language=["en"],
        license="cc-by-sa-3.0",
        data=[{"name": "prompts", "license": "CC-BY-SA-3.0", "attribution": "Allison Smith"}],
    )
    text, data = read(model_folder)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["openslr/librispeech_asr"] and data["language"] == ["en"]
    assert "| `prompts`, split train | 357 | 0.23 | CC-BY-SA-3.0 |" in text and "streamed, not counted" in text
    assert "540 (12 epochs)" in text and "6.000 (step 10) to 3.160 (step 540)" in text and "1,000 of 2,000" in text
    assert "| learning rate | 0.0003 |" in text and "Allison Smith" in text
    assert "/home/ada" not in text and "33.0" not in text
    assert 'model="ada/reader"' in text
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "reader" and [(r.metric_type, r.metric_value) for r in results] == [("wer", 12.34)]
    assert results[0].dataset_split == "validation" and results[0].dataset_type == "prompts"


@pytest.mark.parametrize("seen", [4, None], ids=["some", "not recorded"])
def test_rates_on_clips_that_were_trained_on_are_no_results(model_folder, seen):
    setup = {**SUMMARY["setup"], "eval_clips_trained_on": seen}
    (model_folder / "training_summary.json").write_text(json.dumps({**SUMMARY, "setup": setup}))
    create_model_card(model_folder)
    text, data = read(model_folder)
    assert "model-index" not in data and "12.34" in text
    create_model_card(model_folder, evaluations=[{"dataset": "/x/prompts", "split": "train", "wer": 0.0}])
    assert "model-index" not in read(model_folder)[1] and "was trained on these clips**" in read(model_folder)[0]
    assert ("was trained on these clips**" in text) == bool(seen) and ("is not recorded" in text) == (seen is None)


def test_two_parts_of_a_dataset_have_a_row_each(model_folder):
    parts = [{"place": "org/speech", "config": name, "split": "train", "is_local": False} for name in ("a", "b")]
    evaluated = [{"place": "prompts", "split": "test", "is_local": True, "asks": True}]
    setup = {**SUMMARY["setup"], "train_data": parts, "eval_data": evaluated}
    reports = {"org/speech": {"num_clips": 7, "hours": 1.5}, "org/speech (2)": {"num_clips": 8, "hours": 2.5}}
    summary = {**SUMMARY, "setup": setup, "data": {"train": reports, "eval": {"prompts": {"num_clips": 40}}}}
    (model_folder / "training_summary.json").write_text(json.dumps(summary))
    create_model_card(model_folder)
    text, data = read(model_folder)
    assert data["datasets"] == ["org/speech"] and "config a, split train | 7 | 1.50" in text
    assert "config b, split train | 8 | 2.50" in text
    # Its error rate is one of answers to questions
    assert "12.34" in text and "answers to questions about the recordings" in text and "model-index" not in data


def test_results_come_with_their_commands_and_bounds(speaking_folder, tmp_path):
    (tmp_path / "speech.json").write_text(json.dumps(SPEECH))
    (tmp_path / "wer.json").write_text(json.dumps({"wer": 0.0712, "cer": 0.02, "rtfx": 30.0, "substitutions": 4}))
    asr = {"file": tmp_path / "wer.json", "dataset": "openslr/librispeech_asr", "config": "clean", "split": "test"}
    create_model_card(
        speaking_folder, evaluations=[tmp_path / "speech.json", {**asr, "command": "python eval.py /tmp/x.json"}]
    )
    text, data = read(speaking_folder)
    assert "python scripts/evaluate_tts.py --data speech,split=test" in text and "python eval.py x.json" in text
    assert "| recordings | 60 | 1.20 (1.00 to 2.00) | – |" in text
    assert "| this model | 60, 1 failed | 25.00 (20.00 to 30.00) | 8.4 |" in text
    _, results = model_index_to_eval_results(data["model-index"])
    found = {(r.task_type, r.metric_type): (r.metric_value, r.dataset_type, r.dataset_split) for r in results}
    assert found == {
        ("text-to-speech", "wer"): (25.0, "speech", "test"),
        ("automatic-speech-recognition", "wer"): (7.12, "openslr/librispeech_asr", "test"),
        ("automatic-speech-recognition", "cer"): (2.0, "openslr/librispeech_asr", "test"),
    }
    assert data["metrics"] == ["wer", "cer"] and "text-to-speech" in data["tags"]


def test_two_local_sets_are_two_datasets(model_folder):
    sets = [
        {"dataset": f"/home/ada/{name}", "split": "test", "wer": wer} for name, wer in (("near", 0.1), ("far", 0.5))
    ]
    create_model_card(model_folder, evaluations=sets)
    (model,) = read(model_folder)[1]["model-index"]
    found = {entry["dataset"]["name"]: [m["value"] for m in entry["metrics"]] for entry in model["results"]}
    assert found == {"near, split test": [10.0], "far, split test": [50.0]}
    _, results = model_index_to_eval_results([model])  # what its readers make of it
    assert {(r.dataset_type, r.metric_value) for r in results} == {("near", 10.0), ("far", 50.0)}

    with pytest.raises(ValueError, match="/a/near and /b/near would both be 'near, split test'"):
        create_model_card(model_folder, evaluations=[{**sets[0], "dataset": f"/{name}/near"} for name in "ab"])


def test_the_snippets_of_a_card_run(speaking_folder, speech_clips, monkeypatch):
    create_model_card(speaking_folder)
    text, _ = read(speaking_folder)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(speaking_folder.parent)
    soundfile.write("speech.wav", speech_clips[0]["array"][:8000], 16000)
    for block in blocks:
        exec(compile(block, "card", "exec"), {})


def test_a_folder_with_code_says_both_ways(speaking_folder, tmp_path):
    folder = shutil.copytree(speaking_folder, tmp_path / "with-code")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "c.C"}}))
    (folder / "training_summary.json").write_text(json.dumps({"length": {"tasks": ["tts"]}}))
    create_model_card(folder, overwrite=True)
    text, data = read(folder)
    assert "trust_remote_code=True" in text and "import mel_llm" in text
    create_model_card(speaking_folder, with_code=True)
    assert "trust_remote_code=True" in read(speaking_folder)[0]
    create_model_card(speaking_folder)
    assert "trust_remote_code" not in read(speaking_folder)[0]
    # Trained to speak alone: it has not learnt to read
    assert data["pipeline_tag"] == "text-to-speech" and "speech-recognition" not in text


def test_adapters_keep_what_peft_says_of_them(tiny, tmp_path):
    model, processor = tiny
    model.name_or_path = model.config._name_or_path = "ada/base"
    adapted = get_peft_model(model, lora_config(model, "small", r=2, lora_alpha=4))
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    theirs = metadata_load(folder / "README.md")
    processor.save_pretrained(folder)
    create_model_card(folder, config=model.config, overwrite=True, tags=["telephone"])
    text, data = read(folder)
    assert data["library_name"] == theirs["library_name"] == "peft"
    assert data["base_model"] == theirs["base_model"] == "ada/base" and data["base_model_relation"] == "adapter"
    assert {"lora", "transformers", "telephone"} <= set(data["tags"]) and "r 2, alpha 4" in text

    adapter = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "/home/ada/base"}))
    create_model_card(folder)  # without the config of its base
    text, data = read(folder)
    assert "base_model" not in data and "not on the Hub" in text and "/home/ada" not in text


def test_a_model_of_several_tasks_is_shown_as_what_it_is_for(speaking_folder):
    tasks = ["asr", "tts", "continuation"]
    card = create_model_card(speaking_folder, tasks=tasks, pipeline_tag="audio-to-audio")
    assert card.data.pipeline_tag == "audio-to-audio"
    assert {"automatic-speech-recognition", "text-to-speech", "audio-to-audio"} <= set(card.data.tags)
    for task in ("automatic-speech-recognition", "text-to-speech", "speech-continuation"):
        assert f'pipeline("{task}"' in card.text
    assert "longer recordings are cut at pauses; of longer prompts the end is heard" in card.text
    alone = create_model_card(speaking_folder, tasks=["tts"]).text
    assert "cut at pauses" not in alone


def test_continuations_and_answers_have_tables_of_their_own(model_folder):
    """As scripts/evaluate_continuation.py writes them: one file, two evaluations."""
    place = "recordings,split=test"
    measured = {name: {"value": value} for name, value in (("text_speech_wer", 0.5), ("nll_per_token", 4.25))}
    answered = {"speech_accuracy": {"value": 0.125, "low": 0.1, "high": 0.15}}
    systems = [
        {"name": "natural continuation", "settings": {"kind": "reference"}, "num_utterances": 7},
        {"name": "runs/my-mel-llm", "settings": {"kind": "continuation"}, "num_utterances": 7, "totals": measured},
    ]
    results = {
        "environment": {"command": f"python scripts/evaluate_continuation.py --data {place}"},
        "arguments": {"data": place, "qa": "/home/ada/questions.json"},
        "tasks": {"continuation": systems, "qa": [{**systems[1], "totals": answered}]},
    }
    card = create_model_card(model_folder, tasks=["continuation", "qa"], evaluations=[results])
    assert "### Continuations: recordings, split test" in card.text and "### Answers: questions.json\n" in card.text
    assert "| this model | 7 | 50.00 | 4.25 |" in card.text and "12.5 (10.0 to 15.0)" in card.text
    assert "| natural continuation | 7 | – | – |" in card.text and "/home/ada" not in card.text
    published = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert published == {
        ("recordings, split test", "text_speech_wer"): 50.0,
        ("questions.json", "speech_accuracy"): 12.5,
    }
    assert {result.task_type for result in card.data.eval_results} == {"audio-to-audio"} == {card.data.pipeline_tag}
    assert "question=True" in card.text
    # What is told of one data set, or of none
    both = {**results, "dataset": "org/speech"}
    for wrong, message in ((both, "cannot be told one `dataset`"), ({**results, "tasks": {}}, "has no numbers")):
        with pytest.raises(ValueError, match=message):
            create_model_card(model_folder, evaluations=[wrong])
    questions = {**results, "arguments": {"qa": "org/questions"}, "tasks": {"qa": results["tasks"]["qa"]}}
    assert "Answers: org/questions, split test" in create_model_card(model_folder, evaluations=[questions]).text
    assert "question=True" not in create_model_card(model_folder, tasks=["continuation"]).text


def test_nobodys_words_are_overwritten(model_folder):
    path = model_folder / "README.md"
    path.write_text("# Mine\n")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        create_model_card(model_folder)
    assert path.read_text() == "# Mine\n"
    create_model_card(model_folder, overwrite=True)
    create_model_card(model_folder, license="mit")  # its own may be written anew
    written = path.read_text()
    assert is_generated(written) and "license: mit" in written
    path.write_text(written.replace("license: mit", "license: apache-2.0"))
    with pytest.raises(FileExistsError):
        create_model_card(model_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"license": "Apache 2.0"}, "license"),
        ({"license": "other"}, "license_name"),
        ({"language": "English"}, "language"),
        ({"base_model": "/home/ada/base"}, "base_model"),
        ({"samples": ["samples/0.wav"]}, "samples/0.wav"),
        ({"samples": ["../secret.wav"]}, "secret"),
        ({"tasks": ["sing"]}, "tasks"),
        (
            {"pipeline_tag": "text-to-speech"},
            "`pipeline_tag` must be one of automatic-speech-recognition, which it does",
        ),
        ({"data": [{"name": "x", "licence": "mit"}]}, "licence"),
        ({"evaluations": [{"wer": 0.1}]}, "measured on"),
        ({"evaluations": [{"dataset": "x", "words": "few"}]}, "no numbers"),
        ({"evaluations": [{**SPEECH, "systems": SPEECH["systems"] * 2}]}, "which of its systems"),
    ],
)
def test_a_wrong_argument_writes_nothing(model_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model_card(model_folder, **arguments)
    assert not (model_folder / "README.md").exists() and not list(model_folder.glob("*.partial"))
    assert not list(model_folder.glob(".partial*"))


def test_folders_that_hold_no_mel_llm_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        create_model_card(tmp_path / "nothing")
    with pytest.raises(ValueError, match="without a model"):
        create_model_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(ValueError, match="whisper"):
        create_model_card(tmp_path)


def test_samples_are_linked(speaking_folder):
    soundfile.write(speaking_folder / "a b.wav", [0.0] * 16, 16000)
    samples = [{"path": "a b.wav", "text": "Hello."}, "https://example.org/x.flac"]
    create_model_card(speaking_folder, samples=samples)
    text, _ = read(speaking_folder)
    assert "* [a b.wav](a%20b.wav): Hello." in text and "[x.flac](https://example.org/x.flac)" in text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("language: no", "text"),  # Norwegian, to whoever wrote it
        ("license: Apache 2.0", "license"),
        ("datasets: [my data]", "datasets"),
        ("base_model: ./base", "base_model"),
        ("tags: [1]", "tags"),
        ("model-index: [{name: x, results: [{task: {type: asr}}]}]", "model_index"),
        ("a: [", "cannot be read"),
        ("- a", "cannot be read"),
    ],
)
def test_metadata_that_the_hub_refuses(metadata, message):
    (problem, *_) = metadata_problems(f"---\n{metadata}\n---\n# Card\n")
    assert message in problem
    assert metadata_problems("# Card\n")
    assert metadata_problems("---\nlicense: mit\nlanguage: [en, fra]\n---\n") == []


def test_paths_of_a_machine_leave_commands_and_addresses_stay():
    command = (
        "python a.py --data=/home/me/speech,split=test ~/runs/x C:\\Users\\me\\y.json runs/z https://x.org/a/b 1/2"
    )
    expected = "python a.py --data=speech,split=test x y.json runs/z https://x.org/a/b 1/2"
    assert without_local_paths(command) == expected


def test_keys_leave_commands():
    command = "train.py --hub_token hf_abcdefghij1 --token=abc --api-key k1 --max_new_tokens 128 --eval_data a"
    assert without_local_paths(command) == (
        "train.py --hub_token ... --token=... --api-key ... --max_new_tokens 128 --eval_data a"
    )
    assert without_local_paths("HF_TOKEN=hf_abcdefghij1 train.py") == "HF_TOKEN=... train.py"


@pytest.mark.parametrize("rate", [-0.1, 12.5])
def test_rates_that_are_none_are_refused(model_folder, rate):
    with pytest.raises(ValueError, match="`wer` is .* a rate is a ratio"):
        create_model_card(model_folder, evaluations=[{"metrics": {"wer": rate}, "dataset": "mine"}])


def test_places_that_end_alike_stay_apart():
    assert local_names(["/a/speech", "/b/speech", "/a/speech", "c.txt"]) == {
        "/a/speech": "speech",
        "/b/speech": "speech-2",
        "c.txt": "c.txt",
    }
    content = {"data": {"/a/speech": 1, "/b/my speech": 2}, "x": ["/b/my speech", "ORG/NAME", "C:\\ada\\z"], "n": None}
    expected = {"data": {"speech": 1, "my speech": 2}, "x": ["my speech", "ORG/NAME", "z"], "n": None}
    assert without_paths(content) == expected


# --- the Trainer ----------------------------------------------------------------------------------------------------


def test_a_finished_run_has_its_card(script, recordings, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    more = [*SCRATCH, "--eval_data", recordings, f"{recordings},split=train", "--max_steps", "3"]
    train(script, *words(recordings, output, *more))
    text, data = read(output)
    assert data["pipeline_tag"] == "automatic-speech-recognition" and "trained from scratch" in text
    assert "| `speech`, split train | 12 |" in text and str(tmp_path) not in text
    assert "model-index" not in data and "was trained on these clips**" in text  # twelve of the sixteen
    assert is_generated(text) and "| train batch size | 4 |" in text
    summary = (output / "training_summary.json").read_text()  # it goes to the Hub too
    assert str(tmp_path) not in summary and recordings not in summary
    assert json.loads(summary)["data"]["train"]["speech"]["num_clips"] == 12

    output = tmp_path / "unseen"
    more = [*SCRATCH, "--eval_data", recordings, "--max_steps", "3", "--speed_factors", "0.9", "1.1"]
    train(script, *words(recordings, output, *more))
    text, data = read(output)
    assert "was trained on these clips" not in text and "| speed factors | [0.9, 1.1] |" in text
    _, results = model_index_to_eval_results(data["model-index"])
    assert {result.metric_type for result in results} == {"wer", "cer"}
    assert {result.dataset_split for result in results} == {"validation"}


def test_a_run_with_adapters_leaves_a_card_that_is_there(script, recordings, model_folder, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    output.mkdir()
    (output / "README.md").write_text("# Mine\n")
    more = ["--model_name_or_path", str(model_folder), "--lora", "small", "--max_steps", "2"]
    run = train(script, *words(recordings, output, *more))
    assert (output / "README.md").read_text() == "# Mine\n"
    assert not (output / "checkpoint-2" / "README.md").exists()  # PEFT's, with the path of the base model

    (output / "README.md").unlink()
    run.trainer.create_model_card(license="mit", language="en")
    text, data = read(output)
    assert data["library_name"] == "peft" and data["license"] == "mit" and str(tmp_path) not in text


def test_push_to_hub_brings_the_card(script, recordings, tmp_path, monkeypatch):  # noqa: F811
    uploads = []

    def upload_folder(*args, folder_path, **kwargs):
        uploads.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    def create_repo(*args, **kwargs):
        return RepoUrl("https://huggingface.co/ada/reader")

    for owner in (HfApi, transformers.trainer):  # where the functions are depends on the version
        for function in (upload_folder, create_repo):
            if hasattr(owner, function.__name__):
                monkeypatch.setattr(owner, function.__name__, staticmethod(function) if owner is HfApi else function)
    more = [*SCRATCH, "--max_steps", "2", "--hub_model_id", "ada/reader", "--save_strategy", "no"]
    run = train(script, *words(recordings, tmp_path / "run", *more))
    assert uploads == []
    run.trainer.push_to_hub()
    (files,) = uploads
    assert {"README.md", "model.safetensors", "training_summary.json", "processor_config.json"} <= files.keys()
    assert b'model="ada/reader"' in files["README.md"] and "training_args.bin" not in files
    assert not (tmp_path / "run" / ".saving").exists()
