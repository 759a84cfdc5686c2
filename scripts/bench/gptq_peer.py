#!/usr/bin/env python
"""llm-compressor's GPTQ of one layer's experts, alone on a GPU: its own modifier, hooks and kernels, no more.

Key idea: experts of a checkpoint's layer are Linear modules on the device before the clock starts, and random states
go through them as the layer's router sends them, or all through each, which is the peer's default. Its hooks make the
Gram matrices, its observer the scales, its batched Triton kernels the codes. Left out of its seconds, in its favour:
reading, attention, attaching schemes and observers, packing, writing. A few experts of the same sizes go first and pay
for its compilers.

usage: scripts/bench/gptq_peer.py SOURCE [--layer 2] [--tokens 8192] [--experts N] [--device cuda] [--scheme W4A16]
           [--observer memoryless_mse] [--seen routed|all]
Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from torch import Tensor, nn

from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.model.layout import PROJECTIONS, router_name
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.quant.engine_torch import TorchEngine
from mimoquant.weights.stored import read_experts

TARGETS = [r"re:.*experts\.\d+\.(gate|up|down)_proj$"]
WARM_UP = 2  # experts
PORTION = 16  # experts that are read at once


class Expert(nn.Module):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for projection in PROJECTIONS:
            rows, width = weights[projection].shape
            linear = nn.Linear(width, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(weights[projection], requires_grad=False)
            self.add_module(f"{projection}_proj", linear)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(inner)
        return out


class Experts(nn.Module):
    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)


def read_layer(plan: Plan, layer: int, experts: int, device: torch.device) -> tuple[list[Expert], Tensor]:
    """The first experts of a layer in bf16, and the router's matrix, in float32."""
    engine, made = TorchEngine(device.type), []
    with CheckpointReader(plan.layout.index) as reader:
        for begin in range(0, experts, PORTION):
            end = min(begin + PORTION, experts)
            stacks = read_experts(reader, plan.layout, layer, begin, end)
            bf16 = {p: engine.bf16(stack).to(device) for p, stack in stacks.items()}
            made += [Expert({p: bf16[p][e].clone() for p in PROJECTIONS}) for e in range(end - begin)]
        info = plan.layout.index.tensors[router_name(layer)]
        raw = torch.from_numpy(reader.read(info.name))
    router = raw.view({"BF16": torch.bfloat16, "F32": torch.float32}[info.dtype]).view(info.shape)
    return made, router.float().to(device)


def through(layer: Experts, x: Tensor, chosen: Tensor | None) -> None:
    """Each expert sees the tokens that chose it [tokens, top-k], or all."""
    for number, expert in enumerate(layer.experts):
        expert(x if chosen is None else x[(chosen == number).any(1)])


def quantize(layer: Experts, x: Tensor, chosen: Tensor | None, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the Gram matrices and of all that follows."""
    modifier = GPTQModifier(scheme=options.scheme, targets=TARGETS, weight_observer=options.observer)
    state, event = State(model=layer), Event()
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, event)
    modules: list[nn.Module] = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    times = [now(x.device)]
    through(layer, x, chosen)
    times.append(now(x.device))
    modifier.on_sequential_epoch_end(state, event, modules)
    times.append(now(x.device))
    rounded = len(modifier._rtn_fallback_module_names)
    modifier.on_calibration_end(state, event)
    return {"gram_s": times[1] - times[0], "codes_s": times[2] - times[1], "plainly_rounded": rounded}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def error(layer: Experts, kept: dict[str, Tensor]) -> float:
    """relMSE of the first expert's weights against what they were."""
    first = layer.experts[0]
    pairs = [(getattr(first, f"{p}_proj").weight.float(), kept[p].float()) for p in PROJECTIONS]
    return math.fsum(float((a - b).square().sum()) for a, b in pairs) / math.fsum(
        float(b.square().sum()) for _, b in pairs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, help="all of the layer by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--observer", default="memoryless_mse")
    parser.add_argument("--seen", choices=("routed", "all"), default="routed")
    options = parser.parse_args()
    logger.remove()  # a line for each of 768 modules
    print(json.dumps(measure(options)))


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    plan = make_plan(options.source, load_recipe("gptq-int4-g128").rounded_for("output"))
    geometry = plan.layout.geometry
    experts, router = read_layer(plan, options.layer, options.experts or geometry.experts, device)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, geometry.hidden, device=device)
    chosen = (x @ router.T).topk(geometry.top_k, dim=1).indices if options.seen == "routed" else None
    x = x.to(torch.bfloat16)[None] if chosen is None else x.to(torch.bfloat16)
    few, _ = read_layer(plan, options.layer, WARM_UP, device)
    quantize(Experts(few), x, chosen, options)
    kept = {p: getattr(experts[0], f"{p}_proj").weight.clone() for p in PROJECTIONS}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layer = Experts(experts)
    told = quantize(layer, x, chosen, options)
    told |= {"seconds": told["gram_s"] + told["codes_s"], "relative_error": error(layer, kept)}
    told["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return told | {"experts": len(experts), "tokens": options.tokens, "seen": options.seen}


if __name__ == "__main__":
    main()
