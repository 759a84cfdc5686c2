"""A second forward of DFlash drafters, written from the engines' sources: float64, one head of one query at a time.

It reads the files by the safetensors library and `config.json` by itself; `write_drafter` makes small ones.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mtp_reference import rotated
from safetensors.torch import load_file, save_file

from mimoquant.model.drafter import read_drafter

Floats = npt.NDArray[np.float64]

CONFIG: dict[str, Any] = {  # the keys of MiMo-V2.5-DFlash and their published values, as far as they are not sizes
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 5,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "v_head_dim": 128,
    "partial_rotary_factor": 0.5,
    "block_size": 8,
    "dflash_config": {
        "target_layer_ids": [0, 11, 23, 35, 47],
        "mask_token_id": 151675,
        "num_anchors": 4096,
        "block_size": 8,
        "loss_decay_gamma": 7.0,
        "use_swa": True,
        "swa_window_size": 1024,
        "backbone_rotary_base": 5000000,
        "attention_value_scale": 0.612,
        "attention_sink_bias": True,
    },
    "num_target_layers": 48,
    "vocab_size": 152576,
    "max_position_embeddings": 262144,
    "rope_theta": 10000,
    "sliding_window": 1024,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def changed(dflash: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """The published config with other values; None takes a key away."""
    special = {k: v for k, v in (CONFIG["dflash_config"] | (dflash or {})).items() if v is not None}
    return {k: v for k, v in (CONFIG | {"dflash_config": special} | values).items() if v is not None}


def small(dflash: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    """A drafter for the micro checkpoint, by its config."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "v_head_dim": 12,
        "num_target_layers": 5,
        "vocab_size": 1024,
        "block_size": 5,
        "sliding_window": 7,
    }
    own = {"target_layer_ids": [0, 3, 4], "mask_token_id": 211, "block_size": 5, "swa_window_size": 7}
    return changed(own | (dflash or {}), **(sizes | values))


def write_drafter(folder: Path, config: dict[str, Any], *, mask: bool = True, seed: int = 0) -> Path:
    """Random weights of a size that makes every part matter, in the files that published drafters have."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, special = config["hidden_size"], config["intermediate_size"], config["dflash_config"]
    heads, kv, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def normal(*shape: int, around: float = 0.0, spread: float = 1.0) -> torch.Tensor:
        return (around + spread * torch.randn(shape, generator=generator)).bfloat16()

    tensors = {"fc.weight": normal(hidden, hidden * len(special["target_layer_ids"]), spread=0.05)}
    tensors |= {name: normal(hidden, around=1.0, spread=0.3) for name in ("hidden_norm.weight", "norm.weight")}
    for n in range(config["num_hidden_layers"]):
        at = f"layers.{n}."
        for name, rows, columns in (
            ("q", heads * dim, hidden),
            ("k", kv * dim, hidden),
            ("v", kv * dim, hidden),
            ("o", hidden, heads * dim),
        ):
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(rows, columns, spread=columns**-0.5)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            tensors[f"{at}mlp.{name}_proj.weight"] = normal(rows, columns, spread=columns**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = normal(hidden, around=1.0, spread=0.3)
        for name in ("q_norm", "k_norm"):
            tensors[f"{at}self_attn.{name}.weight"] = normal(dim, around=1.0, spread=0.3)
        if special.get("attention_sink_bias"):
            tensors[f"{at}self_attn.attention_sink_bias"] = normal(heads)
    save_file(tensors, folder / "dflash_draft_model.safetensors")
    weight_map = dict.fromkeys(tensors, "dflash_draft_model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    if mask:
        held = {"mask_token_id": special["mask_token_id"], "embedding": normal(hidden)}
        torch.save(held, folder / "mask_embedding.pt")
    return folder


def write_headers(folder: Path, config: dict[str, Any]) -> Path:
    """A drafter of any size whose values are a hole in the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in read_drafter(config, folder).shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "dflash_draft_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return folder


class Reference:
    """A drafter, spelled out."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.special = self.config["dflash_config"]
        loaded = load_file(folder / "dflash_draft_model.safetensors")
        self.weights = {name: value.double().numpy() for name, value in loaded.items()}
        path = folder / "mask_embedding.pt"
        self.mask = torch.load(path)["embedding"].double().numpy() if path.exists() else None
        sliding = self.special.get("use_swa") or "sliding_attention" in self.config.get("layer_types", [])
        self.window = self.config["sliding_window"] if sliding else 10**9

    def norm(self, x: Floats, name: str) -> Floats:
        return (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]
        )

    def turned(self, head: Floats, position: int) -> Floats:
        width = int(self.config["head_dim"] * self.config.get("partial_rotary_factor", 1.0))
        return rotated(head, position, width, self.config["rope_theta"])

    def key_value(self, state: Floats, position: int, group: int, at: str) -> tuple[Floats, Floats]:
        dim = self.config["head_dim"]
        rows = slice(group * dim, (group + 1) * dim)
        key = self.weights[f"{at}k_proj.weight"][rows] @ state
        value = self.weights[f"{at}v_proj.weight"][rows] @ state
        return self.turned(self.norm(key, f"{at}k_norm"), position), value * self.special.get(
            "attention_value_scale", 1
        )

    def attention(self, context: list[Floats], block: list[Floats], first: int, at: str) -> list[Floats]:
        """context: states of positions 0.. before the block, which begins at position `first`."""
        dim, heads = self.config["head_dim"], self.config["num_attention_heads"]
        out = []
        for row, state in enumerate(block):
            position, mixed = first + row, []
            for head in range(heads):
                group = head // (heads // self.config["num_key_value_heads"])
                query = self.weights[f"{at}q_proj.weight"][head * dim : (head + 1) * dim] @ state
                query = self.turned(self.norm(query, f"{at}q_norm"), position)
                places = [(s, c) for s, c in enumerate(context) if position - s < self.window]
                places += [(first + i, other) for i, other in enumerate(block)]
                pairs = [self.key_value(c, s, group, at) for s, c in places]
                shares = np.exp([query @ key / math.sqrt(dim) for key, _ in pairs])
                total = shares.sum()
                if self.special.get("attention_sink_bias"):
                    total += math.exp(self.weights[f"{at}attention_sink_bias"][head])
                mixed.append(sum(share * value for share, (_, value) in zip(shares, pairs, strict=True)) / total)
            out.append(self.weights[f"{at}o_proj.weight"] @ np.concatenate(mixed))
        return out

    def draft(self, captured: list[Floats], anchor: Floats, mask: Floats, start: int) -> Floats:
        """The last norm's rows [b - 1, H] at the masks of the block after position `start`.

        captured: of each layer [T, H]. anchor, mask: embeddings of the token at start + 1 and of the mask token.
        """
        fused = [self.weights["fc.weight"] @ np.concatenate([layer[s] for layer in captured]) for s in range(start + 1)]
        context = [self.norm(state, "hidden_norm") for state in fused]
        rows = [anchor, *[mask] * (self.special["block_size"] - 1)]
        for n in range(self.config["num_hidden_layers"]):
            at = f"layers.{n}."
            normed = [self.norm(row, f"{at}input_layernorm") for row in rows]
            mixed = self.attention(context, normed, start + 1, f"{at}self_attn.")
            rows = [row + more for row, more in zip(rows, mixed, strict=True)]
            for i, row in enumerate(rows):
                x = self.norm(row, f"{at}post_attention_layernorm")
                gate, up = (self.weights[f"{at}mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
                rows[i] = row + self.weights[f"{at}mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.norm(np.array(rows[1:]), "norm")
