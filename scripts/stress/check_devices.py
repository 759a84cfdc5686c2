"""Do two devices, or two machines, write the same bytes? One digest for every recipe and source.

usage: scripts/stress/check_devices.py --device cpu > here.txt         then, where the other device is:
       scripts/stress/check_devices.py --device cuda --expect here.txt

Sources: the micro checkpoint, and a synthetic one with V2.5's real expert shapes. The digest is of
the journal, which holds every shard's sha256. Also prints seconds, which on a GPU include its first use.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path

import mimoquant
from mimoquant import pipeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.shipped import shipped_recipes
from mimoquant.synthetic.checkpoint import SynthSizes, synth

ASYMMETRIC = r"""
default_stage: {default_modifiers: {QuantizationModifier: {scheme: W4A16_ASYM,
  targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}}}
mimoquant: {scale_search: mse}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--expect", type=Path)
    options = parser.parse_args()
    expected = set(options.expect.read_text().splitlines()) if options.expect else None
    recipes = {name: load_recipe(name) for name in shipped_recipes() if name.endswith(("-rtn", "-mse"))}
    recipes["int4-g128-asym-mse"] = parse_recipe(ASYMMETRIC, "int4-g128-asym-mse")
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sizes = SynthSizes(layers=3, experts=2, top_k=1, hidden=4096, expert_intermediate=2048)
        synth(work / "real-shapes", "v2.5", sizes=sizes)
        for name, source in (("micro", mimoquant.micro_checkpoint()), ("real-shapes", work / "real-shapes")):
            for recipe_name, recipe in recipes.items():
                begin = time.perf_counter()
                out = work / f"{name}-{recipe_name}"
                pipeline.quantize(make_plan(source, recipe), out, device=options.device)
                seconds = time.perf_counter() - begin
                line = f"{name} {recipe_name} {hashlib.sha256((out / 'journal.jsonl').read_bytes()).hexdigest()}"
                verdict = "" if expected is None else "same" if line in expected else "DIFFERENT"
                differ += verdict == "DIFFERENT"
                print(line, flush=True)
                print(f"{name} {recipe_name}: {seconds:.2f} s on {options.device} {verdict}", file=sys.stderr)
    if differ:
        sys.exit(f"{differ} outputs differ")


if __name__ == "__main__":
    main()
