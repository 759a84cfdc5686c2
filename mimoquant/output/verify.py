"""Proof that an output is what its recipe says: every file, every tensor, every value.

Key idea: the plan is made anew from the source's headers and OUT/recipe.yaml (of a relayout: relayout.json), and OUT is
held against it. Files: names, sizes, sha256 of the journal. Headers: exactly the planned tensors. Values: copied bytes
are equal, dequantized tensors are computed again from the source, and each quantized weight's source value lies in the
rounding interval of its code. That interval is computed apart from the encoder, so an encoder's mistake shows.

Problems are collected, not thrown: a report of all that is wrong beats the first thing that is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.checkpoint.folders import is_there, resolve_inside, sha256_inside
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME, is_unfinished, list_files
from mimoquant.checkpoint.index import CheckpointIndex, TensorInfo, open_index
from mimoquant.checkpoint.journal import JOURNAL_NAME, JournalLine, hashing_pool, read_journal
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry
from mimoquant.errors import CheckpointError, MimoquantError, QualityError, UsageError
from mimoquant.model.layout import PROJECTIONS, norm_name, router_name
from mimoquant.output.documents import VerifyDocument
from mimoquant.output.lost_groups import settled, told_otherwise
from mimoquant.output.published import is_dangling_index, may_be_edited, only_template_differs
from mimoquant.output.small_files import is_as_written, written_texts
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.planning.relayout import RECORD_NAME, plan_again
from mimoquant.planning.units import Experts, Unit
from mimoquant.quant.clamped import clamped
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.stack import Audit
from mimoquant.run.clamped import Counts, as_groups, named
from mimoquant.run.steps import kind_of
from mimoquant.run.workshop import Workshop
from mimoquant.weights.stored import read_experts, read_parts

Array = npt.NDArray[Any]


@dataclass
class VerifyReport:
    """What was checked and what is wrong, while it is being found; see `VerifyDocument` for the fields."""

    ok: bool = True
    problems: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    bytes_checked: int = 0
    worst_rounding: float = 0.0
    worst_rounding_tensor: str | None = None
    worst_relative_error: float = 0.0
    worst_relative_error_tensor: str | None = None
    mean_relative_error: float = 0.0
    unproven: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    out: str = ""

    clamped: Counts = field(default_factory=dict)

    def problem(self, text: str) -> None:
        self.ok = False
        self.problems.append(text)

    def problems_of(self, texts: list[str]) -> None:
        for text in texts:
            self.problem(text)

    def as_json(self) -> VerifyDocument:
        document = VerifyDocument(
            schema_version=SCHEMA_VERSION,
            out=self.out,
            ok=self.ok,
            problems=self.problems,
            checked=dict(self.checked),
            bytes_checked=self.bytes_checked,
            worst_rounding=self.worst_rounding,
            worst_rounding_tensor=self.worst_rounding_tensor,
            worst_relative_error=self.worst_relative_error,
            worst_relative_error_tensor=self.worst_relative_error_tensor,
            mean_relative_error=self.mean_relative_error,
            unproven=self.unproven,
            set_aside=self.set_aside,
        )
        if self.clamped:
            document["clamped_groups"] = as_groups(self.clamped)
        return document


def verify(
    out: Path | str, source: Path | str, *, progress: Callable[[str, int, int], None] | None = None
) -> VerifyReport:
    """Check a written checkpoint against its source; both are only read.

    Args:
        progress: called with (what is done, how many are done, how many there are), files first, then their values.
    Raises UsageError where `out` is no output of this program, CheckpointError where the source itself is bad.
    """
    out, report = Path(out), VerifyReport(out=str(out))
    plan = plan_again(out, source) if is_there(out, RECORD_NAME) else _planned_by_recipe(out, source)
    if plan.recipe.calibrated:
        from mimoquant.output.verify_calibrated import unproven

        report.unproven = unproven(plan.recipe, plan.formats)
    tell = progress or (lambda name, done, total: None)
    journal = _check_files(out, plan, report, tell)
    try:
        index = open_index(out)
    except MimoquantError as error:
        report.problem(str(error))
        return report
    _check_headers(index, plan, report)
    _hear_libraries(index, plan, report)
    engine = CpuEngine()
    try:
        with CheckpointReader(plan.layout.index) as ours, CheckpointReader(index) as theirs:
            check = _Values(plan, ours, theirs, engine, report, journal)
            for number, unit in enumerate(plan.units, start=1):
                check.unit(unit)
                tell(f"values of {unit.name}", number, len(plan.units))
            report.bytes_checked = theirs.bytes_read
    finally:
        engine.close()
    return report


def _planned_by_recipe(out: Path, source: Path | str) -> Plan:
    if not is_there(out, "recipe.yaml"):
        raise UsageError(
            f"{out}: has no recipe.yaml, so it is not a finished output of mimoquant quantize",
            hint="of what others wrote, verify --engine and eval-kl tell",
        )
    resolve_inside(out, "recipe.yaml")
    recipe = load_recipe(str(out / "recipe.yaml"))
    plan = make_plan(source, recipe, allow_unknown=True)
    before, now = recipe.provenance.get("source_headers_sha256"), plan.layout.index.headers_fingerprint()
    if before != now:
        raise CheckpointError(
            f"{out}: was not made from {source}: the headers of its source had sha256 {str(before)[:12]}..., "
            f"here they have {now[:12]}...",
            hint="give the very files that quantize read",
        )
    return plan


def _check_files(
    out: Path, plan: Plan, report: VerifyReport, tell: Callable[[str, int, int], None]
) -> dict[str, JournalLine]:
    """Shards against plan and journal, small files as they are written anew, nothing else. The journal, by unit."""
    try:
        journal = {line.file: line for line in read_journal(resolve_inside(out, JOURNAL_NAME))}
    except (CheckpointError, OSError) as error:
        report.problem(str(error))
        journal = {}
    planned = {unit.file: unit for unit in plan.units}
    present = {path.name for path in out.iterdir() if path.suffix == ".safetensors"}
    for file in sorted(present - planned.keys()):
        report.problem(f"{file}: is an extra weights file")
    with hashing_pool() as pool:
        found = pool.map(lambda unit: _wrong_shard(out, unit, journal.get(unit.file)), planned.values())
        for number, (unit, wrong) in enumerate(zip(plan.units, found, strict=True), start=1):
            tell(f"hash of {unit.file}", number, len(planned))
            report.problems_of([wrong] if wrong else [])
    report.checked["files"] += len(planned)
    lines, record = {line.unit: line for line in journal.values()}, plan.recipe.provenance.get("calibration")
    texts = written_texts(plan, lines, record) if len(journal) == len(planned) else {}
    for name in [*plan.side_files, *texts]:
        _check_small_file(out, name, plan, texts.get(name), report)
        report.checked["files"] += 1
    expected = {*planned, *plan.side_files, *texts, JOURNAL_NAME, *_check_fingerprints(out, record, report)}
    if texts:
        _check_extras(out, {*expected, *present, "report.html"}, report)
    return lines


def _wrong_shard(out: Path, unit: Unit, line: JournalLine | None) -> str | None:
    """What is wrong with a shard as a file."""
    if not is_there(out, unit.file):
        return f"{unit.file}: is missing"
    try:
        size, sha256 = resolve_inside(out, unit.file).stat().st_size, None
        if size == unit.size_bytes and line is not None:
            sha256 = sha256_inside(out, unit.file)
    except CheckpointError as error:
        return str(error)
    if size != unit.size_bytes:
        return f"{unit.file}: has {size} bytes, planned are {unit.size_bytes}"
    if line is None or sha256 is None:
        return f"{unit.file}: is not in the journal"
    return (
        None
        if sha256 == line.sha256
        else (f"{unit.file}: sha256 is {sha256[:12]}..., the journal has {line.sha256[:12]}...")
    )


def _check_small_file(out: Path, name: str, plan: Plan, written: bytes | None, report: VerifyReport) -> None:
    """Against what quantize writes (`written`) or the source has; what was edited for publishing is told of."""
    source = plan.layout.index.folder
    if not is_there(out, name):
        report.problem(f"{name}: is missing")
        return
    try:
        if name in plan.mended:
            mended = hashlib.sha256(plan.mended[name]).hexdigest()
            wrong = "is not what --mend-json makes of the source's" if sha256_inside(out, name) != mended else None
        elif written is None:
            wrong = "differs from the source's" if sha256_inside(out, name) != sha256_inside(source, name) else None
        else:
            wrong = None if is_as_written(out, name, written) else "is not what the recipe makes of this source"
    except CheckpointError as error:
        report.problem(str(error))
        return
    if wrong and may_be_edited(name):
        report.set_aside.append(f"{name}: edited, not part of the proof")
    elif wrong and written is None and name not in plan.mended and only_template_differs(name, out, source):
        report.set_aside.append(f"{name}: its chat_template was edited, which is not part of the proof")
    elif wrong:
        report.problem(f"{name}: {wrong}")


def _check_extras(out: Path, expected: set[str], report: VerifyReport) -> None:
    """Files that nobody planned. What the Hub and git add is hidden, and no part of a checkpoint."""
    try:
        files, other_forms = list_files(out)
    except CheckpointError as error:
        report.problem(str(error))
        return
    for name in (name for name in files if name not in expected):
        if may_be_edited(name):
            report.set_aside.append(f"{name}: added, not part of the proof")
        elif is_unfinished(name):
            report.set_aside.append(f"{name}: left by a download, not part of the proof")
        elif is_dangling_index(name, out):
            report.set_aside.append(f"{name}: an index of weights that are not here, not part of the proof")
        else:
            report.problem(f"{name}: is an extra file")
    for name in other_forms:
        if name.endswith("__pycache__/"):
            report.problem(f"{name}: is an extra folder")
        else:
            report.set_aside.append(f"{name}: another form of the weights, or left by training, not part of the proof")


def _check_fingerprints(out: Path, record: object, report: VerifyReport) -> list[str]:
    """Of what was calibrated on, against the recipe; the name of their file, where there should be one."""
    named = record.get("fingerprints_sha256") if isinstance(record, dict) else None
    if named is None:  # data-free, or by an earlier version
        return []
    if not is_there(out, FINGERPRINTS_NAME):
        report.problem(f"{FINGERPRINTS_NAME}: is missing")
    else:
        try:
            sha256 = sha256_inside(out, FINGERPRINTS_NAME)
            if sha256 != named:
                found = f"sha256 is {sha256[:12]}..., the recipe has {str(named)[:12]}..."
                report.problem(f"{FINGERPRINTS_NAME}: {found}")
        except CheckpointError as error:
            report.problem(str(error))
    report.checked["files"] += 1
    return [FINGERPRINTS_NAME]


def _check_headers(index: CheckpointIndex, plan: Plan, report: VerifyReport) -> None:
    expected = {entry.name: (unit.file, entry) for unit in plan.units for entry in unit.entries}
    for name in sorted(index.tensors.keys() - expected.keys()):
        report.problem(f"{name}: is an extra tensor")
    for name, (file, entry) in expected.items():
        info = index.tensors.get(name)
        report.checked["tensors"] += 1
        if info is None:
            report.problem(f"{name}: is missing")
        elif (info.file, info.dtype, info.shape) != (file, entry.dtype, entry.shape):
            report.problem(
                f"{name}: is {info.dtype}{list(info.shape)} in {info.file}, "
                f"planned is {entry.dtype}{list(entry.shape)} in {file}"
            )


def _hear_libraries(index: CheckpointIndex, plan: Plan, report: VerifyReport) -> None:
    from mimoquant.output.libraries import ask_libraries  # which loads them: seconds

    answers = ask_libraries(index, plan.layout.geometry, plan.layout.index.folder)
    for problem in answers.problems:
        report.problem(problem)
    report.set_aside += answers.set_aside
    report.checked += answers.checked


class _Values:
    """Compares values, step by step of the plan: what a kind of step needs for its check (`run.steps.Proof`)."""

    def __init__(
        self,
        plan: Plan,
        ours: CheckpointReader,
        theirs: CheckpointReader,
        engine: CpuEngine,
        report: VerifyReport,
        journal: dict[str, JournalLine],
    ) -> None:
        self.plan, self.ours, self.theirs, self.engine, self.report = plan, ours, theirs, engine, report
        self.journal = journal
        self.shop = Workshop(plan, ours, engine)
        self.total = Audit(0.0, 0, 0.0, 0.0)
        self.layer: int | None = None
        self.fold: Array | None = None

    def unit(self, unit: Unit) -> None:
        layer = self.layer = unit.layer
        self.fold = self._norm_fold(layer) if layer is not None and layer in self.plan.formats else None
        steps = [step for step in unit.steps if all(map(self._readable, step.entries))]  # headers tell of the others
        for step in steps:
            try:
                kind_of(step).check(step, self)
            except QualityError as error:  # more groups without a scale than quantize lets pass
                self.report.problem(str(error))
        counted = self.shop.counted()
        self.report.clamped |= counted
        if (line := self.journal.get(unit.name)) and len(steps) == len(unit.steps):
            self.report.problems_of(told_otherwise(line, counted))

    def problem(self, text: str) -> None:
        self.report.problem(text)

    def count(self, what: str, number: int = 1) -> None:
        self.report.checked[what] += number

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
            self.report.problem(f"{name}: is not the source's, nor that by {kind}")
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
                self.report.problem(
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
                self.report.problem(f"{name}: gate and up have different global scales, engines use one")
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
                self.report.problem(f"{name}: its weight_scale_2 is no power of two")

    def _judge(self, name: str, audit: Audit, limit: float | None) -> None:
        report = self.report
        report.checked["quantized tensors"] += 1
        self.total = self.total.merge(audit)
        report.mean_relative_error = self.total.relative_error
        if not audit.scales_ok:
            report.problem(f"{name}: has scales that are zero, not finite, or negative where they may not be")
        elif limit is not None and not audit.relative_error <= limit:
            report.problem(
                f"{name}: its values are far from the source's, relMSE {audit.relative_error:.3g} "
                f"against at most {limit:.3g}"
            )
        elif audit.outside and self.plan.recipe.casts:
            report.problem(f"{name}: {audit.outside} blocks of 16 do not have the source's values")
        elif audit.outside and self.plan.recipe.calibrated:
            least = "at least " if self.plan.recipe.real_fold else ""  # one a channel
            report.problem(f"{name}: {least}{audit.outside} codes are not the nearest on their scale")
        elif audit.outside:
            report.problem(
                f"{name}: {audit.outside} values lie outside the rounding interval of their code, "
                f"the worst at {audit.worst:.3g} half steps"
            )
        if not audit.worst <= report.worst_rounding:
            report.worst_rounding, report.worst_rounding_tensor = audit.worst, name
        if not audit.relative_error <= report.worst_relative_error:
            report.worst_relative_error, report.worst_relative_error_tensor = audit.relative_error, name
