"""Every tensor has a known role, shape and dtype, or the run stops and says which one has not."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counted import calls_in, cost_of_run

import mimoquant
from mimoquant.checkpoint.index import open_index
from mimoquant.errors import CheckpointError
from mimoquant.model.geometry import read_geometry
from mimoquant.model.layout import ModelLayout, read_layout
from mimoquant.model.releases import Release, release_of
from mimoquant.planning.facts import expert_placement
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
DENSE = "model.layers.0.mlp.up_proj.weight"
Config = Callable[..., dict[str, Any]]


def layout_of(folder: Path, **options: Any) -> ModelLayout:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return read_layout(open_index(folder), config, **options)


def refused(folder: Path, *fragments: object) -> CheckpointError:
    """The refusal: one sentence that names the folder and every fragment."""
    with pytest.raises(CheckpointError) as caught:
        layout_of(folder)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    for fragment in (str(folder), *fragments):
        assert str(fragment) in message, f"{fragment!r} is not in: {message}"
    return caught.value


def config_refused(config: dict[str, Any], *fragments: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_geometry(config, "F/config.json")
    for fragment in ("F/config.json", *fragments):
        assert str(fragment) in str(caught.value), f"{fragment!r} is not in: {caught.value}"
    assert "\n" not in str(caught.value)


def all_names(layout: ModelLayout) -> list[str]:
    """The tensor names that the layout accounts for: weights and their scales."""
    weights = [weight for unit in layout.units.values() for weight in unit] + list(layout.experts.values())
    return [info.name for weight in weights for info in (weight.info, weight.scale) if info is not None]


@pytest.mark.parametrize(
    "settings",
    [{}, {"fp8": True}, {"fused": True, "mtp": 1}, {"fp8": True, "fused": True, "mtp": 2}],
    ids=["bf16", "fp8", "fused", "fp8 fused"],
)
def test_a_small_checkpoint_is_understood_to_the_last_tensor(
    tiny_checkpoint: Callable[..., Path], settings: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(**settings)
    layout = layout_of(folder)
    assert sorted(all_names(layout)) == sorted(layout.index.tensors)
    assert layout.geometry.moe_layers == [1, 2] and layout.geometry.sliding == (False, True, False)
    assert layout.mtp_layers == settings.get("mtp", 0) and layout.unknown == []
    assert len(layout.experts) == 2 * 4 * 3
    assert (layout.expert(1, 2, "gate").scale is not None) == settings.get("fp8", False)
    assert layout.expert(1, 2, "gate").name == GATE and layout.expert(2, 3, "down").info.shape == (128, 128)


@pytest.mark.parametrize(("model", "mtp"), [("mimo-tiny", 3), ("mimo-tiny-official", 3)])
def test_the_trained_small_models_are_understood(shared: Path, model: str, mtp: int) -> None:
    folder = shared / "models" / model
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    layout = layout_of(folder)
    assert sorted(all_names(layout)) == sorted(layout.index.tensors)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert {name: info.file for name, info in layout.index.tensors.items()} == weight_map
    assert layout.mtp_layers == mtp and layout.geometry.moe_layers == list(range(1, 8))
    assert layout.geometry.fused_qkv == ("official" in model)


def test_names_in_layer_types_mean_the_same_as_zeros_and_ones(tiny_checkpoint: Callable[..., Path]) -> None:
    def edit(checkpoint: Any) -> None:
        del checkpoint.config["hybrid_layer_pattern"], checkpoint.config["moe_layer_freq"]
        checkpoint.config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
        checkpoint.config["mlp_layer_types"] = ["dense", "sparse", "sparse"]

    assert layout_of(tiny_checkpoint(edit=edit)).geometry == layout_of(tiny_checkpoint(name="plain")).geometry


@pytest.mark.parametrize(
    "name",
    [
        GATE,
        DENSE,
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.1.self_attn.attention_sink_bias",
    ],
)
def test_a_missing_tensor_is_named(tiny_checkpoint: Callable[..., Path], name: str) -> None:
    refused(tiny_checkpoint(edit=lambda checkpoint: checkpoint.tensors.pop(name)), name, "missing")


def test_an_unknown_tensor_is_named_unless_allowed(tiny_checkpoint: Callable[..., Path]) -> None:
    def edit(checkpoint: Any) -> None:
        checkpoint.tensors["model.layers.1.mlp.shared_experts.gate_proj.weight"] = checkpoint.tensors[GATE]
        checkpoint.tensors["zzz"] = checkpoint.tensors[GATE]

    folder = tiny_checkpoint(edit=edit)
    error = refused(folder, "2 tensors", "model.layers.1.mlp.shared_experts.gate_proj.weight", "[128, 128]")
    assert "--allow-unknown" in (error.hint or "")
    layout = layout_of(folder, allow_unknown=True)
    assert layout.unknown == ["model.layers.1.mlp.shared_experts.gate_proj.weight", "zzz"]
    assert [weight.role for weight in layout.units["unknown"]] == ["unknown"] * 2


@pytest.mark.parametrize("name", ["visual.blocks.0.attn.proj.bias", "audio_encoder.x", "speech_embeddings.3.weight"])
def test_towers_pass_by_prefix(tiny_checkpoint: Callable[..., Path], name: str) -> None:
    layout = layout_of(tiny_checkpoint(edit=lambda c: c.tensors.update({name: c.tensors["model.norm.weight"]})))
    assert [weight.name for weight in layout.units["towers"]] == [name]


def test_a_wrong_shape_names_both(tiny_checkpoint: Callable[..., Path]) -> None:
    def transpose(checkpoint: Any) -> None:
        checkpoint.tensors[DENSE] = dataclasses.replace(checkpoint.tensors[DENSE], shape=(128, 256))

    refused(tiny_checkpoint(edit=transpose), DENSE, [128, 256], [256, 128])


def test_a_wrong_dtype_names_both(tiny_checkpoint: Callable[..., Path]) -> None:
    def narrow(checkpoint: Any) -> None:
        checkpoint.tensors[GATE] = dataclasses.replace(checkpoint.tensors[GATE], dtype="U8", data=bytes(128 * 128))

    refused(tiny_checkpoint(edit=narrow), GATE, "U8", "F8_E4M3 or BF16")


def edit_scale(change: Callable[[np.ndarray], np.ndarray | None], name: str = GATE) -> Callable[[Any], None]:
    def edit(checkpoint: Any) -> None:
        scale = checkpoint.tensors.pop(f"{name}_scale_inv")
        changed = change(np.frombuffer(scale.data, np.float32).reshape(scale.shape))
        if changed is not None:
            checkpoint.tensors[f"{name}_scale_inv"] = dataclasses.replace(
                scale, shape=changed.shape, data=np.ascontiguousarray(changed).tobytes()
            )

    return edit


def test_a_weight_without_its_scale_is_named(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(fp8=True, edit=edit_scale(lambda scale: None))
    refused(folder, f"{GATE} is FP8 but {GATE}_scale_inv is missing")


def test_a_scale_of_the_wrong_shape_names_both(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(fp8=True, edit=edit_scale(lambda scale: np.repeat(scale, 2, axis=0)))
    refused(folder, f"{GATE}_scale_inv", [2, 1], [1, 1])


def test_a_cropped_qkv_scale_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    """One padded block per rank, not ceil(rows / 128): the published trap in small."""
    name = "model.layers.0.self_attn.qkv_proj.weight"
    sizes = {"num_attention_heads": 4, "head_dim": 64, "v_head_dim": 32}  # 256 + 128 + 64 rows, 224 a rank
    tiny_checkpoint(fp8=True, fused=True, name="whole", **sizes)
    whole = layout_of(tiny_checkpoint(fp8=True, fused=True, name="whole", **sizes))
    assert [w.scale.shape for w in whole.units["layer 0"] if w.name == name and w.scale] == [(4, 1)]
    folder = tiny_checkpoint(fp8=True, fused=True, edit=edit_scale(lambda scale: scale[:3], name), **sizes)
    refused(folder, [4, 1], "F32[3, 1]", f"{name}_scale_inv")


def test_fp8_weights_without_a_quantization_config_are_what_they_are(tiny_checkpoint: Callable[..., Path]) -> None:
    """Blocks of 128x128 can be seen in the files; under the config of another method they are a contradiction."""

    def lost(checkpoint: Any) -> None:
        del checkpoint.config["quantization_config"]

    def other(checkpoint: Any) -> None:
        checkpoint.config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}

    folder = tiny_checkpoint(fp8=True, edit=lost)
    assert layout_of(folder).experts == layout_of(tiny_checkpoint(fp8=True, name="kept")).experts
    with pytest.raises(CheckpointError, match=r"is FP8, config\.json has no quantization_config for it"):
        mimoquant.inspect(tiny_checkpoint(fp8=True, edit=other, name="other"))


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("model_type", "deepseek_v3", "mimo_v2_flash, mimo_v2"),
        ("model_type", None, "mimo_v2"),
        ("model_type", ["mimo_v2"], "mimo_v2"),
        ("architectures", 3, "MiMoV2"),
        ("architectures", [], "MiMoV2"),
        ("architectures", [3], "MiMoV2"),
        ("architectures", None, "MiMoV2"),
        ("architectures", "MiMoV2ForCausalLM", "a list"),
        ("scoring_func", "softmax", "'sigmoid'"),
        ("scoring_func", None, "'sigmoid'"),
        ("topk_method", "greedy", "'noaux_tc'"),
        ("hidden_act", "gelu", "'silu'"),
        ("n_group", 8, "1"),
        ("topk_group", 4, "1"),
        ("norm_topk_prob", False, "True"),
        ("norm_topk_prob", 1, "True"),
        ("n_shared_experts", 1, "absent"),
        ("routed_scaling_factor", 2.5, "1.0"),
        ("tie_word_embeddings", True, "False"),
        ("attention_bias", True, "False"),
        ("attention_projection_layout", "fused_kv", "'fused_qkv'"),
        ("num_hidden_layers", 5000, "5000"),
        ("hidden_size", 0, "positive"),
        ("hidden_size", "128", "positive"),
        ("n_routed_experts", None, "positive"),
        ("vocab_size", True, "positive"),
        ("num_experts_per_tok", 2.0, "positive"),
        ("moe_layer_freq", [0, 1], "3 zeros and ones"),
        ("moe_layer_freq", [0, 1, 2], "3 zeros and ones"),
        ("hybrid_layer_pattern", 5, "3 zeros and ones"),
        ("hybrid_layer_pattern", None, "3 zeros and ones"),
        ("quantization_config", [], "not an object"),
    ],
)
def test_an_unknown_config_value_is_named_with_what_is_known(
    tiny_config: Config, key: str, value: Any, known: str
) -> None:
    shown = [] if isinstance(value, list) or value in (5, None) else [repr(value)]
    config_refused(tiny_config(**{key: value}), key, known, *shown)


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("weight_block_size", [64, 128], "[128, 128]"),
        ("weight_block_size", None, "[128, 128]"),
        ("quant_method", "gptq", "'fp8'"),
        ("fmt", "e5m2", "'e4m3'"),
        ("activation_scheme", "static", "'dynamic'"),
        ("store_dtype", "int8", "'fp8'"),
    ],
)
def test_an_unknown_fp8_setting_is_named_with_what_is_known(
    tiny_config: Config, key: str, value: Any, known: str
) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]} | {key: value}
    config_refused(tiny_config(quantization_config=settings), f"quantization_config.{key}", repr(value), known)


def test_unknown_rope_scaling_is_refused(tiny_config: Config) -> None:
    config_refused(tiny_config(rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_scaling", "yarn", "default")
    read_geometry(tiny_config(rope_scaling={"type": "default"}), "F/config.json")


@pytest.mark.parametrize("value", ["yarn", ["yarn"], 3])
def test_rope_scaling_of_another_type_is_refused(tiny_config: Config, value: Any) -> None:
    config_refused(tiny_config(rope_scaling=value), "rope_scaling")


def test_a_fused_qkv_that_does_not_split_over_its_ranks_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(fused=True, swa_num_attention_heads=3, swa_head_dim=25)
    refused(folder, "75", "2")


def test_scales_are_found_in_other_files(tiny_checkpoint: Callable[..., Path]) -> None:
    """Experts over two shards, one of them cut in two and one weight parted from its scale."""
    experts = ".mlp.experts."

    def shard_of(name: str) -> int:
        if name == f"{GATE}_scale_inv" or "layers.2.mlp.experts.3.down" in name:
            return 2
        return 1 if experts in name else 3

    folder = tiny_checkpoint(fp8=True, edit=lambda checkpoint: setattr(checkpoint, "shard_of", shard_of))
    layout = layout_of(folder)
    weight = layout.expert(1, 2, "gate")
    assert weight.scale is not None
    assert (weight.info.file, weight.scale.file) == ("model-1.safetensors", "model-2.safetensors")
    split_layers, parted = expert_placement(layout)
    assert [str(layer) for layer in split_layers] == ["2"] and parted == [GATE]


def published(shared: Path, kind: str, folder: Path) -> Path:
    """A whole published checkpoint as sparse files: true names, sizes and offsets, no payload."""
    tool = shared / "tools" / "make_sparse_checkpoint.py"
    if not tool.is_file():
        pytest.skip(f"{tool} is not there")
    subprocess.run([sys.executable, tool, kind, folder], check=True, capture_output=True)
    return folder


CALLS_A_TENSOR = 120  # of functions: 108 at most today, which is some 3 s for Flash's 73,081 tensors on two quiet cores


@pytest.mark.slow
def test_the_published_v25_is_understood_and_planned_in_seconds(shared: Path, tmp_path: Path) -> None:
    folder = published(shared, "v25", tmp_path / "v25")
    layout = layout_of(folder)
    assert len(layout.index.tensors) == 73_081 and len(all_names(layout)) == 73_081
    assert layout.index.size_bytes == 315_031_102_208 == layout.index.metadata["total_size"]
    assert release_of(layout) == Release("MiMo-V2.5", ("XiaomiMiMo/MiMo-V2.5",)) and layout.mtp_layers == 3
    split_layers, parted = expert_placement(layout)
    assert [str(layer) for layer in split_layers] == ["43"]
    assert sorted(parted) == sorted(f"model.layers.43.mlp.experts.{32 * r + 31}.up_proj.weight" for r in range(8))
    for recipe in ("int4-g128-rtn", "mxfp4-rtn"):
        plan, count = calls_in(lambda recipe=recipe: make_plan(folder, load_recipe(recipe)))
        assert count < CALLS_A_TENSOR * 73_081, f"{recipe}: {count} calls"
        assert list(plan.formats) == list(range(1, 48)) and len(plan.units) == 52
        quantized = sum(math.prod(weight.info.shape) for weight in layout.experts.values())
        assert quantized == 47 * 256 * 3 * 2048 * 4096
        assert quantized / 2 < plan.tensor_bytes < 0.62 * layout.index.size_bytes


@pytest.mark.slow
def test_the_published_pro_is_understood_and_planned(shared: Path, tmp_path: Path) -> None:
    folder = published(shared, "pro", tmp_path / "pro")
    layout = layout_of(folder)
    assert len(layout.index.tensors) == 159_581 == len(all_names(layout))
    assert layout.index.size_bytes == 1_033_369_538_304
    assert release_of(layout) == Release("MiMo-V2.5-Pro", ("XiaomiMiMo/MiMo-V2.5-Pro",))
    plan, count = calls_in(lambda: make_plan(folder, load_recipe("int4-g128-rtn")))
    assert len(plan.formats) == 69 and count < CALLS_A_TENSOR * 159_581, f"{count} calls"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tensors", "size_bytes", "memory_mb"),
    [("v26-flash", 73_081, 172_923_364_096, 400), ("v26-pro", 160_040, 566_027_990_784, 800)],
)
def test_the_published_v26_is_inspected_and_planned_in_seconds(
    shared: Path, tmp_path: Path, kind: str, tensors: int, size_bytes: int, memory_mb: int
) -> None:
    """Each verb in a process of its own: the functions it calls, start and imports with them, and the most memory it
    had."""
    folder = published(shared, kind, tmp_path / kind)
    layout = layout_of(folder, packed=True)
    assert len(layout.index.tensors) == tensors and layout.index.size_bytes == size_bytes and not layout.unknown
    assert release_of(layout) == Release(
        f"MiMo-V2.6-{kind[4:].title()}", tuple(f"XiaomiMiMo/MiMo-V2.6-{kind[4:].title()}-{x}" for x in ("RL", "MOPD"))
    )
    for verb in ("inspect", "plan -r nvfp4-cast", "plan -r int4-g128-rtn", "plan -r gptq-int4-g128"):
        count, most_kb = cost_of_run(*verb.split(), folder)
        assert count < CALLS_A_TENSOR * tensors, f"{verb}: {count} calls"
        assert most_kb < memory_mb * 1024, f"{verb}: {most_kb} kB"


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "fp8", "store_dtype": "mxfp4"}, {"quant_method": "compressed-tensors"}]
)
def test_a_source_that_is_quantized_already_is_refused(quantization: dict[str, Any]) -> None:
    config = json.loads((mimoquant.micro_checkpoint() / "config.json").read_text())
    config["quantization_config"] |= quantization
    with pytest.raises(CheckpointError, match="quantized already"):
        read_geometry(config, "config.json")
    assert read_geometry(config, "config.json", packed=True).experts == 8


def beside_gate(
    suffix: str, dtype: str, *shape: int, gate: str | None = None, name: str = GATE
) -> Callable[[Any], None]:
    """Puts `<module>.suffix` into a checkpoint; `gate` changes the weight's dtype as well."""

    def edit(checkpoint: Any) -> None:
        plain, rng = checkpoint.tensors[GATE], np.random.default_rng(0)
        if gate is not None:
            checkpoint.tensors[GATE] = type(plain).random(gate, plain.shape, rng)
        data = bytes(math.prod(shape) * {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "U8": 1}[dtype])
        checkpoint.tensors[name.removesuffix("weight") + suffix] = type(plain)(dtype, shape, data)

    return edit


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("BF16", (1, 1)), ("BF16", (128, 1)), ("U8", (128, 4)), ("F32", (128, 1))],
    ids=["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "F32 by channel"],
)
def test_fp8_experts_of_another_kind_are_refused(
    tiny_checkpoint: Callable[..., Path], dtype: str, shape: tuple[int, ...]
) -> None:
    """The peer's FP8 schemes share the names of ours; read as F32 blocks they would give other values."""
    folder = tiny_checkpoint(edit=beside_gate("weight_scale", dtype, *shape, gate="F8_E4M3"))
    with pytest.raises(CheckpointError, match=f"{GATE} is F8_E4M3.*with scales {dtype}.*F32"):
        layout_of(folder, allow_unknown=True, packed=True)


def test_fp8_experts_of_a_carve_out_are_read(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(edit=beside_gate("weight_scale", "F32", 1, 1, gate="F8_E4M3"))
    scale = layout_of(folder, packed=True).expert(1, 2, "gate").scale
    assert scale is not None and scale.shape == (1, 1)


def test_codes_of_another_dtype_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    """They were taken for codes of 4-bit floats."""

    def edit(checkpoint: Any) -> None:
        beside_gate("weight_packed", "U32", 128, 16)(checkpoint)
        beside_gate("weight_scale", "BF16", 128, 1)(checkpoint)
        del checkpoint.tensors[GATE]

    with pytest.raises(CheckpointError, match=r"gate_proj\.weight_packed is U32, codes are I32 or U8"):
        layout_of(tiny_checkpoint(edit=edit), packed=True)


@pytest.mark.parametrize("suffix", ["weight_g_idx", "weight_scale_2", "bias"])
def test_an_unknown_part_of_an_expert_is_never_passed_over(tiny_checkpoint: Callable[..., Path], suffix: str) -> None:
    with pytest.raises(CheckpointError, match=f"gate_proj.{suffix} belongs to an expert"):
        layout_of(tiny_checkpoint(edit=beside_gate(suffix, "I32", 128)), allow_unknown=True, packed=True)


def test_scales_of_activations_are_no_part_of_a_weight(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(edit=beside_gate("input_global_scale", "F32", 1))
    assert len(layout_of(folder, allow_unknown=True, packed=True).unknown) == 1


def test_quantized_attention_is_named_as_such(tiny_checkpoint: Callable[..., Path]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def edit(checkpoint: Any) -> None:
        beside_gate("weight_packed", "I32", 128, 8, name=name)(checkpoint)
        del checkpoint.tensors[name]

    with pytest.raises(CheckpointError, match=f"{name}_packed: is quantized, which only routed experts may be"):
        layout_of(tiny_checkpoint(edit=edit), allow_unknown=True, packed=True)


@pytest.mark.parametrize("location", ["input", "output", "weight_input"])
def test_rotations_of_activations_are_refused(tiny_config: Config, location: str) -> None:
    """The peer's QuIP leaves half of each rotation to the engine; weights alone are then another model."""
    transforms = {
        "config_groups": {"v": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location}]}}
    }
    config = tiny_config(quantization_config={"quant_method": "compressed-tensors", "transform_config": transforms})
    if location.startswith("weight_"):
        assert read_geometry(config, "F/config.json", packed=True).experts == 4
        return
    with pytest.raises(CheckpointError, match=f"rotates activations \\(location '{location}'\\)"):
        read_geometry(config, "F/config.json", packed=True)
