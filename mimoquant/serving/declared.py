"""What a checkpoint's config.json makes an engine build, module by module.

Key idea: modules are looked up as the engine does: ignore list first, then targets, with the prefix that the engine
puts before names; of ModelOpt's `quantized_layers` a module's own entry, else the first of a module inside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from mimoquant.errors import CheckpointError
from mimoquant.serving import contracts as c
from mimoquant.serving.served import Served, Stored
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT


class Declared:
    """The `quantization_config` of a checkpoint. `prefix`: what the engine puts before the names of the text model."""

    def __init__(self, checkpoint: Served, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        self.config: dict[str, Any] = checkpoint.text.get("quantization_config") or {}

    def expert_form(self, name: str, module: str) -> Stored:
        """What the engine will make of a layer's experts."""
        if self.checkpoint.container == MODELOPT:
            algo = self.algo(module)
            return Stored(c.MO_NVFP4, 16) if algo in ("NVFP4", "W4A16_NVFP4") else Stored(algo or c.BF16)
        if self.checkpoint.container != COMPRESSED_TENSORS:
            ignored = module in (self.config.get("ignored_layers") or [])
            if ignored or not self.config:
                return Stored(c.BF16)
            return Stored(c.NATIVE_MXFP4, 32) if self.config.get("store_dtype") == "mxfp4" else Stored(c.FP8)
        if self.matches(self.config.get("ignore"), name):
            return Stored(c.BF16)
        for group in (self.config.get("config_groups") or {}).values():
            if self.matches(group.get("targets"), name):
                return _group_form(group.get("weights") or {})
        return Stored(c.BF16)

    def algo(self, module: str) -> str | None:
        """What a ModelOpt config has for a module; None: nothing, so it is left in bf16."""
        ignore = self.config.get("ignore") or self.config.get("exclude_modules") or ()
        if self.checkpoint.container != MODELOPT or any(fnmatch(module, pattern) for pattern in ignore):
            return None
        algo = str(self.config.get("quant_algo")).upper()
        return self._quantized_layers.get(module) if algo == "MIXED_PRECISION" else algo

    @cached_property
    def _quantized_layers(self) -> dict[str, str]:
        """Module → its own entry, else the first one of a module inside it."""
        named: dict[str, str] = {}
        layers = self.config.get("quantized_layers")
        entries = layers.items() if isinstance(layers, dict) else ()
        algos = {key: str(entry.get("quant_algo")).upper() for key, entry in entries if isinstance(entry, dict)}
        for key, algo in algos.items():
            parts = key.split(".")
            for end in range(1, len(parts)):
                named.setdefault(".".join(parts[:end]), algo)
        return named | algos

    def targets(self, name: str) -> bool:
        groups = (self.config.get("config_groups") or {}).values()
        return any(
            "Linear" in (group.get("targets") or ()) or self.matches(group.get("targets"), name) for group in groups
        )

    def matches(self, patterns: Iterable[str] | None, name: str) -> bool:
        """As compressed-tensors matches: `re:` patterns from the start of the name as the engine has it, else equal."""
        prefix = "" if name.startswith("model.mtp.") else self.prefix
        for pattern in patterns or ():
            if not pattern.startswith("re:"):
                if pattern == name:  # engines map plain names to their own
                    return True
                continue
            try:
                if re.match(pattern[3:], prefix + name):
                    return True
            except re.error as error:
                raise CheckpointError(
                    f"{self.checkpoint.name}/config.json: quantization_config: {pattern!r} is no pattern ({error})"
                ) from error
        return False


def _group_form(weights: dict[str, Any]) -> Stored:
    """The form that a compressed-tensors group declares."""
    if weights.get("num_bits") == 8 and weights.get("type") == "float":
        return Stored(c.FP8)
    group = weights.get("group_size")
    if weights.get("type") == "int":
        return Stored(c.INT4 if weights.get("symmetric", True) else c.INT4_ASYMMETRIC, group)
    return Stored(c.CT_NVFP4 if weights.get("strategy") == "tensor_group" or group == 16 else c.CT_MXFP4, group)
