"""The `mel-llm` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Language models that read and write spectrograms.", no_args_is_help=True)


@app.callback()
def main() -> None:
    # With a callback, a single command keeps its name: `mel-llm transcribe`, and others may come
    pass


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Audio files: wav, flac, ogg, opus, mp3.")],
    model: Annotated[str, typer.Option(help="Folder or Hub name of a Mel-LLM.")],
    language: Annotated[str | None, typer.Option(help="Language spoken, by name or two-letter code.")] = None,
    prompt: Annotated[str | None, typer.Option(help="More to tell the model, such as names to expect.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
) -> None:
    """Write the transcript of each file. A file that cannot be read is reported and the rest goes on."""
    # Imported late: `mel-llm --help` need not wait for torch
    import torch
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    import mel_llm

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    default_prompt = language is None and prompt is None
    try:
        processor = AutoProcessor.from_pretrained(model)
        if not default_prompt:  # before any file is touched
            processor.apply_transcription_request([None], language=language, prompt=prompt, tokenize=False)
        recogniser = AutoModelForSpeechSeq2Seq.from_pretrained(model).to(device).eval()
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        print(f"mel-llm: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    failed = 0
    for file in files:
        try:
            audio = mel_llm.load_audio(file, sampling_rate=processor.feature_extractor.sampling_rate)
            if default_prompt:
                inputs = processor(audio=audio)
            else:
                inputs = processor.apply_transcription_request(audio, language=language, prompt=prompt)
            ids = recogniser.generate(**inputs.to(device))
            (text,) = processor.batch_decode(ids, return_format="transcription_only")
        except (OSError, ValueError) as error:
            failed += 1
            print(f"{file}: {error}", file=sys.stderr)
            continue
        print(f"{file}: {text}" if len(files) > 1 else text, flush=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
