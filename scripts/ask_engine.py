"""Ask an engine, in a process and with packages of its own; `judge_gpu.py` starts this.

    python ask_engine.py JOB.json     {"engine": "vllm" | "sglang", "checkpoint": folder, "ids": [[token, ...], ...],
                                       "vocab": count, "settings": keywords of the engine, "out": folder,
                                       "new": 0 or count, "more": count; if wanted "capture": count,
                                       "float64": true}

new = 0: OUT/rows.npy gets the log-probabilities after every token but the last of each prompt, float32 [positions,
vocab]. Else OUT/text.json gets {"generated": [[token, ...], ...], "counts": what the engine counted of `new` tokens a
prompt}, the text with `more` tokens a prompt. Greedy. OUT/engine.json names the versions and the GPU.

capture (vLLM): OUT/captured.safetensors gets this many inputs of FP8 products of each kind and width, with what the
engine made of them: KIND.NUMBER.x (bf16), .q (codes as bytes), .s (float32). KIND: linear, experts, or silu_mul, whose
x is gate and up side by side; of each the first CAPTURED_ROWS rows. OUT/rows_by_our_layers.npy has the rows once more,
with our layers around the engine's kernels (`our_layers.py`, which imports mimoquant).

float64 (vLLM): engine.json tells how far kernels are from float64 (`Sums`), and OUT/rows_in_float64.npy has the rows
once more, with FP8 products and attention in float64.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_CACHE_MAXSIZE": str(4 << 30),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
}

import numpy as np

Rows = list[np.ndarray]
CAPTURED_ROWS = 96


class Captured:
    """What vLLM's FP8 products were given and what they made of it. To be made before the engine is."""

    def __init__(self, limit: int) -> None:
        from vllm import _custom_ops
        from vllm.model_executor.layers.fused_moe import utils
        from vllm.model_executor.layers.quantization.utils import fp8_utils

        self.limit, self.begun = limit, False
        self.tensors: dict[str, Any] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self.called: dict[str, int] = {}
        for kind, module, name in (
            ("linear", fp8_utils, "per_token_group_quant_fp8"),
            ("experts", utils, "per_token_group_quant_fp8"),
            ("silu_mul", _custom_ops, "silu_and_mul_per_block_quant"),
        ):
            setattr(module, name, self.keeping(kind, getattr(module, name)))

    def keeping(self, kind: str, plain: Any) -> Any:
        def keep(x: Any, *more: Any, **named: Any) -> Any:
            codes, scales = plain(x, *more, **named)
            self.called[kind] = self.called.get(kind, 0) + 1
            place = kind, x.shape[-1]
            if self.begun and x.ndim == 2 and self.counts.get(place, 0) < self.limit:
                self.counts[place] = self.counts.get(place, 0) + 1
                name = f"{kind}.{sum(self.counts.values())}"
                for key, tensor in (("x", x), ("q", codes), ("s", scales)):
                    self.tensors[f"{name}.{key}"] = tensor[:CAPTURED_ROWS].detach().cpu().contiguous()
            return codes, scales

        return keep

    def save(self, path: Path) -> dict[str, Any]:
        import torch
        from safetensors.torch import save_file
        from vllm.utils import deep_gemm
        from vllm.utils.import_utils import has_deep_gemm

        bytes_of = {name: t.view(torch.uint8) if name.endswith(".q") else t for name, t in self.tensors.items()}
        save_file(bytes_of, path)
        return {
            "captured_calls": self.called,
            "has_deep_gemm": bool(has_deep_gemm()),
            "deep_gemm_supported": bool(deep_gemm.is_deep_gemm_supported()),
            "is_deep_gemm_e8m0_used": bool(deep_gemm.is_deep_gemm_e8m0_used()),
        }


class Sums:
    """How far what vLLM's kernels make of FP8 codes, of keys and values, of rotations and of SiLU x up is from the same
    in float64, rounded once; and while `on`, products of FP8 and attention are that instead. To be made before the
    engine is, which compiles nothing (enforce_eager)."""

    def __init__(self) -> None:
        self.begun = self.on = False
        self.told: dict[str, dict[str, float]] = {}
        self.errors: dict[str, str] = {}
        self.kernels: set[str] = set()
        for patch in (self.linears, self.experts, self.attention, self.silu, self.norms):
            self.safely(patch.__name__, patch)

    def safely(self, what: str, call: Any) -> Any:
        return tried(self.errors, what, call)

    def tell(self, what: str, theirs: Any, exact: Any) -> Any:
        """Count elements that another rounding to bf16 has moved; the float64 values, rounded."""
        ours = exact.to(theirs.dtype)
        if self.begun:
            told = self.told.setdefault(
                what, {"elements": 0, "differ": 0, "error2": 0.0, "rounding2": 0.0, "norm2": 0.0}
            )
            told["elements"] += theirs.numel()
            told["differ"] += int((theirs != ours).sum())
            told["error2"] += float((theirs.double() - exact).square().sum())
            told["rounding2"] += float((ours.double() - exact).square().sum())
            told["norm2"] += float(exact.square().sum())
        return ours

    def linears(self) -> None:
        from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFp8BlockScaledMMKernel
        from vllm.model_executor.kernels.linear.scaled_mm.triton import TritonFp8BlockScaledMMKernel

        def summed(plain: Any) -> Any:
            def product(kernel: Any, A: Any, B: Any, As: Any, Bs: Any) -> Any:
                out = plain(kernel, A, B, As, Bs)
                if not (self.begun or self.on):
                    return out
                self.kernels.add(type(kernel).__name__)

                told = self.safely("linear", lambda: self.tell("linear", out, rows_of(A, As) @ matrix_of(B, Bs).T))
                return told if self.on and told is not None else out

            return product

        for kind in (CutlassFp8BlockScaledMMKernel, TritonFp8BlockScaledMMKernel):
            kind.apply_block_scaled_mm = summed(kind.apply_block_scaled_mm)

    def experts(self) -> None:
        import torch
        from vllm.model_executor.layers.fused_moe.experts import triton_moe

        plain = triton_moe.invoke_fused_moe_triton_kernel

        def invoke(*given: Any, **named: Any) -> None:
            plain(*given, **named)
            if not (self.begun or self.on) or not named.get("use_fp8_w8a8"):
                return

            def exact() -> None:
                a, b, c, a_s, b_s, gains, order, experts, padded, weighted, top_k, config = given
                pairs, of = a.shape[0] * top_k, experts.long()
                if order is not None:
                    order = order[: int(padded)].long()
                    of = of[torch.arange(len(order), device=of.device) // config["BLOCK_SIZE_M"]]
                    there = order < pairs
                    of = torch.zeros(pairs, dtype=torch.int64, device=of.device).index_put_((order[there],), of[there])
                of, rows = of[:pairs], rows_of(a, a_s)
                out = torch.empty(pairs, b.shape[1], dtype=torch.float64, device=a.device)
                for expert in range(len(b)):
                    at = (of == expert).nonzero()[:, 0]
                    out[at] = rows[at // top_k] @ matrix_of(b[expert], b_s[expert]).T
                if weighted:
                    out *= gains.reshape(-1, 1).double()
                rounded = self.tell(f"experts, {'down' if weighted else 'gate and up'}", c.view(pairs, -1), out)
                if self.on:
                    c.copy_(rounded.view(c.shape))

            self.safely("experts", exact)

        triton_moe.invoke_fused_moe_triton_kernel = invoke

    def attention(self) -> None:
        from vllm.model_executor.models import mimo_v2

        def forward(layer: Any, positions: Any, hidden_states: Any) -> Any:
            qkv, _ = layer.qkv_proj(hidden_states)
            parts = mimo_v2._split_qkv(qkv, layer.q_size, layer.k_size, layer.v_size, layer.kv_chunk_rows)
            q, k, v = (part.contiguous() for part in parts)
            before = (q.clone(), k.clone()) if self.begun else None
            q, k = layer.rotary_emb(positions, q, k)
            if before:
                self.safely("rope", lambda: self.rotations(layer, positions, before, (q, k)))
            if layer.v_scale is not None:
                v = v * layer.v_scale
            out = layer.attn(q, k, v)
            if self.begun or self.on:
                told = self.safely("attention", lambda: self.attended(layer, positions, (q, k, v), out))
                out = told if self.on and told is not None else out
            return layer.o_proj(out)[0]

        mimo_v2.MiMoV2Attention.forward = forward

    def rotations(self, layer: Any, positions: Any, before: Any, after: Any) -> None:
        """By cosines in float32 and in bf16, each rounded once, and by cosines in bf16 with every step rounded."""
        import torch

        emb, width = layer.rotary_emb, layer.rotary_emb.rotary_dim
        cos, sin = emb._compute_cos_sin_cache().to(positions.device)[positions].chunk(2, -1)
        for name, c, s in (("float32", cos, sin), ("bf16", cos.bfloat16(), sin.bfloat16())):
            c, s = (part[:, None].double() for part in (c, s))
            for x, theirs in zip(before, after, strict=True):
                heads, turned = (t.view(len(t), -1, layer.head_dim)[..., :width] for t in (x.double(), theirs))
                left, right = heads.chunk(2, -1)
                self.tell(f"rope, {name}", turned, torch.cat((left * c - right * s, right * c + left * s), -1))
                if name == "bf16":
                    lc, rs, rc, ls = (
                        (one * two).bfloat16() for one, two in ((left, c), (right, s), (right, c), (left, s))
                    )
                    steps = torch.cat((lc.double() - rs.double(), rc.double() + ls.double()), -1)
                    self.tell("rope, bf16 in steps", turned, steps)

    def attended(self, layer: Any, positions: Any, heads: Any, out: Any) -> Any:
        import torch

        q, k, v = (part.double() for part in heads)
        q, k = (part.view(len(part), -1, layer.head_dim) for part in (q, k))
        v = v.view(len(v), -1, layer.v_head_dim)
        groups, exact = q.shape[1] // k.shape[1], torch.empty_like(out, dtype=torch.float64)
        coarse = torch.empty_like(exact)
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        window = getattr(layer.attn, "sliding_window", None) or len(positions) + 1
        sink = layer.attention_sink_bias
        for begin, end in itertools.pairwise(starts):
            mine = slice(begin, end)
            keys, values = (t[mine].repeat_interleave(groups, 1) for t in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q[mine], keys) * layer.scaling
            apart = torch.arange(end - begin, device=q.device)
            apart = apart[:, None] - apart[None, :]
            scores.masked_fill_((apart < 0) | (apart >= window), float("-inf"))
            peak = scores.amax(-1, keepdim=True)
            if sink is not None:
                peak = torch.maximum(peak, sink.double()[:, None, None])
            share = (scores - peak).exp()
            total = share.sum(-1, keepdim=True)
            if sink is not None:
                total = total + (sink.double()[:, None, None] - peak).exp()
            for target, part in ((exact, share), (coarse, share.bfloat16().double())):
                target[mine] = torch.einsum("hij,jhd->ihd", part / total, values).reshape(end - begin, -1)
        self.tell("attention, shares in bf16", out, coarse)
        return self.tell("attention", out, exact)

    def silu(self) -> None:
        import torch.nn.functional as F
        from vllm.model_executor.layers.activation import SiluAndMul

        plain = SiluAndMul.forward_cuda

        def forward(layer: Any, x: Any) -> Any:
            out = plain(layer, x)
            if self.begun:
                gate, up = x.double().chunk(2, -1)
                self.tell("SiLU x up, rounded once", out, F.silu(gate) * up)
                self.tell("SiLU x up, SiLU in bf16", out, F.silu(gate).bfloat16().double() * up)
            return out

        SiluAndMul.forward_cuda = forward

    def norms(self) -> None:
        from vllm.model_executor.layers.layernorm import RMSNorm

        plain = RMSNorm.forward_cuda

        def forward(layer: Any, x: Any, residual: Any = None) -> Any:
            given = (x.double() if residual is None else x.double() + residual.double()) if self.begun else None
            out = plain(layer, x, residual)
            if given is not None:
                for name, wide in (("the sum in bf16", given.bfloat16().double()), ("the sum as it is", given)):
                    normed = wide * (wide.square().mean(-1, keepdim=True) + layer.variance_epsilon).rsqrt()
                    weight, theirs = layer.weight.double(), out if residual is None else out[0]
                    self.tell(f"norm, {name}", theirs, normed * weight)
                    self.tell(f"norm, {name}, in steps", theirs, normed.bfloat16().double() * weight)
            return out

        RMSNorm.forward_cuda = forward


def rows_of(codes: Any, scales: Any) -> Any:
    """FP8 rows [m, k] with a scale for each 128 of a row, in float64."""
    return codes.double() * scales.double().repeat_interleave(128, -1)[:, : codes.shape[1]]


def matrix_of(codes: Any, scales: Any) -> Any:
    """An FP8 matrix [n, k] with a scale for each 128 x 128, in float64."""
    wide = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes.double() * wide[: codes.shape[0], : codes.shape[1]]


def tried(errors: dict[str, str], what: str, call: Any) -> Any:
    """What a call gives, or None: a judge's run goes on."""
    try:
        return call()
    except Exception as error:
        errors[what] = f"{type(error).__name__}: {error}"[:300]
        return None


def our_layers(checkpoint: Path) -> Any:
    from our_layers import OurLayers

    return OurLayers(checkpoint)


def by_our_layers(engine: Any, job: dict[str, Any], ours: Any) -> None:
    """Once more with our layers beside the engine's, which tells how alike its own answers are, and instead of them."""
    out = Path(job["out"])
    ours.mode, first = "beside", np.load(out / "rows.npy")
    ours.told["equal_once_more"] = float((np.stack(engine.rows(job["ids"], job["vocab"])) == first).mean())
    ours.mode = "instead"
    np.save(out / "rows_by_our_layers.npy", np.stack(engine.rows(job["ids"], job["vocab"])))


class Vllm:
    def __init__(self, job: dict[str, Any], length: int) -> None:
        from vllm import LLM

        self.llm = LLM(
            job["checkpoint"],
            **{
                "skip_tokenizer_init": True,
                "trust_remote_code": True,
                "enforce_eager": True,
                "max_model_len": length,
                "max_num_seqs": len(job["ids"]),
                "max_logprobs": -1,
                "logprobs_mode": "raw_logprobs",
                "seed": 0,
                "enable_prefix_caching": False,
                "gpu_memory_utilization": 0.1,
                "kv_cache_memory_bytes": 2**29,
                "disable_custom_all_reduce": True,
                "disable_log_stats": False,
            }
            | job["settings"],
        )

    def generate(self, ids: list[list[int]], **asked: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **asked)
        prompts = [{"prompt_token_ids": one} for one in ids]
        return list(self.llm.generate(prompts, sampling, use_tqdm=False))

    def rows(self, ids: list[list[int]], vocab: int) -> Rows:
        rows = []
        for reply in self.generate(ids, max_tokens=1, prompt_logprobs=-1):
            for told in reply.prompt_logprobs[1:]:
                row = np.full(vocab, np.nan, np.float32)
                row[list(told)] = [one.logprob for one in told.values()]
                rows.append(row)
        return rows

    def text(self, ids: list[list[int]], new: int, more: int) -> tuple[list[list[int]], dict[str, float]]:
        replies = self.generate(ids, max_tokens=new)
        metrics = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        counts = {
            name.removeprefix("vllm:spec_decode_num_"): value
            for name, value in metrics.items()
            if name.startswith("vllm:spec_decode_num_")
        }
        if more:
            replies = self.generate(ids, max_tokens=new + more)
        return [list(reply.outputs[0].token_ids) for reply in replies], counts


class Sglang:
    def __init__(self, job: dict[str, Any], length: int) -> None:
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.server_args import ServerArgs

        wanted = {
            "model_path": job["checkpoint"],
            "skip_tokenizer_init": True,
            "trust_remote_code": True,
            "dtype": "bfloat16",
            "attention_backend": "triton",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_cuda_graph": True,
            "disable_piecewise_cuda_graph": True,
            "disable_radix_cache": True,
            "disable_custom_all_reduce": True,
            "skip_server_warmup": True,
            "context_length": length,
            "max_running_requests": len(job["ids"]),
            "mem_fraction_static": 0.15,
            "max_total_tokens": 2**15,
            "chunked_prefill_size": -1,
            "random_seed": 0,
            "log_level": "info",
            "disable_flashinfer_autotune": True,
        } | job["settings"]
        known = inspect.signature(ServerArgs).parameters
        for name in sorted(set(wanted) - set(known)):
            print(f"this SGLang knows no {name}", flush=True)
        self.engine = Engine(**{name: value for name, value in wanted.items() if name in known})

    def generate(self, ids: list[list[int]], tokens: int, **asked: Any) -> list[Any]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        replies = self.engine.generate(input_ids=ids, sampling_params=sampling, **asked)
        return replies if isinstance(replies, list) else [replies]

    def rows(self, ids: list[list[int]], vocab: int) -> Rows:
        rows = []
        for prompt in ids:  # one at a time: an answer is a list of positions x vocabulary
            [reply] = self.generate(
                [prompt], 1, return_logprob=[True], logprob_start_len=[0], token_ids_logprob=[list(range(vocab))]
            )
            for told in reply["meta_info"]["input_token_ids_logprobs"][1:]:
                row = np.full(vocab, np.nan, np.float32)
                row[[one[1] for one in told]] = [np.nan if one[0] is None else one[0] for one in told]
                rows.append(row)
        return rows

    def text(self, ids: list[list[int]], new: int, more: int) -> tuple[list[list[int]], dict[str, float]]:
        replies = self.generate(ids, new)
        counts: dict[str, float] = {}
        for reply in replies:
            for name, value in reply["meta_info"].items():
                if name.startswith("spec_") and isinstance(value, int | float):
                    counts[name] = counts.get(name, 0) + value
        counts["sequences"] = len(replies)
        if more:
            replies = self.generate(ids, new + more)
        return [list(reply["output_ids"]) for reply in replies], counts


def versions(engine: str) -> dict[str, Any]:
    from importlib import metadata

    import torch

    said: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    for name in (engine, "torch", "transformers", "compressed-tensors", "sglang-kernel", "flashinfer-python"):
        try:
            said[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return said


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out, ids, start = Path(job["out"]), job["ids"], time.monotonic()
    length = max(map(len, ids)) + job["new"] + job["more"] + 16
    captured = Captured(job["capture"]) if job.get("capture") else None
    errors: dict[str, str] = {}
    ours = tried(errors, "our layers", lambda: our_layers(Path(job["checkpoint"]))) if captured else None
    sums = Sums() if job.get("float64") else None
    engine = (Vllm if job["engine"] == "vllm" else Sglang)(job, length)
    loaded = time.monotonic()
    if captured:
        captured.begun = True
    if sums:
        sums.begun = True
    if job["new"]:
        text, counts = engine.text(ids, job["new"], job["more"])
        (out / "text.json").write_text(json.dumps({"generated": text, "counts": counts}))
    else:
        np.save(out / "rows.npy", np.stack(engine.rows(ids, job["vocab"])))
    said = versions(job["engine"]) | {"load_s": round(loaded - start), "run_s": round(time.monotonic() - loaded)}
    if captured:
        said |= captured.save(out / "captured.safetensors")
        captured.begun = False
    if ours:
        said |= {"our_layers": ours.told}
        tried(errors, "rows by our layers", lambda: by_our_layers(engine, job, ours))
    if sums:
        sums.begun, sums.on = False, True
        rows = sums.safely("rows", lambda: np.stack(engine.rows(ids, job["vocab"])))
        if rows is not None:
            np.save(out / "rows_in_float64.npy", rows)
        said |= {"sums": sums.told, "errors_of_sums": sums.errors, "linear_kernels": sorted(sums.kernels)}
    if errors:
        said |= {"errors": errors}
    (out / "engine.json").write_text(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)  # an engine's own end may hang, and there is nothing left to write


if __name__ == "__main__":
    main()
