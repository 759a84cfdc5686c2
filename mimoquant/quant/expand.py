"""MXFP4 as bf16, exactly: what searches and methods start from where a source's experts are in 4 bits already.

Key idea: a value is e2m1 times 2^k, which bf16 holds for every k of E8M0: its exponents are float32's, and two of its
bits of significand are needed. So one table of 256 exponents by 256 bytes of two codes has all there is.

Left out: what bf16 holds as Inf (6 times 2^127) or NaN (exponent 255); an encoder refuses these by name.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.quant.formats import E2M1_VALUES

Array = npt.NDArray[Any]
_BLOCK_BYTES = 16  # of codes, that share an exponent
_SLAB_BYTES = 2**20  # of codes at once: indexes take eight times that


@functools.lru_cache(maxsize=1)
def _pairs() -> Array:
    """uint32 [256 * 256]: for exponent and byte, the bf16 of the low nibble in the low half, of the high one above."""
    values = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.ldexp(values, np.arange(256)[:, None] - 127).astype(np.float32)
    wide[255] = np.nan
    bits = wide.view(np.uint32) >> 16
    byte = np.arange(256)
    table: Array = (bits[:, byte & 15] | (bits[:, byte >> 4] << 16)).reshape(-1)
    return table


def expand(codes: Array, exponents: Array, out: Array) -> None:
    """The values of one stack's codes.

    Args:
        codes: uint8 [..., I/2], even columns in low nibbles; exponents: uint8 [..., I/32], biased.
        out: uint16 [..., I], bf16 bits, written.
    """
    blocks, flat = codes.reshape(-1, _BLOCK_BYTES), exponents.reshape(-1, 1).astype(np.intp) << 8
    pairs, step = out.reshape(-1).view(np.uint32).reshape(-1, _BLOCK_BYTES), _SLAB_BYTES // _BLOCK_BYTES
    for begin in range(0, len(blocks), step):
        place = flat[begin : begin + step] | blocks[begin : begin + step]
        np.take(_pairs(), place, out=pairs[begin : begin + step], mode="clip")
