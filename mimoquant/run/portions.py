"""The calibration tokens on their way through the model, in portions that are dealt out to the ranks.

Key idea: a portion's hidden states rest with one rank, on its host or device, and there it goes through attention,
router and experts. What experts see of all portions is then given to all ranks, so each of them has the layer's
statistics from the same sums in the same order, whoever did which part. Portions, and the blocks that statistics are
summed over, depend on the data alone, so the bytes that come out do not depend on the number of ranks.

Memory on each rank's device: one layer's tokens, in bfloat16, and of its own portions also the experts' sum in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.machine.team import Team
from mimoquant.model.decoder_layer import ExpertChunk, LayerWeights, Router, add_experts
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.layer_stream import (
    BLOCK_TOKENS,
    Block,
    Stream,
    add_blocks,
    attend_and_route,
    dense_layer,
    on_host,
    portions,
    route_again,
)
from mimoquant.model.layout import ModelLayout
from mimoquant.model.media import Placed
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.embedding import Embedding

Seen = list[tuple[Tensor, Dispatch]]  # blocks of tokens [n, H] bf16, and where they go


def walked(reader: CheckpointReader, layout: ModelLayout, device: torch.device) -> CheckpointWeights:
    """A source's weights, as tokens are walked through them: on CUDA attention takes two of three bfloat16 parts of its
    float32 rows, which is far more than engines have of them."""
    weights = CheckpointWeights(reader, layout, device)
    weights.config = replace(weights.config, parts=2)
    return weights


@dataclass
class Portion:
    """`tokens` tokens, which belong to the rank `owner`. Its `stream` and, inside a MoE layer, `block` are there only;
    `routing` is everywhere."""

    owner: int
    tokens: int
    stream: Stream | None
    block: Block | None = None
    routing: Routing | None = None


class Portions:
    """Sets of sequences (those that train, those held out) that walk through a model's layers together."""

    def __init__(
        self,
        weights: CheckpointWeights,
        sets: Sequence[Tensor],
        team: Team,
        media: Sequence[Sequence[Placed]] = (),
        *,
        near: bool = False,
    ) -> None:
        """`media`: what numbers below 0 in the `sets` stand for (`media.walked_ids`). `near`: hidden states rest on the
        device, and not on the host."""
        self.weights, self.team, self.near = weights, team, near
        parts, number = [portions(ids) for ids in sets], itertools.count()
        own = list(itertools.chain(*parts))[team.rank :: team.size]
        embedding = Embedding(weights, itertools.chain(*own), media)
        self.sets = [[self._portion(part, embedding, next(number)) for part in of_set] for of_set in parts]
        self.seen: list[Seen] = []  # of each set, in a MoE layer

    def _portion(self, batches: list[Tensor], embedding: Embedding, number: int) -> Portion:
        owner, stream = number % self.team.size, None
        if owner == self.team.rank:
            embedded = (embedding(batch) for batch in batches)
            rest = [hidden.to(torch.float32) if self.near else on_host(hidden) for hidden in embedded]
            stream = Stream(self.weights, rest)
        return Portion(owner, sum(batch.numel() for batch in batches), stream)

    @property
    def routing(self) -> list[Routing]:
        """Where the tokens of all portions go."""
        return [portion.routing for portion in itertools.chain(*self.sets) if portion.routing is not None]

    def dense(self, weights: LayerWeights) -> None:
        """Take all tokens through a layer without experts."""
        self.clear()
        for stream, _ in self._own():
            dense_layer(stream, weights)

    def attend(self, weights: LayerWeights) -> None:
        """Take all tokens through a layer's attention and router."""
        self._route(attend_and_route, weights)

    def route_again(self, weights: LayerWeights) -> None:
        """Take all tokens, past attention already, through another norm and router."""
        self._route(route_again, weights)

    def through(self, chunk: ExpertChunk) -> None:
        """Take this rank's tokens through a chunk of experts. Chunks come in the same order on all ranks."""
        for _, portion in self._own():
            if portion.block is not None:
                add_experts(portion.block.out, portion.block.tokens, portion.block.dispatch, chunk)

    def add(self) -> None:
        """Add what the experts made to the hidden states: the layer is passed."""
        for stream, portion in self._own():
            if portion.block is not None:
                add_blocks(stream, [portion.block])
        self.clear()

    def state(self) -> dict[str, Tensor]:
        """This rank's hidden states between two layers, by name."""
        return {
            f"calibration {i} {j}": hidden
            for i, (stream, _) in enumerate(self._own())
            for j, hidden in enumerate(stream.batches)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, hidden in self.state().items():
            hidden.copy_(state[name])

    def clear(self) -> None:
        """Let go of a layer's tokens."""
        self.seen = []
        for portion in itertools.chain(*self.sets):
            portion.block = portion.routing = None

    def _own(self) -> Iterator[tuple[Stream, Portion]]:
        for portion in itertools.chain(*self.sets):
            if portion.stream is not None:
                yield portion.stream, portion

    def _route(self, walk: Callable[..., list[Block]], weights: LayerWeights) -> None:
        """`walk` all portions, each at its owner, then give all ranks what came out."""
        self.clear()
        groups = [list(_grouped(members)) for members in self.sets]
        held = [[self._memory(group, weights) for group in of_set] for of_set in groups]
        every = [
            pair
            for of_set, memory in zip(groups, held, strict=True)
            for group, block in zip(of_set, memory, strict=True)
            for pair in _rows(group, block)
        ]
        for portion, rows in every:
            self._own_rows(portion, rows, walk, weights)
        for portion, rows in every:
            assert portion.routing is not None
            for tensor in (rows, portion.routing.experts, portion.routing.weights):
                self.team.broadcast(tensor, portion.owner)
        assert isinstance(weights.mlp, Router)
        experts = len(weights.mlp.weight)
        self.seen = [
            [(block, _dispatch(group, experts)) for group, block in zip(of_set, memory, strict=True)]
            for of_set, memory in zip(groups, held, strict=True)
        ]

    def _memory(self, group: list[Portion], weights: LayerWeights) -> Tensor:
        count = sum(portion.tokens for portion in group)
        return torch.empty(count, len(weights.post_norm), dtype=torch.bfloat16, device=self.weights.device)

    def _own_rows(
        self, portion: Portion, rows: Tensor, walk: Callable[..., list[Block]], weights: LayerWeights
    ) -> None:
        """Walk a portion of ours and put its tokens into `rows`, which its block then looks at; or make room."""
        if portion.stream is None:
            shape = (portion.tokens, self.weights.config.top_k)
            portion.routing = Routing(
                torch.empty(shape, dtype=torch.int64, device=rows.device),
                torch.empty(shape, dtype=torch.float32, device=rows.device),
            )
            return
        (block,) = walk(portion.stream, weights, torch.bfloat16)
        portion.block = replace(block, tokens=rows.copy_(block.tokens))
        (routing,) = portion.stream.routing
        portion.routing = Routing(routing.experts.contiguous(), routing.weights.contiguous())


def _grouped(members: list[Portion]) -> Iterator[list[Portion]]:
    """Consecutive portions that make up at most BLOCK_TOKENS together."""
    group: list[Portion] = []
    for portion in members:
        if group and sum(p.tokens for p in group) + portion.tokens > BLOCK_TOKENS:
            yield group
            group = []
        group.append(portion)
    yield group


def _rows(group: list[Portion], block: Tensor) -> Iterator[tuple[Portion, Tensor]]:
    """Each portion's rows of their common block."""
    return zip(group, torch.split(block, [portion.tokens for portion in group]), strict=True)


def _dispatch(group: list[Portion], experts: int) -> Dispatch:
    routings = [portion.routing for portion in group if portion.routing is not None]
    return Dispatch.of(
        Routing(torch.cat([r.experts for r in routings]), torch.cat([r.weights for r in routings])), experts
    )
