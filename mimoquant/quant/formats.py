"""The 4-bit formats: what is stored, and the constants both engines share.

Key idea: a format is data. It says which parts a weight [out, in] is stored as; `engine_*` computes the parts and turns
them back into values; `container` gives them names on disk. Values on the grids:

    int4   (q - zero_point) * scale          q in -8..7, scale bf16, zero_point in -8..7 (asymmetric only)
    mxfp4  e2m1 * 2^(scale - 127)            block of 32, scale E8M0
    nvfp4  e2m1 * scale / global_scale       block of 16, scale E4M3, global_scale float32 (a divisor)

with e2m1 in +-{0, .5, 1, 1.5, 2, 3, 4, 6}. Codes are packed two a byte, the even column in the low nibble; int4 codes
are stored as q + 8.

At the edges, the same on every engine (tests/reliability/test_numerics.py): a group of zeros, of either sign, or of
an FP8 block whose scale is 0, gets the zero scale below (asymmetric int4: zero point -8) and codes of +0; so does a
group whose scale underflows. Saturated FP8 is a value as any other. A weight that is NaN or Inf, or becomes so when
multiplied by its block's scale (as 0 by Inf does), is refused by name. Where squared errors overflow (from 1e19 on) a
search keeps the plain scale. Not refused by engines though not representable: in MXFP4 1.75 * 2^127 and more, which is
rounded up to 2^128, and in NVFP4 with powers of two as global scales values near that. A run counts such groups, and
those whose scale underflows (`clamped`).

References: OCP Microscaling v1.0; NVIDIA NVFP4; compressed-tensors 0.19 (names, eps, rounding).
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZES = {"int4": (32, 64, 128), "mxfp4": (32,), "nvfp4": (16,)}
SEARCHES = ("absmax", "mse")

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0..7; 8..15 are the negatives

# A group of zeros gets the scale that compressed-tensors gives it.
INT4_ZERO_SCALE = 2.0**-7
NVFP4_ZERO_SCALE = 0.125
# So does a group whose plain scale underflows E4M3, which makes its values 0; the search also tries the smallest one.
NVFP4_SMALLEST_SCALE = 2.0**-9

# Scale multipliers that the mse search tries, after 1.0 (a candidate must be strictly better to win, so a tie keeps
# the plain rounding). int4: 40 points in [.45, 1.05]. nvfp4: 49 points in [.6, 1.8] of the block scale.
INT4_MULTIPLIERS = (1.0, *(0.45 + 0.6 * i / 39 for i in range(40)))
NVFP4_MULTIPLIERS = (1.0, *(0.6 + 1.2 * i / 48 for i in range(49)))
# mxfp4: exponents relative to floor(log2 amax) - 2. The plain choice comes first (see `MXFP4_ROUND_UP`).
MXFP4_OFFSETS = (-1, 0, 1)

# The plain mxfp4 exponent rounds amax to a power of two, up from mantissa 1.75 on: adding this to the float32 bits of
# amax carries into the exponent exactly then (compressed-tensors' rule; OCP floors, ModelOpt takes the ceiling).
MXFP4_ROUND_UP = 0x200000

# The global scale maps the largest |weight| to e2m1's 6 times this E4M3 value. Plain: all of E4M3's range, as
# compressed-tensors. Search: 256 leaves room for block scales up to 1.75x, or multipliers above 1 would saturate.
NVFP4_RANGE = {"absmax": 448.0, "mse": 256.0, "gram": 256.0}


def multipliers(name: str, search: str, *, signed: bool = False, every: int = 1) -> tuple[float, ...]:
    """What a search tries, the plain choice first, and nothing else for "absmax". mxfp4 has offsets of the exponent.

    Args:
        signed: int4 only, also the negatives, which put -8 on the side with the larger weights.
        every: one in so many of what comes after the first; not of mxfp4's three.
    """
    if search == "absmax":
        return (1.0,)
    if name == "mxfp4":
        return (1.0, *MXFP4_OFFSETS)
    values = INT4_MULTIPLIERS if name == "int4" else NVFP4_MULTIPLIERS
    if signed and name == "int4":
        values += tuple(-c for c in values)
    return values[:1] + values[1::every]


@dataclass(frozen=True, slots=True)
class Format:
    """A 4-bit storage format. `group_size`: weights of a row that share a scale."""

    name: str
    group_size: int
    symmetric: bool = True
    pow2_global: bool = False  # nvfp4: global scales are powers of two, so that their reciprocals are exact too

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES.get(self.name, ()):
            raise ValueError(f"{self.name} has no group size {self.group_size}")

    @property
    def scales_move(self) -> bool:
        """Whether a refinement may choose other scales: not powers of two, nor such as have zero points beside them."""
        return self.name != "mxfp4" and self.symmetric

    @property
    def label(self) -> str:
        if self.name != "int4":
            return self.name
        return f"int4 g{self.group_size}" + ("" if self.symmetric else " asymmetric")

    def parts(self, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part name → (safetensors dtype, shape) for a weight [out_features, in_features]."""
        groups = in_features // self.group_size
        scale_dtype = {"int4": "BF16", "mxfp4": "U8", "nvfp4": "F8_E4M3"}[self.name]
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("U8", (out_features, in_features // 2)),
            "scale": (scale_dtype, (out_features, groups)),
        }
        if not self.symmetric:
            parts["zero_point"] = ("I32", (out_features // 8, groups))
        if self.name == "nvfp4":
            parts["global_scale"] = ("F32", (1,))
        return parts

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        if in_features % self.group_size:
            return f"group size {self.group_size} does not divide the width {in_features}"
        if out_features % 8:
            return f"{out_features} rows are no multiple of 8"
        return None


MXFP4 = Format("mxfp4", 32)
