"""Symmetric KL between two models' next-token distributions, over the full vocabulary.

The definition, once for the whole program. With p the reference's and q the candidate's distribution at a position
(softmax of the logits, temperature 1, full vocabulary, natural logarithm):

    KL(p‖q) = sum_v p_v (log p_v - log q_v)        "forward"
    KL(q‖p) = sum_v q_v (log q_v - log p_v)        "reverse"
    J = (KL(p‖q) + KL(q‖p)) / 2                    the headline, nats per token; the sum is 2 J

Key idea: with logits z, the log-sum-exps cancel in J, and all three follow from running sums over vocabulary blocks, so
logits are never held for the whole vocabulary. Logits and exponentials are float32 (float64 stays float64), sums
float64. Equal logits give 0 to the bit. Left out: top-k approximations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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

    @staticmethod
    def joined(parts: Iterable[TokenScores]) -> TokenScores:
        held = list(parts)
        return TokenScores(*(np.concatenate([getattr(part, f.name) for part in held]) for f in fields(TokenScores)))


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
        labels: [tokens] int64, the token that follows each position.
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
        parts.append(token_divergence(logits(reference[rows], reference_head), logits(candidate[rows], candidate_head),
                                      len(reference_head), labels[rows]))  # fmt: skip
    return TokenScores.joined(parts)


def bootstrap(
    values: Floats, sequence: npt.NDArray[np.int64], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling whole sequences (tokens of one are not independent)."""
    names, index = np.unique(sequence, return_inverse=True)
    sums = np.bincount(index, weights=values, minlength=len(names))
    counts = np.bincount(index, minlength=len(names))
    picks = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
