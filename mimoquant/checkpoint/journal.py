"""The run folder: what is finished survives a kill.

Key idea: everything is written into `OUT.partial/`. A shard is written and fsynced first, then its line is appended to
`journal.jsonl` and fsynced, and at the very end the folder is renamed to `OUT`. So `OUT` is always complete, and after
a kill the journal tells exactly which shards can be kept. `run.json` says what the run was to do; a resume under
another recipe, source or version is refused by name. Lines hold no times, so equal outputs have equal journals.

A second run into the same folder is refused by a file lock, which dies with its process.

Several processes may share a run: rank 0 holds the lock, decides what can be kept and publishes; the others join it.
Each appends to a journal of its own, because appends from several machines to one file on a network disk may be lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.writer import fsync_folder, write_file_durably
from mimoquant.errors import CheckpointError, StoppedError, UsageError

JOURNAL_NAME = "journal.jsonl"
RANK_JOURNALS = "journal-*.jsonl"  # of the ranks from 1 on
RUN_NAME = "run.json"


@dataclass(frozen=True, slots=True)
class JournalLine:
    """One finished shard. `facts`: what a calibrated run tells of the layer."""

    unit: str
    file: str
    size_bytes: int
    sha256: str
    facts: dict[str, Any] | None = None

    def as_plain(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_journal(path: Path) -> list[JournalLine]:
    """All whole lines of a journal; a torn last line (the process died inside the write) is dropped."""
    lines: list[JournalLine] = []
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return lines
    parts = raw.split(b"\n")
    for number, part in enumerate(parts[:-1], start=1):
        try:
            fields = json.loads(part)
            line = JournalLine(**fields)
            kinds = [type(value) for value in asdict(line).values()]
            if kinds[:-1] != [str, str, int, str] or not isinstance(line.facts, dict | None):
                raise TypeError
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: line {number} is damaged") from error
        lines.append(line)
    return lines


class RunFolder:
    """`OUT.partial/` while a run is under way. Use as a context manager: the lock is held inside.

    `rank`: of this process among those of the run. Others than 0 enter after it has.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool, rank: int = 0) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self._identity = identity
        self._resume = resume
        self._rank = rank
        self._lock = -1
        self._journal = -1
        self._recording = threading.Lock()
        self._ours = False  # whether this process made the folder
        self.finished: dict[str, JournalLine] = {}

    def __enter__(self) -> RunFolder:
        if self._rank == 0 and (self.out.exists() or self.out.is_symlink()):
            raise UsageError(f"{self.out}: exists already", hint="choose another --out or remove it")
        try:
            self._open() if self._rank == 0 else self._follow()
        except OSError as error:
            self.close()
            raise UsageError(
                f"{self.partial}: cannot be written ({error.strerror})", hint="choose another --out"
            ) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        self.close()

    def path(self, file: str) -> Path:
        return self.partial / file

    def record(self, line: JournalLine) -> None:
        """Append one durable line; the shard it names must be durable already. Any thread may call it."""
        with self._recording:
            try:
                fsync_folder(self.partial)
                view = memoryview(json.dumps(line.as_plain()).encode() + b"\n")
                while view:
                    view = view[os.write(self._journal, view) :]
                os.fsync(self._journal)
            except OSError as error:
                raise StoppedError(
                    f"{self._journal_path()}: cannot be written ({error.strerror})",
                    hint="make room, then run the same command again with --resume",
                ) from error
            self.finished[line.unit] = line

    def publish(self, order: list[str]) -> None:
        """Rewrite the journal in plan order and rename the folder to its final name."""
        self._write_journal([self.finished[unit] for unit in order])
        try:
            self.path(RUN_NAME).unlink()
            fsync_folder(self.partial)
            os.rename(self.partial, self.out)
            fsync_folder(self.out.parent)
        except OSError as error:
            raise StoppedError(
                f"{self.out}: the finished {self.partial.name} cannot get its name ({error.strerror})",
                hint="everything is written: rename the folder yourself",
            ) from error

    def discard(self) -> None:
        """Remove the folder if this run made it: it ended before anything in it was worth keeping."""
        if self._ours:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _open(self) -> None:
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise UsageError(f"{self.partial}: is in the way and no folder of ours", hint="move it away")
        self._ours = not self.partial.exists()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial, os.O_RDONLY)
        self._claim(self._lock)
        run_path = self.path(RUN_NAME)
        if self._ours:
            write_file_durably(run_path, json.dumps(self._identity, indent=2).encode())
        elif not run_path.is_file():
            raise UsageError(f"{self.partial}: is in the way and not an unfinished run of ours", hint="move it away")
        elif not self._resume:
            raise UsageError(
                f"{self.partial}: an unfinished run is there",
                hint="continue it with --resume, or remove that folder to start again",
            )
        else:
            self._check_identity(run_path)
            self._keep_finished()
        self._open_journal()

    def _follow(self) -> None:
        """Take part in the run that rank 0 has opened."""
        path = self.path(RUN_NAME)
        if not path.is_file():
            raise UsageError(f"{self.partial}: rank {self._rank} does not see the folder that rank 0 made",
                             hint="several nodes need one folder that all of them see")  # fmt: skip
        self._check_identity(path)
        self._open_journal()

    def _journal_path(self) -> Path:
        return self.path(f"journal-{self._rank}.jsonl" if self._rank else JOURNAL_NAME)

    def _open_journal(self) -> None:
        self._journal = os.open(self._journal_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._claim(self._journal)

    def _claim(self, descriptor: int) -> None:
        """Lock a file until it is closed."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{self.partial}: another run is writing there", hint="wait for it, or stop it") from error

    def _write_journal(self, lines: list[JournalLine]) -> None:
        """One journal in the place of all."""
        text = "".join(json.dumps(line.as_plain()) + "\n" for line in lines)
        write_file_durably(self.path(JOURNAL_NAME), text.encode())
        for path in self.partial.glob(RANK_JOURNALS):
            with path.open("rb") as handle:
                self._claim(handle.fileno())  # its rank may have outlived rank 0
            path.unlink()

    def _check_identity(self, path: Path) -> None:
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(f"{path}: is damaged", hint="remove the folder and start again")
        for key, now in self._identity.items():
            if before.get(key) != now:
                raise UsageError(
                    f"{self.partial}: cannot be resumed, {key} was {str(before.get(key))[:16]}, is now {str(now)[:16]}",
                    hint="resume with what the run began with, or remove the folder and start again",
                )

    def _keep_finished(self) -> None:
        """Keep journaled shards whose bytes still have their hash; forget (and so rewrite) the others."""
        journals = [self.path(JOURNAL_NAME), *sorted(self.partial.glob(RANK_JOURNALS))]
        for line in itertools.chain(*map(read_journal, journals)):
            path = self.path(line.file)
            if path.is_file() and path.stat().st_size == line.size_bytes and file_sha256(path) == line.sha256:
                self.finished[line.unit] = line
        self._write_journal(list(self.finished.values()))

    def close(self) -> None:
        """Let go of the folder."""
        for descriptor in (self._journal, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._journal = self._lock = -1


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that may be written below `folder`."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that is there."""
    probe = folder.absolute()
    return next((parent for parent in (probe, *probe.parents) if parent.exists()), probe)
