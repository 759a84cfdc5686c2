"""J and its companions against a float64 brute force, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoquant.evaluation import divergence
from mimoquant.evaluation.divergence import TokenScores, bootstrap, head_divergences, token_divergences


def scores_of(z_p: torch.Tensor, z_q: torch.Tensor, labels: torch.Tensor) -> TokenScores:
    [scores] = token_divergences(lambda b, e: z_p[:, b:e], [lambda b, e: z_q[:, b:e]], z_p.shape[1], labels)
    return scores


def brute_force(z_p: torch.Tensor, z_q: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both directions from the textbook, position by position and word by word."""
    forward, reverse = [], []
    for row_p, row_q in zip(z_p.double().tolist(), z_q.double().tolist(), strict=True):
        p, q = np.exp(np.array(row_p) - max(row_p)), np.exp(np.array(row_q) - max(row_q))
        p, q = p / p.sum(), q / q.sum()
        forward.append(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
        reverse.append(sum(b * (np.log(b) - np.log(a)) for a, b in zip(p, q, strict=True)))
    return np.array(forward), np.array(reverse)


@pytest.mark.parametrize("block", [3, 7, 64])
def test_float64_agrees_with_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "VOCAB_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    z_p = 4 * torch.randn(11, 50, dtype=torch.float64, generator=generator)
    z_q = z_p + 0.7 * torch.randn(11, 50, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 50, (11,), generator=generator)
    scores = scores_of(z_p, z_q, labels)
    forward, reverse = brute_force(z_p, z_q)
    assert np.abs(scores.kl_forward - forward).max() < 1e-10
    assert np.abs(scores.kl_reverse - reverse).max() < 1e-10
    assert np.abs(scores.j - (forward + reverse) / 2).max() < 1e-10
    loss = torch.nn.functional.cross_entropy(z_p, labels, reduction="none").numpy()
    assert np.abs(scores.reference_loss - loss).max() < 1e-10
    assert np.array_equal(scores.agree, (z_p.argmax(-1) == z_q.argmax(-1)).numpy())
    assert np.abs(scores.confidence - z_p.softmax(-1).amax(-1).numpy()).max() < 1e-10


def test_float32_is_within_its_rounding() -> None:
    generator = torch.Generator().manual_seed(2)
    z_p = 6 * torch.randn(40, 20_000, generator=generator)
    z_q = z_p + 0.2 * torch.randn(40, 20_000, generator=generator)
    scores = scores_of(z_p, z_q, torch.zeros(40, dtype=torch.int64))
    exact = scores_of(z_p.double(), z_q.double(), torch.zeros(40, dtype=torch.int64))
    assert np.abs(scores.j / exact.j - 1).max() < 1e-5


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0, 50), st.floats(0, 5))
def test_laws(seed: int, spread: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z_p = spread * torch.randn(4, 37, generator=generator)
    z_q = z_p + noise * torch.randn(4, 37, generator=generator)
    labels = torch.randint(0, 37, (4,), generator=generator)
    scores, swapped = scores_of(z_p, z_q, labels), scores_of(z_q, z_p, labels)
    assert (scores.j >= 0).all() and (scores.kl_forward >= 0).all() and (scores.kl_reverse >= 0).all()
    assert np.array_equal(scores.j, swapped.j)
    assert (scores_of(z_p, z_p, labels).j == 0).all() and (scores_of(z_p, z_p, labels).kl_forward == 0).all()
    order = torch.randperm(37, generator=generator)
    permuted = scores_of(z_p[:, order], z_q[:, order], torch.argsort(order)[labels])
    assert np.allclose(scores.j, permuted.j, rtol=1e-4, atol=1e-6)


def test_logits_that_are_not_finite_are_marked() -> None:
    z_p = torch.zeros(3, 10)
    z_q = z_p.clone()
    z_q[1, 4], z_q[2, 9] = float("nan"), float("inf")
    scores = scores_of(z_p, z_q, torch.zeros(3, dtype=torch.int64))
    assert scores.finite.tolist() == [True, False, False]


def test_token_blocks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, other = (torch.randn(50, 16, generator=generator) for _ in range(2))
    head = torch.randn(30, 16, generator=generator).to(torch.bfloat16)
    labels = torch.randint(0, 30, (50,), generator=generator)
    [whole] = head_divergences((hidden, head), [(other, head)], labels)
    monkeypatch.setattr(divergence, "TOKEN_BLOCK", 7)
    [parts] = head_divergences((hidden, head), [(other, head)], labels)
    assert np.allclose(whole.j, parts.j, rtol=1e-5)


def test_the_bootstrap_resamples_sequences_not_tokens() -> None:
    """Tokens of a sequence that are all alike carry no more than one token: the interval must not shrink."""
    rng = np.random.default_rng(0)
    means = rng.normal(1, 0.1, 64)
    narrow = bootstrap(means, np.arange(64))
    repeated = bootstrap(np.repeat(means, 100), np.repeat(np.arange(64), 100))
    assert np.allclose(narrow, repeated)
    assert narrow[0] < means.mean() < narrow[1] and 0.03 < narrow[1] - narrow[0] < 0.07
