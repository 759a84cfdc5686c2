"""AWQ through the Gram matrix: which power of two each channel is scaled by, without one forward pass.

Key idea: a weight matrix whose columns are multiplied by 2^k, on inputs divided by 2^k, is the same function; what
changes is which columns share a scale's resolution with which. The Gram matrix of the scaled inputs follows from the
old one, so every candidate's loss tr(D H Dᵀ) is known at once, with the scale search inside. Powers of two are exact in
every dtype that matters here: nothing but the rounding of the 4-bit weights differs, and router logits stay the same
bits.

A candidate must beat the identity, so a fold is never worse than none under its own loss.
Shapes: E experts, O rows, I columns. Reference: Lin et al., AWQ, arXiv 2306.00978 (alpha grid, duo scaling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LIMIT = 12  # largest |k|
SAMPLE_ROWS = 128  # of a matrix, that choose: what a fold does to a row, it does to all


def candidates(gram_diagonal: Tensor, weight_mean: Tensor | None, n_grid: int) -> Iterator[Tensor]:
    """Exponents k, int32 of the shape of `gram_diagonal` [..., I]; the first is the identity.

    Args:
        gram_diagonal: mean square of each input channel.
        weight_mean: mean |weight| of each column, for duo scaling; None without.
    """
    spread = torch.log2(gram_diagonal.clamp(min=1e-30)) / 2
    weight = None if weight_mean is None else torch.log2(weight_mean.clamp(min=1e-30))
    live = gram_diagonal > 1e-12 * gram_diagonal.amax(-1, keepdim=True)  # a channel that nobody uses is left alone
    if weight_mean is not None:
        live = live & (weight_mean > 0)
    yield torch.zeros_like(gram_diagonal, dtype=torch.int32)
    for step in range(1, n_grid + 1):
        alpha = step / n_grid
        exponent = alpha * spread if weight is None else alpha * spread - (1 - alpha) * weight
        high = exponent.masked_fill(~live, -float("inf")).amax(-1, keepdim=True)
        low = exponent.masked_fill(~live, float("inf")).amin(-1, keepdim=True)
        k = (exponent - (high + low) / 2).round().clamp(-LIMIT, LIMIT)
        yield torch.where(live, k, 0.0).to(torch.int32)


def scaled_gram(gram_EII: Tensor, k: Tensor) -> Tensor:
    """The Gram matrix of inputs divided by 2^k; k is [I] or [E, I]."""
    shrunk = power(-k)
    return gram_EII * shrunk[..., :, None] * shrunk[..., None, :]


def power(k: Tensor) -> Tensor:
    """2^k in float32."""
    return torch.ldexp(torch.ones_like(k, dtype=torch.float32), k)


def scaled(values: Tensor, k: Tensor) -> Tensor:
    """`values` times 2^k (which broadcasts), in their own dtype: exact, but for what under- or overflows."""
    return (values * power(k)).to(values.dtype)


def exponents(source: Tensor, result: Tensor) -> Tensor:
    """The inverse of `scaled`: k, int32, of each element; 0 where either is 0. Not exact unless they are powers."""
    both = (source != 0) & (result != 0)
    ratio = torch.where(both, result.to(torch.float32) / torch.where(both, source, 1.0).to(torch.float32), 1.0)
    return torch.log2(ratio).round().to(torch.int32)


def best_fold(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    n_grid: int,
    duo: bool,
    shared: bool,
) -> Tensor:
    """The exponents with the least loss: [E, I], each expert its own, or [I] where all share one (`shared`).

    Args:
        loss_of: (weights, Gram matrices) → loss [E] after quantization.
    """
    weight_EOI = weight_EOI[:, :: -(-weight_EOI.shape[1] // SAMPLE_ROWS)]
    diagonal = torch.diagonal(gram_EII, dim1=-2, dim2=-1)
    mean = weight_EOI.abs().to(torch.float32).mean(-2) if duo else None
    if shared:
        diagonal, mean = diagonal.mean(0), None if mean is None else mean.mean(0)
    best: Tensor | None = None
    least: Tensor | None = None
    for k in candidates(diagonal, mean, n_grid):
        loss = loss_of(scaled(weight_EOI, k[..., None, :]), scaled_gram(gram_EII, k))
        loss = loss.sum() if shared else loss
        if best is None or least is None:
            best, least = k, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better if shared else better[:, None], k, best)
    assert best is not None
    return best
