"""One step of a plan: what it reads, what it yields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError
from mimoquant.model.layout import PROJECTIONS
from mimoquant.planning.plan import Plan
from mimoquant.planning.reorder import Reorder, block_values, read_blocks
from mimoquant.planning.units import Copy, Dequantize, Experts, Shapes, Step
from mimoquant.quant.cast import InexactError, cast
from mimoquant.quant.stack import Engine, NonFiniteError, Stack
from mimoquant.run.deal import Task
from mimoquant.weights.container import expert_tensors
from mimoquant.weights.stored import dequantize, not_finite, read_experts, read_matrix

if TYPE_CHECKING:
    from mimoquant.run.calibrated import Calibrator


Array = npt.NDArray[Any]


Produced = Iterator[tuple[str, Array]]


Parts = dict[str, dict[str, Array]]  # projection → part → [E, ...]


COPY_BLOCK = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Loaded:
    """Steps that are done together, one but for a round of experts, with the source bytes that they need of this rank.
    A copy comes in blocks; `data` of the others is what was read."""

    task: Task
    steps: tuple[Step, ...]
    data: Any
    last: bool  # of its unit


def _kind(steps: Sequence[Step]) -> str:
    """What steps of one kind are called in a timeline."""
    step = steps[0] if steps else None
    if isinstance(step, Experts):
        return "keep experts" if step.fmt is None else "quantize experts"
    if isinstance(step, Reorder):
        return "reorder"
    return "dequantize" if isinstance(step, Dequantize) else "copy"


def _load(plan: Plan, tasks: list[Task], reader: CheckpointReader, engine: Engine, rank: int) -> Iterator[Loaded]:
    """Every step's source bytes, in order. Runs in the read-ahead thread."""
    for task in tasks:
        for number, steps in enumerate(task.groups, start=1):
            last, step = number == len(task.groups), steps[0] if steps else None
            if isinstance(step, Experts):
                yield Loaded(task, steps, _load_experts(plan, steps, reader, engine, rank), last)
            elif isinstance(step, Dequantize):
                yield Loaded(task, steps, read_matrix(reader, step.weight), last)
            elif isinstance(step, Copy):
                yield from _load_copy(task, step, reader, last)
            elif isinstance(step, Reorder):
                yield from _load_reorder(task, step, reader, last)
            else:
                yield Loaded(task, steps, None, last)


def _load_experts(
    plan: Plan, steps: tuple[Step, ...], reader: CheckpointReader, engine: Engine, rank: int
) -> dict[str, Stack] | None:
    """A chunk of experts: of a round that of this rank, if it has one there; kept experts go through all ranks."""
    experts = [step for step in steps if isinstance(step, Experts)]
    in_rounds = plan.recipe.calibration is not None and experts[0].fmt is not None
    mine = experts[rank : rank + 1] if in_rounds else experts
    if not mine:
        return None
    return read_experts(reader, plan.layout, mine[0].layer, mine[0].begin, mine[0].end, engine.empty)


def _load_copy(task: Task, step: Copy, reader: CheckpointReader, last: bool) -> Iterator[Loaded]:
    """A tensor in blocks, so that a large one does not have to fit; an empty one is one empty block."""
    size = step.info.size_bytes
    for start in range(0, max(size, 1), COPY_BLOCK):
        block = np.empty(min(COPY_BLOCK, size - start), np.uint8)
        reader.read_range(step.info, start, block)
        yield Loaded(task, (step,), block, last and start + len(block) >= size)


def _load_reorder(task: Task, step: Reorder, reader: CheckpointReader, last: bool) -> Iterator[Loaded]:
    left = len(step.rows)
    for block in read_blocks(reader, step):
        left -= len(block.values)
        yield Loaded(task, (step,), block, last and not left)


def _compute(plan: Plan, loaded: Loaded, engine: Engine, calibrator: Calibrator | None) -> Produced:
    """The output tensors (or parts of them) of what was loaded, in file order; none where another rank writes them."""
    if not loaded.steps:
        return
    step, data, writes = loaded.steps[0], loaded.data, loaded.task.writes
    if isinstance(step, Copy):
        if loaded.task.unit.name not in ("towers", "unknown"):
            _refuse_non_finite(step.info, data)
        yield step.info.name, data if calibrator is None else calibrator.folded(step.info.name, data)
    elif isinstance(step, Reorder):
        if data.scales is None:
            _refuse_non_finite(step.infos[0], data.values)
        yield data.entry.name, block_values(data, step.weight, engine)
    elif isinstance(step, Shapes):
        for entry, shape in zip(step.entries, step.shapes, strict=True):
            yield entry.name, np.array(shape, np.int64)
    elif isinstance(step, Dequantize):
        yield step.entries[0].name, dequantize(data, step.weight, plan.layout.geometry, engine)
    elif step.fmt is None:
        if calibrator is not None:
            calibrator.keep(step, data)
        if writes:
            yield from _kept_experts(plan, step, data, engine)
    elif calibrator is None:
        yield from _stored(plan, step, _encoded(plan, step, data, engine))
    else:
        experts = [step for step in loaded.steps if isinstance(step, Experts)]
        for step, parts in zip(experts, calibrator.encode(experts, data, wanted=writes), strict=False):
            yield from _stored(plan, step, parts)


def _refuse_non_finite(info: TensorInfo, block: Array) -> None:
    """NaN and Inf have all exponent bits set (E4M3, which has no Inf: all bits but the sign); codes have neither."""
    masks: dict[str, tuple[Any, int]] = {
        "BF16": (np.uint16, 0x7F80),
        "F32": (np.uint32, 0x7F800000),
        "F8_E4M3": (np.uint8, 0x7F),
    }
    if info.dtype not in masks:
        return
    kind, mask = masks[info.dtype]
    if ((block.view(kind) & kind(mask)) == mask).any():
        raise not_finite(info.name)


def _encoded(plan: Plan, step: Experts, stacks: dict[str, Stack], engine: Engine) -> Parts:
    assert step.fmt is not None
    try:
        return cast(stacks) if plan.recipe.casts else engine.encode(stacks, step.fmt, plan.recipe.scale_search)
    except NonFiniteError as error:
        raise not_finite(plan.layout.expert(step.layer, step.begin + error.expert, error.projection).name) from error
    except InexactError as error:
        weight = plan.layout.expert(step.layer, step.begin + error.expert, error.projection)
        raise CheckpointError(
            f"{weight.name}: NVFP4 cannot hold it exactly, {error.blocks} of its blocks of 32 have an exponent more "
            "than 17 below the largest of its matrix (of gate and up together)",
            hint="keep MXFP4 for this checkpoint, or quantize the published FP8 files with nvfp4-mse",
        ) from error


def _stored(plan: Plan, step: Experts, parts: Parts) -> Produced:
    """A chunk's tensors, expert by expert."""
    assert step.fmt is not None
    geometry = plan.layout.geometry
    stored = {p: expert_tensors(plan.container, step.fmt, *geometry.expert_shape(p)) for p in PROJECTIONS}
    names = iter(step.entries)
    for expert in range(step.end - step.begin):
        for projection in PROJECTIONS:
            for tensor in stored[projection]:
                yield next(names).name, tensor.turned(parts[projection][tensor.part][expert])


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
