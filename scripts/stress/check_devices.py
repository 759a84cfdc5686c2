"""Do two devices, or two machines, write the same bytes? One digest for every recipe and source.

usage: scripts/stress/check_devices.py --device cpu > here.txt         then, where the other device is:
       scripts/stress/check_devices.py --device cuda --expect here.txt

Sources: the micro checkpoint, and a synthetic one with V2.5's real expert shapes. The digest is of
the journal, which holds every shard's sha256. Also prints seconds, which on a GPU include its first use.

First two-sided rounding is held to its plain statement, compiled and plain on the same device: its
products differ between devices, so its digest has no place among the others.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import mimoquant
from mimoquant import pipeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.quant import descent, tiles, two_sided
from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.shipped import shipped_recipes
from mimoquant.synthetic.checkpoint import SynthSizes, synth

ASYMMETRIC = r"""
default_stage: {default_modifiers: {QuantizationModifier: {scheme: W4A16_ASYM,
  targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}}}
mimoquant: {scale_search: mse}
"""


def two_sided_differs(device: str, fmt: Format) -> bool:
    """Whether the compiled loops over tiles choose other codes than the plain ones, rounding and descent."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(4, 136, 384, generator=generator)).to(torch.bfloat16).to(device)
    rows, columns = (torch.randn(4, 1000, n, generator=generator).to(device) for n in weight.shape[1:])
    metric, gram = (0.3 * x.mT @ x / 1000 + 0.7 * torch.eye(x.shape[2], device=device) for x in (rows, columns))
    parts = encode(weight, fmt, "mse", nvfp4_global_scale(amax(weight), "mse", fmt), signed=fmt.symmetric)
    grid, made = Grid.of(parts, fmt), []
    for plainly in (False, True):
        with contextlib.ExitStack() as patched:
            if plainly:
                patched.enter_context(mock.patch.object(two_sided, "round_tile", tiles.round_tile_plainly))
                if device.startswith("cuda"):
                    from mimoquant.quant.kernels import tiles_cuda

                    patched.enter_context(mock.patch.object(tiles_cuda, "round_wave", tiles.round_wave_plainly))
            codes = two_sided.two_sided(weight.float(), gram, metric, grid, fmt, 0.05).codes
            made += [codes, descent.descend(weight.float(), gram, metric, grid, codes, fmt, 1)]
    return not (torch.equal(made[0], made[2]) and torch.equal(made[1], made[3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--expect", type=Path)
    options = parser.parse_args()
    expected = set(options.expect.read_text().splitlines()) if options.expect else None
    recipes = {name: load_recipe(name) for name in shipped_recipes() if name.endswith(("-rtn", "-mse"))}
    recipes["int4-g128-asym-mse"] = parse_recipe(ASYMMETRIC, "int4-g128-asym-mse")
    differ = 0
    for fmt in (Format("int4", 128), Format("int4", 32, symmetric=False), Format("mxfp4", 32), Format("nvfp4", 16)):
        wrong = two_sided_differs(options.device, fmt)
        differ += wrong
        print(f"two-sided {fmt.label} on {options.device}: {'DIFFERENT' if wrong else 'same'}", file=sys.stderr)
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
