"""Lanes of a write-behind: order in each, no waiting between them, a bound on what waits, errors that surface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mimoquant.machine.overlap import WriteBehind, heir, is_given_up, read_ahead


def test_a_lane_keeps_its_order_and_lanes_do_not_wait_for_each_other() -> None:
    done: dict[int, list[int]] = {0: [], 1: []}
    gate, other = threading.Event(), threading.Event()

    def slow(i: int) -> None:
        assert gate.wait(10)
        done[0].append(i)

    def quick(i: int) -> None:
        done[1].append(i)
        if i == 9:
            other.set()

    with WriteBehind(10_000, lanes=2) as behind:
        for i in range(10):
            behind.submit(2, 1, slow, i)  # lane 2 of two is lane 0
            behind.submit(1, 1, quick, i)
        assert other.wait(10) and not done[0], "lane 1 is through while lane 0 has not begun"
        gate.set()
    assert done == {0: list(range(10)), 1: list(range(10))}


def test_all_lanes_share_one_bound() -> None:
    gate, waiting = threading.Event(), threading.Event()

    def block() -> None:
        assert gate.wait(10)

    def submit_all(behind: WriteBehind) -> None:
        for lane in range(3):
            behind.submit(lane, 40, block)
        waiting.set()

    with WriteBehind(100, lanes=3) as behind:
        thread = threading.Thread(target=submit_all, args=(behind,))
        thread.start()
        assert not waiting.wait(0.3), "the third does not fit"
        gate.set()
        thread.join(10)
        assert waiting.is_set()
        behind.submit(0, 1000, time.sleep, 0)  # larger than the bound: alone it goes


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_first_error_surfaces_and_drops_the_rest(lanes: int) -> None:
    ran: list[int] = []

    def fail() -> None:
        raise ValueError("disk")

    with pytest.raises(ValueError, match="disk"), WriteBehind(10, lanes) as behind:
        behind.submit(0, 1, fail)
        for i in range(1000):
            behind.submit(i, 5, ran.append, i)
            time.sleep(0.001)
    assert len(ran) < 1000


def test_an_error_of_the_block_is_the_one_that_is_raised() -> None:
    with pytest.raises(KeyError), WriteBehind(10, 2) as behind:
        behind.submit(0, 1, time.sleep, 0)
        raise KeyError


def test_threads_that_read_for_another_know_that_its_work_is_given_up() -> None:
    begun, told = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        for _ in range(6000):
            if is_given_up():
                told.set()
                return
            time.sleep(0.01)

    def items() -> Iterator[None]:
        yield None
        with ThreadPoolExecutor(1, initializer=heir()) as pool:
            yield pool.submit(wait).result()

    ahead = read_ahead(items())
    next(ahead)
    assert begun.wait(60)
    ahead.close()
    assert told.is_set()
