"""What `quant.cast` does to each block of 32 values, for CPUs: exponents to scales and back, and which blocks are zero.

Key idea: codes stay where they are, so a pass goes over the exponents, a sixteenth of the bytes, and looks at codes
where it must. What is taken seldom stands in a loop of its own, so that the others compile to vectors. Blocks are pairs
of words: 16 codes each, without their signs zero for zero.
"""

from __future__ import annotations

import numpy as np

from mimoquant.quant.kernels.compiled import compiled

_MAGNITUDES = np.uint64(0x7777777777777777)
_jit = compiled()


@_jit
def largest_live(words, exponents):
    """The largest exponent, and the largest of a block that is not zero, -1 where there is none.

    words: uint64 [blocks, 2]; exponents: uint8 [blocks].
    """
    largest, live = np.uint8(0), np.int64(-1)
    for i in range(exponents.shape[0]):
        largest = max(largest, exponents[i])
    for i in range(exponents.shape[0]):
        if exponents[i] > live and (words[i, 0] | words[i, 1]) & _MAGNITUDES:
            live = np.int64(exponents[i])
            if live == largest:
                break
    return np.int64(largest), live


@_jit
def e4m3_scales(words, exponents, least, pairs):
    """Each exponent as the E4M3 byte of 2^(exponent - least - 9), twice, into `pairs`, uint16 [blocks].

    What lies more than 17 above `least`, or below it, gets the end of that range; only blocks of zeros may. Returns how
    many others lie below. 2^-9 to 2^-7 are E4M3's subnormals 1, 2 and 4, from 2^-6 on a byte has the exponent times 8.
    """
    low, least = 0, np.int16(least)
    for i in range(exponents.shape[0]):
        step = np.int16(exponents[i]) - least
        low += step < 0
        step = np.uint16(min(max(step, np.int16(0)), np.int16(17)))
        byte = np.uint16(1) << step if step < 3 else np.uint16(8) * (step - np.uint16(2))
        pairs[i] = np.uint16(byte) * np.uint16(0x101)
    lost = 0
    if low:
        for i in range(exponents.shape[0]):
            if exponents[i] < least and (words[i, 0] | words[i, 1]) & _MAGNITUDES:
                lost += 1
    return lost


@_jit
def e8m0_exponents(words, pairs, table, none, of_zeros, exponents):
    """The exponent of each pair of scales by `table`, uint8 [256], where `none` stands for a scale that has none.
    Returns how many blocks have no exponent of their own: one half's scale has none, or the halves' differ.

    words: uint64 [blocks, 2]; pairs: uint8 [blocks, 2]; exponents: uint8 [blocks], written, `of_zeros` where a block is
    zero. A half that is zero may have any scale.
    """
    odd, lost = 0, 0
    for i in range(exponents.shape[0]):
        found = table[pairs[i, 0]]
        odd += (pairs[i, 0] != pairs[i, 1]) | (found == none)
        live = (words[i, 0] | words[i, 1]) & _MAGNITUDES
        exponents[i] = found if live else np.uint8(of_zeros)
    if odd:
        for i in range(exponents.shape[0]):
            first, second = table[pairs[i, 0]], table[pairs[i, 1]]
            live_0, live_1 = words[i, 0] & _MAGNITUDES != 0, words[i, 1] & _MAGNITUDES != 0
            lost += (live_0 & (first == none)) | (live_1 & (second == none)) | (live_0 & live_1 & (first != second))
            exponents[i] = first if live_0 else second if live_1 else np.uint8(of_zeros)
    return lost
