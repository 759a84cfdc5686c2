"""Every problem that the check knows, planted one by one in a sound output; and sound outputs, which have none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from headers import Header, at_scale, output
from safetensors.torch import load_file
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving import contracts
from mimoquant.serving.check import check
from mimoquant.serving.problem import Problem
from mimoquant.serving.served import planned, read_served, served
from mimoquant.synthetic.checkpoint import SynthSizes, synth

Headers = dict[str, Header]
EXPERT = "model.layers.1.mlp.experts.0.gate_proj"
FEW = 16  # experts a layer where something is planted: what is wrong in one layer is wrong in any number of them
SMALL = SynthSizes(layers=6, expert_intermediate=256, head_dim=48)


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failures(problems: list[Problem]) -> list[str]:
    return [problem.text for problem in problems if problem.fails]


# --- sound outputs ----------------------------------------------------------------------------------------------------

SOUND = [
    ("vllm", "v2.5", "native", 8),
    ("vllm", "v2.5-pro", "native", 16),
    ("vllm", "v2-flash", "native", 4),
    ("vllm", "v2.5", "int4-g128", 8),
    ("vllm", "v2.5", "int4-g32-asymmetric", 4),
    ("vllm", "v2.5-pro", "mxfp4", 8),
    ("vllm", "v2-flash", "nvfp4", 8),
    ("sglang", "v2.5", "native", 4),
    ("sglang", "v2.5", "native", 2),
    ("sglang", "v2.5-pro", "native", 8),
    ("sglang", "v2.5", "int4-g128", 8),
    ("sglang", "v2-flash", "nvfp4", 8),
    ("vllm", "v2.5", "modelopt", 8),
    ("vllm", "v2.5-pro", "modelopt", 16),
    ("vllm", "v2-flash", "modelopt", 8),
    ("sglang", "v2.5", "modelopt", 8),
    ("sglang", "v2-flash", "modelopt", 4),
    ("transformers", "v2-flash", "int4-g128", None),
    ("transformers", "v2-flash", "mxfp4", None),
]


@pytest.mark.parametrize(("engine", "variant", "form", "tp"), SOUND)
def test_a_sound_output_has_no_problem(engine: str, variant: str, form: str, tp: int | None) -> None:
    assert check(at_scale(variant, form), engine, None, tp, arch="SM90") == []


def test_int4_of_one_group_a_rank_is_known_to_go_wrong_in_vllm() -> None:
    """2,048 inner channels over TP 16 are one group of 128: vLLM lays gate's and up's scales as if they had one."""
    for variant in ("v2.5", "v2.5-pro"):
        (problem,) = check(at_scale(variant, "int4-g128"), "vllm", None, 16, 16)
        assert problem.verdict == "corrupted" and "int4 g128 with 128 inner channels a rank" in problem.text
        assert "group_size: 32" in str(problem.hint)
        assert check(at_scale(variant, "int4-g128"), "vllm", None, 16, 1) == []  # experts whole on their GPU
        (unsure,) = check(at_scale(variant, "int4-g128"), "vllm", "0.30", 16, 16)
        assert unsure.verdict == "warning" and "known from 0.32 on" in unsure.text
    assert check(at_scale("v2.5", "int4-g128"), "sglang", None, 8, 16) == []


def test_without_a_tp_one_group_a_rank_is_a_warning(outputs: dict[str, Path]) -> None:
    whole = read_served(outputs["int4"])
    narrow = replace(whole, geometry=replace(whole.geometry, expert_intermediate=128))
    (unsure,) = check(narrow, "vllm")
    assert unsure.verdict == "warning" and "one group" in unsure.text and not unsure.fails


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_kept_layers_are_allowed_in_modelopts_container(engine: str) -> None:
    assert check(at_scale("v2.5", "modelopt", ((41, "bf16"),)), engine, None, 8) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_kept_layers_are_allowed(engine: str, kind: str) -> None:
    found = check(at_scale("v2.5", "nvfp4", ((41, kind),)), engine, None, 8)
    assert found == []


# --- planted in headers and config ------------------------------------------------------------------------------------


def group(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]
    return found


def lose(suffix: str) -> Callable[[dict[str, Any], Headers], None]:
    return lambda config, tensors: tensors.pop(f"{EXPERT}.{suffix}") and None


def exact_targets(config: dict[str, Any], tensors: Headers) -> None:
    group(config)["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["lm_head"]


def linear_with_a_list(config: dict[str, Any], tensors: Headers) -> None:
    """As llm-compressor writes it: every matrix that was left alone, by name."""
    group(config)["targets"] = ["Linear"]
    others = [
        name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight") and ".experts." not in name
    ]
    config["quantization_config"]["ignore"] = ["lm_head", *others]


def linear_with_fused_names(config: dict[str, Any], tensors: Headers) -> None:
    """The same for engines, whose modules are fused."""
    linear_with_a_list(config, tensors)
    ignore = config["quantization_config"]["ignore"]
    fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    ignore += [name.replace(part, whole) for name in ignore for part, whole in fused.items() if name.endswith(part)]


def half_ignored(config: dict[str, Any], tensors: Headers) -> None:
    linear_with_a_list(config, tensors)
    config["quantization_config"]["ignore"].remove("model.layers.0.mlp.up_proj")


def no_quantization_config(config: dict[str, Any], tensors: Headers) -> None:
    del config["quantization_config"]


def no_ignore(config: dict[str, Any], tensors: Headers) -> None:
    config["quantization_config"]["ignore"] = []


def anchored(config: dict[str, Any], tensors: Headers) -> None:
    group(config)["targets"] = [r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$"]


def one_layer_ignored(config: dict[str, Any], tensors: Headers) -> None:
    config["quantization_config"]["ignore"] += [r"re:.*layers\.7\.mlp\.experts\..*"]


def two_schemes(config: dict[str, Any], tensors: Headers) -> None:
    config["quantization_config"]["ignore"] += [r"re:.*layers\.7\.mlp\.experts\.\d+\.up_proj"]


def other_group_size(config: dict[str, Any], tensors: Headers) -> None:
    group(config)["weights"]["group_size"] = 64


def not_symmetric(config: dict[str, Any], tensors: Headers) -> None:
    group(config)["weights"]["symmetric"] = False


def mixed_experts(config: dict[str, Any], tensors: Headers) -> None:
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{EXPERT}.{part}"]
    tensors[f"{EXPERT}.weight"] = Header("BF16", (2048, 4096))


def fp8_attention(config: dict[str, Any], tensors: Headers) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = Header("F8_E4M3", tensors[name].shape)


def fused_again(config: dict[str, Any], tensors: Headers) -> None:
    config["attention_projection_layout"] = "fused_qkv"
    for layer in range(48):
        prefix = f"model.layers.{layer}.self_attn."
        rows = sum(tensors.pop(f"{prefix}{letter}_proj.weight").shape[0] for letter in "qkv")
        tensors[f"{prefix}qkv_proj.weight"] = Header("BF16", (rows, 4096))


def no_remote_code(config: dict[str, Any], tensors: Headers) -> None:
    del config["auto_map"]


def mixed_format(config: dict[str, Any], tensors: Headers) -> None:
    config["quantization_config"]["format"] = "mixed-precision"


def store_dtype_lost(config: dict[str, Any], tensors: Headers) -> None:
    config["quantization_config"]["store_dtype"] = "fp8"


def o_proj_not_ignored(config: dict[str, Any], tensors: Headers) -> None:
    config["quantization_config"]["ignored_layers"].remove("model.layers.3.self_attn.o_proj")


def layers_of(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["quantized_layers"]
    return found


def unnamed_layer(config: dict[str, Any], tensors: Headers) -> None:
    for name in [name for name in layers_of(config) if name.startswith("model.layers.7.")]:
        del layers_of(config)[name]


def unshared_algo(config: dict[str, Any], tensors: Headers) -> None:
    for name in [name for name in layers_of(config) if name.startswith("model.layers.7.")]:
        layers_of(config)[name] = {"quant_algo": "MXFP8", "group_size": 32}


def named_attention(config: dict[str, Any], tensors: Headers) -> None:
    layers_of(config)["model.layers.3.self_attn.qkv_proj"] = {"quant_algo": "MXFP8", "group_size": 32}


def mxfp8_fused(config: dict[str, Any], tensors: Headers) -> None:
    """As lukealonso publishes it."""
    fused_again(config, tensors)
    for layer in range(48):
        module = f"model.layers.{layer}.self_attn.qkv_proj"
        rows = tensors[f"{module}.weight"].shape[0]
        tensors[f"{module}.weight"] = Header("F8_E4M3", (rows, 4096))
        tensors[f"{module}.weight_scale_inv"] = Header("U8", (rows, 128))
        layers_of(config)[module] = {"quant_algo": "MXFP8", "group_size": 32}


def four_bit_activations(config: dict[str, Any], tensors: Headers) -> None:
    for entry in layers_of(config).values():
        entry["quant_algo"] = "NVFP4"


def scales_undeclared(config: dict[str, Any], tensors: Headers) -> None:
    tensors |= {
        name.replace("weight_scale_2", "input_scale"): header
        for name, header in tensors.items()
        if name.endswith("weight_scale_2")
    }


def nothing(config: dict[str, Any], tensors: Headers) -> None:
    return None


Row = tuple[str, str, str, Callable[[dict[str, Any], Headers], None], int | None, str | None, str]
PLANTED: list[Row] = [  # engine, form, verdict, what is done to V2.5, TP, version, what is said
    ("vllm", "int4-g128", "corrupted", lose("weight_scale"), 8, None, "weight_scale is missing, as are 0 others"),
    ("vllm", "nvfp4", "corrupted", lose("weight_global_scale"), 8, None, "weight_global_scale is missing"),
    ("vllm", "int4-g128", "warning", lose("weight_shape"), 8, None, "weight_shape is missing"),
    ("vllm", "int4-g128", "refused", mixed_experts, 8, None, "layer 1: its experts have 2 formats"),
    ("vllm", "int4-g128", "refused", linear_with_a_list, 8, None, "0.self_attn.qkv_proj and 50 others are bf16"),
    ("sglang", "int4-g128", "refused", linear_with_a_list, 8, None, "0.self_attn.qkv_proj and 54 others are bf16"),
    ("vllm", "int4-g128", "refused", half_ignored, 8, None, "0.mlp.gate_up_proj: quantization_config ign"),
    (
        "transformers",
        "int4-g128",
        "corrupted",
        exact_targets,
        None,
        None,
        "targets them: transformers 5.17.0 draws random",
    ),
    ("vllm", "native", "corrupted", no_quantization_config, 8, None, "47 layers (1-47): experts are native mxfp4"),
    ("vllm", "native", "corrupted", no_quantization_config, 8, None, "config.json has no quantization_config"),
    ("vllm", "int4-g128", "refused", exact_targets, 8, None, "are bf16, and quantization_config targets them"),
    (
        "vllm",
        "int4-g128",
        "corrupted",
        anchored,
        8,
        None,
        "47 layers (1-47): experts are compressed-tensors int4 g128, quantization_config makes them bf16",
    ),
    ("vllm", "int4-g128", "corrupted", one_layer_ignored, 8, None, "layer 7: experts are compressed-tensors int4 g128"),
    ("sglang", "int4-g128", "refused", one_layer_ignored, 8, None, "layer 7: experts are compressed-tensors int4 g128"),
    ("transformers", "int4-g128", "corrupted", one_layer_ignored, None, None, "draws random weights"),
    ("vllm", "int4-g128", "refused", two_schemes, 8, None, "layer 7: quantization_config gives its 3 projections 2"),
    ("vllm", "int4-g128", "refused", other_group_size, 8, None, "makes them compressed-tensors int4 g64"),
    ("vllm", "int4-g128", "corrupted", not_symmetric, 8, None, "makes them compressed-tensors int4 asymmetric g128"),
    ("sglang", "int4-g128", "refused", no_ignore, 8, None, "are in neither targets nor ignore"),
    ("vllm", "int4-g128", "corrupted", fp8_attention, 8, None, "0.self_attn.qkv_proj are FP8"),
    ("vllm", "int4-g128", "corrupted", fused_again, 4, None, "fused bf16 qkv is read as [Q|K|V]"),
    ("sglang", "int4-g128", "corrupted", fused_again, 2, None, "attention TP is 2, must be 4"),
    ("sglang", "int4-g128", "refused", fused_again, 8, None, "attention TP is 8, must be 4"),
    ("sglang", "int4-g128", "warning", fused_again, None, None, "attention TP must be 4"),
    ("vllm", "int4-g128", "refused", no_remote_code, 8, None, "model_type 'mimo_v2' has no class in transformers"),
    ("sglang", "int4-g128", "warning", no_remote_code, 8, None, "(SGLang 0.5.23, not verified)"),
    ("transformers", "int4-g128", "refused", no_remote_code, None, None, "has no class in transformers 5.17"),
    ("sglang", "int4-g128", "refused", mixed_format, 8, None, "need pack-quantized as the format of the whole"),
    ("vllm", "native", "corrupted", store_dtype_lost, 8, None, "quantization_config makes them fp8"),
    ("vllm", "native", "corrupted", o_proj_not_ignored, 8, None, "model.layers.3.self_attn.o_proj"),
    ("vllm", "int4-g128", "refused", nothing, 32, None, "2048 inner channels over TP 32 are 64 a rank"),
    ("vllm", "int4-g128", "refused", nothing, 12, None, "64 heads and 4 KV heads do not split over TP 12"),
    ("vllm", "native", "corrupted", nothing, 4, "0.23", "store_dtype is not known yet"),
    ("vllm", "native", "refused", nothing, 4, "0.30", "sliding-window layers have 8 KV heads"),
    ("vllm", "int4-g128", "warning", nothing, 4, "0.25", "not verified in vLLM 0.25, known from 0.26 on"),
    ("sglang", "native", "refused", nothing, 8, None, "attention TP is 8, must divide 4"),
    ("sglang", "native", "warning", nothing, None, None, "attention TP must divide 4"),
    ("sglang", "mxfp4", "refused", nothing, 8, None, "stop with KeyError"),
    ("sglang", "native", "refused", nothing, 32, None, "are 64 a rank, no multiple of the group of 128"),
    ("sglang", "int4-g32-asymmetric", "refused", nothing, 8, None, "does not turn weight_zero_point"),
    ("sglang", "int4-g128", "warning", nothing, 8, "0.5.20", "expected 'fused_qkv' or unset"),
    ("transformers", "nvfp4", "corrupted", nothing, None, None, "loads without the global scales"),
    ("transformers", "native", "corrupted", nothing, None, None, "loads without the experts' scales"),
    ("transformers", "int4-g32-asymmetric", "refused", nothing, None, None, "passes no weight_zero_point"),
    ("transformers", "int4-g128", "warning", nothing, None, None, "loads by its remote code"),
    ("vllm", "modelopt", "corrupted", lose("weight_scale_2"), 8, None, "weight_scale_2 is missing, as are 0 others"),
    (
        "vllm",
        "modelopt",
        "corrupted",
        unnamed_layer,
        8,
        None,
        "layer 7: experts are modelopt nvfp4 g16, quantization_config makes them bf16",
    ),
    ("sglang", "modelopt", "refused", unnamed_layer, 8, None, "quantization_config makes them bf16"),
    ("vllm", "modelopt", "corrupted", unshared_algo, 8, None, "quantization_config makes them MXFP8"),
    ("vllm", "modelopt", "corrupted", named_attention, 8, None, "3.self_attn.qkv_proj: their dtype is"),
    ("vllm", "modelopt", "refused", mxfp8_fused, 4, None, "any FP8 qkv_proj is taken for interleaved 128x128 blocks"),
    ("sglang", "modelopt", "corrupted", mxfp8_fused, 4, None, "cut into ranks as if it were interleaved"),
    ("sglang", "modelopt", "corrupted", fused_again, 4, None, "attention TP is 4, must be 1"),
    (
        "vllm",
        "modelopt",
        "warning",
        four_bit_activations,
        8,
        None,
        "no input_scale is there: they are scaled by memory not written to",
    ),
    ("sglang", "modelopt", "warning", four_bit_activations, 8, None, "no input_scale is there: they are scaled by 1"),
    (
        "vllm",
        "modelopt",
        "warning",
        scales_undeclared,
        8,
        None,
        "does not ask for activations in 4 bits: it is served W4A16",
    ),
    ("vllm", "modelopt", "warning", nothing, 8, "0.31", "not verified in vLLM 0.31, known from 0.32 on"),
    ("transformers", "modelopt", "refused", nothing, None, None, "quant_method modelopt is unknown to it"),
]


@pytest.mark.parametrize(("engine", "form", "verdict", "plant", "tp", "version", "said"), PLANTED)
def test_a_planted_problem_is_told(
    engine: str,
    form: str,
    verdict: str,
    plant: Callable[[dict[str, Any], Headers], None],
    tp: int | None,
    version: str | None,
    said: str,
) -> None:
    config, tensors = output("v2.5", form, experts=FEW)
    plant(config, tensors)
    found = check(served(config, tensors, "OUT", {"tp_size": 4}), engine, version, tp)
    assert any(problem.verdict == verdict and said in problem.text for problem in found), found


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("form", ["int4-g128", "mxfp4", "nvfp4"])
def test_linear_is_right_where_all_else_is_named(engine: str, form: str) -> None:
    """What a pattern for experts gives, `Linear` with a full list gives, in any container of compressed-tensors."""
    config, tensors = output("v2-flash", form, experts=FEW)
    before = check(served(config, tensors, "OUT", {}), engine, None, 4)
    linear_with_fused_names(config, tensors)
    assert check(served(config, tensors, "OUT", {}), engine, None, 4) == before


def test_what_repeats_is_one_line() -> None:
    """47 layers with one fault are one sentence; of two faults there are two."""
    config, tensors = output("v2.5", "int4-g128", experts=FEW)
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:nothing"]
    texts = failures(check(served(config, tensors, "OUT", {}), "vllm"))
    assert [text.split(":")[0] for text in texts] == ["47 layers (1-47)"]
    group(config)["targets"] = [r"re:.*layers\.(4|5|6|9)\.mlp\.experts.*"]
    config["quantization_config"]["ignore"] += [r"re:.*layers\.5\.mlp\.experts\.\d+\.up_proj"]
    texts = failures(check(served(config, tensors, "OUT", {}), "vllm"))
    assert sorted(text.split(":")[0] for text in texts) == ["43 layers (1-3, 7-8, 10-47)", "layer 5"]


def test_the_anchored_pattern_fails_for_its_prefix_only() -> None:
    """Without towers there is no language_model. before the name, and the same pattern matches."""
    config, tensors = output("v2.5-pro", "int4-g128", experts=FEW)
    anchored(config, tensors)
    assert check(served(config, tensors, "OUT", {"tp_size": 4}), "vllm", None, 8) == []


@pytest.mark.parametrize(("kind", "verdict"), [("bf16", "corrupted"), ("fp8", "refused")])
def test_transformers_and_kept_layers(kind: str, verdict: str) -> None:
    problem, *rest = check(at_scale("v2-flash", "int4-g128", ((41, kind),)), "transformers")
    assert all("not verified" in other.text for other in rest)
    assert problem.verdict == verdict and f"layers 41: a layer kept in {kind}" in problem.text


def test_sglang_takes_a_kept_layer_for_mxfp4() -> None:
    found = check(at_scale("v2.5", "mxfp4", ((41, "bf16"),)), "sglang", None, 8)
    assert found[0].verdict == "corrupted" and "layers 41" in found[0].text and "KeyError" in found[1].text


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_v2_flash_in_fp8_does_not_split_over_8(engine: str) -> None:
    (problem,) = check(at_scale("v2-flash", "native"), engine, None, 8)
    assert problem.verdict == "refused" and "1536 rows over TP 8 is 192 a rank" in problem.text
    assert check(at_scale("v2-flash", "native"), engine, None, 2) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("tp", [None, 1, 2, 4])
def test_v2_flash_as_published_is_read_wrong_at_any_tp(engine: str, tp: int | None) -> None:
    """Each head of a global k has scale rows of its own; engines lay scales out in blocks of 128 rows throughout."""
    config, tensors = output("v2-flash", "native", experts=FEW, published_qkv=True)
    (problem,) = check(served(config, tensors, "x", {}), engine, None, tp)
    assert problem.verdict == "corrupted" and "scales of other rows" in problem.text and "relayout" in str(problem.hint)


FLASH_CHANGES: list[tuple[str, Any, str]] = [
    ("hybrid_layer_pattern", [1] * 48, "layer_types is absent"),
    ("moe_layer_freq", None, "mlp_layer_types is absent"),
    ("rope_theta", 1e7, "rope_theta is 10000000.0, taken is 5e+06"),
    ("layernorm_epsilon", 1e-6, "rms_norm_eps is absent"),
]


@pytest.mark.parametrize(("key", "value", "said"), FLASH_CHANGES)
def test_keys_that_transformers_does_not_read(key: str, value: Any, said: str) -> None:
    config, tensors = output("v2-flash", "int4-g128", experts=FEW)
    if key == "moe_layer_freq":
        config[key] = [0, 0, *config[key][2:]]
        tensors = {
            name: header for name, header in tensors.items() if not name.startswith("model.layers.1.mlp.experts")
        }
    else:
        config[key] = value
    if key == "hybrid_layer_pattern":
        config[key] = [0, 1, 0, *config[key][3:-1], 0]
    found = check(served(config, tensors, "OUT", {"tp_size": 4}), "transformers")
    assert any(problem.verdict == "corrupted" and said in problem.text for problem in found), found


def test_a_pattern_that_is_none_is_refused() -> None:
    config, tensors = output("v2.5", "int4-g128", experts=FEW)
    config["quantization_config"]["ignore"] = ["re:(["]
    with pytest.raises(CheckpointError, match=r"'re:\(\[' is no pattern"):
        check(served(config, tensors, "OUT", {"tp_size": 4}), "vllm")


def test_a_plain_checkpoint_with_an_audio_tower_stops_vllm() -> None:
    """`test_vllm_prompt` loads one by the hint, and not without it."""
    config, tensors = output("v2.5", "native", experts=FEW)
    config |= {"audio_config": {"audio_channels": 20}, "vision_config": {"depth": 28}}
    assert not [p for p in check(served(config, tensors, "OUT", {"tp_size": 4}), "vllm") if "audio" in p.text]
    del config["quantization_config"]

    def told(engine: str, version: str | None = None) -> list[Problem]:
        return [p for p in check(served(config, tensors, "OUT", {}), engine, version) if "audio tower" in p.text]

    [problem] = told("vllm")
    assert problem.verdict == "refused" and "embed_tokens" in problem.text and "enable_weights_track" in problem.hint
    assert not told("sglang") and told("vllm", "0.31")[0].verdict == "warning"
    del config["audio_config"]
    assert not told("vllm")


def test_every_row_says_where_it_is_from() -> None:
    for row in (*contracts.FORMATS, *contracts.CARVE_OUTS, *contracts.QKV, *contracts.TOWERS):
        assert row.source and row.evidence in (contracts.RUN, contracts.READ, contracts.UNVERIFIED)
        assert row.verdict == contracts.RIGHT or row.what, row
        assert row.tp == "any" or row.what, row
        assert row.engine in contracts.ENGINES


# --- written folders and the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real outputs of small checkpoints: name → folder."""
    base = tmp_path_factory.mktemp("outputs")
    synth(base / "flash", "flash", sizes=SMALL)
    synth(base / "v2.5", "v2.5", sizes=SMALL)
    made = {}
    for name, source, recipe in (
        ("int4", "flash", "int4-g128-rtn"),
        ("nvfp4", "flash", "nvfp4-mse"),
        ("native", "v2.5", "mxfp4-rtn"),
    ):
        made[name] = base / f"out-{name}"
        pipeline.quantize(make_plan(base / source, load_recipe(recipe)), made[name], device="cpu")
    return made | {"flash": base / "flash", "v2.5": base / "v2.5"}


def test_a_plan_says_what_the_output_is(outputs: dict[str, Path]) -> None:
    plan = make_plan(outputs["flash"], load_recipe("int4-g128-rtn"))
    before, after = planned(plan), read_served(outputs["int4"])
    for engine in contracts.ENGINES:
        assert check(before, engine, None, 2) == check(after, engine, None, 2)
    assert before.bytes_by_kind == after.bytes_by_kind


def test_native_mxfp4_of_v2_flash_has_global_qkv_in_bf16(tmp_path: Path) -> None:
    """In FP8, as the source has them, engines read them wrong."""
    source, out = tmp_path / "source", tmp_path / "out"
    synth(source, "flash", sizes=SynthSizes(layers=6, expert_intermediate=256, head_dim=64))
    assert [problem.verdict for problem in check(read_served(source), "vllm", None, 2)] == ["corrupted"]
    plan = make_plan(source, load_recipe("mxfp4-rtn"))
    assert plan.container == "native" and any("q, k, v of layers 0, 5 become bf16" in note for note in plan.notes)
    pipeline.quantize(plan, out, device="cpu")
    for engine in ("vllm", "sglang"):
        assert check(read_served(out), engine, None, 1) == []
    assert verify(out, source).ok
    relayout = call("relayout", source, "--qkv", "split", "--dtype", "bf16", "--out", tmp_path / "bf16")
    assert relayout.exit_code == 0, relayout.output
    tensors = [
        {
            name: value
            for path in folder.glob("*.safetensors")
            for name, value in load_file(path).items()
            if "layers.5.self_attn" in name
        }
        for folder in (out, tmp_path / "bf16")
    ]
    assert all(torch.equal(value, tensors[0][name]) for name, value in tensors[1].items()), "two ways, one result"


def test_verify_with_an_engine(outputs: dict[str, Path]) -> None:
    good = call("verify", outputs["int4"], "--engine", "vllm", "--tp", "1")
    assert good.exit_code == 0 and good.stdout == "vLLM 0.33.0 at TP 1: nothing is known against it\n", good.output
    bad = call("verify", outputs["nvfp4"], "--engine", "transformers")
    assert bad.exit_code == 3 and "corrupted: layers 1-5: compressed-tensors nvfp4" in bad.stdout, bad.output
    assert "transformers would refuse or corrupt it (problems: 1)" in bad.stderr and "Traceback" not in bad.output
    facts = json.loads(call("verify", outputs["int4"], "--engine", "sglang", "--tp", "8", "--json").stdout)["engine"]
    assert facts["ok"] is False and facts["problems"][0]["verdict"] == "refused"


def test_verify_with_a_source_and_an_engine(outputs: dict[str, Path]) -> None:
    both = call("verify", outputs["int4"], "--source", outputs["flash"], "--engine", "sglang", "--json")
    assert both.exit_code == 0, both.output
    facts = json.loads(both.stdout)
    assert facts["ok"] and facts["checked"]["files"] > 0 and facts["engine"]["problems"] == []


def test_verify_wants_something_to_hold_against(outputs: dict[str, Path]) -> None:
    for arguments, said in (
        ((), "nothing to hold"),
        (("--source", "x", "--tp", "2"), "are about an --engine"),
        (("--engine", "vllm", "--engine-version", "x"), "is no version"),
    ):
        result = call("verify", outputs["int4"], *arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output


def test_plan_warns(outputs: dict[str, Path]) -> None:
    result = call("plan", outputs["v2.5"], "-r", "mxfp4-rtn")
    assert "SGLang: warning: self_attn: fused FP8 qkv is in 2 chunks, attention TP must divide 2" in result.stdout
    facts = json.loads(call("plan", outputs["flash"], "-r", "int4-g128-rtn", "--json").stdout)
    assert [(engine["engine"], engine["problems"]) for engine in facts["engines"]] == [("vllm", []), ("sglang", [])]


def test_launch_prints_a_command(outputs: dict[str, Path]) -> None:
    text = call("launch", outputs["int4"], "--engine", "vllm", "--gpu", "h100", "--gpus", "2", "--mtp")
    assert text.exit_code == 0 and f"vllm serve {outputs['int4']} \\" in text.stdout, text.output
    facts = json.loads(
        call("launch", outputs["int4"], "--engine", "sglang", "--gpu", "a100", "--gpus", "1", "--json").stdout
    )
    assert facts["schema_version"] == 1 and facts["command"][:3] == ["python3", "-m", "sglang.launch_server"]
    source = call("launch", outputs["v2.5"], "--engine", "sglang", "--gpu", "h100", "--gpus", "1")
    assert source.exit_code == 0 and f"--model-path {outputs['v2.5']} \\" in source.stdout, source.output
    refused = call("launch", outputs["flash"], "--engine", "vllm", "--gpu", "h100", "--gpus", "1")
    assert refused.exit_code == 3 and "gets scales of other rows" in refused.stderr
    wrong = call("launch", mimoquant.micro_checkpoint(), "--engine", "vllm", "--gpu", "h800", "--gpus", "1")
    assert wrong.exit_code == 2


def test_the_checks_load_nothing_heavy() -> None:
    code = "import sys, mimoquant.serving.launch; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = ("torch", "numba", "llvmlite", "transformers", "compressed_tensors", "safetensors")
    assert [name for name in heavy if name in loaded] == []
