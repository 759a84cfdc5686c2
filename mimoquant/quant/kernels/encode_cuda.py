"""`engine_torch.encode` as one Triton kernel: FP8 or bf16 weights → codes and scales, the search inside.

Key idea: a group of weights stays in registers while every scale is tried on it, so that a weight is read once and
written once, whatever the search. The sequence of float32 operations of every element is `engine_torch`'s: divisions as
IEEE wants them, no fused multiply-add, sums by halving. The bytes are the same.

A group of 64 or 128 is spread over L = 2 or 4 threads, weight s = L k + l in thread l, so that all but the last sums of
halves stay within a thread. A division a weight would be most of the search: there a quotient comes from the scale's
reciprocal and one correction, which is the rounded quotient but within 2^-47 of a tie (Markstein, 1990), where both
neighbours cost the same; codes come from true divisions, and groups of extreme weights take those in the search too.

Shapes: E experts, O out_features, I in_features, G groups of a row, S group size; N groups of a program, K = S / L
weights of a thread; tiles are [K, N L].

Arrays that `_encode` takes, all contiguous; an array that a format does without is another one, never read:
    values, block_scales        the source: FP8 bits, uint8 [E, O, I], with float32 [E, R, C]; or bf16 bits, uint16
    importance                  float32 [E, I], what a column's squared error counts (WEIGHTED)
    global_scales               float32 [E], nvfp4's
    tried, count                float32, what the search tries, and how many; the first is plain rounding
    steps                       int32, 0, 1, 2, ...: indexes that the compiler cannot see through
    packed, scale_out, zero_out what is stored: uint8 [E, O, I/2]; bf16 bits, E8M0 or E4M3 bytes [E, O, G]; int8
    bad                         int32 [E], how many groups are not finite
    rows, groups                O and G; scale_rows, scale_columns: R and C
Of a program: `n` [N L] the group of each thread, counted from the expert's first; `there` whether it exists; `x` the
weights [K, N L]; low, high, amax, scale, zero and stored (what is stored of the scale) of each thread's group [N L].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.kernels.arithmetic_cuda import (
    FP8_UNIT,
    NO_FUSION,
    e2m1_code,
    from_bits,
    round_bf16,
    round_e2m1,
    round_level,
    steps,
)
from mimoquant.quant.kernels.rounding import pack_zero_points
from mimoquant.quant.kernels.search_cuda import INT4, NVFP4, candidate, search, spread

_THREADS = 32  # of a program: a warp, which need not wait for others
_LONGEST = 32  # weights that a thread holds
_EXTREME = tl.constexpr(2.0**60)  # beyond it, or below its inverse, a reciprocal may over- or underflow
_KINDS = {"int4": 0, "mxfp4": 1, "nvfp4": 2}


@triton.jit
def _load(
    values,
    block_scales,
    expert,
    first,
    groups,
    scale_rows,
    scale_columns,
    n,
    s,
    there,
    S: tl.constexpr,
    FP8: tl.constexpr,
):
    """Groups' weights as float32 [K, N L], and which threads have seen one that is not finite. `first`: the expert's
    first group."""
    held = tl.trans(tl.load(values + (first + n)[:, None] * S + s, mask=there[:, None], other=0))
    if FP8:
        place = (expert * scale_rows + n // groups // 128) * scale_columns + n % groups * S // 128
        unit = tl.load(block_scales + place, mask=there, other=1.0)
        x = from_bits(((held.to(tl.uint32) & 0x7F) << 20) | ((held.to(tl.uint32) & 0x80) << 24)) * FP8_UNIT
        x = from_bits(round_bf16(x * unit[None, :]))
        spoiled = (tl.max((held & 0x7F).to(tl.int32), axis=0) == 0x7F) | ~(tl.abs(unit) < float("inf"))
    else:
        x = from_bits(held.to(tl.uint32) << 16)
        spoiled = tl.max((held & 0x7FFF).to(tl.int32), axis=0) >= 0x7F80  # `tl.max` of floats passes over NaN
    return x, spoiled


@triton.jit
def _range(x, N: tl.constexpr, L: tl.constexpr):
    """The least and largest weight of each thread's group, or 0: [N L]."""
    low, high = tl.minimum(tl.min(x, axis=0), 0.0), tl.maximum(tl.max(x, axis=0), 0.0)
    if L > 1:
        low = spread(tl.min(tl.reshape(low, (N, L)), axis=1), N, L)
        high = spread(tl.max(tl.reshape(high, (N, L)), axis=1), N, L)
    return low, high


@triton.jit
def _codes(x, scale, zero, KIND: tl.constexpr):
    """The nearest codes, by true divisions: int32 [K, N L]."""
    wide = tl.zeros_like(x) + scale[None, :]
    if KIND == INT4:
        code = (round_level(tl.div_rn(x, wide) + zero[None, :]) + 8.0).to(tl.int32)
    else:
        code = e2m1_code(round_e2m1(tl.div_rn(tl.abs(x), wide))) | tl.where(x < 0, 8, 0)
    return code


@triton.jit
def _store_codes(packed, code, begin, count, K: tl.constexpr, N: tl.constexpr, L: tl.constexpr):
    """Two a byte, in memory order, so that stores are wide. `count`: groups of the expert, whose first is `begin`."""
    S: tl.constexpr = K * L
    if L == 1:
        even, odd = tl.split(tl.permute(tl.reshape(code, (K // 2, 2, N)), (0, 2, 1)))
    else:
        even, odd = tl.split(tl.reshape(code, (K, N * L // 2, 2)))
    pairs = tl.reshape((even | (odd << 4)).to(tl.uint8), (K if L > 1 else K // 2, N, (L + 1) // 2))
    pairs = tl.reshape(tl.permute(pairs, (1, 0, 2)), (N, S // 2))
    first = tl.program_id(0) * N + tl.arange(0, N)
    out = (begin + first)[:, None] * (S // 2) + tl.arange(0, S // 2)[None, :]
    tl.store(packed + out, pairs, mask=(first < count)[:, None])


@triton.jit
def _store_scales(scale_out, zero_out, group, stored, zero, there, KIND: tl.constexpr, SYMMETRIC: tl.constexpr):
    if KIND == INT4:
        tl.store(scale_out + group, stored.to(tl.uint16), mask=there)
    else:
        tl.store(scale_out + group, stored.to(tl.uint8), mask=there)
    if not SYMMETRIC:
        tl.store(zero_out + group, zero.to(tl.int8), mask=there)


@triton.jit
def _encode(
    values,
    block_scales,
    importance,
    global_scales,
    tried,
    steps,
    packed,
    scale_out,
    zero_out,
    bad,
    rows,
    groups,
    scale_rows,
    scale_columns,
    count,
    KIND: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FP8: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SIGNED: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    S: tl.constexpr = K * L
    thread = tl.arange(0, N * L)
    n = tl.program_id(0) * N + thread // L
    there, begin = n < rows * groups, expert * rows * groups
    # an index that the compiler cannot see through: else it would spread a thread's weights, for the sake of loads; and
    # tiles are loaded turned, [N L, K]: else it would spread those of groups that one thread has whole
    s = tl.load(steps + tl.arange(0, K))[None, :] * L + (thread % L)[:, None]
    x, spoiled = _load(values, block_scales, expert, begin, groups, scale_rows, scale_columns, n, s, there, S, FP8)
    weigh = x
    if WEIGHTED:
        of_column = expert * groups * S + (n % groups)[:, None] * S + s
        weigh = tl.trans(tl.load(importance + of_column, mask=there[:, None], other=0.0))
    low, high = _range(x, N, L)
    amax = tl.maximum(-low, high)
    global_scale = tl.zeros_like(amax) + 1.0
    if KIND == NVFP4:
        global_scale = tl.zeros_like(amax) + tl.load(global_scales + expert)
    c = tl.load(tried)
    scale, zero, stored = candidate(low, high, amax, global_scale, c, c == c, KIND, SYMMETRIC)
    if count > 1:
        tame = (amax == 0) | ((amax < _EXTREME) & (amax > 1 / _EXTREME)) | ~there
        if tl.min(tame.to(tl.int32), axis=0) == 1:
            scale, zero, stored = search(
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
                KIND,
                SYMMETRIC,
                WEIGHTED,
                True,
                SIGNED,
                K,
                N,
                L,
            )
        else:
            scale, zero, stored = search(
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
                KIND,
                SYMMETRIC,
                WEIGHTED,
                False,
                SIGNED,
                K,
                N,
                L,
            )
    _store_codes(packed, _codes(x, scale, zero, KIND), begin, rows * groups, K, N, L)
    there = there & (thread % L == 0)
    _store_scales(scale_out, zero_out, begin + n, stored, zero, there, KIND, SYMMETRIC)
    spoiled = spoiled | ~(amax < float("inf")) | ~(tl.abs(scale) < float("inf"))
    tl.atomic_add(bad + expert, tl.sum((spoiled & there).to(tl.int32), axis=0))


@cache
def _kept(tried: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device; to bring it there every time would be to wait for all that was begun before."""
    return torch.tensor(tried, dtype=torch.float32, device=device)


def _in_pairs(tried: Sequence[float]) -> bool:
    """Whether the second half has the negatives of the first."""
    half = len(tried) // 2
    return len(tried) == 2 * half and all(a == -b for a, b in zip(tried[:half], tried[half:], strict=True))


def encode(
    values: Tensor,
    block_scales: Tensor | None,
    fmt: Format,
    tried: Sequence[float],
    global_scale_E: Tensor | None,
    importance_EI: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored parts of a stack, as `engine_torch.encode` gives them, and int32 [E], how many groups are not finite.

    Args:
        values: [E, O, I] uint8 (FP8 bits) with `block_scales` float32 [E, R, C], or bfloat16 without.
        tried: see `formats.multipliers`.
    """
    experts, rows, width = values.shape
    groups, device = width // fmt.group_size, values.device
    held = values if block_scales is not None else values.view(torch.uint16)
    shape = (experts, rows, groups)
    codes = torch.empty(experts, rows, width // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(shape, dtype=torch.uint16 if fmt.name == "int4" else torch.uint8, device=device)
    zero = torch.empty(shape if not fmt.symmetric else (1,), dtype=torch.int8, device=device)
    bad = torch.zeros(experts, dtype=torch.int32, device=device)
    unused = codes.view(-1)[:1]
    blocks = (1, 1) if block_scales is None else block_scales.shape[1:]
    lanes = -(-fmt.group_size // _LONGEST)
    of_a_program = _THREADS // lanes
    _encode[(triton.cdiv(rows * groups, of_a_program), experts)](
        held.contiguous(),
        unused if block_scales is None else block_scales.contiguous(),
        unused if importance_EI is None else importance_EI.contiguous(),
        unused if global_scale_E is None else global_scale_E,
        _kept(tuple(tried), device),
        steps(device),
        codes,
        scale,
        zero,
        bad,
        rows,
        groups,
        *blocks,
        len(tried),
        KIND=_KINDS[fmt.name],
        SYMMETRIC=fmt.symmetric,
        FP8=block_scales is not None,
        WEIGHTED=importance_EI is not None,
        SIGNED=fmt.symmetric and fmt.name == "int4" and _in_pairs(tried),
        K=fmt.group_size // lanes,
        N=of_a_program,
        L=lanes,
        num_warps=_THREADS // 32,
        **NO_FUSION,
    )
    return _parts(codes, scale, zero, fmt, global_scale_E), bad


def _parts(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format, global_scale_E: Tensor | None) -> dict[str, Tensor]:
    dtype = {"int4": torch.bfloat16, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}[fmt.name]
    parts = {"codes": codes, "scale": scale.view(dtype)}
    if not fmt.symmetric:
        parts["zero_point"] = pack_zero_points(zero)
    if fmt.name == "nvfp4":
        assert global_scale_E is not None
        parts["global_scale"] = global_scale_E.to(torch.float32).reshape(-1, 1)
    return parts
