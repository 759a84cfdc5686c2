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

from collections.abc import Callable
from functools import cache
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


@cache
def _kernels() -> Any:
    """Compiled loops. No compiler is loaded before something is cast: readers of checkpoints take constants of here."""
    from mimoquant.quant.kernels import cast_cpu

    return cast_cpu


def cast(stacks: dict[str, Stack], fmt: Format, empty: Callable[..., Array] = np.empty) -> dict[str, dict[str, Array]]:
    """The parts of nvfp4 or mxfp4 for experts in mxfp4: projection → part → array with leading E.

    Args:
        stacks: `values` packed codes, uint8 [E, O, I/2]; `scales` biased exponents, uint8 [E, O, I/32].
        empty: where memory for scales is from.
    Raises NonFiniteError for an exponent that is NaN, InexactError where NVFP4 cannot hold a block.
    """
    top = {projection: _largest_live(projection, stack) for projection, stack in stacks.items()}
    if fmt.name == "mxfp4":
        return {p: {"codes": stack.values, "scale": _scales(stack)} for p, stack in stacks.items()}
    top["gate"] = top["up"] = np.maximum(top["gate"], top["up"])
    return {
        p: _parts(p, stack, np.where(top[p] < 0, _UNSCALED, np.maximum(top[p], _LEAST)), empty)
        for p, stack in stacks.items()
    }


def exponents(
    codes: Array, scale: Array, ratio_E2: Array, empty: Callable[..., Array] = np.empty
) -> tuple[Array, Array]:
    """NVFP4 as MXFP4 with the same codes: biased exponents, uint8 [E, O, I/32], and [E] how many blocks have none.

    Args:
        codes: uint8 [E, O, I/2]; scale: E4M3 bytes [E, O, I/16].
        ratio_E2: float64, the global scale as what is multiplied and what is divided by, so that a quotient that is a
            power of two is found to be one.
        empty: where memory for the exponents is from.
    """
    with np.errstate(all="ignore"):
        mantissa, power = np.frexp(E4M3_VALUES * ratio_E2[:, :1] / ratio_E2[:, 1:])
    is_power = (mantissa == 0.5) & (power >= 1 - 127) & (power <= 128)
    table = np.where(is_power, power + 126, _NONE).astype(np.uint8)
    found = empty((*codes.shape[:-1], codes.shape[-1] // 16), np.uint8)
    bad = [
        _kernels().e8m0_exponents(*_blocks(codes[e], scale[e]), table[e], _NONE, _ZEROS, found[e].reshape(-1))
        for e in range(len(codes))
    ]
    return found, np.array(bad, np.int64)


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


def _blocks(codes: Array, *scales: Array) -> tuple[Array, ...]:
    """One expert's blocks of 32: its codes as words [blocks, 2], each kind of scales [blocks] or [blocks, 2]."""
    words = codes.reshape(-1, 16).view(np.uint64)
    return words, *(scale.reshape(len(words), -1) for scale in scales)


def _largest_live(projection: str, stack: Stack) -> Array:
    """[E] biased exponent of the largest block that is not zero; -1 where all are."""
    found = [
        _kernels().largest_live(*_blocks(c), s.reshape(-1)) for c, s in zip(stack.values, _scales(stack), strict=True)
    ]
    bad = next((expert for expert, (largest, _) in enumerate(found) if largest == _NAN), None)
    if bad is not None:
        raise NonFiniteError(projection, bad)
    return np.array([live for _, live in found], np.int32)


def _parts(projection: str, stack: Stack, top_E: Array, empty: Callable[..., Array]) -> dict[str, Array]:
    scales = _scales(stack)
    twice = empty((*scales.shape, 2), np.uint8)  # one for each half of the block
    for expert, top in enumerate(top_E.tolist()):
        (words,), pairs = _blocks(stack.values[expert]), twice[expert].reshape(-1).view(np.uint16)
        lost = _kernels().e4m3_scales(words, scales[expert].reshape(-1), top - (_LARGEST - _SMALLEST), pairs)
        if lost:
            raise InexactError(projection, expert, lost)
    divisor = np.ldexp(np.float32(1), _UNSCALED - top_E).astype(np.float32)
    scale = twice.reshape(*scales.shape[:-1], -1)
    return {"codes": stack.values, "scale": scale, "global_scale": divisor[:, None]}
