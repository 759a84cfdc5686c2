"""Threads that compiled loops are spread over on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


class AtOnce(Executor):
    """Runs what is submitted right there."""

    def submit(self, call: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(call(*args, **named))
        except Exception as error:  # the caller asks for the result
            done.set_exception(error)
        return done


def executor(threads: int) -> Executor:
    """A pool of so many threads; for one, the caller itself, so that callers on a core each do not queue."""
    return ThreadPoolExecutor(threads) if threads > 1 else AtOnce()


pool = cache(executor)
