"""Makes the corpora that this project trains on, and checks corpora.

    python scripts/prepare_data.py real --output_dir speech --languages en es fr it ru
    python scripts/prepare_data.py synthetic --texts sentences.tsv --output_dir speech/synth-extra --engines flite espeak \\
        --hours 2
    python scripts/prepare_data.py spliced --corpora speech/asterisk-en --model hub_cards/mel-llm-small-en \\
        --output_dir speech/spliced-asterisk --hours 2
    python scripts/prepare_data.py check speech

`real` unpacks recordings from Debian's packages, `synthetic` has texts spoken, `spliced` puts words of some clips behind words
of others, `check` reads a folder with corpora. See docs/data.md. Nothing is overwritten, and what was interrupted goes on when
the same command is given again (`spliced`, which takes minutes, begins anew).
"""

import argparse
import logging
import sys
from pathlib import Path

from speech_data.asterisk import LANGUAGES, prepare_asterisk
from speech_data.check import check_corpus, find_corpora, format_table
from speech_data.engines import ENGINES, EngineOptions
from speech_data.g722 import find_g722_decoder
from speech_data.splicing import make_spliced
from speech_data.synthesis import Synthesis, SynthesisPlan, available_engines, choose_voices
from speech_data.texts import load_sentences

from mel_llm.script_errors import interruption_goes_on, told_in_a_line


logger = logging.getLogger("prepare_data")


class _Parser(argparse.ArgumentParser):
    """Hyphens and underscores in names are the same, as in the other scripts."""

    def add_argument(self, *names, **kwargs):
        hyphens = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *hyphens, **kwargs)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    real = commands.add_parser("real", help="Recordings with transcripts, from Debian's packages.")
    real.add_argument(
        "--output_dir", type=Path, required=True, help="Gets a folder asterisk-LANGUAGE for each language."
    )
    real.add_argument("--languages", nargs="+", choices=LANGUAGES, default=["en"], help="Default: en.")
    real.add_argument(
        "--debs",
        type=Path,
        help="Folder with asterisk-core-sounds-XX_*.deb and asterisk-core-sounds-XX-g722_*.deb. Without it, they are "
        "downloaded by apt-get.",
    )
    real.add_argument("--format", choices=["flac", "ogg", "wav"], default="flac", help="ogg is Opus. Default: flac.")
    real.set_defaults(run=run_real)

    synthetic = commands.add_parser("synthetic", help="Texts spoken by synthesisers that are installed.")
    synthetic.add_argument("--texts", type=Path, required=True, help=".tsv with a column text, or a sentence a line.")
    synthetic.add_argument("--output_dir", type=Path, required=True, help="A new folder, or one to go on with.")
    synthetic.add_argument(
        "--engines", nargs="+", default=list(ENGINES), help=f"{', '.join(ENGINES)} or python:module.function."
    )
    synthetic.add_argument("--hours", type=float, required=True, help="How much there shall be, in all.")
    synthetic.add_argument(
        "--voices", nargs="+", default=[], help="VOICE or ENGINE:VOICE, * for any letters. Default: every voice."
    )
    synthetic.add_argument(
        "--speeds", type=float, nargs=2, default=[0.9, 1.1], metavar=("MIN", "MAX"), help="Default: 0.9 1.1."
    )
    synthetic.add_argument("--seed", type=int, default=0, help="Of who says what at which speed. Default: 0.")
    synthetic.add_argument("--workers", type=int, default=1, help="Processes that speak. Default: 1.")
    synthetic.add_argument(
        "--format", choices=["flac", "ogg", "wav"], default="ogg", help="ogg is Opus. Default: ogg."
    )
    synthetic.add_argument(
        "--piper_voices", type=Path, nargs="+", default=[], help="NAME.onnx, NAME.onnx.json beside."
    )
    synthetic.add_argument(
        "--piper_variation",
        type=float,
        default=1.0,
        help="How much of the chance in Piper's voices is left; with 0 a text is always said in the same way. Default: 1.",
    )
    synthetic.add_argument("--kokoro_model", type=Path, help="Kokoro-82M v1.0 as ONNX.")
    synthetic.add_argument("--kokoro_voices", type=Path, help="Folder with VOICE.bin, or one .npz.")
    synthetic.add_argument(
        "--kokoro_mixtures", type=int, default=0, help="New voices, mixed of two of Kokoro's each. Default: 0."
    )
    synthetic.set_defaults(run=run_synthetic)

    spliced = commands.add_parser(
        "spliced", help="Words of some clips behind words of others: sentences that nobody said."
    )
    spliced.add_argument("--corpora", type=Path, nargs="+", required=True, help="Whose train splits are cut.")
    spliced.add_argument(
        "--model",
        required=True,
        help="A Mel-LLM with a CTC head, to find words with: hub_cards/mel-llm-small-en, for English.",
    )
    spliced.add_argument("--output_dir", type=Path, required=True, help="A new folder.")
    spliced.add_argument("--hours", type=float, required=True, help="How much there shall be.")
    spliced.add_argument(
        "--seconds", type=float, nargs=2, default=[2.0, 12.0], metavar=("MIN", "MAX"), help="Of a clip. Default: 2 12."
    )
    spliced.add_argument("--seed", type=int, default=0, help="Of what goes together. Default: 0.")
    spliced.add_argument(
        "--format",
        choices=["flac", "ogg", "wav"],
        default="flac",
        help="ogg is Opus, which takes its time. Default: flac.",
    )
    spliced.set_defaults(run=run_spliced)

    check = commands.add_parser("check", help="What is in a corpus, and what is wrong with it.")
    check.add_argument("folders", type=Path, nargs="+", help="Corpora, or folders of corpora.")
    check.add_argument("--max_faults", type=int, default=20, help="How many are told for each split. Default: 20.")
    check.set_defaults(run=run_check)
    return parser


def run_real(arguments: argparse.Namespace) -> int:
    decode = find_g722_decoder()
    for language in arguments.languages:
        target = arguments.output_dir / f"asterisk-{language}"
        if target.exists():  # a corpus appears whole, so there is nothing to go on with
            logger.info(f"{target} is there already and stays as it is.")
            continue
        prepare_asterisk(language, arguments.output_dir, decode, arguments.debs, f".{arguments.format}")
    return 0


def check_hours(hours: float) -> None:
    if not 0 < hours < float("inf"):
        raise ValueError(f"--hours must be more than 0, got {hours}.")


def run_synthetic(arguments: argparse.Namespace) -> int:
    check_hours(arguments.hours)
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}.")
    if not 0 <= arguments.piper_variation <= 2:
        raise ValueError(f"--piper_variation must be from 0 to 2, got {arguments.piper_variation}.")
    sentences, digest = load_sentences(arguments.texts)
    options = EngineOptions(
        piper_voices=tuple(arguments.piper_voices),
        piper_variation=arguments.piper_variation,
        kokoro_model=arguments.kokoro_model,
        kokoro_voices=arguments.kokoro_voices,
        kokoro_mixtures=arguments.kokoro_mixtures,
    )
    engines = available_engines(arguments.engines, options)
    voices = choose_voices(engines, arguments.voices)
    plan = SynthesisPlan(tuple(sentences), tuple(voices), arguments.seed, *arguments.speeds)
    settings = {"texts": digest}
    if arguments.piper_variation != 1:  # only then, so that folders which were begun without it go on
        settings["piper_variation"] = arguments.piper_variation
    synthesis = Synthesis(plan, arguments.output_dir, settings, f".{arguments.format}")
    synthesis.run(arguments.hours, engines, options, arguments.workers)
    return 0


def run_spliced(arguments: argparse.Namespace) -> int:
    check_hours(arguments.hours)
    shortest, longest = arguments.seconds
    if not 0 < shortest <= longest < float("inf"):
        raise ValueError(f"--seconds must be two numbers above 0, the lesser one first, got {shortest} {longest}.")
    make_spliced(
        arguments.corpora,
        arguments.output_dir,
        arguments.model,
        arguments.hours,
        (shortest, longest),
        arguments.seed,
        f".{arguments.format}",
    )
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    reports = [
        report for folder in arguments.folders for corpus in find_corpora(folder) for report in check_corpus(corpus)
    ]
    print(format_table(reports))
    num_faults = 0
    for report in reports:
        num_faults += len(report.faults)
        for fault in report.faults[: arguments.max_faults]:
            print(f"{report.corpus}: {fault}")
        if len(report.faults) > arguments.max_faults:
            print(f"{report.corpus}/{report.split}: and {len(report.faults) - arguments.max_faults} more")
    print("Nothing is wrong." if num_faults == 0 else f"{num_faults} faults.")
    return 0 if num_faults == 0 else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = build_parser().parse_args()
    with told_in_a_line("prepare_data.py"), interruption_goes_on(logger):
        sys.exit(arguments.run(arguments))
