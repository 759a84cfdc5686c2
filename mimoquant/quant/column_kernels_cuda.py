"""`columns`' loops as Triton kernels: a program holds a block of columns of some rows of one expert in registers.

Key idea: the sequence of float32 operations of every element is that of the plain loops, with divisions rounded as IEEE
wants them and no fused multiply-add, so the bytes are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.gpu_arithmetic import NO_FUSION, e2m1_code, round_e2m1, round_level
from mimoquant.quant.grid import Grid

_ROWS = 32  # of a program, one a thread: each holds its row of the block in registers


@triton.jit
def _coded(x, scale, zero, IS_INT4: tl.constexpr):  # type: ignore[no-untyped-def]
    """(code, value) of `grid.Grid.encode` and `decode`."""
    if IS_INT4:
        level = round_level(tl.div_rn(x, scale) + zero)
        return (level + 8.0).to(tl.uint8), (level - zero) * scale
    rounded = round_e2m1(tl.abs(tl.div_rn(x, scale)))
    code = e2m1_code(rounded) | tl.where(x < 0, 8, 0)
    return code.to(tl.uint8), tl.where(x < 0, -rounded, rounded) * scale


@triton.jit
def _column(scale, values, zero, shares, expert, i, columns, rows, r, k, HAS_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale, value and zero point of column i, and its share in each later column; anything beyond the last."""
    place, there = (expert * columns + i) * rows + r, r < tl.where(i < columns, rows, 0)
    s, value = tl.load(scale + place, mask=there, other=1.0), tl.load(values + place, mask=there, other=0.0)
    z = tl.load(zero + place, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
    share = tl.load(shares + (expert * columns + i) * columns + k, mask=(k > i) & (k < columns), other=0.0)
    return s, value, z, share


@triton.jit
def _round_columns(target, weight, push, scale, zero, codes, left, columns, rows, IS_INT4: tl.constexpr,
                   HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, there = tl.arange(0, BLOCK), r < rows
    first = expert * columns * rows
    at = first + k[:, None] * rows + r[None, :]
    tile = tl.load(target + at, mask=(k < columns)[:, None] & there[None, :], other=0.0)
    s, w, z, share = _column(scale, weight, zero, push, expert, 0, columns, rows, r, k, HAS_ZERO)
    for i in range(columns):
        place = first + i * rows + r
        # of the next column, asked for before this one needs its time
        later = _column(scale, weight, zero, push, expert, i + 1, columns, rows, r, k, HAS_ZERO)
        code, value = _coded(tl.sum(tl.where(k[:, None] == i, tile, 0.0), axis=0), s, z, IS_INT4)
        rest = w - value
        tl.store(codes + place, code, mask=there)
        tl.store(left + place, rest, mask=there)
        tile = tile + share[:, None] * rest[None, :]
        s, w, z, share = later


@triton.jit
def _improve_columns(slope, values, codes, gram, scale, zero, columns, rows, IS_INT4: tl.constexpr,
                     HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, there = tl.arange(0, BLOCK), r < rows
    first = expert * columns * rows
    at = first + k[:, None] * rows + r[None, :]
    inside = (k < columns)[:, None] & there[None, :]
    tile = tl.load(slope + at, mask=inside, other=0.0)
    s, old, z, share = _column(scale, values, zero, gram, expert, 0, columns, rows, r, k, HAS_ZERO)
    for i in range(columns):
        place = first + i * rows + r
        later = _column(scale, values, zero, gram, expert, i + 1, columns, rows, r, k, HAS_ZERO)
        steep = tl.sum(tl.where(k[:, None] == i, tile, 0.0), axis=0)
        curvature = tl.zeros_like(steep) + tl.load(gram + (expert * columns + i) * columns + i)
        step = tl.div_rn(steep, curvature)
        sound = (tl.abs(step) < float("inf")) & (curvature > 0)
        code, value = _coded(tl.where(sound, old + step, old), s, z, IS_INT4)
        tl.store(codes + place, code, mask=there)
        tl.store(values + place, value, mask=there)
        tile = tile - share[:, None] * (value - old)[None, :]
        s, old, z, share = later
    tl.store(slope + at, tile, mask=inside)


def round_columns(target: Tensor, weight: Tensor, push: Tensor, grid: Grid, fmt: Format) -> tuple[Tensor, Tensor]:
    """See `columns.round_columns`."""
    codes, left = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    arrays = (target, weight, push, grid.scale, grid.scale if grid.zero is None else grid.zero, codes, left)
    _launch(_round_columns, arrays, target, grid, fmt)
    return codes, left


def improve_columns(slope: Tensor, values: Tensor, codes: Tensor, gram: Tensor, grid: Grid, fmt: Format) -> None:
    """See `columns.improve_columns`."""
    arrays = (slope, values, codes, gram, grid.scale, grid.scale if grid.zero is None else grid.zero)
    _launch(_improve_columns, arrays, slope, grid, fmt)


def _launch(kernel: Any, arrays: tuple[Tensor, ...], like_EBO: Tensor, grid: Grid, fmt: Format) -> None:
    experts, columns, rows = like_EBO.shape
    if not all(array.is_contiguous() for array in arrays):
        raise ValueError("a column kernel wants contiguous arrays")
    kernel[(triton.cdiv(rows, _ROWS), experts)](
        *arrays, columns, rows, IS_INT4=fmt.name == "int4", HAS_ZERO=grid.zero is not None,
        BLOCK=triton.next_power_of_2(columns), ROWS=_ROWS, num_warps=1, **NO_FUSION,
    )  # fmt: skip
