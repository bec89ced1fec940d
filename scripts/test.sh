#!/usr/bin/env bash
# Sets everything up (the first time: a few minutes, about 5 GB), checks the style and runs the tests.
#
#   scripts/test.sh [--oldest] [arguments of pytest]
#
#   --oldest                                 test beside the oldest supported transformers (in .venv-oldest)
#   scripts/test.sh -k processing            some tests only
#   scripts/test.sh -n 0 --pdb               one process, with a debugger
#   PYTHON=python3.12 scripts/test.sh        choose the interpreter
#
# The tests run offline.
set -euo pipefail

# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"

if [[ "${1:-}" == "--oldest" ]]; then
    shift
    VENV="$REPO/.venv-oldest"
    # `transformers serve` of that time decodes audio with librosa.
    prepare_venv "$VENV" "$REPO/constraints-oldest.txt" librosa
elif [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 0
else
    VENV="$REPO/.venv"
    prepare_venv "$VENV" "$REPO/constraints.txt"
fi
python="$VENV/bin/python"
cd -- "$REPO"

# Nothing here may reach the network, read the user's cache, or leave anything there.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1
export HF_HOME="$VENV/.huggingface"
unset HF_HUB_CACHE HF_DATASETS_CACHE HF_MODULES_CACHE TRANSFORMERS_CACHE HF_TOKEN HF_ENDPOINT

# One process per core, one thread per process: the models are tiny, and torch's threads in several processes on the same
# cores slow each other down many times over. loadfile keeps a module's fixtures in one process;
# conftest.py says which modules begin.
workers=$("$python" -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# A finding of ruff fails the run, but only after the tests have had their say.
style=0
"$python" -m ruff check src modeling_tests scripts || style=1
"$python" -m ruff format --check src modeling_tests scripts || style=1

tests=0
"$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder --durations 30 "$@" || tests=$?

if [[ "$style" != 0 ]]; then
    say "error: ruff has findings (above, before the tests)."
    [[ "$tests" != 0 ]] || tests=1
fi
exit "$tests"
