"""Threads that keep disk and processor busy at once: one reads ahead, others write behind.

Key idea: bounded queues, so memory stays at a few chunks; an exception on either side surfaces on the other, and
nobody waits for a thread that has died.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


_reading = threading.local()


def is_given_up() -> bool:
    """Whether this thread reads ahead for somebody who has left: what it waits for is no longer wanted."""
    stop: threading.Event | None = getattr(_reading, "stop", None)
    return stop is not None and stop.is_set()


def heir() -> Callable[[], None]:
    """For threads that read on behalf of this one: called in each, it tells them when this one's work is given up."""
    stop = getattr(_reading, "stop", None)
    return lambda: setattr(_reading, "stop", stop)


def read_ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield `items`, produced by a thread up to `depth` ahead. Closing the generator stops the thread."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        _reading.stop = stop
        try:
            if all(put((item, None)) for item in items):
                put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):
            while True:  # room for what it holds, or it would look up only when it has waited in vain
                ready.get_nowait()
        thread.join()


@contextlib.contextmanager
def workers(
    count: int, name: str, first: Callable[..., object] | None = None, *args: Any
) -> Iterator[ThreadPoolExecutor]:
    """Threads for what can be done side by side, each of which calls `first(*args)` first; where their user fails or is
    stopped, nothing is begun any more."""
    with ThreadPoolExecutor(count, name, first, args) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class WriteBehind:
    """Runs submitted calls in order, on one thread a lane, while at most `limit_bytes` of their data wait.

    Calls of different lanes run at the same time: a file is hashed by one thread at a time, several files are not. The
    first exception is raised by the next `submit` or at the end of the `with` block; calls after it are dropped, as are
    all that wait when the block itself fails.
    """

    def __init__(self, limit_bytes: int, lanes: int = 1) -> None:
        self._limit = limit_bytes
        self._calls: list[collections.deque[tuple[Callable[..., Any], tuple[Any, ...], int]]] = [
            collections.deque() for _ in range(lanes)
        ]
        self._waiting_bytes = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(calls,), name=f"write-behind-{lane}", daemon=True)
            for lane, calls in enumerate(self._calls)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        with self._changed:
            self._closed = True
            if error is not None:
                self._drop()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if error is None and self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether a call has raised, which the next `submit` or the end of the block tells."""
        return self._error is not None

    def submit(self, lane: int, size_bytes: int, call: Callable[..., Any], *args: Any) -> None:
        """Queue `call(*args)`, which holds `size_bytes` of data, on a lane (modulo their number); waits while too much
        is queued."""
        with self._changed:
            while self._error is None and self._waiting_bytes and self._waiting_bytes + size_bytes > self._limit:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            self._calls[lane % len(self._calls)].append((call, args, size_bytes))
            self._waiting_bytes += size_bytes
            self._changed.notify_all()

    def _drop(self) -> None:
        for calls in self._calls:
            calls.clear()

    def _work(self, calls: collections.deque[tuple[Callable[..., Any], tuple[Any, ...], int]]) -> None:
        while True:
            with self._changed:
                while not calls and not self._closed and self._error is None:
                    self._changed.wait()
                if not calls or self._error is not None:
                    return
                call, args, size_bytes = calls[0]
            try:
                call(*args)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._drop()
            with self._changed:
                self._waiting_bytes -= size_bytes
                if calls:  # not cleared meanwhile
                    calls.popleft()
                self._changed.notify_all()
