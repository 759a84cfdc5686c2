"""int4 scales fitted to the two-sided loss tr(F D H Dᵀ), between rounds of `descent`.

Key idea: with the codes given, the loss is one quadratic in all scales of a matrix, and its bottom is found by a few
steps of conjugate gradients, each two products of whole matrices, whatever the number of groups. The curvature of each
scale alone is the preconditioner. Then scales are rounded to bf16, whose steps are far finer than what they move by; an
expert whose loss did not fall keeps what it had.

Not for E4M3 scales: their steps are 6 to 12 %, and with the codes given one in sixty would move at all. MXFP4's are
powers of two, and asymmetric int4 has zero points beside them.
Shapes: E experts, O rows, I columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimoquant.quant.columns import units
from mimoquant.quant.descent import whole_loss
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.products import half_dtype, halves, product, rough_chain

_STEPS = 6  # of conjugate gradients: what more would gain is less than rounding to bf16 loses


def refit(
    weight_EOI: Tensor, gram_EII: Tensor, metric_EOO: Tensor, parts: dict[str, Tensor], codes_EOI: Tensor, fmt: Format
) -> dict[str, Tensor]:
    """The parts with better scales, where the format's can be fitted.

    Args:
        metric_EOO: as `two_sided` takes it.
    """
    if not can_fit(fmt):
        return parts
    old, half = parts["scale"].to(torch.float32), half_dtype(codes_EOI.device)
    unit, metric, gram = units(codes_EOI, fmt, half), metric_EOO.to(half), gram_EII.to(half)

    def values(scale: Tensor) -> Tensor:
        return (scale[..., None] * unit.view(*scale.shape, fmt.group_size)).view(unit.shape)

    def felt(change_EOI: Tensor) -> Tensor:
        """Half the gradient by each scale [E, O, G], of a change of the values."""
        slope = rough_chain(metric, change_EOI, gram)
        return (slope * unit).view(*old.shape, fmt.group_size).sum(-1)

    alone = torch.diagonal(metric_EOO, dim1=-2, dim2=-1)[..., None] * _own_curvature(unit, gram_EII, fmt)
    fitted = old + _solved(felt(weight_EOI - values(old)), alone, lambda step: felt(values(step)))
    new = fitted.to(torch.bfloat16).to(torch.float32)
    new = torch.where(((new > 0) == (old > 0)) & (new != 0) & torch.isfinite(new), new, old)
    before, after = (whole_loss(weight_EOI - values(scale), gram, metric) for scale in (old, new))
    new = torch.where((after < before)[:, None, None], new, old)
    return parts | {"scale": Grid(new, None).stored_scale(parts)}


def can_fit(fmt: Format) -> bool:
    """Whether this finds other scales for a format."""
    return fmt.name == "int4" and fmt.scales_move


def _own_curvature(unit_EOI: Tensor, gram_EII: Tensor, fmt: Format) -> Tensor:
    """uᵀ H u of each group's values u at a scale of one, [E, O, G]."""
    groups = [slice(begin, begin + fmt.group_size) for begin in range(0, unit_EOI.shape[-1], fmt.group_size)]
    along = [product((unit_EOI[..., own],), halves(gram_EII[:, own, own])) for own in groups]
    return torch.stack([(bent * unit_EOI[..., own]).sum(-1) for bent, own in zip(along, groups, strict=True)], dim=-1)


def _solved(slope_EOG: Tensor, alone_EOG: Tensor, felt: Callable[[Tensor], Tensor]) -> Tensor:
    """`_STEPS` steps toward the x with felt(x) = slope, each expert's on its own. What has no curvature stays."""
    sound = alone_EOG > 0
    eased = torch.where(sound, 1 / torch.where(sound, alone_EOG, 1.0), 0.0)
    out, rest = torch.zeros_like(slope_EOG), slope_EOG
    step = eased * rest
    size = (rest * step).sum((-2, -1), keepdim=True)
    for _ in range(_STEPS):
        bent = felt(step)
        along = (step * bent).sum((-2, -1), keepdim=True)
        far = torch.where(along > 0, size / along, 0.0)
        out, rest = out + far * step, rest - far * bent
        before, size = size, (rest * eased * rest).sum((-2, -1), keepdim=True)
        step = eased * rest + torch.where(before > 0, size / before, 0.0) * step
    return out
