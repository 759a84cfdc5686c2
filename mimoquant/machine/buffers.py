"""Memory for large arrays that is used again: a fresh page costs the kernel about as much as copying it.

Key idea: a block is lent as an array that does not own it. When that array and all views of it are gone, the block is
idle and the next array of about its size gets it. So nobody gives anything back, and nothing is used twice by mistake.

Left out: small arrays, which the allocator keeps warm by itself; clearing: an array holds whatever it held before.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

_SMALLEST = 2**17  # bytes from which the allocator hands memory back to the kernel at once
IDLE_BYTES = 2**27  # that are kept at most, for the arrays to come


class Buffers:
    """`empty` is `numpy.empty`, in memory that was touched before where there is some. Thread-safe."""

    def __init__(self) -> None:
        self._idle: list[memoryview] = []
        self._lock = threading.RLock()  # an array may end while its own thread is in here

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array whose values are anything."""
        dtype, count = np.dtype(dtype), math.prod(shape)
        size = count * dtype.itemsize
        if size < _SMALLEST:
            return np.empty(shape, dtype)
        block = self._idle_block(size) or np.empty(size, np.uint8).data
        lent = np.frombuffer(block, dtype, count)  # views of it have it as their base, for it is no view of an array
        weakref.finalize(lent, self._take_back, block).atexit = False
        return lent.reshape(shape)

    @property
    def idle_bytes(self) -> int:
        return sum(block.nbytes for block in self._idle)

    def _idle_block(self, size: int) -> memoryview | None:
        """The smallest that is large enough, and not more than twice as large."""
        with self._lock:
            fitting = [block for block in self._idle if size <= block.nbytes <= 2 * size]
            if not fitting:
                return None
            best = min(fitting, key=lambda block: block.nbytes)
            self._idle = [block for block in self._idle if block is not best]
            return best

    def _take_back(self, block: memoryview) -> None:
        with self._lock:
            if self.idle_bytes + block.nbytes <= IDLE_BYTES:
                self._idle.append(block)
