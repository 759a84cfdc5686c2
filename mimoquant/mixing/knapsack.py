"""One option for each layer: the least cost within a limit, exactly (a multiple-choice knapsack).

Key idea: layer by layer, keep every partial sum (weight, cost) that no other one beats in both, and drop those that
cannot end below the best whole choice known. What a partial sum can still reach is told by the linear relaxation of the
layers to come, which for this problem is a convex function: the lower hulls of the layers, merged by slope.

Costs and weights are any numbers: cost J and weight bytes, or the other way round. References: Sinha and Zoltners, The
multiple-choice knapsack problem, 1979; Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Item = tuple[float, float]  # cost, weight
_SLACK = 1e-12  # relative: sums of the same numbers in another order differ by less


@dataclass(frozen=True)
class _Rest:
    """What the layers from one on can still do: their least weight, and at `weights` above it the least `costs` of the
    linear relaxation, which lie on a convex line."""

    weights: Floats
    costs: Floats

    def cost(self, room: Floats) -> Floats:
        """The least cost within some room; infinite where the room is too small."""
        inside = np.interp(room, self.weights, self.costs)
        return np.where(room >= self.weights[0] - _SLACK * abs(self.weights[0]), inside, np.inf)


def best_options(classes: Sequence[Sequence[Item]], limit: float) -> list[int] | None:
    """The index of one item in each class, with the least sum of costs at a sum of weights of at most `limit`.

    Of equal costs the least weight. None where nothing fits. Raises ValueError for an empty class.
    """
    if not all(classes):
        raise ValueError("every class needs an item")
    kept = [undominated(items) for items in classes]
    rests = _relaxations([[classes[i][k] for k in members] for i, members in enumerate(kept)])
    known = _rounded(classes, kept, limit)
    if known is None:
        return None
    best = sum(classes[i][k][0] for i, k in enumerate(known))
    weight, cost = np.zeros(1), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # of each sum: the sum before, the item
    for items, members, rest in zip(classes, kept, rests[1:], strict=True):
        costs, weights = (np.array([items[k][part] for k in members]) for part in (0, 1))
        sums, totals = (weight[:, None] + weights).ravel(), (cost[:, None] + costs).ravel()
        order = np.lexsort((totals, sums))
        order = order[_falling(totals[order])]
        room = limit - sums[order]
        order = order[totals[order] + rest.cost(room * (1 + _SLACK * np.sign(room))) <= best + _SLACK * abs(best)]
        steps.append((order // len(members), np.array(members)[order % len(members)]))
        weight, cost = sums[order], totals[order]
    fits = np.flatnonzero(weight <= limit)
    if not len(fits):  # nothing is below what was known
        return known
    return _traced(steps, int(fits[np.lexsort((weight[fits], cost[fits]))[0]]))


def undominated(items: Sequence[Item]) -> list[int]:
    """Indices by rising weight and strictly falling cost."""
    out: list[int] = []
    for k in sorted(range(len(items)), key=lambda k: (items[k][1], items[k][0])):
        if not out or items[k][0] < items[out[-1]][0]:
            out.append(k)
    return out


def _falling(costs: Floats) -> npt.NDArray[np.bool_]:
    """Which of the costs are below all before them."""
    before = np.minimum.accumulate(np.concatenate(([np.inf], costs[:-1])))
    out: npt.NDArray[np.bool_] = costs < before
    return out


def _hull(items: Sequence[Item]) -> list[Item]:
    """The lower convex hull of items with rising weight and falling cost."""
    hull: list[Item] = []
    for cost, weight in items:
        while len(hull) > 1 and _slope(hull[-2], (cost, weight)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((cost, weight))
    return hull


def _slope(a: Item, b: Item) -> float:
    return (b[0] - a[0]) / (b[1] - a[1])


def _relaxations(classes: Sequence[Sequence[Item]]) -> list[_Rest]:
    """One for each layer to begin from, and one for the end."""
    rests = [_Rest(np.zeros(1), np.zeros(1))]
    base, pieces = np.zeros(2), np.zeros((0, 2))  # (cost, weight) of the lightest; differences along all hulls
    for items in reversed(classes):
        hull = np.array(_hull(items))
        base, pieces = base + hull[0], np.concatenate([pieces, np.diff(hull, axis=0)])
        pieces = pieces[np.argsort(pieces[:, 0] / pieces[:, 1], kind="stable")]
        line = np.concatenate([base[None], base + pieces.cumsum(0)])
        rests.append(_Rest(line[:, 1], line[:, 0]))
    return rests[::-1]


def _rounded(classes: Sequence[Sequence[Item]], kept: Sequence[Sequence[int]], limit: float) -> list[int] | None:
    """A good choice: from the lightest items on, the steps with the best slope that still fit."""
    place = [0] * len(kept)
    weight = sum(items[members[0]][1] for items, members in zip(classes, kept, strict=True))
    if weight > limit:
        return None
    while True:
        steps = []
        for i, (items, members) in enumerate(zip(classes, kept, strict=True)):
            here = items[members[place[i]]]
            for target in range(place[i] + 1, len(members)):
                there = items[members[target]]
                if weight + there[1] - here[1] <= limit:
                    steps.append((_slope(here, there), i, target, there[1] - here[1]))
        if not steps:
            return [members[at] for members, at in zip(kept, place, strict=True)]
        _, i, place[i], more = min(steps)
        weight += more


def _traced(steps: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], at: int) -> list[int]:
    """The items that led to a sum."""
    out = []
    for before, item in reversed(steps):
        out.append(int(item[at]))
        at = int(before[at])
    return out[::-1]
