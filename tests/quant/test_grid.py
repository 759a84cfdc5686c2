"""A grid of given scales against the engine that finds them: the same codes and values, to the bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimoquant.quant.engine_torch import amax, decode, encode, nvfp4_global_scale, unpack_nibbles
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid

FORMATS = [Format("int4", size, symmetric) for size in (32, 64, 128) for symmetric in (True, False)] + [
    Format("mxfp4", 32),
    Format("nvfp4", 16),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weights(seed: int = 0) -> Tensor:
    """bf16 [3, 16, 256] with zero groups, ties, outliers, tiny and one-sided rows."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.02, (3, 16, 256)).astype(np.float32)
    values[rng.random(values.shape) < 0.005] *= 40
    values[:, 1] = 0
    values[:, 2, :128] = 0
    values[:, 3] = rng.integers(-24, 25, (3, 256)) / 4
    values[:, 4] *= 1e-30
    values[:, 5] = np.abs(values[:, 5])
    values[:, 6, ::3] = -0.0
    values[2] *= 7
    return torch.from_numpy(values).to(torch.bfloat16)


def parts_of(weight: Tensor, fmt: Format, search: str) -> dict[str, Tensor]:
    return encode(weight, fmt, search, nvfp4_global_scale(amax(weight), search, fmt))


@pytest.mark.parametrize("search", ["absmax", "mse"])
@every_format
def test_codes_and_values_are_the_engine_s_to_the_bit(fmt: Format, search: str) -> None:
    weight = weights()
    parts = parts_of(weight, fmt, search)
    grid = Grid.of(parts, fmt)
    assert (grid.zero is None) == fmt.symmetric
    wide, codes = grid.wide(fmt), unpack_nibbles(parts["codes"])
    assert torch.equal(wide.encode(weight.float(), fmt), codes)
    assert torch.equal(wide.decode(codes, fmt).view(torch.int32), decode(parts, fmt).view(torch.int32))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_negative_scales_too(group_size: int) -> None:
    fmt, weight = Format("int4", group_size), weights()
    parts = encode(weight, fmt, "mse", signed=True)
    wide, codes = Grid.of(parts, fmt).wide(fmt), unpack_nibbles(parts["codes"])
    assert (wide.scale < 0).any() and (wide.scale > 0).any()
    assert torch.equal(wide.encode(weight.float(), fmt), codes)
    assert torch.equal(wide.decode(codes, fmt), decode(parts, fmt))


@every_format
def test_turned_it_is_the_grid_of_each_group_s_columns(fmt: Format) -> None:
    weight = weights()
    parts = parts_of(weight, fmt, "absmax")
    codes, turned = unpack_nibbles(parts["codes"]), Grid.of(parts, fmt).turned()
    for column in (0, 31, 100, 255):
        group = column // fmt.group_size
        place = Grid(turned.scale[:, group], None if turned.zero is None else turned.zero[:, group])
        assert place.scale.shape == (3, 16)
        assert torch.equal(place.encode(weight[:, :, column].float(), fmt), codes[:, :, column])
        assert torch.equal(place.decode(codes[:, :, column], fmt), decode(parts, fmt)[:, :, column])


@every_format
def test_a_value_on_the_grid_keeps_its_code(fmt: Format) -> None:
    """All 16 codes, whatever the scale: what a second encoding of decoded values relies on."""
    grid = Grid.of(parts_of(weights(), fmt, "absmax"), fmt).wide(fmt)
    for code in range(16):
        codes = torch.full((3, 16, 256), code, dtype=torch.uint8)
        again = grid.encode(grid.decode(codes, fmt), fmt)
        if fmt.name != "int4" and code == 8:
            codes.zero_()  # the negative zero
        assert torch.equal(again, codes)


def levels(fmt: Format, zero: float) -> list[float]:
    if fmt.name == "int4":
        return [q - zero for q in range(-8, 8)]
    return [sign * level for sign, level in itertools.product((1.0, -1.0), E2M1)]


@given(
    fmt=st.sampled_from(FORMATS),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    negative=st.booleans(),
    zero=st.integers(-8, 7),
    levels_in=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50),
)
@settings(deadline=None, max_examples=150)
def test_no_grid_value_is_nearer(fmt: Format, scale: float, negative: bool, zero: int, levels_in: list[float]) -> None:
    signed = -scale if negative and fmt.name == "int4" else scale
    zero_point = None if fmt.symmetric else torch.tensor(float(zero))
    grid = Grid(torch.tensor(signed, dtype=torch.float32), zero_point)
    values = torch.tensor(levels_in, dtype=torch.float32) * grid.scale
    codes = grid.encode(values, fmt)
    assert codes.dtype is torch.uint8 and int(codes.max()) <= 15
    ours = grid.decode(codes, fmt).double()
    offered = torch.tensor(levels(fmt, 0.0 if fmt.symmetric else zero), dtype=torch.float64) * grid.scale.double()
    nearest = (values.double()[:, None] - offered).abs().amin(1)
    # float32 takes a value that is within an ulp of the middle for either neighbour
    assert ((values.double() - ours).abs() <= nearest + scale * 20 * 2.0**-23).all()
    assert torch.isin(ours, offered.float().double()).all()
