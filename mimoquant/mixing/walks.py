"""The walks of a sensitivity run over its sequences: one back, and those forward with all forks of a layer at once.

Key idea: a walk reads each layer once, takes every lane through it, and keeps what a resume needs after each layer.
What the walks are for is `run`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.fisher.matrices import Fisher
from mimoquant.fisher.walk import FisherSettings, walk_back
from mimoquant.machine.team import Team
from mimoquant.mixing.attribution import Ablation, Floats
from mimoquant.mixing.choose import Choice
from mimoquant.mixing.documents import WalkCost
from mimoquant.mixing.felt import FeltCosts, Gradients, LayerFelt, layer_costs
from mimoquant.mixing.forks import Lane, Probe, Probed, Trial, finals_of, mean_j, walk_forks
from mimoquant.mixing.layer_options import CalibratedOptions, LayerOptions
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.needs import QUICK_DRAWS, Forks
from mimoquant.mixing.served import MixtureRoundings
from mimoquant.model.layer_stream import portions
from mimoquant.model.served_rounding import NONE
from mimoquant.planning.plan import Plan
from mimoquant.quant.stack import Engine
from mimoquant.run.clamped import Counts
from mimoquant.weights.decoded import CheckpointWeights

Progress = Callable[[str, int, int], None]  # what is walked, layers passed (0: it begins), layers


def forks_of(mixtures: Mixtures, tokens: TokenSet, team: Team, *, quick: bool = False) -> Forks:
    """What the run is, for `fork_needs`."""
    count = 2 * len(portions(torch.empty(-(-len(tokens.ids) // 2), tokens.ids.shape[1], device="meta")))
    served = mixtures.served
    formats, share = len(probed_of(mixtures)), -(-count // team.size) / count
    more = served.beside.anything or served.reference.anything
    return Forks(mixtures.plan, formats, tokens.ids.size, share, team.size, served=more, quick=quick)


def probed_of(mixtures: Mixtures) -> tuple[Probed, ...]:
    """The options that leave an error in a layer's output: formats, and what is kept where its inputs are rounded."""
    every = (
        Probed(option.label, option.fmt, mixtures.served.inputs.get(option.label, NONE)) for option in mixtures.options
    )
    return tuple(one for one in every if one.fmt or one.inputs != NONE)


def halves(tokens: TokenSet) -> tuple[list[int], list[int]]:
    """Sequences for the forks of the clean model, and for those of the quantized one: half of each domain."""
    seen: dict[str, int] = {}
    out: tuple[list[int], list[int]] = ([], [])
    for sequence, domain in enumerate(tokens.domains):
        turn = seen.setdefault(domain, len(seen))  # domains begin in turns, so that both halves have one size
        out[turn % 2].append(sequence)
        seen[domain] += 1
    return out


class Walks:
    """The walks of one run over the same sequences; `told`: what each of them cost. Without `snapshots` they cannot be
    taken up."""

    def __init__(
        self,
        mixtures: Mixtures,
        tokens: TokenSet,
        calibration: TokenSet | None,
        engine: Engine,
        team: Team,
        snapshots: Snapshots | None = None,
        progress: Progress | None = None,
        fisher: Fisher | None = None,
    ) -> None:
        self.mixtures, self.calibration, self.engine, self.team = mixtures, calibration, engine, team
        with CheckpointReader(mixtures.plan.layout.index) as reader:
            self.roundings = MixtureRoundings(mixtures, reader)
        self.snapshots, self.progress, self.fisher = snapshots, progress or (lambda *told: None), fisher
        self.geometry = mixtures.plan.layout.geometry
        ids, self.tokens = torch.from_numpy(tokens.ids), tokens.ids.size
        self.order = halves(tokens)
        self.every = [(half, part) for half in (0, 1) for part in portions(ids[self.order[half]])]
        self.mine = self.every[self.team.rank :: self.team.size]
        self.references: list[Tensor] = []
        self.told: list[WalkCost] = []
        self.clamped: dict[str, Counts] = {}  # format → groups that have no scale, as the last walk has it of a weight

    def ablation(self) -> tuple[Ablation, list[list[Probe]]]:
        """J of every fork, and the probes of each MoE layer."""
        probed, first = probed_of(self.mixtures), self.mixtures.options[0].label
        trials = [self._forks(half, kept=len(self.mixtures.options) - 1) for half in (0, 1)]
        lanes = [Lane(part, trials[half], () if half else probed) for half, part in self.mine]
        j, by_layer = self._walk("ablation", self.mixtures.plan, lanes), self._probes(lanes)
        ratio = np.array(
            [[_ratio(of_layer, option.label, first) for option in self.mixtures.options] for of_layer in by_layer]
        )
        end = 2 + len(self.mixtures.layers)
        none = (j[0][end], j[1][end]) if self.roundings.apart else None
        return Ablation((j[0][1], j[1][1]), j[0][2:end], j[1][2:end], ratio, none), by_layer

    def felt(self, fisher: Fisher) -> tuple[FeltCosts, list[list[Probe]]]:
        """What the options of each MoE layer cost, and its probes; `fisher` has walked back the same sequences."""
        probed, kept, rows = probed_of(self.mixtures), len(self.mixtures.options) - 1, self._rows()
        trials = [self._trial(name, [kept] * len(self.mixtures.layers)) for name in ("the source", "a layer's error")]
        lanes = [
            Lane(part, trials, probed, Gradients(fisher, of_lane, self.team.device))
            for (_, part), of_lane in zip(self.mine, rows[self.team.rank :: self.team.size], strict=True)
        ]
        with CheckpointReader(self.mixtures.plan.layout.index) as reader:
            self._pass("felt", self.mixtures.plan, reader, lanes)
        told = self.team.gather([self._costs(lane) for lane in lanes])
        costs, stay = (np.concatenate(parts, axis=2) for parts in zip(*self._in_order(told), strict=True))
        return FeltCosts.of(costs, stay, self.mixtures.options), self._probes(lanes)

    def _costs(self, lane: Lane) -> list[Any]:
        """What `layer_costs` says of a lane, as JSON can hold it."""
        layers = [LayerFelt.of(lane.felt[layer]) for layer in self.mixtures.layers]
        return [costs.tolist() for costs in layer_costs(layers, self.geometry.hidden, sum(map(len, lane.ids)))]

    def _rows(self) -> list[list[int]]:
        """Of each of `every`: which sequences it has."""
        out, begin = [], [0, 0]
        for half, part in self.every:
            count = sum(map(len, part))
            out.append(self.order[half][begin[half] : begin[half] + count])
            begin[half] += count
        return out

    def _probes(self, lanes: list[Lane]) -> list[list[Probe]]:
        """By MoE layer, of all ranks' lanes that have any, in their order."""
        told = self.team.gather([[vars(probe) for probe in lane.probes] for lane in lanes])
        probes = [[Probe(**one) for one in of_lane] for of_lane in self._in_order(told)]
        return list(map(list, zip(*filter(None, probes), strict=True)))

    def _forks(self, half: int, kept: int) -> list[Trial]:
        """The source, all layers quantized, and one of them so (first half), or all but one (second); last the source
        as it is served, where that is another thing. `kept`: an option with the source's values."""
        layers, count = self.mixtures.layers, len(self.mixtures.layers)
        one, others, name = (kept, 0, "all but") if half else (0, kept, "only")
        forks = [
            self._trial(f"{name} layer {layer} quantized", [one if n == layer else others for n in layers])
            for layer in layers
        ]
        source = Trial("the source", (None,) * self.geometry.layers, self.roundings.reference)
        served = [self._trial("the source as served", [kept] * count)] * self.roundings.apart
        return [source, self._trial("all layers quantized", [0] * count), *forks, *served]

    def measure(self, choices: Sequence[Choice]) -> list[tuple[Floats, Floats]]:
        """J of each sequence, by halves, of each choice. Calibrated ones are walked one by one: each has codes of its
        own, because what a layer is calibrated on has passed the layers before it."""
        together = [list(choices)] if self.calibration is None else [[choice] for choice in choices]
        out = []
        for some in together:
            name = hashlib.sha256(repr(some).encode()).hexdigest()[:12]
            trials = [self._trial(f"choice {number}", choice) for number, choice in enumerate(some)]
            plan = self.mixtures.plan if self.calibration is None else self.mixtures.planned(some[0])
            j = self._walk(f"measure-{name}", plan, [Lane(part, trials) for _, part in self.mine])
            out += list(zip(*j, strict=True))
        return out

    def _trial(self, name: str, choice: Sequence[int]) -> Trial:
        options = self.mixtures.named(choice)
        stored = tuple(options[n].fmt if n in options else None for n in range(self.geometry.layers))
        return Trial(name, stored, self.roundings.of(options) if self.mixtures.served.anything else ())

    def _walk(self, name: str, plan: Plan, lanes: list[Lane]) -> tuple[Floats, Floats]:
        """J [trials, sequences] of both halves. A walk that was begun is taken up where it was left."""
        with CheckpointReader(plan.layout.index) as reader:
            source = self._pass(name, plan, reader, lanes)
            norm, head = (source.source.tensor(key) for key in ("model.norm.weight", "lm_head.weight"))
            self.references = self.references or [finals_of(lane, 0, norm) for lane in lanes]
            mine = [mean_j(lane, reference, norm, head) for lane, reference in zip(lanes, self.references, strict=True)]
            self.told[-1]["bytes_read"] = reader.bytes_read
        ordered = self._in_order(self.team.gather(mine))
        of_first, of_second = (
            np.concatenate(
                [np.array(j) for (half, _), j in zip(self.every, ordered, strict=True) if half == wanted], axis=1
            )
            for wanted in (0, 1)
        )
        return of_first, of_second

    def _pass(self, name: str, plan: Plan, reader: CheckpointReader, lanes: list[Lane]) -> LayerOptions:
        """Take lanes through all layers; what was read so far is told."""
        layers = self.geometry.layers
        self.progress(name.partition("-")[0], 0, layers)
        source = self._options(plan, reader)
        begun = self.snapshots.load(name, layers) if self.snapshots else None
        first = self._taken_up(source, lanes, *begun) if begun else self._begun(source, lanes)
        walk_forks(source, lanes, first=first, after_layer=lambda layer: self._save(name, layer, source, lanes))
        for of_rank in self.team.gather(source.clamped):
            for label, counts in of_rank.items():
                self.clamped[label] = self.clamped.get(label, {}) | counts
        passed = sum(self.team.gather(sum(lane.passed for lane in lanes))) / self.tokens
        self.told.append(
            WalkCost(
                walk=name,
                forward_passes=passed / layers,
                bytes_read=reader.bytes_read,
                layers_walked=layers - first,
            )
        )
        return source

    def _options(self, plan: Plan, reader: CheckpointReader) -> LayerOptions:
        if self.calibration is None:
            return LayerOptions(plan, reader, self.engine, self.team.device)
        return CalibratedOptions(plan, reader, self.engine, self.calibration, self.team, self.fisher)

    def _begun(self, source: LayerOptions, lanes: list[Lane]) -> int:
        embedding = source.source.tensor("model.embed_tokens.weight")
        for lane in lanes:
            lane.begin(source, embedding)
        return 0

    def _taken_up(
        self, source: LayerOptions, lanes: list[Lane], layers: int, states: dict[str, Tensor], facts: Any
    ) -> int:
        source.restore(states)
        source.clamped = facts["clamped"]
        for number, (lane, (passed, probes)) in enumerate(zip(lanes, facts["lanes"], strict=True)):
            own = {
                key.removeprefix(f"lane {number} "): values
                for key, values in states.items()
                if key.startswith(f"lane {number} ")
            }
            lane.restore(source, layers, own)
            lane.passed, lane.probes = passed, [Probe(**one) for one in probes]
        return layers

    def _save(self, name: str, layer: int, source: LayerOptions, lanes: list[Lane]) -> None:
        states = source.state() | {
            f"lane {number} {key}": values for number, lane in enumerate(lanes) for key, values in lane.state().items()
        }
        of_lanes = [(lane.passed, [vars(probe) for probe in lane.probes]) for lane in lanes]
        facts = {"lanes": of_lanes, "clamped": source.clamped}
        if self.snapshots:
            self.snapshots.save(name, layer, states, facts)
        self.progress(name.partition("-")[0], layer + 1, self.geometry.layers)

    def _in_order(self, told: list[list[Any]]) -> list[Any]:
        """What ranks tell of their lanes, in the order of all."""
        return [told[number % self.team.size][number // self.team.size] for number in range(len(self.every))]


def _ratio(probes: Sequence[Probe], label: str, base: str) -> float:
    """An option's error over the base's, of a layer; 0 for the source's values, 1 where the base has no error."""
    whole = sum(probe.error[base] for probe in probes)
    if label not in probes[0].error:
        return 0.0
    return sum(probe.error[label] for probe in probes) / whole if whole else 1.0


def walked(walks: Walks, tokens: TokenSet, folder: Path) -> Fisher:
    """The walk back over the sequences that choose. What enters each layer rests in files, which a resume takes up."""
    plan, layers = walks.mixtures.plan, walks.geometry.layers
    first = min(walks.geometry.moe_layers)

    def passed(way: str, layer: int) -> None:
        done = (layer + 1, layers) if way == "forward" else (layers - layer, layers - first)
        walks.progress(f"walk {way}", *done)

    with CheckpointReader(plan.layout.index) as reader:
        weights, settings = (
            CheckpointWeights(reader, plan.layout, torch.device(walks.team.device)),
            FisherSettings(QUICK_DRAWS, states="files"),
        )
        fisher = walk_back(weights, tokens, settings, folder, team=walks.team, resume=True, progress=passed)
        again = (layers - first - 1) / layers if reader.bytes_read else 0.0
        walks.told.append(
            WalkCost(
                walk="back",
                forward_passes=1.0 + again if reader.bytes_read else 0.0,
                bytes_read=reader.bytes_read,
                layers_walked=layers if reader.bytes_read else 0,
            )
        )
    return fisher
