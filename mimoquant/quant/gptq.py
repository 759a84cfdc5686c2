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
from mimoquant.quant.order import falling, inverse, laid, reordered
from mimoquant.quant.products import Halves, add_product, exact_parts, halves, part, take_product, transposed, zeros

BLOCK = 128  # columns that are rounded before what is left of them is pushed onto the rest of their panel
_PANEL, _CUDA_PANEL = 512, 256  # columns that are pushed onto by all before them in one product
_MORE_DAMP = (10.0, 100.0)  # times the dampening, for a matrix that has no Cholesky factor
_FACTOR_PANEL = 512  # columns of a Cholesky factor that are made at once, on CUDA
_LEAST_DAMP = 0.01  # what those multiply, if less was asked for


@dataclass(frozen=True)
class GptqResult:
    """Codes [E, O, I] uint8; how many experts needed more dampening, and how many were rounded plainly instead.

    `troubled`, bool [E], says which ones those are: nothing should trust their Gram matrix. `left`: weight - value, as
    `products.halves` [E, I, O], where the method has it.
    """

    codes: Tensor
    damped: int
    rounded: int
    troubled: Tensor
    left: Halves | None = None


def push_factor(gram_EII: Tensor, order: Tensor, damp: float) -> tuple[Tensor, list[int], list[int]]:
    """How far what is left of column i moves column j > i: strictly upper triangular, [E, I, I].

    Args:
        order: [E, I] in which rows and columns of the Gram matrices are rounded; so does the factor have them.
        damp: of the mean diagonal, added to the diagonal.

    Also returns which experts needed more dampening, and which are rounded plainly because none helped: there the
    factor is zero. To know that is the one time that the host waits for a GPU.
    """
    ordered = laid(gram_EII, order, order)
    mean = torch.diagonal(ordered, dim1=-2, dim2=-1).mean(-1)
    factor, sound = _factored(ordered, (damp * mean).clamp(min=torch.finfo(torch.float32).tiny))
    damped: list[int] = []
    rounded: list[int] = []
    for expert in torch.nonzero(~sound).flatten().tolist():
        own = slice(expert, expert + 1)
        for more in _MORE_DAMP:
            one = laid(gram_EII[own], order[own], order[own])
            again, sound = _factored(one, more * max(damp, _LEAST_DAMP) * mean[own])
            if bool(sound):
                factor[own] = again
                damped.append(expert)
                break
        else:
            factor[own] = 0.0
            rounded.append(expert)
    return factor, damped, rounded


def _factored(ordered: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The push factor [E, I, I] with `step` [E] on the diagonal, and bool [E], whether there is one; overwrites."""
    torch.diagonal(ordered, dim1=-2, dim2=-1).add_(step[:, None])
    if ordered.is_cuda:
        return ordered, _by_panels(ordered)
    lower, info = torch.linalg.cholesky_ex(ordered.flip(-2, -1))
    lower /= torch.diagonal(lower, dim1=-2, dim2=-1)[:, None, :].clone()
    return lower.flip(-2, -1).triu_(1), (info == 0) & _finite(lower)


def _by_panels(gram: Tensor) -> Tensor:
    """`_factored` in place, panel by panel from the last, since the library's batched one leaves most of a GPU idle."""
    width, sound = gram.shape[-1], torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for first, end in reversed(spans(0, width, _FACTOR_PANEL)):
        own, before = slice(first, end), slice(0, first)
        lower, info = torch.linalg.cholesky_ex(gram[:, own, own].flip(-2, -1))
        upper = lower.flip(-2, -1)
        diagonal = torch.diagonal(upper, dim1=-2, dim2=-1)[:, None, :].clone()
        if first:
            above = torch.linalg.solve_triangular(upper, gram[:, before, own].mT, upper=True).mT.contiguous()
            one, other = exact_parts(above)
            for begin, stop in spans(0, first, _FACTOR_PANEL):  # the upper triangle is enough
                there = gram[:, :stop, begin:stop]
                take_product(there, one[:, :stop], other[:, begin:stop].mT)
            gram[:, before, own] = above.div_(diagonal)
            gram[:, own, before] = 0.0
            sound &= _finite(above)
        gram[:, own, own] = upper.div_(diagonal).triu_(1)
        sound &= (info == 0) & _finite(upper)
    return sound


def _finite(matrices: Tensor) -> Tensor:
    """bool [E]."""
    return torch.isfinite(torch.linalg.vector_norm(matrices, float("inf"), dim=(1, 2)))


def panel_of(matrix: Tensor) -> int:
    """Columns of a panel: on CUDA fewer, since what is pushed within one costs memory traffic and not arithmetic."""
    return _CUDA_PANEL if matrix.is_cuda else _PANEL


def spans(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """begin..end in pieces."""
    return [(first, min(first + size, end)) for first in range(begin, end, size)]


def gptq(weight_EOI: Tensor, gram_EII: Tensor, grid: Grid, fmt: Format, damp: float) -> GptqResult:
    """Codes of `weight_EOI` (float32) on `grid`, made for inputs with the Gram matrix `gram_EII` (float32).

    On CUDA weights may be bfloat16. Weights that lie in memory column by column need no copy; codes do.
    """
    experts, rows, width = weight_EOI.shape
    order = falling(gram_EII)
    factor, damped, rounded = push_factor(gram_EII, order, damp)
    push, every, group = halves(factor), slice(None), (order // fmt.group_size).to(torch.int32)
    weight = reordered(weight_EOI.transpose(1, 2), order)
    turned = grid.turned()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    stack = Columns(weight, factor, turned.scale, turned.zero, codes, zeros(experts, width, rows, weight), fmt)
    for first, end in spans(0, width, panel_of(weight)):
        target, before = weight[:, first:end].to(torch.float32, copy=True), slice(0, first)
        if first:
            add_product(target, transposed(part(push, before, slice(first, end))), part(stack.left, before, every))
        for now in (slice(*span) for span in spans(first, end, BLOCK)):
            round_columns(stack, now, target[:, now.start - first : now.stop - first], group)
            later = transposed(part(push, now, slice(now.stop, end)))
            add_product(target[:, now.stop - first :], later, part(stack.left, now, every))
    codes, *left = (reordered(of, inverse(order)) for of in (codes, *stack.left))
    return GptqResult(codes.transpose(1, 2), len(damped), len(rounded), troubled(damped + rounded, codes), tuple(left))


def troubled(experts: list[int], like_Emn: Tensor) -> Tensor:
    """bool [E], which of a stack's experts are among these."""
    found = torch.zeros(len(like_Emn), dtype=torch.bool, device=like_Emn.device)
    if experts:
        found[experts] = True
    return found
