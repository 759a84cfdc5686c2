"""Many variants of one checkpoint in one walk: streams of hidden states that part where the variants begin to differ.

Key idea: a trial says for every layer what its experts are. Trials that have been the same up to a layer have the same
hidden states, so they are one stream, a branch; where the next layer differs the branch forks. So "only layer l
quantized" costs the layers from l on, and all branches of all trials ride on one load of the weights. Attention and
router are no one's to change: where a branch forks, its children share them too.

Beside the clean branch some tokens are a probe: they go through a layer's experts in every option, which tells how the
options' errors compare there, and what each expert's error is.

Trials may be walked as they are served, inputs and cache rounded: branches part before attention where that differs.

Left out: branches that meet again; they never have the same hidden states after they have parted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.evaluation.divergence import head_divergences
from mimoquant.evaluation.side_by_side import final_hidden
from mimoquant.machine.overlap import read_ahead
from mimoquant.mixing.felt import Gradients, LayerFelt, border, felt
from mimoquant.mixing.layer_options import LayerOptions, Option, Round
from mimoquant.mixing.needs import probe_every
from mimoquant.model.decoder_layer import (
    DenseWeights,
    ExpertChunk,
    LayerWeights,
    Router,
    add_experts,
    add_group,
    expert_outputs,
)
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.layer_stream import Block, Stream, add_blocks, attend_and_route, dense_layer, on_host
from mimoquant.model.served_rounding import NONE, NVFP4, UNROUNDED, LayerRounding, Roundings

K = TypeVar("K")


@dataclass(frozen=True)
class Trial:
    """A variant of the checkpoint: the option of each layer's experts; None where they are as the source has them.
    `roundings`: what is rounded beside its weights, by layer; empty: nothing."""

    name: str
    options: tuple[Option, ...]
    roundings: Roundings = ()

    def rounding(self, layer: int) -> LayerRounding:
        return self.roundings[layer] if self.roundings else UNROUNDED

    def until(self, layers: int) -> object:
        """What tells it from another before that layer."""
        return self.options[:layers], tuple(self.roundings[:layers])


@dataclass(frozen=True)
class Probed:
    """What a layer's experts may be, and what their inputs are rounded to."""

    label: str
    fmt: Option
    inputs: str = NONE


class HostStream(Stream):
    """Hidden states that rest on the host, for a GPU has room for one layer's work on every branch, and not for more.
    They are replaced and never changed: branches share them, and a snapshot may still be reading them."""

    def put(self, batch: int, hidden: Tensor, *, non_blocking: bool = False) -> None:
        self.batches[batch] = on_host(hidden, non_blocking=non_blocking) if hidden.is_cuda else hidden


@dataclass
class Branch:
    """Trials, by number, that have been the same so far, and their hidden states."""

    trials: list[int]
    stream: HostStream

    def of(self, trials: list[int]) -> Branch:
        """Some of its trials, which go on by themselves from here."""
        return Branch(trials, HostStream(self.stream.source, list(self.stream.batches)))


@dataclass
class Probe:
    """What a layer's experts make of some tokens, E values in the lists; one entry an option in the dicts.

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

    `probed`: what is probed in each layer beside the clean branch, which then has to be the first trial. With
    `gradients` all tokens are probed, and `felt` has, by layer, what the loss feels of them (`LayerFelt`, packed); the
    second trial, the source once more, is then the carrier of the last layer's error to the next.
    """

    ids: list[Tensor]
    trials: list[Trial]
    probed: tuple[Probed, ...] = ()
    gradients: Gradients | None = None
    felt: dict[int, Tensor] = field(default_factory=dict)
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

    def part_for_attention(self, layer: int) -> None:
        """Part the branches whose trials differ in what is rounded before the layer's experts."""
        out = []
        for branch in self.branches:
            apart = self._grouped(branch, lambda trial: trial.rounding(layer).of_attention)
            out += [branch] if len(apart) == 1 else [branch.of(trials) for trials in apart.values()]
        self.branches = out

    def rounding(self, branch: Branch, layer: int) -> LayerRounding:
        """Of a branch's trials, up to the experts."""
        return self.trials[branch.trials[0]].rounding(layer)

    def parted(self, branch: Branch, layer: int) -> dict[tuple[Option, LayerRounding], list[int]]:
        """The branch's trials by what they want of a layer."""
        return self._grouped(branch, lambda trial: (trial.options[layer], trial.rounding(layer)))

    def _grouped(self, branch: Branch, key: Callable[[Trial], K]) -> dict[K, list[int]]:
        out: dict[K, list[int]] = {}
        for number in branch.trials:
            out.setdefault(key(self.trials[number]), []).append(number)
        return out

    def state(self) -> dict[str, Tensor]:
        """Hidden states by branch (its first trial) and batch, and what is felt by layer."""
        states = {
            f"branch {branch.trials[0]} batch {i}": hidden
            for branch in self.branches
            for i, hidden in enumerate(branch.stream.batches)
        }
        return states | {f"felt {layer}": values for layer, values in self.felt.items()}

    def restore(self, source: LayerOptions, layers: int, state: dict[str, Tensor]) -> None:
        """The branches as they are after `layers` layers: each has states by its first trial."""
        together: list[list[int]] = []
        for number, trial in enumerate(self.trials):
            alike = (of for of in together if self.trials[of[0]].until(layers) == trial.until(layers))
            if f"branch {number} batch 0" in state:
                together.append([number])
            else:
                next(alike).append(number)
        held = ((trials, [state[f"branch {trials[0]} batch {i}"] for i in range(len(self.ids))]) for trials in together)
        self.branches = [Branch(trials, HostStream(source.source, batches)) for trials, batches in held]
        told = ((key.split(), values) for key, values in state.items())
        self.felt = {int(layer): values for (kind, layer, *_), values in told if kind == "felt"}


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
                    _dense(layer, lane, weights)
            else:
                _experts(layer, source, lanes, weights, feed)
            source.end()
            if after_layer:
                after_layer(layer)


def _dense(layer: int, lane: Lane, weights: LayerWeights) -> None:
    lane.part_for_attention(layer)
    for branch in lane.branches:
        dense_layer(branch.stream, weights, lane.rounding(branch, layer))
    lane.passed += lane.tokens * len(lane.branches)


def _experts(
    layer: int, source: LayerOptions, lanes: Sequence[Lane], weights: LayerWeights, feed: Iterator[Any]
) -> None:
    assert isinstance(weights.mlp, Router)
    passages = [_Passage(layer, source, lane, weights) for lane in lanes]
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


@dataclass(frozen=True)
class _Part:
    """A branch inside one layer: what its experts are, what is rounded of it; tokens in its blocks are so already."""

    option: Option
    rounding: LayerRounding
    branch: Branch
    blocks: list[Block]


def scaled(rounding: LayerRounding, scales: tuple[float, float]) -> LayerRounding:
    """With the scales that come with a layer's codes."""
    return replace(rounding, gate_up_scale=scales[0], down_scale=scales[1]) if rounding.experts == NVFP4 else rounding


class _Passage:
    """A lane inside one layer: past attention, its branches forked, on the way through the experts."""

    def __init__(self, layer: int, source: LayerOptions, lane: Lane, weights: LayerWeights) -> None:
        self.layer, self.source, self.lane = layer, source, lane
        self.parts: list[_Part] = []
        self.probe: _Probing | None = None
        lane.part_for_attention(layer)
        for branch in lane.branches:
            blocks = attend_and_route(branch.stream, weights, rounding=lane.rounding(branch, layer))
            if lane.probed and 0 in branch.trials:
                self.probe = self._probing(blocks, branch.stream, weights)
            for number, ((option, rounding), trials) in enumerate(lane.parted(branch, layer).items()):
                mine = [replace(block, out=torch.zeros_like(block.out)) for block in blocks] if number else blocks
                told = scaled(rounding, source.input_scales(option))
                seen = [replace(block, tokens=told.expert_inputs(block.tokens)) for block in mine]
                self.parts.append(_Part(option, rounding, branch.of(trials), seen))
        self.lane.branches = [part.branch for part in self.parts]
        if isinstance(self.probe, _Feeling):
            self.probe.arrived = _apart(self.lane.branches)

    def _probing(self, blocks: list[Block], stream: HostStream, weights: LayerWeights) -> _Probing:
        if self.lane.gradients is None:
            return _Probing(blocks, stream.routing, self.lane.probed, self.source, probe_every(len(self.lane.probed)))
        return _Feeling(blocks, stream, self.lane.probed, self.source, weights)

    @property
    def wanted(self) -> list[Option]:
        probed = [one.fmt for one in self.lane.probed]
        return [part.option for part in self.parts] + ([None, *probed] if self.probe else [])

    def through(self, chunks: dict[Option, ExpertChunk]) -> None:
        for part in self.parts:
            rounding = scaled(part.rounding, self.source.input_scales(part.option))
            for block in part.blocks:
                add_experts(block.out, block.tokens, block.dispatch, chunks[part.option], rounding)
        if self.probe:
            self.probe.through(chunks)

    def finish(self) -> None:
        for part in self.parts:
            add_blocks(part.branch.stream, part.blocks, part.rounding)
        self.lane.passed += self.lane.tokens * len(self.parts)
        if isinstance(self.probe, _Feeling):
            self.probe.feel(self.layer, self.lane)
        if self.probe:
            self.lane.probes.append(self.probe.told(self.layer))
            self.lane.passed += self.probe.passed


class _Probing:
    """One in `every` of the tokens of some blocks, on its way through the experts in all options. Answers stay float32
    here where the branches' are stored in bf16: only their ratios are of use."""

    def __init__(
        self,
        blocks: list[Block],
        routing: list[Routing],
        probed: tuple[Probed, ...],
        source: LayerOptions,
        every: int,
    ) -> None:
        self.probed, self.source = probed, source
        experts, device = len(blocks[0].dispatch.begins) - 1, blocks[0].tokens.device
        self.routed = [sum(b.dispatch.begins[e + 1] - b.dispatch.begins[e] for b in blocks) for e in range(experts)]
        self.blocks = []
        for block, chosen in zip(blocks, routing, strict=True):
            few = Routing(chosen.experts[::every], chosen.weights[::every])
            tokens = block.tokens[::every]
            outs = {label: torch.zeros_like(tokens) for label in (None, *(one.label for one in probed))}
            self.blocks.append((tokens, Dispatch.of(few, experts), outs))
        self.passed = sum(len(tokens) for tokens, _, _ in self.blocks) * (1 + len(probed))
        self.energy, self.largest = torch.zeros(2, experts, dtype=torch.float64, device=device)
        self.error = {one.label: torch.zeros_like(self.energy) for one in probed}

    def through(self, chunks: dict[Option, ExpertChunk]) -> None:
        plain = chunks[None]
        roundings = [
            scaled(LayerRounding(experts=one.inputs), self.source.input_scales(one.fmt)) for one in self.probed
        ]
        for tokens, dispatch, outs in self.blocks:
            seen = [rounding.expert_inputs(tokens) for rounding in roundings]
            for group in dispatch.groups(plain.begin, plain.begin + len(plain.gate)):
                experts = group.members
                clean = expert_outputs(tokens, group, plain)
                add_group(outs[None], group, clean)
                self.energy[experts] += _energy(clean, group.gains)
                reached = (clean.abs().amax(-1) * group.used).amax(-1)
                self.largest[experts] = torch.maximum(self.largest[experts], reached.double())
                for one, inputs, rounding in zip(self.probed, seen, roundings, strict=True):
                    change = expert_outputs(inputs, group, chunks[one.fmt], rounding) - clean
                    add_group(outs[one.label], group, change)
                    self.error[one.label][experts] += _energy(change, group.gains)

    def changes(self, label: str | None) -> Tensor:
        """[n, H] of the probed tokens in an option; for None what the experts add."""
        return torch.cat([outs[label] for _, _, outs in self.blocks])

    def told(self, layer: int) -> Probe:
        whole = {
            label: sum(float(outs[label].square().sum(dtype=torch.float64)) for _, _, outs in self.blocks)
            for label in (None, *self.error)
        }
        return Probe(
            layer,
            whole[None],
            {label: whole[label] for label in self.error},
            self.energy.tolist(),
            {label: error.tolist() for label, error in self.error.items()},
            self.largest.tolist(),
            self.routed,
        )


class _Feeling(_Probing):
    """All tokens in all options, and each once more with its last expert replaced by the next.

    `arrived`: [N], how far the error of the last layer that has experts has moved what this one's router sees.
    """

    def __init__(
        self,
        blocks: list[Block],
        stream: HostStream,
        probed: tuple[Probed, ...],
        source: LayerOptions,
        weights: LayerWeights,
    ) -> None:
        super().__init__(blocks, stream.routing, probed, source, every=1)
        assert isinstance(weights.mlp, Router)
        self.arrived = torch.empty(0)
        self.distances: list[Tensor] = []
        self.jumps: list[tuple[Tensor, Dispatch, Tensor]] = []
        hidden, device = torch.cat([batch.flatten(0, 1) for batch in stream.batches]), blocks[0].tokens.device
        config = stream.source.config
        for block, rows in zip(blocks, torch.split(hidden, [len(block.tokens) for block in blocks]), strict=True):
            distance, there = border(
                block.tokens, rows.to(device), weights.post_norm, weights.mlp, config.top_k, config.eps
            )
            self.distances.append(distance)
            dispatch = Dispatch.of(there, len(weights.mlp.weight))
            self.jumps.append((block.tokens, dispatch, torch.zeros_like(block.tokens)))
        self.passed += len(hidden)

    def through(self, chunks: dict[Option, ExpertChunk]) -> None:
        super().through(chunks)
        for tokens, dispatch, out in self.jumps:
            add_experts(out, tokens, dispatch, chunks[None])

    def feel(self, layer: int, lane: Lane) -> None:
        """What is felt of the layer; then the first format's error, and no other, goes on to the next."""
        assert lane.gradients is not None
        gradients, changes = lane.gradients.of(layer), [self.changes(one.label) for one in self.probed]
        jump = torch.cat([out for _, _, out in self.jumps]) - self.changes(None)
        lane.felt[layer] = LayerFelt(
            torch.stack([felt(gradients, change) for change in changes]),
            torch.stack([change.norm(dim=-1) for change in changes]),
            torch.cat(self.distances),
            jump.norm(dim=-1),
            felt(gradients, jump),
            self.arrived.to(jump.device),
            _apart(lane.branches).to(jump.device),
        ).packed()
        clean = lane.branches[0]
        batches, done = [], 0
        for hidden in clean.stream.batches:
            count = hidden.shape[:2].numel()
            batches.append(hidden + changes[0][done : done + count].to(hidden.device).view_as(hidden))
            done += count
        lane.branches = [Branch([0], clean.stream), Branch([1], HostStream(clean.stream.source, batches))]


def _apart(branches: list[Branch]) -> Tensor:
    """[N], on the host: the norm of each token's difference between two branches; 0 while they are one."""
    first, other = (branch.stream.batches for branch in (branches[0], branches[-1]))
    return torch.cat([(a - b).flatten(0, 1).norm(dim=-1) for a, b in zip(first, other, strict=True)])


def _energy(outputs: Tensor, gains: Tensor) -> Tensor:
    """[m] float64: squared outputs [m, c, H] of each expert, weighted by its squared gains (0 where padded)."""
    return (outputs * gains[..., None]).square().sum(-1).sum(-1, dtype=torch.float64)


def finals_of(lane: Lane, trial: int, norm: Tensor) -> Tensor:
    """Normed hidden states of a trial's scored positions, at the end of the walk."""
    branch = next(branch for branch in lane.branches if trial in branch.trials)
    last = branch.stream.source.layers - 1
    return final_hidden(branch.stream, norm, lane.rounding(branch, last))


@torch.no_grad()
def mean_j(lane: Lane, reference: Tensor, norm: Tensor, head: Tensor) -> list[list[float]]:
    """J of each trial and sequence, in nats a token, against the reference's final hidden states.

    Raises CheckpointError where a trial's logits are not finite: no mean would be right.
    """
    labels = torch.cat(lane.ids)[:, 1:].flatten().to(reference.device)
    out = []
    for number, trial in enumerate(lane.trials):
        [scores] = head_divergences((reference, head), [(finals_of(lane, number, norm), head)], labels)
        if not scores.finite.all():
            bad = int((~scores.finite).sum())
            raise CheckpointError(
                f"{trial.name}: {bad} of {len(labels)} positions have logits that are not finite",
                hint="quantizing breaks this model there; eval-kl of the output says more",
            )
        out.append(scores.j.reshape(-1, lane.ids[0].shape[1] - 1).mean(1).tolist())
    return out
