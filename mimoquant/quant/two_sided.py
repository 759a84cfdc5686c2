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

from collections.abc import Callable

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import BLOCK, GptqResult, push_factor, spans, troubled
from mimoquant.quant.grid import Grid
from mimoquant.quant.order import falling, laid, laid_back, reordered
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
    rows, fall, _, _ = _ordered_factor(metric_EOO, 0.0)
    weight = laid(weight_EOI, rows, columns)
    stack = stack_of(weight, weight, grid, rows, columns, fmt)
    sweep(stack, fall, push)
    codes = laid_back(stack.codes, rows, columns)
    return GptqResult(codes, len(damped), len(rounded), troubled(damped + rounded, codes))


def stack_of(weight: Tensor, wanted: Tensor, grid: Grid, rows: Tensor, columns: Tensor, fmt: Format) -> Rows:
    """`weight` and `wanted` are laid in the order of `rows` and `columns`, the grid is not. Codes are room for them."""
    scale, zero = reordered(grid.scale, rows), None if grid.zero is None else reordered(grid.zero, rows)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    return Rows(weight, wanted, scale, zero, (columns // fmt.group_size).to(torch.int32), codes, fmt)


def sweep(stack: Rows, fall: Tensor, push: Tensor, *, rough_push: Tensor | None = None) -> None:
    """Fill the codes, once through the matrix.

    Args:
        fall, push: strictly upper triangular, [E, O, O] and [E, I, I]: in row k how far what is left of row or column
            k moves each later one.
        rough_push: the first half of push, where products of first halves are enough (`products.rough_product`); what
            it has below the diagonal means nothing.
    """
    waves = by_waves(stack.weight.device)
    if waves is None:
        _by_bands(stack, fall, push)
    else:
        waves(stack, fall, push, rough_push)


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
            target, before = stack.wanted[:, band, now].clone(), slice(0, now.start)
            if now.start:
                add_product(target, part(moved, every, before), part(along, before, now))
            tile = Tile(band, now, fall[:, band, band].contiguous(), push[:, now, now].contiguous())
            rest, shift = round_tile(stack, tile, target, above[:, :, now].contiguous())
            put(left, band, rest, now)
            put(moved, every, shift, now)


def once_for_all(make: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor) -> tuple[Tensor, ...]:
    """`make` of a stack of matrices; of one that is `expand`ed over the experts, once."""
    if len(matrix) == 1 or matrix.stride(0):
        return make(matrix)
    return tuple(made.expand(len(matrix), *made.shape[1:]).contiguous() for made in make(matrix[:1]))


def _ordered_factor(matrix: Tensor, damp: float) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """The order by falling diagonal [E, n], and `gptq.push_factor` in it."""
    fates: list[list[int]] = []

    def make(matrix: Tensor) -> tuple[Tensor, ...]:
        order = falling(matrix)
        push, *found = push_factor(matrix, order, damp)
        fates.extend(found)
        return order, push

    order, push = once_for_all(make, matrix)
    shared = len(matrix) > 1 and not matrix.stride(0)
    damped, rounded = (list(range(len(matrix))) if found and shared else found for found in fates)
    return order, push, damped, rounded
