"""What vLLM's kernels round, beside ours: FP8 codes captured inside the engine, and our forward with its bf16.

`compare_captured` holds inputs, codes and scales that `ask_engine.py` kept of vLLM 0.33's FP8 products against
`quant.activations`, bit for bit. `as_bf16` makes our forward round to bf16 wherever vLLM stores a tensor; it replaces
functions of `model.decoder_layer` while it lasts, which is right for a judge only: the program itself computes in
float32. Experts in FP8 take SiLU(gate) x up in float32, since vLLM's kernel for that rounds once, to FP8. Elsewhere
SiLU is bf16 before it meets up, cosines are, and the sum of experts; a norm rounds once. `ask_engine.Sums` saw norms,
rotations and SiLU x up so inside the engine, bit for bit.

Left out: the order of sums, attention's probabilities in bf16, the last bits of FP8 products on Hopper.
Sources: vLLM 0.33, `input_quant_fp8.py`, `experts/triton_moe.py`, `fused_silu_mul_block_quant.cu`, `mimo_v2.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mimoquant.evaluation import side_by_side
from mimoquant.model import decoder_layer, layer_stream
from mimoquant.model.attention import Heads
from mimoquant.model.decoder_layer import (
    AttentionWeights,
    DenseWeights,
    ExpertChunk,
    ForwardConfig,
    Group,
    LayerWeights,
    group_of_chunk,
)
from mimoquant.model.served_rounding import NONE, UNROUNDED, LayerRounding, rounded
from mimoquant.quant.activations import quantize_fp8
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.stored import read_matrix, read_stack, scale_rows


def compare_captured(path: Path) -> dict[str, Any]:
    """By kind of product: how many codes and scales are another's than ours. Its file has NAME.x, .q (bytes), .s."""
    held = load_file(path)
    found: dict[str, Any] = {}
    for name in sorted({key.rpartition(".")[0] for key in held}):
        kind = name.rpartition(".")[0]
        codes, scales = _ours(kind, held[f"{name}.x"])
        told = found.setdefault(kind, {"tensors": 0, "codes": 0, "codes_differ": 0, "scales": 0, "scales_differ": 0})
        told["tensors"] += 1
        for what, own, theirs in (("codes", codes, held[f"{name}.q"]), ("scales", scales, held[f"{name}.s"])):
            told[what] += theirs.numel()
            told[f"{what}_differ"] += int((own != theirs.reshape(own.shape)).sum())
        told["widths"] = sorted({*told.get("widths", ()), held[f"{name}.x"].shape[-1]})
    return found


def _ours(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes [rows, I] and scales [rows, groups]; `kind` "silu_mul": of SiLU(gate) x up, side by side in x."""
    rows = x.to(torch.float32)
    if kind == "silu_mul":
        gate, up = rows.chunk(2, -1)
        rows = gate * (1 / (1 + (-gate).exp())) * up
    blocks = quantize_fp8(rows)
    codes = blocks.elements.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)[..., : rows.shape[-1]]
    return codes, blocks.scales


def _product_in_float64(parts: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    [rows] = parts
    return (rows.double() @ weight.double().transpose(-1, -2)).to(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@contextlib.contextmanager
def exact_weights() -> Iterator[None]:
    """While this lasts, weights in FP8 are code times scale in float32, as FP8 products have them. Ours are that in
    bf16, what an engine without such products computes with."""
    tensor, stack = CheckpointWeights.tensor, CheckpointWeights._stack

    def widened(codes: Any, scales: Any, scale_row: Any) -> Tensor:
        values = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32)
        column = torch.arange(values.shape[-1]) // 128
        return values * torch.from_numpy(scales)[..., torch.as_tensor(scale_row), :][..., column]

    def exact(self: CheckpointWeights, name: str, dtype: torch.dtype | None = None) -> Tensor:
        weight = self._units[name]
        if weight.info.dtype != "F8_E4M3":
            return tensor(self, name, dtype)
        held = read_matrix(self.reader, weight)
        assert held.scales is not None
        codes, scales = held.values[0], held.scales[0]
        return widened(codes, scales, scale_rows(weight.role, len(codes), len(scales), self.layout.geometry))

    def exact_stack(self: CheckpointWeights, number: int, begin: int, end: int, projection: str) -> Tensor:
        weights = [self.layout.expert(number, expert, projection) for expert in range(begin, end)]
        if weights[0].info.dtype != "F8_E4M3":
            return stack(self, number, begin, end, projection)
        held = read_stack(self.reader, weights)
        assert held.scales is not None
        return widened(held.values, held.scales, np.arange(held.values.shape[1]) // 128)

    with (
        mock.patch.object(CheckpointWeights, "tensor", exact),
        mock.patch.object(CheckpointWeights, "_stack", exact_stack),
    ):
        yield


@contextlib.contextmanager
def as_bf16(*, in_float64: bool = False) -> Iterator[None]:
    """While this lasts, our forward holds tensors in bf16 where vLLM does, by round trips in float32.

    `in_float64`: sums of products too, so that the last bits differ: how far two right forwards are from each other.
    """
    plain = decoder_layer
    norm, rotate, heads = plain.rms_norm, plain.rotate, plain.attention_heads
    product = _product_in_float64 if in_float64 else plain.product
    summed = layer_stream.add_blocks

    def normed(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        return bf16(norm(hidden, weight, eps))

    def attention_block(
        hidden: Tensor, weights: LayerWeights, config: ForwardConfig, rounding: LayerRounding = UNROUNDED
    ) -> tuple[Tensor, Tensor]:
        hidden = bf16(hidden)
        attended = plain.attention(normed(hidden, weights.input_norm, config.eps), weights.attention, config, rounding)
        hidden = bf16(hidden + attended)
        return hidden, normed(hidden, weights.post_norm, config.eps)

    def attention_heads(hidden: Tensor, weights: AttentionWeights, config: ForwardConfig) -> Heads:
        made = heads(hidden, weights, config)
        return replace(made, value=bf16(made.value))

    def expert_outputs(tokens: Tensor, group: Group, chunk: ExpertChunk, rounding: LayerRounding = UNROUNDED) -> Tensor:
        gate, up, down = group_of_chunk(group, chunk)
        rows = tokens[group.rows]
        opened, up_rows = F.silu(bf16(product((rows,), gate))), bf16(product((rows,), up))
        if rounding.experts == NONE:
            inner = bf16(bf16(opened) * up_rows)
        else:  # a kernel that rounds once
            inner = rounded(opened * up_rows, rounding.experts, rounding.down_scale)
        return bf16(product((inner,), down) * group.gains[..., None])

    def add_group(out: Tensor, group: Group, outputs: Tensor) -> None:
        for slot, count in enumerate(group.counts):
            out.index_add_(0, group.rows[slot, :count], outputs[slot, :count])

    def dense_mlp(hidden: Tensor, weights: DenseWeights, rounding: str = NONE) -> Tensor:
        rows = rounded(bf16(hidden), rounding)
        inner = bf16(F.silu(bf16(product((rows,), weights.gate)))) * bf16(product((rows,), weights.up))
        return bf16(product((rounded(bf16(inner), rounding),), weights.down))

    def add_blocks(stream: layer_stream.Stream, blocks: list[layer_stream.Block]) -> None:
        summed(stream, [replace(block, out=bf16(block.out)) for block in blocks])

    def rounded_bf16(rows: Tensor, kind: str, scale: float = 1.0) -> Tensor:
        return rounded(bf16(rows), kind, scale)

    changed = {
        "product": lambda parts, weight: bf16(product(parts, weight)),
        "rotate": lambda heads, cos, sin: bf16(rotate(heads, bf16(cos), bf16(sin))),
        "rounded": rounded_bf16,
        "attention_heads": attention_heads,
        "expert_outputs": expert_outputs,
        "add_group": add_group,
    }
    with contextlib.ExitStack() as stack:
        for name, function in changed.items():
            stack.enter_context(mock.patch.object(plain, name, function))
        for name, function in (
            ("attention_block", attention_block),
            ("dense_mlp", dense_mlp),
            ("add_blocks", add_blocks),
        ):
            stack.enter_context(mock.patch.object(layer_stream, name, function))
        stack.enter_context(
            mock.patch.object(side_by_side, "rms_norm", lambda hidden, *more: normed(bf16(hidden), *more))
        )
        yield
