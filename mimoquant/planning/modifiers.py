"""The modifiers that are read, and what llm-compressor writes into them that changes nothing.

Key idea: its `Recipe.yaml()` writes a modifier's every key that is not null. A key at its default is dropped here, so
that a recipe means the same with it and without; one at another value that would be dropped is refused with that value.

Reference: the fields of llm-compressor 0.14.0.1's QuantizationModifier, GPTQModifier and AWQModifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimoquant.planning.calibration_settings import Fail
from mimoquant.quant.formats import GROUP_SIZES, Format
from mimoquant.weights.container import format_inputs, format_weights

METHODS = {"QuantizationModifier": "rtn", "GPTQModifier": "gptq", "AWQModifier": "awq"}
PRESETS = {  # schemes of compressed-tensors by name → format, and whether activations are rounded too (None: never)
    "W4A16": (Format("int4", 128), None),
    "W4A16_ASYM": (Format("int4", 128, symmetric=False), None),
    "MXFP4A16": (Format("mxfp4", 32), None),
    "NVFP4A16": (Format("nvfp4", 16), False),
    "NVFP4": (Format("nvfp4", 16), True),
}
WEIGHT_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "dynamic": (False,),
    "actorder": (None, "static", "weight"),
    "block_structure": (None,),
    "observer_kwargs": (None, {}),
    "zp_dtype": (None, "torch.int8"),
    "scale_dtype": (None, "torch.uint8", "torch.float8_e4m3fn"),
}
FORMAT_KEYS = {
    "targets",
    "ignore",
    "scheme",
    "config_groups",
    "weight_observer",
    "observer",
}  # what goes to what format
_OWN_KEYS = {
    "QuantizationModifier": set(),
    "GPTQModifier": {"block_size", "dampening_frac", "actorder", "offload_hessians"},
    "AWQModifier": {"mappings", "offload_device", "duo_scaling", "n_grid"},
}
# Null where the key may be left out as well; the others have a default of their own, and null is another value.
_NULL_IS_DEFAULT = FORMAT_KEYS | {"mappings", "offload_device", "offload_hessians"}
_AT_DEFAULT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("index", "group", "start", "end", "update"), (None,)),
    **dict.fromkeys(("initialized_", "finalized_", "started_", "ended_"), (False,)),
    **dict.fromkeys(("input_observer", "output_observer"), (None,)),
    "bypass_divisibility_checks": (None, False),
    "kv_cache_scheme": (None,),
    # of earlier versions, at what they were by themselves
    **dict.fromkeys(("sequential_targets", "num_calibration_steps", "disable_quantization_observer_epoch"), (None,)),
    "requires_calibration_data": (None, False, True),  # what follows from the other keys
}
_WHY = {
    "bypass_divisibility_checks": "group sizes must divide the width",
    "kv_cache_scheme": "only routed experts are quantized",
    "input_observer": "weights only: leave it out or null",
    "output_observer": "weights only: leave it out or null",
}


def without_empty(document: dict[Any, Any]) -> dict[Any, Any]:
    """A recipe without the keys of the whole that llm-compressor knows and that say nothing where they are empty."""
    return {key: value for key, value in document.items() if key not in ("args", "metadata", "version") or value}


def without_run_type(stage: dict[Any, Any]) -> dict[Any, Any]:
    """A stage without what earlier versions of llm-compressor wrote there: that it runs once, as all runs do here."""
    return {key: value for key, value in stage.items() if (key, value) != ("run_type", "oneshot")}


def settings_of(modifier: str, given: dict[Any, Any], fail: Fail) -> dict[str, Any]:
    """A modifier's settings without what is at its default. Raises RecipeError for what is not supported."""
    known = FORMAT_KEYS | _OWN_KEYS[modifier] | _AT_DEFAULT.keys()
    if modifier == "GPTQModifier":
        known |= {"batched_quantization"}
    kept = {}
    for key, value in given.items():
        if key not in known:
            fail(f"unknown key {key!r} in {modifier}, with {_shown(value)}", f"known are {', '.join(sorted(known))}")
        if key in _AT_DEFAULT:
            if not any(value is default for default in _AT_DEFAULT[key]):
                fail(f"{modifier}.{key} is {_shown(value)}, which is not supported", _WHY.get(key, "leave it out"))
        elif key == "batched_quantization":  # how many modules at a time: no matter of what comes out
            if value not in (None, "auto") and (type(value) is not int or value < 1):
                fail(f"{modifier}.{key} is {_shown(value)}", "known are auto, null and a number of modules")
        elif value is not None or key not in _NULL_IS_DEFAULT:
            kept[key] = value
    for number, mapping in enumerate(kept.get("mappings") or ()):
        if isinstance(mapping, dict) and mapping.get("activation_hook_target", 0) is None:
            kept["mappings"][number] = {k: v for k, v in mapping.items() if k != "activation_hook_target"}
    return kept


def weight_observer(settings: dict[str, Any], where: str, fail: Fail) -> str | None:
    """The observer that a modifier has for the weights of all its groups; `observer` goes before `weight_observer`."""
    named = settings.get("observer", {})
    if not isinstance(named, dict):
        fail(f"{where}.observer is {_shown(named)}, expected a mapping such as {{weights: mse}}")
    for key, value in named.items():
        if key != "weights" and value is not None:
            fail(f"{where}.observer.{key} is {_shown(value)}, which is not supported", "weights only: leave it out")
    found = named.get("weights", settings.get("weight_observer"))
    if found is not None and not isinstance(found, str):
        fail(f"{where} has the observer {_shown(found)}, which is not supported")
    return found


def rounds_inputs(group: Mapping[str, Any], fmt: Format, where: str, fail: Fail) -> bool | None:
    """Whether a config group rounds its modules' activations too, which only NVFP4 may (None for others), and only as
    its preset does. Raises RecipeError for any other activations."""
    if group.get("output_activations") is not None:
        fail(f"{where} quantizes output_activations, which is not supported", "leave it out or null")
    given = group.get("input_activations")
    if given is None:
        return False if fmt.name == "nvfp4" else None
    if fmt.name != "nvfp4" or not isinstance(given, dict):
        fail(
            f"{where} quantizes input_activations, which is not supported beside {fmt.label} weights",
            "weights only: leave it out or null; NVFP4 weights may have those of the scheme NVFP4",
        )
    known = format_inputs(fmt) | {"actorder": None, "block_structure": None, "observer_kwargs": {}}
    for key, value in given.items():
        if key not in known or value not in (known[key], {} if known[key] is None else known[key]):
            wanted = f"{known[key]!r} is" if key in known else f"{', '.join(sorted(known))} are"
            fail(f"{where}.input_activations.{key} is {_shown(value)}, which is not supported", f"{wanted} known")
    for key in ("num_bits", "type", "strategy", "group_size", "dynamic"):  # their defaults are others
        if key not in given:
            fail(f"{where}.input_activations has no {key}", f"{known[key]!r} is known")
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def weight_format(weights: dict[str, Any], where: str, fail: Fail) -> Format:
    """The format that a config group's `weights` ask for. Raises RecipeError for one that is not supported."""
    for key, allowed in WEIGHT_DEFAULTS.items():
        if key in weights and weights[key] not in allowed:
            fail(f"{where}.weights.{key} is {weights[key]!r}, which is not supported")
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size else "tensor")
    symmetric = weights.get("symmetric", True)
    if bits != 4 or kind not in ("int", "float"):
        fail(f"{where} asks for {bits!r}-bit {kind} weights; 4-bit int and float are supported")
    name = "int4" if kind == "int" else {16: "nvfp4", 32: "mxfp4"}.get(size, "") if type(size) is int else ""
    if strategy != ("tensor_group" if name == "nvfp4" else "group"):
        fail(f"{where} has the strategy {strategy!r} with group size {size}, which is not supported")
    if type(size) is not int or size not in GROUP_SIZES.get(name, ()):
        sizes = GROUP_SIZES["int4"] if kind == "int" else (16, 32)
        fail(f"{where} has group size {size!r}; {kind} weights take {', '.join(map(str, sizes))}")
    if not isinstance(symmetric, bool) or (name != "int4" and not symmetric):
        fail(f"{where} has symmetric: {symmetric!r}; only int4 may be asymmetric")
    fmt = Format(name, size, symmetric)
    stored = format_weights(fmt)
    for key in ("scale_dtype", "zp_dtype"):
        if weights.get(key) not in (None, stored[key]):
            fail(f"{where}.weights.{key} is {weights[key]!r}, {fmt.label} stores {stored[key]!r}")
    return fmt
