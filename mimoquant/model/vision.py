"""The vision tower: patches of pictures in, rows for the text model's embedding out.

Key idea: a picture goes through a block whole and alone, so what comes out does not depend on its neighbours. Pictures
take the same block together, in portions of limited size, so its weights are read once a portion, and one block is in
memory; between two blocks a portion rests on the host. A block attends over all patches of a frame, or over those at
most `window` before and after, counted along rows or along columns of merged patches. Weights stay in bfloat16; all
arithmetic is float32.

Shapes: n patches of a picture, H hidden, N heads, K key-value heads, G heads to a key-value head, D head_dim.
Reference: the published modeling code, as ports of it tell; vLLM 0.32, SGLang 0.5.23 (guide: what they do otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.model.decoder_layer import linear, rms_norm, rotary_table, rotate
from mimoquant.model.layer_stream import made_ahead, on_host
from mimoquant.model.media import PORTION_PATCHES, Picture, in_portions
from mimoquant.model.tower_config import COLUMNS, FULL, VisionConfig

EPS = 1e-6  # of every norm in the towers, in the published code and every engine: config.json does not tell
_THETA = 10000.0
_SCORE_BYTES = 256 * 2**20  # of attention scores that are held at once


@dataclass(frozen=True, slots=True)
class Affine:
    """weight [O, I], bias [O] or none."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        out = linear(rows, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


@dataclass(frozen=True, slots=True)
class VisionBlock:
    """One block: norms [H], qkv [(N + 2 K) * D, H], proj [H, N * D], SwiGLU; sinks [N] where it has them."""

    norm1: Tensor
    norm2: Tensor
    qkv: Affine
    proj: Affine
    gate: Affine
    up: Affine
    down: Affine
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class Merger:
    """What makes a token of merged patches: LayerNorm [H], and two products. The published files have no bias."""

    norm: Tensor
    norm_bias: Tensor | None
    first: Affine
    second: Affine


class VisionSource(Protocol):
    """Where the tower's weights come from, a block at a time."""

    device: torch.device

    def patches(self) -> Tensor: ...  # [H, C * T * P * P]

    def vision_block(self, number: int) -> VisionBlock: ...

    def merger(self) -> Merger: ...


@torch.no_grad()
def picture_rows(pictures: Sequence[Picture], source: VisionSource, config: VisionConfig) -> list[Tensor]:
    """Each picture's rows for the embedding, [tokens, out_hidden] float32, on the host.

    Raises CheckpointError for patches that are not the model's.
    """
    sizes = [math.prod(picture.grid) for picture in pictures]
    portions = in_portions(pictures, sizes, PORTION_PATCHES)
    return [rows for portion in portions for rows in _portion_rows(portion, source, config)]


def _portion_rows(pictures: Sequence[Picture], source: VisionSource, config: VisionConfig) -> list[Tensor]:
    device, embedding = source.device, source.patches()
    patches = (_patches(picture, config) for picture in pictures)
    states = [on_host(linear(of_picture.to(device), embedding)) for of_picture in patches]
    del embedding
    blocks = (source.vision_block(number) for number in range(len(config.kinds)))
    with made_ahead(blocks, device) as ahead:
        for block, kind in zip(ahead, config.kinds, strict=True):
            for picture, state in zip(pictures, states, strict=True):
                state.copy_(through_block(state.to(device), block, picture.grid, config, kind))
    merger = source.merger()
    return [on_host(merged(state.to(device), merger, config)) for state in states]


def _patches(picture: Picture, config: VisionConfig) -> Tensor:
    t, h, w = picture.grid
    patches = picture.patches
    if patches.shape != (t * h * w, config.patch_width):
        raise CheckpointError(
            f"a picture of {t} x {h} x {w} patches has values {list(patches.shape)}, "
            f"its model takes {[t * h * w, config.patch_width]}"
        )
    return torch.from_numpy(patches)


def through_block(
    hidden: Tensor, block: VisionBlock, grid: tuple[int, int, int], config: VisionConfig, kind: int
) -> Tensor:
    """A picture's hidden states [n, H], in the order of its patches, through one block of a kind."""
    cos, sin = rotation(grid, config, hidden)
    order = column_order(grid, config.merge).to(hidden.device) if kind == COLUMNS else None
    heads = block.qkv(rms_norm(hidden, block.norm1, EPS)).view(len(hidden), -1, config.head_dim)
    query, key, value = torch.split(heads, [config.heads, config.kv_heads, config.kv_heads], dim=1)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if order is not None:
        query, key, value = query[order], key[order], value[order]
    frames = [part.chunk(grid[0]) for part in (query, key, value)]
    window = None if kind == FULL else config.window
    out = torch.cat([_attention(q, k, v, block.sinks, window) for q, k, v in zip(*frames, strict=True)])
    if order is not None:
        out = torch.empty_like(out).index_copy_(0, order, out)
    hidden = hidden + block.proj(out)
    normed = rms_norm(hidden, block.norm2, EPS)
    return hidden + block.down(F.silu(block.gate(normed)) * block.up(normed))


def merged(hidden: Tensor, merger: Merger, config: VisionConfig) -> Tensor:
    """[n, H] → [n / merge^2, out_hidden]."""
    bias = None if merger.norm_bias is None else merger.norm_bias.to(hidden.dtype)
    normed = F.layer_norm(hidden, (config.hidden,), merger.norm.to(hidden.dtype), bias, EPS)
    return merger.second(F.gelu(merger.first(normed.view(-1, config.merged))))


def rotation(grid: tuple[int, int, int], config: VisionConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [n, D] of each patch: of each half of a head one half turns with its row, one with its column."""
    t, h, w = grid
    rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    order = _merged_order(h, w, config.merge)
    places = torch.stack((rows[order], columns[order]), dim=1).repeat(t, 1).to(like.device)
    table = rotary_table(max(h, w), config.head_dim // 2, _THETA, like)
    cos, sin = (of[:, : config.head_dim // 4][places].flatten(1) for of in table)
    return torch.cat((cos, cos), dim=1), torch.cat((sin, sin), dim=1)


def _merged_order(h: int, w: int, merge: int) -> Tensor:
    """Row-major patches of a frame in the order of a picture: those that are merged lie together."""
    places = torch.arange(h * w).view(h // merge, merge, w // merge, merge)
    return places.transpose(1, 2).flatten()


def column_order(grid: tuple[int, int, int], merge: int) -> Tensor:
    """Patches [n] of a picture with its columns of merged patches one after the other."""
    t, h, w = grid
    places = torch.arange(t * h * w).view(t, h // merge, w // merge, merge**2)
    return places.transpose(1, 2).flatten()


def _attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, window: int | None) -> Tensor:
    """Attention of a frame: query [n, N, D], key and value [n, K, D] → [n, N * D].

    A query sees the keys at most `window` before and after it, all without one. A sink is added to the scores of the
    first key, for the queries that see it.
    """
    count, heads, width = query.shape
    groups = heads // key.shape[1]
    query = query.view(count, -1, groups, width).permute(1, 2, 0, 3)
    key, value = key.permute(1, 2, 0)[:, None], value.transpose(0, 1)[:, None]
    bias = None if sinks is None else sinks.to(query.dtype).view(-1, groups, 1)
    out = query.new_empty(count, heads * width)
    for begin, end, first, last in _chunks(count, heads, window):
        scores = query[..., begin:end, :] @ key[..., first:last] * width**-0.5
        if bias is not None and first == 0:
            scores[..., 0] += bias
        if window is not None:
            places = torch.arange(first, last, device=query.device)
            distance = places[None, :] - torch.arange(begin, end, device=query.device)[:, None]
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        part = scores.softmax(-1) @ value[..., first:last, :]
        out[begin:end] = part.permute(2, 0, 1, 3).flatten(1)
    return out


def _chunks(count: int, heads: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Queries begin..end that are taken together, and the keys first..last that any of them sees."""
    chunk = max(16, _SCORE_BYTES // (4 * heads * count)) if window is None else max(128, 2 * window)
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        yield begin, end, *((0, count) if window is None else (max(0, begin - window), min(count, end + window)))
