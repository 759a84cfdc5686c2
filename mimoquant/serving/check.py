"""A checkpoint's facts against an engine's contract → what would be refused, silently corrupted, or is not verified.

Key idea: engines of this family skip tensors they have no name for, so a wrong config loads without a word. What the
files hold is looked up in `contracts`; what config.json makes of them is held against it in `contradictions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from mimoquant.model.geometry import FP8_BLOCK
from mimoquant.planning.documents import EngineCheck
from mimoquant.serving import contracts as c
from mimoquant.serving import contradictions
from mimoquant.serving.input_rounding import input_problems
from mimoquant.serving.kernels import rounding_words, unasked
from mimoquant.serving.problem import WARNING, Problem, of_layers
from mimoquant.serving.quantization_keys import QuantizationKeys
from mimoquant.serving.served import CHANNEL, Served
from mimoquant.serving.transformers_config import config_problems
from mimoquant.wording import ranges


def check(
    checkpoint: Served,
    engine: str,
    version: str | None = None,
    tp: int | None = None,
    expert_tp: int | None = None,
    arch: str | None = None,
) -> list[Problem]:
    """Everything that `engine` would do wrong with a checkpoint, worst first.

    Args:
        version: of the engine; None: the newest one that the contracts were read from.
        tp: tensor parallelism of attention; None: what depends on it is told as a warning.
        expert_tp: of the experts, where it is another than that of attention.
        arch: of the GPUs, as in `gpus`; None: what depends on it is told.
    Raises UsageError: the version cannot be read.
    """
    looked = _Check(checkpoint, engine, version or c.ENGINES[engine].read, tp, expert_tp or tp, arch)
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

    def __init__(
        self, checkpoint: Served, engine: str, version: str, tp: int | None, expert_tp: int | None, arch: str | None
    ) -> None:
        self.checkpoint, self.engine, self.tp, self.expert_tp, self.arch = checkpoint, engine, tp, expert_tp, arch
        self.version, self.label = c.parse_version(version), f"{c.ENGINES[engine].label} {version}"
        self.contradictions = contradictions.of(checkpoint, engine, self.label)

    def problems(self) -> Iterator[Problem]:
        yield from self._mixtures()
        yield from self._parts()
        yield from self._formats()
        yield from self._kept()
        keys = QuantizationKeys(self.contradictions.declared, self.label, self.tp)
        stopped = list(keys.stops())
        yield from stopped
        if not stopped:  # else nothing is built of what it declares
            yield from self.contradictions.built
        yield from self.contradictions.names()
        yield from self.contradictions.settings()
        yield from input_problems(self.contradictions.declared, self.label, self.arch)
        yield from keys.problems()
        if self.engine == c.TRANSFORMERS:
            yield from (Problem(*row) for row in config_problems(self.checkpoint, self.version))
            return
        if self.checkpoint.modelopt_blocks:
            yield from self._row(c.BLOCKS, c.MO_BLOCKS, "config.json")
        if self.checkpoint.bf16_router:
            yield from self._row(c.ROUTERS, c.BF16_ROUTER, "mlp.gate")
        if self.engine == c.VLLM and self.checkpoint.plain_sound:
            yield from self._row(c.TOWERS, c.PLAIN_SOUND, "config.json")
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
        mixed: dict[tuple[str, ...], list[int]] = {}
        for layer, forms in self.checkpoint.experts.items():
            if len(forms) > 1:
                mixed.setdefault(tuple(form.words for form in forms), []).append(layer)
        for names, layers in mixed.items():
            yield Problem(
                c.REFUSED,
                f"{of_layers(layers)}: {'its' if len(layers) == 1 else 'their'} experts have {len(names)} formats "
                f"({', '.join(names)}), {self.label} loads 1",
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
        served = [] if self.engine == c.TRANSFORMERS else [self.checkpoint.subject]  # FP8 or bf16, if all are
        for subject in self.checkpoint.subjects or served:
            layers = [n for n, forms in self.checkpoint.experts.items() if any(f.subject == subject for f in forms)]
            yield from self._row(c.FORMATS, subject, f"layers {ranges(layers)}")
            kernel = unasked(self.engine, subject)
            if kernel and (self.arch is None or self.arch in kernel.archs):
                yield Problem(
                    WARNING,
                    f"layers {ranges(layers)}: {subject} is computed on {kernel.unasked} with activations rounded to "
                    f"{rounding_words(kernel.rounds)}, which nothing in it asks for and J does not know of "
                    f"({self.label})",
                    kernel.source,
                    "quantize with --container native",
                )
        by_channel = [n for n, forms in self.checkpoint.experts.items() if any(f.group_size == CHANNEL for f in forms)]
        if by_channel:
            yield Problem(
                WARNING,
                f"{of_layers(by_channel)}: int4 with one scale a row is not verified ({self.label})",
                "compressed_tensors_moe_wna16.py of 0.32, compressed_tensors_wNa16_moe.py of 0.5.23 (read)",
            )
        subjects, config = set(self.checkpoint.subjects), self.contradictions.declared.config
        if self.engine == c.TRANSFORMERS:
            found = {(form.subject, form.group_size) for forms in self.checkpoint.experts.values() for form in forms}
            if len([form for form in found if form[0] in subjects]) > 1:
                yield from self._row(c.FORMATS, c.UNLIKE, "quantization_config")
        elif config.get("format") == "mixed-precision" and subjects & {c.INT4, c.INT4_ASYMMETRIC}:
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
                "use 0.31.0 or newer",
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
        one = {f.group_size for forms in self.checkpoint.experts.values() for f in forms if f.subject in c.INT4S}
        for group in sorted(size for size in one if size and 0 < inner // tp == size < geometry.hidden):
            shown = f"int4 g{group} with {group} inner channels a rank, one group,"
            found = self._row(c.GROUPS, c.ONE_GROUP, "experts", shown)
            yield from found if self.expert_tp else (replace(problem, verdict=WARNING) for problem in found)
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
        known = (form.group_size or 0 for forms in self.checkpoint.experts.values() for form in forms)
        sizes = {size for size in known if size > 0}
        groups = dict.fromkeys(sizes, "Marlin: in/TP must be a multiple of the group")
        if c.FP8 in self.checkpoint.kept.values():
            groups[FP8_BLOCK] = "FP8 experts are in whole blocks"
        if self.engine == c.SGLANG and c.NATIVE_MXFP4 in self.checkpoint.subjects:
            groups[FP8_BLOCK] = "fp8.py of 0.5.23, create_fp8_moe_weight_ (run): native MXFP4 passes as FP8 there"
        return groups
