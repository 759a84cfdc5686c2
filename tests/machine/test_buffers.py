"""Memory that is used again: by whom nobody holds any more, and never by two at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mimoquant.machine.buffers import IDLE_BYTES, Buffers

MB = 2**20


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_memory_is_lent_again_when_the_last_view_of_it_is_gone() -> None:
    buffers = Buffers()
    array = buffers.empty((4, MB), np.uint16)
    first, kept = address(array), array[1, 3:].view(np.uint8).reshape(-1)
    assert (array.shape, array.dtype) == ((4, MB), np.uint16) and array.flags.writeable and array.flags.c_contiguous
    read = kept.data  # what a file is written from
    del array, kept
    other = buffers.empty((4, MB), np.uint16)
    assert address(other) != first and buffers.idle_bytes == 0
    del read
    assert buffers.idle_bytes == 8 * MB
    assert address(buffers.empty((7 * MB,), np.uint8)) == first


@pytest.mark.parametrize(("size", "again"), [(8 * MB, True), (4 * MB, True), (4 * MB - 1, False), (8 * MB + 1, False)])
def test_a_block_fits_what_takes_half_of_it_or_more(size: int, again: bool) -> None:
    buffers = Buffers()
    first = address(buffers.empty((8 * MB,), np.uint8))
    assert (address(buffers.empty((size,), np.uint8)) == first) is again


def test_the_smallest_that_fits_is_taken() -> None:
    buffers = Buffers()
    held = [buffers.empty((size * MB,), np.uint8) for size in (8, 5, 6)]
    wanted = address(held[1])
    held.clear()
    assert address(buffers.empty((4 * MB,), np.uint8)) == wanted


def test_no_more_lies_idle_than_is_said() -> None:
    buffers = Buffers()
    held = [buffers.empty((IDLE_BYTES // 4,), np.uint8) for _ in range(6)]
    held.clear()
    assert buffers.idle_bytes == IDLE_BYTES


@pytest.mark.parametrize("shape", [(0,), (3, 5), (0, 4 * MB)])
def test_small_arrays_are_numpys_own(shape: tuple[int, ...]) -> None:
    buffers = Buffers()
    array = buffers.empty(shape, np.float32)
    assert array.shape == shape and array.dtype == np.float32
    del array
    assert buffers.idle_bytes == 0


def test_threads_never_share_a_block() -> None:
    buffers, wrong = Buffers(), []

    def work(mark: int) -> None:
        for _ in range(50):
            array = buffers.empty((MB // 4,), np.uint8)
            array[:] = mark
            other = buffers.empty((MB // 4,), np.uint8)
            other[:] = 255 - mark
            if not ((array == mark).all() and (other == 255 - mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and buffers.idle_bytes <= 4 * 3 * MB // 4  # a name's old array lives until it has its new one
