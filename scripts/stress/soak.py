#!/usr/bin/env python
"""Quantize, verify and evaluate the micro checkpoint again and again in one process: nothing may grow.

Told every tenth cycle: resident memory, open files, threads, on CUDA also its memory. The first tenth of the cycles is
warm-up; after it the medians of the first and the last quarter are compared. Tokens are random ids: each `Tokenizer` of
tokenizers 0.23.3 that has encoded a text leaves some .6 MB behind, whoever uses it. `verify` runs on the CPU's compiled
engine; where numba is not installed, on a machine for CUDA, it is left out.

usage: python scripts/stress/soak.py [--cycles N] [--device cpu|cuda] [--sequences N]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mimoquant
from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.evaluation.eval_kl import eval_kl
from mimoquant.machine.team import Team
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

RECIPES = ("int4-g128-mse", "mxfp4-mse", "nvfp4-mse", "gptq-int4-g128")
HAS_NUMBA = importlib.util.find_spec("numba") is not None
MOST_GROWTH_BYTES = {"rss_bytes": 16 * 2**20, "cuda_reserved_bytes": 64 * 2**20}  # the allocators' own to and fro


def now(device: str) -> dict[str, int]:
    """What a leak would show in. What the allocator only keeps for itself is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    out = {
        "rss_bytes": pages * os.sysconf("SC_PAGESIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }
    if device == "cuda":
        import torch

        out["cuda_bytes"], out["cuda_reserved_bytes"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return out


def cycle(number: int, folder: Path, device: str, tokens: TokenSet) -> str:
    """One recipe after the other; returns what the cycle wrote, as a hash."""
    source, out = mimoquant.micro_checkpoint(), folder / "out"
    recipe = load_recipe(RECIPES[number % len(RECIPES)])
    if recipe.calibrated:
        recipe = recipe.calibrated_on({"data": (str(folder / "calibration.npy"),), "tokens": tokens.ids.shape[1]})
    pipeline.quantize(make_plan(source, recipe), out, device=device)
    if HAS_NUMBA:
        from mimoquant.output.verify import verify

        report = verify(out, source)
        assert report.ok, report.problems
    facts = eval_kl(source, out, tokens, team=Team(device), noise_floor=False)
    written = f"{file_sha256(out / 'journal.jsonl')} {facts['j']['mean']}"
    shutil.rmtree(out)
    return written


def grown(told: list[dict[str, int]]) -> list[str]:
    """What is more at the end than after the warm-up."""
    steady = told[len(told) // 10 :]
    quarter = max(1, len(steady) // 4)
    out = []
    for key in steady[0]:
        before, after = (statistics.median(one[key] for one in part) for part in (steady[:quarter], steady[-quarter:]))
        print(f"{key}: {before:.0f} in the first quarter after warm-up, {after:.0f} in the last")
        if after - before > MOST_GROWTH_BYTES.get(key, 0):
            out.append(key)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    begin, told = time.monotonic(), []
    written: dict[int, str] = {}
    vocab = make_plan(mimoquant.micro_checkpoint(), load_recipe(RECIPES[0])).layout.geometry.vocab
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(("held-out.npy", "calibration.npy")):
            ids = np.random.default_rng(number).integers(0, vocab, (options.sequences, 64))
            np.save(Path(folder) / name, ids)
        held_out = load_tokens(
            [f"{folder}/held-out.npy"],
            mimoquant.micro_checkpoint(),
            sequences=options.sequences,
            tokens=64,
            vocab=vocab,
        )
        for number in range(options.cycles):
            found = cycle(number, Path(folder), options.device, held_out)
            assert written.setdefault(number % len(RECIPES), found) == found, f"cycle {number} wrote something else"
            told.append(now(options.device))
            if number % 10 == 9:
                print(f"cycle {number + 1}: {told[-1]}", flush=True)
    more, elapsed_s = grown(told), time.monotonic() - begin
    left_out = "" if HAS_NUMBA else ", without verify"
    print(f"{options.cycles} cycles in {elapsed_s:.0f} s{left_out}: {f'grown: {more}' if more else 'no growth'}")
    sys.exit(bool(more))


if __name__ == "__main__":
    main()
