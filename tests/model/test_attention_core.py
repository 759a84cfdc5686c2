"""What a query takes of each key, by the plain softmax in float64; on CUDA the one-pass kernel too."""

from __future__ import annotations

import pytest
import torch

from mimoquant.model.attention import attend, attention_shares

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])


@every_device
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize(("keys", "window", "queries"), [(40, 12, 30), (700, 1000, 150), (129, 129, 129)])
def test_shares_are_those_of_the_plain_softmax(keys: int, window: int, queries: int, sink: bool, device: str) -> None:
    """Queries that see a window of what came before, in the middle of a sequence; in pieces as they are at once."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(shape, generator=draw) for shape in ((2, 2, 3, queries, 16), (2, 2, keys, 16)))
    value, sinks = torch.randn(2, 2, keys, 8, generator=draw), torch.randn(6, generator=draw) if sink else None
    scores = 0.25 * query.double() @ key.double().unsqueeze(2).mT
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    scores.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
    nowhere = torch.full((6,), float("-inf")) if sinks is None else sinks
    logits = torch.cat((scores, nowhere.double().view(1, 2, 3, 1, 1).expand(2, -1, -1, queries, -1)), dim=-1)
    expected = logits.softmax(-1)[..., :keys]
    there = [None if of is None else of.to(device) for of in (query, key, sinks, value)]
    args = there[2], keys - queries, window, 0.25
    shares = attention_shares(*there[:2], *args)
    assert (shares.cpu().double() - expected).abs().max() < 1e-6
    out = attend(*there[:2], there[3], *args)
    assert device == "cuda" or torch.equal(out, (shares.flatten(2, 3) @ there[3]).view_as(out))
    assert (out.cpu().double() - expected @ value.double().unsqueeze(2)).abs().max() < 1e-5
