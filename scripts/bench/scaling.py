#!/usr/bin/env python
"""What a calibrated layer costs with more tokens, experts and layers: measured, fitted by a line, plotted.

Points are GPTQ int4 g128 runs on V2.5's sizes with the objective output, as `gpu.py` makes and times them: experts at
8,192 tokens, tokens at V2.5's number of experts, and the layers of the run with the fewest, which must not slow down.
The line's constant is told beside its slope, with the largest distance of a point from it.

usage: scripts/bench/scaling.py [--work /dev/shm] [--device cuda] [--tokens N...] [--experts N...] [--full N]
                                [--layers N] [--hidden 4096] [--inner 2048] [--svg FILE]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import gpu
import numpy as np
import torch
from versions import versions

from mimoquant.planning.plan import CUDA_CHUNK_BYTES, make_plan
from mimoquant.planning.recipe import load_recipe

Points = list[tuple[float, float]]  # what grows, seconds
SEQUENCE = 512


def layer_seconds(source: Path, tokens: int, options: argparse.Namespace) -> list[float]:
    """Of each layer of a run, in order, without the first, which pays for compilers."""
    ids = np.random.default_rng(0).integers(0, 1000, (max(16, tokens // SEQUENCE), SEQUENCE)).astype(np.int32)
    data = options.work / "ids.npy"
    np.save(data, ids)
    changes = {"data": (str(data),), "sequences": len(ids), "tokens": SEQUENCE, "objective": "output"}
    recipe = load_recipe("gptq-int4-g128").calibrated_on(changes)
    plan = make_plan(source, recipe, chunk_bytes=CUDA_CHUNK_BYTES)
    seconds, _, _ = gpu.run(plan, options.work, options.device)
    return [seconds[layer] for layer in sorted(seconds)][1:]


def measure(options: argparse.Namespace) -> dict[str, Points]:
    points: dict[str, Points] = {"tokens": [], "experts": [], "layers": []}

    def put(name: str, x: float, seconds: float) -> None:
        points[name].append((x, seconds))
        print(f"{name} {x:,.0f}: {seconds:.2f} s a layer", flush=True)

    for experts in options.experts:
        layers = options.layers if experts == min(options.experts) else 2
        source = gpu.make_source(options.work / "source", "V2.5", layers, experts)
        every = layer_seconds(source, options.tokens[0], options)
        put("experts", experts, float(np.median(every)))
        if layers == options.layers:
            for number, seconds in enumerate(every, start=2):
                put("layers", number, seconds)
        if experts == options.full:
            put("tokens", options.tokens[0], float(np.median(every)))
            for tokens in options.tokens[1:]:
                put("tokens", tokens, float(np.median(layer_seconds(source, tokens, options))))
        shutil.rmtree(source)
    return points


def line(points: Points) -> tuple[float, float, float]:
    """Least squares: constant, slope, and the largest distance of a point in shares of its value."""
    x, y = (np.array(column, float) for column in zip(*points, strict=True))
    slope, constant = np.polyfit(x, y, 1)
    return float(constant), float(slope), float(np.abs((constant + slope * x) / y - 1).max())


def table(points: dict[str, Points]) -> str:
    rows = [
        "| a layer's seconds with more | points (x: seconds) | constant | per 1,000 | worst distance |",
        "|---|---|---|---|---|",
    ]
    for name, of in points.items():
        told = ", ".join(f"{x:,.0f}: {y:.2f}" for x, y in of)
        if len(of) > 1:
            constant, slope, worst = line(of)
            rows.append(f"| {name} | {told} | {constant:.2f} s | {1000 * slope:.4g} s | {worst:.1%} |")
    return "\n".join(rows)


def plot(points: dict[str, Points]) -> str:
    """One panel each, as SVG: points, and the line from zero."""
    width, height, panels = 320, 220, []
    for number, (name, of) in enumerate(item for item in points.items() if len(item[1]) > 1):
        constant, slope, _ = line(of)
        right, top = max(x for x, _ in of), 1.1 * max(y for _, y in of)

        def at(x: float, y: float, right: float = right, top: float = top) -> tuple[float, float]:
            return 45 + x / right * (width - 65), height - 35 - y / top * (height - 60)

        (x0, y0), (x1, y1) = at(0, constant), at(right, constant + slope * right)
        dots = labels = ""
        for x, y in of:
            left, down = at(x, y)
            dots += f"<circle cx='{left:.1f}' cy='{down:.1f}' r='3.5' fill='#0a62a6'/>"
            labels += f"<text x='{left:.1f}' y='{down - 8:.1f}' text-anchor='middle'>{y:.2f} s</text>"
        panels.append(
            f"<g transform='translate({number * width} 0)'><text x='45' y='16'>seconds a layer, over {name}</text>"
            f"<path d='M45 25V{height - 35}H{width - 15}' fill='none' stroke='#888'/>"
            f"<path d='M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}' stroke='#c65' fill='none'/>{dots}{labels}"
            f"<text x='{width - 20}' y='{height - 18}' text-anchor='end'>{right:,.0f}</text></g>"
        )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width * len(panels)}' height='{height}' "
        f"font-family='sans-serif' font-size='11'>{''.join(panels)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**13, 2**16, 2**18, 2**20])
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 128, 256, 384])
    parser.add_argument("--full", type=int, default=256, help="the number of experts that more tokens go through")
    parser.add_argument("--layers", type=int, default=8, help="of the run with the fewest experts")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    gpu.SIZES["V2.5"]["hidden"], gpu.INNER = options.hidden, options.inner
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        options.work = Path(folder)
        points = measure(options)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(f"{name}; {versions(('mimoquant', 'torch', 'numpy'))}\n\n{table(points)}")
    if options.svg:
        options.svg.write_text(plot(points))


if __name__ == "__main__":
    main()
