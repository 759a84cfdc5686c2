"""Have vLLM's or SGLang's own gate and choice of experts answer. Runs in vLLM's environment, not in ours.

    python router_engines.py vllm|sglang IN.npz OUT.npz

IN: tokens [N, H] and weight [E, H] in float32, of values that bf16 holds; bias [E]; top_k. OUT, for a router declared
in float32 and in bf16: `<dtype>_logits` [N, E], `_experts` and `_weights` [N, k], and `bf16_asked`, the dtypes of what
the bf16 router multiplies on a GPU and of its product.

A GPU's product of bf16 with a float32 result has no CPU kernel, so `torch.mm` is stood in for where it is asked for
one: what was asked is kept, and answered by the product in float32. All else is the engines' own: GateLinear and
grouped_topk of vLLM, MoEGate and biased_grouped_topk_impl of SGLang.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Gate = Callable[[torch.Tensor], torch.Tensor]
Choice = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
ASKED: list[str] = []
_mm = torch.mm


def mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    if out_dtype is None:
        return _mm(left, right)
    ASKED[:] = [str(dtype).removeprefix("torch.") for dtype in (left.dtype, right.dtype, out_dtype)]
    return _mm(left.to(out_dtype), right.to(out_dtype))


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, for code that asks."""

    is_cuda = True


def vllm(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Gate, Choice]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

    with set_current_vllm_config(VllmConfig()):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, "tcp://127.0.0.1:29517", 0, "gloo")
            initialize_model_parallel()
        experts, hidden = weight.shape
        # as MiMoV2MoE makes it
        gate = GateLinear(hidden, experts, bias=False, params_dtype=dtype, out_dtype=torch.float32)
    gate.weight.data.copy_(weight)
    gate.allow_cublas_router_gemm = dtype == torch.bfloat16  # as on a GPU
    if dtype == torch.float32:
        gate.quant_method.process_weights_after_loading(gate)

    def choose(tokens: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, k: int) -> Any:
        return grouped_topk(tokens, logits, k, True, 1, 1, "sigmoid", 1.0, bias)

    return (lambda tokens: gate(tokens.to(dtype))[0]), choose


def sglang(weight: torch.Tensor, dtype: torch.dtype) -> tuple[Gate, Choice]:
    import sglang_loader  # noqa: F401  (stubs for what importing names does not use)
    from sglang.srt.layers.moe.topk import biased_grouped_topk_impl
    from sglang.srt.models.mimo_v2 import MoEGate

    experts, hidden = weight.shape
    declared = {} if dtype == torch.float32 else {"moe_router_dtype": "bfloat16"}
    config = SimpleNamespace(n_routed_experts=experts, hidden_size=hidden, topk_method="noaux_tc", **declared)
    gate = MoEGate(config, None)
    assert gate.weight.dtype == dtype and gate.e_score_correction_bias.dtype == torch.float32
    gate.weight.data.copy_(weight)
    return (lambda tokens: gate(tokens.as_subclass(OnGpu))), (
        lambda tokens, logits, bias, k: biased_grouped_topk_impl(tokens, logits, bias, k, True, 1, 1)
    )


@torch.no_grad()
def main() -> None:
    engine, read, written = sys.argv[1:]
    given = np.load(read)
    tokens, weight, bias = (torch.from_numpy(given[name]) for name in ("tokens", "weight", "bias"))
    torch.mm = mm
    found = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        gate, choose = {"vllm": vllm, "sglang": sglang}[engine](weight, dtype)
        logits = gate(tokens.to(torch.bfloat16)).as_subclass(torch.Tensor)
        assert logits.dtype == torch.float32
        weights, experts = choose(tokens, logits, bias, int(given["top_k"]))
        found |= {f"{name}_logits": logits, f"{name}_experts": experts, f"{name}_weights": weights}
    np.savez(written, bf16_asked=np.array(ASKED), **{name: tensor.numpy() for name, tensor in found.items()})


if __name__ == "__main__":
    main()
