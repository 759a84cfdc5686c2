"""One model under the keys of many transformers versions: each is read alike, contradicted or unknown ones are refused.

The matrix starts from the micro checkpoint's config in four published spellings; a row moves, renames or contradicts
keys, and says what the forward must read or which words the refusal must have.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mimoquant
from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import drop_text_key, set_text_key, text_keys
from mimoquant.model.decoder_layer import read_forward_config
from mimoquant.model.geometry import read_geometry

Config = dict[str, Any]
MICRO: Config = json.loads((mimoquant.micro_checkpoint() / "config.json").read_text())
READ = {"rope_theta": 5e6, "sliding_rope_theta": 1e4, "partial_rotary_factor": 0.334, "eps": 1e-5, "window": 64}
ROPE = ("rope_theta", "swa_rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling")


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def bare(**more: Any) -> Config:
    """The micro config without any key of rope, and with these."""
    return without(MICRO, *ROPE) | more


FULL = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334}
SLIDING = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334}
BY_TYPE = {"full_attention": FULL, "sliding_attention": SLIDING}
PLAIN = {"rope_theta": 5000000, "swa_rope_theta": 10000, "partial_rotary_factor": 0.334}
FLAT = {"partial_rotary_factor": 0.334, "rope_theta": 5e6, "rope_type": "default", "type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def nested(config: Config, *kept: str) -> Config:
    """All of the text model's keys in `text_config`, but these."""
    top = ("architectures", "model_type", "quantization_config", "auto_map", *kept)
    inner = without(config, *top) | {"model_type": "mimo_v2_text"}
    return {key: config[key] for key in top if key in config} | {"text_config": inner}


def quantization(**changes: Any) -> Config:
    return MICRO | {"quantization_config": MICRO["quantization_config"] | changes}


# what each spelling reads beside READ
READINGS: dict[str, tuple[Config, Config]] = {
    "micro, every place": (MICRO, {}),
    "V2-Flash: integers at the top": (bare(**PLAIN), {}),
    "V2.5: and rope_scaling of the default type": (
        bare(**PLAIN, rope_scaling={"rope_type": "default", "type": "default"}),
        {},
    ),
    "V2.6-Flash: rope_parameters flat": (bare(**PLAIN, rope_parameters=FLAT), {}),
    "transformers 5: by layer type alone": (bare(rope_parameters=BY_TYPE), {}),
    "by layer type, without a type": (
        bare(rope_parameters={kind: without(one, "rope_type") for kind, one in BY_TYPE.items()}),
        {},
    ),
    "by layer type in rope_scaling": (bare(rope_scaling=BY_TYPE), {}),
    "flat, sliding beside it": (bare(rope_parameters=FLAT, swa_rope_theta=1e4), {}),
    "by layer type and a flat rest": (bare(rope_parameters=BY_TYPE | {"rope_type": "default"}), {}),
    "both dictionaries, agreeing": (bare(**PLAIN, rope_parameters=BY_TYPE, rope_scaling={"type": "default"}), {}),
    "partial factor of sliding layers only": (
        bare(rope_parameters={"full_attention": without(FULL, "partial_rotary_factor"), "sliding_attention": SLIDING}),
        {},
    ),
    "null is absent": (bare(**PLAIN, rope_scaling=None, rope_parameters=None), {}),
    "null inside is absent": (bare(**PLAIN, rope_parameters=FLAT | {"factor": None}), {}),
    "another theta": (bare(**PLAIN | {"rope_theta": 1e7}), {"rope_theta": 1e7}),
    "eps under transformers' name": (without(MICRO, "layernorm_epsilon") | {"rms_norm_eps": 1e-6}, {"eps": 1e-6}),
    "eps under the published name": (without(MICRO, "rms_norm_eps") | {"layernorm_epsilon": 1e-6}, {"eps": 1e-6}),
    "window under transformers' name": (without(MICRO, "sliding_window_size"), {}),
    "window under the published name": (without(MICRO, "sliding_window"), {}),
    "torch_dtype": (without(MICRO, "dtype") | {"torch_dtype": "bfloat16"}, {}),
    "torch_dtype with its module": (MICRO | {"torch_dtype": "torch.bfloat16"}, {}),
    "no dtype": (without(MICRO, "dtype"), {}),
    "float32": (without(MICRO, "dtype") | {"dtype": "float32"}, {}),
    "layer types alone": (without(MICRO, "hybrid_layer_pattern", "moe_layer_freq"), {}),
    "published patterns alone": (without(MICRO, "layer_types", "mlp_layer_types"), {}),
    "router in bf16": (MICRO | {"moe_router_dtype": "bfloat16"}, {}),
    "router in float32": (MICRO | {"moe_router_dtype": "float32"}, {}),
    "n_group null": (MICRO | {"n_group": None, "topk_group": None}, {}),
    "scaling factor 1": (MICRO | {"routed_scaling_factor": 1.0}, {}),
    "everything in text_config": (nested(MICRO), {}),
    "text_config beside the same keys": (nested(MICRO) | without(MICRO, "dtype"), {}),
    "half in text_config": (nested(MICRO, "hidden_size", "num_hidden_layers", "rope_theta"), {}),
    "null at the top, told in text_config": (nested(MICRO) | {"rope_theta": None, "vocab_size": None}, {}),
    "quantization_config in text_config": (
        {
            "architectures": MICRO["architectures"],
            "model_type": "mimo_v2",
            "text_config": without(MICRO, "architectures", "model_type"),
        },
        {},
    ),
    "modules_to_not_convert": (quantization(ignored_layers=None, modules_to_not_convert=["lm_head"]), {}),
}

REFUSALS: dict[str, tuple[Config, tuple[str, ...]]] = {
    "yarn in rope_scaling": (MICRO | {"rope_scaling": YARN}, ("rope_scaling", "yarn", "default")),
    "yarn under the old key": (MICRO | {"rope_scaling": {"type": "yarn", "factor": 4}}, ("rope_scaling", "yarn")),
    "yarn in rope_parameters, flat": (bare(**PLAIN, rope_parameters=YARN), ("rope_parameters", "yarn")),
    "yarn of global layers": (
        bare(rope_parameters={"full_attention": FULL | YARN, "sliding_attention": SLIDING}),
        ("rope_parameters.full_attention", "yarn"),
    ),
    "yarn of sliding layers": (
        bare(rope_parameters={"full_attention": FULL, "sliding_attention": SLIDING | YARN}),
        ("rope_parameters.sliding_attention", "yarn"),
    ),
    "linear": (MICRO | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("linear",)),
    "dynamic, flat": (bare(**PLAIN, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), ("dynamic",)),
    "llama3": (MICRO | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("llama3",)),
    "longrope": (bare(**PLAIN, rope_parameters=FLAT | {"rope_type": "longrope"}), ("longrope",)),
    "two types in one dictionary": (MICRO | {"rope_scaling": {"rope_type": "default", "type": "yarn"}}, ("yarn",)),
    "a factor beside the default type": (
        MICRO | {"rope_scaling": {"type": "default", "factor": 4.0}},
        ("factor", "4.0"),
    ),
    "mrope sections": (bare(**PLAIN, rope_parameters=FLAT | {"mrope_section": [8, 8]}), ("mrope_section",)),
    "rope for another kind of layer": (
        bare(rope_parameters=BY_TYPE | {"chunked_attention": FULL}),
        ("chunked_attention",),
    ),
    "yarn inside text_config": (nested(MICRO | {"rope_scaling": YARN}), ("rope_scaling", "yarn")),
    "two thetas": (
        MICRO | {"rope_theta": 1e7},
        ("rope_theta is 10000000.0", "rope_parameters.full_attention", "5000000.0"),
    ),
    "two thetas, flat": (bare(**PLAIN, rope_parameters=FLAT | {"rope_theta": 1e6}), ("5000000", "1000000.0")),
    "two sliding thetas": (
        MICRO | {"swa_rope_theta": 2e4},
        ("swa_rope_theta is 20000.0", "sliding_attention", "10000.0"),
    ),
    "two partial factors": (MICRO | {"partial_rotary_factor": 0.5}, ("0.5", "0.334")),
    "sliding layers turn another part": (
        bare(rope_parameters={"full_attention": FULL, "sliding_attention": SLIDING | {"partial_rotary_factor": 1.0}}),
        ("0.334", "1.0"),
    ),
    "the two dictionaries contradict": (
        bare(
            **without(PLAIN, "rope_theta"), rope_parameters={"rope_theta": 5e6}, rope_scaling=FLAT | {"rope_theta": 1e6}
        ),
        ("1000000.0", "5000000.0"),
    ),
    "no theta of sliding layers": (bare(rope_parameters=FLAT), ("swa_rope_theta",)),
    "a theta as text": (bare(**PLAIN | {"rope_theta": "5e6"}), ("rope_theta", "'5e6'")),
    "a theta that is true": (bare(**PLAIN | {"rope_theta": True}), ("rope_theta", "True")),
    "a theta of zero": (bare(**PLAIN | {"rope_theta": 0}), ("rope_theta", "0")),
    "rope as a list": (bare(**PLAIN, rope_parameters=[FLAT]), ("rope_parameters",)),
    "two eps": (MICRO | {"rms_norm_eps": 1e-6}, ("layernorm_epsilon is 1e-05", "rms_norm_eps is 1e-06")),
    "two windows": (MICRO | {"sliding_window": 128}, ("sliding_window_size is 64", "sliding_window is 128")),
    "two dtypes": (MICRO | {"torch_dtype": "float16"}, ("float16", "bfloat16")),
    "float16": (MICRO | {"dtype": "float16"}, ("dtype is 'float16'",)),
    "two counts of experts": (MICRO | {"num_experts": 16}, ("n_routed_experts is 8", "num_experts is 16")),
    "two attention patterns": (MICRO | {"hybrid_layer_pattern": [0, 0, 1, 0, 1]}, ("layer 1", "sliding_attention")),
    "two patterns of experts": (MICRO | {"moe_layer_freq": [0, 0, 1, 1, 1]}, ("layer 1", "sparse")),
    "layer types of another depth": (MICRO | {"layer_types": MICRO["layer_types"][:-1]}, ("4", "5")),
    "text_config contradicts": (nested(MICRO) | {"hidden_size": 512}, ("hidden_size", "512", "256", "text_config")),
    "text_config contradicts in rope": (nested(MICRO) | {"rope_theta": 1e4}, ("rope_theta", "10000.0", "5000000.0")),
    "text_config is no object": (MICRO | {"text_config": "auto"}, ("text_config",)),
    "router in float16": (MICRO | {"moe_router_dtype": "float16"}, ("moe_router_dtype", "float16")),
    "blocks of another size": (quantization(mxfp4_block_size=16), ("mxfp4_block_size", "16", "32")),
    "another scale format": (quantization(scale_fmt="ue8m0"), ("scale_fmt", "ue8m0")),
    "soft capping": (MICRO | {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping", "50.0")),
    "normed queries": (MICRO | {"use_qk_norm": True}, ("use_qk_norm", "True")),
    "no window after all": (MICRO | {"use_sliding_window": False}, ("use_sliding_window", "False")),
    "a limit inside experts": (MICRO | {"swiglu_limit": 7.0}, ("swiglu_limit", "7.0")),
    "layers without rope": (MICRO | {"no_rope_layers": [1, 1, 1, 0, 1]}, ("no_rope_layers", "[1, 1, 1, 0, 1]")),
    "a shared expert by another name": (MICRO | {"num_shared_experts": 1}, ("num_shared_experts is 1",)),
    "scaled embeddings": (MICRO | {"scale_emb": 12}, ("scale_emb is 12",)),
    "sliding layers scaled by a key of theirs": (
        MICRO | {"swa_rope_scaling": {"type": "yarn"}},
        ("swa_rope_scaling", "yarn"),
    ),
    "biases of q, k, v": (MICRO | {"qkv_bias": True}, ("qkv_bias is True",)),
    "sinks as a number": (MICRO | {"add_swa_attention_sink_bias": 1}, ("add_swa_attention_sink_bias", "1")),
    "normalised weights as a number": (MICRO | {"norm_topk_prob": 1}, ("norm_topk_prob", "1")),
    "interleaved rope": (MICRO | {"rope_interleave": True}, ("rope_interleave",)),
}


def test_the_matrix_is_as_large_as_it_should_be() -> None:
    assert len(READINGS) + len(REFUSALS) >= 60


@pytest.mark.parametrize("name", READINGS)
def test_each_spelling_is_read_as_the_same_model(name: str) -> None:
    config, more = READINGS[name]
    before = copy.deepcopy(config)
    geometry, forward = read_geometry(config, "F/config.json"), read_forward_config(config, "F/config.json")
    assert {key: getattr(forward, key) for key in READ} == READ | more
    known = read_geometry(MICRO, "F/config.json")
    assert geometry == known and config == before


@pytest.mark.parametrize("name", REFUSALS)
def test_what_contradicts_or_is_unknown_is_refused_by_key_and_value(name: str) -> None:
    config, fragments = REFUSALS[name]
    with pytest.raises(CheckpointError) as caught:
        read_geometry(config, "F/config.json")
        read_forward_config(config, "F/config.json")
    message = str(caught.value)
    assert "\n" not in message and all(fragment in message for fragment in ("F/config.json", *fragments)), message


def test_keys_are_written_where_they_stand() -> None:
    inside = {"text_config": {"attention_projection_layout": "fused_qkv"}}
    set_text_key(inside, "attention_projection_layout", "split")
    assert inside == {"text_config": {"attention_projection_layout": "split"}}
    both = {"a": 1, "text_config": {"a": 1}}
    set_text_key(both, "a", 2)
    set_text_key(both, "b", 3)
    assert both == {"a": 2, "text_config": {"a": 2}, "b": 3}
    drop_text_key(both, "a")
    assert both == {"text_config": {}, "b": 3}
    assert text_keys({"a": 1}, "F") == {"a": 1}


@pytest.mark.parametrize("recipe", ["mxfp4-rtn", "int4-g128-rtn"])
def test_a_nested_config_gives_the_same_checkpoint(
    tmp_path: Path, recipe: str, link_micro: Callable[[Config], Path]
) -> None:
    """Quantized from a config whose keys lie in text_config: the same tensors, and a config that reads as the same."""
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    mimoquant.quantize(mimoquant.micro_checkpoint(), recipe, plain, device="cpu")
    mimoquant.quantize(link_micro(nested(MICRO)), recipe, moved, device="cpu")
    for shard in sorted(plain.glob("*.safetensors")):
        assert shard.read_bytes() == (moved / shard.name).read_bytes()
    ours, other = (json.loads((folder / "config.json").read_text()) for folder in (plain, moved))
    assert text_keys(ours, "")["quantization_config"] == text_keys(other, "")["quantization_config"]
    assert read_geometry(ours, "", packed=True) == read_geometry(other, "", packed=True)
    assert mimoquant.verify(moved, link_micro(nested(MICRO)))["ok"]


@pytest.fixture
def link_micro(tmp_path: Path) -> Callable[[Config], Path]:
    """The micro checkpoint under another config."""
    import shutil

    def make(config: Config) -> Path:
        folder = tmp_path / "source"
        if not folder.exists():
            shutil.copytree(mimoquant.micro_checkpoint(), folder)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
