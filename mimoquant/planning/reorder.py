"""Rows of a layer's q, k and v in another order: one step of a plan, and how it is read.

Key idea: every layout is a permutation of the rows of [Q|K|V], so a step is an index array: for each row that goes out,
the row of the source that holds it. bf16 is always moved exactly. FP8 is where every block of 128 rows that goes out
takes its rows from one scale row; then codes and scales are moved and nothing is computed. Else the value has to be:
the product of code and scale, rounded once to bf16, which is what every reader makes of it. So are float32 matrices.

Rows come in blocks, so memory does not depend on the size of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry
from mimoquant.errors import UsageError
from mimoquant.model.geometry import Geometry
from mimoquant.model.layout import Weight, scale_row_counts
from mimoquant.model.qkv import Indexes, moved_rows, moved_scale_rows
from mimoquant.quant.stack import Engine, NonFiniteError
from mimoquant.weights.stored import not_finite, rounded, scale_rows

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Reorder:
    """Rows of `infos` go out as `entries` in another order, both taken one tensor after the other.

    rows: for each row that goes out, the row of `infos`. scale_rows: for each row that goes out, its row of `scales`,
    which it is multiplied by to become bf16; None: bytes are moved.
    """

    weight: Weight  # the first of those that are moved
    infos: tuple[TensorInfo, ...]
    entries: tuple[Entry, ...]
    rows: Indexes = field(compare=False, repr=False)
    scales: tuple[TensorInfo, ...] = ()
    scale_rows: Indexes | None = field(default=None, compare=False, repr=False)

    @property
    def role(self) -> str:
        return self.weight.role


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Some rows of an entry, as stored in the source; where they are FP8 to be bf16, with all scales."""

    entry: Entry
    values: Array
    scales: Array | None = None
    scale_row: Indexes | None = None


def reorder(weights: list[Weight], before: Geometry, after: Geometry, *, sliding: bool, bf16: bool) -> list[Reorder]:
    """The steps that bring a layer's qkv (`weights`: the fused one, or q, k, v) from one geometry's order to another's.

    Raises UsageError where FP8 codes cannot be kept: a block that goes out would need several scales.
    """
    rows = (after.sliding_attention if sliding else after.global_attention).rows
    order = moved_rows(rows, _chunks(before), _chunks(after))
    infos = tuple(weight.info for weight in weights)
    dtypes = {info.dtype for info in infos}
    first, stem = weights[0], weights[0].name.removesuffix(f"{weights[0].role}_proj.weight")
    names = [("qkv", sum(rows))] if after.fused_qkv else list(zip("qkv", rows, strict=True))

    def entries(dtype: str) -> tuple[Entry, ...]:
        return tuple(Entry(f"{stem}{part}_proj.weight", dtype, (count, after.hidden)) for part, count in names)

    if dtypes in ({"BF16"}, {"F32"}):
        return [Reorder(first, infos, entries("BF16"), order)]
    if len(dtypes) > 1:
        found = ", ".join(f"{info.name} is {info.dtype}" for info in infos)
        raise UsageError(f"{found}: they cannot be moved together", hint="convert such a layer's weights to one dtype")
    scales = tuple(weight.scale for weight in weights if weight.scale)
    starts = np.cumsum([0, *(scale.shape[0] for scale in scales)])
    scale_of = np.concatenate(
        [
            start + scale_rows(weight.role, weight.info.shape[0], scale.shape[0], before)
            for weight, scale, start in zip(weights, scales, starts, strict=False)
        ]
    )[order]
    if bf16:
        return [Reorder(first, infos, entries("BF16"), order, scales, scale_of)]
    kept = _kept_scales(entries("F8_E4M3"), scale_of, after)
    blocks = tuple(Entry(f"{entry.name}_scale_inv", "F32", (len(rows), scales[0].shape[1])) for entry, rows in kept)
    return [
        Reorder(first, scales, blocks, np.concatenate([rows for _, rows in kept])),
        Reorder(first, infos, entries("F8_E4M3"), order),
    ]


def unmoved(weight: Weight, entries: tuple[Entry, ...], geometry: Geometry) -> Reorder:
    """A matrix in FP8 or float32 as bf16, its rows where they are."""
    rows = weight.info.shape[0]
    if weight.scale is None:
        return Reorder(weight, (weight.info,), entries, np.arange(rows))
    scale_row = scale_rows(weight.role, rows, weight.scale.shape[0], geometry)
    return Reorder(weight, (weight.info,), entries, np.arange(rows), (weight.scale,), scale_row)


def _chunks(geometry: Geometry) -> int:
    """Separate q, k, v, one after the other, lie as one chunk does."""
    return geometry.qkv_chunks if geometry.fused_qkv else 1


def _kept_scales(entries: tuple[Entry, ...], scale_of: Indexes, after: Geometry) -> list[tuple[Entry, Indexes]]:
    """For each FP8 tensor that goes out, the source's scale row of each of its scale rows."""
    kept, start = [], 0
    for entry in entries:
        role, count = entry.name.split(".")[-2].removesuffix("_proj"), entry.shape[0]
        before = scale_of[start : start + count]
        found = [
            moved
            for blocks in scale_row_counts(after, role, count)
            if (moved := moved_scale_rows(before, scale_rows(role, count, blocks, after))) is not None
        ]
        if not found:
            raise UsageError(
                f"{entry.name}: cannot stay FP8 in this layout, rows that would share a block of 128 have other scales",
                hint="--dtype bf16 writes the exact product of code and scale, rounded once as every reader does",
            )
        kept.append((entry, found[0]))
        start += count
    return kept


def read_blocks(
    reader: CheckpointReader, step: Reorder, *, block_bytes: int = 2**24, empty: Callable[..., Array] = np.empty
) -> Iterator[RowBlock]:
    """What goes out, in order and in blocks: rows of one entry each, in memory from `empty`. A block ends where a scale
    row does, if one ends in it, so that what is looked at by FP8 blocks is seen whole."""
    info = step.infos[0]
    width = info.size_bytes // info.shape[0]
    dtype = {"BF16": np.uint16, "F32": np.float32}.get(info.dtype, np.uint8)
    scales = None
    if step.scale_rows is not None:
        parts = [reader.read(scale.name).view(np.float32).reshape(scale.shape) for scale in step.scales]
        scales = np.concatenate(parts)
    start, height = 0, max(1, block_bytes // width)
    for entry in step.entries:
        begin, stop = start, start + entry.shape[0]
        while begin < stop:
            end = _end(step.scale_rows, begin, min(begin + height, stop), stop)
            raw = empty((end - begin, width), np.uint8)
            _gather(reader, step.infos, step.rows[begin:end], raw)
            scale_row = None if step.scale_rows is None else step.scale_rows[begin:end]
            yield RowBlock(entry, raw.view(dtype), scales, scale_row)
            begin = end
        start = stop


def _end(scale_rows: Indexes | None, begin: int, end: int, stop: int) -> int:
    """Where a block ends that may go on to `end`, of rows up to `stop`."""
    if scale_rows is None or end == stop:
        return end
    changes = np.flatnonzero(np.diff(scale_rows[begin : end + 1]))
    return begin + int(changes[-1]) + 1 if len(changes) else end


def _gather(reader: CheckpointReader, infos: tuple[TensorInfo, ...], rows: Indexes, out: Array) -> None:
    """Read `rows` of tensors that are taken one after the other, run by run."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for at, run in zip([0, *breaks.tolist()], np.split(rows, breaks), strict=True):
        begin, end, first = int(run[0]), int(run[-1]) + 1, 0
        for info in infos:
            low, high = max(begin, first), min(end, first + info.shape[0])
            if low < high:
                part = out[at + low - begin : at + high - begin]
                reader.read_range(info, (low - first) * out.shape[1], part.reshape(-1))
            first += info.shape[0]


def _rounds(block: RowBlock) -> bool:
    return block.values.dtype == np.float32 and block.entry.dtype == "BF16"


def block_values(block: RowBlock, weight: Weight, engine: Engine) -> Array:
    """The rows as they go out. Raises CheckpointError where a product is not finite."""
    if block.scales is None or block.scale_row is None:
        return rounded(block.values, weight.info) if _rounds(block) else block.values
    try:
        return engine.dequantize(block.values, block.scales, block.scale_row)
    except NonFiniteError as error:
        raise not_finite(weight.name) from error
