"""A layer's experts on their tokens, in chunks, beside float64; on CUDA all of a chunk in one launch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.model import dispatch
from mimoquant.model.decoder_layer import ExpertChunk, add_experts
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.served_rounding import FP8, MXFP8, NVFP4, UNROUNDED, LayerRounding, rounded

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
EXPERTS, TOP_K = 7, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(
    tokens: Tensor, routing: Routing, weights: tuple[Tensor, Tensor, Tensor], rounding: LayerRounding = UNROUNDED
) -> Tensor:
    """In float64, token by token; what down sees is rounded as the tokens are, and as `rounding` says."""
    out = torch.zeros(tokens.shape, dtype=torch.float64)
    gate, up, down = (weight.double() for weight in weights)
    stored = rounding.stored
    for n, (row, chosen, gains) in enumerate(zip(tokens.double(), routing.experts, routing.weights, strict=True)):
        for e, gain in zip(chosen.tolist(), gains.double(), strict=True):
            silu = F.silu(stored(gate[e] @ row))
            inner = (stored(silu) if rounding.silu_in_bf16 else silu) * stored(up[e] @ row)
            inner = stored(inner) if rounding.silu_in_bf16 else inner
            seen = rounded(inner.to(tokens.dtype)[None], rounding.experts, rounding.down_scale)[0]
            out[n] += stored(gain * (down[e] @ seen.double()))
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


@every_device
@pytest.mark.parametrize("parts", ["as the kind has them", "three"])
@pytest.mark.parametrize(
    "rounding",
    [LayerRounding(in_bf16=True)]
    + [LayerRounding(kind, 0.5, 300.0, in_bf16=in_bf16) for kind in (MXFP8, NVFP4, FP8) for in_bf16 in (True, False)],
    ids=str,
)
def test_experts_round_and_store_between_products(
    rounding: LayerRounding, parts: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs that bfloat16 holds are one product, with the sums that three have."""
    if parts == "three":
        monkeypatch.setattr(LayerRounding, "parts", lambda self, kind, usual=3: usual)
    rows = rounding.expert_inputs(drawn(100, 96, seed=0).bfloat16().float())
    gate, up = (drawn(EXPERTS, 80, 96, seed=seed).bfloat16() / 96**0.5 for seed in (1, 2))
    down = drawn(EXPERTS, 96, 80, seed=3).bfloat16()
    routing = Routing(drawn(100, EXPERTS, seed=4).topk(TOP_K).indices, drawn(100, TOP_K, seed=5).abs())
    there = [tensor.to(device) for tensor in (rows, routing.experts, routing.weights, gate, up, down)]
    out, plain = (torch.zeros(100, 96, device=device) for _ in range(2))
    for sums, told in ((out, rounding), (plain, UNROUNDED)):
        add_experts(sums, there[0], Dispatch.of(Routing(*there[1:3]), EXPERTS), ExpertChunk(0, *there[3:]), told)
    wanted = exact(rows, routing, (gate, up, down), rounding)
    apart, far = ((sums.cpu().double() - wanted).norm() / wanted.norm() for sums in (out, plain))
    assert apart < 1e-3 and far > 2e-3, f"{apart:.1e} and without any rounding {far:.1e}"
