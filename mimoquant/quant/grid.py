"""Rounding to a grid whose scales are given: what every method that chooses codes does in the end.

Key idea: parts of a format (scale, zero point, global scale) become one float32 scale and zero a group, and then int4
and the FP4 formats differ in one line each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mimoquant.quant.engine_torch import e2m1_codes, exp2, unpack_zero_points
from mimoquant.quant.formats import E2M1_VALUES, Format
from mimoquant.quant.kernels.rounding import round_e2m1


@cache
def e2m1(device: torch.device) -> Tensor:
    """The values of the 16 codes; kept, since making them anew every time would wait for the device each time."""
    return torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), device=device)


@dataclass(frozen=True, slots=True)
class Grid:
    """scale and zero, float32, of the same shape; zero is None but for asymmetric int4. Usually [E, O, G]."""

    scale: Tensor
    zero: Tensor | None

    @staticmethod
    def of(parts: dict[str, Tensor], fmt: Format) -> Grid:
        """The grid that the stored parts mean."""
        if fmt.name == "mxfp4":
            return Grid(exp2(parts["scale"]), None)
        scale = parts["scale"].to(torch.float32)
        if fmt.name == "nvfp4":
            scale = scale / parts["global_scale"].reshape(-1, 1, 1)
        zero = None if fmt.symmetric else unpack_zero_points(parts["zero_point"]).to(torch.float32)
        return Grid(scale, zero)

    def turned(self) -> Grid:
        """[E, O, G] as [E, G, O], or the other way."""
        return Grid(
            self.scale.transpose(1, 2).contiguous(),
            None if self.zero is None else self.zero.transpose(1, 2).contiguous(),
        )

    def part(self, rows: slice, groups: slice) -> Grid:
        """Of some rows and groups of [E, O, G]."""
        return Grid(self.scale[:, rows, groups], None if self.zero is None else self.zero[:, rows, groups])

    def stored_scale(self, parts: dict[str, Tensor]) -> Tensor:
        """The scale [E, O, G] as it stands beside the rest of `parts`; not of mxfp4."""
        divisor = parts.get("global_scale")
        scale = self.scale if divisor is None else self.scale * divisor.reshape(-1, 1, 1)
        return scale.to(parts["scale"].dtype)

    def wide(self, fmt: Format, dim: int = -1) -> Grid:
        """The grid of every weight; `dim` is that of the groups."""
        size = fmt.group_size
        return Grid(
            self.scale.repeat_interleave(size, dim),
            None if self.zero is None else self.zero.repeat_interleave(size, dim),
        )

    def encode(self, values: Tensor, fmt: Format) -> Tensor:
        """The nearest codes, uint8 0..15."""
        if fmt.name != "int4":
            return e2m1_codes(values, round_e2m1((values / self.scale).abs()))
        level = values / self.scale if self.zero is None else values / self.scale + self.zero
        return (level.clamp(-8.0, 7.0).round() + 8.0).to(torch.uint8)

    def decode(self, codes: Tensor, fmt: Format) -> Tensor:
        """The values of codes, float32."""
        if fmt.name != "int4":
            return e2m1(codes.device)[codes.int()] * self.scale
        level = codes.to(torch.float32) - 8.0
        return (level if self.zero is None else level - self.zero) * self.scale
