"""How kernels round what goes into a matrix product, and what goes into a key-value cache.

Key idea: every rounding cuts the last dimension into blocks, gives a block one scale from its largest magnitude, and
puts the elements on the grid of E4M3 or E2M1, to nearest, ties to even. The order of the float32 operations is that of
the kernels, since a block scale that is one unit off moves codes. Each `quantize_*` returns grid values and scales;
`Blocks.values` is what the product sees.

    NVFP4   blocks of 16, E4M3 scales under a global scale (a divisor: 2688 / amax; 1.0 is amax 2688)
    MXFP8   blocks of 32, E8M0 scales, E4M3 elements; exponents rounded up, so that nothing saturates
    MXFP4   blocks of 32, E8M0 scales, E2M1 elements; exponents as compressed-tensors chooses them for weights
    FP8     groups of 128, float32 scales, or powers of two ("UE8M0", DeepGEMM on Blackwell), E4M3 elements
    FP8 KV  E4M3 under one scale

Widths that are no multiple of a block end in a shorter one. FlashInfer's MXFP4 rounds exponents up instead; vLLM's
kernel for W4A4 experts, the one that serves such checkpoints, does as stated here.

Left out: `rcp.approx` of the NVFP4 kernels, whose last bit is the hardware's (vLLM's own reference divides, too);
rounding to bf16 first, which is the caller's; queries, which some FP8 attention kernels round as well.

Sources: vLLM 0.33 (`nvfp4_emulation_utils.py`, `mxfp8_utils.py`, `nvfp4_utils.cuh`, `mxfp4_experts_quant.cu`,
`per_token_group_quant.cu`), FlashInfer at fb28d72 (`quantization_utils.cuh`), ModelOpt 0.47 (`qtensor/`). Tests hold
these functions to vLLM's and ModelOpt's, bit by bit, and FP8 to what was captured inside vLLM 0.33 on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.quant.formats import MXFP4_ROUND_UP

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_UNIT = 1.0  # the input global scale of NVIDIA's own recipes: amax 2688 = 448 * 6
FP8_GROUP = 128
_EXPONENT = 0x7F800000  # the bits of float32 that say which power of two it is
_FP8_EPS = 1e-10  # the least amax of a group, and the least scale that becomes a power of two


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows [..., I] as grid values `elements` [..., G, b] and `scales` [..., G] (float32): blocks of b along I.

    `divisor`: what the scales are divided by (NVFP4's global scale), broadcast over `scales`.
    """

    elements: Tensor
    scales: Tensor
    width: int
    divisor: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """What the product sees, [..., I] float32."""
        scales = self.scales if self.divisor is None else self.scales / self.divisor
        return (self.elements * scales[..., None]).flatten(-2)[..., : self.width]


def quantize_nvfp4(rows: Tensor, global_scale: Tensor | float = NVFP4_UNIT) -> Blocks:
    """Blocks of 16 under E4M3 scales.

    Args:
        rows: [..., I] float32.
        global_scale: float32 divisor, 2688 over the largest input; one, or broadcast against [..., 1].
    A block whose scale underflows E4M3 is 0; one beyond its range saturates at 448 * 6 / global_scale.
    """
    grouped = _grouped(rows, 16)
    divisor = torch.as_tensor(global_scale, dtype=torch.float32, device=rows.device)
    wanted = divisor * (grouped.abs().amax(-1) * (1.0 / E2M1_MAX))
    scales = _e4m3(wanted)
    gain = torch.where(scales == 0, 0.0, 1.0 / (scales * (1.0 / divisor)))
    return Blocks(_e2m1(grouped * gain[..., None]), scales, rows.shape[-1], divisor)


def quantize_mxfp4(rows: Tensor) -> Blocks:
    """Blocks of 32 under powers of two: a quarter of the one that amax rounds to, up from mantissa 1.75 on."""
    grouped = _grouped(rows, 32)
    rounded = grouped.abs().amax(-1).contiguous().view(torch.int32) + MXFP4_ROUND_UP
    biased = ((rounded >> 23) - 2).clamp(0, 254)
    scales = torch.ldexp(torch.ones_like(rounded, dtype=torch.float32), biased - 127)
    elements = _e2m1(grouped / scales[..., None])
    return Blocks(torch.where(biased[..., None] == 0, 0.0, elements), scales, rows.shape[-1])


def quantize_mxfp8(rows: Tensor) -> Blocks:
    """Blocks of 32 under powers of two, the least that does not saturate E4M3."""
    grouped = _grouped(rows, 32)
    scales = _power_of_two(_divided(grouped.abs().amax(-1), E4M3_MAX))
    return Blocks(_e4m3(grouped / scales[..., None]), scales, rows.shape[-1])


def quantize_fp8(rows: Tensor, *, power_of_two: bool = False) -> Blocks:
    """Groups of 128 a row under float32 scales, amax / 448; `power_of_two`: rounded up to one.

    vLLM's kernel multiplies by the reciprocal: seen on an H200, where a division gives 1 code of 2,000 otherwise.
    """
    grouped = _grouped(rows, FP8_GROUP)
    scales = _divided(grouped.abs().amax(-1).clamp(min=_FP8_EPS), E4M3_MAX)
    if power_of_two:
        scales = _power_of_two(scales.clamp(min=_FP8_EPS))
    return Blocks(_e4m3(grouped * (1.0 / scales)[..., None]), scales, rows.shape[-1])


def round_kv_fp8(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Keys or values as an E4M3 cache returns them; `scale`: the checkpoint's k_scale or v_scale."""
    return _e4m3(values / scale if isinstance(scale, Tensor) else _divided(values, scale)) * scale


def _divided(values: Tensor, by: float) -> Tensor:
    """By a tensor on the device: by a number torch multiplies on CUDA with its reciprocal, one bit off at times."""
    return values / values.new_full((), by)


def _grouped(rows: Tensor, size: int) -> Tensor:
    """[..., I] as [..., G, size], filled up with zeros."""
    missing = -rows.shape[-1] % size
    return (F.pad(rows, (0, missing)) if missing else rows).reshape(*rows.shape[:-1], -1, size)


def _e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 values, saturated, in float32."""
    return _on_grid(values, E4M3_MAX, digits=3, least=2.0**-9)


def _e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 values, saturated, with their signs."""
    return _on_grid(values, E2M1_MAX, digits=1, least=0.5)


def _on_grid(values: Tensor, most: float, *, digits: int, least: float) -> Tensor:
    """float32 `values` with so many binary digits behind the first, in steps of at least `least`; ties to even.

    A step is the power of two at or below a magnitude, which float32's bits have, times 2^-digits. That is a few passes
    in place, where a dtype's own conversion back takes longer than all of them.
    """
    values = values.clamp(-most, most)
    powers = values.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    steps = powers.mul_(2.0**-digits).clamp_(min=least)
    return values.div_(steps).round_().mul_(steps)


def _power_of_two(scales: Tensor) -> Tensor:
    """The least powers of two that are not below `scales`, in E8M0's range (at least 2^-127).

    By the bits of float32: a logarithm would round numbers just above a power of two down to it.
    """
    mantissa, exponent = torch.frexp(scales)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(scales), torch.where(scales == 0, -127, exponent))
