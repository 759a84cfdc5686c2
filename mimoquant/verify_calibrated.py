"""What `verify` can prove of experts whose codes were chosen by calibration.

Key idea: GPTQ moves weights on purpose, so a code need not be the nearest to its source. What holds: scales are finite
and not zero; the stored values are near the source's (relMSE of the weights themselves, which a swapped or shifted
tensor would throw far off); under a search alone every code is the nearest on its scale. Powers of two that AWQ moved
between channels are read off what is stored, never taken on trust: the norm's must be exact, and the router's too.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from mimoquant.quant.awq import exponents, scaled
from mimoquant.quant.engine_torch import TorchEngine, decode, stored_parts, unpack_nibbles
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.stack import Audit, Stack
from mimoquant.recipe import Recipe

Array = npt.NDArray[Any]


def audits(
    stored: dict[str, dict[str, Array]], stacks: dict[str, Stack], fmt: Format, recipe: Recipe, fold: Array | None
) -> dict[str, list[Audit]]:
    """One audit an expert for each projection. `fold`: exponents of the layer's norm, if the recipe folds it."""
    engine, cpu = TorchEngine("cpu"), torch.device("cpu")
    source = {p: engine.bf16(stack).to(torch.float32) for p, stack in stacks.items()}
    parts = {p: stored_parts(held, fmt, cpu) for p, held in stored.items()}
    if fold is not None:
        source |= {p: scaled(source[p], torch.from_numpy(fold)) for p in ("gate", "up")}
    if recipe.folds_down:
        stored2, source2 = decode(parts["up"], fmt).square().sum(-1), source["up"].square().sum(-1)
        ratio = torch.where((stored2 > 0) & (source2 > 0), stored2 / source2.clamp(min=1e-30), 1.0)
        exponent = (torch.log2(ratio) / 2).round().clamp(-126, 126).to(torch.int32)
        source["up"] = scaled(source["up"], exponent[:, :, None])
        source["down"] = scaled(source["down"], -exponent[:, None, :])
    nearest, signed = recipe.method in ("rtn", "awq"), recipe.signed_scales and fmt.name == "int4" and fmt.symmetric
    return {p: _audits(source[p], parts[p], fmt, nearest=nearest, signed=signed) for p in source}


def _audits(
    source: torch.Tensor, parts: dict[str, torch.Tensor], fmt: Format, *, nearest: bool, signed: bool
) -> list[Audit]:
    grid = Grid.of(parts, fmt)
    error2 = (decode(parts, fmt) - source).square().sum((1, 2), dtype=torch.float64)
    weight2 = source.square().sum((1, 2), dtype=torch.float64)
    good = (torch.isfinite(grid.scale) & ((grid.scale != 0) if signed else (grid.scale > 0))).flatten(1).all(1)
    outside = torch.zeros(len(source), dtype=torch.int64)
    if nearest:
        codes, wanted = unpack_nibbles(parts["codes"]), grid.wide(fmt).encode(source.to(torch.bfloat16).float(), fmt)
        outside = (codes != wanted).flatten(1).sum(1)
    return [Audit(0.0, *row) for row in zip(outside.tolist(), error2.tolist(), weight2.tolist(), good.tolist(),
                                            strict=True)]  # fmt: skip


def norm_exponents(source: Array, stored: Array) -> Array | None:
    """Exponents k with stored = source / 2^k, int32, of bf16 bits; None where no powers of two do that exactly."""
    ours, theirs = (torch.from_numpy(bits).view(torch.bfloat16).to(torch.float32) for bits in (source, stored))
    k = -exponents(ours, theirs)
    return k.numpy() if torch.equal(scaled(theirs, k), ours) else None


def is_scaled(source: Array, stored: Array, dtype: str, k: Array) -> bool:
    """Whether a router's `stored` bytes are `source` times 2^k by column, exactly."""
    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    ours, theirs = (torch.from_numpy(raw).view(kind).view(-1, len(k)) for raw in (source, stored))
    return torch.equal(scaled(ours, torch.from_numpy(k)), theirs) and bool(torch.isfinite(theirs).all())
