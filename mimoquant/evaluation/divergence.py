"""Symmetric KL between two models' next-token distributions, over the full vocabulary.

The definition, once for the whole program. With p the reference's and q the candidate's distribution at a position
(softmax of the logits, temperature 1, full vocabulary, natural logarithm):

    KL(p‖q) = sum_v p_v (log p_v - log q_v)        "forward"
    KL(q‖p) = sum_v q_v (log q_v - log p_v)        "reverse"
    J = (KL(p‖q) + KL(q‖p)) / 2                    the headline, nats per token; the sum is 2 J

Key idea: with logits z, the log-sum-exps cancel in J, and all three follow from running sums over vocabulary blocks, so
logits are never held for the whole vocabulary. Logits and exponentials are float32 (float64 stays float64), sums
float64. Equal logits give 0 to the bit.

Where only some of the candidate's probabilities can be had (a server gives no more), `lumped_divergence` takes all the
others as one outcome. That is a lower bound of the above, never an approximation that may lie on either side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.machine.cores import on_cores
from mimoquant.model.decoder_layer import float32_parts, product
from mimoquant.wording import FEWEST_SEQUENCES

Floats = npt.NDArray[np.float64]
VOCAB_BLOCK, TOKEN_BLOCK, ROW_BLOCK = 8192, 2048, 64  # of logits, and of what is made of them on a CPU
TOGETHER = 3  # candidates whose logits are held beside the reference's


@dataclass(frozen=True)
class TokenScores:
    """One value a position, in order. Losses (nats) are of the token that follows; `agree`: same most likely token."""

    kl_forward: Floats
    kl_reverse: Floats
    j: Floats
    reference_loss: Floats
    candidate_loss: Floats
    confidence: Floats  # the reference's largest probability
    agree: npt.NDArray[np.bool_]
    finite: npt.NDArray[np.bool_]
    predicts: npt.NDArray[np.bool_]  # whether the token that follows is one that models predict: not a picture's

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """Which positions make up the means. Losses of the others may be NaN."""
        return self.finite & self.predicts

    @staticmethod
    def joined(parts: Iterable[TokenScores]) -> TokenScores:
        held = list(parts)
        return TokenScores(*(np.concatenate([getattr(part, f.name) for part in held]) for f in fields(TokenScores)))


@dataclass(frozen=True)
class TopScores:
    """Each position's most likely ids, most likely first, and the loss (nats) of the token that follows."""

    ids: npt.NDArray[np.int64]  # [tokens, K]
    log_probabilities: Floats  # [tokens, K], nats
    loss: Floats  # [tokens]


@dataclass(frozen=True)
class LumpedScores:
    """One value a position: lower bounds (nats), the mass that was lumped, and what may be missing of J."""

    kl_forward: Floats
    kl_reverse: Floats
    j: Floats
    reference_tail: Floats
    candidate_tail: Floats
    ids: npt.NDArray[np.int64]  # how many stand alone
    gap_estimate: Floats
    gap_ceiling: Floats


class _Side:
    """One distribution at some positions: running maximum, and sum of exponentials. Of the block of the vocabulary that
    was added last, `share` [tokens, block] are the exponentials, and earlier sums have to `shrink` [tokens]."""

    share: Tensor
    shrink: Tensor

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.peak = torch.full(labels.shape, float("-inf"), dtype=torch.float64, device=labels.device)
        self.total = torch.zeros_like(self.peak)
        self.top = torch.zeros_like(labels)
        self.label = torch.full_like(self.peak, float("nan"))
        self.finite = torch.ones_like(labels, dtype=torch.bool)

    def add(self, logits: Tensor, begin: int) -> None:
        values, where = logits.max(-1)
        self.finite &= values.isfinite() & logits.amin(-1).isfinite()
        peak = torch.maximum(self.peak, values.double())
        self.top = torch.where(values.double() > self.peak, where + begin, self.top)
        self.shrink = (self.peak - peak).exp()
        self.share = (logits - peak.to(logits.dtype)[:, None]).exp_()
        self.total = self.total * self.shrink + self.share.sum(-1, dtype=torch.float64)
        self.peak = peak
        inside = (self.labels >= begin) & (self.labels < begin + logits.shape[1])
        picked = logits.gather(1, (self.labels - begin).clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        self.label = torch.where(inside, picked, self.label)

    def weighed(self, moment: Tensor, values: Tensor) -> Tensor:
        """A running sum of exponentials times something, with the block that was added last."""
        return moment * self.shrink + (self.share * values).sum(-1, dtype=torch.float64)

    @property
    def log_total(self) -> Tensor:
        return self.peak + self.total.log()


class _Pair:
    """A candidate beside the reference at some positions, and sums of exponentials of each times (z_p - z_q)."""

    def __init__(self, reference: _Side) -> None:
        self.p, self.q = reference, _Side(reference.labels)
        self.moment_p, self.moment_q = (torch.zeros_like(reference.peak) for _ in range(2))

    def add(self, z_p: Tensor, z_q: Tensor, begin: int) -> None:
        """A block of the vocabulary, which the reference has been given already."""
        difference = z_p - z_q
        self.q.add(z_q, begin)
        self.moment_p = self.p.weighed(self.moment_p, difference)
        self.moment_q = self.q.weighed(self.moment_q, difference)
        del self.q.share  # as large as the logits

    def scores(self) -> TokenScores:
        p, q = self.p, self.q
        gap = p.log_total - q.log_total
        mean_p, mean_q = self.moment_p / p.total, self.moment_q / q.total
        scores = {
            "kl_forward": (mean_p - gap).clamp(min=0),
            "kl_reverse": (gap - mean_q).clamp(min=0),
            "j": ((mean_p - mean_q) / 2).clamp(min=0),
            "reference_loss": p.log_total - p.label,
            "candidate_loss": q.log_total - q.label,
            "confidence": 1 / p.total,
            "agree": p.top == q.top,
            "finite": p.finite & q.finite,
            "predicts": p.labels >= 0,
        }
        return TokenScores(**{name: values.cpu().numpy() for name, values in scores.items()})


Logits = Callable[[int, int], Tensor]  # (begin, end) → [tokens, end - begin] of that block of the vocabulary


def token_divergences(reference: Logits, candidates: Sequence[Logits], vocab: int, labels: Tensor) -> list[TokenScores]:
    """Scores of some positions, of each candidate; the reference's logits and exponentials are made once.

    Args:
        labels: [tokens] int64, the token that follows each position; below 0 a picture's or a sound's, which no model
            predicts: there is no loss then.
    """
    rows = _row_blocks(labels)
    sides = [_Side(labels[at]) for at in rows]
    pairs = [[_Pair(side) for side in sides] for _ in candidates]
    for begin in range(0, vocab, VOCAB_BLOCK):
        end = min(begin + VOCAB_BLOCK, vocab)
        z_p, *z_of_candidates = (logits(begin, end) for logits in (reference, *candidates))
        for place, (at, side) in enumerate(zip(rows, sides, strict=True)):
            side.add(z_p[at], begin)
            for of_candidate, z_q in zip(pairs, z_of_candidates, strict=True):
                of_candidate[place].add(z_p[at], z_q[at], begin)
            del side.share
    return [TokenScores.joined(pair.scores() for pair in of_candidate) for of_candidate in pairs]


def _row_blocks(labels: Tensor) -> list[slice]:
    """Positions that are looked at together. On a CPU few, so that what is made of them on the way stays in its caches;
    never one beside others, whose sum would be taken in another order."""
    count = len(labels)
    parts = 1 if labels.device.type == "cuda" else max(1, count // ROW_BLOCK)
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


Head = tuple[Tensor, Tensor]  # final (normed) hidden states [tokens, H], and an output matrix [vocab, H]


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """In the states' dtype at least float32; of states that are stored in bf16 they are stored so too."""
    made = product(float32_parts(hidden, head), head)
    return made.to(hidden.dtype).to(made.dtype)


def head_divergences(reference: Head, candidates: Sequence[Head], labels: Tensor) -> list[TokenScores]:
    """Scores of each candidate, at the same positions, a few tokens at a time; `labels` as in `token_divergences`."""

    def logits(of: Head, rows: slice) -> Logits:
        hidden, head = of[0][rows], of[1]
        return lambda begin, end: logits_of(hidden, head[begin:end])

    vocab, out = len(reference[1]), []
    starts = range(0, len(labels), TOKEN_BLOCK)
    for some in (candidates[first : first + TOGETHER] for first in range(0, len(candidates), TOGETHER)):

        def scores(start: int, some: Sequence[Head] = some) -> list[TokenScores]:
            rows = slice(start, start + TOKEN_BLOCK)
            others = [logits(candidate, rows) for candidate in some]
            return token_divergences(logits(reference, rows), others, vocab, labels[rows])

        size = 4 * min(len(labels), TOKEN_BLOCK) * min(vocab, VOCAB_BLOCK) * (1 + len(some))
        parts = on_cores(scores, starts, labels.device, size)
        out += [TokenScores.joined(of_candidate) for of_candidate in zip(*parts, strict=True)]
    return out


@torch.no_grad()
def top_log_probabilities(hidden: Tensor, head: Tensor, k: int, labels: Tensor) -> TopScores:
    """The k most likely ids of each position, with log-probabilities over the full vocabulary.

    Args:
        hidden: final (normed) hidden states [tokens, H]. head: output matrix [vocab, H], k of whose rows are kept.
        labels: [tokens] int64, the token that follows each position.
    """
    parts = []
    for start in range(0, len(labels), TOKEN_BLOCK):
        rows = hidden[start : start + TOKEN_BLOCK]
        side = _Side(labels[start : start + TOKEN_BLOCK])
        values = rows.new_empty(len(rows), 0)
        ids = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for begin in range(0, len(head), VOCAB_BLOCK):
            logits = logits_of(rows, head[begin : begin + VOCAB_BLOCK])
            side.add(logits, begin)
            names = torch.arange(begin, begin + logits.shape[1], device=rows.device).expand(logits.shape)
            values, ids = torch.cat([values, logits], -1), torch.cat([ids, names], -1)
            values, places = values.topk(min(k, values.shape[1]), dim=-1)
            ids = ids.gather(-1, places)
        parts.append((ids, values.double() - side.log_total[:, None], side.log_total - side.label))
    return TopScores(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


RESOLUTION = 1e-6  # what is left of 1 after a sum of float32 probabilities is known to no better than this


def lumped_divergence(
    reference: Floats, candidate: Floats, known: npt.NDArray[np.bool_], *, complete: bool = False
) -> LumpedScores:
    """Divergences of two distributions of which only some ids are known, all the others taken as one outcome.

    With S the known ids and the tail p_t = 1 - sum_S p, q_t = 1 - sum_S q:

        KL_lump(p‖q) = sum_S p log(p/q) + p_t log(p_t/q_t), the reverse likewise, J_lump their half-sum

    Merging outcomes cannot raise a divergence (data processing), so each is a lower bound of its full-vocabulary value,
    whatever S is. A tail that is smaller than float32 resolves takes in the least likely ids of S, one after the other:
    that merges once more, and the bound stays one. What is missing of J is (p_t KL(p'‖q') + q_t KL(q'‖p')) / 2 with p'
    and q' the distributions inside the tail. Nothing known bounds it; `gap_estimate` takes for both divergences those
    inside the less likely half of S, and `gap_ceiling` is the most it can be if no log(p/q) of the tail lies outside
    the range of those in S.

    Args:
        reference, candidate: [tokens, K] log-probabilities in nats of the same ids, the reference's most likely first.
        known: [tokens, K], which of them belong to S; the candidate's other values are not looked at.
        complete: the K ids are the whole vocabulary, so that where all are known there is no tail.
    """
    known = known & (candidate > -np.inf) & (reference > -np.inf)
    log_p, log_q = np.where(known, reference, 0.0), np.where(known, candidate, 0.0)
    p, q = np.exp(log_p) * known, np.exp(log_q) * known
    kept, tail_p, tail_q = _resolved(p, q, known & complete)
    p, q, ratio = p * kept, q * kept, np.where(kept, log_p - log_q, 0.0)
    lumped = tail_p > 0
    tail_ratio = np.log(np.where(lumped, tail_p, 1.0)) - np.log(np.where(lumped, tail_q, 1.0))
    forward = (p * ratio).sum(-1) + tail_p * tail_ratio
    reverse = -(q * ratio).sum(-1) - tail_q * tail_ratio
    half = kept & (2 * kept.cumsum(-1) > kept.sum(-1, keepdims=True))
    inside = _conditional(p * half, q * half, ratio)
    high = np.maximum(np.where(kept, ratio, -np.inf).max(-1, initial=-np.inf), tail_ratio)
    low = np.minimum(np.where(kept, ratio, np.inf).min(-1, initial=np.inf), tail_ratio)
    return LumpedScores(
        kl_forward=forward.clip(min=0),
        kl_reverse=reverse.clip(min=0),
        j=((forward + reverse) / 2).clip(min=0),
        reference_tail=tail_p,
        candidate_tail=tail_q,
        ids=kept.sum(-1),
        gap_estimate=(tail_p * inside[0] + tail_q * inside[1]) / 2,
        gap_ceiling=(tail_p * (high - tail_ratio) + tail_q * (tail_ratio - low)) / 2,
    )


def _resolved(p: Floats, q: Floats, complete: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """(which ids stand alone [tokens, K], mass of the others in p and in q [tokens]).

    `complete`: where all of a position's ids are marked, there are no others.
    """
    sums = [np.concatenate([(1 - one.sum(-1, keepdims=True)), one[:, ::-1]], 1).cumsum(-1) for one in (p, q)]
    enough = np.minimum(*sums) >= RESOLUTION  # [tokens, 1 + K]: the rest, the rest and the last id, ...
    enough[:, -1] = True
    merged = np.where(complete.all(-1), 0, enough.argmax(-1))
    row = np.arange(len(p))
    kept = (np.arange(p.shape[1]) < p.shape[1] - merged[:, None]) & ((p > 0) | (q > 0))
    tails = [np.where(complete.all(-1), 0.0, one[row, merged].clip(min=0)) for one in sums]
    return kept, tails[0], tails[1]


def _conditional(p: Floats, q: Floats, ratio: Floats) -> tuple[Floats, Floats]:
    """Both divergences of p and q [tokens, K], each taken as a distribution of its own; 0 where there is nothing."""
    mass_p, mass_q = p.sum(-1), q.sum(-1)
    ok = (mass_p > 0) & (mass_q > 0)
    mass_p, mass_q = np.where(ok, mass_p, 1.0), np.where(ok, mass_q, 1.0)
    gap = np.log(mass_p / mass_q)
    forward, reverse = (p * ratio).sum(-1) / mass_p - gap, gap - (q * ratio).sum(-1) / mass_q
    return np.where(ok, forward, 0.0).clip(min=0), np.where(ok, reverse, 0.0).clip(min=0)


def bootstrap(
    values: Floats, sequence: npt.NDArray[np.int64], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling whole sequences (tokens of one are not independent).

    (-inf, inf) of fewer than `FEWEST_SEQUENCES`: resampling them says nothing of others, and of one it has no width.
    """
    names, index = np.unique(sequence, return_inverse=True)
    if len(names) < FEWEST_SEQUENCES:
        return -math.inf, math.inf
    sums = np.bincount(index, weights=values, minlength=len(names))
    counts = np.bincount(index, minlength=len(names))
    picks = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
