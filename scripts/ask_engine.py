"""Ask an engine, in a process and with packages of its own; `judge_gpu.py` starts this. Imports nothing of ours.

    python ask_engine.py JOB.json     {"engine": "vllm" | "sglang", "checkpoint": folder, "ids": [[token, ...], ...],
                                       "vocab": count, "settings": keywords of the engine, "out": folder,
                                       "new": 0 or count, "more": count, "capture": count, if wanted}

new = 0: OUT/rows.npy gets the log-probabilities after every token but the last of each prompt, float32 [positions,
vocab]. Else OUT/text.json gets {"generated": [[token, ...], ...], "counts": what the engine counted of `new` tokens a
prompt}, the text with `more` tokens a prompt. Greedy. OUT/engine.json names the versions and the GPU.

capture (vLLM): OUT/captured.safetensors gets this many inputs of FP8 products of each kind and width, with what the
engine made of them: KIND.NUMBER.x (bf16), .q (codes as bytes), .s (float32). KIND: linear, experts, or silu_mul, whose
x is gate and up side by side; of each the first CAPTURED_ROWS rows.
"""

from __future__ import annotations

import inspect
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
    engine = (Vllm if job["engine"] == "vllm" else Sglang)(job, length)
    loaded = time.monotonic()
    if captured:
        captured.begun = True
    if job["new"]:
        text, counts = engine.text(ids, job["new"], job["more"])
        (out / "text.json").write_text(json.dumps({"generated": text, "counts": counts}))
    else:
        np.save(out / "rows.npy", np.stack(engine.rows(ids, job["vocab"])))
    said = versions(job["engine"]) | {"load_s": round(loaded - start), "run_s": round(time.monotonic() - loaded)}
    if captured:
        said |= captured.save(out / "captured.safetensors")
    (out / "engine.json").write_text(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)  # an engine's own end may hang, and there is nothing left to write


if __name__ == "__main__":
    main()
