"""`sensitivity`: what a layer can become, held-out tokens, whether the forks fit, the walks, the recipe's engines."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mimoquant.assembly.choices import EvaluationChoice, LimitChoice, MixtureChoice, RoundingChoice, Watcher
from mimoquant.assembly.evaluations import asked_by_name, held_out_tokens
from mimoquant.assembly.files import check_new
from mimoquant.errors import UsageError
from mimoquant.machine import memory
from mimoquant.mixing.kept_findings import findings_path
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.needs import foreseen, fork_refusal
from mimoquant.mixing.run import quick_sensitivity, sensitivity
from mimoquant.mixing.served import ServedOptions
from mimoquant.mixing.walks import forks_of
from mimoquant.model.rounding import rounds_cache
from mimoquant.model.served_rounding import NONE, NOTHING, Rounding
from mimoquant.planning.plan import CHUNK_BYTES, CUDA_CHUNK_BYTES, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving.as_served import as_served, parse_place
from mimoquant.serving.check import planned_facts
from mimoquant.serving.served import planned, read_served
from mimoquant.weights.container import COMPRESSED_TENSORS

if TYPE_CHECKING:
    from mimoquant.machine.team import Team
    from mimoquant.mixing.documents import SensitivityDocument
    from mimoquant.planning.documents import EngineCheck


def check_recipe_file(out: Path) -> None:
    """Raises UsageError where a recipe could not be read again under this name."""
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {out}: a recipe file ends in .yaml")


def choose_mixture(
    source: Path,
    out: Path,
    mixture: MixtureChoice,
    choice: EvaluationChoice,
    limit: LimitChoice,
    team: Team,
    *,
    resume: bool,
    watcher: Watcher,
) -> SensitivityDocument:
    """Measure, choose, write the recipe `out` and its findings. The same on every rank, but for times: `mixing.run`."""
    begin = time.monotonic()
    check_recipe_file(out)
    if limit.quick and limit.target_kl is not None:
        raise UsageError(
            f"--quick predicts what layers cost and measures no J, so J of {limit.target_kl:g} cannot be kept",
            hint="give --budget-gib, or leave --quick out",
        )
    there = resume and team.gather(out.is_file())[0]  # a recipe, which may be the one that is wanted
    if team.leads and not there:
        check_new(out, (source,))
        if not resume:
            check_new(findings_path(out), (source,))
    mixtures = mixtures_of(source, mixture, team.device)
    mixtures.served = served_options(mixtures, choice.rounding)
    if limit.quick and mixtures.served.anything:
        raise UsageError(
            f"--quick predicts what weights cost, and {mixtures.served.told} would be rounded beside them",
            hint="leave --quick out: then J is measured as it is served",
        )
    vocab = mixtures.plan.layout.geometry.vocab
    tokens = held_out_tokens(source, choice, vocab, watcher)
    forks = forks_of(mixtures, tokens, team, quick=limit.quick)
    if not there:
        if refused := fork_refusal(forks, len(tokens.ids), team.device, memory.machine(team.device)):
            raise refused
        for note in [*mixtures.dropped, foreseen(forks, team.device)]:
            watcher.note(note)
    how = quick_sensitivity if limit.quick else partial(sensitivity, target_j=limit.target_kl)
    found = how(
        mixtures,
        tokens,
        out,
        budget_bytes=limit.budget_bytes,
        resume=resume,
        team=team,
        progress=watcher.progress,
    )
    if there:
        watcher.note(f"{out}: is finished already, of the same source, data and limit; nothing is left to do")
    return {
        **found,
        "out": str(out),
        "elapsed_s": round(time.monotonic() - begin, 3),
        "engines": _engines(source, out, mixture.allow_unknown) if team.leads else [],
    }


def served_options(mixtures: Mixtures, choice: RoundingChoice) -> ServedOptions:
    """What is rounded of each option, and of the source where it is rounded too.

    Raises UsageError: options contradict each other, or it is not known what runs an option there.
    """
    by_name = asked_by_name(choice)
    if not choice.as_served:
        inputs = {option.label: by_name.experts if option.fmt else NONE for option in mixtures.options}
        return ServedOptions(inputs, replace(by_name, experts=NONE), by_name if choice.reference else NOTHING)
    place, layout = parse_place(choice.as_served), mixtures.plan.layout
    cache, count = rounds_cache(layout), len(mixtures.layers)
    kinds: dict[str, str] = {}
    known: dict[str, None] = {}
    beside = NOTHING
    for number, option in reversed(list(enumerate(mixtures.options))):  # a plan must quantize something, so one layer
        made = planned(mixtures.planned([0] + [number] * (count - 1)))
        beside, told = as_served(made, *place, cache=cache)
        kinds[option.label] = beside.of_experts(mixtures.layers[1])
        known |= dict.fromkeys(told)
    inputs = {option.label: kinds[option.label] for option in mixtures.options}
    of_source = as_served(read_served(layout.index.folder), *place, cache=cache)[0] if choice.reference else NOTHING
    return ServedOptions(inputs, Rounding(NONE, beside.dense, beside.cache), of_source, tuple(known))


def mixtures_of(source: Path, mixture: MixtureChoice, device: str) -> Mixtures:
    """What each layer can become. One container holds all formats; it is the default for them."""
    chunk_bytes = CUDA_CHUNK_BYTES if device.startswith("cuda") else CHUNK_BYTES
    recipe = load_recipe(mixture.recipe)
    made = make_plan(
        source,
        recipe.rounded_for(mixture.objective) if mixture.objective else recipe,
        container=mixture.container or (COMPRESSED_TENSORS if mixture.any_format else None),
        allow_unknown=mixture.allow_unknown,
        chunk_bytes=chunk_bytes,
    )
    return Mixtures(made, chunk_bytes, fp8=mixture.fp8, any_format=mixture.any_format)


def _engines(source: Path, out: Path, allow_unknown: bool) -> list[EngineCheck]:
    """What engines would make of the recipe's output, for not all load layers of several formats."""
    return planned_facts(planned(make_plan(source, load_recipe(str(out)), allow_unknown=allow_unknown)))
