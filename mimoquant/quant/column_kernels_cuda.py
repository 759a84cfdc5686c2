"""`columns`' loops as Triton kernels: a program holds a block of columns of some rows of one expert in registers.

Key idea: the sequence of float32 operations of every element is that of the plain loops, with divisions rounded as IEEE
wants them, sums by halving and no fused multiply-add, so the bytes are the same. What a column needs is asked for while
the one before is still at work.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.columns import Columns
from mimoquant.quant.formats import NVFP4_SMALLEST_SCALE
from mimoquant.quant.gpu_arithmetic import (
    NO_FUSION,
    e2m1_code,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    fold,
    from_bits,
    round_bf16,
    round_e2m1,
    round_level,
)
from mimoquant.quant.products import Halves

_ROUND_ROWS, _IMPROVE_ROWS = 32, 16  # of a program, which is one warp
_SMALLEST = tl.constexpr(NVFP4_SMALLEST_SCALE)


@triton.jit
def _coded(x, scale, zero, IS_INT4: tl.constexpr):
    """(code, value) of `grid.Grid.encode` and `decode`."""
    if IS_INT4:
        level = round_level(tl.div_rn(x, scale) + zero)
        code, value = (level + 8.0).to(tl.uint8), (level - zero) * scale
    else:
        rounded = round_e2m1(tl.abs(tl.div_rn(x, scale)))
        code = (e2m1_code(rounded) | tl.where(x < 0, 8, 0)).to(tl.uint8)
        value = tl.where(x < 0, -rounded, rounded) * scale
    return code, value


@triton.jit
def _level(code, IS_INT4: tl.constexpr):
    """The value of a code at a scale of one and a zero point of zero."""
    return code.to(tl.float32) - 8.0 if IS_INT4 else e2m1_value(code.to(tl.int32))


@triton.jit
def _keep(rest, high, low, place, there):
    """The two halves of `products.halves`."""
    top = rest.to(tl.bfloat16)
    tl.store(high + place, top, mask=there)
    tl.store(low + place, (rest - top.to(tl.float32)).to(tl.bfloat16), mask=there)


@triton.jit
def _to_round(scale, weight, zero, push, group, expert, i, now, end, width, rows, groups, r, k,
              HAS_ZERO: tl.constexpr):  # fmt: skip
    """Scale, value and zero point of column i of the block, and its share in each later column."""
    column = tl.minimum(now + i, end - 1)
    there = r < rows
    g = tl.load(group + expert * width + column).to(tl.int64)
    of_group = (expert * groups + g) * rows + r
    s = tl.load(scale + of_group, mask=there, other=1.0)
    w = tl.load(weight + (expert * width + column) * rows + r, mask=there, other=0.0)
    z = tl.load(zero + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
    share = tl.load(push + (expert * width + column) * width + now + k, mask=(k > i) & (now + k < end), other=0.0)
    return s, w, z, share


@triton.jit
def _round_columns(target, weight, push, scale, zero, group, codes, high, low, panel, now, end, width, rows, groups,
                   IS_INT4: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
                   ROWS: tl.constexpr):  # fmt: skip
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, there = tl.arange(0, BLOCK), r < rows
    inside = (now + k < end)[:, None] & there[None, :]
    tile = tl.load(target + expert * panel + k[:, None] * rows + r[None, :], mask=inside, other=0.0)
    s, w, z, share = _to_round(
        scale, weight, zero, push, group, expert, 0, now, end, width, rows, groups, r, k, HAS_ZERO
    )
    for i in range(end - now):
        later = _to_round(
            scale, weight, zero, push, group, expert, i + 1, now, end, width, rows, groups, r, k, HAS_ZERO
        )
        code, value = _coded(tl.sum(tl.where(k[:, None] == i, tile, 0.0), axis=0), s, z, IS_INT4)
        rest, place = w - value, (expert * width + now + i) * rows + r
        tl.store(codes + place, code, mask=there)
        _keep(rest, high, low, place, there)
        tile = tile + share[:, None] * rest[None, :]
        s, w, z, share = later


@triton.jit
def _halving_sum(x, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """[BLOCK, ROWS] → [ROWS]. Where all but one group is zero, the sum of that group by halving."""
    if BLOCK >= 128:
        x = fold(x, 128, ROWS)
    if BLOCK >= 64:
        x = fold(x, 64, ROWS)
    x = fold(x, 32, ROWS)
    x = fold(x, 16, ROWS)
    x = fold(x, 8, ROWS)
    x = fold(x, 4, ROWS)
    return tl.reshape(fold(x, 2, ROWS), (ROWS,))


@triton.jit
def _better_scale(tile, codes, gram, old, divisor, expert, begin, first, now, end, width, rows, r, k,
                  IS_INT4: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
                  ROWS: tl.constexpr):  # fmt: skip
    """See `columns._better_scale`: the new scale, and the slope that follows it."""
    there = r < rows
    reach = tl.zeros_like(tile)
    for i in range(S):
        column = expert * width + begin + i
        unit = _level(tl.load(codes + column * rows + r, mask=there, other=0), IS_INT4)
        share = tl.load(gram + column * width + now + k, mask=now + k < end, other=0.0)
        reach = reach + share[:, None] * unit[None, :]
    own = ((k >= first) & (k < first + S))[:, None]
    place = (expert * width + now + k)[:, None] * rows + r[None, :]
    units = _level(tl.load(codes + place, mask=own & there[None, :], other=0), IS_INT4)
    curvature = _halving_sum(tl.where(own, reach * units, 0.0), BLOCK, ROWS)
    wanted = old + tl.div_rn(_halving_sum(tl.where(own, tile * units, 0.0), BLOCK, ROWS), curvature)
    if IS_INT4:
        new = from_bits(round_bf16(wanted))
    else:
        new = wanted * divisor
        new = tl.div_rn(e4m3_value(e4m3_byte(tl.where(new > _SMALLEST, new, _SMALLEST))), divisor)
    sound = ((wanted > 0) == (old > 0)) & (wanted != 0) & (tl.abs(wanted) < float("inf"))
    sound = sound & (tl.abs(new) < float("inf")) & (new != 0) & (curvature > 0)
    new = tl.where(sound, new, old)
    return new, tile - (new - old)[None, :] * reach


@triton.jit
def _to_improve(codes, weight, gram, expert, i, now, end, width, rows, r, k):
    """Code, weight and curvature of column i of the block, and its share in each later column."""
    column = expert * width + tl.minimum(now + i, end - 1)
    there = r < rows
    code = tl.load(codes + column * rows + r, mask=there, other=0)
    w = tl.load(weight + column * rows + r, mask=there, other=0.0)
    curvature = tl.load(gram + column * width + tl.minimum(now + i, end - 1))
    share = tl.load(gram + column * width + now + k, mask=(k > i) & (now + k < end), other=0.0)
    return code, w, tl.zeros_like(w) + curvature, share


@triton.jit
def _improve_columns(slope, weight, gram, scale, zero, divisors, codes, high, low, change_high, change_low, panel, now,
                     end, width, rows, groups, IS_INT4: tl.constexpr, HAS_ZERO: tl.constexpr, SCALES: tl.constexpr,
                     S: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, there = tl.arange(0, BLOCK), r < rows
    inside = (now + k < end)[:, None] & there[None, :]
    tile = tl.load(slope + expert * panel + k[:, None] * rows + r[None, :], mask=inside, other=0.0)
    code, w, curvature, share = _to_improve(codes, weight, gram, expert, 0, now, end, width, rows, r, k)
    for first in range(0, end - now, S):
        of_group = (expert * groups + (now + first) // S) * rows + r
        before = tl.load(scale + of_group, mask=there, other=1.0)
        s, z = before, tl.zeros_like(before)
        if HAS_ZERO:
            z = tl.load(zero + of_group, mask=there, other=0.0)
        if SCALES:
            divisor = tl.zeros_like(before) + (1.0 if IS_INT4 else tl.load(divisors + expert))
            s, tile = _better_scale(tile, codes, gram, before, divisor, expert, now + first, first, now, end, width,
                                    rows, r, k, IS_INT4, S, BLOCK, ROWS)  # fmt: skip
            tl.store(scale + of_group, s, mask=there)
        for i in range(first, first + S):
            later = _to_improve(codes, weight, gram, expert, i + 1, now, end, width, rows, r, k)
            level = _level(code, IS_INT4) - z if HAS_ZERO else _level(code, IS_INT4)
            old, start = level * before, level * s
            step = tl.div_rn(tl.sum(tl.where(k[:, None] == i, tile, 0.0), axis=0), curvature)
            sound = (tl.abs(step) < float("inf")) & (curvature > 0)
            code, value = _coded(tl.where(sound, start + step, start), s, z, IS_INT4)
            place = (expert * width + now + i) * rows + r
            tl.store(codes + place, code, mask=there)
            _keep(w - value, high, low, place, there)
            _keep(old - value, change_high, change_low, (expert * (end - now) + i) * rows + r, there)
            tile = tile - share[:, None] * (value - start)[None, :]
            code, w, curvature, share = later


def round_columns(stack: Columns, now: slice, target: Tensor, group_EI: Tensor) -> None:
    """See `columns.round_columns`."""
    arrays = (stack.weight, stack.matrix, stack.scale, _or(stack.zero, stack.scale), group_EI, stack.codes, *stack.left)
    _launch(_round_columns, _ROUND_ROWS, stack, now, target, arrays)


def improve_columns(stack: Columns, now: slice, slope: Tensor, scales: bool) -> Halves:
    """See `columns.improve_columns`."""
    change = tuple(torch.empty(slope.shape, dtype=torch.bfloat16, device=slope.device) for _ in range(2))
    arrays = (stack.weight, stack.matrix, stack.scale, _or(stack.zero, stack.scale), _or(stack.divisor, stack.scale),
              stack.codes, *stack.left, *change)  # fmt: skip
    _launch(_improve_columns, _IMPROVE_ROWS, stack, now, slope, arrays, SCALES=scales, S=stack.fmt.group_size)
    return change


def _or(array: Tensor | None, unused: Tensor) -> Tensor:
    return unused if array is None else array


def _launch(
    kernel: Any, tile: int, stack: Columns, now: slice, view: Tensor, arrays: tuple[Tensor, ...], **constants: Any
) -> None:
    """`view`: [E, B, O] of a panel, whose columns lie next to each other."""
    experts, width, rows = stack.weight.shape
    if not all(array.is_contiguous() for array in arrays) or view.stride()[1:] != (rows, 1):
        raise ValueError("a column kernel wants contiguous arrays")
    kernel[(triton.cdiv(rows, tile), experts)](
        view, *arrays, view.stride(0), now.start, now.stop, width, rows, stack.scale.shape[1],
        IS_INT4=stack.fmt.name == "int4", HAS_ZERO=stack.zero is not None,
        BLOCK=max(32, triton.next_power_of_2(now.stop - now.start)), ROWS=tile, num_warps=1, **constants, **NO_FUSION,
    )  # fmt: skip
