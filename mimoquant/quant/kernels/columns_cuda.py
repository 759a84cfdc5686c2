"""`columns`' loops as Triton kernels: a program takes a block of columns of some rows of one expert, a row a thread.

Key idea: a strip of columns is moved by all that go before it in the block at once, by tensor cores (three products of
TF32 hold 21 bits of a float32), and its second half so by the first. Half a strip's columns then go one by one in
registers, and what a column needs is asked for while the one before is still at work. (A whole strip's would take the
compiler seven times as long: it walks through all operations for each of them that touches memory.) Within half a strip
the sequence of float32 operations of every element is that of the plain loops, with divisions rounded as IEEE wants
them, sums by halving and no fused multiply-add. So the bytes are those of the plain loops but for the order, and the
last bits, of the sums between halves.

Arrays that the kernels take (shapes: `columns`), float32 but where it is said, contiguous but for the first; an array
that a format does without is another one, never read:
    target, slope       [E, B, O] of a larger panel, whose experts lie `panel` apart; overwritten
    weight, codes       [E, I, O], codes uint8, weight bfloat16 perhaps: as in `kernels.columns.Columns`
    left, change        bfloat16, weight - value [E, I, O] and old - new [E, B, O]
    push, gram          [E, I, I]: row i says how far what column i leaves, or how far it steps, moves the later columns
    scale, zero, before [E, G, O]; `before`: the scales that codes had; divisors: float32 [E], nvfp4's global scales
    group               int32 [E, I], the group whose scale a column has
    reaches             [E, G of the block, B, O], how fast the slope falls when a group's scale grows
    now, begin, end, stop   columns of the weight: of the block from `now` on, of this launch begin..end
    width, rows, groups     I, O and G
Of a program: `r` [ROWS] its rows, `there` whether they exist, `tile` the expert's panel. W columns are a strip; i and
`at` are columns counted within the block. `_to_round` and `_to_improve` load what a column needs.
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
    TF32_PARTS,
    e2m1_code,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    from_bits,
    halving_sum,
    round_bf16,
    round_e2m1,
    round_level,
)
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.products import Halves

_ROWS = 32  # of a program: one a thread
_STRIP = 16  # columns that all before them move at once; every group size is a multiple
# registers of a thread, at most, of the refinement's loop: 150 would let 13 programs be at work at once, 128 lets 16
_LIMITED: dict[str, Any] = {} if torch.version.hip else {"maxnreg": 128}
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
def _moved(tile, matrix, first, last, at, now, width, rows, N: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    """Move the N columns that begin at column `at` of the block by columns first..last before them, W at once.

    `tile`: of columns first..last what each moves the later ones by, of those what they were before.
    """
    r, c, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, N), tl.arange(0, W)
    there = (r < rows)[None, :]
    strip = tile + (at + c)[:, None] * rows + r[None, :]
    corner = matrix + now * width + now + at
    total = tl.load(strip, mask=there, other=0.0)
    for k in tl.range(first, last, W, num_stages=1):
        done = k + d < last
        by = tl.load(tile + (k + d)[:, None] * rows + r[None, :], mask=done[:, None] & there, other=0.0)
        far = tl.load(corner + (k + d)[None, :] * width + c[:, None], mask=done[None, :], other=0.0)
        total = tl.dot(far, by, total, input_precision=TF32_PARTS)
    tl.store(strip, total, mask=there)


@triton.jit
def _moved_half(tile, matrix, first, at, now, width, rows, N: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    """Move half a strip, N columns that begin at column `at` of the block, by what moves it from column `first` on and
    has not yet: the first half comes with the second."""
    within = (at - first) % W
    if at > first:
        if within == 0:
            _moved(tile, matrix, first, at, at, now, width, rows, W, W, ROWS)
        else:
            _moved(tile, matrix, at - within, at, at, now, width, rows, N, W, ROWS)
        tl.debug_barrier()  # a lane reads other values than it wrote


@triton.jit
def _shares(matrix, at, j: tl.constexpr, now, width):
    """How far each of the half strip's columns before its column j moves that one, j numbers."""
    place = matrix + (now + at) * width + now + at + j
    out = ()
    for i in tl.static_range(j):
        out = out + (tl.load(place + i * width),)  # noqa: RUF005
    return out


@triton.jit
def _sum(value, shares, before, j: tl.constexpr):
    """A column's value, after the j before it in its half strip have moved it."""
    for i in tl.static_range(j):
        value = value + shares[i] * before[i]
    return value


@triton.jit
def _to_round(tile, scale, weight, zero, group, i, now, end, rows, r, HAS_ZERO: tl.constexpr):
    """What column i of the block wants to be, its weight, scale and zero point."""
    column = tl.minimum(now + i, end - 1)
    there = r < rows
    of_group = tl.load(group + column) * rows + r
    s = tl.load(scale + of_group, mask=there, other=1.0)
    w = tl.load(weight + column * rows + r, mask=there, other=0.0).to(tl.float32)
    z = tl.load(zero + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
    return tl.load(tile + (column - now) * rows + r, mask=there, other=0.0), w, s, z


@triton.jit
def _round_columns(
    target,
    weight,
    push,
    scale,
    zero,
    group,
    codes,
    left,
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
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, tile, whole = r < rows, target + expert * panel, expert * width * rows
    push += expert * width * width
    weight, codes, left, group = weight + whole, codes + whole, left + whole, group + expert * width
    scale, zero = scale + expert * groups * rows, zero + (expert * groups * rows if HAS_ZERO else 0)
    for at in range(0, end - now, W // 2):
        _moved_half(tile, push, 0, at, now, width, rows, W // 2, W, ROWS)
        wanted, w, s, z = _to_round(tile, scale, weight, zero, group, at, now, end, rows, r, HAS_ZERO)
        shares, by = (), ()
        for j in tl.static_range(W // 2):
            code, value = coded(_sum(wanted, shares, by, j), s, z, IS_INT4)
            rest, place = w - value, (now + at + j) * rows + r
            if j + 1 < W // 2:  # what the next one needs is asked for before anything is written
                wanted, w, s, z = _to_round(tile, scale, weight, zero, group, at + j + 1, now, end, rows, r, HAS_ZERO)
                shares, by = _shares(push, at, j + 1, now, width), by + (rest,)  # noqa: RUF005
            tl.store(codes + place, code, mask=there)
            tl.store(left + place, rest.to(tl.bfloat16), mask=there)
            tl.store(tile + (at + j) * rows + r, rest, mask=there)
        tl.debug_barrier()  # the next halves read what this one moves them by


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
def _to_improve(tile, codes, weight, gram, i, now, stop, width, rows, r):
    """Slope, code, weight and curvature of column i of the block."""
    column = tl.minimum(now + i, stop - 1)
    there, place = r < rows, column * rows + r
    code = tl.load(codes + place, mask=there, other=0)
    w = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    curvature = tl.load(gram + column * width + column)
    return tl.load(tile + (column - now) * rows + r, mask=there, other=0.0), code, w, tl.zeros_like(w) + curvature


@triton.jit
def _improve_columns(
    slope,
    weight,
    gram,
    scale,
    before,
    zero,
    codes,
    left,
    change,
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
    expert, r = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, tile, first, whole = r < rows, slope + expert * panel, begin - now, expert * width * rows
    gram += expert * width * width
    weight, codes, left = weight + whole, codes + whole, left + whole
    scale, before = scale + expert * groups * rows, before + expert * groups * rows
    zero += expert * groups * rows if HAS_ZERO else 0
    change += expert * (stop - now) * rows
    for at in range(first, end - now, W // 2):
        _moved_half(tile, gram, first, at, now, width, rows, W // 2, W, ROWS)
        steep, code, w, curvature = _to_improve(tile, codes, weight, gram, at, now, stop, width, rows, r)
        of_group = (now + at) // S * rows + r
        s, was = tl.load(scale + of_group, mask=there, other=1.0), tl.load(before + of_group, mask=there, other=1.0)
        z = tl.load(zero + of_group, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
        shares, by = (), ()
        for j in tl.static_range(W // 2):
            level = level_of(code, IS_INT4) - z if HAS_ZERO else level_of(code, IS_INT4)
            old, start = level * was, level * s
            step = tl.div_rn(_sum(steep, shares, by, j), curvature)
            sound = (tl.abs(step) < float("inf")) & (curvature > 0)
            code, value = coded(tl.where(sound, start + step, start), s, z, IS_INT4)
            new, rest, changed, moves = code, w - value, old - value, start - value
            if j + 1 < W // 2:  # what the next one needs is asked for before anything is written
                steep, code, w, curvature = _to_improve(
                    tile, codes, weight, gram, at + j + 1, now, stop, width, rows, r
                )
                shares, by = _shares(gram, at, j + 1, now, width), by + (moves,)  # noqa: RUF005
            place = (now + at + j) * rows + r
            tl.store(codes + place, new, mask=there)
            tl.store(left + place, rest.to(tl.bfloat16), mask=there)
            tl.store(change + (at + j) * rows + r, changed.to(tl.bfloat16), mask=there)
            tl.store(tile + (at + j) * rows + r, moves, mask=there)
        tl.debug_barrier()  # the next halves read what this one moves them by
    for at in range(end - now, stop - now, W):
        _moved(tile, gram, first, end - now, at, now, width, rows, W, W, ROWS)


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
    change = torch.empty(slope.shape, dtype=torch.bfloat16, device=slope.device)
    before = stack.scale if reach is None else stack.scale.clone()
    arrays = (
        stack.weight,
        stack.matrix,
        stack.scale,
        before,
        array_or(stack.zero, before),
        stack.codes,
        *stack.left,
        change,
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
            **_LIMITED,
            **_options(stack),
        )
    return (change,)


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
    return {"IS_INT4": stack.fmt.name == "int4", "ROWS": _ROWS, "num_warps": 1, "num_stages": 1, **NO_FUSION}
