"""When each thread of a run did what: for `--profile`, and for the one line that says what bounds a run.

Key idea: a span is a name, a thread and two times. Work on a GPU is asynchronous, so a span that hands work to it ends
where the thread stops to wait for the result; whatever waits is a span of its own.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
WAIT_READ, WAIT_WRITE = "wait for reading", "wait for writing"


class Timeline:
    """Spans of all threads; thread-safe. `seconds` sums them by name."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._spans: list[tuple[str, str, float, float]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((name, threading.current_thread().name, begin, time.perf_counter()))

    def waited(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """`items`, with the time that each one was waited for as a span."""
        iterator = iter(items)
        while True:
            with self.span(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @property
    def seconds(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for name, _, begin, end in self._spans:
            sums[name] = sums.get(name, 0.0) + end - begin
        return sums

    @property
    def bound(self) -> tuple[str, float]:
        """What the run waited for most, and its share of the time: reading, writing or computing."""
        total, waited = time.perf_counter() - self._begin, self.seconds
        shares = {"reading": waited.get(WAIT_READ, 0.0), "writing": waited.get(WAIT_WRITE, 0.0)}
        shares["computing"] = max(0.0, total - sum(shares.values()))
        name = max(shares, key=lambda kind: shares[kind])
        return name, shares[name] / total if total else 0.0

    def chrome_trace(self) -> str:
        """JSON for chrome://tracing or Perfetto: one row a thread, microseconds."""
        threads = {name: number for number, name in enumerate(dict.fromkeys(span[1] for span in self._spans))}
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": name}}
            for name, number in threads.items()
        ]
        for name, thread, begin, end in self._spans:
            start, length = (begin - self._begin) * 1e6, (end - begin) * 1e6
            events.append({"name": name, "ph": "X", "pid": 0, "tid": threads[thread], "ts": start, "dur": length})
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
