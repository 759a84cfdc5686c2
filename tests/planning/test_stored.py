"""What is stored decides, not what config.json says: each way in which the two part, with what is right then."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, edit_json
from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, RecipeError
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving.check import check
from mimoquant.serving.served import planned
from mimoquant.wording import many

Make = Callable[..., Path]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
Q = "model.layers.1.self_attn.q_proj"


def mxfp4(source: Path, container: str | None = None) -> Plan:
    return make_plan(source, load_recipe("mxfp4-rtn"), container=container)


def misread(plan: Plan) -> list[str]:
    """What engines would refuse or corrupt of a plan's output that is no matter of its remote code."""
    found = (check(planned(plan), engine) for engine in ("vllm", "sglang"))
    texts = [p.text for problems in found for p in problems if p.fails and "auto_map" not in p.text]
    return [text for text in texts if "w13_weight" not in text]  # SGLang has no MXFP4 of compressed-tensors


def replaced(made: Any, dtype: str, shape: tuple[int, ...], data: bytes) -> Any:
    """A tensor of a checkpoint in the making."""
    return type(next(iter(made.tensors.values())))(dtype, shape, data)


def ignoring(*names: str) -> Callable[[Any], None]:
    """Add to the list of what stays in bf16."""
    return lambda made: made.config["quantization_config"]["ignored_layers"].extend(names)


def in_bf16(*ends: str) -> Callable[[Any], None]:
    """Cast weights to bf16, as a conversion does that leaves config.json alone."""

    def edit(made: Any) -> None:
        for name in [name for name in made.tensors if name.endswith(ends) and f"{name}_scale_inv" in made.tensors]:
            shape = made.tensors[name].shape
            made.tensors[name] = replaced(made, "BF16", shape, bytes(2 * shape[0] * shape[1]))
            del made.tensors[f"{name}_scale_inv"]

    return edit


def test_the_published_form_goes_native_and_says_nothing(tiny_checkpoint: Make) -> None:
    plan = mxfp4(tiny_checkpoint(fp8=True))
    assert plan.container == "native" and misread(plan) == []
    assert not any("stored" in note or "quantization_config" in note for note in plan.notes)
    assert mimoquant.inspect(MICRO)["notes"] == [] and mxfp4(MICRO).container == "native"


PARTED: list[tuple[str, dict[str, Any], Callable[[Any], None] | None, str]] = [
    ("all bf16", {"quantization_config": FP8}, None, "says fp8 and no weight is, so it is left over"),
    (
        "q in bf16",
        {"fp8": True},
        in_bf16("q_proj.weight"),
        "misread 3 weights .* model.layers.0.self_attn.q_proj.weight",
    ),
    (
        "dense in bf16",
        {"fp8": True},
        in_bf16("0.mlp.down_proj.weight"),
        "layers.0.mlp.down_proj.weight is bf16, and no",
    ),
    ("only experts are FP8", {"fp8": True}, in_bf16("k_proj.weight", "v_proj.weight"), "misread 6 weights"),
    ("FP8 q is listed", {"fp8": True}, ignoring(Q), f"{Q}.weight is FP8, and an entry"),
    ("experts are listed", {"fp8": True}, ignoring("model.layers.2.mlp.experts"), "names model.layers.2.mlp.experts"),
    (
        "an expert is listed",
        {"fp8": True},
        ignoring("model.layers.1.mlp.experts.3.up_proj"),
        "names model.layers.1.mlp",
    ),
    (
        "a part of a name",
        {"fp8": True},
        lambda made: made.config["quantization_config"].update(ignored_layers=["o_proj"]),
        "misread 3 weights",
    ),
]  # what, checkpoint, edit, what is said


@pytest.mark.parametrize(("what", "settings", "edit", "said"), PARTED, ids=[row[0] for row in PARTED])
def test_a_config_that_engines_would_misread_is_not_kept(
    what: str, settings: dict[str, Any], edit: Any, said: str, tiny_checkpoint: Make
) -> None:
    source = tiny_checkpoint(edit=edit, **settings)
    plan = mxfp4(source)
    assert plan.container == "compressed-tensors" and misread(plan) == []
    with pytest.raises(RecipeError, match=said):
        mxfp4(source, "native")


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.11.mlp.experts", "model.layers.21.mlp.experts.0.gate_proj"],
        ["lm_head", "model.decoder.self_attn.o_proj"],
        ["model.layers.1.self_attn.qkv_projection"],
        ["model.layers.0.mlp.experts"],
    ],
)
def test_names_that_are_of_nothing_change_nothing(names: list[str], tiny_checkpoint: Make) -> None:
    """Layer 11 is not layer 1; the published list names a decoder that is not there either."""
    plan = mxfp4(tiny_checkpoint(fp8=True, edit=ignoring(*names)))
    assert plan.container == "native" and misread(plan) == []


def test_other_formats_do_not_keep_what_was_left_over(tiny_checkpoint: Make) -> None:
    source = tiny_checkpoint(quantization_config=FP8)
    plan = make_plan(source, load_recipe("int4-g32-mse"))
    assert plan.config["quantization_config"]["quant_method"] == "compressed-tensors" and misread(plan) == []
    assert any("says fp8 and no weight is: it is left over" in note for note in plan.notes)
    facts = mimoquant.inspect(source)
    assert facts["weights"] == "bf16" and facts["notes"] == [note for note in plan.notes if "left over" in note]


def test_fp8_without_a_config_is_what_it_is_with_one(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """The same bytes come out, and the layout says of itself what blocks there are."""
    lost = tiny_checkpoint(fp8=True, name="lost", edit=lambda made: made.config.pop("quantization_config"))
    kept = tiny_checkpoint(fp8=True, name="kept")
    for source in (lost, kept):
        mimoquant.quantize(source, "int4-g32-mse", tmp_path / f"{source.name}-out", device="cpu")
    shards = [sorted((tmp_path / f"{name}-out").glob("*.safetensors")) for name in ("lost", "kept")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*shards, strict=True)) and len(shards[0]) > 3
    facts = mimoquant.inspect(lost)
    assert facts["weights"] == "fp8 128x128" and "36 weights are FP8" in facts["notes"][0]
    assert mxfp4(lost).container == "compressed-tensors"
    with pytest.raises(RecipeError, match="the weights are FP8, and it does not say so"):
        mxfp4(lost, "native")
    assert any(problem.fails for problem in check(planned(mxfp4(kept)), "transformers"))


SPOILED: list[tuple[str, Callable[[Any], object], str]] = [
    ("no scale", lambda made: made.tensors.pop(f"{Q}.weight_scale_inv"), "is FP8 but .* is missing"),
    (
        "a scale for the tensor",
        lambda made: made.tensors.update({f"{Q}.weight_scale_inv": replaced(made, "F32", (1,), bytes(4))}),
        "weight_scale_inv is F32.1., expected F32",
    ),
    (
        "MX scales",
        lambda made: made.tensors.update({f"{Q}.weight_scale_inv": replaced(made, "U8", (96, 4), bytes(384))}),
        "weight_scale_inv is U8",
    ),
]  # what, edit, what is said


@pytest.mark.parametrize(("what", "edit", "said"), SPOILED, ids=[row[0] for row in SPOILED])
@pytest.mark.parametrize("declared", [True, False])
def test_fp8_that_is_not_of_128x128_blocks_is_refused(
    what: str, edit: Any, said: str, declared: bool, tiny_checkpoint: Make
) -> None:
    def spoil(made: Any) -> None:
        edit(made)
        if not declared:
            del made.config["quantization_config"]

    with pytest.raises(CheckpointError, match=said):
        mimoquant.inspect(tiny_checkpoint(fp8=True, edit=spoil))


CONTRADICTED: list[tuple[str, dict[str, Any], str]] = [
    (
        "compressed-tensors",
        {"quant_method": "compressed-tensors", "config_groups": {}},
        "quant_method 'compressed-tensors'",
    ),
    ("modelopt", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method 'modelopt'"),
    ("store_dtype", FP8 | {"store_dtype": "mxfp4"}, "store_dtype 'mxfp4'"),
]  # what, quantization_config, what is said


@pytest.mark.parametrize(("what", "quantization", "said"), CONTRADICTED, ids=[row[0] for row in CONTRADICTED])
@pytest.mark.parametrize("fp8", [True, False])
def test_a_config_of_quantized_experts_is_refused_with_what_says_so(
    what: str, quantization: dict[str, Any], said: str, fp8: bool, tiny_checkpoint: Make
) -> None:
    source = tiny_checkpoint(fp8=fp8, quantization_config=quantization)
    with pytest.raises(CheckpointError, match=said) as refused:
        mxfp4(source)
    assert "left over" in str(refused.value.hint)


def scales(dtype: str, shape: tuple[int, ...] | None) -> Callable[[Any], None]:
    """Other scales than a number for each 128x128 block: of a whole tensor, of a row, in another dtype; None: none."""
    size = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}[dtype]

    def edit(made: Any) -> None:
        for name in [name for name in made.tensors if name.endswith("_scale_inv")]:
            if shape is None:
                del made.tensors[name]
            else:
                made.tensors[name] = replaced(made, dtype, shape, bytes(size * math.prod(shape)))

    return edit


def cast_beside_scales(made: Any) -> None:
    for name in [name for name in made.tensors if f"{name}_scale_inv" in made.tensors]:
        shape = made.tensors[name].shape
        made.tensors[name] = replaced(made, "BF16", shape, bytes(2 * shape[0] * shape[1]))


def renamed(made: Any) -> None:
    for name in [name for name in made.tensors if name.endswith("_scale_inv")]:
        made.tensors[name.removesuffix("_inv")] = made.tensors.pop(name)


def experts_as(dtype: str, size: int) -> Callable[[Any], None]:
    def edit(made: Any) -> None:
        for name in [name for name in made.tensors if ".experts." in name and name.endswith(".weight")]:
            shape = made.tensors[name].shape
            made.tensors[name] = replaced(made, dtype, shape, bytes(size * shape[0] * shape[1]))

    return edit


STRANGE: list[tuple[str, Callable[[Any], None], str]] = [
    ("one scale a tensor", scales("F32", ()), r"weight_scale_inv is F32\[\], expected F32\["),
    ("one scale a tensor, in a list", scales("F32", (1,)), r"weight_scale_inv is F32\[1\], expected F32\["),
    ("three dimensions", scales("F32", (1, 1, 1)), r"weight_scale_inv is F32\[1, 1, 1\], expected F32\["),
    ("bf16 scales", scales("BF16", (1, 1)), r"weight_scale_inv is BF16\[1, 1\], expected F32\["),
    ("exponents", scales("U8", (1, 1)), r"weight_scale_inv is U8\[1, 1\], expected F32\["),
    ("no scales", scales("F32", None), "is FP8 but .*weight_scale_inv is missing"),
    ("scales by another name", renamed, "is FP8 but .*weight_scale_inv is missing"),
    ("scales that were left over", cast_beside_scales, "weights are no longer FP8 and have a scale of FP8 beside them"),
    ("half floats", experts_as("F16", 2), "is F16, expected F8_E4M3 or BF16"),
    ("the other FP8", experts_as("F8_E5M2", 1), "is F8_E5M2, expected F8_E4M3 or BF16"),
    ("bytes", experts_as("U8", 1), "is U8, expected F8_E4M3 or BF16"),
]  # what, edit, what is said


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("what", "edit", "said"), STRANGE, ids=[row[0] for row in STRANGE])
def test_what_is_stored_otherwise_is_named(what: str, edit: Any, said: str, fused: bool, tiny_checkpoint: Make) -> None:
    settings = {"fp8": True, "fused": True} if fused else {"fp8": True}
    with pytest.raises(CheckpointError, match=said):
        mxfp4(tiny_checkpoint(edit=edit, **settings))


ABSENT: list[tuple[str, Callable[[dict[str, Any]], Any], int]] = [
    ("layers", lambda q: q["ignored_layers"].extend(["model.layers.60.self_attn.o_proj", "layers.5.mlp"]), 2),
    ("an expert", lambda q: q["ignored_layers"].append("model.layers.0.mlp.experts.300.up_proj"), 1),
    ("with the towers' prefix", lambda q: q["ignored_layers"].append("language_model.model.layers.9.mlp.experts"), 1),
    ("a tower's", lambda q: q["ignored_layers"].append("visual.layers.60.attn"), 0),
    ("an MTP layer's", lambda q: q["ignored_layers"].append("model.mtp.layers.60.self_attn.o_proj"), 0),
    ("a pattern", lambda q: q["ignored_layers"].append(r"re:.*layers\.60\..*"), 1),
    ("a pattern's end", lambda q: q["ignored_layers"].append(r"re:model\.layers\.60$"), 1),
    ("a pattern of layers that are there", lambda q: q["ignored_layers"].append(r"re:.*layers\.(0|1)\..*"), 0),
    ("a part", lambda q: q["ignored_layers"].append("model.layers.1.self_attn.oproj"), 1),
    ("a weight", lambda q: q["ignored_layers"].append("model.layers.1.self_attn.o_proj.weight"), 1),
    ("shared experts", lambda q: q["ignored_layers"].append("model.layers.1.mlp.shared_experts.up_proj"), 1),
    ("another class's names", lambda q: q["ignored_layers"].append("model.language_model.layers.9.mlp.experts"), 1),
    (
        "parts that are there, or that engines make",
        lambda q: q["ignored_layers"].extend(
            ["model.layers.1.mlp.gate", "model.layers.1.mlp.experts.1.up_proj", "model.layers.1.self_attn.qkv_proj"]
        ),
        0,
    ),
    ("a star", lambda q: q["ignored_layers"].append("model.layers.1.self_attn*"), 0),
]  # what, edit, names that are of nothing


@pytest.mark.parametrize(("what", "edit", "count"), ABSENT, ids=[row[0] for row in ABSENT])
def test_layers_that_are_not_there_are_told(what: str, edit: Any, count: int, tiny_checkpoint: Make) -> None:
    source = tiny_checkpoint(fp8=True)
    edit_json(source / "config.json", lambda config: edit(config["quantization_config"]))
    said = [
        f"quantization_config names {many(count, 'module')} not to be found here" in note
        for note in mxfp4(source).notes
    ]
    assert any(said) == (count > 0)
    warned = [problem for problem in check(planned(mxfp4(source)), "vllm") if "not to be found here" in problem.text]
    assert [problem.verdict for problem in warned] == ["warning"] * (count > 0)


# --- what engines will make of it is told by quantize too -------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_quantize_tells_the_verdicts_before_and_after(quiet: bool, tmp_path: Path) -> None:
    words = ["quantize", MICRO, "-r", "mxfp4-rtn", "-o", tmp_path / "out", *(["-q"] if quiet else [])]
    made = CliRunner().invoke(app, [str(word) for word in words])
    line = "SGLang: warning: self_attn: fused FP8 qkv is in 2 chunks"
    assert made.exit_code == 0 and made.stdout.count(line) == 1
    assert made.stdout.index(line) > made.stdout.index("wrote")
    assert made.stderr.count(line) == (0 if quiet else 1)
    if not quiet:
        assert made.stderr.index(line) < made.stderr.index("[1/9]")


def test_the_verdicts_are_those_of_plan(tmp_path: Path) -> None:
    planned_to = mimoquant.plan(MICRO, "int4-g32-mse", device="cpu")["engines"]
    assert mimoquant.quantize(MICRO, "int4-g32-mse", tmp_path / "out", device="cpu")["engines"] == planned_to
    told = {facts["engine"]: facts for facts in planned_to}
    assert mimoquant.verify(tmp_path / "out", engine="vllm")["engine"] == told["vllm"]
