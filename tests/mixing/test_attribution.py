"""What a layer contributes: held against J made of known layers and pairs."""

from __future__ import annotations

import numpy as np
import pytest

from mimoquant.mixing.attribution import Ablation, Estimate, Floats

LAYERS, SEQUENCES = 6, 40
RATIO = np.array([[1.0, 0.8, 0.6, 0.0]] * LAYERS)


def made(pair: float, noise: float = 0.1, seed: int = 0) -> tuple[Ablation, Floats, Floats]:
    """An ablation of J = sum_i a_i + sum_ij pair a_i a_j, whose sequences differ in their whole level; a; all pairs."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.5, 2.0, LAYERS) * 1e-3
    b = pair * np.outer(a, a) * (1 - np.eye(LAYERS))
    whole = a.sum() + b.sum() / 2
    level = np.exp(noise * rng.standard_normal(2 * SEQUENCES))
    first, second = level[:SEQUENCES], level[SEQUENCES:]
    restored = whole - a - b.sum(1)
    return (
        Ablation((whole * first, whole * second), a[:, None] * first, restored[:, None] * second, RATIO),
        a,
        b,
    )


@pytest.mark.parametrize("pair", [0.0, -40.0, 30.0])
def test_shares_add_up_and_tell_what_pairs_cost(pair: float) -> None:
    ablation, a, b = made(pair)
    shares = ablation.contributions
    assert np.allclose(shares.sum(1), ablation.total, rtol=1e-12)
    expected = (a + b.sum(1) / 2) * ablation.total[0] / (a.sum() + b.sum() / 2)
    assert np.allclose(shares[0], expected, rtol=1e-9)


@pytest.mark.parametrize("pair", [0.0, -40.0, 30.0])
def test_choices_are_predicted(pair: float) -> None:
    """Every subset of the layers kept; J by the pairs is what the curve of the shares tells, nearly."""
    ablation, a, b = made(pair, noise=0.0)
    for kept in range(2**LAYERS):
        choice = [3 if kept >> i & 1 else 0 for i in range(LAYERS)]
        left = RATIO[np.arange(LAYERS), choice]
        true = a @ left + left @ b @ left / 2
        assert ablation.predicted(choice)[0] == pytest.approx(true, rel=0.05, abs=1e-9)
    assert ablation.predicted([0] * LAYERS)[0] == pytest.approx(ablation.total[0], rel=1e-12)
    assert ablation.predicted([3] * LAYERS)[0] == 0


@pytest.mark.parametrize("pair", [0.0, -40.0, 30.0])
def test_the_cost_of_a_target_is_the_inverse_of_the_prediction(pair: float) -> None:
    ablation, _, _ = made(pair)
    for choice in ([0, 1, 2, 3, 0, 1], [2] * 6, [0] * 6, [3, 3, 3, 3, 3, 0]):
        j, cost = ablation.predicted(choice)[0], ablation.costs()[np.arange(LAYERS), choice].sum()
        assert ablation.cost_of(j) == pytest.approx(cost, rel=1e-9)


@pytest.mark.parametrize("pair", [0.0, -40.0, 30.0])
def test_what_no_layer_causes_is_no_layers_share(pair: float) -> None:
    """J of the source as it is served comes on top of whatever is chosen, and changes no share."""
    plain, _, _ = made(pair)
    none = tuple(0.5 * np.median(half) * np.linspace(0.5, 1.5, SEQUENCES) for half in plain.whole)
    whole = (plain.whole[0] + none[0], plain.whole[1] + none[1])
    told = Ablation(whole, plain.alone + none[0], plain.restored + none[1], RATIO, (none[0], none[1]))
    assert np.allclose(told.contributions, plain.contributions, rtol=1e-9)
    for choice in ([0, 1, 2, 3, 0, 1], [0] * 6, [3] * 6):
        j = told.predicted(choice)
        assert np.allclose(j, told.floor + plain.predicted(choice), rtol=1e-9)
        cost = told.costs()[np.arange(LAYERS), choice].sum()
        assert told.cost_of(j[0]) == pytest.approx(cost, rel=1e-9, abs=1e-12)
    assert told.cost_of(0.0) == 0 and (told.floor > 0).all()


def test_intervals_hold_what_they_say() -> None:
    """95 % intervals of a contribution, over sets of sequences drawn anew, hold its true value about so often."""
    held = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        spread = np.exp(0.4 * rng.standard_normal((3, LAYERS, SEQUENCES)) - 0.08)
        a = np.linspace(1, 2, LAYERS)[:, None] * 1e-3
        parts, others = a * spread[0], a * spread[1]
        ablation = Ablation((parts.sum(0), others.sum(0)), parts, others.sum(0) - others, RATIO)
        told = Estimate.of(ablation.contributions[:, 2])
        held.append(told.low <= a[2, 0] <= told.high)
    assert 0.85 <= np.mean(held) <= 1.0


def test_a_checkpoint_without_error_costs_nothing() -> None:
    zero = np.zeros(4)
    ablation = Ablation((zero, zero), np.zeros((LAYERS, 4)), np.zeros((LAYERS, 4)), RATIO)
    assert not ablation.contributions.any() and not ablation.predicted([0] * LAYERS).any()
