"""A layout on a kind of GPU → the words of the command that serves a checkpoint there, and its environment.

Key idea: an option stands here because the checkpoint needs it, because these GPUs do, or because its user asked for
it; what the engine finds by itself is left to it. Sources: the engines' own options (vLLM 0.33, SGLang 0.5.23, older
names where a row says so), vLLM's recipes and SGLang's cookbook for this family.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from mimoquant.model.drafter import Drafter
from mimoquant.serving import contracts as c
from mimoquant.serving.documents import ParallelLayout
from mimoquant.serving.gpus import Gpu, Kernel
from mimoquant.serving.served import Served

SWA_RATIO = 0.1  # SGLang's --swa-full-tokens-ratio: KV tokens of sliding-window layers per token of global ones
MTP_STEPS = 3
ATTN_DP_SINCE = (0, 5, 23)  # of SGLang: --attn-dp-size, and a drafter beside data-parallel attention


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


@dataclass(frozen=True, slots=True)
class Speculation:
    """What proposes tokens: the checkpoint's MTP layers, a drafter, or nothing."""

    mtp: bool = False
    drafter: Drafter | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """Everything a command follows from. `kernel`: of the experts, None where it is not known; `context`: tokens."""

    checkpoint: Served
    engine: str
    version: c.Version
    gpu: Gpu
    kernel: Kernel | None
    layout: Layout
    context: int
    speculation: Speculation
    deepep: bool

    @property
    def nodes(self) -> int:
        return -(-self.layout.gpus // self.gpu.node)

    @property
    def moe_option(self) -> str | None:
        """The MoE back end that the command has to name."""
        if self.kernel is None:
            return None
        return self.kernel.deepep or None if self.deepep else self.kernel.named(self.version)

    @property
    def needs_window(self) -> bool:
        """Whether SGLang finds no window where the drafter has one."""
        drafter = self.speculation.drafter
        return bool(drafter and drafter.window is not None and not drafter.windows_by_layer_types)

    def environment(self) -> dict[str, str]:
        """Variables that it needs; words in <> are to be filled in."""
        found = dict(self.kernel.environment) if self.kernel else {}
        if self.nodes > 1:
            found |= {"VLLM_HOST_IP": "<IP of this node>"} if self.engine == c.VLLM else dict(self.gpu.between_nodes)
        if self.deepep:  # caps its buffers, as SGLang's cookbook does
            found["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = "256"
        return found

    def words(self) -> list[str]:
        """The command, word by word."""
        parts = self._vllm() if self.engine == c.VLLM else self._sglang()
        return [word for words in parts for word in words]

    def _vllm(self) -> Iterator[tuple[str, ...]]:
        yield "vllm", "serve", self.checkpoint.name
        yield ("--trust-remote-code",)
        yield "--tensor-parallel-size", str(self.layout.attention_tp)
        if self.layout.dp > 1:
            yield "--data-parallel-size", str(self.layout.dp)
        if self.layout.ep:
            yield ("--enable-expert-parallel",)
        if self.nodes > 1:
            yield "--distributed-executor-backend", "ray"
        yield "--max-model-len", str(self.context)
        yield "--gpu-memory-utilization", f"{self.gpu.fraction:.2f}"
        if self.gpu.vllm_attention != "FLASH_ATTN_DIFFKV":
            yield "--attention-backend", self.gpu.vllm_attention
        if self.moe_option:
            yield "--moe-backend", self.moe_option
        if self.gpu.spark:
            yield "--kv-cache-dtype", "fp8_e4m3"
            yield "--load-format", "instanttensor"
        if self.checkpoint.answer_tokens is not None:  # else it caps every answer
            yield "--generation-config", "vllm"
        yield "--reasoning-parser", "mimo"
        yield "--tool-call-parser", "mimo"
        yield ("--enable-auto-tool-choice",)
        if self.speculation.mtp:
            yield "--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 2})
        if drafter := self.speculation.drafter:
            draft = {"method": "dflash", "model": str(drafter.folder), "num_speculative_tokens": drafter.depth}
            yield "--speculative-config", json.dumps(draft)

    def _sglang(self) -> Iterator[tuple[str, ...]]:
        yield "python3", "-m", "sglang.launch_server", "--model-path", self.checkpoint.name
        yield ("--trust-remote-code",)
        yield from self._sglang_parallelism()
        if self.nodes > 1:
            yield "--nnodes", str(self.nodes), "--node-rank", "<rank>", "--dist-init-addr", "<head IP>:20000"
        yield "--context-length", str(self.context)
        yield "--mem-fraction-static", f"{self.gpu.fraction - 0.05:.2f}"
        yield "--swa-full-tokens-ratio", str(SWA_RATIO)
        yield "--attention-backend", self.gpu.sglang_attention
        if self.checkpoint.towers and self.gpu.sglang_attention == "fa4":
            yield "--mm-attention-backend", "fa4"
        if self.moe_option:
            yield "--moe-runner-backend", self.moe_option
        if self.gpu.amd:
            yield ("--disable-custom-all-reduce",)
        if self.gpu.spark:
            yield "--kv-cache-dtype", "fp8_e4m3"
        yield "--reasoning-parser", "mimo"
        yield "--tool-call-parser", "mimo"
        yield from self._sglang_speculation()

    def _sglang_parallelism(self) -> Iterator[tuple[str, ...]]:
        """SGLang's --tp counts all GPUs; attention has a dp-th of them."""
        yield "--tp", str(self.layout.gpus)
        if self.layout.dp > 1:
            if self.version >= ATTN_DP_SINCE:
                yield "--attn-dp-size", str(self.layout.dp)
            else:
                yield "--dp", str(self.layout.dp), "--enable-dp-attention"
        if self.layout.dp > 1 or self.deepep:
            yield ("--enable-dp-lm-head",)
        if self.layout.dp > 1 and self.checkpoint.towers:
            yield ("--mm-enable-dp-encoder",)
        if self.layout.ep:
            yield "--ep", str(self.layout.gpus)
        if self.deepep:
            yield "--moe-a2a-backend", "deepep", "--deepep-mode", "auto", "--moe-dense-tp-size", "1"

    def _sglang_speculation(self) -> Iterator[tuple[str, ...]]:
        if self.speculation.mtp:
            yield "--speculative-algorithm", "EAGLE"
            yield "--speculative-num-steps", str(MTP_STEPS)
            yield "--speculative-eagle-topk", "1"
            yield "--speculative-num-draft-tokens", str(MTP_STEPS + 1)
        if drafter := self.speculation.drafter:
            yield "--speculative-algorithm", "DFLASH"
            yield "--speculative-draft-model-path", str(drafter.folder)
            yield "--speculative-num-draft-tokens", str(drafter.block)
            if self.needs_window:
                yield "--speculative-draft-window-size", str(drafter.window)
