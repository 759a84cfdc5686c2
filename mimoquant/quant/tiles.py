"""The inner loop under a two-sided loss, over a tile of rows and columns.

Key idea: an entry waits for those above it and those before it, so all entries of an anti-diagonal are ready at once: m
rows and n columns take m + n - 1 steps. The loop stands here in plain torch, which says what it does; compiled ones of
equal bytes (on CUDA but for sums between cells of a tile, which are products there) run in its place:
`kernels.tiles_cpu` on a CPU, `kernels.tiles_cuda` on CUDA where Triton is. Products and sums are separate float32
operations everywhere else, and an entry's sums begin with what stood there and go up in rows and in columns.

Shapes: E experts, O rows of the weight, I columns, M and N those of a tile, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels.triton_modules import triton_kernels
from mimoquant.quant.products import Halves, put


@dataclass(frozen=True)
class Rows:
    """A stack of weights on its way to codes, rows and columns in the order in which they are rounded; contiguous.

    weight: float32 [E, O, I], what is left of an entry is counted from. wanted: float32 [E, O, I], what an entry is
    rounded to while nothing is left of others: the weight itself, or in the descent what is best beside them. scale,
    zero: float32 [E, O, G], of rows in that order and groups as stored. group: int32 [E, I], the group of a column.
    codes: uint8 [E, O, I].
    """

    weight: Tensor
    wanted: Tensor
    scale: Tensor
    zero: Tensor | None
    group: Tensor
    codes: Tensor
    fmt: Format


@dataclass(frozen=True)
class Tile:
    """Where a tile is, and the blocks of both matrices on its diagonal, float32.

    down: [E, M, M], in row i how far what is left of row i moves each later one. along: [E, N, N], the same of columns.
    Both are strictly upper triangular.
    """

    rows: slice
    columns: slice
    down: Tensor
    along: Tensor


def round_tile(stack: Rows, tile: Tile, target_EMN: Tensor, above_EMN: Tensor) -> tuple[Tensor, Tensor]:
    """Round entries to the codes nearest to target + above. Fills codes; overwrites both arguments.

    Args:
        target_EMN: what is wanted, moved by the columns before the tile; in the tile each entry moves those after it in
            its row by along times what it is `moved`.
        above_EMN: how far the rows above the tile move an entry; in the tile each entry moves those below it by down
            times what is `left` of it.
    Returns left = weight - value and moved = left + above, float32 [E, M, N] each.
    """
    kernels = _kernels(target_EMN.device.type)
    both: tuple[Tensor, Tensor] = (kernels.round_tile if kernels else round_tile_plainly)(
        stack, tile, target_EMN, above_EMN
    )
    return both


def by_waves(device: torch.device) -> Callable[[Rows, Tensor, Tensor, Tensor | None], None] | None:
    """What fills a whole stack's codes in waves of tiles: see `two_sided.sweep`."""
    kernels = _kernels(device.type)
    waves: Callable[[Rows, Tensor, Tensor, Tensor | None], None] | None = getattr(kernels, "round_all", None)
    return waves


@cache
def _kernels(device: str) -> Any:
    """The module with compiled loops for a kind of device, or None."""
    if device == "cpu":
        from mimoquant.quant.kernels import tiles_cpu

        return tiles_cpu
    return triton_kernels("tiles_cuda")


def _diagonals(stack: Rows, tile: Tile) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Grid]]:
    """The anti-diagonals of a tile, first to last: their places in the tile and in the stack, and their grid."""
    rows, columns = (side.stop - side.start for side in (tile.rows, tile.columns))
    device = stack.weight.device
    every = torch.arange(len(stack.weight), device=device)[:, None]
    for step in range(rows + columns - 1):
        i = torch.arange(max(0, step - columns + 1), min(rows, step + 1), device=device)
        j = step - i
        row, column = tile.rows.start + i, tile.columns.start + j
        group = stack.group[:, column].long()
        zero = None if stack.zero is None else stack.zero[every, row, group]
        yield i, j, row, column, Grid(stack.scale[every, row, group], zero)


def round_tile_plainly(stack: Rows, tile: Tile, target: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """See `round_tile`."""
    left, moved = torch.empty_like(target), torch.empty_like(target)
    for i, j, row, column, place in _diagonals(stack, tile):
        code = place.encode(target[:, i, j] + above[:, i, j], stack.fmt)
        rest = stack.weight[:, row, column] - place.decode(code, stack.fmt)
        stack.codes[:, row, column], left[:, i, j], moved[:, i, j] = code, rest, rest + above[:, i, j]
        above[:, :, j] += tile.down[:, i].mT * left[:, None, i, j]
        target[:, i] += tile.along[:, j] * moved[:, i, j, None]
    return left, moved


def round_wave_plainly(
    stack: Rows,
    place: tuple[int, int, int],
    blocks: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    kept: tuple[Halves, Halves],
) -> None:
    """What `kernels.tiles_cuda.round_wave` does: tile after tile of an anti-diagonal of tiles, each as `round_tile`.

    Args:
        place: the first tile's row and column, and how many there are; each is one tile below and left of the last.
        blocks: those on the diagonals of both factors, [E, blocks, M, M] and [E, blocks, N, N].
        wanted: target and above, [E, T, M, N]. kept: left and moved of the whole matrix, filled.
    """
    size, (height, width) = wanted[0].shape[-1], stack.weight.shape[1:]
    for t in range(place[2]):
        top, side = place[0] + t * size, place[1] - t * size
        rows, columns = slice(top, min(height, top + size)), slice(side, min(width, side + size))
        m, n = rows.stop - rows.start, columns.stop - columns.start
        tile = Tile(rows, columns, blocks[0][:, top // size, :m, :m], blocks[1][:, side // size, :n, :n])
        target, above = (of[:, t, :m, :n].clone() for of in wanted)
        for whole, some in zip(kept, round_tile_plainly(stack, tile, target, above), strict=True):
            put(whole, rows, some, columns)
