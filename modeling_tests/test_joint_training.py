"""Reading and speaking in one run: batches of one task, both losses, one checkpoint for both classes."""

import csv
import json
import logging
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tiny, load_script
from test_train_script import SCRATCH, folder, losses, script, train, words  # noqa: F401  (fixtures among them)
from transformers import (
    AutoModelForPreTraining,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from mel_llm import (
    MelLLMFeatureExtractor,
    MelLLMForTextToSpeech,
    MelLLMSpeechConfig,
    MelLLMVocoder,
    MelLLMVocoderConfig,
)
from mel_llm.training import (
    SpeechDataset,
    SpeechSampler,
    SpeechSource,
    SynthesisCollator,
    TaskCollator,
    TranscriptionCollator,
    load_source,
)


SPEECH = ["--speech_config", json.dumps({"head_hidden_size": 32, "postnet_channels": 16, "history_dropout": 0.1})]
BOTH = ["--tasks", "asr,tts", *SCRATCH, *SPEECH]


def log_history(output) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


# --- order and batches ------------------------------------------------------------------------------------------------


def test_a_batch_is_of_one_kind_and_no_clip_is_left_out():
    lengths = np.random.default_rng(0).uniform(1, 20, 33)
    for by_length in (True, False):
        sampler = SpeechSampler(
            lengths, sizes=[10, 10, 13], batch_size=4, kinds=["asr", "tts", "asr"], by_length=by_length
        )
        kind_of = np.array([0] * 10 + [1] * 10 + [0] * 13)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            order = [index for _, index in sampler]
            assert len(order) == len(sampler) == 24 + 12 and set(order) == set(range(33))
            assert all(len(set(kind_of[batch])) == 1 for batch in np.array(order).reshape(-1, 4))
            assert order == [index for _, index in sampler]
    with pytest.raises(ValueError, match="need a `batch_size`"):
        SpeechSampler(lengths, kinds=["asr"])


def test_tasks_have_their_shares():
    sampler = SpeechSampler([1.0] * 400, sizes=[200, 200], weights=[3, 1], batch_size=4, kinds=["asr", "tts"])
    order = [index for _, index in sampler]
    assert len(order) == 400 and sum(index < 200 for index in order) == 300


def test_texts_and_spectrograms(speaking_tiny, speech_clips):
    model, processor = speaking_tiny
    examples = [{"audio": clip["array"], "text": clip["text"]} for clip in speech_clips[:3]]
    batch = SynthesisCollator(processor)(examples)
    lengths = [len(example["audio"]) // 160 for example in examples]
    assert batch["labels"].shape == (3, max(lengths), 80)
    assert ((batch["labels"] != -100).all(-1).sum(-1)).tolist() == lengths
    spoken = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert spoken == [example["text"] for example in examples]
    assert torch.isfinite(model(**batch).loss)
    strange = SynthesisCollator(processor)([examples[0], {**examples[1], "text": "\0 ..."}])
    assert torch.isfinite(model(**strange).loss)
    request = processor.apply_speech_request([example["text"] for example in examples])
    assert torch.equal(request["input_ids"], batch["input_ids"])

    spelt = SynthesisCollator(processor, spell=True)(examples)["transcript_bytes"]
    assert [bytes(row[row != -100].tolist()).decode() for row in spelt] == [
        " ".join(re.sub("[^a-z' ]", "", example["text"].lower()).split()) for example in examples
    ]

    tasks = TaskCollator({"asr": TranscriptionCollator(processor), "tts": SynthesisCollator(processor)})
    as_tasks = [{**example, "task": "tts"} for example in examples]
    assert torch.equal(tasks(as_tasks)["labels"], batch["labels"])
    with pytest.raises(ValueError, match=r"one task, got \['asr', 'tts'\]"):
        tasks([{**examples[0], "task": "asr"}, as_tasks[1]])


def test_a_run_learns_to_spell_what_it_will_say_and_to_go_on_from_what_it_said(script, folder, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    forward = MelLLMForTextToSpeech.forward
    monkeypatch.setattr(
        MelLLMForTextToSpeech,
        "forward",
        lambda self, *args, **kwargs: (
            seen.append((self.training, self.history_sampling)) or forward(self, *args, **kwargs)
        ),
    )
    speech = ["--speech_config", json.dumps({"history_dropout": 0.1, "ctc_weight": 0.5, "ctc_rate": 4})]
    arguments = [
        "--tasks",
        "tts",
        *SCRATCH,
        *speech,
        "--history_sampling",
        "0.25",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    output = train(script, *words(folder, tmp_path / "run", *arguments))
    assert (True, 0.25) in seen and (True, 0.0) not in seen
    assert all(entry["tts_ctc"] > 0 for entry in log_history(tmp_path / "run") if "tts_ctc" in entry)
    assert any("tts_ctc" in entry for entry in log_history(tmp_path / "run")), output


def test_texts_that_have_no_room_to_be_spelt_are_counted(script, folder, tmp_path, caplog):  # noqa: F811
    for rate, told in ((1, True), (8, False)):
        caplog.clear()
        speech = ["--speech_config", json.dumps({"ctc_weight": 0.5, "ctc_rate": rate})]
        slow = ["--audio_config", json.dumps({"reduction_factor": 16, "conv_channels": 8, "hidden_size": 32})]
        script.prepare(
            words(folder, tmp_path / str(rate), "--tasks", "tts", *SCRATCH, *slow, *speech, "--max_steps", "1")
        )
        assert ("Raise `ctc_rate` in --speech_config" in caplog.text) == told


def test_a_clip_follows_another_of_the_same_speaker(folder, speech_clips):  # noqa: F811
    path = Path(folder) / "train" / "metadata.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file_name", "text", "speaker"])
        writer.writeheader()
        writer.writerows({**row, "speaker": "ab"[i % 2] if i else ""} for i, row in enumerate(rows))
    data = load_source(SpeechSource(folder))
    assert data["speaker"][:2] == [None, f"{folder}: b"]
    paired = SpeechDataset(data, voice_pairs=1.0, max_seconds=60.0)
    alone = SpeechDataset(data)
    texts = data["text"][:]
    for index in range(len(data)):
        example, plain = paired[0, index], alone[0, index]
        if index == 0:  # of nobody
            assert example["text"] == plain["text"]
            continue
        before = example["text"].removesuffix(f" {plain['text']}")
        assert before in [text for i, text in enumerate(texts) if i and i % 2 == index % 2 and i != index]
        assert np.array_equal(example["audio"][-len(plain["audio"]) :], plain["audio"])
        other = alone[0, texts.index(before)]["audio"]
        assert np.array_equal(example["audio"][: len(other)], other) and len(example["audio"]) == len(other) + len(
            plain["audio"]
        )
        assert paired[index]["text"] == plain["text"]  # not in evaluation
    short = SpeechDataset(data, voice_pairs=1.0, max_seconds=1.0)
    assert [short[0, i]["text"] for i in range(len(data))] == texts
    half = SpeechDataset(data, voice_pairs=0.5, max_seconds=60.0)
    own = [len(alone[i]["audio"]) / 16000 for i in range(len(data))]
    for epoch in range(2):
        longer = half.epoch_lengths(own, epoch)
        assert longer == pytest.approx([len(half[epoch, i]["audio"]) / 16000 for i in range(len(data))])
        sampler = SpeechSampler(own, batch_size=4, epoch_lengths=half.epoch_lengths)
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        if epoch == 0:
            assert max(longer[index] for index in order[:4]) == max(longer)
    assert 0 < sum(half[epoch, 1]["text"] != texts[1] for epoch in range(20)) < 20
    with pytest.raises(ValueError, match="no speaker has two clips"):
        SpeechDataset(load_source(SpeechSource(folder), "validation"), voice_pairs=0.5)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_one_run_teaches_both_and_one_checkpoint_loads_as_either(script, folder, speech_clips, tmp_path, caplog):  # noqa: F811
    output = tmp_path / "both"
    evaluation = ["--eval_data", folder, "--eval_strategy", "epoch"]
    train(script, *words(folder, output, *BOTH, *evaluation, "--num_train_epochs", "10", "--spec_augment"))
    history = log_history(output)
    for name in ("asr_loss", "tts_loss"):
        curve = [entry[name] for entry in history if name in entry]
        assert len(curve) == 30 and np.mean(curve[-5:]) < 0.9 * np.mean(curve[:5])
    assert {"tts_before", "tts_after", "tts_kl", "tts_stop", "tts_mean_error"} <= set().union(*history)
    evaluations = [entry for entry in history if "eval_tts_loss" in entry]
    assert len(evaluations) >= 10 and evaluations[-1]["eval_tts_loss"] < evaluations[0]["eval_tts_loss"]
    assert "eval_tts_stop" in evaluations[0] and any("eval_asr_wer" in entry for entry in history)

    caplog.clear()
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        reader = AutoModelForSpeechSeq2Seq.from_pretrained(str(output))
        speaker = AutoModelForTextToWaveform.from_pretrained(str(output))
    transformers_logging.disable_propagation()
    assert not caplog.records, caplog.text
    processor = AutoProcessor.from_pretrained(str(output))
    inputs = processor(audio=speech_clips[0]["array"])
    read = [model.generate(**inputs, max_new_tokens=8) for model in (reader, speaker)]
    assert torch.equal(*read)
    recogniser = pipeline("automatic-speech-recognition", model=str(output))
    assert isinstance(recogniser(speech_clips[0]["array"], generate_kwargs={"max_new_tokens": 8})["text"], str)
    said = pipeline("text-to-speech", model=str(output))("Hello.", forward_params={"max_seconds": 0.3})
    assert said["sampling_rate"] == 16000 and np.isfinite(said["audio"]).all()


def test_weights_of_tasks_and_of_sources(script, folder, tmp_path):  # noqa: F811
    def shares(*more):
        run = script.prepare(words(folder, tmp_path / "run", *BOTH, *more))
        data = run.trainer.train_dataset.data
        tasks = [data[index]["task"] for _, index in run.trainer.train_sampler]
        return {task: tasks.count(task) for task in set(tasks)}

    assert shares() == {"asr": 12, "tts": 12}
    assert shares("--task_weights", "3", "1", "--per_device_train_batch_size", "2") == {"asr": 18, "tts": 6}
    # The folder twice, once for reading alone
    assert shares("--train_data", folder, f"{folder},task=asr") == {"asr": 24, "tts": 12}
    weighted = ("--train_data", f"{folder},weight=1", f"{folder},task=asr,weight=2", "--task_weights", "1", "2")
    assert shares(*weighted) == {"asr": 12, "tts": 24}


def test_speech_alone_on_the_device(script, folder, tmp_path):  # noqa: F811
    curves = []
    for name, more in (("workers", []), ("device", ["--features_on_device"])):
        arguments = ["--tasks", "tts", *SCRATCH, *SPEECH, "--max_steps", "3", "--eval_data", folder, *more]
        run = train(script, *words(folder, tmp_path / name, *arguments))
        assert isinstance(run.trainer.model, MelLLMForTextToSpeech)
        curves.append(list(losses(tmp_path / name).values()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert "eval_tts_loss" in json.loads((tmp_path / "device" / "training_summary.json").read_text())["metrics"]


def test_a_reader_learns_to_speak_and_a_speaker_that_reads_on_keeps_its_voice(script, folder, tiny_folder, tmp_path):  # noqa: F811
    speaker = tmp_path / "speaker"
    arguments = ["--model_name_or_path", tiny_folder, "--tasks", "tts", *SPEECH, "--max_steps", "2"]
    train(script, *words(folder, speaker, *arguments))
    model = AutoModelForTextToWaveform.from_pretrained(str(speaker))
    before = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    assert torch.equal(
        model.model.audio_embedder.normalizer.global_mean, before.model.audio_embedder.normalizer.global_mean
    )

    reader = tmp_path / "reader"
    train(script, *words(folder, reader, "--model_name_or_path", str(speaker), "--max_steps", "2"))
    again = AutoModelForTextToWaveform.from_pretrained(str(reader))
    for name, value in model.speech_head.state_dict().items():
        assert torch.equal(again.speech_head.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"--speech_config is for new speech heads"):
        script.prepare(words(folder, tmp_path / "x", "--model_name_or_path", str(speaker), "--tasks", "tts", *SPEECH))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_log_and_the_warm_up_do_not_depend_on_accumulation(script, folder, tmp_path, accumulation):  # noqa: F811
    audio = json.dumps({**json.loads(SCRATCH[3]), "ctc_weight": 0.5, "ctc_rate": 4})
    size = [
        "--per_device_train_batch_size",
        str(8 // accumulation),
        "--gradient_accumulation_steps",
        str(accumulation),
    ]
    more = [*size, "--learning_rate", "1e-9", "--audio_config", audio, *SCRATCH[:2], "--max_steps", "1"]
    train(script, *words(folder, tmp_path / "asr", *more, "--group_by_length", "false"))
    entry = log_history(tmp_path / "asr")[0]
    assert entry["loss"] == pytest.approx(entry["asr_text"] + 0.5 * entry["asr_ctc"], rel=1e-3)
    run = train(
        script, *words(folder, tmp_path / "tts", *size, "--tasks", "tts", *SCRATCH, *SPEECH, "--max_steps", "3")
    )
    assert run.trainer.model.speech_head.num_updates == 3


def test_a_vocoder_is_put_in_later(script, folder, tmp_path):  # noqa: F811
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1}
    config = MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="istft", vocoder_kwargs=sizes)
    MelLLMVocoder(config).save_pretrained(tmp_path / "vocoder")
    for name, more in (("whole", []), ("lora", ["--lora", "small"])):
        output = tmp_path / name
        arguments = [
            "--tasks",
            "tts",
            *SCRATCH,
            *SPEECH,
            "--max_steps",
            "1",
            "--save_strategy",
            "steps",
            "--save_steps",
            "1",
        ]
        train(script, *words(folder, output, *arguments, *more))
        assert script.prepare(words(folder, output, *arguments, *more)) is None
        train(script, *words(folder, output, *arguments, *more, "--vocoder", str(tmp_path / "vocoder")))
        model = AutoModelForTextToWaveform.from_pretrained(str(output / "base" if more else output))
        assert model.config.vocoder_config.vocoder_type == "istft"


def test_adapters_that_speak(script, folder, tiny_folder, tmp_path):  # noqa: F811
    output = tmp_path / "lora"
    more = ["--model_name_or_path", tiny_folder, "--tasks", "asr,tts", *SPEECH, "--lora", "small", "--max_steps", "4"]
    run = train(script, *words(folder, output, *more))
    trained = run.trainer.model.eval()
    assert not any(p.requires_grad for n, p in trained.named_parameters() if n.endswith("embed_tokens.weight"))
    inputs = run.processor.apply_speech_request("Hello.")
    options = {"max_seconds": 0.3, "seed": 3, "return_dict_in_generate": True}
    expected = trained.generate(**inputs, **options).spectrogram[0]
    from peft import PeftModel

    with pytest.raises(ValueError, match="holds adapters"):
        script.prepare(words(folder, tmp_path / "more", "--model_name_or_path", str(output)))
    base = AutoModelForTextToWaveform.from_pretrained(str(output / "base"))
    again = PeftModel.from_pretrained(base, str(output)).eval()
    torch.testing.assert_close(again.generate(**inputs, **options).spectrogram[0], expected)


def test_a_trained_vocoder_is_put_in(script, folder, tokenizer, tmp_path):  # noqa: F811
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1}
    for padding in (120, 0):
        extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=padding)
        config = MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="istft", vocoder_kwargs=sizes)
        MelLLMVocoder(config).save_pretrained(tmp_path / f"vocoder{padding}")
    arguments = ["--tasks", "tts", *SCRATCH, *SPEECH, "--max_steps", "1"]
    train(script, *words(folder, tmp_path / "run", *arguments, "--vocoder", str(tmp_path / "vocoder120")))
    model = AutoModelForTextToWaveform.from_pretrained(str(tmp_path / "run"))
    put_in = MelLLMVocoder.from_pretrained(tmp_path / "vocoder120")
    for name, value in put_in.state_dict().items():
        assert torch.equal(model.vocoder.state_dict()[name], value), name
    # As well out of a model that speaks
    train(script, *words(folder, tmp_path / "other", *arguments, "--vocoder", str(tmp_path / "run")))
    other = AutoModelForTextToWaveform.from_pretrained(str(tmp_path / "other"))
    assert all(torch.equal(other.vocoder.state_dict()[name], value) for name, value in put_in.state_dict().items())
    with pytest.raises(ValueError, match=r"is for features with edge_padding 0 \(here 120\)"):
        script.prepare(words(folder, tmp_path / "x", *arguments, "--vocoder", str(tmp_path / "vocoder0")))
    model.vocoder = model.config.vocoder_config = None
    model.save_pretrained(tmp_path / "mute")
    build_tiny(tokenizer)[0].save_pretrained(tmp_path / "reader")
    for name in ("mute", "reader"):
        with pytest.raises(ValueError, match=f"{name} is a Mel-LLM that has no vocoder"):
            script.prepare(words(folder, tmp_path / "x", *arguments, "--vocoder", str(tmp_path / name)))
    # Which transformers would load as Griffin-Lim, with a warning
    model.model.language_model.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="llm is a model of the type 'llama', and no vocoder"):
        script.prepare(words(folder, tmp_path / "x", *arguments, "--vocoder", str(tmp_path / "llm")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_data", "FOLDER,task=tts"], "is for tts, which is not among --tasks"),
        (["--train_data", "FOLDER,task=sing"], "`task` must be one of asr, tts"),
        (["--tasks", "asr,tts", "--train_data", "FOLDER,streaming=true", "--max_steps", "1"], "one task at a time"),
        (["--tasks", "asr,tts", "--train_data", "FOLDER,task=asr"], "left to use for tts"),
        (["--tasks", "tts", "--speech_config", '{"flux": 1}'], "no field flux"),
        (["--tasks", "tts", "--speech_preset", "large"], "one of paper, small"),
        (["--vocoder", "none"], "add --tasks tts"),
        (["--tasks", "tts", "--voice_pairs", "0.5"], "no speaker has two clips"),
        (["--tasks", "continuation", "--speech_config", '{"ctc_weight": 1}'], "`ctc_weight` is for speaking texts"),
    ],
)
def test_what_cannot_work_is_told_before_training(script, folder, tmp_path, arguments, message):  # noqa: F811
    arguments = [argument.replace("FOLDER", folder) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        script.prepare(words(folder, tmp_path / "run", *SCRATCH, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "asr,sing"], "--tasks must be one or several of asr, tts, continuation, qa, got asr sing"),
        (["--tasks", "asr", "asr"], "--tasks must be"),
        (["--tasks", "asr,tts", "--task_weights", "1"], "--task_weights must be a positive number for each"),
        (["--tasks", "tts", "--speed_factors", "0.9"], "--speed_factors is for reading"),
        (["--tasks", "asr,tts", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor is for tokens"),
        (["--tasks", "tts", "--text_dropout", "0.1"], "--text_dropout is for reading"),
        (["--packing", "--text_dropout", "0.1"], "--text_dropout is for reading"),
        (["--text_dropout", "1"], "--text_dropout must be at least 0 and less than 1"),
        (["--history_sampling", "0.5"], "--history_sampling is for speaking"),
        (["--tasks", "continuation", "--history_sampling", "-1"], "--history_sampling must be from 0 to 1"),
        (["--tasks", "tts", "--history_sampling", "2"], "--history_sampling must be from 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit(script, folder, tmp_path, arguments, message, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        script.parse_arguments(words(folder, tmp_path, *arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tasks", "steps"),
    [
        ("mel-llm-small-en", ["asr"], ["1-letters", "2-short", "3-all", "4-finer", "5-taught", "6-spliced"]),
        ("mel-llm-small-en-tts", ["tts"], ["1-place", "2-own"]),
        ("mel-llm-small-en-continuation", ["asr", "tts", "continuation"], ["1-all", "2-speech"]),
    ],
)
def test_the_steps_of_a_recipe_are_understood(script, folder, tmp_path, name, tasks, steps):  # noqa: F811
    recipe = ROOT / "scripts" / "recipes" / name
    files = sorted(recipe.glob("*.yaml"))
    assert [path.stem for path in files] == steps
    shell = recipe.with_suffix(".sh").read_text()
    for path in files:
        more = ["--train_data", folder, "--output_dir", str(tmp_path), "--use_cpu"]
        _, data, training = script.parse_arguments([str(path), *more])
        assert data.tasks == tasks and training.max_steps > 0
        assert training.ctc_only_steps == {"1-letters": training.max_steps, "4-finer": 200}.get(path.stem, 0)
        assert f"train {path.stem} " in shell
    subprocess.run(["bash", "-n", recipe.with_suffix(".sh")], check=True)


def test_a_voice_becomes_a_model_that_goes_on(speaking_tiny, tmp_path):
    model, processor = speaking_tiny
    model.save_pretrained(tmp_path / "voice"), processor.save_pretrained(tmp_path / "voice")
    start = load_script("recipes/mel_llm_small_en_continuation_start")
    start.main([str(tmp_path / "voice"), str(tmp_path / "start")])
    going_on, info = AutoModelForPreTraining.from_pretrained(tmp_path / "start", output_loading_info=True)
    assert type(going_on).__name__ == "MelLLMForSpeechContinuation" and not info["missing_keys"]
    assert going_on.ctc_head is not None
    asked = processor.tokenizer.decode(going_on.config.continuation_suffix_ids)
    assert "Go on." in asked and asked != processor.tokenizer.decode(model.config.continuation_suffix_ids)
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(going_on.state_dict()[name], weights)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        start.main([str(tmp_path / "voice"), str(tmp_path / "start")])


@pytest.fixture(scope="module")
def speaking_tiny(tokenizer):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    return build_tiny(
        tokenizer,
        feature_extractor=extractor,
        speech_config=MelLLMSpeechConfig.from_preset("small", head_hidden_size=16, postnet_channels=8),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2),
    )
