"""`tiles`' loops compiled for CPUs: an expert a task, columns in vector registers, or the rows of an anti-diagonal.

Key idea: the sequence of float32 operations of every entry is that of the plain loops, so the bytes are the same. The
rounding goes row by row, which is another order of the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.quant.kernels.columns_cpu import INFINITY, coded, decoded, pool
from mimoquant.quant.kernels.encode_cpu import F32, compiled
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


@_jit
def _improve_tile(slope, weight, scale, zero, group, down, along, is_int4, codes, left, moved):
    """`moved` lies column by column."""
    rows, columns = slope.shape
    has_zero, steep, change = zero.shape[0] > 0, np.empty(rows, F32), np.zeros(rows, F32)
    flipped = np.zeros((columns, columns + 2 * rows), F32)  # so that the rows of an anti-diagonal read side by side
    for k in range(columns):
        for j in range(columns):
            flipped[k, rows + columns - 1 - j] = along[k, j]
    for step in range(rows + columns - 1):
        begin, end, shift = max(0, step - columns + 1), min(rows, step + 1), rows + columns - 1 - step
        for i in range(begin, end):
            steep[i] = slope[i, step - i]
        for k in range(min(step, columns)):
            for i in range(begin, end):
                steep[i] = steep[i] + flipped[k, shift + i] * moved[k, i]
        for i in range(begin, end):
            j = step - i
            s, z = scale[i, group[j]], zero[i, group[j]] if has_zero else F32(0)
            start, curvature = decoded(codes[i, j], s, z, is_int4), along[j, j]
            away = steep[i] / curvature
            sound = abs(away) < INFINITY and curvature > F32(0)
            codes[i, j], value = coded(start + away if sound else start, s, z, is_int4)
            left[i, j], change[i] = weight[i, j] - value, start - value
        for k in range(begin, end):
            if change[k] != F32(0):
                _add(moved[step - k], change[k], down[k], 0)


def round_tile(stack: Rows, tile: Tile, target: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """See `tiles.round_tile`."""
    left, moved = torch.empty(target.shape), torch.empty(target.shape)

    def task(e: int) -> None:
        _round_tile(target[e].numpy(), above[e].numpy(), *_of_expert(stack, tile, e), left[e].numpy(), moved[e].numpy())

    _over_experts(task, len(target))
    return left, moved


def improve_tile(stack: Rows, tile: Tile, slope: Tensor) -> tuple[Tensor, Tensor]:
    """See `tiles.improve_tile`."""
    experts, count, width = slope.shape
    left, moved = torch.empty(slope.shape), torch.zeros(experts, width, count)

    def task(e: int) -> None:
        _improve_tile(slope[e].numpy(), *_of_expert(stack, tile, e), left[e].numpy(), moved[e].numpy())

    _over_experts(task, experts)
    return left, moved.mT


def _of_expert(stack: Rows, tile: Tile, e: int) -> tuple[Any, ...]:
    """What both loops take of an expert's tile: weight, scale, zero, group, down, along, whether int4, codes."""
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
