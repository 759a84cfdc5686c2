"""What a checkpoint's config.json makes an engine build, module by module.

Key idea: modules are looked up as the engine does: ignore list first, then targets by name, then by class. `Linear` is
the class of an expert's matrices too, though engines fuse them into one module: vLLM and SGLang write a second entry
for it, transformers takes the first group whose targets are classes. Names are those that the engine gives modules: a
prefix where there are towers, q, k and v as one. Of ModelOpt's `quantized_layers` a module's own entry, else the first
of a module inside it.
Reference: vLLM 0.32 (compressed_tensors/utils.py, utils/quant_utils.py), SGLang 0.5.23 (the same files), transformers
5.17 (integrations/compressed_tensors.py); `tests/serving` asks their own functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from mimoquant.errors import CheckpointError
from mimoquant.model.geometry import FP8_BLOCK, IGNORE_LISTS
from mimoquant.planning.settings_beside import lacks_cache
from mimoquant.planning.stored import absent_modules
from mimoquant.serving import contracts as c
from mimoquant.serving.arguments import ArgumentsError, read_arguments
from mimoquant.serving.served import CHANNEL, Served, Stored, layer_algos
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT

IGNORED, CLAIMED, UNCLAIMED, PARTED = "ignored", "claimed", "unclaimed", "parted"
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_LINEAR = "Linear"
_EXPERTS_CLASS = {c.VLLM: "RoutedExperts", c.SGLANG: "FusedMoE"}
_LINEAR_CLASSES = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear"}


class Declared:
    """The `quantization_config` of a checkpoint, as one engine reads it.

    Raises CheckpointError where it is not made of what compressed-tensors' groups and lists are made of.
    """

    def __init__(self, checkpoint: Served, engine: str) -> None:
        self.checkpoint, self.engine = checkpoint, engine
        # what the engine puts before the names of the text model
        self.prefix = c.ENGINES[engine].text_prefix if checkpoint.towers else ""
        self.config: dict[str, Any] = checkpoint.text.get("quantization_config") or {}
        if engine == c.SGLANG and checkpoint.settings_beside and lacks_cache(self.config):
            self.config = checkpoint.settings_beside
        flash = checkpoint.geometry.model_type == "mimo_v2_flash"
        self.own_experts = engine == c.TRANSFORMERS and flash  # transformers' class, whose experts are no modules

    @cached_property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Target → its group, in the config's order; of two groups with one target the last counts."""
        groups = self.config.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise self._not(groups, "config_groups", "an object")
        found: dict[str, dict[str, Any]] = {}
        for name, group in groups.items():
            if not (isinstance(group, dict) and isinstance(group.get("weights") or {}, dict)):
                raise self._not(group, f"config_groups.{name}", "an object with targets and weights")
            found |= dict.fromkeys(self._list(group.get("targets"), f"config_groups.{name}.targets"), group)
        return found

    @cached_property
    def ignore(self) -> list[str]:
        """Of compressed-tensors."""
        return self._list(self.config.get("ignore"), "ignore")

    @cached_property
    def ignored_layers(self) -> list[str]:
        """Of `quant_method: fp8`, which has two names for it: vLLM takes the first that is not empty, SGLang the first
        that is there and reads names with and without `model.`."""
        lists = {key: self._list(self.config.get(key), key) for key in IGNORE_LISTS if key in self.config}
        if self.engine != c.SGLANG:
            return next((names for names in lists.values() if names), [])
        names = next(iter(lists.values()), [])
        return [given + name.removeprefix("model.") for name in names for given in ("", "model.")]

    # --- experts ------------------------------------------------------------------------------------------------------

    def expert_form(self, name: str, module: str) -> Stored | None:
        """What the engine will make of a layer's experts; None: SGLang finds no target, and stops."""
        if self.checkpoint.container == MODELOPT:
            algo = self.algo(module)
            return Stored(c.MO_NVFP4, 16) if algo in ("NVFP4", "W4A16_NVFP4") else Stored(algo or c.BF16)
        if self.checkpoint.container != COMPRESSED_TENSORS:
            if not self.config or self._experts_ignored(module):
                return Stored(c.BF16)
            return Stored(c.NATIVE_MXFP4, 32) if self.config.get("store_dtype") == "mxfp4" else Stored(c.FP8)
        if not self.own_experts and self._listed(self.ignore, name):
            return Stored(c.BF16)
        group = self.expert_group(name)
        if group is None:
            return None if self.engine == c.SGLANG else Stored(c.BF16)
        return _group_form(group.get("weights") or {})

    def expert_group(self, name: str) -> dict[str, Any] | None:
        """The group that an expert's matrix is in, whether it is ignored or not."""
        if self.own_experts:
            return self._own_experts_group()
        by_name = next((target for target in self.groups if self._matches(target, name)), None)
        if by_name is not None:
            return self.groups[by_name]
        known = _EXPERTS_CLASS.get(self.engine, _LINEAR)
        by_class = next((target for target in self.groups if self._is_class(target, known)), None)
        return self.groups.get(_LINEAR if by_class is None else by_class)

    def _own_experts_group(self) -> dict[str, Any] | None:
        """get_experts_scheme of transformers: one group for the experts of all layers, whatever is ignored."""
        named = (target for target in self.groups if target.startswith("re:") and "experts" in target)
        classes = (target for target in self.groups if not target.startswith("re:"))
        found = next(named, None) or next(classes, None) or next(iter(self.groups), None)
        return None if found is None else self.groups[found]

    def _experts_ignored(self, module: str) -> bool:
        """Of `quant_method: fp8`: also where an expert inside is named, whichever."""
        if any(module in name for name in self.ignored_layers if "experts" in name):
            return True
        return self.engine == c.SGLANG and self._listed_fp8(module)

    # --- other matrices -----------------------------------------------------------------------------------------------

    def linear(self, module: str) -> str:
        """Fate of a matrix that is no expert's, by the name of the module that the engine builds.

        IGNORED; CLAIMED: in the form that the config tells of; UNCLAIMED: in no target (SGLang stops there); PARTED:
        the matrices that the module is made of have several fates, and the engine stops.
        """
        compressed = self.checkpoint.container == COMPRESSED_TENSORS
        listed = (lambda name: self._listed(self.ignore, name)) if compressed else self._listed_fp8
        names = self._shards(module)
        whole = names == [module] or self.engine == c.VLLM  # a fused module may be named by itself
        if whole and listed(module):
            return IGNORED
        ignored = {listed(name) for name in names}
        if len(ignored) > 1:
            return PARTED
        if ignored == {True}:
            return IGNORED
        return CLAIMED if not compressed or self._targeted(module, names) else UNCLAIMED

    def _shards(self, module: str) -> list[str]:
        """The names by which a module is looked up: its own, or those of what it fuses."""
        head, _, last = module.rpartition(".")
        if self.engine == c.SGLANG and self.checkpoint.container == COMPRESSED_TENSORS:
            return [module]  # the class has no packed_modules_mapping
        if self.engine == c.VLLM and last == "qkv_proj" and self.checkpoint.geometry.model_type != "mimo_v2_flash":
            return [module]
        return [f"{head}.{shard}" for shard in _FUSED.get(last, (last,))]

    def _targeted(self, module: str, names: list[str]) -> bool:
        known = _LINEAR_CLASSES.get(module.rpartition(".")[2], "RowParallelLinear")
        return (
            any(self._matches(target, module) for target in self.groups)
            or all(any(self._matches(target, name) for target in self.groups) for name in names)
            or any(self._is_class(target, known) for target in self.groups)
        )

    # --- names --------------------------------------------------------------------------------------------------------

    def _listed(self, names: Iterable[str], name: str) -> bool:
        """In an ignore list of compressed-tensors. SGLang also takes the end of a name for it."""
        ends = self.engine == c.SGLANG
        return any(
            self._matches(entry, name) or (ends and not entry.startswith("re:") and name.endswith(f".{entry}"))
            for entry in names
        )

    def _listed_fp8(self, name: str) -> bool:
        """In `ignored_layers`. vLLM takes whole names, SGLang any run of a name's components."""
        if self.engine != c.SGLANG:
            return name in self.ignored_layers
        whole = f".{name}."
        return any(run in whole for run in self._ignored_runs)

    @cached_property
    def _ignored_runs(self) -> list[str]:
        """`ignored_layers` between dots."""
        return [f".{entry.rstrip('.')}." for entry in self.ignored_layers]

    def _matches(self, pattern: str, name: str) -> bool:
        """`re:` patterns from the start of the name as the engine has it, else equal."""
        given = ("" if name.startswith("model.mtp.") else self.prefix) + name
        if not pattern.startswith("re:"):
            return pattern in (name, given)  # engines map plain names to their own
        return self._starts(pattern, given)

    def _is_class(self, target: str, known: str) -> bool:
        """Whether a target is the class of a module; vLLM and SGLang take a part of its name for it."""
        if target.startswith("re:"):
            return self.engine != c.TRANSFORMERS and self._starts(target, known)
        if self.engine == c.TRANSFORMERS:
            return target == _LINEAR
        return target.lower() in known.lower()

    def _starts(self, pattern: str, text: str) -> bool:
        try:
            return re.match(pattern[3:], text) is not None
        except re.error as error:
            raise CheckpointError(
                f"{self.checkpoint.name}/config.json: quantization_config: {pattern!r} is no pattern ({error})"
            ) from error

    # --- ModelOpt -----------------------------------------------------------------------------------------------------

    def algo(self, module: str) -> str | None:
        """What a ModelOpt config has for a module; None: nothing, so it is left in bf16."""
        ignore = self.config.get("ignore") or self.config.get("exclude_modules") or ()
        if self.checkpoint.container != MODELOPT or any(fnmatch(module, pattern) for pattern in ignore):
            return None
        algo = str(self.config.get("quant_algo")).upper()
        return self._layer_algos.get(module) if algo == "MIXED_PRECISION" else algo

    @cached_property
    def _layer_algos(self) -> dict[str, str]:
        return layer_algos(self.config) if self._from_beside else self.checkpoint.quantized_layers

    @cached_property
    def absent(self) -> list[str]:
        """What the config names and the model does not have."""
        return absent_modules(self.config, self.checkpoint.geometry) if self._from_beside else self.checkpoint.absent

    @property
    def _from_beside(self) -> bool:
        """Whether the engine reads the other file; what it says is not kept for all engines."""
        return self.config is self.checkpoint.settings_beside

    # --- what it is made of -------------------------------------------------------------------------------------------

    def _list(self, value: Any, key: str) -> list[str]:
        if value is None:
            return []
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self._not(value, key, "a list of names")
        return value

    def _not(self, value: Any, key: str, expected: str) -> CheckpointError:
        shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
        return CheckpointError(
            f"{self.checkpoint.name}/config.json: quantization_config.{key} is {shown}, expected {expected}"
        )


def _group_form(weights: dict[str, Any]) -> Stored:
    """The form that a compressed-tensors group declares."""
    try:
        read = read_arguments(weights)
    except ArgumentsError:  # which stops the engine before
        return Stored("compressed-tensors of arguments that it does not take")
    kind, strategy, group = (read.num_bits, read.type), read.strategy, read.group_size
    if kind == (8, "float"):
        block = read.block_structure == (FP8_BLOCK, FP8_BLOCK)
        return Stored(c.FP8 if block else f"{c.FP8} by {strategy}")
    if kind == (4, "int") and strategy in ("group", "channel"):
        return Stored(c.INT4 if read.symmetric else c.INT4_ASYMMETRIC, group if strategy == "group" else CHANNEL)
    if (*kind, strategy, group) == (4, "float", "tensor_group", 16) and read.symmetric:
        return Stored(c.CT_NVFP4, group)
    if (*kind, strategy, group) == (4, "float", "group", 32) and read.symmetric:
        return Stored(c.CT_MXFP4, group)
    return Stored(f"compressed-tensors {read.type} of {read.num_bits} bits, {strategy}", group)
