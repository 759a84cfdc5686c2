"""What becomes of the activations of NVFP4 experts: W4A4 where config.json asks for it, scales are there and a GPU's
kernels round; else W4A16, or worse.

Key idea: config.json, files and kernels each have a say (`declared`, `served`, `gpus`), and where one of them is of
another mind the engine says nothing. Reference: vLLM 0.32 and 0.33 (oracle/nvfp4.py, modelopt.py,
compressed_tensors_moe_w4a4_nvfp4.py), SGLang 0.5.23 (modelopt_quant.py, compressed_tensors_w4a4_nvfp4_moe.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from mimoquant.model.layout import expert_module
from mimoquant.model.served_rounding import NONE
from mimoquant.serving import contracts as c
from mimoquant.serving.declared import Declared
from mimoquant.serving.kernels import KERNELS
from mimoquant.serving.problem import WARNING, Problem
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT, input_scale_tensor

_SOURCE = {
    c.VLLM: "compressed_tensors_moe_w4a4_nvfp4.py and modelopt.py of 0.33",
    c.SGLANG: "compressed_tensors.py and modelopt_quant.py of 0.5.23",
}


def rounds_inputs(declared: Declared) -> bool:
    """Whether config.json asks for activations in NVFP4, of any layer's experts."""
    layers = [n for n, forms in declared.checkpoint.experts.items() if forms and forms[0].subject in c.NVFP4]
    return any(_rounds(declared, layer) for layer in layers)


def _rounds(declared: Declared, layer: int) -> bool:
    if declared.checkpoint.container == MODELOPT:
        return declared.algo(f"model.layers.{layer}.mlp.experts") == "NVFP4"
    group = declared.expert_group(expert_module(layer, 0, "gate")) or {}
    inputs = group.get("input_activations")
    return isinstance(inputs, dict) and (inputs.get("num_bits"), inputs.get("type")) == (4, "float")


def input_problems(declared: Declared, label: str, arch: str | None) -> Iterator[Problem]:
    """`arch`: of the GPUs; None: what depends on it is told of all."""
    checkpoint, engine = declared.checkpoint, declared.engine
    if engine not in _SOURCE or not set(checkpoint.subjects) & set(c.NVFP4):
        return
    kind, asks = COMPRESSED_TENSORS if c.CT_NVFP4 in checkpoint.subjects else MODELOPT, rounds_inputs(declared)
    suffix = input_scale_tensor(kind)[0]
    rows = [row for row in KERNELS if (row.engine, row.subject) == (engine, c.NVFP4_INPUTS)]
    here = [row for row in rows if arch is None or arch in row.archs]
    rounding = _places([(row.name, row.archs) for row in here if row.rounds != NONE])
    plain = _places([(row.name, row.archs) for row in here if row.rounds == NONE])
    if asks and not checkpoint.input_scales and (rounding or arch is None):
        fixed = engine == c.SGLANG and kind == MODELOPT  # which fills them in
        does = "are scaled by 1" if fixed else "are scaled by memory not written to"
        remedy = "declare W4A16_NVFP4" if kind == MODELOPT else "delete input_activations"
        yield Problem(
            WARNING if arch is None or fixed else c.CORRUPTED,
            f"quantization_config: experts' activations are in 4 bits, and no {suffix} is there: they {does} where "
            f"kernels round them ({rounding}; {label})",
            _SOURCE[engine],
            f"{remedy}: weights alone are served then; or quantize with --input-scales",
        )
    elif asks and checkpoint.input_scales and arch is None:
        yield Problem(
            WARNING,
            f"quantization_config: experts' activations are in 4 bits: rounded too by {rounding}, which is no part of "
            f"J of weights; {plain} computes weights alone, W4A16, although there are input scales ({label})",
            _SOURCE[engine],
        )
    elif asks and checkpoint.input_scales and plain:
        yield Problem(
            WARNING,
            f"experts have input scales, and {plain} computes weights alone: it is served W4A16 ({label})",
            _SOURCE[engine],
        )
    elif checkpoint.input_scales and not asks:
        yield Problem(
            WARNING,
            f"experts have {suffix}, and quantization_config does not ask for activations in 4 bits: it is served "
            f"W4A16 ({label})",
            _SOURCE[engine],
        )


def _places(rows: list[tuple[str | None, tuple[str, ...]]]) -> str:
    """Kernels and where they run, in words; empty where there are none."""
    by_name: dict[str, list[str]] = {}
    for name, archs in rows:
        by_name.setdefault(name or "an unknown kernel", []).extend(archs)
    return "; ".join(f"{name} on {', '.join(archs)}" for name, archs in by_name.items())
