#!/usr/bin/env python
"""What codes for the loss (`objective: kl`) change beside `output`: J, J by domain and by position, top-1 where the
reference is sure, and acceptance of MTP drafts. One trained model, one set of tokens, every calibrated format.

Each recipe is quantized with both objectives, --at-once processes at a time, then all are walked together on the
held-out tokens, and each once more for its drafts. Differences and ratios are paired, with intervals of 95 % by a
bootstrap over sequences, the same draws for all.

usage: scripts/bench/objectives.py MODEL --work DIR [--out FILE.jsonl] [--calib mixed-v1] [--calib-size 512 256]
           [--eval heldout-v1] [--eval-size 96 513] [--formats mxfp4 nvfp4 ...] [--device cuda] [--at-once 4]
--out: a line for each output, then one for each format, as they are measured. Prints Markdown tables; progress goes to
stderr. What is in --work already is not quantized again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import Floats, interval, resampled
from versions import versions

from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.evaluation.divergence import TokenScores
from mimoquant.evaluation.drafts import choose_draft
from mimoquant.evaluation.eval_draft import DraftScores, compare_drafts
from mimoquant.evaluation.eval_kl import compare, open_layout
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.evaluation.summary import CONFIDENT, summarize
from mimoquant.machine.team import Team

OBJECTIVES = ("output", "kl")
POSITIONS = 8  # parts of a sequence


@dataclass
class Output:
    """One quantized model and what was measured of it."""

    format: str
    objective: str
    folder: Path
    scores: TokenScores | None = None
    drafts: DraftScores | None = None


def tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def quantize(options: argparse.Namespace, output: Output) -> bool:
    """Whether it is there."""
    if output.folder.is_dir():
        return True
    sequences, tokens = options.calib_size
    command = [sys.executable, "-m", "mimoquant", "quantize", options.model, "-r", f"gptq-{output.format}"]
    command += ["--objective", output.objective, "--out", output.folder, "--data", options.calib]
    command += ["--sequences", sequences, "--tokens", tokens, "--device", options.device, "-q"]
    begin = time.perf_counter()
    done = subprocess.run([str(part) for part in command], stdout=sys.stderr)
    tell(f"{output.folder.name}: {'made' if done.returncode == 0 else 'failed'}, {time.perf_counter() - begin:.1f} s")
    return done.returncode == 0


def measure(options: argparse.Namespace, outputs: Sequence[Output], tokens: TokenSet) -> None:
    reference = open_layout(options.model)
    layouts = [open_layout(output.folder) for output in outputs]
    for output in outputs:
        refuse_shared_data(output.folder, tokens)
    walked = compare(reference, layouts, tokens, noise_floor=False, team=Team(options.device))
    for output, comparison in zip(outputs, walked.comparisons, strict=True):
        output.scores = comparison.scores
        assert output.scores is not None
        facts = summarize(output.scores, tokens)
        told = {key: value for key, value in facts.items() if key not in ("histogram", "by_confidence")}
        keep(
            options,
            {"output": output.folder.name, "j_per_sequence": by_sequence(output.scores.j, tokens).tolist()} | told,
        )


def draft(options: argparse.Namespace, outputs: Sequence[Output], tokens: TokenSet) -> None:
    reference = open_layout(options.model)
    for output in outputs:
        layouts = reference, open_layout(output.folder)
        mtp = choose_draft(layouts, "mtp", None, tokens.ids.shape[1])
        _, output.drafts = compare_drafts(*layouts, tokens, mtp, device=options.device)


def by_sequence(values: Floats, tokens: TokenSet) -> Floats:
    return np.asarray(values.reshape(len(tokens.ids), -1).mean(1), dtype=np.float64)


def ratio(kl: Floats, output: Floats) -> str:
    """Of means over sequences, paired."""
    return f"{kl.mean() / output.mean():.3f} ({interval(resampled(kl) / resampled(output), 3)})"


def difference(kl: Floats, output: Floats, digits: int = 2) -> str:
    """Of means over sequences, in points of a hundred, paired."""
    points = 100 * (kl - output)
    return f"{points.mean():+.{digits}f} ({signed(resampled(points), digits)})"


def signed(means: Floats, digits: int) -> str:
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def sure_difference(kl: TokenScores, output: TokenScores, tokens: TokenSet) -> str:
    """Top-1 agreement where the reference is sure: kl minus output, in points, paired over sequences."""
    sure = (kl.confidence > CONFIDENT).reshape(len(tokens.ids), -1).sum(1).astype(np.float64)
    gained = (kl.agree.astype(np.float64) - output.agree) * (kl.confidence > CONFIDENT)
    means = resampled(gained.reshape(len(tokens.ids), -1).sum(1)) / resampled(sure)
    return f"{100 * gained.sum() / sure.sum():+.2f} ({signed(100 * means, 2)})"


def beside(fmt: str, kl: Output, output: Output, tokens: TokenSet) -> dict[str, Any]:
    """A format's `kl` over or minus its `output`."""
    ours, theirs = kl.scores, output.scores
    assert ours is not None and theirs is not None
    j = [by_sequence(scores.j, tokens) for scores in (ours, theirs)]
    domains = np.array(tokens.domains)
    length = tokens.ids.shape[1] - 1
    parts = itertools.pairwise(np.linspace(0, length, POSITIONS + 1).astype(int))
    grid = [scores.j.reshape(-1, length) for scores in (ours, theirs)]
    facts: dict[str, Any] = {
        "format": fmt,
        "j": [float(of.mean()) for of in j],
        "ratio": ratio(*j),
        "top1": [float(scores.agree.mean()) for scores in (ours, theirs)],
        "top1_sure": [float(scores.agree[scores.confidence > CONFIDENT].mean()) for scores in (ours, theirs)],
        "top1_sure_points": sure_difference(ours, theirs, tokens),
        "by_domain": {
            str(name): [*(float(of[domains == name].mean()) for of in j), ratio(*(of[domains == name] for of in j))]
            for name in np.unique(domains)
        },
        "by_position": {f"{begin}-{end}": ratio(*(of[:, begin:end].mean(1) for of in grid)) for begin, end in parts},
    }
    if kl.drafts is not None and output.drafts is not None:
        lengths = [drafts.lengths() for drafts in (kl.drafts, output.drafts)]
        facts["accepted_length"] = [[float(values.mean()) for values in of] for of in lengths]
        first = [drafts.acceptance[..., 0].mean(1) for drafts in (kl.drafts, output.drafts)]
        facts["acceptance_1_points"] = difference(*first)
        facts["accepted_length_hundredths"] = difference(*(of[0].mean(1) for of in lengths))
    return facts


def keep(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    told = ("ratio", "top1_sure_points", "acceptance_1_points", "accepted_length_hundredths")
    print("| format | J: kl, output | " + " | ".join(told) + " |\n" + "|---" * (2 + len(told)) + "|")
    for row in rows:
        cells = [", ".join(f"{j:.5f}" for j in row["j"]), *(str(row.get(name, "-")) for name in told)]
        print(f"| {row['format']} | {' | '.join(cells)} |")
    for part in ("by_domain", "by_position"):
        names = list(rows[0][part])
        print(f"\n| {part} | " + " | ".join(row["format"] for row in rows) + " |\n" + "|---" * (1 + len(rows)) + "|")
        for name in names:
            cells = [value if isinstance(value := row[part][name], str) else value[-1] for row in rows]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--formats", nargs="+", default=["int4-g128", "int4-g32", "mxfp4", "nvfp4"])
    parser.add_argument("--calib", default="mixed-v1")
    parser.add_argument("--calib-size", type=int, nargs=2, default=[512, 256], metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--eval", default="heldout-v1")
    parser.add_argument("--eval-size", type=int, nargs=2, default=[96, 513], metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--at-once", type=int, default=1, help="quantizations at a time")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pairs = itertools.product(options.formats, OBJECTIVES)
    outputs = [Output(fmt, objective, options.work / f"{fmt}-{objective}") for fmt, objective in pairs]
    with ThreadPoolExecutor(options.at_once) as pool:
        made = list(pool.map(lambda output: quantize(options, output), outputs))
    outputs = [output for output, there in zip(outputs, made, strict=True) if there]
    vocab, (sequences, length) = open_layout(options.model).geometry.vocab, options.eval_size
    tokens = load_tokens([options.eval], options.model, sequences=sequences, tokens=length, vocab=vocab)
    measure(options, outputs, tokens)
    tell("scored")
    draft(options, outputs, tokens)
    rows = []
    for fmt in options.formats:
        both = {output.objective: output for output in outputs if output.format == fmt}
        if len(both) == len(OBJECTIVES):
            rows.append(beside(fmt, both["kl"], both["output"], tokens))
            keep(options, rows[-1])
    calibrated = " x ".join(map(str, options.calib_size))
    held = f"{options.eval}, {' x '.join(map(str, tokens.ids.shape))}"
    print(f"{options.model.name}, {options.device}; calibrated on {options.calib}, {calibrated}; J over {held};")
    print(versions(("torch", "triton", "numpy")) + "\n")
    print_tables(rows)


if __name__ == "__main__":
    main()
