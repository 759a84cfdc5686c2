"""Scales under the two-sided loss: near the bottom that float64 finds, and the loss never rises."""

from __future__ import annotations

import pytest
import torch
from test_two_sided import DAMP, EXPERTS, ROWS, WIDTH, loss, problem
from torch import Tensor

from mimoquant.quant.columns import units
from mimoquant.quant.engine_torch import amax, nvfp4_global_scale
from mimoquant.quant.expert_methods import encode_with
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.method import Method
from mimoquant.quant.refit import refit
from mimoquant.quant.two_sided import two_sided

FITTED = [Format("int4", 32), Format("int4", 128)]
STAYING = [Format("mxfp4", 32), Format("nvfp4", 16), Format("int4", 32, symmetric=False)]
fitted_formats = pytest.mark.parametrize("fmt", FITTED, ids=lambda fmt: fmt.label)


def bottom(weight: Tensor, gram: Tensor, metric: Tensor, codes: Tensor, fmt: Format) -> float:
    """The least loss of one expert over all scales, in float64: least squares of its whitened error."""
    roots = [torch.linalg.cholesky(matrix[0].double()) for matrix in (metric, gram)]
    unit = units(codes, fmt)[0].double()
    columns = []
    for row in range(ROWS):
        for begin in range(0, WIDTH, fmt.group_size):
            own = slice(begin, begin + fmt.group_size)
            columns.append(torch.outer(roots[0][row], unit[row, own] @ roots[1][own]).flatten())
    wanted = (roots[0].T @ weight[0].double() @ roots[1]).flatten()
    matrix = torch.stack(columns, dim=1)
    found = torch.linalg.lstsq(matrix, wanted[:, None]).solution
    return float((wanted - (matrix @ found)[:, 0]).square().sum())


@fitted_formats
def test_scales_come_near_the_bottom_that_a_float64_reference_finds(fmt: Format) -> None:
    weight, gram, metric, parts = problem(fmt)
    codes = two_sided(weight, gram, metric, Grid.of(parts, fmt), fmt, DAMP).codes
    before = loss(weight, gram, metric, Grid.of(parts, fmt), codes, fmt)[0]
    after = loss(weight, gram, metric, Grid.of(refit(weight, gram, metric, parts, codes, fmt), fmt), codes, fmt)[0]
    least = bottom(weight, gram, metric, codes, fmt)
    assert least < after and after - least < 0.15 * (before - least)  # bf16


@fitted_formats
def test_the_loss_never_rises_and_signs_stay(fmt: Format) -> None:
    weight, gram, metric, parts = problem(fmt, 5)
    sign = torch.where(torch.arange(ROWS)[:, None] % 2 == 0, 1, -1)
    last = parts = parts | {"scale": parts["scale"] * sign.to(parts["scale"].dtype)}
    codes = two_sided(weight, gram, metric, Grid.of(parts, fmt), fmt, DAMP).codes
    before = loss(weight, gram, metric, Grid.of(parts, fmt), codes, fmt)
    for _ in range(4):
        last = refit(weight, gram, metric, last, codes, fmt)
        after = loss(weight, gram, metric, Grid.of(last, fmt), codes, fmt)
        assert (after <= before * (1 + 1e-6)).all()
        before = after
    assert last["scale"].dtype == torch.bfloat16 and not torch.equal(last["scale"], parts["scale"])
    assert torch.equal(last["scale"].sign(), parts["scale"].sign())


@fitted_formats
def test_what_nothing_is_known_of_keeps_its_scales(fmt: Format) -> None:
    weight, gram, metric, parts = problem(fmt)
    codes = two_sided(weight, gram, metric, Grid.of(parts, fmt), fmt, DAMP).codes
    for no_gram, no_metric in ((0 * gram, metric), (gram, 0 * metric)):
        assert torch.equal(refit(weight, no_gram, no_metric, parts, codes, fmt)["scale"], parts["scale"])
    blind = gram.clone()
    blind[:, : fmt.group_size] = blind[:, :, : fmt.group_size] = 0  # a group that no token uses
    kept, moved = (of["scale"] for of in (parts, refit(weight, blind, metric, parts, codes, fmt)))
    assert torch.equal(moved[..., 0], kept[..., 0]) and not torch.equal(moved, kept)


@pytest.mark.parametrize("fmt", STAYING, ids=lambda fmt: fmt.label)
def test_scales_with_coarse_steps_or_zero_points_stay(fmt: Format) -> None:
    weight, gram, metric, parts = problem(fmt)
    codes = two_sided(weight, gram, metric, Grid.of(parts, fmt), fmt, DAMP).codes
    assert refit(weight, gram, metric, parts, codes, fmt) is parts


def test_a_method_with_rounds_loses_less_than_codes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = FITTED[0]
    weight, gram, metric, _ = problem(fmt)
    rough, scale = weight.to(torch.bfloat16), nvfp4_global_scale(amax(weight), "gram", fmt)
    method, felt = Method("gram", gptq=True, refine=2, signed=True), []
    for fitted in (True, False):
        if not fitted:
            monkeypatch.setattr("mimoquant.quant.expert_methods.refit", lambda w, g, m, parts, codes, f: parts)
        off = encode_with(rough, gram, fmt, method, scale, metric).values.double() - rough.double()
        felt.append(((metric.double() @ off @ gram.double()) * off).sum((1, 2)))
    assert felt[0].shape == (EXPERTS,) and felt[0].sum() < 0.995 * felt[1].sum()
