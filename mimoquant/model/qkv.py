"""Row order of a fused, tensor-parallel-interleaved qkv, and of its FP8 scale rows.

Key idea: both are index arrays. The published fused tensor is [q_0 k_0 v_0 | q_1 k_1 v_1 | ...] in `chunks` ranks,
each rank blocked into 128 rows by itself, so its last block is partial and a block may hold rows of k and v together.
Reading it as [Q|K|V], or cropping the padded scale rows, loads without an error and is wrong.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Indexes = npt.NDArray[np.int64]


def deinterleave_rows(rows: tuple[int, int, int], chunks: int) -> Indexes:
    """For each row of [Q|K|V], the row of the interleaved tensor that holds it. `rows`: output rows of q, k, v."""
    per_rank = [count // chunks for count in rows]
    if any(count % chunks for count in rows):
        raise ValueError(f"q, k, v rows {rows} do not split over {chunks} ranks")
    starts = np.concatenate([[0], np.cumsum(per_rank)])
    rank_begin = np.arange(chunks)[:, None] * starts[-1]
    parts = [rank_begin + np.arange(starts[i], starts[i + 1])[None, :] for i in range(3)]
    return np.concatenate([part.reshape(-1) for part in parts])


def scale_row_of(rows: int, scale_rows: int, chunks: int, *, ranked: bool, block: int = 128) -> Indexes:
    """For each of `rows` weight rows, the scale row that applies: blocks of 128 restart at every rank if `ranked`."""
    if not ranked:
        return np.arange(rows) // block
    per_rank = rows // chunks
    row = np.arange(rows)
    return row // per_rank * math.ceil(per_rank / block) + row % per_rank // block
