"""Trains a small Mel-LLM to speak eight recordings of demo_clips/ by heart, and lets it speak.

What this shows is that the objective, the loop that writes mel patches, the stop and the vocoder work together; it says
nothing about texts that the model has not learnt.

    python scripts/demo_tts.py --output_dir .demo/tts            # some four minutes on one CPU thread
    python scripts/demo_tts.py --output_dir .demo/tts --plot     # and a picture of a real and a generated mel

Writes the model, one wav for each text, and figures.json: how far the free-running mel is from the real one (mean
absolute difference in deviations of the training data), both lengths, and the speed.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import torch
from transformers import set_seed

from mel_llm import (
    MelLLMConfig,
    MelLLMFeatureExtractor,
    MelLLMSpeechConfig,
    MelLLMVocoderConfig,
    load_audio,
)
from mel_llm.conversion import from_text_llm
from mel_llm.training import compute_feature_statistics, train_tokenizer


CLIPS = Path(__file__).resolve().parents[1] / "demo_clips"


def read_clips(number: int) -> list[dict]:
    """The shortest recordings, with their transcripts."""
    with open(CLIPS / "metadata.csv", newline="", encoding="utf-8") as file:
        clips = [{"audio": load_audio(CLIPS / row["file_name"]), "text": row["text"]} for row in csv.DictReader(file)]
    return sorted(clips, key=lambda clip: len(clip["audio"]))[:number]


def build(clips: list[dict], seed: int):
    set_seed(seed)
    tokenizer = train_tokenizer([clip["text"] for clip in clips], vocab_size=320)
    # With this padding a spectrogram has one frame for each 160 samples
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    small = MelLLMConfig.from_preset("small", vocab_size=len(tokenizer), text_config={"num_hidden_layers": 4})
    model, processor = from_text_llm(
        small.text_config,
        tokenizer,
        audio_config=small.audio_config,
        feature_extractor=extractor,
        transcription_instruction="",
        speech_config=MelLLMSpeechConfig.from_preset("small"),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor),
    )
    rate = extractor.sampling_rate
    features = [
        extractor(clip["audio"], sampling_rate=rate, return_tensors="pt")["input_features"][0] for clip in clips
    ]
    model.model.set_feature_statistics(*compute_feature_statistics(features))
    return model, processor, features


def train(model, inputs, features, steps: int, learning_rate: float) -> None:
    labels = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=-100.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        output = model(**inputs, labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            terms = "  ".join(f"{name} {value.item():.3f}" for name, value in output.losses.items())
            print(f"step {step}: {terms}", flush=True)
    model.eval()


def speak(model, inputs, features, temperature: float, seed: int) -> tuple[dict, list]:
    started = time.time()
    output = model.generate(**inputs, temperature=temperature, seed=seed, return_dict_in_generate=True)
    elapsed = time.time() - started
    rows = []
    for written, real, stopped in zip(output.spectrogram, features, output.stopped, strict=True):
        frames = min(len(written), len(real))
        distance = (model.normalize(written[:frames]) - model.normalize(real[:frames])).abs().mean().item()
        rows.append(
            {"mel_l1": round(distance, 4), "frames": len(written), "real_frames": len(real), "stopped": stopped}
        )
    seconds = sum(len(audio) for audio in output.audio) / model.config.sampling_rate
    return {"clips": rows, "times_faster_than_real_time": round(seconds / elapsed, 1)}, output


def plot(real: torch.Tensor, written: torch.Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for axis, frames, title in zip(axes, (real, written), ("recorded", "generated, free-running"), strict=True):
        image = axis.imshow(frames.T, origin="lower", aspect="auto", vmin=0, vmax=float(real.max()))
        axis.set(title=title, ylabel="mel bin")
    axes[1].set_xlabel("frame (10 ms)")
    figure.colorbar(image, ax=axes, label="ln power")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="where model, wav files and figures go")
    parser.add_argument("--steps", type=int, default=700, help="training steps, each over all clips")
    parser.add_argument("--clips", type=int, default=8, help="how many recordings, the shortest first")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the speech that is written to files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", action="store_true", help="write mel.png, a real and a generated mel")
    arguments = parser.parse_args()

    arguments.output_dir.mkdir(parents=True, exist_ok=True)  # rather refused now than after the training
    clips = read_clips(arguments.clips)
    model, processor, features = build(clips, arguments.seed)
    inputs = processor.apply_speech_request([clip["text"] for clip in clips])
    started = time.time()
    train(model, inputs, features, arguments.steps, arguments.learning_rate)
    print(f"Trained in {time.time() - started:.0f} s.")

    figures = {"steps": arguments.steps, "seed": arguments.seed, "torch": torch.__version__}
    figures["temperature 0"], _ = speak(model, inputs, features, 0.0, arguments.seed)
    figures[f"temperature {arguments.temperature:g}"], output = speak(
        model, inputs, features, arguments.temperature, arguments.seed
    )
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    for index, (clip, audio) in enumerate(zip(clips, output.audio, strict=True)):
        path = arguments.output_dir / f"{index}.wav"
        processor.save_audio(audio, str(path))
        print(f"{path}: {clip['text']}")
    (arguments.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        plot(features[-1], output.spectrogram[-1], arguments.output_dir / "mel.png")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
