#!/usr/bin/env python
"""The walk back on layers of V2.5's size: seconds a layer, forward and back, and peak memory beside what is foreseen.

Makes a checkpoint with a dense and a few MoE layers on a RAM disk (random weights; eight experts, repeated) and walks
it twice: equal bytes of both say that a device repeats itself. A layer's seconds are from the end of the layer before
it to its own end, reading included; the last layer is global, those between slide. The walk back passes all but the
first MoE layer, whose matrix alone is taken. Then the head on a vocabulary of real size, and, on fewer tokens, how far
bfloat16 moves F beside other labels.

usage: scripts/bench/fisher.py [--work /dev/shm] [--device cuda] [--model V2.5] [--layers 3] [--experts 256]
                               [--sequences 256] [--tokens 512] [--draws 2] [--states host] [--check-sequences 32]
under torchrun: the first rank makes the source, all share the walks
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from unittest import mock

import gpu
import numpy as np
import torch

from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.fisher import labels
from mimoquant.fisher.matrices import Fisher
from mimoquant.fisher.needs import fisher_needs
from mimoquant.fisher.walk import FisherSettings, walk_back
from mimoquant.machine.team import Team
from mimoquant.weights.decoded import CheckpointWeights

VOCAB = 152_576
HEAD_TOKENS = 8192


def settled(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed_walk(
    weights: CheckpointWeights, tokens: TokenSet, settings: FisherSettings, folder: Path, team: Team
) -> tuple[Fisher, list[tuple[str, int, float]]]:
    """Also (way, layer, seconds since the last layer of either way)."""
    rows: list[tuple[str, int, float]] = []
    last = time.perf_counter()

    def progress(way: str, layer: int) -> None:
        nonlocal last
        settled(team.device)
        rows.append((way, layer, time.perf_counter() - last))
        last = time.perf_counter()

    begin = time.perf_counter()
    fisher = walk_back(weights, tokens, settings, folder, team=team, progress=progress)
    if team.leads:
        print(f"  {tokens.ids.size:,} tokens x {settings.draws} draws: {time.perf_counter() - begin:.1f} s in all")
    return fisher, rows


def head_seconds(positions: int, hidden: int, draws: int, device: str) -> float:
    """Of drawing labels and their gradients."""
    states = torch.randn(positions, hidden, device=device)
    matrix = 0.02 * torch.randn(VOCAB, hidden, device=device).to(torch.bfloat16)
    norm, uniform = torch.ones(hidden, device=device), labels.uniforms(positions, draws, 0)
    for _ in range(2):
        settled(device)
        begin = time.perf_counter()
        labels.head_gradients(states, norm, matrix, 1e-5, uniform)
        settled(device)
    return time.perf_counter() - begin


def compare(weights: CheckpointWeights, tokens: TokenSet, draws: int, work: Path) -> None:
    """Distances of F: bfloat16 from float32 with the same labels, and float32 with other labels."""
    held, drawn = [], labels.drawn

    def keep(shares: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        held.append(drawn(shares, uniform))
        return held[-1]

    with mock.patch.object(labels, "drawn", keep):
        exact = walk_back(weights, tokens, FisherSettings(draws, exact=True), work / "exact")
    with mock.patch.object(labels, "drawn", lambda shares, uniform: held.pop(0)):
        rough = walk_back(weights, tokens, FisherSettings(draws), work / "rough")
    other = walk_back(weights, tokens, FisherSettings(draws, seed=1, exact=True), work / "other")
    for layer in exact.layers:
        true, moved, redrawn = (one.load(layer) for one in (exact, rough, other))
        print(f"  layer {layer}: bfloat16 moves F by {float((moved - true).norm() / true.norm()):.4f}, "
              f"other labels by {float((redrawn - true).norm() / true.norm()):.4f}")  # fmt: skip


def measure(options: argparse.Namespace, work: Path, team: Team) -> None:
    source = work / "source"
    if team.leads:
        gpu.make_source(source, options.model, options.layers, options.experts)
        drawn = np.random.default_rng(0).integers(0, 1000, (options.sequences, options.tokens)).astype(np.int32)
        np.save(work / "ids.npy", drawn)
    team.gather(None)
    layout, settings = open_layout(source), FisherSettings(options.draws, states=options.states)

    def tokens(sequences: int) -> TokenSet:
        data = [str(work / "ids.npy")]
        return load_tokens(data, source, sequences=sequences, tokens=options.tokens, vocab=layout.geometry.vocab)

    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device(team.device))
        every, walks = tokens(options.sequences), []
        for number in range(2):
            if team.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            walks.append(timed_walk(weights, every, settings, work / f"fisher-{number}", team))
        if not team.leads:
            return
        for one, other in zip(walks[0][1], walks[1][1], strict=True):
            kind = "sliding" if layout.geometry.sliding[one[1]] else "global"
            print(f"  {one[0]} layer {one[1]} ({kind}): {one[2]:.2f} s, again {other[2]:.2f} s")
        same = all(torch.equal(walks[0][0].load(layer), walks[1][0].load(layer)) for layer in walks[0][0].layers)
        print(f"  the second walk's matrices are {'the same' if same else 'NOT THE SAME'}")
        told = fisher_needs(layout.geometry, every.ids.size, settings, team.device, team.size)
        peak = torch.cuda.max_memory_allocated() / 1e9 if team.device.startswith("cuda") else float("nan")
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"  peak {peak:.1f} GB on the device (foreseen {told.gpu_bytes / 1e9:.1f}), host {host:.1f} GB (foreseen "
              f"{told.host_bytes / 1e9:.1f}); {told.layer_flop / 1e12:.0f} TFLOP a layer both ways")  # fmt: skip
        some = min(HEAD_TOKENS, every.ids.size)
        seconds = head_seconds(some, layout.geometry.hidden, options.draws, team.device) * every.ids.size / some
        print(f"  head: {seconds:.1f} s for all tokens at a vocabulary of {VOCAB:,}")
        if options.check_sequences and team.size == 1:
            compare(weights, tokens(options.check_sequences), options.draws, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="V2.5", choices=list(gpu.SIZES))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--states", default="host", choices=("host", "files"))
    parser.add_argument("--check-sequences", type=int, default=32)
    options = parser.parse_args()
    gpu.on_ranks(options, "fisher", measure)


if __name__ == "__main__":
    main()
