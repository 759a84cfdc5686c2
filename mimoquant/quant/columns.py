"""The two inner loops over the columns of a block: GPTQ's, and the refinement's.

Key idea: within a block each column waits for the one before, so a tensor library launches a handful of operations a
column on little data. The loops stand here in plain torch, which says what they do; compiled ones of equal bytes (on
CUDA but for sums between strips of columns, which are products there) run in their place: `kernels.columns_cpu` on a
CPU, `kernels.columns_cuda` on CUDA where Triton is. Columns come first in memory, so that every loop reads and writes
whole rows of it. Products and sums are separate float32 operations everywhere else.

Shapes: E experts, I columns of the weight, O its rows, B columns of the block `now`, G groups, S columns of a group.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mimoquant.quant.formats import NVFP4_SMALLEST_SCALE, Format
from mimoquant.quant.grid import Grid, e2m1
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.kernels.rounding import halving_sum
from mimoquant.quant.kernels.triton_modules import triton_kernels
from mimoquant.quant.order import cuda_passes
from mimoquant.quant.products import Halves, first_half


def round_columns(stack: Columns, now: slice, target_EBO: Tensor, group_EI: Tensor) -> None:
    """Round columns one after the other to the codes nearest to their targets; what is left of each moves the targets
    of those to come. Fills codes and left.

    Args:
        target_EBO: what the columns want to be; overwritten.
        group_EI: the group (int32) whose scale a column has. Row i of `stack.matrix` says how far what is left of
            column i moves each later column.
    """
    kernels = _kernels(target_EBO.device.type)
    (kernels.round_columns if kernels else round_columns_plainly)(stack, now, target_EBO, group_EI)


def improve_columns(stack: Columns, now: slice, slope_EBO: Tensor, reach_EGBO: Tensor | None) -> Halves:
    """Group after group: the best scale for its codes (with `reach_EGBO`), then for each of its columns the best code.

    Fills scale, codes and left. `stack.matrix` is the Gram matrix. Returns old - new values, [E, B, O].

    Args:
        slope_EBO: (weight - values) times the Gram matrix, minus half the loss's gradient; overwritten.
        reach_EGBO: the block's Gram matrix times each group's values at a scale of one: how fast the slope falls when
            that group's scale grows.
    """
    kernels = _kernels(slope_EBO.device.type)
    change: Halves = (kernels.improve_columns if kernels else improve_columns_plainly)(
        stack, now, slope_EBO, reach_EGBO
    )
    return change


@cache
def _kernels(device: str) -> Any:
    """The module with compiled loops for a kind of device, or None."""
    if device == "cpu":
        from mimoquant.quant.kernels import columns_cpu

        return columns_cpu
    return triton_kernels("columns_cuda")


def units(codes: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of symmetric codes at a scale of one."""
    if (kernels := cuda_passes(codes)) and dtype == torch.bfloat16:
        levels: Tensor = kernels.units(codes, fmt.name == "int4")
        return levels
    return codes.to(dtype).sub_(8.0) if fmt.name == "int4" else e2m1(codes.device).to(dtype)[codes.int()]


def round_columns_plainly(stack: Columns, now: slice, target: Tensor, group_EI: Tensor) -> None:
    """See `round_columns`."""
    left = torch.empty_like(target)
    every = torch.arange(len(target), device=target.device)
    for i, column in enumerate(range(now.start, now.stop)):
        group = group_EI[:, column].long()
        place = Grid(stack.scale[every, group], None if stack.zero is None else stack.zero[every, group])
        stack.codes[:, column] = place.encode(target[:, i], stack.fmt)
        left[:, i] = stack.weight[:, column] - place.decode(stack.codes[:, column], stack.fmt)
        target[:, i + 1 :] += stack.matrix[:, column, column + 1 : now.stop, None] * left[:, i, None, :]
    stack.left[0][:, now] = left


def improve_columns_plainly(stack: Columns, now: slice, slope: Tensor, reach: Tensor | None) -> Halves:
    """See `improve_columns`."""
    size, fmt, change = stack.fmt.group_size, stack.fmt, torch.empty_like(slope)
    left = torch.empty_like(slope)
    for begin in range(now.start, now.stop, size):
        group, first = begin // size, begin - now.start
        zero = None if stack.zero is None else stack.zero[:, group]
        before = Grid(stack.scale[:, group].clone(), zero)
        if reach is not None:
            _better_scale(stack, now, slope, group, reach[:, first // size])
        place = Grid(stack.scale[:, group], zero)
        for i, column in enumerate(range(begin, begin + size), start=first):
            old, start = (grid.decode(stack.codes[:, column], fmt) for grid in (before, place))
            curvature = stack.matrix[:, column, column, None]
            step = slope[:, i] / curvature
            sound = torch.isfinite(step) & (curvature > 0)  # else all codes cost the same: keep this one
            stack.codes[:, column] = place.encode(torch.where(sound, start + step, start), fmt)
            new = place.decode(stack.codes[:, column], fmt)
            slope[:, i + 1 :] -= stack.matrix[:, column, column + 1 : now.stop, None] * (new - start)[:, None, :]
            left[:, i], change[:, i] = stack.weight[:, column] - new, old - new
    stack.left[0][:, now] = left
    return first_half(change)


def _better_scale(stack: Columns, now: slice, slope: Tensor, group: int, reach: Tensor) -> None:
    """The group's least-squares scale for its codes, as its format stores it; `slope` follows."""
    size = stack.fmt.group_size
    own = slice(group * size, (group + 1) * size)
    inside = slice(own.start - now.start, own.stop - now.start)
    unit = units(stack.codes[:, own], stack.fmt)
    curvature = halving_sum((reach[:, inside] * unit).transpose(1, 2))
    old = stack.scale[:, group].clone()
    wanted = old + halving_sum((slope[:, inside] * unit).transpose(1, 2)) / curvature
    new = _storable(wanted, stack)
    # never to zero or through it; and where the curvature is not positive, `wanted` means nothing
    sound = ((wanted > 0) == (old > 0)) & (wanted != 0) & torch.isfinite(wanted)
    sound &= torch.isfinite(new) & (new != 0) & (curvature > 0)
    new = torch.where(sound, new, old)
    slope -= (new - old)[:, None, :] * reach
    stack.scale[:, group] = new


def _storable(scale: Tensor, stack: Columns) -> Tensor:
    """The scale [E, O] that comes out of the file if this one goes in."""
    if stack.divisor is None:
        return scale.to(torch.bfloat16).to(torch.float32)
    divisor = stack.divisor.reshape(-1, 1)
    return (scale * divisor).clamp(NVFP4_SMALLEST_SCALE, 448.0).to(torch.float8_e4m3fn).to(torch.float32) / divisor
