"""Time and memory of the header verbs at full size, and the memory of a run that is larger than it may hold.

usage: scripts/bench/scale.py headers CKPT [CKPT ...]     inspect and plan (median of 5), e.g. on sparse full-size files
       scripts/bench/scale.py memory [--gb 6] [--work DIR] quantize a synthetic checkpoint, peak RSS against one layer
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def measure(command: list[str]) -> tuple[float, float, str]:
    """(seconds, peak resident bytes, stdout) of one mimoquant process."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mimoquant", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"mimoquant {' '.join(command)} failed with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024, text


def headers(checkpoints: list[str]) -> None:
    print("| checkpoint | verb | seconds (median of 5) | peak RSS | output bytes |\n|---|---|---|---|---|")
    for checkpoint in checkpoints:
        verbs = {"inspect": ["inspect", checkpoint]}
        verbs |= {
            f"plan {recipe}": ["plan", checkpoint, "-r", recipe, "--json"]
            for recipe in ("int4-g128-rtn", "mxfp4-rtn", "nvfp4-mse", "awq-int4-layer41-bf16")
        }
        for verb, command in verbs.items():
            runs = [measure(command) for _ in range(5)]
            size = json.loads(runs[0][2])["output_bytes"] if verb != "inspect" else "-"
            seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
            print(f"| {Path(checkpoint).name} | {verb} | {seconds:.2f} | {peak / 1e6:.0f} MB | {size} |", flush=True)


def memory(gigabytes: float, folder: Path | None) -> None:
    from mimoquant.synthetic.checkpoint import SynthSizes, synth

    with tempfile.TemporaryDirectory(dir=folder) as work:
        expert = 3 * 4096 * 2048
        layers = 6
        sizes = SynthSizes(
            layers=layers + 1, experts=round(gigabytes * 1e9 / layers / expert), hidden=4096, expert_intermediate=2048
        )
        report = synth(Path(work) / "source", "v2.5", sizes=sizes)
        layer = sizes.experts * expert
        print(f"source {report.size_bytes / 1e9:.2f} GB, one layer {layer / 1e9:.2f} GB of FP8")
        for recipe in ("mxfp4-rtn", "int4-g128-rtn"):
            seconds, peak, _ = measure(
                ["quantize", f"{work}/source", "-r", recipe, "--out", f"{work}/{recipe}", "--device", "cpu"]
            )
            print(
                f"quantize {recipe}: {seconds:.1f} s, peak RSS {peak / 1e9:.2f} GB "
                f"(limit 1.2 GB + one layer = {(1.2e9 + layer) / 1e9:.2f} GB)"
            )
            seconds, peak, _ = measure(["verify", f"{work}/{recipe}", "--source", f"{work}/source"])
            print(f"verify   {recipe}: {seconds:.1f} s, peak RSS {peak / 1e9:.2f} GB", flush=True)
        ids = Path(work) / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, sizes.vocab, (16, 256)))
        seconds, peak, _ = measure(
            ["eval-kl", f"{work}/source", f"{work}/mxfp4-rtn", "--data", str(ids), "--tokens", "256", "--device", "cpu"]
        )
        hidden = 4 * ids.stat().st_size // 8 * sizes.hidden * 4
        print(
            f"eval-kl  mxfp4-rtn, 16 x 256 tokens: {seconds:.1f} s, peak RSS {peak / 1e9:.2f} GB (limit 1.5 GB + two "
            f"layers + hidden states = {(1.5e9 + 2 * layer + hidden) / 1e9:.2f} GB)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("headers").add_argument("checkpoints", nargs="+")
    run = verbs.add_parser("memory")
    run.add_argument("--gb", type=float, default=6)
    run.add_argument("--work", type=Path)
    options = parser.parse_args()
    if options.verb == "headers":
        headers(options.checkpoints)
    else:
        memory(options.gb, options.work)


if __name__ == "__main__":
    main()
