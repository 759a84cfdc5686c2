"""Reference and candidates on their way over the same tokens: the hidden states of both, and what comes of them.

Key idea: a portion of the sequences goes through all checkpoints and is scored by itself, so it is one object: its
streams, the reference's first, and a part of each candidate's comparison. The streams for the noise floor, which are
of the reference alone, ride along. So do, where activations are rounded, those that tell what of J is of weights and
what of activations: on every fourth batch, since a stream costs as much as a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimoquant.evaluation.divergence import TokenScores, head_divergences, logits_of
from mimoquant.evaluation.documents import NoiseFloor
from mimoquant.evaluation.not_finite import all_finite
from mimoquant.model.decoder_layer import rms_norm
from mimoquant.model.layer_stream import Stream, portions
from mimoquant.model.media import Placed
from mimoquant.model.served_rounding import LayerRounding, Roundings
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.embedding import Embedding

NOISE = 2.0**-9
WORST = 20
CAUSES_EVERY = 4  # one in so many batches is walked once more for each cause of J

# Of a layer: squared error, squared norm, sum of overlaps, routing choices. The first is NaN where the candidate's
# states are not finite, the second where the reference's are not.
Trace = tuple[float, float, float, int]


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


@dataclass(frozen=True)
class Side:
    """What goes over the tokens: a checkpoint's weights, with what is rounded beside them, by layer."""

    source: CheckpointWeights
    roundings: Roundings = ()


@dataclass(frozen=True)
class Cause:
    """A J of its own, which tells what of the candidate's is due to what: of `other` against `reference`."""

    name: str
    reference: Side
    other: Side


@dataclass
class Portion:
    """Some sequences: batches of ids, a stream of each side (the reference's first), a part of each candidate.

    `few`: which of the batches are walked for the causes; `aside`: the streams of the sides that only these have, on
    those batches alone.
    """

    batches: list[Tensor]
    streams: list[Stream]
    parts: list[Part]
    few: list[int]
    aside: list[Stream]
    causes: list[TokenScores] = field(default_factory=list)

    def passed(self) -> None:
        """All streams have passed a layer."""
        for part, theirs in zip(self.parts, self.streams[1:], strict=True):
            part.traces.append(_trace(self.streams[0], theirs))


def batches_of_causes(number: int, batches: Sequence[Tensor], usual: int) -> list[int]:
    """Which batches of portion `number` the causes are measured on; portions have `usual` batches, but for the last."""
    return [place for place in range(len(batches)) if (number * usual + place) % CAUSES_EVERY == 0]


class StateName(NamedTuple):
    """Which hidden states a tensor of a snapshot holds; on disk the three numbers with spaces between."""

    side: int  # 0: the reference, then the candidates, then what only the causes have
    stream: int  # of a portion; the reference has those of the noise floor after them
    batch: int

    @classmethod
    def parse(cls, name: str) -> StateName:
        return cls(*map(int, name.split()))

    def __str__(self) -> str:
        return " ".join(map(str, self))


class SideBySide:
    """The walk of one rank: its portions through all sides, and the noise floor's streams, if it has them."""

    def __init__(
        self,
        sides: list[Side],
        causes: list[Cause],
        mine: list[tuple[list[Tensor], list[int]]],
        floor: Tensor | None,
        media: Sequence[Sequence[Placed]] = (),
    ) -> None:
        """`sides`: the reference, then the candidates. `mine`: portions, and their batches that `causes` are measured
        on. `floor`: sequences that the noise floor is measured on. `media`: what ids below 0 stand for."""
        self.sides, self.causes = sides, causes
        self.aside = list(dict.fromkeys(s for c in causes for s in (c.reference, c.other) if s not in sides))
        some = [[batches[place] for place in few] for batches, few in mine if few]
        jobs = [*([batches for batches, _ in mine] for _ in sides), *(list(some) for _ in self.aside)]
        if floor is not None:
            jobs[0] += [list(torch.split(floor, 1)), *portions(floor)[:1]]
        self._streams = _streams_of_sides([*sides, *self.aside], jobs, media)
        self.floor = self._streams[0][len(mine) :]
        if self.floor:
            self.floor[-1].noise = NOISE
        left = [iter(streams) for streams in self._streams[len(sides) :]]
        self.portions = [
            Portion(
                batches,
                [of_side[number] for of_side in self._streams[: len(sides)]],
                [Part() for _ in sides[1:]],
                few,
                [next(streams) for streams in left] if few else [],
            )
            for number, (batches, few) in enumerate(mine)
        ]

    @property
    def streams(self) -> list[Stream]:
        return [stream for of_side in self._streams for stream in of_side]

    def parts(self, candidate: int) -> list[Part]:
        """One candidate's, portion by portion."""
        return [portion.parts[candidate] for portion in self.portions]

    def passed(self) -> None:
        """All streams have passed a layer."""
        for portion in self.portions:
            portion.passed()

    def snapshot(self) -> tuple[dict[str, Tensor], list[list[list[Trace]]]]:
        """Hidden states by `StateName`, and the traces so far: of each candidate, of each portion."""
        traces = [[part.traces for part in self.parts(number)] for number in range(len(self.sides) - 1)]
        return {str(name): self._streams[name.side][name.stream].batches[name.batch] for name in self}, traces

    def __iter__(self) -> Iterator[StateName]:
        for side, streams in enumerate(self._streams):
            for number, stream in enumerate(streams):
                for batch in range(len(stream.batches)):
                    yield StateName(side, number, batch)

    def take_up(self, states: dict[str, Tensor], traces: Any) -> None:
        """Put streams and parts where a snapshot had them."""
        for text, hidden in states.items():
            name = StateName.parse(text)
            stream = self._streams[name.side][name.stream]
            stream.put(name.batch, hidden.to(stream.source.device))
        for number, of_candidate in enumerate(traces):
            for part, of_part in zip(self.parts(number), of_candidate, strict=True):
                part.traces = of_part

    @torch.no_grad()
    def score(self) -> NoiseFloor | None:
        """Fill in the parts' scores; returns the noise floor, if streams for it are there."""
        ends = _Ends([*self.sides, *self.aside])
        floor: NoiseFloor | None = None
        for portion in self.portions:
            finals = [
                final_hidden(stream, ends.norm(side)) for stream, side in zip(portion.streams, self.sides, strict=True)
            ]
            labels = torch.cat(portion.batches)[:, 1:].flatten().to(finals[0].device)
            head = ends.head(self.sides[0])
            others = [(final, ends.head(side)) for final, side in zip(finals[1:], self.sides[1:], strict=True)]
            of_candidates = head_divergences((finals[0], head), others, labels)
            for part, other, scores in zip(portion.parts, others, of_candidates, strict=True):
                part.scores, part.worst = scores, _worst(scores, finals[0], other[0], head, other[1])
            if self.floor and portion is self.portions[0]:
                again = [final_hidden(stream, ends.norm(self.sides[0])) for stream in self.floor]
                in_batches, noisy = _mean_js(again, finals[0], head, labels)
                floor = NoiseFloor(batch=in_batches, relative_noise=noisy)
            if portion.few:
                portion.causes = self._causes(portion, finals, ends)
        return floor

    def _causes(self, portion: Portion, finals: list[Tensor], ends: _Ends) -> list[TokenScores]:
        """The scores of each cause, at the positions of the portion's few batches."""
        rows: list[int] = []
        begin = 0
        for place, batch in enumerate(portion.batches):
            count = batch[:, 1:].numel()
            rows += range(begin, begin + count) if place in portion.few else ()
            begin += count
        kept = torch.tensor(rows)
        of_side = dict(zip(self.sides, (final[kept.to(final.device)] for final in finals), strict=True))
        for side, stream in zip(self.aside, portion.aside, strict=True):
            of_side[side] = final_hidden(stream, ends.norm(side))
        labels = torch.cat([portion.batches[place] for place in portion.few])[:, 1:].flatten()
        known = portion.parts[0].scores
        told = {
            (self.sides[0], self.sides[1]): TokenScores(*(getattr(known, f.name)[rows] for f in fields(TokenScores)))
        }
        for reference in dict.fromkeys(cause.reference for cause in self.causes):
            others = [c.other for c in self.causes if c.reference == reference and (reference, c.other) not in told]
            p, *finals_of_others = ((of_side[side], ends.head(side)) for side in (reference, *others))
            if others:
                scores = head_divergences(p, finals_of_others, labels.to(p[0].device))
                told |= {(reference, other): of_other for other, of_other in zip(others, scores, strict=True)}
        return [told[cause.reference, cause.other] for cause in self.causes]


class _Ends:
    """What comes after the last layer, read once a checkpoint."""

    def __init__(self, sides: Sequence[Side]) -> None:
        sources = dict.fromkeys(side.source for side in sides)
        self._heads = {source: source.tensor("lm_head.weight") for source in sources}
        self._norms = {source: source.tensor("model.norm.weight") for source in sources}

    def head(self, side: Side) -> Tensor:
        return self._heads[side.source]

    def norm(self, side: Side) -> Tensor:
        return self._norms[side.source]


def _streams_of_sides(
    sides: Sequence[Side], jobs: Sequence[Sequence[Sequence[Tensor]]], media: Sequence[Sequence[Placed]]
) -> list[list[Stream]]:
    """Streams for the jobs of each side; a checkpoint's embedding is read once, and its towers."""
    out: list[list[Stream]] = [[] for _ in sides]
    for source in dict.fromkeys(side.source for side in sides):
        mine = [place for place, side in enumerate(sides) if side.source is source]
        streams = iter(streams_of(source, [job for place in mine for job in jobs[place]], media))
        for place in mine:
            for _ in jobs[place]:
                stream = next(streams)
                stream.roundings = sides[place].roundings
                out[place].append(stream)
    return out


def streams_of(
    source: CheckpointWeights, jobs: Sequence[Sequence[Tensor]], media: Sequence[Sequence[Placed]] = ()
) -> list[Stream]:
    """One stream of embedded tokens for each list of batches of ids; the embedding is read once. `media`: what ids
    below 0 stand for. A batch that several jobs have is one tensor in all of them, until they part (`layer_stream`)."""
    embedding = Embedding(source, (ids for job in jobs for ids in job), media)
    batches = {id(ids): ids for job in jobs for ids in job}
    hidden = {place: embedding(ids).to(torch.float32) for place, ids in batches.items()}
    return [Stream(source, [hidden[id(ids)] for ids in job]) for job in jobs]


def final_hidden(stream: Stream, norm: Tensor, rounding: LayerRounding | None = None) -> Tensor:
    """Normed hidden states of the scored positions (all but each sequence's last), [sequences * (T - 1), H].

    `rounding`: of the last layer; None: as the stream has it. States that are stored in bf16 come in bf16.
    """
    last = rounding or stream.rounding(stream.source.layers - 1)
    normed = (rms_norm(hidden.to(norm.device), norm, stream.source.config.eps) for hidden in stream.batches)
    final = torch.cat([states[:, :-1].flatten(0, 1) for states in normed])
    return final.bfloat16() if last.in_bf16 else final


def _mean_js(others: Sequence[Tensor], reference: Tensor, head: Tensor, labels: Tensor) -> list[float]:
    """Mean J of what other streams of the reference's first positions came to, each against what it came to itself."""
    few = len(others[0])
    told = head_divergences((reference[:few], head), [(other, head) for other in others], labels[:few])
    return [float(scores.j[scores.predicts].mean()) for scores in told]


def _trace(reference: Stream, candidate: Stream) -> Trace:
    error2 = norm2 = 0.0
    for ours, theirs in zip(reference.batches, candidate.batches, strict=True):
        error2 += float((theirs - ours).square().sum(dtype=torch.float64))
        norm2 += float(ours.square().sum(dtype=torch.float64))
    shared = [
        float((a.experts[:, :, None] == b.experts[:, None, :]).any(-1).double().sum())
        for a, b in zip(reference.routing, candidate.routing, strict=True)
    ]
    choices = sum(routing.experts.numel() for routing in reference.routing)
    return _marked(error2, candidate), _marked(norm2, reference), sum(shared), choices


def _marked(square: float, stream: Stream) -> float:
    """A sum of squares; where it is not finite, NaN if that stream's states are not, else Inf."""
    if math.isfinite(square):
        return square
    return math.inf if all_finite(stream.batches) else math.nan


def _worst(
    scores: TokenScores, reference: Tensor, candidate: Tensor, reference_head: Tensor, candidate_head: Tensor
) -> list[WorstToken]:
    order = np.argsort(-np.where(scores.counted, scores.j, -1.0), kind="stable")[:WORST]
    rows = torch.from_numpy(order.copy())
    tops = []
    for hidden, head in ((reference, reference_head), (candidate, candidate_head)):
        probabilities = logits_of(hidden[rows], head).softmax(-1)
        values, ids = probabilities.topk(min(5, len(head)), dim=-1)
        tops.append([list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)])
    return [
        WorstToken(int(index), float(scores.j[index]), *pair)
        for index, pair in zip(order, zip(*tops, strict=True), strict=True)
    ]
