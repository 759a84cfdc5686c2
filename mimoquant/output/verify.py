"""Proof that an output is what its recipe says: every file, every tensor, every value.

Key idea: the plan is made anew from the source's headers and OUT/recipe.yaml (of a relayout: relayout.json), and OUT is
held against it. Files: names, sizes, sha256 of the journal. Headers: exactly the planned tensors. Values: copied bytes
are equal, dequantized tensors are computed again from the source, and each quantized weight's source value lies in the
rounding interval of its code. That interval is computed apart from the encoder, so an encoder's mistake shows.

Problems are collected, not thrown: a report of all that is wrong beats the first thing that is.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.checkpoint.folders import is_there, resolve_inside, sha256_inside
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME, is_unfinished, list_files
from mimoquant.checkpoint.index import CheckpointIndex, open_index
from mimoquant.checkpoint.journal import HASHED_AT_ONCE, JOURNAL_NAME, JournalLine, read_journal
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import remote_of
from mimoquant.errors import CheckpointError, MimoquantError, UsageError
from mimoquant.machine.overlap import workers
from mimoquant.output.documents import VerifyDocument
from mimoquant.output.published import is_dangling_index, may_be_edited, only_template_differs
from mimoquant.output.small_files import is_as_written, written_texts
from mimoquant.output.verify_values import Found, Sides, check_unit
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.planning.relayout import RECORD_NAME, plan_again
from mimoquant.planning.units import Unit
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.stack import Audit
from mimoquant.run.clamped import Counts, as_groups

UNITS_AT_ONCE = 4  # one thread waits for memory most of the time


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
    total: Audit = field(default_factory=lambda: Audit(0.0, 0, 0.0, 0.0))

    def problem(self, text: str) -> None:
        self.ok = False
        self.problems.append(text)

    def problems_of(self, texts: list[str]) -> None:
        for text in texts:
            self.problem(text)

    def add(self, found: Found) -> None:
        """Take in the next unit."""
        self.problems_of(found.problems)
        self.checked.update(found.checked)
        self.clamped |= found.clamped
        for name, audit in found.audits:
            if not math.isfinite(audit.relative_error):  # a problem, which is told; no measure of the others
                continue
            self.total = self.total.merge(audit)
            if not audit.worst <= self.worst_rounding:
                self.worst_rounding, self.worst_rounding_tensor = audit.worst, name
            if not audit.relative_error <= self.worst_relative_error:
                self.worst_relative_error, self.worst_relative_error_tensor = audit.relative_error, name
        self.mean_relative_error = self.total.relative_error

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
            sides = Sides(plan, ours, theirs, journal, engine)
            with workers(_units_at_once(plan), "values") as pool:
                found = pool.map(partial(check_unit, sides), plan.units)
                try:
                    for number, (unit, seen) in enumerate(zip(plan.units, found, strict=True), start=1):
                        report.add(seen)
                        tell(f"values of {unit.name}", number, len(plan.units))
                except BaseException:
                    sides.stopped.set()  # or it would wait for the layers that are being looked at
                    raise
            report.bytes_checked = theirs.bytes_read
    finally:
        engine.close()
    return report


def _units_at_once(plan: Plan) -> int:
    """Each takes the memory of a chunk or two. What is far away comes in order, several requests for a unit."""
    return 1 if remote_of(plan.layout.index.folder) else max(1, min(UNITS_AT_ONCE, len(os.sched_getaffinity(0)) // 2))


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
    with workers(HASHED_AT_ONCE, "hash") as pool:
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
