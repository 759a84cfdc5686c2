"""MXFP4 ↔ NVFP4 without changing a value: the codes stay, exponents become block scales and a global scale, or back.

Key idea: with k the exponent of a block of 32 and m = k_max - 8, the block becomes two of 16 with the scale 2^(k - m),
which E4M3 holds from 2^8 down to its smallest subnormal 2^-9, under the global multiplier 2^m. So the cast is exact
where k_max - k <= 17. Gate and up of an expert share m, so k_max is over both. A block whose codes are all zero is
zero under any scale and does not count.

Back: a block of 32 is two of 16 whose scales, times the global one, are one power of two. That is so in NVFP4 that was
cast, by whoever, and by chance elsewhere. A block of zeros may have any scale, so its exponent need not come back.

Left out: blocks that would have to be rounded; they stop the run. Reference: ModelOpt 0.47, which casts so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.quant.formats import Format
from mimoquant.quant.stack import NonFiniteError, Stack

Array = npt.NDArray[Any]
_NAN = 255  # of E8M0
_LARGEST, _SMALLEST = 8, -9  # exponents of powers of two that are used as E4M3 scales
_E4M3 = np.array([1, 2, 4, *range(8, 8 * 16, 8)], np.uint8)  # of 2^-9 .. 2^8
_UNSCALED = 127 + _LARGEST  # the biased k_max that makes m 0
_ZEROS = 127  # the exponent that a block of zeros gets, 2^0
_E4M3_VALUES = np.array(
    [
        (-1) ** (byte >> 7)
        * (2.0 ** ((byte >> 3 & 15) - 7) * (1 + (byte & 7) / 8) if byte & 0x78 else (byte & 7) / 512)
        for byte in range(256)
    ]
)
_E4M3_VALUES[[0x7F, 0xFF]] = np.nan
_LEAST = _UNSCALED - 126  # the least one that is used, lest the divisor 2^-m overflow; its blocks fit all the same


class InexactError(Exception):
    """Blocks of an expert lie too far below the largest; the caller knows its name."""

    def __init__(self, projection: str, expert: int, blocks: int) -> None:
        super().__init__(projection, expert, blocks)
        self.projection, self.expert, self.blocks = projection, expert, blocks


def cast(stacks: dict[str, Stack], fmt: Format) -> dict[str, dict[str, Array]]:
    """The parts of nvfp4 or mxfp4 for experts in mxfp4: projection → part → array with leading E.

    Args:
        stacks: `values` packed codes, uint8 [E, O, I/2]; `scales` biased exponents, uint8 [E, O, I/32].
    Raises NonFiniteError for an exponent that is NaN, InexactError where NVFP4 cannot hold a block.
    """
    live = {projection: nonzero_blocks(stack.values, 16) for projection, stack in stacks.items()}
    top = {projection: _largest(projection, stack, live[projection]) for projection, stack in stacks.items()}
    if fmt.name == "mxfp4":
        return {p: {"codes": stack.values, "scale": _scales(stack)} for p, stack in stacks.items()}
    top["gate"] = top["up"] = np.maximum(top["gate"], top["up"])
    return {
        p: _parts(p, stack, live[p], np.where(top[p] < 0, _UNSCALED, np.maximum(top[p], _LEAST)))
        for p, stack in stacks.items()
    }


def exponents(codes: Array, scale: Array, ratio_E2: Array) -> tuple[Array, Array]:
    """NVFP4 as MXFP4 with the same codes: biased exponents, uint8 [E, O, I/32], and [E] how many blocks have none.

    Args:
        codes: uint8 [E, O, I/2]; scale: E4M3 bytes [E, O, I/16].
        ratio_E2: float64, the global scale as what is multiplied and what is divided by, so that a quotient that is a
            power of two is found to be one.
    """
    with np.errstate(all="ignore"):
        mantissa, power = np.frexp(_E4M3_VALUES * ratio_E2[:, :1] / ratio_E2[:, 1:])
    biased = np.where((mantissa == 0.5) & (power >= 1 - 127) & (power <= 128), power + 126, -1).astype(np.int16)
    found = np.take_along_axis(biased[:, None], scale.reshape(len(scale), 1, -1).astype(np.intp), axis=2)
    pair = np.where(nonzero_blocks(codes, 8), found.reshape(scale.shape), -2).reshape(*scale.shape[:2], -1, 2)
    one, other = pair[..., 0], pair[..., 1]
    bad = (one == -1) | (other == -1) | ((one >= 0) & (other >= 0) & (one != other))
    largest = np.maximum(one, other)
    return np.where(largest < 0, _ZEROS, largest).astype(np.uint8), bad.sum((1, 2))


def nonzero_blocks(codes: Array, block_bytes: int) -> Array:
    """Whether any value of a block is not zero: bool [E, O, blocks]. A code without its sign bit is zero for zero."""
    words = codes.view(np.uint64) & np.uint64(0x7777777777777777)
    live: Array = words.reshape(*codes.shape[:2], -1, block_bytes // 8).max(-1) != 0
    return live


def _scales(stack: Stack) -> Array:
    assert stack.scales is not None
    return stack.scales


def _largest(projection: str, stack: Stack, live: Array) -> Array:
    """[E] biased exponent of the largest block that is not zero; -1 where all are."""
    scales = _scales(stack)
    bad = np.flatnonzero(scales.max((1, 2)) == _NAN)
    if len(bad):
        raise NonFiniteError(projection, int(bad[0]))
    largest: Array = np.where(live, scales.astype(np.int32), -1).max((1, 2))
    return largest


def _parts(projection: str, stack: Stack, live: Array, top_E: Array) -> dict[str, Array]:
    exponent = _scales(stack).astype(np.int32) - top_E[:, None, None] + _LARGEST
    lost = ((exponent < _SMALLEST) & live).sum((1, 2))
    if lost.any():
        expert = int(np.flatnonzero(lost)[0])
        raise InexactError(projection, expert, int(lost[expert]))
    scale = _E4M3[exponent.clip(_SMALLEST, _LARGEST) - _SMALLEST]
    divisor = np.ldexp(np.float32(1), _UNSCALED - top_E).astype(np.float32)
    return {"codes": stack.values, "scale": np.repeat(scale, 2, axis=-1), "global_scale": divisor[:, None]}
