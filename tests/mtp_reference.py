"""A second forward of the MTP layers, written from the published facts: float64, one query at a time.

It reads the files by the safetensors library and undoes FP8 blocks and the fused qkv by itself, rank by rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

Floats = npt.NDArray[np.float64]


def rotated(head: Floats, position: int, width: int, theta: float) -> Floats:
    """A head [D] whose first `width` channels are turned in pairs, half a width apart."""
    out, half = head.copy(), width // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / width)
        a, b = head[i], head[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


class Reference:
    """A checkpoint's MTP layers, spelled out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def matrix(self, name: str, ranks: int = 1) -> Floats:
        """FP8 blocks of 128 x 128 begin anew with every rank; the product is rounded to bf16, as engines hold it."""
        values = self.read(name)
        if values.dtype != torch.float8_e4m3fn:
            return values.double().numpy()
        scales, rows = self.read(f"{name}_scale_inv"), len(values) // ranks
        scale_rows, out = len(scales) // ranks, np.empty(values.shape)
        for row in range(len(values)):
            scale = scales[row // rows * scale_rows + row % rows // 128].repeat_interleave(128)[: values.shape[1]]
            out[row] = (values[row].float() * scale).bfloat16().double().numpy()
        return out

    def qkv(self, prefix: str) -> list[Floats]:
        heads, kv = self.config["swa_num_attention_heads"], self.config["swa_num_key_value_heads"]
        dim, v_dim = self.config["swa_head_dim"], self.config["swa_v_head_dim"]
        if self.config.get("attention_projection_layout") != "fused_qkv":
            return [self.matrix(f"{prefix}{letter}_proj.weight") for letter in "qkv"]
        ranks = self.config["num_key_value_heads"]
        fused, parts = self.matrix(f"{prefix}qkv_proj.weight", ranks), ([], [], [])
        for rank in np.split(fused, ranks):
            begin = 0
            for part, rows in zip(parts, (heads * dim, kv * dim, kv * v_dim), strict=True):
                part.append(rank[begin : begin + rows // ranks])
                begin += rows // ranks
        return [np.concatenate(part) for part in parts]

    def norm(self, x: Floats, name: str) -> Floats:
        weight = self.read(name).double().numpy()
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layernorm_epsilon"]) * weight

    def rotated(self, head: Floats, position: int) -> Floats:
        width = int(self.config["swa_head_dim"] * self.config["partial_rotary_factor"])
        return rotated(head, position, width, self.config["swa_rope_theta"])

    def attention(self, x: Floats, prefix: str) -> Floats:
        """x [T, H]; window, sinks, scaled values."""
        heads, kv = self.config["swa_num_attention_heads"], self.config["swa_num_key_value_heads"]
        dim, v_dim, window = (self.config[k] for k in ("swa_head_dim", "swa_v_head_dim", "sliding_window_size"))
        q, k, v = (x @ part.T for part in self.qkv(prefix))
        sinks = self.read(f"{prefix}attention_sink_bias").double().numpy()
        out = np.zeros((len(x), heads * v_dim))
        for head in range(heads):
            group = head // (heads // kv)
            keys = np.array([self.rotated(row[group * dim : (group + 1) * dim], t) for t, row in enumerate(k)])
            values = v[:, group * v_dim : (group + 1) * v_dim] * self.config["attention_value_scale"]
            for t in range(len(x)):
                first = max(0, t - window + 1)
                query = self.rotated(q[t, head * dim : (head + 1) * dim], t)
                shares = np.exp(keys[first : t + 1] @ query / math.sqrt(dim))
                total = shares.sum() + math.exp(sinks[head])
                out[t, head * v_dim : (head + 1) * v_dim] = shares @ values[first : t + 1] / total
        return out @ self.matrix(f"{prefix}o_proj.weight").T

    def layer(self, number: int, hidden: Floats, embedded: Floats) -> Floats:
        """Both [T, H]: states, and the embeddings of the tokens that follow them."""
        prefix = f"model.mtp.layers.{number}."
        joined = np.concatenate(
            [self.norm(embedded, f"{prefix}enorm.weight"), self.norm(hidden, f"{prefix}hnorm.weight")], -1
        )
        x = joined @ self.matrix(f"{prefix}eh_proj.weight").T
        x = x + self.attention(self.norm(x, f"{prefix}input_layernorm.weight"), f"{prefix}self_attn.")
        normed = self.norm(x, f"{prefix}pre_mlp_layernorm.weight")
        gate, up = (normed @ self.matrix(f"{prefix}mlp.{name}_proj.weight").T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ self.matrix(f"{prefix}mlp.down_proj.weight").T
        return self.norm(x, f"{prefix}final_layernorm.weight")

    def drafted(self, final: Floats, embedded: Floats, depths: int, *, chained: bool = True) -> list[Floats]:
        """h_1 .. h_D of a sequence: layer d is told of the token d places on; unless chained, of `final` each."""
        starts, hidden, out = len(final) - depths, final, []
        for depth in range(1, depths + 1):
            out.append(self.layer(depth - 1, hidden[:starts], embedded[depth : depth + starts]))
            hidden = out[-1] if chained else final
        return out
