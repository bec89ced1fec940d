"""`mel-llm continue`: goes on with a recording, or answers it, in text and in sound."""

import json as json_module
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import STDIN, fail, interruptible, load, report
from .cli_speak import _check_numbers, _check_output, _File, _Pipe, _save_picture


def continue_speech(
    prompt: Annotated[
        str, typer.Argument(help="A recording (wav, flac, ogg, opus, mp3, aiff), a URL, or - for standard input.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The file for the sound, whose ending is its format (wav, flac, ogg, opus, mp3, aiff), or - for a WAV on "
            "standard output.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(envvar="MEL_LLM_MODEL", help="Folder or Hub name of a Mel-LLM that goes on.")
    ] = None,
    question: Annotated[bool, typer.Option("--question", help="Answer the recording: it is a question.")] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Write the text and make no sound.")] = False,
    skip_text: Annotated[bool, typer.Option("--skip-text", help="Make the sound without any text before it.")] = False,
    with_prompt: Annotated[
        bool, typer.Option("--with-prompt", help="Put the recording before what follows it, in the sound.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Write the text as JSON, with its parts where they are known.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Give out text and sound while they are made.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the mel, heard and made, into this PNG; needs matplotlib.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes what is drawn repeatable.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the text instead of taking the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Variation; 1 by default, 0 for none.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Longest time for what follows; by default what its text may need.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Go on with a recording: its text and what follows on standard output, and what follows as sound.

    Of a recording that is longer than the model was trained on, the last seconds are taken, and the command says so. The file
    appears under its name when it is complete. With -o -, the text goes to standard error. The exit status is 0 if all went
    well, 1 if the work broke off, 2 if nothing could be done.
    """
    with interruptible():
        target = _check_use(prompt, output, plot, text_only, skip_text, with_prompt, json, stream, overwrite)
        _check_numbers(temperature, max_seconds)
        if model is None:
            fail("no model: pass --model FOLDER, or set MEL_LLM_MODEL.")
        options = {
            "task": "qa" if question else "continuation",
            "return_text_only": text_only,
            "skip_text": skip_text,
            "do_sample": sample,
            "seed": seed,
            "temperature": temperature,
            "max_seconds": max_seconds,
        }
        options = {name: value for name, value in options.items() if value is not None}
        speaker, processor, audio = _load(model, device, dtype, prompt, text_only)
        audio = _last_seconds(audio, speaker.config.audio_config)
        sink = None
        if not text_only:
            rate = speaker.config.sampling_rate
            sink = _Pipe(rate) if target is None else _File(target, rate)
        words = None if json or skip_text else (sys.stderr if output == STDIN else sys.stdout)
        made = _go_on(speaker, processor, audio, options, sink, words, stream, with_prompt)
        if json:
            row = {"file": prompt, **processor.decode_continuation(made)[0]}
            if not text_only:
                row["seconds"] = round(len(made.audio[0]) / speaker.config.sampling_rate, 3)
            print(json_module.dumps(row, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"), flush=True)
        if sink is not None and not sink.keep(overwrite):
            raise typer.Exit(1)
        if plot is not None and not _draw(processor, audio, made, plot):
            raise typer.Exit(1)


# --- before any work ----------------------------------------------------------------------------------------------------


def _check_use(prompt, output, plot, text_only, skip_text, with_prompt, json, stream, overwrite) -> Path | None:
    """The file to be written, or None; refuses what does not go together."""
    if text_only and skip_text:
        fail("--text-only and --skip-text leave nothing to be made: pass one of them.")
    if text_only:
        given = {"-o": output, "--plot": plot, "--with-prompt": with_prompt or None}
        if names := [name for name, value in given.items() if value is not None]:
            fail(f"--text-only makes no sound: {', '.join(names)} would have none.")
    if json and (stream or output == STDIN):
        fail(f"--json is written when all is done, to standard output: not with {'--stream' if stream else '-o -'}.")
    if prompt == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            fail("standard input is a terminal: pipe audio into it.")
    elif not prompt.startswith(("http://", "https://")):
        if os.path.isdir(prompt):
            fail(f"{prompt} is a folder: name a recording.")
        if not os.path.exists(prompt):
            fail(f"there is no file {prompt}.")
    return None if text_only else _check_output(output, plot, [prompt], overwrite)


def _load(model: str, device: str | None, dtype: str, prompt: str, text_only: bool):
    """The model, its processor, and the recording `(samples,)`, which is read before the model is loaded."""
    from transformers.utils import logging

    from .audio_utils_mel_llm import load_audio

    audio = []

    def check(processor):
        if not hasattr(processor, "decode_continuation"):
            raise ValueError(f"{model} is no Mel-LLM: its processor is a {type(processor).__name__}.")
        source = sys.stdin.buffer.read() if prompt == STDIN else prompt
        audio.append(load_audio(source, sampling_rate=processor.feature_extractor.sampling_rate))

    speaker, processor = load("AutoModelForPreTraining", model, device, dtype, check)
    if not hasattr(speaker, "speech_head"):
        fail(f"{model} is no Mel-LLM that goes on but of the type {speaker.config.model_type!r}.")
    if speaker.vocoder is None and not text_only:
        fail(f"{model} has no vocoder, so it makes no sound; --text-only writes the text.")
    trained = speaker.config.architectures
    if trained and type(speaker).__name__ not in trained:
        report(f"{model} is a {trained[0]}, which was not trained to go on with speech: expect nonsense.")
    for name in ("continuation_generation_mel_llm", "speech_generation_mel_llm"):  # the command says it itself
        logging.get_logger(f"mel_llm.{name}").setLevel("ERROR")
    return speaker, processor, audio[0]


def _last_seconds(audio, config):
    limit = int(config.max_audio_seconds * config.sampling_rate)
    if len(audio) > limit:
        seconds = len(audio) / config.sampling_rate
        report(
            f"the recording has {seconds:.1f} s and the model was trained on at most {config.max_audio_seconds:g}: its last "
            f"{config.max_audio_seconds:g} s are taken."
        )
        audio = audio[-limit:]
    return audio


# --- the work -----------------------------------------------------------------------------------------------------------


def _go_on(speaker, processor, audio, options: dict, sink, words, stream: bool, with_prompt: bool):
    """Writes text into `words` and sound into `sink`; returns what `generate` does. Ends the program, with a report, where it
    breaks off."""
    import torch

    streamers = {}
    if stream and words is not None:
        streamers["text_streamer"] = _words_streamer(processor, words)
    try:
        inputs = processor(audio=audio).to(speaker.device)
        if sink is not None and stream:
            if with_prompt:
                sink.put(torch.from_numpy(audio))
            streamers["streamer"] = sink
        made = speaker.generate(**inputs, **options, **streamers)
        has_text = bool((made.sequences != speaker.config.pad_token_id).any())
        has_speech = made.spectrogram is not None and len(made.spectrogram[0]) > 0
        if not has_text and not has_speech:
            raise ValueError("the recording is silent: there is nothing to go on from.")
        if words is not None and not stream:
            print(_printable(processor.decode_continuation(made)[0]["text"], words), file=words, flush=True)
        if sink is not None and not stream:
            before = [torch.from_numpy(audio)] if with_prompt else []
            sink.put(torch.cat([*before, made.audio[0].cpu()]))
    except BrokenPipeError:  # the player was closed: the command line framework ends the program quietly
        raise
    except KeyboardInterrupt:
        if sink is not None:
            sink.leave()
        raise
    except Exception as error:
        report(f"mel-llm: {'' if isinstance(error, OSError | ValueError) else type(error).__name__ + ': '}{error}")
        if sink is not None:
            started = sink.num_samples > 0
            sink.leave() if started else sink.drop()
            raise typer.Exit(1 if started else 2) from None
        raise typer.Exit(2) from None
    if made.stopped is not None and not made.stopped[0]:
        seconds = len(made.audio[0]) / speaker.config.sampling_rate
        report(f"the speech was ended after {seconds:.1f} s by a limit and not by the model.")
    return made


def _words_streamer(processor, file):
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(_printable(text, file), file=file, end="\n" if stream_end else "", flush=True)

    return Words(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _printable(text: str, file) -> str:
    encoding = file.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _draw(processor, audio, made, path: Path) -> bool:
    import torch

    from .speech_plot import SpeechPlot

    extractor = processor.feature_extractor
    picture = SpeechPlot(extractor)
    heard = processor(audio=audio)["input_features"][0]
    samples = torch.zeros(len(heard) * extractor.hop_length)
    samples[: len(audio)] = torch.from_numpy(audio)[: len(samples)]
    picture.add(heard, samples)
    picture.add(made.spectrogram[0].cpu(), made.audio[0].cpu())
    seconds = len(heard) * extractor.hop_length / extractor.sampling_rate
    text = processor.decode_continuation(made)[0]["text"]
    title = "".join(character for character in " ".join(text.split()) if character.isprintable())
    return _save_picture(picture, path, [seconds], title)
