"""What config.json tells of towers: published configs read, and every row that means another forward refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mimoquant.errors import CheckpointError
from mimoquant.model.tower_config import MediaIds, read_tower_config

Config = dict[str, Any]
PUBLISHED_IDS = MediaIds(151655, 151669, 151652, 151653, 151673, 151674)
SMALL: Config = {  # a config with towers, each key once
    "image_token_id": 9,
    "vision_config": {
        "depth": 3,
        "fullatt_block_indexes": [0],
        "hidden_act": "silu",
        "hidden_size": 32,
        "in_chans": 3,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_key_value_heads": 1,
        "num_query_groups": 4,
        "out_hidden_size": 48,
        "patch_size": 4,
        "qk_channels": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "use_sink": True,
        "visual_token_window_size": 3,
        "vit_window_attn_types": [-1, 0, 1],
    },
    "audio_config": {
        "add_post_norm": True,
        "audio_channels": 2,
        "group_size": 4,
        "input_full_attention": True,
        "input_local_attn_heads": 4,
        "input_local_dim": 32,
        "input_local_head_dim": 8,
        "input_local_intermediate_size": 64,
        "input_local_layers": 2,
        "out_hidden_size": 48,
        "partial_rotary_factor": 1.0,
        "projection_layers": 2,
        "rope_theta": 640000,
        "speech_vocab_size": "16",
        "speech_zeroemb_idx": "15",
    },
    "processor_config": {"image_token_id": 9, "audio_token_id": 8},
}


@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2.6-Flash", "MiMo-V2.6-Pro"])
def test_published_configs(name: str, shared: Path) -> None:
    towers = read_tower_config(json.loads((shared / "mimo" / name / "config.json").read_text()), name)
    vision, audio = towers.need_vision(), towers.need_audio()
    assert towers.ids == PUBLISHED_IDS
    assert (vision.heads, vision.kv_heads, vision.head_dim, vision.window, vision.sinks) == (32, 8, 64, 64, True)
    assert (vision.kinds.count(-1), vision.kinds.count(0), vision.kinds.count(1)) == (4, 12, 12)
    assert (audio.codebooks, set(audio.code_counts), audio.group, audio.last_norm) == (20, {1280}, 4, True)
    assert vision.out_hidden == audio.out_hidden == (6144 if name.endswith("Pro") else 4096)


def test_text_only_models_have_neither(shared: Path) -> None:
    config = json.loads((shared / "mimo" / "MiMo-V2.5-Pro" / "config.json").read_text())
    towers = read_tower_config(config, "config.json")
    assert (towers.vision, towers.audio, towers.ids.image) == (None, None, None)
    for need in (towers.need_vision, towers.need_audio, lambda: towers.need_id("audio")):
        with pytest.raises(CheckpointError, match=r"config\.json: has no (vision|audio)_"):
            need()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vision_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu', known is 'silu'"),
    ("vision_config", {"depth": 2}, "vit_window_attn_types is [-1, 0, 1], expected 2 of"),
    ("vision_config", {"vit_window_attn_types": [-1, 0, 2]}, "expected 3 of -1, 0 and 1"),
    ("vision_config", {"fullatt_block_indexes": [0, 2]}, "fullatt_block_indexes is [0, 2], and"),
    ("vision_config", {"fullatt_block_indexes": None}, "makes it [0]: which holds?"),
    ("vision_config", {"num_query_groups": 2}, "do not go together"),
    ("vision_config", {"num_key_value_heads": 3}, "do not go together"),
    ("vision_config", {"in_channels": 1}, "in_chans is 3 and in_channels is 1: which holds?"),
    ("vision_config", {"kv_channels": 8}, "qk_channels is 16 and kv_channels is 8: which holds?"),
    ("vision_config", {"patch_size": 0}, "patch_size is 0, expected a positive whole number"),
    ("vision_config", {"use_sink": 1}, "use_sink is 1, expected true or false"),
    ("vision_config", {"visual_token_window_size": -1}, "visual_token_window_size is -1"),
    ("vision_config", {"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes is [1], known is absent"),
    ("audio_config", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, known is"),
    ("audio_config", {"projection_layers": 1}, "projection_layers is 1, known is 2"),
    ("audio_config", {"input_full_attention": False}, "input_full_attention is False, known is True"),
    ("audio_config", {"input_local_head_dim": 16}, "4 heads of 16 do not make up an input_local_dim of 32"),
    ("audio_config", {"speech_vocab_size": "16-16-16"}, "speech_vocab_size is '16-16-16', expected"),
    ("audio_config", {"speech_vocab_size": "many"}, "speech_vocab_size is 'many', expected"),
    ("audio_config", {"rope_theta": None}, "rope_theta is None, expected a positive number"),
    ("processor_config", {"image_token_id": 7}, "image_token_id is 9 and processor_config.image_token_id is 7"),
    ("processor_config", {"audio_token_id": "8"}, "processor_config.audio_token_id is '8', expected a token's id"),
]


@pytest.mark.parametrize(("part", "change", "words"), REFUSED, ids=[f"{row[0]} {row[1]}" for row in REFUSED])
def test_another_forward_is_refused(part: str, change: dict[str, Any], words: str) -> None:
    config = copy.deepcopy(SMALL)
    config[part] |= change
    with pytest.raises(CheckpointError) as error:
        read_tower_config(config, "config.json")
    assert words in str(error.value)


def test_positions_of_several_numbers_a_token_are_refused() -> None:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    with pytest.raises(CheckpointError, match=r"rope_scaling\.mrope_section is \[16, 24, 24\], known is absent"):
        read_tower_config(SMALL | {"rope_scaling": rope}, "config.json")


def test_a_size_for_each_codebook() -> None:
    config = copy.deepcopy(SMALL)
    config["audio_config"]["speech_vocab_size"] = "16-4"
    assert read_tower_config(config, "config.json").need_audio().code_counts == (16, 4)
