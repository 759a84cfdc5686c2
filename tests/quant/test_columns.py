"""The compiled loops over columns, and the compiled weighted search, give the bytes of their plain statements; on CUDA
loops over columns do but for what strips of them move each other by, which are products there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import stored_formats
import torch
from torch import Tensor

from mimoquant.quant import columns
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale, stored_parts, to_numpy
from mimoquant.quant.formats import Format, multipliers
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.products import first_half
from mimoquant.quant.stack import Stack

FORMATS = [*stored_formats.FORMATS, Format("int4", 64)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
        ],
    ),
]
every_device = pytest.mark.parametrize("device", DEVICES)
SIZES = [(3, 40, 256), (2, 264, 128)]  # experts, rows, width: no multiples of a slab or a tile


def weights(experts: int, rows: int, width: int, device: str, seed: int = 0) -> Tensor:
    """bf16, with a group of zeros, a row of one value, the smallest numbers and large ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, width, generator=generator) * 0.02
    weight[0, 0, :128], weight[-1, 1], weight[0, 2], weight[0, 3] = 0.0, 0.25, weight[0, 2] * 1e-37, weight[0, 3] * 1e30
    return weight.to(torch.bfloat16).to(device)


def stack_of(fmt: Format, size: tuple[int, int, int], device: str, matrix: Tensor) -> Columns:
    """Weights with searched scales, nothing rounded yet."""
    weight = weights(*size, device)
    parts = encode(weight, fmt, "mse", nvfp4_global_scale(amax(weight), "mse", fmt), signed=fmt.symmetric)
    grid, turned = Grid.of(parts, fmt).turned(), weight.float().transpose(1, 2).contiguous()
    divisor = parts["global_scale"].flatten() if fmt.name == "nvfp4" else None
    codes = torch.zeros(turned.shape, dtype=torch.uint8, device=device)
    return Columns(turned, matrix, grid.scale, grid.zero, codes, first_half(torch.zeros_like(turned)), fmt, divisor)


def copy(stack: Columns) -> Columns:
    left = tuple(half.clone() for half in stack.left)
    return replace(stack, scale=stack.scale.clone(), codes=stack.codes.clone(), left=left)


def gram_of(size: tuple[int, int, int], device: str) -> Tensor:
    inputs = torch.randn(size[0], 300, size[2], generator=torch.Generator().manual_seed(1)).to(device)
    inputs[:, :, 5] = 0  # a column that no token used
    return inputs.mT @ inputs


def reach_of(stack: Columns, gram: Tensor, now: slice) -> Tensor:
    unit, size = columns.units(stack.codes[:, now], stack.fmt), stack.fmt.group_size
    groups = [slice(begin, begin + size) for begin in range(0, now.stop - now.start, size)]
    return torch.stack([gram[:, now, now][:, :, own] @ unit[:, own] for own in groups], dim=1)


def same(one: Columns, other: Columns) -> bool:
    if one.codes.is_cuda:  # all but the rare one that lies between two codes, and what that moves
        apart = [(mine != plain).float().mean() for mine, plain in ((one.codes, other.codes), (one.scale, other.scale))]
        return float(max(apart)) < 2e-3 and first_columns_are_same(one, other)
    pairs = [(one.codes, other.codes), (one.scale, other.scale), *zip(one.left, other.left, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def first_columns_are_same(one: Columns, other: Columns) -> bool:
    first = slice(one.codes.shape[1] - 128, one.codes.shape[1] - 120)
    return all(
        torch.equal(mine[:, first], plain[:, first])
        for mine, plain in ((one.codes, other.codes), (one.left[0], other.left[0]))
    )


@every_device
@pytest.mark.parametrize("size", SIZES)
@every_format
def test_compiled_loops_give_the_bytes_of_the_plain_ones(fmt: Format, size: tuple[int, int, int], device: str) -> None:
    """GPTQ's loop, then the refinement's on what it left, over the last block of the columns."""
    gram, now = gram_of(size, device), slice(size[2] - 128, size[2])
    start = stack_of(fmt, size, device, (gram / 300).triu(1).contiguous())
    order = torch.stack([torch.randperm(size[2], generator=torch.Generator().manual_seed(e)) for e in range(size[0])])
    groups = (order // fmt.group_size).to(torch.int32).to(device)
    mine, plain, alone = copy(start), copy(start), replace(copy(start), matrix=0 * start.matrix)
    for stack, loop in (
        (mine, columns.round_columns),
        (plain, columns.round_columns_plainly),
        (alone, columns.round_columns),
    ):
        loop(stack, now, stack.weight[:, now].clone(), groups)
    assert same(mine, plain) and (mine.codes != alone.codes).any()

    natural = torch.arange(size[2], dtype=torch.int32, device=device).expand(size[0], -1) // fmt.group_size
    columns.round_columns(start, now, start.weight[:, now].clone(), natural.contiguous())
    start = replace(start, matrix=gram)
    slope = (gram[:, now, now] @ start.left[0].float()[:, now]).contiguous()
    for scales in (False, True) if fmt.symmetric and fmt.name != "mxfp4" else (False,):
        mine, plain, reach = copy(start), copy(start), reach_of(start, gram, now) if scales else None
        change = columns.improve_columns(mine, now, slope.clone(), reach)
        expected = columns.improve_columns_plainly(plain, now, slope.clone(), reach)
        assert same(mine, plain)
        assert all(
            (one != other).float().mean() < (0.01 if one.is_cuda else 1e-9)
            for one, other in zip(change, expected, strict=True)
        )
        assert (mine.codes != start.codes).any() and bool((mine.scale != start.scale).any()) == scales


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("every", [1, 5])
@every_format
def test_the_weighted_search_gives_the_bytes_of_the_plain_engine(fmt: Format, every: int, weighted: bool) -> None:
    weight = weights(3, 40, 256, "cpu")
    scale = nvfp4_global_scale(amax(weight), "gram", fmt) if fmt.name == "nvfp4" else None
    importance = torch.rand(3, 256, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    expected = encode(weight, fmt, "gram", scale, importance, signed=fmt.symmetric, every=every)
    tried = multipliers(fmt.name, "gram", signed=fmt.symmetric, every=every)
    parts = CpuEngine(2).encode_weighted(
        Stack(to_numpy(weight), None),
        fmt,
        tried,
        None if scale is None else scale.numpy(),
        None if importance is None else np.asarray(importance),
    )
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
