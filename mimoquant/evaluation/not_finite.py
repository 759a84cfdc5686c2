"""Which checkpoint made an evaluation come to nothing, and where: said where no position has finite logits.

Key idea: weights that are NaN or Inf are refused by name when they are read, so what is not finite here has grown on
its way. The first layer after which hidden states are not finite is where to look; where all are, the logits are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mimoquant.errors import CheckpointError


class Walked(NamedTuple):
    """One side of a comparison: what it is called, whether any of its numbers came to be finite, and the first layer
    after which hidden states are not (None: all are, or it is not known)."""

    name: str
    finite: bool
    first: int | None = None


def nothing_finite(sides: Sequence[Walked], last: str = "logits") -> CheckpointError:
    """The error where no position is left to compare. `last`: what is not finite where all hidden states are."""
    blamed = [side for side in sides if side.first is not None] or [side for side in sides if not side.finite]
    if not blamed:
        return CheckpointError(f"no position has finite logits in both {sides[0].name} and {sides[1].name}")
    told = " and ".join(f"{side.name} ({_where(side, last)})" for side in blamed)
    return CheckpointError(
        f"no position has finite logits: NaN or Inf in {told}",
        hint="weights are looked at when they are read, and hold neither: something grows without bound on its way"
        if any(side.first is not None for side in blamed)
        else None,
    )


def _where(side: Walked, last: str) -> str:
    return f"its {last}" if side.first is None else f"first after layer {side.first}"


def all_finite(batches: Iterable[Tensor]) -> bool:
    """Whether hidden states are neither NaN nor Inf; their sum tells, unless it overflows itself."""
    return all(bool(hidden.sum(dtype=torch.float64).isfinite()) for hidden in batches)


def first_of(finite: Sequence[bool]) -> int | None:
    """The first layer whose states are not finite, of those of all layers in order."""
    return next((layer for layer, fine in enumerate(finite) if not fine), None)
