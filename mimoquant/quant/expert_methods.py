"""One stack of experts, one projection, one recipe → stored parts: search, rounding, refinement, and what they cost.

Key idea: a method is a sequence of choices on the same weights and the same Gram matrix; each step starts from what the
one before left, and the losses are all of one kind, tr(D H Dᵀ) / tr(W H Wᵀ), "relMSE".
Shapes: E experts, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mimoquant.quant.descent import descend
from mimoquant.quant.engine_torch import (
    amax,
    decode,
    encode,
    nvfp4_global_scale,
    pack_nibbles,
    stored_parts,
    to_numpy,
)
from mimoquant.quant.formats import Format, multipliers
from mimoquant.quant.gptq import Factor, GptqResult, begun_factor, gptq
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels.triton_modules import triton_kernels
from mimoquant.quant.method import Method
from mimoquant.quant.order import cuda_passes, falling, turned
from mimoquant.quant.refine import refine
from mimoquant.quant.refit import can_fit, refit
from mimoquant.quant.stack import Stack
from mimoquant.quant.two_sided import two_sided

_UNUSED = 1e-6  # importance of an input that no token used, where 1 is the mean


@dataclass(frozen=True)
class Encoded:
    """Parts as stored, values as an engine reads them (bf16 [E, O, I]), and GPTQ's fallbacks."""

    parts: dict[str, Tensor]
    values: Tensor
    damped: int = 0
    rounded: int = 0


def encode_with(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    fmt: Format,
    method: Method,
    global_scale_E: Tensor | None,
    metric_EOO: Tensor | None = None,
) -> Encoded:
    """Quantize a stack (bf16) for inputs with the given Gram matrices (float32). Raises TypeError for other dtypes.

    Args:
        metric_EOO: what the loss feels of the outputs (`output_metric`, float32). With it codes are chosen from both
            sides, and `method.refine` are rounds of descent afterwards, each with int4 scales fitted anew; scales that
            can move are first refined as often for outputs that count alike. Without it all outputs count alike.
    """
    if weight_EOI.dtype != torch.bfloat16:
        raise TypeError(f"weights are bfloat16, these are {weight_EOI.dtype}")
    for_outputs = method.gptq and (metric_EOO is None or (method.refine > 0 and fmt.scales_move))
    factor = begun_factor(gram_EII, falling(gram_EII), method.damp) if for_outputs else None  # beside the search
    importance = _importance(gram_EII) if method.search == "gram" else None
    parts = _searched(weight_EOI, fmt, method, global_scale_E, importance)
    if not method.gptq:
        return Encoded(parts, as_read(parts, fmt))
    if factor:
        parts, result = _for_outputs(weight_EOI, gram_EII, parts, fmt, method, factor)
    if metric_EOO is not None:
        parts, result = _for_loss(weight_EOI, (gram_EII, metric_EOO), parts, fmt, method)
    parts = parts | {"codes": _packed(result.codes)}
    return Encoded(parts, as_read(parts, fmt), result.damped, result.rounded)


def joined(some: Sequence[Encoded]) -> Encoded:
    """Consecutive experts' as one stack."""
    if len(some) == 1:
        return some[0]
    parts = {name: torch.cat([one.parts[name] for one in some]) for name in some[0].parts}
    values = torch.cat([one.values for one in some])
    return Encoded(parts, values, sum(one.damped for one in some), sum(one.rounded for one in some))


def as_read(parts: dict[str, Tensor], fmt: Format) -> Tensor:
    """The values of stored parts as an engine reads them: bf16 [E, O, I]."""
    kernels = cuda_passes(parts["codes"])
    if kernels is None or not fmt.symmetric or "multiplier" in parts:
        return decode(parts, fmt).to(torch.bfloat16)
    values: Tensor = kernels.decoded(parts, fmt)
    return values


def _packed(codes_EOI: Tensor) -> Tensor:
    """As stored. The column loops leave them column by column."""
    kernels = cuda_passes(codes_EOI)
    if kernels is None or not codes_EOI.mT.is_contiguous():
        return pack_nibbles(codes_EOI.contiguous())
    pairs: Tensor = kernels.packed(codes_EOI.mT)
    return pairs


def global_scale(weight_EOI: Tensor, search: str, fmt: Format) -> Tensor | None:
    """What `encode_with` takes of a stack, [E]; only nvfp4 has one."""
    return nvfp4_global_scale(amax(weight_EOI), search, fmt) if fmt.name == "nvfp4" else None


def _for_outputs(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    parts: dict[str, Tensor],
    fmt: Format,
    method: Method,
    factor: Callable[[], Factor],
) -> tuple[dict[str, Tensor], GptqResult]:
    """Scales and codes under tr(D H Dᵀ). `factor`: see `gptq`."""
    weight = turned(weight_EOI)  # columns come first
    weight = (weight if weight.is_cuda else weight.to(torch.float32)).mT
    result = gptq(weight, gram_EII, Grid.of(parts, fmt), fmt, method.damp, factor)
    if not method.refine:
        return parts, result
    parts, codes = refine(weight, _trusted(gram_EII, result), parts, result.codes, fmt, method.refine, result.left)
    return parts, replace(result, codes=codes, left=None)


def _for_loss(
    weight_EOI: Tensor, both: tuple[Tensor, Tensor], parts: dict[str, Tensor], fmt: Format, method: Method
) -> tuple[dict[str, Tensor], GptqResult]:
    """Codes under tr(F D H Dᵀ), on the scales that `parts` have; then rounds of better scales and better codes.
    `both`: H and F."""
    weight, (gram, metric) = weight_EOI.to(torch.float32), both
    result = two_sided(weight, gram, metric, Grid.of(parts, fmt), fmt, method.damp)
    if not method.refine:
        return parts, result
    codes, gram = result.codes, _trusted(gram, result)
    for rounds in [1] * method.refine if can_fit(fmt) else [method.refine]:
        parts = refit(weight, gram, metric, parts, codes, fmt)
        codes = descend(weight, gram, metric, Grid.of(parts, fmt), codes, fmt, rounds)
    return parts, replace(result, codes=codes)


def _trusted(gram_EII: Tensor, result: GptqResult) -> Tensor:
    """Zero matrices leave experts in trouble as they are; a loss without a bottom would ruin them."""
    if not (result.damped or result.rounded):
        return gram_EII
    return torch.where(result.troubled[:, None, None], 0.0, gram_EII)


def _searched(
    weight: Tensor, fmt: Format, method: Method, global_scale: Tensor | None, importance: Tensor | None
) -> dict[str, Tensor]:
    """`engine_torch.encode`, compiled where there is a compiler for the device; the bytes are the same."""
    signed = method.signed and fmt.symmetric
    tried = multipliers(fmt.name, method.search, signed=signed, every=method.every)
    if weight.is_cuda:
        kernels = triton_kernels("encode_cuda")
        if kernels is None:
            return encode(weight, fmt, method.search, global_scale, importance, signed=signed, every=method.every)
        parts: dict[str, Tensor] = kernels.encode(weight, None, fmt, tried, global_scale, importance)[0]
        return parts
    scale = None if global_scale is None or fmt.name != "nvfp4" else global_scale.numpy()
    weigh = None if importance is None else importance.numpy()
    stack = Stack(to_numpy(weight), None)
    arrays = _cpu_engine(torch.get_num_threads()).encode_weighted(stack, fmt, tried, scale, weigh)
    return stored_parts(arrays, fmt, weight.device)


@cache
def _cpu_engine(threads: int) -> Any:
    from mimoquant.quant.engine_cpu import CpuEngine  # no compiler for CPUs is needed where a GPU does the work

    return CpuEngine(threads)


def _importance(gram_EII: Tensor) -> Tensor:
    """[E, I] float32: the Gram diagonal over its mean. Unused inputs count a little, so that a group of them still has
    its best plain scale; where the diagonal says nothing, all inputs count the same.
    """
    diagonal = torch.diagonal(gram_EII, dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    usable = (mean > 0) & torch.isfinite(diagonal).all(-1, keepdim=True) & (diagonal >= 0).all(-1, keepdim=True)
    return torch.where(usable, (diagonal / mean).clamp(min=_UNUSED), 1.0)


def loss(weight_EOI: Tensor, values_EOI: Tensor, gram_EII: Tensor) -> Tensor:
    """[E] float32: energy of the output error, tr(D H Dᵀ)."""
    return energy(values_EOI.to(torch.float32) - weight_EOI.to(torch.float32), gram_EII)


def energy(weight_EOI: Tensor, gram_EII: Tensor, metric_EOO: Tensor | None = None) -> Tensor:
    """[E] float32: tr(W H Wᵀ), or tr(F W H Wᵀ) under a metric of the outputs; with products of bfloat16 and sums of
    float32, which is plenty for a report."""
    rough = weight_EOI.to(torch.bfloat16)
    if rough.is_cuda:
        pushed = torch.bmm(rough, gram_EII.to(torch.bfloat16), out_dtype=torch.float32)
        felt = None if metric_EOO is None else torch.bmm(metric_EOO.to(rough.dtype), rough, out_dtype=torch.float32)
    else:
        wide = rough.to(torch.float32)
        pushed, felt = wide @ gram_EII, None if metric_EOO is None else metric_EOO @ wide
    return (pushed * (rough if felt is None else felt)).sum((-2, -1))
