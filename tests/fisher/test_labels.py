"""Labels are drawn from the probabilities that are given, by numbers that depend on position and draw alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.fisher.labels import drawn, head_gradients, uniforms
from mimoquant.model.decoder_layer import linear, rms_norm


@pytest.mark.parametrize("vocab", [5, 1024, 3000])
def test_labels_are_where_the_numbers_fall(vocab: int) -> None:
    """Against a plain search among float64 cumulative sums; a share of 0, also the padded one, is never drawn."""
    shares = torch.rand(40, vocab, generator=torch.Generator().manual_seed(vocab)) ** 8
    shares[:, ::3] = 0
    shares[0], shares[0, 1] = 0, 1
    shares = shares / shares.sum(-1, keepdim=True)
    numbers = uniforms(40, 50, seed=3)
    numbers[:, 0], numbers[:, 1] = 0.0, 1 - 2.0**-53
    ours = drawn(shares, numbers).numpy()
    wide = shares.double().numpy()
    edges = wide.cumsum(1)
    theirs = np.stack([np.searchsorted(edge, u * edge[-1], side="right") for edge, u in
                       zip(edges, numbers.numpy(), strict=True)])  # fmt: skip
    inside = numbers.numpy() < 0.999
    assert (ours == theirs)[inside].mean() > 0.999  # float64 sums in another order
    assert (np.take_along_axis(wide, ours, 1) > 0).all() and (ours[0] == 1).all()


def test_labels_have_the_models_frequencies() -> None:
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0]).expand(20_000, 5)
    counts = torch.bincount(drawn(shares, uniforms(20_000, 2, seed=0)).flatten(), minlength=5).double()
    expected = shares[0].double() * 40_000
    chi2 = ((counts - expected)[:4] ** 2 / expected[:4]).sum()
    assert counts[4] == 0 and chi2 < 16.3  # .1 % of 3 degrees of freedom


def test_numbers_are_those_of_a_position_however_many_there_are() -> None:
    assert torch.equal(uniforms(100, 2, seed=5)[:30], uniforms(30, 2, seed=5))
    assert not torch.equal(uniforms(30, 2, seed=5), uniforms(30, 2, seed=6))


def head(vocab: int = 50, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(30, hidden, generator=generator), 1 + torch.rand(hidden, generator=generator),
            torch.randn(vocab, hidden, generator=generator).bfloat16())  # fmt: skip


def test_gradients_are_those_of_the_labels_log_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against automatic differentiation, over more than one block of tokens."""
    monkeypatch.setattr("mimoquant.fisher.labels.TOKEN_BLOCK", 7)
    hidden, norm, matrix = head()
    labels, ours = head_gradients(hidden, norm, matrix, 1e-5, uniforms(30, 3, seed=1))
    leaf = hidden.clone().requires_grad_()
    log_p = linear(rms_norm(leaf, norm, 1e-5), matrix).log_softmax(-1)
    for draw in range(3):
        (theirs,) = torch.autograd.grad(log_p.gather(1, labels[:, draw : draw + 1]).sum(), leaf, retain_graph=True)
        assert float((ours[draw] - theirs).norm() / theirs.norm()) < 1e-5


def test_predictions_that_are_not_finite_stop_the_walk() -> None:
    hidden, norm, matrix = head()
    hidden[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="predictions are not finite"):
        head_gradients(hidden, norm, matrix, 1e-5, uniforms(30, 1, seed=1))
