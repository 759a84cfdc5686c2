"""A layer between the program and the disk: it records every call that changes a folder, and lets one of them fail.

Key idea: all that a run writes goes through few functions of `os`. Those are replaced, for paths below one folder, by
ones that note the call first. A call may then fail as a disk does (`OSError`), be cut short, or be the last one that
the process makes (`Killed`: from then on nothing reaches the disk any more, whatever the process still tries). fsync
does nothing here: what it promises is for `disk_model` to judge, which is given the record.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


class Killed(BaseException):
    """The process is gone. No `except` of the program may stop it."""


@dataclass(frozen=True)
class Call:
    """One call that changes the disk. `path` is what it is done to, `data` what is written, `target` a new name."""

    kind: str  # mkdir, create, write, fsync, rename, unlink
    path: Path
    data: bytes = b""
    target: Path | None = None


@dataclass
class FaultLayer:
    """`fault` sees every call before it is made, with its number; it may raise, or return how many bytes go through."""

    root: Path
    fault: Callable[[int, Call], int | None] = lambda number, call: None
    calls: list[Call] = field(default_factory=list)
    dead: bool = False
    _paths: dict[int, Path] = field(default_factory=dict)  # open file → its path
    _lock: Any = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def active(self) -> Iterator[FaultLayer]:
        wrapped = {
            name: getattr(self, f"_{name}")
            for name in ("open", "close", "write", "fsync", "replace", "rename", "mkdir", "unlink")
        }
        self._real = {name: getattr(os, name) for name in wrapped}
        with contextlib.ExitStack() as stack:
            for name, function in wrapped.items():
                stack.enter_context(mock.patch.object(os, name, function))
            yield self

    def _note(self, call: Call) -> int | None:
        if self.dead:
            raise Killed
        number = len(self.calls)
        self.calls.append(call)
        try:
            return self.fault(number, call)
        except Killed:
            self.dead = True
            raise

    def _ours(self, path: Any, options: dict[str, Any]) -> Path | None:
        if isinstance(path, int) or options.get("dir_fd") is not None:
            return None
        absolute = Path(os.path.abspath(os.fsdecode(path)))
        return absolute if absolute.is_relative_to(self.root) else None

    def _open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        ours = self._ours(path, options)
        with self._lock:
            if ours and flags & os.O_CREAT:
                there = ours.exists()
                if not there or flags & os.O_TRUNC:
                    self._note(Call("create", ours))
            descriptor: int = self._real["open"](path, flags, mode, **options)
            if ours:
                self._paths[descriptor] = ours
        return descriptor

    def _close(self, descriptor: int) -> None:
        with self._lock:
            self._paths.pop(descriptor, None)
            self._real["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        with self._lock:
            path = self._paths.get(descriptor)
            if path is None:
                return int(self._real["write"](descriptor, data))
            try:
                through = self._note(Call("write", path, bytes(data)))
            except Killed:
                self._real["write"](descriptor, bytes(data)[: len(data) // 2])  # the disk had begun
                raise
            return int(self._real["write"](descriptor, memoryview(data)[:through]))

    def _fsync(self, descriptor: int) -> None:
        with self._lock:
            path = self._paths.get(descriptor)
            if path is not None:
                self._note(Call("fsync", path))

    def _rename(self, path: Any, target: Any, **options: Any) -> None:
        with self._lock:
            ours = self._ours(path, options)
            if ours:
                self._note(Call("rename", ours, target=Path(os.path.abspath(os.fsdecode(target)))))
            self._real["rename"](path, target, **options)

    _replace = _rename

    def _mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        with self._lock:
            ours = self._ours(path, options)
            if ours and not ours.exists() and ours.parent.is_dir():
                self._note(Call("mkdir", ours))
            self._real["mkdir"](path, mode, **options)

    def _unlink(self, path: Any, **options: Any) -> None:
        with self._lock:
            ours = self._ours(path, options)
            if ours:
                self._note(Call("unlink", ours))
            self._real["unlink"](path, **options)
