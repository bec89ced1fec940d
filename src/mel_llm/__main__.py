"""`python -m mel_llm PROGRAM ...` runs any program of transformers with Mel-LLM loaded.

transformers has no entry points for plugins, so something must import this package before a script that knows nothing
of it looks for its classes:

    python -m mel_llm run_speech_recognition_seq2seq.py --model_name_or_path ./my-mel-llm ...
    python -m mel_llm serve ./my-mel-llm

A file, or a path that ends in `.py`, is run as a script; `-m NAME` runs a module; `transcribe`, `speak` and the other commands of
`mel-llm` are run as that does, where its folder is not on the PATH; anything else is a command of the `transformers` command
line.
"""

import os
import runpy
import sys

import mel_llm  # noqa: F401  (importing it registers the classes)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            sys.exit("python -m mel_llm -m: name the module to run.")
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0].endswith(".py") or os.path.isfile(arguments[0]):
        script = arguments[0]
        if not os.path.isfile(script):
            sys.exit(f"python -m mel_llm: there is no script {script!r}.")
        sys.argv = arguments
        # As `python script.py` does, so that the script finds its neighbours
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")
    else:
        from typer.main import get_command

        from .cli import app

        if arguments[0] in get_command(app).commands:
            sys.argv = ["mel-llm", *arguments]
            return app(prog_name="python -m mel_llm")
        from transformers.cli.transformers import main as transformers_main

        sys.argv = ["transformers", *arguments]
        transformers_main()


if __name__ == "__main__":
    main()
