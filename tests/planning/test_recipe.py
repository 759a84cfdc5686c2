"""Recipes: what we ship parses and survives its own round trip, what we do not support is refused by name."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mimoquant.errors import RecipeError
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, match_name, parse_recipe
from mimoquant.quant.formats import Format
from mimoquant.shipped import recipes_folder, shipped_recipes
from mimoquant.weights.container import CONTAINERS, EXPERT_TARGET

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
OTHER_RECIPES = {
    "presets": """
        default_stage:
          default_modifiers:
            QuantizationModifier: {targets: ['re:.*experts.*'], scheme: NVFP4A16, ignore: [lm_head]}
        """,
    "asymmetric": """
        quant_stage:
          quant_modifiers:
            QuantizationModifier: {targets: Linear, scheme: W4A16_ASYM, ignore: ['re:.*self_attn.*']}
        mimoquant: {carve_outs: {2: bf16}, scale_search: mse, container: compressed-tensors}
        """,
    "gptq": """
        default_stage:
          default_modifiers:
            GPTQModifier:
              config_groups:
                experts: {targets: ['re:.*experts.*'], weights: {num_bits: 4, group_size: 64, observer: mse}}
              dampening_frac: 0.05
              actorder: static
        mimoquant: {scale_search: gram, calibration: {set: mixed-v1, sequences: 512, tokens: 2048}}
        """,
    "awq that carries the scheme": """
        default_stage:
          default_modifiers:
            AWQModifier: {targets: ['re:.*experts.*'], scheme: W4A16, duo_scaling: true, n_grid: 20}
        """,
    "awq before gptq": """
        default_stage:
          default_modifiers:
            AWQModifier: {duo_scaling: true}
            GPTQModifier: {targets: ['re:.*experts.*'], scheme: W4A16, dampening_frac: 0.05}
        """,
}


def document(weights: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """A recipe with one group of experts; `settings` go into the modifier."""
    group = {"targets": [EXPERT_TARGET], "weights": INT4 | (weights or {})}
    modifier = {"config_groups": {"experts": group}} | settings
    return {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}


def parsed(content: dict[str, Any] | str) -> Any:
    return parse_recipe(content if isinstance(content, str) else yaml.safe_dump(content), "test")


def refused(content: dict[str, Any] | str, *fragments: str) -> RecipeError:
    """The refusal: one sentence with the recipe's name and every fragment."""
    with pytest.raises(RecipeError) as caught:
        parsed(content)
    return checked(caught.value, "recipe test", *fragments)


def checked(error: RecipeError, *fragments: str) -> RecipeError:
    assert error.exit_code == 2 and "\n" not in str(error)
    for fragment in fragments:
        assert fragment in str(error), f"{fragment!r} is not in: {error}"
    return error


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_say_what_their_names_say(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(str(recipes_folder() / f"{name}.yaml")) == recipe
    (group,) = recipe.groups
    expected = name.split("-")
    kind = next(part for part in expected if part in ("int4", "mxfp4", "nvfp4"))
    assert group.fmt.name == kind
    size = next((int(part[1:]) for part in expected if re.fullmatch(r"g\d+", part)), group.fmt.group_size)
    assert group.fmt == Format(kind, size)
    assert recipe.method == (expected[0] if expected[0] in ("awq", "gptq") else "rtn")
    searches = {"mse": "mse", "rtn": "absmax", "cast": "cast"}
    assert recipe.scale_search == searches.get(expected[-1], "gram" if recipe.calibrated else "mse")
    scales = ("calibrated" if recipe.calibrated else "unit") if "w4a4" in expected else "none"
    assert recipe.output.input_scales == scales
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# "), "a comment says when to use it"


def test_there_are_shipped_recipes() -> None:
    assert {"int4-g128-rtn", "int4-g128-mse", "mxfp4-mse", "nvfp4-mse"} <= set(shipped_recipes())


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", [*shipped_recipes(), *OTHER_RECIPES])
def test_a_resolved_recipe_read_back_is_itself(name: str, container: str) -> None:
    """What it says (every group, pattern, modifier and setting) neither grows nor shrinks on the way."""
    recipe = parsed(OTHER_RECIPES[name]) if name in OTHER_RECIPES else load_recipe(name)
    resolved = recipe.resolved(container)
    text = yaml.safe_dump(resolved, sort_keys=False)
    again = parse_recipe(text, recipe.name)
    assert again.resolved(container) == resolved
    assert yaml.safe_dump(again.resolved(container), sort_keys=False) == text
    for attribute in ("method", "groups", "ignore", "scale_search", "carve_outs", "extra"):
        assert getattr(again, attribute) == getattr(recipe, attribute), attribute
    assert again.container == container
    calibration = recipe.calibration
    if calibration and calibration.fisher:  # the draws that were taken are written, so that they can be taken again
        calibration = replace(calibration, fisher=replace(calibration.fisher, draws=calibration.fisher_draws))
    assert again.calibration == calibration


@pytest.mark.parametrize(
    ("preset", "fmt"),
    [
        ("W4A16", Format("int4", 128)),
        ("W4A16_ASYM", Format("int4", 128, symmetric=False)),
        ("MXFP4A16", Format("mxfp4", 32)),
        ("NVFP4A16", Format("nvfp4", 16)),
    ],
)
def test_presets_are_those_of_compressed_tensors(preset: str, fmt: Format) -> None:
    text = {"default_stage": {"default_modifiers": {"QuantizationModifier": {"scheme": preset, "targets": ["x"]}}}}
    assert parsed(text).groups[0].fmt == fmt
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from mimoquant.weights.container import format_weights

    theirs = quantization.preset_name_to_scheme(preset, ["x"]).weights
    ours = quantization.QuantizationArgs(**format_weights(fmt))
    for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
        assert getattr(theirs, key) == getattr(ours, key), key
    if fmt.name != "int4":
        assert theirs.scale_dtype == ours.scale_dtype


def test_observers_choose_the_search() -> None:
    assert parsed(document({"observer": "memoryless_minmax"})).scale_search == "absmax"
    assert parsed(document({"observer": "mse"})).scale_search == "mse"
    assert parsed(document({"observer": "mse"}) | {"mimoquant": {"scale_search": "absmax"}}).scale_search == "absmax"


def test_crlf_and_unicode_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(document(ignore=["re:.*ünïcode.*"]), allow_unicode=True)
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.replace("\n", "\r\n").encode())
    assert load_recipe(str(path)).ignore == ("re:.*ünïcode.*",)


# --- patterns ---------------------------------------------------------------------------------------------------------

NAMES = [
    "lm_head",
    "model.layers.1.mlp.experts.0.gate_proj",
    "model.layers.11.mlp.experts.0.gate_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.experts.255.down_proj",
    "model.mtp.layers.0.mlp.up_proj",
    "",
    "re:x",
    "x",
]
PATTERNS = [
    "lm_head",
    "Linear",
    "re:",
    "re:lm",
    "re:head",
    r"re:.*layers\.1\.",
    r"re:.*layers\.1\.mlp\.gate$",
    EXPERT_TARGET,
    r"re:.*mlp\.(gate|up)",
    "re:^model",
    "re:re:x",
    "x",
    "",
    "re:.*$",
    r"re:\s*lm",
]


def theirs() -> Callable[[str, str], bool]:
    return pytest.importorskip("compressed_tensors.utils.match").match_name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_compressed_tensors(pattern: str) -> None:
    match = theirs()
    assert [match_name(name, pattern) for name in NAMES] == [match(name, pattern) for name in NAMES]


pieces = st.sampled_from(
    [
        "model",
        "layers",
        r"\.",
        ".",
        ".*",
        "1",
        "41",
        r"\d+",
        "mlp",
        "(gate|up)",
        "_proj",
        "$",
        "^",
        "[0-9]",
        "?",
        "experts",
        "re:",
        "|",
    ]
)


@given(
    name=st.lists(st.sampled_from(["model", ".", "layers", "1", "41", "mlp", "gate", "up_proj", "re:"])).map("".join),
    pattern=st.builds(str.__add__, st.sampled_from(["re:", ""]), st.lists(pieces, max_size=8).map("".join)),
)
def test_made_up_patterns_match_as_in_compressed_tensors(name: str, pattern: str) -> None:
    match = theirs()
    try:
        expected = match(name, pattern)
    except re.error:
        refused(document(ignore=[pattern]), "broken pattern")
        return
    assert match_name(name, pattern) == expected


# --- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_keys_are_refused_where_they_stand() -> None:
    refused(document() | {"mimoqaunt": {}}, "'mimoqaunt'")
    refused(document(observer="mse"), "QuantizationModifier.observer is 'mse'")
    refused(document({"groupsize": 64}), "'groupsize'", "experts.weights")
    refused(document() | {"mimoquant": {"scale_serach": "mse"}}, "'scale_serach'", "mimoquant")
    refused(document() | {"mimoquant": {"calibration": {"samples": 3}}}, "'samples'", "calibration")
    spoiled = document()
    spoiled["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"]["experts"]["bits"] = 4
    refused(spoiled, "'bits'", "experts")


@pytest.mark.parametrize(
    ("weights", "fragments"),
    [
        ({"observer": "imatrix_mse"}, ["observer", "'imatrix_mse'"]),
        ({"observer": ["mse"]}, ["observer"]),
        ({"num_bits": 8}, ["8-bit"]),
        ({"num_bits": 3}, ["3-bit"]),
        ({"num_bits": None}, ["bit"]),
        ({"num_bits": 8, "type": "float"}, ["8-bit float"]),
        ({"type": "nf4"}, ["nf4"]),
        ({"group_size": 48}, ["48", "32, 64, 128"]),
        ({"group_size": 128.0}, ["128.0"]),
        ({"group_size": "128"}, ["128"]),
        ({"group_size": None, "strategy": "channel"}, ["'channel'"]),
        ({"type": "float", "group_size": 64}, ["64"]),
        ({"strategy": "block"}, ["'block'"]),
        ({"type": "float", "group_size": 16}, ["'group'", "16"]),
        ({"type": "float", "group_size": 32, "symmetric": False}, ["symmetric"]),
        ({"symmetric": "yes"}, ["symmetric"]),
        ({"dynamic": True}, ["dynamic"]),
        ({"actorder": "group"}, ["actorder", "'group'"]),
        ({"observer_kwargs": {"maxshrink": 0.2}}, ["observer_kwargs"]),
        ({"block_structure": [128, 128]}, ["block"]),
        ({"scale_dtype": "torch.float16"}, ["scale_dtype"]),
    ],
)
def test_unsupported_weights_are_refused(weights: dict[str, Any], fragments: list[str]) -> None:
    refused(document(weights), "experts", *fragments)


@pytest.mark.parametrize("side", ["input_activations", "output_activations"])
def test_activation_quantization_is_refused(side: str) -> None:
    spoiled = document()
    group = spoiled["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"]["experts"]
    group[side] = {"num_bits": 8, "type": "float", "dynamic": True}
    refused(spoiled, "experts", side, "not supported")
    group[side] = None
    parsed(spoiled)


OTHER_SCHEMES = [
    "FP8_DYNAMIC",
    "W8A8",
    "W4A8",
    "MXFP4",
    "w4a16",
    4,
    ["W4A16"],
    {"W8A8": ["Linear"]},
    {},
    {"W4A16": []},
    {4: "x"},
]


@pytest.mark.parametrize("scheme", OTHER_SCHEMES, ids=str)
def test_other_schemes_are_refused_by_name(scheme: Any) -> None:
    content = document(scheme=scheme, targets=["Linear"])
    del content["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"]
    refused(content, "scheme", str(scheme) if isinstance(scheme, str) else "")


def test_modifiers_that_do_not_go_together_are_refused() -> None:
    content = document()
    modifiers = content["default_stage"]["default_modifiers"]
    modifiers["GPTQModifier"] = copy.deepcopy(modifiers["QuantizationModifier"])
    refused(content, "GPTQModifier", "QuantizationModifier")
    twice = document()
    twice["default_stage"]["more_modifiers"] = copy.deepcopy(twice["default_stage"]["default_modifiers"])
    refused(twice, "QuantizationModifier", "twice")
    refused({"default_stage": {"default_modifiers": {"AWQModifier": {}}}}, "exactly one", "found 0")
    refused({"default_stage": {"default_modifiers": {}}}, "no modifier")
    refused(document() | {"other_stage": document()["default_stage"]}, "stage", "found 2")
    refused({"mimoquant": {}}, "stage", "found 0")


OTHER_MODIFIERS = ["SmoothQuantModifier", "SparseGPTModifier", "SpinQuantModifier", "quantizationmodifier"]


@pytest.mark.parametrize("modifier", OTHER_MODIFIERS)
def test_other_modifiers_are_refused_by_name(modifier: str) -> None:
    content = document()
    content["default_stage"]["default_modifiers"][modifier] = {}
    refused(content, modifier, "not supported")


def test_a_kv_cache_scheme_is_refused() -> None:
    refused(document(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme")


@pytest.mark.parametrize(
    ("carve_outs", "fragment"),
    [
        ([41], "list"),
        ("41", "str"),
        ({"41": "bf16"}, "'41'"),
        ({41: "fp16"}, "'fp16'"),
        ({41: None}, "None"),
        ({-1: "bf16"}, "-1"),
        ({True: "bf16"}, "True"),
        ({4.0: "bf16"}, "4.0"),
        ({41: ["bf16"]}, "bf16"),
    ],
)
def test_carve_outs_of_the_wrong_type_are_refused(carve_outs: Any, fragment: str) -> None:
    refused(document() | {"mimoquant": {"carve_outs": carve_outs}}, "carve_outs", fragment)


@pytest.mark.parametrize(
    ("block", "fragment"),
    [
        ({"version": 2}, "2"),
        ({"scale_search": "hessian"}, "'hessian'"),
        ({"container": "gguf"}, "'gguf'"),
        ({"scale_search": ["mse"]}, "mse"),
        ({"calibration": "wikitext"}, "str"),
        ([1], "list"),
    ],
)
def test_a_wrong_mimoquant_block_is_refused(block: Any, fragment: str) -> None:
    refused(document() | {"mimoquant": block}, fragment)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: *a",
        "a: &a {k: 1}\n<<: *a",
        "a: &a [1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]",
    ],
    ids=["alias", "merge", "bomb"],
)
def test_aliases_are_refused(text: str) -> None:
    refused(text, "alias")


def test_a_repeated_key_is_refused() -> None:
    text = yaml.safe_dump(document())
    refused(text + text, "'default_stage'", "twice")
    refused(text.replace("num_bits: 4", "num_bits: 8\n            num_bits: 4"), "'num_bits'", "twice")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "just words",
        "a: b: c",
        "{",
        "\t- x",
        "[" * 1000,
        "!!python/object/apply:os.system ['true']",
        "a: 2024-99-99",
        "? [1, 2]\n: 3",
        "a: !!bool maybe",
        "a: !!timestamp now",
        "a: !!int many",
        "a: !!float much",
        "a: !!binary \xff",
        "--- {}\n--- {}",
        "a: \x01",
    ],
)
def test_what_is_no_recipe_at_all_is_refused(text: str) -> None:
    refused(text)


@pytest.mark.parametrize("value", [5, {"re:x": 1}, [1], [["x"]], "re:(", ["re:["]])
@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_pattern_lists_are_checked(key: str, value: Any) -> None:
    content = document(**({"ignore": value} if key == "ignore" else {}))
    if key == "targets":
        groups = content["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"]
        groups["experts"]["targets"] = value
    refused(content, key)


def test_files_that_are_not_there_or_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("int4-g512-magic")
    assert "int4-g128-mse" in (checked(caught.value, "'int4-g512-magic'").hint or "")
    for make in (
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"# " + b"x" * 1_000_000),
        lambda path: path.write_bytes(b"a: \xff\xfe"),
    ):
        path = tmp_path / f"{id(make)}.yaml"
        make(path)
        with pytest.raises(RecipeError) as caught:
            load_recipe(str(path))
        checked(caught.value, str(path))


# --- what does not fit a checkpoint -----------------------------------------------------------------------------------


def plan_refused(folder: Path, content: dict[str, Any], *fragments: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        make_plan(folder, parsed(content))
    return checked(caught.value, "recipe test", *fragments)


def retargeted(*targets: str, **settings: Any) -> dict[str, Any]:
    content = document(**settings)
    groups = content["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"]
    groups["experts"]["targets"] = list(targets)
    return content


def test_a_recipe_that_fits_gives_every_layer_its_format(tiny_checkpoint: Callable[..., Path]) -> None:
    plan = make_plan(tiny_checkpoint(), parsed(document() | {"mimoquant": {"carve_outs": {2: "bf16"}}}))
    assert plan.formats == {1: Format("int4", 128)} and plan.carve_outs == {2: "bf16"}


def test_linear_means_what_the_ignore_list_leaves(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    plan_refused(folder, retargeted("Linear"), "would quantize", "only routed experts")
    plan_refused(folder, retargeted("Linear", ignore=["lm_head", "re:.*self_attn.*"]), "model.layers.0.mlp.", "dense")
    ignore = ["lm_head", "re:.*self_attn.*", r"re:.*layers\.0\."]
    assert make_plan(folder, parsed(retargeted("Linear", ignore=ignore))).formats == {
        1: Format("int4", 128),
        2: Format("int4", 128),
    }


@pytest.mark.parametrize(
    ("target", "module"),
    [
        ("lm_head", "lm_head"),
        (r"re:.*mlp\.gate$", "model.layers.1.mlp.gate"),
        ("re:.*o_proj", "model.layers.0.self_attn.o_proj"),
        ("re:.*", "model.embed_tokens"),
    ],
)
def test_a_target_beside_the_experts_is_refused_by_name(
    tiny_checkpoint: Callable[..., Path], target: str, module: str
) -> None:
    plan_refused(tiny_checkpoint(), retargeted(EXPERT_TARGET, target), module)


def test_a_carve_out_without_experts_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    for layer in (0, 3, 41):
        content = document() | {"mimoquant": {"carve_outs": {layer: "bf16"}}}
        assert "1-2" in (plan_refused(tiny_checkpoint(), content, f"layer {layer}", "no routed experts").hint or "")


def test_a_recipe_that_matches_nothing_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    plan_refused(folder, retargeted("re:.*block_sparse_moe.*"), "layers 1-2", "nothing to quantize")
    plan_refused(folder, retargeted(), "nothing to quantize")
    plan_refused(folder, document(ignore=[r"re:.*mlp\.experts\."]), "nothing to quantize")
    plan_refused(folder, document() | {"mimoquant": {"carve_outs": {1: "bf16", 2: "bf16"}}}, "nothing to quantize")


def test_experts_of_one_layer_must_be_treated_alike(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    for target in (r"re:.*experts\.[0-2]\.", r"re:.*experts\.\d+\.(gate|up)_proj"):
        plan_refused(folder, retargeted(target), "layer 1", "2 ways")
    plan_refused(folder, document(ignore=[r"re:.*layers\.2\.mlp\.experts\.3\.down_proj"]), "layer 2", "2 ways")


def test_two_groups_must_not_claim_one_expert(tiny_checkpoint: Callable[..., Path]) -> None:
    content = document()
    groups = content["default_stage"]["default_modifiers"]["QuantizationModifier"]["config_groups"]
    groups["more"] = {"targets": [r"re:.*layers\.2\.mlp\.experts\..*"], "weights": INT4 | {"group_size": 32}}
    plan_refused(tiny_checkpoint(), content, "model.layers.2.mlp.experts.", "experts and more")


def test_formats_that_do_not_divide_the_experts_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(hidden_size=96)
    plan_refused(folder, document(), "128", "96")
    assert make_plan(folder, parsed(document({"group_size": 32}))).formats


def test_carve_outs_and_containers_must_fit_the_source(tiny_checkpoint: Callable[..., Path]) -> None:
    bf16, fp8 = tiny_checkpoint(name="bf16"), tiny_checkpoint(name="fp8", fp8=True)
    keep_fp8 = document() | {"mimoquant": {"carve_outs": {1: "fp8"}}}
    plan_refused(bf16, keep_fp8, "layer 1", "bf16")
    assert make_plan(fp8, parsed(keep_fp8)).carve_outs == {1: "fp8"}
    mxfp4 = document({"type": "float", "group_size": 32})
    native = {"mimoquant": {"container": "native"}}
    plan_refused(bf16, mxfp4 | native, "native", "FP8 source")
    plan_refused(fp8, document() | native, "native", "MXFP4")
    nvfp4 = document({"type": "float", "strategy": "tensor_group", "group_size": 16})
    modelopt = {"mimoquant": {"container": "modelopt", "carve_outs": {1: "fp8"}}}
    plan_refused(fp8, document() | modelopt, "modelopt container holds NVFP4, not int4")
    plan_refused(fp8, nvfp4 | modelopt, "modelopt container holds NVFP4, and no layer of FP8")
    modelopt["mimoquant"]["carve_outs"] = {1: "bf16"}
    assert make_plan(fp8, parsed(nvfp4 | modelopt)).formats == {2: Format("nvfp4", 16, pow2_global=True)}
    assert make_plan(fp8, parsed(mxfp4)).container == "native"
    assert make_plan(bf16, parsed(mxfp4)).container == "compressed-tensors"


# --- llm-compressor ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_recipes())
def test_resolved_recipes_load_in_llm_compressor(name: str, tmp_path: Path) -> None:
    """Slow because importing llm-compressor takes six seconds."""
    theirs = pytest.importorskip("llmcompressor.recipe", reason="llm-compressor is not installed (the extra `peer`)")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(load_recipe(name).resolved("compressed-tensors"), sort_keys=False))
    modifiers = theirs.Recipe.create_instance(str(path)).modifiers
    carrier = modifiers[-1]
    assert type(carrier).__name__ in ("QuantizationModifier", "GPTQModifier")
    (group,) = load_recipe(name).groups
    (scheme,) = carrier.config_groups.values()
    assert list(scheme.targets) == list(group.targets)
    assert (scheme.weights.num_bits, scheme.weights.group_size) == (4, group.fmt.group_size)
    assert list(carrier.ignore) == list(load_recipe(name).ignore)


def test_groups_that_disagree_about_their_observer_are_refused() -> None:
    group = "{{targets: ['re:.*layers.{}.mlp.experts.*'], weights: {{num_bits: 4, type: int, group_size: 32{}}}}}"
    for second in (", observer: minmax", ""):
        groups = f"{{a: {group.format(1, ', observer: mse')}, b: {group.format(2, second)}}}"
        text = f"default_stage: {{default_modifiers: {{QuantizationModifier: {{config_groups: {groups}}}}}}}"
        with pytest.raises(RecipeError, match="different observers"):
            parse_recipe(text, "test")


def test_a_scale_dtype_that_is_not_the_formats_is_refused() -> None:
    weights = "{num_bits: 4, type: int, group_size: 32, scale_dtype: torch.uint8}"
    groups = f"{{a: {{targets: ['re:.*experts.*'], weights: {weights}}}}}"
    text = f"default_stage: {{default_modifiers: {{QuantizationModifier: {{config_groups: {groups}}}}}}}"
    with pytest.raises(RecipeError, match=r"scale_dtype is 'torch\.uint8', int4 g32 stores None"):
        parse_recipe(text, "test")


def test_a_recipe_that_is_no_regular_file_is_refused_as_such(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    for path, why in ((tmp_path / "r.yaml", "is no regular file"), (Path("/dev/null"), "is no regular file")):
        with pytest.raises(RecipeError, match=f"^{path}: {why}$"):
            load_recipe(str(path))
