"""Many variants of one checkpoint in one walk: streams of hidden states that part where the variants begin to differ.

Key idea: a trial says for every layer what its experts are. Trials that have been the same up to a layer have the same
hidden states, so they are one stream, a branch; where the next layer differs the branch forks. So "only layer l
quantized" costs the layers from l on, and all branches of all trials ride on one load of the weights. Attention and
router are no one's to change: where a branch forks, its children share them too.

Beside the clean branch some tokens are a probe: they go through a layer's experts in every format, which tells how the
formats' errors compare there, and what each expert's error is.

Left out: branches that meet again; they never have the same hidden states after they have parted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.evaluation.divergence import head_divergence
from mimoquant.evaluation.side_by_side import final_hidden
from mimoquant.machine.overlap import read_ahead
from mimoquant.mixing.layer_options import LayerOptions, Option, Round
from mimoquant.mixing.needs import probe_every
from mimoquant.model.decoder_layer import (
    DenseWeights,
    Dispatch,
    ExpertChunk,
    LayerWeights,
    Router,
    Routing,
    add_experts,
    add_group,
    expert_outputs,
)
from mimoquant.model.layer_stream import Block, Stream, add_blocks, attend_and_route, dense_layer, on_host
from mimoquant.quant.formats import Format


@dataclass(frozen=True)
class Trial:
    """A variant of the checkpoint: the option of each layer's experts; None where they are as the source has them."""

    name: str
    options: tuple[Option, ...]


class HostStream(Stream):
    """Hidden states that rest on the host, for a GPU has room for one layer's work on every branch, and not for more.
    They are replaced and never changed: branches share them, and a snapshot may still be reading them."""

    def put(self, batch: int, hidden: Tensor) -> None:
        self.batches[batch] = on_host(hidden) if hidden.is_cuda else hidden


@dataclass
class Branch:
    """Trials, by number, that have been the same so far, and their hidden states."""

    trials: list[int]
    stream: HostStream


@dataclass
class Probe:
    """What a layer's experts make of some tokens, E values in the lists; one entry a format in the dicts.

    `energy`: sum over tokens of the squared norm of what the layer's experts add together; `error`: of its change.
    The same of single experts, each weighted by its routing weight: `expert_energy`, `expert_error`. `largest`: the
    largest |value| that comes out of an expert. `routed`: tokens of each expert, of all of the lane.
    """

    layer: int
    energy: float
    error: dict[str, float]
    expert_energy: list[float]
    expert_error: dict[str, list[float]]
    largest: list[float]
    routed: list[int]


@dataclass
class Lane:
    """A portion of the sequences, in batches of ids, with the trials that it goes through.

    `formats`: what is probed in each layer beside the clean branch, which then has to be the first trial.
    """

    ids: list[Tensor]
    trials: list[Trial]
    formats: tuple[Format, ...] = ()
    branches: list[Branch] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    passed: float = 0.0  # tokens times layers, of all branches; a probe counts with the share of tokens and formats

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.ids)

    def begin(self, source: LayerOptions, embedding: Tensor) -> None:
        """All trials are one branch of embedded tokens."""
        device = source.source.device
        batches = [on_host(embedding[ids.to(device)]) for ids in self.ids]
        self.branches = [Branch(list(range(len(self.trials))), HostStream(source.source, batches))]

    def parted(self, branch: Branch, layer: int) -> dict[Option, list[int]]:
        """The branch's trials by what they want of a layer."""
        out: dict[Option, list[int]] = {}
        for number in branch.trials:
            out.setdefault(self.trials[number].options[layer], []).append(number)
        return out

    def state(self) -> dict[str, Tensor]:
        """Hidden states by branch (its first trial) and batch."""
        return {
            f"branch {branch.trials[0]} batch {i}": hidden
            for branch in self.branches
            for i, hidden in enumerate(branch.stream.batches)
        }

    def restore(self, source: LayerOptions, layers: int, state: dict[str, Tensor]) -> None:
        """The branches as they are after `layers` layers."""
        together: dict[tuple[Option, ...], list[int]] = {}
        for number, trial in enumerate(self.trials):
            together.setdefault(trial.options[:layers], []).append(number)
        held = (
            (trials, [state[f"branch {trials[0]} batch {i}"] for i in range(len(self.ids))])
            for trials in together.values()
        )
        self.branches = [Branch(trials, HostStream(source.source, batches)) for trials, batches in held]


@torch.no_grad()
def walk_forks(
    source: LayerOptions, lanes: Sequence[Lane], *, first: int = 0, after_layer: Callable[[int], None] | None = None
) -> None:
    """Take all lanes from layer `first` to the last. `after_layer` is called after each."""
    with contextlib.closing(read_ahead(source.feed(first), depth=1)) as feed:
        for layer in range(first, source.source.layers):
            weights = next(feed)
            assert isinstance(weights, LayerWeights)
            source.begin(layer, weights)
            if isinstance(weights.mlp, DenseWeights):
                for lane in lanes:
                    _dense(lane, weights)
            else:
                _experts(layer, source, lanes, weights, feed)
            source.end()
            if after_layer:
                after_layer(layer)


def _dense(lane: Lane, weights: LayerWeights) -> None:
    for branch in lane.branches:
        dense_layer(branch.stream, weights)
    lane.passed += lane.tokens * len(lane.branches)


def _experts(
    layer: int, source: LayerOptions, lanes: Sequence[Lane], weights: LayerWeights, feed: Iterator[Any]
) -> None:
    assert isinstance(weights.mlp, Router)
    passages = [_Passage(layer, lane, weights) for lane in lanes]
    wanted = dict.fromkeys(option for passage in passages for option in passage.wanted)
    done = 0
    while done < len(weights.mlp.weight):
        work: Round = next(feed)
        for chunks in source.chunks(work, list(wanted)):
            for passage in passages:
                passage.through(chunks)
        done = work[-1][0].end
    for passage in passages:
        passage.finish()


class _Passage:
    """A lane inside one layer: past attention, its branches forked, on the way through the experts."""

    def __init__(self, layer: int, lane: Lane, weights: LayerWeights) -> None:
        self.layer, self.lane = layer, lane
        self.parts: list[tuple[Option, Branch, list[Block]]] = []
        self.probe: _Probing | None = None
        for branch in lane.branches:
            blocks = attend_and_route(branch.stream, weights)
            if lane.formats and 0 in branch.trials:
                self.probe = _Probing(blocks, branch.stream.routing, lane.formats)
            for number, (option, trials) in enumerate(lane.parted(branch, layer).items()):
                stream = HostStream(branch.stream.source, list(branch.stream.batches))
                mine = [replace(block, out=torch.zeros_like(block.out)) for block in blocks] if number else blocks
                self.parts.append((option, Branch(trials, stream), mine))
        self.lane.branches = [branch for _, branch, _ in self.parts]

    @property
    def wanted(self) -> list[Option]:
        return [option for option, _, _ in self.parts] + ([None, *self.lane.formats] if self.probe else [])

    def through(self, chunks: dict[Option, ExpertChunk]) -> None:
        for option, _, blocks in self.parts:
            for block in blocks:
                add_experts(block.out, block.tokens, block.dispatch, chunks[option])
        if self.probe:
            self.probe.through(chunks)

    def finish(self) -> None:
        for _, branch, blocks in self.parts:
            add_blocks(branch.stream, blocks)
        self.lane.passed += self.lane.tokens * len(self.parts)
        if self.probe:
            self.lane.probes.append(self.probe.told(self.layer))
            self.lane.passed += self.probe.passed


class _Probing:
    """Some tokens (`probe_every`) of some blocks, on its way through the experts in all formats."""

    def __init__(self, blocks: list[Block], routing: list[Routing], formats: tuple[Format, ...]) -> None:
        self.formats = formats
        experts, device = len(blocks[0].dispatch.begins) - 1, blocks[0].tokens.device
        self.routed = [sum(b.dispatch.begins[e + 1] - b.dispatch.begins[e] for b in blocks) for e in range(experts)]
        self.blocks, every = [], probe_every(len(formats))
        for block, chosen in zip(blocks, routing, strict=True):
            few = Routing(chosen.experts[::every], chosen.weights[::every])
            tokens = block.tokens[::every]
            outs = {option: torch.zeros_like(tokens) for option in (None, *formats)}
            self.blocks.append((tokens, Dispatch.of(few, experts), outs))
        self.passed = sum(len(tokens) for tokens, _, _ in self.blocks) * (1 + len(formats))
        self.energy, self.largest = torch.zeros(2, experts, dtype=torch.float64, device=device)
        self.error = {fmt: torch.zeros_like(self.energy) for fmt in formats}

    def through(self, chunks: dict[Option, ExpertChunk]) -> None:
        plain = chunks[None]
        for tokens, dispatch, outs in self.blocks:
            for group in dispatch.groups(plain.begin, plain.begin + len(plain.gate)):
                experts = torch.tensor(group.experts, device=tokens.device)
                clean = expert_outputs(tokens, group, plain)
                add_group(outs[None], group, clean)
                self.energy[experts] += _energy(clean, group.gains)
                reached = (clean.abs().amax(-1) * group.used).amax(-1)
                self.largest[experts] = torch.maximum(self.largest[experts], reached.double())
                for fmt in self.formats:
                    change = expert_outputs(tokens, group, chunks[fmt]) - clean
                    add_group(outs[fmt], group, change)
                    self.error[fmt][experts] += _energy(change, group.gains)

    def told(self, layer: int) -> Probe:
        whole = {
            option: sum(float(outs[option].square().sum(dtype=torch.float64)) for _, _, outs in self.blocks)
            for option in (None, *self.formats)
        }
        return Probe(
            layer,
            whole[None],
            {fmt.label: whole[fmt] for fmt in self.formats},
            self.energy.tolist(),
            {fmt.label: self.error[fmt].tolist() for fmt in self.formats},
            self.largest.tolist(),
            self.routed,
        )


def _energy(outputs: Tensor, gains: Tensor) -> Tensor:
    """[m] float64: squared outputs [m, c, H] of each expert, weighted by its squared gains (0 where padded)."""
    return (outputs * gains[..., None]).square().sum(-1).sum(-1, dtype=torch.float64)


def finals_of(lane: Lane, trial: int, norm: Tensor) -> Tensor:
    """Normed hidden states of a trial's scored positions, at the end of the walk."""
    branch = next(branch for branch in lane.branches if trial in branch.trials)
    return final_hidden(branch.stream, norm)


@torch.no_grad()
def mean_j(lane: Lane, reference: Tensor, norm: Tensor, head: Tensor) -> list[list[float]]:
    """J of each trial and sequence, in nats a token, against the reference's final hidden states.

    Raises CheckpointError where a trial's logits are not finite: no mean would be right.
    """
    labels = torch.cat(lane.ids)[:, 1:].flatten().to(reference.device)
    out = []
    for number, trial in enumerate(lane.trials):
        scores = head_divergence(reference, finals_of(lane, number, norm), head, head, labels)
        if not scores.finite.all():
            bad = int((~scores.finite).sum())
            raise CheckpointError(
                f"{trial.name}: {bad} of {len(labels)} positions have logits that are not finite",
                hint="quantizing breaks this model there; eval-kl of the output says more",
            )
        out.append(scores.j.reshape(-1, lane.ids[0].shape[1] - 1).mean(1).tolist())
    return out
