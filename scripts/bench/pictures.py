#!/usr/bin/env python
"""Does calibrating on pictures lower J on pictures? A small omni model is trained, quantized, and compared.

Trains the model of `scripts/make/train_omni.py`, quantizes it with shipped recipes after calibrating on text alone
("text"), on text and chats about pictures in equal parts ("both"), on text and the same chats without their pictures
("words": what the chats' wording does by itself), all of as many tokens, and on all of the text and as many chats
besides ("added"). J is measured on pictures and text that were kept back. Several subsets of the calibration data are
drawn, each used by all four. Intervals are bootstraps over sequences of the mean over subsets, with the same draws on
both sides of a ratio. Then towers of V2.5's size are
timed.

What is done already is not done again: results lie in DIR, one JSON line each; what was made by a killed run goes.
--until says after how many seconds nothing new is begun.

usage: scripts/bench/pictures.py DATA.npz --work DIR [--device cuda] [--train-s 150] [--until 330] [--workers 4]
           [--only train quantize measure towers] [--subsets 3] [--calib 64 256] [--eval 96] [--size omni]
           [--recipes gptq-int4-g128 gptq-mxfp4] [--objectives kl output]
DATA.npz: of `scripts/make/train_micro.py --prepare`. Prints JSON lines as results come, and Markdown tables at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from growth import windows
from versions import versions

from mimoquant import api
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.evaluation.contexts import CONTEXTS, contexts_of
from mimoquant.evaluation.eval_kl import compare, open_layout
from mimoquant.machine.devices import resolve_device
from mimoquant.machine.team import Team
from mimoquant.model.media import Picture
from mimoquant.model.tower_config import FULL, VisionConfig
from mimoquant.model.vision import Affine, Merger, VisionBlock, picture_rows

MAKE = Path(__file__).resolve().parents[1] / "make"
sys.path.append(str(MAKE))
STAGES = ("train", "quantize", "measure", "towers")
RECIPES, OBJECTIVES, SETS = ("gptq-int4-g128", "gptq-mxfp4"), ("kl", "output"), ("text", "words", "both", "added")
HELD_OUT, CALIBRATION = 1000, 2000  # seeds of pictures, which training does not have
RESAMPLES = 4000
MEASURE_S = 60  # that measuring takes
BEGUN = time.monotonic()
Floats = npt.NDArray[np.float64]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One quantized model. `data`: what it was calibrated on."""

    recipe: str
    objective: str
    data: str
    subset: int

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.objective}/{self.data}/{self.subset}"


class Results:
    """JSON lines in a file, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.held: dict[str, Facts] = {line["key"]: line for line in map(json.loads, lines)}

    def add(self, key: str, **facts: Any) -> None:
        line = {"key": key, "at_s": round(time.monotonic() - BEGUN, 1)} | facts
        self.held[key] = line
        text = json.dumps(line)
        print(text if len(text) < 400 else text[:400] + "...", flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")


def time_left(options: argparse.Namespace, afterwards_s: float = 0.0) -> bool:
    return time.monotonic() - BEGUN < float(options.until) - afterwards_s


# --- the model and its data -------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, results: Results) -> None:
    if "train" in results.held:
        return
    command = [sys.executable, str(MAKE / "train_omni.py"), str(options.data), "--out", str(options.work / "model")]
    command += ["--size", options.size, "--device", options.device, "--time-limit", str(options.train_s)]
    command += ["--chats", str(options.chats), "--report", str(options.work / "train.txt")]
    if options.train_batch:
        command += ["--batch", str(options.train_batch), "--texts", str(options.train_batch)]
    begun = time.monotonic()
    subprocess.run(command, check=True)
    results.add("train", seconds=round(time.monotonic() - begun, 1))


def write_data(options: argparse.Namespace) -> None:
    """Of each subset text and chats, and what J is measured on."""
    from train_omni import write_chats

    rows, tokens = options.calib
    if not (options.work / "text-held.npy").is_file():
        every = windows(options.data, "train", rows * options.subsets, tokens)
        for subset in range(options.subsets):
            np.save(options.work / f"text-{subset}.npy", every[subset :: options.subsets])
            for data, pictures in (("both", True), ("words", False)):
                chats = options.work / f"{data}-{subset}.jsonl"
                write_chats(chats, rows * tokens // 100, CALIBRATION + subset, pictures=pictures)
        write_chats(options.work / "pictures-held.jsonl", options.eval * tokens // 100, HELD_OUT)
        np.save(options.work / "text-held.npy", windows(options.data, "held", options.eval, tokens))


def variants(options: argparse.Namespace) -> Iterator[Variant]:
    """A subset of all before the next, so that a run that is cut short has whole comparisons."""
    for subset, objective, recipe, data in itertools.product(
        range(options.subsets), options.objectives, options.recipes, SETS
    ):
        yield Variant(recipe, objective, data, subset)


def folder_of(work: Path, variant: Variant) -> Path:
    return work / "out" / variant.name.replace("/", "-")


def quantize(work: Path, variant: Variant, calib: tuple[int, int], device: str) -> Facts:
    """In a process of its own, mostly."""
    begun, out = time.monotonic(), folder_of(work, variant)
    for stale in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(stale, ignore_errors=True)
    data = [str(work / f"text-{variant.subset}.npy")]
    if variant.data != "text":
        data.append(str(work / f"{'words' if variant.data == 'words' else 'both'}-{variant.subset}.jsonl"))
    told = api.quantize(
        work / "model",
        variant.recipe,
        out,
        device=device,
        data=data,
        sequences=calib[0] * (2 if variant.data == "added" else 1),
        tokens=calib[1],
        objective=variant.objective,
    )
    layers = told["calibration"] or {}
    names = ("tokens", "image_tokens", "starved")
    kept = {layer: {name: facts.get(name) for name in names} for layer, facts in layers.items()}
    return {"seconds": round(time.monotonic() - begun, 1), "layers": kept}


def quantize_all(options: argparse.Namespace, results: Results) -> None:
    """Several at once: each computes little, and waits for the host most of the time."""
    (options.work / "out").mkdir(exist_ok=True)
    todo = [variant for variant in variants(options) if f"quantize {variant.name}" not in results.held]
    if options.workers == 1:
        for variant in todo:
            if time_left(options, MEASURE_S):
                facts = quantize(options.work, variant, options.calib, options.device)
                results.add(f"quantize {variant.name}", **facts)
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.workers))
    context, waiting = multiprocessing.get_context("spawn"), iter(todo)
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        running = {}

        def begin() -> None:
            variant = next(waiting, None) if time_left(options, MEASURE_S) else None
            if variant is not None:
                running[pool.submit(quantize, options.work, variant, options.calib, options.device)] = variant

        for _ in range(options.workers):
            begin()
        while running:
            done = next(as_completed(running))
            results.add(f"quantize {running.pop(done).name}", **done.result())
            begin()


# --- J ----------------------------------------------------------------------------------------------------------------


def held_out(options: argparse.Namespace, name: str) -> TokenSet:
    vocab = open_layout(options.work / "model").geometry.vocab
    file = options.work / ("text-held.npy" if name == "text" else "pictures-held.jsonl")
    tokens = options.calib[1]
    return load_tokens(
        [str(file)], options.work / "model", sequences=options.eval, tokens=tokens, vocab=vocab, takes_media=True
    )


def measure(options: argparse.Namespace, results: Results) -> None:
    """All variants at once, in one walk a set: sums of J and numbers of positions, of each sequence and context."""
    made = [v for v in variants(options) if f"quantize {v.name}" in results.held]
    for name in ("pictures", "text"):
        todo = [variant for variant in made if f"measure {name} {variant.name}" not in results.held]
        if not todo:
            continue
        tokens = held_out(options, name)
        layouts = [open_layout(folder_of(options.work, variant)) for variant in todo]
        team = Team(resolve_device(options.device))
        walked = compare(open_layout(options.work / "model"), layouts, tokens, noise_floor=False, team=team)
        context = contexts_of(tokens.media or [()] * len(tokens.ids), tokens.ids.shape[1]).ravel()
        sequence = np.repeat(np.arange(len(tokens.ids)), tokens.ids.shape[1] - 1)
        for variant, comparison in zip(todo, walked.comparisons, strict=True):
            scores = comparison.scores
            assert scores is not None
            at = scores.counted
            place = sequence * len(CONTEXTS) + context
            shape, bins = (len(tokens.ids), len(CONTEXTS)), len(tokens.ids) * len(CONTEXTS)
            sums = np.bincount(place[at], scores.j[at], bins).reshape(shape)
            counts = np.bincount(place[at], minlength=bins).reshape(shape)
            results.add(
                f"measure {name} {variant.name}",
                j=float(scores.j[at].mean()),
                top1=float(scores.agree[at].mean()),
                loss=float(scores.reference_loss[at].mean()),
                sums=sums.tolist(),
                counts=counts.tolist(),
            )


WHERE = {  # the rows of the table: a set's name, and places in CONTEXTS
    "pictures: right after one": ("pictures", [1]),
    "pictures: later after one": ("pictures", [2]),
    "pictures: after one, both": ("pictures", [1, 2]),
    "text": ("text", [0]),
}


def sums_of(results: Results, options: argparse.Namespace, made: Variant, where: str) -> tuple[Floats, Floats] | None:
    """[subsets, sequences] of J, and positions [sequences]; of the subsets that both sets of data have."""
    name, places = WHERE[where]
    found = []
    for subset in range(options.subsets):
        keys = [f"measure {name} {made.recipe}/{made.objective}/{data}/{subset}" for data in SETS]
        if all(key in results.held for key in keys):
            found.append(results.held[keys[SETS.index(made.data)]])
    if not found:
        return None
    sums = np.array([np.array(facts["sums"])[:, places].sum(1) for facts in found])
    return sums, np.array(found[0]["counts"], np.float64)[:, places].sum(1)


def tables(options: argparse.Namespace, results: Results) -> list[str]:
    told = ("both over text", "by subset", "both over words", "added over text")
    rows = [f"| recipe, objective | J on | {' | '.join((*SETS, *told))} |", "|" + "---|" * (6 + len(told))]
    for recipe, objective, where in itertools.product(options.recipes, options.objectives, WHERE):
        found = {data: sums_of(results, options, Variant(recipe, objective, data, 0), where) for data in SETS}
        held = {data: sums for data, sums in found.items() if sums is not None}
        if len(held) < len(SETS):
            continue
        counts = held["text"][1]
        text, words, both, added = (held[data][0] for data in SETS)
        j = [f"{sums.mean(0).sum() / counts.sum():.5f}" for sums in (text, words, both, added)]
        by_subset = ", ".join(f"{ratio:.3f}" for ratio in both.sum(1) / text.sum(1))
        cells = [*j, ratio(both, text), by_subset, ratio(both, words), ratio(added, text)]
        rows.append(f"| {recipe}, {objective} | {where} | {' | '.join(cells)} |")
    return [*rows, "", *coverage(options, results)]


def ratio(sums: Floats, others: Floats) -> str:
    """Of two [subsets, sequences], with its interval."""
    draws = np.random.default_rng(0).integers(sums.shape[1], size=(RESAMPLES, sums.shape[1]))
    mine, theirs = (part.mean(0) for part in (sums, others))
    low, high = np.quantile(mine[draws].sum(1) / theirs[draws].sum(1), [0.025, 0.975])
    return f"{mine.sum() / theirs.sum():.3f} ({low:.3f}-{high:.3f})"


def coverage(options: argparse.Namespace, results: Results) -> list[str]:
    """Tokens of experts, by what a run was calibrated on; experts of one recipe, which others share."""
    rows = ["| calibrated on | starved | fewest tokens | tokens of the tenth of experts that pictures reach most |"]
    rows.append("|---|---|---|---|")
    pairs = []
    for subset in range(options.subsets):
        keys = [f"quantize {options.recipes[0]}/{options.objectives[0]}/{data}/{subset}" for data in SETS]
        if all(key in results.held for key in keys):
            pairs.append([results.held[key]["layers"] for key in keys])
    for place, data in enumerate(SETS):
        told = []
        for pair in pairs:
            tokens = np.concatenate([facts["tokens"] for facts in pair[place].values()])
            images = np.concatenate([facts["image_tokens"] for facts in pair[SETS.index("both")].values()])
            most = np.argsort(images)[-max(1, len(images) // 10) :]
            starved = sum(facts["starved"] for facts in pair[place].values())
            told.append((f"{starved} of {len(tokens)}", str(tokens.min()), f"{tokens[most].mean():.0f}"))
        if told:
            rows.append(f"| {data} | {' | '.join('; '.join(column) for column in zip(*told, strict=True))} |")
    if pairs:
        mixed = pairs[0][SETS.index("both")].values()
        every = [np.concatenate([facts[n] for facts in mixed]) for n in ("tokens", "image_tokens")]
        share = every[1] / np.maximum(every[0], 1)
        rows += [
            "",
            f"Share of images in an expert's tokens, first subset, both: {np.quantile(share, [0, 0.5, 0.9, 1])}",
        ]
    return rows


# --- towers at V2.5's size --------------------------------------------------------------------------------------------


class RandomTower:
    """V2.5's vision tower with random weights, which lie on the device: reading them is not timed."""

    def __init__(self, config: VisionConfig, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        self.noise = torch.Generator(self.device).manual_seed(0)
        hidden, inner, heads = config.hidden, config.intermediate, config.heads * config.head_dim
        norm = torch.ones(hidden, dtype=torch.bfloat16, device=self.device)
        qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
        shapes = ((qkv, hidden), (hidden, heads), (inner, hidden), (inner, hidden), (hidden, inner))
        fused, proj, gate, up, down = (self._product(*shape) for shape in shapes)
        self.block = VisionBlock(norm, norm, fused, proj, gate, up, down, norm[: config.heads])
        self.last = Merger(
            norm, None, self._product(config.merged, config.merged), self._product(config.out_hidden, config.merged)
        )

    def _product(self, out: int, inner: int) -> Affine:
        weight = torch.randn(out, inner, generator=self.noise, device=self.device) * inner**-0.5
        return Affine(weight.bfloat16(), torch.zeros(out, dtype=torch.bfloat16, device=self.device))

    def patches(self) -> torch.Tensor:
        return self._product(self.config.hidden, self.config.patch_width).weight

    def vision_block(self, number: int) -> VisionBlock:
        return replace(self.block, sinks=None) if self.config.kinds[number] == FULL else self.block

    def merger(self) -> Merger:
        return self.last


def v25_vision(depth: int) -> VisionConfig:
    kinds = ((-1, 0, 0, 0, 0, 1, 1, 1, 1) * 4)[:depth]
    return VisionConfig(1280, 4608, 32, 8, 64, 3, 16, 2, 2, 4096, kinds, 64, True)


def time_towers(options: argparse.Namespace, results: Results) -> None:
    """Seconds a thousand image tokens, by the pictures' size. Blocks are alike, so a few tell of all on a CPU."""
    depth = 28 if options.device.startswith("cuda") else 9
    config = v25_vision(depth)
    source = RandomTower(config, options.device)
    for side, count in options.pictures:
        key = f"towers {side} x {count}"
        if key in results.held or not time_left(options):
            continue
        grid = (1, side // config.patch, side // config.patch)
        values = np.random.default_rng(0).standard_normal((grid[1] * grid[2], config.patch_width), np.float32)
        pictures = [Picture(values, grid)] * count
        seconds = []
        for _ in range(2):
            if options.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            rows = picture_rows(pictures, source, config)
            seconds.append(time.perf_counter() - begun)
        tokens = sum(map(len, rows))
        peak = torch.cuda.max_memory_allocated() / 1e9 if options.device.startswith("cuda") else None
        per = min(seconds) / tokens * 1000
        results.add(
            key, tokens=tokens, blocks=depth, first_s=seconds[0], second_s=seconds[1], per_1000=per, peak_gb=peak
        )


def tower_lines(results: Results) -> list[str]:
    rows = ["| V2.5's vision tower: pictures | image tokens | blocks | s for 1000 image tokens | peak GB on the GPU |"]
    rows.append("|---|---|---|---|---|")
    for key, facts in results.held.items():
        if key.startswith("towers "):
            peak = "-" if facts["peak_gb"] is None else f"{facts['peak_gb']:.2f}"
            name = key.removeprefix("towers ")
            rows.append(f"| {name} | {facts['tokens']} | {facts['blocks']} | {facts['per_1000']:.3f} | {peak} |")
    return rows if len(rows) > 2 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="omni", help="of the model, as of train_omni.py")
    parser.add_argument("--train-s", type=float, default=150, help="seconds that training may take")
    parser.add_argument("--train-batch", type=int, help="windows of chats a step of training, and as many of text")
    parser.add_argument("--chats", type=int, default=60000, help="about pictures, to train on")
    parser.add_argument("--until", type=float, default=330, help="seconds after which nothing new is begun")
    parser.add_argument("--workers", type=int, default=4, help="runs of quantize at once")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--subsets", type=int, default=3, help="of the calibration data")
    parser.add_argument("--calib", type=int, nargs=2, default=[64, 256], metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--eval", type=int, default=96, help="sequences that J is measured on, of each set")
    parser.add_argument(
        "--pictures", type=int, nargs=2, action="append", metavar=("SIDE", "COUNT"), help="that towers are timed with"
    )
    options = parser.parse_args()
    options.pictures = options.pictures or [(448, 32), (896, 8), (1792, 2)]
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.work / "results.jsonl")
    if "train" in options.only:
        train(options, results)
    if "quantize" in options.only:
        write_data(options)
        quantize_all(options, results)
    if "measure" in options.only:
        measure(options, results)
    if "towers" in options.only:
        time_towers(options, results)
    made = f"{options.device}, {os.cpu_count()} cores; calibrated on {options.calib}, J over {options.eval} sequences"
    print(f"\n{made}; {versions(('torch', 'numpy', 'triton', 'numba', 'pillow'))}; {time.monotonic() - BEGUN:.0f} s\n")
    print("\n".join([*tables(options, results), "", *tower_lines(results)]))


if __name__ == "__main__":
    main()
