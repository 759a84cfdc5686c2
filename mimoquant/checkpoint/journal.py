"""The run folder: what is finished survives a kill.

Key idea: everything is written into `OUT.partial/`. A shard is written and fsynced first, then its line is appended to
`journal.jsonl` and fsynced, and at the very end the folder is renamed to `OUT`. So `OUT` is always complete, and after
a kill the journal tells exactly which shards can be kept. `run.json` says what the run was to do; a resume under
another recipe, source or version is refused by name. It goes last of all: `OUT` with a `run.json` is complete but was
not left by its run, and a resume looks at it again. Lines hold no times, so equal outputs have equal journals.

A second run into the same folder is refused by a file lock, which dies with its process.

Several processes may share a run: rank 0 holds the lock, decides what can be kept and publishes; the others join it.
Each appends to a journal of its own, because appends from several machines to one file on a network disk may be lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.writer import (
    TEMPORARY,
    fsync_folder,
    make_folder_durably,
    stopped,
    stopping,
    write_all,
    write_file_durably,
)
from mimoquant.errors import CheckpointError, UsageError, is_disk_trouble
from mimoquant.machine.overlap import workers
from mimoquant.machine.team import Team

JOURNAL_NAME = "journal.jsonl"
RANK_JOURNALS = "journal-*.jsonl"  # of the ranks from 1 on
RUN_NAME = "run.json"
HASHED_AT_ONCE = 4  # files: sha256 is slower than a disk


@dataclass(frozen=True, slots=True)
class JournalLine:
    """One finished shard. `facts`: what a calibrated run tells of the layer. `clamped`: weight → groups that became
    zero, that were clamped, all; None where no group was."""

    unit: str
    file: str
    size_bytes: int
    sha256: str
    facts: Mapping[str, Any] | None = None
    clamped: Mapping[str, list[int]] | None = None

    def as_plain(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def is_whole_in(self, folder: Path) -> bool:
        """Whether the shard is there with the bytes that were written; reads all of it."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.size_bytes and file_sha256(path) == self.sha256


def read_journal(path: Path) -> list[JournalLine]:
    """All whole lines of a journal. The last one is dropped if it is torn (the process died inside the write) or, as
    the only one that may not have reached the disk, was damaged by a loss of power."""
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
            if kinds[:4] != [str, str, int, str] or not isinstance(line.facts, dict | None):
                raise TypeError
            _check_clamped(line.clamped)
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(parts) - 1 and not parts[-1]:
                break
            raise CheckpointError(f"{path}: line {number} is damaged") from error
        lines.append(line)
    return lines


def _check_clamped(clamped: Any) -> None:
    """Raises TypeError where it is not what a journal line may have."""
    if clamped is not None and not (isinstance(clamped, dict) and clamped and all(map(_is_count, clamped.values()))):
        raise TypeError


def _is_count(numbers: Any) -> bool:
    """Whether these are groups that became zero, that were clamped, all of a matrix."""
    if not isinstance(numbers, list) or [type(value) for value in numbers] != [int, int, int]:
        return False
    zeroed, clamped, groups = map(int, numbers)
    return min(zeroed, clamped) >= 0 and 0 < zeroed + clamped <= groups


class RunFolder:
    """`OUT.partial/` while a run is under way. Use as a context manager: the lock is held inside.

    `rank`: of this process among those of the run. Others than 0 enter after it has.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool, rank: int = 0) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self._identity: dict[str, Any] = json.loads(json.dumps(identity, default=str))  # as it comes back from run.json
        self._resume = resume
        self._rank = rank
        self._lock = -1
        self._journal = -1
        self._recording = threading.Lock()
        self._ours = False  # whether this process made the folder
        self.finished: dict[str, JournalLine] = {}

    def __enter__(self) -> RunFolder:
        if (self.out / RUN_NAME).is_file():  # killed between the folder's last name and the removal of this file
            self.partial = self.out
        elif self._rank == 0 and (self.out.exists() or self.out.is_symlink()):
            raise UsageError(f"{self.out}: exists already", hint="choose another --out or remove it")
        try:
            self._open() if self._rank == 0 else self._follow()
        except OSError as error:
            self.close()
            if is_disk_trouble(error):
                raise stopped(self.partial, error) from error
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
            with stopping(self._journal_path()):
                fsync_folder(self.partial)
                write_all(self._journal, json.dumps(line.as_plain()).encode() + b"\n")
                os.fsync(self._journal)
            self.finished[line.unit] = line

    def publish(self, order: list[str]) -> None:
        """Rewrite the journal in plan order and rename the folder to its final name."""
        with stopping(self.partial):
            self._write_journal([self.finished[unit] for unit in order])
            fsync_folder(self.partial)
        with stopping(self.out):
            os.rename(self.partial, self.out)
            self.partial = self.out
            fsync_folder(self.out.parent)
            self.path(RUN_NAME).unlink()
        with contextlib.suppress(OSError):  # the folder is complete, with or without that file
            fsync_folder(self.out)

    def discard(self) -> None:
        """Remove the folder if this run made it: it ended before anything in it was worth keeping."""
        if self._ours:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _open(self) -> None:
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise UsageError(f"{self.partial}: is in the way and no folder of ours", hint="move it away")
        make_folder_durably(self.partial)
        self._lock = os.open(self.partial, os.O_RDONLY | os.O_CLOEXEC)
        self._claim(self._lock)
        run_path = self.path(RUN_NAME)
        self._ours = set(os.listdir(self.partial)) <= {RUN_NAME + TEMPORARY}  # new, or killed before anything began
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
            raise UsageError(
                f"{self.partial}: rank {self._rank} does not see the folder that rank 0 made",
                hint="several nodes need one folder that all of them see",
            )
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
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise UsageError(f"{path}: is damaged", hint="remove the folder and start again")
        found = first_change({key: before.get(key) for key in self._identity}, self._identity)
        if found:
            what, was, now = found
            raise UsageError(
                f"{self.partial}: cannot be resumed, {what} was {short_value(was)}, is now {short_value(now)}",
                hint="resume with what the run began with, or remove the folder and start again",
            )

    def _keep_finished(self) -> None:
        """Keep journaled shards whose bytes still have their hash; forget (and so rewrite) the others."""
        journals = [self.path(JOURNAL_NAME), *sorted(self.partial.glob(RANK_JOURNALS))]
        lines = [line for journal in journals for line in read_journal(journal)]
        with workers(HASHED_AT_ONCE, "hash") as pool:
            whole = pool.map(lambda line: line.is_whole_in(self.partial), lines)
            self.finished |= {line.unit: line for line, kept in zip(lines, whole, strict=True) if kept}
        self._write_journal(list(self.finished.values()))

    def close(self) -> None:
        """Let go of the folder."""
        for descriptor in (self._journal, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._journal = self._lock = -1


def first_change(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first value that differs: its place (keys with dots between), what it was, what it is."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else (name, before, now)
    for key in dict.fromkeys((*now, *before)):
        found = first_change(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        if found:
            return found
    return None


def short_value(value: Any) -> str:
    """As much of a value as tells it from another: of a digest 16 digits."""
    text = str(value)
    return text[:16] if len(text) == 64 and " " not in text else text[:80]


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


@contextlib.contextmanager
def opened(run: RunFolder, team: Team, check: Callable[[RunFolder], None] | None = None) -> Iterator[RunFolder]:
    """`run` of this rank, open on all ranks. `check` is called by rank 0 before the others join, and may refuse."""
    with contextlib.ExitStack() as stack:
        if team.leads:
            stack.enter_context(run)
            if check:
                check(run)
        kept = team.gather([line.as_plain() for line in run.finished.values()])[0]
        if not team.leads:
            stack.enter_context(run)
            run.finished = {line["unit"]: JournalLine(**line) for line in kept}
        yield run
