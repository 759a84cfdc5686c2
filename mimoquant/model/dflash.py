"""The forward of a DFlash drafter: a block of tokens drafted in one pass from a backbone's hidden states.

Key idea: of the text the drafter sees no token but the last, only what the backbone made of all before it. With
h_i(s) the backbone's residual stream at position s after layer i (before any norm, also for the last layer):

    c(s) = hidden_norm(fc [ h_i(s) for i in captured ])              one vector a position, for all draft layers
    k(s), v(s) = rope(k_norm(W_k c(s))), W_v c(s) * value_scale      of each layer; c passes no input_layernorm

A block that starts after position t holds the token at t+1 and b-1 masks, at the positions t+1 .. t+b. Its states
pass ordinary pre-norm layers whose queries see k, v of positions 0..t and of the whole block, in both directions: no
place of the block is hidden from another. A window w hides what lies w or more positions behind a query. A sink is
one more logit a head. The mask at t+1+d, after the last norm and by the backbone's head, is the guess at that
position's own token.

A product with a concatenation is a sum, so captured states are added to `fc` one layer at a time and need not be kept.
A mask is the vector of mask_embedding.pt, else the backbone's embedding of the mask token; the former stands for that
token at the start of a block too, as both engines have it. (SGLang writes it into the backbone's own table; here the
backbone is left alone.)

Left out: caches. Positions are the text's: SGLang with `--speculative-draft-window-size` shifts them, which rotary
embeddings do not see. Source: vLLM 0.32 and SGLang 0.5.23, whose differences `drafter` lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimoquant.model.decoder_layer import DenseWeights, dense_mlp, linear, rms_norm, rotary_table, rotate
from mimoquant.model.drafter import Drafter

_ROWS = 2**13  # of blocks that go through the drafter together
_SCORE_BYTES = 256 * 2**20  # of attention scores that are held at once


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """q [N*D, H], k and v [K*D, H], o [H, N*D]; query and key norms [D]; sink [N] or None."""

    input_norm: Tensor
    post_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_norm: Tensor
    k_norm: Tensor
    sink: Tensor | None
    mlp: DenseWeights


@dataclass(frozen=True, slots=True)
class DrafterWeights:
    """fc [H, captured * H], norms [H]; `mask` [H] replaces the backbone's embedding of the mask token, if given."""

    fc: Tensor
    hidden_norm: Tensor
    layers: list[DraftLayer]
    norm: Tensor
    mask: Tensor | None


def fuse(hidden_BTH: Tensor, place: int, weights: DrafterWeights) -> Tensor:
    """The part of fc's product [B, T, H] that comes from the `place`-th captured layer."""
    width = hidden_BTH.shape[-1]
    return linear(hidden_BTH, weights.fc[:, place * width : (place + 1) * width])


def draft_blocks(
    fused_BTH: Tensor, embedded_BTH: Tensor, mask_H: Tensor, weights: DrafterWeights, drafter: Drafter, starts: Tensor
) -> Tensor:
    """What the last norm gives at the masks of the blocks after positions `starts` [S]: [B, S, b - 1, H].

    Args:
        fused_BTH: fc's product with the captured hidden states, not normed. embedded_BTH: the text's tokens.
    """
    batch, tokens, _ = fused_BTH.shape
    context = rms_norm(fused_BTH, weights.hidden_norm, drafter.eps)
    table = rotary_table(tokens + drafter.block, drafter.rotary_dim, drafter.rope_theta, fused_BTH)
    seen = torch.arange(tokens, device=fused_BTH.device)
    held = [_keys_values(context, layer, drafter, table, seen) for layer in weights.layers]
    rows = min(_ROWS, _SCORE_BYTES // (4 * drafter.heads * (tokens + drafter.block)))
    parts = []
    for some in torch.split(starts, max(1, rows // (batch * drafter.block))):
        masks = mask_H.expand(batch, len(some), drafter.depth, -1)
        hidden = torch.cat((embedded_BTH[:, some + 1].unsqueeze(2), masks), dim=2).flatten(1, 2)
        for layer, context_kv in zip(weights.layers, held, strict=True):
            normed = rms_norm(hidden, layer.input_norm, drafter.eps)
            hidden = hidden + _attention(normed, layer, context_kv, some, drafter, table)
            hidden = hidden + dense_mlp(rms_norm(hidden, layer.post_norm, drafter.eps), layer.mlp)
        parts.append(rms_norm(hidden, weights.norm, drafter.eps).view(batch, len(some), drafter.block, -1)[:, :, 1:])
    return torch.cat(parts, dim=1)


def _keys_values(
    states_BTH: Tensor, layer: DraftLayer, drafter: Drafter, table: tuple[Tensor, Tensor], positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of states at `positions` [T], both [B, K, T, D]."""
    shape = (*states_BTH.shape[:2], drafter.kv_heads, drafter.head_dim)
    key, value = (linear(states_BTH, weight).view(shape) for weight in (layer.k, layer.v))
    key = _turned(key, layer.k_norm, drafter, table, positions)
    return key.transpose(1, 2), value.transpose(1, 2) * drafter.value_scale


def _turned(
    heads_BTND: Tensor, norm: Tensor, drafter: Drafter, table: tuple[Tensor, Tensor], positions: Tensor
) -> Tensor:
    cos, sin = (part[positions] for part in table)
    return rotate(rms_norm(heads_BTND, norm, drafter.eps), cos, sin)


def _attention(
    normed: Tensor,
    layer: DraftLayer,
    context_kv: tuple[Tensor, Tensor],
    starts: Tensor,
    drafter: Drafter,
    table: tuple[Tensor, Tensor],
) -> Tensor:
    """normed [B, S*b, H], the blocks one after another; each sees its context and itself. Softmax in float32."""
    (key, value), kv_heads, dim = context_kv, drafter.kv_heads, drafter.head_dim
    batch, rows, tokens = *normed.shape[:2], key.shape[2]
    groups, block = drafter.heads // kv_heads, (len(starts), drafter.block)
    place = torch.arange(drafter.block, device=starts.device)
    positions = (starts[:, None] + 1 + place).flatten()
    query = linear(normed, layer.q).view(batch, rows, drafter.heads, dim)
    query = _turned(query, layer.q_norm, drafter, table, positions)
    query = query.view(batch, rows, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)  # [B, K, G, S*b, D]
    own_key, own_value = (
        part.reshape(batch, kv_heads, 1, *block, dim) for part in _keys_values(normed, layer, drafter, table, positions)
    )
    to_context = (query @ key.unsqueeze(2).transpose(-1, -2)).masked_fill(
        ~_visible(starts, positions, tokens, drafter), float("-inf")
    )
    to_own = (query.reshape(batch, kv_heads, groups, *block, dim) @ own_key.transpose(-1, -2)).flatten(3, 4)
    scores = torch.cat((to_context, to_own), dim=-1).to(torch.float32) * dim**-0.5
    if layer.sink is not None:
        sinks = layer.sink.to(torch.float32).view(1, kv_heads, -1, 1, 1)
        scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
    share = scores.softmax(-1).to(value.dtype)
    of_own = share[..., tokens : tokens + drafter.block].reshape(batch, kv_heads, groups, *block, -1) @ own_value
    mixed = share[..., :tokens] @ value.unsqueeze(2) + of_own.flatten(3, 4)
    return linear(mixed.permute(0, 3, 1, 2, 4).flatten(2), layer.o)


def _visible(starts: Tensor, positions: Tensor, tokens: int, drafter: Drafter) -> Tensor:
    """[S*b, T]: whether a query of a block sees a position of the text: up to the block's start, inside the window."""
    past = torch.arange(tokens, device=starts.device)[None, :]
    seen = past <= starts.repeat_interleave(drafter.block)[:, None]
    return seen if drafter.window is None else seen & (positions[:, None] - past < drafter.window)
