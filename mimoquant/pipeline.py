"""The quantize run: for each unit of the plan, for each step, read → compute → write. The first file to read.

Key idea: the plan has decided everything, so this is a loop with a reader one chunk ahead and a writer behind. A unit
is a shard; it is fsynced, then journaled, so a killed run goes on where it was. What comes out depends on the plan
alone: not on how often the run was interrupted, nor, without calibration, on the device or the number of threads. A
calibrated run takes its tokens along (`_Walk`), layer by layer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import yaml

import mimoquant
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet, load_tokens
from mimoquant.checkpoint.hf_files import CONFIG_NAME, copy_side_files
from mimoquant.checkpoint.index import INDEX_NAME, open_shard
from mimoquant.checkpoint.journal import JournalLine, RunFolder, free_bytes
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import ShardWriter, write_file_durably
from mimoquant.container import expert_tensors
from mimoquant.devices import make_engine, resolve_device
from mimoquant.errors import CheckpointError, StoppedError, UsageError
from mimoquant.layer_weights import dequantize, not_finite, output_tensors, read_experts, read_matrix
from mimoquant.model.layout import PROJECTIONS
from mimoquant.overlap import WriteBehind, read_ahead
from mimoquant.plan import WRITE_QUEUE_BYTES, Copy, Dequantize, Experts, Plan, Shapes, Step, Unit
from mimoquant.quant.stack import Engine, NonFiniteError, Stack
from mimoquant.report import QuantizeReport, fallbacks, model_card
from mimoquant.timeline import WAIT_READ, WAIT_WRITE, Timeline

if TYPE_CHECKING:
    from mimoquant.calibrated import Calibrator

Array = npt.NDArray[Any]
Produced = Iterator[tuple[str, Array]]
Progress = Callable[[Unit, int, bool], None]  # unit, output bytes of it done, whether it is finished

COPY_BLOCK = 32 * 2**20
WRITE_LANES = 3  # shards that are written and hashed at once where a GPU fills them faster than one thread hashes
DISK_SLACK = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Loaded:
    """A step with the source bytes it needs. A copy comes in blocks; `data` of the others is what was read."""

    unit: Unit
    step: Step
    data: Any
    last: bool  # of its unit


def quantize(
    plan: Plan, out: Path | str, *, device: str = "auto", resume: bool = False, progress: Progress | None = None,
    timeline: Timeline | None = None,
) -> QuantizeReport:  # fmt: skip
    """Execute a plan into the folder `out`, which appears only when it is complete.

    Args:
        device: "cpu", "cuda", or "auto" (cuda where there is one). The bytes are the same, unless the recipe
            calibrates: then they are the same on the same kind of device.
        resume: continue what a killed run left in `out`.partial.
        timeline: is told what the run spends its time on.
    Raises:
        UsageError: `out` exists, lies in the source, an unfinished run is there; disk too small.
        CheckpointError: bad data. QualityError: too many starved experts. StoppedError: disk trouble, resumable.
    """
    out = _preflight(plan, out)
    tokens = _calibration_tokens(plan)
    device = resolve_device(device)
    identity = plan.identity()
    if tokens:  # sums of float32 differ between kinds of device, and GPTQ makes much of little
        chunks = sum(isinstance(step, Experts) for unit in plan.units for step in unit.steps)
        identity |= {"calibration tokens": tokens.sha256, "kind of device": device.partition(":")[0],
                     "chunks of experts": str(chunks)}  # fmt: skip
    with contextlib.closing(make_engine(device)) as engine, RunFolder(out, identity, resume=resume) as run:
        _check_disk(plan, run)
        try:
            _write_units(plan, run, engine, tokens, progress or (lambda unit, done, finished: None),
                         timeline or Timeline())  # fmt: skip
            return _finish(plan, run, tokens)
        except CheckpointError:
            if not run.finished:  # nothing that a resume could use
                run.discard()
            raise


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


def _calibration_tokens(plan: Plan) -> TokenSet | None:
    """What the recipe calibrates on; None for a recipe that needs none. The tokenizer is the source's own."""
    wanted, layout = plan.recipe.calibration, plan.layout
    if wanted is None:
        return None
    return load_tokens(wanted.data, layout.index.folder, sequences=wanted.sequences, tokens=wanted.tokens,
                       vocab=layout.geometry.vocab)  # fmt: skip


def _check_disk(plan: Plan, run: RunFolder) -> None:
    done = sum(line.size_bytes for line in run.finished.values())
    needed, free = plan.shard_bytes + plan.side_bytes - done + DISK_SLACK, free_bytes(run.partial)
    if needed > free:
        sentence = f"{run.out}: needs {needed / 1e9:.2f} GB but {free / 1e9:.2f} GB are free"
        if run.finished:
            raise StoppedError(sentence, hint="make room, then run the same command again with --resume")
        run.discard()
        raise UsageError(sentence, hint="make room or choose another --out")


def _write_units(
    plan: Plan, run: RunFolder, engine: Engine, tokens: TokenSet | None, progress: Progress, timeline: Timeline
) -> None:
    todo = [unit for unit in plan.units if unit.name not in run.finished]
    for unit in plan.units:
        if unit.name in run.finished:
            progress(unit, unit.size_bytes, True)
    writer: ShardWriter | None = None
    lane, lanes, queue = 0, 1, WRITE_QUEUE_BYTES
    if engine.name.startswith("cuda"):
        lanes, queue = WRITE_LANES, 2 * max(unit.size_bytes for unit in plan.units)
    with CheckpointReader(plan.layout.index) as reader, WriteBehind(queue, lanes) as behind:
        walk = _Walk(plan, run, reader, tokens, engine.name) if tokens else None
        steps = read_ahead(timeline.waited("read", _load(plan, todo, reader, engine)))
        try:
            for loaded in timeline.waited(WAIT_READ, steps):
                if writer is None:
                    writer = ShardWriter(run.path(loaded.unit.file), loaded.unit.entries)
                    if walk:
                        with timeline.span("attention and routing"):
                            walk.enter(loaded.unit)
                produced = _compute(plan, loaded, engine, walk.calibrator if walk else None)
                for name, array in timeline.waited(_kind(loaded.step), produced):
                    array = np.ascontiguousarray(array)
                    with timeline.span(WAIT_WRITE):
                        behind.submit(lane, array.nbytes, _write, timeline, writer, name, array)
                progress(loaded.unit, writer.size_bytes, False)
                if loaded.last:
                    facts = walk.leave(loaded.unit) if walk else None
                    behind.submit(lane, 0, partial(_complete, loaded.unit, writer, run, progress, facts))
                    writer, lane = None, lane + 1
        finally:
            steps.close()  # type: ignore[attr-defined]


def _write(timeline: Timeline, writer: ShardWriter, name: str, array: Array) -> None:
    with timeline.span("write and hash"):
        writer.write(name, array)


def _kind(step: Step) -> str:
    """What a step is called in a timeline."""
    if isinstance(step, Experts):
        return "keep experts" if step.fmt is None else "quantize experts"
    return "dequantize" if isinstance(step, Dequantize) else "copy"


class _Walk:
    """Keeps the calibration tokens beside the units: a layer's are there when its shard begins, also after a resume."""

    def __init__(self, plan: Plan, run: RunFolder, reader: CheckpointReader, tokens: TokenSet, device: str) -> None:
        from mimoquant.calibrated import Calibrator  # torch is loaded only where it is needed

        self.plan, self.run = plan, run
        self.calibrator = Calibrator(plan, reader, tokens, device)
        self.at = 0  # the next layer to walk

    def enter(self, unit: Unit) -> None:
        layer = layer_of(unit)
        if layer is None:
            return
        while self.at < layer:  # finished by an earlier run
            earlier = next(other for other in self.plan.units if layer_of(other) == self.at)
            with CheckpointReader(open_shard(self.run.path(earlier.file))) as written:
                self.calibrator.replay(self.at, earlier, written)
            self.at += 1
        self.calibrator.begin(layer)

    def leave(self, unit: Unit) -> dict[str, Any] | None:
        if layer_of(unit) is None:
            return None
        self.at += 1
        return self.calibrator.end()


def layer_of(unit: Unit) -> int | None:
    """The decoder layer that a unit is, if it is one."""
    return int(unit.name.removeprefix("layer ")) if unit.name.startswith("layer ") else None


def _complete(
    unit: Unit, writer: ShardWriter, run: RunFolder, progress: Progress, facts: dict[str, Any] | None
) -> None:
    """The shard is written: make it durable, then say so in the journal."""
    sha256 = writer.close()
    if writer.size_bytes != unit.size_bytes:
        raise AssertionError(f"{unit.file}: wrote {writer.size_bytes} bytes, planned {unit.size_bytes}")
    run.record(JournalLine(unit.name, unit.file, unit.size_bytes, sha256, facts))
    progress(unit, unit.size_bytes, True)


def _load(plan: Plan, units: list[Unit], reader: CheckpointReader, engine: Engine) -> Iterator[Loaded]:
    """Every step's source bytes, in order. Runs in the read-ahead thread."""
    for unit in units:
        for number, step in enumerate(unit.steps, start=1):
            last = number == len(unit.steps)
            if isinstance(step, Experts):
                stacks = read_experts(reader, plan.layout, step.layer, step.begin, step.end, engine.empty)
                yield Loaded(unit, step, stacks, last)
            elif isinstance(step, Dequantize):
                yield Loaded(unit, step, read_matrix(reader, step.weight), last)
            elif isinstance(step, Copy):
                yield from _load_copy(unit, step, reader, last)
            else:
                yield Loaded(unit, step, None, last)


def _load_copy(unit: Unit, step: Copy, reader: CheckpointReader, last: bool) -> Iterator[Loaded]:
    """A tensor in blocks, so that a large one does not have to fit; an empty one is one empty block."""
    size = step.info.size_bytes
    for start in range(0, max(size, 1), COPY_BLOCK):
        block = np.empty(min(COPY_BLOCK, size - start), np.uint8)
        reader.read_range(step.info, start, block)
        yield Loaded(unit, step, block, last and start + len(block) >= size)


def _compute(plan: Plan, loaded: Loaded, engine: Engine, calibrator: Calibrator | None) -> Produced:
    """The output tensors (or parts of them) of one step, in file order."""
    step, data = loaded.step, loaded.data
    if isinstance(step, Copy):
        if loaded.unit.name not in ("towers", "unknown"):
            _refuse_non_finite(step, data)
        yield step.info.name, data if calibrator is None else calibrator.folded(step.info.name, data)
    elif isinstance(step, Shapes):
        for entry, shape in zip(step.entries, step.shapes, strict=True):
            yield entry.name, np.array(shape, np.int64)
    elif isinstance(step, Dequantize):
        split = len(step.entries) > 1
        tensors = output_tensors(data, step.weight, plan.layout.geometry, engine, split=split, sliding=step.sliding)
        yield from zip((entry.name for entry in step.entries), tensors, strict=True)
    elif step.fmt is None:
        if calibrator is not None:
            calibrator.keep(step, data)
        yield from _kept_experts(plan, step, data, engine)
    else:
        yield from _quantized_experts(plan, step, data, engine, calibrator)


def _refuse_non_finite(step: Copy, block: Array) -> None:
    """NaN and Inf have all exponent bits set (E4M3, which has no Inf: all bits but the sign)."""
    masks: dict[str, tuple[Any, int]] = {
        "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000), "F8_E4M3": (np.uint8, 0x7F)
    }  # fmt: skip
    kind, mask = masks[step.info.dtype]
    if ((block.view(kind) & kind(mask)) == mask).any():
        raise not_finite(step.info.name)


def _quantized_experts(
    plan: Plan, step: Experts, stacks: dict[str, Stack], engine: Engine, calibrator: Calibrator | None
) -> Produced:
    assert step.fmt is not None
    try:
        if calibrator is None:
            parts = engine.encode(stacks, step.fmt, plan.recipe.scale_search)
        else:
            parts = calibrator.encode(step, stacks)
    except NonFiniteError as error:
        raise not_finite(plan.layout.expert(step.layer, step.begin + error.expert, error.projection).name) from error
    stored = {p: expert_tensors(plan.container, step.fmt, *stacks[p].values.shape[1:]) for p in PROJECTIONS}
    names = iter(step.entries)
    for expert in range(step.end - step.begin):
        for projection in PROJECTIONS:
            for tensor in stored[projection]:
                yield next(names).name, parts[projection][tensor.part][expert]


def _kept_experts(plan: Plan, step: Experts, stacks: dict[str, Stack], engine: Engine) -> Produced:
    names = iter(step.entries)
    for expert in range(step.end - step.begin):
        for projection in PROJECTIONS:
            stack = Stack(*(None if part is None else part[expert : expert + 1] for part in stacks[projection]))  # type: ignore[arg-type]
            if step.kept == "fp8":
                assert stack.scales is not None
                yield next(names).name, stack.scales[0]
                yield next(names).name, stack.values[0]
            else:
                weight = plan.layout.expert(step.layer, step.begin + expert, projection)
                yield next(names).name, dequantize(stack, weight, plan.layout.geometry, engine)


def _finish(plan: Plan, run: RunFolder, tokens: TokenSet | None) -> QuantizeReport:
    """Everything beside the shards, then the folder gets its name."""
    copy_side_files(plan.layout.index.folder, run.partial, plan.side_files)
    record = CalibrationRecord.of(tokens).as_plain() if tokens else None
    for name, data in written_texts(plan, run.finished, record).items():
        write_file_durably(run.path(name), data)
    run.publish([unit.name for unit in plan.units])
    return QuantizeReport.of(plan, run.finished)


def written_texts(plan: Plan, finished: dict[str, JournalLine], calibration: dict[str, Any] | None) -> dict[str, bytes]:
    """The small files of an output, by name: they follow from the plan, the journal and what was calibrated on."""
    weight_map = {entry.name: unit.file for unit in plan.units for entry in unit.entries}
    index = {"metadata": plan.index_metadata, "weight_map": dict(sorted(weight_map.items()))}
    report = QuantizeReport.of(plan, finished)
    texts = {
        INDEX_NAME: json.dumps(index, indent=2),
        CONFIG_NAME: json.dumps(plan.config, indent=2, ensure_ascii=False),
        "recipe.yaml": resolved_recipe(plan, finished, calibration),
        "report.json": json.dumps(report.as_json(), indent=2),
        "README.md": model_card(plan, report),
    }
    return {name: (text.rstrip("\n") + "\n").encode() for name, text in texts.items()}


def resolved_recipe(plan: Plan, finished: dict[str, JournalLine], calibration: dict[str, Any] | None) -> str:
    """`OUT/recipe.yaml`: every default written out, and where the source came from. Reading it back repeats the run."""
    document = plan.recipe.resolved(plan.container)
    document["mimoquant"]["provenance"] = {
        "mimoquant": mimoquant.__version__,
        "release": plan.layout.geometry.release,
        "source_headers_sha256": plan.layout.index.headers_fingerprint(),
        "quantized_layers": len(plan.formats),
        "routed_experts": plan.layout.geometry.experts,
        "fallbacks": fallbacks(finished) or 0,
    }
    if calibration is not None:
        document["mimoquant"]["provenance"]["calibration"] = calibration
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)
