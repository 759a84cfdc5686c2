"""Roundings that the Triton kernels share, the same float32 operations as `engine_torch`'s and `cpu_kernels`'.

Adding 1.5 * 2^23 to |x| < 2^22 rounds it to a whole number, ties to even; half and twice that to steps of 1/2 and 2.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FP8_UNIT = tl.constexpr(2.0**120)  # what the bits of an E4M3 lack as those of a float32
TF32_PARTS = tl.constexpr("ieee" if torch.version.hip else "tf32x3")  # 21 bits of a float32, by tensor cores
NO_FUSION = {"enable_fp_fusion": False}  # for every launch: a fused multiply-add would round once where others do twice


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def fold(x, SIZE: tl.constexpr, N: tl.constexpr):
    """[SIZE, N] → the sum of its halves, [SIZE / 2, N]."""
    low, high = tl.split(tl.permute(tl.reshape(x, (2, SIZE // 2, N)), (1, 2, 0)))
    return low + high


@triton.jit
def halving_sum(x, SIZE: tl.constexpr, N: tl.constexpr):
    """[SIZE, N] → [N], adding halves: `engine_torch.halving_sum`. SIZE is a power of two from 16 to 128."""
    if SIZE >= 128:
        x = fold(x, 128, N)
    if SIZE >= 64:
        x = fold(x, 64, N)
    if SIZE >= 32:
        x = fold(x, 32, N)
    x = fold(x, 16, N)
    x = fold(x, 8, N)
    x = fold(x, 4, N)
    return tl.reshape(fold(x, 2, N), (N,))


@triton.jit
def round_level(x):
    """To a whole number in -8..7."""
    x = tl.where(x > -8.0, x, -8.0)
    x = tl.where(x < 7.0, x, 7.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_e2m1(y):
    """Nearest of {0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code; y >= 0."""
    y = tl.where(y < 6.0, y, 6.0)
    magic = tl.where(y < 2.0, 6291456.0, tl.where(y < 4.0, 12582912.0, 25165824.0))
    return (y + magic) - magic


@triton.jit
def e2m1_code(rounded):
    """int32 0..7."""
    twice = (rounded * 2.0).to(tl.int32)
    return tl.where(twice < 5, twice, tl.where(twice < 7, 5, tl.where(twice < 10, 6, 7)))


@triton.jit
def round_bf16(x):
    """float32 → the bits of the nearest bfloat16, in the upper half of a uint32; finite x."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000


@triton.jit
def e2m1_value(code):
    """float32 of an int32 code 0..15."""
    small = code & 7
    half = tl.where(small < 5, small, tl.where(small == 5, 6, tl.where(small == 6, 8, 12)))
    magnitude = half.to(tl.float32) * 0.5
    return tl.where(code < 8, magnitude, -magnitude)


@triton.jit
def e4m3_byte(value):
    """float32 >= 0 to the nearest E4M3, ties to even, int32."""
    value = tl.where(value < 448.0, value, 448.0)
    bits = bits_of(value)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).to(tl.int32) - (120 << 3)
    small = ((value * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.where(value < 0.015625, small, normal)


@triton.jit
def e4m3_value(byte):
    return from_bits(byte << 20) * FP8_UNIT


@cache
def steps(device: torch.device) -> torch.Tensor:
    """0, 1, 2 .. 127, int32: an index that the compiler cannot see through."""
    return torch.arange(128, dtype=torch.int32, device=device)
