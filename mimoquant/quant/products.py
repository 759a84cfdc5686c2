"""Products of float32 matrices: on CUDA by tensor cores, from two bfloat16 halves of each side.

Key idea: x = high + low holds 16 bits of x. high·high + high·low + low·high, each exact and summed in float32, is a
product to 2^-16 of its terms, at several times the speed of one in float32. What chooses codes needs no more: it lies
far below the steps between them. On a CPU the one half is the matrix itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimoquant.quant.order import cuda_passes

Halves = tuple[Tensor, ...]


def halves(matrix: Tensor) -> Halves:
    """A float32 matrix as `product` takes it: itself, or on CUDA the two bfloat16 tensors that sum to it, nearly."""
    if not matrix.is_cuda:
        return (matrix,)
    if kernels := cuda_passes(matrix):
        both: Halves = kernels.split(matrix)
        return both
    high = matrix.to(torch.bfloat16)
    return high, (matrix - high).to(torch.bfloat16)


def half_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a half. Of values that it holds exactly, one half is enough on the right of `product`."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def product(left: Halves, right: Halves) -> Tensor:
    """[E, m, k] @ [E, k, n] → float32 [E, m, n]. A `right` may be one half."""
    if len(left) == 1:
        return left[0] @ right[0]
    out = torch.bmm(left[1], right[0], out_dtype=torch.float32)
    return _added(out, left[:1], right)


def add_product(out: Tensor, left: Halves, right: Halves) -> None:
    """`product`, added to float32 [E, m, n], which may be a part of a larger tensor."""
    if len(left) == 1:
        out += left[0] @ right[0]
    else:
        _added(out, left, right)


def _added(out: Tensor, left: Halves, right: Halves) -> Tensor:
    """The products of halves that count, the smallest first: low · high, high · low, high · high."""
    for half in left[:0:-1]:
        torch.baddbmm(out, half, right[0], out_dtype=torch.float32, out=out)
    for half in right[::-1]:
        torch.baddbmm(out, left[0], half, out_dtype=torch.float32, out=out)
    return out


def rough_product(left: Tensor, right: Tensor) -> Tensor:
    """Of float32 matrices, float32 [E, m, n]; on CUDA from their first halves alone, to 2^-9 of its terms."""
    if not left.is_cuda:
        return left @ right
    return torch.bmm(left.to(torch.bfloat16), right.to(torch.bfloat16), out_dtype=torch.float32)


def exact_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix [E, m, k] as both sides of `take_product`, whose terms it holds to 2^-23; on CUDA as three
    bfloat16 parts side by side, [E, m, 6k]: in the order in which the six products that count meet."""
    if not matrix.is_cuda:
        return matrix, matrix
    high = matrix.to(torch.bfloat16)
    rest = matrix - high
    middle = rest.to(torch.bfloat16)
    low = rest.sub_(middle).to(torch.bfloat16)
    left, right = (low, high, middle, middle, high, high), (high, low, middle, high, middle, high)
    return torch.cat(left, -1), torch.cat(right, -1)


def take_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """The product of `exact_parts`, [E, m, k] and [E, k, n], taken from float32 [E, m, n]; in the one pass of it."""
    if not out.is_cuda:
        torch.baddbmm(out, left, right, alpha=-1, out=out)
    else:
        torch.baddbmm(out, left, right, alpha=-1, out_dtype=torch.float32, out=out)


def part(matrix: Halves, rows: slice, columns: slice) -> Halves:
    """A block of a stack of matrices."""
    return tuple(half[:, rows, columns] for half in matrix)


def transposed(matrix: Halves) -> Halves:
    """Each matrix of the stack, transposed."""
    return tuple(half.transpose(-1, -2) for half in matrix)


def zeros(experts: int, rows: int, columns: int, like: Tensor) -> Halves:
    """The halves of zero matrices, to be filled by `put`."""
    if not like.is_cuda:
        return (like.new_zeros(experts, rows, columns),)
    high, low = (like.new_zeros(experts, rows, columns, dtype=torch.bfloat16) for _ in range(2))
    return high, low


def put(matrix: Halves, rows: slice, values: Tensor, columns: slice = slice(None)) -> None:
    """Overwrite a block of a stack of matrices, by default whole rows."""
    for half, new in zip(matrix, halves(values), strict=True):
        half[:, rows, columns] = new
