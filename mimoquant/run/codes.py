"""Codes of a chunk's experts from their statistics, on a CPU by a core for some of the experts each; and how far thin
statistics are shrunk, which is chosen by such codes. Shapes: E experts, R rows, K columns.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mimoquant.calibration import statistics
from mimoquant.machine.cores import dealt
from mimoquant.quant.expert_methods import Encoded, encode_with, energy, global_scale, joined, loss
from mimoquant.quant.formats import Format
from mimoquant.quant.method import Method

SHRINKAGES = (0.0, 1.0, 4.0)  # times the width, that are tried
COARSE = 5  # one in so many scale multipliers is tried while a fold or a shrinkage is chosen


def encode(weight: Tensor, gram: Tensor, fmt: Format, method: Method, metric: Tensor | None = None) -> Encoded:
    """See `encode_with`; each expert has a global scale of its own, where the format has one."""

    def encoded(own: slice) -> Encoded:
        rows = weight[own]
        felt = None if metric is None else metric[own]
        return encode_with(rows, gram[own], fmt, method, global_scale(rows, method.search, fmt), felt)

    return joined(dealt(encoded, len(weight), weight.device))


def best_shrinkage(
    rows: Tensor, gram: Tensor, held: Tensor, count: list[int], pooled: Tensor, fmt: Format, method: Method
) -> tuple[float, dict[str, float]]:
    """The shrinkage whose codes have the least loss on held-out tokens, and each one's loss as predicted and measured;
    1 and nothing where no held-out token came by.

    Args:
        rows: [E, R, K], gate's above up's.
        gram, held: [E, K, K] sums over the experts' own tokens, and over those held out.
        count: tokens of each expert in `gram`.
        pooled: [K, K] of the whole layer, a token.
    """
    quick = replace(method, refine=0, every=COARSE)
    of_held = energy(rows, held)
    if not bool(of_held.any()):
        return 1.0, {}
    whole, told = of_held.sum(), {}

    def losses(own: slice, n0: float) -> Tensor:
        """[3, E]: on held-out tokens, on the expert's own, and the energy that this is a share of."""
        shrunk = statistics.shrink(gram[own], count[own], pooled, n0)
        values = encode(rows[own], shrunk, fmt, quick).values
        return torch.stack(
            (loss(rows[own], values, held[own]), loss(rows[own], values, shrunk), energy(rows[own], shrunk))
        )

    for factor in SHRINKAGES:
        made = dealt(partial(losses, n0=factor * len(pooled)), len(rows), rows.device)
        on_held, on_own, of_own = torch.cat(made, dim=1).sum(1)
        told[f"predicted_{factor:g}"] = float(on_own / of_own.clamp(min=1e-30))
        told[f"measured_{factor:g}"] = float(on_held / whole.clamp(min=1e-30))
    return min(SHRINKAGES, key=lambda factor: told[f"measured_{factor:g}"]), told
