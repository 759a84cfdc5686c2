"""What is felt of one expert's answers, from its own tokens and its layer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mimoquant.quant.output_metric import DAMP, experts_fisher, gate_up_metric

WIDTH = 48
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]


def samples(root: Tensor, count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ root


def halves_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of one expert: sums of outer products of two halves, and of how many."""
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return torch.stack([half.T @ half for half in (first, second)])[:, None], torch.tensor(
        [[float(len(first))], [float(len(second))]]
    )


@pytest.fixture(scope="module")
def roots() -> tuple[Tensor, Tensor]:
    """Of the layer's matrix and of an expert's, which are alike in half of their directions."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(1, 0.05, WIDTH)[:, None]
    other = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(1, 0.05, WIDTH)[:, None]
    return layer, 0.8 * layer + 0.6 * other


def test_samples_decide_how_much_is_the_experts_own(roots: tuple[Tensor, Tensor]) -> None:
    layer, root = roots
    fisher, true = layer.T @ layer, root.T @ root
    true = true * (fisher.trace() / true.trace())
    shares, errors = [], []
    for count in (8, 64, 512, 8192):
        blended, share = experts_fisher(*halves_of(samples(root, count, count)), fisher)
        assert blended[0].trace() == pytest.approx(float(fisher.trace()), rel=1e-4)
        shares.append(float(share))
        errors.append(float((blended[0] - true).norm() / (fisher - true).norm()))
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.6 and shares[-1] < 0.05
    assert max(errors) < 1.02, "never worse than the layer's"
    assert errors[2] < 0.6 and errors[3] < 0.2


@pytest.mark.parametrize("count", [0, 1])
def test_an_expert_without_samples_has_its_layers(count: int, roots: tuple[Tensor, Tensor]) -> None:
    fisher = roots[0].T @ roots[0]
    blended, share = experts_fisher(*halves_of(samples(roots[1], count, 0)), fisher)
    assert float(share) == 1.0 and torch.equal(blended[0], fisher)
    nothing = torch.zeros(2, 1, WIDTH, WIDTH)
    assert torch.equal(experts_fisher(nothing, torch.full((2, 1), 9.0), fisher)[0][0], fisher)


def test_an_expert_that_is_like_its_layer_gains_nothing_of_its_own(roots: tuple[Tensor, Tensor]) -> None:
    fisher = roots[0].T @ roots[0]
    shares = [float(experts_fisher(*halves_of(samples(roots[0], 512, seed)), fisher)[1]) for seed in range(8)]
    assert min(shares) > 0.7 and sum(shares) / 8 > 0.85


def test_halves_that_depend_on_one_another_inside_count_for_less(roots: tuple[Tensor, Tensor]) -> None:
    """Rows that come eight times, as a sequence's tokens nearly do, are worth one each."""
    rows = samples(roots[1], 64, 1)
    fisher = roots[0].T @ roots[0]
    once, eightfold = (experts_fisher(*halves_of(r), fisher)[1] for r in (rows, rows.repeat_interleave(8, 0)))
    assert float(once) == pytest.approx(float(eightfold), rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("shared", [True, False], ids=["one matrix", "one an expert"])
def test_gate_and_up_feel_what_down_makes_of_them(shared: bool, device: str, roots: tuple[Tensor, Tensor]) -> None:
    """By the definition, in float64: [[M, M], [M, M]] times the slopes' moments, M = down' F down; and dampened."""
    draw = torch.Generator().manual_seed(5)
    down, slopes = torch.randn(2, WIDTH, 16, generator=draw).bfloat16(), torch.rand(2, 32, 32, generator=draw)
    fisher = torch.stack([root.T @ root for root in roots])
    fisher = fisher[0] if shared else fisher
    inner = down.double().mT @ fisher.double() @ down.double()
    expected = slopes.double() * torch.cat([torch.cat([inner, inner], 2)] * 2, 1)
    expected += DAMP * torch.diag_embed(expected.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).expand(-1, 32))
    found = gate_up_metric(fisher.to(device), down.float().to(device), slopes.to(device))
    assert (found.cpu().double() - expected).abs().max() < 1e-5 * expected.abs().max()
