"""Recipes as llm-compressor itself saves them: keys at their default change nothing.

`recipes_of_llmcompressor.txt` holds what its 0.14.0.1 wrote; the slow test asks the one that is installed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimoquant.errors import RecipeError
from mimoquant.planning.output_settings import OutputSettings
from mimoquant.planning.recipe import Group, Recipe, parse_recipe
from mimoquant.quant.formats import Format
from mimoquant.weights.container import EXPERT_TARGET

_, *_PARTS = re.split(
    r"^===== (.+)\n", Path(__file__).with_name("recipes_of_llmcompressor.txt").read_text(), flags=re.M
)
SAVED = dict(zip(_PARTS[::2], _PARTS[1::2], strict=True))
SENTINEL = "AWQModifier.offload_device is an object of !!python/object/apply:llmcompressor.sentinel.Sentinel"
INT4, INT4_ASYM = Format("int4", 128), Format("int4", 128, symmetric=False)

ACCEPTED: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "scale_search": "gram", "ignore": ("lm_head",)},
    "gptq-groups": {"method": "gptq", "scale_search": "gram"},
    "gptq-actorder": {"method": "gptq", "scale_search": "gram"},
    "gptq-mse": {"method": "gptq", "scale_search": "mse"},
    "rtn": {"method": "rtn", "fmt": Format("mxfp4", 32)},
    "rtn-linear": {"fmt": Format("nvfp4", 16), "targets": ("Linear",), "ignore": ("lm_head", "re:.*self_attn.*")},
    "rtn-observer": {"scale_search": "mse"},
    "rtn-group-nvfp4": {"scale_search": "mse", "fmt": Format("nvfp4", 16)},
    "rtn-mxfp4-group": {"fmt": Format("mxfp4", 32)},
    "rtn-scheme-dict": {},
    "rtn-w4a4": {"fmt": Format("nvfp4", 16), "output": OutputSettings(input_scales="unit")},
    "awq-offload-none": {"method": "awq", "scale_search": "gram"},
}
REFUSED = {
    "gptq-group-order": ["actorder 'group' is not supported"],
    "gptq-batched4": ["block_size is 64"],
    "rtn-imatrix": ["'imatrix_mse'", "not supported"],
    "rtn-kv": ["QuantizationModifier.kv_cache_scheme is {'num_bits': 8", "not supported"],
    "awq": [SENTINEL],
    "awq-default": [SENTINEL],
    "awq-both": [SENTINEL],
    "awq-gptq": [SENTINEL],
    "awq-offload": ["AWQModifier.offload_device is an object of !!python/object/apply:torch.device"],
    "smooth": ["SmoothQuantModifier is not supported"],
    "indexed": ["QuantizationModifier.index is 3"],
}


def expected(name: str) -> Recipe:
    given = {"method": "rtn", "fmt": INT4, "targets": (EXPERT_TARGET,), "scale_search": "absmax", "ignore": ()}
    given |= ACCEPTED[name]
    plain = parse_recipe(
        yaml.safe_dump({"default_stage": {"default_modifiers": {"QuantizationModifier": {"scheme": "W4A16"}}}}), name
    )
    group = Group(
        "experts" if "group" in name or name == "gptq-actorder" else "group_0", given["targets"], given["fmt"]
    )
    kept = {key: given[key] for key in ("method", "scale_search", "ignore", "output") if key in given}
    return replace(plain, groups=(group,), **kept)


def without_defaults(name: str) -> dict[str, Any]:
    """The saved recipe without all that is null or at its default."""
    document = yaml.safe_load(SAVED[name])
    for settings in document["default_stage"]["default_modifiers"].values():
        for key in ("bypass_divisibility_checks", "requires_calibration_data", "batched_quantization"):
            settings.pop(key, None)
        if settings.get("ignore") == []:
            del settings["ignore"]
        if "config_groups" in settings or isinstance(settings.get("scheme"), dict):
            del settings["targets"]
        for group in settings.get("config_groups", {}).values():
            kept = {key: value for key, value in group["weights"].items() if value not in (None, {}, False)}
            settings["config_groups"] = {"experts": {"targets": group["targets"], "weights": kept}}
        for mapping in settings.get("mappings", []):
            del mapping["activation_hook_target"]
    return document


def test_every_saved_recipe_is_either_accepted_or_refused_here() -> None:
    assert set(SAVED) == {*ACCEPTED, *REFUSED, "rtn-scheme-dict2"}


@pytest.mark.parametrize("name", list(ACCEPTED))
def test_what_it_saves_is_read_and_defaults_change_nothing(name: str) -> None:
    found = parse_recipe(SAVED[name], name)
    assert found == parse_recipe(yaml.safe_dump(without_defaults(name)), name)
    bare = replace(found, extra={}, calibration=None)
    assert bare == expected(name)


def test_several_presets_become_several_groups() -> None:
    found = parse_recipe(SAVED["rtn-scheme-dict2"], "x")
    assert [(group.targets, group.fmt.label) for group in found.groups] == [
        ((EXPERT_TARGET,), "int4 g128"),
        ((r"re:.*layers\.3\..*experts.*",), Format("mxfp4", 32).label),
    ]


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_supported_is_refused_by_name_and_value(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(SAVED[name], name)
    assert all(part in str(caught.value) for part in REFUSED[name]), caught.value
    if "python" in str(caught.value):
        assert str(caught.value.hint) == "delete offload_device and what stands under it"
        lines = re.sub(r"^ +offload_device: [^\]]*\]\n", "", SAVED[name], flags=re.M)
        if name in ("awq", "awq-default", "awq-offload"):
            assert "awq" in parse_recipe(lines, name).method
        else:
            with pytest.raises(RecipeError, match=r"duo_scaling 'both'|activation_hook_target"):
                parse_recipe(lines, name)


def modifier(**settings: Any) -> str:
    given = {"scheme": "W4A16", "targets": [EXPERT_TARGET]} | settings
    return yaml.safe_dump({"default_stage": {"default_modifiers": {"GPTQModifier": given}}})


NULLS = ("index", "group", "start", "end", "update", "kv_cache_scheme", "config_groups", "weight_observer")
NULLS += (
    "input_observer",
    "output_observer",
    "observer",
    "ignore",
    "bypass_divisibility_checks",
    "batched_quantization",
)


@pytest.mark.parametrize("key", [*NULLS, "requires_calibration_data", "offload_hessians"])
def test_a_null_key_changes_nothing(key: str) -> None:
    assert parse_recipe(modifier(**{key: None}), "x") == parse_recipe(modifier(), "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("start", 0.0),
        ("end", 2),
        ("update", -1),
        ("group", "quantization"),
        ("bypass_divisibility_checks", True),
        ("input_observer", "minmax"),
        ("initialized_", True),
        ("requires_calibration_data", "yes"),
        ("batched_quantization", "all"),
        ("batched_quantization", 0),
        ("batched_quantization", True),
        ("actorder", None),
        ("dampening_frac", None),
        ("block_size", None),
        ("sequential_update", True),
        ("observer", {"input": "mse"}),
        ("weight_observer", "mse_plus"),
        ("observer", {"weights": ["mse"]}),
    ],
)
def test_another_value_is_refused_with_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(modifier(**{key: value}), "x")
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    assert key in str(caught.value) or "observer" in key, caught.value
    assert repr(shown) in str(caught.value), caught.value


def test_a_null_scheme_beside_the_carrier_is_none() -> None:
    text = "default_stage: {default_modifiers: {AWQModifier: {scheme: null, config_groups: null, mappings: null}, "
    text += "QuantizationModifier: {scheme: W4A16, targets: ['re:.*experts.*']}}}"
    assert parse_recipe(text, "x").method == "awq"


def test_a_group_may_name_the_format_that_it_is_stored_in() -> None:
    text = (
        "default_stage: {default_modifiers: {QuantizationModifier: {config_groups: {a: {targets: ['re:x'], format: %s, "
    )
    text += "weights: {num_bits: 4, type: float, group_size: 32, strategy: null}}}}}}"
    assert parse_recipe(text % "mxfp4-pack-quantized", "x").groups == parse_recipe(text % "null", "x").groups
    for other in ("pack-quantized", "dense", "[]"):
        with pytest.raises(RecipeError, match=r"a\.format is .*, mxfp4 is stored as mxfp4-pack-quantized"):
            parse_recipe(text % other, "x")


@pytest.mark.parametrize(
    ("text", "where", "key"),
    [
        ("!!python/tuple [1]", "the document", None),
        ("a: !!python/name:torch.uint8", "a", "a"),
        ("a: {b: [1, {c: !!python/object/new:os.system [x]}]}", "a.b[1].c", "c"),
        ("a: [!local x]", "a[0]", "a"),
        ("? !!python/tuple [a]\n: 1", "the document", None),
    ],
)
def test_objects_are_refused_where_they_stand(text: str, where: str, key: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "x")
    assert str(caught.value).startswith(f"recipe x: {where} is an object of !")
    assert str(caught.value.hint).startswith(f"delete {key} " if key else "a recipe is a mapping")


def test_two_stages_are_refused_by_their_names() -> None:
    text = SAVED["gptq"].replace("default_stage", "default_stage_0") + SAVED["gptq"].replace("stage:", "stage_1:")
    with pytest.raises(RecipeError, match=r"found 2 \(default_stage_0, default_stage_1\)"):
        parse_recipe(text, "x")
    parse_recipe(SAVED["gptq"].replace("default_stage", "quant_stage").replace("default_mod", "quant_mod"), "x")


@pytest.mark.slow
def test_the_installed_one_still_saves_what_is_written_down_here() -> None:
    """Slow because importing llm-compressor takes six seconds."""
    pytest.importorskip("llmcompressor.recipe", reason="llm-compressor is not installed (the extra `peer`)")
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.recipe import Recipe as Theirs

    made = {
        "gptq": GPTQModifier(targets=[EXPERT_TARGET], ignore=["lm_head"], scheme="W4A16"),
        "gptq-mse": GPTQModifier(targets=[EXPERT_TARGET], scheme="W4A16", weight_observer="mse"),
        "rtn-scheme-dict": QuantizationModifier(scheme={"W4A16": [EXPERT_TARGET]}),
    }
    for name, one in made.items():
        assert Theirs.from_modifiers([one]).yaml().strip() == SAVED[name].strip()


@pytest.mark.parametrize(
    ("document", "stage", "modifier"),
    [
        ({}, {"run_type": "oneshot"}, {}),
        ({"metadata": None, "args": {}, "version": None}, {}, {}),
        ({}, {}, {"sequential_targets": None}),
        ({}, {}, {"num_calibration_steps": None, "disable_quantization_observer_epoch": None}),
        ({"args": None}, {"run_type": "oneshot"}, {"sequential_targets": None}),
    ],
)
def test_what_earlier_versions_wrote_changes_nothing(
    document: dict[str, Any], stage: dict[str, Any], modifier: dict[str, Any]
) -> None:
    def read(document: dict[str, Any], stage: dict[str, Any], modifier: dict[str, Any]) -> Recipe:
        settings = {"targets": [EXPERT_TARGET], "scheme": "W4A16"} | modifier
        return parse_recipe(
            yaml.safe_dump(document | {"a_stage": stage | {"a_modifiers": {"GPTQModifier": settings}}}), "r"
        )

    assert read(document, stage, modifier) == read({}, {}, {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a_stage: {run_type: train, a_modifiers: {GPTQModifier: {scheme: W4A16}}}",
            "unknown key 'run_type' in a_stage",
        ),
        (
            "version: 2\na_stage: {a_modifiers: {GPTQModifier: {scheme: W4A16}}}",
            "unknown key 'version' in the document",
        ),
        (
            "a_stage: {a_modifiers: {GPTQModifier: {sequential_targets: [X]}}}",
            "sequential_targets is ['X'], which is not",
        ),
    ],
)
def test_what_earlier_versions_had_otherwise_is_refused(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(problem)):
        parse_recipe(text, "r")
