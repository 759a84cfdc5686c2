"""Compiled kernels for CPUs: one pass over the source bytes, rows in cache, no interpreter in the loop.

Key idea: a row is decoded into a small float32 buffer (FP8 or bf16 → bf16 value), then each group is scaled, rounded
and packed from there. Loops are written so that they vectorize: one-dimensional slices, selects instead of min/max,
rounding by adding and subtracting 1.5 * 2^23. The order of every float32 operation is `engine_torch`'s, so the bytes
are the same; `fastmath` stays off for that reason. Kernels release the interpreter lock: callers run rows in threads.

Why not torch: its float8 → float32 conversion takes 6.8 ns an element on one core, this whole pipeline below 1.

Arrays of one expert that kernels take, with O out_features, I in_features, G groups of a row, S columns of a group:
    fp8, bf16           the source's bits, uint8 or uint16 [O, I]; the one that it is not in is empty (NO8, NO16)
    scales, scale_row   of FP8: block scales, float32 [R, C]; the row of them that a row has, int64 [O]
    begin, end          the rows of this call
    multipliers         float32, what the search tries (`formats.multipliers`); one of them: nothing is searched
    importance          float32 [I], what a column's squared error counts, or NO_IMPORTANCE
    packed, scale_out, zero_out     what is stored: uint8 [O, I/2]; bf16 bits, E8M0 or E4M3 bytes [O, G]; int8 [O, G]
Of a row, in cache: `values` float32 [I] and `bits`, the same memory as uint32; `codes` uint8 [I] and `codes16`, the
same memory as uint16 [I/2]. Of a group: `group` and `weigh`, its values and importance; `error`, room for S sums.
Each encoder goes row by row: `_load_row`, then of each group `_..._search` and `_..._codes`, then `_pack`.
"""

from __future__ import annotations

import math

import numpy as np

from mimoquant.quant.formats import INT4_ZERO_SCALE, MXFP4_ROUND_UP, NVFP4_SMALLEST_SCALE, NVFP4_ZERO_SCALE
from mimoquant.quant.kernels.compiled import compiled
from mimoquant.quant.kernels.e2m1_cpu import e2m1, round_e2m1
from mimoquant.quant.kernels.fp8_cpu import FP8_UNIT, amax_bits, fp8_row, round_bf16

U32, F32, F64, I32 = np.uint32, np.float32, np.float64, np.int32
_MAGIC = F32(12582912.0)  # 1.5 * 2^23: adding it rounds |x| < 2^22 to a whole number, ties to even
_ABS, _INF = U32(0x7FFFFFFF), U32(0x7F800000)
_LANES = 8  # every group is a multiple of them
_ROUND_UP = U32(MXFP4_ROUND_UP)
_ZERO_INT4, _ZERO_NVFP4 = F32(INT4_ZERO_SCALE), F32(NVFP4_ZERO_SCALE)
_SMALLEST_NVFP4 = F32(NVFP4_SMALLEST_SCALE)
NO8, NO16, NO_SCALES = np.empty((0, 0), np.uint8), np.empty((0, 0), np.uint16), np.empty((0, 0), np.float32)
NO_ROWS, NO_IMPORTANCE = np.empty(0, np.int64), np.empty(0, np.float32)


_jit = compiled()
_inline = compiled(inline="always")


@_jit
def _row_values(row, fp8, bf16, scales, scale_row, values, bits):
    """Row `row` of the source as bf16 values in float32. Returns 1 if it holds a NaN of FP8; `bits` tell the rest."""
    if bf16.shape[0]:
        source = bf16[row]
        for i in range(source.shape[0]):
            bits[i] = U32(source[i]) << U32(16)
        return 0
    return fp8_row(fp8[row], scales[scale_row[row]], values, bits)


@_jit
def _load_row(row, fp8, bf16, scales, scale_row, values, bits):
    """The same; returns 1 if anything in it is not finite."""
    bad = _row_values(row, fp8, bf16, scales, scale_row, values, bits)
    return 1 if amax_bits(bits) >= _INF else bad


@_jit
def _largest_place(bits):
    """Where the largest magnitude of a group stands."""
    largest = amax_bits(bits)
    for i in range(bits.shape[0]):
        if bits[i] & _ABS == largest:
            return i
    return 0


@_jit
def _pack(codes16, packed):
    """Pairs of codes, read as uint16, to one byte each."""
    for i in range(packed.shape[0]):
        pair = codes16[i]
        packed[i] = np.uint8(pair | (pair >> np.uint16(4)))


@_jit
def _halving_sum(error, size):
    """Of the first `size` (8 at least); the last eight written out, which is what the loop would do with them."""
    while size > 8:
        size //= 2
        low, high = error[:size], error[size : 2 * size]
        for i in range(size):
            low[i] = low[i] + high[i]
    even = (error[0] + error[4]) + (error[2] + error[6])
    return even + ((error[1] + error[5]) + (error[3] + error[7]))


@_inline
def _int4_scale(spread, levels):
    scale = U32(round_bf16(F32(spread / levels).view(U32))).view(F32)
    return _ZERO_INT4 if scale == F32(0) else scale


@_inline
def round_level(x):
    x = x if x > F32(-8) else F32(-8)
    x = x if x < F32(7) else F32(7)
    return (x + _MAGIC) - _MAGIC


@_inline
def _int4_range(low, high, c, symmetric):
    """Scale and zero point for the group's range shrunk by |c|; a symmetric scale has the sign of `c`."""
    if symmetric:
        largest = -low if -low > high else high
        return _int4_scale(largest * c, F32(7.5)), F32(0)
    scale = _int4_scale((high - low) * c, F32(15))
    return scale, round_level(F32(-8) - (low * c) / scale)


@_jit
def _place(group, value):
    """Where `value` stands in a group; the first place if it does not."""
    for i in range(group.shape[0]):
        if group[i] == value:
            return i
    return 0


@_inline
def _int4_square(x, scale, zero):
    difference = (round_level(x / scale + zero) - zero) * scale - x
    return difference * difference


@_jit
def _int4_error(group, scale, zero, weigh, error):
    """The first halving of the sum is taken on the way. `weigh`: importance of each column, or nothing."""
    half = group.shape[0] // 2
    left, right = group[:half], group[half:]
    if weigh.shape[0]:
        of_left, of_right = weigh[:half], weigh[half:]
        for i in range(half):
            first = _int4_square(left[i], scale, zero) * of_left[i]
            error[i] = first + _int4_square(right[i], scale, zero) * of_right[i]
    else:
        for i in range(half):
            error[i] = _int4_square(left[i], scale, zero) + _int4_square(right[i], scale, zero)
    return _halving_sum(error, half)


@_inline
def _int4_loses(group, scale, zero, weigh, at, best):
    """Whether one element's error alone is as large as the best sum: no sum that it is part of is smaller, for rounding
    a sum of two never takes it below either."""
    error = _int4_square(group[at], scale, zero)
    return (error * weigh[at] if weigh.shape[0] else error) >= best


@_jit
def _int4_codes(group, scale, zero, codes):
    for i in range(group.shape[0]):
        codes[i] = np.uint8(I32(round_level(group[i] / scale + zero)) + I32(8))


@_jit
def _int4_search(group, symmetric, multipliers, weigh, error):
    """Scale and zero point of the least error of all that is tried; a candidate must be strictly better."""
    low, high = F32(0), F32(0)
    for i in range(group.shape[0]):
        low = group[i] if group[i] < low else low
        high = group[i] if group[i] > high else high
    scale, zero = _int4_range(low, high, F32(1), symmetric)
    if multipliers.shape[0] > 1:
        best = _int4_error(group, scale, zero, weigh, error)
        lowest, highest = _place(group, low), _place(group, high)
        for k in range(1, multipliers.shape[0]):
            other, other_zero = _int4_range(low, high, multipliers[k], symmetric)
            if _int4_loses(group, other, other_zero, weigh, highest, best):
                continue
            if _int4_loses(group, other, other_zero, weigh, lowest, best):
                continue
            other_error = _int4_error(group, other, other_zero, weigh, error)
            if other_error < best:
                best, scale, zero = other_error, other, other_zero
    return scale, zero


@_jit
def encode_int4(
    fp8, bf16, scales, scale_row, begin, end, size, symmetric, multipliers, importance, packed, scale_out, zero_out
):
    """Rows begin..end to int4, in groups of `size`. Returns the number of rows that are not finite."""
    width = packed.shape[1] * 2
    values, codes, error = np.empty(width, F32), np.empty(width, np.uint8), np.empty(size, F32)
    bits, codes16, bad = values.view(U32), codes.view(np.uint16), 0
    plain = symmetric and multipliers.shape[0] == 1
    for row in range(begin, end):
        wrong, largest = _row_values(row, fp8, bf16, scales, scale_row, values, bits), U32(0)
        for g in range(width // size):
            group, weigh = values[g * size : (g + 1) * size], importance[g * size : (g + 1) * size]
            of_group = amax_bits(bits[g * size : (g + 1) * size])
            largest = of_group if of_group > largest else largest
            if plain:
                scale, zero = _int4_scale(U32(of_group).view(F32), F32(7.5)), F32(0)
            else:
                scale, zero = _int4_search(group, symmetric, multipliers, weigh, error)
            _int4_codes(group, scale, zero, codes[g * size : (g + 1) * size])
            bad += 0 if math.isfinite(scale) else 1  # an asymmetric range can overflow
            scale_out[row, g] = np.uint16(F32(scale).view(U32) >> U32(16))
            zero_out[row, g] = np.int8(zero)
        bad += 1 if largest >= _INF else wrong
        _pack(codes16, packed[row])
    return bad


@_inline
def _fp4_square(magnitude, scale):
    difference = round_e2m1(magnitude / scale) * scale - magnitude
    return difference * difference


@_jit
def _fp4_error(group, scale, weigh, error):
    """As `_int4_error`."""
    half = group.shape[0] // 2
    left, right = group[:half], group[half:]
    if weigh.shape[0]:
        of_left, of_right = weigh[:half], weigh[half:]
        for i in range(half):
            first = _fp4_square(abs(left[i]), scale) * of_left[i]
            error[i] = first + _fp4_square(abs(right[i]), scale) * of_right[i]
    else:
        for i in range(half):
            error[i] = _fp4_square(abs(left[i]), scale) + _fp4_square(abs(right[i]), scale)
    return _halving_sum(error, half)


@_inline
def _fp4_loses(largest, scale, weight, best):
    """As `_int4_loses`, of the largest magnitude; `weight` is its importance, or 1."""
    return _fp4_square(largest, scale) * weight >= best


@_jit
def _fp4_codes(group, scale, codes):
    for i in range(group.shape[0]):
        sign = U32(8) if group[i] < F32(0) else U32(0)
        codes[i] = np.uint8(e2m1(abs(group[i]) / scale) | sign)


@_inline
def _exp2(biased):
    return U32(U32(1) << U32(22) if biased == 0 else U32(biased) << U32(23)).view(F32)


@_inline
def _clamp_exponent(biased):
    return 0 if biased < 0 else (254 if biased > 254 else biased)


@_inline
def _mxfp4_exponent(largest):
    return _clamp_exponent(np.int64((largest + _ROUND_UP) >> U32(23)) - 2)


@_jit
def _mxfp4_search(group, largest, weigh, error):
    """The biased exponent of the least error; `largest`: bits of the group's largest magnitude."""
    biased = _mxfp4_exponent(largest)
    best = _fp4_error(group, _exp2(biased), weigh, error)
    for offset in range(-1, 2):
        other = _clamp_exponent(np.int64(largest >> U32(23)) - 2 + offset)
        other_error = _fp4_error(group, _exp2(other), weigh, error)
        if other_error < best:
            best, biased = other_error, other
    return biased


@_jit
def _mxfp4_plain(values, bits, codes, scale_out):
    """A row without a search, all [G, 32], so that the compiler knows how long a group is. Returns the bits of its
    largest magnitude. A quotient by a power of two is the product with its inverse, to the bit."""
    most = U32(0)
    for g in range(values.shape[0]):
        largest = U32(0)
        for i in range(32):
            magnitude = U32(bits[g, i] & _ABS)
            largest = magnitude if magnitude > largest else largest
        biased = _mxfp4_exponent(largest)
        factor = _exp2(254 - biased)
        for i in range(32):
            sign = U32(8) if values[g, i] < F32(0) else U32(0)
            codes[g, i] = np.uint8(e2m1(abs(values[g, i]) * factor) | sign)
        scale_out[g] = np.uint8(biased)
        most = largest if largest > most else most
    return most


@_jit
def encode_mxfp4(fp8, bf16, scales, scale_row, begin, end, search, importance, packed, scale_out):
    """Rows begin..end to mxfp4. Returns the number of rows that are not finite."""
    width = packed.shape[1] * 2
    values, codes, error = np.empty(width, F32), np.empty(width, np.uint8), np.empty(32, F32)
    bits, codes16, bad = values.view(U32), codes.view(np.uint16), 0
    groups, groups_bits, groups_codes = values.reshape(-1, 32), bits.reshape(-1, 32), codes.reshape(-1, 32)
    for row in range(begin, end):
        wrong = _row_values(row, fp8, bf16, scales, scale_row, values, bits)
        if search:
            largest = amax_bits(bits)
            for g in range(width // 32):
                weigh = importance[g * 32 : g * 32 + 32]
                biased = _mxfp4_search(groups[g], amax_bits(groups_bits[g]), weigh, error)
                _fp4_codes(groups[g], _exp2(biased), groups_codes[g])
                scale_out[row, g] = np.uint8(biased)
        else:
            largest = _mxfp4_plain(groups, groups_bits, groups_codes, scale_out[row])
        bad += 1 if largest >= _INF else wrong
        _pack(codes16, packed[row])
    return bad


@_inline
def e4m3_byte(value):
    """float32 0..448 to the nearest E4M3, ties to even."""
    value = value if value < F32(448) else F32(448)
    bits = F32(value).view(U32)
    normal = ((bits + U32(0x7FFFF) + ((bits >> U32(20)) & U32(1))) >> U32(20)) - U32(120 << 3)
    small = U32(I32((value * F32(512) + _MAGIC) - _MAGIC))
    return small if value < F32(2.0**-6) else normal


@_inline
def e4m3_value(byte):
    return U32(U32(byte) << U32(20)).view(F32) * FP8_UNIT


@_inline
def _nvfp4_scale(wanted, global_scale, zero_scale):
    """The stored E4M3 byte and the scale that it makes."""
    byte = e4m3_byte(wanted)
    byte = e4m3_byte(zero_scale) if byte == U32(0) else byte
    return byte, e4m3_value(byte) / global_scale


@_jit
def _nvfp4_search(group, group_bits, multipliers, global_scale, weigh, error):
    """The stored E4M3 byte of the least error of all that is tried, and the scale that it makes."""
    largest = U32(amax_bits(group_bits)).view(F32)
    base = largest / F32(6) * global_scale
    byte, scale = _nvfp4_scale(base, global_scale, _ZERO_NVFP4)
    if multipliers.shape[0] > 1:
        best, tried, plain = _fp4_error(group, scale, weigh, error), byte, byte
        weight = weigh[_largest_place(group_bits)] if weigh.shape[0] else F32(1)
        for k in range(1, multipliers.shape[0]):
            other, other_scale = _nvfp4_scale(base * multipliers[k], global_scale, _SMALLEST_NVFP4)
            if other in (tried, plain):  # many multipliers round to one E4M3 byte
                continue
            tried = other
            if _fp4_loses(largest, other_scale, weight, best):
                continue
            other_error = _fp4_error(group, other_scale, weigh, error)
            if other_error < best:
                best, byte, scale = other_error, other, other_scale
    return byte, scale


@_jit
def encode_nvfp4(fp8, bf16, scales, scale_row, begin, end, multipliers, global_scale, importance, packed, scale_out):
    """Rows begin..end to nvfp4. Returns the number of rows that are not finite."""
    width = packed.shape[1] * 2
    values, codes, error = np.empty(width, F32), np.empty(width, np.uint8), np.empty(16, F32)
    bits, codes16, bad = values.view(U32), codes.view(np.uint16), 0
    for row in range(begin, end):
        bad += _load_row(row, fp8, bf16, scales, scale_row, values, bits)
        for g in range(width // 16):
            group, group_bits = values[g * 16 : g * 16 + 16], bits[g * 16 : g * 16 + 16]
            weigh = importance[g * 16 : g * 16 + 16]
            byte, scale = _nvfp4_search(group, group_bits, multipliers, global_scale, weigh, error)
            _fp4_codes(group, scale, codes[g * 16 : g * 16 + 16])
            scale_out[row, g] = np.uint8(byte)
        _pack(codes16, packed[row])
    return bad


@_jit
def amax_rows(fp8, bf16, scales, scale_row, begin, end, width):
    """(largest |value| of rows begin..end, number of rows that are not finite)."""
    values = np.empty(width, F32)
    bits, bad, largest = values.view(U32), 0, U32(0)
    for row in range(begin, end):
        bad += _load_row(row, fp8, bf16, scales, scale_row, values, bits)
        row_largest = amax_bits(bits)
        largest = row_largest if row_largest > largest else largest
    return U32(largest).view(F32), bad


@_jit
def audit_rows(fp8, bf16, scales, scale_row, begin, end, codes, group_scale, zero, table, overshoot):
    """Hold codes against their source: is every source value in the rounding interval of its code?

    `table` float32 [3, 16]: grid value, lower and upper end of each code's interval, in units of the scale; beyond the
    ends of the grid a value may lie `overshoot` scales away, which is what the search can clip.
    Returns (largest distance in half steps, values outside, sum of squared errors, sum of squared weights).
    """
    width = codes.shape[1] * 2
    values = np.empty(width, F32)
    bits, worst, outside, error2, weight2 = values.view(U32), 0.0, 0, 0.0, 0.0
    size = width // group_scale.shape[1]
    for row in range(begin, end):
        outside += _load_row(row, fp8, bf16, scales, scale_row, values, bits)
        for i in range(width):
            code = (codes[row, i >> 1] >> np.uint8(4 * (i & 1))) & np.uint8(15)
            scale, offset = group_scale[row, i // size], zero[row, i // size]
            difference = values[i] - (table[0, code] - offset) * scale
            room = (table[2, code] if difference > 0 else table[1, code]) - table[0, code]
            room = overshoot if math.isinf(room) else abs(room)
            distance = abs(difference) / (room * scale)
            clipped = room == overshoot
            if not (distance <= 1.00002 and scale > F32(0) and math.isfinite(scale)):
                outside += 1
            worst = distance if distance > worst and not (clipped and distance <= 1.0) else worst
            error2 += F64(difference) * F64(difference)  # a plain float() stays in 32 bits here
            weight2 += F64(values[i]) * F64(values[i])
    return worst, outside, error2, weight2


@_jit
def error_rows(fp8, bf16, scales, scale_row, begin, end, codes, group_scale, zero, table):
    """How far codes are from their source: the sums of squared differences (NaN where a weight is not finite) and of
    squared weights, in float64.

    `table` float32 [16]: grid value of each code, in units of the scale. Sums go in lanes, which vectorize.
    """
    width = codes.shape[1] * 2
    values, levels = np.empty(width, F32), np.empty(width, F32)
    bits, size = values.view(U32), width // group_scale.shape[1]
    error2, weight2, bad = np.zeros(_LANES), np.zeros(_LANES), 0
    for row in range(begin, end):
        bad += _load_row(row, fp8, bf16, scales, scale_row, values, bits)
        packed = codes[row]
        for i in range(packed.shape[0]):
            levels[2 * i] = table[packed[i] & np.uint8(15)]
            levels[2 * i + 1] = table[packed[i] >> np.uint8(4)]
        for place in range(group_scale.shape[1]):
            scale, offset, first = group_scale[row, place], zero[row, place], place * size
            group, level = values[first : first + size], levels[first : first + size]
            for i in range(0, size, _LANES):
                for lane in range(_LANES):
                    difference = F64(group[i + lane] - (level[i + lane] - offset) * scale)
                    error2[lane] += difference * difference
                    weight2[lane] += F64(group[i + lane]) * F64(group[i + lane])
    return math.nan if bad else error2.sum(), weight2.sum()
