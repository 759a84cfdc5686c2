"""Rows and columns of stacks of matrices in another order, as methods walk through them.

Key idea: an order is a permutation an expert, and what lies in it is a copy: data move once, whatever is turned. On
CUDA each is one pass (`kernels.stacks_cuda`), where Triton is.
Shapes: E experts, O rows, I columns, n of a symmetric matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimoquant.quant.kernels.triton_modules import triton_kernels


def falling(matrix: Tensor) -> Tensor:
    """[E, n]: rows by falling diagonal."""
    return torch.argsort(torch.diagonal(matrix, dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)


def inverse(order: Tensor) -> Tensor:
    """The order [E, n] that undoes another."""
    return torch.argsort(order, dim=-1)


def reordered(matrices: Tensor, order: Tensor) -> Tensor:
    """The rows of each matrix of a stack [E, I, n] in an order [E, I]; contiguous."""
    if kernels := cuda_passes(matrices):
        moved: Tensor = kernels.laid(matrices, order, None)
        return moved
    experts, rows, width = matrices.shape
    place = order + rows * torch.arange(experts, device=order.device)[:, None]
    return matrices.reshape(-1, width).index_select(0, place.flatten()).view(matrices.shape)


def laid(matrix_EOI: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A stack of matrices with their rows [E, O] and columns [E, I] in another order; contiguous."""
    if kernels := cuda_passes(matrix_EOI):
        moved: Tensor = kernels.laid(matrix_EOI, rows, columns)
        return moved
    return reordered(matrix_EOI, rows).gather(2, columns[:, None, :].expand_as(matrix_EOI))


def laid_back(matrix_EOI: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What `laid` has made of the result."""
    return laid(matrix_EOI, inverse(rows), inverse(columns))


def turned(matrix_EOI: Tensor) -> Tensor:
    """Column by column: [E, I, O], contiguous."""
    if kernels := cuda_passes(matrix_EOI):
        other: Tensor = kernels.turned(matrix_EOI)
        return other
    return matrix_EOI.mT.contiguous()


def cuda_passes(matrix: Tensor) -> Any:
    """The module of passes over a stack that lies on CUDA; None where it does not, or there is no Triton."""
    return triton_kernels("stacks_cuda") if matrix.is_cuda else None
