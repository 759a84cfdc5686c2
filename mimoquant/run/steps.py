"""The kinds of step a plan has: what each reads, what it yields, and how that is proven afterwards.

Key idea: these three stand side by side, one class a kind, and `kind_of` is the one place that tells kinds apart. A
run reads a kind's source bytes in a thread ahead (`loading`) and yields the output tensors (`yielded`); `verify` holds
a finished output against the same source (`check`). What can be computed again is proven by doing so. Quantized experts
are not encoded again: their audit (`output.verify`) is computed apart from the encoder, so an encoder's mistake shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.errors import CheckpointError
from mimoquant.model.layout import PROJECTIONS, Weight
from mimoquant.planning.plan import Plan
from mimoquant.planning.reorder import Reorder, RowBlock, block_values, read_blocks, unmoved
from mimoquant.planning.units import Copy, Dequantize, Experts, InputScales, Shapes, Step
from mimoquant.quant.cast import InexactError, cast
from mimoquant.quant.clamped import clamped
from mimoquant.quant.formats import MXFP4
from mimoquant.quant.stack import NonFiniteError, Stack
from mimoquant.run.clamped import named
from mimoquant.run.deal import Task
from mimoquant.run.input_scales import recorded_amax, scale_tensors, unit_amax
from mimoquant.run.workshop import Produced, Workshop
from mimoquant.weights.container import expert_tensors
from mimoquant.weights.stored import (
    dequantize,
    expanded,
    lost_blocks,
    not_finite,
    packed_scale,
    read_experts,
    refuse_non_finite,
    scale_rows,
)

if TYPE_CHECKING:
    from mimoquant.run.calibrated import Calibrator

S = TypeVar("S", bound=Step)
S_contra = TypeVar("S_contra", bound=Step, contravariant=True)
Array = npt.NDArray[Any]
Parts = dict[str, dict[str, Array]]  # projection → part → [E, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Steps that are done together, one but for a round of experts, with the source bytes that they need of this rank.
    A copy comes in blocks; `data` of the others is what was read."""

    task: Task
    steps: tuple[Step, ...]
    data: Any
    last: bool  # of its unit


class Proof(Protocol):
    """What a kind's `check` needs of `verify`, which collects problems instead of stopping at the first."""

    shop: Workshop  # whose reader has the source

    def is_stored(self, name: str, expected: Array, begin: int = 0) -> bool:
        """Whether the output's tensor has these bytes, from byte `begin` on."""
        ...

    def problem(self, text: str) -> None: ...

    def count(self, what: str, number: int = 1) -> None: ...

    def folded(self, info: TensorInfo) -> bool:
        """Whether a copied tensor is the norm or router of a folded layer; then it is checked here."""
        ...

    def record(self, layer: int) -> Mapping[str, Any] | None:
        """What the journal tells of a layer that was calibrated."""
        ...

    def audit(self, step: Experts) -> None:
        """Judge each quantized weight of a chunk by its source value."""
        ...


class Kind(Protocol[S_contra]):
    """One kind of step. `label`: what a timeline calls it."""

    label: str

    def read(self, shop: Workshop, steps: tuple[S_contra, ...]) -> Iterator[tuple[Any, bool]]:
        """The source bytes of steps that are done together, in one piece or several; and whether it is the last."""
        ...

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        """The output tensors (or parts of them) of what was read; none where another rank writes them."""
        ...

    def check(self, step: S_contra, proof: Proof) -> None:
        """Hold what is stored against the source."""
        ...


class Copying:
    """A tensor's bytes as they are, in blocks, so that a large one does not have to fit; an empty one is one block."""

    label = "copy"

    def read(self, shop: Workshop, steps: tuple[Copy, ...]) -> Iterator[tuple[Array, bool]]:
        info = steps[0].info
        for start in range(0, max(info.size_bytes, 1), shop.piece_bytes):
            block = shop.empty((min(shop.piece_bytes, info.size_bytes - start),), np.uint8)
            shop.reader.read_range(info, start, block)
            yield block, start + len(block) >= info.size_bytes

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        (step,), block = loaded.steps, loaded.data
        assert isinstance(step, Copy)
        foreign = loaded.task.unit.name in ("towers", "unknown")  # where bytes by the name of a scale need not be E8M0
        if not (foreign and step.info.dtype == "U8"):
            refuse_non_finite(step.info, block)
        yield step.info.name, block if calibrator is None else calibrator.folded(step.info.name, block)

    def check(self, step: Copy, proof: Proof) -> None:
        if proof.folded(step.info):
            return
        done = 0
        for block, _ in self.read(proof.shop, (step,)):
            if not proof.is_stored(step.info.name, block, done):
                proof.problem(f"{step.info.name}: its bytes are not the source's")
                break
            done += len(block)
        proof.count("copied tensors")


class _Rows(Generic[S]):
    """Rows of a matrix, block by block. A subclass says as which `moves`, and how that is told."""

    label: str
    what: str  # of the source's it should have
    counted: str

    def moves(self, shop: Workshop, step: S) -> Reorder:
        raise NotImplementedError

    def read(self, shop: Workshop, steps: tuple[S, ...]) -> Iterator[tuple[RowBlock, bool]]:
        step = self.moves(shop, steps[0])
        left = len(step.rows)
        half = shop.piece_bytes // 2  # FP8 becomes twice as large
        for block in read_blocks(shop.reader, step, block_bytes=half, empty=shop.empty):
            left -= len(block.values)
            yield block, not left

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        one: Any = loaded.steps[0]
        step, block = self.moves(shop, one), loaded.data
        if block.scales is None:
            refuse_non_finite(step.infos[0], block.values)
        yield block.entry.name, _moved(shop, step, block)

    def check(self, step: S, proof: Proof) -> None:
        moves = self.moves(proof.shop, step)
        done = dict.fromkeys((entry.name for entry in moves.entries), 0)
        wrong: dict[str, None] = {}
        for block, _ in self.read(proof.shop, (step,)):
            name, expected = block.entry.name, _moved(proof.shop, moves, block)
            if not proof.is_stored(name, expected, done[name]):
                wrong[name] = None
            done[name] += expected.nbytes
        for name in wrong:
            proof.problem(f"{name}: its {self.what} are not the source's")
        proof.count(self.counted, len(moves.entries))


class Reordering(_Rows[Reorder]):
    """Rows of q, k and v in another order; where FP8 cannot stay, as bf16."""

    label, what, counted = "reorder", "rows", "reordered tensors"

    def moves(self, shop: Workshop, step: Reorder) -> Reorder:
        return step


class Dequantizing(_Rows[Dequantize]):
    """A weight in FP8 or float32 as bf16."""

    label, what, counted = "dequantize", "values", "recomputed tensors"

    def moves(self, shop: Workshop, step: Dequantize) -> Reorder:
        return unmoved(step.weight, step.entries, shop.plan.layout.geometry)


class Computing(Generic[S]):
    """Values that follow from the source, so they are proven by computing them again. A subclass says `_values`."""

    label = "copy"

    def read(self, shop: Workshop, steps: tuple[S, ...]) -> Iterator[tuple[Any, bool]]:
        raise NotImplementedError

    def _values(self, shop: Workshop, step: S, data: Any) -> Produced:
        """The output tensors of what `read` gave."""
        raise NotImplementedError

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        step: Any = loaded.steps[0]
        yield from self._values(shop, step, loaded.data)

    def check(self, step: S, proof: Proof) -> None:
        for data, _ in self.read(proof.shop, (step,)):
            for name, expected in self._values(proof.shop, step, data):
                if not proof.is_stored(name, expected):
                    proof.problem(f"{name}: its values are not the source's")
                proof.count("recomputed tensors")


class Shaping(Computing[Shapes]):
    """The shapes of quantized weights, which packing hides; known without reading."""

    def read(self, shop: Workshop, steps: tuple[Shapes, ...]) -> Iterator[tuple[None, bool]]:
        yield None, True

    def _values(self, shop: Workshop, step: Shapes, data: None) -> Produced:
        for entry, shape in zip(step.entries, step.shapes, strict=True):
            yield entry.name, np.array(shape, np.int64)


class ScalingInputs:
    """Scales of activations: 1, or by the largest that the walk saw, which the journal tells `verify`."""

    label = "copy"

    def read(self, shop: Workshop, steps: tuple[InputScales, ...]) -> Iterator[tuple[None, bool]]:
        yield None, True

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        (step,) = loaded.steps
        assert isinstance(step, InputScales)
        if not step.calibrated:
            yield from scale_tensors(step, shop.plan.container, unit_amax(shop.plan.layout.geometry.experts))
            return
        assert calibrator is not None
        seen = calibrator.facts.input_amax, calibrator.facts.down_input_amax
        yield from scale_tensors(step, shop.plan.container, seen)

    def check(self, step: InputScales, proof: Proof) -> None:
        plan, by = proof.shop.plan, "journal's" if step.calibrated else "source's"
        experts = plan.layout.geometry.experts
        amax = recorded_amax(proof.record(step.layer), experts) if step.calibrated else unit_amax(experts)
        if amax is None:
            proof.problem(f"layer {step.layer}: the journal does not tell the largest input of each expert")
            return
        for name, expected in scale_tensors(step, plan.container, amax):
            if not proof.is_stored(name, expected):
                proof.problem(f"{name}: its values are not the {by}")
        proof.count("input scales", len(step.entries))


class KeepingExperts(Computing[Experts]):
    """A chunk of experts that a carve-out keeps, in bf16, FP8 or MXFP4. The calibration tokens go through it on all
    ranks."""

    label = "keep experts"

    def read(self, shop: Workshop, steps: tuple[Experts, ...]) -> Iterator[tuple[dict[str, Stack], bool]]:
        yield _read_chunk(shop, steps[0]), True

    def _values(self, shop: Workshop, step: Experts, data: dict[str, Stack]) -> Produced:
        names, layout = iter(step.entries), shop.plan.layout
        for expert in range(step.end - step.begin):
            for projection in PROJECTIONS:
                values, scales = data[projection]
                one = slice(expert, expert + 1)
                stack = Stack(values[one], None if scales is None else scales[one])
                weight = layout.expert(step.layer, step.begin + expert, projection)
                for array in _kept(shop, step, weight, stack):
                    yield next(names).name, array

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        (step,), stacks = loaded.steps, loaded.data
        assert isinstance(step, Experts)
        if calibrator is not None:
            calibrator.keep(step, {p: expanded(stack) for p, stack in stacks.items()} if step.as_codes else stacks)
        if loaded.task.writes:
            yield from self._values(shop, step, stacks)


def _in_bf16(shop: Workshop, weight: Weight, stack: Stack) -> Array:
    """A matrix, a stack of one, as bf16; blocks of FP8 that are lost by that are counted."""
    geometry = shop.plan.layout.geometry
    bits = dequantize(stack, weight, geometry, shop.engine)
    if stack.scales is not None:
        codes, scales = stack.values[0], stack.scales[0]
        lost = lost_blocks(codes, scales, scale_rows(weight.role, len(codes), len(scales), geometry), bits)
        shop.count_lost(weight.name, lost, scales.size)
    return bits


def _moved(shop: Workshop, step: Reorder, block: RowBlock) -> Array:
    """Rows of q, k and v as they go out, counted in the same way."""
    values = block_values(block, step.weight, shop.engine)
    if block.scales is not None and block.scale_row is not None:
        lost = lost_blocks(block.values, block.scales, block.scale_row, values)
        shop.count_lost(step.weight.name, lost, block.scales.size)
    return values


def _kept(shop: Workshop, step: Experts, weight: Weight, stack: Stack) -> Iterator[Array]:
    """What is stored of a kept matrix, a stack of one, in the order of its entries."""
    if step.kept == "bf16":
        refuse_non_finite(weight.info, stack.values, dtype="BF16" if weight.packed else None)
        yield _in_bf16(shop, weight, stack)
        return
    assert stack.scales is not None
    codes, scales, packed = stack.values[0], stack.scales[0], step.kept == "mxfp4"
    refuse_non_finite(packed_scale(weight) if packed else weight.infos[1], scales)
    if packed:
        rows, width = codes.shape
        stored = expert_tensors(shop.plan.container, MXFP4, rows, 2 * width)
        yield from ({"codes": codes, "scale": scales}[tensor.part] for tensor in stored)
        return
    refuse_non_finite(weight.info, codes)
    yield from (scales, codes)


class QuantizingExperts:
    """Chunks of experts in 4 bits. With calibration a round has one chunk a rank, which reads its own and no other."""

    label = "quantize experts"

    def read(self, shop: Workshop, steps: tuple[Experts, ...]) -> Iterator[tuple[Any, bool]]:
        if shop.plan.recipe.calibration is None:
            yield _read_chunk(shop, steps[0]), True
            return
        import torch  # torch is loaded only where it is needed

        from mimoquant.run.crossing import sent

        mine = steps[shop.rank : shop.rank + 1]
        yield sent(_read_chunk(shop, mine[0]), torch.device(shop.engine.name)) if mine else None, True

    def yielded(self, shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
        """With calibration, what was made of the round before: see `Workshop.rest`."""
        experts = [step for step in loaded.steps if isinstance(step, Experts)]
        if calibrator is None:
            yield from _stored(shop.plan, experts[0], _encoded(shop, experts[0], loaded.data))
            return
        finished = calibrator.encode(experts, loaded.data, wanted=loaded.task.writes)

        def made() -> Produced:
            chunks = finished()
            shop.count(calibrator.facts.clamped, experts[0])
            for step, parts in zip(experts, chunks, strict=False):
                yield from _stored(shop.plan, step, parts)

        yield from shop.rest()
        shop.begun.append(made)
        if shop.engine.name == "cpu":  # which gains nothing by it, and would hold two chunks
            yield from shop.rest()

    def check(self, step: Experts, proof: Proof) -> None:
        proof.audit(step)


_KEEPING, _QUANTIZING = KeepingExperts(), QuantizingExperts()
_KINDS: dict[type, Kind[Any]] = {
    Copy: Copying(),
    Reorder: Reordering(),
    Shapes: Shaping(),
    InputScales: ScalingInputs(),
    Dequantize: Dequantizing(),
}


def kind_of(step: Step) -> Kind[Any]:
    """What is done for a step."""
    if isinstance(step, Experts):
        return _KEEPING if step.fmt is None else _QUANTIZING
    return _KINDS[type(step)]


def yielded(shop: Workshop, loaded: Loaded, calibrator: Calibrator | None) -> Produced:
    """The output tensors (or parts of them) of what was loaded, in file order; none where another rank writes them."""
    kind = kind_of(loaded.steps[0]) if loaded.steps else None
    if kind is not _QUANTIZING:
        yield from shop.rest()
    if kind is not None:
        yield from kind.yielded(shop, loaded, calibrator)
    if loaded.last:
        yield from shop.rest()


def label(loaded: Loaded) -> str:
    """What the steps are called in a timeline."""
    return kind_of(loaded.steps[0]).label if loaded.steps else Copying.label


def _read_chunk(shop: Workshop, step: Experts) -> dict[str, Stack]:
    layer, begin, end = step.layer, step.begin, step.end
    empty = shop.empty if step.as_codes else shop.engine.empty
    return read_experts(shop.reader, shop.plan.layout, layer, begin, end, empty, as_codes=step.as_codes)


def _encoded(shop: Workshop, step: Experts, stacks: dict[str, Stack]) -> Parts:
    assert step.fmt is not None
    recipe, layout = shop.plan.recipe, shop.plan.layout
    try:
        if recipe.casts:
            return cast(stacks, step.fmt, shop.empty)
        parts = shop.engine.encode(stacks, step.fmt, recipe.scale_search)
    except NonFiniteError as error:
        raise not_finite(layout.expert(step.layer, step.begin + error.expert, error.projection).name) from error
    except InexactError as error:
        weight = layout.expert(step.layer, step.begin + error.expert, error.projection)
        raise CheckpointError(
            f"{weight.name}: NVFP4 cannot hold it exactly, {error.blocks} of its blocks of 32 have an exponent more "
            "than 17 below the largest of its matrix (of gate and up together)",
            hint="keep MXFP4 for this checkpoint, or quantize the published FP8 files with nvfp4-mse",
        ) from error
    found = {projection: clamped(stacks[projection], parts[projection], step.fmt) for projection in PROJECTIONS}
    shop.count(named(layout, step.layer, step.begin, found), step)
    return parts


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
