"""What `--as-served` takes kernels to round, from headers alone: rows of the tables, and what they do not know."""

from __future__ import annotations

from dataclasses import replace

import pytest
from micro import MICRO

from mimoquant.errors import UsageError
from mimoquant.model.served_rounding import FP8, FP8_UE8M0, MXFP4, MXFP8, NONE, NVFP4, Rounding
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving.as_served import DENSE_KERNELS, as_served, parse_place
from mimoquant.serving.gpus import GPUS, KERNELS
from mimoquant.serving.served import Served, planned, read_served

EXPERTS = {  # recipe and container, engine, GPU → what experts' inputs are rounded to
    ("int4-g128-mse", None, "vllm", "a100"): NONE,
    ("int4-g128-mse", None, "sglang", "b200"): NONE,
    ("mxfp4-rtn", "native", "vllm", "h200"): NONE,
    ("mxfp4-rtn", "native", "vllm", "b200"): MXFP8,
    ("mxfp4-rtn", "native", "sglang", "gb300"): MXFP8,
    ("mxfp4-rtn", "compressed-tensors", "vllm", "h100"): NONE,
    ("mxfp4-rtn", "compressed-tensors", "vllm", "b300"): MXFP4,
    ("nvfp4-mse", "compressed-tensors", "vllm", "b200"): NONE,
    ("nvfp4-mse", "modelopt", "vllm", "rtx-pro-6000"): NONE,
}


def output(recipe: str, container: str | None) -> Served:
    return planned(make_plan(MICRO, load_recipe(recipe), container=container))


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: " ".join(filter(None, case)))
def test_experts_by_the_kernel_that_launch_names(case: tuple[str, str | None, str, str]) -> None:
    recipe, container, engine, gpu = case
    rounding, known = as_served(output(recipe, container), engine, gpu, cache=False)
    assert rounding.experts == EXPERTS[case] and not rounding.by_layer and rounding.cache == NONE
    assert any("experts by " in sentence for sentence in known)
    assert any("not tried by us" in sentence for sentence in known) != GPUS[gpu].tried


@pytest.mark.parametrize("container", ["compressed-tensors", "modelopt"])
def test_input_scales_make_it_w4a4(container: str) -> None:
    both = output("nvfp4-w4a4", container)
    assert as_served(both, "vllm", "b200", cache=False)[0] == Rounding(NVFP4)
    assert as_served(both, "vllm", "h200", cache=True)[0] == Rounding(NONE, NONE, FP8)
    weights_only = replace(output("nvfp4-mse", container), input_scales=True)  # which config.json does not ask for
    assert as_served(weights_only, "vllm", "b200", cache=False)[0] == Rounding()


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("rtx3090", Rounding()),
        ("h100", Rounding(FP8, FP8)),
        ("b200", Rounding(FP8, FP8_UE8M0)),
    ],
)
def test_a_release_in_fp8(gpu: str, expected: Rounding) -> None:
    rounding, known = as_served(read_served(MICRO), "vllm", gpu, cache=False)
    assert rounding == expected
    assert sum("beside the experts by" in sentence for sentence in known) == 1


def test_layers_of_several_formats_are_rounded_each_as_its_own() -> None:
    mixed = output("mxfp4-rtn", "native")
    fp8 = read_served(MICRO).experts
    layers = list(mixed.experts)
    mixed = replace(mixed, experts={**mixed.experts, layers[0]: fp8[layers[0]]})
    rounding, _ = as_served(mixed, "vllm", "b200", cache=False)
    assert rounding.experts == MXFP8 and rounding.by_layer == ((layers[0], FP8),)
    assert rounding.of_experts(layers[0]) == FP8 and rounding.kinds == "mxfp8 and fp8"


@pytest.mark.parametrize(
    ("recipe", "container", "place", "said"),
    [
        ("int4-g128-mse", None, "sglang:rtx4090", "int4 experts is not known here"),
        ("mxfp4-rtn", "native", "sglang:a100", "its Marlin for MXFP4 requires SM90"),
    ],
)
def test_what_is_not_known_is_refused(recipe: str, container: str | None, place: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        as_served(output(recipe, container), *parse_place(place), cache=False)


def test_every_row_says_a_rounding_that_the_forward_has() -> None:
    assert {row.rounds for row in KERNELS} <= {None, "MXFP8", "MXFP4", "NVFP4"}
    assert {row.rounds for row in DENSE_KERNELS} <= {NONE, FP8, FP8_UE8M0, MXFP8}
    assert all(row.evidence and row.source for row in DENSE_KERNELS)
