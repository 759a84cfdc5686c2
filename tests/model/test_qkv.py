"""De-interleaving of the fused qkv, against a checkpoint that is laid out here rank by rank in plain Python."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.model.geometry import Geometry, read_geometry
from mimoquant.model.layout import Weight, scale_row_counts
from mimoquant.model.qkv import deinterleave_rows, scale_row_of
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine
from mimoquant.quant.stack import Engine, Stack
from mimoquant.weights.stored import dequantize, split_qkv

# name → (rows of q, k, v), ranks, weight rows, scale rows as published
PUBLISHED = {
    "V2.5 global": ((64 * 192, 4 * 192, 4 * 128), 4, 13568, 108),
    "V2.5 sliding": ((64 * 192, 8 * 192, 8 * 128), 4, 14848, 116),
    "V2.5-Pro": ((128 * 192, 8 * 192, 8 * 128), 8, 27136, 216),
}
cases = pytest.mark.parametrize(
    ("rows", "ranks", "weight_rows", "scale_rows"), PUBLISHED.values(), ids=PUBLISHED.keys()
)


def interleaved(rows: tuple[int, int, int], ranks: int) -> list[tuple[str, int]]:
    """What lies in each row of the fused tensor: every rank brings its share of q, then of k, then of v."""
    out = []
    for rank in range(ranks):
        for letter, count in zip("qkv", rows, strict=True):
            share = count // ranks
            out += [(letter, rank * share + i) for i in range(share)]
    return out


def scale_rows_by_rank(rows: int, ranks: int) -> list[int]:
    """The scale row of each weight row: every rank is cut into blocks of 128 of its own, the last one partial."""
    out, used = [], 0
    for _ in range(ranks):
        share = rows // ranks
        out += [used + i // 128 for i in range(share)]
        used += math.ceil(share / 128)
    return out


@cases
def test_rows_of_the_published_models(
    rows: tuple[int, int, int], ranks: int, weight_rows: int, scale_rows: int
) -> None:
    fused = interleaved(rows, ranks)
    assert len(fused) == weight_rows == sum(rows)
    ordered = [fused[i] for i in deinterleave_rows(rows, ranks)]
    assert ordered == [(letter, i) for letter, count in zip("qkv", rows, strict=True) for i in range(count)]


@cases
def test_scale_rows_of_the_published_models(
    rows: tuple[int, int, int], ranks: int, weight_rows: int, scale_rows: int
) -> None:
    expected = scale_rows_by_rank(weight_rows, ranks)
    assert max(expected) + 1 == scale_rows
    assert scale_row_of(weight_rows, scale_rows, ranks, ranked=True).tolist() == expected


def test_the_two_readings_differ_where_it_matters() -> None:
    """Cropping the padded scale rows, or blocks that run through, gives other scales in all ranks but the first."""
    ranked = scale_row_of(13568, 108, 4, ranked=True)
    plain = scale_row_of(13568, 106, 4, ranked=False)
    assert plain.tolist() == [i // 128 for i in range(13568)]
    assert (ranked[:3392] == plain[:3392]).all() and (ranked[3392:] != plain[3392:]).any()
    assert ranked[3391] == 26 and ranked[3392] == 27


def test_the_global_k_of_flash_has_a_row_per_head_and_a_half() -> None:
    """V2-Flash's split k_proj: 4 heads of 192 rows, each 128 + 64, so 8 scale rows and not 6."""
    assert scale_row_of(768, 8, 4, ranked=True).tolist() == scale_rows_by_rank(768, 4)
    assert scale_rows_by_rank(768, 4)[-1] == 7


def test_rows_that_do_not_split_are_refused() -> None:
    with pytest.raises(ValueError, match="do not split over 3 ranks"):
        deinterleave_rows((6, 4, 3), 3)


def published_config(shared: Path, model: str) -> dict[str, Any]:
    path = shared / "mimo" / model / "config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("model", "rows", "scale_rows"),
    [("MiMo-V2.5", (13568, 14848), (108, 116)), ("MiMo-V2.5-Pro", (27136, 27136), (216, 216))],
)
def test_the_published_configs_call_for_these_sizes(
    shared: Path, model: str, rows: tuple[int, int], scale_rows: tuple[int, int]
) -> None:
    geometry = read_geometry(published_config(shared, model), model)
    kinds = (geometry.global_attention, geometry.sliding_attention)
    assert tuple(sum(kind.rows) for kind in kinds) == rows
    assert tuple(scale_row_counts(geometry, "qkv", count) for count in rows) == tuple([n] for n in scale_rows)


def small_geometry() -> Geometry:
    """Two ranks of 224 rows (global) and 320 (sliding): two and three blocks, k and v share one."""
    config = {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "attention_projection_layout": "fused_qkv",
        "hidden_size": 160,
        "num_hidden_layers": 1,
        "hybrid_layer_pattern": [0],
        "moe_layer_freq": [0],
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "vocab_size": 8,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "v_head_dim": 32,
        "swa_num_attention_heads": 6,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 56,
        "swa_v_head_dim": 20,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    return read_geometry(config, "config.json")


@pytest.mark.parametrize("engine", [CpuEngine(1), TorchEngine("cpu")], ids=["cpu", "torch"])
@pytest.mark.parametrize("sliding", [False, True])
def test_a_fused_fp8_weight_comes_apart_into_its_own_values(engine: Engine, sliding: bool) -> None:
    """Every block has a scale of its own (a power of two), so a wrong row or scale row changes the values."""
    geometry = small_geometry()
    rows = (geometry.sliding_attention if sliding else geometry.global_attention).rows
    total, ranks, columns = sum(rows), 2, 160
    order, scale_of = interleaved(rows, ranks), scale_rows_by_rank(total, ranks)
    assert scale_row_counts(geometry, "qkv", total) == [max(scale_of) + 1]
    rng = np.random.default_rng(total)
    codes = rng.integers(0, 0x7F, (total, columns)).astype(np.uint8)
    exponents = rng.permutation((max(scale_of) + 1) * 2).reshape(-1, 2)
    scales = (2.0 ** -exponents.astype(np.float64)).astype(np.float32)
    # E4M3 by hand: normal codes 1.m * 2^(e - 7), subnormal ones m * 2^-9
    mantissa, exponent = codes & 7, (codes >> 3).astype(int)
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa * 2.0**-9)
    value *= scales[np.array(scale_of)][:, np.arange(columns) // 128]
    expected = {letter: np.empty((count, columns)) for letter, count in zip("qkv", rows, strict=True)}
    for row, (letter, i) in enumerate(order):
        expected[letter][i] = value[row]

    info = TensorInfo("model.layers.0.self_attn.qkv_proj.weight", "f", "F8_E4M3", (total, columns), 0, codes.size)
    scale_info = TensorInfo(f"{info.name}_scale_inv", "f", "F32", scales.shape, 0, scales.nbytes)
    fused = dequantize(Stack(codes[None], scales[None]), Weight(info.name, "qkv", info, scale_info), geometry, engine)
    for letter, part in zip("qkv", split_qkv(fused, geometry, sliding=sliding), strict=True):
        assert np.array_equal((part.astype(np.uint32) << 16).view(np.float32), expected[letter]), letter
