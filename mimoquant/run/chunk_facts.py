"""What is told of a chunk of experts: what its codes cost, beside plain rounding, under one metric or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimoquant.quant.engine_torch import amax, nvfp4_global_scale
from mimoquant.quant.expert_methods import Encoded, encode_with, energy
from mimoquant.quant.formats import Format
from mimoquant.quant.method import Method

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
