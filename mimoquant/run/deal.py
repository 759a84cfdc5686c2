"""Which rank does what of a plan: units, chunks of experts, rounds.

Key idea: without calibration units do not depend on each other, so each rank takes some and nobody waits. With it all
ranks go through all layers together: chunks of experts come in rounds of one chunk a rank, and one rank writes the
layer. What is dealt is work alone: the plan says what comes out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts, Step, Unit


@dataclass(frozen=True)
class Task:
    """A unit as one rank sees it: groups of steps that are done together. `writes`: whether it writes the shard."""

    unit: Unit
    groups: list[tuple[Step, ...]]
    writes: bool


def deal(plan: Plan, finished: Collection[str], rank: int, size: int) -> list[Task]:
    """What is left for a rank to do, in the plan's order."""
    todo = [unit for unit in plan.units if unit.name not in finished]
    if plan.recipe.calibration is None:
        return [Task(unit, [(step,) for step in unit.steps], True) for unit in _largest_first(todo, size)[rank]]
    numbered = ((unit, plan.units.index(unit) % size == rank) for unit in todo)
    return [
        Task(unit, _rounds(unit, size, writes), writes)
        for unit, writes in numbered
        if writes or unit.name.startswith("layer ")
    ]


def _largest_first(units: list[Unit], size: int) -> list[list[Unit]]:
    """The units of each rank: the largest first, to whom has least."""
    hands: list[list[int]] = [[] for _ in range(size)]
    bytes_of = [0] * size
    for place in sorted(range(len(units)), key=lambda place: -units[place].size_bytes):
        least = bytes_of.index(min(bytes_of))
        hands[least].append(place)
        bytes_of[least] += units[place].size_bytes
    return [[units[place] for place in sorted(hand)] for hand in hands]


def _rounds(unit: Unit, size: int, writes: bool) -> list[tuple[Step, ...]]:
    """Steps one by one, but quantized experts `size` chunks together; those beside the experts at the writer only."""
    groups: list[tuple[Step, ...]] = []
    for step in unit.steps:
        before = groups[-1] if groups else ()
        if not isinstance(step, Experts):
            groups += [(step,)] if writes else []
        elif step.fmt is not None and before and isinstance(before[0], Experts) and len(before) < size:
            groups[-1] = (*before, step)
        else:
            groups.append((step,))
    return groups or [()]  # a layer is walked also where nothing of it is done here
