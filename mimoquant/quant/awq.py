"""AWQ through the Gram matrix: by what each channel is scaled, without one forward pass.

Key idea: a weight matrix whose columns are multiplied by s, on inputs divided by s, is the same function; what changes
is which columns share a scale's resolution with which. The Gram matrix of the scaled inputs follows from the old one,
so every candidate's loss tr(D H Dᵀ) is known at once, with the scale search inside.

A fold is one factor a channel, and there are two kinds, told apart by dtype. Exponents k (int32, s = 2^k) are exact in
every dtype that matters here: nothing but the rounding of the 4-bit weights differs, and router logits stay the same
bits. Real factors s (float32) are finer, and what they touch is rounded once more to the dtype it is stored in.

A candidate must beat the identity, so a fold is never worse than none under its own loss.
Shapes: E experts, O rows, I columns. Reference: Lin et al., AWQ, arXiv 2306.00978 (alpha grid, duo scaling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LIMIT = 12  # largest |log2 s|
SAMPLE_ROWS = 128  # of a matrix, that choose: what a fold does to a row, it does to all


def candidates(
    gram_diagonal: Tensor, weight_mean: Tensor | None, n_grid: int, *, real: bool = False
) -> Iterator[Tensor]:
    """Folds of the shape of `gram_diagonal` [..., I], exponents or `real` factors; the first is the identity.

    Args:
        gram_diagonal: mean square of each input channel.
        weight_mean: mean |weight| of each column, for duo scaling; None without.
    """
    spread = torch.log2(gram_diagonal.clamp(min=1e-30)) / 2
    weight = None if weight_mean is None else torch.log2(weight_mean.clamp(min=1e-30))
    live = gram_diagonal > 1e-12 * gram_diagonal.amax(-1, keepdim=True)  # a channel that nobody uses is left alone
    if weight_mean is not None:
        live = live & (weight_mean > 0)
    yield torch.ones_like(spread) if real else torch.zeros_like(spread, dtype=torch.int32)
    for step in range(1, n_grid + 1):
        alpha = step / n_grid
        exponent = alpha * spread if weight is None else alpha * spread - (1 - alpha) * weight
        high = exponent.masked_fill(~live, -float("inf")).amax(-1, keepdim=True)
        low = exponent.masked_fill(~live, float("inf")).amin(-1, keepdim=True)
        k = exponent - (high + low) / 2
        k = torch.where(live, (k if real else k.round()).clamp(-LIMIT, LIMIT), 0.0)
        yield torch.exp2(k) if real else k.to(torch.int32)


def scaled_gram(gram_EII: Tensor, fold: Tensor) -> Tensor:
    """The Gram matrix of inputs divided by the fold's factors, [I] or [E, I]."""
    shrunk = factors(inverse(fold))
    return gram_EII * shrunk[..., :, None] * shrunk[..., None, :]


def power(k: Tensor) -> Tensor:
    """2^k in float32."""
    return torch.ldexp(torch.ones_like(k, dtype=torch.float32), k)


def factors(fold: Tensor) -> Tensor:
    """What a fold of either kind multiplies by, float32."""
    return fold if fold.is_floating_point() else power(fold)


def inverse(fold: Tensor) -> Tensor:
    """The fold that undoes another of its kind: exact for exponents."""
    return fold.reciprocal() if fold.is_floating_point() else -fold


def moved(fold: Tensor) -> Tensor:
    """Which channels a fold changes, bool."""
    return fold != (1 if fold.is_floating_point() else 0)


def scaled(values: Tensor, fold: Tensor) -> Tensor:
    """`values` times the fold's factors (which broadcast), rounded once to their own dtype.

    Exponents round nothing, but for what under- or overflows.
    """
    return (values * factors(fold)).to(values.dtype)


def exponents(source: Tensor, result: Tensor) -> Tensor:
    """The inverse of `scaled`: k, int32, of each element; 0 where either is 0. Not exact unless they are powers."""
    both = (source != 0) & (result != 0)
    ratio = torch.where(both, result.to(torch.float32) / torch.where(both, source, 1.0).to(torch.float32), 1.0)
    return torch.log2(ratio).round().to(torch.int32)


def divided_by(source: Tensor, result: Tensor, *, real: bool) -> Tensor:
    """The fold that a norm was divided by: `source` over `result` [I]; the identity where either is 0.

    A real one is the quotient of what is stored, not what was asked for: see `settled`.
    """
    if not real:
        return -exponents(source, result)
    both = (source != 0) & (result != 0) & torch.isfinite(result)
    return torch.where(both, source.to(torch.float32) / torch.where(both, result, 1.0).to(torch.float32), 1.0)


def settled(fold: Tensor, norm: Tensor) -> Tensor:
    """The fold that `norm` [I] can be divided by and stored: a real factor gives way to the rounding of its quotient.

    So router and experts make up for the norm that is stored, and its rounding costs nothing. Dividing by what is
    returned rounds to the same norm again.
    """
    return divided_by(norm, scaled(norm, inverse(fold)), real=True) if fold.is_floating_point() else fold


def best_fold(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    n_grid: int,
    duo: bool,
    shared: bool,
    real: bool = False,
) -> Tensor:
    """The fold with the least loss: [E, I], each expert its own, or [I] where all share one (`shared`).

    Args:
        loss_of: (weights, Gram matrices) → loss [E] after quantization.
        real: factors rather than exponents.
    """
    weight_EOI = weight_EOI[:, :: -(-weight_EOI.shape[1] // SAMPLE_ROWS)]
    diagonal = torch.diagonal(gram_EII, dim1=-2, dim2=-1)
    mean = weight_EOI.abs().to(torch.float32).mean(-2) if duo else None
    if shared:
        diagonal, mean = diagonal.mean(0), None if mean is None else mean.mean(0)
    best: Tensor | None = None
    least: Tensor | None = None
    for fold in candidates(diagonal, mean, n_grid, real=real):
        loss = loss_of(scaled(weight_EOI, fold[..., None, :]), scaled_gram(gram_EII, fold))
        loss = loss.sum() if shared else loss
        if best is None or least is None:
            best, least = fold, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better if shared else better[:, None], fold, best)
    assert best is not None
    return best
