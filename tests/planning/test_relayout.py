"""`relayout`: rows go where they belong and nothing else changes; FP8 is kept exactly, or refused by name.

References are written here in plain loops over ranks, heads and blocks, and multiply in float64.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro import MICRO, contents
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.layout import Attention, Geometry, read_geometry
from mimoquant.model.qkv import moved_rows, moved_scale_rows, possible_chunks, scale_row_of, with_chunks
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.planning.relayout import LAYOUTS, make_relayout
from mimoquant.planning.reorder import Reorder, read_blocks
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served

BIG = {"swa_head_dim": 128, "swa_v_head_dim": 128, "head_dim": 128, "v_head_dim": 128}  # heads on whole FP8 blocks
PUBLISHED = {"V2.5 global": (64, 4), "V2.5 sliding": (64, 8), "Pro": (128, 8)}  # heads, KV heads; Flash's are V2.5's


def call(*arguments: str | Path | int) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def relayout(source: Path, out: Path, qkv: str, **options: Any) -> Path:
    plan = make_relayout(source, qkv, **options)
    finished = pipeline.execute(plan, out, device="cpu")
    assert {line.file: line.size_bytes for line in finished.values()} == {u.file: u.size_bytes for u in plan.units}
    return out


def tensor_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    index = open_index(folder)
    with CheckpointReader(index) as reader:
        return {name: (info.dtype, info.shape, reader.read(name).tobytes()) for name, info in index.tensors.items()}


def is_qkv(name: str) -> bool:
    return any(f"self_attn.{part}_proj.weight" in name for part in ("qkv", "q", "k", "v"))


# --- rows, in plain loops


def order(rows: tuple[int, int, int], chunks: int) -> list[tuple[str, int]]:
    """What lies in each row of a fused tensor."""
    out = []
    for chunk in range(chunks):
        for letter, count in zip("qkv", rows, strict=True):
            out += [(letter, chunk * count // chunks + i) for i in range(count // chunks)]
    return out


def scale_cells(rows: int, chunks: int) -> list[tuple[int, int]]:
    """The scale row of each row of a fused tensor, as (chunk, block in it)."""
    return [(row // (rows // chunks), row % (rows // chunks) // 128) for row in range(rows)]


@given(
    st.one_of(
        st.sampled_from([(64 * 192, 4 * 192, 4 * 128), (64 * 192, 8 * 192, 8 * 128), (128 * 192, 8 * 192, 8 * 128)]),
        st.tuples(*[st.integers(1, 40).map(lambda n: 4 * n)] * 3),
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
)
@settings(max_examples=40, deadline=None)
def test_rows_go_where_they_belong_and_come_back(rows: tuple[int, int, int], before: int, after: int) -> None:
    moved, stored = moved_rows(rows, before, after), order(rows, before)
    assert [stored[row] for row in moved] == order(rows, after)
    assert (moved[moved_rows(rows, after, before)] == np.arange(sum(rows))).all()


Cells = list[tuple[str, int, int]]  # the scale row of each row: the tensor, the share of it, the block of the share


def cells(rows: tuple[int, int, int], chunks: int, shares: int) -> Cells:
    """Of a fused qkv in `chunks`, or of separate q, k, v (0) that are blocked in as many `shares` each."""
    if chunks:
        return [("qkv", chunk, block) for chunk, block in scale_cells(sum(rows), chunks)]
    parts = zip("qkv", rows, strict=True)
    return [(letter, share, block) for letter, count in parts for share, block in scale_cells(count, shares)]


# kind, chunks of the source (0: split) → in how many chunks codes and scales can be kept
EXACT = [
    ("V2.5 global", 4, {4}),
    ("V2.5 sliding", 4, {0, 1, 2, 4}),
    ("Pro", 8, {8}),
    ("V2.5 global", 0, {0}),
    ("V2.5 sliding", 0, {0, 1, 2, 4}),
]


@pytest.mark.parametrize(("kind", "before", "exact"), EXACT)
def test_where_a_published_fp8_qkv_can_be_kept(kind: str, before: int, exact: set[int]) -> None:
    """Brute force over the rows of each block that goes out, q, k and v by itself; index arithmetic says the same."""
    heads, kv = PUBLISHED[kind]
    rows, published = (heads * 192, kv * 192, kv * 128), 8 if kind == "Pro" else 4
    stored = dict(zip(order(rows, max(before, 1)), cells(rows, before, published), strict=True))
    found = set()
    for after in (0, 1, 2, 4, *([8] if published == 8 else [])):
        going_out, kept = order(rows, max(after, 1)), []
        for shares in (1, published):  # separate tensors may be blocked as one, or share by share
            taken: dict[tuple[str, int, int], set[tuple[str, int, int]]] = {}
            for row, cell in zip(going_out, cells(rows, after, shares), strict=True):
                taken.setdefault(cell, set()).add(stored[row])
            kept.append(
                {
                    name
                    for name in ("qkv", "q", "k", "v")
                    if all(len(found) == 1 for cell, found in taken.items() if cell[0] == name)
                }
            )
        if {"qkv", "q", "k", "v"} == kept[0] | kept[1]:
            found.add(after)
        if before and after:
            old = scale_row_of(sum(rows), 0, before, ranked=True)[moved_rows(rows, before, after)]
            moved = moved_scale_rows(old, scale_row_of(sum(rows), 0, after, ranked=True))
            assert (moved is not None) == (after in exact), after
    assert found == exact


def values_of(folder: Path, stem: str, attention: Attention, chunks: int) -> dict[str, np.ndarray]:
    """q, k, v as bf16 bits, read with plain loops: `chunks` of a fused tensor, 0 for separate ones."""
    tensors = tensor_bytes(folder)

    def matrix(name: str, ranks: int) -> np.ndarray:
        dtype, shape, raw = tensors[name]
        if dtype == "BF16":
            return np.frombuffer(raw, np.uint16).reshape(shape)
        codes = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(torch.float8_e4m3fn)
        scales = np.frombuffer(tensors[f"{name}_scale_inv"][2], np.float32)
        scales = scales.reshape(tensors[f"{name}_scale_inv"][1]).astype(np.float64)
        share = shape[0] // ranks
        row_of = [row // share * math.ceil(share / 128) + row % share // 128 for row in range(shape[0])]
        product = codes.double().numpy().reshape(shape) * scales[row_of][:, np.arange(shape[1]) // 128]
        return torch.from_numpy(product).to(torch.float32).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    if not chunks:
        return {letter: matrix(f"{stem}{letter}_proj.weight", 1) for letter in "qkv"}
    fused = matrix(f"{stem}qkv_proj.weight", chunks)
    out = {
        letter: np.empty((count, fused.shape[1]), np.uint16)
        for letter, count in zip("qkv", attention.rows, strict=True)
    }
    for row, (letter, i) in enumerate(order(attention.rows, chunks)):
        out[letter][i] = fused[row]
    return out


@pytest.mark.parametrize(("qkv", "tp", "chunks"), [("split", None, 0), ("canonical", None, 1), ("interleaved", 1, 1)])
def test_fp8_becomes_the_bf16_that_every_reader_makes_of_it(
    qkv: str, tp: int | None, chunks: int, tmp_path: Path
) -> None:
    out = relayout(MICRO, tmp_path / "out", qkv, tp=tp, bf16=True)
    geometry = read_geometry(json.loads((MICRO / "config.json").read_text()), "")
    stems = {f"model.layers.{n}.self_attn.": geometry.attention(n) for n in range(geometry.layers)}
    stems |= {f"model.mtp.layers.{n}.self_attn.": geometry.sliding_attention for n in range(3)}
    for stem, attention in stems.items():
        wanted, found = values_of(MICRO, stem, attention, 2), values_of(out, stem, attention, chunks)
        assert all(np.array_equal(wanted[letter], found[letter]) for letter in "qkv"), stem
    before, after = tensor_bytes(MICRO), tensor_bytes(out)
    others = [name for name in before if not is_qkv(name)]
    assert len(others) > 300 and {name: after[name] for name in others} == {name: before[name] for name in others}
    assert {name for name in after if not is_qkv(name)} == set(others)
    report = verify(out, MICRO)
    assert report.ok and report.checked["reordered tensors"] == 8 * (3 if qkv == "split" else 1), report.problems


geometries = st.fixed_dictionaries(
    {
        "num_attention_heads": st.sampled_from([4, 8]),
        "swa_num_attention_heads": st.just(4),
        "num_key_value_heads": st.sampled_from([2, 4]),
        "swa_num_key_value_heads": st.just(4),
        "head_dim": st.integers(1, 24),
        "v_head_dim": st.integers(1, 24),
        "swa_head_dim": st.integers(1, 24),
        "swa_v_head_dim": st.integers(1, 24),
        "hidden_size": st.just(32),
        "moe_layer_freq": st.just([0, 0, 0]),
    }
)


@given(changes=geometries, way=st.sampled_from(["split canonical", "canonical split", "canonical", "split 2 split"]))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_round_trip_gives_the_original_bytes(
    tiny_checkpoint: Callable[..., Path], changes: dict[str, Any], way: str
) -> None:
    """interleaved → other layouts → interleaved, of bf16, MTP layers too. 2: interleaved over two ranks."""
    at = source = tiny_checkpoint(fused=True, mtp=1, name="source", **changes)
    for number, qkv in enumerate(way.split()):
        named = (qkv, None) if qkv in LAYOUTS else ("interleaved", int(qkv))
        at = relayout(at, source.parent / str(number), named[0], tp=named[1])
    at = relayout(at, source.parent / "back", "interleaved")
    assert tensor_bytes(at) == tensor_bytes(source)
    assert json.loads((at / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for folder in source.parent.iterdir():
        shutil.rmtree(folder)


def test_fp8_on_whole_blocks_moves_with_its_scales(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(fp8=True, fused=True, mtp=1, **BIG)
    at = source
    for qkv, chunks in (("split", 0), ("canonical", 1), ("interleaved", 2)):
        last, at = at, relayout(at, tmp_path / qkv, qkv)
        assert verify(at, last).ok
        part = "q" if qkv == "split" else "qkv"
        assert open_index(at).tensors[f"model.layers.1.self_attn.{part}_proj.weight"].dtype == "F8_E4M3"
        assert "qkv_proj" not in (at / "config.json").read_text()
        geometry = read_geometry(json.loads((source / "config.json").read_text()), "")
        for layer in range(3):
            stem, attention = f"model.layers.{layer}.self_attn.", geometry.attention(layer)
            wanted, found = values_of(source, stem, attention, 2), values_of(at, stem, attention, chunks)
            assert all(np.array_equal(wanted[letter], found[letter]) for letter in "qkv"), (stem, qkv)
    assert tensor_bytes(at) == tensor_bytes(source)


def test_split_fp8_may_have_a_scale_row_per_share_as_flash_has(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """k of 192 rows a chunk and v of 64: no block of 128 holds one scale, a block of each share does."""
    sizes = BIG | {"head_dim": 192, "v_head_dim": 64}
    source = tiny_checkpoint(fp8=True, fused=True, **sizes)
    out = relayout(source, tmp_path / "out", "split")
    tensors = open_index(out).tensors
    counts = [tensors[f"model.layers.0.self_attn.{part}_proj.weight_scale_inv"].shape[0] for part in "qkv"]
    assert counts == [6, 4, 2]
    assert verify(out, source).ok
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.qkv_proj\.weight: cannot stay FP8"):
        make_relayout(out, "interleaved")


def test_blocks_are_bounded_and_the_same_bytes(tmp_path: Path) -> None:
    plan = make_relayout(MICRO, "canonical", bf16=True)
    with CheckpointReader(plan.layout.index) as reader:
        for step in plan.moved[:2]:
            whole = list(read_blocks(reader, step))
            small = list(read_blocks(reader, step, block_bytes=1000))
            assert len(small) > 50 and all(block.values.nbytes <= 1000 for block in small)
            assert np.array_equal(np.concatenate([block.values for block in small]), whole[0].values)
            assert np.array_equal(np.concatenate([block.scale_row for block in small]), whole[0].scale_row)


@pytest.mark.parametrize(("rows", "ends"), [(2, [1, 3, 5, 6]), (3, [3, 6]), (4, [3, 6]), (5, [5, 6]), (6, [6])])
def test_a_block_ends_where_a_scale_row_does(rows: int, ends: list[int]) -> None:
    """The third row's scale begins a new one, which is cut only where a block is too small for it."""
    plan = make_relayout(MICRO, "canonical", bf16=True)
    weight = next(weight for weight in plan.layout.units["layer 0"] if weight.role == "dense")
    assert weight.scale is not None
    width = weight.info.shape[1]
    entry, scale_row = Entry(weight.name, "BF16", (6, width)), np.array([0, 1, 1, 2, 2, 3])
    step = Reorder(weight, (weight.info,), (entry,), np.arange(6), (weight.scale,), scale_row)
    with CheckpointReader(plan.layout.index) as reader:
        blocks = list(read_blocks(reader, step, block_bytes=rows * width))
        assert np.cumsum([len(block.values) for block in blocks]).tolist() == ends
        stored = reader.read(weight.name)[: 6 * width].reshape(6, width)
    assert np.array_equal(np.concatenate([block.values for block in blocks]), stored)


# --- what readers make of it


def test_the_function_is_the_same_to_the_bit(tmp_path: Path) -> None:
    out = relayout(MICRO, tmp_path / "out", "split", bf16=True)
    result = call(
        "eval-kl", MICRO, out, "--sequences", 1, "--tokens", 24, "--device", "cpu", "--no-noise-floor", "--json"
    )
    facts = json.loads(result.stdout)
    assert facts["j"]["mean"] == 0.0 and facts["j"]["max"] == 0.0


@pytest.mark.parametrize("recipe", ["mxfp4-rtn", "int4-g128-rtn"])
def test_our_own_outputs_keep_their_experts(recipe: str, tmp_path: Path) -> None:
    quantized, out = tmp_path / "quantized", tmp_path / "out"
    pipeline.quantize(make_plan(MICRO, load_recipe(recipe)), quantized, device="cpu")
    qkv = "split" if recipe == "mxfp4-rtn" else "canonical"
    result = call("relayout", quantized, "--qkv", qkv, "--dtype", "bf16", "--out", out, "--json")
    facts = json.loads(result.stdout)
    assert facts["layers"] == 8 and facts["dtypes"]["after"] == "BF16"
    before, after = tensor_bytes(quantized), tensor_bytes(out)
    assert {n: v for n, v in before.items() if not is_qkv(n)} == {n: v for n, v in after.items() if not is_qkv(n)}
    assert (out / "recipe.yaml").read_bytes() == (quantized / "recipe.yaml").read_bytes()
    assert verify(out, quantized).ok and call("inspect", out).exit_code == 0
    wrong = call("verify", out, "--source", MICRO)
    assert wrong.exit_code == 3 and "hint: give the checkpoint that relayout read" in wrong.stderr
    if qkv == "canonical":
        back = relayout(out, tmp_path / "back", "split")
        assert tensor_bytes(back) == before
        assert json.loads((back / "config.json").read_text()) == json.loads((quantized / "config.json").read_text())


def problems(folder: Path, engine: str, tp: int) -> list[str]:
    found = check(read_served(folder), engine, None, tp, expert_tp=1)
    return [problem.text for problem in found if problem.fails and "auto_map" not in problem.text]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_get_what_they_need(engine: str, tmp_path: Path) -> None:
    """Two chunks: right, refused or silently wrong by the TP; split in bf16 is right at any, if config.json says so."""
    fused = relayout(MICRO, tmp_path / "fused", "interleaved", bf16=True)
    split = relayout(fused, tmp_path / "split", "split")
    assert "corrupted" in [p.verdict for p in check(read_served(fused), engine, None, 1)]
    assert (engine == "sglang") == any("must divide 2" in text for text in problems(MICRO, engine, 4))
    for tp in (1, 2, 4):
        assert problems(split, engine, tp) == [], tp
    path = split / "config.json"
    config = json.loads(path.read_text())
    ignored = config["quantization_config"]["ignored_layers"]
    assert {f"model.layers.{n}.self_attn.qkv_proj" for n in range(5)} < set(ignored)
    assert "model.decoder.self_attn.qkv_proj" in ignored and "model.mtp.layers.2.self_attn.qkv_proj" in ignored
    for part in ("qkv",) if engine == "vllm" else "qkv":  # SGLang looks only for the parts
        ignored.remove(f"model.layers.3.self_attn.{part}_proj")
    path.write_text(json.dumps(config))
    assert any("layers.3.self_attn.qkv_proj" in text for text in problems(split, engine, 2))


@pytest.mark.parametrize(
    ("qkv", "tp", "engine", "at", "said"),
    [
        ("canonical", None, "vllm", 4, None),
        ("canonical", None, "sglang", 1, None),
        ("canonical", None, "sglang", 2, "is cut into equal parts"),
        ("interleaved", None, "sglang", 2, None),
        ("interleaved", None, "vllm", 1, "is read as [Q|K|V]"),
    ],
)
def test_a_fused_bf16_is_right_where_the_engine_takes_it(
    qkv: str, tp: int | None, engine: str, at: int, said: str | None, tmp_path: Path
) -> None:
    found = problems(relayout(MICRO, tmp_path / "out", qkv, tp=tp, bf16=True), engine, at)
    assert found == [] if said is None else said in found[0]


def test_fp8_in_another_number_of_chunks_is_known_to_be_misread(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = relayout(tiny_checkpoint(fp8=True, fused=True, **BIG), tmp_path / "out", "canonical")
    for engine in ("vllm", "sglang"):
        assert any(
            "not in num_key_value_heads chunks is read as if it were" in text for text in problems(out, engine, 1)
        )


# --- how many chunks there are


Config = Callable[..., dict[str, Any]]


def fused_geometry(tiny_config: Config, heads: int, kv: tuple[int, int]) -> Geometry:
    """Heads of 192 and 128, as published."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv[0], "head_dim": 192, "v_head_dim": 128}
    swa = {f"swa_{key}": value for key, value in sizes.items()} | {"swa_num_key_value_heads": kv[1]}
    return read_geometry(tiny_config(**sizes, **swa, attention_projection_layout="fused_qkv"), "config.json")


class Shaped:
    def __init__(self, *shape: int) -> None:
        self.shape = shape


@pytest.mark.parametrize(
    ("heads", "kv", "scale_rows", "chunks"), [(64, (4, 8), (108, 116), 4), (128, (8, 8), (216, 216), 8)]
)
def test_the_published_scale_rows_prove_the_chunks(
    tiny_config: Config, heads: int, kv: tuple[int, int], scale_rows: tuple[int, int], chunks: int
) -> None:
    geometry = fused_geometry(tiny_config, heads, kv)
    kinds = (geometry.global_attention, geometry.sliding_attention)
    tensors: dict[str, Any] = {}
    for layer, (kind, count) in enumerate(zip(kinds, scale_rows, strict=True)):
        name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
        tensors |= {name: Shaped(sum(kind.rows), 4096), f"{name}_scale_inv": Shaped(count, 32)}
    assert with_chunks(geometry, tensors, {}, "F").qkv_chunks == chunks
    with pytest.raises(CheckpointError, match=f"tp_size 2, its scale rows over {chunks}"):
        with_chunks(geometry, tensors, {"tp_size": 2}, "F")


@pytest.mark.parametrize("said", [0, -1, 3, 8, True, "2", 2.0, [2]])
def test_a_tp_size_that_cannot_be_is_refused(tiny_config: Config, said: Any) -> None:
    geometry = fused_geometry(tiny_config, 64, (4, 8))
    assert possible_chunks(geometry) == [1, 2, 4]
    with pytest.raises(CheckpointError, match="split over 1, 2, 4"):
        with_chunks(geometry, {}, {"tp_size": said}, "F")


def test_a_bf16_qkv_of_unknown_order_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    def forget(checkpoint: Any) -> None:
        checkpoint.metadata = {}

    folder = tiny_checkpoint(fused=True, edit=forget)
    result = call("inspect", folder)
    assert result.exit_code == 3 and "interleaved over 1 or 2 ranks, and the index has no tp_size" in result.stderr
    assert "2 for the published order, 1 for [Q|K|V]" in result.stderr


# --- the run


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    plan, whole = make_relayout(MICRO, "split", bf16=True), relayout(MICRO, tmp_path / "whole", "split", bf16=True)
    out, seen = tmp_path / "out", []

    def stop(unit: Any, size: int, finished: bool) -> None:
        seen.extend([unit.name] if finished else [])
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.execute(plan, out, device="cpu", progress=stop)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    other = call("relayout", MICRO, "--qkv", "canonical", "--dtype", "bf16", "--out", out, "--resume")
    assert other.exit_code == 2 and "cannot be resumed, qkv was split, is now canonical" in other.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    done = call("relayout", MICRO, "--qkv", "split", "--dtype", "bf16", "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert contents(out) == contents(whole)
    unchanged = [name for name, at in kept.items() if (out / name).stat().st_mtime_ns == at]
    assert len(unchanged) >= 3


def test_the_source_is_left_alone_and_its_card_is_kept(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    before = contents(source)
    first = relayout(source, tmp_path / "first", "split", bf16=True)
    second = relayout(first, tmp_path / "second", "canonical")
    assert contents(source) == before
    card = (second / "README.md").read_text()
    assert card.startswith((MICRO / "README.md").read_text().rstrip("\n")) and card.count("## Layout of qkv") == 1
    assert "as `canonical`" in card and "as `split`" not in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--qkv", "interleaved", "--tp", 3), "do not split over 3 chunks"),
        (("--qkv", "interleaved", "--tp", 4, "--dtype", "bf16"), "hint: give 1 or 2"),
        (("--qkv", "split", "--tp", 2), "--tp 2: is about --qkv interleaved, not split"),
        (("--qkv", "interleaved"), "qkv is interleaved over 2 already"),
        (("--qkv", "split"), "hint: --dtype bf16"),
        (("--qkv", "sideways"), "sideways"),
        (("--qkv", "interleaved", "--tp", 0), "--tp"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_is_written(
    arguments: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    result = call("relayout", MICRO, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_or_lies_in_the_source_is_refused(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    asked = ("relayout", source, "--qkv", "split", "--dtype", "bf16", "--out")
    for out, said in ((source, "lies inside"), (source / "out", "lies inside"), (tmp_path, "exists already")):
        result = call(*asked, out)
        assert result.exit_code == 2 and said in result.stderr, result.output
    assert sorted(os.listdir(source)) == sorted(os.listdir(MICRO))


def test_split_flash_has_nothing_to_split(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(fp8=True)
    with pytest.raises(UsageError, match="qkv is split already, nothing would change"):
        make_relayout(source, "split")
    out = relayout(source, tmp_path / "out", "split", bf16=True)
    assert "attention_projection_layout" not in json.loads((out / "config.json").read_text())
    assert verify(out, source).ok and LAYOUTS[0] == json.loads((out / "relayout.json").read_text())["qkv"]


def test_damage_is_found(tmp_path: Path) -> None:
    out = relayout(MICRO, tmp_path / "out", "split", bf16=True)
    info = open_index(out).tensors["model.mtp.layers.1.self_attn.v_proj.weight"]
    raw = np.fromfile(out / info.file, np.uint8)
    rows = raw[info.offset : info.offset + info.size_bytes].reshape(info.shape[0], -1)
    rows[[0, 1]] = rows[[1, 0]]
    raw.tofile(out / info.file)
    found = verify(out, MICRO).problems
    assert any("sha256" in text for text in found)
    assert f"{info.name}: its rows are not the source's" in found
    (out / "relayout.json").write_text('{"qkv": "split", "tp": "2", "bf16": true}')
    damaged = call("verify", out, "--source", MICRO)
    assert damaged.exit_code == 3 and "relayout.json: is damaged" in damaged.stderr


def test_a_source_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    info = open_index(source).tensors["model.layers.1.self_attn.qkv_proj.weight"]
    raw = np.fromfile(source / info.file, np.uint8)
    raw[info.offset + 5] = 0x7F
    raw.tofile(source / info.file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv_proj\.weight: holds NaN"):
        relayout(source, tmp_path / "out", "split", bf16=True)
