"""Labels drawn from the model's own predictions, and the gradient that each gives at the last layer's output.

Key idea: with logits z = head · norm(x) and y drawn from p = softmax(z), the gradient of log p_y at norm(x) is
head[y] - Σ_v p_v head[v]. The sum is the same for every draw, so a draw costs a row of the head. Tokens go a few at a
time; logits are never there for more.

A label is where a uniform number falls among p's cumulative sums. The numbers come from a counter-based generator on
the host, by position and draw, so labels do not depend on who draws them; sums are float64, so another device's labels
differ only where its p does. The sums are taken in two steps (blocks of the vocabulary, then one block): short rows are
summed in a fixed order on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.model.backward import linear_gradient, norm_gradient
from mimoquant.model.decoder_layer import linear, rms_norm

TOKEN_BLOCK = 1024  # whose logits are there at once
VOCAB_BLOCK = 1024


def uniforms(positions: int, draws: int, seed: int) -> Tensor:
    """[positions, draws] float64 in [0, 1)."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).random((positions, draws)))


def drawn(shares_NV: Tensor, uniform_ND: Tensor) -> Tensor:
    """Labels [N, D] (int64) from probabilities [N, V] and uniform numbers (float64). One of share 0 is never drawn."""
    vocab = shares_NV.shape[1]
    padded = torch.nn.functional.pad(shares_NV, (0, -vocab % VOCAB_BLOCK))
    blocks = padded.view(len(padded), -1, VOCAB_BLOCK)
    mass = blocks.sum(-1, dtype=torch.float64)
    block, within = _fallen(mass, uniform_ND * mass.sum(-1, keepdim=True))
    rows = torch.arange(len(blocks), device=blocks.device)[:, None]
    inner = blocks[rows, block].to(torch.float64)
    place, _ = _fallen(inner, within[..., None])
    return block * VOCAB_BLOCK + place[..., 0]


def _fallen(shares: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Among the cumulative sums of shares [..., n], which interval each of values [..., d] falls into, and how deep."""
    edges = shares.cumsum(-1)
    values = torch.minimum(values, edges[..., -1:] * (1 - 2.0**-52))  # sums may round to less than was aimed at
    place = torch.searchsorted(edges, values.contiguous(), right=True).clamp(max=shares.shape[-1] - 1)
    return place, (values - edges.gather(-1, place) + shares.gather(-1, place)).clamp(min=0)


def head_gradients(
    hidden_NH: Tensor, norm: Tensor, head: Tensor, eps: float, uniform_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Labels [N, D] (int64) and their gradients [D, N, H] (float32) at the last layer's output.

    Args:
        hidden_NH: that output, float32. norm, head: the final norm [H] and lm_head [V, H].
    Raises CheckpointError where logits are not finite: nothing could be drawn.
    """
    count, draws = uniform_ND.shape
    out = hidden_NH.new_empty(draws, *hidden_NH.shape)
    labels = torch.empty(count, draws, dtype=torch.int64, device=hidden_NH.device)
    for begin in range(0, count, TOKEN_BLOCK):
        some = slice(begin, begin + TOKEN_BLOCK)
        hidden = hidden_NH[some]
        shares = linear(rms_norm(hidden, norm, eps), head).softmax(-1)
        if not bool(shares.isfinite().all()):
            raise CheckpointError("the model's predictions are not finite: no labels can be drawn from them")
        labels[some] = drawn(shares, uniform_ND[some].to(shares.device))
        mean = linear_gradient(shares, head)
        for draw in range(draws):
            of_normed = head[labels[some, draw]].to(mean.dtype) - mean
            out[draw, some] = norm_gradient(of_normed, hidden, norm, eps)
    return labels, out
