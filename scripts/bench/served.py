"""J of weights, of activations and of both, by format and rounding: mimo-tiny on the bench ids.

    python scripts/bench/served.py SHARED/models/mimo-tiny --held-out SHARED/bench/tiny_eval_ids.npy
    python scripts/bench/served.py SHARED/models/mimo-tiny --held-out SHARED/bench/tiny_eval_ids.npy --time

Prints Markdown: a row a rounding; J of activations alone, and of both with each recipe. With --time instead the CPU
seconds of an evaluation with and without rounding, alternating.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import mimoquant
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.index import open_index
from mimoquant.evaluation.eval_kl import AsServed, compare, eval_kl, open_layout
from mimoquant.model.served_rounding import FP8, MXFP8, NONE, NVFP4, Rounding
from mimoquant.planning.settings_beside import read_config

ROUNDINGS = {
    "none": Rounding(),
    "fp8": Rounding(FP8),
    "mxfp8": Rounding(MXFP8),
    "nvfp4, unit scales": Rounding(NVFP4),
    "FP8 KV cache, scale 1": Rounding(NONE, NONE, FP8),
}
ROUNDS = 3  # of each timing


def print_table(source: Path, outputs: dict[str, Path], tokens: TokenSet) -> None:
    """The reference itself is the first candidate: its J is of activations alone."""
    reference, *candidates = (open_layout(folder) for folder in (source, *outputs.values()))
    print(f"| rounded | activations alone | {' | '.join(outputs)} |")
    print("|---" * (2 + len(outputs)) + "|")
    for name, rounding in ROUNDINGS.items():
        candidates_first = [open_layout(source), *candidates]
        roundings = [Rounding(), *([rounding] * len(candidates_first))]
        told = compare(reference, candidates_first, tokens, roundings=roundings, noise_floor=False)
        means = [one.scores.j.mean() for one in told.comparisons if one.scores is not None]
        print(f"| {name} | {' | '.join(f'{j:.5f}' for j in means)} |", flush=True)


def print_times(source: Path, candidate: Path, tokens: TokenSet) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ("none", "mxfp8", "nvfp4, unit scales")}
    for _ in range(ROUNDS):
        for name, taken in seconds.items():
            begin = time.process_time()
            eval_kl(source, AsServed(candidate, ROUNDINGS[name]), tokens)
            taken.append(time.process_time() - begin)
    for name, taken in seconds.items():
        print(f"eval-kl, {name}: {sorted(taken)[ROUNDS // 2]:.1f} CPU seconds ({min(taken):.1f} to {max(taken):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=["int4-g128-mse", "mxfp4-rtn", "nvfp4-mse"])
    asked = parser.parse_args()
    vocab = int(read_config(open_index(asked.source))["vocab_size"])
    tokens = load_tokens([asked.held_out], asked.source, sequences=asked.sequences, tokens=512, vocab=vocab)
    print(f"{len(tokens.ids)} x {tokens.ids.shape[1]} tokens, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        outputs = {recipe: Path(scratch, recipe) for recipe in asked.recipes}
        for recipe, out in outputs.items():
            mimoquant.quantize(asked.source, recipe, out, device="cpu")
        if asked.time:
            print_times(asked.source, next(reversed(outputs.values())), tokens)
        else:
            print_table(asked.source, outputs, tokens)


if __name__ == "__main__":
    main()
