"""Data-free quantization on a CPU: mimoquant beside llm-compressor's model_free_ptq, and beside a plain copy.

One FP8 checkpoint (V2-Flash layout, real expert sizes) is made, then every round runs, one after another and each in
its own process: a copy (read every source byte in 32 MiB blocks, write as many bytes as the output has, fsync), our
`mimoquant quantize` (the whole process, start-up included) and the peer's `model_free_ptq` with its FP8 dequantizer
chained (the call alone, imports not counted: that favours the peer). All files are in the page cache beforehand.

usage: scripts/bench/datafree.py [--experts 32] [--layers 3] [--repeats 5] [--peer-repeats 2] [--work DIR]
Prints a Markdown table with medians and spread; paste it into scripts/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from versions import versions

FORMATS = {"mxfp4": ("mxfp4-rtn", "MXFP4A16"), "int4 g128": ("int4-g128-rtn", "W4A16")}
BLOCK = 32 * 2**20
PEER = r"""
import json, sys, time
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from llmcompressor import model_free_ptq
source, out, scheme, device, workers = sys.argv[1:6]
fp8 = [r"re:.*mlp\.experts\.\d+\.\w+_proj$", r"re:.*self_attn\.[qkv]_proj$", r"re:.*mlp\.\w+_proj$"]
begin = time.perf_counter()
model_free_ptq(source, out, scheme=scheme, ignore=[r"re:(?!.*mlp\.experts\.).*"], device=device,
               max_workers=int(workers), converter=FP8BlockDequantizer(targets=fp8))
print("SECONDS", time.perf_counter() - begin)
"""


def copy(source: Path, target: Path, out_bytes: int) -> float:
    """Seconds to read the source's bytes and write `out_bytes`, durably."""
    begin, block = time.perf_counter(), bytearray(BLOCK)
    for path in source.iterdir():
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(block):
                pass
    target.mkdir()
    with (target / "out").open("wb", buffering=0) as handle:
        left = out_bytes
        while left > 0:
            left -= handle.write(memoryview(block)[: min(left, BLOCK)])
        os.fsync(handle.fileno())
    return time.perf_counter() - begin


def ours(source: Path, out: Path, recipe: str) -> float:
    """Seconds of the whole process."""
    command = [
        sys.executable,
        "-m",
        "mimoquant",
        "quantize",
        str(source),
        "-r",
        recipe,
        "--out",
        str(out),
        "--container",
        "compressed-tensors",
        "--device",
        "cpu",
    ]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def peer(source: Path, out: Path, scheme: str, device: str = "cpu", workers: int = 2) -> float:
    """Seconds of the peer's call, without its imports."""
    command = [sys.executable, "-c", PEER, str(source), str(out), scheme, device, str(workers)]
    done = subprocess.run(command, check=True, text=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return float(next(line for line in done.stdout.splitlines() if line.startswith("SECONDS")).split()[1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}, n={len(values)})"


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    names = ("mimoquant", "numba", "numpy", "torch", "compressed-tensors", "llmcompressor")
    return f"{model}, {len(os.sched_getaffinity(0))} cores; {versions(names)}"


def bench(source: Path, work: Path, label: str, repeats: int, peer_repeats: int) -> str:
    recipe, scheme = FORMATS[label]
    ours(source, work / "warm", recipe)  # compiles and caches the kernels, fills the page cache
    out_bytes = sum(path.stat().st_size for path in (work / "warm").iterdir())
    shutil.rmtree(work / "warm")
    copies, mine, theirs = [], [], []
    for number in range(repeats):
        copies.append(copy(source, work / "copy", out_bytes))
        mine.append(ours(source, work / "ours", recipe))
        if number < peer_repeats:
            theirs.append(peer(source, work / "peer", scheme))
        for name in ("copy", "ours", "peer"):
            shutil.rmtree(work / name, ignore_errors=True)
        print(f"{label}: round {number + 1} of {repeats} done", file=sys.stderr)
    copied, own, other = (statistics.median(values) for values in (copies, mine, theirs or [float("nan")]))
    return (
        f"| {label} | {spread(mine)} | {spread(theirs) if theirs else '-'} | {other / own:.1f}x | {spread(copies)} "
        f"| {own / copied:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder with room for four copies of the checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        from mimoquant.synthetic.checkpoint import SynthSizes, synth

        sizes = SynthSizes(
            layers=options.layers,
            experts=options.experts,
            hidden=4096,
            expert_intermediate=2048,
            head_dim=128,
            v_head_dim=128,
        )
        report = synth(work / "source", "flash", sizes=sizes)
        print(
            f"{machine()}\nsource: {report.size_bytes / 1e9:.2f} GB of FP8, {json.dumps(vars(options), default=str)}\n"
        )
        print("| format | mimoquant, s | model_free_ptq, s | faster | copy, s | over copy |")
        print("|---|---|---|---|---|---|", flush=True)
        for label in FORMATS:
            print(bench(work / "source", work, label, options.repeats, options.peer_repeats), flush=True)


if __name__ == "__main__":
    main()
