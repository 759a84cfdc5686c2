"""A folder with what an omni model says of its data: tokenizer, template, configs. No weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mimoquant import micro_checkpoint

MARKS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|mimo_audio_start|>",
    "<|mimo_audio_end|>",
    "<|audio_pad|>",
)
VOCAB = 1024 + len(MARKS)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEMPLATE = """{%- macro said(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'audio' -%}<|mimo_audio_start|><|audio_pad|><|mimo_audio_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for turn in messages -%}{{ '<|im_start|>' + turn['role'] + '\n' + said(turn['content']) + '<|im_end|>\n' }}
{%- endfor -%}"""


def omni_folder(folder: Path, **vision: Any) -> Path:
    """Write the micro checkpoint's tokenizer with marks for media, MiMo's template in short, and the configs that say
    how media become tokens: patches of 16, 2 x 2 of them a token, 20 codebooks of 32, 4 frames a token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((micro_checkpoint() / "tokenizer.json").read_text())
    for number, mark in enumerate(MARKS):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 1024 + number, "content": mark})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(micro_checkpoint() / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((micro_checkpoint() / "config.json").read_text())
    ids = {
        "vision_start_token_id": 1024,
        "vision_end_token_id": 1025,
        "image_token_id": 1026,
        "audio_start_token_id": 1027,
        "audio_end_token_id": 1028,
        "audio_token_id": 1029,
    }
    config |= ids | {"vocab_size": VOCAB, "vision_config": VISION | vision, "audio_config": AUDIO}
    config["processor_config"] = ids | {"image_min_pixels": 4096, "image_max_pixels": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    beside = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    beside |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "rescale_factor": 0.00392156862745098}
    (folder / "preprocessor_config.json").write_text(json.dumps(beside))
    return folder


VISION = {
    "depth": 3,
    "fullatt_block_indexes": [0],
    "hidden_act": "silu",
    "hidden_size": 64,
    "in_chans": 3,
    "intermediate_size": 96,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_query_groups": 2,
    "out_hidden_size": 256,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "spatial_patch_size": 16,
    "temporal_patch_size": 2,
    "use_sink": True,
    "visual_token_window_size": 4,
    "vit_window_attn_types": [-1, 0, 1],
}
AUDIO = {
    "add_post_norm": True,
    "audio_channels": 20,
    "group_size": 4,
    "input_full_attention": True,
    "input_local_attn_heads": 2,
    "input_local_dim": 64,
    "input_local_head_dim": 32,
    "input_local_intermediate_size": 96,
    "input_local_layers": 2,
    "out_hidden_size": 256,
    "partial_rotary_factor": 1.0,
    "projection_layers": 2,
    "rope_theta": 640000,
    "speech_vocab_size": "32",
}
