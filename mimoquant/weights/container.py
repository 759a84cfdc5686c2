"""How each container names and declares quantized experts on disk.

Key idea: a container is data (suffixes, dtypes, whether it can hold FP8 beside the experts) plus one function that
builds config.json's `quantization_config`. What the engines accept was read from vLLM 0.33 and SGLang 0.5.23.

    compressed-tensors   no FP8 `weight_scale_inv` exists there, so FP8 attention, dense MLP and MTP become bf16, and a
                         fused qkv becomes split q, k, v: the one bf16 layout both engines load rightly at any TP
    native               the family's own `store_dtype: mxfp4` under `quant_method: fp8`: all else stays as it was
    modelopt             NVFP4 as ModelOpt exports it: MIXED_PRECISION, whose `quantized_layers` name the experts and
                         nothing else, each W4A16_NVFP4 (weights only, so there is no `input_scale`). All else as under
                         compressed-tensors: 128x128 FP8 has a name there (FP8_PB_WO), but vLLM reads `weight_scale`
                         [o, 1, i, 1] where SGLang reads `weight_scale_inv` [o, i]. Where that is asked for, it is as
                         public releases are: FP8 stays, named FP8_BLOCK_SCALES

Where NVFP4 experts have input scales, engines round their activations to 4 bits too: compressed-tensors declares
`input_activations` and stores a divisor, `input_global_scale`, 2688 / amax; ModelOpt declares NVFP4 and stores a
multiplier, `input_scale`, amax / 2688. 2688 is 448 x 6, the largest that a scale of 1 lets an activation be.

ModelOpt stores a multiplier, `weight_scale_2`, where the formats here have a divisor. Its global scales are powers of
two (`Format.pow2_global`): both are exact, and so is every product of code, block scale and global scale, in bf16 and
in any order. What a reader computes is then what `verify` and `eval-kl` judge, to the bit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.model.config_keys import OLD_QUANTIZATION, drop_text_key, set_text_key, text_keys
from mimoquant.model.geometry import IGNORE_LISTS
from mimoquant.model.layout import PROJECTIONS, expert_module
from mimoquant.quant.formats import MXFP4, Format

COMPRESSED_TENSORS, NATIVE, MODELOPT = "compressed-tensors", "native", "modelopt"
CONTAINERS = (COMPRESSED_TENSORS, NATIVE, MODELOPT)
EXPERT_TARGET = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
# Everything but the experts: SGLang 0.5.23 stops at a matrix that is in neither targets nor ignore. The name of a whole
# layer of experts must not match either, engines look that up too.
NOT_EXPERTS = r"re:^(?!.*\.mlp\.experts(\.|$)).*$"
DENSE = ("bf16", "fp8")  # what FP8 beside the experts becomes in ModelOpt's container
INPUT_SCALES = NONE, UNIT, CALIBRATED = ("none", "unit", "calibrated")  # what NVFP4 experts scale activations by
NVFP4_FULL = 2688.0  # the largest activation at an input scale of 1
_LEAST_AMAX = 2.0**-100  # so that neither form of a scale overflows
_CONFIG = "config.json"
FORMAT_VERSION = "0.19.0"  # of compressed-tensors, whose layout this is

# Part of a format → its suffix on disk, in the order in which the parts of a module are written.
_SUFFIXES = {
    COMPRESSED_TENSORS: {
        "global_scale": "weight_global_scale",
        "codes": "weight_packed",
        "zero_point": "weight_zero_point",
        "scale": "weight_scale",
    },
    NATIVE: {"codes": "weight", "scale": "weight_scale"},
    MODELOPT: {"global_scale": "weight_scale_2", "codes": "weight", "scale": "weight_scale"},
}
_COMPRESSED_FORMAT = {"int4": "pack-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a quantized expert: the part of the format it holds, its name suffix, dtype and shape.

    `reciprocal`: what is stored is one over the part.
    """

    part: str
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    reciprocal: bool = False

    def turned(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part as it is stored, or what is stored as the part."""
        if not self.reciprocal:
            return values
        with np.errstate(divide="ignore"):
            return np.float32(1) / values


@functools.lru_cache  # asked once an expert, and there are tens of thousands with a handful of shapes
def expert_tensors(container: str, fmt: Format, out_features: int, in_features: int) -> tuple[Stored, ...]:
    """The tensors that stand for `<module>.weight` [out_features, in_features], in the order they are written."""
    parts = fmt.parts(out_features, in_features)
    stored = []
    for part, suffix in _SUFFIXES[container].items():
        if part == "codes" and fmt.name == "int4":  # the same bytes, declared as eight codes a word
            stored.append(Stored(part, suffix, "I32", (out_features, in_features // 8)))
        elif part == "global_scale" and part in parts and container == MODELOPT:
            stored.append(Stored(part, suffix, "F32", (), reciprocal=True))
        elif part in parts:
            stored.append(Stored(part, suffix, *parts[part]))
    return tuple(stored)


def input_scale_tensor(container: str) -> tuple[str, tuple[int, ...]]:
    """Suffix and shape of what scales an NVFP4 module's activations, F32."""
    return ("input_global_scale", (1,)) if container == COMPRESSED_TENSORS else ("input_scale", ())


def input_scales_of(container: str, amax_E: Sequence[float]) -> npt.NDArray[np.float32]:
    """The largest activation of each expert as the container stores it. One that saw none has that of its layer, and
    all have a scale of 1 where the layer has none."""
    amax = np.array(amax_E, np.float32)
    amax = np.where(amax > 0, amax, amax.max() if amax.max() > 0 else np.float32(NVFP4_FULL))
    amax, full = np.maximum(amax, np.float32(_LEAST_AMAX)), np.float32(NVFP4_FULL)
    return full / amax if container == COMPRESSED_TENSORS else amax / full


def shape_tensor(container: str, fmt: Format) -> bool:
    """Whether each module also has `weight_shape`, I64 [2]; vLLM's loader asks for it."""
    return container == COMPRESSED_TENSORS and fmt.name == "int4"


def keeps_fp8(container: str, dense: str) -> bool:
    """Whether what lies beside the experts goes out as it is stored, with FP8 block scales; else it becomes bf16.

    `dense`: one of DENSE, where the container leaves that open.
    """
    return container == NATIVE or (container == MODELOPT and dense == "fp8")


def ignored_modules(quantization: dict[str, Any]) -> list[str]:
    """What `quant_method: fp8` leaves in bf16, by whichever of the list's two names."""
    return next((list(quantization[key]) for key in IGNORE_LISTS if quantization.get(key)), [])


def add_ignored(config: dict[str, Any], modules: Iterable[str]) -> None:
    """Name more modules as bf16, in the list that is there. Never in a second one beside it: vLLM would read only
    that, and SGLang only the first, even where it is empty."""
    quantization = text_keys(config, _CONFIG)["quantization_config"]
    named = [*dict.fromkeys([*ignored_modules(quantization), *modules])]
    present = [key for key in IGNORE_LISTS if key in quantization]
    keys = [key for key in present if quantization[key]] or present[:1] or IGNORE_LISTS[:1]
    for key in {*present} - {*keys}:
        del quantization[key]
    quantization |= dict.fromkeys(keys, named)


def ignore_qkv(config: dict[str, Any], stems: Iterable[str]) -> None:
    """Name the q, k, v of these layers (`model.layers.0`) as bf16: under `quant_method: fp8` engines make FP8 modules
    of all that is not ignored, so they are named as the module that engines build and as its parts."""
    add_ignored(config, [f"{stem}.self_attn.{part}_proj" for stem in stems for part in ("qkv", "q", "k", "v")])


def output_config(
    config: dict[str, Any],
    container: str,
    formats: dict[int, Format],
    carve_outs: dict[int, str],
    bf16_qkv: Sequence[int] = (),
    *,
    modules: Sequence[str] = (),
    input_scales: str = NONE,
) -> dict[str, Any]:
    """The source's config.json with the keys that the output changes. `formats`: MoE layer → format; `carve_outs`: MoE
    layer → what it is kept in; `bf16_qkv`: layers whose q, k, v become bf16 in a container that keeps others in FP8;
    `modules`: beside the experts, those that stay FP8 in ModelOpt's container, or that are bf16 in a native one whose
    source is in another; `input_scales`: of NVFP4 experts, one of INPUT_SCALES."""
    out = copy.deepcopy(config)
    drop_text_key(out, OLD_QUANTIZATION)  # the same once more, or nothing
    if container == NATIVE:
        if (text_keys(out, _CONFIG).get("quantization_config") or {}).get("quant_method") != "fp8":
            drop_text_key(out, "quantization_config")
            out["quantization_config"] = _native_settings(modules)
            fused = text_keys(out, _CONFIG).get("attention_projection_layout") == "fused_qkv"
            if fused and any(module.endswith(".q_proj") for module in modules):
                _declare_split(out)
        quantization = text_keys(out, _CONFIG)["quantization_config"]
        quantization["store_dtype"] = "mxfp4"
        quantization["mxfp4_block_size"] = 32
        if bf16_layers := [layer for layer, kind in sorted(carve_outs.items()) if kind == "bf16"]:
            add_ignored(out, [f"model.layers.{layer}.mlp.experts" for layer in bf16_layers])
        if bf16_qkv:
            ignore_qkv(out, [f"model.layers.{layer}" for layer in bf16_qkv])
        return out
    if text_keys(out, _CONFIG).get("attention_projection_layout") == "fused_qkv" and not modules:
        _declare_split(out)
    drop_text_key(out, "quantization_config")
    if container == MODELOPT:
        algo = "W4A16_NVFP4" if input_scales == NONE else "NVFP4"
        settings = _modelopt_settings(config, formats, algo, modules)
        out["quantization_config"] = {"quant_method": "modelopt"} | settings
    else:
        out["quantization_config"] = _compressed_tensors_config(formats, carve_outs, input_scales)
    return out


def _declare_split(config: dict[str, Any]) -> None:
    """q, k and v lie apart; what a converter said of the order of a fused one is past."""
    set_text_key(config, "attention_projection_layout", "split")
    drop_text_key(config, "conversion_metadata")


def hf_quant_config(config: dict[str, Any], version: str) -> dict[str, Any]:
    """ModelOpt's own file beside config.json, for readers that look there: the same settings, under its names."""
    settings = dict(config["quantization_config"])
    del settings["quant_method"]
    settings["exclude_modules"] = settings.pop("ignore")
    return {"producer": {"name": "mimoquant", "version": version}, "quantization": settings}


def _modelopt_settings(
    config: dict[str, Any], layers: Iterable[int], algo: str, fp8_modules: Sequence[str]
) -> dict[str, Any]:
    """What is not in `quantized_layers` is left alone by both engines: attention, MTP (also under the draft's own
    prefix), head and towers need no entry where they are bf16."""
    blocks = dict.fromkeys(name for module in fp8_modules for name in _engine_names(module))
    modules = (
        expert_module(layer, expert, projection)
        for layer in sorted(layers)
        for expert in range(text_keys(config, _CONFIG)["n_routed_experts"])
        for projection in PROJECTIONS
    )
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "ignore": [],
        "quantized_layers": {
            **{module: {"quant_algo": "FP8_BLOCK_SCALES", "group_size": 128} for module in blocks},
            **{module: {"quant_algo": algo, "group_size": 16} for module in modules},
        },
    }


def _native_settings(bf16_modules: Sequence[str]) -> dict[str, Any]:
    """As published, but for what is in bf16: under the names of the files and of what engines fuse."""
    names = dict.fromkeys(name for module in bf16_modules for name in (*_engine_names(module), *_fused_qkv(module)))
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "ignored_layers": list(names),
        "mxfp4_block_size": 32,
        "quant_method": "fp8",
        "store_dtype": "mxfp4",
        "weight_block_size": [128, 128],
    }


def _fused_qkv(module: str) -> Iterator[str]:
    stem, _, last = module.rpartition(".")
    if last == "q_proj":
        yield from _engine_names(f"{stem}.qkv_proj")


def _engine_names(module: str) -> Iterator[str]:
    """A module under all names that engines look it up by: gate and up also as the one that SGLang fuses them to,
    MTP's also as its draft model has them."""
    stem, _, last = module.rpartition(".")
    fused = [module, *([f"{stem}.gate_up_proj"] if last in ("gate_proj", "up_proj") else [])]
    yield from fused
    if module.startswith("model.mtp.layers."):
        yield from (f"model.decoder.{name.split('.', 4)[4]}" for name in fused)


def _compressed_tensors_config(
    formats: dict[int, Format], carve_outs: dict[int, str], input_scales: str
) -> dict[str, Any]:
    formats = formats | {layer: MXFP4 for layer, kind in carve_outs.items() if kind == "mxfp4"}
    distinct = sorted(set(formats.values()), key=lambda fmt: fmt.label)
    groups: dict[str, Any] = {}
    for number, fmt in enumerate(distinct):
        layers = [layer for layer, other in formats.items() if other == fmt]
        target = EXPERT_TARGET if len(distinct) == 1 else layers_target(layers)
        inputs = format_inputs(fmt) if scales_inputs(fmt, input_scales) else None
        groups[f"group_{number}"] = _group(target, _COMPRESSED_FORMAT[fmt.name], format_weights(fmt), inputs)
    fp8_layers = sorted(layer for layer, kind in carve_outs.items() if kind == "fp8")
    if fp8_layers:
        groups[f"group_{len(groups)}"] = _group(layers_target(fp8_layers), "float-quantized", _FP8_WEIGHTS, _FP8_INPUT)
        if len(distinct) == 1:  # the general target must not claim the FP8 layers
            groups["group_0"]["targets"] = [layers_target(list(formats))]
    kinds = {group["format"] for group in groups.values()}
    bf16_layers = sorted(layer for layer, kind in carve_outs.items() if kind == "bf16")
    return {
        "config_groups": groups,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [NOT_EXPERTS, *([layers_target(bf16_layers)] if bf16_layers else [])],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": FORMAT_VERSION,
    }


def layers_target(layers: list[int]) -> str:
    """The experts of some layers."""
    choice = "|".join(str(layer) for layer in sorted(layers))
    return rf"re:.*layers\.({choice})\.mlp\.experts\.\d+\.(gate|up|down)_proj$"


def _group(target: str, kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "targets": [target],
        "format": kind,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def format_weights(fmt: Format) -> dict[str, Any]:
    """The compressed-tensors `QuantizationArgs` of a format, as JSON."""
    scale_dtype = {"int4": None, "mxfp4": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}[fmt.name]
    return {
        "num_bits": 4,
        "type": "int" if fmt.name == "int4" else "float",
        "symmetric": fmt.symmetric,
        "strategy": "tensor_group" if fmt.name == "nvfp4" else "group",
        "group_size": fmt.group_size,
        "dynamic": False,
        "scale_dtype": scale_dtype,
        "zp_dtype": None if fmt.symmetric else "torch.int8",
    }


def scales_inputs(fmt: Format, input_scales: str) -> bool:
    """Whether experts of a format have input scales, where `input_scales` is asked for."""
    return input_scales != NONE and fmt.name == "nvfp4"


def format_inputs(fmt: Format) -> dict[str, Any]:
    """The same of the activations of NVFP4 experts, as compressed-tensors' preset NVFP4 has them: their blocks are
    scaled as they come, by a global scale that is stored."""
    return format_weights(fmt) | {"dynamic": "local", "observer": "static_minmax"}


_FP8_WEIGHTS = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "block",
    "block_structure": [128, 128],
    "dynamic": False,
}
_FP8_INPUT = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 128,
    "dynamic": True,
}
