"""The vision tower: patches of pictures in, rows for the text model's embedding out.

Key idea: a picture goes through a block whole and alone, so what comes out does not depend on its neighbours. Pictures
take the same block together, in portions of limited size, so its weights are read once a portion, and one block is in
memory; between two blocks a portion rests on the device. A block attends over all patches of a frame, or over those at
most `window` before and after, counted along rows or along columns of merged patches: then queries are taken in runs,
all runs of a frame at once, and each run sees one stretch of keys. What a picture's size alone decides is made once a
portion. Weights stay in bfloat16; all arithmetic is float32.

Shapes: n patches of a picture, H hidden, N heads, K key-value heads, G heads to a key-value head, D head_dim.
Reference: the published modeling code, as ports of it tell; vLLM 0.32, SGLang 0.5.23 (guide: what they do otherwise).
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.model.decoder_layer import float32_parts, linear, product, rotary_table
from mimoquant.model.layer_stream import made_ahead
from mimoquant.model.media import MLP_PATCHES, PORTION_PATCHES, QUERY_RUN, Picture, in_portions
from mimoquant.model.tower_config import COLUMNS, FULL, VisionConfig

EPS = 1e-6  # of every norm in the towers, in the published code and every engine: config.json does not tell
_THETA = 10000.0
_AHEAD = 4  # pictures that threads cut up while a GPU computes


@dataclass(frozen=True, slots=True)
class Affine:
    """weight [O, I], bias [O] or none."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        return self.of_parts(float32_parts(rows, self.weight))

    def of_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        """See `decoder_layer.product`."""
        out = product(parts, self.weight)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, slots=True)
class VisionBlock:
    """One block: norms [H], qkv [(N + 2 K) * D, H], proj [H, N * D], SwiGLU; sinks [N] where it has them,
    and a window."""

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
    states = [linear(patches.to(device), embedding) for patches in _cut_up(pictures, config, device)]
    del embedding
    places = {grid: Places(grid, config, device) for grid in {picture.grid for picture in pictures}}
    blocks = (source.vision_block(number) for number in range(len(config.kinds)))
    with made_ahead(blocks, device) as ahead:
        for block, kind in zip(map(_widened, ahead), config.kinds, strict=True):
            for number, picture in enumerate(pictures):
                states[number] = through_block(states[number], block, places[picture.grid], config, kind)
    merger = source.merger()
    return [merged(state, merger, config).cpu() for state in states]


def _cut_up(pictures: Sequence[Picture], config: VisionConfig, device: torch.device) -> Iterator[Tensor]:
    """Each picture's patches. Files are decoded and cut up here, for a GPU by a few threads: it would wait for one."""
    if device.type != "cuda":
        yield from (_patches(picture, config) for picture in pictures)
        return
    waiting: deque[Future[Tensor]] = deque()
    # Reading a file turns warnings off and on again, which threads would do to one another: they are off for all of it.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(_AHEAD, "cut-up") as pool:
        for picture in pictures:
            if len(waiting) == _AHEAD:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_patches, picture, config))
        while waiting:
            yield waiting.popleft().result()


def _patches(picture: Picture, config: VisionConfig) -> Tensor:
    t, h, w = picture.grid
    patches = picture.patches
    if patches.shape != (t * h * w, config.patch_width):
        raise CheckpointError(
            f"a picture of {t} x {h} x {w} patches has values {list(patches.shape)}, "
            f"its model takes {[t * h * w, config.patch_width]}"
        )
    return torch.from_numpy(patches)


def _widened(block: VisionBlock) -> VisionBlock:
    """Norms and sinks in float32, once for all pictures."""
    sinks = None if block.sinks is None else block.sinks.float()
    return replace(block, norm1=block.norm1.float(), norm2=block.norm2.float(), sinks=sinks)


class Places:
    """What a picture's size alone decides, on a device: rotations, the order by columns, and which keys a run sees."""

    def __init__(self, grid: tuple[int, int, int], config: VisionConfig, device: torch.device) -> None:
        self.grid, self.config, self.device = grid, config, device
        self.frame = grid[1] * grid[2]
        self.run = max(QUERY_RUN, 2 * config.window)
        self.runs = -(-self.frame // self.run)

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Patches by columns, and back."""
        order = column_order(self.grid, self.config.merge).to(self.device)
        return order, torch.argsort(order)

    @cached_property
    def by_rows(self) -> tuple[Tensor, Tensor]:
        """What heads are multiplied with and what their turned halves are, both [n, 1, D]."""
        cos, sin = rotation(self.grid, self.config, torch.empty(0, device=self.device))
        half = self.config.head_dim // 2
        return cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), dim=1)[:, None]

    @cached_property
    def by_columns(self) -> tuple[Tensor, Tensor]:
        cos, sin = self.by_rows
        return cos[self.order[0]], sin[self.order[0]]

    @cached_property
    def seen(self) -> Tensor:
        """[runs, 1, G * run, run + 2 * window]: 0, or -inf where a query does not see a key."""
        window, run = self.config.window, self.run
        first = torch.arange(0, self.runs * run, run, device=self.device)[:, None, None]
        query = torch.arange(run, device=self.device)[None, :, None]
        key = torch.arange(-window, run + window, device=self.device)[None, None, :]
        hidden = ((key - query).abs() > window) | (first + key < 0) | (first + key >= self.frame)
        bias = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, float("-inf"))
        return bias.repeat(1, self.config.heads // self.config.kv_heads, 1)[:, None]


def through_block(hidden: Tensor, block: VisionBlock, places: Places, config: VisionConfig, kind: int) -> Tensor:
    """A picture's hidden states [n, H], in the order of its patches, through one block of a kind."""
    heads = block.qkv(F.rms_norm(hidden, (config.hidden,), block.norm1, EPS)).view(len(hidden), -1, config.head_dim)
    if kind == COLUMNS:
        heads = heads[places.order[0]]
    _rotate(heads[:, : config.heads + config.kv_heads], *(places.by_columns if kind == COLUMNS else places.by_rows))
    frames = torch.split(heads, places.frame)
    if kind == FULL:
        out = _joined([_full_attention(of_frame, config) for of_frame in frames])
    else:
        out = _joined([_window_attention(of_frame, block.sinks, places) for of_frame in frames])
    if kind == COLUMNS:
        out = out[places.order[1]]
    hidden = block.proj(out).add_(hidden)
    return _joined([_mlp(part, block, config) for part in torch.split(hidden, MLP_PATCHES)])


def _joined(parts: list[Tensor]) -> Tensor:
    """One after the other; no copy of one alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mlp(hidden: Tensor, block: VisionBlock, config: VisionConfig) -> Tensor:
    normed = float32_parts(F.rms_norm(hidden, (config.hidden,), block.norm2, EPS), block.gate.weight)
    inner = F.silu(block.gate.of_parts(normed)).mul_(block.up.of_parts(normed))
    return block.down(inner).add_(hidden)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`decoder_layer.rotate` of whole heads [n, N, D], in place; the sign of a turned half is the sine's."""
    halves = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(halves, sin)


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


def _full_attention(heads: Tensor, config: VisionConfig) -> Tensor:
    """Attention of a frame: rotated queries and keys, and values, [n, N + 2 K, D] → [n, N * D]. Queries that share a
    key's head stand one after the other."""
    query, key, value = torch.split(heads.transpose(0, 1), [config.heads, config.kv_heads, config.kv_heads])
    out = F.scaled_dot_product_attention(query.reshape(1, config.kv_heads, -1, config.head_dim), key[None], value[None])
    by_group = torch.unflatten(out[0], 1, (-1, len(heads)))
    return by_group.permute(2, 0, 1, 3).reshape(len(heads), -1)


def _window_attention(heads: Tensor, sinks: Tensor | None, places: Places) -> Tensor:
    """The same, where a query sees the keys at most `window` before and after it. A sink is added to the scores of the
    first key, for the queries that see it: all of them are in the first run."""
    config, run, runs, window = places.config, places.run, places.runs, places.config.window
    padded = F.pad(heads, (0, 0, 0, 0, window, runs * run - len(heads) + window))
    query = padded[window : window + runs * run, : config.heads].view(runs, run, config.kv_heads, -1, config.head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(runs, config.kv_heads, -1, config.head_dim)
    # [runs, K, run + 2 * window, D], of the same memory
    stretches = padded[:, config.heads :].unfold(0, run + 2 * window, run).transpose(-1, -2)
    key, value = torch.split(stretches, config.kv_heads, dim=1)
    seen = places.seen
    if sinks is None:
        out = F.scaled_dot_product_attention(query, key, value, seen)
    else:
        first = seen[:1].view(1, 1, -1, run, run + 2 * window).repeat(1, config.kv_heads, 1, 1, 1)
        first[..., window] += sinks.view(1, config.kv_heads, -1, 1)
        parts = (slice(0, 1), first.flatten(2, 3)), (slice(1, runs), seen[1:])
        out = _joined(
            [F.scaled_dot_product_attention(query[at], key[at], value[at], mask) for at, mask in parts if len(mask)]
        )
    by_group = torch.unflatten(out, 2, (-1, run))
    return by_group.permute(0, 3, 1, 2, 4).reshape(runs * run, -1)[: len(heads)]
