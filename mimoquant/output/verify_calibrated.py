"""What `verify` can prove of experts whose codes were chosen by calibration.

Key idea: GPTQ moves weights on purpose, so a code need not be the nearest to its source. What holds: scales are finite
and not zero; the stored values are near the source's (relMSE of the weights themselves beside that of plain rounding,
which a swapped or shifted tensor would throw far off); under a search alone, where no rounds at the end chose codes
together, every code is the nearest on its scale. Factors that AWQ moved between channels are read off what is stored,
never taken on trust. Between norm, router and experts that is exact, for powers of two and for real factors: source
norm over stored norm.

Real factors between up_proj and down_proj are stored nowhere. Each code leaves a range to its channel's factor; codes
are the nearest if, and as far as bf16 can tell only if, one factor lies in all ranges of up's row and down's column.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.planning.recipe import Recipe
from mimoquant.quant.awq import LIMIT, divided_by, inverse, scaled
from mimoquant.quant.clamped import Clamped, clamped
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine, decode, stored_parts, unpack_nibbles
from mimoquant.quant.formats import E2M1_VALUES, Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.stack import Audit, NonFiniteError, Stack
from mimoquant.run.chunk_facts import clamped_on_device, clamped_within
from mimoquant.weights.decoded import TORCH_DTYPES

Array = npt.NDArray[Any]
FACTOR_OFF = 2.0  # that an estimate of a channel's factor may be, where its groups have no scale
# Squared; 4 bits have .005 to .02. Where a few columns are far larger than the others plain rounding has more, and
# codes that make up for one another may have several times that (4.03 was seen). Zeros have 1, another weight has 2.
RELATIVE_ERROR, TIMES_PLAIN, MOST_RELATIVE_ERROR = 0.1, 6.0, 0.75
BF16_ROUNDING = 2.0**-8  # largest relative change; it has room for what float32 adds


def audits(
    stored: dict[str, dict[str, Array]],
    stacks: dict[str, Stack],
    fmt: Format,
    recipe: Recipe,
    fold: Array | None,
    *,
    layer: int,
    kernels: CpuEngine,
) -> tuple[dict[str, list[Audit]], dict[str, dict[int, tuple[Clamped, Clamped]]]]:
    """One audit an expert for each projection, and groups that have no scale, at least and at most. `fold`: what the
    layer's norm was divided by, if the recipe folds it."""
    moved = recipe.calibration is not None and recipe.calibration.reconstructs(layer)  # codes, by rounds at the end
    nearest = recipe.method in ("rtn", "awq") and not moved
    signed = recipe.signed_scales and fmt.name == "int4" and fmt.symmetric
    if not nearest and fold is None and not recipe.folds_down:  # as it lies in the source: nothing has to be made of it
        counts = {p: clamped(stack, stored[p], fmt, nearest=False) for p, stack in stacks.items()}
        return (
            {p: kernels.distances(stack, fmt, stored[p], signed=signed) for p, stack in stacks.items()},
            {p: {e: (one, one) for e, one in of.items()} for p, of in counts.items()},
        )
    engine, cpu = TorchEngine("cpu"), torch.device("cpu")
    weights = {p: engine.bf16(stack) for p, stack in stacks.items()}
    if fold is not None:
        weights |= {p: scaled(weights[p], torch.from_numpy(fold)) for p in ("gate", "up")}
    source = {p: weight.to(torch.float32) for p, weight in weights.items()}
    parts = {p: stored_parts(held, fmt, cpu) for p, held in stored.items()}
    unfit: dict[str, Tensor] = {}
    if recipe.folds_down:
        if recipe.real_fold and nearest:
            unfit = _unfit(source, parts, fmt)
        between = (_real_fold if recipe.real_fold else _pow2_fold)(decode(parts["up"], fmt), source["up"])
        source["up"] = scaled(source["up"], inverse(between)[:, :, None])
        source["down"] = scaled(source["down"], between[:, None, :])
    found = {}
    for p in source:
        if recipe.folds_down and recipe.real_fold and p != "gate":
            found[p] = clamped_within(source[p].to(torch.bfloat16).float(), parts[p], fmt, FACTOR_OFF)
        else:
            found[p] = {e: (one, one) for e, one in clamped_on_device(source[p], parts[p], fmt).items()}
    return {
        p: _audits(source[p], parts[p], fmt, nearest=nearest, signed=signed, unfit=unfit.get(p)) for p in source
    }, found


def error_limits(
    judged: dict[str, list[Audit]], stacks: dict[str, Stack], fmt: Format, kernels: CpuEngine
) -> dict[tuple[str, int], float]:
    """(projection, expert) → the relative error that its stored values may have, of each."""
    limits = {(p, place): RELATIVE_ERROR for p, of in judged.items() for place in range(len(of))}
    for p, place in limits:
        if judged[p][place].relative_error <= RELATIVE_ERROR:
            continue
        own = {name: _only(stack, place) for name, stack in stacks.items()}
        with contextlib.suppress(NonFiniteError):
            parts = kernels.encode(own, fmt, "absmax")[p]
            (plain,) = kernels.distances(own[p], fmt, parts, signed=False)
            limits[p, place] = min(MOST_RELATIVE_ERROR, max(RELATIVE_ERROR, TIMES_PLAIN * plain.relative_error))
    return limits


def _only(stack: Stack, expert: int) -> Stack:
    place = slice(expert, expert + 1)
    return Stack(stack.values[place], None if stack.scales is None else stack.scales[place])


def _pow2_fold(stored_EOI: Tensor, source_EOI: Tensor) -> Tensor:
    """Exponents [E, O] that up's rows were divided by, from the rows' sizes: 4 bits leave no doubt."""
    stored2, source2 = stored_EOI.square().sum(-1), source_EOI.square().sum(-1)
    ratio = torch.where((stored2 > 0) & (source2 > 0), stored2 / source2.clamp(min=1e-30), 1.0)
    return -(torch.log2(ratio) / 2).round().clamp(-126, 126).to(torch.int32)


def _real_fold(stored_EOI: Tensor, source_EOI: Tensor) -> Tensor:
    """Factors [E, O] that up's rows were divided by, by least squares: near enough to tell a right row from a wrong."""
    both, own = (stored_EOI * source_EOI).sum(-1), source_EOI.square().sum(-1)
    return torch.where((both > 0) & (own > 0), own / both.clamp(min=1e-30), 1.0).clamp(2.0**-126, 2.0**126)


def _unfit(source: dict[str, Tensor], parts: dict[str, dict[str, Tensor]], fmt: Format) -> dict[str, Tensor]:
    """How many channels of each expert [E] no factor fits: up's rows by themselves, down's columns beside them."""
    low, high = _factors(source["up"], parts["up"], fmt, -1)
    fits = low <= high
    down_low, down_high = _factors(source["down"], parts["down"], fmt, -2)
    low, high = high.reciprocal() * (1 - 2**-20), low.reciprocal() * (1 + 2**-20)  # what is not in up is in down
    both = torch.maximum(low, down_low) <= torch.minimum(high, down_high)
    return {"up": (~fits).sum(1), "down": (~torch.where(fits, both, down_low <= down_high)).sum(1)}


def _factors(source_EOI: Tensor, parts: dict[str, Tensor], fmt: Format, dim: int) -> tuple[Tensor, Tensor]:
    """The least and largest positive factor with which all codes along `dim` are the nearest; least > largest: none.

    A code is that of source times factor, rounded to bf16, so it leaves the factor a range one level wide, an eighth of
    a large weight. The ranges of other weights lie elsewhere: of many, what they share is next to nothing.
    """
    grid, codes = Grid.of(parts, fmt).wide(fmt), unpack_nibbles(parts["codes"]).int()
    ends = [edge[codes] if grid.zero is None else edge[codes] - grid.zero for edge in _edges(fmt)]
    divisor = torch.where(source_EOI == 0, 1.0, source_EOI)
    one, other = (end * grid.scale / divisor for end in ends)
    low, high = torch.minimum(one, other) / (1 + BF16_ROUNDING), torch.maximum(one, other) / (1 - BF16_ROUNDING)
    zero = (source_EOI == 0) & (low <= 0) & (high >= 0)  # stays zero whatever the factor
    low, high = low.masked_fill(zero, 0.0), high.masked_fill(zero, torch.inf)
    return low.amax(dim).clamp(min=0.0), high.amin(dim)


def _edges(fmt: Format) -> tuple[Tensor, Tensor]:
    """Where the rounding interval of each of the 16 codes ends, in levels: two tensors [16], in no order."""
    if fmt.name == "int4":
        level = torch.arange(-8.0, 8.0)
        low, high = level - 0.5, level + 0.5
        low[0], high[15] = -torch.inf, torch.inf
        return low, high
    value = torch.tensor(E2M1_VALUES)
    middle = (value[1:] + value[:-1]) / 2
    inner, outer = torch.cat((torch.zeros(1), middle)), torch.cat((middle, torch.tensor([torch.inf])))
    return torch.cat((inner, -inner)), torch.cat((outer, -outer))


def _audits(
    source: Tensor, parts: dict[str, Tensor], fmt: Format, *, nearest: bool, signed: bool, unfit: Tensor | None
) -> list[Audit]:
    """`unfit`: channels with a wrong code, where the source is known but for a factor a channel."""
    grid = Grid.of(parts, fmt)
    error2 = (decode(parts, fmt) - source).square().sum((1, 2), dtype=torch.float64)
    weight2 = source.square().sum((1, 2), dtype=torch.float64)
    good = (torch.isfinite(grid.scale) & ((grid.scale != 0) if signed else (grid.scale > 0))).flatten(1).all(1)
    outside = torch.zeros(len(source), dtype=torch.int64)
    if unfit is not None:
        outside = unfit
    elif nearest:
        codes, wanted = unpack_nibbles(parts["codes"]), grid.wide(fmt).encode(source.to(torch.bfloat16).float(), fmt)
        outside = (codes != wanted).flatten(1).sum(1)
    return [
        Audit(0.0, *row) for row in zip(outside.tolist(), error2.tolist(), weight2.tolist(), good.tolist(), strict=True)
    ]


def norm_fold(source: Array, stored: Array, dtype: str, *, real: bool) -> Array | None:
    """What the bytes of a norm were divided by: exponents, int32, or `real` factors, float32; None for anything else.

    Powers of two must give the source back exactly; factors are positive and at most 2^12, but for the norm's rounding.
    """
    ours, theirs = (torch.from_numpy(raw).view(TORCH_DTYPES[dtype]) for raw in (source, stored))
    fold = divided_by(ours, theirs, real=real)
    if not real:
        return fold.numpy() if torch.equal(scaled(theirs.float(), fold), ours.float()) else None
    within = bool((torch.log2(fold).abs() <= LIMIT + BF16_ROUNDING * 2).all())  # false for NaN, of a negative factor
    return fold.numpy() if within and torch.equal(scaled(ours, inverse(fold)), theirs) else None


def misscaled(source: Array, stored: Array, dtype: str, fold: Array) -> int:
    """Columns of a router's `stored` bytes that are not `source` times the fold's factors, rounded once."""
    ours, theirs = (torch.from_numpy(raw).view(TORCH_DTYPES[dtype]).view(-1, len(fold)) for raw in (source, stored))
    same = (scaled(ours, torch.from_numpy(fold)) == theirs) & torch.isfinite(theirs)
    return int((~same.all(0)).sum())


def unproven(recipe: Recipe, layers: Iterable[int]) -> list[str]:
    """What no check of the files alone can prove, of what the recipe folds."""
    if not recipe.real_fold:
        return []
    told, between = [], "the factors between up_proj and down_proj, which no tensor holds: "
    if any(recipe.folds_norm(layer) for layer in layers):
        told.append(
            "the share of tokens whose top-k changed: norm and router make up for each other but for one "
            "rounding, and what that does to routing takes the tokens to measure"
        )
    if recipe.folds_down and recipe.method == "awq":
        told.append(f"{between}each channel has one with which all its codes are the nearest, but for bf16's rounding")
    elif recipe.folds_down:
        told.append(f"{between}they are estimated, and with them both are near the source's")
    return told
