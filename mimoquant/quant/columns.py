"""The two inner loops over the columns of a block: GPTQ's, and the refinement's.

Key idea: within a block each column waits for the one before, so a tensor library launches a handful of operations a
column on little data. The loops stand here in plain torch, which says what they do; compiled ones of equal bytes run in
their place: `column_kernels_cpu` on a CPU, `column_kernels_cuda` on CUDA where Triton is. Columns come first in memory,
so that every loop reads and writes whole rows of it. Products and sums are separate float32 operations everywhere.

Shapes: E experts, B columns of a block, O rows of the weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid


def round_columns(
    target_EBO: Tensor, weight_EBO: Tensor, push_EBB: Tensor, grid: Grid, fmt: Format
) -> tuple[Tensor, Tensor]:
    """Round columns one after the other; what is left of each moves the targets of those to come.

    Args:
        target_EBO: what the columns want to be; overwritten.
        push_EBB: row i says how far what is left of column i moves each later column.
        grid: of every column, [E, B, O].

    Returns codes, uint8, and what is left, weight - value, float32; both [E, B, O].
    """
    kernels = _kernels(target_EBO.device.type)
    run = kernels.round_columns if kernels else round_columns_plainly
    codes, left = run(target_EBO, weight_EBO, push_EBB, grid, fmt)
    return codes, left


def improve_columns(
    slope_EBO: Tensor, values_EBO: Tensor, codes_EBO: Tensor, gram_EBB: Tensor, grid: Grid, fmt: Format
) -> None:
    """Give each column its best code, all other columns as they are. `values_EBO` and `codes_EBO` are overwritten.

    Args:
        slope_EBO: (weight - values) times the Gram matrix, at these columns; overwritten.
    """
    kernels = _kernels(slope_EBO.device.type)
    run = kernels.improve_columns if kernels else improve_columns_plainly
    run(slope_EBO, values_EBO, codes_EBO, gram_EBB, grid, fmt)


@cache
def _kernels(device: str) -> Any:
    """The module with compiled loops for a kind of device, or None."""
    if device == "cpu":
        from mimoquant.quant import column_kernels_cpu

        return column_kernels_cpu
    try:
        from mimoquant.quant import column_kernels_cuda
    except ImportError:  # no Triton here
        return None
    return column_kernels_cuda


def round_columns_plainly(
    target: Tensor, weight: Tensor, push: Tensor, grid: Grid, fmt: Format
) -> tuple[Tensor, Tensor]:
    """See `round_columns`."""
    codes, left = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        place = grid.at(i)
        codes[:, i] = place.encode(target[:, i], fmt)
        left[:, i] = weight[:, i] - place.decode(codes[:, i], fmt)
        target[:, i + 1 :] += push[:, i, i + 1 :, None] * left[:, i, None, :]
    return codes, left


def improve_columns_plainly(
    slope: Tensor, values: Tensor, codes: Tensor, gram: Tensor, grid: Grid, fmt: Format
) -> None:
    """See `improve_columns`."""
    for i in range(slope.shape[1]):
        place, old, curvature = grid.at(i), values[:, i].clone(), gram[:, i, i, None]
        step = slope[:, i] / curvature
        sound = torch.isfinite(step) & (curvature > 0)  # else all codes cost the same: keep this one
        codes[:, i] = place.encode(torch.where(sound, old + step, old), fmt)
        values[:, i] = place.decode(codes[:, i], fmt)
        slope[:, i + 1 :] -= gram[:, i, i + 1 :, None] * (values[:, i] - old)[:, None, :]
