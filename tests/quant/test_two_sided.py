"""Two-sided rounding and descent against float64, entry by entry, and what must hold of their losses."""

from __future__ import annotations

import pytest
import torch
from stored_formats import every_format
from test_gptq import offered, parts_of
from torch import Tensor

from mimoquant.calibration.statistics import slopes
from mimoquant.quant import descent
from mimoquant.quant.descent import descend
from mimoquant.quant.engine_torch import amax, nvfp4_global_scale
from mimoquant.quant.expert_methods import encode_with
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import gptq, push_factor
from mimoquant.quant.grid import Grid
from mimoquant.quant.method import Method
from mimoquant.quant.output_metric import dampened, gate_up_metric, shrunk_fisher
from mimoquant.quant.two_sided import two_sided

EXPERTS, ROWS, WIDTH = 2, 72, 256  # two bands, two blocks
DAMP = 0.05
NEAR = 1e-3  # of a grid step: float32 sums in another order


def correlated(size: int, seed: int) -> Tensor:
    """[EXPERTS, size, size] of vectors that share an eighth of their directions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(EXPERTS, 1000, size // 8, generator=generator)
    vectors = shared @ torch.randn(EXPERTS, size // 8, size, generator=generator) / (size / 8) ** 0.5
    vectors += 0.5 * torch.randn(EXPERTS, 1000, size, generator=generator)
    return vectors.mT @ vectors / 1000


def problem(fmt: Format, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    weight = torch.randn(EXPERTS, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight, correlated(WIDTH, seed + 1), dampened(correlated(ROWS, seed + 2), 0.1), parts_of(weight, fmt)


def loss(weight: Tensor, gram: Tensor, metric: Tensor, grid: Grid, codes: Tensor, fmt: Format) -> Tensor:
    off = (grid.wide(fmt).decode(codes, fmt) - weight).double()
    return ((metric.double() @ off @ gram.double()) * off).sum((1, 2))


def unit_factor(matrix: Tensor) -> Tensor:
    """float64, unit upper triangular: U of `matrix` = U P Uᵀ with a diagonal P, rows in the order of rounding."""
    upper = torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    return upper / torch.diagonal(upper)


def excess_of(
    weight: Tensor, gram: Tensor, metric: Tensor, codes: Tensor, parts: dict[str, Tensor], fmt: Format, expert: int
) -> Tensor:
    """How much further from what the reference wants each code [O, I] is than the nearest one, in scales.

    The squares of the e_ij must sum to the loss.
    """
    values, scale = offered(parts, fmt, expert)
    down = torch.argsort(-torch.diagonal(metric), stable=True)
    along = torch.argsort(-torch.diagonal(gram), stable=True)
    hessian = gram.double() + DAMP * torch.diagonal(gram).double().mean() * torch.eye(len(gram), dtype=torch.float64)
    first = unit_factor(metric[down][:, down]).T  # [i, k]: of row k in e_i, k <= i
    second = unit_factor(hessian[along][:, along])  # [m, j]
    group = along // fmt.group_size
    wanted = weight.double()[down][:, along]
    choices, chosen = values[down][:, group], codes[down][:, along].long()
    off = choices.gather(2, chosen[..., None])[..., 0] - wanted
    error = first @ off @ second  # both triangular: sums over k <= i and m <= j
    away = (choices - wanted[..., None] + (error - off)[..., None]).abs()
    own = away.gather(2, chosen[..., None])[..., 0]
    excess = (own - away.amin(-1)) / scale[down][:, group]
    whole = (metric.double()[down][:, down] @ off @ hessian[along][:, along] * off).sum()
    pivots = [
        torch.diagonal(torch.linalg.cholesky(matrix.double().flip(0, 1))).flip(0).square()
        for matrix in (metric[down][:, down], hessian[along][:, along])
    ]
    assert torch.isclose(whole, (pivots[0][:, None] * error.square() * pivots[1]).sum(), rtol=1e-9)
    return excess


@every_format
def test_each_code_is_the_nearest_to_what_a_float64_reference_wants(fmt: Format) -> None:
    weight, gram, metric, parts = problem(fmt)
    codes = two_sided(weight, gram, metric, Grid.of(parts, fmt), fmt, DAMP).codes
    excess = excess_of(weight[0], gram[0], metric[0], codes[0], parts, fmt, 0)
    assert excess.max() < NEAR
    assert int((excess > 0).sum()) <= 4  # ties, that float32 sums decide otherwise
    wrong = codes[0] ^ (torch.arange(WIDTH) == 7).to(torch.uint8)
    assert excess_of(weight[0], gram[0], metric[0], wrong, parts, fmt, 0).max() > NEAR


@every_format
def test_the_identity_gives_the_codes_of_gptq(fmt: Format) -> None:
    weight, gram, _, parts = problem(fmt)
    grid, alike = Grid.of(parts, fmt), torch.eye(ROWS).repeat(EXPERTS, 1, 1)
    plain = gptq(weight, gram, grid, fmt, DAMP).codes
    assert torch.equal(two_sided(weight, gram, alike, grid, fmt, DAMP).codes, plain)
    assert torch.equal(two_sided(weight, gram, 0 * alike, grid, fmt, DAMP).codes, plain)  # nothing was felt


@every_format
def test_the_whole_loss_is_lower_than_from_one_side_and_descent_lowers_it_further(fmt: Format) -> None:
    ratios = []
    for seed in range(4):
        weight, gram, metric, parts = problem(fmt, 10 * seed)
        grid = Grid.of(parts, fmt)
        one = gptq(weight, gram, grid, fmt, DAMP).codes
        before = two_sided(weight, gram, metric, grid, fmt, DAMP).codes
        after = [descend(weight, gram, metric, grid, before, fmt, rounds) for rounds in (1, 2)]
        losses = [loss(weight, gram, metric, grid, codes, fmt) for codes in (one, before, *after)]
        assert (losses[2] < losses[1]).all() and (losses[3] <= losses[2]).all()
        ratios.append(losses[1] / losses[0])
    assert torch.cat(ratios).mean() < 0.8


@every_format
def test_a_metric_of_all_experts_is_factored_once_for_the_same_codes(
    fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram, metric, parts = problem(fmt)
    grid, shared, made = Grid.of(parts, fmt), metric[:1].expand(EXPERTS, -1, -1), []

    def factor(matrix: Tensor, order: Tensor, damp: float) -> tuple[Tensor, list[int], list[int]]:
        made.append(len(matrix))
        return push_factor(matrix, order, damp)

    monkeypatch.setattr("mimoquant.quant.two_sided.push_factor", factor)
    once = two_sided(weight, gram, shared, grid, fmt, DAMP).codes
    assert made == [EXPERTS, 1] and torch.equal(once, two_sided(weight, gram, shared.clone(), grid, fmt, DAMP).codes)


@every_format
def test_rounds_of_a_method_lower_what_the_loss_feels(fmt: Format) -> None:
    weight, gram, metric, _ = problem(fmt)
    rough, grid_scale = weight.to(torch.bfloat16), nvfp4_global_scale(amax(weight), "gram", fmt)
    felt = []
    for rounds, of in ((2, None), (0, metric), (2, metric)):
        method = Method("gram", gptq=True, refine=rounds, signed=True)
        off = encode_with(rough, gram, fmt, method, grid_scale, of).values.double() - rough.double()
        felt.append(((metric.double() @ off @ gram.double()) * off).sum((1, 2)))
    assert (felt[1] < felt[0]).all() and felt[2].mean() < felt[1].mean()


@pytest.mark.parametrize("alike", [0.999, 1.0])
def test_descent_never_raises_the_loss_even_of_outputs_and_inputs_that_are_all_alike(alike: float) -> None:
    fmt = Format("int4", 32)
    weight, _, _, parts = problem(fmt)
    grid = Grid.of(parts, fmt)
    same = [alike + (1 - alike) * torch.eye(size).repeat(EXPERTS, 1, 1) for size in (WIDTH, ROWS)]
    codes = grid.wide(fmt).encode(weight, fmt)
    left = weight - grid.wide(fmt).decode(codes, fmt)
    after = descend(weight, *same, grid, codes, fmt, 2)
    moved = weight - grid.wide(fmt).decode(after, fmt)
    assert (descent.whole_loss(moved, *same) <= descent.whole_loss(left, *same)).all()


def test_gate_and_up_have_the_metric_that_autograd_finds() -> None:
    """The second moment of d(g · answer)/d(gate's and up's outputs), where g is independent of the tokens."""
    hidden, inner, tokens = 6, 4, 50
    draw = torch.Generator().manual_seed(0)
    down, fisher = torch.randn(1, hidden, inner, generator=draw), correlated(hidden + 2, 5)[0][:hidden, :hidden]
    root = torch.linalg.cholesky(fisher)
    gate, up = (torch.randn(tokens, inner, generator=draw, requires_grad=True) for _ in range(2))
    expected = torch.zeros(2 * inner, 2 * inner)
    for direction in root.T:  # their outer products sum to the Fisher matrix
        felt = (torch.nn.functional.silu(gate) * up) @ down[0].T @ direction
        found = torch.cat(torch.autograd.grad(felt.sum(), (gate, up)), dim=-1)
        expected += found.T @ found
    rows = slopes(gate, up).detach()
    assert torch.allclose(gate_up_metric(fisher, down, (rows.T @ rows)[None])[0], dampened(expected, 0.1), rtol=1e-4)


def test_a_fisher_matrix_of_few_samples_turns_into_the_identity() -> None:
    fisher = correlated(64, 3)[0]
    mean = torch.diagonal(fisher).mean()
    few, many = shrunk_fisher(fisher, 1) / mean, shrunk_fisher(fisher, 10**7) / mean
    assert (few - torch.diag(torch.diagonal(few))).abs().max() < 0.02
    assert torch.allclose(many, fisher / mean, atol=1e-4)
