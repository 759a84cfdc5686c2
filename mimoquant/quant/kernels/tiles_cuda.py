"""`tiles`' loops as Triton kernels: a program walks a tile of one expert, a row a thread, one anti-diagonal a step.

Key idea: the sequence of float32 operations of every entry is that of the plain loops, with divisions rounded as IEEE
wants them and no fused multiply-add, so the bytes are the same. Entries fetch what moves them instead of being moved:
each sum then stays in a register, and threads read next to each other: rows above by column, columns before by row
(`moved` lies column by column for that).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.kernels.arithmetic_cuda import NO_FUSION, steps
from mimoquant.quant.kernels.columns_cuda import _coded, _level, _or
from mimoquant.quant.tiles import Rows, Tile

_LEAST_ROWS = 32  # of a program: a warp


@triton.jit
def _round_tile(
    target,
    above,
    weight,
    scale,
    zero,
    group,
    down,
    along,
    codes,
    left,
    moved,
    numbers,
    first,
    begin,
    rows,
    columns,
    height,
    width,
    groups,
    IS_INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`first`, `begin`: the tile's row and column in the matrix [height, width]."""
    expert, i = tl.program_id(0).to(tl.int64), tl.load(numbers + tl.arange(0, ROWS))
    tile, inside = expert * rows * columns, i < rows
    of_row = expert * height + first + i
    for step in range(0, rows + columns - 1):
        j = step - i
        there = inside & (j >= 0) & (j < columns)
        at = tile + i * columns + j
        over, wanted = tl.load(above + at, mask=there, other=0.0), tl.load(target + at, mask=there, other=0.0)
        for k in tl.range(0, rows, loop_unroll_factor=4):
            by = tl.load(down + (expert * rows + k) * rows + i, mask=inside, other=0.0)
            over = over + by * tl.load(left + tile + k * columns + j, mask=there & (k < i), other=0.0)
        for k in tl.range(0, tl.minimum(step, columns), loop_unroll_factor=4):
            by = tl.load(along + (expert * columns + k) * columns + j, mask=there, other=0.0)
            wanted = wanted + by * tl.load(moved + tile + k * rows + i, mask=there & (k < j), other=0.0)
        g = tl.load(group + expert * width + begin + j, mask=there, other=0)
        s = tl.load(scale + of_row * groups + g, mask=there, other=1.0)
        z = tl.load(zero + of_row * groups + g, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
        code, value = _coded(wanted + over, s, z, IS_INT4)
        place = of_row * width + begin + j
        rest = tl.load(weight + place, mask=there, other=0.0) - value
        tl.store(codes + place, code, mask=there)
        tl.store(left + at, rest, mask=there)
        tl.store(moved + tile + j * rows + i, rest + over, mask=there)
        tl.debug_barrier()  # the next anti-diagonal reads what was left of this one


@triton.jit
def _improve_tile(
    slope,
    weight,
    scale,
    zero,
    group,
    down,
    along,
    codes,
    left,
    moved,
    change,
    numbers,
    first,
    begin,
    rows,
    columns,
    height,
    width,
    groups,
    IS_INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`change` [E, M]: room for what an anti-diagonal changed, by row."""
    expert, i = tl.program_id(0).to(tl.int64), tl.load(numbers + tl.arange(0, ROWS))
    tile, inside = expert * rows * columns, i < rows
    of_row = expert * height + first + i
    for step in range(0, rows + columns - 1):
        j = step - i
        there = inside & (j >= 0) & (j < columns)
        steep = tl.load(slope + tile + i * columns + j, mask=there, other=0.0)
        for k in tl.range(0, tl.minimum(step, columns), loop_unroll_factor=4):
            by = tl.load(along + (expert * columns + k) * columns + j, mask=there, other=0.0)
            steep = steep + by * tl.load(moved + tile + k * rows + i, mask=there, other=0.0)
        g = tl.load(group + expert * width + begin + j, mask=there, other=0)
        s = tl.load(scale + of_row * groups + g, mask=there, other=1.0)
        z = tl.load(zero + of_row * groups + g, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
        place = of_row * width + begin + j
        level = _level(tl.load(codes + place, mask=there, other=0), IS_INT4)
        start = (level - z) * s if HAS_ZERO else level * s
        curvature = tl.load(along + (expert * columns + j) * columns + j, mask=there, other=1.0)
        away = tl.div_rn(steep, curvature)
        sound = (tl.abs(away) < float("inf")) & (curvature > 0)
        code, value = _coded(tl.where(sound, start + away, start), s, z, IS_INT4)
        tl.store(codes + place, code, mask=there)
        tl.store(left + tile + i * columns + j, tl.load(weight + place, mask=there, other=0.0) - value, mask=there)
        tl.store(change + expert * rows + i, start - value, mask=there)
        tl.debug_barrier()  # every thread reads what all rows changed
        for k in range(tl.maximum(0, step - columns + 1), tl.minimum(rows, step + 1)):
            by = tl.load(change + expert * rows + k)
            if by != 0.0:  # few codes change
                to = moved + tile + (step - k) * rows + i
                far = tl.load(down + (expert * rows + k) * rows + i, mask=inside, other=0.0)
                tl.store(to, tl.load(to, mask=inside, other=0.0) + by * far, mask=inside)
        tl.debug_barrier()  # before what changed is overwritten


def round_tile(stack: Rows, tile: Tile, target: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """See `tiles.round_tile`."""
    experts, rows, columns = target.shape
    left, moved = torch.empty_like(target), target.new_empty(experts, columns, rows)
    _launch(_round_tile, stack, tile, (target, above), (left, moved))
    return left, moved.mT


def improve_tile(stack: Rows, tile: Tile, slope: Tensor) -> tuple[Tensor, Tensor]:
    """See `tiles.improve_tile`."""
    experts, rows, columns = slope.shape
    left, moved = torch.empty_like(slope), slope.new_zeros(experts, columns, rows)
    _launch(_improve_tile, stack, tile, (slope,), (left, moved, slope.new_empty(experts, rows)))
    return left, moved.mT


def _launch(kernel: Any, stack: Rows, tile: Tile, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
    """A program an expert, whose threads are the tile's rows."""
    experts, rows, columns = given[0].shape
    arrays = (
        *given,
        stack.weight,
        stack.scale,
        _or(stack.zero, stack.scale),
        stack.group,
        tile.down,
        tile.along,
        stack.codes,
        *made,
        steps(stack.weight.device),
    )
    if not all(array.is_contiguous() for array in arrays):
        raise ValueError("a tile kernel wants contiguous arrays")
    threads = max(_LEAST_ROWS, triton.next_power_of_2(rows))
    kernel[(experts,)](
        *arrays,
        tile.rows.start,
        tile.columns.start,
        rows,
        columns,
        *stack.weight.shape[1:],
        stack.scale.shape[2],
        IS_INT4=stack.fmt.name == "int4",
        HAS_ZERO=stack.zero is not None,
        ROWS=threads,
        num_warps=threads // _LEAST_ROWS,
        **NO_FUSION,
    )
