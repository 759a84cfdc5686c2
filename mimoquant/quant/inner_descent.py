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
from mimoquant.quant.output_metric import felt_inside
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
    weight, down = (of.to(torch.float32) for of in weights)
    gram, metric, felt = matrices
    values, codes = grid.wide(fmt).decode(codes_EJH, fmt), codes_EJH.clone()
    groups = []
    for own in together([len(tokens) for tokens in seen], WALKED_TOKENS[codes.device.type]):
        inner = felt_inside(felt[own], down[own])
        groups.append(_Tokens(own, padded(seen[own]), weight[own], values[own], inner))
    walk = _Walk(groups, gram, metric, rough_product(metric, values - weight))
    width = max(1, codes.shape[2] // _PANELS // fmt.group_size) * fmt.group_size
    for panel in (slice(*span) for span in spans(0, codes.shape[2], width)):
        part = grid.part(slice(None), slice(panel.start // fmt.group_size, -(-panel.stop // fmt.group_size)))
        old, value, before = codes[:, :, panel], values[:, :, panel], walk.slope(panel)
        new = descend(value, gram[:, panel, panel], metric, part, old, fmt, 1, pull=-before)
        change = part.wide(fmt).decode(new, fmt) - value
        walk.move(change, panel)
        turned = ((before + walk.slope(panel)) * change).sum(-1) > 0
        walk.take_back(change, turned, panel)
        codes[:, :, panel] = torch.where(turned[..., None], old, new)
    values = grid.wide(fmt).decode(codes, fmt)
    better = torch.cat([group.answers_better(values[group.own]) for group in groups])
    return torch.where(better[:, None, None], codes, codes_EJH)


class _Walk:
    """Where a chunk of experts stands: its tokens, in groups, and `felt` [E, J, H], metric times the values' error."""

    def __init__(self, groups: list[_Tokens], gram: Tensor, metric: Tensor, felt: Tensor) -> None:
        self.groups, self.gram, self.metric, self.felt = groups, gram, metric, felt
        self.doubt = torch.cat([group.doubt for group in groups])

    def slope(self, panel: slice) -> Tensor:
        """[E, J, P], half the gradient by the values of some columns."""
        measured = torch.cat([group.slope(panel) for group in self.groups])
        return torch.lerp(measured, rough_product(self.felt, self.gram[:, :, panel]), self.doubt)

    def move(self, change_EJP: Tensor, panel: slice) -> None:
        """Take a change of some columns' values."""
        self.felt[:, :, panel] += rough_product(self.metric, change_EJP)
        for group in self.groups:
            group.move(change_EJP[group.own], panel)

    def take_back(self, change_EJP: Tensor, turned_EJ: Tensor, panel: slice) -> None:
        """Undo what some rows have just moved by."""
        self.felt[:, :, panel] -= rough_product(self.metric, torch.where(turned_EJ[..., None], change_EJP, 0.0))
        for group in self.groups:
            group.take_back(turned_EJ[group.own])


class _Tokens:
    """How far the inner activations of some experts' tokens are off, and how they move with gate and up. Tokens come
    last.

    Args:
        own: which experts of the chunk. tokens: [E, T, H]. weight, values: of gate and up [E, J, H], as they were and
            as they are. felt: what is felt of inner activations, [E, I, I].
    `off`: [E, I, T], brought up to date by `slopes` [E, 2, I, T]. `doubt`: how much of a row's gradient is not to be
    asked of the tokens, [E, J, 1].
    """

    def __init__(self, own: slice, tokens: Tensor, weight: Tensor, values: Tensor, felt: Tensor) -> None:
        self.own, self.felt = own, felt
        tokens = tokens if tokens.shape[1] else tokens.new_zeros(len(tokens), 1, tokens.shape[2])
        self.inputs = tokens.mT.to(half_dtype(tokens.device)).contiguous()
        self.count = (tokens != 0).any(-1).sum(-1).clamp(min=1)[:, None, None]
        self.wanted = _inner(product(halves(weight), (self.inputs,)))
        given = product(halves(values), (self.inputs,))
        self.off, self.slopes = _inner(given).sub_(self.wanted), _slopes(given)
        self.loss, self.moved = self._loss(self.off), torch.empty(0)
        energy = self.slopes.flatten(1, 2).square()
        many = energy.sum(-1, keepdim=True).square() / energy.square_().sum(-1, keepdim=True).clamp(min=_TINY)
        prior = _PRIOR * tokens.shape[2]
        self.doubt = prior / (many + prior)

    def answers_better(self, values: Tensor) -> Tensor:
        """[E], whether other values of gate and up answer better than the first ones, not by slopes."""
        off = _inner(product(halves(values), (self.inputs,))).sub_(self.wanted)
        return self._loss(off) < self.loss

    def _loss(self, off: Tensor) -> Tensor:
        """[E], what is felt of the answers' errors."""
        return (rough_product(self.felt, off) * off).sum((1, 2))

    def slope(self, panel: slice) -> Tensor:
        """[E, J, P], half the gradient of what is felt of a token's answer by the values of some columns."""
        pull = self.slopes * rough_product(self.felt, self.off)[:, None]
        return product(halves(pull.flatten(1, 2)), (self.inputs[:, panel].mT,)) / self.count

    def move(self, change_EJP: Tensor, panel: slice) -> None:
        """Take a change of some columns' values."""
        given = product(halves(change_EJP), (self.inputs[:, panel],))
        self.moved = given.view(self.slopes.shape).mul_(self.slopes)
        self.off += self.moved[:, 0].add(self.moved[:, 1])

    def take_back(self, turned_EJ: Tensor) -> None:
        """Undo what some rows have just moved by."""
        self.moved *= turned_EJ.view(*self.moved.shape[:3], 1)
        self.off -= self.moved[:, 0].add_(self.moved[:, 1])


def _inner(given_EJT: Tensor) -> Tensor:
    """The inner activations [E, I, T] of what gate and up give."""
    gate, up = given_EJT.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def _slopes(given_EJT: Tensor) -> Tensor:
    """How fast they move with gate's output and with up's, [E, 2, I, T]."""
    gate, up = given_EJT.chunk(2, dim=1)
    return torch.stack([silu_slope(gate).mul_(up), F.silu(gate)], dim=1)
