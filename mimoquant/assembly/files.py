"""Files that a caller names: `~` in front of them, sources on the Hub, and where one beside the checkpoints may be
written, which is refused before a long run rather than after it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mimoquant.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
_NO_PATHS = ("server", "model", "data_column", "engine_version")  # arguments whose `~` is their own
_SOURCES = ("source", "checkpoint", "reference", "candidate", "baseline")  # arguments that may be on the Hub
_ON_THE_HUB = "hf:/"  # a path has one slash where the address had two


def at_home(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose paths may begin with `~` or `~user`: a shell does not put the folder there in `--out=~/x`. A
    checkpoint that is only read may be `hf://ORG/NAME[@REVISION]`; it is closed when the function is done.

    Raises UsageError where there is no such home, rather than let a folder named `~` be made; of a source on the Hub
    what `hub.opened` raises.
    """
    order = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> R:
        out = dict(zip(order, args, strict=False)).get("out", kwargs.get("out"))
        keep = _kept(kwargs.get("keep_source"), out)
        if keep and keep.is_dir() and kwargs.get("resume") and Path(_expanded(out)).is_dir():
            keep = None  # a job that is queued again: both have their names, so both are complete
        with contextlib.ExitStack() as stack:
            names = itertools.chain(order, itertools.repeat(""))
            given = [_settled(key, value, stack, keep) for key, value in zip(names, args, strict=False)]
            return function(*given, **{key: _settled(key, value, stack, keep) for key, value in kwargs.items()})

    return called


def _kept(folder: Any, out: Any) -> Path | None:
    """Where a source on the Hub is to be kept, absolute, if anywhere. Raises UsageError where that is no folder of its
    own, before anything is made there: each of the two is written under another name until it is complete."""
    if folder is None:
        return None
    if str(folder).startswith(_ON_THE_HUB):
        raise _not_read("keep_source", _address(folder))
    keep = Path(os.path.abspath(_expanded(folder)))
    if not keep.name:
        raise UsageError(f"--keep-source {keep}: exists already", hint="name a folder that is still to be made")
    if out is not None and not str(out).startswith(_ON_THE_HUB):
        ours, its = ([place, f"{place}.partial"] for place in (str(keep), os.path.abspath(_expanded(out))))
        for one, other in itertools.product(map(os.path.realpath, ours), map(os.path.realpath, its)):
            if Path(one).is_relative_to(other) or Path(other).is_relative_to(one):
                raise UsageError(
                    f"--keep-source {keep}: is --out {out}, or one lies in the other",
                    hint="the source and the output each need a folder of their own",
                )
    return keep


def _address(value: Any) -> str:
    """A path that stands for a source on the Hub as it was typed: it has lost a slash."""
    return f"{_ON_THE_HUB}/{str(value).removeprefix(_ON_THE_HUB).lstrip('/')}"


def _not_read(argument: str, name: str) -> UsageError:
    return UsageError(
        f"{name}: is on the Hub, where only a checkpoint that is read may be, and is given as "
        f"{argument.replace('_', '-')}",
        hint="give a file or folder of this machine",
    )


def _settled(argument: str, value: Any, stack: contextlib.ExitStack, keep: Path | None) -> Any:
    """What the function gets for an argument."""
    if argument in _NO_PATHS:
        return value
    _refuse_empty(argument, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{argument.replace('_', '-')} is {value}, expected a finite number")
    if isinstance(value, str | Path) and str(value).startswith(_ON_THE_HUB):
        return _opened(argument, _address(value), stack, keep)
    if argument == "source" and keep is not None:
        raise UsageError(f"--keep-source {keep}: {value} is a folder, which is there already", hint="leave it out")
    return _expanded(value)


def _opened(argument: str, name: str, stack: contextlib.ExitStack, keep: Path | None) -> Path:
    """The folder that stands for a source on the Hub, until the stack is closed."""
    if argument not in _SOURCES:
        raise _not_read(argument, name)
    try:
        from mimoquant.checkpoint.hub import opened  # loads huggingface_hub, which reads its settings
    except ValueError as error:
        raise UsageError(
            f"{name}: huggingface_hub does not take its settings ({error})",
            hint="look at the variables HF_ENDPOINT, HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT",
        ) from error

    return stack.enter_context(opened(name, keep))


def _refuse_empty(argument: str, value: Any) -> None:
    """A path of no letters would be the current folder. (What became `Path("")` on the way cannot be told from ".".)"""
    if value == "" or (isinstance(value, list | tuple) and "" in value):
        raise UsageError(f"{argument.replace('_', '-')} is empty", hint="name a file or folder; . is the current one")


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
