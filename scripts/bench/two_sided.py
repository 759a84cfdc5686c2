#!/usr/bin/env python
"""Two-sided rounding on a GPU: are its codes those of the plain loops, and what does it cost beside `gptq`?

First, on small matrices of every format, the waves of Triton kernels are held to plain torch on the same products. Then
one chunk of experts of real size is rounded, as many as a run takes at once, and the seconds of a whole layer are those
times its chunks. Synthetic weights; inputs and outputs that share an eighth of their directions.

usage: scripts/bench/two_sided.py [--variants] [--descent]
  --variants: also time sizes of tiles and cells, and depths of products (minutes: each is compiled)
  --descent: also rounds of descent after it, by numbers of panels, and what they do to the loss
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mimoquant.quant import descent, tiles
from mimoquant.quant.engine_torch import amax, encode, nvfp4_global_scale
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import gptq
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels import tiles_cuda
from mimoquant.quant.tiles import Rows
from mimoquant.quant.two_sided import two_sided

FORMATS = (Format("int4", 128), Format("int4", 32, symmetric=False), Format("mxfp4", 32), Format("nvfp4", 16))
SIZES = {  # name → experts of a layer, of a chunk, rows and columns
    "V2.5 gate and up": (256, 32, 4096, 4096),
    "V2.5 down": (256, 32, 4096, 2048),
    "Pro gate and up": (384, 22, 4096, 6144),
    "Pro down": (384, 22, 6144, 2048),
}
VARIANTS: list[dict[str, Any]] = [  # of `tiles_cuda`'s constants
    {},
    {"_UNROLL": 4},
    {"_UNROLL": 16},
    {"_CELL": 16},
    {"TILE_SIDE": 64, "_WARPS": 4},
    {"_WARPS": 4},
    {"_DEPTH": 64, "_STAGES": 2},
    {"_DEPTH": 64, "_STAGES": 3},
]
DAMP = 0.05
RARE = 2e-3  # of the codes: what sums between cells, of another order, may move
PANELS = 4, 8, 16
ENOUGH = 130  # seconds after which no other variant is begun
BEGUN = time.perf_counter()


def metric(experts: int, size: int) -> Tensor:
    """[E, size, size] of vectors that share an eighth of their directions, dampened."""
    out = torch.empty(experts, size, size, device="cuda")
    for one in out:
        vectors = torch.randn(2 * size, size // 8, device="cuda") @ torch.randn(size // 8, size, device="cuda")
        vectors = vectors / (size / 8) ** 0.5 + 0.5 * torch.randn(2 * size, size, device="cuda")
        one.copy_(vectors.T @ vectors / (2 * size)).diagonal().add_(0.1)
    return out


def problem(experts: int, rows: int, width: int, fmt: Format) -> tuple[Tensor, Tensor, Tensor, Grid]:
    weight = (0.02 * torch.randn(experts, rows, width, device="cuda")).to(torch.bfloat16)
    parts = encode(weight, fmt, "absmax", nvfp4_global_scale(amax(weight), "absmax", fmt))
    return weight.float(), metric(experts, width), metric(experts, rows), Grid.of(parts, fmt)


def check(fmt: Format) -> bool:
    """Whether waves give other codes than the plain loops, but for the rare one that lies between two."""
    weight, gram, outer, grid = problem(4, 264, 384, fmt)
    mine = two_sided(weight, gram, outer, grid, fmt, DAMP).codes
    with mock.patch.object(tiles_cuda, "round_wave", tiles.round_wave_plainly):
        plain = two_sided(weight, gram, outer, grid, fmt, DAMP).codes
    with mock.patch("mimoquant.quant.two_sided.by_waves", lambda device: None):  # other products, the same sums
        bands = two_sided(weight, gram, outer, grid, fmt, DAMP).codes
    differ, apart = int((mine != plain).sum()), float((mine != bands).float().mean())
    lost = [float(loss(weight, grid, codes, fmt, gram, outer).mean()) for codes in (mine, bands)]
    print(
        f"{fmt.label}: {differ} of {mine.numel()} codes differ from the plain loops'; from bands' {apart:.2%}, "
        f"loss {lost[0] / lost[1]:.5f} of theirs",
        flush=True,
    )
    return differ > RARE * mine.numel()


def seconds(call: Callable[[], object], times: int = 3) -> float:
    """Median, after a first call that compiles."""
    taken = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def stack_of(weight: Tensor, grid: Grid, fmt: Format) -> Rows:
    group = (torch.arange(weight.shape[2], device="cuda") // fmt.group_size).to(torch.int32).repeat(len(weight), 1)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device="cuda")
    return Rows(weight, weight, grid.scale.contiguous(), None, group, codes, fmt)


def time_size(name: str, fmt: Format, with_descent: bool) -> None:
    experts, chunk, rows, width = SIZES[name]
    weight, gram, outer, grid = problem(chunk, rows, width, fmt)
    factor, layers = experts / chunk, []
    torch.cuda.reset_peak_memory_stats()
    for call in (
        lambda: gptq(weight.mT.contiguous().mT, gram, grid, fmt, DAMP),
        lambda: two_sided(weight, gram, outer, grid, fmt, DAMP),
    ):
        layers.append(factor * seconds(call, 2))
    peak = torch.cuda.max_memory_allocated() / 1e9
    one = gptq(weight.mT.contiguous().mT, gram, grid, fmt, DAMP).codes
    both = two_sided(weight, gram, outer, grid, fmt, DAMP).codes
    lost = [float(loss(weight, grid, codes, fmt, gram, outer).mean()) for codes in (one, both)]
    print(
        f"{name}, {fmt.label}, a layer of {experts} experts by {chunk}: gptq {layers[0]:.2f} s, two-sided "
        f"{layers[1]:.2f} s, peak {peak:.1f} GB; loss {lost[1] / lost[0]:.4f} of gptq's",
        flush=True,
    )
    if with_descent:
        for panels in PANELS:
            with mock.patch.object(descent, "_PANELS", panels):
                spent = factor * seconds(lambda: descent.descend(weight, gram, outer, grid, both, fmt, 2), 1)
                after = descent.descend(weight, gram, outer, grid, both, fmt, 2)
            peak = torch.cuda.max_memory_allocated() / 1e9
            lost.append(float(loss(weight, grid, after, fmt, gram, outer).mean()))
            print(
                f"  two rounds of descent by {panels} panels {spent:.2f} s more, loss {lost[-1] / lost[1]:.4f} of "
                f"before, {float((after != both).float().mean()):.2%} of codes, peak {peak:.1f} GB",
                flush=True,
            )


def loss(weight: Tensor, grid: Grid, codes: Tensor, fmt: Format, gram: Tensor, outer: Tensor) -> Tensor:
    return descent.whole_loss(weight - grid.wide(fmt).decode(codes, fmt), gram, outer)


def parts_of_a_layer() -> None:
    """Where a layer's seconds go, gate and up of V2.5."""
    experts, chunk, rows, width = SIZES["V2.5 gate and up"]
    weight, gram, outer, grid = problem(chunk, rows, width, FORMATS[0])
    fall, push = (0.002 * torch.randn_like(of).triu_(1) for of in (outer, gram))
    del gram, outer
    stack, factor = stack_of(weight, grid, FORMATS[0]), experts / chunk
    for variant in VARIANTS:
        if time.perf_counter() - BEGUN > ENOUGH:
            break
        try:
            with mock.patch.multiple(tiles_cuda, **variant) if variant else mock.MagicMock():
                whole = factor * seconds(lambda: tiles_cuda.round_all(stack, fall, push, None), 2)
                with mock.patch.object(tiles_cuda, "round_wave"):
                    products = factor * seconds(lambda: tiles_cuda.round_all(stack, fall, push, None), 2)
        except Exception as error:  # a variant that does not fit the chip is none
            print(f"{variant}: {type(error).__name__}", flush=True)
            continue
        print(f"{variant or 'as it is'}: waves {whole:.2f} s, products alone {products:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--descent", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    differ = sum(check(fmt) for fmt in FORMATS)
    for name in SIZES:
        time_size(name, FORMATS[0], options.descent)
    time_size("V2.5 gate and up", FORMATS[3], False)
    if options.variants:
        parts_of_a_layer()
    if differ:
        sys.exit(f"{differ} formats differ")


if __name__ == "__main__":
    main()
