"""`plan`, `quantize` and `relayout`: the plan in chunks that fit the machine, or why none does; then its run."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mimoquant import pipeline
from mimoquant.assembly.choices import PlanChoice
from mimoquant.calibration.records import notes
from mimoquant.checkpoint.folders import is_there, read_inside
from mimoquant.checkpoint.index import read_json_inside
from mimoquant.checkpoint.remote import revision_of
from mimoquant.errors import MimoquantError, UsageError
from mimoquant.machine import memory
from mimoquant.machine.devices import resolve_device
from mimoquant.machine.memory import Machine
from mimoquant.machine.timeline import Timeline
from mimoquant.mixing.needs import sensitivity_facts
from mimoquant.model.releases import is_revision
from mimoquant.output.documents import Bound, QuantizeDocument
from mimoquant.planning.facts import plan_facts, relayout_facts
from mimoquant.planning.needs import fitting_plan, refusal
from mimoquant.planning.plan import CPU_CHUNK_BYTES, Plan, make_plan
from mimoquant.planning.recipe import MAX_RECIPE_BYTES, load_recipe, parse_recipe
from mimoquant.planning.relayout import RECORD_NAME, make_relayout
from mimoquant.serving.check import planned_facts
from mimoquant.serving.served import planned

if TYPE_CHECKING:
    from collections.abc import Callable

    from mimoquant.machine.team import Team
    from mimoquant.planning.documents import PlanDocument, RelayoutDocument


def source_on_hub(out: Path) -> str | None:
    """hf://ORG/NAME@COMMIT that an output was made from, where its own record says so."""
    with contextlib.suppress(MimoquantError, UnicodeDecodeError):
        if is_there(out, RECORD_NAME):
            read = read_json_inside(out, RECORD_NAME, max_bytes=MAX_RECIPE_BYTES).get("source_revision")
        else:
            text = read_inside(out, "recipe.yaml", MAX_RECIPE_BYTES).decode()
            read = parse_recipe(text, "recipe").output.source_revision
        if isinstance(read, str) and is_revision(read):
            return f"hf://{read}"
    return None


def fitted_plan(source: Path | str, choice: PlanChoice, device: str, has: Machine, ranks: int = 1) -> Plan:
    """The plan in chunks that fit a machine."""
    recipe = load_recipe(choice.recipe).calibrated_on(choice.calibration.changes())
    recipe = recipe.stored_as(choice.output.changes() | {"source_revision": revision_of(source)})

    def make(chunk_bytes: int) -> Plan:
        return make_plan(
            source,
            recipe,
            container=choice.container,
            allow_unknown=choice.allow_unknown,
            chunk_bytes=chunk_bytes,
        )

    if recipe.calibration is None and device == "cpu":
        return make(CPU_CHUNK_BYTES)
    return fitting_plan(make, device, has, ranks)


def plan_document(
    source: Path | str,
    choice: PlanChoice,
    *,
    device: str,
    gpu_memory: float | None,
    folder: Path | None,
    measure: bool,
) -> PlanDocument:
    """`plan`. `folder`: on whose disk to look for room. `measure`: rehearse, to tell the time."""
    device = resolve_device(device)
    has = memory.machine(device, gpu_memory)
    made = fitted_plan(source, choice, device, has)
    took = None
    if measure:
        from mimoquant.run.rehearsal import rehearse

        took = rehearse(made, device, folder)
    facts = plan_facts(
        made,
        device,
        has,
        engines=planned_facts(planned(made)),
        sensitivity=sensitivity_facts(made, device),
        took=took,
        folder=folder,
    )
    with contextlib.suppress(UsageError):  # what is not there is told when it is read
        facts["notes"] = [*facts["notes"], *data_notes(made)]
    return facts


def data_notes(plan: Plan) -> list[str]:
    """What of the data that a plan calibrates on is not read, in sentences."""
    return notes(plan.recipe.calibration.data) if plan.recipe.calibration else []


class QuantizeRun:
    """A quantize run that is put together and not begun. Its plan may be looked at before it is executed.
    `engines`: what they will make of its output."""

    def __init__(
        self,
        source: Path | str,
        choice: PlanChoice,
        out: Path | str,
        team: Team,
        *,
        gpu_memory: float | None = None,
        resume: bool = False,
    ) -> None:
        """Raises UsageError, RecipeError, CheckpointError: the plan cannot be made, or does not fit the machine."""
        self._begin, self.out, self.team, self.resume = time.monotonic(), out, team, resume
        has = memory.machine(team.device, gpu_memory)
        has = replace(has, gpu_bytes=min(team.gather(has.gpu_bytes)))  # chunks must be the same everywhere
        self.plan = fitted_plan(source, choice, team.device, has, team.size)
        for refused in (self.plan.json_refusal, refusal(self.plan, team.device, has, team.size)):
            if refused:
                raise refused
        self.engines = planned_facts(planned(self.plan))
        self.timeline = Timeline()

    def execute(
        self,
        progress: pipeline.Progress | None = None,
        walked: pipeline.Walked | None = None,
        note: Callable[[str], None] | None = None,
    ) -> QuantizeDocument:
        """Write `out`; see `pipeline.execute`. The same on every rank of the team, but for times."""
        finished = _Told(note)
        report = pipeline.quantize(
            self.plan,
            self.out,
            resume=self.resume,
            team=self.team,
            timeline=self.timeline,
            progress=progress,
            tells=pipeline.Tells(walked, finished),
        )
        what, share = self.timeline.bound
        return {
            **report,
            "out": str(self.out),
            "elapsed_s": round(time.monotonic() - self._begin, 3),
            "bound_by": Bound(what=what, share=share),
            "engines": self.engines,
            "found_finished": finished.anything,
        }


class _Told:
    """A note, and whether there was one: of a run that finds its output finished."""

    def __init__(self, note: Callable[[str], None] | None) -> None:
        self.note, self.anything = note, False

    def __call__(self, text: str) -> None:
        self.anything = True
        if self.note:
            self.note(text)


class RelayoutRun:
    """A relayout that is put together and not begun. `engines`: what they will make of its output."""

    def __init__(
        self,
        source: Path | str,
        out: Path | str,
        *,
        qkv: str,
        tp: int | None = None,
        bf16: bool = False,
        resume: bool = False,
        allow_unknown: bool = False,
        base_model: str | None = None,
    ) -> None:
        """Raises UsageError: nothing would change, or not exactly. CheckpointError: the source."""
        self._begin, self.out, self.resume = time.monotonic(), out, resume
        self.plan = make_relayout(
            source,
            qkv,
            tp=tp,
            bf16=bf16,
            allow_unknown=allow_unknown,
            base_model=base_model,
            source_revision=revision_of(source),
        )
        self.engines = planned_facts(planned(self.plan))

    def execute(
        self, progress: pipeline.Progress | None = None, note: Callable[[str], None] | None = None
    ) -> RelayoutDocument:
        """Write `out`; see `pipeline.execute`."""
        told = _Told(note)
        tells = pipeline.Tells(note=told)
        finished = pipeline.execute(
            self.plan, self.out, device="cpu", resume=self.resume, progress=progress, tells=tells
        )
        elapsed_s = round(time.monotonic() - self._begin, 3)
        return relayout_facts(
            self.plan, finished, self.engines, out=self.out, elapsed_s=elapsed_s, found_finished=told.anything
        )
