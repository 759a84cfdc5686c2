"""What the loss feels of an expert's projections: their output metrics, from the residual stream's Fisher matrix.

Key idea: F [H, H], the second moment of the gradient of log p at a layer's output, is what the loss feels of its
experts' answers, so it is down_proj's metric as it stands. Gate and up are stacked, [2I, H]: an error of their outputs
moves the inner activation of token t by s_t = [up σ'(gate), σ(gate)], σ being SiLU, and what is felt of inner
activations is M = W_dᵀ F W_d. So their metric is [[M, M], [M, M]] ∘ Σ_t s_t s_tᵀ: no gradient of an expert's own is
needed.

F is of as many samples as tokens were walked back through, times draws of labels. Few say little of it and would
mislead, so it is shrunk toward the multiple of the identity with its trace, under which all outputs count alike: that
is GPTQ on the Gram matrix alone.

An expert sees tokens of its own kind, and what is felt of its answers there is not what is felt of the layer's output
on average. F_e, the second moment at its own tokens, is of fewer samples, so it is shrunk toward F as far as its noise
tells. Noise and distance are measured: by two halves of the tokens, which differ by noise alone, and from F.

Shapes: E experts, H hidden, I inner width, J = 2I.
Reference: shrinkage as in Ledoit and Wolf, 2004, with the variance from halves, since a sequence's tokens depend on one
another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimoquant.quant.products import first_half, halves, product, transposed

SHRINKAGE = 1.0  # n0 over the width: samples' worth of the identity
DAMP = 0.1  # of the mean diagonal, at least, of any metric
_TINY = torch.finfo(torch.float32).tiny


def shrunk_fisher(fisher_HH: Tensor, samples: int) -> Tensor:
    """F of `samples` gradients, shrunk toward the identity at its own trace."""
    width = len(fisher_HH)
    share = SHRINKAGE * width / (samples + SHRINKAGE * width)
    return dampened((1 - share) * fisher_HH, share / (1 - share))


def experts_fisher(halves_2EHH: Tensor, count_2E: Tensor, fisher_HH: Tensor) -> tuple[Tensor, Tensor]:
    """What is felt of each expert's answers [E, H, H], and how much of it is its layer's [E], 0 to 1.

    (1 - lambda) F_e + lambda F, both with the trace of F; lambda is what expected squared error is least for, the
    variance of F_e over its mean squared distance from F, and 1 where a half has no samples.

    Args:
        halves_2EHH: sums of outer products over two halves of the samples, and count_2E of how many.
    """
    total = count_2E.sum(0).clamp(min=1)
    own = halves_2EHH.sum(0) / total[:, None, None]
    scale = _trace(own) / _trace(fisher_HH).clamp(min=_TINY)
    apart = halves_2EHH[0] / count_2E[0].clamp(min=1)[:, None, None]
    apart -= halves_2EHH[1] / count_2E[1].clamp(min=1)[:, None, None]
    noise = count_2E.prod(0) / total.square() * _squares(apart)
    del apart
    far = _squares(own - scale[:, None, None] * fisher_HH)
    sound = (count_2E > 0).all(0) & (far > 0) & (scale > 0)
    share = torch.where(sound, noise / far.clamp(min=_TINY), 1.0).clamp(max=1.0)
    own *= torch.where(sound, (1 - share) / scale.clamp(min=_TINY), 0.0)[:, None, None]
    return own.add_(share[:, None, None] * fisher_HH), share


def _trace(matrices: Tensor) -> Tensor:
    return torch.diagonal(matrices, dim1=-2, dim2=-1).sum(-1)


def _squares(matrices: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return norm.square()


def dampened(metric: Tensor, damp: float) -> Tensor:
    """A copy of [..., n, n] with `damp` of the mean diagonal more on the diagonal."""
    metric = metric.clone()
    diagonal = torch.diagonal(metric, dim1=-2, dim2=-1)
    diagonal += damp * diagonal.mean(-1, keepdim=True)
    return metric


def gate_up_metric(fisher_HH: Tensor, down_EHI: Tensor, slopes_EJJ: Tensor) -> Tensor:
    """[E, J, J] of gate's rows and up's below them.

    Args:
        fisher_HH: or one an expert, [E, H, H]. down_EHI: down_proj as it will answer, float32. slopes_EJJ: the second
            moment of s over the tokens.
    """
    return dampened(slopes_EJJ * felt_inside(fisher_HH, down_EHI).repeat(1, 2, 2), DAMP)


def felt_inside(fisher_HH: Tensor, down_EHI: Tensor) -> Tensor:
    """W_dᵀ F W_d, [E, I, I] float32, of weights that bfloat16 holds; F may be one for all."""
    down, fisher = first_half(down_EHI), fisher_HH.expand(len(down_EHI), *fisher_HH.shape[-2:])
    return product(transposed(down), halves(product(halves(fisher), down)))
