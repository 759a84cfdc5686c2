"""`columns`' loops compiled for CPUs: a slab of rows of one expert a task, columns in order, rows in vector registers.

Key idea: the sequence of float32 operations of every element is that of the plain loops, so the bytes are the same.
Loops take whole arrays and the rows `begin` to `end`: the compiler knows a slice of a contiguous row to be contiguous,
and reads it into vector registers; rows of an array that was sliced before it would read one by one.

Arrays of one expert that kernels take (shapes: `columns`), float32 but where it is said:
    target, slope       [B, O]: what the block's columns want to be; half the loss's slope at them. Both are overwritten
    weight, codes, left [I, O]: as in `kernels.columns.Columns`, codes uint8; codes and left are filled
    push, gram          [I, I]: row i says how far what column i leaves, or how far it steps, moves the later columns
    scale, zero         [G, O]; `zero` is empty where codes are symmetric
    group               int32 [I], the group whose scale a column has
    reach               [G, B, O], how fast the slope falls when a group's scale grows; empty: scales stay
    change              [B, O], filled with old - new values
    now, begin, end     the block's first column; the rows of this call
    divisor             nvfp4's global scale; 0: int4
Of the rows begin..end of one column, as slices: x, w, s, z of target, weight, scale, zero; code; rest of left.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mimoquant.quant.formats import E2M1_VALUES, NVFP4_SMALLEST_SCALE
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.kernels.compiled import compiled
from mimoquant.quant.kernels.e2m1_cpu import e2m1_code, round_e2m1
from mimoquant.quant.kernels.encode_cpu import (
    F32,
    I32,
    U32,
    e4m3_byte,
    e4m3_value,
    round_level,
)
from mimoquant.quant.kernels.fp8_cpu import round_bf16
from mimoquant.quant.kernels.pool import pool
from mimoquant.quant.products import Halves

_SLAB = 128  # rows of a task: with a block of 128 columns, 64 KB an array
INFINITY, _SMALLEST = F32(np.inf), F32(NVFP4_SMALLEST_SCALE)
_E2M1 = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], np.float32)
_jit, _inline = compiled(), compiled(inline="always")
_NOTHING, _NO_REACH = np.empty((0, 0), np.float32), np.empty((0, 0, 0), np.float32)


@_inline
def coded(x, scale, zero, is_int4):
    """(code, value) of `grid.Grid.encode` and `decode`."""
    if is_int4:
        level = round_level(x / scale + zero)
        return np.uint8(I32(level) + I32(8)), (level - zero) * scale
    rounded = round_e2m1(abs(x / scale))
    sign = I32(8) if x < F32(0) else I32(0)
    return np.uint8(e2m1_code(rounded) | sign), (-rounded if x < F32(0) else rounded) * scale


@_inline
def decoded(code, scale, zero, is_int4):
    """The value of a code."""
    level = F32(I32(code) - I32(8)) - zero if is_int4 else _E2M1[code]
    return level * scale


@_inline
def _storable(scale, divisor):
    """The scale that comes out of the file if this one goes in; `divisor` 0: int4."""
    if divisor == F32(0):
        return U32(round_bf16(F32(scale).view(U32))).view(F32)
    wanted = scale * divisor
    return e4m3_value(e4m3_byte(wanted if wanted > _SMALLEST else _SMALLEST)) / divisor


@_jit
def _push(rest, shares, first, later, begin, sign):
    """later[j] += sign * shares[j] * rest for the columns from `first` on, in the rows from `begin` on."""
    rows = rest.shape[0]
    for j in range(first, later.shape[0]):
        share, row = sign * shares[j], later[j, begin : begin + rows]
        for r in range(rows):
            row[r] = row[r] + share * rest[r]


@_jit
def _round_slab(target, weight, push, scale, zero, group, is_int4, now, codes, left, begin, end):
    for i in range(target.shape[0]):
        column = now + i
        x, w, s = target[i, begin:end], weight[column, begin:end], scale[group[column], begin:end]
        code, rest = codes[column, begin:end], left[column, begin:end]
        if zero.shape[0]:
            z = zero[group[column], begin:end]
            for r in range(x.shape[0]):
                code[r], value = coded(x[r], s[r], z[r], is_int4)
                rest[r] = w[r] - value
        else:
            for r in range(x.shape[0]):
                code[r], value = coded(x[r], s[r], F32(0), is_int4)
                rest[r] = w[r] - value
        _push(rest, push[column, now:], i + 1, target, begin, F32(1))


@_jit
def _better_scale(slope, codes, scale, divisor, is_int4, first, size, reach, now, begin, sums):
    """See `columns._better_scale`. `first`: of the group, within the block; `sums` is room to work in."""
    rows = scale.shape[0]
    end = begin + rows
    for i in range(size):
        code, far, steep = codes[now + first + i, begin:end], reach[first + i, begin:end], slope[first + i, begin:end]
        for r in range(rows):
            unit = decoded(code[r], F32(1), F32(0), is_int4)
            sums[0, i, r] = far[r] * unit
            sums[1, i, r] = steep[r] * unit
    half = size // 2
    while half:
        for i in range(half):
            for r in range(rows):
                sums[0, i, r] = sums[0, i, r] + sums[0, i + half, r]
                sums[1, i, r] = sums[1, i, r] + sums[1, i + half, r]
        half //= 2
    for r in range(rows):
        curvature, old = sums[0, 0, r], scale[r]
        wanted = old + sums[1, 0, r] / curvature
        new = _storable(wanted, divisor)
        same = (wanted > F32(0)) == (old > F32(0)) and wanted != F32(0) and abs(wanted) < INFINITY
        new = new if same and abs(new) < INFINITY and new != F32(0) and curvature > F32(0) else old
        sums[0, 0, r], scale[r] = new - old, new
    for k in range(slope.shape[0]):
        steep, far = slope[k, begin:end], reach[k, begin:end]
        for r in range(rows):
            steep[r] = steep[r] - sums[0, 0, r] * far[r]


@_jit
def _improve_slab(
    slope, weight, codes, gram, scale, zero, divisor, is_int4, reach, now, size, left, change, begin, end
):
    rows = end - begin
    sums, step, before = np.empty((2, size, rows), F32), np.empty(rows, F32), np.empty(rows, F32)
    for first in range(0, slope.shape[0], size):
        s, has_zero = scale[(now + first) // size, begin:end], zero.shape[0] > 0
        for r in range(rows):  # an assignment of slices would be compiled with the text of its error, for seconds
            before[r] = s[r]
        if reach.shape[0]:
            _better_scale(slope, codes, s, divisor, is_int4, first, size, reach[first // size], now, begin, sums)
        for i in range(first, first + size):
            column = now + i
            code, w, rest = codes[column, begin:end], weight[column, begin:end], left[column, begin:end]
            steep, changed, curvature = slope[i, begin:end], change[i, begin:end], gram[column, column]
            for r in range(rows):
                z = zero[column // size, begin + r] if has_zero else F32(0)
                old, start = decoded(code[r], before[r], z, is_int4), decoded(code[r], s[r], z, is_int4)
                away = steep[r] / curvature
                sound = abs(away) < INFINITY and curvature > F32(0)
                code[r], value = coded(start + away if sound else start, s[r], z, is_int4)
                step[r], rest[r], changed[r] = value - start, w[r] - value, old - value
            _push(step, gram[column, now:], i + 1, slope, begin, F32(-1))


def round_columns(stack: Columns, now: slice, target: Tensor, group_EI: Tensor) -> None:
    """See `columns.round_columns`."""
    is_int4 = stack.fmt.name == "int4"

    def task(e: int, begin: int, end: int) -> None:
        zero = _NOTHING if stack.zero is None else stack.zero[e].numpy()
        _round_slab(
            target[e].numpy(),
            stack.weight[e].numpy(),
            stack.matrix[e].numpy(),
            stack.scale[e].numpy(),
            zero,
            group_EI[e].numpy(),
            is_int4,
            now.start,
            stack.codes[e].numpy(),
            stack.left[0][e].numpy(),
            begin,
            end,
        )

    _over_slabs(task, target)


def improve_columns(stack: Columns, now: slice, slope: Tensor, reach: Tensor | None) -> Halves:
    """See `columns.improve_columns`."""
    change, is_int4 = torch.empty(slope.shape), stack.fmt.name == "int4"

    def task(e: int, begin: int, end: int) -> None:
        zero = _NOTHING if stack.zero is None else stack.zero[e].numpy()
        far = _NO_REACH if reach is None else reach[e].numpy()
        divisor = F32(0 if stack.divisor is None else float(stack.divisor[e]))
        _improve_slab(
            slope[e].numpy(),
            stack.weight[e].numpy(),
            stack.codes[e].numpy(),
            stack.matrix[e].numpy(),
            stack.scale[e].numpy(),
            zero,
            divisor,
            is_int4,
            far,
            now.start,
            stack.fmt.group_size,
            stack.left[0][e].numpy(),
            change[e].numpy(),
            begin,
            end,
        )

    _over_slabs(task, slope)
    return (change,)


def _over_slabs(task: Callable[[int, int, int], None], like_EBO: Tensor) -> None:
    experts, _, rows = like_EBO.shape
    slabs = [(e, begin, min(begin + _SLAB, rows)) for e in range(experts) for begin in range(0, rows, _SLAB)]
    for done in [pool(torch.get_num_threads()).submit(task, *slab) for slab in slabs]:
        done.result()
