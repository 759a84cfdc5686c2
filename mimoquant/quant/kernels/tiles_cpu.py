"""`tiles`' loop compiled for CPUs: an expert a task, columns in vector registers.

Key idea: the sequence of float32 operations of every entry is that of the plain loop, so the bytes are the same. It
goes row by row, which is another order of the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.quant.kernels.columns_cpu import coded
from mimoquant.quant.kernels.compiled import compiled
from mimoquant.quant.kernels.encode_cpu import F32
from mimoquant.quant.kernels.pool import pool
from mimoquant.quant.tiles import Rows, Tile

_jit = compiled()
_NOTHING = np.empty((0, 0), np.float32)


@_jit
def _add(row, by, other, begin):
    """row += by * other, from `begin` on."""
    for j in range(begin, row.shape[0]):
        row[j] = row[j] + by * other[j]


@_jit
def _round_tile(target, above, weight, scale, zero, group, down, along, is_int4, codes, left, moved):
    for i in range(target.shape[0]):
        over, wanted, has_zero = above[i], target[i], zero.shape[0] > 0
        for k in range(i):
            _add(over, down[k, i], left[k], 0)
        for j in range(target.shape[1]):
            s, z = scale[i, group[j]], zero[i, group[j]] if has_zero else F32(0)
            codes[i, j], value = coded(wanted[j] + over[j], s, z, is_int4)
            left[i, j] = weight[i, j] - value
            moved[i, j] = left[i, j] + over[j]
            _add(wanted, moved[i, j], along[j], j + 1)


def round_tile(stack: Rows, tile: Tile, target: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """See `tiles.round_tile`."""
    left, moved = torch.empty(target.shape), torch.empty(target.shape)

    def task(e: int) -> None:
        _round_tile(target[e].numpy(), above[e].numpy(), *_of_expert(stack, tile, e), left[e].numpy(), moved[e].numpy())

    _over_experts(task, len(target))
    return left, moved


def _of_expert(stack: Rows, tile: Tile, e: int) -> tuple[Any, ...]:
    """What the loop takes of an expert's tile: weight, scale, zero, group, down, along, whether int4, codes."""
    rows, columns = tile.rows, tile.columns
    return (
        stack.weight[e, rows, columns].numpy(),
        stack.scale[e, rows].numpy(),
        _NOTHING if stack.zero is None else stack.zero[e, rows].numpy(),
        stack.group[e, columns].numpy(),
        tile.down[e].numpy(),
        tile.along[e].numpy(),
        stack.fmt.name == "int4",
        stack.codes[e, rows, columns].numpy(),
    )


def _over_experts(task: Callable[[int], None], experts: int) -> None:
    for done in [pool(torch.get_num_threads()).submit(task, e) for e in range(experts)]:
        done.result()
