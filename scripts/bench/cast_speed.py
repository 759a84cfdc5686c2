"""Casts of MXFP4 experts beside a plain copy of the same files, on the same disk or RAM disk.

A checkpoint in V2.6's form is made (one dense layer and some MoE layers of Flash's sizes, random codes), copied by
`cp -r`, and cast each way, copy and cast of a row's own source in turns, so that both meet the same machine. A cast is
the run in this process, durable files and their sha256 included; start-up is left out, and so is a first run of each.
Seconds are the best and the median of the repeats, GB/s source bytes in the best; a ratio is of seconds, the copy's
over the cast's. CPU seconds are of all threads, the least of the repeats; other programs change them little.

usage: scripts/bench/cast_speed.py [--device cpu|cuda] [--work DIR] [--experts 256] [--layers 3] [--repeats 3]
       [--ways NAME ...]
A RAM disk is --work /dev/shm; the defaults take 36 GB there, and 8 GB beside. Prints a table for
scripts/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from versions import versions

from mimoquant import pipeline
from mimoquant.checkpoint.index import DTYPE_BYTES
from mimoquant.checkpoint.writer import Entry, shard_header
from mimoquant.model.geometry import Geometry, read_geometry
from mimoquant.model.layout import PROJECTIONS, expert_module, layer_rows, scale_row_counts
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

# name → what it is cast from ("source": V2.6's form, else another way), recipe, container, settings
WAYS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "NVFP4, ModelOpt": ("source", "nvfp4-cast", "modelopt", {"dense": "fp8", "input_scales": "unit"}),
    "NVFP4, compressed-tensors": ("source", "nvfp4-cast", "compressed-tensors", {}),
    "MXFP4, compressed-tensors": ("source", "mxfp4-cast", "compressed-tensors", {}),
    "native, from NVFP4": ("NVFP4, ModelOpt", "mxfp4-cast", "native", {}),
    "native, from compressed-tensors": ("MXFP4, compressed-tensors", "mxfp4-cast", "native", {}),
}
EXPERTS_A_FILE, VOCAB = 4, 8192
BLOCK = np.random.default_rng(0).integers(0, 256, 2**25, np.uint8)


def config(layers: int, experts: int) -> dict[str, Any]:
    """V2.6-Flash's, with fewer layers, experts and words."""
    heads = {"num_attention_heads": 64, "head_dim": 192, "v_head_dim": 128}
    total = layers + 1
    return {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "attention_projection_layout": "fused_qkv",
        "dtype": "bfloat16",
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": total,
        "vocab_size": VOCAB,
        "hybrid_layer_pattern": [0, *[1] * layers],
        "moe_layer_freq": [0, *[1] * layers],
        **heads,
        **{f"swa_{key}": value for key, value in heads.items()},
        "num_key_value_heads": 4,
        "swa_num_key_value_heads": 8,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "sliding_window": 128,
        "layernorm_epsilon": 1e-6,
        "hidden_act": "silu",
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_shared_experts": None,
        "routed_scaling_factor": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": 1e7,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.334,
        "attention_value_scale": 0.707,
        "moe_router_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "store_dtype": "mxfp4",
            "mxfp4_block_size": 32,
            "weight_block_size": [128, 128],
            "ignored_layers": [f"model.layers.{layer}.self_attn.o_proj" for layer in range(total)]
            + ["model.decoder.self_attn.o_proj"],
        },
    }


def entries(geometry: Geometry) -> Iterator[Entry]:
    """Every tensor, as V2.6 has it."""
    yield Entry("model.embed_tokens.weight", "BF16", (geometry.vocab, geometry.hidden))
    yield Entry("lm_head.weight", "BF16", (geometry.vocab, geometry.hidden))
    yield Entry("model.norm.weight", "BF16", (geometry.hidden,))
    rows = [row for layer in range(geometry.layers) for row in layer_rows(geometry, layer)]
    for name, role, dtypes, shape in rows:
        fp8 = role in ("qkv", "dense")
        yield Entry(
            name, "F32" if role == "router_bias" else "F8_E4M3" if fp8 else "BF16" if "BF16" in dtypes else "F32", shape
        )
        if fp8:
            yield Entry(
                f"{name}_scale_inv", "F32", (scale_row_counts(geometry, role, shape[0])[0], -(-shape[1] // 128))
            )
    for layer in geometry.moe_layers:
        for expert in range(geometry.experts):
            for projection in PROJECTIONS:
                module, (height, width) = expert_module(layer, expert, projection), geometry.expert_shape(projection)
                yield Entry(f"{module}.weight", "U8", (height, width // 2))
                yield Entry(f"{module}.weight_scale", "U8", (height, width // 32))


def file_of(name: str) -> str:
    expert = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else 0
    return f"model_pp0_ep{expert // EXPERTS_A_FILE}_shard0.safetensors"


def values(entry: Entry, begin: int) -> npt.NDArray[np.uint8]:
    """Bytes of finite values: small floats, exponents over seven binades, any codes."""
    count = entry.size_bytes // DTYPE_BYTES[entry.dtype]
    start = begin % max(1, len(BLOCK) - count)
    noise = np.resize(BLOCK, count) if count > len(BLOCK) else BLOCK[start : start + count]
    if entry.dtype == "BF16":
        halves = noise.astype(np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)
        return halves.view(np.uint8)
    if entry.dtype == "F32":
        return (1e-4 * (1 + noise.astype(np.float32))).view(np.uint8)
    if entry.dtype == "F8_E4M3":
        return (noise & np.uint8(0x97)) | np.uint8(0x60)
    if entry.name.endswith("_scale"):  # the largest are few, as in weights
        steps: npt.NDArray[np.uint8] = np.minimum(noise % np.uint8(7) + np.uint8(1), noise >> np.uint8(1))
        return np.uint8(121) - steps
    return noise


def write_source(folder: Path, layers: int, experts: int) -> Path:
    folder.mkdir()
    told = config(layers, experts)
    (folder / "config.json").write_text(json.dumps(told))
    shards: dict[str, list[Entry]] = {}
    for entry in entries(read_geometry(told, "config.json", packed=True)):
        shards.setdefault(file_of(entry.name), []).append(entry)
    for file, held in shards.items():
        held.sort(key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name))
        with (folder / file).open("wb") as handle:
            handle.write(shard_header(held, metadata=False))
            for number, entry in enumerate(held):
                handle.write(values(entry, number * 4099).data)
    weight_map = {entry.name: file for file, held in shards.items() for entry in held}
    metadata = {"save_format": "mxfp4", "total_size": sum(e.size_bytes for held in shards.values() for e in held)}
    index = {"metadata": metadata | {"tp_size": 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def in_turns(works: list[Callable[[Path], None]], out: Path, repeats: int) -> list[tuple[list[float], float]]:
    """Of each work its seconds, and least CPU seconds of this process and its children; one after the other, again and
    again, after a first time that does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    cpu: list[list[float]] = [[] for _ in works]
    for number in range(repeats + 1):
        for took, used, work in zip(seconds, cpu, works, strict=True):
            before, begin = cpu_seconds(), time.perf_counter()
            work(out)
            if number:
                took.append(time.perf_counter() - begin)
                used.append(cpu_seconds() - before)
            shutil.rmtree(out)
    return [(took, min(used)) for took, used in zip(seconds, cpu, strict=True)]


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def copied(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in out.iterdir():  # as durable as a cast
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def cast(source: Path, out: Path, way: str, device: str) -> None:
    _, recipe, container, settings = WAYS[way]
    plan = make_plan(source, load_recipe(recipe).stored_as(settings), container=container)
    pipeline.quantize(plan, out, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="NAME")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, device {args.device}, {args.repeats} repeats in turns")
    print(versions(("mimoquant", "numpy", "torch")), flush=True)
    print(
        "\n| | source | copy, best s | cast | copy, median s | cast | GB/s | copy, CPU s/GB | cast "
        "| of the copy, by best | by median |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=args.work) as made:
        bench(Path(made), args)


def bench(work: Path, args: argparse.Namespace) -> None:
    """A row for each way, with the copy of its source beside it."""
    source = write_source(work / "source", args.layers, args.experts)
    origin, folder = "source", source
    for way in sorted(args.ways, key=[*WAYS].index):
        if WAYS[way][0] != origin:
            origin, folder = WAYS[way][0], work / "origin"  # no way leads from the source again
            shutil.rmtree(folder, ignore_errors=True)
            cast(source, folder, origin, args.device)
        works: list[Callable[[Path], None]] = [
            partial(copied, folder),
            partial(cast, folder, way=way, device=args.device),
        ]
        print(row(way, size_of(folder) / 1e9, *in_turns(works, work / "out", args.repeats)), flush=True)


def row(name: str, size: float, copy: tuple[list[float], float], ours: tuple[list[float], float]) -> str:
    """`copy`, `ours`: seconds, and least CPU seconds."""
    best, middle = (f"{of(copy[0]):.2f} | {of(ours[0]):.2f}" for of in (min, statistics.median))
    ratios = (of(copy[0]) / of(ours[0]) for of in (min, statistics.median))
    cpu = " | ".join(f"{used / size:.2f}" for _, used in (copy, ours))
    told = " | ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"| {name} | {size:.2f} GB | {best} | {middle} | {size / min(ours[0]):.2f} | {cpu} | {told} |"


if __name__ == "__main__":
    main()
