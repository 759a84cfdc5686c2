"""Row order of a fused, tensor-parallel-interleaved qkv, and of its FP8 scale rows; how many ranks it has.

Key idea: both are index arrays. The published fused tensor is [q_0 k_0 v_0 | q_1 k_1 v_1 | ...] in `chunks` ranks,
each rank blocked into 128 rows by itself, so its last block is partial and a block may hold rows of k and v together.
Reading it as [Q|K|V], or cropping the padded scale rows, loads without an error and is wrong. [Q|K|V] is one chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mimoquant.errors import CheckpointError

if TYPE_CHECKING:
    from mimoquant.model.geometry import Geometry

Indexes = npt.NDArray[np.int64]
BLOCK = 128  # rows that share an FP8 scale


class Header(Protocol):
    """A tensor of an index or of a plan."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def deinterleave_rows(rows: tuple[int, int, int], chunks: int) -> Indexes:
    """For each row of [Q|K|V], the row of the interleaved tensor that holds it. `rows`: output rows of q, k, v."""
    per_rank = [count // chunks for count in rows]
    if any(count % chunks for count in rows):
        raise ValueError(f"q, k, v rows {rows} do not split over {chunks} ranks")
    starts = np.concatenate([[0], np.cumsum(per_rank)])
    rank_begin = np.arange(chunks)[:, None] * starts[-1]
    parts = [rank_begin + np.arange(starts[i], starts[i + 1])[None, :] for i in range(3)]
    return np.concatenate([part.reshape(-1) for part in parts])


def scale_row_of(rows: int, scale_rows: int, chunks: int, *, ranked: bool, block: int = BLOCK) -> Indexes:
    """For each of `rows` weight rows, the scale row that applies: blocks of 128 restart at every rank if `ranked`."""
    if not ranked:
        return np.arange(rows) // block
    per_rank = rows // chunks
    row = np.arange(rows)
    return row // per_rank * math.ceil(per_rank / block) + row % per_rank // block


@functools.lru_cache  # two kinds of layer, asked once a layer
def moved_rows(rows: tuple[int, int, int], before: int, after: int) -> Indexes:
    """For each row of a qkv in `after` chunks, the row that holds it in `before` chunks.

    Separate q, k, v, one after the other, have the order of one chunk.
    """
    return deinterleave_rows(rows, before)[np.argsort(deinterleave_rows(rows, after))]


def moved_scale_rows(before: Indexes, after: Indexes) -> Indexes | None:
    """For each scale row of a tensor whose rows were moved, the scale row it had; None where that would be several.

    Args:
        before, after: for each row of the tensor as it is now, the scale row that applied and the one that will.
    """
    kept = np.empty(int(after.max()) + 1, np.int64)
    kept[after] = before
    return kept if np.array_equal(kept[after], before) else None


def possible_chunks(geometry: Geometry) -> list[int]:
    """Numbers of chunks that no head is cut by."""
    kinds = (geometry.global_attention, geometry.sliding_attention)
    common = math.gcd(*(count for kind in kinds for count in (kind.heads, kind.kv_heads)))
    return [chunks for chunks in range(1, common + 1) if common % chunks == 0]


def with_chunks(geometry: Geometry, tensors: Mapping[str, Header], metadata: dict[str, Any], where: str) -> Geometry:
    """The geometry with the chunks that its fused qkv is stored in: `tp_size` of the index, or what scale rows prove.

    Raises CheckpointError where they contradict each other, or neither tells: in bf16 all orders look alike. ModelOpt's
    exports are [Q|K|V], but for those that leave the published FP8 blocks as they were.
    """
    scales = {name: scale for name, scale in tensors.items() if name.endswith("self_attn.qkv_proj.weight_scale_inv")}
    if not geometry.fused_qkv or (geometry.mxfp8 and not any(scale.dtype == "F32" for scale in scales.values())):
        return geometry
    published = geometry.global_attention.kv_heads
    said, possible = metadata.get("tp_size"), possible_chunks(geometry)
    if said is not None and (type(said) is not int or said not in possible):
        kinds = (geometry.global_attention, geometry.sliding_attention)
        raise CheckpointError(
            f"{where}: the index says the fused qkv is interleaved over tp_size {said!r}, its "
            f"{' and '.join(str(kind.rows) for kind in kinds)} rows split over {', '.join(map(str, possible))}"
        )
    blocked = [
        (weight.shape[0], scale.shape[0])
        for name, scale in scales.items()
        if (weight := tensors.get(name.removesuffix("_scale_inv"))) and len(weight.shape) == len(scale.shape) == 2
    ]
    proven = [n for n in possible if all(n * math.ceil(rows / n / BLOCK) == count for rows, count in blocked)]
    if said is None and len(proven) > 1:
        raise CheckpointError(
            f"{where}: the fused qkv may be interleaved over {' or '.join(map(str, proven))} ranks, and the index has "
            "no tp_size",
            hint=f'add "tp_size" to the metadata of the index: {published} for the published order, 1 for [Q|K|V]',
        )
    if said is not None and proven and said not in proven:
        raise CheckpointError(
            f"{where}: the index says the fused qkv is interleaved over tp_size {said}, its scale rows over "
            f"{' or '.join(map(str, proven))}"
        )
    # with none proven, the scales have no right shape, which is told by name when they are read
    return replace(geometry, qkv_chunks=said or (proven[0] if proven else published))
