"""`tiles`' loop as Triton kernels, and the sweep of `two_sided` over the whole matrix by waves of tiles.

Key idea: tiles of an anti-diagonal of tiles wait only for those of the anti-diagonals before, so each such wave is one
launch of products from both sides, a program a tile and expert, and then of the roundings. Within a tile the same goes
for its cells of _CELL rows and columns: those of an anti-diagonal are one launch, a warp a cell, which first takes what
the tile's earlier cells move it by, as products of three TF32 (21 bits of a float32), then walks its entries, a row a
lane, an anti-diagonal a step. Within a cell the sequence of float32 operations of every entry is that of the plain
loops, with divisions rounded as IEEE wants them and no fused multiply-add; so the bytes are those of the plain loops
but for the order, and the last bits, of the sums between cells and between tiles.
Entries fetch what moves them instead of being moved: threads read next to each other, rows above by column, columns
before by row (`moved` of a wave lies column by column for that).

Shapes: E experts, T tiles of a wave, M rows and N columns of a tile, O rows and I columns of the matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.kernels.arithmetic_cuda import NO_FUSION, TF32_PARTS
from mimoquant.quant.kernels.columns_cuda import array_or, coded
from mimoquant.quant.products import Halves, halves, zeros
from mimoquant.quant.tiles import Rows, Tile

TILE_SIDE = 128  # rows and columns that are rounded before what is left of them is pushed onto the rest
_CELL, _UNROLL = 32, 8  # rows and columns of a warp; how many of what moves an entry are asked for at once
_DEPTH, _STAGES, _WARPS = 32, 3, 8  # of the products: how far they go at once, how many are on their way, warps


@triton.jit
def _reach(
    first_high,
    first_low,
    second_high,
    second_low,
    wanted,
    out,
    first,
    begin,
    height,
    width,
    IS_ABOVE: tl.constexpr,
    ROUGHLY: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile t of a wave lies t tiles below row `first` and left of column `begin`. What rows above it move it by,
    (down of all rows above)ᵀ · left; or what is wanted and columns before it move that by, moved · along. ROUGHLY: from
    first halves alone.
    """
    t, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, side = first + t * TILE, begin - t * TILE
    i, j, k = top + tl.arange(0, TILE), side + tl.arange(0, TILE), tl.arange(0, DEPTH)
    inside = (i < height)[:, None] & (j < width)[None, :]
    whole = expert * height * width
    if IS_ABOVE:  # down [O, O] read by columns; left [O, I]
        one = expert * height * height + k[None, :] * height + i[:, None]
        one_step, two, until = DEPTH * height, whole + k[:, None] * width + j[None, :], top
    else:  # moved [O, I]; along [I, I]
        one = whole + i[:, None] * width + k[None, :]
        one_step, two, until = DEPTH, expert * width * width + k[:, None] * width + j[None, :], side
    total = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(0, until, DEPTH):
        a_high = tl.load(first_high + one, mask=(i < height)[:, None], other=0.0)
        b_high = tl.load(second_high + two, mask=(j < width)[None, :], other=0.0)
        if not ROUGHLY:
            a_low = tl.load(first_low + one, mask=(i < height)[:, None], other=0.0)
            b_low = tl.load(second_low + two, mask=(j < width)[None, :], other=0.0)
            total = tl.dot(a_low, b_high, total)
            total = tl.dot(a_high, b_low, total)
        total = tl.dot(a_high, b_high, total)
        one += one_step
        two += DEPTH * width
    if not IS_ABOVE:
        total += tl.load(wanted + whole + i[:, None].to(tl.int64) * width + j[None, :], mask=inside, other=0.0)
    place = (expert * tl.num_programs(0) + t) * TILE * TILE
    inner = tl.arange(0, TILE)
    tl.store(out + place + inner[:, None] * TILE + inner[None, :], total)


@triton.jit
def _pulled(total, by_row, by_column, count, stride, CELL: tl.constexpr):
    """total [CELL, CELL] and the sum over k < count of by_row[k, i] times by_column[k, j]."""
    each, some = tl.arange(0, CELL), tl.arange(0, 16)
    for k in tl.range(0, count, 16, num_stages=1):
        near = tl.load(by_row + (k + some)[None, :] * stride + each[:, None])
        far = tl.load(by_column + (k + some)[:, None] * stride + each[None, :])
        total = tl.dot(near, far, total, input_precision=TF32_PARTS)
    return total


@triton.jit
def _and_one(total, by_row, by_column, k, stride, i, j, there):
    """total and by_row[k, i] times by_column[k, j]."""
    near = tl.load(by_row + k * stride + i, mask=there, other=0.0)
    return total + near * tl.load(by_column + k * stride + j, mask=there, other=0.0)


@triton.jit
def _keep_halves(rest, high, low, place, there):
    """The two halves of `products.halves`."""
    top = rest.to(tl.bfloat16)
    tl.store(high + place, top, mask=there)
    tl.store(low + place, (rest - top.to(tl.float32)).to(tl.bfloat16), mask=there)


# numbers of which each would make another kernel when it is 1 or a multiple of 16
_PLAIN_NUMBERS = ("tiles", "blocks_down", "blocks_along", "cells", "diagonal")


@triton.jit(do_not_specialize=_PLAIN_NUMBERS)
def _round_cells(
    target,
    above,
    weight,
    scale,
    zero,
    group,
    down,
    along,
    codes,
    left,
    moved,
    left_high,
    left_low,
    moved_high,
    moved_low,
    first,
    begin,
    tiles,
    blocks_down,
    blocks_along,
    end_row,
    end_column,
    height,
    width,
    groups,
    cells,
    diagonal,
    IS_INT4: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    CELL: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The cells of one anti-diagonal of every tile of a wave; `cells` of them a tile. `down`, `along`: blocks on the
    matrices' diagonals, [E, blocks, TILE, TILE]. KEEP: write the halves of what is left and moved, too.
    """
    t, u, expert = tl.program_id(0) // cells, tl.program_id(0) % cells, tl.program_id(1).to(tl.int64)
    r = tl.maximum(0, diagonal - (TILE // CELL - 1)) + u
    row, column = r * CELL, (diagonal - r) * CELL  # of the cell in its tile
    top, side, lane = first + t * TILE, begin - t * TILE, tl.arange(0, CELL)
    tile = (expert * tiles + t) * TILE * TILE
    down += (expert * blocks_down + top // TILE % blocks_down) * TILE * TILE + row
    along += (expert * blocks_along + side // TILE % blocks_along) * TILE * TILE + column
    over_left, over_moved = left + tile + column, moved + tile + row
    square = tile + (row + lane)[:, None] * TILE + column + lane[None, :]
    tl.store(above + square, _pulled(tl.load(above + square), down, over_left, row, TILE, CELL))
    tl.store(target + square, _pulled(tl.load(target + square), over_moved, along, column, TILE, CELL))
    tl.debug_barrier()  # a lane reads other entries than it wrote
    of_row = expert * height + top + row + lane
    down, over_left = down + row * TILE, over_left + row * TILE
    along, over_moved = along + column * TILE, over_moved + column * TILE
    for step in range(0, 2 * CELL - 1):
        j = step - lane
        there = (j >= 0) & (j < CELL) & (top + row + lane < end_row) & (side + column + j < end_column)
        at = tile + (row + lane) * TILE + column + j
        over, wanted = tl.load(above + at, mask=there, other=0.0), tl.load(target + at, mask=there, other=0.0)
        place = of_row * width + side + column + j
        g = tl.load(group + expert * width + side + column + j, mask=there, other=0)
        s = tl.load(scale + of_row * groups + g, mask=there, other=1.0)
        z = tl.load(zero + of_row * groups + g, mask=there, other=0.0) if HAS_ZERO else tl.zeros_like(s)
        w = tl.load(weight + place, mask=there, other=0.0)
        for some in range(0, tl.minimum(step, CELL), UNROLL):
            for k in tl.static_range(UNROLL):
                over = _and_one(over, down, over_left, some + k, TILE, lane, j, there & (some + k < lane))
                wanted = _and_one(wanted, over_moved, along, some + k, TILE, lane, j, there & (some + k < j))
        code, value = coded(wanted + over, s, z, IS_INT4)
        rest = w - value
        tl.store(codes + place, code, mask=there)
        tl.store(left + at, rest, mask=there)
        tl.store(moved + tile + (column + j) * TILE + row + lane, rest + over, mask=there)
        tl.debug_barrier()  # the next anti-diagonal reads what was left of this one
    if KEEP:
        inside = (top + row + lane < end_row)[:, None] & (side + column + lane < end_column)[None, :]
        place = of_row[:, None] * width + side + column + lane[None, :]
        _keep_halves(tl.load(left + square, mask=inside, other=0.0), left_high, left_low, place, inside)
        turned = tile + (column + lane)[None, :] * TILE + (row + lane)[:, None]
        _keep_halves(tl.load(moved + turned, mask=inside, other=0.0), moved_high, moved_low, place, inside)


def round_all(stack: Rows, fall: Tensor, push: Tensor, rough_push: Tensor | None) -> None:
    """Fill the codes of a whole stack, by waves of tiles: see `two_sided.sweep`."""
    experts, rows, width = stack.weight.shape
    blocks = _diagonal_blocks(fall), _diagonal_blocks(push)
    down, along = halves(fall), halves(push) if rough_push is None else (rough_push, rough_push)
    left, moved = (zeros(experts, rows, width, stack.weight) for _ in range(2))
    bands, columns = (triton.cdiv(size, TILE_SIDE) for size in (rows, width))
    for wave in range(bands + columns - 1):
        top = max(0, wave - columns + 1)
        place = top * TILE_SIDE, (wave - top) * TILE_SIDE, min(bands, wave + 1) - top
        target, above = reach(stack.wanted, place, (down, along), (left, moved), rough_push is not None)
        round_wave(stack, place, blocks, (target, above), (left, moved))


def reach(
    wanted: Tensor,
    place: tuple[int, int, int],
    factors: tuple[Halves, Halves],
    done: tuple[Halves, Halves],
    roughly: bool = False,
) -> tuple[Tensor, Tensor]:
    """(target, above) of a wave's tiles, float32 [E, T, M, N]: see `tiles.round_tile`.

    Args:
        place: the first tile's row and column, and how many there are; each is one tile below and left of the last.
    """
    (down, along), (left, moved) = factors, done
    experts, rows, width = wanted.shape
    first, begin, count = place
    target, above = (wanted.new_empty(experts, count, TILE_SIDE, TILE_SIDE) for _ in range(2))
    for is_above, one, two, out in ((True, down, left, above), (False, moved, along, target)):
        _reach[(count, experts)](
            *one,
            *two,
            wanted,
            out,
            first,
            begin,
            rows,
            width,
            IS_ABOVE=is_above,
            ROUGHLY=roughly,
            TILE=TILE_SIDE,
            DEPTH=_DEPTH,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return target, above


def round_wave(
    stack: Rows,
    place: tuple[int, int, int],
    blocks: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    kept: tuple[Halves, Halves],
) -> None:
    """Round a wave's tiles. Fills codes and the halves of what is left and moved; overwrites `wanted`."""
    made = wanted[0].new_empty(wanted[0].shape), wanted[0].new_empty(wanted[0].shape)
    _round(stack, place, stack.weight.shape[1:], (*wanted, *blocks), (*made, *kept[0], *kept[1]))


def round_tile(stack: Rows, tile: Tile, target: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """See `tiles.round_tile`."""
    experts, rows, columns = target.shape
    square = experts, 1, TILE_SIDE, TILE_SIDE
    given = [target.new_zeros(square) for _ in range(4)]
    for whole, some in zip(given, (target, above, tile.down, tile.along), strict=True):
        whole[:, 0, : some.shape[1], : some.shape[2]] = some
    left, moved = target.new_empty(square), target.new_empty(square)
    ends = torch.Size((tile.rows.stop, tile.columns.stop))
    _round(stack, (tile.rows.start, tile.columns.start, 1), ends, tuple(given), (left, moved))
    return left[:, 0, :rows, :columns], moved[:, 0, :columns, :rows].mT


def _round(
    stack: Rows, place: tuple[int, int, int], ends: torch.Size, given: tuple[Tensor, ...], made: tuple[Tensor, ...]
) -> None:
    """Launch the cells of a wave. `given`: target, above, and the blocks; `made`: left, moved, and their halves."""
    (target, above, down, along), (experts, rows, width) = given, stack.weight.shape
    keeps = len(made) > 2
    made = made if keeps else (*made, *(target,) * 4)
    arrays = (
        stack.weight,
        stack.scale,
        array_or(stack.zero, stack.scale),
        stack.group,
        down,
        along,
        stack.codes,
        *made,
    )
    if not all(array.is_contiguous() for array in (target, above, *arrays)):
        raise ValueError("a tile kernel wants contiguous arrays")
    side = TILE_SIDE // _CELL
    for diagonal in range(2 * side - 1):
        cells = side - abs(diagonal - side + 1)
        _round_cells[(place[2] * cells, experts)](
            target,
            above,
            *arrays,
            *place,
            down.shape[1],
            along.shape[1],
            *ends,
            rows,
            width,
            stack.scale.shape[2],
            cells,
            diagonal,
            IS_INT4=stack.fmt.name == "int4",
            HAS_ZERO=stack.zero is not None,
            KEEP=keeps,
            TILE=TILE_SIDE,
            CELL=_CELL,
            UNROLL=_UNROLL,
            num_warps=1,
            **NO_FUSION,
        )


def _diagonal_blocks(matrix: Tensor) -> Tensor:
    """[E, n, n] → the blocks on the diagonal, zeros where the last is cut short: [E, n / tile, tile, tile]."""
    size = matrix.shape[-1]
    if size % TILE_SIDE == 0:  # in one pass
        apart = matrix.view(len(matrix), size // TILE_SIDE, TILE_SIDE, size // TILE_SIDE, TILE_SIDE)
        return apart.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    blocks = matrix.new_zeros(len(matrix), triton.cdiv(size, TILE_SIDE), TILE_SIDE, TILE_SIDE)
    for b in range(blocks.shape[1]):
        own = slice(b * TILE_SIDE, min(size, (b + 1) * TILE_SIDE))
        blocks[:, b, : own.stop - own.start, : own.stop - own.start] = matrix[:, own, own]
    return blocks
