#!/usr/bin/env python
"""One quantize run shared by the ranks of torchrun: seconds, and a sha256 of the output folder to compare with others.

Uses the Python interface alone, so torch, numpy and pyyaml are enough on a machine with GPUs.

usage: torchrun --nproc-per-node N scripts/bench/ranks.py --source DIR --recipe NAME|FILE --out DIR
       [--device cuda|cpu] [--sequences 16] [--tokens 512] [--data SET|FILE] [--chunk-mib M] [--resume]

Without torchrun it is a run of one process. The sha256 must be the same for any number of ranks, for equal --chunk-mib
and outputs in the same folder. Calibrates on random ids (`ids.npy` beside the output) unless --data names something.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from mimoquant import pipeline
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.machine.team import Team
from mimoquant.planning.plan import CHUNK_BYTES, CUDA_CHUNK_BYTES, Plan, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.planning.units import Unit


def folder_sha256(folder: Path) -> str:
    """Of all names and contents."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return whole.hexdigest()


def random_ids(options: argparse.Namespace, team: Team) -> str:
    """A file of ids that all ranks see."""
    path = Path(options.out).absolute().parent / "ids.npy"
    if team.leads:
        np.save(path, np.random.default_rng(0).integers(0, 1000, (options.sequences, options.tokens)).astype(np.int32))
    team.gather(None)
    return str(path)


def planned(options: argparse.Namespace, team: Team) -> Plan:
    recipe = load_recipe(options.recipe)
    if recipe.calibrated:
        given: dict[str, Any] = {"sequences": options.sequences, "tokens": options.tokens}
        recipe = recipe.calibrated_on(given | {"data": (options.data or random_ids(options, team),)})
    large = CUDA_CHUNK_BYTES if recipe.calibrated and team.device.startswith("cuda") else CHUNK_BYTES
    return make_plan(options.source, recipe, chunk_bytes=options.chunk_mib * 2**20 if options.chunk_mib else large)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="gptq-int4-g128")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--data")
    parser.add_argument("--chunk-mib", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    with Team.from_environment(options.device) as team:
        plan, begin = planned(options, team), time.perf_counter()

        ends = [begin]

        def progress(unit: Unit, done: int, finished: bool) -> None:
            if finished and team.leads:
                ends.append(time.perf_counter())
                print(f"{ends[-1] - begin:8.1f} s, +{ends[-1] - ends[-2]:.2f} s  {unit.name}", flush=True)

        pipeline.quantize(plan, options.out, resume=options.resume, progress=progress, team=team)
        seconds = time.perf_counter() - begin
    if team.leads:
        print(
            f"{team.size} ranks on {options.device}: {seconds:.1f} s, sha256 {folder_sha256(options.out)}", flush=True
        )


if __name__ == "__main__":
    main()
