"""`columns`' loops as Triton kernels: a program holds a block of columns of some rows of one expert in registers.

Key idea: the sequence of float32 operations of every element is that of the plain loops, with divisions rounded as IEEE
wants them, sums by halving and no fused multiply-add, so the bytes are the same. What a column needs is asked for while
the one before is still at work.

Arrays that the kernels take (shapes: `columns`), float32 but where it is said, contiguous but for the first; an array
that a format does without is another one, never read:
    target, slope       [E, B, O] of a larger panel, whose experts lie `panel` apart; overwritten
    weight, codes       [E, I, O], codes uint8, weight bfloat16 perhaps: as in `kernels.columns.Columns`
    high, low           bfloat16 [E, I, O], halves of weight - value; change_high, change_low: of old - new [E, B, O]
    push, gram          [E, I, I]: row i says how far what column i leaves, or how far it steps, moves the later columns
    scale, zero, before [E, G, O]; `before`: the scales that codes had; divisors: float32 [E], nvfp4's global scales
    group               int32 [E, I], the group whose scale a column has
    reaches             [E, G of the block, B, O], how fast the slope falls when a group's scale grows
    steps               int32, 0, 1, 2, ...: indexes that the compiler cannot see through
    now, begin, end, stop   columns of the weight: of the block from `now` on, of this launch begin..end
    width, rows, groups     I, O and G
Of a program: `r` [ROWS] its rows, `there` whether they exist, `tile` the expert's panel, `strip` [W, ROWS] some columns
of it; i is a column counted within the block. `_to_round` and `_to_improve` load what a column needs, `keep_halves`
stores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.formats import NVFP4_SMALLEST_SCALE
from mimoquant.quant.kernels.arithmetic_cuda import (
    NO_FUSION,
    e2m1_code,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    from_bits,
    halving_sum,
    round_bf16,
    round_e2m1,
    round_level,
    steps,
)
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.products import Halves

_ROWS = 32  # of a program: one a thread, if the compiler cannot see that they lie next to each other
_STRIP = 8  # columns that are at hand; every group size is a multiple
_SMALLEST = tl.constexpr(NVFP4_SMALLEST_SCALE)


@triton.jit
def coded(x, scale, zero, IS_INT4: tl.constexpr):
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
def level_of(code, IS_INT4: tl.constexpr):
    """The value of a code at a scale of one and a zero point of zero."""
    return code.to(tl.float32) - 8.0 if IS_INT4 else e2m1_value(code.to(tl.int32))


@triton.jit
def keep_halves(rest, high, low, place, there):
    """The two halves of `products.halves`."""
    top = rest.to(tl.bfloat16)
    tl.store(high + place, top, mask=there)
    tl.store(low + place, (rest - top.to(tl.float32)).to(tl.bfloat16), mask=there)


@triton.jit
def _to_round(scale, weight, zero, group, expert, i, now, end, width, rows, groups, r, HAS_ZERO: tl.constexpr):
    """Scale, value and zero point of column i of the block."""
    column = tl.minimum(now + i, end - 1)
    there = r < rows
    g = tl.load(group + expert * width + column).to(tl.int64)
    of_group = (expert * groups + g) * rows + r
    s = tl.load(scale + of_group, mask=there, other=1.0)
    w = tl.load(weight + (expert * width + column) * rows + r, mask=there, other=0.0).to(tl.float32)
    z = tl.load(zero + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
    return s, w, z


@triton.jit
def _share(matrix, expert, i, at, now, width, r, W: tl.constexpr):
    """How far column i of the block moves those of the strip that begins at column `at` of it, [W, ROWS].

    Said once for each row: else the compiler takes the numbers through shared memory, at twice the time.
    """
    corner = matrix + (expert * width + now) * width + now + at
    return tl.load(corner + i * width + tl.arange(0, W)[:, None] + 0 * r[None, :])


@triton.jit
def _strip(tile, matrix, expert, first, end, at, now, width, rows, r, W: tl.constexpr):
    """Strip [W, ROWS] that begins at column `at` of the block, after columns first..end have moved it.

    `tile`: of columns first..end what each moves the later ones by, of those what they were before.
    """
    there = r < rows
    strip = tl.load(tile + (at + tl.arange(0, W))[:, None] * rows + r[None, :], mask=there[None, :], other=0.0)
    for i in tl.range(first, end, loop_unroll_factor=4):
        by = tl.load(tile + i * rows + r, mask=there, other=0.0)
        strip = strip + _share(matrix, expert, i, at, now, width, r, W) * by[None, :]
    return strip


@triton.jit
def _column(strip, j, W: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, W)[:, None] == j, strip, 0.0), axis=0)


@triton.jit
def _round_columns(
    target,
    weight,
    push,
    scale,
    zero,
    group,
    codes,
    high,
    low,
    steps,
    panel,
    now,
    end,
    width,
    rows,
    groups,
    IS_INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
):
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.load(steps + tl.arange(0, ROWS))
    there, tile = r < rows, target + expert * panel
    s, w, z = _to_round(scale, weight, zero, group, expert, 0, now, end, width, rows, groups, r, HAS_ZERO)
    for at in range(0, end - now, W):
        strip = _strip(tile, push, expert, 0, at, at, now, width, rows, r, W)
        for j in range(W):
            i = at + j
            later = _to_round(scale, weight, zero, group, expert, i + 1, now, end, width, rows, groups, r, HAS_ZERO)
            near = _share(push, expert, i, at, now, width, r, W)
            code, value = coded(_column(strip, j, W), s, z, IS_INT4)
            rest, place = w - value, (expert * width + now + i) * rows + r
            tl.store(codes + place, code, mask=there)
            keep_halves(rest, high, low, place, there)
            tl.store(tile + i * rows + r, rest, mask=there)
            strip = strip + near * rest[None, :]
            s, w, z = later
        tl.debug_barrier()  # the next strips read what this one moves them by


@triton.jit
def _better_scale(
    slope,
    codes,
    scale,
    divisors,
    reaches,
    panel,
    now,
    first,
    columns,
    width,
    rows,
    groups,
    IS_INT4: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """See `columns._better_scale`. `first`: of the group, within the block."""
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, s, there = tl.arange(0, BLOCK), first + tl.arange(0, S), r < rows
    reach = reaches + (expert * (columns // S) + first // S) * columns * rows
    steep = slope + expert * panel
    place = (expert * width + now + s)[:, None] * rows + r[None, :]
    unit = level_of(tl.load(codes + place, mask=there[None, :], other=0), IS_INT4)
    at = s[:, None] * rows + r[None, :]
    curvature = halving_sum(tl.load(reach + at, mask=there[None, :], other=0.0) * unit, S, ROWS)
    gain = halving_sum(tl.load(steep + at, mask=there[None, :], other=0.0) * unit, S, ROWS)
    of_group = (expert * groups + (now + first) // S) * rows + r
    old = tl.load(scale + of_group, mask=there, other=1.0)
    wanted = old + tl.div_rn(gain, curvature)
    if IS_INT4:
        new = from_bits(round_bf16(wanted))
    else:
        divisor = tl.zeros_like(old) + tl.load(divisors + expert)
        new = wanted * divisor
        new = tl.div_rn(e4m3_value(e4m3_byte(tl.where(new > _SMALLEST, new, _SMALLEST))), divisor)
    sound = ((wanted > 0) == (old > 0)) & (wanted != 0) & (tl.abs(wanted) < float("inf"))
    sound = sound & (tl.abs(new) < float("inf")) & (new != 0) & (curvature > 0)
    new = tl.where(sound, new, old)
    tl.store(scale + of_group, new, mask=there)
    # of the columns that are still to come, the group's own among them
    at, inside = k[:, None] * rows + r[None, :], ((k >= first) & (k < columns))[:, None] & there[None, :]
    moved = (new - old)[None, :] * tl.load(reach + at, mask=inside, other=0.0)
    tl.store(steep + at, tl.load(steep + at, mask=inside, other=0.0) - moved, mask=inside)


@triton.jit
def _to_improve(codes, weight, gram, expert, i, now, end, width, rows, r):
    """Code, weight and curvature of column i of the block."""
    column = expert * width + tl.minimum(now + i, end - 1)
    there = r < rows
    code = tl.load(codes + column * rows + r, mask=there, other=0)
    w = tl.load(weight + column * rows + r, mask=there, other=0.0).to(tl.float32)
    curvature = tl.load(gram + column * width + tl.minimum(now + i, end - 1))
    return code, w, tl.zeros_like(w) + curvature


@triton.jit
def _improve_columns(
    slope,
    weight,
    gram,
    scale,
    before,
    zero,
    codes,
    high,
    low,
    change_high,
    change_low,
    steps,
    panel,
    now,
    begin,
    end,
    stop,
    width,
    rows,
    groups,
    IS_INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Columns begin..end of the block now..stop; those after them are moved and left to another launch."""
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.load(steps + tl.arange(0, ROWS))
    there, tile = r < rows, slope + expert * panel
    code, w, curvature = _to_improve(codes, weight, gram, expert, begin - now, now, stop, width, rows, r)
    for at in range(begin - now, end - now, W):
        strip = _strip(tile, gram, expert, begin - now, at, at, now, width, rows, r, W)
        of_group = (expert * groups + (now + at) // S) * rows + r
        s, was = tl.load(scale + of_group, mask=there, other=1.0), tl.load(before + of_group, mask=there, other=1.0)
        z = tl.load(zero + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
        for j in range(W):
            i = at + j
            later = _to_improve(codes, weight, gram, expert, i + 1, now, stop, width, rows, r)
            near = _share(gram, expert, i, at, now, width, r, W)
            level = level_of(code, IS_INT4) - z if HAS_ZERO else level_of(code, IS_INT4)
            old, start = level * was, level * s
            step = tl.div_rn(_column(strip, j, W), curvature)
            sound = (tl.abs(step) < float("inf")) & (curvature > 0)
            code, value = coded(tl.where(sound, start + step, start), s, z, IS_INT4)
            place = (expert * width + now + i) * rows + r
            tl.store(codes + place, code, mask=there)
            keep_halves(w - value, high, low, place, there)
            keep_halves(old - value, change_high, change_low, (expert * (stop - now) + i) * rows + r, there)
            tl.store(tile + i * rows + r, start - value, mask=there)
            strip = strip + near * (start - value)[None, :]
            code, w, curvature = later
        tl.debug_barrier()  # the next strips read what this one moves them by
    for at in range(end - now, stop - now, W):
        strip = _strip(tile, gram, expert, begin - now, end - now, at, now, width, rows, r, W)
        tl.store(tile + (at + tl.arange(0, W))[:, None] * rows + r[None, :], strip, mask=there[None, :])


def round_columns(stack: Columns, now: slice, target: Tensor, group_EI: Tensor) -> None:
    """See `columns.round_columns`."""
    arrays = (
        stack.weight,
        stack.matrix,
        stack.scale,
        array_or(stack.zero, stack.scale),
        group_EI,
        stack.codes,
        *stack.left,
        steps(target.device),
    )
    _check(stack, arrays, target)
    _, width, rows = stack.weight.shape
    _round_columns[_grid(stack)](
        target,
        *arrays,
        target.stride(0),
        now.start,
        now.stop,
        width,
        rows,
        stack.scale.shape[1],
        HAS_ZERO=stack.zero is not None,
        W=_STRIP,
        **_options(stack),
    )


def improve_columns(stack: Columns, now: slice, slope: Tensor, reach: Tensor | None) -> Halves:
    """See `columns.improve_columns`."""
    _, width, rows = stack.weight.shape
    change = tuple(torch.empty(slope.shape, dtype=torch.bfloat16, device=slope.device) for _ in range(2))
    before = stack.scale if reach is None else stack.scale.clone()
    arrays = (
        stack.weight,
        stack.matrix,
        stack.scale,
        before,
        array_or(stack.zero, before),
        stack.codes,
        *stack.left,
        *change,
        steps(slope.device),
    )
    _check(stack, arrays, slope)
    size, groups = stack.fmt.group_size, stack.scale.shape[1]
    for begin in range(now.start, now.stop, now.stop - now.start if reach is None else size):
        if reach is not None:
            _improve_scale(stack, now, begin - now.start, slope, reach)
        end = now.stop if reach is None else begin + size
        _improve_columns[_grid(stack)](
            slope,
            *arrays,
            slope.stride(0),
            now.start,
            begin,
            end,
            now.stop,
            width,
            rows,
            groups,
            HAS_ZERO=stack.zero is not None,
            S=size,
            W=_STRIP,
            **_options(stack),
        )
    return change


def _improve_scale(stack: Columns, now: slice, first: int, slope: Tensor, reach: Tensor) -> None:
    """Of the group that begins at column `first` of the block."""
    _, width, rows = stack.weight.shape
    _better_scale[_grid(stack)](
        slope,
        stack.codes,
        stack.scale,
        array_or(stack.divisor, stack.scale),
        reach,
        slope.stride(0),
        now.start,
        first,
        now.stop - now.start,
        width,
        rows,
        stack.scale.shape[1],
        S=stack.fmt.group_size,
        BLOCK=_block(now),
        **_options(stack),
    )


def array_or(array: Tensor | None, unused: Tensor) -> Tensor:
    return unused if array is None else array


def _check(stack: Columns, arrays: tuple[Tensor, ...], view: Tensor) -> None:
    """`view`: [E, B, O] of a panel, whose columns lie next to each other."""
    if not all(array.is_contiguous() for array in arrays) or view.stride()[1:] != (stack.weight.shape[2], 1):
        raise ValueError("a column kernel wants contiguous arrays")


def _grid(stack: Columns) -> tuple[int, int]:
    return triton.cdiv(stack.weight.shape[2], _ROWS), len(stack.weight)


def _block(now: slice) -> int:
    return max(32, int(triton.next_power_of_2(now.stop - now.start)))


def _options(stack: Columns) -> dict[str, Any]:
    return {"IS_INT4": stack.fmt.name == "int4", "ROWS": _ROWS, "num_warps": 1, **NO_FUSION}
