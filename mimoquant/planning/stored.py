"""What config.json says of dtypes, held against what the files hold.

Key idea: what is stored decides. A quantization_config that was left over when weights were cast to bf16, one that was
lost on the way, a list of layers that are not there: reading goes by the files, and what is said of them is told. Where
the output would keep the source's quantization_config, it must say what the files hold, or engines misread them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mimoquant.model.config_keys import text_keys
from mimoquant.model.geometry import IGNORE_LISTS, Geometry
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight, expert_module, layer_rows
from mimoquant.planning.settings_beside import settings_notes
from mimoquant.weights.container import ignored_modules
from mimoquant.wording import many

_FUSED = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj"}
_LINEAR_ROLES = ("qkv", "q", "k", "v", "o", "dense")
_LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)(?:\.|$)")
_EXPERT = re.compile(r"\.experts\.(\d+)(?:\.|$)")
_NUMBER_IN_PATTERN = re.compile(r"layers\\?\.(\d+)(?=\\?\.|\$|$)")
_FUSED_BY_ENGINES = ("self_attn.qkv_proj", "self_attn.attn", "mlp.gate_up_proj", "mlp.experts.gate_up_proj")


def native_obstacle(layout: ModelLayout, layers: Iterable[int]) -> str | None:
    """Why the family's own container would be misread, which keeps the source's quantization_config: it completes the
    sentence "the native container ...". None: it would not. `layers`: those whose experts are quantized."""
    if not layout.geometry.fp8:
        if layout.geometry.quant_method is None and _stored_fp8(layout):
            return "needs a config.json that says quant_method fp8: the weights are FP8, and it does not say so"
        return "needs an FP8 source (it declares quant_method fp8)"
    if not _stored_fp8(layout):
        return "needs an FP8 source: quantization_config says fp8 and no weight is, so it is left over"
    names = ignored_modules(_quantization(layout))
    lists = " or ".join(IGNORE_LISTS)
    for layer in layers:
        experts = next((name for name in names if f"model.layers.{layer}.mlp.experts" in f"{name}."), None)
        if experts is not None and not _is_other(experts, layer):
            return f"would leave experts in bf16 that are quantized: {lists} names {experts}"
    odd = list(_misdeclared(layout, names))
    if odd:
        what = "is FP8, and an" if odd[0].scale else "is bf16, and no"
        return (
            f"would have engines misread {len(odd)} weights that stay as they are: {odd[0].name} {what} entry of "
            f"{lists} names it"
        )
    return None


def _is_other(name: str, layer: int) -> bool:
    """Whether a name is of a layer whose number merely begins alike."""
    found = _LAYER.search(name)
    return found is None or int(found[1]) != layer


def _misdeclared(layout: ModelLayout, names: list[str]) -> Iterator[Weight]:
    """Matrices beside the experts that are FP8 though listed as bf16, or bf16 though not listed. MTP layers have other
    names in engines, and no rule."""
    listed = set(names)
    for unit, weights in layout.units.items():
        for weight in weights:
            if not unit.startswith("layer ") or weight.role not in _LINEAR_ROLES:
                continue
            module = weight.name.removesuffix(".weight")
            head, _, last = module.rpartition(".")
            fused = _FUSED.get(weight.role) or ("gate_up_proj" if last in ("gate_proj", "up_proj") else last)
            if (weight.scale is not None) == bool({module, f"{head}.{fused}"} & listed):
                yield weight


def stored_weights(layout: ModelLayout) -> str:
    """What most of the checkpoint is stored in."""
    if any(weight.packed for weight in layout.experts.values()):
        return "4-bit experts"
    return "fp8 128x128" if any(weight.scale for weight in layout.experts.values()) else "bf16"


def config_notes(layout: ModelLayout) -> list[str]:
    """Where quantization_config and files differ, in sentences."""
    quantization, notes = _quantization(layout), []
    fp8 = _stored_fp8(layout)
    if layout.geometry.quant_method == "fp8" and not fp8 and not any(w.packed for w in layout.experts.values()):
        notes.append("quantization_config says fp8 and no weight is: it is left over, what is stored decides")
    if layout.geometry.quant_method is None and fp8:
        notes.append(
            f"{fp8} weights are FP8 with scales for blocks of 128x128, and config.json has no quantization_config: "
            "what is stored decides"
        )
    if absent := absent_modules(quantization, layout.geometry):
        notes.append(absent_text(absent, layout.geometry))
    return [*notes, *settings_notes(layout.index.folder, layout.config)]


def absent_modules(quantization: dict[str, Any], geometry: Geometry) -> list[str]:
    """Names in quantization_config of layers, experts or parts of a layer that the model does not have, and patterns
    that tell of such layers by number. MTP layers and towers have other names in engines, and are left alone."""
    groups = quantization.get("config_groups")
    targets = (
        [group.get("targets") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    lists = [
        *(quantization.get(key) for key in (*IGNORE_LISTS, "ignore", "exclude_modules", "quantized_layers")),
        *targets,
    ]
    names = [name for names in lists if isinstance(names, list | dict) for name in names if isinstance(name, str)]
    parts = functools.cache(lambda layer: _parts(geometry, layer))  # names are as many as an output has tensors
    return [name for name in dict.fromkeys(names) if _is_absent(name, geometry, parts)]


def _is_absent(name: str, geometry: Geometry, parts: Callable[[str], frozenset[str]]) -> bool:
    if name.startswith("re:"):
        return any(int(number) >= geometry.layers for number in _NUMBER_IN_PATTERN.findall(name))
    layer, expert = _LAYER.match(name), _EXPERT.search(name)
    if layer is None:
        return False
    if int(layer[1]) >= geometry.layers or (expert is not None and int(expert[1]) >= geometry.experts):
        return True
    part = name[layer.end() :].rstrip(".")
    return bool(part) and "*" not in part and _EXPERT.sub(".experts.0.", f"{part}.") not in parts(layer[1])


def _parts(geometry: Geometry, layer: str) -> frozenset[str]:
    """What a layer's modules are called, and what they lie in, each with a dot at its end; of experts the first."""
    prefix, number = f"model.layers.{layer}.", int(layer)
    names = [name for name, *_ in layer_rows(geometry, number)] + [f"{prefix}{name}.x" for name in _FUSED_BY_ENGINES]
    names += [f"{prefix}self_attn.{letter}_proj.weight" for letter in "qkv"]
    if geometry.moe[number]:
        names += [f"{expert_module(number, 0, projection)}.weight" for projection in PROJECTIONS]
    words = [name.removeprefix(prefix).split(".")[:-1] for name in names]
    return frozenset("".join(f"{part}." for part in word[:end]) for word in words for end in range(1, len(word) + 1))


def absent_text(names: list[str], geometry: Geometry) -> str:
    """What is said of them."""
    return (
        f"quantization_config names {many(len(names), 'module')} not to be found here, first {names[0]}; there are "
        f"{geometry.layers} layers of {geometry.experts} experts: is it of another checkpoint?"
    )


def _quantization(layout: ModelLayout) -> dict[str, Any]:
    return text_keys(layout.config, "config.json").get("quantization_config") or {}


def _stored_fp8(layout: ModelLayout) -> int:
    """How many weights have FP8 scales."""
    beside = sum(weight.scale is not None for weights in layout.units.values() for weight in weights)
    return beside + sum(weight.scale is not None for weight in layout.experts.values())
