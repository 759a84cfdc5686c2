"""How the codes of experts are chosen, as data: no tensor library, so that a plan can reckon with it."""

from __future__ import annotations

from dataclasses import dataclass

# The joint refinement (`reconstruct`): what its memory and time follow from.
WALKED_TOKENS = {"cpu": 2**12, "cuda": 2**16}  # of all experts walked together: on a CPU, what its cache holds
WALKED_FEWEST = 2**10  # as many tokens are reckoned for any expert: its rows' Gram matrices take memory as well
WALKED_MOST = 2**13  # of an expert: time grows with them
WALKED_COLUMNS = 32  # of a block, at least a group: their rows' Gram matrices cost arithmetic with its width
WALKED_TURNS = 4  # of rows: more at once overshoot, since each is blind to what the others do


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
