"""A checkpoint, an engine, GPUs → the command that serves it, as a document.

Key idea: try the parallel layouts that the GPUs allow, take the first that the contracts have nothing against, and lay
weights and KV cache out in what a GPU has. Nothing is guessed that the checkpoint says: chunks of the fused qkv, group
sizes, MTP layers, towers, heads.

Left out: pipeline parallelism, prefill-decode disaggregation, DeepEP. The memory estimate counts weights, one
sequence's KV cache and a flat reserve, and was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.drafter import Drafter, open_drafter
from mimoquant.serving import contracts as c
from mimoquant.serving.check import check
from mimoquant.serving.documents import LaunchDocument, ParallelLayout, PatchFacts
from mimoquant.serving.problem import Problem
from mimoquant.serving.served import Served
from mimoquant.wording import size

GIB = 2**30
RESERVE_BYTES = 5 * GIB  # activations, CUDA graphs, communication buffers; an assumption
PREFILL_TOKENS = 8192  # that a chunk of prefill adds to the window of sliding-window layers
LEAST_CONTEXT = 8192
SWA_RATIO = 0.1  # SGLang's --swa-full-tokens-ratio: KV tokens of sliding-window layers per token of global ones
MTP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """How GPUs share a model: `gpus` = attention_tp x dp; experts over all of them, whole (`ep`) or cut."""

    gpus: int
    attention_tp: int
    dp: int
    ep: bool

    @property
    def expert_tp(self) -> int:
        return 1 if self.ep else self.gpus

    def as_plain(self) -> ParallelLayout:
        return ParallelLayout(gpus=self.gpus, attention_tp=self.attention_tp, dp=self.dp, ep=self.ep)


def launch(
    checkpoint: Served,
    engine: str,
    gpu: str,
    gpus: int,
    *,
    version: str | None = None,
    mtp: bool = False,
    dflash: Path | None = None,
) -> LaunchDocument:
    """Make the command.

    Raises:
        UsageError: options that cannot go together, or GPUs that the checkpoint does not fit on.
        CheckpointError: the engine would refuse or corrupt it, however it is started, or the drafter does not fit.
    """
    if not checkpoint.subjects:
        raise CheckpointError(f"{checkpoint.name}: holds no 4-bit experts", hint="launch is for what quantize writes")
    drafter = _check_options(checkpoint, mtp, dflash)
    maker = _Maker(checkpoint, engine, c.GPUS[gpu], gpus, version or c.ENGINES[engine].read)
    layout, problems = maker.layout()
    context, weights, kv = maker.context(layout)
    return LaunchDocument(
        schema_version=SCHEMA_VERSION,
        checkpoint=checkpoint.name,
        engine=engine,
        version=maker.version,
        evidence=maker.evidence(),
        minimum_version=maker.minimum_version(),
        gpu=maker.gpu.label,
        layout=layout.as_plain(),
        image=c.ENGINES[engine].image.format(maker.version),
        environment=dict(maker.environment()),
        command=maker.command(layout, context, mtp, drafter),
        moe_backend=maker.moe_backend(),
        attention_backend=maker.attention(),
        context=context,
        weights_bytes=weights,
        kv_bytes_per_token=kv,
        expect=list(maker.expect()),
        notes=[*(problem.text for problem in problems), *maker.notes(mtp, drafter)],
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

    def __init__(self, checkpoint: Served, engine: str, gpu: c.Gpu, gpus: int, version: str) -> None:
        self.checkpoint, self.engine, self.gpu, self.gpus, self.version = checkpoint, engine, gpu, gpus, version
        self.subject = checkpoint.subjects[0]
        self.nodes = -(-gpus // gpu.node)

    def layout(self) -> tuple[Layout, list[Problem]]:
        """The first layout without a failure: one attention group over all GPUs, then smaller ones."""
        first: list[Problem] = []
        for attention_tp in sorted((n for n in range(1, self.gpus + 1) if self.gpus % n == 0), reverse=True):
            ep_first = self.engine == c.VLLM and attention_tp < self.gpus
            for ep in (True, False) if ep_first else (False, True):
                layout = Layout(self.gpus, attention_tp, self.gpus // attention_tp, ep)
                if ep and (self.gpus == 1 or self.checkpoint.geometry.experts % self.gpus):
                    continue
                problems = self._problems(layout)
                if not any(problem.fails or problem.other_tp for problem in problems):
                    return layout, problems
                first = first or problems
        worst = next(problem for problem in first if problem.fails or problem.other_tp)
        raise CheckpointError(f"{self.checkpoint.name}: {worst.text}", hint=worst.hint)

    def _problems(self, layout: Layout) -> list[Problem]:
        return check(self.checkpoint, self.engine, self.version, layout.attention_tp, layout.expert_tp)

    # --- memory -------------------------------------------------------------------------------------------------------

    def weights(self, layout: Layout) -> int:
        """Bytes on one GPU: experts over all, towers whole, the rest over an attention group."""
        sizes = self.checkpoint.bytes_by_kind
        return sizes["experts"] // layout.gpus + sizes["towers"] + (sizes["rest"] + sizes["mtp"]) // layout.attention_tp

    def context(self, layout: Layout) -> tuple[int, int, int]:
        """(tokens of one sequence, weights and KV bytes a token on one GPU)."""
        weights, usable = self.weights(layout), int(self.gpu.memory_gib * GIB * self.gpu.fraction)
        whole, sliding = self.checkpoint.kv_bytes(layout.attention_tp, 1 if self.gpu.node == 1 else 2)
        left = usable - weights - RESERVE_BYTES
        if self.engine == c.SGLANG:
            whole += int(sliding * SWA_RATIO)
        else:
            left -= sliding * (PREFILL_TOKENS + int(self.checkpoint.text.get("sliding_window_size") or 128))
        context = min(self.checkpoint.max_context, max(0, left) // whole // 1024 * 1024)
        least = min(LEAST_CONTEXT, self.checkpoint.max_context)
        if context < least:
            raise UsageError(
                f"{self.checkpoint.name}: needs {size(weights + RESERVE_BYTES + whole * least)} on each of {self.gpus} "
                f"{self.gpu.label}, {size(usable)} can be used (estimate)",
                hint="use more GPUs, or GPUs with more memory",
            )
        return context, weights, whole

    # --- what is said -------------------------------------------------------------------------------------------------

    def evidence(self) -> str:
        row = c.rows_for(c.FORMATS, self.engine, self.subject, c.parse_version(self.version))
        return f"{row.evidence}: {row.source}" if row else c.UNVERIFIED

    def minimum_version(self) -> str:
        """The oldest version for which everything this checkpoint needs is known to be right."""
        kinds = {f"any: {kind}" for kind in self.checkpoint.kept.values()}
        wanted = {*self.checkpoint.subjects, self.checkpoint.qkv, *kinds}
        since = max(c.known_since(self.engine, subject) for subject in wanted)
        return ".".join(map(str, since)) or "not known"

    def moe_backend(self) -> str | None:
        return c.MOE_BACKENDS.get((self.engine, self.subject, self.gpu.sm))

    def attention(self) -> str:
        return self.gpu.vllm_attention if self.engine == c.VLLM else self.gpu.sglang_attention

    def environment(self) -> Iterator[tuple[str, str]]:
        if self.engine == c.VLLM and self.nodes > 1:
            yield "VLLM_HOST_IP", "<IP of this node>"

    def command(self, layout: Layout, context: int, mtp: bool, drafter: Drafter | None) -> list[str]:
        make = self._vllm if self.engine == c.VLLM else self._sglang
        return [word for words in make(layout, context, mtp, drafter) for word in words]

    def _vllm(self, layout: Layout, context: int, mtp: bool, drafter: Drafter | None) -> Iterator[tuple[str, ...]]:
        yield "vllm", "serve", self.checkpoint.name
        yield ("--trust-remote-code",)
        yield "--tensor-parallel-size", str(layout.attention_tp)
        if layout.dp > 1:
            yield "--data-parallel-size", str(layout.dp)
        if layout.ep:
            yield ("--enable-expert-parallel",)
        if self.nodes > 1:
            yield "--distributed-executor-backend", "ray"
        yield "--max-model-len", str(context)
        yield "--gpu-memory-utilization", f"{self.gpu.fraction:.2f}"
        if self.gpu.vllm_attention != "FLASH_ATTN_DIFFKV":
            yield "--attention-backend", self.gpu.vllm_attention
        if self.gpu.node == 1:
            yield "--kv-cache-dtype", "fp8_e4m3"
            yield "--load-format", "instanttensor"
        if self.checkpoint.answer_tokens is not None:  # else it caps every answer
            yield "--generation-config", "vllm"
        yield "--reasoning-parser", "mimo"
        yield "--tool-call-parser", "mimo"
        yield ("--enable-auto-tool-choice",)
        if mtp:
            yield "--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 2})
        if drafter:
            draft = {"method": "dflash", "model": str(drafter.folder), "num_speculative_tokens": drafter.depth}
            yield "--speculative-config", json.dumps(draft)

    def _sglang(self, layout: Layout, context: int, mtp: bool, drafter: Drafter | None) -> Iterator[tuple[str, ...]]:
        yield "python3", "-m", "sglang.launch_server", "--model-path", self.checkpoint.name
        yield ("--trust-remote-code",)
        yield "--tp", str(layout.gpus)
        if layout.dp > 1:
            if c.parse_version(self.version) >= (0, 5, 23):
                yield "--attn-dp-size", str(layout.dp)
            else:
                yield "--dp", str(layout.dp), "--enable-dp-attention"
            yield ("--enable-dp-lm-head",)
            if self.checkpoint.towers:
                yield ("--mm-enable-dp-encoder",)
        if layout.ep:
            yield "--ep", str(layout.gpus)
        if self.nodes > 1:
            yield "--nnodes", str(self.nodes), "--node-rank", "<rank>", "--dist-init-addr", "<head IP>:20000"
        yield "--context-length", str(context)
        yield "--mem-fraction-static", f"{self.gpu.fraction - 0.05:.2f}"
        yield "--swa-full-tokens-ratio", str(SWA_RATIO)
        yield "--attention-backend", self.gpu.sglang_attention
        if self.checkpoint.towers and self.gpu.sglang_attention == "fa4":
            yield "--mm-attention-backend", "fa4"
        backend = self.moe_backend()
        if backend and not self._own_choice():
            yield "--moe-runner-backend", backend
        if self.gpu.node == 1:
            yield "--kv-cache-dtype", "fp8_e4m3"
        yield "--reasoning-parser", "mimo"
        yield "--tool-call-parser", "mimo"
        if mtp:
            yield "--speculative-algorithm", "EAGLE"
            yield "--speculative-num-steps", str(MTP_STEPS)
            yield "--speculative-eagle-topk", "1"
            yield "--speculative-num-draft-tokens", str(MTP_STEPS + 1)
        if drafter:
            yield "--speculative-algorithm", "DFLASH"
            yield "--speculative-draft-model-path", str(drafter.folder)
            yield "--speculative-num-draft-tokens", str(drafter.block)
            if self._needs_window(drafter):
                yield "--speculative-draft-window-size", str(drafter.window)

    def _own_choice(self) -> bool:
        """Whether the engine picks the back end by itself."""
        return self.gpu.sm in c.OWN_CHOICE.get((self.engine, self.subject), (self.gpu.sm,))

    def _needs_window(self, drafter: Drafter) -> bool:
        """Whether the engine finds no window where the drafter has one."""
        return self.engine == c.SGLANG and drafter.window is not None and not drafter.windows_by_layer_types

    def expect(self) -> Iterator[str]:
        """Lines of the log that say that the right code runs."""
        backend = self.moe_backend()
        if self.engine == c.VLLM:
            architecture = self.checkpoint.config["architectures"][0]
            omni = self.checkpoint.towers and architecture == "MiMoV2ForCausalLM"
            yield f"Resolved architecture: {'MiMoV2OmniForCausalLM' if omni else architecture}"
            yield f"Using {self.gpu.vllm_attention} for attention."
            if backend:
                yield f"Using '{backend}' {c.VLLM_MOE_WORD[self.subject]} MoE backend"
        elif backend and self.subject == c.NATIVE_MXFP4 and self._own_choice():
            yield f"MiMoV2 on SM{self.gpu.sm}: moe_runner_backend={backend}."
        elif backend and (self.engine, self.subject) not in c.OWN_CHOICE:
            yield f"Using {backend}"
        yield c.ENGINES[self.engine].started

    def notes(self, mtp: bool, drafter: Drafter | None) -> Iterator[str]:
        """What a reader has to know, and what nobody has tried."""
        label = f"{c.ENGINES[self.engine].label} {self.version}"
        least, known = c.MINIMUM_SM.get(self.subject, (80, ()))
        if self.gpu.sm not in known:
            on = f"{self.gpu.label} (SM{self.gpu.sm}; least is SM{least})"
            yield f"not verified: the kernels of {self.subject} on {on}"
        if self.gpu.evidence == c.UNVERIFIED:
            yield f"not verified: attention by {self.attention()} on {self.gpu.label}"
        if self.gpu.node == 1:
            yield "not verified: this image on Arm; FP8 KV cache and instanttensor are what is known from two Sparks"
        if self.engine == c.VLLM and self.checkpoint.answer_tokens is not None:
            capped = self.checkpoint.answer_tokens
            yield f"--generation-config vllm, or generation_config.json ends every answer after {capped} tokens"
        yield "context is an estimate from sizes, not measured; sample at temperature 1.0, top_p 0.95"
        if mtp and self.engine == c.VLLM:
            yield f"{label} runs 1 of the {self.checkpoint.mtp_layers} MTP layers"
        if drafter:
            captured = ", ".join(map(str, drafter.captured))
            yield f"the drafter fits: {drafter.depth} tokens a pass, from the states after layers {captured}"
            yield f"not verified: DFlash in {label} with this checkpoint"
            if self._needs_window(drafter):
                yield f"{label} reads no window from this drafter's config, so the command gives it"
        if self.subject == c.MO_NVFP4 and not self._own_choice():
            yield f"without the MoE back end named here {label} would round activations to 4 bits, unscaled"
        if self.nodes > 1:
            where = "on the head of one Ray cluster" if self.engine == c.VLLM else "on each node with its own <rank>"
            yield f"{self.nodes} nodes: start it {where}"

    def patches(self, gpu: str) -> list[c.Patch]:
        return [patch for patch in c.PATCHES if patch.gpu == gpu and self.engine == c.VLLM]
