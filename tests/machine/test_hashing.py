"""Several files hashed at once: each sha256 is hashlib's, in pairs and alone, whatever pieces come when."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from mimoquant.machine import hashing as hashing_module
from mimoquant.machine.hashing import UNHASHED_BYTES, BlockDigest, HashedStream, Hashing
from mimoquant.quant.kernels import sha256_cpu

SIZES = (0, 1, 4, 8, 55, 56, 63, 64, 65, 1000, 2**18 - 1, 2**18, 2**21 + 3)
needs_instructions = pytest.mark.skipif(not sha256_cpu.IS_THERE, reason="a processor without instructions for sha256")
NOISE = np.random.default_rng(0).integers(0, 256, 2**22, np.uint8)


def pieces(seed: int) -> list[memoryview]:
    rng = np.random.default_rng(seed)
    sizes = rng.choice(SIZES, rng.integers(0, 12)).tolist()
    return [NOISE[begin : begin + size].data for size in sizes for begin in [int(rng.integers(0, 2**20))]]


def put(stream: HashedStream, views: list[memoryview]) -> None:
    for view in views:
        stream.put(view)
        stream.wait()


def at_once(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("cores", [2, 4, 16])
@pytest.mark.parametrize("instructions", [True, False])
def test_each_file_has_its_sha256(files: int, cores: int, instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sha256_cpu, "IS_THERE", instructions and sha256_cpu.IS_THERE)
    found: dict[int, str] = {}
    with Hashing(files, cores) as hashing:

        def one(seed: int) -> None:
            stream = hashing.stream()
            put(stream, pieces(seed))
            found[seed] = stream.hexdigest()
            stream.close()

        at_once([partial(one, seed) for seed in range(files + 2)])
    assert found == {seed: hashlib.sha256(b"".join(pieces(seed))).hexdigest() for seed in range(files + 2)}


@needs_instructions
def test_two_files_are_hashed_together_and_a_lone_one_when_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    hash_taken = hashing_module._hash

    def counted(streams: list[HashedStream]) -> tuple[int, ...]:
        taken.append(len(streams))
        return hash_taken(streams)

    monkeypatch.setattr(hashing_module, "_hash", counted)
    whole = NOISE.data
    with Hashing(2, cores=2) as hashing:
        one, other = hashing.stream(), hashing.stream()
        for _ in range(UNHASHED_BYTES // len(whole)):
            one.put(whole)
            one.wait()
        assert not taken  # it waits for company
        one.put(whole)
        one.wait()
        assert taken and set(taken) == {1}
        for _ in range(UNHASHED_BYTES // len(whole)):
            other.put(whole)
        assert other.hexdigest() == hashlib.sha256(whole.tobytes() * (UNHASHED_BYTES // len(whole))).hexdigest()
        assert 2 in taken
        one.close()


@needs_instructions
@pytest.mark.parametrize("length", [0, 1, 55, 56, 64, 119, 120, 127, 128, 200])
def test_padding_is_the_standards(length: int) -> None:
    digest = BlockDigest()
    digest.update(NOISE[:length].data)
    assert digest.hexdigest() == hashlib.sha256(NOISE[:length]).hexdigest()


def test_what_hashing_raises_is_told_to_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(streams: list[HashedStream]) -> tuple[int, ...]:
        raise MemoryError

    monkeypatch.setattr(hashing_module, "_hash", fails)
    with Hashing() as hashing:
        stream = hashing.stream()
        stream.put(NOISE.data)
        with pytest.raises(MemoryError):
            stream.hexdigest()


@needs_instructions
def test_a_file_that_is_alone_is_hashed_while_it_is_written_and_nobody_waits_for_one_that_is_done() -> None:
    with Hashing(2, cores=2) as hashing:
        one = hashing.stream()
        one.put(NOISE.data)
        deadline = time.monotonic() + 60
        while not one.is_idle and time.monotonic() < deadline:
            time.sleep(0.001)
        assert one.is_idle  # without anybody who waits
        other = hashing.stream()
        one.put(NOISE.data)
        other.close()
        while not one.is_idle and time.monotonic() < deadline:
            time.sleep(0.001)
        assert one.is_idle
        wanted = hashlib.sha256(2 * NOISE.tobytes()).hexdigest()
        assert one.hexdigest() == wanted == one.hexdigest()
