#!/usr/bin/env python
"""Does vLLM on this machine's GPUs answer with our numbers? Every container, real head sizes, TP 1 and more.

Writes random checkpoints with 192/128 heads in Flash's layout (split q, k, v in bf16) and in Pro's (FP8, fused), has
them quantized, asks vLLM for the log-probabilities of whole prompts, and holds them against our float32 forward of the
same output. The row of an output that was not quantized tells the noise of bf16. Prints which kernels vLLM names.

usage: scripts/judge_gpu.py [--work DIR] [--tp 1 2] [--only TEXT...]          with vLLM in the same environment

All experts see all tokens (top 8 of 8): a rounding that flips a route would say nothing about a container.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "CUDA_CACHE_MAXSIZE": str(4 << 30),
}

import numpy as np
import torch

from mimoquant import pipeline
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.model.decoder_layer import linear
from mimoquant.model.layer_stream import walk
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.synthetic.checkpoint import SynthSizes, synth
from mimoquant.weights.decoded import CheckpointWeights

SIZES = SynthSizes(
    layers=6,
    hidden=512,
    experts=8,
    top_k=8,
    expert_intermediate=512,
    dense_intermediate=512,
    vocab=2048,
    heads=16,
    kv_heads=2,
    swa_kv_heads=2,
    head_dim=192,
    v_head_dim=128,
    mtp_layers=0,
)
LENGTHS = (96, 96, 96)
TIMEOUT_S = 200  # of one engine, its kernels' compilation included
SPOKEN = re.compile(r"(?:Using \S.*?(?:backend|Experts|Marlin|kernel|Method)\S*[^\n]*|\S*Marlin\S*[^\n]*)")


@dataclass(frozen=True)
class Case:
    source: str
    recipe: str | None = None
    container: str = "auto"

    def __str__(self) -> str:
        return f"{self.recipe or 'not quantized'}, {self.source}" + (
            "" if self.container == "auto" else f", {self.container}"
        )


CASES = (
    Case("flash"),
    Case("pro"),
    *(Case("flash", recipe) for recipe in ("int4-g128-mse", "int4-g32-mse", "nvfp4-mse")),
    *(Case("pro", recipe) for recipe in ("int4-g128-mse", "nvfp4-mse")),
    *(
        Case(source, "mxfp4-mse", container)
        for source in ("flash", "pro")
        for container in ("native", "compressed-tensors")
    ),
    Case("pro", "nvfp4-mse", "modelopt"),
)


def with_remote_code(folder: Path) -> None:
    """What names the config's class where `mimo_v2` is published; vLLM has none of its own."""
    shutil.copy(Path(__file__).parents[1] / "tests/serving/configuration_mimo_v2.py", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mimo_v2.MiMoV2Config"}
    (folder / "config.json").write_text(json.dumps(config))


def prepared(case: Case, work: Path) -> Path:
    """The folder of a case's output."""
    if case.recipe is None:
        return work / case.source
    out = work / re.sub(r"\W+", "-", str(case))
    container = {} if case.container == "auto" else {"container": case.container}
    pipeline.quantize(make_plan(work / case.source, load_recipe(case.recipe), **container), out, device="cuda")
    return out


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(4, SIZES.vocab, length).tolist() for length in LENGTHS]


@torch.no_grad()
def ours(folder: Path) -> np.ndarray:
    """Log-probabilities after every token but the last of each prompt, float64 [positions, vocabulary]."""
    layout = open_layout(folder)
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        [stream] = streams_of(weights, [[torch.tensor(prompts())]])
        walk([stream])
        hidden = final_hidden(stream, weights.tensor("model.norm.weight"))
        rows = linear(hidden, weights.tensor("lm_head.weight")).log_softmax(-1)
    return rows.numpy().astype(np.float64)


def ask(folder: str, tp: int, out: str) -> None:
    """The same from vLLM; runs in a process of its own."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        enforce_eager=True,
        tensor_parallel_size=tp,
        max_model_len=LENGTHS[0] + 8,
        max_num_seqs=4,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        seed=0,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=2**28,
        attention_backend="TRITON_ATTN_DIFFKV",
        disable_custom_all_reduce=True,
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    replies = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], asked, use_tqdm=False)
    rows: list[Any] = []
    for reply in replies:
        for told in reply.prompt_logprobs[1:]:
            row = np.full(SIZES.vocab, np.nan, np.float32)
            row[list(told)] = [one.logprob for one in told.values()]
            rows.append(row)
    np.save(out, np.stack(rows))


def answered(folder: Path, tp: int, number: int, work: Path) -> tuple[np.ndarray | None, str]:
    """vLLM's rows, or none, and its log. `number` tells the GPU and ports of an engine apart from others'."""
    out, log = (work / f"{folder.name}-tp{tp}.{suffix}" for suffix in ("npy", "log"))
    gpus = range(tp) if tp > 1 else [number % torch.cuda.device_count()]
    with (
        log.open("w") as told,
        subprocess.Popen(
            [sys.executable, __file__, "--ask", str(folder), str(tp), str(out)],
            stdout=told,
            stderr=subprocess.STDOUT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "VLLM_PORT": str(20000 + 64 * number)},
            start_new_session=True,
        ) as engine,
    ):
        try:
            engine.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(engine.pid, signal.SIGKILL)  # its workers, too
            told.write(f"\nTimeoutError: no answer in {TIMEOUT_S} s\n")
    return (np.load(out).astype(np.float64) if out.exists() else None), log.read_text(errors="replace")


def row(case: Case, tp: int, number: int, work: Path, folders: dict[Case, Path], own: dict[Case, np.ndarray]) -> str:
    theirs, log = answered(folders[case], tp, number, work)
    spoken = sorted({" ".join(found.split())[:110] for found in SPOKEN.findall(log) if "Using" in found})
    if theirs is None:
        reason = [line for line in log.splitlines() if re.search(r"\b\w*Error\b", line)]
        return f"| {case} | {tp} | no answer: {(reason or log.splitlines())[-1][-200:]} | | |"
    kl = (np.exp(own[case]) * (own[case] - theirs)).sum(-1)
    source = own[Case(case.source)]
    away = (np.exp(source) * (source - own[case])).sum(-1).mean()
    return (
        f"| {case} | {tp} | {np.abs(own[case] - theirs).max():.3f} | {kl.mean():.1e} | {away:.3f} | "
        f"{'; '.join(spoken)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="a folder for checkpoints and logs, kept; else a temporary one")
    parser.add_argument("--tp", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--ask", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        return ask(options.ask[0], int(options.ask[1]), options.ask[2])
    if options.work:
        options.work.mkdir(parents=True)
        return judge(options.work, options)
    with tempfile.TemporaryDirectory() as folder:
        judge(Path(folder), options)


def judge(work: Path, options: argparse.Namespace) -> None:
    for layout in ("flash", "pro"):
        synth(work / layout, layout, sizes=SIZES)
    with_remote_code(work / "pro")
    wanted = [case for case in CASES if any(text in str(case) for text in options.only) or case.recipe is None]
    folders = {case: prepared(case, work) for case in wanted}
    own = {case: ours(folder) for case, folder in folders.items()}
    print("| output | TP | max abs Δ log p | KL to ours | KL to the source | kernels |\n|---|---|---|---|---|---|")
    with ThreadPoolExecutor(options.at_once) as pool:
        jobs = [
            pool.submit(row, case, tp, number, work, folders, own)
            for number, (tp, case) in enumerate(itertools.product(options.tp, wanted))
        ]
        for job in as_completed(jobs):
            print(job.result(), flush=True)


if __name__ == "__main__":
    main()
