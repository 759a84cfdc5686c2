"""`sensitivity`: what each layer's quantization costs in J, and a recipe that spends bytes where they buy most.

Key idea: one walk carries the clean model, the one with all layers quantized, and a fork of either at each layer: the
clean one with only that layer quantized, on half of the sequences, and the quantized one with only that layer restored,
on the other half. That is L/2 + 2 forward passes, and each byte of the checkpoint is read once. `attribution` makes of
it what each option of each layer is predicted to cost, `knapsack` chooses exactly. Layers do not quite add up, so the
choice is measured end to end, which is another pass and read; where prediction and measurement differ beyond their
interval, or one format everywhere is predicted to be about as good, up to two rounds measure such neighbours, too.

All of them can be walked as they are served, activations and cache rounded (`Mixtures.served`).

Left out: `eval-kl`'s details. The sequences here choose, so J of the chosen recipe should be told on other ones.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.calibration.tokens import CalibrationRecord, TokenSet, calibration_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import UsageError
from mimoquant.evaluation.held_out import refuse_shared
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.fisher.matrices import Fisher
from mimoquant.machine.devices import make_engine
from mimoquant.machine.team import Team
from mimoquant.mixing.attribution import Ablation, Floats
from mimoquant.mixing.choose import Choice, Chooser
from mimoquant.mixing.documents import SensitivityCost, SensitivityFindings, WalkCost
from mimoquant.mixing.facts import choice_facts, facts_of, recipe_text
from mimoquant.mixing.forks import Lane, Probe, Probed, Trial, finals_of, mean_j, walk_forks
from mimoquant.mixing.kept_findings import keep_findings, kept_findings, made_of
from mimoquant.mixing.layer_options import CalibratedOptions, LayerOptions
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.needs import Forks
from mimoquant.mixing.served import MixtureRoundings
from mimoquant.model.layer_stream import portions
from mimoquant.model.served_rounding import NONE
from mimoquant.planning.plan import Plan
from mimoquant.quant.clamped import Clamped
from mimoquant.quant.stack import Engine
from mimoquant.run.clamped import Counts, as_groups, too_many
from mimoquant.run.objective import walked_back
from mimoquant.wording import clamped_notes

Progress = Callable[[str, int, int], None]  # what is walked, layers passed (0: it begins), layers


def sensitivity(
    mixtures: Mixtures,
    tokens: TokenSet,
    out: Path,
    *,
    budget_bytes: int | None = None,
    target_j: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    team: Team | None = None,
) -> SensitivityFindings:
    """Measure, choose, measure again, and write the recipe `out`.

    Args:
        tokens: to measure J on; others than the recipe calibrates on.
        budget_bytes: of the output's shards; without it and `target_j`, what the recipe itself takes.
        target_j: the least bytes that keep J below this are chosen.
        resume: take up what a killed run left beside `out`; where that is there, of the same request, nothing is done.
    Returns what was found; the same on every rank of `team`.
    Raises UsageError: nothing fits, data is shared, or `out` is of another request; CheckpointError: bad data;
    QualityError: the target was missed.
    """
    team, calibration = team or Team("cpu"), calibration_tokens(mixtures.plan.recipe.calibration, mixtures.plan.layout)
    budget = mixtures.plan.shard_bytes if budget_bytes is None and target_j is None else budget_bytes
    shared = _refuse(mixtures, tokens, calibration, budget)
    identity = _identity(mixtures, tokens, calibration, team)
    made = made_of(identity, budget, target_j)
    if resume and (finished := kept_findings(out, made, team)) is not None:
        return finished
    with (
        contextlib.closing(make_engine(team.device)) as engine,
        Snapshots.beside(out, identity, resume=resume, team=team) as snapshots,
    ):
        fisher = None
        if calibration and mixtures.plan.recipe.objective == "kl":
            with CheckpointReader(mixtures.plan.layout.index) as reader:
                fisher = walked_back(mixtures.plan, reader, calibration, snapshots.run.partial, team, progress)
        walks = Walks(mixtures, tokens, calibration, engine, team, snapshots, progress, fisher)
        facts, text = _found(walks, tokens, budget, target_j)
        facts["data"]["shared_with_calibration"] = shared
        if team.leads:
            keep_findings(out, facts, made, text)
        snapshots.finish(text)
    return facts


def _found(
    walks: Walks, tokens: TokenSet, budget: int | None, target_j: float | None
) -> tuple[SensitivityFindings, str]:
    """Facts and recipe."""
    mixtures, (ablation, probes) = walks.mixtures, walks.ablation()
    chooser = Chooser(mixtures, ablation, walks.measure)
    choice = chooser.within(budget) if budget is not None else chooser.below(float(target_j or 0))
    facts: SensitivityFindings = {
        **facts_of(mixtures, tokens, ablation, probes, budget_bytes=budget, target_j=target_j),
        "cost": SensitivityCost(
            walks=walks.told, forward_passes_bound=walks.geometry.layers / 2 + 3 + walks.roundings.apart
        ),
        "chosen": choice_facts(mixtures, ablation, choice, chooser.measured[choice]),
        "tried": [choice_facts(mixtures, ablation, *one) for one in chooser.measured.items()],
    }
    facts["notes"] = [*facts["notes"], *_lost(mixtures, choice, walks.clamped)]
    return facts, recipe_text(mixtures, choice, facts)


def _lost(mixtures: Mixtures, choice: Choice, clamped: dict[str, Counts]) -> list[str]:
    """What is told of groups that have no scale in the format that was chosen for them."""
    counts: Counts = {}
    wrong: list[str] = []
    for layer, option in mixtures.named(choice).items():
        of_format = clamped.get(option.label, {}) if option.fmt else {}
        here = {name: count for name, count in of_format.items() if name.startswith(f"model.layers.{layer}.")}
        wrong += filter(None, (too_many(name, Clamped(*numbers), option.label) for name, numbers in here.items()))
        counts |= here
    return [*clamped_notes(as_groups(counts)), *(f"quantize will stop: {text}" for text in wrong[:1])]


def _refuse(mixtures: Mixtures, tokens: TokenSet, calibration: TokenSet | None, budget: int | None) -> float | None:
    """Raise what can be before the walk; the share of `tokens` that is calibrated on, if anything is."""
    if len(tokens.ids) < 4:
        raise UsageError(f"{tokens.name}: {len(tokens.ids)} sequences; both halves need at least 2")
    shared = None
    if calibration is not None:
        shared = refuse_shared(CalibrationRecord.of(calibration), tokens, "the recipe")
    if budget is None:
        return shared
    least = mixtures.rest_bytes + sum(map(min, mixtures.bytes))
    kept = min(mixtures.size([k] * len(mixtures.layers)) for k, one in enumerate(mixtures.options) if one.fmt is None)
    if budget < least:
        raise UsageError(
            f"a budget of {budget / 2**30:.6g} GiB is below the {least / 2**30:.6g} of the smallest mixture"
        )
    if budget >= kept:
        raise UsageError(
            f"a budget of {budget / 2**30:.6g} GiB takes no quantization: with all experts kept the "
            f"checkpoint has {kept / 2**30:.6g}"
        )
    return shared


def _identity(mixtures: Mixtures, tokens: TokenSet, calibration: TokenSet | None, team: Team) -> dict[str, Any]:
    """What a run that is taken up must share with the one that began. Budget and target come after the measurement."""
    identity = mixtures.plan.identity() | {"config": mixtures.plan.layout.config}
    if team.leads:  # other ranks may read copies of the source with times of their own
        identity["source"] = mixtures.plan.layout.index.stamps()
    if calibration:
        identity["calibration tokens"] = calibration.sha256
    return identity | {
        "formats": ", ".join(fmt.label for fmt in mixtures.formats),
        "tokens a sequence": str(tokens.ids.shape[1]),
        "tokens": tokens.sha256,
        "rounding": mixtures.served.told,
        "kind of device": team.device.partition(":")[0],
        "processes": str(team.size),
    }


def forks_of(mixtures: Mixtures, tokens: TokenSet, team: Team) -> Forks:
    """What the run is, for `fork_needs`."""
    count = 2 * len(portions(torch.empty(-(-len(tokens.ids) // 2), tokens.ids.shape[1], device="meta")))
    served = mixtures.served
    formats, share = len(probed_of(mixtures)), -(-count // team.size) / count
    more = served.beside.anything or served.reference.anything
    return Forks(mixtures.plan, formats, tokens.ids.size, share, team.size, served=more)


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
        j = self._walk("ablation", self.mixtures.plan, lanes)
        told = self.team.gather([[vars(probe) for probe in lane.probes] for lane in lanes])
        probes = [[Probe(**one) for one in of_lane] for of_lane in self._in_order(told)]
        by_layer = list(map(list, zip(*filter(None, probes), strict=True)))
        ratio = np.array(
            [[_ratio(of_layer, option.label, first) for option in self.mixtures.options] for of_layer in by_layer]
        )
        end = 2 + len(self.mixtures.layers)
        none = (j[0][end], j[1][end]) if self.roundings.apart else None
        return Ablation((j[0][1], j[1][1]), j[0][2:end], j[1][2:end], ratio, none), by_layer

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
        self.progress(name.partition("-")[0], 0, self.geometry.layers)
        with CheckpointReader(plan.layout.index) as reader:
            source = self._options(plan, reader)
            begun = self.snapshots.load(name, self.geometry.layers) if self.snapshots else None
            first = self._taken_up(source, lanes, *begun) if begun else self._begun(source, lanes)
            walk_forks(source, lanes, first=first, after_layer=lambda layer: self._save(name, layer, source, lanes))
            norm, head = (source.source.tensor(key) for key in ("model.norm.weight", "lm_head.weight"))
            self.references = self.references or [finals_of(lane, 0, norm) for lane in lanes]
            mine = [mean_j(lane, reference, norm, head) for lane, reference in zip(lanes, self.references, strict=True)]
            for of_rank in self.team.gather(source.clamped):
                for label, counts in of_rank.items():
                    self.clamped[label] = self.clamped.get(label, {}) | counts
            passed = sum(self.team.gather(sum(lane.passed for lane in lanes))) / self.tokens
            layers = self.geometry.layers
            self.told.append(
                WalkCost(
                    walk=name,
                    forward_passes=passed / layers,
                    bytes_read=reader.bytes_read,
                    layers_walked=layers - first,
                )
            )
        ordered = self._in_order(self.team.gather(mine))
        of_first, of_second = (
            np.concatenate(
                [np.array(j) for (half, _), j in zip(self.every, ordered, strict=True) if half == wanted], axis=1
            )
            for wanted in (0, 1)
        )
        return of_first, of_second

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
