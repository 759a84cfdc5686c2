"""The arithmetic in plain torch: any device, whole stacks at once. The reference for `engine_cpu`, and the GPU path.

Key idea: every operation is one IEEE float32 operation per element, divisors are tensors (torch turns a division by a
Python number into a multiplication on CUDA), and sums are taken by halving, so the order is fixed: CPU and GPU agree to
the bit. Shapes: E experts, O out_features, I in_features, G groups of a row, S group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.quant.formats import (
    E2M1_VALUES,
    INT4_ZERO_SCALE,
    MXFP4_OFFSETS,
    MXFP4_ROUND_UP,
    NVFP4_RANGE,
    NVFP4_SMALLEST_SCALE,
    NVFP4_ZERO_SCALE,
    Format,
    multipliers,
)
from mimoquant.quant.kernels.rounding import halving_sum, pack_zero_points, round_e2m1
from mimoquant.quant.kernels.triton_modules import triton_kernels
from mimoquant.quant.order import cuda_passes
from mimoquant.quant.stack import NonFiniteError, Stack

Array = npt.NDArray[Any]


def dequantize_fp8(values: Tensor, block_scales: Tensor, scale_row: Tensor | None = None, block: int = 128) -> Tensor:
    """FP8 blocks as bf16: float32 product, then one rounding.

    Args:
        values: [..., O, I] float8_e4m3fn.
        block_scales: [..., R, ceil(I / block)] float32.
        scale_row: [O] scale row of each weight row; None for plain blocks of `block` rows.
    """
    rows, columns = values.shape[-2:]
    if scale_row is None:
        scale_row = torch.arange(rows, device=values.device) // block
    column = torch.arange(columns, device=values.device) // block
    return (values.to(torch.float32) * block_scales[..., scale_row, :][..., column]).to(torch.bfloat16)


def amax(weight_EOI: Tensor) -> Tensor:
    """[E] float32, the largest |value| of each expert. NaN and Inf propagate."""
    if weight_EOI.is_cuda:  # in one pass
        largest: Tensor = torch.linalg.vector_norm(weight_EOI, float("inf"), dim=(-2, -1))
        return largest.to(torch.float32)
    return weight_EOI.abs().amax(dim=(-2, -1)).to(torch.float32)


def nvfp4_global_scale(amax_E: Tensor, search: str, fmt: Format) -> Tensor:
    """[E] float32 divisor that maps `amax_E` into E4M3 x E2M1; 1 where that overflows (an all-zero tensor).

    With `fmt.pow2_global` it is rounded down to a power of two, which leaves the largest block scale in the range.
    """
    numerator = torch.full_like(amax_E, NVFP4_RANGE[search] * 6.0)
    scale = numerator / amax_E.clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(torch.isinf(scale), torch.ones_like(scale), scale)
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32) if fmt.pow2_global else scale


def encode(
    weight_EOI: Tensor,
    fmt: Format,
    search: str = "absmax",
    global_scale_E: Tensor | None = None,
    importance_EI: Tensor | None = None,
    *,
    signed: bool = False,
    every: int = 1,
) -> dict[str, Tensor]:
    """Quantize a stack of bf16 or float32 weights [E, O, I] to the parts of `fmt` (see `Format.parts`), with leading E.

    Args:
        importance_EI: weight of each column's squared error in the search; the Gram diagonal, for search "gram".
        signed, every: see `formats.multipliers`.

    Scales come as bf16 (int4), uint8 E8M0 (mxfp4) or float8_e4m3fn (nvfp4). Non-finite weights are the caller's to
    refuse (`amax`). Raises ValueError for a shape the format cannot hold.
    """
    experts, out_features, in_features = weight_EOI.shape
    problem = fmt.misfit(out_features, in_features)
    if problem:
        raise ValueError(problem)
    grouped = weight_EOI.to(torch.float32).reshape(experts, out_features, -1, fmt.group_size)
    weigh = None if importance_EI is None else importance_EI.reshape(experts, 1, -1, fmt.group_size)
    tried = multipliers(fmt.name, search, signed=signed and fmt.symmetric, every=every)[1:]
    if fmt.name == "int4":
        codes, parts = _encode_int4(grouped, fmt, tried, weigh)
    elif fmt.name == "mxfp4":
        codes, parts = _encode_mxfp4(grouped, search, weigh)
    else:
        assert global_scale_E is not None
        codes, parts = _encode_nvfp4(grouped, tried, global_scale_E, weigh)
    return {"codes": pack_nibbles(codes.reshape(experts, out_features, in_features)), **parts}


def decode(parts: dict[str, Tensor], fmt: Format) -> Tensor:
    """Parts [E, ...] back to float32 values [E, O, I]; exact, before any rounding to bf16."""
    codes = unpack_nibbles(parts["codes"])
    experts, out_features, in_features = codes.shape
    codes = codes.reshape(experts, out_features, -1, fmt.group_size)
    if fmt.name == "int4":
        level = codes.to(torch.float32) - 8
        if not fmt.symmetric:
            level = level - unpack_zero_points(parts["zero_point"]).to(torch.float32)[..., None]
        values = level * parts["scale"].to(torch.float32)[..., None]
    else:
        table = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), device=codes.device)
        scale = exp2(parts["scale"]) if fmt.name == "mxfp4" else parts["scale"].to(torch.float32)
        if "multiplier" in parts:  # what others wrote; ours is a power of two, whose reciprocal is exact
            scale = scale * parts["multiplier"].reshape(-1, 1, 1)
        elif fmt.name == "nvfp4":
            scale = scale / parts["global_scale"].reshape(-1, 1, 1)
        values = table[codes.long()] * scale[..., None]
    return values.reshape(experts, out_features, in_features)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., I] in 0..15 → [..., I/2], even columns in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def unpack_zero_points(packed: Tensor) -> Tensor:
    """The inverse of `pack_zero_points`, int8."""
    shifts = torch.arange(0, 32, 4, device=packed.device).reshape(1, 1, 8, 1)
    nibbles = (packed[:, :, None, :].to(torch.int64) >> shifts) & 15
    return (nibbles - 8).to(torch.int8).flatten(1, 2)


def _divisor(value: float, like: Tensor) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=like.device)


def _round_bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def _int4_scale(spread: Tensor, levels: float) -> Tensor:
    scale = _round_bf16(spread / _divisor(levels, spread))
    return torch.where(scale == 0, _divisor(INT4_ZERO_SCALE, scale), scale)


def _int4_candidate(grouped: Tensor, low: Tensor, high: Tensor, c: float, symmetric: bool) -> tuple[Tensor, ...]:
    """scale, zero point and levels (float, -8..7) for the range shrunk by |c|; the scale has the sign of `c`."""
    multiplier = _divisor(c, low)
    if symmetric:
        scale = _int4_scale(torch.maximum(-low, high) * multiplier, 7.5)
        zero = torch.zeros_like(scale)
    else:
        scale = _int4_scale((high - low) * multiplier, 15.0)
        zero = (-8.0 - (low * multiplier) / scale).clamp(-8.0, 7.0).round()
    level = (grouped / scale[..., None] + zero[..., None]).clamp(-8.0, 7.0).round()
    return scale, zero, level


def _encode_int4(
    grouped: Tensor, fmt: Format, tried: Sequence[float], weigh: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
    best = _int4_candidate(grouped, low, high, 1.0, fmt.symmetric)
    best_error = _int4_error(grouped, best, weigh)
    for c in tried:
        candidate = _int4_candidate(grouped, low, high, c, fmt.symmetric)
        error = _int4_error(grouped, candidate, weigh)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = tuple(
            torch.where(better[..., None] if new.ndim > better.ndim else better, new, old)
            for new, old in zip(candidate, best, strict=True)
        )
    scale, zero, level = best
    parts = {"scale": scale.to(torch.bfloat16)}
    if not fmt.symmetric:
        parts["zero_point"] = pack_zero_points(zero)
    return (level + 8.0).to(torch.uint8), parts


def _int4_error(grouped: Tensor, candidate: tuple[Tensor, ...], weigh: Tensor | None) -> Tensor:
    scale, zero, level = candidate
    return _squared((level - zero[..., None]) * scale[..., None] - grouped, weigh)


def _squared(difference: Tensor, weigh: Tensor | None) -> Tensor:
    squares = difference * difference
    return halving_sum(squares if weigh is None else squares * weigh)


def e2m1_codes(grouped: Tensor, rounded: Tensor) -> Tensor:
    """4-bit codes from the weights (a negative one that rounds to zero keeps its sign) and their rounded magnitudes."""
    small = (rounded * 2.0).to(torch.uint8)  # 0..4 are the codes of 0, .5, 1, 1.5, 2
    code = torch.where(rounded < 2.5, small, torch.where(rounded < 3.5, 5, torch.where(rounded < 5.0, 6, 7)))
    return (code + (grouped < 0) * 8).to(torch.uint8)


def exp2(biased: Tensor) -> Tensor:
    """2^(biased - 127) in float32 for uint8 exponents 0..254 (0 is the subnormal 2^-127)."""
    bits = biased.to(torch.int32) << 23
    return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)


def _mxfp4_exponents(amax_EOG: Tensor) -> tuple[Tensor, Tensor]:
    """The plain (rounded) and the floored biased exponent, as int32, not yet clamped."""
    bits = amax_EOG.contiguous().view(torch.int32)
    return ((bits + MXFP4_ROUND_UP) >> 23) - 2, (bits >> 23) - 2


def _mxfp4_candidate(grouped: Tensor, biased: Tensor) -> tuple[Tensor, Tensor]:
    biased = biased.clamp(0, 254)
    scale = exp2(biased)[..., None]
    return biased, round_e2m1(grouped.abs() / scale)


def _fp4_error(grouped: Tensor, rounded: Tensor, scale: Tensor, weigh: Tensor | None) -> Tensor:
    return _squared(rounded * scale[..., None] - grouped.abs(), weigh)


def _encode_mxfp4(grouped: Tensor, search: str, weigh: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    plain, floored = _mxfp4_exponents(grouped.abs().amax(-1))
    biased, rounded = _mxfp4_candidate(grouped, plain)
    if search != "absmax":
        best_error = _fp4_error(grouped, rounded, exp2(biased), weigh)
        for offset in MXFP4_OFFSETS:
            other, other_rounded = _mxfp4_candidate(grouped, floored + offset)
            error = _fp4_error(grouped, other_rounded, exp2(other), weigh)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            biased = torch.where(better, other, biased)
            rounded = torch.where(better[..., None], other_rounded, rounded)
    return e2m1_codes(grouped, rounded), {"scale": biased.to(torch.uint8)}


def _nvfp4_candidate(
    grouped: Tensor, wanted: Tensor, global_scale: Tensor, zero_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Stored E4M3 scale (as float32), effective scale and rounded magnitudes for the wanted block scale."""
    stored = wanted.clamp(max=448.0).to(torch.float8_e4m3fn).to(torch.float32)
    stored = torch.where(stored == 0, _divisor(zero_scale, stored), stored)
    effective = stored / global_scale
    return stored, effective, round_e2m1(grouped.abs() / effective[..., None])


def _encode_nvfp4(
    grouped: Tensor, tried: Sequence[float], global_scale_E: Tensor, weigh: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    global_scale = global_scale_E.to(torch.float32).reshape(-1, 1, 1)
    base = grouped.abs().amax(-1) / _divisor(6.0, grouped) * global_scale
    stored, effective, rounded = _nvfp4_candidate(grouped, base, global_scale, NVFP4_ZERO_SCALE)
    best_error = _fp4_error(grouped, rounded, effective, weigh)
    for c in tried:
        other, other_effective, other_rounded = _nvfp4_candidate(
            grouped, base * _divisor(c, base), global_scale, NVFP4_SMALLEST_SCALE
        )
        error = _fp4_error(grouped, other_rounded, other_effective, weigh)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        stored = torch.where(better, other, stored)
        rounded = torch.where(better[..., None], other_rounded, rounded)
    parts = {"scale": stored.to(torch.float8_e4m3fn), "global_scale": global_scale_E.to(torch.float32).reshape(-1, 1)}
    return e2m1_codes(grouped, rounded), parts


class Sent(NamedTuple):
    """A `Stack` on a CUDA device already."""

    values: Tensor
    scales: Tensor | None


class TorchEngine:
    """The same work as `engine_cpu.CpuEngine` on a torch device; numpy arrays in and out."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.name = device

    def close(self) -> None:
        return None

    def encode(self, stacks: dict[str, Stack], fmt: Format, search: str) -> dict[str, dict[str, Array]]:
        """See `engine_cpu.CpuEngine.encode`."""
        kernels = triton_kernels("encode_cuda") if self.device.type == "cuda" else None
        if kernels is not None and fmt.name != "nvfp4":  # whose global scale needs all weights first
            return {p: self._encode_bytes(kernels, p, stack, fmt, search) for p, stack in stacks.items()}
        weights = {projection: self.bf16(stack) for projection, stack in stacks.items()}
        largest = {projection: amax(weight) for projection, weight in weights.items()}
        for projection, values in largest.items():
            bad = torch.nonzero(~torch.isfinite(values))
            if len(bad):
                raise NonFiniteError(projection, int(bad[0, 0]))
        shared = torch.maximum(largest["gate"], largest["up"])
        results = {}
        for projection, weight in weights.items():
            scale = nvfp4_global_scale(shared if projection in ("gate", "up") else largest[projection], search, fmt)
            if kernels is None:
                parts = encode(weight, fmt, search, scale)
            else:
                parts = kernels.encode(weight, None, fmt, multipliers(fmt.name, search), scale, None)[0]
            bad = torch.nonzero(~torch.isfinite(parts["scale"].to(torch.float32)))  # an asymmetric range can overflow
            if len(bad):
                raise NonFiniteError(projection, int(bad[0, 0]))
            results[projection] = {part: to_numpy(values) for part, values in parts.items()}
        return results

    def _encode_bytes(self, kernels: Any, projection: str, stack: Stack, fmt: Format, search: str) -> dict[str, Array]:
        """One stack in one pass over its bytes as stored."""
        values = self._there(stack.values)
        if stack.scales is None:
            values, scales = values.view(torch.bfloat16), None
        else:
            scales = self._there(stack.scales)
        parts, bad = kernels.encode(values, scales, fmt, multipliers(fmt.name, search), None, None)
        results = {part: to_numpy(held) for part, held in parts.items()}
        spoiled = torch.nonzero(bad)
        if len(spoiled):
            raise NonFiniteError(projection, int(spoiled[0, 0]))
        return results

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Pinned where that helps: copies to a GPU then run at the speed of the bus, beside other work."""
        kind = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}[np.dtype(dtype).name]
        return torch.empty(shape, dtype=kind, pin_memory=self.device.type == "cuda").numpy()

    def _there(self, values: Array | Tensor) -> Tensor:
        if not isinstance(values, Tensor):
            return torch.from_numpy(values).to(self.device, non_blocking=True)
        values.record_stream(torch.cuda.current_stream(values.device))  # of another one, perhaps
        return values

    def dequantize(self, values: Array, block_scales: Array, scale_row: Array) -> Array:
        """See `engine_cpu.CpuEngine.dequantize`."""
        fp8, scales = torch.from_numpy(values).to(self.device), torch.from_numpy(block_scales).to(self.device)
        rows = torch.from_numpy(scale_row).to(self.device)
        out = dequantize_fp8(fp8.view(torch.float8_e4m3fn), scales, rows)
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError("", 0)
        return to_numpy(out)

    def bf16(self, stack: Stack | Sent) -> Tensor:
        """A stack's values [E, O, I] in bf16, on the device."""
        values = self._there(stack.values)
        if stack.scales is None:
            return values.view(torch.bfloat16)
        scales = self._there(stack.scales)
        if kernels := cuda_passes(values):
            compiled: Tensor = kernels.dequantize(values, scales)
            return compiled
        return dequantize_fp8(values.view(torch.float8_e4m3fn), scales)


def stored_parts(parts: dict[str, Array], fmt: Format, device: torch.device) -> dict[str, Tensor]:
    """What numpy read from disk, as `decode` takes it: the inverse of `to_numpy`."""
    held = {name: torch.from_numpy(values).to(device) for name, values in parts.items()}
    if fmt.name != "mxfp4":
        held["scale"] = held["scale"].view(torch.bfloat16 if fmt.name == "int4" else torch.float8_e4m3fn)
    return held


def to_numpy(values: Tensor) -> Array:
    """Any tensor as numpy, dtypes that numpy lacks as their bits. What comes from a GPU is in pinned memory."""
    held = on_host(values)
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()
    return as_numpy(held)


def on_host(values: Tensor) -> Tensor:
    """A contiguous tensor on the host; a GPU's in pinned memory, when the stream has come so far."""
    values = values.contiguous()
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def as_numpy(held: Tensor) -> Array:
    """A tensor on the host as numpy, dtypes that numpy lacks as their bits."""
    bits = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}.get(held.dtype)
    return (held.view(bits) if bits else held).numpy()
