"""Files that a caller names: `~` in front of them, and where one beside the checkpoints may be written, which is
refused before a long run rather than after it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mimoquant.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
_NO_PATHS = ("server", "model", "data_column", "engine_version")  # arguments whose `~` is their own


def at_home(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose paths may begin with `~` or `~user`: a shell does not put the folder there in `--out=~/x`.

    Raises UsageError where there is no such home, rather than let a folder named `~` be made.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> R:
        named = {key: value if key in _NO_PATHS else _expanded(value) for key, value in kwargs.items()}
        return function(*map(_expanded, args), **named)

    return called


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UsageError(f"{value}: there is no such home folder", hint=f"what is itself named so is ./{value}")
    return type(value)(path)


def check_new(path: Path, checkpoints: tuple[Path, ...]) -> None:
    """The same of --out, which must not be there yet."""
    if path.exists():
        raise UsageError(f"--out {path}: exists already", hint="choose another name or remove it")
    check_writable(path, checkpoints, "--out")


def check_writable(path: Path, checkpoints: tuple[Path, ...], option: str = "--html") -> None:
    """Try to write a file, and leave no trace of it."""
    try:
        target = path.resolve()
        for folder in checkpoints:
            if target.is_relative_to(folder.resolve()):
                raise UsageError(f"{option} {path}: lies in {folder}, which holds a checkpoint and nothing else")
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UsageError(f"{option} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
