"""What serving a checkpoint rounds beside its weights: activations, keys and values. A plain J knows of neither.

Key idea: config.json says it in each container's words, and a scale that only such rounding needs says it in the files.
Reference: compressed-tensors 0.19 (`input_activations`, `kv_cache_scheme`), ModelOpt (`quant_algo`,
`kv_cache_quant_algo`).
"""

from __future__ import annotations

from typing import Any

from mimoquant.model.config_keys import text_keys
from mimoquant.model.layout import ModelLayout

_MODELOPT_BOTH = {"NVFP4", "MXFP8"}  # of its names for formats, those that quantize activations too
INPUT_SCALE_SUFFIXES = (".input_global_scale", ".input_scale")  # compressed-tensors', ModelOpt's


def rounds_activations(layout: ModelLayout) -> bool:
    """Whether activations are quantized too."""
    quantization = _quantization(layout)
    groups, layers = quantization.get("config_groups"), quantization.get("quantized_layers")
    of_groups = groups.values() if isinstance(groups, dict) else ()
    named = layers.values() if isinstance(layers, dict) else ()
    algos = {str(entry.get("quant_algo")) for entry in (quantization, *named) if isinstance(entry, dict)}
    declared = any(isinstance(group, dict) and bool(group.get("input_activations")) for group in of_groups)
    return bool(algos & _MODELOPT_BOTH) or declared or has_input_scales(layout)


def rounds_cache(layout: ModelLayout) -> bool:
    """Whether keys and values are quantized in the cache."""
    quantization = _quantization(layout)
    declared = any(quantization.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
    return declared or any(weight.role == "cache_scale" for weights in layout.units.values() for weight in weights)


def has_input_scales(layout: ModelLayout) -> bool:
    """Whether any expert has one."""
    return any(info.name.endswith(INPUT_SCALE_SUFFIXES) for weight in layout.experts.values() for info in weight.packed)


def left_out_of_j(layout: ModelLayout) -> list[str]:
    """What J of this checkpoint leaves out, in words; empty: J is of all that is rounded."""
    return [
        *(["activations"] if rounds_activations(layout) else []),
        *(["the KV cache"] if rounds_cache(layout) else []),
    ]


def _quantization(layout: ModelLayout) -> dict[str, Any]:
    return text_keys(layout.config, "config.json").get("quantization_config") or {}
