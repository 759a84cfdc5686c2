"""Joint improvement of scales and codes after GPTQ, at exactly the same format.

Key idea: the loss tr(D H Dᵀ) is quadratic. With the codes fixed, a group's best scale has a closed form; with the
scales fixed, so has the best value of one column, all else equal, and the code nearest to it is the best one. Neither
step raises the loss (but for the rounding of a scale); two alternations take 3-5 % off what GPTQ leaves.

MXFP4 scales are powers of two and asymmetric int4 has zero points beside them: there only codes move.
Shapes: E experts, O rows, I columns, G groups, S group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimoquant.quant.formats import NVFP4_SMALLEST_SCALE, Format
from mimoquant.quant.gptq import BLOCK
from mimoquant.quant.grid import Grid

_DAMP = 1e-3  # of the mean diagonal: keeps a column that no token used from moving


def refine(
    weight_EOI: Tensor, gram_EII: Tensor, parts: dict[str, Tensor], codes: Tensor, fmt: Format, rounds: int
) -> tuple[dict[str, Tensor], Tensor]:
    """`rounds` times scales, then codes. Returns parts with new scales, and new codes [E, O, I] uint8."""
    mean = torch.diagonal(gram_EII, dim1=-2, dim2=-1).mean(-1)
    gram = gram_EII + _DAMP * mean[:, None, None] * torch.eye(gram_EII.shape[-1], device=gram_EII.device)
    for _ in range(rounds):
        if fmt.name != "mxfp4" and fmt.symmetric:
            parts = _better_scales(weight_EOI, gram, parts, codes, fmt)
        codes = _better_codes(weight_EOI, gram, Grid.of(parts, fmt), codes, fmt)
    return parts, codes


def _better_scales(
    weight: Tensor, gram: Tensor, parts: dict[str, Tensor], codes: Tensor, fmt: Format
) -> dict[str, Tensor]:
    """Least-squares scales for the given codes, group after group; each as its format stores it."""
    scale = Grid.of(parts, fmt).scale.clone()
    levels = Grid(torch.ones_like(weight), None).decode(codes, fmt)
    slope = (weight - levels * scale.repeat_interleave(fmt.group_size, -1)) @ gram  # minus half the loss's gradient
    for group in range(scale.shape[-1]):
        columns = slice(group * fmt.group_size, (group + 1) * fmt.group_size)
        level = levels[:, :, columns]
        curvature = ((level @ gram[:, columns, columns]) * level).sum(-1)
        old = scale[:, :, group]
        wanted = old + (slope[:, :, columns] * level).sum(-1) / curvature
        new = _storable(wanted, parts, fmt)
        # never to zero or through it; and where the curvature is not positive, `wanted` means nothing
        sound = (wanted.sign() == old.sign()) & torch.isfinite(new) & (new != 0) & (curvature > 0)
        new = torch.where(sound, new, old)
        slope -= ((new - old)[..., None] * level) @ gram[:, columns]
        scale[:, :, group] = new
    stored = scale if fmt.name == "int4" else scale * parts["global_scale"].reshape(-1, 1, 1)
    return parts | {"scale": stored.to(parts["scale"].dtype)}


def _storable(scale: Tensor, parts: dict[str, Tensor], fmt: Format) -> Tensor:
    """The scale [E, O] that comes out of the file if this one goes in."""
    if fmt.name == "int4":
        return scale.to(torch.bfloat16).to(torch.float32)
    divisor = parts["global_scale"].reshape(-1, 1)
    return (scale * divisor).clamp(NVFP4_SMALLEST_SCALE, 448.0).to(torch.float8_e4m3fn).to(torch.float32) / divisor


def _better_codes(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor, fmt: Format) -> Tensor:
    """One sweep over the columns, each to its best code given all others."""
    wide = grid.wide(fmt)
    values, codes = wide.decode(codes, fmt), codes.clone()
    slope = (weight - values) @ gram
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    for begin in range(0, weight.shape[-1], BLOCK):
        end = min(begin + BLOCK, weight.shape[-1])
        near, before = slope[:, :, begin:end].clone(), values[:, :, begin:end].clone()
        for i in range(begin, end):
            place = Grid(wide.scale[:, :, i], None if wide.zero is None else wide.zero[:, :, i])
            step = near[:, :, i - begin] / diagonal[:, i, None]
            sound = torch.isfinite(step) & (diagonal[:, i, None] > 0)  # else all codes cost the same: keep this one
            codes[:, :, i] = place.encode(torch.where(sound, values[:, :, i] + step, values[:, :, i]), fmt)
            new = place.decode(codes[:, :, i], fmt)
            near -= (new - values[:, :, i])[..., None] * gram[:, None, i, begin:end]
            values[:, :, i] = new
        slope -= (values[:, :, begin:end] - before) @ gram[:, begin:end]
    return codes
