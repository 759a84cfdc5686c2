"""Reference and candidates on their way over the same tokens: the hidden states of both, and what comes of them.

Key idea: a portion of the sequences goes through all checkpoints and is scored by itself, so it is one object: its
streams, the reference's first, and a part of each candidate's comparison. The streams for the noise floor, which are
of the reference alone, ride along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimoquant.evaluation.divergence import TokenScores, head_divergence
from mimoquant.evaluation.documents import NoiseFloor
from mimoquant.model.decoder_layer import linear, rms_norm
from mimoquant.model.layer_stream import Stream, portions
from mimoquant.weights.decoded import CheckpointWeights

NOISE = 2.0**-9
WORST = 20

Trace = tuple[float, float, float, int]  # of a layer: squared error, squared norm, sum of overlaps, routing choices


@dataclass
class WorstToken:
    """One of the positions with the largest J: its index among the scored ones, and both models' favourites."""

    index: int
    j: float
    reference_top: list[tuple[int, float]]
    candidate_top: list[tuple[int, float]]


@dataclass
class Part:
    """One candidate against the reference, of one portion: a trace of each layer passed, and in the end its scores."""

    traces: list[Trace] = field(default_factory=list)
    scores: TokenScores | None = None
    worst: list[WorstToken] = field(default_factory=list)


@dataclass
class Portion:
    """Some sequences: batches of ids, a stream of each checkpoint (the reference's first), a part of each candidate."""

    batches: list[Tensor]
    streams: list[Stream]
    parts: list[Part]

    def passed(self) -> None:
        """All streams have passed a layer."""
        for part, theirs in zip(self.parts, self.streams[1:], strict=True):
            part.traces.append(_trace(self.streams[0], theirs))


class StateName(NamedTuple):
    """Which hidden states a tensor of a snapshot holds; on disk the three numbers with spaces between."""

    checkpoint: int  # 0: the reference, then the candidates
    stream: int  # of a portion; the reference has those of the noise floor after them
    batch: int

    @classmethod
    def parse(cls, name: str) -> StateName:
        return cls(*map(int, name.split()))

    def __str__(self) -> str:
        return " ".join(map(str, self))


class SideBySide:
    """The walk of one rank: its portions through all checkpoints, and the noise floor's streams, if it has them."""

    def __init__(self, weights: list[CheckpointWeights], mine: list[list[Tensor]], floor: Tensor | None) -> None:
        """`weights`: the reference's, then the candidates'. `floor`: sequences that the noise floor is measured on."""
        self.weights = weights
        jobs = [list(mine) for _ in weights]
        if floor is not None:
            jobs[0] += [list(torch.split(floor, 1)), *portions(floor)[:1]]
        self._streams = [streams_of(source, job) for source, job in zip(weights, jobs, strict=True)]
        self.floor = self._streams[0][len(mine) :]
        if self.floor:
            self.floor[-1].noise = NOISE
        self.portions = [
            Portion(batches, [of_source[number] for of_source in self._streams], [Part() for _ in weights[1:]])
            for number, batches in enumerate(mine)
        ]

    @property
    def streams(self) -> list[Stream]:
        return [stream for of_source in self._streams for stream in of_source]

    def parts(self, candidate: int) -> list[Part]:
        """One candidate's, portion by portion."""
        return [portion.parts[candidate] for portion in self.portions]

    def passed(self) -> None:
        """All streams have passed a layer."""
        for portion in self.portions:
            portion.passed()

    def snapshot(self) -> tuple[dict[str, Tensor], list[list[list[Trace]]]]:
        """Hidden states by `StateName`, and the traces so far: of each candidate, of each portion."""
        traces = [[part.traces for part in self.parts(number)] for number in range(len(self.weights) - 1)]
        return {str(name): self._streams[name.checkpoint][name.stream].batches[name.batch] for name in self}, traces

    def __iter__(self) -> Iterator[StateName]:
        for checkpoint, streams in enumerate(self._streams):
            for number, stream in enumerate(streams):
                for batch in range(len(stream.batches)):
                    yield StateName(checkpoint, number, batch)

    def take_up(self, states: dict[str, Tensor], traces: Any) -> None:
        """Put streams and parts where a snapshot had them."""
        for text, hidden in states.items():
            name = StateName.parse(text)
            stream = self._streams[name.checkpoint][name.stream]
            stream.put(name.batch, hidden.to(stream.source.device))
        for number, of_candidate in enumerate(traces):
            for part, of_part in zip(self.parts(number), of_candidate, strict=True):
                part.traces = of_part

    @torch.no_grad()
    def score(self) -> NoiseFloor | None:
        """Fill in the parts' scores; returns the noise floor, if streams for it are there."""
        heads = [source.tensor("lm_head.weight") for source in self.weights]
        norms = [source.tensor("model.norm.weight") for source in self.weights]
        floor: NoiseFloor | None = None
        for portion in self.portions:
            finals = [final_hidden(stream, norm) for stream, norm in zip(portion.streams, norms, strict=True)]
            labels = torch.cat(portion.batches)[:, 1:].flatten().to(finals[0].device)
            for part, final, head in zip(portion.parts, finals[1:], heads[1:], strict=True):
                part.scores = head_divergence(finals[0], final, heads[0], head, labels)
                part.worst = _worst(part.scores, finals[0], final, heads[0], head)
            if self.floor and portion is self.portions[0]:
                means = [_mean_j(stream, finals[0], norms[0], heads[0], labels) for stream in self.floor]
                floor = NoiseFloor(batch=means[0], relative_noise=means[1])
        return floor


def streams_of(source: CheckpointWeights, jobs: Sequence[Sequence[Tensor]]) -> list[Stream]:
    """One stream of embedded tokens for each list of batches of ids; the embedding is read once."""
    embedding = source.tensor("model.embed_tokens.weight")
    return [Stream(source, [embedding[ids.to(source.device)].to(torch.float32) for ids in job]) for job in jobs]


def final_hidden(stream: Stream, norm: Tensor) -> Tensor:
    """Normed hidden states of the scored positions (all but each sequence's last), [sequences * (T - 1), H]."""
    normed = (rms_norm(hidden.to(norm.device), norm, stream.source.config.eps) for hidden in stream.batches)
    return torch.cat([states[:, :-1].flatten(0, 1) for states in normed])


def _mean_j(stream: Stream, reference: Tensor, norm: Tensor, head: Tensor, labels: Tensor) -> float:
    """Mean J of another stream of the reference's first positions against what they came to."""
    other = final_hidden(stream, norm)
    few = len(other)
    return float(head_divergence(reference[:few], other, head, head, labels[:few]).j.mean())


def _trace(reference: Stream, candidate: Stream) -> Trace:
    error2 = norm2 = 0.0
    for ours, theirs in zip(reference.batches, candidate.batches, strict=True):
        error2 += float((theirs - ours).square().sum(dtype=torch.float64))
        norm2 += float(ours.square().sum(dtype=torch.float64))
    shared = [
        float((a.experts[:, :, None] == b.experts[:, None, :]).any(-1).double().sum())
        for a, b in zip(reference.routing, candidate.routing, strict=True)
    ]
    return error2, norm2, sum(shared), sum(routing.experts.numel() for routing in reference.routing)


def _worst(
    scores: TokenScores, reference: Tensor, candidate: Tensor, reference_head: Tensor, candidate_head: Tensor
) -> list[WorstToken]:
    order = np.argsort(-np.where(scores.finite, scores.j, -1.0), kind="stable")[:WORST]
    rows = torch.from_numpy(order.copy())
    tops = []
    for hidden, head in ((reference, reference_head), (candidate, candidate_head)):
        probabilities = linear(hidden[rows], head).softmax(-1)
        values, ids = probabilities.topk(min(5, len(head)), dim=-1)
        tops.append([list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)])
    return [
        WorstToken(int(index), float(scores.j[index]), *pair)
        for index, pair in zip(order, zip(*tops, strict=True), strict=True)
    ]
