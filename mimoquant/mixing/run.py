"""`sensitivity`: what each layer's quantization costs in J, and a recipe that spends bytes where they buy most.

Key idea: one walk carries the clean model, the one with all layers quantized, and a fork of either at each layer: the
clean one with only that layer quantized, on half of the sequences, and the quantized one with only that layer restored,
on the other half. That is L/2 + 2 forward passes, and each byte of the checkpoint is read once. `attribution` makes of
it what each option of each layer is predicted to cost, `knapsack` chooses exactly. Layers do not quite add up, so the
choice is measured end to end, which is another pass and read; where prediction and measurement differ beyond their
interval, or one format everywhere is predicted to be about as good, up to two rounds measure such neighbours, too.

All of them can be walked as they are served, activations and cache rounded (`Mixtures.served`). With `quick` there are
no forks, and nothing is measured: `felt` predicts what each option of each layer costs, from a walk back over the same
sequences and one walk forward.

Left out: `eval-kl`'s details. The sequences here choose, so J of the chosen recipe should be told on other ones.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimoquant.calibration.tokens import CalibrationRecord, TokenSet, calibration_tokens, refuse_media
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import UsageError
from mimoquant.evaluation.held_out import refuse_shared
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.fisher.matrices import Fisher
from mimoquant.machine.devices import make_engine
from mimoquant.machine.team import Team
from mimoquant.mixing.choose import Choice, Chooser, best_within
from mimoquant.mixing.documents import SensitivityCost, SensitivityFindings
from mimoquant.mixing.facts import choice_facts, facts_of, recipe_text
from mimoquant.mixing.kept_findings import keep_findings, kept_findings, made_of
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.walks import Progress, Walks, walked
from mimoquant.quant.clamped import Clamped
from mimoquant.run.clamped import Counts, as_groups, too_many
from mimoquant.run.objective import walked_back
from mimoquant.wording import clamped_notes


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
    budget = mixtures.plan.shard_bytes if budget_bytes is None and target_j is None else budget_bytes
    return _run(_Request(mixtures, tokens, out, budget, target_j), resume, progress, team or Team("cpu"))


def quick_sensitivity(
    mixtures: Mixtures,
    tokens: TokenSet,
    out: Path,
    *,
    budget_bytes: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    team: Team | None = None,
) -> SensitivityFindings:
    """Predict what layers cost by the Fisher matrix and the routers, choose by that, and write the recipe `out`;
    nothing is measured. Arguments, result and errors as of `sensitivity`."""
    budget = mixtures.plan.shard_bytes if budget_bytes is None else budget_bytes
    return _run(_Request(mixtures, tokens, out, budget, quick=True), resume, progress, team or Team("cpu"))


@dataclass(frozen=True)
class _Request:
    """What is asked for; one of `budget` (bytes) and `target_j` is there."""

    mixtures: Mixtures
    tokens: TokenSet
    out: Path
    budget: int | None
    target_j: float | None = None
    quick: bool = False


def _run(asked: _Request, resume: bool, progress: Progress | None, team: Team) -> SensitivityFindings:
    mixtures, tokens, out, budget, quick = asked.mixtures, asked.tokens, asked.out, asked.budget, asked.quick
    calibration = calibration_tokens(mixtures.plan.recipe.calibration, mixtures.plan.layout)
    shared = _refuse(mixtures, tokens, calibration, budget)
    identity = _identity(mixtures, tokens, calibration, team) | {"costs": "fisher" if quick else "forks"}
    made = made_of(identity, budget, asked.target_j)
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
        if quick:
            assert budget is not None
            facts, text = _felt(walks, tokens, budget, walked(walks, tokens, snapshots.run.partial / "felt"))
        else:
            facts, text = _found(walks, tokens, budget, asked.target_j)
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


def _felt(walks: Walks, tokens: TokenSet, budget: int, fisher: Fisher) -> tuple[SensitivityFindings, str]:
    """Facts and recipe, without forks."""
    mixtures, (costs, probes) = walks.mixtures, walks.felt(fisher)
    choice = best_within(mixtures, costs.costs(), budget)
    facts: SensitivityFindings = {
        **facts_of(mixtures, tokens, costs, probes, budget_bytes=budget, target_j=None),
        "cost": SensitivityCost(walks=walks.told),
        "chosen": choice_facts(mixtures, costs, choice),
        "tried": [],
    }
    facts["notes"] = [*facts["notes"], *_lost(mixtures, choice, walks.clamped)]
    return facts, recipe_text(mixtures, choice, facts)


def _refuse(mixtures: Mixtures, tokens: TokenSet, calibration: TokenSet | None, budget: int | None) -> float | None:
    """Raise what can be before the walk; the share of `tokens` that is calibrated on, if anything is."""
    refuse_media(tokens, "sensitivity")
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
