#!/usr/bin/env bash
# Sets everything up (the first time: a few minutes, about 5 GB) and runs the demo. Arguments go to scripts/demo.py.
#
#   scripts/demo.sh [--help | arguments of demo.py]
#   PYTHON=python3.12 scripts/demo.sh        choose the interpreter
set -euo pipefail

# shellcheck source=scripts/_setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_setup.sh"

VENV="$REPO/.venv"
prepare_venv "$VENV" "$REPO/constraints.txt"

export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # it forks workers, and warns about that
exec "$VENV/bin/python" "$REPO/scripts/demo.py" "$@"
