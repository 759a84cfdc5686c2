"""One multi-token-prediction (MTP) layer, forward only: the draft model that every MiMo-V2 checkpoint carries.

Key idea: an MTP layer is a dense sliding-window decoder layer with another entrance and an exit norm, so attention and
MLP are `decoder_layer`'s. With e the embedding of the next token and h the hidden state it follows:

    x = eh_proj [ enorm(e) ; hnorm(h) ]        in this order
    x = x + attention(input_layernorm(x));  x = x + mlp(pre_mlp_layernorm(x))
    out = final_layernorm(x)

`out` goes to the backbone's lm_head, and is the h of the layer one deeper. The first layer's h is the backbone's hidden
state after its last norm.

Left out: caches. Source: the published tensors; how vLLM and SGLang run them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimoquant.model.decoder_layer import (
    DenseWeights,
    ForwardConfig,
    LayerWeights,
    attention_block,
    dense_mlp,
    linear,
    rms_norm,
)


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """Norm weights are [H], `projection` is [H, 2 H] with the embedding's columns first."""

    layer: LayerWeights
    embedding_norm: Tensor
    hidden_norm: Tensor
    projection: Tensor
    final_norm: Tensor


def mtp_forward(hidden_BTH: Tensor, embedded_BTH: Tensor, weights: MtpWeights, config: ForwardConfig) -> Tensor:
    """What the layer makes of hidden states and the embeddings of the tokens it is told of; normed, [B, T, H]."""
    assert isinstance(weights.layer.mlp, DenseWeights)
    embedded = rms_norm(embedded_BTH, weights.embedding_norm, config.eps)
    hidden = rms_norm(hidden_BTH, weights.hidden_norm, config.eps)
    joined = linear(torch.cat((embedded, hidden), dim=-1), weights.projection)
    attended, normed = attention_block(joined, weights.layer, config)
    return rms_norm(attended + dense_mlp(normed, weights.layer.mlp), weights.final_norm, config.eps)
