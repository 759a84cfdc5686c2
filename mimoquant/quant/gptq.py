"""GPTQ on scales that are already chosen, for many experts at once.

Key idea: the Gram matrix H of the inputs says what an error costs, tr(D H Dᵀ). Columns are rounded one after the other,
those with the largest H_jj first, and each error is pushed onto the columns that are still to come. Scales are static:
they belong to the column's place in the file, so the order needs no index in the file. All experts of a stack walk
through the columns together.

With J the reversal of rows and columns, J H J = L Lᵀ gives U = J L⁻¹ J, upper triangular with UᵀU = H⁻¹: one Cholesky
factor and one triangular solve instead of two factors and an inverse.

Left out: dynamic groups (the scale search goes first), activations. Shapes: E experts, O rows, I columns, G groups.
References: Frantar et al., GPTQ, arXiv 2210.17323; facts of dampening .05: llm-compressor issue 2922.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid

BLOCK = 128  # columns whose errors are kept back, then pushed onto the rest in one product
_MORE_DAMP = (10.0, 100.0)  # times the dampening, for a matrix that has no Cholesky factor
_LEAST_DAMP = 0.01  # what those multiply, if less was asked for


@dataclass(frozen=True)
class GptqResult:
    """Codes [E, O, I] uint8; how many experts needed more dampening, and how many were rounded plainly instead.

    `troubled`, bool [E], says which ones those are: nothing should trust their Gram matrix.
    """

    codes: Tensor
    damped: int
    rounded: int
    troubled: Tensor


def inverse_factor(gram_EII: Tensor, damp: float) -> tuple[Tensor, int, int]:
    """Upper triangular U [E, I, I] with UᵀU = (H + damp mean(diag H))⁻¹, and the two counts of `GptqResult`.

    Where no dampening helps, U is the identity: no error is pushed anywhere.
    """
    factor, damped, rounded = _inverse_factor(gram_EII, damp)
    return factor, int(damped.sum()), int(rounded.sum())


def _inverse_factor(gram_EII: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same with bool [E] in place of counts."""
    mean = torch.diagonal(gram_EII, dim1=-2, dim2=-1).mean(-1)
    step = (damp * mean).clamp(min=torch.finfo(torch.float32).tiny)
    eye = torch.eye(gram_EII.shape[-1], device=gram_EII.device)
    lower, info = torch.linalg.cholesky_ex((gram_EII + step[:, None, None] * eye).flip(-2, -1))
    damped = (info != 0) | ~torch.isfinite(lower).all(-1).all(-1)
    rounded = torch.zeros_like(damped)
    for expert in torch.nonzero(damped).flatten().tolist():
        lower[expert], fell_back = _once_more(gram_EII[expert], max(damp, _LEAST_DAMP) * mean[expert], eye)
        rounded[expert] = fell_back
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    for expert in torch.nonzero(~torch.isfinite(inverse).all(-1).all(-1)).flatten().tolist():
        inverse[expert], rounded[expert] = eye, True  # tiny pivots, and their inverse overflows
    return inverse.flip(-2, -1), damped & ~rounded, rounded


def _once_more(gram: Tensor, step: Tensor, eye: Tensor) -> tuple[Tensor, bool]:
    for factor in _MORE_DAMP:
        lower, info = torch.linalg.cholesky_ex((gram + factor * step * eye).flip(-2, -1))
        if info == 0 and bool(torch.isfinite(lower).all()):
            return lower, False
    return eye, True


def gptq(weight_EOI: Tensor, gram_EII: Tensor, grid: Grid, fmt: Format, damp: float) -> GptqResult:
    """Codes of `weight_EOI` (float32) on `grid`, made for inputs with the Gram matrix `gram_EII` (float32)."""
    order = torch.argsort(torch.diagonal(gram_EII, dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    sorted_gram = gram_EII.gather(1, order[:, :, None].expand_as(gram_EII))
    sorted_gram = sorted_gram.gather(2, order[:, None, :].expand_as(gram_EII))
    factor, damped, rounded = _inverse_factor(sorted_gram, damp)
    # columns first, so that the column loop reads and writes whole rows of memory
    weight = weight_EOI.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, weight_EOI.shape[1])).contiguous()
    group = order // fmt.group_size
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for begin in range(0, weight.shape[1], BLOCK):
        end = min(begin + BLOCK, weight.shape[1])
        errors = _round_block(weight, codes, factor, grid, group, fmt, begin, end)
        weight[:, end:] -= factor[:, begin:end, end:].transpose(1, 2) @ errors
    back = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    back = back.transpose(1, 2).contiguous()
    return GptqResult(back, int(damped.sum()), int(rounded.sum()), damped | rounded)


def _round_block(
    weight: Tensor, codes: Tensor, factor: Tensor, grid: Grid, group: Tensor, fmt: Format, begin: int, end: int
) -> Tensor:
    """Round columns begin..end of weight [E, I, O], in place; their errors [E, end - begin, O], over the diagonal."""
    errors = torch.empty_like(weight[:, begin:end])
    columns = grid.columns(group[:, begin:end])
    for i in range(begin, end):
        column, place = weight[:, i], columns.at(i - begin)
        codes[:, i] = place.encode(column, fmt)
        error = (column - place.decode(codes[:, i], fmt)) / factor[:, i, i, None]
        weight[:, i + 1 : end] -= factor[:, i, i + 1 : end, None] * error[:, None, :]
        errors[:, i - begin] = error
    return errors
