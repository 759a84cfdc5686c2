"""Hidden states that rest on the host while a GPU computes: where they go is the stream's to say, as branches share
them."""

from __future__ import annotations

import contextlib
import time
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from mimoquant.mixing.forks import Branch, HostStream
from mimoquant.model import layer_stream
from mimoquant.model.layer_stream import Stream

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]


class Told(Stream):
    """Notes what is put back."""

    def put(self, batch: int, hidden: Tensor, *, non_blocking: bool = False) -> None:
        self.seed = batch + 1
        assert non_blocking


def test_what_goes_home_goes_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_stream, "side_stream", lambda *_: mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    stream = Told(cast(Any, mock.Mock(device=torch.device("cuda"))), [torch.zeros(1, 2, 3)] * 2)
    with layer_stream._Ferry(stream) as ferry:
        ferry.store(1, mock.Mock())
    assert stream.seed == 2


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_branch_leaves_what_others_share(device: str) -> None:
    source = cast(Any, mock.Mock(device=torch.device(device)))
    whole = Branch([0, 1], HostStream(source, [torch.zeros(1, 64, 32).pin_memory() for _ in range(3)]))
    for number, branch in enumerate(whole.of([trial]) for trial in whole.trials):
        with layer_stream._Ferry(branch.stream) as ferry:
            for batch in range(3):
                ferry.store(batch, ferry.load(batch) + number + 1)
        assert all((held == number + 1).all() for held in branch.stream.batches)
    assert not any(held.any() for held in whole.stream.batches)


class Layers:
    """Layers that say their number, and when each was read."""

    layers = 4

    def __init__(self, device: str) -> None:
        self.device, self.read, self.sound = torch.device(device), list[int](), 3

    def layer(self, number: int) -> Tensor:
        self.read.append(number)
        if number > self.sound:
            raise ValueError(f"layer {number}")
        return torch.full((2,), float(number), device=self.device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_layers_are_read_ahead_where_a_gpu_computes(device: str) -> None:
    source = Layers(device)
    with contextlib.closing(layer_stream.LayersAhead(cast(Any, source))) as ahead:
        assert [float(cast(Any, ahead.take(n))[0]) for n in (0, 1, 1, 3)] == [0, 1, 1, 3]
        assert device != "cpu" or source.read == [0, 1, 1, 3]
        ahead.take(1)
        until = time.monotonic() + 20
        while device != "cpu" and source.read[-1] < 2:
            assert time.monotonic() < until, "nothing is read ahead"
    source.read = []
    with contextlib.closing(layer_stream.LayersAhead(cast(Any, source), near=False)) as ahead:
        assert [float(cast(Any, ahead.take(n))[0]) for n in (0, 2)] == source.read == [0, 2]
    source.sound = 1  # what goes wrong is told with the layer that it belongs to
    with contextlib.closing(layer_stream.LayersAhead(cast(Any, source))) as ahead:
        ahead.take(1)
        with pytest.raises(ValueError, match="layer 2"):
            ahead.take(2)
