"""Small work on a CPU: several pieces side by side, each by a core of its own, instead of one after the other by all.

Key idea: torch gives every operation to all cores, and where operations are small its threads mostly wait for each
other. Pieces that do not need one another go to a core each. Each sum is made within one piece, by one thread, so bytes
are the same for any number of cores (a test runs 1, 2 and 5). Large pieces have all cores; MKL may split their sums.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from mimoquant.machine.overlap import workers

T = TypeVar("T")
R = TypeVar("R")
_AT_ONCE_BYTES = 2**26  # of pieces that are worked on: what a piece holds meanwhile may be twenty times its size


def on_cores(
    make: Callable[[T], R], pieces: Sequence[T], device: torch.device, size_bytes: int = 0
) -> Generator[R, None, None]:
    """`make` of each piece, in order; one or two more than there are cores for are made ahead. It is to be used up, or
    closed: until then torch has fewer threads.

    Args:
        size_bytes: of a piece. Large ones, whose operations keep all cores busy, and those of a GPU go one by one.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, len(pieces), _AT_ONCE_BYTES // max(1, size_bytes))
    if device.type != "cpu" or at_once < 2:
        yield from map(make, pieces)
        return
    coming: collections.deque[Future[R]] = collections.deque()
    rest = iter(pieces)
    with _threads(threads // at_once) as each, workers(at_once, "core", torch.set_num_threads, each) as pool:
        coming.extend(pool.submit(make, piece) for piece in itertools.islice(rest, at_once + 1))
        while coming:
            made = coming.popleft().result()
            coming.extend(pool.submit(make, piece) for piece in itertools.islice(rest, 1))
            yield made


def dealt(make: Callable[[slice], R], count: int, device: torch.device) -> list[R]:
    """`make` of `count` things in a row, experts say, of which each core takes some; of all of them on a GPU."""
    parts = max(1, min(count, torch.get_num_threads())) if device.type == "cpu" else 1
    shares = [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]
    return list(on_cores(make, shares, device))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[int]:
    """Meanwhile torch has so many threads; MKL takes the number for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
