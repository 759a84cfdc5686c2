"""Asks vLLM's and SGLang's own functions what they make of a module, by a quantization_config.

    python engine_lookups.py JOBS.json      [{"config": {...}, "flash": bool, "modules": [...], "experts": [...]}, ...]

    python engine_lookups.py --moe CONFIGS.json      [{...}, ...]

Prints for each of the first kind: engine → name → "ignored", "claimed", "unclaimed", or the name of the exception that
it stops with; of experts the type and the number of bits that the scheme has. Of the second kind: engine → what it
builds for the experts of a layer, or the exception. `sglang_loader` says how SGLang is imported.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang_loader
import torch

assert sglang_loader.STUBS  # in place of what SGLang imports and does not use

import sglang.srt.layers.quantization.compressed_tensors.compressed_tensors as sglang_ct  # noqa: E402
import sglang.srt.layers.quantization.compressed_tensors.utils as sglang_utils  # noqa: E402
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe as vllm_moe_package  # noqa: E402
import vllm.model_executor.layers.quantization.compressed_tensors.utils as vllm_utils  # noqa: E402
from sglang.srt.layers.quantization.fp8 import Fp8Config as SglangFp8  # noqa: E402
from sglang.srt.layers.quantization.utils import is_layer_skipped as sglang_skipped  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
    CompressedTensorsKVCacheMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped  # noqa: E402
from vllm.model_executor.models.mimo_v2 import MiMoV2FlashForCausalLM, MiMoV2ForCausalLM  # noqa: E402

CLASSES = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear"}


def module(name: str) -> torch.nn.Module:
    """An empty module of the class that an engine builds by that name."""
    made: torch.nn.Module = type(CLASSES.get(name.rpartition(".")[2], "RowParallelLinear"), (torch.nn.Module,), {})()
    return made


def fate(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except Exception as error:
        return type(error).__name__


def group(matched: dict[str, Any] | None) -> str:
    return "unclaimed" if matched is None else f"{matched['weights'].type}{matched['weights'].num_bits}"


def vllm(config: dict[str, Any], flash: bool, modules: list[str], experts: list[str]) -> dict[str, str]:
    mapping = (MiMoV2FlashForCausalLM if flash else MiMoV2ForCausalLM).packed_modules_mapping
    if config["quant_method"] == "fp8":
        fp8 = Fp8Config.from_config(copy.deepcopy(config))

        def skipped(name: str) -> str:
            return "ignored" if is_layer_skipped(name, fp8.ignored_layers, mapping) else "claimed"

        return {name: fate(lambda name=name: skipped(name)) for name in (*modules, *experts)}
    made = CompressedTensorsConfig.from_config(copy.deepcopy(config))
    made.packed_modules_mapping = mapping

    def linear(name: str) -> str:
        if vllm_utils.should_ignore_layer(name, made.ignore or [], mapping):
            return "ignored"
        return "unclaimed" if made.get_scheme_dict(module(name), name) is None else "claimed"

    def expert(name: str) -> str:
        made._add_fused_moe_to_target_scheme_map()
        routed = type("RoutedExperts", (torch.nn.Module,), {})()
        return group(made.get_scheme_dict(routed, f"{name}.0.gate_proj"))

    return {name: fate(lambda name=name: linear(name)) for name in modules} | {
        name: fate(lambda name=name: expert(name)) for name in experts
    }


def sglang(config: dict[str, Any], flash: bool, modules: list[str], experts: list[str]) -> dict[str, str]:
    if config["quant_method"] == "fp8":
        fp8 = SglangFp8.from_config(copy.deepcopy(config))

        def skipped(name: str) -> str:
            return "ignored" if sglang_skipped(name, fp8.ignored_layers, fp8.packed_modules_mapping) else "claimed"

        return {name: fate(lambda name=name: skipped(name)) for name in (*modules, *experts)}
    made = sglang_ct.CompressedTensorsConfig.from_config(copy.deepcopy(config))

    def linear(name: str) -> str:
        if sglang_utils.should_ignore_layer(name, made.ignore or [], made.packed_modules_mapping):
            return "ignored"
        try:
            sglang_utils.find_matched_target(name, module(name), made.target_scheme_map, made.packed_modules_mapping)
        except ValueError:
            return "unclaimed"
        return "claimed"

    def expert(name: str) -> str:
        made._add_fused_moe_to_target_scheme_map()
        return group(made.get_scheme_dict(type("FusedMoE", (torch.nn.Module,), {})(), f"{name}.0.gate_proj"))

    return {name: fate(lambda name=name: linear(name)) for name in modules} | {
        name: fate(lambda name=name: expert(name)) for name in experts
    }


def vllm_moe(config: dict[str, Any]) -> str:
    """The class that vLLM takes for experts; what they are constructed with is not looked at."""
    parts = "w4a4_mxfp4 w4a4_nvfp4 w4a8_fp8 w4a8_int8 w4a8_mxfp4 w8a8_fp8 w8a8_int8 w8a8_mxfp8 wna16"
    for part in parts.split():
        made = importlib.import_module(f"{vllm_moe_package.__name__}.compressed_tensors_moe_{part}")
        for name in [name for name in vars(made) if name.endswith("MoEMethod") and name.startswith("CompressedT")]:
            if name != "CompressedTensorsMoEMethod":
                setattr(made, name, type(name, (), {"__init__": lambda self, *args, **more: None}))
    projections = {f"ckpt_{part}_proj_name": f"{part}_proj" for part in ("gate", "up", "down")}
    layer = type("RoutedExperts", (torch.nn.Module,), {**projections, "moe_config": None})()
    read = CompressedTensorsConfig.from_config(copy.deepcopy(config))
    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(read.kv_cache_scheme)
    method = vllm_moe_package.CompressedTensorsMoEMethod.get_moe_method(read, layer, "model.layers.1.mlp.experts")
    return type(method).__name__


def sglang_moe(config: dict[str, Any]) -> str:
    read = sglang_ct.CompressedTensorsConfig.from_config(copy.deepcopy(config))
    read._check_scheme_supported = lambda *args, **more: False  # there is no GPU to ask
    if read._is_mxfp4_moe("model.layers.1.mlp.experts"):
        return "Mxfp4MoEMethod"
    layer = type("FusedMoE", (torch.nn.Module,), {})()
    scheme = read.get_moe_scheme(layer, "model.layers.1.mlp.experts")
    return f"{type(scheme).__name__} {getattr(scheme, 'has_input_global_scale', '')}".strip()


def main() -> None:
    jobs = json.loads(Path(sys.argv[-1]).read_text())
    if sys.argv[1] == "--moe":
        asked = {"vllm": vllm_moe, "sglang": sglang_moe}
        print(json.dumps([{e: fate(lambda j=j, ask=ask: ask(j)) for e, ask in asked.items()} for j in jobs]))
        return
    print(json.dumps([{"vllm": vllm(**job), "sglang": sglang(**job)} for job in jobs]))


if __name__ == "__main__":
    main()
