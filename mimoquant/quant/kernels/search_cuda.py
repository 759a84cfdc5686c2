"""The scale search of `encode_cuda`: what each format tries, and what it costs.

Of a program: `x` the weights of N groups [K, N L], K in each of a group's L threads; low, high, amax, scale, zero and
stored (what is stored of the scale) of each thread's group [N L]; see `encode_cuda` for the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mimoquant.quant.formats import INT4_ZERO_SCALE, MXFP4_ROUND_UP, NVFP4_SMALLEST_SCALE, NVFP4_ZERO_SCALE
from mimoquant.quant.kernels.arithmetic_cuda import (
    bits_of,
    e4m3_byte,
    e4m3_value,
    from_bits,
    halving_sum,
    round_bf16,
    round_e2m1,
    round_level,
)

INT4, MXFP4, NVFP4 = (tl.constexpr(number) for number in range(3))
_INT4_ZERO, _NVFP4_ZERO = tl.constexpr(INT4_ZERO_SCALE), tl.constexpr(NVFP4_ZERO_SCALE)
_NVFP4_SMALLEST, _ROUND_UP = tl.constexpr(NVFP4_SMALLEST_SCALE), tl.constexpr(MXFP4_ROUND_UP)


@triton.jit
def _group_sum(x, K: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    """[K, N L] → the sums of groups by adding halves, in each of a group's threads: [N L]."""
    x = halving_sum(x, K, N * L)
    if L > 1:
        if L == 4:
            low, high = tl.split(tl.permute(tl.reshape(x, (N, 2, 2)), (0, 2, 1)))
            x = low + high
        low, high = tl.split(tl.reshape(x, (N, 2)))
        x = spread(low + high, N, L)
    return x


@triton.jit
def spread(x, N: tl.constexpr, L: tl.constexpr):
    """[N] → [N L]: each group's value in each of its threads."""
    return tl.reshape(tl.broadcast_to(x[:, None], (N, L)), (N * L,))


@triton.jit
def _int4_scale(spread, levels):
    scale = from_bits(round_bf16(tl.div_rn(spread, tl.zeros_like(spread) + levels)))
    return tl.where(scale == 0, _INT4_ZERO, scale)


@triton.jit
def _int4_range(low, high, c, SYMMETRIC: tl.constexpr):
    if SYMMETRIC:
        scale = _int4_scale(tl.maximum(-low, high) * c, 7.5)
        return scale, tl.zeros_like(scale)
    scale = _int4_scale((high - low) * c, 15.0)
    return scale, round_level(-8.0 - tl.div_rn(low * c, scale))


@triton.jit
def _exp2(biased):
    return from_bits(tl.where(biased == 0, 1 << 22, biased << 23))


@triton.jit
def _nvfp4_scale(wanted, global_scale, zero_scale):
    """The stored E4M3 byte and the scale that it makes."""
    byte = e4m3_byte(wanted)
    byte = tl.where(byte == 0, e4m3_byte(tl.zeros_like(wanted) + zero_scale), byte)
    return byte, tl.div_rn(e4m3_value(byte), global_scale)


@triton.jit
def _quotient(x, scale, wide, QUICK: tl.constexpr):
    if QUICK:
        inverse = tl.zeros_like(x) + tl.div_rn(tl.zeros_like(scale) + 1.0, scale)[None, :]
        near = x * inverse
        quotient = tl.fma(tl.fma(-near, wide, x), inverse, near)
    else:
        quotient = tl.div_rn(x, wide)
    return quotient


@triton.jit
def _error(
    x,
    scale,
    zero,
    weigh,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    QUICK: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
):
    wide = tl.zeros_like(x) + scale[None, :]
    if KIND == INT4:
        offset = zero[None, :]
        difference = (round_level(_quotient(x, scale, wide, QUICK) + offset) - offset) * wide - x
    else:
        magnitude = tl.abs(x)
        difference = round_e2m1(_quotient(magnitude, scale, wide, QUICK)) * wide - magnitude
    return _cost(difference, weigh, WEIGHTED, K, N, L)


@triton.jit
def _cost(difference, weigh, WEIGHTED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    squares = difference * difference
    if WEIGHTED:
        squares = squares * weigh
    return _group_sum(squares, K, N, L)


@triton.jit
def candidate(low, high, amax, global_scale, c, plain, KIND: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(scale, zero point, what is stored of the scale) for what the search tries as `c`; `plain`: the first of all."""
    if KIND == INT4:
        scale, zero = _int4_range(low, high, c, SYMMETRIC)
        return scale, zero, (bits_of(scale) >> 16).to(tl.int32)
    if KIND == MXFP4:
        bits = bits_of(amax)
        biased = (tl.where(plain, bits + _ROUND_UP, bits) >> 23).to(tl.int32) - 2 + tl.where(plain, 0, c.to(tl.int32))
        biased = tl.where(biased < 0, 0, tl.where(biased > 254, 254, biased))
        return _exp2(biased), tl.zeros_like(amax), biased
    base = tl.div_rn(amax, tl.zeros_like(amax) + 6.0) * global_scale
    byte, scale = _nvfp4_scale(base * c, global_scale, tl.where(plain, _NVFP4_ZERO, _NVFP4_SMALLEST))
    return scale, tl.zeros_like(amax), byte


@triton.jit
def search(
    x,
    low,
    high,
    amax,
    global_scale,
    scale,
    zero,
    stored,
    weigh,
    tried,
    count,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WEIGHTED: tl.constexpr,
    QUICK: tl.constexpr,
    SIGNED: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
):
    """The best of all that is tried; a candidate must be strictly better."""
    if SIGNED:
        scale, stored = _search_signed(x, amax, scale, stored, weigh, tried, count // 2, WEIGHTED, QUICK, K, N, L)
        return scale, zero, stored
    best = _error(x, scale, zero, weigh, KIND, WEIGHTED, QUICK, K, N, L)
    for k in range(1, count):
        c = tl.load(tried + k)
        other, other_zero, other_stored = candidate(low, high, amax, global_scale, c, c != c, KIND, SYMMETRIC)
        error = _error(x, other, other_zero, weigh, KIND, WEIGHTED, QUICK, K, N, L)
        better = error < best
        best, scale = tl.where(better, error, best), tl.where(better, other, scale)
        zero, stored = tl.where(better, other_zero, zero), tl.where(better, other_stored, stored)
    return scale, zero, stored


@triton.jit
def _search_signed(
    x,
    amax,
    scale,
    stored,
    weigh,
    tried,
    pairs,
    WEIGHTED: tl.constexpr,
    QUICK: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
):
    """`search` of symmetric int4 where all that is tried has its negative `pairs` further on: quotients of both differ
    in sign, so each is made and rounded once, and clamped to -8..7 and to -7..8. The negatives come after all others.
    """
    best, worst = tl.zeros_like(amax), tl.zeros_like(amax) + float("inf")
    other, other_stored = scale, stored
    for k in range(0, pairs):
        found = from_bits(round_bf16(tl.div_rn(amax * tl.load(tried + k), tl.zeros_like(amax) + 7.5)))
        one = tl.where(found == 0, _INT4_ZERO, found)
        wide = tl.zeros_like(x) + one[None, :]
        level = (_quotient(x, one, wide, QUICK) + 12582912.0) - 12582912.0
        error = _cost(_between(level, -8.0, 7.0) * wide - x, weigh, WEIGHTED, K, N, L)
        mirrored = _cost(_between(level, -7.0, 8.0) * wide - x, weigh, WEIGHTED, K, N, L)
        bits = (bits_of(one) >> 16).to(tl.int32)
        better = (k == 0) | (error < best)
        best, scale, stored = (
            tl.where(better, error, best),
            tl.where(better, one, scale),
            tl.where(better, bits, stored),
        )
        better = (mirrored < worst) & (found != 0)
        worst, other = tl.where(better, mirrored, worst), tl.where(better, -one, other)
        other_stored = tl.where(better, bits | 0x8000, other_stored)
    better = worst < best
    return tl.where(better, other, scale), tl.where(better, other_stored, stored)


@triton.jit
def _between(x, low: tl.constexpr, high: tl.constexpr):
    x = tl.where(x > low, x, low)
    return tl.where(x < high, x, high)
