"""One stack of experts, one projection, one recipe → stored parts: search, GPTQ, refinement, and what they cost.

Key idea: a method is a sequence of choices on the same weights and the same Gram matrix; each step starts from what the
one before left, and the losses are all of one kind, tr(D H Dᵀ) / tr(W H Wᵀ), "relMSE".
Shapes: E experts, O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimoquant.quant.engine_torch import decode, encode, pack_nibbles
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import gptq
from mimoquant.quant.grid import Grid
from mimoquant.quant.method import Method
from mimoquant.quant.refine import refine

_UNUSED = 1e-6  # importance of an input that no token used, where 1 is the mean


@dataclass(frozen=True)
class Encoded:
    """Parts as stored, values as an engine reads them (bf16 [E, O, I]), and GPTQ's fallbacks."""

    parts: dict[str, Tensor]
    values: Tensor
    damped: int = 0
    rounded: int = 0


def encode_with(
    weight_EOI: Tensor, gram_EII: Tensor, fmt: Format, method: Method, global_scale_E: Tensor | None
) -> Encoded:
    """Quantize a stack (bf16 or float32) for inputs with the given Gram matrices (float32)."""
    weight = weight_EOI.to(torch.float32)
    importance = _importance(gram_EII) if method.search == "gram" else None
    parts = _searched(weight, fmt, method, global_scale_E, importance)
    damped = rounded = 0
    if method.gptq:
        result = gptq(weight, gram_EII, Grid.of(parts, fmt), fmt, method.damp)
        codes, damped, rounded = result.codes, result.damped, result.rounded
        if method.refine:
            if damped or rounded:  # a zero matrix leaves an expert as it is; a loss without a bottom would ruin it
                gram_EII = torch.where(result.troubled[:, None, None], 0.0, gram_EII)
            parts, codes = refine(weight, gram_EII, parts, codes, fmt, method.refine)
        parts = parts | {"codes": pack_nibbles(codes)}
    return Encoded(parts, decode(parts, fmt).to(torch.bfloat16), damped, rounded)


def _searched(
    weight: Tensor, fmt: Format, method: Method, global_scale: Tensor | None, importance: Tensor | None
) -> dict[str, Tensor]:
    """`encode`, one expert after the other on a CPU, where a matrix stays in cache over the candidates."""
    signed = method.signed and fmt.name == "int4" and fmt.symmetric
    step = len(weight) if weight.is_cuda else 1
    chunks = [
        encode(weight[i : i + step], fmt, method.search, None if global_scale is None else global_scale[i : i + step],
               None if importance is None else importance[i : i + step], signed=signed, every=method.every)
        for i in range(0, len(weight), step)
    ]  # fmt: skip
    return {part: torch.cat([chunk[part] for chunk in chunks]) for part in chunks[0]}


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


def energy(weight_EOI: Tensor, gram_EII: Tensor) -> Tensor:
    """[E] float32: tr(W H Wᵀ), with products of bfloat16 and sums of float32, which is plenty for a report."""
    rough = weight_EOI.to(torch.bfloat16)
    if rough.is_cuda:
        pushed = torch.bmm(rough, gram_EII.to(torch.bfloat16), out_dtype=torch.float32)
    else:
        pushed = rough.to(torch.float32) @ gram_EII
    return (pushed * rough).sum((-2, -1))
