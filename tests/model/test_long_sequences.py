"""Sequences of thousands of tokens: attention goes over the queries in chunks, and what comes later changes nothing.

The plain statement beside it is one query at a time, in float64: its keys, one softmax, the sink's share taken away.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mimoquant
from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet
from mimoquant.evaluation.eval_kl import compare, open_layout
from mimoquant.model import attention as attention_core
from mimoquant.model import decoder_layer
from mimoquant.model.decoder_layer import AttentionWeights, ForwardConfig, attention, rotary_table, rotate
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

TOKENS, WINDOW = 8192, 128
CONFIG = ForwardConfig(
    eps=1e-5,
    rope_theta=5e6,
    sliding_rope_theta=1e4,
    partial_rotary_factor=0.5,
    window=WINDOW,
    value_scale=0.707,
    top_k=2,
)


def random_attention(*, sliding: bool) -> tuple[torch.Tensor, AttentionWeights]:
    """Hidden states [1, 8192, 64] and the weights of 2 query heads on 1 key-value head, with sinks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights = AttentionWeights(
        q=4 * draw(64, 64),
        k=4 * draw(32, 64),
        v=draw(16, 64),
        o=draw(64, 32),
        sink=torch.tensor([0.5, 2.0]),
        heads=2,
        kv_heads=1,
        sliding=sliding,
    )
    return torch.randn(1, TOKENS, 64, generator=generator), weights


def plain_rows(hidden: torch.Tensor, weights: AttentionWeights, positions: list[int]) -> torch.Tensor:
    """What attention gives at some positions, [positions, H], in float64."""
    theta = CONFIG.sliding_rope_theta if weights.sliding else CONFIG.rope_theta
    cos, sin = (table.double() for table in rotary_table(TOKENS, 16, theta, hidden))
    wide = hidden.double()
    query = rotate((wide @ weights.q.double().T).view(1, TOKENS, 2, 32), cos, sin)[0]
    key = rotate((wide @ weights.k.double().T).view(1, TOKENS, 1, 32), cos, sin)[0, :, 0]
    value = (wide @ weights.v.double().T)[0] * CONFIG.value_scale
    assert weights.sink is not None
    rows = []
    for position in positions:
        first = max(0, position - WINDOW + 1) if weights.sliding else 0
        seen = slice(first, position + 1)
        heads = []
        for head in range(2):
            logits = key[seen] @ query[position, head] * 32**-0.5
            share = torch.cat((logits, weights.sink[head : head + 1].double())).softmax(0)[:-1]
            heads.append(share @ value[seen])
        rows.append(torch.cat(heads) @ weights.o.double().T)
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("sliding", [False, True], ids=["global", "sliding"])
@pytest.mark.parametrize("chunk_bytes", [2**20, 2**24], ids=["128 chunks", "32 chunks"])
def test_attention_over_8k_tokens_is_what_it_is_defined_as(
    sliding: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_core, "_QUERY_CHUNK_BYTES", chunk_bytes)
    hidden, weights = random_attention(sliding=sliding)
    positions = [0, 1, 15, 16, WINDOW - 1, WINDOW, 4095, 4096, 4097, 8000, TOKENS - 2, TOKENS - 1]
    out = attention(hidden, weights, CONFIG)[0, positions]
    assert (out.double() - plain_rows(hidden, weights, positions)).abs().max() < 1e-4


def test_chunks_of_queries_equal_one_chunk_over_4k_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, both = random_attention(sliding=False)
    assert both.sink is not None
    weights = replace(both, q=both.q[:32], o=both.o[:, :16], sink=both.sink[:1], heads=1)  # one head: half the memory
    sizes: list[int] = []
    attend = decoder_layer.attend

    def counting(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(query.shape[-2])
        return attend(query, *rest)

    monkeypatch.setattr(decoder_layer, "attend", counting)
    results = []
    for chunk_bytes in (2**40, 2**23):
        monkeypatch.setattr(attention_core, "_QUERY_CHUNK_BYTES", chunk_bytes)
        results.append(attention(hidden[:, : TOKENS // 2], weights, CONFIG))
    assert sizes[0] == TOKENS // 2 and len(sizes) > 8 and sum(sizes) == TOKENS
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_later_tokens_do_not_change_the_scores_of_earlier_ones(tmp_path: Path) -> None:
    """Through everything: J at the first positions of a long sequence is that of the short one."""
    pipeline.quantize(
        make_plan(mimoquant.micro_checkpoint(), load_recipe("int4-g128-rtn")), tmp_path / "out", device="cpu"
    )
    reference, candidate = open_layout(mimoquant.micro_checkpoint()), open_layout(tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, reference.geometry.vocab, (1, 1024))
    j = []
    for length in (256, 1024):
        tokens = TokenSet(
            name="test",
            ids=ids[:, :length].astype(np.int64),
            domains=("a",),
            sha256="0" * 64,
            sequence_hashes=("0",),
            origins=("test",),
        )
        (comparison,) = compare(reference, [candidate], tokens, noise_floor=False).comparisons
        assert comparison.scores is not None
        j.append(comparison.scores.j)
    assert len(j[1]) == 1023 and np.mean(j[0]) > 1e-3
    assert np.abs(j[0] - j[1][:255]).max() < 1e-5
