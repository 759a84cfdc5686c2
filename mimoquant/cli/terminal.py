"""Progress on stderr: one bar with rate and time left on a terminal, one line a finished step elsewhere.

Key idea: what a run says while it works goes through `tell`, so `--quiet` is one switch, which leaves errors and hints.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from mimoquant.errors import StoppedError, as_called, without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from mimoquant.assembly.choices import Watcher
    from mimoquant.machine.timeline import Timeline
    from mimoquant.planning.plan import Plan
    from mimoquant.planning.units import Unit

T = TypeVar("T")  # a verb's document
WIDE = 72  # columns from which on a bar has room for what bounds the run
RESUMABLE = "run the same command again with --resume to go on where it stopped"
INTERRUPTED = "interrupted"
_NEVER_HUSHED = ("error: ", "hint: ", INTERRUPTED)
_quiet = False


def hush(wanted: bool) -> bool:
    """What `--quiet` does, for the rest of the process or until it is undone."""
    global _quiet
    _quiet = wanted
    return wanted


class Progress:
    """Of a run of units: stage, bytes, rate, time left; with a `timeline` what bounds the run so far."""

    def __init__(self, made: Plan, ranks: int = 1, timeline: Timeline | None = None) -> None:
        self.timeline, self.bound = timeline, ""
        self.share = 1 if made.recipe.calibrated else ranks  # others write at the same time, and are seen at the end
        self.units, self.total = len(made.units), made.shard_bytes
        self.finished = 0
        self.done: dict[str, int] = {}
        self.telling = threading.Lock()  # shards that are written side by side tell of themselves
        self.begin, self.walk = time.monotonic(), Lines()
        self.kept = 0  # bytes that an earlier run had written
        self.bar: Bar | None = None
        self.wide = True

    def __enter__(self) -> Progress:
        if sys.stderr and sys.stderr.isatty() and not _quiet:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            console = Console(stderr=True)
            self.wide = console.width >= WIDE
            self.bar = Bar(*columns, console=console)
            self.bar.start()
            self.task = self.bar.add_task("quantizing", total=self.total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def walked(self, way: str, done: int, layers: int) -> None:
        """Called by the run where it walks back, before anything is quantized."""
        if self.bar:
            self.bar.update(self.task, description=f"{way}, {done} of {layers} layers")
        else:
            self.walk(way, done, layers)
        self.begin = time.monotonic()

    def advance(self, unit: Unit, size_bytes: int, finished: bool) -> None:
        """Called by the run, by any of its threads; `size_bytes` of the unit are written."""
        with self.telling:
            self._advance(unit, size_bytes, finished)

    def _advance(self, unit: Unit, size_bytes: int, finished: bool) -> None:
        from mimoquant.wording import size

        self.done[unit.name] = size_bytes
        written = sum(self.done.values())
        self.finished += finished
        if finished and self.timeline:
            self.bound = f", bound by {self.timeline.bound[0]}"
        if self.bar:
            said = unit.name + (self.bound if self.wide else "")
            self.bar.update(self.task, completed=written, description=said)
        elif finished:
            elapsed = time.monotonic() - self.begin
            rate = written / elapsed if elapsed else 0
            left = (self.total - written) / rate / self.share if rate else 0
            tell(
                f"[{self.finished}/{self.units}] {unit.name}: {size(written)} of {size(self.total)}, "
                f"{size(int(rate))}/s{self.bound}, {left:.0f} s left"
            )


class Lines:
    """stderr: a line for each step of work that comes in parts, with the time left of its kind."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        elapsed = time.monotonic() - self.begin
        tell(f"[{done}/{total}] {name}, {elapsed / done * (total - done):.0f} s left")
        if done == total:
            self.begin = time.monotonic()


def watcher(leads: bool = True) -> Watcher:
    """Notes and progress on stderr; nothing from a rank that does not lead."""
    from mimoquant.assembly.choices import Watcher

    return Watcher(lambda note: tell(f"note: {note}"), Lines()) if leads else Watcher()


def open_streams() -> None:
    """Let stdout and stderr take any name, whatever their encoding: what it cannot hold is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # neither closed nor replaced
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Data on stdout. Raises StoppedError where it takes none, as on a full disk; BrokenPipeError: nobody reads."""
    try:
        print(as_called(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StoppedError(
            f"stdout: cannot be written ({error.strerror})", hint="what the verb writes beside it is complete"
        ) from error


def tell(line: str) -> None:
    """A line on stderr; a reader who has left, or a stderr that is closed, is no reason to stop."""
    if not sys.stderr or (_quiet and not line.startswith(_NEVER_HUSHED)):
        return
    with contextlib.suppress(OSError):
        print(without_secrets(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def hint_to_resume(wanted: bool) -> Iterator[None]:
    """Note on an interrupt, where what is done inside can go on after it, how it does."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if wanted:
            interrupt.add_note(RESUMABLE)
        raise


def print_document(document: T, to_text: Callable[[T], str], as_json: bool) -> None:
    """A verb's result on stdout: one JSON document, or the text that is made from it."""
    from mimoquant.wording import json_text, visible

    say(json_text(document) if as_json else "\n".join(map(visible, to_text(document).split("\n"))))


@contextlib.contextmanager
def printed_last(document: T, to_text: Callable[[T], str], as_json: bool) -> Iterator[None]:
    """Print a document when what is written inside is written; also where that fails, since the work is done."""
    try:
        yield
    finally:
        print_document(document, to_text, as_json)
