"""`mel-llm speak`: texts of any length to an audio file, or to a player while they are being spoken."""

import contextlib
import math
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import STDIN, check_folder, fail, interruptible, load, report


# What a file is written as, by its ending
_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".wave": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aif": ("AIFF", "PCM_16"),
    ".aiff": ("AIFF", "PCM_16"),
}
_STDOUT = "-"
_LONGEST_NAME = 60  # characters of a sentence in a report
# libsndfile's Vorbis encoder keeps what it is given in one go on the stack
_WRITE_SAMPLES = 1 << 14
_MAX_WAV_BYTES = (1 << 32) - (1 << 16)


def speak(
    text: Annotated[
        str | None, typer.Argument(help="What to speak, or - for standard input (UTF-8).", show_default=False)
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The file, whose ending is its format (wav, flac, ogg, opus, mp3, aiff), or - for a WAV on "
            "standard output.",
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Speak the text in this file (UTF-8), however long.")] = None,
    model: Annotated[
        str | None, typer.Option(envvar="MEL_LLM_MODEL", help="Folder or Hub name of a Mel-LLM that speaks.")
    ] = None,
    voice: Annotated[
        str | None, typer.Option(help="A recording of 0.5 to 30 seconds whose voice is to go on; needs --voice-text.")
    ] = None,
    voice_text: Annotated[str | None, typer.Option(help="What is said in --voice, word for word.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Give out sound while a sentence is being spoken, not behind it.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the mel and the waveform into this PNG; needs matplotlib.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the speech repeatable.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Variation; 1 by default, 0 for none.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Longest time for a sentence; by default what its length may need.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Speak a text of any length, sentence by sentence in one voice.

    The file appears under its name when it is complete. Until then it grows beside it as NAME.partial.ENDING, and what
    an interrupted run has spoken stays there. The exit status is 0 if all went well, 1 if the speech broke off, 2 if
    nothing could be done.
    """
    with interruptible():
        target = _check_output(output, plot, [file, voice], overwrite)
        _check_numbers(temperature, max_seconds)
        if (voice is None) != (voice_text is None):
            fail("--voice and --voice-text go together: a recording, and what is said in it.")
        if model is None:
            fail("no model: pass --model FOLDER, or set MEL_LLM_MODEL.")
        text = _read_text(text, file)
        options = {"seed": seed, "temperature": temperature, "max_seconds": max_seconds}
        options = {name: value for name, value in options.items() if value is not None}
        if voice is not None:
            options.update(voice=voice, voice_text=voice_text)
        speaker, processor, text = _load(model, device, dtype, text, options)
        sink = _Pipe(speaker.config.sampling_rate) if target is None else _File(target, speaker.config.sampling_rate)
        picture = None
        if plot is not None:
            from .speech_plot import SpeechPlot

            picture = SpeechPlot(processor.feature_extractor)
        if not _speak(speaker, processor, text, options, sink, stream, picture):
            raise typer.Exit(1)
        if not (sink.keep(overwrite) and (picture is None or _save_picture(picture, plot))):
            raise typer.Exit(1)


# --- before any work ----------------------------------------------------------------------------------------------------


def _check_output(
    output: str | None, plot: Path | None, inputs: list[str | Path | None], overwrite: bool
) -> Path | None:
    """The file to be written, or None for standard output; refuses what could not be written or would lose something."""
    if output is None:
        fail("no output: pass -o FILE.wav, or -o - to pipe the sound into a player.")
    targets: list[tuple[str, Path]] = []
    if output == _STDOUT:
        if sys.stdout.isatty():
            fail("standard output is a terminal: pipe it into a player, or pass -o FILE.wav.")
    else:
        _check_format(output)
        targets.append(("-o", Path(output)))
    if plot is not None:
        if plot.suffix.lower() != ".png":
            fail(f"--plot writes PNG: {plot} must end in .png.")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail("--plot needs matplotlib: `pip install matplotlib`.")
        targets.append(("--plot", plot))
    sources = {os.path.realpath(name) for name in inputs if name is not None}
    for name, target in targets:
        if os.path.realpath(target) in sources:
            fail(f"{target} is both to be read and to be written.")
        if target.is_dir():
            fail(f"{name} {target} is a folder: name a file.")
        if os.path.lexists(target) and not overwrite:
            fail(f"{target} is there already; --overwrite replaces it.")
        check_folder(target.parent, f"{name} {target}: the folder")
    return None if output == _STDOUT else Path(output)


def _check_format(output: str) -> None:
    ending = Path(output).suffix.lower()
    if ending not in _FORMATS:
        known = ", ".join(name[1:] for name in _FORMATS)
        fail(f"-o {output}: the ending {ending!r} names no format that can be written ({known}).")
    import soundfile

    if not soundfile.check_format(*_FORMATS[ending]):
        fail(
            f"-o {output}: the libsndfile that is installed ({soundfile.__libsndfile_version__}) cannot write {ending}."
        )


def _check_numbers(temperature: float | None, max_seconds: float | None) -> None:
    if temperature is not None and not 0 <= temperature < math.inf:
        fail(f"--temperature must be a finite number of at least 0, got {temperature}.")
    if max_seconds is not None and not 0 < max_seconds <= 86_400:
        fail(f"--max-seconds must be more than 0 and at most a day, got {max_seconds}.")


def _read_text(text: str | None, file: Path | None) -> str:
    """The text, from where it is to be had; refuses one without a word."""
    from .synthesis_mel_llm import split_sentences

    if (text is None) == (file is None):
        fail(
            "pass either the text (or - for standard input) or --file."
            if file
            else "no text: give it, or - or --file."
        )
    name = "the text"
    try:
        if file is not None:
            name = str(file)
            text = _decode(file.read_bytes())
        elif text == STDIN:
            name = "standard input"
            text = _decode(sys.stdin.buffer.read())
        split_sentences(text)
    except OSError as error:
        fail(error)
    except UnicodeDecodeError as error:
        fail(f"{name} is no UTF-8 text ({error.reason} at byte {error.start}); convert it, e.g. with iconv.")
    except ValueError:
        fail(f"{name} has no word to be spoken.")
    return text


def _decode(data: bytes) -> str:
    has_mark = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # as some editors on Windows write
    return data.decode("utf-16" if has_mark else "utf-8-sig")


def _load(model: str, device: str | None, dtype: str, text: str, options: dict):
    """The model, its processor, and the text without what it cannot speak; what can be wrong with text and voice is told
    before the model is loaded."""
    from transformers.utils import logging

    cleaned: list[str] = []

    def check(processor):
        if not hasattr(processor, "apply_speech_request"):
            raise ValueError(f"{model} is no Mel-LLM: its processor is a {type(processor).__name__}.")
        cleaned.append(processor.clean_speech_text(text))
        if "voice" in options:
            processor.apply_speech_request("a", voice=options["voice"], voice_text=options["voice_text"])

    speaker, processor = load("AutoModelForTextToWaveform", model, device, dtype, check)
    if not hasattr(speaker, "speech_head"):
        fail(f"{model} is no Mel-LLM that speaks but of the type {speaker.config.model_type!r}.")
    if speaker.vocoder is None:
        fail(f"{model} has no vocoder, so it makes no sound.")
    # The command names the sentences itself
    logging.get_logger("mel_llm.speech_generation_mel_llm").setLevel("ERROR")
    return speaker, processor, cleaned[0]


# --- the work -----------------------------------------------------------------------------------------------------------


def _speak(speaker, processor, text: str, options: dict, sink, stream: bool, picture) -> bool:
    """Speaks the text into the sink; False, with a report, if it broke off."""
    from .synthesis_mel_llm import PAUSE_SECONDS, iter_speech, split_sentences

    guarded: list[bool] = []
    num_spoken = 0

    def on_sentence(sentence: str, output) -> None:
        guarded.append(not output.stopped[0])
        if picture is not None:
            picture.add(output.spectrogram[0].cpu(), output.audio[0].cpu(), PAUSE_SECONDS)
        if guarded[-1]:
            seconds = len(output.audio[0]) / speaker.config.sampling_rate
            report(
                f"sentence {len(guarded)} ({_shorten(sentence)}) was ended after {seconds:.1f} s by a limit and not by the "
                "model."
            )

    total = sum(len(sentence) for sentence in split_sentences(text))
    try:
        sentences = iter_speech(
            speaker, processor, text, streamer=sink if stream else None, on_sentence=on_sentence, **options
        )
        with _progress(total) as bar:
            for sentence, audio in sentences:
                if not stream:
                    sink.put(audio)
                num_spoken += 1
                bar.update(min(len(sentence), total - bar.n))
                bar.set_postfix_str(
                    f"{sink.num_samples / speaker.config.sampling_rate:.0f} s of speech", refresh=False
                )
    except BrokenPipeError:  # the player was closed: the command line framework ends the program quietly
        raise
    except KeyboardInterrupt:
        sink.leave(num_spoken)
        raise
    except Exception as error:
        report(f"mel-llm: {'' if isinstance(error, OSError | ValueError) else type(error).__name__ + ': '}{error}")
        sink.leave(num_spoken)
        return False
    if any(guarded):
        report(f"{sum(guarded)} of {len(guarded)} sentences were not ended by the model itself.")
    return True


def _shorten(sentence: str) -> str:
    sentence = sentence.encode("utf-8", "backslashreplace").decode()
    return repr(sentence if len(sentence) <= _LONGEST_NAME else sentence[: _LONGEST_NAME - 3] + "...")


@contextlib.contextmanager
def _progress(total: int) -> Iterator:
    """A progress bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc="speaking", total=total, unit=" letters", file=sys.stderr, disable=None, leave=False) as bar:
        yield bar


def _save_picture(picture, path: Path, *details) -> bool:
    try:
        picture.save(path, *details)
    except Exception as error:  # the sound is safe
        report(f"mel-llm: {path} could not be drawn: {error}")
        return False
    return True


def _pcm(samples):
    """16-bit integers of a waveform `(samples,)`; louder than full scale is cut off."""
    if not samples.isfinite().all():
        raise ValueError("the model wrote NaN or infinity; try --dtype float32.")
    return (samples.clamp(-1.0, 1.0) * 32767.0).round().short().numpy()


class _File:
    """A sound file that grows under a partial name and then appears. Takes samples as a streamer does."""

    def __init__(self, path: Path, sampling_rate: int):
        import soundfile

        self.path, self.sampling_rate, self.num_samples = path, sampling_rate, 0
        self.format, subtype = _FORMATS[path.suffix.lower()]
        try:
            self.partial = self._new_partial()
        except OSError as error:
            fail(f"-o {path} cannot be written: {error}")
        try:
            self.file = soundfile.SoundFile(self.partial, "w", sampling_rate, 1, subtype, format=self.format)
        except (RuntimeError, ValueError) as error:
            os.unlink(self.partial)
            fail(f"-o {path} cannot be written at {sampling_rate} Hz: {getattr(error, 'error_string', error)}")

    def _new_partial(self) -> Path:
        """Another run may be at work on the same target, or have been killed."""
        for number in range(1, 1000):
            middle = ".partial" if number == 1 else f".partial-{number}"
            partial = self.path.with_name(f"{self.path.stem}{middle}{self.path.suffix}")
            with contextlib.suppress(FileExistsError):
                os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                return partial
        raise OSError("there are too many partial files beside it; remove them.")

    def put(self, samples) -> None:
        if self.format == "WAV" and 2 * (self.num_samples + len(samples)) > _MAX_WAV_BYTES:
            raise ValueError("a WAV file has at most 4 GB: write flac or ogg, or speak the text in parts.")
        for block in samples.split(_WRITE_SAMPLES):
            self.file.write(_pcm(block))
        self.file.flush()
        self.num_samples += len(samples)

    def end(self) -> None:
        pass

    def keep(self, overwrite: bool) -> bool:
        """The file is complete."""
        try:
            self.file.close()
            if os.path.lexists(self.path) and not overwrite:  # it came while this one was being written
                report(f"mel-llm: {self.path} is there by now; the speech is in {self.partial}.")
                return False
            os.replace(self.partial, self.path)
        except (OSError, RuntimeError) as error:
            report(f"mel-llm: {self.path}: {error}; what was written is in {self.partial}.")
            return False
        return True

    def leave(self, num_sentences: int | None = None) -> None:
        """The run broke off: what was spoken stays under the partial name, if there is anything."""
        with contextlib.suppress(OSError, RuntimeError):
            self.file.close()
        if self.num_samples == 0:
            os.unlink(self.partial)
            return
        seconds = self.num_samples / self.sampling_rate
        if num_sentences is None:
            report(f"mel-llm: what was made ({seconds:.1f} s of sound) is in {self.partial}.")
        else:
            report(f"mel-llm: the first {num_sentences} sentences ({seconds:.1f} s of sound) are in {self.partial}.")

    def drop(self) -> None:
        self.file.close()
        os.unlink(self.partial)


class _Pipe:
    """A WAV of unknown length on standard output, as players and converters read it."""

    def __init__(self, sampling_rate: int):
        self.num_samples, self.file = 0, sys.stdout.buffer
        self.header = b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEfmt "
        self.header += struct.pack("<IHHIIHH", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
        self.header += b"data" + struct.pack("<I", 0xFFFFFFFF)

    def put(self, samples) -> None:
        header, self.header = self.header, b""  # only when there is sound: a run that fails writes nothing
        self.file.write(header + _pcm(samples).astype("<i2").tobytes())
        self.file.flush()
        self.num_samples += len(samples)

    def end(self) -> None:
        pass

    def keep(self, overwrite: bool) -> bool:
        return True

    def leave(self, num_sentences: int | None = None) -> None:
        report(f"mel-llm: the sound broke off{'' if num_sentences is None else f' behind {num_sentences} sentences'}.")

    def drop(self) -> None:
        pass
