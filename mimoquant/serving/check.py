"""A checkpoint's facts against an engine's contract → what would be refused, silently corrupted, or is not verified.

Key idea: engines of this family skip tensors they have no name for, so a wrong config loads without a word. The checks
look modules up as the engine does (ignore list first, then targets, expert 0 for a whole layer, the omni prefix) and
compare what it would build with what the files hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mimoquant.model.geometry import FP8_BLOCK
from mimoquant.model.layout import PROJECTIONS, expert_module
from mimoquant.planning.documents import EngineCheck, EngineProblem
from mimoquant.serving import contracts as c
from mimoquant.serving.declared import Declared
from mimoquant.serving.served import Served, Stored
from mimoquant.serving.transformers_config import config_problems
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT
from mimoquant.wording import ranges

WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing. `verdict`: refused (stops with an error), corrupted (loads and is wrong) or warning.

    `other_tp`: another tensor parallelism avoids it.
    """

    verdict: str
    text: str
    source: str
    hint: str | None = None
    other_tp: bool = False

    @property
    def fails(self) -> bool:
        return self.verdict != WARNING

    def as_plain(self) -> EngineProblem:
        return EngineProblem(
            verdict=self.verdict, text=self.text, source=self.source, hint=self.hint, other_tp=self.other_tp
        )


def check(
    checkpoint: Served, engine: str, version: str | None = None, tp: int | None = None, expert_tp: int | None = None
) -> list[Problem]:
    """Everything that `engine` would do wrong with a checkpoint, worst first.

    Args:
        version: of the engine; None: the newest one that the contracts were read from.
        tp: tensor parallelism of attention; None: what depends on it is told as a warning.
        expert_tp: of the experts, where it is another than that of attention.
    Raises UsageError: the version cannot be read.
    """
    looked = _Check(checkpoint, engine, version or c.ENGINES[engine].read, tp, expert_tp or tp)
    found = list(looked.problems())
    order = {c.CORRUPTED: 0, c.REFUSED: 1, WARNING: 2}
    return sorted(dict.fromkeys(found), key=lambda problem: order[problem.verdict])


def engine_facts(checkpoint: Served, engine: str, version: str | None, tp: int | None) -> EngineCheck:
    """The check as a document."""
    problems = check(checkpoint, engine, version, tp)
    return EngineCheck(
        engine=engine,
        version=version or c.ENGINES[engine].read,
        tp=tp,
        ok=not any(problem.fails for problem in problems),
        problems=[problem.as_plain() for problem in problems],
    )


def planned_facts(checkpoint: Served) -> list[EngineCheck]:
    """What `plan` tells: vLLM and SGLang, as far as it does not depend on how they are started."""
    return [engine_facts(checkpoint, engine, None, None) for engine in (c.VLLM, c.SGLANG)]


class _Check:
    """One check; every method yields problems."""

    def __init__(self, checkpoint: Served, engine: str, version: str, tp: int | None, expert_tp: int | None) -> None:
        self.checkpoint, self.engine, self.tp, self.expert_tp = checkpoint, engine, tp, expert_tp
        self.version, self.label = c.parse_version(version), f"{c.ENGINES[engine].label} {version}"
        self.declared = Declared(checkpoint, c.ENGINES[engine].text_prefix if checkpoint.towers else "")
        self.config = self.declared.config

    def problems(self) -> Iterator[Problem]:
        yield from self._mixtures()
        yield from self._parts()
        yield from self._formats()
        yield from self._kept()
        yield from self._declared()
        if self.engine == c.TRANSFORMERS:
            yield from (Problem(*row) for row in config_problems(self.checkpoint))
            return
        yield from self._linears()
        yield from self._remote_code()
        yield from self._qkv()
        yield from self._widths()
        yield from self._fp8_blocks()

    def _row(self, table: tuple[c.Row, ...], subject: str, where: str, shown: str = "") -> Iterator[Problem]:
        """What a row says; nothing if it is right. `shown`: the subject in words, where its key is none."""
        row = c.rows_for(table, self.engine, subject, self.version)
        where = f"{where}: {shown or subject}"
        if row is None:
            known = [row for row in table if row.engine == self.engine and row.subject == subject and row.since]
            since = ".".join(map(str, min(row.since for row in known))) if known else "no version"
            yield Problem(
                WARNING,
                f"{where} is not verified in {self.label}, known from {since} on",
                "no contract for this version",
            )
        elif row.evidence == c.UNVERIFIED:
            yield Problem(WARNING, f"{where} {row.what or 'should be right'} ({self.label}, not verified)", row.source)
        elif row.verdict != c.RIGHT:
            yield Problem(row.verdict, f"{where} {row.what} ({self.label})", row.source, row.hint)

    def _mixtures(self) -> Iterator[Problem]:
        for layer, forms in self.checkpoint.experts.items():
            if len(forms) > 1:
                names = ", ".join(f"{form.subject} g{form.group_size}" for form in forms)
                yield Problem(
                    c.REFUSED,
                    f"layer {layer}: its experts have {len(forms)} formats ({names}), {self.label} loads 1",
                    "the scheme is looked up for expert 0 of a layer",
                )

    def _parts(self) -> Iterator[Problem]:
        shapes = [name for name in self.checkpoint.missing if name.endswith(".weight_shape")]
        rest = [name for name in self.checkpoint.missing if not name.endswith(".weight_shape")]
        if rest:
            yield Problem(
                c.CORRUPTED,
                f"{rest[0]} is missing, as are {len(rest) - 1} others of the experts: "
                f"{self.label} does not notice, and computes with memory that nothing was written to",
                "coverage is checked for unquantized models only",
            )
        if shapes:
            yield Problem(
                WARNING,
                f"{shapes[0]} is missing, as are {len(shapes) - 1} others: loaders that track weights stop there",
                "vLLM 0.32 with enable_weights_track",
            )

    def _formats(self) -> Iterator[Problem]:
        for subject in self.checkpoint.subjects:
            layers = [n for n, forms in self.checkpoint.experts.items() if any(f.subject == subject for f in forms)]
            yield from self._row(c.FORMATS, subject, f"layers {ranges(layers)}")
        subjects = set(self.checkpoint.subjects)
        if self.config.get("format") == "mixed-precision" and subjects & {c.INT4, c.INT4_ASYMMETRIC}:
            yield from self._row(c.FORMATS, c.MIXED, "quantization_config.format")

    def _kept(self) -> Iterator[Problem]:
        subjects = self.checkpoint.subjects
        for kind in sorted(set(self.checkpoint.kept.values())) if subjects else ():
            layers = [layer for layer, other in self.checkpoint.kept.items() if other == kind]
            named = next(
                (
                    s
                    for s in subjects
                    if any(r.engine == self.engine and r.subject == f"{s}: {kind}" for r in c.CARVE_OUTS)
                ),
                "any",
            )
            yield from self._row(
                c.CARVE_OUTS, f"{named}: {kind}", f"layers {ranges(layers)}", f"a layer kept in {kind}"
            )

    # --- what config.json makes the engine build ----------------------------------------------------------------------

    def _declared(self) -> Iterator[Problem]:
        if self.engine == c.TRANSFORMERS and self.checkpoint.container != COMPRESSED_TENSORS:
            return
        algos = {self.declared.algo(f"model.layers.{layer}.mlp.experts") for layer in self.checkpoint.experts}
        if "NVFP4" in algos and not self.checkpoint.input_scales:
            yield Problem(
                WARNING,
                f"quantization_config declares activations in 4 bits (NVFP4) and there is no "
                f"input_scale: {self.label} scales them by memory not written to, or not at all, where its "
                "kernels round activations (Blackwell)",
                "modelopt.py of 0.33, modelopt_quant.py of 0.5.23",
                "declare W4A16_NVFP4",
            )
        for layer, forms in self.checkpoint.experts.items():
            module = f"model.layers.{layer}.mlp.experts"
            if len(forms) != 1:
                continue  # told already
            names = (expert_module(layer, 0, projection) for projection in PROJECTIONS)
            found = [self.declared.expert_form(name, module) for name in names]
            if len(set(found)) > 1:
                yield Problem(
                    c.REFUSED,
                    f"layer {layer}: quantization_config gives its 3 projections "
                    f"{len(set(found))} schemes, {self.label} takes 1",
                    "get_moe_method",
                )
            elif found[0] != forms[0]:
                yield self._contradiction(layer, found[0], forms[0])

    def _contradiction(self, layer: int, declared: Stored, stored: Stored) -> Problem:
        said, have = (
            f"{form.subject}{f' g{form.group_size}' if form.group_size else ''}" for form in (declared, stored)
        )
        if declared.subject == stored.subject:
            verdict, then = c.REFUSED, "stops at the shapes of the scales"
        elif self.engine == c.VLLM:
            verdict, then = c.CORRUPTED, "skips the tensors it has no name for and computes with memory not written to"
        elif self.engine == c.TRANSFORMERS:
            verdict, then = c.CORRUPTED, "drops what it does not expect and draws random weights"
        else:
            verdict, then = c.REFUSED, "stops with KeyError at the first tensor it has no name for"
        return Problem(
            verdict,
            f"layer {layer}: experts are {have}, quantization_config makes them {said}: {self.label} {then}",
            "load_weights of this family",
            "the patterns in targets and ignore must match names with what the engine puts before them"
            if self.declared.prefix
            else None,
        )

    def _linears(self) -> Iterator[Problem]:
        """Matrices beside the experts: in bf16 under compressed-tensors, in FP8 unless ignored under native."""
        if self.checkpoint.container == MODELOPT:
            yield from self._modelopt_linears()
            return
        scaled: list[str] = []
        untargeted: list[str] = []
        claimed: list[str] = []
        compressed = self.checkpoint.container == COMPRESSED_TENSORS
        for module, parts in self._modules():
            fp8 = any(self.checkpoint.linears[part] == "F8_E4M3" for part in parts)
            lookup = parts if self._by_shard(module) else [module]
            ignore = self.config.get("ignore" if compressed else "ignored_layers")
            ignored = all(self.declared.matches(ignore, name) for name in lookup)
            if compressed:
                targeted = any(self.declared.targets(name) for name in lookup)
                if fp8:
                    scaled.append(module)
                elif not ignored and targeted:
                    claimed.append(module)
                elif not ignored and self.engine == c.SGLANG:
                    untargeted.append(module)
            elif self.config and fp8 == ignored and not module.startswith("model.mtp."):
                claimed.append(module)
        yield from self._linear_problems(scaled, untargeted, claimed, compressed)

    def _modelopt_linears(self) -> Iterator[Problem]:
        """Under ModelOpt they are what `quantized_layers` says of them, or bf16."""
        wrong = []
        for module, parts in self._modules():
            declared = {self.declared.algo(module), *map(self.declared.algo, parts)} - {None}
            if bool(declared) != any(self.checkpoint.linears[part] == "F8_E4M3" for part in parts):
                wrong.append(module)
        if wrong:
            yield Problem(
                c.CORRUPTED,
                f"{wrong[0]} and {len(wrong) - 1} others: their dtype is not what "
                f"quantization_config says, {self.label} builds another layer for them",
                "get_quant_method of its ModelOpt config",
            )

    def _linear_problems(
        self, scaled: list[str], untargeted: list[str], claimed: list[str], compressed: bool
    ) -> Iterator[Problem]:
        if scaled:
            yield Problem(
                c.CORRUPTED,
                f"{scaled[0]} and {len(scaled) - 1} others are FP8: compressed-tensors has no "
                f"parameter for their weight_scale_inv, {self.label} loads them without scales",
                "load_weights of this family",
                "write them in bf16",
            )
        if untargeted:
            yield Problem(
                c.REFUSED,
                f"{untargeted[0]} and {len(untargeted) - 1} others are in neither targets nor "
                f"ignore of quantization_config: {self.label} stops with 'Unable to find matching target'",
                "compressed_tensors/utils.py of 0.5.23, find_matched_target (run)",
                "add a pattern to ignore that matches every module but the experts",
            )
        if claimed and compressed:
            yield Problem(
                c.REFUSED,
                f"{claimed[0]} and {len(claimed) - 1} others are bf16, and quantization_config "
                f"targets them: {self.label} wants packed weights there",
                "vLLM 0.32 on a CPU (run)",
                "name them in ignore (self_attn.qkv_proj too), or target the experts by regex",
            )
        elif claimed:
            yield Problem(
                c.CORRUPTED,
                f"{claimed[0]} and {len(claimed) - 1} others: their dtype is not what "
                f"ignored_layers says, {self.label} loads them without scales",
                "fp8.py, is_layer_skipped",
            )

    def _modules(self) -> Iterator[tuple[str, list[str]]]:
        """Linear modules as engines build them, with the matrices on disk that make them up."""
        parts: dict[str, list[str]] = {}
        for name in self.checkpoint.linears:
            parts.setdefault(_fused(name), []).append(name)
        yield from parts.items()

    def _by_shard(self, module: str) -> bool:
        """Whether a fused module is looked up by the names of its parts."""
        if self.engine == c.SGLANG:
            return False
        flash = self.checkpoint.geometry.model_type == "mimo_v2_flash"
        return flash or not module.endswith("qkv_proj")

    # --- how it is started --------------------------------------------------------------------------------------------

    def _remote_code(self) -> Iterator[Problem]:
        model_type = self.checkpoint.geometry.model_type
        if model_type == "mimo_v2" and not self.checkpoint.config.get("auto_map"):
            verdict = c.REFUSED if self.engine == c.VLLM else WARNING
            unsure = "" if verdict == c.REFUSED else f" ({self.label}, not verified)"
            yield Problem(
                verdict,
                f"config.json: model_type {model_type!r} has no class in transformers, and no "
                f"auto_map names one{unsure}",
                "issue vllm#41519",
                "copy configuration_mimo_v2.py and its auto_map from the source",
            )

    def _qkv(self) -> Iterator[Problem]:
        if self.checkpoint.declared_split and c.rows_for(c.QKV, self.engine, c.DECLARED_SPLIT, self.version):
            yield from self._row(c.QKV, c.DECLARED_SPLIT, "config.json")
        subject, chunks = self.checkpoint.qkv, self.checkpoint.geometry.qkv_chunks
        row = c.rows_for(c.QKV, self.engine, subject, self.version)
        if row is None or row.tp == "any":
            yield from self._row(c.QKV, subject, "self_attn")
            return
        kv_heads = self.checkpoint.geometry.sliding_attention.kv_heads
        if row.same_kv_heads and kv_heads != chunks:
            yield Problem(
                c.REFUSED,
                f"self_attn: {subject} is in {chunks} chunks, sliding-window layers have "
                f"{kv_heads} KV heads: {self.label} stops at their scales",
                "pull requests #53242 and #57508",
                "use 0.32.0 or newer",
            )
            return
        allowed = f"{'must be' if row.tp == 'is the chunks' else 'must divide'} {chunks}"
        if self.tp is None:
            many = "1 chunk" if chunks == 1 else f"{chunks} chunks"
            yield Problem(
                WARNING, f"self_attn: {subject} is in {many}, attention TP {allowed} ({self.label})", row.source
            )
        elif self.checkpoint.geometry.global_attention.kv_heads % self.tp:  # what engines take for the chunks
            yield self._wrong_tp(row, chunks, allowed, c.REFUSED if self.engine == c.SGLANG else row.otherwise)
        elif row.tp == "is the chunks" and chunks != self.tp:
            yield self._wrong_tp(row, chunks, allowed, row.otherwise)

    def _wrong_tp(self, row: c.Row, chunks: int, allowed: str, verdict: str) -> Problem:
        text = f"self_attn: {row.subject} {row.what}: attention TP is {self.tp}, {allowed} ({self.label})"
        if row.evidence == c.UNVERIFIED:
            verdict, text = WARNING, f"{text}, not verified"
        other = f", or {row.hint}" if row.hint else ""
        hint = f"use attention TP {chunks} and data parallelism for the rest{other}"
        return Problem(verdict, text, row.source, hint, other_tp=True)

    def _widths(self) -> Iterator[Problem]:
        """What tensor parallelism has to divide."""
        geometry = self.checkpoint.geometry
        if self.tp is not None:
            for kind, attention in (("global", geometry.global_attention), ("sliding", geometry.sliding_attention)):
                heads, kv = attention.heads, attention.kv_heads
                if heads % self.tp or (kv % self.tp and self.tp % kv):
                    yield Problem(
                        c.REFUSED,
                        f"{kind} attention: {heads} heads and {kv} KV heads do not split over TP {self.tp}",
                        "QKVParallelLinear",
                    )
        inner, tp = geometry.expert_intermediate, self.expert_tp or 1
        for group, source in sorted(self._groups().items()):
            if inner % tp or inner // tp % group:
                yield Problem(
                    c.REFUSED,
                    f"experts: {inner} inner channels over TP {tp} are {inner / tp:g} a rank, no "
                    f"multiple of the group of {group}",
                    source,
                    "use expert parallelism",
                )

    def _fp8_blocks(self) -> Iterator[Problem]:
        """Whether a rank's part of k is in whole blocks of scales, which are laid out for q, k and v together."""
        tp = self.tp or 1
        for rows in sorted(self.checkpoint.fp8_k_rows if self.checkpoint.qkv == c.SPLIT else ()):
            if rows // tp % FP8_BLOCK:
                stops = tp * math.ceil(rows / tp / FP8_BLOCK) > math.ceil(rows / FP8_BLOCK)
                does = "stops at its scales" if stops else "puts v's scales on other rows"
                yield Problem(
                    c.REFUSED if stops else c.CORRUPTED,
                    f"self_attn: FP8 k of {rows} rows over TP {tp} is "
                    f"{rows / tp:g} a rank, no multiple of the block of {FP8_BLOCK}: {self.label} {does}",
                    "issue sglang#18003; adjust_block_scale_shard of vLLM 0.32 is the same",
                    f"use a smaller attention TP and data parallelism, or {c.BF16_QKV}",
                    other_tp=True,
                )

    def _groups(self) -> dict[int, str]:
        """What a rank's inner channels must be a multiple of, and who says so."""
        sizes = {form.group_size for forms in self.checkpoint.experts.values() for form in forms if form.group_size}
        groups = dict.fromkeys(sizes, "Marlin: in/TP must be a multiple of the group")
        if c.FP8 in self.checkpoint.kept.values():
            groups[FP8_BLOCK] = "FP8 experts are in whole blocks"
        if self.engine == c.SGLANG and c.NATIVE_MXFP4 in self.checkpoint.subjects:
            groups[FP8_BLOCK] = "fp8.py of 0.5.23, create_fp8_moe_weight_ (run): native MXFP4 passes as FP8 there"
        return groups


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
