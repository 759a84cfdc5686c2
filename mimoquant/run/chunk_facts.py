"""What is told of a chunk of experts: what its codes cost, beside plain rounding, under one metric or both; and which
groups have no scale in the format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.machine.cores import dealt
from mimoquant.model.decoder_layer import ExpertChunk
from mimoquant.model.layout import PROJECTIONS, ModelLayout
from mimoquant.quant.clamped import (
    Clamped,
    Groups,
    at_low_end,
    clamped_groups,
    huge,
    is_suspicious,
    suspicious,
    unsigned,
)
from mimoquant.quant.engine_torch import to_numpy
from mimoquant.quant.expert_methods import Encoded, encode_with, energy, global_scale
from mimoquant.quant.formats import Format
from mimoquant.quant.method import Method
from mimoquant.run.clamped import Counts, named

TOLD_ROWS = 1024  # at least, of a matrix, that tell its relMSE


@dataclass(frozen=True)
class Rounded:
    """A stack of weights [E, O, I] and what became of it, by which statistics. `metric`: of its outputs, if any."""

    weight: Tensor
    gram: Tensor
    metric: Tensor | None
    encoded: Encoded


def chunk_losses(made: list[Rounded], fmt: Format) -> Tensor:
    """Losses of each expert over all stacks: see `_losses`."""

    def losses(one: Rounded) -> Tensor:
        parts = dealt(lambda own: _losses(_some(one, own), fmt), len(one.weight), one.weight.device)
        return torch.cat(parts, dim=-1)

    return torch.stack([losses(one) for one in made]).sum(0)


def _some(one: Rounded, own: slice) -> Rounded:
    """Of some of its experts."""
    metric = None if one.metric is None else one.metric[own]
    parts = {name: part[own] for name, part in one.encoded.parts.items()}
    encoded = replace(one.encoded, parts=parts, values=one.encoded.values[own])
    return Rounded(one.weight[own], one.gram[own], metric, encoded)


def relative_losses(losses: Tensor) -> dict[str, Any]:
    """What is told of `chunk_losses`, by expert."""
    facts: dict[str, Any] = {}
    for (total, mine, plain), names in zip(losses, (("relmse", "relmse_plain"), ("felt", "felt_plain")), strict=False):
        total = total.clamp(min=1e-30)
        facts |= {name: (values / total).tolist() for name, values in zip(names, (mine, plain), strict=True)}
    return facts


def fallbacks(made: list[Rounded]) -> dict[str, int]:
    """How often a method fell back."""
    return {
        "damped": sum(one.encoded.damped for one in made),
        "rounded": sum(one.encoded.rounded for one in made),
    }


def clamped_facts(
    chunk: ExpertChunk, parts: dict[str, dict[str, Tensor]], fmt: Format, layout: ModelLayout, layer: int
) -> Counts:
    """See `run.clamped`. `parts`: projection → what was stored of the chunk."""
    found = {
        projection: clamped_on_device(getattr(chunk, projection), parts[projection], fmt) for projection in PROJECTIONS
    }
    return named(layout, layer, chunk.begin, found)


def clamped_on_device(weight_EOI: Tensor, parts: dict[str, Tensor], fmt: Format) -> dict[int, Clamped]:
    """`quant.clamped.clamped` of what lies on a device, which is looked through there: little leaves it."""
    bits = _stored_bits(parts, fmt)
    found = torch.nonzero(is_suspicious(bits, huge(parts.get("global_scale"), fmt), fmt))
    if not len(found):
        return {}
    held = {name: to_numpy(values) for name, values in parts.items() if name not in ("codes", "scale")}
    return _counted(weight_EOI, parts["codes"], bits, held, fmt, tuple(found.T.cpu().numpy()))


def clamped_within(
    weight_EOI: Tensor, parts: dict[str, Tensor], fmt: Format, off: float
) -> dict[int, tuple[Clamped, Clamped]]:
    """The same of weights that are known but for a factor of at most `off` or its inverse: least and most counts.

    A larger weight is clamped to the least scale no sooner, and to the most no later, so each end is looked at alone.
    """
    held, bits = {name: to_numpy(values) for name, values in parts.items() if name != "codes"}, _stored_bits(parts, fmt)
    found = suspicious(held, fmt)
    low = at_low_end(_picked(bits, found), fmt)
    least: dict[int, Clamped] = {}
    most: dict[int, Clamped] = {}
    for which, few, many in ((low, off, 1 / off), (~low, 1 / off, off)):
        groups = tuple(place[which] for place in found)
        for total, size in ((least, few), (most, many)):
            for expert, one in _counted(weight_EOI, parts["codes"], bits, held, fmt, groups, size).items():
                before = total.get(expert, Clamped(0, 0, 0, one.groups))
                total[expert] = Clamped(
                    before.zeroed + one.zeroed, before.clamped + one.clamped, before.infinite + one.infinite, one.groups
                )
    return {expert: (least.get(expert, Clamped(0, 0, 0, one.groups)), one) for expert, one in most.items()}


def _counted(
    weight_EOI: Tensor,
    codes: Tensor,
    bits: Tensor,
    held: dict[str, npt.NDArray[Any]],
    fmt: Format,
    groups: Groups,
    size: float = 1.0,
) -> dict[int, Clamped]:
    """Of weights times `size`."""
    codes, weights = codes.reshape(*bits.shape, -1), weight_EOI.reshape(*bits.shape, fmt.group_size)

    def picked(some: Groups) -> npt.NDArray[Any]:
        return _picked(weights, some) * size

    own, counts = _picked(bits, groups), (len(bits), bits[0].numel())
    return clamped_groups(held, fmt, groups, own, lambda some: _picked(codes, some), picked, counts)


def _stored_bits(parts: dict[str, Tensor], fmt: Format) -> Tensor:
    """Scales without their sign, of what lies on a device."""
    bits: Tensor = unsigned(parts["scale"].view(torch.int16 if fmt.name == "int4" else torch.uint8), fmt)
    return bits


def _picked(values: Tensor, groups: Groups) -> npt.NDArray[Any]:
    """Some groups' codes or stored bits, or weights as float32; on the host."""
    held = values[tuple(torch.from_numpy(np.ascontiguousarray(place)).to(values.device) for place in groups)]
    return to_numpy(held.to(torch.float32) if held.dtype.is_floating_point else held)


def _losses(one: Rounded, fmt: Format) -> Tensor:
    """[metrics, 3, E]: the output's energy, what quantizing lost of it, what plain rounding loses; all outputs alike
    and, where there is a metric of them, under that. Of a matrix with thousands of rows one in several stands for all.
    """
    step = max(1, one.weight.shape[1] // TOLD_ROWS)
    rows, scale = one.weight[:, ::step].contiguous(), global_scale(one.weight, "absmax", fmt)
    plain = encode_with(rows, one.gram, fmt, Method("absmax"), scale).values
    gram = one.gram.to(torch.bfloat16) if rows.is_cuda else one.gram  # as `energy` takes it
    wide = rows.to(torch.float32)
    changes = (values.to(torch.float32) - wide for values in (one.encoded.values[:, ::step], plain))
    metrics = [None] if one.metric is None else [None, one.metric[:, ::step, ::step]]
    energies = [torch.stack([energy(stack, gram, metric) for metric in metrics]) for stack in (rows, *changes)]
    return torch.stack(energies, dim=1)
