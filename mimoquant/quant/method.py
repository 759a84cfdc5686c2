"""How the codes of experts are chosen, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """`search`: absmax, mse or gram. `damp`: of the mean Gram diagonal. `refine`: rounds after GPTQ.

    `signed`: symmetric int4 scales may be negative, which puts the level -8 on the side with the larger weights.
    """

    search: str
    gptq: bool = False
    damp: float = 0.05
    refine: int = 0
    signed: bool = False
    every: int = 1  # the search tries one in so many multipliers
