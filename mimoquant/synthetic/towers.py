"""Vision and audio towers for a checkpoint in V2.5's layout: what config.json says of them, and their tensors.

Small ones by default. Every kind of block, tensor and key of the real ones is there, so that engines load them: a block
of each kind, sinks where there is a window, several codebooks, the published spelling of their number. Token ids end
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerSizes:
    """Of the vision tower, then of the audio tower. `kinds`: of the vision blocks, -1 full, 0 and 1 in windows."""

    kinds: tuple[int, ...] = (-1, 0, 1, 1, 0, -1)
    hidden: int = 32
    inner: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    patch: int = 4
    window: int = 6  # image tokens to each side
    sound_hidden: int = 32
    sound_inner: int = 64
    sound_heads: int = 4
    layers: int = 2
    codebooks: int = 4
    codes: int = 16
    group: int = 4


SMALL = TowerSizes()
_IDS = (  # from the end of the vocabulary
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
    "audio_start_token_id",
    "audio_end_token_id",
)
_AT_THE_TOP = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def tower_config(hidden: int, vocab: int, sizes: TowerSizes = SMALL) -> dict[str, Any]:
    """vision_config, audio_config, processor_config and token ids, as V2.5's config.json has them."""
    ids = {name: max(0, vocab - 1 - place) for place, name in enumerate(_IDS)}
    return {name: ids[name] for name in _AT_THE_TOP} | {
        "vision_model_type": "mimovl",
        "vision_config": _vision_config(hidden, sizes),
        "audio_config": _audio_config(hidden, sizes),
        "processor_config": ids
        | {
            "patch_size": sizes.patch,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_min_pixels": 4 * (2 * sizes.patch) ** 2,
            "image_max_pixels": 256 * (2 * sizes.patch) ** 2,
            "audio_channels": sizes.codebooks,
            "audio_group_size": sizes.group,
            "audio_sampling_rate": 24000,
            "pad_token_id": 0,
            "rope_type": "rope",
        },
    }


def _vision_config(hidden: int, sizes: TowerSizes) -> dict[str, Any]:
    return {
        "depth": len(sizes.kinds),
        "fullatt_block_indexes": [block for block, kind in enumerate(sizes.kinds) if kind == -1],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "in_chans": 3,
        "intermediate_size": sizes.inner,
        "kv_channels": sizes.head_dim,
        "num_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "num_query_groups": sizes.heads // sizes.kv_heads,
        "out_hidden_size": hidden,
        "patch_size": sizes.patch,
        "qk_channels": sizes.head_dim,
        "spatial_merge_size": 2,
        "spatial_patch_size": sizes.patch,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "use_sink": True,
        "visual_token_window_size": sizes.window,
        "vit_window_attn_types": list(sizes.kinds),
        "window_size": 2 * sizes.window,
    }


def _audio_config(hidden: int, sizes: TowerSizes) -> dict[str, Any]:
    return {
        "add_post_norm": True,
        "audio_channels": sizes.codebooks,
        "audio_segment_size": 6000,
        "group_size": sizes.group,
        "input_full_attention": True,
        "input_local_attn_heads": sizes.sound_heads,
        "input_local_dim": sizes.sound_hidden,
        "input_local_head_dim": sizes.sound_hidden // sizes.sound_heads,
        "input_local_hidden_dropout": 0.0,
        "input_local_intermediate_size": sizes.sound_inner,
        "input_local_layers": sizes.layers,
        "out_hidden_size": hidden,
        "partial_rotary_factor": 1.0,
        "projection_layers": 2,
        "rope_theta": 640000,
        "speech_vocab_size": str(sizes.codes),
        "speech_zeroemb_idx": str(sizes.codes - 1),
    }


def tower_tensors(hidden: int, sizes: TowerSizes = SMALL) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, all bf16."""
    heads = {
        "attn.qkv": ((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, sizes.hidden),
        "attn.proj": (sizes.hidden, sizes.heads * sizes.head_dim),
    }
    for block, kind in enumerate(sizes.kinds):
        for name, shape in (heads | _mlp(sizes.hidden, sizes.inner)).items():
            yield f"visual.blocks.{block}.{name}.weight", shape
            yield f"visual.blocks.{block}.{name}.bias", shape[:1]
        for norm in ("norm1", "norm2"):
            yield f"visual.blocks.{block}.{norm}.weight", (sizes.hidden,)
        if kind != -1:
            yield f"visual.blocks.{block}.attn.sinks", (sizes.heads,)
    local, sounds = "audio_encoder.input_local_transformer.", sizes.sound_hidden
    for layer in range(sizes.layers):
        products = {f"self_attn.{letter}_proj": (sounds, sounds) for letter in "qkvo"}
        for name, shape in (_mlp(sounds, sizes.sound_inner) | products).items():
            yield f"{local}layers.{layer}.{name}.weight", shape
        for letter in "qkv":
            yield f"{local}layers.{layer}.self_attn.{letter}_proj.bias", (sounds,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{local}layers.{layer}.{norm}.weight", (sounds,)
    for codebook in range(sizes.codebooks):
        yield f"speech_embeddings.{codebook}.weight", (sizes.codes, sounds)
    yield "visual.patch_embed.proj.weight", (sizes.hidden, 3, 2, sizes.patch, sizes.patch)
    merged, grouped = 4 * sizes.hidden, sizes.group * sounds
    for module, inner, outer in (
        ("visual.merger.mlp", merged, merged),
        ("audio_encoder.projection.mlp", grouped, 4 * grouped),
    ):
        yield f"{module}.0.weight", (outer, inner)
        yield f"{module}.2.weight", (hidden, outer)
    yield "visual.merger.ln_q.weight", (sizes.hidden,)
    yield f"{local}norm.weight", (sounds,)


def _mlp(hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
