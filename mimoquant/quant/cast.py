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
_SLAB_BLOCKS = 2**14  # that are looked at together
_MAGNITUDES = np.uint64(0x7777777777777777)  # of 16 codes, without their signs
_NAN = _NONE = 255  # of E8M0; no exponent
_LARGEST, _SMALLEST = 8, -9  # exponents of powers of two that are used as E4M3 scales
_E4M3 = np.array([1, 2, 4, *range(8, 8 * 16, 8)], np.uint8)  # of 2^-9 .. 2^8
_UNSCALED = 127 + _LARGEST  # the biased k_max that makes m 0
_ZEROS = 127  # the exponent that a block of zeros gets, 2^0
E4M3_VALUES = np.array(
    [
        (-1) ** (byte >> 7)
        * (2.0 ** ((byte >> 3 & 15) - 7) * (1 + (byte & 7) / 8) if byte & 0x78 else (byte & 7) / 512)
        for byte in range(256)
    ]
)
E4M3_VALUES[[0x7F, 0xFF]] = np.nan
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
    largest = {projection: _largest(projection, stack) for projection, stack in stacks.items()}
    if fmt.name == "mxfp4":
        return {p: {"codes": stack.values, "scale": _scales(stack)} for p, stack in stacks.items()}
    top = {projection: _largest_live(stack, largest[projection]) for projection, stack in stacks.items()}
    top["gate"] = top["up"] = np.maximum(top["gate"], top["up"])
    return {
        p: _parts(p, stack, np.where(top[p] < 0, _UNSCALED, np.maximum(top[p], _LEAST))) for p, stack in stacks.items()
    }


def exponents(codes: Array, scale: Array, ratio_E2: Array) -> tuple[Array, Array]:
    """NVFP4 as MXFP4 with the same codes: biased exponents, uint8 [E, O, I/32], and [E] how many blocks have none.

    Args:
        codes: uint8 [E, O, I/2]; scale: E4M3 bytes [E, O, I/16].
        ratio_E2: float64, the global scale as what is multiplied and what is divided by, so that a quotient that is a
            power of two is found to be one.
    """
    with np.errstate(all="ignore"):
        mantissa, power = np.frexp(E4M3_VALUES * ratio_E2[:, :1] / ratio_E2[:, 1:])
    is_power = (mantissa == 0.5) & (power >= 1 - 127) & (power <= 128)
    table = np.where(is_power, power + 126, _NONE).astype(np.uint8)
    pairs = scale.view(np.uint16)  # of a block's two halves, most of them alike
    first = (pairs & 0xFF).astype(np.uint8)
    one = _looked_up(table, first)
    found = np.where(nonzero_blocks(codes, 16), one, np.uint8(_ZEROS))
    bad = np.zeros(len(codes), np.int64)
    odd = np.flatnonzero((first != pairs >> 8) | (one == _NONE))  # a half of zeros may be scaled by anything
    if len(odd):
        expert = odd // found[0].size
        live = nonzero_blocks(codes.reshape(-1, 16)[odd], 8)
        pair = np.where(live, table[expert[:, None], scale.reshape(-1, 2)[odd]], np.int16(-1))
        lost = (pair == _NONE).any(1) | ((pair >= 0).all(1) & (pair[:, 0] != pair[:, 1]))
        np.add.at(bad, expert, lost)
        found.reshape(-1)[odd] = np.where(live.any(1), pair.max(1), _ZEROS)
    return found, bad


def nonzero_blocks(codes: Array, block_bytes: int) -> Array:
    """Whether any value of a block is not zero: bool [..., blocks]. A code without its sign bit is zero for zero."""
    words, live = codes.reshape(-1, block_bytes).view(np.uint64), np.empty(codes.size // block_bytes, np.bool_)
    for begin in range(0, len(words), _SLAB_BLOCKS):  # what fits a cache
        slab, found = words[begin : begin + _SLAB_BLOCKS], live[begin : begin + _SLAB_BLOCKS]
        np.not_equal(slab[:, 0] & _MAGNITUDES, 0, out=found)
        rest = np.flatnonzero(~found)  # few: a word of zeros is rare
        found[rest] = ((slab[rest, 1:] & _MAGNITUDES) != 0).any(1)
    return live.reshape(*codes.shape[:-1], codes.shape[-1] // block_bytes)


def _scales(stack: Stack) -> Array:
    assert stack.scales is not None
    return stack.scales


def _looked_up(table: Array, values: Array) -> Array:
    """Bytes [E, ...] by a table [E, 256] of bytes: `bytes.translate`, which needs no wide indexes."""
    found = b"".join(one.tobytes().translate(row.tobytes()) for one, row in zip(values, table, strict=True))
    return np.frombuffer(found, np.uint8).reshape(values.shape)


def _largest(projection: str, stack: Stack) -> Array:
    """[E] biased exponent of the largest block."""
    largest: Array = _scales(stack).reshape(len(stack.values), -1).max(1)
    bad = np.flatnonzero(largest == _NAN)
    if len(bad):
        raise NonFiniteError(projection, int(bad[0]))
    return largest


def _largest_live(stack: Stack, largest_E: Array) -> Array:
    """[E] biased exponent of the largest block that is not zero; -1 where all are.

    Codes are looked at in the blocks that have the largest exponent; in others only where all of those are zero.
    """
    scales, top = _scales(stack), largest_E.astype(np.int32)
    expert, live = _live_where(stack, scales == largest_E[:, None, None])
    for number in np.setdiff1d(np.arange(len(top)), expert[live]).tolist():
        top[number] = np.where(nonzero_blocks(stack.values[number], 16), scales[number].astype(np.int32), -1).max()
    return top


def _live_where(stack: Stack, wanted: Array) -> tuple[Array, Array]:
    """Of the blocks that are `wanted` [E, O, I/32], one after the other: its expert, and whether it is not zero."""
    place = np.flatnonzero(wanted)
    live = nonzero_blocks(stack.values.reshape(-1, 16)[place], 16)[:, 0]
    return place // wanted[0].size, live


def _parts(projection: str, stack: Stack, top_E: Array) -> dict[str, Array]:
    scales = _scales(stack)
    least = (top_E - (_LARGEST - _SMALLEST)).clip(0).astype(np.uint8)
    expert, live = _live_where(stack, scales < least[:, None, None])
    if live.any():
        first = int(expert[live][0])
        raise InexactError(projection, first, int((expert[live] == first).sum()))
    exponent = np.arange(256) - top_E[:, None] + _LARGEST
    scale = _looked_up(_E4M3[exponent.clip(_SMALLEST, _LARGEST) - _SMALLEST], scales)
    divisor = np.ldexp(np.float32(1), _UNSCALED - top_E).astype(np.float32)
    twice = (scale.astype(np.uint16) * np.uint16(0x101)).view(np.uint8)  # one for each half of the block
    return {"codes": stack.values, "scale": twice, "global_scale": divisor[:, None]}
