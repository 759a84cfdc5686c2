"""hf_quant_config.json beside config.json: what completes it is read as engines do, what contradicts it is told."""

from __future__ import annotations

from typing import Any

import pytest

from mimoquant.planning.settings_beside import contradictions

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "NVFP4"}},
}
GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}, "targets": ["Linear"]}}}
FLOAT8 = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}


def beside(**changes: Any) -> dict[str, Any]:
    return {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]} | changes


@pytest.mark.parametrize(
    ("told", "other"),
    [  # the same under either file's names, as ModelOpt writes them
        (NVFP4, beside()),
        (NVFP4 | GROUPS | FLOAT8, beside(group_size=16, kv_cache_quant_algo="FP8")),
        (NVFP4 | {"kv_cache_quant_algo": None}, beside(kv_cache_quant_algo="auto")),
        (NVFP4 | {"quant_algo": "nvfp4"}, beside()),
        (NVFP4 | {"ignore": [], "exclude_modules": ["lm_head"]}, beside()),
        (NVFP4 | {"ignore": ["b", "a"]}, beside(exclude_modules=["a", "b"])),
        (NVFP4 | GROUPS, beside()),
        (
            MIXED,
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "nvfp4", "group_size": 16}}},
        ),
        (MIXED, {"quant_algo": "MIXED_PRECISION"}),
    ],
)
def test_the_same_in_other_words_is_no_contradiction(told: dict[str, Any], other: dict[str, Any]) -> None:
    assert contradictions(told, other) == []


@pytest.mark.parametrize(
    ("told", "other", "first", "second"),
    [
        (NVFP4, beside(quant_algo="FP8"), "quant_algo is 'NVFP4' in", "'FP8' in hf_quant"),
        (NVFP4, beside(quant_algo="W4A16_NVFP4"), "quant_algo is 'NVFP4'", "'W4A16_NVFP4'"),
        (NVFP4, beside(kv_cache_quant_algo="FP8"), "the KV cache is in 16 bits", "in FP8"),
        (NVFP4 | FLOAT8, beside(kv_cache_quant_algo="NVFP4"), "the KV cache is in FP8", "in NVFP4"),
        (NVFP4 | GROUPS, beside(group_size=32), "group_size is 16", "32"),
        (NVFP4, beside(exclude_modules=["lm_head", "x*"]), "1 module, does not name x*", "of 2 modules, does"),
        (NVFP4 | {"ignore": ["z", "lm_head"]}, beside(), "of 2 modules, names z", "does not"),
        (MIXED, MIXED | {"quantized_layers": {"a": {"quant_algo": "FP8"}}}, "has a as NVFP4", "as FP8"),
        (MIXED, MIXED | {"quantized_layers": {}}, "has a as NVFP4", "as nothing"),
        ({"quant_method": "fp8"}, beside(), "quant_method is 'fp8'", "quant_algo is 'NVFP4'"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, beside(), "'compressed-tensors'", "'NVFP4'"),
    ],
)
def test_a_contradiction_is_told_with_both_values(
    told: dict[str, Any], other: dict[str, Any], first: str, second: str
) -> None:
    (text,) = contradictions(told, other)
    before, after = text.split(" in quantization_config of config.json, ")
    assert first in f"{before} in" and second in after and after.endswith(" in hf_quant_config.json")


def test_settings_of_the_wrong_types_are_compared_too() -> None:
    odd = {"quant_algo": ["x"], "exclude_modules": "lm_head", "quantized_layers": [1], "config_groups": [2]}
    assert len(contradictions(NVFP4, odd | {"group_size": "16", "kv_cache_scheme": {}})) == 3
