"""Let a real vLLM on a CPU generate with speculation, and keep what it counted. Runs in vLLM's own environment.

    python vllm_drafter.py JOB.json     {"checkpoint": folder, "ids": [[token, ...], ...], "new": count, "more": count,
                                         "speculative": vLLM's config of that name, "out": file}

Written to `out`: {"generated": [[token, ...], ...], "drafted": count, "accepted": count}: counts of generating `new`
tokens, then the same text with `more` tokens. Greedy, float32; vLLM's own kernels, attention and bookkeeping, nothing
replaced.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    longest = len(job["ids"][0]) + job["new"] + job["more"]
    llm = LLM(
        job["checkpoint"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        seed=0,
        max_model_len=longest + 16,
        max_num_seqs=len(job["ids"]),
        disable_log_stats=False,
        enable_prefix_caching=False,
        speculative_config=job["speculative"],
    )

    def generated(count: int) -> list[list[int]]:
        asked = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
        replies = llm.generate([{"prompt_token_ids": ids} for ids in job["ids"]], asked, use_tqdm=False)
        return [list(reply.outputs[0].token_ids) for reply in replies]

    text = generated(job["new"])
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    if job["more"]:
        text = generated(job["new"] + job["more"])
    told = {
        "generated": text,
        "drafted": counts["vllm:spec_decode_num_draft_tokens"],
        "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
    }
    Path(job["out"]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
