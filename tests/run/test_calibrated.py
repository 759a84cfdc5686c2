"""Calibrated runs, end to end on the embedded checkpoint: quality, coverage, folds, resume, refusals, proof."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from micro import MICRO, held_out, j_of, plain_gptq, stopped_after
from safetensors.torch import load_file, save_file

from mimoquant import pipeline
from mimoquant.calibration import statistics
from mimoquant.calibration.tokens import load_tokens
from mimoquant.checkpoint.index import INDEX_NAME, open_index
from mimoquant.checkpoint.journal import read_journal
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import QualityError, RecipeError, UsageError
from mimoquant.evaluation.eval_kl import eval_kl, open_layout
from mimoquant.model.decoder_layer import ExpertChunk, Router, add_experts, attention_block, route
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.layer_stream import Stream, add_blocks, attend_and_route, dense_layer
from mimoquant.model.layout import norm_name, router_name
from mimoquant.output.verify import verify
from mimoquant.planning.plan import CHUNK_BYTES, Plan, make_plan
from mimoquant.planning.recipe import Recipe, load_recipe, parse_recipe
from mimoquant.quant.expert_methods import encode_with, loss
from mimoquant.quant.formats import Format
from mimoquant.quant.method import Method
from mimoquant.report.verb_text import verify_text
from mimoquant.run import calibrated
from mimoquant.weights.decoded import CheckpointWeights

TARGETS = r"targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']"
NORM = r"""{smooth_layer: 're:.*layers\.[1-9]\.post_attention_layernorm$', balance_layers: ['re:.*mlp\.gate$',
 're:.*mlp\.experts\.\d+\.gate_proj$', 're:.*mlp\.experts\.\d+\.up_proj$']}"""
DOWN = r"{smooth_layer: 're:.*experts\.\d+\.up_proj$', balance_layers: ['re:.*experts\.\d+\.down_proj$']}"
AWQ = f"""
default_stage: {{default_modifiers: {{AWQModifier: {{mappings: [{NORM}, {DOWN}], duo_scaling: false, n_grid: 4}},
  QuantizationModifier: {{scheme: W4A16, {TARGETS}}}}}}}
mimoquant: {{carve_outs: {{3: bf16}}}}
"""
REAL = AWQ.replace("carve_outs", "fold: exact-real, carve_outs")
ORIGINAL = "calibration: {propagate: original, shrinkage: 1}"
REAL_ORIGINAL = REAL.replace("carve_outs", f"{ORIGINAL}, carve_outs")
FEW_EXPERTS = 2**18  # bytes of a chunk: two or three experts
GRAM = f"default_stage: {{default_modifiers: {{QuantizationModifier: {{scheme: MXFP4A16, {TARGETS}}}}}}}\n" + (
    "mimoquant: {scale_search: gram}"
)
FEW = {"sequences": 32, "tokens": 64}


def run(recipe: Recipe, out: Path, chunk_bytes: int = CHUNK_BYTES, source: Path = MICRO, **settings: object) -> Plan:
    plan = make_plan(source, recipe.calibrated_on(FEW | settings), chunk_bytes=chunk_bytes)
    pipeline.quantize(plan, out, device="cpu")
    return plan


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    run(plain_gptq("int4-g128"), out)
    return out


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AWQ with a planted channel: a norm gain 64 times as large, and weights that make up for it."""
    out = tmp_path_factory.mktemp("awq") / "out"
    run(parse_recipe(AWQ, "awq"), out)
    return out


@pytest.fixture(scope="module")
def bf16_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro checkpoint with routers in bf16, in which nothing but powers of two can be made up for exactly."""
    source = tmp_path_factory.mktemp("bf16") / "source"
    shutil.copytree(MICRO, source)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        routers = {
            name: values.to(torch.bfloat16) for name, values in tensors.items() if name.endswith("mlp.gate.weight")
        }
        if routers:
            save_file(tensors | routers, path, {"format": "pt"})
    index = json.loads((source / INDEX_NAME).read_text())
    index["metadata"]["total_size"] = sum(info.size_bytes for info in open_index(source).tensors.values())
    (source / INDEX_NAME).write_text(json.dumps(index))
    return source


@pytest.fixture(scope="module")
def real(bf16_router: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "out"
    run(parse_recipe(REAL, "awq"), out, source=bf16_router)
    return out


@pytest.fixture(scope="module")
def real_original(bf16_router: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("original") / "out"
    run(parse_recipe(REAL_ORIGINAL, "awq"), out, FEW_EXPERTS, bf16_router)
    return out


@pytest.fixture(scope="module")
def plain_j(tmp_path_factory: pytest.TempPathFactory) -> float:
    """J of int4 g128, plainly rounded."""
    out = tmp_path_factory.mktemp("plain") / "out"
    pipeline.quantize(make_plan(MICRO, load_recipe("int4-g128-rtn")), out, device="cpu")
    return j_of(out, held_out(28, 64))


def test_gptq_has_less_divergence_than_plain_rounding(gptq: Path, plain_j: float) -> None:
    assert j_of(gptq, held_out(28, 64)) < 0.8 * plain_j


@pytest.mark.parametrize(
    ("fmt", "plain", "most"),
    [("mxfp4", "mxfp4-rtn", 0.9), ("nvfp4", "nvfp4-mse", 0.97)],
)
@pytest.mark.slow
def test_so_have_other_formats_with_more_tokens(fmt: str, plain: str, most: float, tmp_path: Path) -> None:
    run(plain_gptq(fmt), tmp_path / "gptq", sequences=64, tokens=128)
    pipeline.quantize(make_plan(MICRO, load_recipe(plain)), tmp_path / "plain", device="cpu")
    tokens = held_out(28, 64)
    assert j_of(tmp_path / "gptq", tokens) < most * j_of(tmp_path / "plain", tokens)


def test_the_output_is_proven_and_tells_its_coverage(gptq: Path) -> None:
    report = verify(gptq, MICRO)
    assert report.ok, report.problems
    told = json.loads((gptq / "report.json").read_text())
    assert told["method"] == "gptq" and told["fallbacks"] == {
        "experts_without_tokens": 0,
        "gptq_damped_more": 0,
        "gptq_rounded_plainly": 0,
    }
    layers = told["calibration"]
    geometry = open_layout(MICRO).geometry
    assert list(layers) == [f"layer {layer}" for layer in geometry.moe_layers]
    for facts in layers.values():
        assert sum(facts["tokens"]) == 30 * 64 * geometry.top_k  # two of 32 sequences are held out
        assert all(0 < e <= t for e, t in zip(facts["effective"], facts["tokens"], strict=True))
        assert np.mean(facts["relmse"]) < 0.8 * np.mean(facts["relmse_plain"])
        held = facts["held_out"]
        assert facts["shrinkage"] == min((0.0, 1.0, 4.0), key=lambda n0: held[f"measured_{n0:g}"])


def test_the_written_recipe_repeats_the_run(gptq: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(gptq / "recipe.yaml"))
    assert recipe.calibration is not None and recipe.calibration.data == ("mixed-v1",) and recipe.refine == 2
    pipeline.quantize(make_plan(MICRO, recipe), tmp_path / "again", device="cpu")
    names = sorted(path.name for path in gptq.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (gptq / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_evaluating_on_the_calibration_data_is_refused(gptq: Path) -> None:
    tokens = load_tokens(["mixed-v1"], MICRO, sequences=4, tokens=32, vocab=1024)
    with pytest.raises(UsageError, match="calibrated on"):
        eval_kl(MICRO, gptq, tokens)


@pytest.mark.slow
def test_modelopts_container_is_calibrated_resumed_and_proven(tmp_path: Path) -> None:
    """Its global scales are turned over on the way out and, in a resume's walk through written codes, on the way in."""
    plan = make_plan(MICRO, plain_gptq("nvfp4").calibrated_on(FEW), container="modelopt")
    pipeline.quantize(plan, tmp_path / "whole", device="cpu")
    assert verify(tmp_path / "whole", MICRO).ok
    with stopped_after(4):
        pipeline.quantize(plan, tmp_path / "out", device="cpu")
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (tmp_path / "whole" / "journal.jsonl").read_bytes()


@pytest.fixture(scope="module")
def resumable(
    gptq: Path, folded: Path, real: Path, real_original: Path, bf16_router: Path
) -> dict[str, tuple[Path, Recipe, Path, int]]:
    """A run that was not disturbed: its output, recipe, source and bytes of a chunk."""
    return {
        "gptq": (gptq, plain_gptq("int4-g128"), MICRO, CHUNK_BYTES),
        "awq": (folded, parse_recipe(AWQ, "awq"), MICRO, CHUNK_BYTES),
        "real": (real, parse_recipe(REAL, "awq"), bf16_router, CHUNK_BYTES),
        "real original in small chunks": (real_original, parse_recipe(REAL_ORIGINAL, "awq"), bf16_router, FEW_EXPERTS),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "finished"),
    [
        ("gptq", 4),
        ("awq", 3),
        ("real original in small chunks", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gptq", 1), ("awq", 5), ("real", 3), ("real", 5))),
        pytest.param("real original in small chunks", 5, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_writes_the_same_bytes(
    kind: str,
    finished: int,
    resumable: dict[str, tuple[Path, Recipe, Path, int]],
    tmp_path: Path,
) -> None:
    whole, recipe, source, chunk = resumable[kind]
    with stopped_after(finished):
        run(recipe, tmp_path / "out", chunk, source)
    plan = make_plan(source, recipe.calibrated_on(FEW), chunk_bytes=chunk)
    with pytest.raises(UsageError, match=r"recipe\.mimoquant\.calibration\.sequences was"):
        pipeline.quantize(
            make_plan(source, recipe.calibrated_on(FEW | {"sequences": 16})),
            tmp_path / "out",
            device="cpu",
            resume=True,
        )
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == (whole / "journal.jsonl").read_bytes()
    assert (tmp_path / "out" / "report.json").read_bytes() == (whole / "report.json").read_bytes()


def test_awq_is_not_worse_than_plain_rounding_and_is_proven(folded: Path, plain_j: float) -> None:
    assert j_of(folded, held_out(28, 64)) < 0.95 * plain_j
    report = verify(folded, MICRO)
    assert report.ok, report.problems
    told = json.loads((folded / "report.json").read_text())
    assert "layer 3" not in told["calibration"] and told["carve_outs"] == {"3": "bf16"}


@pytest.mark.slow
def test_a_folded_norm_leaves_router_logits_to_the_bit(tmp_path: Path) -> None:
    """A norm fold is forced by a candidate that always wins; the router must see the same products."""
    source = open_layout(MICRO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated.Calibrator, "_fold_of", lambda self, layer: torch.arange(256, dtype=torch.int32) % 2)
        run(parse_recipe(AWQ, "awq"), tmp_path / "out")
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems
    assert report.checked["folded tensors"] == 2 * 3
    out = open_layout(tmp_path / "out")
    hidden = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    chosen = []
    for layout in (source, out):
        with CheckpointReader(layout.index) as reader:
            gain = torch.from_numpy(reader.read(norm_name(2))).view(torch.bfloat16).float()
            kind = {"BF16": torch.bfloat16, "F32": torch.float32}[layout.index.tensors[router_name(2)].dtype]
            weight = torch.from_numpy(reader.read(router_name(2))).view(kind).view(-1, 256).float()
            chosen.append(route(hidden * gain, Router(weight, torch.zeros(len(weight))), 2))
    assert torch.equal(chosen[0].experts, chosen[1].experts) and torch.equal(chosen[0].weights, chosen[1].weights)
    tokens = held_out(28, 64)
    assert j_of(tmp_path / "out", tokens) < 0.2  # the fold is a bad one, but the function is the same


@pytest.mark.parametrize("damage", ["router", "norm", "codes", "scale"])
def test_damage_to_a_calibrated_output_is_found(damage: str, folded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for path in folded.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    name = {
        "router": router_name(2),
        "norm": norm_name(2),
        "codes": "model.layers.2.mlp.experts.1.up_proj.weight_packed",
        "scale": "model.layers.2.mlp.experts.1.down_proj.weight_scale",
    }[damage]
    info = open_index(out).tensors[name]
    raw = bytearray((out / info.file).read_bytes())
    if damage == "codes":  # rows shifted by one
        row = info.size_bytes // info.shape[0]
        block = raw[info.offset : info.offset + info.size_bytes]
        raw[info.offset : info.offset + info.size_bytes] = block[row:] + block[:row]
    elif damage == "scale":
        raw[info.offset : info.offset + 2] = b"\x00\x00"
    else:
        raw[info.offset] ^= 1
    (out / info.file).write_bytes(raw)
    report = verify(out, MICRO)
    assert any(name.removesuffix("_packed").removesuffix("_scale") in problem for problem in report.problems)


@pytest.mark.slow
def test_search_alone_by_the_gram_diagonal_is_nearest_rounding(tmp_path: Path) -> None:
    run(parse_recipe(GRAM, "gram"), tmp_path / "out")
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["original", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("asymmetric", "down only"))]
)
def test_the_other_ways_are_proven_too(kind: str, tmp_path: Path) -> None:
    asymmetric = f"default_stage: {{default_modifiers: {{GPTQModifier: {{scheme: W4A16_ASYM, {TARGETS}}}}}}}"
    recipe = {
        "asymmetric": parse_recipe(asymmetric, "asym"),
        "original": plain_gptq("int4-g32").calibrated_on({"propagate": "original", "shrinkage": 1.0}),
        "down only": parse_recipe(AWQ.replace(f"mappings: [{NORM}, {DOWN}], ", ""), "awq"),
    }[kind]
    run(recipe, tmp_path / "out")
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems
    tokens = held_out(28, 64)
    assert j_of(tmp_path / "out", tokens) < {"asymmetric": 0.037, "original": 0.03, "down only": 0.045}[kind]


@pytest.mark.slow
def test_channels_that_nobody_uses_are_left_alone(tmp_path: Path) -> None:
    """A norm gain of zero and a row of zeros: no exponent could be read off them."""
    source = tmp_path / "source"
    source.mkdir()
    for path in MICRO.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    index = open_index(source)
    for name, place in ((norm_name(2), 7 * 2), ("model.layers.2.mlp.experts.3.up_proj.weight", 5 * 256)):
        info = index.tensors[name]
        raw = bytearray((source / info.file).read_bytes())
        size = 2 if name == norm_name(2) else 256
        raw[info.offset + place : info.offset + place + size] = bytes(size)
        (source / info.file).write_bytes(raw)
    recipe = parse_recipe(AWQ, "awq").calibrated_on(FEW)
    pipeline.quantize(make_plan(source, recipe), tmp_path / "out", device="cpu")
    report = verify(tmp_path / "out", source)
    assert report.ok, report.problems


def test_too_many_starved_experts_are_an_error(tmp_path: Path) -> None:
    recipe = plain_gptq("int4-g128").calibrated_on({"max_starved_experts": 0})
    with pytest.raises(QualityError, match=r"layer 1: \d+ experts saw fewer than 128 tokens, max_starved_experts is 0"):
        run(recipe, tmp_path / "out", sequences=4)


def test_a_recipe_that_needs_no_tokens_refuses_them() -> None:
    with pytest.raises(RecipeError, match="needs no tokens"):
        load_recipe("int4-g128-rtn").calibrated_on({"sequences": 3})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AWQ.replace(r"'re:.*mlp\.gate$',", ""), "leaves the router"),
        (AWQ.replace("carve_outs: {3: bf16}", "fold: real"), "fold 'real' is unknown"),
        (AWQ.replace("n_grid: 4", "n_grid: 0"), "n_grid is 0"),
        (GRAM.replace("scale_search: gram", "scale_search: gram, refine: -1"), "refine is -1"),
        (GRAM.replace("scale_search: gram", "scale_search: gram, refine: 3"), "refine has no meaning"),
        (GRAM.replace("scale_search: gram", "scale_search: mse, calibration: {}"), "calibration has no meaning"),
        (GRAM.replace("scale_search: gram", "scale_search: gram, calibration: {data: []}"), "must be a list"),
        (
            AWQ.replace(
                r"experts\.\d+\.up_proj$', balance_layers: ['re:.*experts",
                r"layers\.1\..*up_proj$', balance_layers: ['re:.*experts",
            ),
            "is not supported",
        ),
        (
            GRAM.replace("scale_search: gram", "scale_search: gram, calibration: {set: a, data: [b]}"),
            "both set and data",
        ),
        (GRAM.replace("scale_search: gram", "scale_search: gram, calibration: {tokens: x}"), "calibration.tokens"),
        (GRAM.replace("scale_search: gram", "scale_search: gram, calibration: {shrinkage: -1}"), "shrinkage"),
        (GRAM.replace("scale_search: gram", "scale_search: gram, calibration: {propagate: none}"), "propagate"),
        (GRAM.replace("QuantizationModifier: {", "GPTQModifier: {dampening_frac: 0, "), "dampening_frac is 0"),
        (GRAM.replace("QuantizationModifier: {", "GPTQModifier: {actorder: group, "), "actorder 'group'"),
        (GRAM.replace("QuantizationModifier: {", "GPTQModifier: {actorder: null, "), "actorder None"),
        (GRAM.replace("QuantizationModifier: {", "GPTQModifier: {block_size: 64, "), "block_size is 64"),
    ],
)
def test_settings_that_would_be_dropped_or_go_wrong_are_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        parse_recipe(text, "r")


# --- folds by real factors --------------------------------------------------------------------------------------------


def rerouted(source: Path, out: Path, layer: int) -> float:
    """The share of calibration tokens, counted one by one, whose experts differ by source's and out's norm and router.

    The tokens come through what was written.
    """
    tokens = load_tokens(["mixed-v1"], source, sequences=32, tokens=64, vocab=1024)
    held = np.arange(32) % 16 == 15
    differ = 0
    with CheckpointReader(open_index(source)) as ours, CheckpointReader(open_index(out)) as theirs:
        before = CheckpointWeights(ours, open_layout(source), torch.device("cpu"))
        after = CheckpointWeights(theirs, open_layout(out), torch.device("cpu"))
        for part in (~held, held):
            ids = torch.from_numpy(tokens.ids[part])
            stream = Stream(after, [after.tensor("model.embed_tokens.weight")[ids].float()])
            dense_layer(stream, after.layer(0))
            for number in range(1, layer):
                blocks = attend_and_route(stream, after.layer(number), torch.bfloat16)
                for chunk in after.expert_chunks(number):
                    add_experts(blocks[0].out, blocks[0].tokens, blocks[0].dispatch, chunk)
                add_blocks(stream, blocks)
            chosen = []
            for weights in (before.layer(layer), after.layer(layer)):
                assert isinstance(weights.mlp, Router)
                seen = attention_block(stream.batches[0], weights, after.config)[1].flatten(0, 1)
                chosen.append([set(row) for row in route(seen, weights.mlp, 2).experts.tolist()])
            differ += sum(one != other for one, other in zip(*chosen, strict=True))
    return differ / tokens.ids.size


def told_changed(out: Path) -> dict[int, float]:
    layers = json.loads((out / "report.json").read_text())["calibration"]
    return {int(name.split()[1]): facts["topk_changed"] for name, facts in layers.items()}


@pytest.mark.slow
def test_the_share_of_tokens_that_change_experts_is_the_true_one(bf16_router: Path, real: Path) -> None:
    told = told_changed(real)
    assert list(told) == [1, 2, 4] and 0 < max(told.values()) < 0.05
    for layer, share in told.items():
        assert share == float(f"{rerouted(bf16_router, real, layer):.4g}")


@pytest.mark.slow
def test_powers_of_two_change_no_tokens_experts(folded: Path, gptq: Path, bf16_router: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated.Calibrator, "_fold_of", lambda self, layer: torch.arange(256, dtype=torch.int32) % 3)
        run(parse_recipe(AWQ, "awq"), tmp_path / "out", source=bf16_router)
    for source, out in ((MICRO, folded), (bf16_router, tmp_path / "out")):
        assert set(told_changed(out).values()) == {0.0}
        assert rerouted(source, out, 1) == rerouted(source, out, 4) == 0.0
    assert "topk_changed" not in (gptq / "report.json").read_text()


@pytest.mark.slow
def test_a_float32_router_makes_up_for_real_factors(tmp_path: Path) -> None:
    run(parse_recipe(REAL, "awq"), tmp_path / "out")
    assert verify(tmp_path / "out", MICRO).ok
    assert max(told_changed(tmp_path / "out").values()) < 0.001
    tokens = held_out(28, 64)
    assert j_of(tmp_path / "out", tokens) < 0.045


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["awq", "gptq", "mxfp4", "asymmetric", "original"])
def test_real_factors_are_proven_and_what_is_not_is_said(
    kind: str, bf16_router: Path, real: Path, real_original: Path, tmp_path: Path
) -> None:
    text = {
        "gptq": REAL.replace("QuantizationModifier", "GPTQModifier"),
        "mxfp4": REAL.replace("W4A16", "MXFP4A16"),
        "asymmetric": REAL.replace("W4A16", "W4A16_ASYM"),
    }.get(kind)
    out = {"awq": real, "original": real_original}.get(kind, tmp_path / "out")
    if text is not None:
        run(parse_recipe(text, kind), out, source=bf16_router)
    report = verify(out, bf16_router)
    assert report.ok, report.problems
    assert report.checked["folded tensors"] == 2 * 3
    routing, factors = report.unproven
    assert "top-k changed" in routing and ("estimated" in factors) == (kind == "gptq")
    assert verify_text(report.as_json() | {"out": "o"}).count("unproven") == 2
    assert "scaled against each other by real factors" in (out / "README.md").read_text()


def test_what_is_exact_has_nothing_unproven(folded: Path) -> None:
    assert verify(folded, MICRO).unproven == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("router", "mlp.gate.weight: does not make up for what"),
        ("norm", "mlp.gate.weight: does not make up for what"),
        ("norm sign", "post_attention_layernorm.weight: is not the source's, nor that by factors"),
        ("gate codes", "gate_proj.weight: at least 1 codes are not the nearest"),
        ("up codes", "up_proj.weight: at least 1 codes are not the nearest"),
        ("down codes", "down_proj.weight: at least 1 codes are not the nearest"),
        ("up scales", "down_proj.weight: at least 1 codes are not the nearest"),
    ],
)
def test_damage_to_an_output_with_real_factors_is_found(
    damage: str, said: str, real: Path, bf16_router: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(real, out)
    expert = f"model.layers.2.mlp.experts.1.{damage.split()[0]}_proj.weight_"
    name = {"router": router_name(2), "norm": norm_name(2)}.get(damage.split()[0])
    name = name or expert + ("scale" if "scales" in damage else "packed")
    info = open_index(out).tensors[name]
    raw = bytearray((out / info.file).read_bytes())
    if damage == "up scales":  # a whole row 1/16 larger or so: codes are the nearest, but not with down's factor
        row = info.size_bytes // info.shape[0]
        for place in range(info.offset, info.offset + row, 2):
            raw[place] ^= 0x08
    elif damage.endswith("codes"):  # a level more or less
        raw[info.offset + 3] ^= 1
    else:
        raw[info.offset + (1 if "sign" in damage else 0)] ^= 0x80 if "sign" in damage else 1
    (out / info.file).write_bytes(raw)
    problems = verify(out, bf16_router).problems
    assert any(said in problem for problem in problems), problems


@pytest.mark.slow
def test_real_factors_that_leave_a_channel_alone(bf16_router: Path, tmp_path: Path) -> None:
    """A norm gain of zero has no quotient: it stays, and so do its columns."""
    source = tmp_path / "source"
    shutil.copytree(bf16_router, source)
    info = open_index(source).tensors[norm_name(2)]
    raw = bytearray((source / info.file).read_bytes())
    raw[info.offset + 14 : info.offset + 16] = bytes(2)
    (source / info.file).write_bytes(raw)
    run(parse_recipe(REAL, "awq"), tmp_path / "out", source=source)
    report = verify(tmp_path / "out", source)
    assert report.ok, report.problems


# --- statistics -------------------------------------------------------------------------------------------------------


def routed(tokens: int, experts: int, top_k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    chosen = scores.topk(top_k, -1)
    return Routing(chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True))


def test_gram_matrices_are_those_of_the_routed_tokens() -> None:
    tokens, routing = torch.randn(300, 32).to(torch.bfloat16), routed(300, 6, 2)
    dispatch = Dispatch.of(routing, 6)
    got = statistics.expert_grams([(tokens, dispatch)], 1, 5, 32)
    for expert in range(1, 5):
        mine = tokens[(routing.experts == expert).any(-1)].double()
        assert torch.allclose(got[expert - 1].double(), mine.T @ mine, rtol=1e-5, atol=1e-3)
    assert statistics.counts([dispatch], 0, 6) == [(routing.experts == e).sum().item() for e in range(6)]
    gains = routing.weights[routing.experts == 2].double()
    expected = float(gains.sum() ** 2 / gains.square().sum())
    assert statistics.effective_counts([dispatch], 2, 3)[0] == pytest.approx(expected, rel=1e-4)


def test_gradients_of_an_expert_are_those_at_its_own_tokens_times_their_gains() -> None:
    """Two blocks, and no gradients for the last tokens of the second."""
    blocks, gradients = [(torch.empty(300, 32), routed(300, 6, 2, seed)) for seed in (0, 1)], torch.randn(2, 500, 32)
    gradients = gradients.to(torch.bfloat16)
    seen = [(tokens, Dispatch.of(routing, 6)) for tokens, routing in blocks]
    sums, counts = statistics.gradient_grams(gradients, seen, 1, 5)
    experts, weights = (
        torch.cat([getattr(routing, name) for _, routing in blocks])[:500] for name in ("experts", "weights")
    )
    for expert in range(1, 5):
        gains = ((experts == expert) * weights).sum(1).double()
        rows = (gradients.double() * gains[:, None]).flatten(0, 1)
        assert int(counts[:, expert - 1].sum()) == 2 * int((gains > 0).sum())
        assert counts[:, expert - 1].min() > 100
        assert torch.allclose(sums[:, expert - 1].sum(0).double(), rows.T @ rows, rtol=1e-2, atol=0.05)


def test_an_experts_intermediate_is_that_of_its_weights() -> None:
    tokens, routing = torch.randn(200, 16).to(torch.bfloat16), routed(200, 4, 2)
    gate, up = (torch.randn(4, 8, 16).to(torch.bfloat16) for _ in range(2))
    chunk = ExpertChunk(0, gate, up, torch.zeros(4, 16, 8))
    got = statistics.expert_grams([(tokens, Dispatch.of(routing, 4))], 0, 4, 8, statistics.intermediate_of(chunk))
    for expert in range(4):
        mine = tokens[(routing.experts == expert).any(-1)].float()
        inner = torch.nn.functional.silu(mine @ gate[expert].float().T) * (mine @ up[expert].float().T)
        inner = inner.to(torch.bfloat16).double()
        assert torch.allclose(got[expert].double(), inner.T @ inner, rtol=1e-4, atol=1e-2)


def test_shrinkage_keeps_the_trace_and_gives_the_pooled_matrix_to_an_expert_without_tokens() -> None:
    rows = torch.randn(3, 50, 8)
    sums = statistics.gram(rows)
    pooled = sums.sum(0) / 150
    sums[2] = 0
    shrunk = statistics.shrink(sums, [50, 50, 0], pooled, 16.0)
    traces = torch.diagonal(shrunk, dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(traces[:2], torch.diagonal(sums[:2] / 50, dim1=-2, dim2=-1).sum(-1), rtol=1e-5)
    assert torch.allclose(shrunk[2], pooled, rtol=1e-5)
    assert statistics.shares([50, 0], 16.0) == [16 / 66, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_half_as_many_tokens_as_columns_shrinkage_beats_all_else_on_other_tokens(seed: int) -> None:
    """Experts share most of their inputs' covariance, as in the facts' model: 60 % shared, 40 % their own."""
    width, experts, fmt = 256, 8, Format("int4", 128)
    generator = torch.Generator().manual_seed(seed)

    def root() -> torch.Tensor:
        scale = torch.rand(width, generator=generator).mul(4).exp()
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        return basis * (scale / scale.mean()).sqrt()

    shared, own = root(), [root() for _ in range(experts)]

    def draw(count: int) -> torch.Tensor:
        return torch.stack(
            [
                torch.randn(count, width, generator=generator) @ shared.T * 0.6**0.5
                + torch.randn(count, width, generator=generator) @ mine.T * 0.4**0.5
                for mine in own
            ]
        )

    weight = torch.randn(experts, 64, width, generator=generator).to(torch.bfloat16)
    count = width // 2
    seen, other = statistics.gram(draw(count)), statistics.gram(draw(8192)) / 8192
    counts, pooled = [count] * experts, seen.mean(0) / count

    def held_out_loss(n0: float, method: Method) -> float:
        gram = statistics.shrink(seen, counts, pooled, n0)
        return float(loss(weight, encode_with(weight, gram, fmt, method, None).values, other).sum())

    full = Method("gram", gptq=True)
    shrunk, plain = held_out_loss(4.0 * width, full), held_out_loss(0.0, full)
    search, rounding = held_out_loss(0.0, Method("gram")), held_out_loss(0.0, Method("absmax"))
    assert shrunk < min(0.7 * plain, 0.98 * search, 0.8 * rounding)


def test_a_held_out_sixteenth_is_not_in_the_statistics(tmp_path: Path) -> None:
    plan = make_plan(MICRO, plain_gptq("int4-g128").calibrated_on(FEW))
    tokens = load_tokens(["mixed-v1"], MICRO, sequences=32, tokens=64, vocab=1024)
    changed = tokens.ids.copy()
    changed[15::16] = 7  # only held-out sequences
    with CheckpointReader(plan.layout.index) as reader:
        one = calibrated.Calibrator(plan, reader, tokens, "cpu")
        two = calibrated.Calibrator(plan, reader, replace(tokens, ids=changed), "cpu")
        for walker in (one, two):
            walker.begin(0)
            walker.end()
            walker.begin(1)
    assert torch.equal(one.pooled, two.pooled) and one.facts.tokens == two.facts.tokens
    assert not torch.equal(one.tokens.seen[1][0][0], two.tokens.seen[1][0][0])


def test_the_journal_carries_the_facts_of_each_layer(gptq: Path) -> None:
    lines = {line.unit: line for line in read_journal(gptq / "journal.jsonl")}
    assert lines["layer 0"].facts is None and lines["layer 1"].facts is not None
    record = yaml.safe_load((gptq / "recipe.yaml").read_text())["mimoquant"]["provenance"]["calibration"]
    assert record["name"] == "mixed-v1" and len(record["sequences"]) == 32


@pytest.mark.slow
def test_a_refined_layer_is_told_and_proven(tmp_path: Path) -> None:
    """Layers before it keep their bytes, its facts say what it brought, and what was written is what is verified."""
    plan = run(plain_gptq("mxfp4"), tmp_path / "plain")
    run(plain_gptq("mxfp4"), tmp_path / "refined", reconstruct=1, reconstruct_layers=(2,))
    plain, refined = (
        json.loads((tmp_path / name / "report.json").read_text())["calibration"] for name in ("plain", "refined")
    )
    assert (
        "answer" not in refined["layer 1"]
        and "answer" not in plain["layer 2"]
        and plain["layer 1"] == refined["layer 1"]
    )
    before, after = (sum(column) for column in zip(*refined["layer 2"]["answer"], strict=True))
    assert after < before and all(new <= old for old, new in refined["layer 2"]["answer"])
    same = {
        unit.layer: (tmp_path / "plain" / unit.file).read_bytes() == (tmp_path / "refined" / unit.file).read_bytes()
        for unit in plan.units
        if unit.layer is not None
    }
    assert same[1] and not same[2]
    assert verify(tmp_path / "refined", MICRO).ok


@pytest.mark.slow
def test_too_few_sequences_to_hold_some_out_refine_all_the_same(tmp_path: Path) -> None:
    run(plain_gptq("mxfp4"), tmp_path / "out", sequences=8, reconstruct=1, reconstruct_layers=(2,))
    told = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["layer 2"]["answer"]
    assert told == [[0.0, 0.0]] * len(told), "nobody judges"


def test_layers_that_cannot_be_refined_are_refused() -> None:
    recipe = plain_gptq("mxfp4")
    for changes, said in (
        ({"reconstruct": 1, "reconstruct_layers": (0,)}, "layer 0 cannot be refined"),
        ({"reconstruct_layers": (2,)}, "layers to refine are named, and no rounds"),
    ):
        with pytest.raises(RecipeError, match=said):
            make_plan(MICRO, recipe.calibrated_on(changes))
    with pytest.raises(RecipeError, match="--refine cannot go with it"):
        load_recipe("mxfp4-mse").calibrated_on({"reconstruct": 1})
