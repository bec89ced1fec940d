"""scripts/train_vocoder.py as a user runs it: whole, killed and started again, on audio without transcripts."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import soundfile
import torch
from conftest import ROOT, build_tiny, load_script

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoder, MelLLMVocoderConfig
from mel_llm.training import (
    SegmentSampler,
    SpeechDataset,
    SpeechSource,
    VocoderTrainer,
    VocoderTrainingArguments,
    load_source,
    select_clips,
)
from mel_llm.training.vocoder import Discriminators, SpectralLoss


SCRIPT = str(ROOT / "scripts" / "train_vocoder.py")
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2}


@pytest.fixture
def folder(speech_clips, tmp_path):
    """Clips in two splits, listed without any transcript; one of the files is no audio."""
    for split, clips in (("train", speech_clips[:6]), ("validation", speech_clips[6:8])):
        place = tmp_path / "speech" / split
        place.mkdir(parents=True)
        with open(place / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name"])
            for index, clip in enumerate(clips):
                soundfile.write(place / f"{index}.wav", clip["array"], 16000)
                writer.writerow([f"{index}.wav"])
            if split == "train":
                (place / "bad.wav").write_bytes(b"no audio")
                writer.writerow(["bad.wav"])
    return str(tmp_path / "speech")


def words(folder, output, *more):
    common = {
        "--train_data": folder,
        "--eval_data": folder,
        "--output_dir": str(output),
        "--vocoder_kwargs": json.dumps(TINY),
        "--max_steps": "12",
        "--batch_size": "2",
        "--segment_seconds": "0.25",
        "--adversarial_start": "4",
        "--discriminator_channels": "2",
        "--logging_steps": "1",
        "--eval_steps": "6",
        "--save_steps": "3",
        "--device": "cpu",
    }
    given = set(more)
    return [item for pair in common.items() if pair[0] not in given for item in pair] + list(more)


def launch(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(folder, tmp_path):
    printed = finish(launch(*words(folder, tmp_path / "whole")))
    assert "6 clips" in printed and "1 missing or not audio" in printed and "parameters are trained" in printed
    with open(tmp_path / "whole" / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert not rows[3]["discriminator"] and rows[4]["discriminator"] and rows[5]["eval_mel"] and rows[11]["eval_mel"]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    model = {"config.json", "model.safetensors"}
    assert names == {"checkpoint-9", "checkpoint-12", "losses.csv", "training_summary.json", *model}

    output = tmp_path / "killed"
    process = launch(*words(folder, output))
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-6").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (output / "checkpoint-6").is_dir()
    # One that was interrupted while it was written, and half a row of the log
    (output / "checkpoint-99").mkdir()
    with open(output / "losses.csv", "a") as file:
        file.write("98,1.2")
    printed = finish(launch(*words(folder, output)))
    assert "Going on from" in printed
    assert (output / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()

    vocoder = MelLLMVocoder.from_pretrained(output)
    assert vocoder.extractor.edge_padding == 120 and vocoder.generator.normalizer.global_mean.any()
    assert vocoder(torch.zeros(1, 10, 80)).shape == (1, 1600)
    assert "trained already" in finish(launch(*words(folder, output)))
    refused, _ = (process := launch(*words(folder, output, "--max_steps", "14", "--batch_size", "3"))).communicate()
    assert process.returncode == 1 and "`batch_size` 2, not 3" in refused and "Traceback" not in refused
    summary = json.loads((output / "training_summary.json").read_text())
    assert summary["metrics"]["eval_mel"] > 0 and summary["skipped_steps"] == 0


@pytest.mark.slow
def test_a_trained_vocoder_is_trained_on(folder, tmp_path):
    """HiFi-GAN, from the folder of another run."""
    kwargs = {
        "upsample_initial_channel": 16,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]],
    }
    extractor = MelLLMFeatureExtractor.from_preset("hifigan16k")
    config = MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="hifigan", vocoder_kwargs=kwargs)
    vocoder = MelLLMVocoder(config)
    vocoder.set_feature_statistics(torch.full((80,), -2.5), torch.ones(80))
    vocoder.save_pretrained(tmp_path / "first")
    more = ["--model_name_or_path", str(tmp_path / "first"), "--vocoder_kwargs", "{}", "--max_steps", "3"]
    finish(launch(*words(folder, tmp_path / "run", *more)))
    trained = MelLLMVocoder.from_pretrained(tmp_path / "run")
    assert trained.config.vocoder_type == "hifigan" and trained.hop_length == 256
    assert (trained.generator.model.mean == -2.5).all()  # what it was trained with stays
    assert not torch.equal(trained.generator.model.conv_pre.weight, vocoder.generator.model.conv_pre.weight)


def test_the_vocoder_of_a_model_that_speaks_is_gone_on_with(tokenizer, tmp_path):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    model, _ = build_tiny(
        tokenizer,
        feature_extractor=extractor,
        speech_config=MelLLMSpeechConfig.from_preset("small", head_hidden_size=16, postnet_channels=8),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(
            extractor, vocoder_type="istft", vocoder_kwargs=TINY
        ),
    )
    model.save_pretrained(tmp_path / "voice")
    script = load_script("train_vocoder")
    arguments = script.VocoderArguments(train_data=["x"], model_name_or_path=str(tmp_path / "voice"))
    vocoder, is_new = script.build(arguments, seed=0)
    assert not is_new and vocoder.config.vocoder_type == "istft"
    for name, value in model.vocoder.state_dict().items():
        assert torch.equal(vocoder.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--segment_seconds", "0.01"), "--segment_seconds must be at least 0.064"),
        (("--vocoder_kwargs", "{"), "--vocoder_kwargs is not JSON"),
        (("--batch_size", "0"), "`batch_size` must be more than 0"),
        (("--vocoder_type", "griffin_lim", "--vocoder_kwargs", "{}"), "nothing to train"),
        (("--train_data", "nowhere/at/all.csv"), "nowhere"),
    ],
)
@pytest.mark.slow
def test_what_a_user_can_mend_is_told_in_a_line(folder, tmp_path, more, message):
    process = launch(*words(folder, tmp_path / "run", *more))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and message in printed and "Traceback" not in printed


def test_sources_without_transcripts(folder, speech_clips, tmp_path):
    with pytest.raises(ValueError, match="none of the columns file_name"):
        load_source(SpeechSource(folder))
    data = load_source(SpeechSource(folder), needs_text=False)
    assert len(data) == 7 and set(data["text"]) == {""}
    rows, seconds, report = select_clips(data, None)
    assert len(rows) == len(seconds) == report.num_clips == 6 and report.left_out == {"missing or not audio": 1}

    loose = tmp_path / "loose"
    loose.mkdir()
    soundfile.write(loose / "a.wav", speech_clips[0]["array"], 16000)
    with pytest.raises(ValueError, match="no clips with transcripts"):
        load_source(SpeechSource(str(loose)))
    assert len(load_source(SpeechSource(str(loose)), needs_text=False)) == 1


def test_a_batch_is_a_function_of_seed_and_step(speech_clips):
    data = [{"audio": {"path": clip["path"], "bytes": None}, "text": ""} for clip in speech_clips[:4]]
    clips = SpeechDataset(data)
    sampler = SegmentSampler(clips, torch.tensor([1.0, 1.0, 0.0, 2.0]), 4000, seed=3)
    first = sampler.batch(7, 5)
    assert first.shape == (5, 4000) and torch.equal(first, sampler.batch(7, 5))
    assert not torch.equal(first, sampler.batch(8, 5))
    # Segments longer than any clip are clips and silence
    (whole,) = SegmentSampler(clips, torch.tensor([0.0, 0.0, 1.0, 0.0]), 10**6, seed=0).batch(0, 1)
    size = len(speech_clips[2]["array"])
    assert torch.equal(whole[:size], torch.from_numpy(speech_clips[2]["array"])) and not whole[size:].any()


def test_losses_are_least_where_waveforms_are_the_same(speech_clips):
    real = torch.from_numpy(speech_clips[0]["array"])[None, :8000]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    loss = SpectralLoss()
    values = [loss(real + level * noise, real).item() for level in (0.0, 0.01, 0.1)]
    assert values[0] == 0 and values[0] < values[1] < values[2]
    silent = torch.zeros(1, 8000, requires_grad=True)
    loss(silent, torch.zeros(1, 8000)).backward()
    assert torch.isfinite(silent.grad).all()


def test_discriminators_tell_apart_what_they_have_learnt(speech_clips):
    torch.manual_seed(0)
    real = torch.stack([torch.from_numpy(clip["array"])[:6000] for clip in speech_clips[:2]])
    fake = 0.1 * torch.randn(2, 6000)
    discriminators = Discriminators(4)
    optimizer = torch.optim.AdamW(discriminators.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = discriminators.loss(real, fake)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adversarial, matching = discriminators.generator_loss(real, real)
    assert matching == 0 and adversarial < discriminators.generator_loss(real, fake)[0]


def test_a_step_whose_gradients_do_not_exist_is_passed_over(speech_clips, tmp_path):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    config = MelLLMVocoderConfig.from_feature_extractor(extractor, vocoder_type="istft", vocoder_kwargs=TINY)
    arguments = VocoderTrainingArguments(str(tmp_path), batch_size=1, adversarial_start=100, device="cpu")
    data = SpeechDataset([{"audio": {"path": speech_clips[0]["path"], "bytes": None}, "text": ""}])
    trainer = VocoderTrainer(
        MelLLMVocoder(config), arguments, SegmentSampler(data, torch.ones(1), 3200, 0), None, torch.ones(80)
    )
    trainer.vocoder.generator.embed.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = trainer.vocoder.generator.head.weight.clone()
    trainer.train_step()
    assert trainer.num_skipped == 1 and trainer.step == 1
    assert torch.equal(trainer.vocoder.generator.head.weight, before)
