"""Rounding to E2M1 for CPUs: the value of FP4 nearest to a magnitude, ties to the even code, and its code."""

from __future__ import annotations

import numpy as np

from mimoquant.quant.kernels.compiled import compiled

U32, F32, I32 = np.uint32, np.float32, np.int32
# 1.5 * 2^23 and the same for steps of 1/2 and 2: adding it rounds to a whole number of steps
_MAGIC, _MAGIC_HALF, _MAGIC_TWO = F32(12582912.0), F32(6291456.0), F32(25165824.0)
_inline = compiled(inline="always")


@_inline
def round_e2m1(y):
    """Steps of .5 below 2, 1 below 4, 2 up to 6: a magic number of that many units rounds to that step."""
    y = y if y < F32(6) else F32(6)
    magic = _MAGIC_HALF if y < F32(2) else (_MAGIC if y < F32(4) else _MAGIC_TWO)
    return (y + magic) - magic


@_inline
def e2m1_code(rounded):
    twice = I32(rounded * F32(2))
    return twice if twice < I32(5) else (I32(5) if twice < I32(7) else (I32(6) if twice < I32(10) else I32(7)))


@_inline
def e2m1(y):
    """`e2m1_code(round_e2m1(y))` in half the steps: below 1 the magic sum's last bits are the code, from 1 on a value
    rounded to one bit of mantissa has it as its highest ones."""
    y = y if y < F32(6) else F32(6)
    small = U32(F32(y + _MAGIC_HALF).view(U32) & U32(7))
    bits = F32(y).view(U32)
    odd = U32(U32(bits >> U32(22)) & U32(1))
    return small if y < F32(1) else U32(U32(U32(bits + U32(0x1FFFFF) + odd) >> U32(22)) - U32(252))
