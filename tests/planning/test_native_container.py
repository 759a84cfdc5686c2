"""The native container's config: one ignore list, by the name that the source has for it."""

from __future__ import annotations

from typing import Any

import pytest
from headers import published_config

from mimoquant.errors import CheckpointError
from mimoquant.model.geometry import IGNORE_LISTS, read_geometry
from mimoquant.quant.formats import Format
from mimoquant.weights.container import NATIVE, output_config

ATTENTION = "model.layers.0.self_attn.o_proj"
KEPT = "model.layers.2.mlp.experts"
MXFP4 = Format("mxfp4", 32)

LISTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # what, the source's lists, the output's
    ("vLLM's name", {"ignored_layers": [ATTENTION]}, {"ignored_layers": [ATTENTION, KEPT]}),
    ("transformers' name", {"modules_to_not_convert": [ATTENTION]}, {"modules_to_not_convert": [ATTENTION, KEPT]}),
    ("none", {}, {"ignored_layers": [KEPT]}),
    ("an empty one", {"modules_to_not_convert": []}, {"modules_to_not_convert": [KEPT]}),
    ("a null", {"ignored_layers": None}, {"ignored_layers": [KEPT]}),
    (
        "an empty one that hides the other in SGLang",
        {"ignored_layers": [], "modules_to_not_convert": [ATTENTION]},
        {"modules_to_not_convert": [ATTENTION, KEPT]},
    ),
    (
        "a null beside the other",
        {"ignored_layers": [ATTENTION], "modules_to_not_convert": None},
        {"ignored_layers": [ATTENTION, KEPT]},
    ),
    (
        "both, and they agree",
        {"ignored_layers": [ATTENTION], "modules_to_not_convert": [ATTENTION]},
        {"ignored_layers": [ATTENTION, KEPT], "modules_to_not_convert": [ATTENTION, KEPT]},
    ),
    ("named already", {"modules_to_not_convert": [KEPT]}, {"modules_to_not_convert": [KEPT]}),
]


@pytest.mark.parametrize(("what", "source", "told"), LISTS, ids=[row[0] for row in LISTS])
def test_there_is_one_list(what: str, source: dict[str, Any], told: dict[str, Any]) -> None:
    config = published_config("v2.5")
    quantization = config["quantization_config"]
    del quantization["ignored_layers"]
    quantization |= source
    out = output_config(config, NATIVE, {1: MXFP4}, {2: "bf16"})["quantization_config"]
    assert {key: out[key] for key in IGNORE_LISTS if key in out} == told
    assert config["quantization_config"] == quantization  # the source's is left alone


def test_a_nested_config_is_written_where_it_stands() -> None:
    config = published_config("v2.5")
    quantization = config.pop("quantization_config")
    quantization["modules_to_not_convert"] = quantization.pop("ignored_layers")
    config["text_config"] = {"quantization_config": quantization}
    out = output_config(config, NATIVE, {1: MXFP4}, {2: "bf16"}, bf16_qkv=[3])
    names = out["text_config"]["quantization_config"]["modules_to_not_convert"]
    assert names[-5:] == [KEPT, *(f"model.layers.3.self_attn.{part}_proj" for part in ("qkv", "q", "k", "v"))]
    assert "quantization_config" not in out and "ignored_layers" not in out["text_config"]["quantization_config"]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"ignored_layers": [ATTENTION], "modules_to_not_convert": [KEPT]}, "of 1 and 1 modules, and .* in one only"),
        ({"ignored_layers": [ATTENTION, KEPT], "modules_to_not_convert": [KEPT]}, "of 2 and 1 modules"),
        ({"ignored_layers": ATTENTION}, "ignored_layers must be a list of modules' names"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert must be a list"),
        ({"modules_to_not_convert": {"lm_head": True}}, "modules_to_not_convert must be a list"),
    ],
)
def test_lists_that_contradict_or_are_none_are_refused(lists: dict[str, Any], said: str) -> None:
    config = published_config("v2.5")
    del config["quantization_config"]["ignored_layers"]
    config["quantization_config"] |= lists
    with pytest.raises(CheckpointError, match=said):
        read_geometry(config, "SOURCE/config.json")
