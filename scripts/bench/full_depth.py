#!/usr/bin/env python
"""All layers of V2.5 at their true widths, with fewer experts, from plan to launch: does a run go on as it began?

Each stage is a process of the program itself, watched from outside: seconds by its own lines on stderr, host memory by
/proc, device memory by nvidia-smi. `quantize` is killed in the middle of its middle layer, `resume` goes on. What a
stage saw is kept in WORK/records, so a stage that is done is not done again, and the work may be cut into several
calls of this script, each of which prints the table of what there is so far.

usage: scripts/bench/full_depth.py [STAGE...] --work DIR [--sizes v2.5|small] [--layers N] [--experts N] [--room-gb N]
           [--device cuda] [--recipe NAME] [--sequences 512] [--tokens 512] [--eval-sequences 16] [--eval-tokens 1024]
           [--until SECONDS] [--out FILE]
STAGE: make, plan, quantize, resume, verify, eval, launch; all of them by default, in this order. --experts: by default
as many as fit beside the output into --room-gb and what is free. --until: when a stage that still runs is ended; each
has nine minutes at most.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from full_source import SIZES, TOWERS, make_source, synth
from versions import versions
from watched import Seen, watch

from mimoquant.checkpoint.journal import JOURNAL_NAME, file_sha256, read_journal

STAGE_S = 540
MODEL_CODE = Path(__file__).resolve().parents[2] / "tests" / "serving" / "configuration_mimo_v2.py"
_LAYER = re.compile(r"\[\d+/\d+\] layer (\d+): ")
Record = dict[str, Any]


class Stopped(Exception):
    """No time is left, or a stage did not end as it should; the message says which."""


class Job:
    """The folders of a run, what it was asked for, what is known of its stages."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.monotonic()
        self.work: Path = options.work
        self.source, self.out = self.work / "source", self.work / "out"
        self.partial, self.records = self.work / "out.partial", self.work / "records"
        self.records.mkdir(parents=True, exist_ok=True)

    def record(self, stage: str) -> Record:
        path = self.records / f"{stage}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def keep(self, stage: str, record: Record) -> None:
        path = self.records / f"{stage}.json"
        path.with_suffix(".new").write_text(json.dumps(record))
        path.with_suffix(".new").rename(path)

    @property
    def left_s(self) -> float:
        until: float = self.options.until
        return min(STAGE_S, until - (time.monotonic() - self.begin))

    @property
    def layers(self) -> int:
        return int(json.loads((self.source / "config.json").read_text())["num_hidden_layers"])

    @property
    def middle(self) -> int:
        """The layer in which `quantize` is killed."""
        return self.layers // 2

    def ids(self, name: str, sequences: int, tokens: int) -> str:
        """A file of random ids, made once."""
        path = self.work / f"{name}.npy"
        if not path.is_file():
            vocab = json.loads((self.source / "config.json").read_text())["vocab_size"]
            drawn = np.random.default_rng(len(name)).integers(0, vocab - 64, (sequences, tokens))
            np.save(path, drawn.astype(np.int32))
        return str(path)

    def recipe(self) -> list[str]:
        """The options that `plan` and `quantize` share."""
        o = self.options
        data = self.ids("calibration", o.sequences, o.tokens)
        sizes = ["--data", data, "--sequences", str(o.sequences), "--tokens", str(o.tokens)]
        return ["-r", o.recipe, "--objective", "output", *sizes, "--device", o.device, "--out", str(self.out)]

    def watched(self, stage: str, *arguments: str, kill_when: Callable[[], bool] | None = None, code: int = 0) -> Seen:
        seen = watch([*arguments], self.records / f"{stage}.log", limit_s=self.left_s, kill_when=kill_when)
        if seen.exit_code != code:
            last = "\n".join(line for _, line in seen.lines[-12:])
            raise Stopped(f"{stage}: exit code {seen.exit_code} after {seen.seconds:.0f} s\n{last}")
        return seen


# --- stages


def make(job: Job) -> Record:
    o, begin = job.options, time.monotonic()
    sizes = SIZES[o.sizes]
    sizes = replace(sizes, layers=o.layers or sizes.layers)
    experts = o.experts or (fitting_experts(job, sizes) if o.sizes == "v2.5" else sizes.experts)
    shutil.rmtree(job.source, ignore_errors=True)
    report = make_source(job.source, replace(sizes, experts=experts), TOWERS[o.sizes])
    shutil.copy(MODEL_CODE, job.source)  # as published beside the weights, so that `quantize` has it to copy
    config = json.loads((job.source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": f"{MODEL_CODE.stem}.MiMoV2Config"}
    (job.source / "config.json").write_text(json.dumps(config))
    return {"experts": experts, "seconds": time.monotonic() - begin} | asdict(report)


def fitting_experts(job: Job, sizes: Any) -> int:
    """How many experts a layer there is room for: with what a source takes, an int4 output .52 of an expert's bytes and
    at most twice those of all else, where FP8 becomes bf16."""
    room = min(job.options.room_gb * 1e9, shutil.disk_usage(job.work).free)
    geometry = synth.read_geometry(
        synth._published_config(synth._random_config(sizes, "v2.5"), "v2.5", TOWERS[job.options.sizes]), ""
    )
    stored = synth.stored_tensors(geometry, sizes.mtp_layers)
    bytes_of = {one.name: sum(entry.size_bytes for entry in one.entries) for one in stored}
    of_experts = sum(size for name, size in bytes_of.items() if ".experts." in name)
    other = 3 * (sum(bytes_of.values()) - of_experts)
    return int((room - other) / (1.52 * of_experts / sizes.experts)) // 8 * 8


def plan(job: Job) -> Record:
    seen = job.watched("plan", "plan", str(job.source), *job.recipe(), "--measure", "--json")
    return asdict(seen) | {"document": json.loads(seen.stdout), "stdout": ""}


class _Middle:
    """Whether a run is in the middle of a layer, by its journal's last lines."""

    def __init__(self, job: Job) -> None:
        self.journal, self.wanted = job.partial / JOURNAL_NAME, f'"layer {job.middle - 1}"'.encode()
        self.ends: list[float] = []
        self.moment: float | None = None

    def __call__(self) -> bool:
        try:
            text = self.journal.read_bytes()
        except FileNotFoundError:
            return False
        if text.count(b"\n") > len(self.ends):
            self.ends += [time.monotonic()] * (text.count(b"\n") - len(self.ends))
        if self.moment is None and self.wanted in text:
            self.moment = self.ends[-1] + (self.ends[-1] - self.ends[-2]) / 2
        return self.moment is not None and time.monotonic() >= self.moment


def quantize(job: Job) -> Record:
    """Until it is killed; with --no-kill to its end, and then `resume` finds nothing to do."""
    for folder in (job.partial, job.out):
        shutil.rmtree(folder, ignore_errors=True)  # of a stage that did not come to its end
    arguments = ["quantize", str(job.source), *job.recipe()]
    if job.options.no_kill:
        seen = job.watched("quantize", *arguments)
        return asdict(seen) | {"kept": shards(job.out, read_journal(job.out / JOURNAL_NAME)), "begun": {}}
    seen = job.watched("quantize", *arguments, kill_when=_Middle(job), code=128 + 9)
    lines = read_journal(job.partial / JOURNAL_NAME)
    if f"layer {job.middle - 1}" not in [line.unit for line in lines]:
        raise Stopped(f"quantize: out of time before layer {job.middle}")
    begun = {path.name: path.stat().st_size for path in job.partial.glob("*.safetensors")}
    for line in lines:
        begun.pop(line.file)
    return asdict(seen) | {"kept": shards(job.partial, lines), "begun": begun}


def shards(folder: Path, lines: list[Any]) -> dict[str, Any]:
    """Of each journaled shard: its file, when that was written, and whether its bytes have the journal's hash."""

    def one(line: Any) -> dict[str, Any]:
        path = folder / line.file
        right = path.is_file() and file_sha256(path) == line.sha256
        return {"file": line.file, "sha256": line.sha256, "right": right, "written": path.stat().st_mtime_ns}

    with ThreadPoolExecutor() as pool:
        return dict(zip([line.unit for line in lines], pool.map(one, lines), strict=True))


def resume(job: Job) -> Record:
    seen = job.watched("resume", "quantize", str(job.source), *job.recipe(), "--resume")
    written = shards(job.out, read_journal(job.out / JOURNAL_NAME))
    before = job.record("quantize")["kept"]
    return asdict(seen) | {
        "kept": sorted(unit for unit in before if before[unit] == written[unit]),
        "again": sorted(unit for unit in before if before[unit] != written[unit]),
        "new": sorted(unit for unit in written if unit not in before),
        "wrong": sorted(unit for unit in written if not written[unit]["right"]),
        "left": sorted(path.name for path in job.work.glob("out.partial*")),
        "output_bytes": sum(path.stat().st_size for path in job.out.rglob("*") if path.is_file()),
    }


def verify(job: Job) -> Record:
    seen = job.watched("verify", "verify", str(job.out), "--source", str(job.source), "--json")
    return asdict(seen) | {"document": json.loads(seen.stdout), "stdout": ""}


def evaluate(job: Job) -> Record:
    o = job.options
    data = job.ids("held-out", o.eval_sequences, o.eval_tokens)
    arguments = ["eval-kl", str(job.source), str(job.out), "--data", data, "--tokens", str(o.eval_tokens)]
    seen = job.watched("eval", *arguments, "--device", o.device, "--json")
    document = json.loads(seen.stdout)
    return asdict(seen) | {"document": document, "stdout": ""}


def launch(job: Job) -> Record:
    told, seconds = {}, 0.0
    for engine in ("vllm", "sglang"):
        arguments = ["--engine", engine, "--gpu", "h200", "--gpus", "1"]
        seen = job.watched("launch", "launch", str(job.out), *arguments)
        checked = job.watched("launch", "verify", str(job.out), *arguments[:2])
        told[engine] = seen.stdout + checked.stdout
        seconds += seen.seconds
    return {"told": told, "seconds": seconds / len(told)}


STAGES: dict[str, Callable[[Job], Record]] = {
    "make": make,
    "plan": plan,
    "quantize": quantize,
    "resume": resume,
    "verify": verify,
    "eval": evaluate,
    "launch": launch,
}
NEEDED = ("make", "quantize", "resume")  # by those that come after them


# --- what they tell


def layer_ends(record: Record) -> dict[int, float]:
    """Layer → the second at which its shard was in the journal."""
    found = ((_LAYER.match(text), second) for second, text in record.get("lines", ()))
    return {int(match[1]): second for match, second in found if match}


def layer_figures(record: Record, layers: list[int]) -> dict[int, tuple[float, float, float]]:
    """Layer → seconds, most host and most device memory in them; of those whose layer before is of the same run."""
    ends, out = layer_ends(record), {}
    for layer in layers:
        if layer in ends and layer - 1 in ends:
            first, last = ends[layer - 1], ends[layer]
            during = [sample for sample in record["samples"] if first <= sample[0] <= last]
            host, device = (max((sample[place] for sample in during), default=float("nan")) for place in (1, 3))
            out[layer] = last - first, host, device
    return out


def new_layers(job: Job) -> tuple[list[int], list[int]]:
    """Layers that the first run wrote after its first MoE layer, which pays for compilers, and the second after the
    one that it began with."""
    ends = layer_ends(job.record("quantize"))
    first = list(range(2, max(ends, default=0) + 1))
    again = {int(unit.split()[1]) for unit in job.record("resume").get("new", []) if unit.startswith("layer ")}
    return first, sorted(again)[1:]


def growth(values: dict[int, float], layers: int) -> float:
    """The last layer's value over the first's, by a line through all."""
    slope, constant = np.polyfit(list(values), list(values.values()), 1)
    first = float(constant + slope)
    return float(constant + slope * (layers - 1)) / first if first else float("nan")


def undisturbed_s(job: Job) -> float:
    """Seconds of a run that nobody kills: the first one's to its last layer, the second's from its first one on, and
    that one as long as the others."""
    first, second = job.record("quantize"), job.record("resume")
    ends, (_, later) = layer_ends(second), new_layers(job)
    if not later:  # nobody killed it
        return float(first["seconds"])
    figures = layer_figures(second, later)
    usual = statistics.median(seconds for seconds, _, _ in figures.values())
    return float(layer_ends(first)[job.middle - 1] + usual + second["seconds"] - ends[min(later) - 1])


def sliding(job: Job) -> list[int]:
    pattern = json.loads((job.source / "config.json").read_text())["hybrid_layer_pattern"]
    return [layer for layer, kind in enumerate(pattern) if kind]


def table(job: Job) -> list[str]:
    rows = ["| stage | seconds | peak GB on the host | on the device | what it told |", "|---|---|---|---|---|"]
    for stage in STAGES:
        record = job.record(stage)
        if not record:
            rows.append(f"| {stage} | not run | | | |")
            continue
        device = max((sample[3] for sample in record.get("samples", ())), default=0)
        cells = [f"{record['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in record else "", f"{device / 1e9:.1f}"]
        rows.append(f"| {stage} | {record['seconds']:.1f} | {' | '.join(cells)} | {TOLD[stage](job, record)} |")
    if job.record("quantize"):
        rows += ["", *flatness(job)]
    return rows


def flatness(job: Job) -> list[str]:
    first, later = new_layers(job)
    records = job.record("quantize"), job.record("resume") or {"lines": [], "samples": []}
    figures = layer_figures(records[0], first) | layer_figures(records[1], later)
    alike = {layer: figures[layer] for layer in sliding(job) if layer in figures}
    rows = [
        "| a sliding layer's | median | least to most | last over first, by a line | of each run |",
        "|---|---|---|---|---|",
    ]
    for place, (what, unit) in enumerate((("seconds", 1), ("GB on the host", 1e9), ("GB on the device", 1e9))):
        values = {layer: figure[place] / unit for layer, figure in alike.items()}
        runs = [{layer: values[layer] for layer in values if layer in run} for run in (first, later)]
        grown = ", ".join(f"{growth(run, job.layers):.3f}" for run in runs if len(run) > 2)
        rows.append(
            f"| {what} | {statistics.median(values.values()):.2f} | {min(values.values()):.2f} to "
            f"{max(values.values()):.2f} | {growth(values, job.layers):.3f} | {grown} |"
        )
    others = [seconds for layer, (seconds, _, _) in figures.items() if layer not in alike]
    if others:
        rows += ["", f"A global layer: {statistics.median(others):.2f} s. Layers, in order: " + by_layer(figures)]
    return rows


def by_layer(figures: dict[int, tuple[float, float, float]]) -> str:
    return ", ".join(f"{layer}: {figures[layer][0]:.2f}" for layer in sorted(figures))


def _told_plan(job: Job, record: Record) -> str:
    document = record["document"]
    estimate = document["estimate"]
    said = estimate["total_s"]
    text = f"{said:.0f} s, {document['output_bytes'] / 1e9:.1f} GB"
    if job.record("resume") or (job.options.no_kill and job.record("quantize")):
        took = undisturbed_s(job)
        text += f"; a run that nobody kills takes {took:.0f} s, so {said / took:.2f} of it was told"
    return text


def _told_make(job: Job, record: Record) -> str:
    return (
        f"{record['experts']} experts, {job.layers} layers, {record['size_bytes'] / 1e9:.1f} GB, "
        f"{record['tensors']:,} tensors, {len(record['trap'])} weights apart from their scale"
    )


def _told_quantize(job: Job, record: Record) -> str:
    right = sum(one["right"] for one in record["kept"].values())
    shards = f"{len(record['kept'])} shards in the journal, {right} with its hash"
    return f"killed in layer {job.middle}: {shards}, {len(record['begun'])} begun" if record["exit_code"] else shards


def _told_resume(job: Job, record: Record) -> str:
    if not record["new"]:
        return f"nothing was left to do; {len(record['wrong'])} shards with another hash"
    first = min(int(unit.split()[1]) for unit in record["new"] if unit.startswith("layer "))
    ends = layer_ends(record)
    return (
        f"{len(record['kept'])} shards kept to the byte, {len(record['again'])} written again, {len(record['new'])} "
        f"new from layer {first} on, which was there after {ends[first]:.1f} s; "
        f"{len(record['wrong'])} with another hash, {record['output_bytes'] / 1e9:.1f} GB"
    )


def _told_verify(job: Job, record: Record) -> str:
    document = record["document"]
    checked = ", ".join(f"{count:,} {what}" for what, count in document["checked"].items())
    return f"{len(document['problems'])} problems; {checked}; {document['bytes_checked'] / 1e9:.1f} GB"


def _told_eval(job: Job, record: Record) -> str:
    return f"J {record['document']['j']['mean']:.5f}"


TOLD: dict[str, Callable[[Job, Record], str]] = {
    "make": _told_make,
    "plan": _told_plan,
    "quantize": _told_quantize,
    "resume": _told_resume,
    "verify": _told_verify,
    "eval": _told_eval,
    "launch": lambda job, record: ", ".join(record["told"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", choices=[[], *STAGES], default=[])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", choices=SIZES, default="v2.5")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--room-gb", type=float, default=100, help="for source and output, beside the processes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipe", default="gptq-int4-g128")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--eval-sequences", type=int, default=16)
    parser.add_argument("--eval-tokens", type=int, default=1024)
    parser.add_argument("--no-kill", action="store_true", help="let `quantize` come to its end")
    parser.add_argument("--until", type=float, default=10**6, help="seconds after which what runs is ended")
    parser.add_argument("--out", type=Path, help="where the table is written too")
    job = Job(parser.parse_args())
    failed: list[str] = []
    for stage in STAGES:
        if job.record(stage) or (job.options.stages and stage not in job.options.stages):
            continue
        print(f"{time.monotonic() - job.begin:.0f} s: {stage}", file=sys.stderr, flush=True)
        try:
            job.keep(stage, STAGES[stage](job))
        except Stopped as stopped:
            failed.append(str(stopped))
            if stage in NEEDED:
                break
    text = "\n".join([f"{job.options.device}; {versions(('mimoquant', 'torch', 'numpy'))}", "", *table(job)])
    print(text)
    if job.options.out:
        job.options.out.write_text(text + "\n")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
