"""Each part's gradient against automatic differentiation of the forward that every quality number rests on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mimoquant.model import attention as attention_core
from mimoquant.model import backward
from mimoquant.model.decoder_layer import (
    AttentionWeights,
    DenseWeights,
    ExpertChunk,
    ForwardConfig,
    Router,
    add_experts,
    attention,
    dense_mlp,
    linear,
    rms_norm,
    route,
)
from mimoquant.model.dispatch import Dispatch, Routing

DRAWS, SEQUENCES, TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 2, 3, 40, 32, 24, 7, 3
CONFIG = ForwardConfig(
    eps=1e-5, rope_theta=1e4, sliding_rope_theta=100.0, partial_rotary_factor=0.34, window=6, value_scale=0.7,
    top_k=TOP_K,
)  # fmt: skip


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_autograd(forward: Callable[[Tensor], Tensor], at: Tensor, y: Tensor) -> Tensor:
    """For each draw of y the gradient of <forward(at), y>."""
    leaf = at.clone().requires_grad_()
    out = forward(leaf)
    return torch.stack([torch.autograd.grad(out, leaf, of_draw, retain_graph=True)[0] for of_draw in y])


def assert_near(ours: Tensor, theirs: Tensor, bound: float = 2e-6) -> None:
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < bound


HIDDEN_BTH = normal(SEQUENCES, TOKENS, HIDDEN, seed=0)
Y = normal(DRAWS, SEQUENCES, TOKENS, HIDDEN, seed=1)


def test_a_norm() -> None:
    weight = 1 + normal(HIDDEN, seed=2, scale=0.3)
    ours = backward.norm_gradient(Y, HIDDEN_BTH, weight, 0.1)
    assert_near(ours, by_autograd(lambda at: rms_norm(at, weight, 0.1), HIDDEN_BTH, Y))


def test_a_product() -> None:
    weight, y = normal(INNER, HIDDEN, seed=3).bfloat16(), normal(DRAWS, SEQUENCES, TOKENS, INNER, seed=4)
    assert_near(backward.linear_gradient(y, weight), by_autograd(lambda at: linear(at, weight), HIDDEN_BTH, y))


@pytest.mark.parametrize("chunk_bytes", [2**28, 1])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("sink", [False, True])
def test_attention(sliding: bool, sink: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of grouped heads, values of another width, a part of each head rotated; in one chunk of queries and in many."""
    monkeypatch.setattr(attention_core, "_QUERY_CHUNK_BYTES", chunk_bytes)
    heads, kv_heads, width, value_width = 4, 2, 12, 10
    weights = AttentionWeights(
        normal(heads * width, HIDDEN, seed=5, scale=0.4), normal(kv_heads * width, HIDDEN, seed=6, scale=0.4),
        normal(kv_heads * value_width, HIDDEN, seed=7), normal(HIDDEN, heads * value_width, seed=8),
        normal(heads, seed=9) if sink else None, heads, kv_heads, sliding,
    )  # fmt: skip
    ours = backward.attention_gradient(Y, HIDDEN_BTH, weights, CONFIG)
    assert_near(ours, by_autograd(lambda at: attention(at, weights, CONFIG), HIDDEN_BTH, Y))


def test_a_dense_mlp() -> None:
    weights = DenseWeights(*(normal(*shape, seed=10 + i) for i, shape in
                             enumerate(((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)))))  # fmt: skip
    assert_near(backward.dense_gradient(Y, HIDDEN_BTH, weights), by_autograd(lambda at: dense_mlp(at, weights),
                                                                             HIDDEN_BTH, Y))  # fmt: skip


def experts(begin: int, end: int) -> ExpertChunk:
    shapes = ((EXPERTS, INNER, HIDDEN), (EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    return ExpertChunk(begin, *(normal(*shape, seed=20 + i, scale=0.3)[begin:end] for i, shape in enumerate(shapes)))


ROUTER = Router(normal(EXPERTS, HIDDEN, seed=30, scale=0.2), torch.tensor([9.0, *[0.0] * (EXPERTS - 2), -9.0]))


def mixture(tokens: Tensor) -> Tensor:
    """All of a layer's experts, with the router; expert 0 sees every token, the last one none."""
    routing = route(tokens, ROUTER, TOP_K)
    out = torch.zeros(tokens.shape)
    add_experts(out, tokens, Dispatch.of(routing, EXPERTS), experts(0, EXPERTS))
    return out


def test_experts_and_their_router_in_chunks() -> None:
    """The gradient goes through what each expert makes of the token and through how much of it is taken."""
    tokens, y = HIDDEN_BTH.flatten(0, 1), Y.flatten(1, 2)
    routing = route(tokens, ROUTER, TOP_K)
    held = backward.ExpertsGradient(tokens, y, routing, Dispatch.of(routing, EXPERTS))
    for begin, end in ((0, 2), (2, 6), (6, EXPERTS)):
        held.through(experts(begin, end))
    of_router = backward.routing_gradient(held.gains(), tokens, routing, ROUTER)
    assert_near(held.rows + of_router, by_autograd(mixture, tokens, y))
    assert float(of_router.norm()) > 0.01 * float(held.rows.norm()), "or the router would not show"


def test_weights_of_the_chosen_alone() -> None:
    tokens = HIDDEN_BTH.flatten(0, 1)
    y, routing = normal(DRAWS, len(tokens), TOP_K, seed=31), route(tokens, ROUTER, TOP_K)
    ours = backward.routing_gradient(y, tokens, routing, ROUTER)
    assert_near(ours, by_autograd(lambda at: route(at, ROUTER, TOP_K).weights, tokens, y))


def test_experts_without_tokens_and_with_bfloat16_rows() -> None:
    """In bfloat16 the products lose what rounding their rows loses, and no more; a chunk may see no token at all."""
    tokens, y = HIDDEN_BTH.flatten(0, 1), Y.flatten(1, 2)
    routing = Routing(torch.ones(len(tokens), 1, dtype=torch.int64), torch.ones(len(tokens), 1))
    dispatch, chunk, made = Dispatch.of(routing, EXPERTS), experts(0, EXPERTS), []
    for dtype in (torch.float32, torch.bfloat16):
        held = backward.ExpertsGradient(tokens.to(dtype), y.to(dtype), routing, dispatch)
        held.through(experts(3, EXPERTS))
        assert not held.rows.any()
        held.through(chunk)
        made.append(held.rows)
    error = float((made[1] - made[0]).norm() / made[0].norm())
    assert 2**-12 < error < 2**-7
