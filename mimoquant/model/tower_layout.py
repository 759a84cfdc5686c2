"""What every tensor of the towers is: names and shapes from config.json, as `layout` has them of the text model.

Key idea: a text-only run copies towers by prefix and does not ask; a run with media must know every one of them. What
is missing, misshapen or unknown stops it. Biases that the published files lack, and that other writers of this family
give the merger, are used where they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from mimoquant.errors import CheckpointError
from mimoquant.model.layout import ModelLayout
from mimoquant.model.tower_config import FULL, AudioConfig, TowerConfig, VisionConfig

Row = tuple[str, tuple[int, ...]]
LOCAL = "audio_encoder.input_local_transformer."
_DTYPES = ("BF16", "F32")
OPTIONAL = ("visual.merger.ln_q.bias", "visual.merger.mlp.0.bias", "visual.merger.mlp.2.bias")


def vision_rows(config: VisionConfig) -> Iterator[Row]:
    """Names and shapes of `visual.*`."""
    hidden, inner, pixels = config.hidden, config.intermediate, (config.temporal_patch, config.patch, config.patch)
    yield "visual.patch_embed.proj.weight", (hidden, config.channels, *pixels)
    products = {
        "attn.qkv": ((config.heads + 2 * config.kv_heads) * config.head_dim, hidden),
        "attn.proj": (hidden, config.heads * config.head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for block, kind in enumerate(config.kinds):
        prefix = f"visual.blocks.{block}."
        for norm in ("norm1", "norm2"):
            yield f"{prefix}{norm}.weight", (hidden,)
        for name, shape in products.items():
            yield f"{prefix}{name}.weight", shape
            yield f"{prefix}{name}.bias", shape[:1]
        if config.sinks and kind != FULL:
            yield f"{prefix}attn.sinks", (config.heads,)
    yield "visual.merger.ln_q.weight", (hidden,)
    yield "visual.merger.mlp.0.weight", (config.merged, config.merged)
    yield "visual.merger.mlp.2.weight", (config.out_hidden, config.merged)


def audio_rows(config: AudioConfig) -> Iterator[Row]:
    """Names and shapes of `speech_embeddings.*` and `audio_encoder.*`."""
    hidden, inner, grouped = config.hidden, config.intermediate, config.grouped
    for codebook, codes in enumerate(config.code_counts):
        yield f"speech_embeddings.{codebook}.weight", (codes, hidden)
    for layer in range(config.layers):
        prefix = f"{LOCAL}layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        for letter in "qkvo":
            yield f"{prefix}self_attn.{letter}_proj.weight", (hidden, hidden)
        for letter in "qkv":
            yield f"{prefix}self_attn.{letter}_proj.bias", (hidden,)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"{prefix}mlp.{name}_proj.weight", shape
    if config.last_norm:
        yield f"{LOCAL}norm.weight", (hidden,)
    yield "audio_encoder.projection.mlp.0.weight", (4 * grouped, grouped)
    yield "audio_encoder.projection.mlp.2.weight", (config.out_hidden, 4 * grouped)


def check_towers(layout: ModelLayout, config: TowerConfig) -> None:
    """Hold the checkpoint's tower tensors against config.json.

    Raises CheckpointError for one that is missing, unknown, or of another shape or dtype, and for a tower that does not
    end in the text model's width.
    """
    where, hidden = str(layout.index.folder), layout.geometry.hidden
    for name, tower in (("vision_config", config.vision), ("audio_config", config.audio)):
        if tower is not None and tower.out_hidden != hidden:
            raise CheckpointError(
                f"{config.where}: {name}.out_hidden_size is {tower.out_hidden}, hidden_size is {hidden}"
            )
    left = {weight.name: weight.info for weight in layout.units.get("towers", [])}
    rows = [*(vision_rows(config.vision) if config.vision else ()), *(audio_rows(config.audio) if config.audio else ())]
    shapes = dict(rows)
    if config.vision:
        rows += [(name, shapes[name.replace("bias", "weight")][:1]) for name in OPTIONAL if name in left]
    for name, shape in rows:
        info = left.pop(name, None)
        if info is None:
            raise CheckpointError(
                f"{where}: {name} is missing, which config.json calls for",
                hint="the download is incomplete, or config.json belongs to another checkpoint",
            )
        if info.dtype not in _DTYPES or info.shape != shape:
            raise CheckpointError(
                f"{where}: {name} is {info.dtype}{list(info.shape)}, config.json makes it BF16{list(shape)}"
            )
    if left:
        name = min(left)
        raise CheckpointError(
            f"{where}: {name} {list(left[name].shape)} belongs to a tower, and what it does there is unknown"
        )
