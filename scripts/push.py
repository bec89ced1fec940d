"""Checks a folder with a model and its card, and uploads it to the Hub.

    python scripts/push.py hub_cards/mel-llm-small-en --repo ORG/mel-llm-small-en --dry-run
    python scripts/push.py hub_cards/mel-llm-small-en --repo ORG/mel-llm-small-en --private --with-code

The folder is what the repository will be: see hub_cards/README.md. Before anything is uploaded, its files and its
card's metadata are checked, the model is loaded, transcribes a recording and, if it has a speech head, speaks. One commit
brings all files; weights in the repository that the folder does not have go with it. HF_ENDPOINT and HF_TOKEN are
respected.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

import mel_llm
from mel_llm import export_remote_code
from mel_llm.model_card import CARD
from mel_llm.publishing import MAX_FILE_BYTES, file_problems, repository_files, try_model, try_remote_code
from mel_llm.script_errors import told_in_a_line
from mel_llm.sharing_mel_llm import PROCESSOR_FILES, WEIGHT_FILES, prepare_repo, push_folder


RECORDING = Path(__file__).resolve().parents[1] / "demo_clips" / "en_hello-world.flac"


class Refused(Exception):
    """What the user is told in one line."""


# Files that stay behind: all that are hidden, but for the results in .eval_results, which the Hub shows
HIDDEN = (".[!e]*", ".e[!v]*")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="push.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder that the repository is to hold")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="the repository; it is made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="the branch; it is made if need be (main by default)")
    parser.add_argument("--message", default=None, help="the commit's title")
    parser.add_argument("--dry-run", action="store_true", help="check everything, upload nothing")
    parser.add_argument(
        "--with-code", action="store_true", help="add the code, for trust_remote_code=True without the package"
    )
    parser.add_argument("--recording", type=Path, default=RECORDING, help="speech that the model transcribes first")
    parser.add_argument(
        "--max-file-mb", type=float, default=MAX_FILE_BYTES / 1e6, help="refuse larger files (the Hub's limit)"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="PATTERN",
        help="a file that models do not usually have and this one is to have, such as losses.csv or 'figures/*.pdf'; "
        "may be repeated",
    )
    return parser.parse_args(argv)


def check(folder: Path, recording: Path, max_file_bytes: int, also: Sequence[str] = ()) -> dict:
    """Refuses a folder that is not fit to be published; says what the model did."""
    problems = file_problems(folder, max_file_bytes, also)
    if problems:
        raise Refused("\n  ".join([f"{folder} cannot be published as it is:", *problems]))
    if not recording.is_file():
        raise Refused(f"--recording: there is no file {recording}.")
    return try_model(folder, recording)


def add_code(folder: Path, staged: Path) -> Path:
    """A copy of the folder with the code in it; weights are linked, not copied, where the disk allows it."""

    def copy(source, target):
        if source.endswith(".safetensors"):
            try:
                return os.link(source, target)
            except OSError:
                pass
        return shutil.copy2(source, target)

    target = staged / folder.resolve().name
    shutil.copytree(folder, target, copy_function=copy, ignore=shutil.ignore_patterns(*HIDDEN))
    export_remote_code(target)
    return target


def upload(folder: Path, arguments: argparse.Namespace) -> str:
    """Uploads in one commit and returns where it is."""
    try:
        repo_id = prepare_repo(arguments.repo, private=arguments.private or None, revision=arguments.revision)
        commit = push_folder(
            folder,
            repo_id,
            revision=arguments.revision,
            commit_message=arguments.message or f"Upload {folder.resolve().name} (mel_llm {mel_llm.__version__})",
            ignore_patterns=[*HIDDEN, "*/.*"],
            delete_patterns=[*WEIGHT_FILES, *PROCESSOR_FILES],
        )
    except OfflineModeIsEnabled:
        raise Refused("HF_HUB_OFFLINE is set: unset it to upload.") from None
    except Exception as error:  # the Hub refuses, or whatever the HTTP client of the day raises; a bug says its kind
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, HfHubHTTPError | ValueError | ConnectionError) else f"{type(error).__name__}: "
        raise Refused(f"{constants.ENDPOINT}: {kind}{reason}") from error
    tell_leftovers(HfApi(), repo_id, folder, arguments.revision)
    return getattr(commit, "commit_url", None) or f"{constants.ENDPOINT}/{repo_id}"


def tell_leftovers(api: HfApi, repo_id: str, folder: Path, revision: str | None) -> None:
    """Names files of the repository that the folder does not have: they stay until somebody deletes them."""
    try:
        there = set(api.list_repo_files(repo_id, revision=revision))
    except Exception:  # the upload is done; this is a courtesy
        return
    here = {path.relative_to(folder).as_posix() for path in repository_files(folder)}
    left = sorted(there - here - {".gitattributes"})
    if left:
        print(f"Also in the repository, and not in {folder.name}: {', '.join(left[:10])}", file=sys.stderr)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        validate_repo_id(arguments.repo)
    except HFValidationError as error:
        raise Refused(f"--repo: {error}") from None
    if arguments.repo.count("/") != 1:
        raise Refused(f"--repo must be ORG/NAME, got {arguments.repo!r}.")
    if not arguments.dry_run and get_token() is None:
        raise Refused("there is no token: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    folder = arguments.folder
    did = check(folder, arguments.recording, round(arguments.max_file_mb * 1e6), arguments.also)
    print(f"{folder}: {did['model_class']}; hears {arguments.recording.name} as {did['transcript']!r}", end="")
    print(f"; speaks ({did['seconds']:.2f} s)" if "seconds" in did else "")
    with contextlib.ExitStack() as stack:
        if arguments.with_code:
            staged = stack.enter_context(tempfile.TemporaryDirectory(prefix=".push-", dir=folder.resolve().parent))
            folder = add_code(folder, Path(staged))
            try_remote_code(folder, arguments.recording)
            print("Runs with its own code, too (trust_remote_code=True).")
            if "trust_remote_code" not in (folder / CARD).read_text(encoding="utf-8"):
                print(f"{CARD} does not tell of it: create_model_card(..., with_code=True).", file=sys.stderr)
        files = repository_files(folder)
        size = sum(path.stat().st_size for path in files)
        for path in files:
            print(f"  {path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")
        where = f"{constants.ENDPOINT}/{arguments.repo}" + (f" ({arguments.revision})" if arguments.revision else "")
        if arguments.dry_run:
            print(f"Dry run: {len(files)} files, {size / 1e6:,.1f} MB would go to {where}.")
            return
        url = upload(folder, arguments)
    print(f"Uploaded {len(files)} files, {size / 1e6:,.1f} MB to {where}: {url}")


if __name__ == "__main__":
    try:
        with told_in_a_line("push.py", (Refused, OSError, ValueError)):
            main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("push.py: interrupted; what was not committed is not in the repository.")
