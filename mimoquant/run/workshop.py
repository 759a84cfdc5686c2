"""What the steps of a run are done with, and what they leave for later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts
from mimoquant.planning.writing import PIECE_BYTES
from mimoquant.quant.stack import Engine
from mimoquant.run.clamped import Counts, refuse_lost, refuse_many

Produced = Iterator[tuple[str, npt.NDArray[Any]]]  # output tensors by name, in file order; a large one in parts


@dataclass(frozen=True, slots=True)
class Workshop:
    """What steps are done with: the plan, its source, the engine, and which rank of the run this is, of how many
    bytes pieces of a tensor are; what is counted meanwhile of groups that have no scale (see `run.clamped`), and what
    was `begun`."""

    plan: Plan
    reader: CheckpointReader
    engine: Engine
    rank: int = 0
    piece_bytes: int = PIECE_BYTES
    clamped: Counts = field(default_factory=dict)
    begun: list[Callable[[], Produced]] = field(default_factory=list)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory for bytes that go from disk to disk: none that a GPU copies from."""
        return self.engine.empty(shape, dtype) if self.engine.name == "cpu" else np.empty(shape, dtype)

    def rest(self) -> Produced:
        """What comes of rounds of experts that a device was given, and that nobody has waited for: the next one is
        begun before, so that the device always has work."""
        while self.begun:
            yield from self.begun.pop(0)()

    def count(self, clamped: Counts, step: Experts) -> None:
        """Raises QualityError where groups without a scale are many."""
        refuse_many(clamped, step)
        self.clamped.update(clamped)

    def count_lost(self, name: str, lost: tuple[int, int], blocks: int) -> None:
        """The same of FP8 blocks of a weight that became bf16, or of a part of it; `blocks`: of all of it."""
        if any(lost):
            zeroed, some, *_ = self.clamped.get(name, (0, 0))
            self.clamped[name] = [zeroed + lost[0], some + lost[1], 0, blocks]
            refuse_lost({name: self.clamped[name]})

    def counted(self) -> Counts:
        """What was counted since this was asked last."""
        counts = dict(self.clamped)
        self.clamped.clear()
        return counts
