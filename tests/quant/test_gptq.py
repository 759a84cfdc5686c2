"""Batched GPTQ against the textbook: float64, one expert, one column at a time, two Cholesky factors and an inverse.

The reference follows the codes under test, so that each choice is judged on its own: it is the nearest grid value to
what the reference has in that column, or the two candidates are as good as equally near (counted). Without that, the
first tie of a row that falls the other way would change all choices after it.
"""

from __future__ import annotations

import pytest
import torch
from stored_formats import every_format
from torch import Tensor

from mimoquant.quant import gptq as module
from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale, unpack_nibbles, unpack_zero_points
from mimoquant.quant.formats import E2M1_VALUES, Format
from mimoquant.quant.gptq import GptqResult, gptq, push_factor
from mimoquant.quant.grid import Grid
from mimoquant.quant.order import falling, laid

EXPERTS, ROWS, WIDTH = 3, 8, 640  # two panels, five blocks of columns
DAMP = 0.05
NEAR = 1e-3  # of a grid step: float32 sums over a few hundred columns, in another order


def weights(seed: int = 0) -> Tensor:
    return torch.randn(EXPERTS, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.02


def correlated(seed: int = 0) -> Tensor:
    """Gram matrices [EXPERTS, WIDTH, WIDTH] of inputs that share 48 directions; six are ten times as large."""
    generator = torch.Generator().manual_seed(1000 + seed)
    inputs = torch.randn(EXPERTS, 1000, 48, generator=generator) @ torch.randn(EXPERTS, 48, WIDTH, generator=generator)
    inputs = inputs / 7 + 0.5 * torch.randn(EXPERTS, 1000, WIDTH, generator=generator)
    inputs[:, :, torch.randperm(WIDTH, generator=generator)[:6]] *= 10
    return inputs.transpose(1, 2) @ inputs / 1000


def parts_of(weight: Tensor, fmt: Format) -> dict[str, Tensor]:
    return encode(weight, fmt, "mse", nvfp4_global_scale(amax(weight), "mse", fmt))


def run(weight: Tensor, gram: Tensor, fmt: Format, damp: float = DAMP) -> tuple[dict[str, Tensor], GptqResult]:
    parts = parts_of(weight, fmt)
    return parts, gptq(weight, gram, Grid.of(parts, fmt), fmt, damp)


def offered(parts: dict[str, Tensor], fmt: Format, expert: int) -> tuple[Tensor, Tensor]:
    """float64 [O, G, 16], the values of the codes, and [O, G], the scale; from the format's definition."""
    scale = parts["scale"][expert].double()
    if fmt.name == "mxfp4":
        scale = 2.0 ** (scale - 127)
    if fmt.name == "nvfp4":
        scale = scale / parts["global_scale"][expert].double()
    if fmt.name == "int4":
        level = torch.arange(-8, 8, dtype=torch.float64).expand(*scale.shape, 16)
        if not fmt.symmetric:
            level = level - unpack_zero_points(parts["zero_point"])[expert].double()[..., None]
    else:
        level = torch.tensor(E2M1_VALUES, dtype=torch.float64)
        level = torch.cat([level, -level])
    return level * scale[..., None], scale


def textbook(weight: Tensor, gram: Tensor, codes: Tensor, parts: dict[str, Tensor], fmt: Format, expert: int) -> Tensor:
    """How much further from the reference's weight each of `codes` [O, I] is than the nearest, in scales."""
    values, scale = offered(parts, fmt, expert)
    order = torch.argsort(-gram.diagonal(), stable=True)
    hessian = gram.double()[order][:, order]
    hessian += DAMP * hessian.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left = weight.double()[:, order].clone()
    excess = torch.empty_like(left)
    for i, column in enumerate(order.tolist()):
        group = column // fmt.group_size
        away = (left[:, i, None] - values[:, group]).abs()
        chosen = codes[:, column, None].long()
        excess[:, i] = (away.gather(1, chosen)[:, 0] - away.amin(1)) / scale[:, group]
        error = (left[:, i] - values[:, group].gather(1, chosen)[:, 0]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    return excess


def natural(gram: Tensor) -> Tensor:
    """The order in which columns stand."""
    return torch.arange(gram.shape[-1]).expand(len(gram), -1)


def loss(weight: Tensor, codes: Tensor, parts: dict[str, Tensor], gram: Tensor, fmt: Format) -> Tensor:
    difference = Grid.of(parts, fmt).wide(fmt).decode(codes, fmt).double() - weight.double()
    return ((difference @ gram.double()) * difference).sum((-2, -1))


@every_format
def test_every_choice_is_the_textbook_s(fmt: Format) -> None:
    weight, gram = weights(), correlated()
    parts, result = run(weight, gram, fmt)
    assert (result.damped, result.rounded) == (0, 0) and not result.troubled.any()
    assert result.codes.shape == weight.shape and result.codes.dtype is torch.uint8
    excess = torch.stack([textbook(weight[e], gram[e], result.codes[e], parts, fmt, e) for e in range(EXPERTS)])
    assert (excess > 0).float().mean() < 1e-3, "more ties than chance has"
    assert excess.max() < NEAR
    plain = unpack_nibbles(parts["codes"])
    assert (result.codes != plain).float().mean() > 0.1, "and it is not plain rounding"


def test_the_factor_makes_the_loss_a_sum_of_squares() -> None:
    """tr(D H Dᵀ) is the sum over columns i of c_i (d_i + sum of push_ji d_j over j < i)², c_i > 0."""
    gram = correlated()
    push, damped, rounded = push_factor(gram, natural(gram), DAMP)
    assert not damped and not rounded
    assert torch.equal(push, push.triu(1))
    step = DAMP * gram.diagonal(dim1=1, dim2=2).mean(-1).double()
    hessian = gram.double() + step[:, None, None] * torch.eye(WIDTH)
    unit = push.double() + torch.eye(WIDTH)  # H = unit C unitᵀ, C diagonal
    middle = torch.linalg.solve(unit, torch.linalg.solve(unit, hessian).mT)
    diagonal = middle.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0).all()
    assert (middle - torch.diag_embed(diagonal)).abs().max() < 1e-5 * diagonal.max()


def test_a_factor_made_by_panels_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: from the last panel to the first, the matrices in trouble told apart."""
    gram, order = correlated(), falling(correlated())
    whole, _, _ = push_factor(gram, order, DAMP)
    ordered = laid(gram, order, order)
    assert torch.equal(whole, push_factor(ordered, natural(ordered), DAMP)[0])  # to the bit: sums go in that order, too
    ordered += DAMP * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(WIDTH)
    ordered[1] -= 1.5 * torch.diag(ordered[1].diagonal())
    monkeypatch.setattr(module, "_FACTOR_PANEL", 96)
    assert module._by_panels(ordered).tolist() == [True, False, True]
    assert torch.equal(ordered[::2], ordered[::2].triu(1))
    assert torch.allclose(ordered[::2], whole[::2], rtol=1e-3, atol=1e-4)


@every_format
def test_what_is_left_is_told(fmt: Format) -> None:
    parts, result = run(weights(), correlated(), fmt)
    values = Grid.of(parts, fmt).wide(fmt).decode(result.codes, fmt)
    assert result.left is not None and torch.equal(result.left[0].mT, weights() - values)


@every_format
def test_inputs_that_do_not_correlate_give_plain_rounding(fmt: Format) -> None:
    weight, generator = weights(), torch.Generator().manual_seed(3)
    for diagonal in (torch.ones(EXPERTS, WIDTH), torch.rand(EXPERTS, WIDTH, generator=generator)):
        parts, result = run(weight, torch.diag_embed(diagonal), fmt)
        assert torch.equal(result.codes, unpack_nibbles(parts["codes"]))


@every_format
def test_the_loss_is_below_plain_rounding_s(fmt: Format) -> None:
    weight, gram = weights(), correlated()
    parts, result = run(weight, gram, fmt)
    ours = loss(weight, result.codes, parts, gram, fmt)
    assert (ours < 0.5 * loss(weight, unpack_nibbles(parts["codes"]), parts, gram, fmt)).all()


@every_format
def test_experts_do_not_depend_on_their_company(fmt: Format) -> None:
    weight, gram = weights(), correlated()
    parts, together = run(weight, gram, fmt)
    for expert in range(EXPERTS):
        own = slice(expert, expert + 1)
        part = {name: values[own] for name, values in parts.items()}
        alone = gptq(weight[own], gram[own], Grid.of(part, fmt), fmt, DAMP)
        rows = (alone.codes[0] != together.codes[expert]).any(1)
        assert int(rows.sum()) <= 1, "a tie may fall the other way where sums have another order"
        mine, theirs = (loss(weight[own], codes, part, gram[own], fmt) for codes in (alone.codes, together.codes[own]))
        assert abs(float(mine / theirs) - 1) < 1e-2


def test_an_unused_input_is_rounded_plainly_and_moves_nothing() -> None:
    fmt, weight, gram = Format("int4", 32), weights(), correlated()
    unused = torch.tensor([0, 5, 200, 255])
    gram[:, unused], gram[:, :, unused] = 0, 0
    parts, result = run(weight, gram, fmt)
    assert (result.damped, result.rounded) == (0, 0)
    assert torch.equal(result.codes[:, :, unused], unpack_nibbles(parts["codes"])[:, :, unused])
    other = weight.clone()
    other[:, :, unused] *= -0.5
    used = torch.ones(WIDTH, dtype=torch.bool)
    used[unused] = False
    moved = gptq(other, gram, Grid.of(parts, fmt), fmt, DAMP)
    assert torch.equal(moved.codes[:, :, used], result.codes[:, :, used])


def bad_gram(kind: str, good: Tensor) -> Tensor:
    bad = good.clone()
    if kind == "no tokens":
        return torch.zeros_like(good)
    if kind in ("nan", "inf"):
        bad[7, 9] = bad[9, 7] = float(kind)
    elif kind == "a bit negative":
        bad -= 0.2 * good.diagonal().mean() * torch.eye(WIDTH)
    elif kind == "negative":
        bad = -good
    elif kind == "indefinite":
        bad[3, 200] = bad[200, 3] = 1e4 * good.diagonal().max()
    elif kind == "one direction":
        bad[:] = 1.0
    elif kind == "huge":
        bad *= 1e37
    else:
        assert kind == "tiny"
        bad *= 1e-36
    return bad


KINDS = {
    "no tokens": None,
    "nan": "rounded",
    "inf": "rounded",
    "a bit negative": "damped",
    "negative": "rounded",
    "indefinite": "rounded",
    "one direction": None,
    "huge": "rounded",
    "tiny": None,
}


@pytest.mark.parametrize(("kind", "fate"), KINDS.items(), ids=KINDS)
def test_a_bad_gram_matrix_is_counted_and_harms_no_other_expert(kind: str, fate: str | None) -> None:
    fmt, weight, gram = Format("int4", 32), weights(), correlated()
    parts, before = run(weight, gram, fmt)
    gram[1] = bad_gram(kind, gram[1])
    parts, result = run(weight, gram, fmt)
    assert (result.damped, result.rounded) == (int(fate == "damped"), int(fate == "rounded"))
    assert result.troubled.tolist() == [False, fate is not None, False]
    others = torch.tensor([0, 2])
    assert (result.codes[others] != before.codes[others]).float().mean() < 1e-2
    if fate == "rounded" or kind == "no tokens":
        assert torch.equal(result.codes[1], unpack_nibbles(parts["codes"])[1])
    factor, damped, rounded = push_factor(gram, natural(gram), DAMP)
    assert torch.isfinite(factor).all() and (len(damped), len(rounded)) == (result.damped, result.rounded)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("damp", [0.0, 1e-9])
def test_too_few_tokens_and_no_dampening(tokens: int, damp: float) -> None:
    """A singular matrix gets some dampening all the same."""
    fmt, weight = Format("nvfp4", 16), weights()
    inputs = torch.randn(EXPERTS, tokens, WIDTH, generator=torch.Generator().manual_seed(5))
    parts, result = run(weight, inputs.mT @ inputs, fmt, damp)
    assert result.damped == EXPERTS and result.rounded == 0
    factor, _, _ = push_factor(inputs.mT @ inputs, natural(inputs.mT @ inputs), damp)
    assert torch.isfinite(factor).all()
    gram = inputs.mT @ inputs
    plain = loss(weight, unpack_nibbles(parts["codes"]), parts, gram, fmt)
    assert (loss(weight, result.codes, parts, gram, fmt) < plain).all()


def test_the_arguments_stay_as_they_are() -> None:
    weight, gram = weights(), correlated()
    copies = weight.clone(), gram.clone()
    run(weight, gram, Format("mxfp4", 32))
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])
