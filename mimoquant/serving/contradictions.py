"""What an engine would build by config.json, held against what the files hold.

Key idea: modules are looked up as the engine does (`declared`), expert 0 for a whole layer; where the files hold
another form, the engine stops or, worse, loads. What repeats in many layers is one sentence with their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from mimoquant.model.layout import PROJECTIONS, expert_module
from mimoquant.planning.settings_beside import contradictions
from mimoquant.planning.stored import absent_text
from mimoquant.serving import contracts as c
from mimoquant.serving.declared import CLAIMED, IGNORED, PARTED, UNCLAIMED, Declared
from mimoquant.serving.problem import WARNING, Problem, and_others, of_layers
from mimoquant.serving.served import Served, Stored
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT

_SCHEMES = (c.INT4, c.INT4_ASYMMETRIC, c.CT_MXFP4, c.CT_NVFP4)  # of compressed-tensors, for experts in 4 bits
Forms = tuple[Stored | None, Stored]  # declared, stored


def of(checkpoint: Served, engine: str, label: str) -> Contradictions:
    """Those of a checkpoint, looked for once, however many layouts a command is tried in."""
    known: dict[tuple[str, str], Contradictions] = checkpoint.asked
    return known.setdefault((engine, label), Contradictions(checkpoint, engine, label))


class Contradictions:
    """Between the config and the files of one checkpoint; methods yield problems. `label`: of the engine."""

    def __init__(self, checkpoint: Served, engine: str, label: str) -> None:
        self.checkpoint, self.engine, self.label = checkpoint, engine, label
        self.declared = Declared(checkpoint, engine)
        self.container = checkpoint.container

    @cached_property
    def built(self) -> list[Problem]:
        """Of what the engine builds: experts and other matrices."""
        return [*self.experts(), *self.linears()]

    def experts(self) -> Iterator[Problem]:
        packed = any(form.subject in _SCHEMES for forms in self.checkpoint.experts.values() for form in forms)
        if self.engine == c.TRANSFORMERS and self.container != COMPRESSED_TENSORS and not packed:
            return
        parted: dict[int, list[int]] = {}
        others: dict[Forms, list[int]] = {}
        for layer, forms in self.checkpoint.experts.items():
            if len(forms) != 1 or (self.declared.own_experts and layer in self.checkpoint.kept):
                continue  # told already
            found = self._forms(layer)
            if len(set(found)) > 1:
                parted.setdefault(len(set(found)), []).append(layer)
            elif found[0] != forms[0]:
                others.setdefault((found[0], forms[0]), []).append(layer)
        for count, layers in parted.items():
            yield Problem(
                c.REFUSED,
                f"{of_layers(layers)}: quantization_config gives {'its' if len(layers) == 1 else 'their'} 3 "
                f"projections {count} schemes, {self.label} takes 1",
                "get_moe_method",
            )
        for (declared, stored), layers in others.items():
            yield self._contradiction(layers, declared, stored)

    def names(self) -> Iterator[Problem]:
        """Of modules that the model does not have."""
        if absent := self.declared.absent:
            yield Problem(WARNING, absent_text(absent, self.checkpoint.geometry), "config.json")

    def settings(self) -> Iterator[Problem]:
        """Between config.json and ModelOpt's file beside it."""
        told, beside = self.checkpoint.text.get("quantization_config"), self.checkpoint.settings_beside
        reads = "the second" if self.declared.config is beside else "the first"
        for text in contradictions(told, beside) if told and beside else ():
            yield Problem(
                WARNING, f"{text}: {self.label} reads {reads}", "get_quant_config of vLLM 0.32, SGLang 0.5.23"
            )

    def _forms(self, layer: int) -> list[Stored | None]:
        """What each projection of a layer's first expert is to be."""
        module = f"model.layers.{layer}.mlp.experts"
        return [self.declared.expert_form(expert_module(layer, 0, p), module) for p in PROJECTIONS]

    def _contradiction(self, layers: list[int], declared: Stored | None, stored: Stored) -> Problem:
        have = stored.words
        if declared is None:
            return Problem(
                c.REFUSED,
                f"{of_layers(layers)}: experts are {have}, and in neither targets nor ignore of quantization_config: "
                f"{self.label} stops with 'Unable to find matching target'",
                "compressed_tensors/utils.py of 0.5.23, find_matched_target (run)",
            )
        same_names = declared.subject == stored.subject or declared.subject.startswith(f"{stored.subject} by ")
        if same_names:
            verdict, then = c.REFUSED, "stops at the shapes of the scales"
        elif declared.subject.startswith("compressed-tensors ") and declared.subject not in _SCHEMES:
            verdict, then = c.REFUSED, "has no scheme for them, or stops at their shapes"
        elif self.engine == c.VLLM:
            verdict, then = c.CORRUPTED, "skips the tensors it has no name for and computes with memory not written to"
        elif self.engine == c.TRANSFORMERS:
            verdict, then = c.CORRUPTED, "drops what it does not expect and draws random weights"
        elif (declared.subject, stored.subject) == (c.INT4_ASYMMETRIC, c.INT4):  # it has names for all that is stored
            verdict, then = c.CORRUPTED, "takes zero points from memory not written to"
        else:
            verdict, then = c.REFUSED, "stops with KeyError at the first tensor it has no name for"
        return Problem(
            verdict,
            f"{of_layers(layers)}: experts are {have}, quantization_config makes them {declared.words}: "
            f"{self.label} {then}",
            "load_weights of this family",
            "the patterns in targets and ignore must match names with what the engine puts before them"
            if self.declared.prefix
            else None,
        )

    # --- matrices beside the experts ----------------------------------------------------------------------------------

    def linears(self) -> Iterator[Problem]:
        """In bf16 under compressed-tensors, in FP8 unless ignored under native, as `quantized_layers` says it under
        ModelOpt."""
        if self.container == COMPRESSED_TENSORS:
            yield from self._compressed()
        elif self.engine == c.TRANSFORMERS:
            return
        elif self.container == MODELOPT:
            yield from self._modelopt()
        else:
            yield from self._native()

    def _modules(self) -> Iterator[tuple[str, bool]]:
        """Linear modules as the engine builds them, and whether any matrix on disk that makes one up is FP8."""
        for module, names in self._parts().items():
            yield module, any(self.checkpoint.linears[name] == "F8_E4M3" for name in names)

    def _parts(self) -> dict[str, list[str]]:
        """Module as the engine builds it → the matrices on disk that make it up."""
        fused = self.engine != c.TRANSFORMERS
        parts: dict[str, list[str]] = {}
        for name in self.checkpoint.linears:
            parts.setdefault(_fused(name) if fused else name, []).append(name)
        return parts

    def _compressed(self) -> Iterator[Problem]:
        modules = dict(self._modules())
        if self.engine == c.TRANSFORMERS:  # it builds no MTP layers
            modules = {module: fp8 for module, fp8 in modules.items() if not module.startswith("model.mtp.")}
        scaled = [module for module, fp8 in modules.items() if fp8]
        fates: dict[str, list[str]] = {}
        for module, fp8 in modules.items():
            if not fp8:
                fates.setdefault(self.declared.linear(module), []).append(module)
        if scaled:
            yield Problem(
                c.CORRUPTED,
                f"{and_others(scaled)} are FP8: compressed-tensors has no "
                f"parameter for their weight_scale_inv, {self.label} loads them without scales",
                "load_weights of this family",
                "write them in bf16",
            )
        if self.engine == c.SGLANG and (untargeted := fates.get(UNCLAIMED)):
            yield Problem(
                c.REFUSED,
                f"{and_others(untargeted)} are in neither targets nor "
                f"ignore of quantization_config: {self.label} stops with 'Unable to find matching target'",
                "compressed_tensors/utils.py of 0.5.23, find_matched_target (run)",
                "add a pattern to ignore that matches every module but the experts",
            )
        if parted := fates.get(PARTED):
            yield self._parted(parted)
        if claimed := fates.get(CLAIMED):
            wants, source = "wants packed weights there", "vLLM 0.32 on a CPU (run)"
            if self.engine == c.TRANSFORMERS:
                wants, source = "draws random weights for them", "5.17 on a CPU, loading info (run)"
            yield Problem(
                c.CORRUPTED if self.engine == c.TRANSFORMERS else c.REFUSED,
                f"{and_others(claimed)} are bf16, and quantization_config targets them: {self.label} {wants}",
                source,
                "name them in ignore (self_attn.qkv_proj too), or target the experts by regex",
            )

    def _native(self) -> Iterator[Problem]:
        config = self.declared.config
        fates = {module: self.declared.linear(module) for module, _ in self._modules()}
        modules = {module: fp8 for module, fp8 in self._modules() if not module.startswith("model.mtp.")}
        if parted := [module for module in modules if config and fates[module] == PARTED]:
            yield self._parted(parted)
        # without a quantization_config an engine makes all of them bf16
        bf16 = [module for module in modules if not config or fates[module] == IGNORED]
        built = dict.fromkeys(modules, True) | dict.fromkeys(bf16, False)
        wrong = [module for module, fp8 in modules.items() if module not in parted and fp8 != built[module]]
        if wrong:
            said = "what ignored_layers says" if config else "bf16, and config.json has no quantization_config"
            yield Problem(
                c.CORRUPTED,
                f"{and_others(wrong)}: their dtype is not {said}, {self.label} loads them without scales",
                "fp8.py, is_layer_skipped",
            )

    def _parted(self, modules: list[str]) -> Problem:
        return Problem(
            c.REFUSED,
            f"{and_others(modules)}: quantization_config ignores some of the matrices that make one up, and not "
            f"others: {self.label} stops, for it builds one module of them",
            "should_ignore_layer, is_layer_skipped of vLLM 0.32 and SGLang 0.5.23",
            "name all of them, or none",
        )

    def _modelopt(self) -> Iterator[Problem]:
        wrong, parts = [], self._parts()
        for module, fp8 in self._modules():
            declared = {self.declared.algo(module), *map(self.declared.algo, parts[module])} - {None}
            if bool(declared) != fp8:
                wrong.append(module)
        if wrong:
            yield Problem(
                c.CORRUPTED,
                f"{and_others(wrong)}: their dtype is not what "
                f"quantization_config says, {self.label} builds another layer for them",
                "get_quant_method of its ModelOpt config",
            )


def _fused(name: str) -> str:
    """q_proj, k_proj, v_proj → qkv_proj; gate_proj, up_proj → gate_up_proj."""
    head, _, last = name.rpartition(".")
    fused = {
        "q_proj": "qkv_proj",
        "k_proj": "qkv_proj",
        "v_proj": "qkv_proj",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
    }.get(last, last)
    return f"{head}.{fused}"
