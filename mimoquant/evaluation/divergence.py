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

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.wording import FEWEST_SEQUENCES

Floats = npt.NDArray[np.float64]
VOCAB_BLOCK, TOKEN_BLOCK = 8192, 2048


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
    """Running maximum, sum of exponentials, and sum of exponentials times (z_p - z_q), of one distribution."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.peak = torch.full((tokens,), float("-inf"), dtype=torch.float64, device=device)
        self.total = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.moment = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.top = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.label = torch.full((tokens,), float("nan"), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, difference: Tensor, begin: int, labels: Tensor) -> None:
        values, where = logits.max(-1)
        peak = torch.maximum(self.peak, values.double())
        self.top = torch.where(values.double() > self.peak, where + begin, self.top)
        shrink = (self.peak - peak).exp()
        share = (logits - peak.to(logits.dtype)[:, None]).exp()
        self.total = self.total * shrink + share.sum(-1, dtype=torch.float64)
        self.moment = self.moment * shrink + (share * difference).sum(-1, dtype=torch.float64)
        self.peak = peak
        inside = (labels >= begin) & (labels < begin + logits.shape[1])
        picked = logits.gather(1, (labels - begin).clamp(0, logits.shape[1] - 1)[:, None])[:, 0].double()
        self.label = torch.where(inside, picked, self.label)

    @property
    def log_total(self) -> Tensor:
        return self.peak + self.total.log()


def token_divergence(
    reference: Callable[[int, int], Tensor], candidate: Callable[[int, int], Tensor], vocab: int, labels: Tensor
) -> TokenScores:
    """Scores of some positions.

    Args:
        reference, candidate: (begin, end) → logits [tokens, end - begin] of that vocabulary block.
        labels: [tokens] int64, the token that follows each position; below 0 a picture's or a sound's, which no model
            predicts: there is no loss then.
    """
    p, q = _Side(len(labels), labels.device), _Side(len(labels), labels.device)
    finite = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    for begin in range(0, vocab, VOCAB_BLOCK):
        end = min(begin + VOCAB_BLOCK, vocab)
        z_p, z_q = reference(begin, end), candidate(begin, end)
        finite &= z_p.isfinite().all(-1) & z_q.isfinite().all(-1)
        difference = z_p - z_q
        p.add(z_p, difference, begin, labels)
        q.add(z_q, difference, begin, labels)
    gap = p.log_total - q.log_total
    mean_p, mean_q = p.moment / p.total, q.moment / q.total
    scores = {
        "kl_forward": (mean_p - gap).clamp(min=0),
        "kl_reverse": (gap - mean_q).clamp(min=0),
        "j": ((mean_p - mean_q) / 2).clamp(min=0),
        "reference_loss": p.log_total - p.label,
        "candidate_loss": q.log_total - q.label,
        "confidence": 1 / p.total,
        "agree": p.top == q.top,
        "finite": finite,
        "predicts": labels >= 0,
    }
    return TokenScores(**{name: values.cpu().numpy() for name, values in scores.items()})


def head_divergence(
    reference: Tensor, candidate: Tensor, reference_head: Tensor, candidate_head: Tensor, labels: Tensor
) -> TokenScores:
    """Scores from final (normed) hidden states [tokens, H] and output matrices [vocab, H], a few tokens at a time."""

    def logits(hidden: Tensor, head: Tensor) -> Callable[[int, int], Tensor]:
        return lambda begin, end: hidden @ head[begin:end].to(hidden.dtype).T

    parts = []
    for start in range(0, len(labels), TOKEN_BLOCK):
        rows = slice(start, start + TOKEN_BLOCK)
        parts.append(
            token_divergence(
                logits(reference[rows], reference_head),
                logits(candidate[rows], candidate_head),
                len(reference_head),
                labels[rows],
            )
        )
    return TokenScores.joined(parts)


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
        side = _Side(len(rows), rows.device)
        values = rows.new_empty(len(rows), 0)
        ids = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for begin in range(0, len(head), VOCAB_BLOCK):
            logits = rows @ head[begin : begin + VOCAB_BLOCK].to(rows.dtype).T
            side.add(logits, logits.new_zeros(()), begin, labels[start : start + TOKEN_BLOCK])
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
