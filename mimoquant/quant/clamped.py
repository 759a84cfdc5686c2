"""Groups whose scale a format cannot store: not zero, yet out they come as zero, on a scale of the wrong size, or Inf.

Key idea: such a group has a stored scale at an end of what its format stores, or the one that a group of zeros gets. So
scales are looked through first, a byte or two for 16 to 128 weights; codes and source of the few groups that remain.

Left out: scales that are rounded between the ends, E4M3's subnormals by up to a third; casts, which are exact or
refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mimoquant.quant.cast import E4M3_VALUES
from mimoquant.quant.formats import E2M1_VALUES, Format
from mimoquant.quant.stack import Stack

Array = npt.NDArray[Any]
Groups = tuple[Array, ...]  # expert, row and group of each
Picked = Callable[[Groups], Array]
Size = tuple[int, int]

_AT_ONCE = 2**16  # groups
_IN_CACHE = 2**17  # of which the scales, and what is asked of them, stay in a cache
_BLOCK = 128  # of FP8, rows and columns
_INF = 2.0**128 - 2.0**119  # from here on bf16 rounds to Inf
_LEVELS = np.array([E2M1_VALUES[code & 7] for code in range(16)])
_TOP = {
    "int4": 7.5,
    "mxfp4": 6.0,
    "nvfp4": 6.0,
}  # what the largest weight of a group is divided by; asymmetric int4: 15
# Stored bits, without a sign: those of a group of zeros, and the least. MXFP4 has the least for zeros too.
_ZEROS, _LEAST = {"int4": 0x3C00, "mxfp4": 0, "nvfp4": 0x20}, {"int4": 1, "mxfp4": 0, "nvfp4": 1}
_MIDDLE = {"int4": 0x4000, "mxfp4": 127, "nvfp4": 0x40}  # what is at neither end
_E4M3_MOST = 0x7E
# Plain rounding would have stored less than the least scale where a group wants less than so much of it.
_TOO_LITTLE = {"int4": 0.5, "mxfp4": 3.5 / 6.0, "nvfp4": 0.5}
_SMALL_DIVISOR = 1.001 * 6.0 * 448.0 / _INF  # NVFP4 values by such a one, or nearly, may read as Inf
_TOO_MUCH = 464.0 / 448.0  # and more than E4M3's largest from here on


class Clamped(NamedTuple):
    """How many groups of a matrix became zero, were `clamped` to a scale that is not theirs, or read as Inf."""

    zeroed: int
    clamped: int
    infinite: int
    groups: int  # all of the matrix

    @property
    def lost(self) -> int:
        """Groups of all three kinds."""
        return self.zeroed + self.clamped + self.infinite

    @property
    def share(self) -> float:
        """Of the matrix's groups, 0 to 1."""
        return self.lost / self.groups


def clamped(stack: Stack, parts: Mapping[str, Array], fmt: Format, *, nearest: bool = True) -> dict[int, Clamped]:
    """What became of a stack's groups, for the experts that have clamped ones. `parts`: as engines return them.
    `nearest`: their codes are those nearest to these values, so that a group with the scale of zeros and other codes
    has it by chance; else values are bf16, as methods that choose codes take them."""
    codes, size = parts["codes"].reshape(*parts["scale"].shape, -1), fmt.group_size
    values = stack.values.reshape(*parts["scale"].shape, size)

    def weights(groups: Groups) -> Array:
        if stack.scales is None:
            return _bf16(values[groups])
        expert, row, group = groups
        scale = stack.scales[expert, row // _BLOCK, group * size // _BLOCK]
        held: Array = E4M3_VALUES[values[groups]] * scale[:, None]
        return held if nearest else _rounded(held)

    found = suspicious(parts, fmt)
    bits = unsigned(parts["scale"][found], fmt)
    if nearest and fmt.name != "mxfp4":  # whose scale of zeros is the least, which no other groups have by chance
        lost = (bits != _ZEROS[fmt.name]) | _begins_with_zeros(found, parts, fmt, codes)
        found, bits = tuple(place[lost] for place in found), bits[lost]
    held = len(parts["scale"]), parts["scale"][0].size
    return clamped_groups(parts, fmt, found, bits, codes.__getitem__, weights, held)


def clamped_groups(
    parts: Mapping[str, Array], fmt: Format, found: Groups, bits: Array, codes: Picked, weights: Picked, size: Size
) -> dict[int, Clamped]:
    """`clamped`, of parts without codes and scales: of those, what is asked for.

    Args:
        bits: [n], scales of the groups `found` without their sign. codes, weights: give some groups' packed codes
            [n, S/2], weights [n, S]. size: experts, and groups of each.
    """
    counts = np.zeros((size[0], 3), np.int64)
    for begin in range(0, len(found[0]), _AT_ONCE):
        some = slice(begin, begin + _AT_ONCE)
        _count(tuple(place[some] for place in found), bits[some], parts, fmt, codes, weights, counts)
    return {
        int(expert): Clamped(int(counts[expert, 0]), int(counts[expert, 1]), int(counts[expert, 2]), size[1])
        for expert in np.flatnonzero(counts.any(1))
    }


def suspicious(parts: Mapping[str, Array], fmt: Format) -> Groups:
    """Whose scale is that of zeros, the least, the most, or so large that codes may read as Inf."""
    scale, of_huge = parts["scale"], huge(parts.get("global_scale"), fmt)
    experts, rows, groups = scale.shape
    step, places = max(1, _IN_CACHE // groups), [np.empty(0, np.int64)]
    for expert, begin in itertools.product(range(experts), range(0, rows, step)):
        one = slice(expert, expert + 1)
        spread = of_huge[one] if of_huge is not None and of_huge[expert] else None  # it takes longer than all else here
        found = is_suspicious(unsigned(scale[one, begin : begin + step], fmt), spread, fmt)
        places.append((expert * rows + begin) * groups + np.flatnonzero(found))  # in a tenth of the time of `nonzero`
    return np.unravel_index(np.concatenate(places), scale.shape)


def is_suspicious(bits: Any, huge_E: Any, fmt: Format) -> Any:
    """The same of scales without their sign [E, O, G], in numpy or torch. `huge_E`: nvfp4's experts all of whose groups
    are, or None."""
    if fmt.name == "mxfp4":
        return (bits == 0) | (bits >= 253)
    found = (bits <= _LEAST[fmt.name]) | (bits == _ZEROS[fmt.name])
    if fmt.name == "int4":
        return found | (bits >= 0x7E00)  # 2^125, eight of which are 2^128
    found = found | (bits == _E4M3_MOST)
    return found if huge_E is None else found | huge_E[:, None, None]


def huge(global_scale: Any, fmt: Format) -> Any:
    """[E] nvfp4's experts whose divisor is so small that codes may read as Inf; None of other formats."""
    return None if fmt.name != "nvfp4" else global_scale.reshape(-1) <= _SMALL_DIVISOR


def at_low_end(bits: Array, fmt: Format) -> Array:
    """[n] of `suspicious` groups' scales without sign, whether they are so for a small scale; else for a large one."""
    low: Array = bits <= _MIDDLE[fmt.name]
    return low


def unsigned(scale: Any, fmt: Format) -> Any:
    """Stored scales, as integers in numpy or torch, without their sign."""
    return scale & (0xFF if fmt.name == "mxfp4" else 0x7FFF if fmt.name == "int4" else 0x7F)


def _begins_with_zeros(groups: Groups, parts: Mapping[str, Array], fmt: Format, codes: Array) -> Array:
    """[n] whether the first 16 codes of a group are those of zero. `codes`: packed, [E, O, G, S/2]."""
    first = np.ascontiguousarray(codes).view(np.uint64)[..., 0][groups]
    if fmt.name != "int4":
        return np.asarray(first & np.uint64(0x7777777777777777) == 0)
    zeros: Array = first == np.uint64(0x1111111111111111) * _zero_codes(groups, parts, fmt).astype(np.uint64)
    return zeros


def _count(
    groups: Groups, bits: Array, parts: Mapping[str, Array], fmt: Format, codes: Picked, weights: Picked, counts: Array
) -> None:
    """Add some groups to `counts` [E, 3]."""
    level = _largest_level(groups, parts, fmt, codes(groups))
    scale = _scales(groups, bits, parts, fmt)
    infinite = level * scale >= _INF
    held = weights(groups).astype(np.float64)
    low, high = np.minimum(held.min(-1, initial=0.0), 0.0), np.maximum(held.max(-1, initial=0.0), 0.0)
    spread = np.maximum(-low, high) / _TOP[fmt.name] if fmt.symmetric else (high - low) / (2 * _TOP[fmt.name])
    live = spread > 0
    zeroed = live & (level == 0)
    least = _scales(groups, np.full_like(bits, _LEAST[fmt.name]), parts, fmt)
    low_end = (bits <= _LEAST[fmt.name]) | (bits == _ZEROS[fmt.name])
    beyond = low_end & (spread < _TOO_LITTLE[fmt.name] * least)
    if fmt.name == "nvfp4":
        beyond |= (bits == _E4M3_MOST) & (spread > _TOO_MUCH * scale)
    for column, which in enumerate((zeroed, live & beyond & ~zeroed & ~infinite, infinite & ~zeroed)):
        counts[:, column] += np.bincount(groups[0][which], minlength=len(counts))


def _largest_level(groups: Groups, parts: Mapping[str, Array], fmt: Format, packed: Array) -> Array:
    """[n] float64, the largest of a group's values in units of its scale."""
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    if fmt.name != "int4":
        largest: Array = _LEVELS[codes].max(-1)
        return largest
    largest = np.abs(codes.astype(np.int16) - _zero_codes(groups, parts, fmt)[:, None]).max(-1).astype(np.float64)
    return largest


def _zero_codes(groups: Groups, parts: Mapping[str, Array], fmt: Format) -> Array:
    """[n] int16, int4's code of zero."""
    expert, row, group = groups
    if fmt.symmetric:
        return np.full(len(expert), 8, np.int16)
    word = parts["zero_point"].view(np.uint32)[expert, row // 8, group]
    code: Array = (word >> (4 * (row % 8)).astype(np.uint32) & 15).astype(np.int16)
    return code


def _scales(groups: Groups, bits: Array, parts: Mapping[str, Array], fmt: Format) -> Array:
    """[n] float64, the magnitude of stored scales."""
    if fmt.name == "int4":
        return _bf16(bits)
    if fmt.name == "mxfp4":
        return np.ldexp(1.0, bits.astype(np.int32) - 127)
    scale: Array = E4M3_VALUES[bits] / parts["global_scale"].ravel().astype(np.float64)[groups[0]]
    return scale


def _rounded(values: Array) -> Array:
    """float64 of the nearest bf16 values, by way of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return _bf16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def _bf16(bits: Array) -> Array:
    """float64 of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
