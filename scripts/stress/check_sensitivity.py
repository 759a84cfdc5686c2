#!/usr/bin/env python
"""Does `sensitivity` find the same on another device, or shared by ranks? Each run's facts, beside those of another.

usage: scripts/stress/check_sensitivity.py --device cpu --out here          then, where the other device is:
       scripts/stress/check_sensitivity.py --device cuda [--ranks 2] --out there --against here   [SOURCE...]

For each source (the micro checkpoint without any) and recipe (int4 and MXFP4 by search, int4 by GPTQ) the verb chooses
within the size of one layer kept in bf16. Told: the choice, J of all layers quantized and of the choice, the largest
difference of a layer's contribution (over their sum), and seconds. Ends with 1 where choices differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mimoquant
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

GPTQ = r"""
default_stage:
  default_modifiers:
    GPTQModifier: {scheme: W4A16, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {calibration: {set: mixed-v1, sequences: 64, tokens: 256}}
"""
RECIPES = ("int4-g128-mse", "mxfp4-mse", "gptq")


def command(options: argparse.Namespace, source: Path, recipe: str, stem: Path) -> list[str]:
    if recipe == "gptq":
        Path(f"{stem}.recipe.yaml").write_text(GPTQ)
        recipe = f"{stem}.recipe.yaml"
    held = Mixtures(make_plan(source, load_recipe(recipe)))
    budget = held.size([len(held.options) - 1] + [0] * (len(held.layers) - 1))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)] if options.ranks > 1 else []
    return [
        sys.executable,
        *torchrun,
        "-m",
        "mimoquant",
        "sensitivity",
        str(source),
        "--recipe",
        recipe,
        "--out",
        f"{stem}.yaml",
        "--budget-gib",
        repr(budget / 2**30),
        "--sequences",
        str(options.sequences),
        "--tokens",
        str(options.tokens),
        "--device",
        options.device,
        "--json",
    ]


def told(facts: dict[str, Any], other: dict[str, Any] | None) -> tuple[list[str], bool]:
    """Columns of the table, and whether both chose the same."""
    chosen, j = facts["chosen"], facts["j"]["mean"]
    columns = [" ".join(chosen["options"].values()), f"{j:.5f}", f"{chosen['measured']['mean']:.5f}"]
    if other is None:
        return [*columns, "", ""], True
    apart = max(
        abs(a["contribution"]["mean"] - b["contribution"]["mean"])
        for a, b in zip(facts["layers"], other["layers"], strict=True)
    )
    same = chosen["options"] == other["chosen"]["options"]
    off = chosen["measured"]["mean"] / other["chosen"]["measured"]["mean"] - 1
    apart_by = f"{apart / j:.1e}, {j / other['j']['mean'] - 1:+.1e}, {off:+.1e}"
    return [*columns, apart_by, "same" if same else "OTHER"], same


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, default=[mimoquant.micro_checkpoint()])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--sequences", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    print("| checkpoint, recipe | chosen | J of all | J chosen | apart: a layer, all, chosen | choice | s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    alike = True
    for source in options.sources:
        for recipe in options.recipes:
            stem = options.out / f"{source.name}-{recipe}"
            begin = time.perf_counter()
            done = subprocess.run(command(options, source, recipe, stem), stdout=subprocess.PIPE, check=True)
            seconds = time.perf_counter() - begin
            Path(f"{stem}.json").write_bytes(done.stdout)
            other = json.loads((options.against / f"{stem.name}.json").read_bytes()) if options.against else None
            columns, same = told(json.loads(done.stdout), other)
            alike &= same
            print("|", " | ".join([f"{source.name}, {recipe}", *columns, f"{seconds:.1f}"]), "|", flush=True)
    raise SystemExit(not alike)


if __name__ == "__main__":
    main()
