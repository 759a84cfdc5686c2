#!/usr/bin/env python
"""What a layer of V2.5's size costs in `sensitivity`: seconds by how many branches pass it, and what that makes of 47.

A layer's seconds are from the end of the layer before it to its own end, reading and keeping states included. They are
fitted by a line over the branches of all tokens (a branch of half of the sequences counts half, probes with their
share); its constant is what a layer costs in any walk. The first MoE layer, which pays for compilers, is not counted.

usage: scripts/bench/forks.py [--work /dev/shm] [--device cuda] [--layers 5] [--experts 256] [--recipe NAME]
                              [--sequences 56] [--tokens 512] [--calibration 16]
under torchrun: the first rank makes the source, all share the walks
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import gpu
import numpy as np
import torch

from mimoquant.calibration.tokens import load_tokens
from mimoquant.machine.team import Team
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.needs import foreseen, forward_passes, probe_every
from mimoquant.mixing.run import sensitivity
from mimoquant.mixing.walks import forks_of
from mimoquant.planning.plan import CUDA_CHUNK_BYTES, make_plan
from mimoquant.planning.recipe import load_recipe

MODEL_LAYERS = 48  # V2.5's, the first of them dense


def ids(path: Path, sequences: int, tokens: int, seed: int) -> str:
    drawn = np.random.default_rng(seed).integers(0, 1000, (sequences, tokens)).astype(np.int32)
    if not path.exists():
        np.save(path, drawn)
    return str(path)


def branches(place: int, formats: int) -> float:
    """Branches of all tokens that pass MoE layer `place` (0 the first): the source, all layers quantized, a fork for
    each layer so far; and every format for some of one half. In the first layer its fork is all there is."""
    return (place + 3 if place else 2) + (1 + formats) / (2 * probe_every(formats))


def measure(options: argparse.Namespace, work: Path, team: Team) -> None:
    source = work / "source"
    if team.leads:
        gpu.make_source(source, "V2.5", options.layers, options.experts)
        ids(work / "ids.npy", options.sequences, options.tokens, 0)
        ids(work / "calibration.npy", options.calibration, 512, 1)
    team.gather(None)
    recipe = load_recipe(options.recipe)
    if recipe.calibrated:
        held = {"data": (str(work / "calibration.npy"),), "sequences": options.calibration, "tokens": 512}
        recipe = recipe.calibrated_on(held)
    mixtures = Mixtures(make_plan(source, recipe, chunk_bytes=CUDA_CHUNK_BYTES), CUDA_CHUNK_BYTES)
    data, shape = [str(work / "ids.npy")], {"sequences": options.sequences, "tokens": options.tokens}
    tokens = load_tokens(data, source, **shape, vocab=4096)
    budget = mixtures.size([len(mixtures.options) - 2] + [0] * (options.layers - 1))  # one layer FP8
    forks = forks_of(mixtures, tokens, team)
    told: dict[str, list[float]] = {}

    def progress(what: str, done: int, layers: int) -> None:
        told.setdefault(what, []).append(time.perf_counter())

    begin = time.perf_counter()
    facts = sensitivity(mixtures, tokens, work / "recipe.yaml", budget_bytes=budget, team=team, progress=progress)
    if not team.leads:
        return
    print(f"{options.recipe}: {time.perf_counter() - begin:.1f} s in all; told before: {foreseen(forks, team.device)}")
    print(f"  {facts['cost']['walks']}; chosen {list(facts['chosen']['options'].values())}")
    formats = len(mixtures.formats)
    rows = [np.diff(times)[2:] for times in (told["ablation"], told["measure"][: options.layers + 2])]
    x = [branches(place, formats) for place in range(1, options.layers)]
    slope, constant = np.polyfit(x, rows[0], 1)
    pairs = ", ".join(f"{n:.2f} branches {s:.2f}" for n, s in zip(x, rows[0], strict=True))
    print(f"  ablation, seconds a layer: {pairs}")
    print(f"  = {constant:.2f} + {slope:.3f} a branch; measurement {np.median(rows[1]):.2f} s a layer")
    passes = forward_passes(forks) * (options.layers + 1)
    print(f"  passes foreseen {passes:.2f}, counted here {sum(x) + branches(0, formats) + 1:.2f}")
    every = [branches(place, formats) for place in range(MODEL_LAYERS - 1)]
    print(
        f"  47 layers: forks {sum(constant + slope * n for n in every) / 60:.1f} min, "
        f"a choice {np.median(rows[1]) * len(every) / 60:.1f} min"
    )
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9 if options.device.startswith("cuda") else float("nan")
    print(f"  peak {peak:.1f} GB on the device, {host:.1f} GB host", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--recipe", default="int4-g128-mse")
    parser.add_argument("--sequences", type=int, default=56)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=16)
    options = parser.parse_args()
    gpu.on_ranks(options, "forks", measure)


if __name__ == "__main__":
    main()
