"""The compiled loop over a tile gives the bytes of its plain statement; on CUDA but for sums between its cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stored_formats import FORMATS
from torch import Tensor

from mimoquant.quant import tiles
from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.tiles import Rows, Tile

every_format = pytest.mark.parametrize("fmt", [*FORMATS, Format("int4", 64)], ids=lambda fmt: fmt.label)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, on_gpu],
        ),
    ],
)
PLACES = [  # rows, columns: a whole tile, one cut short either way, one row, one column
    (slice(64, 128), slice(128, 256)),
    (slice(128, 136), slice(128, 256)),
    (slice(64, 128), slice(224, 256)),
    (slice(7, 8), slice(0, 128)),
    (slice(0, 40), slice(5, 6)),
]
EXPERTS, ROWS, WIDTH = 2, 136, 256


def weights(seed: int = 0) -> Tensor:
    """With a group of zeros, a row of one value, tiny rows and large ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(EXPERTS, ROWS, WIDTH, generator=generator) * 0.02
    weight[0, 70, :128], weight[1, 71], weight[0, 72] = 0.0, 0.25, weight[0, 72] * 1e-30
    weight[0, 73] *= 1e15
    return weight.to(torch.bfloat16)


def stack_of(fmt: Format, device: str) -> Rows:
    weight = weights()
    parts = encode(weight, fmt, "mse", nvfp4_global_scale(amax(weight), "mse", fmt), signed=fmt.symmetric)
    grid, order = Grid.of(parts, fmt), torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))
    laid = weight.float()[:, :, order].contiguous()
    arrays = (
        laid,
        laid + 0.1 * grid.scale.mean(-1, keepdim=True),  # as in a descent: not what is left is counted from
        grid.scale,
        grid.zero,
        (order // fmt.group_size).to(torch.int32).repeat(EXPERTS, 1),
        torch.zeros(weight.shape, dtype=torch.uint8),
    )
    return Rows(*(None if array is None else array.to(device) for array in arrays), fmt=fmt)


def block(size: int, seed: int, device: str) -> Tensor:
    """A metric of outputs or inputs that are correlated, [EXPERTS, size, size]."""
    samples = torch.randn(EXPERTS, 3 * size, size, generator=torch.Generator().manual_seed(seed))
    samples += torch.randn(EXPERTS, 3 * size, 1, generator=torch.Generator().manual_seed(seed + 50))
    return (samples.mT @ samples / (3 * size)).to(device)


def noise(rows: slice, columns: slice, device: str) -> Tensor:
    shape = EXPERTS, rows.stop - rows.start, columns.stop - columns.start
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device)


@every_device
@pytest.mark.parametrize(("rows", "columns"), PLACES)
@every_format
def test_compiled_rounding_gives_the_codes_of_the_plain_one(
    fmt: Format, rows: slice, columns: slice, device: str
) -> None:
    start = stack_of(fmt, device)
    above = noise(rows, columns, device)
    tile = Tile(rows, columns, *(0.2 * block(size, seed, device).triu(1) for seed, size in enumerate(above.shape[1:])))
    made = []
    for loop in (tiles.round_tile, tiles.round_tile_plainly):
        stack = replace(start, codes=start.codes.clone())
        made.append((stack.codes, *loop(stack, tile, start.wanted[:, rows, columns].clone(), above.clone())))
    if device == "cpu":
        assert all(torch.equal(mine, plain) for mine, plain in zip(*made, strict=True))
    else:  # a cell takes what others move it by from a product
        assert_nearly([of[0][:, rows, columns] for of in made])
        assert all(
            torch.equal(mine[:, :16, :16], plain[:, :16, :16])
            for mine, plain in zip(made[0][1:], made[1][1:], strict=True)
        )
    assert (made[0][0] != 0).any()


def assert_nearly(codes: list[Tensor]) -> None:
    """All but the rare one that lies between two codes, and what that moves."""
    assert (codes[0] != codes[1]).float().mean() < 2e-3


@pytest.mark.gpu
@on_gpu
@every_format
def test_waves_of_tiles_give_the_codes_of_the_plain_loops(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same products, whole ones and rough: those of tensor cores add up in another order than a CPU's."""
    from mimoquant.quant.kernels import tiles_cuda

    start = stack_of(fmt, "cuda")
    fall, push = (0.05 * block(size, size, "cuda").triu(1) for size in (ROWS, WIDTH))
    made = []
    for loop in (tiles_cuda.round_wave, tiles.round_wave_plainly):
        monkeypatch.setattr(tiles_cuda, "round_wave", loop)
        for rough in (None, push.to(torch.bfloat16)):
            stack = replace(start, codes=start.codes.clone())
            tiles_cuda.round_all(stack, fall, push, rough)
            made.append(stack.codes)
    assert_nearly(made[::2])
    assert_nearly(made[1::2])
    assert len(made[0].unique()) > 8 and (made[0] != made[1]).float().mean() < 0.01


@pytest.mark.gpu
@on_gpu
def test_what_moves_a_wave_is_the_sum_over_all_rows_above_and_all_columns_before() -> None:
    from mimoquant.quant.kernels import tiles_cuda
    from mimoquant.quant.products import halves

    draw, size = torch.Generator().manual_seed(0), tiles_cuda.TILE_SIDE
    rows, width = 2 * size + 40, 2 * size + 24
    shapes = (rows, width), (rows, rows), (width, width), (rows, width), (rows, width)
    weight, fall, push, left, moved = (torch.randn(2, *shape, generator=draw).cuda() for shape in shapes)
    factors, done = (halves(fall), halves(push)), (halves(left), halves(moved))
    found = tiles_cuda.reach(weight, (0, 2 * size, 3), factors, done)
    for t, top in enumerate(range(0, rows, size)):
        side = 2 * size - top
        now, here = slice(top, min(rows, top + size)), slice(side, min(width, side + size))
        target = weight[:, now, here].double() + moved[:, now, :side].double() @ push[:, :side, here].double()
        above = fall[:, :top, now].double().mT @ left[:, :top, here].double()
        for mine, expected in zip(found, (target, above), strict=True):
            tile = mine[:, t, : expected.shape[1], : expected.shape[2]].double()
            assert (tile - expected).abs().max() < 2e-3  # 2^-16 of terms, some hundred of them
    rough = tiles_cuda.reach(weight, (0, 2 * size, 3), factors, done, roughly=True)
    assert all(0 < (one - whole).abs().max() < 0.5 for one, whole in zip(rough, found, strict=True))
