"""What the loss feels of an expert's projections: their output metrics, from the residual stream's Fisher matrix.

Key idea: F [H, H], the second moment of the gradient of log p at a layer's output, is what the loss feels of its
experts' answers, so it is down_proj's metric as it stands. Gate and up are stacked, [2I, H]: an error of their outputs
moves the inner activation of token t by s_t = [up σ'(gate), σ(gate)], σ being SiLU, and what is felt of inner
activations is M = W_dᵀ F W_d. So their metric is [[M, M], [M, M]] ∘ Σ_t s_t s_tᵀ: no gradient of an expert's own is
needed.

F is of as many samples as tokens were walked back through, times draws of labels. Few say little of it and would
mislead, so it is shrunk toward the multiple of the identity with its trace, under which all outputs count alike: that
is GPTQ on the Gram matrix alone.

Shapes: E experts, H hidden, I inner width, J = 2I.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 1.0  # n0 over the width: samples' worth of the identity
DAMP = 0.1  # of the mean diagonal, at least, of any metric


def shrunk_fisher(fisher_HH: Tensor, samples: int) -> Tensor:
    """F of `samples` gradients, shrunk toward the identity at its own trace and dampened."""
    width = len(fisher_HH)
    share = SHRINKAGE * width / (samples + SHRINKAGE * width)
    return dampened((1 - share) * fisher_HH, share + DAMP)


def dampened(metric: Tensor, damp: float) -> Tensor:
    """A copy of [..., n, n] with `damp` of the mean diagonal more on the diagonal."""
    metric = metric.clone()
    diagonal = torch.diagonal(metric, dim1=-2, dim2=-1)
    diagonal += damp * diagonal.mean(-1, keepdim=True)
    return metric


def gate_up_metric(fisher_HH: Tensor, down_EHI: Tensor, slopes_EJJ: Tensor) -> Tensor:
    """[E, J, J] of gate's rows and up's below them.

    Args:
        down_EHI: down_proj as it will answer, float32. slopes_EJJ: the second moment of s over the tokens.
    """
    inner = down_EHI.mT @ (fisher_HH @ down_EHI)
    return dampened(slopes_EJJ * inner.repeat(1, 2, 2), DAMP)
