"""Codes of gate and up improved once more, under what an expert answers on its own tokens.

Key idea: two-sided rounding takes what the loss feels of gate's and up's outputs, and what goes into them, to be
independent. They are not: a row of gate or up counts for a token by its slope s there (`output_metric`), most rows are
opened by a few tokens of their own, and for these, what goes in is not what goes in on average. Then an error that the
Gram matrix calls small need not be. So the gradient of tr(F · error of the answers) is measured on the tokens
themselves, anew for each panel of columns, and the panel's codes make one step of `descent` from there: only how steep
the loss is comes from the two matrices. They may call it too flat, and a step goes too far: a row whose gradient turned
against its change on the way (the mean of before and after, which for a quadratic is the change of the loss) keeps the
codes that it had, and so does an expert whose answers, all changes together, are not better on its tokens.

A row's tokens are as many as (Σ s²)² / Σ s⁴, and where that is little beside the width its measured gradient says more
of these tokens than of others: it is mixed with the gradient by the two matrices, as far as `_PRIOR` widths ask for.

Shapes: E experts, T tokens (the most of any of them, zeros behind the others), H hidden, I inner width, J = 2I rows of
gate and of up below them, P columns of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.quant.descent import descend
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import spans
from mimoquant.quant.grid import Grid
from mimoquant.quant.method import WALKED_TOKENS
from mimoquant.quant.products import half_dtype, halves, product, rough_product
from mimoquant.quant.reconstruct import padded, silu_slope, together

_PRIOR = 4.0  # times the width: as many tokens' worth of the gradient by both matrices, against overfitting
_PANELS = 4  # of the columns: more follow the loss a little more closely
_TINY = torch.finfo(torch.float32).tiny


def descend_inner(
    weights: tuple[Tensor, Tensor],
    matrices: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    codes_EJH: Tensor,
    fmt: Format,
    seen: Sequence[Tensor],
) -> Tensor:
    """Once through the columns of a chunk of experts. Returns new codes [E, J, H] uint8.

    Args:
        weights: gate and up stacked [E, J, H], and down [E, H, I] as it will answer, of any float dtype.
        matrices: Gram matrices [E, H, H] and metrics [E, J, J] that the codes were chosen for, and what the loss feels
            of each expert's answers, [E, H, H].
        grid, codes_EJH: of gate and up. seen: of each expert, tokens [n, H].
    """
    out = []
    for own in together([len(tokens) for tokens in seen], WALKED_TOKENS[codes_EJH.device.type]):
        weight, down = (of[own].to(torch.float32) for of in weights)
        gram, metric, felt = (of[own] for of in matrices)
        some = Grid(grid.scale[own], None if grid.zero is None else grid.zero[own])
        values = some.wide(fmt).decode(codes_EJH[own], fmt)
        tokens = _Tokens(padded(seen[own]), weight, values, down.mT @ (felt @ down))
        out.append(_walked(tokens, (weight, gram, metric), some, codes_EJH[own].clone(), fmt))
    return torch.cat(out)


def _walked(tokens: _Tokens, towards: tuple[Tensor, Tensor, Tensor], grid: Grid, codes: Tensor, fmt: Format) -> Tensor:
    """The codes, each panel of columns after one step of descent. `towards`: weights, Gram matrices and metrics."""
    weight, gram, metric = towards
    values = grid.wide(fmt).decode(codes, fmt)
    felt = rough_product(metric, values - weight)  # what is off, as far as the metric feels it
    start, loss = codes.clone(), tokens.loss(tokens.off)

    def slope(panel: slice) -> Tensor:
        """[E, J, P], half the gradient by the values."""
        return torch.lerp(tokens.slope(panel), rough_product(felt, gram[:, :, panel]), tokens.doubt)

    width = max(1, codes.shape[2] // _PANELS // fmt.group_size) * fmt.group_size
    for panel in (slice(*span) for span in spans(0, codes.shape[2], width)):
        own = grid.part(slice(None), slice(panel.start // fmt.group_size, -(-panel.stop // fmt.group_size)))
        old, value, before = codes[:, :, panel], values[:, :, panel], slope(panel)
        new = descend(value, gram[:, panel, panel], metric, own, old, fmt, 1, pull=-before)
        change = own.wide(fmt).decode(new, fmt) - value
        moved = tokens.moved(change, panel)
        tokens.off += moved.sum(1)
        felt[:, :, panel] += rough_product(metric, change)
        turned = ((before + slope(panel)) * change).sum(-1) > 0
        tokens.off -= torch.where(turned.view(*moved.shape[:3], 1), moved, 0.0).sum(1)
        felt[:, :, panel] -= rough_product(metric, torch.where(turned[..., None], change, 0.0))
        codes[:, :, panel] = torch.where(turned[..., None], old, new)
    worse = ~(tokens.loss(tokens.off_by(grid.wide(fmt).decode(codes, fmt))) < loss)
    return torch.where(worse[:, None, None], start, codes)


class _Tokens:
    """How far the inner activations of some experts' tokens are off, and how they move with gate and up. Tokens come
    last.

    Args:
        tokens: [E, T, H]. weight, values: of gate and up [E, J, H], as they were and as they are. felt: what is felt of
            inner activations, [E, I, I].
    `off`: [E, I, T], brought up to date by `slopes` [E, 2, I, T]. `doubt`: how much of a row's gradient is not to be
    asked of the tokens, [E, J, 1].
    """

    def __init__(self, tokens: Tensor, weight: Tensor, values: Tensor, felt: Tensor) -> None:
        self.inputs, self.felt = tokens.mT.to(half_dtype(tokens.device)).contiguous(), felt
        self.count = (tokens != 0).any(-1).sum(-1).clamp(min=1)[:, None, None]
        self.wanted = _activated(product(halves(weight), (self.inputs,)))[0]
        given, self.slopes = _activated(product(halves(values), (self.inputs,)))
        self.off = given - self.wanted
        energy = self.slopes.flatten(1, 2).square()
        many = energy.sum(-1, keepdim=True).square() / energy.square_().sum(-1, keepdim=True).clamp(min=_TINY)
        prior = _PRIOR * tokens.shape[2]
        self.doubt = prior / (many + prior)

    def off_by(self, values: Tensor) -> Tensor:
        """`off` of other values of gate and up, not by slopes."""
        return _activated(product(halves(values), (self.inputs,)))[0] - self.wanted

    def loss(self, off: Tensor) -> Tensor:
        """[E], what is felt of the answers' errors."""
        return (rough_product(self.felt, off) * off).sum((1, 2))

    def slope(self, panel: slice) -> Tensor:
        """[E, J, P], half the gradient of what is felt of a token's answer by the values of some columns."""
        pull = self.slopes * rough_product(self.felt, self.off)[:, None]
        return product(halves(pull.flatten(1, 2)), (self.inputs[:, panel].mT,)) / self.count

    def moved(self, change_EJP: Tensor, panel: slice) -> Tensor:
        """[E, 2, I, T], how far a change of some columns moves the inner activations, through gate and through up."""
        given = product(halves(change_EJP), (self.inputs[:, panel],))
        return given.view(self.slopes.shape).mul_(self.slopes)


def _activated(given_EJT: Tensor) -> tuple[Tensor, Tensor]:
    """The inner activations [E, I, T] of what gate and up give, and their slopes by either, [E, 2, I, T]."""
    gate, up = given_EJT.chunk(2, dim=1)
    opened = F.silu(gate)
    return opened * up, torch.stack([up * silu_slope(gate), opened], dim=1)
