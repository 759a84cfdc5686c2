"""What is told of a chunk of experts: what its codes cost, beside plain rounding, under one metric or both; and which
groups have no scale in the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.model.decoder_layer import ExpertChunk
from mimoquant.model.layout import PROJECTIONS, ModelLayout
from mimoquant.quant.clamped import Clamped, Groups, at_low_end, clamped_groups, suspicious
from mimoquant.quant.engine_torch import amax, nvfp4_global_scale, to_numpy
from mimoquant.quant.expert_methods import Encoded, encode_with, energy
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


def chunk_facts(made: list[Rounded], fmt: Format) -> dict[str, Any]:
    """Relative losses of each expert over all stacks, and how often a method fell back."""
    told = torch.stack([_losses(one, fmt) for one in made]).sum(0)
    facts: dict[str, Any] = {}
    for (total, mine, plain), names in zip(told, (("relmse", "relmse_plain"), ("felt", "felt_plain")), strict=False):
        total = total.clamp(min=1e-30)
        facts |= {name: (values / total).tolist() for name, values in zip(names, (mine, plain), strict=True)}
    return facts | {
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
    """`quant.clamped.clamped` of what lies on a device: of codes and weights only what is asked for leaves it."""
    held = {name: to_numpy(values) for name, values in parts.items() if name != "codes"}
    return _counted(weight_EOI, parts["codes"], held, fmt, suspicious(held, fmt))


def clamped_within(
    weight_EOI: Tensor, parts: dict[str, Tensor], fmt: Format, off: float
) -> dict[int, tuple[Clamped, Clamped]]:
    """The same of weights that are known but for a factor of at most `off` or its inverse: least and most counts.

    A larger weight is clamped to the least scale no sooner, and to the most no later, so each end is looked at alone.
    """
    held = {name: to_numpy(values) for name, values in parts.items() if name != "codes"}
    found = suspicious(held, fmt)
    low = at_low_end(held, fmt, found)
    least: dict[int, Clamped] = {}
    most: dict[int, Clamped] = {}
    for which, few, many in ((low, off, 1 / off), (~low, 1 / off, off)):
        groups = tuple(place[which] for place in found)
        for total, size in ((least, few), (most, many)):
            for expert, one in _counted(weight_EOI, parts["codes"], held, fmt, groups, size).items():
                before = total.get(expert, Clamped(0, 0, 0, one.groups))
                total[expert] = Clamped(
                    before.zeroed + one.zeroed, before.clamped + one.clamped, before.infinite + one.infinite, one.groups
                )
    return {expert: (least.get(expert, Clamped(0, 0, 0, one.groups)), one) for expert, one in most.items()}


def _counted(
    weight_EOI: Tensor,
    codes: Tensor,
    held: dict[str, npt.NDArray[Any]],
    fmt: Format,
    groups: Groups,
    size: float = 1.0,
) -> dict[int, Clamped]:
    """Of weights times `size`."""
    codes = codes.reshape(*held["scale"].shape, -1)
    weights = weight_EOI.reshape(*held["scale"].shape, fmt.group_size)
    return clamped_groups(
        held, fmt, groups, lambda some: _picked(codes, some), lambda some: _picked(weights, some) * size
    )


def _picked(values: Tensor, groups: Groups) -> npt.NDArray[Any]:
    """Some groups' codes, or weights as float32; on the host."""
    held = values[tuple(torch.from_numpy(np.ascontiguousarray(place)).to(values.device) for place in groups)]
    return to_numpy(held if held.dtype == torch.uint8 else held.to(torch.float32))


def _losses(one: Rounded, fmt: Format) -> Tensor:
    """[metrics, 3, E]: the output's energy, what quantizing lost of it, what plain rounding loses; all outputs alike
    and, where there is a metric of them, under that. Of a matrix with thousands of rows one in several stands for all.
    """
    step = max(1, one.weight.shape[1] // TOLD_ROWS)
    rows, scale = one.weight[:, ::step].contiguous(), nvfp4_global_scale(amax(one.weight), "absmax", fmt)
    plain = encode_with(rows, one.gram, fmt, Method("absmax"), scale).values
    wide = rows.to(torch.float32)
    changes = (values.to(torch.float32) - wide for values in (one.encoded.values[:, ::step], plain))
    metrics = [None] if one.metric is None else [None, one.metric[:, ::step, ::step]]
    energies = [torch.stack([energy(stack, one.gram, metric) for metric in metrics]) for stack in (rows, *changes)]
    return torch.stack(energies, dim=1)
