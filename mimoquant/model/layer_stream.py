"""The walker: hidden states go through a model layer by layer, for several sets of weights at once.

Key idea: a `Stream` is a batch of hidden states with the weights it goes through. All streams take the same layer
together, and experts come in chunks, so at any time one layer's dense weights and a few chunks of experts are in
memory, and every weight is read once however many streams use it. A thread reads and decodes the next weights, of
whichever layer and source, while the streams compute. Calibration, evaluation and sensitivity are all walks; they
differ in their streams and in what they do after each layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mimoquant.machine.cores import on_cores
from mimoquant.machine.overlap import read_ahead
from mimoquant.model.decoder_layer import (
    DenseWeights,
    ExpertChunk,
    ForwardConfig,
    LayerWeights,
    Router,
    add_experts,
    attention_block,
    dense_mlp,
    rms_norm,
    route,
)
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.served_rounding import UNROUNDED, LayerRounding, Roundings
from mimoquant.quant.streams import side_stream

Weights = LayerWeights | ExpertChunk
T = TypeVar("T")
BATCH_TOKENS = 2**13  # that go through attention together
BLOCK_TOKENS = 2**17  # that go through the experts together
PORTION_TOKENS = 2**15  # the same, where several processes may share the work: the least that one of them is dealt


class WeightSource(Protocol):
    """Where a model's weights come from, one layer at a time."""

    config: ForwardConfig
    layers: int
    device: torch.device

    def layer(self, number: int) -> LayerWeights: ...

    def expert_chunks(self, number: int) -> Iterator[ExpertChunk]: ...


@dataclass
class Stream:
    """Hidden states on their way: batches of [B, T, H]. `routing` is that of the layer just passed (empty if dense).

    `noise`: relative size of random noise that is multiplied on after each layer, to measure the noise floor.
    `roundings`: of inputs and caches, by layer; empty: none.
    """

    source: WeightSource
    batches: list[Tensor]
    noise: float = 0.0
    seed: int = 0
    routing: list[Routing] = field(default_factory=list)
    roundings: Roundings = ()

    def rounding(self, layer: int) -> LayerRounding:
        return self.roundings[layer] if self.roundings else UNROUNDED

    def put(self, batch: int, hidden: Tensor, *, non_blocking: bool = False) -> None:
        """Replace a batch where it lives: on the device, or on the host; `non_blocking`: once the GPU is there."""
        if self.batches[batch].device == hidden.device:
            self.batches[batch] = hidden
        else:
            self.batches[batch].copy_(hidden, non_blocking=non_blocking)


def on_host(hidden: Tensor, *, non_blocking: bool = False) -> Tensor:
    """As float32 on the host; of a GPU's, in pinned memory, straight from there."""
    return torch.empty(hidden.shape, pin_memory=hidden.is_cuda).copy_(hidden, non_blocking=non_blocking)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive batches' tokens [n, H] on their way through the experts, whose sum is `out` (float32 [n, H])."""

    tokens: Tensor
    out: Tensor
    dispatch: Dispatch


def batch_sequences(tokens: int) -> int:
    """How many sequences of `tokens` tokens make up a batch."""
    return max(1, BATCH_TOKENS // tokens)


def portions(ids: Tensor) -> list[list[Tensor]]:
    """Sequences [S, T] as batches, in portions of whole batches.

    Products of another number of rows may round otherwise, so portions depend on the data alone and always go through
    the model on their own: then it does not matter which process takes which.
    """
    batches = torch.split(ids, batch_sequences(ids.shape[1]))
    count = max(1, PORTION_TOKENS // batches[0].numel())
    return [list(batches[first : first + count]) for first in range(0, len(batches), count)]


def walk(streams: Sequence[Stream], after_layer: Callable[[int], None] | None = None, *, first: int = 0) -> None:
    """Push all streams through all layers from `first` on, in place. `after_layer` sees the streams after each."""
    sources = list({id(stream.source): stream.source for stream in streams}.values())
    with made_ahead(_weights(sources, first), sources[0].device) as feed:
        for number in range(first, sources[0].layers):
            for source in sources:
                _one_layer(number, source, [stream for stream in streams if stream.source is source], feed)
            if after_layer is not None:
                after_layer(number)


def _weights(sources: Sequence[WeightSource], first: int) -> Iterator[Weights]:
    """All weights from layer `first` on, in the order of their use."""
    for number, source in itertools.product(range(first, sources[0].layers), sources):
        yield source.layer(number)
        yield from source.expert_chunks(number)


@contextlib.contextmanager
def made_ahead(items: Iterator[T], device: torch.device) -> Iterator[Iterator[T]]:
    """`items` (tensors, or dataclasses that hold some), made one ahead by a thread. On CUDA a stream of its own makes
    them, beside the products."""
    with contextlib.closing(read_ahead(_aside(items, side_stream(device, "made ahead")), depth=1)) as ahead:
        yield map(_claimed, ahead)


def _aside(items: Iterator[T], side: torch.cuda.Stream | None) -> Iterator[T]:
    """`items`, made by a stream of their own on CUDA, each finished when it comes."""
    with torch.cuda.stream(side):  # does nothing for None
        for item in items:
            if side is not None:
                side.synchronize()
            yield item


class LayersAhead:
    """A source's layers without their experts, one after the other; on CUDA the next are read and brought there by a
    thread and a stream of their own, while this one is worked on. `near`: the source lies here. One that is far away is
    read in order, or the next layer would delay this one's experts."""

    def __init__(self, source: WeightSource, *, near: bool = True) -> None:
        self._source, self._next = source, 0
        self._side = side_stream(source.device, "layers ahead") if near else None
        self._coming: Generator[LayerWeights, None, None] | None = None

    def take(self, number: int) -> LayerWeights:
        """A layer's weights; the next layers' are begun."""
        if self._side is None:
            return self._source.layer(number)
        if self._coming is None or number != self._next:
            self.close()
            layers = map(self._source.layer, range(number, self._source.layers))
            self._coming = read_ahead(_aside(layers, self._side), depth=1)
        self._next = number + 1
        return _claimed(next(self._coming))

    def close(self) -> None:
        """What is read ahead is given up."""
        if self._coming is not None:
            self._coming.close()
            self._coming = None


def _claimed(item: T) -> T:
    """Tell CUDA's allocator that tensors made on the side stream are in use on this one."""
    for tensor in _tensors(item):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return item


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif is_dataclass(item):
        for part in fields(item):
            yield from _tensors(getattr(item, part.name))


@torch.no_grad()
def _one_layer(number: int, source: WeightSource, streams: list[Stream], feed: Iterator[Weights]) -> None:
    weights = next(feed)
    assert isinstance(weights, LayerWeights)
    once = _Once(streams)
    if isinstance(weights.mlp, DenseWeights):
        for stream in streams:
            dense_layer(stream, weights, stream.rounding(number), once)
    else:
        blocks = [_expert_inputs(stream, weights, stream.rounding(number), once) for stream in streams]
        for chunk in layer_chunks(feed, len(weights.mlp.weight)):
            for stream, mine in zip(streams, blocks, strict=True):
                for block in mine:
                    add_experts(block.out, block.tokens, block.dispatch, chunk, stream.rounding(number))
        for stream, mine in zip(streams, blocks, strict=True):
            add_blocks(stream, mine, stream.rounding(number))
    for stream in streams:
        if stream.noise:
            stream.batches = [_noisy(hidden, stream, number, i) for i, hidden in enumerate(stream.batches)]


class _Once:
    """What becomes of batches that several streams hold, which are one tensor until the streams part: made once a layer
    where nothing that it depends on is rounded otherwise."""

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        held = Counter(id(batch) for stream in streams for batch in stream.batches)
        self._shared = {key for key, count in held.items() if count > 1}
        self._made: dict[tuple[int, object], tuple[Tensor, Any]] = {}

    def __call__(self, batch: Tensor, rounding: LayerRounding, make: Callable[[], T]) -> T:
        key = id(batch), rounding.of_attention
        if key[0] not in self._shared:
            return make()
        if key not in self._made:
            self._made[key] = batch, make()  # with the batch, so that no other comes to lie where it did
        made: T = self._made[key][1]
        return made


def _expert_inputs(stream: Stream, weights: LayerWeights, rounding: LayerRounding, once: _Once) -> list[Block]:
    """`attend_and_route`, and what its tokens are rounded to before the experts."""
    blocks = attend_and_route(stream, weights, rounding=rounding, once=once)
    return [replace(block, tokens=rounding.expert_inputs(block.tokens)) for block in blocks]


class _Ferry:
    """Hidden states between the host and a GPU, beside the products: the next batch comes while one is computed, and
    what was made of it goes back, each way on a stream of its own. Where they live on the device, nothing moves."""

    def __init__(self, stream: Stream) -> None:
        self.stream, device = stream, stream.source.device
        afar = any(batch.device.type != device.type for batch in stream.batches)
        self.there, self.back = (side_stream(device, f"states {way}") if afar else None for way in ("there", "back"))
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def __enter__(self) -> _Ferry:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.back is not None:
            self.back.synchronize()  # the host may look at the batches

    def load(self, batch: int) -> Tensor:
        """A batch on the device; batches are asked for in order."""
        if self.there is None:
            return self.stream.batches[batch].to(self.stream.source.device)
        for number in range(batch, min(batch + 2, len(self.stream.batches))):
            if number not in self.coming:
                with torch.cuda.stream(self.there):
                    held = self.stream.batches[number]
                    come = held.to(self.stream.source.device, non_blocking=True)
                self.coming[number] = come, self.there.record_event()
        come, event = self.coming.pop(batch)
        torch.cuda.current_stream(come.device).wait_event(event)
        return _claimed(come)

    def store(self, batch: int, hidden: Tensor) -> None:
        """Replace a batch where it lives, as the stream says: others may share what was there."""
        if self.back is None:
            self.stream.put(batch, hidden)
            return
        self.back.wait_stream(torch.cuda.current_stream(self.back.device))
        with torch.cuda.stream(self.back):
            self.stream.put(batch, hidden, non_blocking=True)
        hidden.record_stream(self.back)


def dense_layer(
    stream: Stream, weights: LayerWeights, rounding: LayerRounding = UNROUNDED, once: _Once | None = None
) -> None:
    """Push a stream through a layer without experts, in place."""
    mlp, once = weights.mlp, once or _Once()
    assert isinstance(mlp, DenseWeights)
    stream.routing = []

    with _Ferry(stream) as ferry:

        def passed(batch: int) -> Tensor:
            hidden, normed = attention_block(ferry.load(batch), weights, stream.source.config, rounding)
            return rounding.stored(hidden + dense_mlp(normed, mlp, rounding))

        def passed_once(batch: int) -> Tensor:
            return once(stream.batches[batch], rounding, partial(passed, batch))

        for i, hidden in enumerate(on_cores(passed_once, range(len(stream.batches)), *_where_and_size(stream))):
            ferry.store(i, hidden)


def layer_chunks(feed: Iterator[Weights], experts: int) -> Iterator[ExpertChunk]:
    """The next chunks of the feed, up to the layer's last expert."""
    done = 0
    while done < experts:
        chunk = next(feed)
        assert isinstance(chunk, ExpertChunk)
        done = chunk.begin + len(chunk.gate)
        yield chunk


def attend_and_route(
    stream: Stream,
    weights: LayerWeights,
    dtype: torch.dtype = torch.float32,
    rounding: LayerRounding = UNROUNDED,
    once: _Once | None = None,
) -> list[Block]:
    """Push a stream through attention, in place; what its experts will see comes back in blocks of whole batches.

    Hidden states may live on the host, blocks are on the source's device. Routing is by float32 states; the blocks'
    tokens are kept in `dtype`.
    """

    once = once or _Once()
    with _Ferry(stream) as ferry:

        def attended(batch: int) -> Tensor:
            hidden, normed = once(
                stream.batches[batch],
                rounding,
                lambda: attention_block(ferry.load(batch), weights, stream.source.config, rounding),
            )
            ferry.store(batch, hidden)
            return normed

        return _routed(stream, weights, dtype, attended)


def route_again(stream: Stream, weights: LayerWeights, dtype: torch.dtype = torch.float32) -> list[Block]:
    """What `attend_and_route` gives with another norm and router, of a stream that is past attention already."""

    with _Ferry(stream) as ferry:

        def normed(batch: int) -> Tensor:
            return rms_norm(ferry.load(batch), weights.post_norm, stream.source.config.eps)

        return _routed(stream, weights, dtype, normed)


def _routed(
    stream: Stream, weights: LayerWeights, dtype: torch.dtype, normed_of: Callable[[int], Tensor]
) -> list[Block]:
    """Blocks of what `normed_of` makes of each batch [B, T, H], routed."""
    router = weights.mlp
    assert isinstance(router, Router)

    def routed(batch: int) -> tuple[Tensor, Routing]:
        normed = normed_of(batch).flatten(0, 1)
        return normed.to(dtype), route(normed, router, stream.source.config.top_k)

    stream.routing, blocks = [], []
    for members in _grouped(stream.batches):
        rows, chosen = zip(*on_cores(routed, members, *_where_and_size(stream)), strict=True)
        routing = Routing(torch.cat([r.experts for r in chosen]), torch.cat([r.weights for r in chosen]))
        stream.routing.append(routing)
        tokens = torch.cat(rows)
        dispatch = Dispatch.of(routing, len(router.weight))
        blocks.append(Block(tokens, torch.zeros_like(tokens, dtype=torch.float32), dispatch))
    return blocks


def _where_and_size(stream: Stream) -> tuple[torch.device, int]:
    """Where a batch is worked on, and its bytes in float32."""
    return stream.source.device, 4 * max((batch.numel() for batch in stream.batches), default=0)


def _grouped(batches: list[Tensor]) -> Iterator[list[int]]:
    """Indices of consecutive batches that make up at most BLOCK_TOKENS together."""
    members: list[int] = []
    size = 0
    for i, batch in enumerate(batches):
        count = batch.shape[:2].numel()
        if members and size + count > BLOCK_TOKENS:
            yield members
            members, size = [], 0
        members.append(i)
        size += count
    yield members


def add_blocks(stream: Stream, blocks: list[Block], rounding: LayerRounding = UNROUNDED) -> None:
    """Add what the experts made of the blocks to the stream's hidden states."""
    batch = 0
    with _Ferry(stream) as ferry:
        for block in blocks:
            done = 0
            while done < len(block.out):
                hidden = ferry.load(batch)
                count = hidden.shape[:2].numel()
                added = rounding.stored(block.out[done : done + count]).view_as(hidden).to(hidden.dtype)
                ferry.store(batch, rounding.stored(hidden + added))
                batch, done = batch + 1, done + count


def _noisy(hidden: Tensor, stream: Stream, number: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((stream.seed, number, batch)) % 2**63)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
    return hidden * (1 + stream.noise * noise)
