"""The choice of one option a layer: held against trying all of them."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoquant.mixing.knapsack import Item, best_options

items = st.tuples(st.integers(-5, 30), st.integers(0, 30)).map(lambda pair: (float(pair[0]), float(pair[1])))
problems = st.lists(st.lists(items, min_size=1, max_size=5), min_size=1, max_size=5)


def tried(classes: list[list[Item]], limit: float) -> tuple[float, float] | None:
    """(cost, weight) of the best of all choices."""
    every = (tuple(sum(part) for part in zip(*choice, strict=True)) for choice in itertools.product(*classes))
    return min(((cost, weight) for cost, weight in every if weight <= limit), default=None)


def totals(classes: list[list[Item]], chosen: list[int]) -> tuple[float, float]:
    held = [of_class[k] for of_class, k in zip(classes, chosen, strict=True)]
    return sum(cost for cost, _ in held), sum(weight for _, weight in held)


@settings(max_examples=300, deadline=None)
@given(problems, st.integers(0, 120))
def test_it_is_the_best_of_all_choices(classes: list[list[Item]], limit: int) -> None:
    """Cost first, then weight; whole numbers, so that sums are exact."""
    chosen, best = best_options(classes, limit), tried(classes, limit)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert totals(classes, chosen) == best


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_real_costs_and_byte_weights_too(seed: int, share: float) -> None:
    rng = random.Random(seed)
    classes = [
        [(rng.expovariate(1.0) / (k + 1), float(10**9 * (k + 1) ** 2 + rng.randrange(64))) for k in range(4)]
        for _ in range(5)
    ]
    lightest, heaviest = (sum(pick(w for _, w in of_class) for of_class in classes) for pick in (min, max))
    limit = lightest + share * (heaviest - lightest)
    chosen, best = best_options(classes, limit), tried(classes, limit)
    assert chosen is not None and best is not None
    cost, weight = totals(classes, chosen)
    assert cost == pytest.approx(best[0], rel=1e-12) and weight <= limit
    swapped = [[(w, c) for c, w in of_class] for of_class in classes]  # the least bytes within a J
    least = best_options(swapped, best[0] * (1 + 1e-12))
    assert least is not None and totals(swapped, least)[0] <= weight


def test_a_model_of_full_size_takes_no_time() -> None:
    rng = random.Random(1)
    classes = []
    for _ in range(69):
        share = rng.lognormvariate(0, 1)
        classes.append(
            [
                (share * ratio * rng.uniform(0.95, 1.05), 3.3e9 * size + rng.randrange(0, 65, 8))
                for ratio, size in ((1, 1), (0.85, 1.03), (0.7, 1.09), (0, 1.94), (0, 3.88))
            ]
        )
    begin = time.monotonic()
    for share in (0.1, 0.5, 0.9):
        limit = 69 * 3.3e9 * (1 + share)
        chosen = best_options(classes, limit)
        assert chosen is not None and totals(classes, chosen)[1] <= limit
    assert time.monotonic() - begin < 3


def test_what_cannot_be_is_said() -> None:
    assert best_options([[(1.0, 5.0)], [(1.0, 6.0)]], 10.0) is None
    with pytest.raises(ValueError, match="every class"):
        best_options([[(1.0, 1.0)], []], 10.0)
