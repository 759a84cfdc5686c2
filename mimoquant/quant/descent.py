"""Codes improved in rounds under the two-sided loss tr(F D H Dᵀ), after `two_sided`.

Key idea: with all other codes given, an entry's best value has a closed form, its value and (F D H)_ij / (F_ii H_jj)
for what is left, D. A round goes through the rows in panels, and a panel is one sweep of `two_sided` that starts from
there: what an entry changes moves those below it and after it, by the metric and the Gram matrix with each column over
its diagonal element. Changes above and after an entry, or below and before it, it does not know of: they couple by both
matrices at once, which is little within a panel, and the next panel begins with the slope of what is then left. Where
it does cost, an expert whose loss did not fall keeps what it had.

Shapes: E experts, O rows, I columns, P rows of a panel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import spans
from mimoquant.quant.grid import Grid
from mimoquant.quant.order import falling, laid, laid_back
from mimoquant.quant.products import half_dtype, rough_chain
from mimoquant.quant.tiles import Rows
from mimoquant.quant.two_sided import once_for_all, stack_of, sweep

_DAMP = 1e-3  # of the Gram matrix's mean diagonal: keeps a column that no token used from moving
_TOGETHER = 8  # experts whose losses are added up at once on CUDA
_PANELS = 4  # of the rows: more follow the loss more closely, fewer give a GPU more to do at once


def descend(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    metric_EOO: Tensor,
    grid: Grid,
    codes_EOI: Tensor,
    fmt: Format,
    rounds: int,
    pull: Tensor | None = None,
) -> Tensor:
    """`rounds` times through the matrix. Returns new codes [E, O, I] uint8.

    Args:
        metric_EOO: as `two_sided` takes it; of zeros, rows go each for itself.
        pull: [E, O, I], half of what the loss falls by beside the two-sided one as a value grows by one.
    """
    rows, across = once_for_all(lambda one: _normed(_never_zero(one)), metric_EOO)
    columns, along = once_for_all(lambda one: _normed(_held(one)), gram_EII)
    weight, push = laid(weight_EOI, rows, columns), along.triu(1)
    stack = replace(stack_of(weight, weight, grid, rows, columns, fmt), codes=laid(codes_EOI, rows, columns))
    half = half_dtype(weight.device)
    left, rough_across, rough_along, extra = (weight - _values(stack)).to(half), across.to(half), along.to(half), None
    if pull is not None:
        extra = laid(_over_curvature(pull, _held(gram_EII), _never_zero(metric_EOO)), rows, columns)
    panels = [slice(*span) for span in spans(0, weight.shape[1], -(-weight.shape[1] // _PANELS))]
    for panel in panels * rounds:
        slope = rough_chain(rough_across[:, :, panel].mT, left, rough_along)
        if extra is not None:
            slope += extra[:, panel]
        part = _part(stack, panel, torch.where(torch.isfinite(slope), slope, 0.0))
        sweep(part, across[:, panel, panel].triu(1), push, rough_push=rough_along)
        stack.codes[:, panel] = part.codes
        left[:, panel] = weight[:, panel] - _values(part)
    codes = laid_back(stack.codes, rows, columns)
    del stack, left, weight, push, across, along, rough_across, rough_along, extra
    is_better = partial(_is_better, (weight_EOI, gram_EII, metric_EOO.expand(len(codes), -1, -1)), grid, fmt)
    some = _TOGETHER if codes.is_cuda else len(codes)
    better = torch.cat([is_better(codes_EOI, codes, pull, slice(*span)) for span in spans(0, len(codes), some)])
    return torch.where(better[:, None, None], codes, codes_EOI)


def _is_better(
    matrices: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    fmt: Format,
    old: Tensor,
    new: Tensor,
    pull: Tensor | None,
    own: slice,
) -> Tensor:
    """[E] of some experts, whether new codes cost less than old ones. `matrices`: weight, Gram and metric."""
    weight, gram, metric = (of[own] for of in matrices)
    wide = Grid(grid.scale[own], None if grid.zero is None else grid.zero[own]).wide(fmt)
    before, after = (wide.decode(codes[own], fmt) for codes in (old, new))
    lost, losing = (whole_loss(weight - values, gram, metric) for values in (before, after))
    if pull is not None:
        losing -= 2 * (pull[own] * (after - before)).sum((-2, -1))
    return losing < lost


def _over_curvature(pull_EOI: Tensor, gram: Tensor, metric: Tensor) -> Tensor:
    """How far each entry alone would go for a pull."""
    across, along = (torch.diagonal(matrix, dim1=-2, dim2=-1) for matrix in (metric, gram))
    return pull_EOI / across[:, :, None] / along[:, None, :]


def _part(stack: Rows, panel: slice, slope_EPI: Tensor) -> Rows:
    """A panel of a stack, as a sweep improves it."""
    scale, zero = stack.scale[:, panel].contiguous(), None if stack.zero is None else stack.zero[:, panel].contiguous()
    part = replace(stack, scale=scale, zero=zero, codes=stack.codes[:, panel].contiguous())
    value = _values(part)
    return replace(part, weight=value, wanted=value + slope_EPI)


def _values(stack: Rows) -> Tensor:
    """What the codes mean, in the stack's order."""
    group = stack.group[:, None].long().expand(stack.codes.shape)
    zero = None if stack.zero is None else stack.zero.gather(2, group)
    return Grid(stack.scale.gather(2, group), zero).decode(stack.codes, stack.fmt)


def _normed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of symmetric matrices: the order of rows, and in it each column over its diagonal element; zeros, if that is."""
    order = falling(matrix)
    matrix = laid(matrix, order, order)
    diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)[..., None, :]
    return order, torch.where(diagonal > 0, matrix / diagonal, 0.0)


def _never_zero(metric: Tensor) -> Tensor:
    """A row that nothing is felt of counts for itself."""
    diagonal = torch.diagonal(metric, dim1=-2, dim2=-1)
    return metric + torch.diag_embed((diagonal <= 0).to(metric.dtype))


def _held(gram: Tensor) -> Tensor:
    """With `_DAMP`."""
    mean = torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)
    return gram + torch.diag_embed((_DAMP * mean)[:, None].expand(gram.shape[:2]))


def whole_loss(left: Tensor, gram: Tensor, metric: Tensor) -> Tensor:
    """[E] float32: tr(F D H Dᵀ) of what is left, D, by rough products; on CUDA of a few experts at a time, for the sake
    of memory."""
    some = _TOGETHER if left.is_cuda else len(left)
    parts = zip(*(torch.split(of, some) for of in (metric.expand(len(left), -1, -1), left, gram)), strict=True)
    return torch.cat([(rough_chain(f, d, h) * d).sum((-2, -1)) for f, d, h in parts])
