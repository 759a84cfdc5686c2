"""What crosses between host and device beside the products: source weights as they are read, stored parts as they go.

Key idea: both copies run on streams of their own, from and to pinned memory, so that nobody waits for the bus. Parts go
between ranks and to the host under one name a tensor, `projection part`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.model.decoder_layer import ExpertChunk
from mimoquant.model.layout import PROJECTIONS
from mimoquant.quant.engine_torch import Sent, as_numpy, on_host
from mimoquant.quant.stack import Stack
from mimoquant.quant.streams import side_stream

Parts = dict[str, dict[str, npt.NDArray[Any]]]  # projection → part → [E, ...]
T = TypeVar("T")
_TURNS = itertools.cycle(range(3))  # of streams for facts: what is begun meanwhile must not be waited for


@dataclass(frozen=True)
class Chosen:
    """What one rank made of its chunk of a round: stored parts by (projection, part), values as read. `told`: facts,
    which wait for the device."""

    parts: dict[str, Tensor]
    chunk: ExpertChunk
    told: Callable[[], dict[str, Any]]


def sent(stacks: dict[str, Stack], device: torch.device) -> dict[str, Stack | Sent]:
    """A chunk as read, on CUDA brought to the device before anybody asks for it; returns when it is there."""
    side = side_stream(device, "weights")
    if side is None:
        return dict(stacks)

    def there(held: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(held).to(device, non_blocking=True)

    out: dict[str, Stack | Sent] = {}
    with torch.cuda.stream(side):
        for projection, (values, scales) in stacks.items():
            out[projection] = Sent(there(values), None if scales is None else there(scales))
    side.synchronize()
    return out


def named(both: dict[str, Tensor], down: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts by `projection part`, those of stacked gate and up split by rows; a global scale is shared."""
    out = {f"down {name}": values for name, values in down.items()}
    for name, values in both.items():
        pair = (values, values) if name == "global_scale" else values.chunk(2, dim=1)
        out |= {f"{projection} {name}": half for projection, half in zip(("gate", "up"), pair, strict=True)}
    return out


def by_projection(named: dict[str, T]) -> dict[str, dict[str, T]]:
    """The inverse of the names that `named` gives: projection → part."""
    out: dict[str, dict[str, T]] = {projection: {} for projection in PROJECTIONS}
    for name, values in named.items():
        projection, _, part = name.partition(" ")
        out[projection][part] = values
    return out


def after_all(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """What is done in the context that comes back follows all that the device was given to do until now, and nothing
    that it is given later: for numbers that somebody waits for."""
    side = side_stream(device, f"facts {next(_TURNS)}")
    if side is None:
        return nullcontext
    side.wait_stream(torch.cuda.current_stream(device))
    return lambda: torch.cuda.stream(side)


def leaving(named: dict[str, Tensor]) -> Callable[[], Parts]:
    """Send parts to the host, on CUDA on a stream of their own; what comes back waits until they are there."""
    device = next(iter(named.values())).device
    side, there = side_stream(device, "leaving"), None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # does nothing for None
        held = {name: on_host(values) for name, values in named.items()}
    if side is not None:
        there = side.record_event()
        for values in named.values():
            values.record_stream(side)

    def arrived() -> Parts:
        if there is not None:
            there.synchronize()
        return by_projection({name: as_numpy(values) for name, values in held.items()})

    return arrived
