"""A chunk's experts on their tokens as three Triton kernels: gate and up, down, and the sum over a token's experts.

Key idea: all experts of a chunk are one launch, whose programs find their expert and their tokens in a list of tiles.
With a product an expert the host could not launch as fast as the GPU computes. Float32 rows are split into bfloat16
parts where they are used, so no part is ever written. Every element's sum runs over the input channels in blocks of
one order, however many tokens there are.

Shapes: N tokens, P (token, expert) pairs sorted by expert, E experts of the chunk, H hidden, I inside an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGE = {9, 10}  # compute capabilities with shared memory for tiles of 128 x 128: 228 KB
_WIDTH = 1024  # of a token's row, that a program sums at once


class _Tile(NamedTuple):
    """Pairs and output channels of a program's tile, input channels at a time, warps, and blocks on their way."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def settings(self) -> dict[str, int]:
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Numbers(NamedTuple):
    """What rows are taken as: the `parts` of bfloat16 that hold them, 3 for any float32. `stored`: gate's and up's
    answers, and an expert's times its gain, are rounded to bfloat16; `silu`: SiLU of gate, and that times up, too."""

    parts: int = 3
    stored: bool = False
    silu: bool = False


_SMALL = _Tile(64, 64, 32, 4, 2)  # fits everywhere
_GATE_UP, _DOWN = _Tile(128, 128, 64, 8, 3), _Tile(128, 128, 32, 8, 4)  # the fastest of six each on an H200


def _is_large(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in _LARGE


def tile_rows(device: torch.device) -> int:
    """How many pairs of an expert are a tile."""
    return (_GATE_UP if _is_large(device) else _SMALL).rows


@triton.jit
def _times(total, rows, matrix_KN, PARTS: tl.constexpr):
    """total + rows times matrix, bfloat16 products exact in float32: of each of the rows' parts, the smallest first."""
    if PARTS == 1:
        return tl.dot(rows.to(tl.bfloat16), matrix_KN, total)
    high = rows.to(tl.bfloat16)
    rest = rows - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    if PARTS == 3:
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, matrix_KN, total)
    total = tl.dot(middle, matrix_KN, total)
    return tl.dot(high, matrix_KN, total)


@triton.jit
def _in_bf16(values):
    """float32 as bfloat16 holds it."""
    return values.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _gate_up(
    tokens,
    places,
    gate,
    up,
    out,
    tiles,
    first,
    width,
    inner,
    PARTS: tl.constexpr,
    STORED: tl.constexpr,
    SILU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [pairs of the chunk, I] = SiLU(tokens gateᵀ) x (tokens upᵀ), rounded once to the dtype of `out`; STORED and
    SILU: see `Numbers`.

    `tiles`: int32 [tiles, 3] of (expert in the chunk, its first pair of the tile, its end). `first`: the chunk's first
    pair.
    """
    column, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    pair = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BM)
    there = pair < tl.load(tiles + 3 * tile + 2)
    token = tl.load(places + pair, mask=there, other=0)
    n, k = column * BN + tl.arange(0, BN), tl.arange(0, BK)
    rows = tokens + token[:, None] * width + k[None, :]
    matrix = expert * inner * width + n[None, :].to(tl.int64) * width + k[:, None]
    opened, lifted = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for begin in range(0, width, BK):
        left = k < width - begin
        x = tl.load(rows + begin, mask=there[:, None] & left[None, :], other=0.0)
        kept = left[:, None] & (n < inner)[None, :]
        opened = _times(opened, x, tl.load(gate + matrix + begin, mask=kept, other=0.0), PARTS)
        lifted = _times(lifted, x, tl.load(up + matrix + begin, mask=kept, other=0.0), PARTS)
    if STORED:
        opened, lifted = _in_bf16(opened), _in_bf16(lifted)
    silu = opened / (1.0 + tl.exp(-opened))
    made = _in_bf16(_in_bf16(silu) * lifted) if SILU else silu * lifted
    target = out + (pair - first)[:, None].to(tl.int64) * inner + n[None, :]
    tl.store(target, made.to(out.dtype.element_ty), mask=there[:, None] & (n < inner)[None, :])


@triton.jit
def _down(
    rows,
    down,
    out,
    tiles,
    first,
    inner,
    width,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [pairs of the chunk, H] = rows [pairs of the chunk, I] times downᵀ, float32."""
    column, tile = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    pair = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BM)
    there = pair < tl.load(tiles + 3 * tile + 2)
    place = (pair - first).to(tl.int64)
    n, k = column * BN + tl.arange(0, BN), tl.arange(0, BK)
    held = rows + place[:, None] * inner + k[None, :]
    matrix = down + expert * width * inner + n[None, :].to(tl.int64) * inner + k[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, inner, BK):
        left = k < inner - begin
        x = tl.load(held + begin, mask=there[:, None] & left[None, :], other=0.0)
        w = tl.load(matrix + begin, mask=left[:, None] & (n < width)[None, :], other=0.0)
        total = _times(total, x, w, PARTS)
    target = out + place[:, None] * width + n[None, :]
    tl.store(target, total, mask=there[:, None] & (n < width)[None, :])


@triton.jit
def _summed(out, values, pairs, gains, first, last, width, STORED: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """out [N, H] += gain times value of each of a token's pairs from `first` to `last`, in the order of the experts.
    `pairs`: int64 [N, K], rising. STORED: see `Numbers`."""
    token = tl.program_id(0).to(tl.int64)
    own, least, most = pairs + token * K, tl.load(pairs + token * K), tl.load(pairs + token * K + K - 1)
    if least < last and most >= first:
        for begin in range(0, width, N):
            j = begin + tl.arange(0, N)
            total = tl.load(out + token * width + j, mask=j < width, other=0.0)
            for slot in tl.static_range(K):
                pair = tl.load(own + slot)
                mine = (pair >= first) & (pair < last)
                gain = tl.load(gains + pair, mask=mine, other=0.0)
                value = tl.load(values + (pair - first) * width + j, mask=mine & (j < width), other=0.0)
                gained = _in_bf16(value * gain) if STORED else value * gain
                total = tl.where(mine, total + gained, total)
            tl.store(out + token * width + j, total, mask=j < width)


def gate_up(
    tokens_NH: Tensor,
    places_P: Tensor,
    gate_up_EIH: tuple[Tensor, Tensor],
    tiles: Tensor,
    span: tuple[int, int],
    numbers: Numbers,
) -> Tensor:
    """[pairs of the chunk, I], in the tokens' dtype (float32 or bfloat16; weights are bfloat16).

    Args:
        places_P: which token a pair has, int64. tiles: see `_gate_up`. span: the chunk's pairs, from and to.
    """
    gate_EIH, up_EIH = gate_up_EIH
    inner, width = gate_EIH.shape[1:]
    tile = _GATE_UP if _is_large(tokens_NH.device) else _SMALL
    out = torch.empty(span[1] - span[0], inner, dtype=tokens_NH.dtype, device=tokens_NH.device)
    _gate_up[(triton.cdiv(inner, tile.columns), len(tiles))](
        tokens_NH.contiguous(),
        places_P,
        gate_EIH.contiguous(),
        up_EIH.contiguous(),
        out,
        tiles,
        span[0],
        width,
        inner,
        PARTS=numbers.parts,
        STORED=numbers.stored,
        SILU=numbers.silu,
        **tile.settings,
    )
    return out


def down(rows_PI: Tensor, down_EHI: Tensor, tiles: Tensor, first: int, numbers: Numbers) -> Tensor:
    """What the experts make of rows [pairs of the chunk, I], float32 [pairs of the chunk, H], before the gains."""
    width, inner = down_EHI.shape[1:]
    tile = _DOWN if _is_large(rows_PI.device) else _SMALL
    out = torch.empty(len(rows_PI), width, dtype=torch.float32, device=rows_PI.device)
    _down[(triton.cdiv(width, tile.columns), len(tiles))](
        rows_PI.contiguous(),
        down_EHI.contiguous(),
        out,
        tiles,
        first,
        inner,
        width,
        PARTS=numbers.parts,
        **tile.settings,
    )
    return out


def add(out_NH: Tensor, values_PH: Tensor, pairs_NK: Tensor, gains_P: Tensor, first: int, numbers: Numbers) -> None:
    """Add the chunk's pairs, from the `first` on, to their tokens (float32), times their gains."""
    _summed[(len(out_NH),)](
        out_NH,
        values_PH,
        pairs_NK,
        gains_P,
        first,
        first + len(values_PH),
        out_NH.shape[1],
        STORED=numbers.stored,
        K=pairs_NK.shape[1],
        N=_WIDTH,
    )
