"""The quantize run: for each unit of the plan, for each step, read → compute → write. The first file to read.

Key idea: the plan has decided everything, so this is a loop with a reader one chunk ahead and a writer behind. A unit
is a shard; it is fsynced, then journaled, so a killed run goes on where it was. What comes out depends on the plan
alone: not on how often the run was interrupted or how many processes (`team`) share it, nor, without calibration, on
the device or the number of threads. A calibrated run takes its tokens along (`_Walk`), layer by layer.
"""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimoquant.calibration.layer_facts import LayerRecord
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet, calibration_tokens
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME, copy_side_files
from mimoquant.checkpoint.index import open_shard
from mimoquant.checkpoint.journal import JournalLine, RunFolder, free_bytes, opened
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import remote_of
from mimoquant.checkpoint.writer import ShardWriter, write_file_durably
from mimoquant.errors import CheckpointError, StoppedError, UsageError
from mimoquant.machine.buffers import Buffers
from mimoquant.machine.devices import make_engine, resolve_device
from mimoquant.machine.hashing import Hashing
from mimoquant.machine.memory import machine
from mimoquant.machine.overlap import WriteBehind, is_given_up, read_ahead
from mimoquant.machine.team import Team
from mimoquant.machine.timeline import WAIT_READ, WAIT_WRITE, Timeline
from mimoquant.output.documents import QuantizeReport
from mimoquant.output.finished import finished_already
from mimoquant.output.quantize_report import quantize_report
from mimoquant.output.small_files import written_texts
from mimoquant.planning.needs import disk_bytes, lighter_on_disk, near_bytes
from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts, Unit
from mimoquant.planning.writing import Writing, writing_of
from mimoquant.quant.stack import Engine
from mimoquant.run.clamped import Counts
from mimoquant.run.deal import Task, deal
from mimoquant.run.loading import load
from mimoquant.run.side_weights import refuse_side_weights
from mimoquant.run.steps import Array, label, yielded
from mimoquant.run.workshop import Workshop

if TYPE_CHECKING:
    from mimoquant.fisher.matrices import Fisher

Walked = Callable[[str, int, int], None]  # which way, layers passed, layers
Progress = Callable[[Unit, int, bool], None]  # unit, output bytes of it done, whether it is finished


@dataclass(frozen=True, slots=True)
class Tells:
    """Whom a run tells more: `walked` of each layer that the walk back has passed, which comes first where the recipe
    asks for it; `note`, in a sentence, of what was found finished."""

    walked: Walked | None = None
    note: Callable[[str], None] | None = None


NOBODY = Tells()

DISK_SLACK = 64 * 2**20


def quantize(
    plan: Plan,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
    team: Team | None = None,
    tells: Tells = NOBODY,
) -> QuantizeReport:
    """Execute a plan into the folder `out`, which appears only when it is complete. Arguments: see `execute`."""
    finished = execute(
        plan, out, device=device, resume=resume, progress=progress, timeline=timeline, team=team, tells=tells
    )
    return quantize_report(plan, finished)


def execute(
    plan: Plan,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
    team: Team | None = None,
    tells: Tells = NOBODY,
) -> dict[str, JournalLine]:
    """Write what a plan says, a relayout's or a recipe's, into the folder `out`; returns the journal, unit by unit.

    Args:
        device: "cpu", "cuda", or "auto" (cuda where there is one). The bytes are the same, unless the recipe
            calibrates: then they are the same on the same kind of device.
        resume: continue what a killed run left in `out`.partial; where `out` is finished there is nothing to do.
        timeline: is told what the run spends its time on. tells: whom else the run tells.
        team: the processes that share the run, all of which call this; `device` is then the team's.
    Raises:
        UsageError: `out` exists (with `resume`: by another plan), lies in the source, an unfinished run is there; disk
        too small.
        CheckpointError: bad data. QualityError: too many starved experts. StoppedError: disk trouble, resumable.
    """
    out = _preflight(plan, out)
    tokens = calibration_tokens(plan.recipe.calibration, plan.layout)
    team = team or Team(resolve_device(device))
    device, progress = team.device, progress or (lambda unit, done, finished: None)
    if resume and (kept := _finished_before(plan, out, tokens, team)) is not None:
        for unit in plan.units:
            progress(unit, unit.size_bytes, False)
        if tells.note:
            tells.note(f"{out}: is finished already, by this recipe and of this source; nothing is left to do")
        return kept
    if team.leads:
        refuse_side_weights(plan.layout.index.folder, plan.side_files.keys() - plan.mended.keys())
    identity = _identity(plan, tokens, team)
    empty = Buffers().empty if plan.recipe.calibration is None else np.empty
    with (
        contextlib.closing(make_engine(plan.engine_device(device), empty)) as engine,
        opened(RunFolder(out, identity, resume=resume, rank=team.rank), team, partial(_check_disk, plan, team)) as run,
    ):
        try:
            timeline = timeline or Timeline()
            fisher = _walked_back(plan, run, tokens, timeline, team, tells.walked)
            _write_units(plan, run, engine, tokens, progress, timeline, team, fisher)
            return _finish(plan, run, tokens, progress, team)
        except CheckpointError:
            if not run.finished and team.size == 1:  # nothing that a resume could use, and nobody who still writes
                run.discard()
            raise


def _finished_before(plan: Plan, out: Path, tokens: TokenSet | None, team: Team) -> dict[str, JournalLine] | None:
    """The journal of an `out` that this plan made before, on every rank; None where there is work to do."""
    found = finished_already(plan, out, tokens) if team.leads else None
    told = team.gather(None if found is None else [line.as_plain() for line in found.values()])[0]
    return None if told is None else {line["unit"]: JournalLine(**line) for line in told}


def _identity(plan: Plan, tokens: TokenSet | None, team: Team) -> dict[str, Any]:
    """What a resume must find unchanged. Other ranks may read copies of the source with times of their own."""
    identity = plan.identity() | {"config": plan.layout.config}
    if team.leads:
        identity["source"] = plan.layout.index.stamps()
    if tokens:  # sums of float32 differ between kinds of device, and GPTQ makes much of little
        chunks = sum(isinstance(step, Experts) for unit in plan.units for step in unit.steps)
        identity |= {
            "calibration tokens": tokens.sha256,
            "kind of device": team.device.partition(":")[0],
            "chunks of experts": str(chunks),
        }
    return identity


def _preflight(plan: Plan, out: Path | str) -> Path:
    """Refuse what can be refused before anything is written; returns the absolute `out`."""
    target, source = Path(os.path.abspath(out)), plan.layout.index.folder.resolve()
    if not target.name or target == Path.cwd() or not str(out):
        raise UsageError(f"--out {str(out)!r}: is not a new folder", hint="name a folder that does not exist yet")
    try:
        inside = target.resolve().is_relative_to(source)
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise UsageError(f"{out}: is not a usable path ({getattr(error, 'strerror', None) or error})") from error
    if inside:
        raise UsageError(f"{out}: lies inside the source {source}", hint="the source is never written to")
    return target


def _check_disk(plan: Plan, team: Team, run: RunFolder) -> None:
    done = sum(line.size_bytes for line in run.finished.values())
    done += sum(path.stat().st_size for path in run.partial.glob("*/*") if path.is_file())  # of the walk back
    begun = ((run.path(unit.file), unit.size_bytes) for unit in plan.units if unit.name not in run.finished)
    done += sum(min(path.stat().st_size, size) for path, size in begun if path.is_file())  # written over
    has, free = machine(team.device), free_bytes(run.partial)
    kept = _bytes_of_source(plan.layout.index.folder, run.partial)
    needed = disk_bytes(plan, team.device, has, team.size) - done + DISK_SLACK + kept
    if needed > free:
        beside = f", {kept / 1e9:.2f} GB of it for the source that is kept," if kept else ""
        sentence = f"{run.out}: needs {needed / 1e9:.2f} GB{beside} but {free / 1e9:.2f} GB are free"
        if run.finished:
            raise StoppedError(sentence, hint="make room, then run the same command again with --resume")
        run.discard()
        lighter = lighter_on_disk(plan, team.device, has, free + done - DISK_SLACK - kept, team.size)
        room = "make room or choose another --out"
        raise UsageError(sentence, hint=f"{room}; {lighter}" if lighter else room)


def _bytes_of_source(source: Path, out: Path) -> int:
    """What is still to come onto the disk of `out` of a source on the Hub that is kept."""
    remote = remote_of(source)
    same_disk = remote is not None and remote.store.folder.stat().st_dev == out.stat().st_dev
    return remote.store.bytes_to_keep if remote and same_disk else 0


def _walked_back(
    plan: Plan, run: RunFolder, tokens: TokenSet | None, timeline: Timeline, team: Team, walked: Walked | None
) -> Fisher | None:
    """What the loss feels of each layer, where the recipe asks for it and a layer is left to be quantized."""
    left = any(unit.layer in plan.formats and unit.name not in run.finished for unit in plan.units)
    if plan.recipe.objective != "kl" or tokens is None or not left:
        return None
    from mimoquant.run.objective import walked_back  # torch is loaded only where it is needed

    with timeline.span("walk back"), CheckpointReader(plan.layout.index) as reader:
        return walked_back(plan, reader, tokens, run.partial, team, walked)


def _write_units(
    plan: Plan,
    run: RunFolder,
    engine: Engine,
    tokens: TokenSet | None,
    progress: Progress,
    timeline: Timeline,
    team: Team,
    fisher: Fisher | None,
) -> None:
    tasks = deal(plan, run.finished.keys(), team.rank, team.size)
    for unit in plan.units:
        if unit.name in run.finished:
            progress(unit, unit.size_bytes, True)
    far = remote_of(plan.layout.index.folder) is not None
    ways, reading = writing_of(plan, engine.name, far=far), CheckpointReader(plan.layout.index)
    with reading as reader, contextlib.ExitStack() as opened, WriteBehind(ways.queue_bytes, ways.lanes) as behind:
        walk = opened.enter_context(_Walk(plan, run, reader, tokens, team, fisher)) if tokens else None
        shop = Workshop(plan, reader, engine, team.rank, ways.piece_bytes)
        shards = _Shards(run, behind, ways, shop, progress, timeline, opened)
        turns = _one_by_one(tasks, run, behind) if far else tasks
        ahead = read_ahead(timeline.waited("read", load(shop, turns, ways.at_once)))
        with contextlib.closing(ahead):
            for loaded in timeline.waited(WAIT_READ, ahead):
                shard = shards.of(loaded.task)
                if shard is None:
                    shard = shards.begin(loaded.task)
                    if walk:
                        with timeline.span("attention and routing"):
                            walk.enter(loaded.task.unit)
                produced = yielded(shard.shop, loaded, walk.calibrator if walk else None)
                for name, array in timeline.waited(label(loaded), produced):
                    shards.write(shard, name, array)
                shards.tell(shard)
                if loaded.last:
                    shards.end(shard, walk.leave(loaded.task.unit) if walk else None)


def _one_by_one(tasks: list[Task], run: RunFolder, behind: WriteBehind) -> Iterator[Task]:
    """Each task once the shard of the one before it is in the journal. What is far away costs time to read, so a kill
    must not cost more than one layer of it; what is read ahead inside a layer stays. Runs in the read-ahead thread."""
    for task in tasks:
        yield task
        while task.writes and task.unit.name not in run.finished:
            if behind.failed or is_given_up():
                return
            time.sleep(0.002)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is being filled. `writer`: None where another rank writes it. `shop`: what counts is its own."""

    unit: Unit
    writer: ShardWriter | None
    lane: int
    shop: Workshop


class _Shards:
    """The output shards, one after the other or some in turn, written behind the run."""

    def __init__(
        self,
        run: RunFolder,
        behind: WriteBehind,
        ways: Writing,
        shop: Workshop,
        progress: Progress,
        timeline: Timeline,
        opened: contextlib.ExitStack,
    ) -> None:
        self.run, self.behind, self.shop = run, behind, shop
        self.progress, self.timeline, self.opened = progress, timeline, opened
        self._hashing = opened.enter_context(Hashing(ways.lanes))
        self._begun: dict[str, _Shard] = {}
        self._lanes = collections.deque(range(ways.lanes))  # that no begun shard has, the one that was left last behind
        # How much of the queue a shard takes that waits for its journal line alone. With one lane it is more than half,
        # so that one such shard at most waits: what a kill costs.
        self._whole = ways.queue_bytes // 2 + 1 if ways.lanes == 1 else 0

    def of(self, task: Task) -> _Shard | None:
        """The shard of a task that was begun."""
        return self._begun.get(task.unit.name)

    def begin(self, task: Task) -> _Shard:
        unit = task.unit
        writer = ShardWriter(self.run.path(unit.file), unit.entries, self._hashing) if task.writes else None
        if writer:
            self.opened.callback(writer.abandon)  # where the run ends in the middle
        shard = _Shard(unit, writer, self._lanes.popleft(), replace(self.shop, clamped={}))
        self._begun[unit.name] = shard
        return shard

    def write(self, shard: _Shard, name: str, array: Array) -> None:
        assert shard.writer is not None
        array = np.ascontiguousarray(array)
        with self.timeline.span(WAIT_WRITE):
            self.behind.submit(shard.lane, array.nbytes, _write, self.timeline, shard.writer, name, array)

    def tell(self, shard: _Shard) -> None:
        """How far a shard is."""
        if shard.writer:
            self.progress(shard.unit, shard.writer.size_bytes, False)

    def end(self, shard: _Shard, facts: LayerRecord | None) -> None:
        unit = shard.unit
        self._lanes.append(self._begun.pop(unit.name).lane)
        if shard.writer:
            finish = partial(_complete, unit, shard.writer, self.run, self.progress, facts, shard.shop.clamped)
            self.behind.submit(shard.lane, self._whole, finish)
        else:
            self.progress(unit, unit.size_bytes, True)


def _write(timeline: Timeline, writer: ShardWriter, name: str, array: Array) -> None:
    with timeline.span("write and hash"):
        writer.write(name, array)


class _Walk:
    """Keeps the calibration tokens beside the units: a layer's are there when its shard begins, also after a resume."""

    def __init__(
        self,
        plan: Plan,
        run: RunFolder,
        reader: CheckpointReader,
        tokens: TokenSet,
        team: Team,
        fisher: Fisher | None,
    ) -> None:
        from mimoquant.run.calibrated import Calibrator  # torch is loaded only where it is needed

        self.plan, self.run = plan, run
        has = machine(team.device)
        has = replace(has, gpu_bytes=min(has.gpu_bytes, plan.gpu_bytes or has.gpu_bytes))
        near = near_bytes(plan, team.device, has, team.size) > 0
        self.calibrator = Calibrator(plan, reader, tokens, team.device, team, fisher=fisher, near=near)
        self.at = 0  # the next layer to walk

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *raised: object) -> None:
        self.calibrator.layers.close()

    def enter(self, unit: Unit) -> None:
        layer = unit.layer
        if layer is None:
            return
        while self.at < layer:  # finished by an earlier run
            earlier = next(other for other in self.plan.units if other.layer == self.at)
            with CheckpointReader(open_shard(self.run.path(earlier.file))) as written:
                self.calibrator.replay(self.at, earlier, written)
            self.at += 1
        self.calibrator.begin(layer)

    def leave(self, unit: Unit) -> LayerRecord | None:
        if unit.layer is None:
            return None
        self.at += 1
        return self.calibrator.end()


def _complete(
    unit: Unit, writer: ShardWriter, run: RunFolder, progress: Progress, facts: LayerRecord | None, clamped: Counts
) -> None:
    """The shard is written: make it durable, then say so in the journal."""
    sha256 = writer.close()
    if writer.size_bytes != unit.size_bytes:
        raise AssertionError(f"{unit.file}: wrote {writer.size_bytes} bytes, planned {unit.size_bytes}")
    counts = {name: [zeroed, clipped, groups] for name, (zeroed, clipped, _, groups) in clamped.items()}
    run.record(JournalLine(unit.name, unit.file, unit.size_bytes, sha256, facts, counts or None))
    progress(unit, unit.size_bytes, True)


def _finish(
    plan: Plan, run: RunFolder, tokens: TokenSet | None, progress: Progress, team: Team
) -> dict[str, JournalLine]:
    """Everything beside the shards, then the folder gets its name; by rank 0, when all ranks have done their part."""
    if not team.leads:
        run.close()  # a file that is open cannot be removed from every network disk
    mine = set(run.finished)
    for lines in team.gather([line.as_plain() for line in run.finished.values()]):
        run.finished |= {line["unit"]: JournalLine(**line) for line in lines}
    if plan.recipe.calibration is None:  # with calibration, every rank has seen all units pass
        for unit in plan.units:
            if unit.name not in mine:
                progress(unit, unit.size_bytes, True)
    if team.leads:
        if plan.recipe.objective == "kl":
            from mimoquant.run.objective import let_go

            let_go(run.partial)
        copy_side_files(plan.layout.index.folder, run.partial, plan.side_files)
        for name, data in plan.mended.items():  # in place of the copy, whose folder there is now
            write_file_durably(run.partial / name, data)
        record = CalibrationRecord.of(tokens).as_plain() if tokens else None
        for name, data in written_texts(plan, run.finished, record).items():
            write_file_durably(run.path(name), data)
        if tokens:
            write_file_durably(run.path(FINGERPRINTS_NAME), tokens.fingerprints.as_bytes())
        run.publish([unit.name for unit in plan.units])
    team.gather(None)
    return run.finished
