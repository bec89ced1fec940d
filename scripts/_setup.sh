# shellcheck shell=bash
# Sourced by demo.sh and test.sh. Everything they need is set up here, on a machine that has only Python and pip:
#
#   prepare_venv VENV CONSTRAINTS [PACKAGE ...]
#
# makes the virtual environment VENV (or reuses it) and installs this repository in editable mode with the extras below,
# at the versions that CONSTRAINTS pins. A stamp inside VENV records what was installed; while it matches, a second call
# does nothing. Variables:
#
#   PYTHON   the interpreter to make the environment with (default: the first suitable python3 on PATH)

REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
EXTRAS="train,dev"

# The lock pins releases that need at least 3.11 and publish no wheels beyond 3.14. The package itself accepts 3.10.
PYTHON_CHECK='import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
PYTHON_VERSIONS="3.11 to 3.14"

# Settings that would make pip or Python look outside the environment
unset PYTHONHOME PYTHONPATH
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}"

say() { printf '%s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# Prints an interpreter that fits, or explains what is missing.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        command -v -- "$PYTHON" >/dev/null 2>&1 || die "PYTHON=$PYTHON: no such command."
        "$PYTHON" -c "$PYTHON_CHECK" >/dev/null 2>&1 ||
            die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 | head -n 1 || true); Python $PYTHON_VERSIONS is needed."
        command -v -- "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        # Running it, not only finding it: version managers put names on PATH that do not start.
        if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$PYTHON_CHECK" >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    if command -v python3 >/dev/null 2>&1; then
        die "python3 is $(python3 --version 2>&1 | head -n 1 || true); Python $PYTHON_VERSIONS is needed." \
            "Install one, or name it: PYTHON=/path/to/python3.11 $0"
    fi
    die "no Python found. Install Python $PYTHON_VERSIONS, or name it: PYTHON=/path/to/python3.11 $0"
}

# What the stamp must hold: a digest of everything that decides the outcome of the install. The repository's path is part
# of it, because an editable install points there and a moved or copied checkout would import the old one.
wanted_stamp() {
    "$1/bin/python" -I - "$REPO/pyproject.toml" "$2" "$REPO" "$EXTRAS" "${@:3}" <<'PY'
import hashlib
import sys

digest = hashlib.sha256()
for path in sys.argv[1:3]:
    with open(path, "rb") as file:
        digest.update(file.read() + b"\0")
digest.update("\0".join([sys.version, *sys.argv[3:]]).encode())
print(digest.hexdigest())
PY
}

# The environment's own pip, or (where Python came without ensurepip, as on Debian without python3-venv) the
# interpreter's pip aimed at the environment.
venv_pip() {
    local venv=$1 python
    shift
    if "$venv/bin/python" -I -c 'import pip' >/dev/null 2>&1; then
        "$venv/bin/python" -I -m pip "$@"
    else
        python=$(find_python)
        "$python" -m pip --python "$venv/bin/python" "$@"
    fi
}

make_venv() {
    local venv=$1 python=$2
    say "Making $venv with $("$python" --version 2>&1) ($python) ..."
    rm -rf -- "$venv"
    mkdir -p -- "$venv"
    : >"$venv/.mel-llm-installing"
    if ! "$python" -m venv "$venv" >"$venv/.mel-llm-venv.log" 2>&1; then
        # Python came without ensurepip: an environment without pip does, if the interpreter's own pip can fill it.
        if ! { "$python" -m venv --without-pip "$venv" && "$python" -m pip --python "$venv/bin/python" --version; } \
            >>"$venv/.mel-llm-venv.log" 2>&1; then
            cat "$venv/.mel-llm-venv.log" >&2
            die "$python could not make a virtual environment with pip (on Debian or Ubuntu: install python3-venv)."
        fi
    fi
    rm -f -- "$venv/.mel-llm-venv.log"
}

install_into() {
    local venv=$1 constraints=$2 attempt interrupted=""
    shift 2
    rm -f -- "$venv/.mel-llm-stamp"
    # While this marker exists the environment may hold half a package, which pip would take for a whole one. If the
    # install is killed, the marker stays, and the next call starts from an empty environment (downloads are cached).
    : >"$venv/.mel-llm-installing"
    trap 'interrupted=yes' INT # pip catches Ctrl-C and ends as if it had only failed
    # -qq: errors only. The warnings are about the configuration of pip on this machine, a line for each package.
    say "Installing the dependencies into $venv (about 5 GB; a few minutes the first time) ..."
    for attempt in 1 2 3; do
        if venv_pip "$venv" install -qq --progress-bar off -c "$constraints" -e "${REPO}[$EXTRAS]" "$@"; then
            break
        fi
        [[ -z "$interrupted" ]] || die "interrupted; the next run starts over."
        if [[ "$attempt" == 3 ]]; then
            # pip ended in its own time, so it left whole packages only.
            rm -f -- "$venv/.mel-llm-installing"
            die "pip could not install the dependencies (see above)."
        fi
        say "pip failed; trying again (a download may have been cut off) ..."
        sleep 3
    done
    [[ -z "$interrupted" ]] || die "interrupted; the next run starts over."
    wanted_stamp "$venv" "$constraints" "$@" >"$venv/.mel-llm-stamp.new"
    mv -f -- "$venv/.mel-llm-stamp.new" "$venv/.mel-llm-stamp"
    rm -f -- "$venv/.mel-llm-installing"
    trap - INT
}

# transformers' ASR pipeline runs the program `ffmpeg` for paths and bytes. Where the system has none, the one inside
# the package imageio-ffmpeg gets that name.
provide_ffmpeg() {
    local venv=$1 binary
    if ! PATH="$venv/bin:$PATH" command -v ffmpeg >/dev/null 2>&1; then
        binary=$("$venv/bin/python" -I -c 'import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())') || {
            say "warning: no ffmpeg here; what needs it will say so."
            return 0
        }
        ln -sfn -- "$binary" "$venv/bin/ffmpeg"
    fi
}

prepare_venv_locked() {
    local venv=$1 constraints=$2 python same
    shift 2
    same='import sys; print(sys.version_info[:2])'

    if [[ -e "$venv/.mel-llm-installing" ]]; then
        say "An earlier set-up of $venv was interrupted; starting over."
        python=$(find_python)
        make_venv "$venv" "$python"
    elif ! "$venv/bin/python" -c "$PYTHON_CHECK" >/dev/null 2>&1; then
        python=$(find_python)
        make_venv "$venv" "$python"
    elif [[ -n "${PYTHON:-}" ]]; then
        # Asked for by name: an environment of another version is not what was meant.
        python=$(find_python)
        if [[ "$("$python" -c "$same")" != "$("$venv/bin/python" -c "$same")" ]]; then
            make_venv "$venv" "$python"
        fi
    fi

    if [[ ! -f "$venv/.mel-llm-stamp" ]] ||
        [[ "$(<"$venv/.mel-llm-stamp")" != "$(wanted_stamp "$venv" "$constraints" "$@")" ]]; then
        install_into "$venv" "$constraints" "$@"
    fi
    provide_ffmpeg "$venv"
}

prepare_venv() {
    # Two set-ups at once would write over each other, so the second waits. The lock is on the repository's directory:
    # no file to leave behind, and the system releases it when the set-up's last process ends, however it ends (a pip that
    # outlives its killed shell still holds it). Where there is no flock (macOS), or the file system cannot lock, there is
    # simply no lock.
    exec 9<"$REPO"
    if command -v flock >/dev/null 2>&1; then
        if ! flock -n 9 2>/dev/null; then
            say "Waiting for another set-up in $REPO to end ..."
            flock 9 2>/dev/null || true
        fi
    fi
    prepare_venv_locked "$@"
    exec 9<&-
    # The environment's programs first, so that `python`, `mel-llm` and `ffmpeg` mean its own in whatever runs next.
    export PATH="$1/bin:$PATH" VIRTUAL_ENV="$1"
}
