"""Roundings that plain torch and kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_zero_points(zero_EOG: Tensor) -> Tensor:
    """int8-valued zero points [E, O, G] in -8..7 → int32 [E, O/8, G], packed along the rows, row 0 lowest."""
    experts, rows, groups = zero_EOG.shape
    nibbles = (zero_EOG.to(torch.int64) + 8).reshape(experts, rows // 8, 8, groups)
    shifts = torch.arange(0, 32, 4, device=zero_EOG.device).reshape(1, 1, 8, 1)
    packed = (nibbles << shifts).sum(dim=2)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def halving_sum(error: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two) by adding halves: the same order on every device."""
    while error.shape[-1] > 1:
        half = error.shape[-1] // 2
        error = error[..., :half] + error[..., half:]
    return error[..., 0]


def round_e2m1(magnitude: Tensor) -> Tensor:
    """Nearest of {0 .. 6}, ties to the even code; `magnitude` >= 0."""
    y = magnitude.clamp(max=6.0)
    fine, middle, coarse = (y * 2.0).round() * 0.5, y.round(), (y * 0.5).round() * 2.0
    return torch.where(y < 2.0, fine, torch.where(y < 4.0, middle, coarse))
