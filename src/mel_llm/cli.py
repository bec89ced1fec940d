"""The `mel-llm` command."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .audio_utils_mel_llm import AUDIO_EXTENSIONS
from .cli_common import STDIN, check_folder, fail, give_usual_rights, interruptible, load, report
from .cli_continue import continue_speech
from .cli_demo import demo
from .cli_serve import serve_speech
from .cli_speak import speak


app = typer.Typer(help="Language models that read and write spectrograms.", no_args_is_help=True)


@app.callback()
def main() -> None:
    pass


@app.command()
def transcribe(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Audio files (wav, flac, ogg, opus, mp3, aiff), folders, which are searched for such files in all their "
            "subfolders, URLs, or - for standard input."
        ),
    ],
    model: Annotated[str | None, typer.Option(envvar="MEL_LLM_MODEL", help="Folder or Hub name of a Mel-LLM.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="A line for each segment, with its times.")] = False,
    txt: Annotated[bool, typer.Option("--txt", help="Write text (the default).")] = False,
    srt: Annotated[bool, typer.Option("--srt", help="Write SubRip subtitles.")] = False,
    vtt: Annotated[bool, typer.Option("--vtt", help="Write WebVTT subtitles.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write JSON, an object on a line for each file.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write NAME.txt, .srt, .vtt, .json here instead of to standard output.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    language: Annotated[str | None, typer.Option(help="Language spoken, by name or two-letter code.")] = None,
    prompt: Annotated[str | None, typer.Option(help="More to tell the model, such as names to expect.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces of a file that are transcribed together.")] = 8,
    max_segment_seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Longest piece that a file is cut into; the model's by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write the transcript of each file, however long.

    A file that cannot be read is reported and the rest goes on. The exit status is 0 if all went well, 1 if a file
    failed or broke off, 2 if nothing could be done.
    """
    formats = [name for name, asked in (("txt", txt), ("srt", srt), ("vtt", vtt), ("json", json)) if asked] or ["txt"]
    with interruptible():
        inputs, failures = _find_inputs(files)
        _check_output(inputs, formats, timestamps, output_dir)
        if model is None:
            fail("no model: pass --model FOLDER, or set MEL_LLM_MODEL.")
        for failure in failures:
            report(failure)
        num_failed = len(failures)
        if output_dir is not None:
            waiting = [entry for entry in inputs if overwrite or not _existing(entry, formats, output_dir)]
            for entry in inputs:
                if entry not in waiting:
                    report(f"{_existing(entry, formats, output_dir)} is there already; --overwrite replaces it.")
            num_failed += len(inputs) - len(waiting)
            inputs = waiting
        if inputs:
            options = {
                "language": language,
                "prompt": prompt,
                "batch_size": batch_size,
                "max_segment_seconds": max_segment_seconds,
            }
            recognise = _load(model, device, dtype, options)
            writer = _Writer(formats, timestamps, output_dir, with_names=len(inputs) + num_failed > 1)
            num_failed += sum(not _transcribe_one(entry, recognise, writer) for entry in inputs)
    if num_failed:
        raise typer.Exit(1)


app.command()(speak)
app.command("continue")(continue_speech)
app.command()(demo)
app.command()(serve_speech)


@dataclass(frozen=True)
class _Input:
    name: str  # as it is reported
    output: Path  # relative to the output folder, without an ending


# --- before any work ----------------------------------------------------------------------------------------------------


def _find_inputs(names: list[str]) -> tuple[list[_Input], list[str]]:
    """What there is to transcribe, in the order of the arguments and sorted within folders, and what went wrong."""
    inputs, failures = [], []
    for name in names:
        if name == STDIN:
            if sys.stdin is None or sys.stdin.isatty():
                fail("standard input is a terminal: pipe audio into it.")
            inputs.append(_Input(name, Path("stdin")))
        elif name.startswith(("http://", "https://")):
            inputs.append(_Input(name, _without_ending(Path(name.split("?")[0].split("#")[0].rstrip("/")).name)))
        elif os.path.isdir(name):
            found = _audio_files(name, failures)
            if not found:
                failures.append(f"{name}: no audio files in this folder ({', '.join(AUDIO_EXTENSIONS)}).")
            inputs += [_Input(os.path.join(name, path), _without_ending(path)) for path in found]
        else:
            inputs.append(_Input(name, _without_ending(os.path.basename(name))))
    if names.count(STDIN) > 1:
        fail("standard input can be read only once.")
    return inputs, failures


def _audio_files(folder: str, failures: list[str]) -> list[str]:
    """Paths relative to the folder, sorted, but for hidden files."""
    paths = []
    for root, _, names in os.walk(folder, onerror=lambda error: failures.append(f"{error.filename}: {error}")):
        for name in names:
            if name.lower().endswith(AUDIO_EXTENSIONS) and not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(root, name), folder))
    return sorted(paths)


def _without_ending(path: str) -> Path:
    stem, ending = os.path.splitext(path)
    return Path(stem if ending.lower() in AUDIO_EXTENSIONS else path)


def _check_output(inputs: list[_Input], formats: list[str], timestamps: bool, output_dir: Path | None) -> None:
    """Refuses what would mix or lose transcripts, before any work is done."""
    if timestamps and "txt" not in formats:
        fail("--timestamps is for text; the other formats have times in them.")
    if output_dir is None:
        if len(formats) > 1:
            fail(f"several formats ({', '.join(formats)}) need --output-dir.")
        if len(inputs) > 1 and formats[0] in ("srt", "vtt"):
            fail(f"--{formats[0]} for several files needs --output-dir.")
        return
    if output_dir.exists() and not output_dir.is_dir():
        fail(f"--output-dir {output_dir} is no folder.")
    sources = {os.path.realpath(entry.name) for entry in inputs}
    taken: dict[Path, str] = {}
    for entry in inputs:
        if entry.output in taken:
            fail(
                f"{taken[entry.output]} and {entry.name} would both be written to "
                f"{output_dir / entry.output}.{formats[0]}: transcribe them into different folders."
            )
        taken[entry.output] = entry.name
        for target in _targets(entry, formats, output_dir):
            if os.path.realpath(target) in sources:
                fail(f"{target} is both to be read and to be written.")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output-dir {output_dir} cannot be written to: {error}")
    check_folder(output_dir, "--output-dir")


def _targets(entry: _Input, formats: list[str], output_dir: Path) -> list[Path]:
    return [output_dir / entry.output.with_name(f"{entry.output.name}.{name}") for name in formats]


def _existing(entry: _Input, formats: list[str], output_dir: Path) -> Path | None:
    return next((target for target in _targets(entry, formats, output_dir) if os.path.lexists(target)), None)


# --- the work -----------------------------------------------------------------------------------------------------------


def _load(model: str, device: str | None, dtype: str, options: dict) -> Callable:
    """Loads the model. Returns `recognise(audio, on_segment, on_progress) -> Transcription`."""
    # Imported late: `mel-llm --help` need not wait for torch
    from transformers.utils import logging

    import mel_llm

    def check(processor):
        if options["language"] is not None or options["prompt"] is not None:  # before any file is touched
            processor.apply_transcription_request(
                [None], language=options["language"], prompt=options["prompt"], tokenize=False
            )

    recogniser, processor = load("AutoModelForSpeechSeq2Seq", model, device, dtype, check)
    if not hasattr(recogniser, "transcribe"):  # Whisper, say, which the same Auto class loads
        fail(f"{model} is no Mel-LLM but of the type {recogniser.config.model_type!r}.")

    def recognise(audio, on_segment, on_progress):
        logger = logging.get_logger("mel_llm.transcription_mel_llm")
        level = logger.level
        logger.setLevel("ERROR")  # the command reports a truncated file itself
        try:
            return mel_llm.transcribe(
                recogniser, processor, audio, on_segment=on_segment, on_progress=on_progress, **options
            )
        finally:
            logger.setLevel(level)

    return recognise


def _transcribe_one(entry: _Input, recognise: Callable, writer: "_Writer") -> bool:
    """Transcribes and writes one input; False, with a report, if it failed or broke off."""
    try:
        source = sys.stdin.buffer if entry.name == STDIN else entry.name
        with _progress(entry.name) as on_progress:
            transcription = recognise(source, lambda segment: writer.segment(entry, segment), on_progress)
        writer.finish(entry, transcription)
    except BrokenPipeError:  # nobody reads on, as with `| head`: the command line framework ends the program quietly
        raise
    except (OSError, ValueError) as error:
        report(f"{entry.name}: {error}")
        return False
    except Exception as error:  # out of memory, say; a night's work goes on with the next file
        report(f"{entry.name}: {type(error).__name__}: {error}")
        return False
    if transcription.truncated:
        report(f"{entry.name}: {transcription.warning} What precedes was transcribed.")
    return not transcription.truncated


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error, if that is a terminal. Gives a function to tell the seconds that are done."""
    from tqdm import tqdm

    with tqdm(desc=name, total=_duration(name), unit=" s", file=sys.stderr, disable=None, leave=False) as bar:
        yield lambda seconds: bar.update(round(seconds) - bar.n)


def _duration(name: str) -> int | None:
    """Seconds of a file, where they can be told without reading it."""
    import soundfile

    try:
        return round(soundfile.info(name).duration) if os.path.isfile(name) and sys.stderr.isatty() else None
    except (OSError, RuntimeError, TypeError):  # the transcription will say what is wrong
        return None


class _Writer:
    """Puts transcripts onto standard output or into files."""

    def __init__(self, formats: list[str], timestamps: bool, output_dir: Path | None, with_names: bool):
        self.formats, self.timestamps, self.output_dir, self.with_names = formats, timestamps, output_dir, with_names

    def segment(self, entry: _Input, segment) -> None:
        """Prints a segment as soon as it is known, if that is what was asked for."""
        from .subtitles import format_segment

        if self.timestamps and self.output_dir is None:
            self._print(entry, format_segment(segment))

    def finish(self, entry: _Input, transcription) -> None:
        from . import subtitles

        makers = {
            "txt": lambda: subtitles.to_txt(transcription, self.timestamps),
            "srt": lambda: subtitles.to_srt(transcription),
            "vtt": lambda: subtitles.to_vtt(transcription),
            "json": lambda: subtitles.to_json(
                transcription, indent=None if self.output_dir is None else 2, file=entry.name
            ),
        }
        if self.output_dir is not None:
            for name, target in zip(self.formats, _targets(entry, self.formats, self.output_dir), strict=True):
                _write_whole(target, makers[name]())
        elif self.formats == ["txt"]:
            if not self.timestamps:
                self._print(entry, transcription.text)
        else:
            _print(makers[self.formats[0]]().rstrip("\n"))

    def _print(self, entry: _Input, text: str) -> None:
        _print(f"{entry.name}: {text}" if self.with_names else text)


def _print(text: str) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):  # a progress bar makes room
        encoding = sys.stdout.encoding or "utf-8"
        # A terminal that lacks a letter, or a file name that is no text, must not cost the transcript
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        give_usual_rights(partial)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


if __name__ == "__main__":
    app()
