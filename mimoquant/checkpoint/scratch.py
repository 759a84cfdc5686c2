"""A private folder for as long as a process needs it; what a killed one left goes with the next.

Key idea: its owner holds a lock on it, which ends with the process however that ends. So whoever makes a folder can
tell one that is in use from one that was left by `kill -9`, and removes the latter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A new folder below the system's temporary one (TMPDIR), removed at the end of the block."""
    above = Path(os.path.realpath(tempfile.gettempdir()))
    _sweep(above, prefix)
    folder, lock = _made(above, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _made(above: Path, prefix: str) -> tuple[Path, int]:
    """A folder and the lock on it. One that another process swept away before it was locked is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=above))
        with contextlib.suppress(FileNotFoundError):
            lock = _opened(folder)
            with contextlib.suppress(OSError):  # a file system without locks, on which nobody sweeps either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _sweep(above: Path, prefix: str) -> None:
    """Remove this user's folders that nobody holds."""
    for folder in above.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = _opened(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
