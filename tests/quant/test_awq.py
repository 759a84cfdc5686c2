"""AWQ through the Gram matrix against forward passes, and what a fold may and may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimoquant.model.decoder_layer import ExpertChunk, Router, add_experts, rms_norm, route
from mimoquant.model.dispatch import Dispatch
from mimoquant.quant.awq import (
    LIMIT,
    best_fold,
    candidates,
    divided_by,
    factors,
    inverse,
    moved,
    power,
    scaled,
    scaled_gram,
    settled,
)
from mimoquant.quant.engine_torch import decode, encode
from mimoquant.quant.expert_methods import loss
from mimoquant.quant.formats import Format

FORMATS = [Format("int4", 32), Format("int4", 128), Format("int4", 64, symmetric=False), Format("mxfp4", 32)]
EXPERTS, ROWS, COLUMNS, TOKENS = 3, 48, 128, 400


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [E, O, I] and inputs [E, n, I] with a few channels that are 16 times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator).to(torch.bfloat16)
    inputs = torch.randn(EXPERTS, TOKENS, COLUMNS, generator=generator)
    inputs[:, :, ::37] *= 16
    return weight, inputs.to(torch.bfloat16)


def rounded(weight: Tensor, fmt: Format) -> Tensor:
    return decode(encode(weight, fmt, "absmax"), fmt)


def by_gram(fmt: Format) -> Any:
    return lambda weight, gram: loss(weight, rounded(weight, fmt), gram)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("duo", [False, True])
def test_the_loss_by_the_gram_matrix_is_that_of_forward_passes(fmt: Format, duo: bool) -> None:
    weight, inputs = planted()
    gram = inputs.double().transpose(1, 2) @ inputs.double()
    mean = weight.abs().float().mean(1) if duo else None
    for k in candidates(torch.diagonal(gram.float(), dim1=1, dim2=2), mean, 5):
        scaled = weight.float() * power(k)[:, None, :]
        seen = inputs.double() / power(k)[:, None, :].double()
        outputs = seen @ rounded(scaled, fmt).double().transpose(1, 2)
        forward = (outputs - inputs.double() @ weight.double().transpose(1, 2)).square().sum((1, 2))
        ours = loss(scaled, rounded(scaled, fmt), scaled_gram(gram.float(), k))
        assert torch.allclose(ours.double(), forward, rtol=2e-2)  # the loss is taken with bf16 differences


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("shared", [False, True])
def test_the_fold_with_the_least_loss_is_chosen_and_the_identity_is_one_of_them(fmt: Format, shared: bool) -> None:
    weight, inputs = planted()
    gram = inputs.float().transpose(1, 2) @ inputs.float()
    fold = best_fold(weight, gram, by_gram(fmt), n_grid=8, duo=False, shared=shared)
    assert fold.shape == ((COLUMNS,) if shared else (EXPERTS, COLUMNS)) and fold.dtype == torch.int32
    scaled = weight.float() * power(fold)[..., None, :]
    after = loss(scaled, rounded(scaled, fmt), scaled_gram(gram, fold))
    before = loss(weight, rounded(weight, fmt), gram)
    if shared:
        assert after.sum() < before.sum()
    else:
        assert (after <= before * 1.0001).all() and (after < 0.95 * before).any()


def test_inputs_that_are_all_alike_leave_the_identity() -> None:
    weight = torch.randn(1, 16, 64).to(torch.bfloat16)
    fold = best_fold(weight, torch.eye(64)[None], by_gram(Format("int4", 32)), n_grid=4, duo=False, shared=False)
    assert not fold.any()


def test_powers_of_two_are_exact_and_bounded() -> None:
    diagonal = torch.tensor([[1e-30, 1e30, 0.0, 4.0]])
    for k in candidates(diagonal, None, 3):
        assert k.abs().max() <= 12
        values = torch.randn(4).to(torch.bfloat16)
        assert torch.equal((values * power(k[0])).to(torch.bfloat16).float() * power(-k[0]), values.float())


# --- real factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_real_factors_lower_the_loss_of_planted_channels_as_powers_of_two_do(
    fmt: Format, shared: bool, seed: int
) -> None:
    weight, inputs = planted(seed)
    gram = inputs.float().transpose(1, 2) @ inputs.float()

    def after(real: bool) -> float:
        fold = best_fold(weight, gram, by_gram(fmt), n_grid=8, duo=False, shared=shared, real=real)
        assert fold.dtype == (torch.float32 if real else torch.int32)
        folded = scaled(weight, fold[..., None, :])
        return float(loss(folded, rounded(folded, fmt), scaled_gram(gram, fold)).sum())

    none = float(loss(weight, rounded(weight, fmt), gram).sum())
    assert after(real=True) < 0.95 * none
    assert after(real=True) < 1.03 * after(real=False)


@pytest.mark.parametrize("duo", [False, True])
def test_real_candidates_are_those_of_powers_of_two_before_they_are_rounded(duo: bool) -> None:
    weight, inputs = planted()
    diagonal = inputs.float().square().sum(1)
    diagonal[0, 3], diagonal[1, :2] = 0.0, torch.tensor([1e-3, 1e30])
    mean = weight.abs().float().mean(1) if duo else None
    pairs = list(zip(candidates(diagonal, mean, 5), candidates(diagonal, mean, 5, real=True), strict=True))
    assert not moved(pairs[0][0]).any() and not moved(pairs[0][1]).any()
    for k, s in pairs:
        assert s.dtype == torch.float32 and s[0, 3] == 1
        assert (torch.log2(s) - k).abs().max() < 0.5001 and torch.log2(s).abs().max() <= LIMIT
    assert any((torch.log2(s) - k).abs().max() > 0.3 for k, s in pairs)


def test_a_settled_factor_is_that_of_the_norm_that_is_stored() -> None:
    """Over all bf16 gains: the rounded quotient is stored, and dividing again or reading back changes nothing."""
    norm = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    norm = norm[torch.isfinite(norm) & (norm.float().abs() > 1e-30) & (norm.float().abs() < 1e30) | (norm == 0)]
    wanted = torch.exp2(torch.rand(len(norm), generator=torch.Generator().manual_seed(0)) * 2 * LIMIT - LIMIT)
    fold = settled(wanted, norm)
    stored = scaled(norm, inverse(fold))
    assert torch.equal(stored, scaled(norm, inverse(wanted)))
    assert torch.equal(divided_by(norm, stored, real=True), fold) and torch.equal(settled(fold, norm), fold)
    assert torch.allclose(stored.float() * fold, norm.float(), rtol=2e-7, atol=0)
    assert (fold / wanted - 1).abs()[norm != 0].max() <= 2**-8 and (fold[norm == 0] == 1).all()
    k = torch.log2(wanted).round().to(torch.int32)
    assert settled(k, norm) is k
    assert torch.equal(divided_by(norm, scaled(norm, -k), real=False), torch.where(norm == 0, 0, k))


def test_a_layer_folded_by_real_factors_is_the_same_function() -> None:
    """Norm, router, gate and up by one fold, up and down by another: float32 before any 4-bit rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, norm = normal(256, 64), normal(64).exp().to(torch.bfloat16)
    router, bias, experts = normal(8, 64) / 8, normal(8) / 10, 8
    gate, up, down = normal(8, 32, 64) / 8, normal(8, 32, 64) / 8, normal(8, 64, 32) / 8
    outside = settled((2 * normal(64)).exp(), norm)
    inside = (2 * normal(8, 32)).exp()

    def layer(norm: Tensor, router: Tensor, chunk: ExpertChunk) -> tuple[Tensor, Tensor]:
        tokens = rms_norm(hidden, norm, 1e-6)
        routing = route(tokens, Router(router, bias), 2)
        out = torch.zeros_like(tokens)
        add_experts(out, tokens, Dispatch.of(routing, experts), chunk)
        return routing.experts, out

    chosen, expected = layer(norm, router, ExpertChunk(0, gate, up, down))
    folded = ExpertChunk(
        0,
        scaled(gate, outside),
        scaled(scaled(up, outside), inverse(inside)[:, :, None]),
        scaled(down, inside[:, None, :]),
    )
    again, out = layer(scaled(norm, inverse(outside)), scaled(router, outside), folded)
    assert (factors(outside) - 1).abs().max() > 10 and torch.equal(chosen, again)
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
