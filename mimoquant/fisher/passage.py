"""A portion of the tokens in one layer: on its way forward, and back.

The forward is `layer_stream`'s, from states in the walk's dtype to states in the walk's dtype. On the way back it is
made again up to the experts; their sum itself is not needed, only what they make of a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mimoquant.model.backward import (
    ExpertsGradient,
    attention_gradient,
    dense_gradient,
    norm_gradient,
    routing_gradient,
)
from mimoquant.model.decoder_layer import (
    DenseWeights,
    ExpertChunk,
    LayerWeights,
    Router,
    add_experts,
    attention_block,
    rms_norm,
)
from mimoquant.model.dispatch import Routing
from mimoquant.model.layer_stream import (
    Stream,
    WeightSource,
    add_blocks,
    attend_and_route,
    dense_layer,
    layer_chunks,
)


def forward_layer(
    source: WeightSource, states: list[Tensor], feed: Iterator[Any], batch: int
) -> tuple[list[Tensor], list[float | None]]:
    """What leaves the layer, and the sum over tokens of the squared norm of what its experts add (None if dense).

    Args:
        states: [S, T, H] of each portion; the list is emptied. feed: the layer's weights. batch: sequences that go
            through attention together.
    """
    if not states:
        return [], []
    weights, dtype, streams = next(feed), states[0].dtype, []
    while states:
        streams.append(Stream(source, _batches(states.pop(0), batch)))
    outputs: list[float | None] = [None] * len(streams)
    if isinstance(weights.mlp, DenseWeights):
        for stream in streams:
            dense_layer(stream, weights)
    else:
        blocks = [attend_and_route(stream, weights, dtype) for stream in streams]
        for chunk in layer_chunks(feed, len(weights.mlp.weight)):
            for (block,) in blocks:
                add_experts(block.out, block.tokens, block.dispatch, chunk)
        outputs = [float(block.out.square().sum(dtype=torch.float64)) for (block,) in blocks]
        for stream, of_stream in zip(streams, blocks, strict=True):
            add_blocks(stream, of_stream)
    return [torch.cat([hidden.to(dtype) for hidden in stream.batches]) for stream in streams], outputs


class Passage:
    """A portion's way back through one layer: made, then `through` all of the layer's experts, then `input_gradient`.

    Args:
        state: what enters the layer [S, T, H]; y: gradients at its output [D, S, T, H], in the dtype of the products.
    """

    def __init__(self, source: WeightSource, weights: LayerWeights, state: Tensor, y: Tensor, batch: int) -> None:
        self.config, self.weights, self.state, self.y, self.batch = source.config, weights, state, y, batch
        self.experts: ExpertsGradient | None = None
        if isinstance(weights.mlp, Router):
            stream = Stream(source, _batches(state, batch))
            (block,) = attend_and_route(stream, weights, state.dtype)
            (self.routing,) = stream.routing
            self.attended = stream.batches
            self.experts = ExpertsGradient(block.tokens, y.flatten(1, 2), self.routing, block.dispatch)
        else:
            self.attended = [attention_block(hidden, weights, self.config)[0] for hidden in _batches(state, batch)]

    def through(self, chunk: ExpertChunk) -> None:
        """Take the gradients through a chunk of experts."""
        assert self.experts is not None
        self.experts.through(chunk)

    def input_gradient(self) -> Tensor:
        """Gradients at the layer's input, [D, S, T, H]."""
        out, begin, eps = torch.empty_like(self.y), 0, self.config.eps
        gains = self.experts.gains() if self.experts else None
        for hidden, attended in zip(_batches(self.state, self.batch), self.attended, strict=True):
            some = slice(begin, begin + len(hidden))
            y = self.y[:, some].to(torch.float32)
            normed = rms_norm(attended, self.weights.post_norm, eps)
            of_mlp = self._mlp_gradient(y, normed, some, gains)
            y += norm_gradient(of_mlp, attended, self.weights.post_norm, eps)
            normed = rms_norm(hidden, self.weights.input_norm, eps)
            of_attention = attention_gradient(y, normed, self.weights.attention, self.config, self.y.dtype)
            y += norm_gradient(of_attention, hidden, self.weights.input_norm, eps)
            out[:, some] = y
            begin += len(hidden)
        return out

    def _mlp_gradient(self, y: Tensor, normed: Tensor, sequences: slice, gains: Tensor | None) -> Tensor:
        """At what a batch's MLP sees, [D, B, T, H]. `gains`: gradients of all routing weights [D, N, k]."""
        if isinstance(self.weights.mlp, DenseWeights):
            return dense_gradient(y, normed, self.weights.mlp)
        assert self.experts is not None and gains is not None
        length = normed.shape[1]
        some = slice(sequences.start * length, sequences.stop * length)
        routing = Routing(self.routing.experts[some], self.routing.weights[some])
        of_router = routing_gradient(gains[:, some], normed.flatten(0, 1), routing, self.weights.mlp)
        return (self.experts.rows[:, some] + of_router).view_as(y)


def _batches(state: Tensor, batch: int) -> list[Tensor]:
    """A portion as float32 batches that go through attention together."""
    return [hidden.to(torch.float32) for hidden in torch.split(state, batch)]
