"""Pieces on a core each: in order, the same as one by one, with torch's threads as they were before."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import mimoquant
from mimoquant.machine.cores import dealt, on_cores

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_as_many_threads_as_torch_had() -> None:
    together = threading.Barrier(4, timeout=30)  # breaks unless four pieces are worked on at once

    def made(piece: int) -> tuple[int, int]:
        if piece < 4:
            together.wait()
        return piece * piece, torch.get_num_threads()

    assert list(on_cores(made, range(50), CPU)) == [(n * n, 1) for n in range(50)]
    assert torch.get_num_threads() == 4


def test_fewer_pieces_than_cores_have_all_cores_one_by_one() -> None:
    assert list(on_cores(lambda _: torch.get_num_threads(), range(3), CPU)) == [4, 4, 4]
    assert dealt(lambda own: (own, torch.get_num_threads()), 3, CPU) == [(slice(0, 3), 4)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_what_the_caller_wants_of_gradients_holds_in_each_piece(mode: Callable[[], AbstractContextManager]) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with mode():
        expected = (weight @ weight).requires_grad, torch.is_inference_mode_enabled()
        out = torch.zeros(2, 2)
        made = on_cores(lambda _: ((weight @ weight).requires_grad, out.is_inference()), range(8), CPU)
        assert set(made) == {expected}
        for _ in on_cores(lambda n: out[n % 2].add_(1.0) if not expected[0] else None, range(8), CPU):
            pass


def test_pieces_within_a_piece_go_one_by_one() -> None:
    here = list(on_cores(lambda _: set(on_cores(lambda _: threading.get_ident(), range(9), CPU)), range(4), CPU))
    assert [len(of_piece) for of_piece in here] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("pieces", "device", "size_bytes"),
    [(9, CPU, 2**26), (1, CPU, 0), (9, torch.device("meta"), 0)],
    ids=["large pieces", "one piece", "another device"],
)
def test_large_pieces_and_those_of_a_gpu_are_made_by_the_caller(
    pieces: int, device: torch.device, size_bytes: int
) -> None:
    by = on_cores(lambda _: (threading.get_ident(), torch.get_num_threads()), range(pieces), device, size_bytes)
    assert set(by) == {(threading.get_ident(), 4)}


def test_no_more_is_made_ahead_than_a_few_pieces() -> None:
    begun: list[int] = []
    made = on_cores(begun.append, range(100), CPU)
    next(made)
    assert len(begun) <= 6
    made.close()
    assert torch.get_num_threads() == 4


def test_a_failure_surfaces_and_torch_has_its_threads_back() -> None:
    def fails(piece: int) -> None:
        if piece == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        list(on_cores(fails, range(1000), CPU))
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_every_one_is_dealt_out_once(count: int) -> None:
    things = list(range(count))
    assert [one for own in dealt(lambda own: things[own], count, CPU) for one in own] == things
    assert len(dealt(lambda own: own, count, torch.device("meta"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gptq-nvfp4", "gptq-int4-g32"])
def test_a_calibrated_run_has_the_same_bytes_while_each_core_gets_an_expert(recipe: str, tmp_path: Path) -> None:
    hashes = []
    for threads in ("1", "2", "5"):
        out = tmp_path / threads
        command = ["quantize", str(mimoquant.micro_checkpoint()), "--recipe", recipe, "--out", str(out), "--quiet"]
        some = ["--sequences", "40", "--tokens", "64"]
        subprocess.run(
            [sys.executable, "-m", "mimoquant", *command, *some],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
        )
        hashes.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")})
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(hashes[0]) > 3
