"""Passes over whole stacks of matrices as Triton kernels: each reads and writes a matrix once, where a tensor library
would do so for every operation.

Key idea: the sequence of float32 operations of every element is that of the plain statements, with divisions rounded as
IEEE wants them and no fused multiply-add, so the bytes are the same. A program takes a row of a matrix.
Shapes: E experts, O rows, I columns, n of a square matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.kernels.arithmetic_cuda import (
    FP8_UNIT,
    NO_FUSION,
    e2m1_value,
    e4m3_value,
    from_bits,
    round_bf16,
)

_COLUMNS = 1024  # of a row, that a program takes at once
_TILE = 64  # rows and columns, where a matrix is turned


@triton.jit
def _laid(source, rows, columns, out, height, width, TURNS: tl.constexpr, N: tl.constexpr):
    """`rows`, `columns`: int64 [E, O] and [E, I]. TURNS: columns have an order of their own."""
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source += (expert * height + tl.load(rows + expert * height + row)) * width
    out += (expert * height + row) * width
    for first in range(0, width, N):
        j = first + tl.arange(0, N)
        there = j < width
        place = tl.load(columns + expert * width + j, mask=there, other=0) if TURNS else j
        tl.store(out + j, tl.load(source + place, mask=there), mask=there)


def laid(matrix_EOI: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    """See `order.laid`; without `columns`, `order.reordered`."""
    experts, height, width = matrix_EOI.shape
    out = torch.empty(matrix_EOI.shape, dtype=matrix_EOI.dtype, device=matrix_EOI.device)
    _laid[(height, experts)](
        matrix_EOI.contiguous(),
        rows.contiguous(),
        (rows if columns is None else columns).contiguous(),
        out,
        height,
        width,
        TURNS=columns is not None,
        N=_COLUMNS,
    )
    return out


@triton.jit
def _split(source, high, low, size, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    x = tl.load(source + at, mask=at < size, other=0.0)
    top = x.to(tl.bfloat16)
    tl.store(high + at, top, mask=at < size)
    tl.store(low + at, (x - top.to(tl.float32)).to(tl.bfloat16), mask=at < size)


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """See `products.halves`."""
    matrix = matrix.contiguous()
    high, low = (torch.empty(matrix.shape, dtype=torch.bfloat16, device=matrix.device) for _ in range(2))
    _split[(triton.cdiv(matrix.numel(), _COLUMNS),)](matrix, high, low, matrix.numel(), N=_COLUMNS, **NO_FUSION)
    return high, low


@triton.jit
def _exact(source, left, right, width, apart, step, N: tl.constexpr):
    """`apart`, `step`: from one matrix of the source to the next, and from one row."""
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source += expert * apart + row * step
    place = (expert * tl.num_programs(0) + row) * 6 * width
    for first in range(0, width, N):
        j = first + tl.arange(0, N)
        there = j < width
        x = tl.load(source + j, mask=there, other=0.0)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        for k in tl.static_range(6):
            one = low if k == 0 else (middle if k == 2 or k == 3 else high)
            other = low if k == 1 else (middle if k == 2 or k == 4 else high)
            tl.store(left + place + k * width + j, one, mask=there)
            tl.store(right + place + k * width + j, other, mask=there)


def exact(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """See `products.exact_parts`; of a part of a stack, too."""
    experts, rows, width = matrix.shape
    matrix = matrix if matrix.stride(2) == 1 else matrix.contiguous()
    left, right = (matrix.new_empty(experts, rows, 6 * width, dtype=torch.bfloat16) for _ in range(2))
    _exact[(rows, experts)](matrix, left, right, width, matrix.stride(0), matrix.stride(1), N=_COLUMNS, **NO_FUSION)
    return left, right


@triton.jit
def _mixed(own, toward, out, count, keep, share, width, toward_each, N: tl.constexpr):
    """`toward_each`: from one expert's target to the next one's, 0 where they share it."""
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = (expert * width + row) * width
    by = tl.load(count + expert)
    kept, shared = tl.load(keep + expert), tl.load(share + expert)
    for first in range(0, width, N):
        j = first + tl.arange(0, N)
        there = j < width
        mine = tl.load(own + place + j, mask=there, other=0.0)
        mean = tl.div_rn(mine, tl.zeros_like(mine) + by)
        target = tl.load(toward + expert * toward_each + row * width + j, mask=there, other=0.0)
        tl.store(out + place + j, kept * mean + shared * target, mask=there)


def mixed(sums_Enn: Tensor, count_E: Tensor, toward: Tensor, keep_E: Tensor, share_E: Tensor) -> Tensor:
    """keep · (sums / count) + share · toward, of square matrices; `toward` is [n, n] or one an expert, all float32."""
    experts, width, _ = sums_Enn.shape
    out = torch.empty_like(sums_Enn)
    _mixed[(width, experts)](
        sums_Enn,
        toward.contiguous(),
        out,
        count_E,
        keep_E,
        share_E,
        width,
        0 if toward.ndim == 2 else width * width,
        N=_COLUMNS,
        **NO_FUSION,
    )
    return out


@triton.jit
def _add_rows(out, rows, values, gains, width, N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    into, gain = out + tl.load(rows + i) * width, tl.load(gains + i)
    for first in range(0, width, N):
        j = first + tl.arange(0, N)
        there = j < width
        value = tl.load(values + i * width + j, mask=there, other=0.0) * gain
        tl.store(into + j, tl.load(into + j, mask=there, other=0.0) + value, mask=there)


def add_rows(out: Tensor, rows: Tensor, values: Tensor, gains: Tensor) -> None:
    """out[rows] += values · gains, float32 [n, H], for the first rows of `values` and `gains`. No row comes twice."""
    _add_rows[(len(rows),)](out, rows, values, gains, out.shape[1], N=_COLUMNS, **NO_FUSION)


@triton.jit
def _turned(source, out, height, width, PACKS: tl.constexpr, T: tl.constexpr):
    """PACKS: two rows of codes become a column of bytes."""
    i, j = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * T + tl.arange(0, T)
    expert, high = tl.program_id(2).to(tl.int64), height // 2 if PACKS else height
    source, there = source + expert * height * width, (i < high)[:, None] & (j < width)[None, :]
    if PACKS:
        even = tl.load(source + 2 * i[:, None] * width + j[None, :], mask=there, other=0)
        odd = tl.load(source + (2 * i[:, None] + 1) * width + j[None, :], mask=there, other=0)
        values = even | (odd << 4)
    else:
        values = tl.load(source + i[:, None] * width + j[None, :], mask=there)
    tl.store(out + expert * high * width + j[None, :] * high + i[:, None], values, mask=there)


def turned(matrix_EOI: Tensor) -> Tensor:
    """[E, I, O], contiguous, of a contiguous stack."""
    experts, height, width = matrix_EOI.shape
    out = torch.empty(experts, width, height, dtype=matrix_EOI.dtype, device=matrix_EOI.device)
    grid = triton.cdiv(height, _TILE), triton.cdiv(width, _TILE), experts
    _turned[grid](matrix_EOI.contiguous(), out, height, width, PACKS=False, T=_TILE)
    return out


def packed(codes_EIO: Tensor) -> Tensor:
    """`engine_torch.pack_nibbles` of codes that lie column by column: uint8 [E, O, I / 2]."""
    experts, height, width = codes_EIO.shape
    out = torch.empty(experts, width, height // 2, dtype=torch.uint8, device=codes_EIO.device)
    grid = triton.cdiv(height // 2, _TILE), triton.cdiv(width, _TILE), experts
    _turned[grid](codes_EIO.contiguous(), out, height, width, PACKS=True, T=_TILE)
    return out


@triton.jit
def _decoded(codes, scales, divisors, out, height, width, groups, KIND: tl.constexpr, S: tl.constexpr, N: tl.constexpr):
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = expert * height + row
    for first in range(0, width, N):
        j = first + tl.arange(0, N)
        there = j < width
        pair = tl.load(codes + place * (width // 2) + j // 2, mask=there, other=0).to(tl.int32)
        code = (pair >> (4 * (j % 2))) & 15
        stored = tl.load(scales + place * groups + j // S, mask=there, other=0)
        if KIND == 0:
            scale, level = stored.to(tl.float32), code.to(tl.float32) - 8.0
        elif KIND == 1:
            scale, level = from_bits(tl.where(stored == 0, 1 << 22, stored.to(tl.int32) << 23)), e2m1_value(code)
        else:
            held = e4m3_value(stored.to(tl.int32))
            scale, level = tl.div_rn(held, tl.zeros_like(held) + tl.load(divisors + expert)), e2m1_value(code)
        tl.store(out + place * width + j, (level * scale).to(tl.bfloat16), mask=there)


def decoded(parts: dict[str, Tensor], fmt: Format) -> Tensor:
    """`engine_torch.decode` of our own symmetric parts, as bfloat16."""
    codes, scale = parts["codes"].contiguous(), parts["scale"].contiguous()
    experts, height, width = codes.shape[0], codes.shape[1], 2 * codes.shape[2]
    out = torch.empty(experts, height, width, dtype=torch.bfloat16, device=codes.device)
    _decoded[(height, experts)](
        codes,
        scale if fmt.name == "int4" else scale.view(torch.uint8),
        parts["global_scale"].contiguous() if fmt.name == "nvfp4" else codes,
        out,
        height,
        width,
        scale.shape[2],
        KIND={"int4": 0, "mxfp4": 1, "nvfp4": 2}[fmt.name],
        S=fmt.group_size,
        N=_COLUMNS,
        **NO_FUSION,
    )
    return out


@triton.jit
def _units(codes, out, size, apart, IS_INT4: tl.constexpr, N: tl.constexpr):
    at, expert = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1).to(tl.int64)
    code = tl.load(codes + expert * apart + at, mask=at < size, other=0).to(tl.int32)
    level = code.to(tl.float32) - 8.0 if IS_INT4 else e2m1_value(code)
    tl.store(out + expert * size + at, level.to(tl.bfloat16), mask=at < size)


def units(codes_EBO: Tensor, is_int4: bool) -> Tensor:
    """`columns.units` as bfloat16, of some columns of a stack."""
    codes_EBO = codes_EBO if codes_EBO[0].is_contiguous() else codes_EBO.contiguous()
    out = torch.empty(codes_EBO.shape, dtype=torch.bfloat16, device=codes_EBO.device)
    size = out[0].numel()
    _units[(triton.cdiv(size, _COLUMNS), len(out))](
        codes_EBO, out, size, codes_EBO.stride(0), IS_INT4=is_int4, N=_COLUMNS
    )
    return out


@triton.jit
def _dequantize(values, block_scales, out, size, rows, width, scale_rows, scale_columns, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    there = at < size
    held = tl.load(values + at, mask=there, other=0).to(tl.uint32)
    expert, row, column = at // (rows * width), at // width % rows, at % width
    place = (expert * scale_rows + row // 128) * scale_columns + column // 128
    unit = tl.load(block_scales + place, mask=there, other=1.0)
    x = from_bits(((held & 0x7F) << 20) | ((held & 0x80) << 24)) * FP8_UNIT * unit
    bits = tl.where((held & 0x7F) == 0x7F, 0x7FC00000, round_bf16(x))  # a NaN stays one
    bits = tl.where(tl.abs(unit) < float("inf"), bits, 0x7FC00000)
    tl.store(out + at, (bits >> 16).to(tl.uint16), mask=there)


def dequantize(values: Tensor, block_scales: Tensor) -> Tensor:
    """FP8 bits, uint8 [E, O, I], with scales of 128 x 128 blocks, float32 [E, R, C], as bfloat16; what is not finite
    comes as NaN. The values are those of `engine_torch.dequantize_fp8`."""
    out = torch.empty(values.shape, dtype=torch.uint16, device=values.device)
    _dequantize[(triton.cdiv(values.numel(), 1024),)](
        values.contiguous(),
        block_scales.contiguous(),
        out,
        values.numel(),
        *values.shape[1:],
        *block_scales.shape[1:],
        N=1024,
        **NO_FUSION,
    )
    return out.view(torch.bfloat16)
