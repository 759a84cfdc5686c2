"""Gradients of one decoder layer with respect to its input, weights fixed: what `decoder_layer` does, differentiated.

Key idea: written out by hand, several gradients (`draws`) at a time, because three things follow that automatic
differentiation does not give. What depends on the forward alone (rotated heads, shares, gate and up) is made once for
all draws. The forward's last products are never made: a routing weight's gradient is <W_downᵀ y, inner>, so down_proj
is used from one side only. And every sum has a fixed order on a GPU: experts are grouped as the forward groups them,
and their results are added expert by expert.

The top-k choice is taken as fixed; the weights of the chosen are differentiated through normalisation and sigmoid.
Products are those of `decoder_layer.product`: float32 rows go in exact parts, bfloat16 rows in one.

Shapes: D draws, else as in `decoder_layer`; y is the gradient of a part's output. Tests hold everything equal to
automatic differentiation of the forward, and whole layers to that of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.model.attention import Heads, attention_shares
from mimoquant.model.decoder_layer import (
    AttentionWeights,
    DenseWeights,
    ExpertChunk,
    ForwardConfig,
    Router,
    attention_heads,
    float32_parts,
    group_of_chunk,
    product,
    rotate,
)
from mimoquant.model.dispatch import Dispatch, Group, Routing


def linear_gradient(y: Tensor, weight: Tensor) -> Tensor:
    """y [..., O] times weight [O, I]: the gradient of `linear`'s rows, [..., I]."""
    turned = weight.transpose(-1, -2)
    return product(float32_parts(y, turned), turned)


def norm_gradient(y: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of `rms_norm`: y [D, ..., H] and its input [..., H], both float32."""
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    normed, wide = hidden * scale, y * weight.to(y.dtype)
    return scale * (wide - normed * (wide * normed).mean(-1, keepdim=True))


# --- attention --------------------------------------------------------------------------------------------------------


def attention_gradient(
    y_DBTH: Tensor,
    hidden_BTH: Tensor,
    weights: AttentionWeights,
    config: ForwardConfig,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Of `attention`: y [D, B, T, H] and its input. Gradients go through the weights as rows of `dtype`."""
    heads = attention_heads(hidden_BTH, weights, config)
    out = torch.empty_like(y_DBTH)
    mixed = [_by_head(linear_gradient(y.to(dtype), weights.o), weights) for y in y_DBTH]
    for draw, (query, key, value) in enumerate(_heads_gradients(mixed, heads, weights.sink)):
        flat = query.permute(0, 3, 1, 2, 4).flatten(2, 3)
        parts = (
            (rotate(flat, heads.cos, -heads.sin), weights.q),
            (rotate(key.permute(0, 2, 1, 3), heads.cos, -heads.sin), weights.k),
            (value.permute(0, 2, 1, 3) * config.value_scale, weights.v),
        )
        out[draw] = sum(linear_gradient(part.flatten(2).to(dtype), weight) for part, weight in parts)
    return out


def _by_head(rows_BTO: Tensor, weights: AttentionWeights) -> Tensor:
    """[B, T, N*V] as [B, K, G, T, V]."""
    batch, tokens, _ = rows_BTO.shape
    groups = weights.heads // weights.kv_heads
    return rows_BTO.view(batch, tokens, weights.kv_heads, groups, -1).permute(0, 2, 3, 1, 4)


def _heads_gradients(y: list[Tensor], heads: Heads, sink: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each draw the gradients of rotated queries, rotated keys and values, in the shapes of `Heads`; y of each draw
    [B, K, G, T, V]. Queries come in the forward's chunks, whose shares are made again once for all draws.

    A sink takes a share of the probability and gives nothing, so its softmax is differentiated as any other.
    """
    out = [(torch.empty_like(heads.query), torch.zeros_like(heads.key), torch.zeros_like(heads.value)) for _ in y]
    for begin, end, first in heads.chunks():
        query, key, value = heads.query[..., begin:end, :], heads.key[..., first:end, :], heads.value[..., first:end, :]
        share = attention_shares(query, key, sink, begin - first, heads.window, heads.scale)
        rows = query.flatten(2, 3)  # [B, K, G*t, D]: the queries of a key-value head as one matrix
        for (of_query, of_key, of_value), of_draw in zip(out, y, strict=True):
            part = of_draw[..., begin:end, :].flatten(2, 3)
            of_share = (part @ value.transpose(-1, -2)).view_as(share)
            of_score = share * (of_share - (of_share * share).sum(-1, keepdim=True)) * heads.scale
            flat = of_score.flatten(2, 3)
            of_query[..., begin:end, :] = (flat @ key).view_as(query)
            of_key[..., first:end, :] += flat.transpose(-1, -2) @ rows
            of_value[..., first:end, :] += share.flatten(2, 3).transpose(-1, -2) @ part
    return out


# --- MLPs -------------------------------------------------------------------------------------------------------------


def dense_gradient(y: Tensor, hidden: Tensor, weights: DenseWeights) -> Tensor:
    """Of `dense_mlp`: y [D, ..., H] and its input [..., H]."""
    gate, up = (product(float32_parts(hidden, w), w) for w in (weights.gate, weights.up))
    of_gate, of_up = _swiglu_gradient(linear_gradient(y, weights.down), gate, up)
    return linear_gradient(of_gate, weights.gate) + linear_gradient(of_up, weights.up)


def _swiglu_gradient(y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, y that of silu(gate) * up."""
    bent = gate.sigmoid()
    return y * (up * bent * (1 + gate * (1 - bent))), y * (gate * bent)


def routing_gradient(y_DNk: Tensor, tokens_NH: Tensor, routing: Routing, router: Router) -> Tensor:
    """Of the routing weights [N, k] with respect to the router's input [N, H] (float32): [D, N, H]."""
    scores = F.linear(tokens_NH, router.weight).sigmoid().gather(-1, routing.experts)
    centred = y_DNk - (y_DNk * routing.weights).sum(-1, keepdim=True)
    of_score = centred / (scores.sum(-1, keepdim=True) + 1e-20) * scores * (1 - scores)
    wide = of_score.new_zeros(*of_score.shape[:2], len(router.weight))
    return wide.scatter_(-1, routing.experts.expand_as(of_score), of_score) @ router.weight


class ExpertsGradient:
    """Gradients at the experts of some tokens, chunk by chunk: `rows` [D, N, H] (float32), the sums that `through` has
    made so far; then `gains`.

    Args:
        tokens: what the experts see [N, H]; y: gradients at their sum [D, N, H]. Their dtype is that of the products.
    """

    def __init__(self, tokens: Tensor, y: Tensor, routing: Routing, dispatch: Dispatch) -> None:
        self.tokens, self.y, self.dispatch, self.shape = tokens, y, dispatch, routing.experts.shape
        self.rows = torch.zeros(y.shape, device=y.device)
        self._order = torch.argsort(routing.experts.flatten(), stable=True)  # as `Dispatch.of` sorts pairs
        self._gains = torch.zeros(len(y), len(self._order) + 1, device=y.device)  # the last is what padding falls into

    def through(self, chunk: ExpertChunk) -> None:
        """Add what the chunk's experts give."""
        for group in self.dispatch.groups(chunk.begin, chunk.begin + len(chunk.gate)):
            pairs = self._pairs(group)
            for draw, (rows, gains) in enumerate(expert_gradients(self.tokens, self.y, group, chunk)):
                self._gains[draw, pairs] = gains
                for slot, count in enumerate(group.counts):
                    self.rows[draw].index_add_(0, group.rows[slot, :count], rows[slot, :count])

    def gains(self) -> Tensor:
        """Gradients of the routing weights [D, N, k], after all chunks."""
        out = torch.empty_like(self._gains[:, :-1])
        out[:, self._order] = self._gains[:, :-1]
        return out.view(-1, *self.shape)

    def _pairs(self, group: Group) -> Tensor:
        """Places [m, c] of a group's pairs among those sorted by expert."""
        starts = self.dispatch.starts[group.members][:, None]
        slot = torch.arange(group.rows.shape[1], device=starts.device)[None, :]
        return torch.where(group.used, starts + slot, len(self._order))


def expert_gradients(
    tokens_NH: Tensor, y_DNH: Tensor, group: Group, chunk: ExpertChunk
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each draw: gradients at the group's tokens [m, c, H] and of their gains [m, c]; padded rows hold anything."""
    gate_w, up_w, down_w = group_of_chunk(group, chunk)
    parts = float32_parts(group.of(tokens_NH), gate_w)
    gate, up = product(parts, gate_w), product(parts, up_w)
    inner = F.silu(gate) * up
    for y_NH in y_DNH:
        of_inner = linear_gradient(group.of(y_NH), down_w)
        gains = (of_inner * inner).sum(-1)
        of_gate, of_up = _swiglu_gradient(of_inner * group.gains[..., None], gate, up)
        rows = linear_gradient(of_gate.to(y_NH.dtype), gate_w)
        yield rows.add_(linear_gradient(of_up.to(y_NH.dtype), up_w)), gains
