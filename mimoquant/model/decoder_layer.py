"""One MiMo-V2 decoder layer, forward only: the reference that every quality number rests on.

Key idea: plain tensor algebra without modules or caches, so that two sets of weights can be run side by side and a
layer's weights dropped right after. Attention goes over the queries in chunks, so a long sequence never holds a whole
score matrix; experts run as a few stacked products over token groups of similar size, never one by one. Weights stay
in bfloat16, which loses nothing; all arithmetic is float32. What is served is stored in bfloat16 after each operation
(`LayerRounding.stored`), where vLLM 0.33 does so: a norm, SiLU before it meets up, cosines, an expert's answer times
its gain, their sum.

Shapes: B sequences, T tokens, H hidden, N heads, K key-value heads, D head_dim, V v_head_dim, E experts, I inner width.
Left out: key-value caches, dropout, attention biases, expert groups (the family has one group).
Reference: transformers 5.17 `mimo_v2_flash` (tests hold the two equal), the published configs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.machine.cores import on_cores
from mimoquant.model.attention import Heads, attend
from mimoquant.model.config_keys import number, read_rope, text_keys
from mimoquant.model.dispatch import Dispatch, Group, Routing, most_bytes
from mimoquant.model.served_rounding import UNROUNDED, LayerRounding, rounded
from mimoquant.quant.kernels.triton_modules import triton_kernels
from mimoquant.quant.order import cuda_passes


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """What the forward needs of config.json beside sizes. `parts`: see `float32_parts`."""

    eps: float
    rope_theta: float
    sliding_rope_theta: float
    partial_rotary_factor: float
    window: int
    value_scale: float
    top_k: int
    parts: int = 3


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """q [N*D, H], k [K*D, H], v [K*V, H], o [H, N*V]; sink [N] or None. `sliding`: window and the other theta."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    sink: Tensor | None
    heads: int
    kv_heads: int
    sliding: bool


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Router:
    """weight [E, H] and bias [E], both in float32."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class ExpertChunk:
    """Experts begin..begin+e of a layer: gate and up [e, I, H], down [e, H, I]."""

    begin: int
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer without its experts, which come in chunks. Norm weights are [H]."""

    input_norm: Tensor
    post_norm: Tensor
    attention: AttentionWeights
    mlp: DenseWeights | Router


def read_forward_config(config: dict[str, Any], where: str) -> ForwardConfig:
    """Read and check the forward's numbers, in the published keys or transformers'.

    Raises CheckpointError naming the key and what was found.
    """
    keys = text_keys(config, where)
    rope = read_rope(keys, where)
    return ForwardConfig(
        eps=number(keys, where, "layernorm_epsilon", "rms_norm_eps"),
        rope_theta=rope.theta,
        sliding_rope_theta=rope.sliding_theta,
        partial_rotary_factor=rope.partial_factor,
        window=int(number(keys, where, "sliding_window_size", "sliding_window")),
        value_scale=number(keys, where, "attention_value_scale", default=1.0),
        top_k=int(number(keys, where, "num_experts_per_tok")),
    )


def attention_block(
    hidden_BTH: Tensor, weights: LayerWeights, config: ForwardConfig, rounding: LayerRounding = UNROUNDED
) -> tuple[Tensor, Tensor]:
    """The layer up to its MLP: (hidden states after attention, what the MLP sees), both [B, T, H].

    Args:
        hidden_BTH: positions 0..T-1 of independent sequences.
    """
    hidden_BTH = rounding.stored(hidden_BTH)  # pictures' rows come as towers made them
    normed = rounding.stored(rms_norm(hidden_BTH, weights.input_norm, config.eps))
    hidden_BTH = rounding.stored(hidden_BTH + attention(normed, weights.attention, config, rounding))
    return hidden_BTH, rounding.stored(rms_norm(hidden_BTH, weights.post_norm, config.eps))


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm; statistics in float32, result in the input's dtype."""
    wide = hidden.to(torch.float32)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(hidden.dtype) * normed.to(hidden.dtype)


def attention(
    hidden_BTH: Tensor, weights: AttentionWeights, config: ForwardConfig, rounding: LayerRounding = UNROUNDED
) -> Tensor:
    """Causal attention with partial rotary embedding, optional window and sinks; [B, T, H]."""
    heads = attention_heads(rounded(hidden_BTH, rounding.qkv), weights, config, rounding)
    out = rounding.stored(attended(heads, *rounding.cached(heads.key, heads.value), weights.sink))
    parts = float32_parts(rounded(out, rounding.o), weights.o, rounding.parts(rounding.o, config.parts))
    return rounding.stored(product(parts, weights.o))


def attended(heads: Heads, key: Tensor, value: Tensor, sink: Tensor | None) -> Tensor:
    """What the queries get of keys and values, which are those of a cache: all heads side by side, [B, T, N*V]."""
    batch, kv_heads, groups, tokens, _ = heads.query.shape
    out = value.new_empty(batch, tokens, kv_heads * groups, value.shape[-1])
    for begin, end, first in heads.chunks():
        query = heads.query[..., begin:end, :]
        part = attend(
            query,
            key[..., first:end, :],
            value[..., first:end, :],
            sink,
            begin - first,
            heads.window,
            heads.scale,
        )
        out[:, begin:end] = part.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out.flatten(2)


def attention_heads(
    hidden_BTH: Tensor, weights: AttentionWeights, config: ForwardConfig, rounding: LayerRounding = UNROUNDED
) -> Heads:
    """What attention makes of its input [B, T, H], rounded already, before positions see each other."""
    batch, tokens, _ = hidden_BTH.shape
    groups, stored = weights.heads // weights.kv_heads, rounding.stored
    parts = float32_parts(hidden_BTH, weights.q, rounding.parts(rounding.qkv, config.parts))
    query = stored(product(parts, weights.q)).view(batch, tokens, weights.heads, -1)
    key = stored(product(parts, weights.k)).view(batch, tokens, weights.kv_heads, -1)
    value = stored(product(parts, weights.v)).view(batch, tokens, weights.kv_heads, -1) * config.value_scale
    theta = config.sliding_rope_theta if weights.sliding else config.rope_theta
    table = rotary_table(tokens, int(query.shape[-1] * config.partial_rotary_factor), theta, hidden_BTH)
    cos, sin = (stored(part) for part in table)
    query = stored(rotate(query, cos, sin)).view(batch, tokens, weights.kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
    key, value = stored(rotate(key, cos, sin)).permute(0, 2, 1, 3), stored(value).permute(0, 2, 1, 3)
    return Heads(query, key, value, cos, sin, config.window if weights.sliding else tokens)


def rotary_table(tokens: int, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, width], computed in float32, in the dtype of `like`."""
    inverse = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width)
    angle = torch.arange(tokens, dtype=torch.float32, device=like.device)[:, None] * inverse[None, :]
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(heads_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first `cos.shape[-1]` channels of each head; the rest passes."""
    width = cos.shape[-1]
    turned, rest = heads_BTND[..., :width], heads_BTND[..., width:]
    left, right = turned.chunk(2, dim=-1)
    swapped = torch.cat((-right, left), dim=-1)
    return torch.cat((turned * cos[:, None, :] + swapped * sin[:, None, :], rest), dim=-1)


def dense_mlp(hidden: Tensor, weights: DenseWeights, rounding: LayerRounding = UNROUNDED) -> Tensor:
    """SwiGLU; `rounding.mlp`: of the inputs of all three products."""
    stored, count = rounding.stored, rounding.parts(rounding.mlp)
    parts = float32_parts(rounded(hidden, rounding.mlp), weights.gate, count)
    inner = stored(stored(F.silu(stored(product(parts, weights.gate)))) * stored(product(parts, weights.up)))
    return stored(product(float32_parts(rounded(inner, rounding.mlp), weights.down, count), weights.down))


def route(tokens: Tensor, router: Router, top_k: int) -> Routing:
    """Sigmoid router in float32; the bias takes part in the choice only; the chosen scores are normalised to one."""
    scores = F.linear(tokens.to(torch.float32), router.weight).sigmoid()
    experts = torch.topk(scores + router.bias, top_k, dim=-1).indices
    chosen = scores.gather(-1, experts)
    return Routing(experts, chosen / (chosen.sum(-1, keepdim=True) + 1e-20))


def add_experts(
    out: Tensor, tokens: Tensor, dispatch: Dispatch, chunk: ExpertChunk, rounding: LayerRounding = UNROUNDED
) -> None:
    """Add to `out` (float32 [B*T, H]) what the chunk's experts make of the tokens that are routed to them.

    `tokens` are rounded already where they are, once for all experts; `rounding` is of down's inputs.

    Experts with a similar number of tokens form one stacked product; where Triton is, all of the chunk do. Results are
    added expert by expert: a token occurs once in each, so the order of the sum is fixed on every device.
    """
    if kernels := _expert_kernels(tokens, out, chunk):
        parts = 1 if tokens.dtype == torch.bfloat16 else rounding.parts(rounding.experts)
        numbers = kernels.Numbers(parts, rounding.in_bf16, rounding.silu_in_bf16)
        for tiles, span in dispatch.tiles(chunk.begin, chunk.begin + len(chunk.gate), kernels.tile_rows(out.device)):
            inner = kernels.gate_up(tokens, dispatch.rows, (chunk.gate, chunk.up), tiles, span, numbers)
            inner = rounded(inner, rounding.experts, rounding.down_scale)
            made = kernels.down(inner, chunk.down, tiles, span[0], numbers)
            kernels.add(out, made, dispatch.pairs, dispatch.gains, span[0], numbers)
        return
    groups = dispatch.groups(chunk.begin, chunk.begin + len(chunk.gate))
    size = most_bytes(groups, tokens.shape[1])
    made = on_cores(lambda group: expert_outputs(tokens, group, chunk, rounding), groups, out.device, size)
    for group, outputs in zip(groups, made, strict=True):
        add_group(out, group, outputs, rounding)


def _expert_kernels(tokens: Tensor, out: Tensor, chunk: ExpertChunk) -> Any:
    """The module that takes tokens through all experts of a chunk at once; None where it, or one of the dtypes, is
    none."""
    if not (tokens.is_cuda and out.dtype == torch.float32 and tokens.dtype in (torch.float32, torch.bfloat16)):
        return None
    if any(weight.dtype != torch.bfloat16 for weight in (chunk.gate, chunk.up, chunk.down)):
        return None
    if torch.cuda.get_device_capability(tokens.device) < (8, 0):  # has no products of bfloat16
        return None
    return triton_kernels("experts_cuda")


def expert_outputs(tokens: Tensor, group: Group, chunk: ExpertChunk, rounding: LayerRounding = UNROUNDED) -> Tensor:
    """What each expert of the group makes of its tokens, [m, c, H], before the gains; padded rows hold anything."""
    gate, up, down = group_of_chunk(group, chunk)
    stored, count = rounding.stored, rounding.parts(rounding.experts)
    parts = float32_parts(group.of(tokens), gate, count)
    if rounding.silu_in_bf16:
        inner = stored(stored(F.silu(stored(product(parts, gate)))) * stored(product(parts, up)))
    else:
        inner = gated(stored(product(parts, gate)), stored(product(parts, up)), tokens.dtype)
    inner = rounded(inner, rounding.experts, rounding.down_scale)
    return product(float32_parts(inner, down, count), down)


def gated(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """SiLU of gate times up, in float32 and then rounded once."""
    opened = F.silu(gate)
    out = torch.empty(up.shape, dtype=dtype, device=up.device) if up.is_cuda else None
    return torch.mul(opened, up, out=out).to(dtype)


def add_group(out: Tensor, group: Group, outputs: Tensor, rounding: LayerRounding = UNROUNDED) -> None:
    """Add a group's `expert_outputs` to `out`, times their gains."""
    kernels = None if rounding.in_bf16 else cuda_passes(out)
    if kernels and out.dtype == outputs.dtype == torch.float32:
        for slot, count in enumerate(group.counts):
            kernels.add_rows(out, group.rows[slot, :count], outputs[slot].contiguous(), group.gains[slot])
        return
    result = rounding.stored(outputs * group.gains[..., None])
    for slot, count in enumerate(group.counts):
        out.index_add_(0, group.rows[slot, :count], result[slot, :count])


def group_of_chunk(group: Group, chunk: ExpertChunk) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up [m, I, H] and down [m, H, I] of a group's experts."""
    gate, up, down = (of_group(weight, group, chunk.begin) for weight in (chunk.gate, chunk.up, chunk.down))
    return gate, up, down


def of_group(weight_EOI: Tensor, group: Group, begin: int) -> Tensor:
    """The group's matrices; no copy where it is all experts of the chunk, or one."""
    if len(group.experts) == len(weight_EOI):
        return weight_EOI
    return weight_EOI[group.places(begin)]


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [..., I] times weight [O, I] transposed, in the rows' dtype: see `product`."""
    return product(float32_parts(rows, weight), weight)


def float32_parts(rows: Tensor, weight: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
    """float32 rows as three bfloat16 parts that sum to them exactly, where `product` has a use for that; or as the
    first two, which leave 2^-17 of each, or the first alone, where rows are bfloat16 by their values."""
    if not (rows.is_cuda and rows.dtype == torch.float32 and weight.dtype == torch.bfloat16):
        return (rows,)
    high = rows.to(torch.bfloat16)
    if parts == 1:
        return (high,)
    rest = rows - high
    middle = rest.to(torch.bfloat16)
    return (high, middle) if parts == 2 else (high, middle, (rest - middle).to(torch.bfloat16))


def product(parts: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """The sum of `parts` [..., I] (see `float32_parts`) times weight [O, I] transposed, or stacked, [m, c, I] and
    [m, O, I]; float32 arithmetic and result (float64 stays float64).

    Weights are bfloat16 by nature. On CUDA three products of bfloat16 parts, exact and summed in float32, are four
    times as fast as one product in float32 and no less exact. Rows that are bfloat16 themselves take one.
    """
    if parts[0].dtype != torch.bfloat16 or not parts[0].is_cuda:
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        return parts[0].to(dtype) @ weight.to(dtype).transpose(-1, -2)
    turned = weight.transpose(-1, -2)
    if weight.ndim == 3:
        out = torch.bmm(parts[-1], turned, out_dtype=torch.float32)
        for part in parts[-2::-1]:
            torch.baddbmm(out, part, turned, out_dtype=torch.float32, out=out)
        return out
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    out = torch.mm(flat[-1], turned, out_dtype=torch.float32)
    for part in flat[-2::-1]:
        torch.addmm(out, part, turned, out_dtype=torch.float32, out=out)
    return out.view(*parts[0].shape[:-1], -1)
