"""The walker: hidden states go through a model layer by layer, for several sets of weights at once.

Key idea: a `Stream` is a batch of hidden states with the weights it goes through. All streams take the same layer
together, and experts come in chunks, so at any time one layer's dense weights and one chunk of experts per weight set
are in memory, and every weight is read once however many streams use it. Calibration, evaluation and sensitivity are
all walks; they differ in their streams and in what they do after each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mimoquant.model.decoder_layer import (
    DenseWeights,
    ExpertChunk,
    ForwardConfig,
    LayerWeights,
    Routing,
    add_experts,
    attention_block,
    dense_mlp,
    route,
)


class WeightSource(Protocol):
    """Where a model's weights come from, one layer at a time."""

    config: ForwardConfig
    layers: int

    def layer(self, number: int) -> LayerWeights: ...

    def expert_chunks(self, number: int) -> Iterator[ExpertChunk]: ...


@dataclass
class Stream:
    """Hidden states on their way: batches of [B, T, H]. `routing` is that of the layer just passed (empty if dense).

    `noise`: relative size of random noise that is multiplied on after each layer, to measure the noise floor.
    """

    source: WeightSource
    batches: list[Tensor]
    noise: float = 0.0
    seed: int = 0
    routing: list[Routing] = field(default_factory=list)


def walk(streams: Sequence[Stream], after_layer: Callable[[int], None] | None = None) -> None:
    """Push all streams through all layers, in place. `after_layer` sees the streams after each layer."""
    sources = list({id(stream.source): stream.source for stream in streams}.values())
    for number in range(sources[0].layers):
        for source in sources:
            _one_layer(number, source, [stream for stream in streams if stream.source is source])
        if after_layer is not None:
            after_layer(number)


@torch.no_grad()
def _one_layer(number: int, source: WeightSource, streams: list[Stream]) -> None:
    weights, config = source.layer(number), source.config
    pending: list[tuple[Tensor, Tensor, Routing]] = []  # float32 sum, tokens, routing of every batch, in order
    for stream in streams:
        stream.routing = []
        for i, hidden in enumerate(stream.batches):
            hidden, normed = attention_block(hidden, weights, config)
            if isinstance(weights.mlp, DenseWeights):
                stream.batches[i] = hidden + dense_mlp(normed, weights.mlp)
                continue
            tokens = normed.flatten(0, 1)
            stream.routing.append(route(tokens, weights.mlp, config.top_k))
            stream.batches[i] = hidden
            pending.append((torch.zeros_like(tokens, dtype=torch.float32), tokens, stream.routing[-1]))
    if pending:
        for chunk in source.expert_chunks(number):
            for out, tokens, routing in pending:
                add_experts(out, tokens, routing, chunk)
        results = iter(pending)
        for stream in streams:
            stream.batches = [hidden + next(results)[0].view_as(hidden).to(hidden.dtype) for hidden in stream.batches]
    for stream in streams:
        if stream.noise:
            stream.batches = [_noisy(hidden, stream, number, i) for i, hidden in enumerate(stream.batches)]


def _noisy(hidden: Tensor, stream: Stream, number: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((stream.seed, number, batch)) % 2**63)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
    return hidden * (1 + stream.noise * noise)
