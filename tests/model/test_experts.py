"""A layer's experts on their tokens, in chunks, beside float64; on CUDA all of a chunk in one launch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.model import dispatch
from mimoquant.model.decoder_layer import ExpertChunk, add_experts
from mimoquant.model.dispatch import Dispatch, Routing

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
EXPERTS, TOP_K = 7, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(tokens: Tensor, routing: Routing, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """In float64, token by token; what down sees is rounded as the tokens are."""
    out = torch.zeros(tokens.shape, dtype=torch.float64)
    gate, up, down = (weight.double() for weight in weights)
    for n, (row, chosen, gains) in enumerate(zip(tokens.double(), routing.experts, routing.weights, strict=True)):
        for e, gain in zip(chosen.tolist(), gains.double(), strict=True):
            inner = F.silu(gate[e] @ row) * (up[e] @ row)
            out[n] += gain * (down[e] @ inner.to(tokens.dtype).double())
    return out


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "hidden", "inner"), [(300, 96, 80), (5, 128, 64)])
def test_chunks_of_experts_give_what_float64_gives(
    tokens: int, hidden: int, inner: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_GROUP_ROWS", 256)  # several launches a chunk
    rows = drawn(tokens, hidden, seed=0).to(dtype)
    gate, up = (drawn(EXPERTS, inner, hidden, seed=seed).bfloat16() / hidden**0.5 for seed in (1, 2))
    down = drawn(EXPERTS, hidden, inner, seed=3).bfloat16()
    favour = torch.linspace(0, 4, EXPERTS)  # some experts get many tokens, some next to none, one has none
    favour[2] = -torch.inf
    chosen = (drawn(tokens, EXPERTS, seed=4) + favour).topk(TOP_K).indices
    routing = Routing(chosen, drawn(tokens, TOP_K, seed=5).abs())
    there = [tensor.to(device) for tensor in (rows, chosen, routing.weights, gate, up, down)]
    sorted_pairs, out = Dispatch.of(Routing(*there[1:3]), EXPERTS), torch.zeros(tokens, hidden, device=device)
    for begin, end in ((0, 4), (4, EXPERTS)):
        add_experts(out, there[0], sorted_pairs, ExpertChunk(begin, *(weight[begin:end] for weight in there[3:])))
    wanted = exact(rows, routing, (gate, up, down))
    allowed = 2e-6 if dtype == torch.float32 else 2e-3  # another sum rounds some of down's inputs otherwise
    assert (out.cpu().double() - wanted).norm() < allowed * wanted.norm()
    if device == "cuda":  # a token's sum does not depend on who is beside it
        few, again = slice(0, tokens // 2), torch.zeros_like(out)
        part = Dispatch.of(Routing(there[1][few], there[2][few]), EXPERTS)
        add_experts(again[few], there[0][few], part, ExpertChunk(0, *there[3:]))
        assert torch.equal(again[few], out[few])
