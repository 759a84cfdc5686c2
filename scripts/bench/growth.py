#!/usr/bin/env python
"""Does what is measured on a small model hold as models grow? Three sizes are trained and quantized, and J is told of
plain rounding, of the peer's best, of codes for an expert's output and of codes for the loss.

Each size is trained by `scripts/make/train_micro.py` on one prepared file, then `scripts/bench/quality.py` makes and
scores the variants: calibrated on text that the models were trained on, J on text of the same kinds that they were not.
What is done already is not done again, so the work may be cut into stages: --until says after how many seconds nothing
new is begun and what still runs is ended (a training takes --train-s, a variant a minute or two). All sizes are trained
at once, and --at-once variants are made at a time.

usage: scripts/bench/growth.py DATA.npz --work DIR [--sizes 10m 30m 120m] [--device cuda] [--train-s 150] [--until 500]
           [--at-once 1] [--calib 64 256] [--eval 76 512] [--peer SCRIPT] [--results DIR] [--methods rtn gptq gptq-kl]
DATA.npz: of `scripts/make/train_micro.py --prepare`. --peer: as of quality.py; its best calibrated variants are run.
--results: where SIZE-ours.jsonl and SIZE-peer.jsonl lie, by default in --work.
Prints a Markdown table of what there is so far; paste it into scripts/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from quality import FORMATS, Floats, interval, resampled
from versions import versions

from mimoquant.calibration.fingerprints import OVERLAP_LIMIT, of_ids

SCRIPTS = Path(__file__).resolve().parents[1]
METHODS = ("gptq-kl", "gptq", "rtn")
PEER_BEST = {  # what was its best, or near it, on the 41 MB model
    "int4-g128": ("gptqmse",),
    "int4-g32": ("g32_gptqimatrix", "g32_gptqmse"),
    "mxfp4": ("mxfp4_gptqmse",),
    "nvfp4": ("nvfp4_gptqexpanded", "nvfp4_gptqmse"),
}
BEGUN = time.monotonic()


@dataclass
class Growing:
    """One size: where its model and its results lie."""

    size: str
    folder: Path
    kept: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def results(self, side: str) -> Path:
        return self.kept / f"{self.size}-{side}.jsonl"

    def of(self, side: str) -> dict[str, Floats]:
        """J of each sequence, by the variant's name."""
        path = self.results(side)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return {line["variant"]: np.array(line["J_per_sequence"]) for line in lines}


def windows(data: Path, stream: str, count: int, length: int) -> npt.NDArray[np.int64]:
    """Ids [count, length] out of the prepared stream, from each domain by its share, none twice."""
    with np.load(data) as archive:
        ids, bounds, shares = archive[stream], archive[f"{stream}_bounds"], archive["shares"]
    rng = np.random.default_rng(0)
    rooms = [(end - begin) // length for begin, end in itertools.pairwise(bounds)]
    wanted = np.minimum(rooms, np.ceil(count * shares).astype(int))
    if wanted.sum() < count:
        raise SystemExit(
            f"{data}: {stream} has {wanted.sum()} windows of {length} tokens by domain, {count} are wanted"
        )
    starts = [
        bounds[domain] + length * place
        for domain, few in enumerate(wanted)
        for place in rng.choice(rooms[domain], few, replace=False)
    ]
    kept = rng.permutation(starts)[:count]
    return np.stack([ids[start : start + length] for start in kept]).astype(np.int64)


def apart(calib: npt.NDArray[np.int64], held: npt.NDArray[np.int64]) -> None:
    """`eval-kl` refuses data that share more: better told before an hour of training than after it."""
    shared = float(np.isin(of_ids(held), of_ids(calib)).mean())
    if shared >= OVERLAP_LIMIT:
        raise SystemExit(
            f"--calib {len(calib)}: {shared:.2%} of the text to judge on is in it, {OVERLAP_LIMIT:.2%} may be"
        )


def run(options: argparse.Namespace, *command: object) -> bool:
    """Whether it went well and in time; what it says goes to stderr."""
    now = time.monotonic() - BEGUN
    print(f"{now:.0f} s:", *command, file=sys.stderr, flush=True)
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=sys.stderr, start_new_session=True)
    try:
        return process.wait(options.until - now) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has begun itself
        print("ended, for there is no more time:", command[0], file=sys.stderr, flush=True)
        return False


def train(options: argparse.Namespace, growing: Growing) -> None:
    if (growing.folder / "train.txt").is_file() or time.monotonic() - BEGUN >= options.until:
        return
    command = [SCRIPTS / "make" / "train_micro.py", "--train", options.data, "--size", growing.size]
    command += ["--out", growing.model, "--report", growing.folder / "train.txt"]
    limits = ["--steps", 10**6, "--time-limit", options.train_s, "--batch", options.batch]
    run(options, *command, *limits, "--device", options.device)


def variants(methods: list[str]) -> list[str]:
    """By falling worth, should a stage end before all are made: names as `quality.py` takes them."""
    ours = [f"ours/{fmt}/{method}" for method in methods for fmt in FORMATS]
    return ours + [f"peer/{name}" for names in itertools.zip_longest(*PEER_BEST.values()) for name in names if name]


def measure(options: argparse.Namespace, growing: Growing, name: str) -> None:
    if not (growing.folder / "train.txt").is_file() or time.monotonic() - BEGUN >= options.until:
        return
    if name in growing.of("ours") or (name.startswith("peer/") and options.peer is None):
        return
    command = [SCRIPTS / "bench" / "quality.py", "--model", growing.model, "--only", name, "--device", options.device]
    command += ["--calib", options.work / "calib.npy", "--eval", options.work / "eval.npy"]
    command += ["--our-results", growing.results("ours"), "--peer-results", growing.results("peer")]
    if name.startswith("peer/"):  # its checkpoint is scored as ours are
        command += ["--peer", options.peer, "--peer-folders", growing.folder / "peers"]
    run(options, *command, "--work", growing.folder)


def table(options: argparse.Namespace, sizes: list[Growing]) -> list[str]:
    rows = ["| size | format | rtn | peer's best | output | kl | kl over output | kl over the peer's best |"]
    rows.append("|" + "---|" * 8)
    for growing in sizes:
        ours = growing.of("ours")
        for fmt in FORMATS:
            j = {method: ours.get(f"ours/{fmt}/{method}") for method in METHODS}
            theirs = [ours[f"peer/{name}"] for name in PEER_BEST[fmt] if f"peer/{name}" in ours]
            best = min(theirs, key=lambda values: float(values.mean()), default=None)
            cells = [told(j["rtn"]), told(best), told(j["gptq"]), told(j["gptq-kl"])]
            cells += [ratio(j["gptq-kl"], j["gptq"]), ratio(j["gptq-kl"], best)]
            rows.append(f"| {growing.size} | {fmt} | {' | '.join(cells)} |")
    return rows


def told(j: Floats | None) -> str:
    return "-" if j is None else f"{j.mean():.5f}"


def ratio(j: Floats | None, other: Floats | None) -> str:
    if j is None or other is None:
        return "-"
    return f"{j.mean() / other.mean():.3f} ({interval(resampled(j) / resampled(other), 3)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["10m", "30m", "120m"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--train-s", type=int, default=150, help="seconds that the training of a size takes")
    parser.add_argument("--batch", type=int, default=64, help="windows of 512 tokens a step of training")
    parser.add_argument("--until", type=int, default=10**6, help="seconds after which nothing new is begun")
    parser.add_argument("--at-once", type=int, default=1, help="variants that are made at a time")
    parser.add_argument("--results", type=Path, help="a folder for what is measured, by default --work")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="ours, by falling worth")
    parser.add_argument("--calib", type=int, nargs=2, default=[64, 256], metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--eval", type=int, nargs=2, default=[76, 512], metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--peer", type=Path, help="the script that runs one variant of llm-compressor")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    apart(calib := windows(options.data, "train", *options.calib), held := windows(options.data, "held", *options.eval))
    np.save(options.work / "calib.npy", calib)
    np.save(options.work / "eval.npy", held)
    kept = options.results or options.work
    sizes = [Growing(size, options.work / size, kept) for size in options.sizes]
    for growing in sizes:
        growing.folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(lambda growing: train(options, growing), sizes))
    wanted = list(itertools.product(variants(options.methods), sizes))
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda one: measure(options, one[1], one[0]), wanted))
    names = ("mimoquant", "torch", "transformers", "compressed-tensors", "llmcompressor")
    print(f"{options.device}; calibrated on {options.calib}, J over {options.eval} ids; {versions(names)}\n")
    print("\n".join(table(options, sizes)))


if __name__ == "__main__":
    main()
