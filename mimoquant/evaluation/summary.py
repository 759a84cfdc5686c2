"""Scores of positions → the report's numbers.

Key idea: plain data that JSON, terminal and page are made from. Intervals resample whole sequences, because tokens of
one sequence are not independent; positions that are not finite count in their share and nowhere else.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from mimoquant.calibration.tokens import TokenSet
from mimoquant.evaluation.contexts import by_context, contexts_of, part_of
from mimoquant.evaluation.divergence import TokenScores, bootstrap
from mimoquant.evaluation.documents import (
    ConfidencePart,
    Difference,
    DomainPart,
    Histogram,
    JFacts,
    Perplexity,
    PositionPart,
    Scores,
    Top1,
)
from mimoquant.evaluation.not_finite import Walked, nothing_finite

CONFIDENT = 0.9  # the reference is sure of its token above this probability
_CONFIDENCE_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 1.0)
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]


def sequence_of(scores: TokenScores, tokens: TokenSet) -> _Ints:
    """The sequence each scored position belongs to."""
    return np.repeat(np.arange(len(tokens.ids)), len(scores.j) // len(tokens.ids))


def paired_difference(candidate: TokenScores, baseline: TokenScores, tokens: TokenSet) -> Difference:
    """J of the baseline, and candidate minus baseline with its interval, over the same positions."""
    ok = candidate.counted & baseline.counted
    difference = (candidate.j - baseline.j)[ok]
    low, high = bootstrap(difference, sequence_of(candidate, tokens)[ok])
    return Difference(j=float(baseline.j[ok].mean()), difference=float(difference.mean()), low=low, high=high)


def summarize(
    scores: TokenScores,
    tokens: TokenSet,
    names: tuple[str, str] = ("the reference", "the candidate"),
    first: tuple[int | None, int | None] = (None, None),
) -> Scores:
    """The report's numbers. Positions that are not finite count in their share and nowhere else, those before a token
    of a picture or a sound nowhere at all.

    `names`, `first`: of both sides, for the CheckpointError where no position is finite (`not_finite.Walked`).
    """
    length = tokens.ids.shape[1] - 1
    sequence = np.repeat(np.arange(len(tokens.ids)), length)
    position = np.tile(np.arange(length), len(tokens.ids))
    domain = np.array(tokens.domains)[sequence]
    ok = scores.counted
    if not ok.any():
        losses = scores.reference_loss[scores.predicts], scores.candidate_loss[scores.predicts]
        finite = (bool(np.isfinite(loss).any()) for loss in losses)
        raise nothing_finite([Walked(*side) for side in zip(names, finite, first, strict=True)])
    j = scores.j[ok]
    out = Scores(
        tokens=int(ok.sum()),
        sequences=len(tokens.ids),
        sequence_tokens=length + 1,
        j=_j_facts(j, sequence[ok]),
        kl_forward=float(scores.kl_forward[ok].mean()),
        kl_reverse=float(scores.kl_reverse[ok].mean()),
        symmetric_sum=float(2 * j.mean()),
        top1=_top1(scores.agree[ok], scores.confidence[ok] > CONFIDENT),
        perplexity=_perplexity(scores.reference_loss[ok], scores.candidate_loss[ok]),
        nonfinite_share=float(1 - scores.finite[scores.predicts].mean()),
        by_confidence=_by_confidence(scores.confidence[ok], j),
        by_domain=[
            DomainPart(domain=str(name), **part_of(j, scores.agree[ok], sequence[ok], domain[ok] == name))
            for name in np.unique(domain[ok])
        ],
        by_position=_by_position(position[ok], j, length),
        histogram=_histogram(j),
    )
    if any(tokens.media):
        context = contexts_of(tokens.media, length + 1).reshape(-1)[ok]
        out["by_context"] = by_context(context, j, scores.agree[ok], sequence[ok])
    return out


def _j_facts(j: _Floats, sequence: _Ints) -> JFacts:
    low, high = bootstrap(j, sequence)
    median, p90, p99, p99_9 = map(float, np.quantile(j, [0.5, 0.9, 0.99, 0.999]))
    return JFacts(
        mean=float(j.mean()), low=low, high=high, max=float(j.max()), median=median, p90=p90, p99=p99, p99_9=p99_9
    )


def _top1(agree: _Bools, sure: _Bools) -> Top1:
    return Top1(
        all=float(agree.mean()),
        confident=float(agree[sure].mean()) if sure.any() else None,
        confident_share=float(sure.mean()),
    )


def _perplexity(reference: _Floats, candidate: _Floats) -> Perplexity:
    losses = reference.mean(), candidate.mean()
    return Perplexity(
        reference=float(np.exp(losses[0])),
        candidate=float(np.exp(losses[1])),
        ratio=float(np.exp(losses[1] - losses[0])),
    )


def _by_confidence(confidence: _Floats, j: _Floats) -> list[ConfidencePart]:
    rows = []
    for low, high in itertools.pairwise(_CONFIDENCE_EDGES):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            rows.append(ConfidencePart(low=low, high=high, tokens=int(inside.sum()), j=float(j[inside].mean())))
    return rows


def _by_position(position: _Ints, j: _Floats, length: int) -> list[PositionPart]:
    edges = np.unique(np.linspace(0, length, 9).astype(int))
    rows = []
    for begin, end in itertools.pairwise(edges):
        inside = (position >= begin) & (position < end)
        if inside.any():
            mean = float(j[inside].mean())
            rows.append(PositionPart(begin=int(begin), end=int(end), tokens=int(inside.sum()), j=mean))
    return rows


def _histogram(j: _Floats) -> Histogram:
    """Counts between edges spaced evenly in log10; the outer bins take what lies beyond."""
    edges = 10.0 ** np.arange(-8, 1.51, 0.25)
    counts, _ = np.histogram(np.clip(j, edges[0], edges[-1]), edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
