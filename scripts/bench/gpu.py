#!/usr/bin/env python
"""Real-size layers on one GPU: calibrated GPTQ and AWQ, 1 M tokens, a Pro layer, and data-free runs beside a copy.

Makes V2.5- and Pro-sized checkpoints (a dense and a few MoE layers; eight random experts, repeated) on a RAM disk, and
runs `pipeline.quantize` on them. A layer's seconds are from the end of the layer before it to its own end, reading,
writing and hashing included; the first layer of a row, which pays for compiling Triton's kernels, is not counted.

usage: scripts/bench/gpu.py [--work /dev/shm] [--device cuda] [--experts 256] [--only ROW...] [--formats RECIPE...]
                            [--out RESULT.md]
ROW: gptq, gptq-peer (`gptq_peer.py` on the same layer), gptq-peer-all (its default: all tokens through each expert),
awq, mxfp4, nvfp4, refine, refine-many, million, pro, datafree (--formats: of these recipes), peer (beside datafree,
llm-compressor's `model_free_ptq`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datafree
import numpy as np
import torch

from mimoquant import pipeline
from mimoquant.machine.devices import resolve_device
from mimoquant.machine.team import Team
from mimoquant.machine.timeline import Timeline
from mimoquant.planning.plan import CUDA_CHUNK_BYTES, Plan, make_plan
from mimoquant.planning.recipe import Recipe, load_recipe, parse_recipe
from mimoquant.planning.units import Unit
from mimoquant.synthetic import weights

synth = importlib.import_module("mimoquant.synthetic.checkpoint")  # the module: `mimoquant.synth` is the verb
EXPERTS = 8  # different ones
INNER = 2048  # width inside an expert
PEER = {"mxfp4-rtn": "MXFP4A16", "int4-g128-rtn": "W4A16"}  # its name of the format
PEER_WORKERS = 8  # threads of its own
PEER_SEES = {"gptq-peer": "routed", "gptq-peer-all": "all"}
FREE = ("mxfp4-rtn", "mxfp4-mse", "int4-g128-rtn", "int4-g128-mse", "nvfp4-mse")
SIZES = {
    "V2.5": {"hidden": 4096, "heads": 64},
    "Pro": {"hidden": 6144, "heads": 128},
}
TARGETS = r"targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']"
AWQ = rf"""
default_stage:
  default_modifiers:
    AWQModifier:
      mappings:
        - smooth_layer: 're:.*layers\.[1-9]\.post_attention_layernorm$'
          balance_layers: ['re:.*mlp\.gate$', 're:.*mlp\.experts\.\d+\.gate_proj$', 're:.*mlp\.experts\.\d+\.up_proj$']
        - smooth_layer: 're:.*mlp\.experts\.\d+\.up_proj$'
          balance_layers: ['re:.*mlp\.experts\.\d+\.down_proj$']
      duo_scaling: true
      n_grid: 20
    QuantizationModifier: {{scheme: W4A16, {TARGETS}}}
"""


class FewExperts(weights.RandomWeights):
    """Experts are drawn once for all layers and all but the first eight; drawing takes far longer than quantizing."""

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        _, found, tail = name.partition(".mlp.experts.")
        if not found:
            return super().read(name, shape, dtype)
        number, _, projection = tail.partition(".")
        return self._expert(int(number) % EXPERTS, projection, shape, dtype)

    @functools.cache  # noqa: B019
    def _expert(self, number: int, projection: str, shape: tuple[int, ...], dtype: str) -> Any:
        return super().read(f"model.layers.1.mlp.experts.{number}.{projection}", shape, dtype)


def on_ranks(options: argparse.Namespace, name: str, measure: Callable[[argparse.Namespace, Path, Team], None]) -> None:
    """`measure(options, folder, team)` on each rank, with a folder under `options.work` that is gone afterwards."""
    work = options.work / name
    with Team.from_environment(resolve_device(options.device)) as team:
        if team.leads:
            work.mkdir()
        try:
            measure(options, work, team)
        finally:
            if team.leads:
                shutil.rmtree(work, ignore_errors=True)


def make_source(folder: Path, model: str, layers: int, experts: int) -> Path:
    sizes = synth.SynthSizes(
        layers=layers + 1,
        experts=experts,
        top_k=8,
        expert_intermediate=INNER,
        kv_heads=4,
        head_dim=192,
        v_head_dim=128,
        window=128,
        mtp_layers=1,
        vocab=4096,
        **SIZES[model],
    )
    encoded: dict[tuple[int, tuple[int, ...]], Any] = {}
    plain = synth.encode_fp8

    def encode_once(weight: Any) -> Any:
        if weight.shape not in ((INNER, sizes.hidden), (sizes.hidden, INNER)):
            return plain(weight)
        place = weight.__array_interface__["data"][0], weight.shape  # experts are kept, so that theirs stay their own
        if place not in encoded:
            encoded[place] = plain(weight)
        return encoded[place]

    begin = time.perf_counter()
    with mock.patch.multiple(synth, RandomWeights=FewExperts, encode_fp8=encode_once):
        report = synth.synth(folder, "pro", sizes=sizes)
    print(f"{model}: {report.size_bytes / 1e9:.1f} GB of source in {time.perf_counter() - begin:.0f} s", flush=True)
    return folder


@contextlib.contextmanager
def output(work: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        yield folder / "out"
    finally:
        shutil.rmtree(folder)


def run(plan: Plan, work: Path, device: str) -> tuple[dict[int, float], float, float]:
    """Seconds of each layer, seconds of all, peak GB on the device."""
    ends: dict[str, float] = {}

    def progress(unit: Unit, done: int, finished: bool) -> None:
        if finished:
            ends[unit.name] = time.perf_counter()

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with output(work) as out:
        timeline = Timeline()
        pipeline.quantize(plan, out, device=device, progress=progress, timeline=timeline)
        total = time.perf_counter() - begin
    print(f"  {total:.1f} s:", ", ".join(f"{name} {s:.1f}" for name, s in timeline.seconds.items()), flush=True)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else float("nan")
    layers = sorted(int(name.split()[1]) for name in ends if name.startswith("layer "))
    seconds = {i: ends[f"layer {i}"] - ends[f"layer {i - 1}"] for i in layers if i}
    return seconds, total, peak


def for_outputs(name: str) -> Recipe:
    """A shipped recipe without its walk back."""
    return load_recipe(name).rounded_for("output")


def calibrated(name: str, source: Path, recipe: Any, tokens: tuple[int, int], options: argparse.Namespace) -> str:
    ids = np.random.default_rng(0).integers(0, 1000, tokens).astype(np.int32)
    data = options.work / "ids.npy"
    np.save(data, ids)
    held = recipe.calibrated_on({"data": (str(data),), "sequences": tokens[0], "tokens": tokens[1]})
    seconds, _, peak = run(make_plan(source, held, chunk_bytes=CUDA_CHUNK_BYTES), options.work, options.device)
    last = max(seconds)
    return f"| {name} | {ids.size:,} | {seconds[last]:.2f} | {peak:.1f} |"


def copy_seconds(source: Path, written: int, work: Path) -> float:
    """Read all of the source and write as many bytes as the output has, one block after the other."""
    block, begin = bytearray(32 * 2**20), time.perf_counter()
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(block):
                pass
    with output(work) as out:
        out.mkdir()
        with (out / "copy").open("wb", buffering=0) as handle:
            for first in range(0, written, len(block)):
                handle.write(memoryview(block)[: min(len(block), written - first)])
            os.fsync(handle.fileno())
        return time.perf_counter() - begin


def peer_seconds(source: Path, scheme: str, options: argparse.Namespace) -> float:
    with output(options.work) as out:
        return datafree.peer(source, out, scheme, options.device, PEER_WORKERS)


def peer_gptq(source: Path, row: str, options: argparse.Namespace) -> str:
    """llm-compressor's GPTQ with its mse observer on the last layer's experts, in a process of its own."""
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()  # it takes what it finds free
    script, seen = Path(__file__).with_name("gptq_peer.py"), PEER_SEES[row]
    command = [sys.executable, str(script), str(source), "--device", options.device, "--seen", seen]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        return f"| {row} | did not end, exit code {done.returncode} | | |"
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"  {told}", flush=True)
    return (
        f"| llm-compressor, V2.5 W4A16 GPTQ, mse observer, experts alone, {seen} | {told['tokens']:,} "
        f"| {told['seconds']:.2f} | {told['peak_gb']:.1f} |"
    )


def data_free(source: Path, options: argparse.Namespace) -> list[str]:
    lines = []
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for recipe in options.formats:
        plan = make_plan(source, load_recipe(recipe))
        run(plan, options.work, options.device)  # compiles
        _, seconds, peak = run(plan, options.work, options.device)
        copy = min(copy_seconds(source, plan.shard_bytes, options.work) for _ in range(2))
        peer = f"{peer_seconds(source, PEER[recipe], options):.1f}" if recipe in PEER and "peer" in options.only else ""
        lines.append(
            f"| {recipe} | {read / 1e9:.1f} + {plan.shard_bytes / 1e9:.1f} | {seconds:.2f} | {copy:.2f} "
            f"| {copy / seconds:.2f} | {peer} | {peak:.1f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2**20, help="of the row `million`")
    parser.add_argument("--only", nargs="*", default=["gptq", "awq", "million", "pro", "datafree", "refine"])
    parser.add_argument("--formats", nargs="+", choices=FREE, default=FREE, metavar="RECIPE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        options.work = Path(folder)
        lines = measure(options)
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(options: argparse.Namespace) -> list[str]:
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    lines = [
        f"{name}, torch {torch.__version__}, {os.cpu_count()} cores",
        "",
        "| one layer | tokens | seconds | peak GB on the device |",
        "|---|---|---|---|",
    ]
    wanted = set(options.only)
    source = make_source(options.work / "v2.5", "V2.5", 2, options.experts) if wanted - {"pro"} else options.work
    few, many = (16, 512), (options.tokens // 512, 512)
    refined = for_outputs("gptq-mxfp4").calibrated_on({"reconstruct": 1})
    felt = load_recipe("gptq-int4-g128")
    rows = {
        "kl": ("V2.5 GPTQ int4 g128, objective kl", felt, few),
        "kl-many": ("V2.5 GPTQ int4 g128, objective kl", felt, (256, 512)),
        "gptq-many": ("V2.5 GPTQ int4 g128", for_outputs("gptq-int4-g128"), (256, 512)),
        "kl-nvfp4": ("V2.5 GPTQ NVFP4, objective kl", load_recipe("gptq-nvfp4"), few),
        "gptq": ("V2.5 GPTQ int4 g128", for_outputs("gptq-int4-g128"), few),
        "awq": ("V2.5 AWQ int4 g128", parse_recipe(AWQ, "awq"), few),
        "mxfp4": ("V2.5 GPTQ MXFP4", for_outputs("gptq-mxfp4"), few),
        "nvfp4": ("V2.5 GPTQ NVFP4", for_outputs("gptq-nvfp4"), few),
        "refine": ("V2.5 GPTQ MXFP4, --refine 1", refined, few),
        "refine-many": ("V2.5 GPTQ MXFP4, --refine 1", refined, (2**18 // 512, 512)),
        "million": ("V2.5 GPTQ int4 g128", for_outputs("gptq-int4-g128"), many),
    }
    for row in (row for row in rows if row in options.only):
        lines.append(calibrated(rows[row][0], source, *rows[row][1:], options))
        print(lines[-1], flush=True)
    for row in (row for row in PEER_SEES if row in options.only):
        lines.append(peer_gptq(source, row, options))
        print(lines[-1], flush=True)
    free = data_free(source, options) if "datafree" in options.only else []
    if wanted - {"pro"}:
        shutil.rmtree(source)
    if "pro" in options.only:
        source = make_source(options.work / "pro", "Pro", 2, options.experts * 3 // 2)
        lines.append(calibrated("Pro GPTQ int4 g128", source, for_outputs("gptq-int4-g128"), few, options))
        print(lines[-1], flush=True)
    if free:
        lines += [
            "",
            "| data-free | GB read + written | seconds | copy | copy / run | peer | peak GB on the device |",
            "|---|---|---|---|---|---|---|",
            *free,
        ]
    return lines


if __name__ == "__main__":
    main()
