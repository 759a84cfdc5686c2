"""Small vision and audio towers for a checkpoint in V2.5's layout: what config.json says of them, and their tensors.

Every kind of block, tensor and key of the real ones is there, so that engines load them: a block of each kind, sinks
where there is a window, several codebooks, the published spelling of their number. Token ids end the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_KINDS = (-1, 0, 1, 1, 0, -1)  # of vision blocks
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM, _PATCH = 32, 64, 4, 2, 16, 4
_CODEBOOKS, _CODES, _LAYERS, _GROUP = 4, 16, 2, 4
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


def tower_config(hidden: int, vocab: int) -> dict[str, Any]:
    """vision_config, audio_config, processor_config and token ids, as V2.5's config.json has them."""
    ids = {name: max(0, vocab - 1 - place) for place, name in enumerate(_IDS)}
    return {name: ids[name] for name in _AT_THE_TOP} | {
        "vision_model_type": "mimovl",
        "vision_config": _vision_config(hidden),
        "audio_config": _audio_config(hidden),
        "processor_config": ids
        | {
            "patch_size": _PATCH,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_min_pixels": 4 * (2 * _PATCH) ** 2,
            "image_max_pixels": 256 * (2 * _PATCH) ** 2,
            "audio_channels": _CODEBOOKS,
            "audio_group_size": _GROUP,
            "audio_sampling_rate": 24000,
            "pad_token_id": 0,
            "rope_type": "rope",
        },
    }


def _vision_config(hidden: int) -> dict[str, Any]:
    return {
        "depth": len(_KINDS),
        "fullatt_block_indexes": [block for block, kind in enumerate(_KINDS) if kind == -1],
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "in_chans": 3,
        "intermediate_size": _INNER,
        "kv_channels": _HEAD_DIM,
        "num_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "num_query_groups": _HEADS // _KV_HEADS,
        "out_hidden_size": hidden,
        "patch_size": _PATCH,
        "qk_channels": _HEAD_DIM,
        "spatial_merge_size": 2,
        "spatial_patch_size": _PATCH,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "use_sink": True,
        "visual_token_window_size": 6,
        "vit_window_attn_types": list(_KINDS),
        "window_size": 12,
    }


def _audio_config(hidden: int) -> dict[str, Any]:
    return {
        "add_post_norm": True,
        "audio_channels": _CODEBOOKS,
        "audio_segment_size": 6000,
        "group_size": _GROUP,
        "input_full_attention": True,
        "input_local_attn_heads": 4,
        "input_local_dim": _HIDDEN,
        "input_local_head_dim": _HIDDEN // 4,
        "input_local_hidden_dropout": 0.0,
        "input_local_intermediate_size": _INNER,
        "input_local_layers": _LAYERS,
        "out_hidden_size": hidden,
        "partial_rotary_factor": 1.0,
        "projection_layers": 2,
        "rope_theta": 640000,
        "speech_vocab_size": str(_CODES),
        "speech_zeroemb_idx": str(_CODES - 1),
    }


def tower_tensors(hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, all bf16."""
    mlp = {
        "mlp.gate_proj": (_INNER, _HIDDEN),
        "mlp.up_proj": (_INNER, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INNER),
    }
    heads = {
        "attn.qkv": ((_HEADS + 2 * _KV_HEADS) * _HEAD_DIM, _HIDDEN),
        "attn.proj": (_HIDDEN, _HEADS * _HEAD_DIM),
    }
    for block, kind in enumerate(_KINDS):
        for name, shape in (heads | mlp).items():
            yield f"visual.blocks.{block}.{name}.weight", shape
            yield f"visual.blocks.{block}.{name}.bias", shape[:1]
        for norm in ("norm1", "norm2"):
            yield f"visual.blocks.{block}.{norm}.weight", (_HIDDEN,)
        if kind != -1:
            yield f"visual.blocks.{block}.attn.sinks", (_HEADS,)
    local = "audio_encoder.input_local_transformer."
    for layer in range(_LAYERS):
        for name, shape in (mlp | {f"self_attn.{letter}_proj": (_HIDDEN, _HIDDEN) for letter in "qkvo"}).items():
            yield f"{local}layers.{layer}.{name}.weight", shape
        for letter in "qkv":
            yield f"{local}layers.{layer}.self_attn.{letter}_proj.bias", (_HIDDEN,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{local}layers.{layer}.{norm}.weight", (_HIDDEN,)
    for codebook in range(_CODEBOOKS):
        yield f"speech_embeddings.{codebook}.weight", (_CODES, _HIDDEN)
    yield "visual.patch_embed.proj.weight", (_HIDDEN, 3, 2, _PATCH, _PATCH)
    merged, grouped = 4 * _HIDDEN, _GROUP * _HIDDEN
    for module, inner, outer in (
        ("visual.merger.mlp", merged, merged),
        ("audio_encoder.projection.mlp", grouped, 4 * grouped),
    ):
        yield f"{module}.0.weight", (outer, inner)
        yield f"{module}.2.weight", (hidden, outer)
    for name in ("visual.merger.ln_q.weight", f"{local}norm.weight"):
        yield name, (_HIDDEN,)
