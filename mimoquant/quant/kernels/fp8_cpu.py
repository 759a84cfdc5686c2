"""Rows of FP8 blocks as bf16, for CPUs: exact product in float32, then one rounding; and what is not finite.

Key idea: a byte's exponent and mantissa are put where float32 has its own, and 2^120 makes up for the other bias. What
has to be looked at is looked at eight bytes at a time, or not at all where scales say that it cannot be.
"""

from __future__ import annotations

import math

import numpy as np

from mimoquant.quant.kernels.compiled import compiled

U32, U64, F32 = np.uint32, np.uint64, np.float32
FP8_UNIT = F32(2.0**120)
_ABS = U32(0x7FFFFFFF)
_INF_ROUNDED = U32(0x7F7F8000)  # the least bits of a float32 that becomes Inf in bf16
_SAFE_SCALE = F32(2.0**118)  # with the largest code, 448, it stays below 2^127

_jit = compiled()
_inline = compiled(inline="always")


@_inline
def round_bf16(bits):
    return (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) & U32(0xFFFF0000)


@_jit
def amax_bits(bits):
    largest = U32(0)
    for i in range(bits.shape[0]):
        magnitude = bits[i] & _ABS
        largest = magnitude if magnitude > largest else largest
    return largest


@_jit
def _holds_nan(source):
    """Whether an FP8 row holds E4M3's NaN, all bits but the sign; eight bytes at a time."""
    width = source.shape[0]
    words, found = source[: width // 8 * 8].view(U64), U64(0)
    for i in range(words.shape[0]):
        found |= ((words[i] & U64(0x7F7F7F7F7F7F7F7F)) + U64(0x0101010101010101)) & U64(0x8080808080808080)
    for i in range(width // 8 * 8, width):
        found |= U64(source[i] & np.uint8(0x7F) == np.uint8(0x7F))
    return found != U64(0)


@_jit
def _fp8_products(source, scales, values, bits):
    """One FP8 row times its scales, not yet rounded, in float32; `values` and `bits` are the same memory. Returns 1 if
    a code or a scale is not finite."""
    width = source.shape[0]
    for i in range(width):
        byte = U32(source[i])
        bits[i] = ((byte & U32(0x7F)) << U32(20)) | ((byte & U32(0x80)) << U32(24))
    bad = 1 if _holds_nan(source) else 0
    for block in range(scales.shape[0]):
        scale = scales[block]
        bad |= 0 if math.isfinite(scale) else 1  # told here: rounding a NaN's bits can carry into the sign
        part = values[block * 128 : min(block * 128 + 128, width)]
        for i in range(part.shape[0]):
            part[i] = (part[i] * FP8_UNIT) * scale
    return bad


@_jit
def fp8_row(source, scales, values, bits):
    """One FP8 row to bf16 values in float32; `values` and `bits` are the same memory. Returns 1 if it holds a NaN."""
    bad = _fp8_products(source, scales, values, bits)
    for i in range(source.shape[0]):
        bits[i] = round_bf16(bits[i])
    return bad


@_jit
def dequantize_rows(fp8, scales, scale_row, begin, end, out):
    """FP8 rows begin..end as bf16 bits into `out` [O, I]. Returns the number of rows that are not finite."""
    values = np.empty(fp8.shape[1], F32)
    bits, bad = values.view(U32), 0
    for row in range(begin, end):
        factors, target = scales[scale_row[row]], out[row]
        wrong = _fp8_products(fp8[row], factors, values, bits)
        for i in range(target.shape[0]):
            target[i] = np.uint16(round_bf16(bits[i]) >> U32(16))
        for scale in factors:
            if abs(scale) > _SAFE_SCALE:  # only then may a product be too large for bf16
                wrong |= 1 if amax_bits(bits) >= _INF_ROUNDED else 0
                break
        bad += wrong
    return bad
