"""The values of an output, unit by unit, against those of its source: the half of `verify` that takes long.

Key idea: nothing of a unit depends on another, so units may be looked at side by side; what was found comes back whole.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.checkpoint.journal import JournalLine
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry
from mimoquant.errors import QualityError
from mimoquant.model.layout import PROJECTIONS, norm_name, router_name
from mimoquant.output.lost_groups import settled, told_otherwise
from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts, Unit
from mimoquant.quant.clamped import clamped
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.stack import Audit
from mimoquant.run.clamped import Counts, named
from mimoquant.run.steps import kind_of
from mimoquant.run.workshop import Workshop
from mimoquant.weights.stored import read_experts, read_parts

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Sides:
    """What is held against one another: the plan with a reader of its source, and one of the output with its journal
    (by unit)."""

    plan: Plan
    ours: CheckpointReader
    theirs: CheckpointReader
    journal: dict[str, JournalLine]
    engine: CpuEngine
    stopped: threading.Event = field(default_factory=threading.Event)
    """Once it is set, no further step is looked at, and what is found is of no use."""


@dataclass
class Found:
    """What was seen of a unit; `audits`: of each quantized tensor, by name."""

    problems: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    clamped: Counts = field(default_factory=dict)
    audits: list[tuple[str, Audit]] = field(default_factory=list)


def check_unit(sides: Sides, unit: Unit) -> Found:
    """Compare the values of a unit, step by step."""
    values = _Values(sides, unit.layer)
    values.check(unit)
    return values.found


class _Values:
    """What a kind of step needs for its check (`run.steps.Proof`)."""

    def __init__(self, sides: Sides, layer: int | None) -> None:
        self.plan, self.ours, self.theirs, self.engine = sides.plan, sides.ours, sides.theirs, sides.engine
        self.journal, self.found, self.layer, self.stopped = sides.journal, Found(), layer, sides.stopped
        self.shop = Workshop(self.plan, self.ours, self.engine)
        self.fold = self._norm_fold(layer) if layer is not None and layer in self.plan.formats else None

    def check(self, unit: Unit) -> None:
        steps = [step for step in unit.steps if all(map(self._readable, step.entries))]  # headers tell of the others
        for step in steps:
            if self.stopped.is_set():
                return
            try:
                kind_of(step).check(step, self)
            except QualityError as error:  # more groups without a scale than quantize lets pass
                self.problem(str(error))
        counted = self.found.clamped = self.shop.counted()
        if (line := self.journal.get(unit.name)) and len(steps) == len(unit.steps):
            self.found.problems += told_otherwise(line, counted)

    def problem(self, text: str) -> None:
        self.found.problems.append(text)

    def count(self, what: str, number: int = 1) -> None:
        self.found.checked[what] += number

    def record(self, layer: int) -> Mapping[str, Any] | None:
        line = self.journal.get(f"layer {layer}")
        return line.facts if line else None

    def is_stored(self, name: str, expected: Array, begin: int = 0) -> bool:
        wanted = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
        found = np.empty(wanted.nbytes, np.uint8)
        self.theirs.read_range(self.theirs.index.tensors[name], begin, found)
        return np.array_equal(found, wanted)

    def _readable(self, entry: Entry) -> bool:
        info = self.theirs.index.tensors.get(entry.name)
        return info is not None and (info.dtype, info.shape) == (entry.dtype, entry.shape)

    def _read(self, name: str) -> Array:
        return self.theirs.read(name)

    def _norm_fold(self, layer: int) -> Array | None:
        """What AWQ divided the layer's norm by, where the recipe lets it."""
        if not self.plan.recipe.folds_norm(layer):
            return None
        from mimoquant.output.verify_calibrated import norm_fold

        name, real = norm_name(layer), self.plan.recipe.real_fold
        found = norm_fold(self.ours.read(name), self._read(name), self.ours.index.tensors[name].dtype, real=real)
        if found is None:
            kind = "factors of at most 4096" if real else "powers of two"
            self.problem(f"{name}: is not the source's, nor that by {kind}")
        return found

    def folded(self, info: TensorInfo) -> bool:
        layer = self.layer
        if self.fold is None or layer is None or info.name not in (norm_name(layer), router_name(layer)):
            return False
        from mimoquant.output.verify_calibrated import misscaled

        self.count("folded tensors")
        if info.name == router_name(layer):
            columns = misscaled(self.ours.read(info.name), self._read(info.name), info.dtype, self.fold)
            if columns:
                self.problem(
                    f"{info.name}: does not make up for what {norm_name(layer)} was divided by, "
                    f"in {columns} of {len(self.fold)} columns"
                )
        return True

    def audit(self, step: Experts) -> None:
        """Judge each quantized weight of a chunk by its source value."""
        assert step.fmt is not None
        layer, begin, end = step.layer, step.begin, step.end
        stacks = read_experts(self.ours, self.plan.layout, layer, begin, end, as_codes=step.as_codes)
        names = (entry.name for entry in step.entries)
        geometry, container = self.plan.layout.geometry, self.plan.container
        stored = read_parts(self.theirs, names, step.end - step.begin, step.fmt, container, geometry)
        limits: dict[tuple[str, int], float] = {}
        if self.plan.recipe.calibrated:
            from mimoquant.output.verify_calibrated import audits, error_limits

            recipe, kernels = self.plan.recipe, self.engine
            judged, ranges = audits(stored, stacks, step.fmt, recipe, self.fold, layer=layer, kernels=kernels)
            limits = error_limits(judged, stacks, step.fmt, self.engine)
            found = settled(ranges, partial(self._told_lost, step))
        elif self.plan.recipe.casts:
            judged, found = {p: self.engine.audit_cast(stacks[p], step.fmt, stored[p]) for p in PROJECTIONS}, {}
        else:
            search = self.plan.recipe.scale_search
            judged = {p: self.engine.audit(stacks[p], step.fmt, search, stored[p]) for p in PROJECTIONS}
            found = {p: clamped(stacks[p], stored[p], step.fmt) for p in PROJECTIONS}
        for projection in PROJECTIONS:
            for position, audit in enumerate(judged[projection]):
                name = self.plan.layout.expert(step.layer, step.begin + position, projection).name
                self._judge(name, audit, limits.get((projection, position)))
        if step.fmt.name == "nvfp4":
            unshared = np.flatnonzero(stored["gate"]["global_scale"] != stored["up"]["global_scale"])
            for number in unshared.tolist():
                name = self.plan.layout.expert(step.layer, step.begin + number, "gate").name
                self.problem(f"{name}: gate and up have different global scales, engines use one")
        if step.fmt.pow2_global:
            self._pow2(step, stored)
        self.shop.count(named(self.plan.layout, layer, begin, found), step)  # last, for it may stop

    def _told_lost(self, step: Experts, projection: str, expert: int) -> list[int] | None:
        """What the journal tells of the groups without a scale of one of a chunk's weights."""
        line = self.journal.get(f"layer {step.layer}")
        name = self.plan.layout.expert(step.layer, step.begin + expert, projection).name
        return (line.clamped or {}).get(name) if line else None

    def _pow2(self, step: Experts, stored: dict[str, dict[str, Array]]) -> None:
        """Global scales that are another number than quantize writes, be it by one bit."""
        for projection in PROJECTIONS:
            mantissa = stored[projection]["global_scale"].ravel().view(np.uint32) & 0x7FFFFF
            for number in np.flatnonzero(mantissa).tolist():
                name = self.plan.layout.expert(step.layer, step.begin + number, projection).name
                self.problem(f"{name}: its weight_scale_2 is no power of two")

    def _judge(self, name: str, audit: Audit, limit: float | None) -> None:
        self.count("quantized tensors")
        self.found.audits.append((name, audit))
        if not audit.scales_ok:
            self.problem(f"{name}: has scales that are zero, not finite, or negative where they may not be")
        elif limit is not None and not audit.relative_error <= limit:
            self.problem(
                f"{name}: its values are far from the source's, relMSE {audit.relative_error:.3g} "
                f"against at most {limit:.3g}"
            )
        elif audit.outside and self.plan.recipe.casts:
            self.problem(f"{name}: {audit.outside} blocks of 16 do not have the source's values")
        elif audit.outside and self.plan.recipe.calibrated:
            least = "at least " if self.plan.recipe.real_fold else ""  # one a channel
            self.problem(f"{name}: {least}{audit.outside} codes are not the nearest on their scale")
        elif audit.outside:
            self.problem(
                f"{name}: {audit.outside} values lie outside the rounding interval of their code, "
                f"the worst at {audit.worst:.3g} half steps"
            )
