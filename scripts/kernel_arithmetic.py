"""What vLLM's kernels round, beside ours: FP8 codes captured inside the engine, and two ways our forward differs.

`compare_captured` holds inputs, codes and scales that `ask_engine.py` kept of vLLM 0.33's FP8 products against
`quant.activations`, bit for bit. `exact_weights` and `sums_in_float64` change our forward while they last, which is
right for a judge only.

Left out: attention's probabilities in bf16, the last bits of FP8 products on Hopper (`our_layers.py` has those).
Sources: vLLM 0.33, `input_quant_fp8.py`, `experts/triton_moe.py`, `fused_silu_mul_block_quant.cu`, `mimo_v2.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mimoquant.evaluation import divergence
from mimoquant.model import decoder_layer
from mimoquant.quant.activations import quantize_fp8
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.stored import read_stack, scale_rows


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
        held = read_stack(self.reader, [weight])
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
def sums_in_float64() -> Iterator[None]:
    """While this lasts, our products are summed in float64: how far two right forwards are from each other."""

    def product(parts: tuple[Tensor, ...], weight: Tensor) -> Tensor:
        [rows] = parts
        return (rows.double() @ weight.double().transpose(-1, -2)).to(torch.float32)

    with mock.patch.object(decoder_layer, "product", product), mock.patch.object(divergence, "product", product):
        yield
