"""What an engine makes of the other keys of a compressed-tensors config: formats, activations, cache, sparsity.

Key idea: each key of a config that llm-compressor or others wrote is known here (`observer` and its like change nothing
for a reader) or is named in a problem. Only groups that experts are in are looked at, but for what stops an engine when
it parses the config.
Reference: vLLM 0.32 and SGLang 0.5.23, compressed_tensors.py and compressed_tensors_moe*.py of each, compressed-tensors
0.17 to 0.19 (`QuantizationArgs`); `tests/serving/test_quantization_keys.py` asks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mimoquant.model.layout import expert_module
from mimoquant.serving import contracts as c
from mimoquant.serving.arguments import STRICT_ORDERS, ArgumentsError, read_arguments
from mimoquant.serving.declared import Declared
from mimoquant.serving.problem import WARNING, Problem
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT

_KNOWN_KEYS = {
    "config_groups",
    "format",
    "global_compression_ratio",
    "ignore",
    "kv_cache_scheme",
    "quant_method",
    "quantization_status",
    "sparsity_config",
    "transform_config",
    "version",
    "packed_modules_mapping",
    "linear_fp8_config",
    "run_compressed",
}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_STATUSES = ("initialized", "calibration", "frozen", "compressed", "decompressed")
_ACTIVATION_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "pack-quantized")
_PARSED = "compressed_tensors.py of vLLM 0.32 and SGLang 0.5.23, from_config (run)"
_MOE = "compressed_tensors_moe.py of vLLM 0.32, get_moe_scheme of SGLang 0.5.23 (run)"
_LIBRARY = "compressed-tensors 0.19 with transformers 5.17 (run)"
_NO_PART = "which is no part of J"


class QuantizationKeys:
    """Of one checkpoint, for one engine; every method yields problems."""

    def __init__(self, declared: Declared, label: str, tp: int | None) -> None:
        self.declared, self.config, self.label, self.tp = declared, declared.config, label, tp
        self.engine, self.checkpoint = declared.engine, declared.checkpoint
        self.serves = declared.engine in (c.VLLM, c.SGLANG)

    def stops(self) -> Iterator[Problem]:
        """What stops the engine while it reads the config, before it builds anything."""
        if self.checkpoint.container != COMPRESSED_TENSORS:
            return
        assert self.declared.groups is not None  # raises where it is not made of groups at all
        for key in ("config_groups", "ignore"):
            if self.serves and self.config.get(key, ()) is None:
                yield self._refused(f"{key} is null", _PARSED, f"delete {key}, or give what belongs there")
        for name, group in (self.config.get("config_groups") or {}).items():
            yield from self._parsing(f"config_groups.{name}", group)
        status = self.config.get("quantization_status", "compressed")
        if self.engine == c.TRANSFORMERS and status not in _STATUSES:
            yield self._refused(f"quantization_status is {status!r}, known are {', '.join(_STATUSES)}", _LIBRARY)

    def problems(self) -> Iterator[Problem]:
        """Of all else."""
        if self.checkpoint.container == MODELOPT and (algo := self.config.get("kv_cache_quant_algo")):
            yield self._warning(f"kv_cache_quant_algo {algo!r} has keys and values cached in it, {_NO_PART}", _PARSED)
        if self.checkpoint.container != COMPRESSED_TENSORS:
            return
        for group, subject in self._used():
            weights, inputs = group.get("weights") or {}, group.get("input_activations")
            yield from self._order(weights, subject)
            yield from self._format(group, subject)
            yield from self._activations(inputs, weights, subject)
            if group.get("output_activations") and self.serves:
                yield self._warning("output_activations is not applied to experts", _MOE)
        yield from self._cache()
        yield from self._sparsity()
        yield from self._rest()

    def _used(self) -> list[tuple[dict[str, Any], str]]:
        """The groups that experts are in, with what is stored of the first layer of each."""
        found: dict[int, tuple[dict[str, Any], str]] = {}
        for layer, forms in self.checkpoint.experts.items():
            group = self.declared.expert_group(expert_module(layer, 0, "gate"))
            if group is not None and forms and forms[0].subject in self.checkpoint.subjects:
                found.setdefault(id(group), (group, forms[0].subject))
        return list(found.values())

    def _parsing(self, where: str, group: dict[str, Any]) -> Iterator[Problem]:
        """What stops an engine when it reads the config, whether experts are in the group or not."""
        targets, weights = group.get("targets"), group.get("weights")
        if targets is None:
            yield self._refused(f"{where} has no targets", _PARSED)
        attention = targets and len(targets) == 1 and str(targets[0]).endswith("Attention")  # vLLM passes over these
        if not weights and self.serves and not (attention and self.engine == c.VLLM):
            yield self._refused(f"{where} has no weights", _PARSED)
        for part in ("weights", "input_activations", "output_activations"):
            yield from self._arguments(f"{where}.{part}", group.get(part) or {})
        if (weights or {}).get("dynamic") and self.serves:
            yield self._refused(f"{where}.weights are dynamic", _MOE)
        if self.engine == c.TRANSFORMERS and (odd := sorted(group.keys() - _GROUP_KEYS)):
            yield self._refused(f"{where} has {', '.join(odd)}, which QuantizationScheme does not take", _LIBRARY)

    def _arguments(self, where: str, given: Any) -> Iterator[Problem]:
        """Of weights or activations, where the library that engines read them with does not take them."""
        if not isinstance(given, dict):
            yield self._refused(f"{where} is {given!r}, no object", _PARSED)
            return
        try:
            order = read_arguments(given).actorder
        except ArgumentsError as error:
            yield self._refused(f"{where}{error}", _PARSED)
            return
        told = given.get("actorder")
        if order == "group" and self.engine != c.SGLANG:
            yield self._refused(
                f"{where}.actorder is {told!r}, which is no longer supported there",
                "compressed_tensors.py of vLLM 0.32; transformers 5.17 with compressed-tensors 0.19 (run)",
                "quantize with static order",
            )
        elif order and self.engine == c.TRANSFORMERS and told not in STRICT_ORDERS:
            yield self._refused(f"{where}.actorder is {told!r}, in other letters", _LIBRARY)

    def _order(self, weights: dict[str, Any], subject: str) -> Iterator[Problem]:
        """actorder. Files with weight_g_idx are not read here, so there is none."""
        order = weights.get("actorder") if isinstance(weights.get("actorder"), str) else None
        grouped = weights.get("actorder") is True or (order or "").lower() == "group"
        if grouped and self.engine == c.SGLANG and subject in (c.INT4, c.INT4_ASYMMETRIC):
            yield Problem(
                c.CORRUPTED,
                f"quantization_config: actorder 'group', and no weight_g_idx is stored: {self.label} sorts columns by "
                "memory not written to",
                "compressed_tensors_wNa16_moe.py of 0.5.23 (read)",
                "delete actorder where groups are in order",
            )
        elif order and order.lower() in ("weight", "dynamic") and self.engine == c.SGLANG and self.tp != 1:
            yield self._warning(
                f"actorder {order!r} keeps the scales of down_proj whole on each rank, not verified at more than TP 1",
                "compressed_tensors_wNa16_moe.py of 0.5.23 (read)",
            )

    def _format(self, group: dict[str, Any], subject: str) -> Iterator[Problem]:
        """How the experts' group says that they are packed; the format of the whole counts where it is silent."""
        of_group = group.get("format")
        kind = self.config.get("format") if of_group is None else of_group
        packed = subject in (c.INT4, c.INT4_ASYMMETRIC)
        if packed and self.engine == c.VLLM and kind != "pack-quantized":
            yield self._refused(f"format {kind!r} of int4 experts, where it takes pack-quantized only", _MOE)
        if self.engine == c.SGLANG and packed and self.config.get("format") != "pack-quantized":
            yield self._refused(
                f"format {self.config.get('format')!r} of the whole, where its int4 experts need pack-quantized", _MOE
            )
        if self.engine == c.SGLANG and subject == c.CT_NVFP4 and kind not in _ACTIVATION_FORMATS:
            if self.checkpoint.input_scales:
                yield self._refused(f"format {kind!r}, for which it has no place for input_global_scale", _MOE)
            else:
                yield self._warning(f"format {kind!r} leaves activations in bf16", _MOE)
        if (
            self.engine == c.TRANSFORMERS
            and of_group is not None
            and of_group not in _PACKERS.get(subject, (of_group,))
        ):
            yield self._refused(f"format {of_group!r} of {subject} experts", "5.17 on a CPU (run)")

    def _activations(self, inputs: Any, weights: dict[str, Any], subject: str) -> Iterator[Problem]:
        if not self.serves:
            return
        if not inputs:
            if subject == c.CT_NVFP4 and self.checkpoint.input_scales and self.engine == c.SGLANG:
                yield self._refused(
                    "no input_activations, and input_global_scale is stored, for which it has no place", _MOE
                )
            return
        if not isinstance(inputs, dict):
            return  # told already
        shown = f"{inputs.get('type', 'int')} of {inputs.get('num_bits', 8)} bits, {inputs.get('strategy')}"
        verdict = self._activations_verdict(inputs, weights, subject)
        if verdict == c.CORRUPTED:
            yield Problem(
                c.CORRUPTED,
                f"quantization_config: input_activations ({shown}) beside {subject} experts: {self.label} builds them "
                "without weight_packed, and computes with memory not written to",
                "compressed_tensors_moe_w4a8_int8.py of 0.32 (read)",
                "delete input_activations: weights are served as they are then",
            )
        elif verdict == c.REFUSED:
            yield self._refused(
                f"input_activations ({shown}) beside {subject} experts", _MOE, "delete input_activations"
            )
        elif subject != c.CT_NVFP4:  # of which `input_rounding` tells
            yield self._warning(
                f"input_activations ({shown}): activations are rounded too where kernels can, {_NO_PART}", _MOE
            )

    def _activations_verdict(self, inputs: dict[str, Any], weights: dict[str, Any], subject: str) -> str:
        bits, kind = inputs.get("num_bits", 8), inputs.get("type", "int")
        if subject == c.CT_NVFP4:
            same = (bits, kind, inputs.get("strategy"), inputs.get("group_size")) == (4, "float", "tensor_group", 16)
            return WARNING if same and inputs.get("symmetric", True) else c.REFUSED
        if subject not in (c.INT4, c.INT4_ASYMMETRIC):
            return WARNING
        dynamic = bits == 8 and bool(inputs.get("dynamic")) and weights.get("symmetric", True)
        if self.engine == c.SGLANG:  # which looks such a scheme up by the class alone
            return WARNING if dynamic and "Linear" in self.declared.groups else c.REFUSED
        if not dynamic or inputs.get("strategy") != "token":
            return c.REFUSED
        return WARNING if kind == "float" else c.CORRUPTED

    def _cache(self) -> Iterator[Problem]:
        scheme = self.config.get("kv_cache_scheme")
        if scheme is None:
            return
        told = scheme if isinstance(scheme, dict) else {}
        strategies = ("tensor", "attn_head") if self.engine == c.VLLM else ("tensor",)
        known = (told.get("type"), told.get("num_bits")) == ("float", 8) and told.get("strategy") in strategies
        known = known and told.get("symmetric") is True and (self.engine == c.VLLM or not told.get("dynamic"))
        shown = f"{told.get('type')} of {told.get('num_bits')} bits, {told.get('strategy')}"
        fault = _fault(scheme) if self.engine == c.TRANSFORMERS else None
        if fault:
            yield self._refused(f"kv_cache_scheme{fault}", _LIBRARY, "delete kv_cache_scheme")
        elif self.engine == c.TRANSFORMERS and not self.checkpoint.cache_scales:
            yield Problem(
                c.CORRUPTED,
                f"quantization_config: kv_cache_scheme ({shown}), and no k_scale and v_scale are stored: {self.label} "
                "rounds keys and values by what it draws for them",
                "5.17 on a CPU, loading info (run)",
                "delete kv_cache_scheme",
            )
        elif self.engine == c.TRANSFORMERS:
            yield self._warning(f"kv_cache_scheme ({shown}) is not verified there, {_NO_PART}", "not tried")
        elif known:
            yield self._warning(f"kv_cache_scheme ({shown}) has keys and values cached in FP8, {_NO_PART}", _PARSED)
        elif self.engine == c.VLLM:
            yield self._refused(
                f"kv_cache_scheme ({shown}), where it takes symmetric FP8 with a scale for a tensor or head",
                "compressed_tensors.py of 0.32, validate_kv_cache_scheme (run)",
                "delete kv_cache_scheme",
            )
        else:
            yield self._warning(f"kv_cache_scheme ({shown}) is passed over", "compressed_tensors.py of 0.5.23 (read)")

    def _sparsity(self) -> Iterator[Problem]:
        block = self.config.get("sparsity_config")
        if not block:
            return
        if not (isinstance(block, dict) and isinstance(block.get("format"), str)):
            yield self._refused("sparsity_config without a format", _PARSED, "delete sparsity_config")
        elif block.get("targets") and self.engine == c.VLLM:
            yield self._refused(
                f"sparsity_config ({block['format']}) has targets, and sparsity is no longer supported there",
                _PARSED,
                "delete it where weights are stored dense",
            )
        elif block.get("targets"):
            yield self._warning(f"sparsity_config ({block['format']}) is passed over", _PARSED)

    def _rest(self) -> Iterator[Problem]:
        if "linear_fp8_config" in self.config and self.engine == c.SGLANG:
            yield Problem(
                c.CORRUPTED,
                f"quantization_config: linear_fp8_config makes every matrix beside the experts FP8, and they are bf16: "
                f"{self.label} loads them without scales",
                "compressed_tensors.py of 0.5.23, get_quant_method (read)",
                "delete linear_fp8_config",
            )
        if odd := sorted(self.config.keys() - _KNOWN_KEYS):
            yield self._warning(f"{', '.join(odd)}: not known here, and passed over by what is known of it", _PARSED)

    def _warning(self, text: str, source: str) -> Problem:
        return Problem(WARNING, f"quantization_config: {text} ({self.label})", source)

    def _refused(self, text: str, source: str, hint: str | None = None) -> Problem:
        return Problem(c.REFUSED, f"quantization_config: {text}: {self.label} stops", source, hint)


def _fault(scheme: Any) -> str | None:
    """Why a scheme is none that the library takes, as the end of a sentence."""
    if not isinstance(scheme, dict):
        return f" is {scheme!r}, no object"
    try:
        read_arguments(scheme)
    except ArgumentsError as error:
        return str(error)
    return None


_PACKERS = {
    c.INT4: ("pack-quantized",),
    c.CT_MXFP4: ("mxfp4-pack-quantized",),
    c.CT_NVFP4: ("nvfp4-pack-quantized",),
}
