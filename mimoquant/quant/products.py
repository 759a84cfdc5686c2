"""Products of float32 matrices: on CUDA by tensor cores, from two bfloat16 halves of each side.

Key idea: x = high + low holds 16 bits of x. high·high + high·low + low·high, each exact and summed in float32, is a
product to 2^-16 of its terms, at several times the speed of one in float32. What chooses codes needs no more: it lies
far below the steps between them. What errors push onto other columns needs not even that: high·high, to 2^-9 of its
terms, moves a weight by a hundredth of a step at most. On a CPU the one half is the matrix itself.
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


def first_half(matrix: Tensor) -> Halves:
    """The first of `halves` alone."""
    return (matrix.to(half_dtype(matrix.device)),)


def half_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a half. Of values that it holds exactly, one half is enough on the right of `product`."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def product(left: Halves, right: Halves) -> Tensor:
    """[E, m, k] @ [E, k, n] → float32 [E, m, n]. Either may be one half."""
    if not left[0].is_cuda:
        return left[0] @ right[0]
    first, *more = _pairs(left, right)
    return _added(torch.bmm(*first, out_dtype=torch.float32), more)


def add_product(out: Tensor, left: Halves, right: Halves) -> None:
    """`product`, added to float32 [E, m, n], which may be a part of a larger tensor."""
    if not out.is_cuda:
        out += left[0] @ right[0]
    else:
        _added(out, _pairs(left, right))


def _pairs(left: Halves, right: Halves) -> list[tuple[Tensor, Tensor]]:
    """The halves whose products count, the smallest first: low · high, high · low, high · high."""
    return [(half, right[0]) for half in left[:0:-1]] + [(left[0], half) for half in right[::-1]]


def _added(out: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    for one, other in pairs:
        torch.baddbmm(out, one, other, out_dtype=torch.float32, out=out)
    return out


def rough_product(left: Tensor, right: Tensor) -> Tensor:
    """Of float32 matrices, float32 [E, m, n]; on CUDA from their first halves alone, to 2^-9 of its terms."""
    if not left.is_cuda:
        return left @ right
    return torch.bmm(left.to(torch.bfloat16), right.to(torch.bfloat16), out_dtype=torch.float32)


def rough_chain(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """left · middle · right, each `rough_product`; halves that are there already are taken as they are."""
    if not left.is_cuda:
        return left @ middle @ right
    half = torch.bfloat16
    return torch.bmm(torch.bmm(left.to(half), middle.to(half)), right.to(half), out_dtype=torch.float32)


def exact_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix [E, m, k] as both sides of `take_product`, whose terms it holds to 2^-23; on CUDA as three
    bfloat16 parts side by side, [E, m, 6k]: in the order in which the six products that count meet."""
    if not matrix.is_cuda:
        return matrix, matrix
    if kernels := cuda_passes(matrix):
        both: tuple[Tensor, Tensor] = kernels.exact(matrix)
        return both
    high = matrix.to(torch.bfloat16)
    rest = matrix - high
    middle = rest.to(torch.bfloat16)
    low = rest.sub_(middle).to(torch.bfloat16)
    left, right = (low, high, middle, middle, high, high), (high, low, middle, high, middle, high)
    return torch.cat(left, -1), torch.cat(right, -1)


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ of float32 matrices, from their `exact_parts`."""
    if not left.is_cuda:
        return left @ right.mT
    return torch.bmm(exact_parts(left)[0], exact_parts(right)[1].mT, out_dtype=torch.float32)


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


def put(matrix: Halves, rows: slice, values: Tensor, columns: slice) -> None:
    """Overwrite a block of a stack of matrices."""
    for half, new in zip(matrix, halves(values), strict=True):
        half[:, rows, columns] = new
