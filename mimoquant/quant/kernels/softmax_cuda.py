"""The softmax of attention as one Triton kernel: a program has a query's scores, and writes its share of each key.

Shapes: `model.attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shares(scores, sinks, scale, keys, queries, heads, offset, window, HAS_SINK: tl.constexpr, N: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    distance = (row % queries).to(tl.int32) + offset - j
    place, seen = scores + row * keys + j, (j < keys) & (distance >= 0) & (distance < window)
    x = tl.load(place, mask=seen, other=0.0) * scale
    x = tl.where(seen, x, float("-inf"))
    peak = tl.max(x, axis=0)
    if HAS_SINK:
        sink = tl.load(sinks + row // queries % heads)
        peak = tl.maximum(peak, sink)
    share = tl.exp(x - peak)
    total = tl.sum(share, axis=0)
    if HAS_SINK:
        total += tl.exp(sink - peak)
    tl.store(place, tl.div_rn(share, tl.zeros_like(share) + total), mask=j < keys)


def shares(scores_BKGts: Tensor, sink: Tensor | None, offset: int, window: int, scale: float) -> Tensor:
    """See `model.attention.attention_shares`; float32, contiguous, overwritten."""
    queries, keys = scores_BKGts.shape[-2:]
    heads = scores_BKGts.shape[1] * scores_BKGts.shape[2]
    size = triton.next_power_of_2(keys)
    _shares[(scores_BKGts.numel() // keys,)](
        scores_BKGts,
        scores_BKGts if sink is None else sink.to(torch.float32).contiguous(),
        scale,
        keys,
        queries,
        heads,
        offset,
        window,
        HAS_SINK=sink is not None,
        N=size,
        num_warps=min(16, max(1, size // 512)),
    )
    return scores_BKGts
