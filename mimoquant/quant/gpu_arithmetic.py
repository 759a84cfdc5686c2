"""Roundings that the Triton kernels share, the same float32 operations as `engine_torch`'s and `cpu_kernels`'.

Adding 1.5 * 2^23 to |x| < 2^22 rounds it to a whole number, ties to even; half and twice that to steps of 1/2 and 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_FUSION = {"enable_fp_fusion": False}  # for every launch: a fused multiply-add would round once where others do twice


@triton.jit
def round_level(x):  # type: ignore[no-untyped-def]
    """To a whole number in -8..7."""
    x = tl.where(x > -8.0, x, -8.0)
    x = tl.where(x < 7.0, x, 7.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_e2m1(y):  # type: ignore[no-untyped-def]
    """Nearest of {0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code; y >= 0."""
    y = tl.where(y < 6.0, y, 6.0)
    magic = tl.where(y < 2.0, 6291456.0, tl.where(y < 4.0, 12582912.0, 25165824.0))
    return (y + magic) - magic


@triton.jit
def e2m1_code(rounded):  # type: ignore[no-untyped-def]
    """int32 0..7."""
    twice = (rounded * 2.0).to(tl.int32)
    return tl.where(twice < 5, twice, tl.where(twice < 7, 5, tl.where(twice < 10, 6, 7)))


@triton.jit
def round_bf16(x):  # type: ignore[no-untyped-def]
    """float32 → the bits of the nearest bfloat16, in the upper half of a uint32; finite x."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
