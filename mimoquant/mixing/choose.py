"""The choice of a format for each layer: chosen by the knapsack, measured, tried against its neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from mimoquant.errors import QualityError, UsageError
from mimoquant.mixing.attribution import Ablation, Estimate, Floats
from mimoquant.mixing.knapsack import best_options, undominated
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.wording import size

Choice = tuple[int, ...]


ROUNDS = 2  # of swaps, at most


SWAPS = 2  # choices that are measured in one of them


RIVAL = 1.1  # times the predicted J of what is chosen: predictions err by some 5 %


def best_within(mixtures: Mixtures, costs: Floats, budget: int) -> Choice:
    """The least sum of costs [L, options] within a budget of bytes. Raises UsageError where nothing is quantized."""
    classes = [list(zip(cost, sizes, strict=True)) for cost, sizes in zip(costs.tolist(), mixtures.bytes, strict=True)]
    best = best_options(classes, budget - mixtures.rest_bytes)
    return _quantizing(mixtures, best, f"a size of {size(budget)}")


def _quantizing(mixtures: Mixtures, choice: list[int] | None, what: str) -> Choice:
    if choice is None or not any(mixtures.options[k].fmt for k in choice):
        problem = "cannot be reached" if choice is None else "takes no quantization: all layers can be kept"
        raise UsageError(f"{what} {problem}", hint="the run is kept: go on with --resume and another limit")
    return tuple(choice)


class Chooser:
    """The choice, and every choice that was measured on the way to it."""

    def __init__(
        self,
        mixtures: Mixtures,
        ablation: Ablation,
        measure: Callable[[Sequence[Choice]], list[tuple[Floats, Floats]]],
    ) -> None:
        self.mixtures, self.ablation, self._measure = mixtures, ablation, measure
        self.costs = ablation.costs()
        self.measured: dict[Choice, Floats] = {}  # [1 + resamples] J

    def within(self, budget: int) -> Choice:
        """The least J within a budget of bytes."""
        best = best_within(self.mixtures, self.costs, budget)
        if best not in self.measured:
            self.measure([best])
        for _ in range(ROUNDS):
            near = self._uniform_rivals(best, budget)
            if not self._agrees(best):
                near += self._neighbours(best, budget)
            near = list(dict.fromkeys(near))[:SWAPS]
            if near:
                self.measure(near)
            fitting = (choice for choice in self.measured if self.mixtures.size(choice) <= budget)
            least = min(fitting, key=lambda choice: self.measured[choice][0])
            if least == best:
                break
            best = least
        return best

    def _uniform_rivals(self, choice: Choice, budget: int) -> list[Choice]:
        """One option everywhere, where it fits and is predicted to be about as good: whoever looks at the result will
        ask for it."""
        count, limit = len(choice), RIVAL * self.ablation.predicted(choice)[0]
        every = [(k,) * count for k, option in enumerate(self.mixtures.options) if option.fmt]
        return [
            one
            for one in every
            if one not in self.measured
            and self.mixtures.size(one) <= budget
            and self.ablation.predicted(one)[0] <= limit
        ]

    def below(self, target: float) -> Choice:
        """The least bytes with J below a target. What was measured corrects what is asked of the prediction."""
        classes = [
            list(zip(sizes, cost, strict=True))
            for cost, sizes in zip(self.costs.tolist(), self.mixtures.bytes, strict=True)
        ]
        floor = float(self.ablation.floor[0])
        if floor > 0 and target <= floor:
            raise UsageError(
                f"a J of {target:g} cannot be reached: with all layers kept, and served so, it is {floor:.5f}",
                hint="the run is kept: go on with --resume and a higher --target-kl, or with --budget-gib",
            )
        asked = target
        for _ in range(1 + ROUNDS):
            best = _quantizing(self.mixtures, best_options(classes, self.ablation.cost_of(asked)), f"a J of {target:g}")
            if best not in self.measured:
                self.measure([best])
            if self.measured[best][0] <= target:
                return best
            asked *= 0.98 * target / self.measured[best][0]
        closest = min(values[0] for values in self.measured.values())
        raise QualityError(
            f"J {closest:.5f} is the least of the {len(self.measured)} choices measured, the target is {target:g}",
            hint="the run is kept: go on with --resume and a lower --target-kl, or with --budget-gib",
        )

    def measure(self, choices: Sequence[Choice]) -> None:
        for choice, (first, second) in zip(choices, self._measure(choices), strict=True):
            self.measured[choice] = self.ablation.mean(first, second)

    def _agrees(self, choice: Choice) -> bool:
        """Whether prediction and measurement are within the interval of their difference."""
        off = Estimate.of(self.measured[choice] - self.ablation.predicted(choice))
        return off.low <= 0 <= off.high

    def _neighbours(self, choice: Choice, budget: int) -> list[Choice]:
        """Choices that differ in one or two layers and fit, by predicted J; those that are measured left out."""
        sizes, room = self.mixtures.bytes, budget - self.mixtures.size(choice)
        moves = [
            (layer, k)
            for layer, now in enumerate(choice)
            for k in undominated(list(zip(self.costs[layer], sizes[layer], strict=True)))
            if k != now
        ]
        found: dict[Choice, float] = {}
        for some in itertools.chain(itertools.combinations(moves, 1), itertools.combinations(moves, 2)):
            near = list(choice)
            for layer, k in some:
                near[layer] = k
            more = sum(sizes[layer][k] - sizes[layer][choice[layer]] for layer, k in some)
            if len({layer for layer, _ in some}) == len(some) and more <= room:
                found[tuple(near)] = sum(
                    float(self.costs[layer, k] - self.costs[layer, choice[layer]]) for layer, k in some
                )
        fitting = (near for near in found if any(self.mixtures.options[k].fmt for k in near))
        return sorted((near for near in fitting if near not in self.measured), key=lambda near: found[near])
