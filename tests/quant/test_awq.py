"""AWQ through the Gram matrix against forward passes, and what a fold may and may not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mimoquant.quant.awq import best_fold, candidates, power, scaled_gram
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


def by_gram(fmt: Format) -> object:
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
    fold = best_fold(weight, gram, by_gram(fmt), n_grid=8, duo=False, shared=shared)  # type: ignore[arg-type]
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
    fold = best_fold(weight, torch.eye(64)[None], by_gram(Format("int4", 32)), n_grid=4, duo=False, shared=False)  # type: ignore[arg-type]
    assert not fold.any()


def test_powers_of_two_are_exact_and_bounded() -> None:
    diagonal = torch.tensor([[1e-30, 1e30, 0.0, 4.0]])
    for k in candidates(diagonal, None, 3):
        assert k.abs().max() <= 12
        values = torch.randn(4).to(torch.bfloat16)
        assert torch.equal((values * power(k[0])).to(torch.bfloat16).float() * power(-k[0]), values.float())
