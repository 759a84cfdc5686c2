"""Small work on a CPU: several pieces side by side, each by a core of its own, instead of one after the other by all.

Key idea: torch gives every operation to all cores, and where operations are small its threads mostly wait for each
other. Pieces that do not need one another go to a core each, if each core gets one. Bytes are then those of one thread
(torch's own threads may give others: MKL splits long sums, and factors, among them).

Left out: pieces that are fewer than cores, and large ones, whose operations keep all cores busy and which hold twenty
times their size meanwhile. They go one by one, by all cores, as they would without this.
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
_AT_ONCE_BYTES = 2**26  # of pieces that are worked on


def on_cores(
    make: Callable[[T], R], pieces: Sequence[T], device: torch.device, size_bytes: int = 0
) -> Generator[R, None, None]:
    """`make` of each piece, in order; one or two more than there are cores for are made ahead. The generator must be
    exhausted or closed: until then torch has one thread.

    Args:
        size_bytes: of a piece.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or not 1 < cores <= min(len(pieces), _AT_ONCE_BYTES // max(1, size_bytes)):
        yield from map(make, pieces)
        return
    make = _in_modes_of_now(make)
    coming: collections.deque[Future[R]] = collections.deque()
    rest = iter(pieces)
    with _one_thread(), workers(cores, "core", torch.set_num_threads, 1) as pool:
        coming.extend(pool.submit(make, piece) for piece in itertools.islice(rest, cores + 1))
        while coming:
            made = coming.popleft().result()
            coming.extend(pool.submit(make, piece) for piece in itertools.islice(rest, 1))
            yield made


def dealt(make: Callable[[slice], R], count: int, device: torch.device) -> list[R]:
    """`make` of `count` things in a row, experts say, of which each core takes some; of all of them where there are
    fewer than cores, and on a GPU."""
    cores = torch.get_num_threads()
    parts = cores if device.type == "cpu" and cores <= count else 1
    return list(on_cores(make, [slice(count * n // parts, count * (n + 1) // parts) for n in range(parts)], device))


def _in_modes_of_now(make: Callable[[T], R]) -> Callable[[T], R]:
    """Whether gradients are kept is a thread's own, and a new thread does not know what its maker wants."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def made(piece: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return make(piece)

    return made


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Meanwhile torch has one; MKL takes the number for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
