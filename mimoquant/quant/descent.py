"""Codes improved one by one under the two-sided loss tr(F D H Dᵀ), after `two_sided`.

Key idea: with all other codes given, an entry's best value has a closed form, w - d + (F D H)_ij / (F_ii H_jj) for what
is left of it, and the code nearest to it is the best one. Rows go in bands, columns in blocks, and a tile goes by
anti-diagonals (`tiles.improve_tile`); entries of one anti-diagonal share neither row nor column, so that they do not
know of each other costs next to nothing. Where it does cost, an expert whose loss did not fall keeps what it had.

Shapes: E experts, O rows, I columns, M rows of a band, N columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import BLOCK, spans
from mimoquant.quant.grid import Grid
from mimoquant.quant.products import Halves, halves, part, product, put
from mimoquant.quant.tiles import Rows, Tile, improve_tile
from mimoquant.quant.two_sided import BAND

_DAMP = 1e-3  # of the Gram matrix's mean diagonal: keeps a column that no token used from moving


def descend(
    weight_EOI: Tensor, gram_EII: Tensor, metric_EOO: Tensor, grid: Grid, codes_EOI: Tensor, fmt: Format, rounds: int
) -> Tensor:
    """`rounds` times through the matrix. Returns new codes [E, O, I] uint8.

    Args:
        metric_EOO: as `two_sided` takes it; of zeros, rows go each for itself.
    """
    gram = gram_EII.clone()
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    diagonal += _DAMP * diagonal.mean(-1, keepdim=True)
    normed = _normed(metric_EOO)
    group = torch.arange(gram.shape[-1], device=gram.device).div(fmt.group_size, rounding_mode="floor")
    stack = Rows(
        weight_EOI.contiguous(),
        grid.scale.contiguous(),
        None if grid.zero is None else grid.zero.contiguous(),
        group.to(torch.int32).repeat(len(gram), 1),
        codes_EOI.clone(memory_format=torch.contiguous_format),
        fmt,
    )
    left = halves(stack.weight - grid.wide(fmt).decode(stack.codes, fmt))
    across, cost, before = halves(normed), halves(gram), whole_loss(left, gram, metric_EOO)
    for _ in range(rounds):
        for band in (slice(*span) for span in spans(0, normed.shape[-1], BAND)):
            _improve_band(stack, band, left, across, cost, normed, gram)
    better = whole_loss(left, gram, metric_EOO) < before
    return torch.where(better[:, None, None], stack.codes, codes_EOI)


def _improve_band(
    stack: Rows, band: slice, left: Halves, across: Halves, cost: Halves, normed: Tensor, gram: Tensor
) -> None:
    """Some rows, block after block. Fills codes and left."""
    every = slice(None)
    pushed = product(part(across, band, every), left)
    down = normed[:, band, band].mT.contiguous()
    for now in (slice(*span) for span in spans(0, gram.shape[-1], BLOCK)):
        slope = product(halves(pushed), part(cost, every, now))
        rest, moved = improve_tile(stack, Tile(band, now, down, gram[:, now, now].contiguous()), slope)
        put(left, band, rest, now)
        pushed[:, :, now] += moved


def _normed(metric: Tensor) -> Tensor:
    """Each row over its diagonal element; a row without one counts alone."""
    diagonal = torch.diagonal(metric, dim1=-2, dim2=-1)[..., None]
    return torch.where(diagonal > 0, metric / diagonal, torch.eye(metric.shape[-1], device=metric.device))


def whole_loss(left: Halves, gram: Tensor, metric: Tensor) -> Tensor:
    """[E] float32: tr(F D H Dᵀ) of what is left, D; products of their first halves."""
    own = left[0]
    if len(left) == 1:
        return ((metric @ own @ gram) * own).sum((-2, -1))
    half = torch.bfloat16
    pushed = torch.bmm(metric.to(half), own, out_dtype=torch.float32).to(half)
    return (torch.bmm(pushed, gram.to(half), out_dtype=torch.float32) * own).sum((-2, -1))
