"""Refinement of scales and codes: it only ever lowers the loss, and each step is the best that brute force finds."""

from __future__ import annotations

import pytest
import torch
from stored_formats import FORMATS, every_format
from torch import Tensor

from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale, unpack_nibbles
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import gptq
from mimoquant.quant.grid import Grid
from mimoquant.quant.refine import refine

MOVABLE = [fmt for fmt in FORMATS if fmt.name != "mxfp4" and fmt.symmetric]
STARTS = [
    (fmt, how)
    for fmt in FORMATS
    for how in ("absmax", "gptq", "random", "signed")
    if how != "signed" or (fmt.name == "int4" and fmt.symmetric)
]
every_start = pytest.mark.parametrize(("fmt", "how"), STARTS)
movable_scales = pytest.mark.parametrize("fmt", MOVABLE, ids=lambda fmt: fmt.label)
DAMP = 1e-3  # of the mean diagonal: the loss that refinement lowers has this much added
EXPERTS, ROWS, WIDTH = 2, 8, 640  # two panels


def weights(width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(EXPERTS, ROWS, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def correlated(width: int = WIDTH, tokens: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(EXPERTS, width // 8, width, generator=generator) / (width / 8) ** 0.5
    inputs = torch.randn(EXPERTS, tokens, width // 8, generator=generator) @ directions
    inputs += 0.5 * torch.randn(EXPERTS, tokens, width, generator=generator)
    inputs[:, :, torch.randperm(width, generator=generator)[: width // 32]] *= 10
    gram: Tensor = inputs.mT @ inputs / tokens
    return gram


def damped(gram: Tensor) -> Tensor:
    """float64, as refinement sees it."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).double()
    return gram.double() + torch.diag_embed((DAMP * mean[:, None]).expand(-1, gram.shape[-1]))


def start(weight: Tensor, gram: Tensor, fmt: Format, how: str) -> tuple[dict[str, Tensor], Tensor]:
    """Parts and codes to begin with: rounded, by GPTQ, or at random."""
    search = "absmax" if how == "absmax" else "mse"
    parts = encode(weight, fmt, search, nvfp4_global_scale(amax(weight), search, fmt), signed=how == "signed")
    if how in ("gptq", "signed"):
        return parts, gptq(weight, gram, Grid.of(parts, fmt), fmt, 0.05).codes
    if how == "random":
        generator = torch.Generator().manual_seed(9)
        return parts, torch.randint(0, 16, weight.shape, dtype=torch.uint8, generator=generator)
    return parts, unpack_nibbles(parts["codes"])


def loss(weight: Tensor, parts: dict[str, Tensor], codes: Tensor, gram: Tensor, fmt: Format) -> Tensor:
    """[E, O] float64."""
    difference = Grid.of(parts, fmt).wide(fmt).decode(codes, fmt).double() - weight.double()
    return ((difference @ gram.double()) * difference).sum(-1)


@every_start
def test_no_round_raises_the_loss_of_any_row(fmt: Format, how: str) -> None:
    """Nor does rounding a scale to what is stored: the old one was storable too, and the new one is nearer the best."""
    weight, gram = weights(), correlated()
    parts, codes = start(weight, gram, fmt, how)
    before = loss(weight, parts, codes, damped(gram), fmt)
    for _ in range(2):
        parts, codes = refine(weight, gram, parts, codes, fmt, 1)
        after = loss(weight, parts, codes, damped(gram), fmt)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


@every_format
def test_it_lowers_what_rounding_and_gptq_leave(fmt: Format) -> None:
    weight, gram = weights(), correlated()
    for how, share in (("absmax", 0.5), ("gptq", 0.99)):
        parts, codes = start(weight, gram, fmt, how)
        better = refine(weight, gram, parts, codes, fmt, 2)
        before, after = (loss(weight, *state, gram, fmt).sum(-1) for state in ((parts, codes), better))
        assert (after < share * before).all()


@every_start
def test_scales_stay_storable(fmt: Format, how: str) -> None:
    """Same dtype and shape, finite, not zero, of the same sign; and nothing but scales changes."""
    weight, gram = weights(), correlated()
    parts, codes = start(weight, gram, fmt, how)
    kept = {name: values.clone() for name, values in parts.items()}
    better, new_codes = refine(weight, gram, parts, codes, fmt, 2)
    assert new_codes.dtype is torch.uint8 and new_codes.shape == codes.shape and int(new_codes.max()) < 16
    assert all(torch.equal(parts[name], kept[name]) for name in kept), "the argument is left alone"
    assert better.keys() == parts.keys()
    for name, values in better.items():
        assert (values.dtype, values.shape) == (parts[name].dtype, parts[name].shape)
        if name != "scale" or fmt not in MOVABLE:
            assert torch.equal(values, parts[name])
    old, new = parts["scale"].float(), better["scale"].float()
    assert torch.isfinite(new).all()
    if fmt in MOVABLE:
        assert torch.equal(new.sign(), old.sign()) and (new != 0).all()
        assert (new != old).any()
    if how == "signed":
        assert (new < 0).any()


@movable_scales
def test_a_scale_that_wants_to_change_its_sign_stays(fmt: Format) -> None:
    weight, gram = weights(), correlated()
    parts, _ = start(weight, gram, fmt, "absmax")
    codes = unpack_nibbles(encode(-weight, fmt, "absmax", nvfp4_global_scale(amax(weight), "absmax", fmt))["codes"])
    better, _ = refine(weight, gram, parts, codes, fmt, 1)
    assert (better["scale"].float() > 0).all()


# --- brute force ------------------------------------------------------------------------------------------------------


def storable_scales(old: Tensor, parts: dict[str, Tensor], fmt: Format) -> Tensor:
    """float64 [N, E, O]: every scale of the sign of `old` that its format has, for int4 between a 16th and 16 times."""
    if fmt.name == "nvfp4":
        stored = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return stored[:, None, None] / parts["global_scale"].double()[None].expand(-1, -1, old.shape[1])
    bits = torch.arange(-4 * 128, 4 * 128 + 1)[:, None, None] + old.to(torch.bfloat16).view(torch.int16).int()
    return bits.to(torch.int16).view(torch.bfloat16).double()


def brute_force(
    weight: Tensor, gram: Tensor, parts: dict[str, Tensor], codes: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    """One round: of each group the scale, then each column's code, is the one of all with the least loss.

    Returns scales [E, O, G], float64, and values [E, O, I].
    """
    hessian, grid = damped(gram), Grid.of(parts, fmt)
    level = Grid(torch.ones_like(weight), None if grid.zero is None else grid.wide(fmt).zero).decode(codes, fmt)
    level, scale, zero, size = level.double(), grid.scale.double().clone(), grid.zero, fmt.group_size
    values = level * scale.repeat_interleave(size, -1)

    def rows(values: Tensor) -> Tensor:
        difference = values - weight.double()
        return ((difference @ hessian) * difference).sum(-1)

    for group in range(scale.shape[-1]):
        own = range(group * size, (group + 1) * size)
        if fmt in MOVABLE:
            choices = storable_scales(grid.scale[:, :, group], parts, fmt)
            tried = values.repeat(len(choices), 1, 1, 1)
            tried[..., own] = level[:, :, own] * choices[..., None]
            best = rows(tried).argmin(0)
            scale[:, :, group] = choices.gather(0, best[None])[0]
            values[:, :, own] = level[:, :, own] * scale[:, :, group, None]
        for column in own:
            place = Grid(scale[:, :, group], None if zero is None else zero[:, :, group])
            choices = torch.stack(
                [place.decode(torch.full(weight.shape[:2], c, dtype=torch.uint8), fmt) for c in range(16)]
            )
            tried = values.repeat(16, 1, 1, 1)
            tried[..., column] = choices
            values[:, :, column] = choices.gather(0, rows(tried).argmin(0)[None])[0]
    return scale, values


@pytest.mark.parametrize(("fmt", "how"), [start for start in STARTS if start[1] != "random"])
def test_one_round_is_what_brute_force_finds(fmt: Format, how: str) -> None:
    width = max(64, fmt.group_size)
    weight, gram = weights(width), correlated(width)
    parts, codes = start(weight, gram, fmt, how)
    scale, values = brute_force(weight, gram, parts, codes, fmt)
    better, codes = refine(weight, gram, parts, codes, fmt, 1)
    grid = Grid.of(better, fmt)
    assert torch.allclose(grid.scale.double(), scale, rtol=1e-6, atol=0)
    assert torch.allclose(grid.wide(fmt).decode(codes, fmt).double(), values, rtol=1e-6, atol=1e-12)


# --- matrices that say nothing ----------------------------------------------------------------------------------------


@every_format
def test_a_bad_gram_matrix_changes_nothing(fmt: Format) -> None:
    """No tokens, NaN, infinity, a negative matrix: those experts stay as they are, the one beside them moves."""
    weight, gram = weights()[:1].repeat(5, 1, 1), correlated()[:1].repeat(5, 1, 1)
    gram[1] = 0
    gram[2, 7, 7] = gram[2, 7, 9] = gram[2, 9, 7] = float("nan")
    gram[3, 7, 7] = gram[3, 7, 9] = gram[3, 9, 7] = float("inf")
    gram[4] *= -1
    parts, codes = start(weight, gram, fmt, "absmax")
    better, new_codes = refine(weight, gram, parts, codes, fmt, 1)
    assert torch.equal(better["scale"][1:].float(), parts["scale"][1:].float())
    grid = Grid.of(parts, fmt).wide(fmt)
    assert torch.equal(grid.decode(new_codes, fmt)[1:], grid.decode(codes, fmt)[1:])
    assert (new_codes[0] != codes[0]).float().mean() > 0.1


def test_a_column_without_inputs_keeps_its_code() -> None:
    fmt, weight, gram = Format("mxfp4", 32), weights(), correlated()
    gram[:, 40], gram[:, :, 40] = 0, 0
    parts, codes = start(weight, gram, fmt, "absmax")
    _, better = refine(weight, gram, parts, codes, fmt, 2)
    assert torch.equal(better[:, :, 40], codes[:, :, 40])
