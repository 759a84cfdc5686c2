"""A source on the Hub that is kept: what is read of it becomes an ordinary checkpoint beside the run.

Key idea: whole shards come, one after the other, the one that is waited for first and the others ahead of need, so that
a download and a run are one pass and each byte comes once, however often it is read. A shard has its name when its
sha256 is the Hub's; what is unfinished is gone on with. The folder has its name when all of it is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mimoquant.checkpoint.writer import fsync_folder, make_folder_durably, stopping, write_file_durably
from mimoquant.errors import StoppedError, UsageError
from mimoquant.machine.overlap import is_given_up
from mimoquant.machine.team import refuse_ranks

_MARK = ".mimoquant-source"  # which revision an unfinished folder is of


class Downloads:
    """A thread that fetches shards. `fetch`: brings one whole; `order`: all of them, in the order of need."""

    def __init__(self, fetch: Callable[[str], None], order: Sequence[str]) -> None:
        self._fetch, self._left = fetch, list(order)
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="download", daemon=True)
        self._thread.start()

    def wait_for(self, file: str) -> None:
        """Until a file is there. Raises what stopped the thread."""
        with self._changed:
            if file in self._left:  # before all others
                self._left.remove(file)
                self._left.insert(0, file)
            while file in self._left and self._error is None and not self._stopped:
                self._changed.wait(0.1)
                if is_given_up():
                    raise StoppedError(f"{file}: its download was given up", hint="go on with --resume")
            if self._error is not None:
                raise self._error
            if file in self._left:
                raise StoppedError(f"{file}: its download was given up", hint="go on with --resume")

    def close(self) -> None:
        """After what is under way was aborted."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._stopped or not self._left:
                        return
                    file = self._left[0]
                self._fetch(file)
                with self._changed:
                    self._left.remove(file)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()


@contextlib.contextmanager
def keeping(target: Path, revision: str) -> Iterator[Path]:
    """The folder that becomes `target` when the block is done without an error; one that was begun is gone on with.

    Raises UsageError: something is in the way. StoppedError: the disk.
    """
    refuse_ranks("--keep-source")
    partial = target.with_name(target.name + ".partial")
    if target.exists() or target.is_symlink():
        raise UsageError(
            f"--keep-source {target}: exists already", hint="give that folder as SOURCE, or choose another one"
        )
    try:
        make_folder_durably(partial)
        lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"--keep-source {target}: cannot be written ({error.strerror})") from error
    try:
        _claim(partial, lock, revision)
        yield Path(os.path.realpath(partial))
        with stopping(target):
            fsync_folder(partial)
            os.rename(partial, target)
            fsync_folder(target.parent)
            (target / _MARK).unlink()
    finally:
        os.close(lock)


def _claim(partial: Path, lock: int, revision: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{partial}: another run is writing there", hint="wait for it, or stop it") from error
    mark = partial / _MARK
    if not os.listdir(partial):
        write_file_durably(mark, revision.encode())
        return
    before = mark.read_text(errors="replace")[:200] if mark.is_file() else None
    if before != revision:
        what = f"is a download of {before}" if before else "is in the way, and no download of ours"
        raise UsageError(f"{partial}: {what}, wanted is {revision}", hint="name that revision, or move the folder away")
