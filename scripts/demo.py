"""Transcribes the recordings in demo_clips/ and prints reference, hypothesis and word error rate.

There is no trained checkpoint in the repository yet, so the first run trains a small model on these very recordings
(a few minutes on two CPU cores) and keeps it in .demo/. What it shows is that the whole path works, from a waveform
through the stock pipeline to text. It says nothing about speech that the model has not heard, and says so.

    bash scripts/demo.sh                        # train if needed, then transcribe demo_clips/
    bash scripts/demo.sh my.wav other.flac      # transcribe files of your own with that model
    bash scripts/demo.sh --model FOLDER         # use a model of yours
    bash scripts/demo.sh --retrain              # train anew
"""

import argparse
import csv
import os
import shutil
import sys
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import torch
from transformers import Trainer, TrainingArguments, pipeline, set_seed
from transformers.utils import logging

import mel_llm
from mel_llm import MelLLMConfig, load_audio
from mel_llm.conversion import from_text_llm
from mel_llm.evaluation import WordErrorRate
from mel_llm.training import TranscriptionCollator, compute_feature_statistics, train_tokenizer


ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "demo_clips"
MODEL = ROOT / ".demo" / "mel-llm-demo"


def read_clips() -> list[dict]:
    with open(CLIPS / "metadata.csv", newline="", encoding="utf-8") as file:
        return [{"path": str(CLIPS / row["file_name"]), "text": row["text"]} for row in csv.DictReader(file)]


def train(clips: list[dict], folder: Path, epochs: int, seed: int) -> None:
    """Trains a small model from scratch on the clips and saves it, whole or not at all."""
    set_seed(seed)
    tokenizer = train_tokenizer([clip["text"] for clip in clips], vocab_size=384)
    small = MelLLMConfig.from_preset(
        "small",
        vocab_size=len(tokenizer),
        text_config={"num_hidden_layers": 4, "hidden_size": 192, "intermediate_size": 512},
        audio_config={"conv_channels": 32, "hidden_size": 192},
    )
    model, processor = from_text_llm(
        small.text_config, tokenizer, audio_config=small.audio_config, transcription_instruction=""
    )
    examples = [{"audio": load_audio(clip["path"]), "text": clip["text"]} for clip in clips]
    # Long recordings are cut into pieces of what it was trained on
    model.config.audio_config.max_audio_seconds = max(len(example["audio"]) for example in examples) / 16000
    features = [processor(example["audio"])["input_features"][0] for example in examples]
    model.model.set_feature_statistics(*compute_feature_statistics(features))

    arguments = TrainingArguments(
        output_dir=str(folder.parent / "training"),
        per_device_train_batch_size=2,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        dataloader_pin_memory=False,
        disable_tqdm=False,
        logging_steps=60,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
    )
    Trainer(model, arguments, train_dataset=examples, data_collator=TranscriptionCollator(processor)).train()

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="audio files to transcribe instead of demo_clips/")
    parser.add_argument("--model", type=Path, help="folder of a model to use instead of the demo's own")
    parser.add_argument("--retrain", action="store_true", help="train the demo's model anew")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the clips")
    parser.add_argument("--epochs", type=int, default=50, help="passes over the clips when training")
    arguments = parser.parse_args()
    for file in arguments.files:
        if not os.path.isfile(file):
            sys.exit(f"There is no file {file!r}.")
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        sys.exit(f"There is no model in {str(arguments.model)!r}.")
    logging.set_verbosity_error()

    clips = read_clips()
    folder = arguments.model or MODEL
    if arguments.model is None and (arguments.retrain or not (MODEL / "config.json").is_file()):
        print(
            f"Training a small model on the {len(clips)} recordings in demo_clips/: there is no trained checkpoint in "
            "the repository yet.\nA few minutes on two CPU cores; kept in .demo/ for the next run."
        )
        started = time.time()
        train(clips, MODEL, arguments.epochs, arguments.seed)
        print(f"Trained in {time.time() - started:.0f} s.")

    recogniser = pipeline(
        "automatic-speech-recognition", model=str(folder), device=0 if torch.cuda.is_available() else "cpu"
    )
    rate = recogniser.feature_extractor.sampling_rate
    if arguments.files:
        for file in arguments.files:
            try:
                print(f"{file}: {recogniser(load_audio(file, sampling_rate=rate))['text']}")
            except (OSError, ValueError) as error:
                print(f"{file}: {error}", file=sys.stderr)
        return

    started = time.time()
    arrays = [load_audio(clip["path"], sampling_rate=rate) for clip in clips]
    texts = [result["text"] for result in recogniser(arrays, batch_size=8)]
    elapsed = time.time() - started
    for clip, text in zip(clips, texts, strict=True):
        print(f"\n{os.path.basename(clip['path'])}\n  reference:  {clip['text']}\n  hypothesis: {text}")
    references = [clip["text"] for clip in clips]
    wer = WordErrorRate(normalizer="whisper").compute(predictions=texts, references=references)["wer"]
    seconds = sum(len(array) for array in arrays) / rate
    print(f"\nWER {100 * wer:.1f} % over {len(clips)} recordings, {seconds:.0f} s of speech, in {elapsed:.1f} s")
    if arguments.model is None:
        print(
            "The model was trained on these same recordings: this shows that the path from sound to text works, not "
            "how well the model hears anything else."
        )
    print(f"mel_llm {mel_llm.__version__}, torch {torch.__version__}, model in {folder}")


if __name__ == "__main__":
    main()
