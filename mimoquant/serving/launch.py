"""A checkpoint, an engine, GPUs → the command that serves it, as a document.

Key idea: try the parallel layouts that the GPUs allow, take the first that the contracts have nothing against, and lay
weights and KV cache out in what a GPU has. Nothing is guessed that the checkpoint says: chunks of the fused qkv, group
sizes, MTP layers, towers, heads. A release is a checkpoint like an output: the same rows hold for it.

Left out: pipeline parallelism, prefill-decode disaggregation. The memory estimate counts weights, one sequence's KV
cache and a flat reserve, and was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.drafter import Drafter, open_drafter
from mimoquant.model.served_rounding import NONE
from mimoquant.serving import contracts as c
from mimoquant.serving.as_served import kernel_subject
from mimoquant.serving.check import check
from mimoquant.serving.command import ATTN_DP_SINCE, SWA_RATIO, Command, Layout, Speculation
from mimoquant.serving.documents import LaunchDocument, PatchFacts
from mimoquant.serving.gpus import GPUS, Gpu
from mimoquant.serving.kernels import kernel, rounding_words
from mimoquant.serving.problem import Problem
from mimoquant.serving.served import Served
from mimoquant.wording import size

GIB = 2**30
RESERVE_BYTES = 5 * GIB  # activations, CUDA graphs, communication buffers; an assumption
PREFILL_TOKENS = 8192  # that a chunk of prefill adds to the window of sliding-window layers
LEAST_CONTEXT = 8192


def launch(
    checkpoint: Served,
    engine: str,
    gpu: str,
    gpus: int,
    *,
    version: str | None = None,
    mtp: bool = False,
    dflash: Path | None = None,
    deepep: bool = False,
) -> LaunchDocument:
    """Make the command.

    Raises:
        UsageError: options that cannot go together, or GPUs that the checkpoint does not fit on.
        CheckpointError: the engine would refuse or corrupt it, however it is started, or the drafter does not fit.
    """
    drafter = _check_options(checkpoint, mtp, dflash)
    maker = _Maker(checkpoint, engine, GPUS[gpu], gpus, version or c.ENGINES[engine].read)
    layout, problems = maker.layout(deepep, drafter)
    command = maker.command(layout, Speculation(mtp, drafter), deepep)
    run_by = command.kernel
    return LaunchDocument(
        schema_version=SCHEMA_VERSION,
        checkpoint=checkpoint.name,
        engine=engine,
        version=maker.version,
        evidence=maker.evidence(),
        minimum_version=maker.minimum_version(),
        gpu=maker.gpu.label,
        layout=layout.as_plain(),
        image=maker.image(),
        environment=command.environment(),
        command=command.words(),
        moe_backend=(command.moe_option if deepep else None) or (run_by.name if run_by else None),
        attention_backend=maker.attention(),
        context=command.context,
        weights_bytes=maker.weights(layout),
        kv_bytes_per_token=maker.kv_bytes(layout),
        expect=list(maker.expect(command)),
        notes=[*(problem.text for problem in problems), *maker.notes(command)],
        patches=[PatchFacts(what=p.what, not_needed_from=p.since, source=p.source) for p in maker.patches(gpu)],
    )


def _check_options(checkpoint: Served, mtp: bool, dflash: Path | None) -> Drafter | None:
    """The drafter, if one is asked for."""
    if mtp and dflash:
        raise UsageError(f"--mtp cannot go with --dflash {dflash}", hint="one draft at a time: leave one of them out")
    if mtp and not checkpoint.mtp_layers:
        raise UsageError(f"--mtp: {checkpoint.name} has no MTP layers", hint="leave --mtp out")
    if dflash is None:
        return None
    drafter, _ = open_drafter(dflash)
    drafter.check_fits(checkpoint.geometry, checkpoint.name)
    return drafter


class _Maker:
    """One launch in the making."""

    def __init__(self, checkpoint: Served, engine: str, gpu: Gpu, gpus: int, version: str) -> None:
        self.checkpoint, self.engine, self.gpu, self.gpus, self.version = checkpoint, engine, gpu, gpus, version
        self.parsed, self.label = c.parse_version(version), f"{c.ENGINES[engine].label} {version}"
        self.subject = kernel_subject(checkpoint, engine, checkpoint.subject)
        self.on = f"{gpu.label} ({gpu.arch})"

    # --- how GPUs share it --------------------------------------------------------------------------------------------

    def layout(self, deepep: bool, drafter: Drafter | None) -> tuple[Layout, list[Problem]]:
        """The first layout without a failure: one attention group over all GPUs, then smaller ones."""
        self._check_kernels(deepep)
        first: list[Problem] = []
        for layout in self._layouts(deepep):
            problems = check(
                self.checkpoint, self.engine, self.version, layout.attention_tp, layout.expert_tp, self.gpu.arch
            )
            if not any(problem.fails or problem.other_tp for problem in problems):
                self._check_drafter(layout, drafter)
                return layout, problems
            first = first or problems
        worst = next((problem for problem in first if problem.fails or problem.other_tp), None)
        if worst is None:
            experts = self.checkpoint.geometry.experts
            raise UsageError(
                f"--deepep: needs whole experts on each GPU, {experts} do not divide over {self.gpus}",
                hint="use another number of GPUs, at least 2",
            )
        raise CheckpointError(f"{self.checkpoint.name}: {worst.text}", hint=worst.hint)

    def _layouts(self, deepep: bool) -> Iterator[Layout]:
        for attention_tp in sorted((n for n in range(1, self.gpus + 1) if self.gpus % n == 0), reverse=True):
            ep_first = self.engine == c.VLLM and attention_tp < self.gpus
            for ep in (True,) if deepep else (True, False) if ep_first else (False, True):
                if not ep or (self.gpus > 1 and self.checkpoint.geometry.experts % self.gpus == 0):
                    yield Layout(self.gpus, attention_tp, self.gpus // attention_tp, ep)

    def _check_kernels(self, deepep: bool) -> None:
        """Raises UsageError, CheckpointError: no kernel runs these experts here, or none beside DeepEP."""
        row = kernel(self.engine, self.subject, self.gpu.arch, ep=deepep)
        if row and row.stops:
            raise CheckpointError(
                f"{self.checkpoint.name}: {self.subject} on {self.on}: {self.label} {row.stops} [{row.source}]",
                hint="use another engine, or another format",
            )
        if deepep and self.engine == c.VLLM:
            raise UsageError("--deepep: is for --engine sglang", hint="leave it out; vLLM has --all2all-backend")
        if deepep and (row is None or row.deepep is None):
            raise UsageError(
                f"--deepep: SGLang's cookbook has none for {self.subject} on {self.on}",
                hint="leave it out; it has FP8 on Hopper, and native MXFP4 on B200, B300 and GB300",
            )

    def _check_drafter(self, layout: Layout, drafter: Drafter | None) -> None:
        if drafter and self.engine == c.SGLANG and layout.dp > 1 and self.parsed < ATTN_DP_SINCE:
            raise UsageError(
                f"--dflash: {self.label} takes no drafter beside data-parallel attention, which {self.gpus} GPUs at "
                f"attention TP {layout.attention_tp} need",
                hint=f"use {layout.attention_tp} GPUs, or SGLang 0.5.23",
            )

    # --- memory -------------------------------------------------------------------------------------------------------

    def weights(self, layout: Layout) -> int:
        """Bytes on one GPU: experts over all, towers whole, the rest over an attention group."""
        sizes = self.checkpoint.bytes_by_kind
        return sizes["experts"] // layout.gpus + sizes["towers"] + (sizes["rest"] + sizes["mtp"]) // layout.attention_tp

    def _cache(self, layout: Layout) -> tuple[int, int]:
        """Bytes of KV cache a token takes on one GPU: in global layers, in sliding-window layers."""
        return self.checkpoint.kv_bytes(layout.attention_tp, 1 if self.gpu.spark else 2)

    def kv_bytes(self, layout: Layout) -> int:
        """Bytes of KV cache that every token of a sequence takes on one GPU."""
        whole, sliding = self._cache(layout)
        return whole + int(sliding * SWA_RATIO) if self.engine == c.SGLANG else whole

    def context(self, layout: Layout) -> int:
        """Tokens that one sequence can have. Raises UsageError: too few."""
        weights, usable = self.weights(layout), int(self.gpu.memory_gib * GIB * self.gpu.fraction)
        per_token, left = self.kv_bytes(layout), usable - weights - RESERVE_BYTES
        if self.engine == c.VLLM:
            window = int(self.checkpoint.text.get("sliding_window_size") or 128)
            left -= self._cache(layout)[1] * (PREFILL_TOKENS + window)
        context = min(self.checkpoint.max_context, max(0, left) // per_token // 1024 * 1024)
        least = min(LEAST_CONTEXT, self.checkpoint.max_context)
        if context < least:
            raise UsageError(
                f"{self.checkpoint.name}: needs {size(weights + RESERVE_BYTES + per_token * least)} on each of "
                f"{self.gpus} {self.gpu.label}, {size(usable)} can be used (estimate)",
                hint="use more GPUs, or GPUs with more memory",
            )
        return context

    def command(self, layout: Layout, speculation: Speculation, deepep: bool) -> Command:
        """Raises UsageError: it does not fit."""
        return Command(
            self.checkpoint,
            self.engine,
            self.parsed,
            self.gpu,
            kernel(self.engine, self.subject, self.gpu.arch, layout.ep),
            layout,
            self.context(layout),
            speculation,
            deepep,
        )

    # --- what is said -------------------------------------------------------------------------------------------------

    def evidence(self) -> str:
        row = c.rows_for(c.FORMATS, self.engine, self.checkpoint.subject, self.parsed)
        return f"{row.evidence}: {row.source}" if row else c.UNVERIFIED

    def minimum_version(self) -> str:
        """The oldest version for which everything this checkpoint needs is known to be right."""
        wanted = {self.checkpoint.subject, self.checkpoint.qkv, *self.checkpoint.subjects}
        wanted |= {f"any: {kind}" for kind in self.checkpoint.kept.values() if self.checkpoint.subjects}
        wanted |= {c.BF16_ROUTER} if self.checkpoint.bf16_router else set()
        since = max(c.known_since(self.engine, subject) for subject in wanted)
        return ".".join(map(str, since)) or "not known"

    def image(self) -> str:
        engine = c.ENGINES[self.engine]
        return (engine.amd_image if self.gpu.amd else engine.image).format(self.version)

    def attention(self) -> str:
        return self.gpu.vllm_attention if self.engine == c.VLLM else self.gpu.sglang_attention

    def expect(self, command: Command) -> Iterator[str]:
        """Lines of the log that say that the right code runs."""
        if self.engine == c.VLLM:
            architecture = self.checkpoint.config["architectures"][0]
            omni = self.checkpoint.towers and architecture == "MiMoV2ForCausalLM"
            yield f"Resolved architecture: {'MiMoV2OmniForCausalLM' if omni else architecture}"
            yield f"Using {self.gpu.vllm_attention} for attention."
        row = command.kernel
        if row and row.log and (self.engine == c.VLLM or command.moe_option is None):  # of SGLang's own choice
            yield row.log
        yield c.ENGINES[self.engine].started

    def notes(self, command: Command) -> Iterator[str]:
        """What a reader has to know, and what nobody has tried."""
        yield from self._not_tried(command)
        yield from self._of_kernels(command)
        if self.gpu.spark:
            yield "not verified: this image on Arm; FP8 KV cache and instanttensor are what is known from two Sparks"
        if self.engine == c.VLLM and self.checkpoint.answer_tokens is not None:
            capped = self.checkpoint.answer_tokens
            yield f"--generation-config vllm, or generation_config.json ends every answer after {capped} tokens"
        yield "context is an estimate from sizes, not measured; sample at temperature 1.0, top_p 0.95"
        yield from self._of_speculation(command)
        if command.nodes > 1:
            where = "on the head of one Ray cluster" if self.engine == c.VLLM else "on each node with its own <rank>"
            yield f"{command.nodes} nodes: start it {where}"

    def _not_tried(self, command: Command) -> Iterator[str]:
        row = command.kernel
        if not self.gpu.tried:
            yield f"not tried by us: any engine on {self.on}"
        if row is None:
            yield f"not verified: the kernels of {self.subject} on {self.on}"
        elif row.evidence == c.UNVERIFIED or not self.gpu.tried:
            known = "not verified" if row.evidence == c.UNVERIFIED else row.evidence
            yield f"its kernels for {self.subject}: {known}: {row.source}"
        if self.gpu.evidence == c.UNVERIFIED:
            yield f"not verified: attention by {self.attention()} on {self.gpu.label}"

    def _of_kernels(self, command: Command) -> Iterator[str]:
        row = command.kernel
        if row and row.rounds != NONE and not row.unasked:  # the check told the other ones
            yield (
                f"{row.name or self.label} rounds activations to {rounding_words(row.rounds)}, which a plain J does "
                "not know of: measure it with `mimoquant eval-kl --as-served`, or with --server URL"
            )
        if self.subject == c.NVFP4_INPUTS and row and row.shares:
            yield f"{row.name} scales the activations of a layer's experts by their largest input scale"
        if self.subject == c.MO_NVFP4 and command.moe_option:
            yield f"without the MoE back end named here {self.label} would round activations to 4 bits, unscaled"
        if command.deepep:
            yield "DeepEP is a package of its own (deep_ep), which SGLang does not install; it pays at many requests"

    def _of_speculation(self, command: Command) -> Iterator[str]:
        if command.speculation.mtp and self.engine == c.VLLM:
            yield f"{self.label} runs 1 of the {self.checkpoint.mtp_layers} MTP layers"
        if drafter := command.speculation.drafter:
            captured = ", ".join(map(str, drafter.captured))
            yield f"the drafter fits: {drafter.depth} tokens a pass, from the states after layers {captured}"
            yield f"not verified: DFlash in {self.label} with this checkpoint"
            if self.engine == c.SGLANG and command.needs_window:
                yield f"{self.label} reads no window from this drafter's config, so the command gives it"

    def patches(self, gpu: str) -> list[c.Patch]:
        return [patch for patch in c.PATCHES if patch.gpu == gpu and self.engine == c.VLLM]
