"""What `--as-served` takes kernels to round, from headers alone: rows of the tables, and what they do not know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from micro import MICRO

from mimoquant.errors import UsageError
from mimoquant.model.served_rounding import FP8, FP8_UE8M0, MXFP4, MXFP8, NONE, NVFP4, Rounding, rounded
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving.as_served import DENSE_KERNELS, as_served, parse_place
from mimoquant.serving.contracts import PLAIN_MXFP8
from mimoquant.serving.gpus import GPUS
from mimoquant.serving.kernels import KERNELS
from mimoquant.serving.served import Served, Stored, planned, read_served

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
        ("rtx4090", Rounding(FP8, NONE)),
        ("h100", Rounding(FP8_UE8M0, FP8_UE8M0)),
        ("b200", Rounding(FP8_UE8M0, FP8_UE8M0)),
        ("rtx-pro-6000", Rounding(FP8, FP8)),
        ("mi300x", Rounding(FP8, FP8)),
        ("mi355x", Rounding(FP8, FP8)),
    ],
)
def test_a_release_in_fp8(gpu: str, expected: Rounding) -> None:
    rounding, known = as_served(read_served(MICRO), "vllm", gpu, cache=False)
    assert rounding == expected
    by_groups = expected if gpu == "b200" else Rounding(FP8, FP8)  # SGLang's experts never see powers of two
    if gpu != "rtx3090":
        told, _ = as_served(read_served(MICRO), "sglang", gpu, cache=False)
        assert told == replace(by_groups, experts=FP8)
    assert sum("beside the experts by" in sentence for sentence in known) == 1


def test_layers_of_several_formats_are_rounded_each_as_its_own() -> None:
    mixed = output("mxfp4-rtn", "native")
    fp8 = read_served(MICRO).experts
    layers = list(mixed.experts)
    mixed = replace(mixed, experts={**mixed.experts, layers[0]: fp8[layers[0]]})
    rounding, _ = as_served(mixed, "vllm", "b200", cache=False)
    assert rounding.experts == MXFP8 and rounding.by_layer == ((layers[0], FP8_UE8M0),)
    assert rounding.of_experts(layers[0]) == FP8_UE8M0 and rounding.kinds == "mxfp8 and fp8-ue8m0"


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


@pytest.mark.parametrize(
    ("engine", "gpu", "expected"),
    [
        ("vllm", "h200", NONE),
        ("vllm", "mi300x", NONE),
        ("vllm", "mi355x", FP8),
        ("sglang", "b200", FP8),
        ("sglang", "rtx5090", FP8),
        ("sglang", "mi355x", FP8),
        ("sglang", "h100", "rounds groups of 32 by float32 scales"),
        ("sglang", "a100", "its MXFP8 kernels begin with SM90"),
        ("sglang", "mi300x", "mxfp8 beside the experts is not known here"),
    ],
)
def test_mxfp8_beside_the_experts(engine: str, gpu: str, expected: str) -> None:
    """`dense` is fp8 for whatever is stored in FP8: the layer's own scales say that it is MXFP8."""
    bf16 = output("int4-g128-mse", None)
    forms = {layer: [Stored("bf16")] for layer in bf16.experts}
    dense = replace(bf16, geometry=replace(bf16.geometry, quant_method="modelopt"), experts=forms, qkv=PLAIN_MXFP8)
    dense = replace(dense, linears=dict.fromkeys(dense.linears, "F8_E4M3"))
    if expected not in (NONE, FP8):
        with pytest.raises(UsageError, match=expected):
            as_served(dense, engine, gpu, cache=False)
        return
    assert as_served(dense, engine, gpu, cache=False)[0] == Rounding(NONE, expected)


def test_every_row_says_a_rounding_that_the_forward_has() -> None:
    """Where a checkpoint's experts are in FP8, every kernel but Marlin rounds what goes into them."""
    rows = torch.ones(1, 128)
    told = [(row.rounds, row.evidence, row.source) for row in KERNELS]
    told += [(row.rounds, row.evidence, row.source) for row in DENSE_KERNELS]
    for kind, evidence, source in told:
        assert evidence and source and rounded(rows, kind).shape == rows.shape
    fp8 = [row for row in KERNELS if row.subject == "fp8"]
    assert {row.rounds for row in fp8} == {NONE, FP8, FP8_UE8M0}
    assert all((row.rounds == NONE) == ((row.name or "").lower() == "marlin") for row in fp8)
    assert {gpu.arch for gpu in GPUS.values()} == {arch for row in fp8 if row.engine == "vllm" for arch in row.archs}
