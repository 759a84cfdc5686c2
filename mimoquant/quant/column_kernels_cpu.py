"""`columns`' loops compiled for CPUs: a slab of rows of one expert a task, columns in order, rows in vector registers.

Key idea: the sequence of float32 operations of every element is that of the plain loops, so the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.quant.cpu_kernels import F32, I32, compiled, e2m1_code, round_e2m1, round_level
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid

_SLAB = 128  # rows of a task: with a block of 128 columns, 64 KB an array
_INF = F32(np.inf)
_jit, _inline = compiled(), compiled(inline="always")
_NO_ZERO = torch.empty(0, 0)


@_inline
def _coded(x, scale, zero, is_int4):  # type: ignore[no-untyped-def]
    """(code, value) of `grid.Grid.encode` and `decode`."""
    if is_int4:
        level = round_level(x / scale + zero)
        return np.uint8(I32(level) + I32(8)), (level - zero) * scale
    rounded = round_e2m1(abs(x / scale))
    sign = I32(8) if x < F32(0) else I32(0)
    return np.uint8(e2m1_code(rounded) | sign), (-rounded if x < F32(0) else rounded) * scale


@_jit
def _round_slab(target, weight, push, scale, zero, is_int4, begin, end, codes, left):  # type: ignore[no-untyped-def]
    columns = weight.shape[0]
    for i in range(columns):
        x, w, s = target[i, begin:end], weight[i, begin:end], scale[i, begin:end]
        code, rest = codes[i, begin:end], left[i, begin:end]
        if zero.shape[0]:
            z = zero[i, begin:end]
            for r in range(end - begin):
                code[r], value = _coded(x[r], s[r], z[r], is_int4)
                rest[r] = w[r] - value
        else:
            for r in range(end - begin):
                code[r], value = _coded(x[r], s[r], F32(0), is_int4)
                rest[r] = w[r] - value
        for j in range(i + 1, columns):
            share, later = push[i, j], target[j, begin:end]
            for r in range(end - begin):
                later[r] = later[r] + share * rest[r]


@_jit
def _improve_slab(slope, values, codes, gram, scale, zero, is_int4, begin, end, change):  # type: ignore[no-untyped-def]
    columns = slope.shape[0]
    for i in range(columns):
        steep, old, s, code = slope[i, begin:end], values[i, begin:end], scale[i, begin:end], codes[i, begin:end]
        curvature = gram[i, i]
        for r in range(end - begin):
            step = steep[r] / curvature
            sound = abs(step) < _INF and curvature > F32(0)
            x = old[r] + step if sound else old[r]
            z = zero[i, begin + r] if zero.shape[0] else F32(0)
            code[r], value = _coded(x, s[r], z, is_int4)
            change[r] = value - old[r]
            old[r] = value
        for j in range(i + 1, columns):
            share, later = gram[i, j], slope[j, begin:end]
            for r in range(end - begin):
                later[r] = later[r] - share * change[r]


def round_columns(target: Tensor, weight: Tensor, push: Tensor, grid: Grid, fmt: Format) -> tuple[Tensor, Tensor]:
    """See `columns.round_columns`."""
    codes, left = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.shape)
    arrays = [part.numpy() for part in (target, weight, push, grid.scale, _zero(grid), codes, left)]

    def task(expert: int, begin: int, end: int) -> None:
        t, w, p, s, z, c, rest = (part[expert] if len(part) else part for part in arrays)
        _round_slab(t, w, p, s, z, fmt.name == "int4", begin, end, c, rest)

    _over_slabs(task, weight)
    return codes, left


def improve_columns(slope: Tensor, values: Tensor, codes: Tensor, gram: Tensor, grid: Grid, fmt: Format) -> None:
    """See `columns.improve_columns`."""
    arrays = [part.numpy() for part in (slope, values, codes, gram, grid.scale, _zero(grid))]

    def task(expert: int, begin: int, end: int) -> None:
        parts = (part[expert] if len(part) else part for part in arrays)
        _improve_slab(*parts, fmt.name == "int4", begin, end, np.empty(end - begin, F32))

    _over_slabs(task, slope)


def _zero(grid: Grid) -> Tensor:
    return _NO_ZERO if grid.zero is None else grid.zero


def _over_slabs(task: Callable[[int, int, int], None], like_EBO: Tensor) -> None:
    experts, _, rows = like_EBO.shape
    slabs = [(e, begin, min(begin + _SLAB, rows)) for e in range(experts) for begin in range(0, rows, _SLAB)]
    for done in [_pool(torch.get_num_threads()).submit(task, *slab) for slab in slabs]:
        done.result()


@cache
def _pool(threads: int) -> Any:
    return ThreadPoolExecutor(threads)
