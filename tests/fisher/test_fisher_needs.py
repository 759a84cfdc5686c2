"""What a walk back is said to take: beside what it leaves on disk, and for the sizes of the published models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from walks import MICRO, some_tokens, walked

from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.fisher.needs import fisher_needs
from mimoquant.fisher.walk import FisherSettings
from mimoquant.model.geometry import Attention, Geometry


def published(hidden: int, layers: int, experts: int, heads: int) -> Geometry:
    kinds = [Attention(heads, kv, 192, 128, sink=False) for kv in (4, 8)]
    return replace(
        open_layout(MICRO).geometry, hidden=hidden, layers=layers, experts=experts, top_k=8, expert_intermediate=2048,
        vocab=152_576, moe=(False, *[True] * (layers - 1)), global_attention=kinds[0], sliding_attention=kinds[1],
    )  # fmt: skip


V25, PRO = published(4096, 48, 256, 64), published(6144, 70, 384, 128)


def test_v25_fits_a_gpu_with_its_states_on_the_host() -> None:
    told = fisher_needs(V25, 131_072, FisherSettings(), "cuda")
    assert told.states_bytes == 47 * 131_072 * 4096 * 2  # 50.5 GB
    assert told.gpu_bytes < 60e9 and told.states_bytes < told.host_bytes < 60e9
    assert 47 * 2 * 131_072 * 4096 * 2 < told.file_bytes < 110e9  # gradients, of two draws


def test_more_ranks_and_files_take_the_states_off_a_host() -> None:
    alone, eight = (fisher_needs(PRO, 2**18, FisherSettings(), "cuda", ranks) for ranks in (1, 8))
    assert eight.states_bytes == alone.states_bytes and 7 * eight.host_bytes < 2 * alone.host_bytes
    files = fisher_needs(PRO, 2**18, FisherSettings(states="files"), "cuda")
    assert files.file_bytes - alone.file_bytes == alone.states_bytes
    assert files.host_bytes < alone.host_bytes - 0.9 * alone.states_bytes


@pytest.mark.parametrize("states", ["host", "files"])
def test_files_are_as_told(states: str, tmp_path: Path) -> None:
    tokens, settings = some_tokens(MICRO, 8, 64), FisherSettings(states="files" if states == "files" else "host")
    found = []

    def look(way: str, layer: int) -> None:
        partial = (tmp_path / "fisher.partial").glob("*.safetensors")
        found.append(sum(path.stat().st_size for path in partial))

    walked(MICRO, tokens, settings, tmp_path / "fisher", progress=look)
    told = fisher_needs(open_layout(MICRO).geometry, tokens.ids.size, settings).file_bytes
    assert 0.9 * told < max(found) < told + 16_000
