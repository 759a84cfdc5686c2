"""The compiled loops over columns, and the compiled weighted search, give the bytes of their plain statements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mimoquant.quant import columns
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale, stored_parts, to_numpy
from mimoquant.quant.formats import Format, multipliers
from mimoquant.quant.grid import Grid
from mimoquant.quant.stack import Stack

FORMATS = [
    Format("int4", 32),
    Format("int4", 64),
    Format("int4", 128),
    Format("int4", 64, symmetric=False),
    Format("mxfp4", 32),
    Format("nvfp4", 16),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
])]  # fmt: skip
every_device = pytest.mark.parametrize("device", DEVICES)
SIZES = [(3, 40, 256), (2, 264, 128)]  # experts, rows, width: no multiples of a slab or a tile


def weights(experts: int, rows: int, width: int, device: str, seed: int = 0) -> Tensor:
    """bf16, with a group of zeros, a row of one value, the smallest numbers and large ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, width, generator=generator) * 0.02
    weight[0, 0, :128], weight[-1, 1], weight[0, 2], weight[0, 3] = 0.0, 0.25, weight[0, 2] * 1e-37, weight[0, 3] * 1e30
    return weight.to(torch.bfloat16).to(device)


def block(fmt: Format, size: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor, Grid]:
    """Weights [E, B, O] of the first columns, their Gram matrix [E, B, B] and grid."""
    weight = weights(*size, device)
    parts = encode(weight, fmt, "mse", nvfp4_global_scale(amax(weight), "mse"), signed=fmt.symmetric)
    grid, width = Grid.of(parts, fmt), 128
    turned = Grid(grid.scale.transpose(1, 2), None if grid.zero is None else grid.zero.transpose(1, 2))
    inputs = torch.randn(size[0], 300, width, generator=torch.Generator().manual_seed(1)).to(device)
    inputs[:, :, 5] = 0  # a column that no token used
    groups = slice(0, width // fmt.group_size)
    return weight.float().transpose(1, 2)[:, :width].contiguous(), inputs.mT @ inputs, turned.rows(groups, fmt.group_size)


@every_device
@pytest.mark.parametrize("size", SIZES)
@every_format
def test_compiled_loops_give_the_bytes_of_the_plain_ones(fmt: Format, size: tuple[int, int, int], device: str) -> None:
    weight, gram, grid = block(fmt, size, device)
    push = (gram / 300).triu(1)
    codes, left = columns.round_columns(weight.clone(), weight, push, grid, fmt)
    plain_codes, plain_left = columns.round_columns_plainly(weight.clone(), weight, push, grid, fmt)
    assert torch.equal(codes, plain_codes) and torch.equal(left, plain_left)
    assert (codes != columns.round_columns(weight.clone(), weight, 0 * push, grid, fmt)[0]).any()
    slope = (gram @ left).contiguous()
    states = []
    for improve in (columns.improve_columns, columns.improve_columns_plainly):
        state = slope.clone(), weight - left, codes.clone()
        improve(*state, gram, grid, fmt)
        states.append(state)
    for mine, plain in zip(*states, strict=True):
        assert torch.equal(mine, plain)
    assert (states[0][2] != codes).any()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("every", [1, 5])
@every_format
def test_the_weighted_search_gives_the_bytes_of_the_plain_engine(fmt: Format, every: int, weighted: bool) -> None:
    weight = weights(3, 40, 256, "cpu")
    scale = nvfp4_global_scale(amax(weight), "gram") if fmt.name == "nvfp4" else None
    importance = torch.rand(3, 256, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    expected = encode(weight, fmt, "gram", scale, importance, signed=fmt.symmetric, every=every)
    tried = multipliers(fmt.name, "gram", signed=fmt.symmetric, every=every)
    parts = CpuEngine(2).encode_weighted(
        Stack(to_numpy(weight), None), fmt, tried, None if scale is None else scale.numpy(),
        None if importance is None else np.asarray(importance),
    )  # fmt: skip
    mine = stored_parts(parts, fmt, weight.device)
    assert mine.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(mine[name].view(torch.uint8), values.reshape(mine[name].shape).view(torch.uint8)), name


def test_what_a_search_tries() -> None:
    assert multipliers("int4", "absmax", signed=True) == (1.0,)
    plain, signed = multipliers("int4", "gram"), multipliers("int4", "gram", signed=True)
    assert signed[: len(plain)] == plain and signed[len(plain) :] == tuple(-c for c in plain)
    assert multipliers("nvfp4", "mse", signed=True) == multipliers("nvfp4", "mse")
    assert multipliers("int4", "mse", every=5) == (1.0, *plain[1::5])
