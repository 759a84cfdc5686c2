"""How much each query takes of each key's value, and what it gets: attention between projections.

Key idea: queries go in chunks, with the keys that any of them sees, so a long sequence never holds a whole score
matrix. Where Triton is, the softmax is one pass over the scores. On a CPU a chunk goes in pieces whose scores stay in
its caches, and scores are made only of keys up to a piece's last query: half of them, where attention is global.

Shapes: B sequences, T tokens, K key-value heads, G queries to each, D head_dim, V v_head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.quant.kernels.triton_modules import triton_kernels

_QUERY_CHUNK_BYTES = 256 * 2**20  # of attention scores that are held at once
_LONGEST = 2**15  # keys whose scores one program holds
_PIECE_BYTES, _PIECE_QUERIES = 2**21, 64  # of scores, and of each head, that are made together on a CPU
_FEWEST_QUERIES = 16  # that are a piece of their own: products of a row or two have sums in another order


@dataclass(frozen=True, slots=True)
class Heads:
    """Rotated queries [B, K, G, T, D] (G to a key-value head), rotated keys [B, K, T, D], values [B, K, T, V].

    `cos`, `sin`: the rotation [T, width]. `window`: how many positions a query sees, its own included.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    window: int

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Queries begin..end that are taken together, and the first key that any of them sees."""
        batch, kv_heads, groups, tokens, _ = self.query.shape
        row_bytes = 4 * batch * kv_heads * groups * min(tokens, 2 * self.window)
        chunk = min(max(_QUERY_CHUNK_BYTES // row_bytes, 16), self.window)
        for begin in range(0, tokens, chunk):
            yield begin, min(begin + chunk, tokens), max(0, begin - self.window + 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, offset: int, window: int, scale: float
) -> Tensor:
    """query [B, K, G, t, D] over key and value [B, K, s, D or V]; query i stands at position i + offset of the keys."""
    if query.is_cuda or query.requires_grad:
        return _times(attention_shares(query, key, sink, offset, window, scale).to(value.dtype), value)
    batch, queries, keys = len(query), query.shape[3], key.shape[2]
    rows = min(queries, _PIECE_QUERIES)
    begins = range(0, max(1, queries - _FEWEST_QUERIES + 1), rows)
    sequences = max(1, _PIECE_BYTES // (4 * query[0, ..., 0].numel() // queries * rows * keys))
    out = value.new_empty(*query.shape[:4], value.shape[-1])
    for first, begin in itertools.product(range(0, batch, sequences), begins):
        end = queries if begin == begins[-1] else begin + rows
        own, now = slice(first, first + sequences), slice(begin, end)
        seen = min(-(-(end + offset) // _PIECE_QUERIES) * _PIECE_QUERIES, keys)  # whole vectors of the sums
        share = attention_shares(query[own, ..., now, :], key[own, :, :seen], sink, offset + begin, window, scale)
        # with the zeros of what is not seen, the product sums up as it does for all queries at once
        out[own, ..., now, :] = _times(F.pad(share, (0, keys - seen)).to(value.dtype), value[own])
    return out


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [B, K, G, t, n] times a matrix [B, K, n, m] of each key-value head. The rows of all its queries go together:
    else each would get a copy of the matrix."""
    out: Tensor = rows.flatten(2, 3) @ matrix
    return out.view(*rows.shape[:4], -1)


def attention_shares(query: Tensor, key: Tensor, sink: Tensor | None, offset: int, window: int, scale: float) -> Tensor:
    """How much of each key's value a query takes, [B, K, G, t, s] float32; see `attend`.

    Softmax in float32, in the memory of the scores: to be given new pages for each step took longer than the steps. The
    sink is one more logit a head, whose share of the probability goes nowhere.
    """
    scores = _times(query, key.transpose(-1, -2)).to(torch.float32)
    if (kernels := _kernels(scores)) and scores.is_contiguous() and key.shape[-2] <= _LONGEST:
        shares: Tensor = kernels.shares(scores, sink, offset, window, scale)
        return shares
    scores = scores.mul_(scale)
    distance = torch.arange(query.shape[-2], device=query.device)[:, None] + offset
    distance = distance - torch.arange(key.shape[-2], device=query.device)[None, :]
    scores.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
    peak = scores.detach().amax(-1, keepdim=True)  # what is subtracted from all alike changes no share
    if sink is not None:
        sinks = sink.to(torch.float32).view(query.shape[1], query.shape[2], 1, 1)
        peak = torch.maximum(peak, sinks.detach())
    share = scores.sub_(peak).exp_()
    total = share.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sinks - peak).exp()
    return share / total if share.requires_grad else share.div_(total)


def _kernels(scores: Tensor) -> Any:
    """The module with the softmax as one kernel, for scores that nobody differentiates; or None."""
    return triton_kernels("softmax_cuda") if scores.is_cuda and not scores.requires_grad else None
