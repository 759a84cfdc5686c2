#!/usr/bin/env python
"""Quality and time of calibrated methods: mimoquant beside llm-compressor, same model, same tokens.

The peer's variants (PEERS) run first, each in its own process through a script that prints one JSON line (J,
J_per_sequence, wall_s, cpu_s, peak_rss_gb); the lines are kept in a file and not measured again. "The peer's best" is
the variant with the lowest J. Ours are then quantized by `mimoquant quantize`, a process each, and scored in one walk a
format; they are measured anew unless --tables is given.

One id is appended to each evaluation sequence: we score all positions but the last, the peer's script scores them all,
and so both score the same ones (attention is causal). Our forward pass is in float32, the peer's in bf16, whose noise
adds to its J. With --peer-folders the peer's checkpoints are saved and scored here too, beside ours, and ratios are of
that; without it they are over the J of the peer's script, some percent in our favour. Intervals are bootstraps over
sequences, with the same draws on both sides of a ratio. Our seconds are of the whole process, the peer's of `oneshot`.

usage: scripts/bench/quality.py --model DIR --calib IDS.npy --eval IDS.npy [--peer SCRIPT] [--peer-results FILE.jsonl]
           [--peer-folders DIR] [--our-results FILE.jsonl] [--tables] [--only PATTERN...] [--work DIR] [--device cpu]
           [--float32-products]
IDS.npy: integers [sequences, tokens]. PATTERN is of a name such as peer/mxfp4_gptq or ours/int4-g128/gptq.
--float32-products: the peer multiplies bf16 matrices in float32 and rounds the result to bf16. Sums are the same but
for their order; on a CPU without bf16 instructions that is several times faster, and favours the peer's seconds.
--tables: measure nothing, print what both files hold (the last line of each name counts).
On a machine with other work set OMP_NUM_THREADS=1: threads that wait for each other make both sides many times slower.
Prints a Markdown table; paste it into scripts/RESULTS.md. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from versions import versions

Floats = npt.NDArray[np.float64]

TARGETS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
FORMATS: dict[str, dict[str, Any]] = {
    "int4-g128": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "int4-g32": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
}
# method: (the modifier that carries the format, keys of the mimoquant block, the formats it is for)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rtn": ("QuantizationModifier", {"scale_search": "absmax"}, "*"),
    "mse": ("QuantizationModifier", {"scale_search": "mse"}, "*"),
    "gram": ("QuantizationModifier", {"scale_search": "gram"}, "*"),
    "awq": ("QuantizationModifier", {}, "int4-g128"),
    "gptq-refine0": ("GPTQModifier", {"refine": 0}, "*"),
    "gptq-refine1": ("GPTQModifier", {"refine": 1}, "*"),
    "gptq": ("GPTQModifier", {}, "*"),
    "gptq-kl": ("GPTQModifier", {"objective": "kl"}, "*"),
    "gptq-unsigned": ("GPTQModifier", {"signed_scales": False}, "int4-*"),
}
# [FORMAT_][awq_]SCALES or [FORMAT_][awq_]gptq[SCALES]. SCALES says the modifier's `weight_observer`: rtn (nothing after
# gptq) is the scheme's own, mse memoryless_mse, imatrix imatrix_mse, expanded nvfp4_expanded_mse, expandedimatrix
# nvfp4_expanded_imatrix. awq: mappings that take the router in. g32_: the preset W4A16 with groups of 32.
PEERS = {
    "int4-g128": ("rtn", "mse", "imatrix", "gptq", "gptqmse", "gptqimatrix", "awq", "awq_gptqmse"),
    "int4-g32": ("g32_rtn", "g32_mse", "g32_imatrix", "g32_gptq", "g32_gptqmse", "g32_gptqimatrix", "g32_awq_gptqmse"),
    "mxfp4": ("mxfp4_rtn", "mxfp4_mse", "mxfp4_gptq", "mxfp4_gptqmse", "mxfp4_gptqimatrix", "mxfp4_awq_gptqmse"),
    "nvfp4": (
        *("nvfp4_rtn", "nvfp4_mse", "nvfp4_expanded", "nvfp4_gptq", "nvfp4_gptqmse", "nvfp4_gptqimatrix"),
        *("nvfp4_gptqexpanded", "nvfp4_gptqexpandedimatrix", "nvfp4_awq_gptqmse"),
    ),
}
FLOAT32_PRODUCTS = r"""
import runpy, sys, torch
plain = torch.nn.functional.linear
def linear(x, weight, bias=None):
    if isinstance(x, torch.Tensor) and x.dtype == weight.dtype == torch.bfloat16:
        return plain(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)
    return plain(x, weight, bias)
torch.nn.functional.linear = linear
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RESAMPLES = 10_000


@dataclass
class Result:
    """One variant: mean J of each sequence, and what making it took."""

    name: str
    wall_s: float
    cpu_s: float
    peak_rss_gb: float
    j: Floats = field(default_factory=lambda: np.empty(0))  # by our scorer, where it scored
    told: float | None = None  # by the peer's script

    @property
    def kind(self) -> str:
        """Its method, by the peer's names."""
        return self.name.rpartition("/")[2].rpartition("_")[2].partition("-")[0]


def tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def resampled(values: Floats) -> Floats:
    """Means over sequences drawn again with replacement; the same draws for every variant, so ratios are paired."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(values[draws].mean(1), dtype=np.float64)


def interval(means: Floats, digits: int) -> str:
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{low:.{digits}f}-{high:.{digits}f}"


# --- kept results -----------------------------------------------------------------------------------------------------


def key_of(options: argparse.Namespace) -> str:
    """What results depend on besides the variant: a line with another key is not used."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (options.calib, options.eval)))
    digest.update(f"{options.model} {options.device}".encode())
    return digest.hexdigest()[:16]


def read_kept(path: Path | None, key: str) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["variant"]: line for line in lines if line["key"] == key}


def keep(path: Path | None, facts: dict[str, Any], key: str) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(facts | {"key": key}) + "\n")


def result_of(name: str, facts: dict[str, Any]) -> Result:
    return Result(name, facts["wall_s"], facts["cpu_s"], facts["peak_rss_gb"], np.array(facts["J_per_sequence"]))


# --- the peer ---------------------------------------------------------------------------------------------------------


def run_peers(options: argparse.Namespace, fmt: str) -> list[Result]:
    """The peer's variants of a format, from the results file or measured now and added to it."""
    key = f"{key_of(options)}{'-float32-products' if options.float32_products else ''}"
    kept, found = read_kept(options.peer_results, key), []
    for variant in PEERS[fmt]:
        name = f"peer/{variant}"
        if not wanted(name, options.only):
            continue
        facts = kept.get(variant)
        if facts is None and options.peer and not options.tables:
            facts = run_peer(options, variant)
            if facts is not None:
                keep(options.peer_results, facts, key)
        if facts is not None:
            found.append(result_of(name, facts))
            found[-1].told = facts["J"]
    return found


def run_peer(options: argparse.Namespace, variant: str) -> dict[str, Any] | None:
    """The JSON line of one variant, None where it fails."""
    start = [sys.executable, *(["-c", FLOAT32_PRODUCTS] if options.float32_products else []), str(options.peer)]
    command = [
        *start,
        str(options.model),
        variant,
        "--calib",
        str(options.calib),
        "--eval",
        str(options.eval),
        "--device",
        options.device,
    ]
    if options.peer_folders:
        command += ["--out", str(options.peer_folders / variant)]
    tell(f"peer/{variant}: begins, load {os.getloadavg()[0]:.1f}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:  # it may leave logs where it runs
        done = subprocess.run(command, text=True, capture_output=True, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tell(f"peer/{variant}: failed\n{done.stderr[-2000:]}")
        return None
    facts: dict[str, Any] = json.loads(lines[-1])
    whole = time.perf_counter() - begin
    tell(f"peer/{variant}: J {facts['J']:.5f}, {facts['cpu_s']:.1f} CPU s, whole process {whole:.0f} s")
    return facts | {"load": os.getloadavg()[1], "process_wall_s": round(whole, 1)}


# --- ours -------------------------------------------------------------------------------------------------------------


def recipe_text(fmt: str, method: str) -> str:
    modifier, block, _ = METHODS[method]
    weights = FORMATS[fmt] | {"symmetric": True}
    carrier = {"config_groups": {"experts": {"targets": [TARGETS], "weights": weights}}}
    modifiers: dict[str, Any] = {"AWQModifier": {}} if method == "awq" else {}
    document = {
        "default_stage": {"default_modifiers": modifiers | {modifier: carrier}},
        "mimoquant": {"version": 1} | block,
    }
    return yaml.safe_dump(document, sort_keys=False)


def run_ours(options: argparse.Namespace, fmt: str, work: Path, peers: list[Result]) -> list[Result]:
    """Our methods for a format: quantized one after another, then scored together with the peer's saved checkpoints."""
    made: list[tuple[Result, Path]] = []
    key = key_of(options)
    kept = read_kept(options.our_results, key)
    for method, (_, _, formats) in METHODS.items():
        name = f"ours/{fmt}/{method}"
        if not fnmatch.fnmatch(fmt, formats) or not wanted(name, options.only):
            continue
        if options.tables:
            if (facts := kept.get(name)) is not None:
                made.append((result_of(name, facts), work))
            continue
        out = work / f"{fmt}-{method}"
        result = quantize(options, name, recipe_text(fmt, method), out)
        if result is not None:
            made.append((result, out))
    ours = [result for result, _ in made]
    for peer in peers:
        folder = (options.peer_folders or work) / peer.name.removeprefix("peer/")
        if (facts := kept.get(peer.name)) is not None:
            peer.j = np.array(facts["J_per_sequence"])
        elif folder.is_dir() and not options.tables:
            made.append((peer, folder))
    if made and not options.tables:
        tell(f"ours/{fmt}: scoring {len(made)} checkpoints")
        scored = score(options, [out for _, out in made], work)
        for (result, _), j in zip(made, scored, strict=True):
            result.j = j
            facts = {
                "variant": result.name,
                "J": j.mean(),
                "J_per_sequence": j.tolist(),
                "wall_s": result.wall_s,
                "cpu_s": result.cpu_s,
                "peak_rss_gb": result.peak_rss_gb,
            }
            keep(options.our_results, facts, key)
            tell(f"{result.name}: J {j.mean():.5f}")
    return ours


def quantize(options: argparse.Namespace, name: str, recipe: str, out: Path) -> Result | None:
    """The whole process's seconds and memory; None where it fails."""
    path = out.with_suffix(".yaml")
    path.write_text(recipe)
    command = [
        sys.executable,
        "-m",
        "mimoquant",
        "quantize",
        str(options.model),
        "-r",
        str(path),
        "--out",
        str(out),
        "--container",
        "compressed-tensors",
        "--device",
        options.device,
    ]
    if any(word in recipe for word in ("GPTQ", "AWQ", "gram")):
        sequences, tokens = np.load(options.calib, mmap_mode="r").shape
        command += ["--data", str(options.calib), "--sequences", str(sequences), "--tokens", str(tokens)]
    begin = time.perf_counter()
    with (log := out.with_suffix(".log")).open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    result = Result(name, time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6)
    if process.returncode:
        tell(f"{name}: failed with {process.returncode}\n{log.read_text()[-2000:]}")
        return None
    tell(f"{name}: {result.wall_s:.1f} s, {result.cpu_s:.1f} CPU s, load {os.getloadavg()[0]:.1f}")
    return result


def score(options: argparse.Namespace, candidates: list[Path], work: Path) -> list[Floats]:
    """Mean J of each sequence, for each candidate, over all positions of the evaluation ids."""
    from mimoquant.calibration.tokens import load_tokens
    from mimoquant.evaluation.eval_kl import compare, open_layout
    from mimoquant.evaluation.held_out import refuse_shared_data
    from mimoquant.machine.team import Team

    ids = np.load(options.eval)
    longer = np.concatenate([ids, ids[:, :1]], axis=1)  # the id that is appended is never predicted from
    np.save(work / "eval.npy", longer)
    reference = open_layout(options.model)
    tokens = load_tokens(
        [str(work / "eval.npy")], options.model, sequences=None, tokens=longer.shape[1], vocab=reference.geometry.vocab
    )
    for candidate in candidates:
        refuse_shared_data(candidate, tokens)
    layouts = [open_layout(candidate) for candidate in candidates]
    walked = compare(reference, layouts, tokens, noise_floor=False, team=Team(options.device))
    means = []
    for comparison in walked.comparisons:
        assert comparison.scores is not None and comparison.scores.finite.all()
        means.append(comparison.scores.j.reshape(ids.shape).mean(1))
    return means


# --- tables -----------------------------------------------------------------------------------------------------------


def wanted(name: str, only: list[str] | None) -> bool:
    return not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)


def row(fmt: str, result: Result, best: Result | None, peers: list[Result]) -> str:
    held = f"{result.j.mean():.5f} ({interval(resampled(result.j), 5)})"
    ratio = faster = "-"
    ours = result not in peers
    if best is not None and ours:
        mean = result.j.mean() / best.j.mean()
        ratio = f"{mean:.3f} ({interval(resampled(result.j) / resampled(best.j), 3)})"
        same = next((peer for peer in peers if peer.kind == result.kind), None)
        faster = f"{same.wall_s / result.wall_s:.1f}x / {same.cpu_s / result.cpu_s:.1f}x" if same else "-"
    name = result.name + (" (its best)" if result is best else "")
    seconds = f"{result.wall_s:.1f} / {result.cpu_s:.1f}"
    told = "-" if result.told is None else f"{result.told:.5f}"
    return f"| {fmt} | {name} | {held} | {told} | {ratio} | {seconds} | {faster} | {result.peak_rss_gb:.2f} GB |"


def machine() -> str:
    names = ("mimoquant", "numpy", "torch", "transformers", "compressed-tensors", "llmcompressor")
    settings = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(("OMP_", "MALLOC_"))]
    return f"{len(os.sched_getaffinity(0))} cores, {' '.join(sorted(settings))}; {versions(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="the script that runs one variant of llm-compressor")
    parser.add_argument("--peer-results", type=Path, help="a .jsonl of what the peer gave, reused and added to")
    parser.add_argument("--peer-folders", type=Path, help="where the peer's checkpoints are saved, to be scored here")
    parser.add_argument("--our-results", type=Path, help="a .jsonl that our results are added to")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what the files hold")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="of names, such as ours/int4-g128/gptq*")
    parser.add_argument("--work", type=Path, help="a folder with room for the quantized models of one format")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32-products", action="store_true", help="the peer multiplies bf16 matrices in float32")
    options = parser.parse_args()
    for name in ("model", "calib", "eval", "peer", "peer_folders"):  # the peer runs in another folder
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.resolve())
    peers = {fmt: run_peers(options, fmt) for fmt in FORMATS}
    rows = []
    for fmt in FORMATS:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            ours = run_ours(options, fmt, Path(folder), peers[fmt])
        best = min(peers[fmt], key=lambda peer: peer.j.mean(), default=None)
        rows += [row(fmt, result, best, peers[fmt]) for result in peers[fmt] + ours]
    shapes = [" x ".join(map(str, np.load(path, mmap_mode="r").shape)) for path in (options.calib, options.eval)]
    print(f"{options.model.name}, calibrated on {shapes[0]} tokens, J over {shapes[1]}; {machine()}.")
    print(f"The peer's bf16 products: {'in float32' if options.float32_products else 'as they come'}.\n")
    print(
        "| format | method | J, nats (95 %) | by its script | over peer's best, paired (95 %) | wall / CPU s "
        "| faster than peer's same method, wall / CPU | peak RSS |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
