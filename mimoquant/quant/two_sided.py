"""GPTQ from both sides: codes chosen under tr(F D H Dᵀ), for many experts at once.

Key idea: the Gram matrix H of the inputs says what an error costs at a projection's outputs, every output alike. What
the loss feels of the outputs is their metric F, a Fisher matrix. With unit triangular factors A of F (rows) and B of H
(columns), as `gptq.push_factor` makes them, the loss is a sum of squares, one an entry, of

    e_ij = sum over k <= i, m <= j of A_ki d_km B_mj,

so entries are rounded one after the other, rows by falling F_ii and columns by falling H_jj, each to the code that
makes its e_ij least, given those above and before it. With r = sum over k < i of A_ki d_k for row i, an entry wants to
be w_ij + r_ij + sum over m < j of (r_im + d_im) B_mj. Where F is the identity, r is zero and this is `gptq`.

Rows go in bands: what all rows above do to a band is one product; in it, what all columns before do to a block is
another; the tile that is left goes entry by entry (`tiles`). Where Triton is, tiles go in waves instead, those of an
anti-diagonal together (`kernels.tiles_cuda`): the same sums but for the order in which products add them up.

Shapes: E experts, O rows, I columns, M rows of a band, N columns of a block. Reference: the idea of a Kronecker
curvature for rounding is YAQA's, arXiv 2505.22988.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import BLOCK, GptqResult, push_factor, reordered, spans
from mimoquant.quant.grid import Grid
from mimoquant.quant.products import add_product, halves, part, product, put, transposed, zeros
from mimoquant.quant.tiles import Rows, Tile, by_waves, round_tile

BAND = 64  # rows that are rounded before what is left of them is pushed onto those below


def two_sided(
    weight_EOI: Tensor, gram_EII: Tensor, metric_EOO: Tensor, grid: Grid, fmt: Format, damp: float
) -> GptqResult:
    """Codes of `weight_EOI` on `grid` (float32 all), under inputs' Gram matrices and outputs' metrics.

    Args:
        metric_EOO: dampened by the caller, who knows how many tokens it is from; of zeros, all outputs count alike. One
            that is `expand`ed over the experts is factored once.
        damp: of the Gram matrices, see `gptq`.
    """
    columns, push, damped, rounded = _ordered_factor(gram_EII, damp)
    order, fall, _, _ = _ordered_factor(metric_EOO, 0.0)
    weight = reordered(reordered(weight_EOI, order).mT.contiguous(), columns).mT.contiguous()
    scale, zero = reordered(grid.scale, order), None if grid.zero is None else reordered(grid.zero, order)
    group = (columns // fmt.group_size).to(torch.int32)
    stack = Rows(weight, scale, zero, group, torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), fmt)
    waves = by_waves(weight.device)
    if waves is None:
        _by_bands(stack, fall, push)
    else:
        waves(stack, fall, push)
    back = reordered(
        reordered(stack.codes, torch.argsort(order, dim=-1)).mT.contiguous(), torch.argsort(columns, dim=-1)
    )
    return GptqResult(back.mT, int(damped.sum()), int(rounded.sum()), damped | rounded)


def _by_bands(stack: Rows, fall: Tensor, push: Tensor) -> None:
    """Fill the codes, band after band and block after block."""
    experts, rows, width = stack.weight.shape
    along, down, every = halves(push), halves(fall), slice(None)
    left = zeros(experts, rows, width, stack.weight)
    for band in (slice(*span) for span in spans(0, rows, BAND)):
        over = slice(0, band.start)
        above = product(transposed(part(down, over, band)), part(left, over, every))
        moved = zeros(experts, band.stop - band.start, width, stack.weight)
        for now in (slice(*span) for span in spans(0, width, BLOCK)):
            target, before = stack.weight[:, band, now].clone(), slice(0, now.start)
            if now.start:
                add_product(target, part(moved, every, before), part(along, before, now))
            tile = Tile(band, now, fall[:, band, band].contiguous(), push[:, now, now].contiguous())
            rest, shift = round_tile(stack, tile, target, above[:, :, now].contiguous())
            put(left, band, rest, now)
            put(moved, every, shift, now)


def _ordered_factor(matrix: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The order by falling diagonal [E, n], and `gptq.push_factor` in it."""
    if len(matrix) > 1 and matrix.stride(0) == 0:
        order, push, damped, rounded = (
            made.expand(len(matrix), *made.shape[1:]).contiguous() for made in _ordered_factor(matrix[:1], damp)
        )
        return order, push, damped, rounded
    order = torch.argsort(torch.diagonal(matrix, dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    return order, *push_factor(reordered(matrix, order).gather(2, order[:, None, :].expand_as(matrix)), damp)
