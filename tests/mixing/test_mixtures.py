"""Recipes whose layers differ: exact bytes, and recipes that read back as the same plan."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from compressed_tensors.quantization import QuantizationConfig
from micro import MICRO

from mimoquant import pipeline
from mimoquant.errors import RecipeError
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe


def mixtures(recipe: str, **settings: Any) -> Mixtures:
    return Mixtures(make_plan(MICRO, load_recipe(recipe), **settings))


def test_options_are_what_the_container_holds() -> None:
    def labels(recipe: str, **settings: Any) -> list[str]:
        return [option.label for option in mixtures(recipe, **settings).options]

    assert labels("int4-g128-mse") == ["int4 g128", "int4 g64", "int4 g32", "fp8", "bf16"]
    assert labels("int4-g32-mse") == ["int4 g32", "int4 g128", "int4 g64", "fp8", "bf16"]
    assert labels("nvfp4-mse") == ["nvfp4", "mxfp4", "fp8", "bf16"]
    assert labels("mxfp4-rtn", container="compressed-tensors") == ["mxfp4", "nvfp4", "fp8", "bf16"]
    assert labels("mxfp4-rtn") == ["mxfp4", "bf16"]  # the native container
    every = Mixtures(make_plan(MICRO, load_recipe("nvfp4-mse")), any_format=True).options
    assert [option.label for option in every] == ["nvfp4", "int4 g128", "int4 g64", "int4 g32", "mxfp4", "fp8", "bf16"]
    every = Mixtures(make_plan(MICRO, load_recipe("int4-g32-mse")), any_format=True).options
    assert [option.label for option in every] == ["int4 g32", "int4 g128", "int4 g64", "mxfp4", "nvfp4", "fp8", "bf16"]
    with pytest.raises(RecipeError, match="the container native holds mxfp4 and no other format"):
        Mixtures(make_plan(MICRO, load_recipe("mxfp4-rtn")), any_format=True)
    assert [option.label for option in Mixtures(make_plan(MICRO, load_recipe("int4-g32-mse")), fp8=False).options] == [
        "int4 g32",
        "int4 g128",
        "int4 g64",
        "bf16",
    ]


@pytest.mark.parametrize("any_format", [False, True])
@pytest.mark.parametrize("recipe", ["int4-g128-mse", "mxfp4-rtn", "nvfp4-mse"])
def test_bytes_of_any_mixture_are_the_sum_of_its_layers(recipe: str, any_format: bool) -> None:
    container = "compressed-tensors" if any_format else None
    plan, rng = make_plan(MICRO, load_recipe(recipe), container=container), random.Random(0)
    held = Mixtures(plan, any_format=any_format)
    for _ in range(12):
        choice = [rng.randrange(len(held.options)) for _ in held.layers]
        choice[rng.randrange(len(choice))] = 0  # something has to be quantized
        assert held.size(choice) == held.planned(choice).shard_bytes


def test_a_mixture_is_written_and_proven(tmp_path: Path) -> None:
    held = mixtures("int4-g128-mse")
    plan = held.planned([1, 3, 0, 2])
    assert {layer: fmt.label for layer, fmt in plan.formats.items()} == {
        1: "int4 g64",
        3: "int4 g128",
        4: "int4 g32",
    } and plan.carve_outs == {2: "fp8"}
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == held.size([1, 3, 0, 2])


def test_int4_beside_mxfp4_and_nvfp4_is_written_and_proven(tmp_path: Path) -> None:
    """By `verify`, and by compressed-tensors, which reads each layer's values by what the config says of its group."""
    held = Mixtures(make_plan(MICRO, load_recipe("nvfp4-mse")), any_format=True)
    plan = held.planned([0, 2, 4, 5])
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems
    groups = QuantizationConfig(**plan.config["quantization_config"]).config_groups.values()
    told = {
        target.partition("layers\\.(")[2][0]: (group.format, group.weights.type, group.weights.group_size)
        for group in groups
        for target in group.targets
    }
    assert told == {
        "1": ("nvfp4-pack-quantized", "float", 16),
        "2": ("pack-quantized", "int", 64),
        "3": ("mxfp4-pack-quantized", "float", 32),
        "4": ("float-quantized", "float", None),
    }


def test_the_recipe_reads_back_as_the_same_plan() -> None:
    held = mixtures("int4-g128-mse")
    for choice in ([1, 3, 0, 2], [0] * 4, [4, 0, 0, 4]):
        plan = held.planned(choice)
        again = make_plan(MICRO, parse_recipe(yaml.safe_dump(plan.recipe.resolved(plan.container)), "again"))
        assert again.units == plan.units and again.config == plan.config


def test_carve_outs_of_the_recipe_are_chosen_anew() -> None:
    text = (MICRO.parent.parent / "recipes" / "int4-g128-mse.yaml").read_text().rstrip() + "\n  carve_outs: {2: bf16}\n"
    given = make_plan(MICRO, parse_recipe(text, "given"))
    assert given.carve_outs == {2: "bf16"}
    held = Mixtures(given)
    assert held.plan.carve_outs == {} and held.dropped == [
        "the recipe's carve-out of layer 2 (bf16) is dropped: layers are chosen anew"
    ]


def test_what_cannot_be_mixed_is_refused() -> None:
    held = mixtures("int4-g128-mse")
    with pytest.raises(RecipeError, match=r"has 2 formats \(int4 g128, int4 g64\)"):
        Mixtures(held.planned([0, 1, 0, 0]))
    with pytest.raises(RecipeError, match="nothing to quantize"):
        held.planned([3] * 4)


@pytest.mark.parametrize("recipe", ["nvfp4-w4a4", "gptq-nvfp4-w4a4"])
def test_input_scales_go_with_nvfp4_wherever_it_is(recipe: str) -> None:
    held = mixtures(recipe)
    mxfp4 = next(k for k, option in enumerate(held.options) if option.fmt and option.fmt.name == "mxfp4")
    for choice, layers in (([0, mxfp4, 0, mxfp4], {1, 3}), ([mxfp4] * 4, set())):
        plan = held.planned(choice)
        scaled = [entry.name for unit in plan.units for entry in unit.entries if ".input_global_scale" in entry.name]
        assert {int(name.split(".")[2]) for name in scaled} == layers and len(scaled) == 24 * len(layers)
        assert held.size(choice) == plan.shard_bytes
        assert (plan.recipe.output.input_scales != "none") == bool(layers)
        again = parse_recipe(yaml.safe_dump(plan.recipe.resolved(plan.container)), "again")
        assert again.output == plan.recipe.output
