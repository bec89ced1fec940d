"""Shows what the models of this repository do: one hears recordings that it was not trained on, one speaks a sentence.

    bash scripts/demo.sh                        # transcribe held_out_clips/, and speak into .demo/speech.wav
    bash scripts/demo.sh my.wav other.flac      # transcribe files of your own
    bash scripts/demo.sh --say "Good morning."  # what is spoken, into --output
    bash scripts/demo.sh --model FOLDER         # use a model of yours, which speaks if it can
    bash scripts/demo.sh --train                # train a small model on demo_clips/, and transcribe these

Nothing is downloaded. With --train, a model from scratch learns the 24 recordings in demo_clips/ by heart, in a few minutes
on two CPU cores, and is kept in .demo/: that shows the path from sound to text in training, and nothing about other speech.
"""

import argparse
import csv
import os
import shutil
import sys
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import soundfile
import torch
from transformers import AutoConfig, Trainer, TrainingArguments, pipeline, set_seed
from transformers.utils import logging

import mel_llm
from mel_llm import MelLLMConfig, load_audio
from mel_llm.conversion import from_text_llm, new_folder
from mel_llm.evaluation import WordErrorRate
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import TranscriptionCollator, compute_feature_statistics, train_tokenizer


ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "hub_cards" / "mel-llm-small-en"
SPEAKER = ROOT / "hub_cards" / "mel-llm-small-en-continuation"
HELD_OUT = ROOT / "held_out_clips"
TRAINED_ON = ROOT / "demo_clips"
TRAINED = ROOT / ".demo" / "mel-llm-demo"
SPEECH = ROOT / ".demo" / "speech.wav"
SENTENCE = "Please enter your number, followed by the pound key."


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="audio files to transcribe instead of held_out_clips/")
    parser.add_argument("--model", type=Path, help="folder of a model to use instead of the repository's")
    parser.add_argument("--say", default=SENTENCE, help=f"what is spoken. Default: {SENTENCE}")
    parser.add_argument(
        "--output", type=Path, help="a new file for that. Default: .demo/speech.wav, written anew each time"
    )
    parser.add_argument("--train", action="store_true", help="train a small model on demo_clips/ and use it")
    parser.add_argument("--retrain", action="store_true", help="the same, anew")
    parser.add_argument("--seed", type=int, default=0, help="of --train: the weights and the order of the clips")
    parser.add_argument("--epochs", type=int, default=50, help="of --train: passes over the clips")
    arguments = parser.parse_args(argv)
    arguments.train |= arguments.retrain
    for file in arguments.files:
        if not os.path.isfile(file):
            parser.error(f"There is no file {file!r}.")
    if arguments.train and arguments.model is not None:
        parser.error("--train makes a model of its own: leave --model out.")
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        parser.error(f"There is no model in {str(arguments.model)!r}.")
    if arguments.output is None:
        arguments.output = SPEECH
        SPEECH.parent.mkdir(exist_ok=True)
    elif arguments.output.exists():
        parser.error(f"{arguments.output} exists already: name another --output.")
    return arguments


def read_clips(folder: Path) -> list[dict]:
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return [{"path": str(folder / row["file_name"]), "text": row["text"]} for row in csv.DictReader(file)]


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
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


def transcribe_files(recogniser, files: list[str], rate: int) -> None:
    for file in files:
        try:
            print(f"{file}: {recogniser(load_audio(file, sampling_rate=rate))['text']}")
        except (OSError, ValueError) as error:
            print(f"{file}: {error}", file=sys.stderr)


def transcribe_clips(recogniser, clips: list[dict], rate: int) -> None:
    arrays = [load_audio(clip["path"], sampling_rate=rate) for clip in clips]
    started = time.time()
    texts = [result["text"] for result in recogniser(arrays, batch_size=8)]
    elapsed = time.time() - started
    for clip, text in zip(clips, texts, strict=True):
        print(f"\n{os.path.basename(clip['path'])}\n  reference:  {clip['text']}\n  hypothesis: {text}")
    references = [clip["text"] for clip in clips]
    wer = WordErrorRate(normalizer="whisper").compute(predictions=texts, references=references)["wer"]
    seconds = sum(len(array) for array in arrays) / rate
    print(
        f"\nWER {100 * wer:.1f} % over {len(clips)} recordings, {seconds:.0f} s of speech, in {elapsed:.1f} s "
        f"({seconds / elapsed:.0f} times faster than real time)"
    )


def speak(folder: Path, text: str, output: Path, device) -> None:
    speaker = pipeline("text-to-audio", model=str(folder), device=device)
    started = time.time()
    speech = speaker(text)
    elapsed = time.time() - started
    audio, rate = speech["audio"].squeeze(), speech["sampling_rate"]
    soundfile.write(output, audio, rate)
    print(f"\n{output}: {text!r}, {len(audio) / rate:.1f} s of speech in {elapsed:.1f} s. It is synthetic.")


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()
    device = 0 if torch.cuda.is_available() else "cpu"
    if arguments.model is None and not arguments.train and not (MODEL / "config.json").is_file():
        print(f"There is no model in {MODEL} yet, so one is trained here, as with --train.")
        arguments.train = True
    folder, clips = arguments.model or MODEL, read_clips(HELD_OUT)
    if arguments.train:
        folder, clips = TRAINED, read_clips(TRAINED_ON)
        if arguments.retrain or not (TRAINED / "config.json").is_file():
            print(
                f"Training a small model on the {len(clips)} recordings in demo_clips/: a few minutes on two CPU cores."
            )
            started = time.time()
            train(clips, TRAINED, arguments.epochs, arguments.seed)
            print(f"Trained in {time.time() - started:.0f} s; kept in .demo/ for the next run.")

    recogniser = pipeline("automatic-speech-recognition", model=str(folder), device=device)
    rate = recogniser.feature_extractor.sampling_rate
    if arguments.files:
        transcribe_files(recogniser, arguments.files, rate)
    else:
        transcribe_clips(recogniser, clips, rate)
        if arguments.train:
            print(
                "The model was trained on these same recordings: this shows that the path from sound to text works, not "
                "how well the model hears anything else."
            )
        elif arguments.model is None:
            print("The model was not trained on these recordings; it was on others of the same speaker.")
    speaker = SPEAKER if folder == MODEL else folder
    if (speaker / "config.json").is_file() and AutoConfig.from_pretrained(speaker).speech_config is not None:
        speak(speaker, arguments.say, arguments.output, device)
    else:
        print(f"\nThe model in {folder} does not speak.")
    print(f"mel_llm {mel_llm.__version__}, torch {torch.__version__}, model in {folder}")


if __name__ == "__main__":
    with told_in_a_line("demo.py"):
        main(sys.argv[1:])
