"""Trains a small model to go on with recordings of demo_clips/ by heart, and lets it go on with their beginnings.

There is no trained checkpoint that goes on with what it hears yet. What this shows is that the joint objective, the text that
is written first, the loop that writes the spectrogram behind it, the stop and the vocoder work together; it says nothing about
recordings that the model has not learnt.

    python scripts/demo_continuation.py --output_dir .demo/continuation            # some six minutes of CPU time
    python scripts/demo_continuation.py --output_dir .demo/ours --form ours --plot # Mel-LLM's form, and a picture

`--form spectron` is SPECTRON's: a Conformer encoder, frame by frame, nothing random, difference terms. `--form ours` has no
encoder, writes four frames at a time, and has the VAE head.

Writes the model, a wav for each recording (its beginning, then what the model made), and figures.json: the texts, how far the
free-running mel is from the real one (mean absolute difference in deviations of the training data), both lengths, and the
same without the text in between (`skip_text`).
"""

import argparse
import csv
import io
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
    MelLLMForSpeechContinuation,
    MelLLMSpeechConfig,
    MelLLMVocoderConfig,
    load_audio,
)
from mel_llm.conversion import from_text_llm
from mel_llm.training import compute_feature_statistics, train_tokenizer


CLIPS = Path(__file__).resolve().parents[1] / "demo_clips"
# Of a recording: the beginning that is heard. The paper's is always three seconds; these are hardly longer as a whole.
PROMPT_SHARE, MAX_PROMPT_SECONDS = 0.4, 3.0
BACKBONE = {"num_hidden_layers": 4}


def read_clips(number: int) -> list[dict]:
    """The shortest recordings of at least a second and a half, with their transcripts."""
    with open(CLIPS / "metadata.csv", newline="", encoding="utf-8") as file:
        clips = [{"audio": load_audio(CLIPS / row["file_name"]), "text": row["text"]} for row in csv.DictReader(file)]
    clips = [clip for clip in clips if len(clip["audio"]) >= 24000]
    return sorted(clips, key=lambda clip: len(clip["audio"]))[:number]


def build(clips: list[dict], form: str, seed: int):
    set_seed(seed)
    tokenizer = train_tokenizer([clip["text"] for clip in clips], vocab_size=320)
    if form == "spectron":
        extractor = MelLLMFeatureExtractor.from_preset("spectron")
        encoder = {"num_blocks": 2, "num_attention_heads": 4, "kernel_size": 5, "intermediate_size": 512}
        config = MelLLMConfig.from_preset(
            "spectron-small",
            vocab_size=len(tokenizer),
            text_config=BACKBONE,
            audio_config={"encoder_config": encoder},
        )
    else:
        # With this padding a spectrogram has one frame for each 160 samples
        extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
        config = MelLLMConfig.from_preset(
            "small",
            vocab_size=len(tokenizer),
            text_config=BACKBONE,
            speech_config=MelLLMSpeechConfig.from_preset("small"),
        )
    model, processor = from_text_llm(
        config.text_config,
        tokenizer,
        audio_config=config.audio_config,
        feature_extractor=extractor,
        transcription_instruction="",
        continuation_instruction="",
        model_class=MelLLMForSpeechContinuation,
        speech_config=config.speech_config,
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor),
    )
    rate = extractor.sampling_rate
    features = [
        extractor(clip["audio"], sampling_rate=rate, return_tensors="pt")["input_features"][0] for clip in clips
    ]
    model.model.set_feature_statistics(*compute_feature_statistics(features))
    return model, processor, features


def split(features: list[torch.Tensor], frame_rate: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each spectrogram `(frames, num_mel_bins)` as its beginning and what follows."""
    heads = [min(round(PROMPT_SHARE * len(frames)), round(MAX_PROMPT_SECONDS * frame_rate)) for frames in features]
    pairs = [(frames[:head], frames[head:]) for frames, head in zip(features, heads, strict=True)]
    return [head for head, _ in pairs], [rest for _, rest in pairs]


def pad(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def train(model, inputs: dict, labels, speech, arguments) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, arguments.learning_rate, total_steps=arguments.steps, pct_start=0.15
    )
    model.train()
    for step in range(1, arguments.steps + 1):
        without = torch.rand(len(labels), 1) < arguments.without_text
        output = model(**inputs, labels=labels.masked_fill(without, -100), spectrogram_labels=speech)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == arguments.steps:
            terms = "  ".join(f"{name} {value.item():.3f}" for name, value in output.losses.items())
            print(f"step {step}: {terms}", flush=True)
    model.eval()


def go_on(model, processor, inputs: dict, clips, real, **options) -> tuple[dict, object]:
    started = time.time()
    output = model.generate(**inputs, **options)
    elapsed = time.time() - started
    rows = []
    for text, clip, written, frames, stopped in zip(
        processor.decode_continuation(output), clips, output.spectrogram, real, output.stopped, strict=True
    ):
        size = min(len(written), len(frames))
        distance = (model.normalize(written[:size]) - model.normalize(frames[:size])).abs().mean().item()
        rows.append(
            {
                "said": clip["text"],
                "written": text["text"],
                "mel_l1": round(distance, 4),
                "frames": len(written),
                "real_frames": len(frames),
                "stopped": stopped,
            }
        )
    seconds = sum(len(audio) for audio in output.audio) / model.config.sampling_rate
    return {"clips": rows, "times_faster_than_real_time": round(seconds / elapsed, 2)}, output


def plot(prompt, real, written, said: str, text: str, frame_rate: float, path: Path) -> None:
    from matplotlib.figure import Figure
    from PIL import Image  # which matplotlib brings

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    both = (torch.cat([prompt, real]), torch.cat([prompt, written]))
    titles = (f"recorded: “{said}”", f"heard up to the line; then written by the model: “{text}”, and spoken")
    for axis, frames, title in zip(axes, both, titles, strict=True):
        extent = (0.0, len(frames) / frame_rate, 0, frames.shape[1])
        low, high = float(both[0].quantile(0.02)), float(both[0].max())
        image = axis.imshow(frames.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high)
        axis.axvline(len(prompt) / frame_rate, color="white", linewidth=1.5)
        axis.set(ylabel="mel bin")
        axis.set_title(title, fontsize=9, loc="left", wrap=True)
    axes[1].set_xlabel("time (s)")
    figure.colorbar(image, ax=axes, label="log-mel")
    with io.BytesIO() as picture:
        figure.savefig(picture, format="png", dpi=80)
        Image.open(picture).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="where model, wav files and figures go")
    parser.add_argument("--form", choices=("spectron", "ours"), default="spectron")
    parser.add_argument("--steps", type=int, default=500, help="training steps, each over all clips")
    parser.add_argument("--clips", type=int, default=6, help="how many recordings, the shortest first")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--without_text", type=float, default=0.25, help="share of examples that go to speech at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", action="store_true", help="write continuation.png: heard, recorded and generated mel"
    )
    arguments = parser.parse_args(argv)

    arguments.output_dir.mkdir(parents=True, exist_ok=True)  # rather refused now than after the training
    clips = read_clips(arguments.clips)
    model, processor, features = build(clips, arguments.form, arguments.seed)
    frame_rate = model.config.audio_config.frame_rate
    prompts, real = split(features, frame_rate)
    mask = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], 0)
    inputs = {"input_features": pad(prompts, 0.0), "input_features_mask": mask}
    labels = pad([torch.tensor(processor.continuation_text_ids(clip["text"])) for clip in clips], -100)
    started = time.time()
    train(model, inputs, labels, pad(real, -100.0), arguments)
    print(f"Trained in {time.time() - started:.0f} s.")

    options = {"temperature": 0.0, "seed": arguments.seed, "max_seconds": 10.0}
    figures = {"form": arguments.form, "steps": arguments.steps, "seed": arguments.seed, "torch": torch.__version__}
    figures["text, then speech"], output = go_on(model, processor, inputs, clips, real, **options)
    figures["speech alone"], _ = go_on(model, processor, inputs, clips, real, **options, skip_text=True)
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    hop = model.config.audio_config.hop_length
    for index, (clip, prompt, audio) in enumerate(zip(clips, prompts, output.audio, strict=True)):
        path = arguments.output_dir / f"{index}.wav"
        processor.save_audio(torch.cat([torch.from_numpy(clip["audio"][: len(prompt) * hop]), audio]), str(path))
        print(f"{path}: {clip['text']}")
    (arguments.output_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        text = figures["text, then speech"]["clips"][-1]["written"]
        path = arguments.output_dir / "continuation.png"
        plot(prompts[-1], real[-1], output.spectrogram[-1], clips[-1]["text"], text, frame_rate, path)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
