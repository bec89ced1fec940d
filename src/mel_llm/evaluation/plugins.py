"""Judges from outside: functions named on the command line, and what tells one version of them from another."""

import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


PREFIX = "python:"


def load_callable(spec: str, argument: str) -> Callable:
    """What `python:module.function` names.

    The module is looked for in the current folder too. A class is called without arguments, once, so that it can load a
    model and be used through its `__call__`.

    Args:
        spec (`str`): `python:module.function`, or `python:package.module.Class`.
        argument (`str`): What error messages call the argument, `--asr`.

    Raises:
        ImportError: There is no such module, or it cannot be imported.
        ValueError: It has no such name, or what has the name cannot be called.
    """
    module_name, _, name = spec.removeprefix(PREFIX).rpartition(".")
    if not module_name or not name.isidentifier():
        raise ValueError(f"{argument} {spec!r} is not understood: write {PREFIX}module.function.")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"{argument} {spec}: {error}. The module must be installed, on PYTHONPATH or in the current folder."
        ) from error
    finally:
        sys.path.remove(here)
    if not hasattr(module, name):
        raise ValueError(f"{argument} {spec}: the module {module_name} has no {name!r}.")
    found = getattr(module, name)
    if inspect.isclass(found):
        found = found()
    if not callable(found):
        raise ValueError(f"{argument} {spec}: {name!r} cannot be called.")
    return found


def fingerprint(value: Any) -> str:
    """Eight hexadecimal digits that change when `value`, of JSON's types, does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def describe_callable(function: Callable) -> str:
    """Its name and the state of the file it is written in: scores of a judge that was changed are not its scores."""
    description = getattr(function, "description", None)
    if isinstance(description, str):
        return description
    kind = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        source = Path(inspect.getsourcefile(kind)).read_bytes()
    except (OSError, TypeError):  # written in C, or at a prompt
        return name
    return f"{name} {hashlib.sha256(source).hexdigest()[:8]}"


def describe_folder(place: str) -> str:
    """A model's folder or Hub name, and for a folder the state of its files (name, size, time): a model that was trained
    on is another one."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return place
    stats = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
    return f"{folder} {fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])}"


__all__ = ["PREFIX", "describe_callable", "describe_folder", "fingerprint", "load_callable"]
