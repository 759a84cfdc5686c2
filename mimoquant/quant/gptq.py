"""GPTQ on scales that are already chosen, for many experts at once.

Key idea: the Gram matrix H of the inputs says what an error costs, tr(D H Dᵀ). Columns are rounded one after the other,
those with the largest H_jj first, and each error is pushed onto the columns that are still to come. Scales are static:
they belong to the column's place in the file, so the order needs no index in the file. All experts of a stack walk
through the columns together.

With the columns in reverse order, H = L Lᵀ gives the loss as a sum of squares, one a column, and the square of column i
is least where its weight is moved by the sum of L_ji / L_ii times what was left of the columns j before it (Babai's
nearest plane). The choices are those of GPTQ's inverse factor, at the price of one Cholesky factor and nothing else.

Left out: dynamic groups (the scale search goes first), activations. Shapes: E experts, O rows, I columns, G groups.
References: Frantar et al., GPTQ, arXiv 2210.17323; Chen et al., arXiv 2507.18553 (that both are the same); facts of
dampening .05: llm-compressor issue 2922.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimoquant.quant.columns import round_columns
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.products import add_product, halves, part, transposed, zeros

BLOCK = 128  # columns that are rounded before what is left of them is pushed onto the rest of their panel
_PANEL, _CUDA_PANEL = 512, 256  # columns that are pushed onto by all before them in one product
_MORE_DAMP = (10.0, 100.0)  # times the dampening, for a matrix that has no Cholesky factor
_FACTOR_PANEL = 512  # columns of a Cholesky factor that are made at once, on CUDA
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


def push_factor(gram_EII: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """How far what is left of column i moves column j > i: strictly upper triangular, [E, I, I].

    Args:
        gram_EII: rows and columns in the order in which they are rounded.
        damp: of the mean diagonal, added to the diagonal.

    Also returns, bool [E], which experts needed more dampening, and which are rounded plainly because none helped:
    there the factor is zero.
    """
    mean = torch.diagonal(gram_EII, dim1=-2, dim2=-1).mean(-1)
    step = (damp * mean).clamp(min=torch.finfo(torch.float32).tiny)
    reversed_gram = gram_EII.flip(-2, -1)
    torch.diagonal(reversed_gram, dim1=-2, dim2=-1).add_(step[:, None])
    factor, sound = _normal_factor(reversed_gram)
    damped = ~sound
    rounded = torch.zeros_like(damped)
    for expert in torch.nonzero(damped).flatten().tolist():
        for more in _MORE_DAMP:
            one = gram_EII[expert : expert + 1].flip(-2, -1)
            torch.diagonal(one, dim1=-2, dim2=-1).add_(more * max(damp, _LEAST_DAMP) * mean[expert])
            again, sound = _normal_factor(one)
            if bool(sound):
                factor[expert] = again[0]
                break
        else:
            factor[expert], rounded[expert] = 0.0, True
    return factor.flip(-2, -1).triu_(1).contiguous(), damped & ~rounded, rounded


def _normal_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor [E, I, I], each column over its diagonal element, and bool [E], whether there is one."""
    lower, info = _cholesky(gram)
    lower /= torch.diagonal(lower, dim1=-2, dim2=-1)[:, None, :].clone()
    return lower, (info == 0) & torch.isfinite(torch.linalg.vector_norm(lower, float("inf"), dim=(1, 2)))


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex`; on CUDA panel by panel, since the library's batched one leaves most of a GPU idle."""
    width = gram.shape[-1]
    if not gram.is_cuda or width <= _FACTOR_PANEL:
        whole: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(gram)
        return whole
    lower, info = gram.clone(), torch.zeros(len(gram), dtype=torch.int32, device=gram.device)
    for first, end in spans(0, width, _FACTOR_PANEL):
        own, rest = slice(first, end), slice(end, width)
        lower[:, own, own], failed = torch.linalg.cholesky_ex(lower[:, own, own])
        info = torch.where(info == 0, failed, info)
        if end < width:
            beside = lower[:, rest, own].mT
            below = torch.linalg.solve_triangular(lower[:, own, own], beside, upper=False).mT.contiguous()
            lower[:, rest, own] = below
            for begin, stop in spans(end, width, _FACTOR_PANEL):  # the lower triangle is enough
                there, part_of = lower[:, begin:, begin:stop], below[:, begin - end : stop - end]
                torch.baddbmm(there, below[:, begin - end :], part_of.mT, alpha=-1, out=there)
    return lower.tril_(), info


def panel_of(matrix: Tensor) -> int:
    """Columns of a panel: on CUDA fewer, since what is pushed within one costs memory traffic and not arithmetic."""
    return _CUDA_PANEL if matrix.is_cuda else _PANEL


def spans(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """begin..end in pieces."""
    return [(first, min(first + size, end)) for first in range(begin, end, size)]


def gptq(weight_EOI: Tensor, gram_EII: Tensor, grid: Grid, fmt: Format, damp: float) -> GptqResult:
    """Codes of `weight_EOI` (float32) on `grid`, made for inputs with the Gram matrix `gram_EII` (float32).

    Weights that lie in memory column by column need no copy; codes do.
    """
    experts, rows, width = weight_EOI.shape
    order = torch.argsort(torch.diagonal(gram_EII, dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    ordered = reordered(gram_EII, order).gather(2, order[:, None, :].expand_as(gram_EII))
    factor, damped, rounded = push_factor(ordered, damp)
    del ordered
    push, every, group = halves(factor), slice(None), (order // fmt.group_size).to(torch.int32)
    weight = reordered(weight_EOI.transpose(1, 2), order)
    turned = grid.turned()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    stack = Columns(weight, factor, turned.scale, turned.zero, codes, zeros(experts, width, rows, weight), fmt)
    for first, end in spans(0, width, panel_of(weight)):
        target, before = weight[:, first:end].clone(), slice(0, first)
        if first:
            add_product(target, transposed(part(push, before, slice(first, end))), part(stack.left, before, every))
        for now in (slice(*span) for span in spans(first, end, BLOCK)):
            round_columns(stack, now, target[:, now.start - first : now.stop - first], group)
            later = transposed(part(push, now, slice(now.stop, end)))
            add_product(target[:, now.stop - first :], later, part(stack.left, now, every))
    back, troubled = reordered(codes, torch.argsort(order, dim=-1)), damped | rounded
    return GptqResult(back.transpose(1, 2), int(damped.sum()), int(rounded.sum()), troubled)


def reordered(matrices: Tensor, order: Tensor) -> Tensor:
    """The rows of each matrix of a stack [E, I, n] in an order [E, I]; contiguous."""
    experts, rows, width = matrices.shape
    place = order + rows * torch.arange(experts, device=order.device)[:, None]
    return matrices.reshape(-1, width).index_select(0, place.flatten()).view(matrices.shape)
