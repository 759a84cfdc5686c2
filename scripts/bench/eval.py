"""`eval-kl` on real-size layers, against the time to read both checkpoints and to multiply the matrices.

Makes a V2.5-sized checkpoint (1 dense + N MoE layers, few different experts), quantizes it to native MXFP4, evaluates
random tokens, once with a few to compile; then measures the two bounds in the same run: a plain read of both
checkpoints, and float32 products of the same size as those of the forward, which are three of bfloat16 on CUDA.

usage: scripts/bench/eval.py [--device cuda] [--layers 3] [--experts 256] [--sequences 64] [--tokens 2048] [--work DIR]
                             [--as-served ENGINE:GPU]
  --as-served: also with what is rounded there, plain and served in turns
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import gpu
import numpy as np
import torch

from mimoquant import pipeline
from mimoquant.assembly.choices import RoundingChoice
from mimoquant.assembly.evaluations import rounded_checkpoints
from mimoquant.calibration.tokens import TokenSet
from mimoquant.evaluation.eval_kl import eval_kl
from mimoquant.machine.team import Team
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

VOCAB = 4096  # of `gpu.make_source`


def read_seconds(*folders: Path) -> float:
    begin, block = time.perf_counter(), bytearray(32 * 2**20)
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as handle:
                while handle.readinto(block):
                    pass
    return time.perf_counter() - begin


def product_seconds(flops: float, device: str) -> float:
    """What `flops` of float32 matrix products take on the device, from one large product."""
    size, dtype, parts = (8192, torch.bfloat16, 3) if device.startswith("cuda") else (2048, torch.float32, 1)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        begin = time.perf_counter()
        (left @ right).sum().item()
        seconds = time.perf_counter() - begin
    return parts * flops * seconds / (2 * size**3)


def evaluate(
    work: Path, sequences: int, length: int, device: str, place: str | None = None
) -> tuple[float, float, float]:
    """Seconds, J, peak GB on the device; with what is rounded at a `place`, or with nothing."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (sequences, length))
    tokens = TokenSet(name="random", ids=ids, domains=("random",) * len(ids), sha256="", sequence_hashes=(), origins=())
    folders = {"reference": work / "source", "candidate": work / "out"}
    sides = rounded_checkpoints(folders, RoundingChoice(as_served=place))
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    facts = eval_kl(sides["reference"], sides["candidate"], tokens, team=Team(device), noise_floor=False)
    seconds = time.perf_counter() - begin
    return seconds, facts["j"]["mean"], torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    for name, value in (("layers", 3), ("experts", 256), ("sequences", 64), ("tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--as-served")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        gpu.make_source(work / "source", "V2.5", options.layers, options.experts)
        begin = time.perf_counter()
        pipeline.quantize(make_plan(work / "source", load_recipe("mxfp4-rtn")), work / "out", device=options.device)
        print(f"quantized on {options.device} in {time.perf_counter() - begin:.1f} s", flush=True)
        places = [None, *([options.as_served] if options.as_served else [])]
        for place in places:
            evaluate(work, min(8, options.sequences), options.tokens, options.device, place)  # compiles
        told: dict[str | None, list[tuple[float, float, float]]] = {place: [] for place in places}
        for place in places * 2:
            told[place].append(evaluate(work, options.sequences, options.tokens, options.device, place))
        read = read_seconds(work / "source", work / "out")
        attention = 4096 * (64 * 192 + 8 * 192 + 8 * 128) + 4096 * 64 * 128
        count = options.sequences * options.tokens
        flops = 2.0 * 2 * count * options.layers * (8 * 3 * 4096 * 2048 + attention)
        bound = read + product_seconds(flops, options.device)
        for place in places:
            seconds, j, peak = min(told[place])
            every = ", ".join(f"{one:.2f}" for one, _, _ in told[place])
            print(f"eval-kl of {count} tokens, {place or 'plain'}: {every} s, {peak:.1f} GB on the device, J {j:.7f}")
        plain, *served = (min(told[place])[0] for place in places)
        print(f"bounds: reading {read:.1f} s + products {bound - read:.1f} s; reached {bound / plain:.2f} of them")
        for seconds in served:
            print(f"{options.as_served}: {seconds / plain:.2f} times plain")


if __name__ == "__main__":
    main()
