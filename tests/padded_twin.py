"""A checkpoint with heads of another size, for engines that take only some: zero-padded, so it is the same function.

A CPU's attention in vLLM 0.32 takes heads of 32, 64, 80, 96, 112, 128, 160, 192, ..., and no values narrower than keys.
A wider head is scaled by its own root, so the queries are multiplied by the root of the ratio: exact in bf16 where that
is a power of two (48 to 192), else rounded.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.model.decoder_layer import AttentionWeights, DenseWeights
from mimoquant.model.mtp import MtpWeights
from mimoquant.weights.decoded import CheckpointWeights


def padded_twin(folder: Path, twin: Path, head: int, *, mtp: bool = False) -> Path:
    """A checkpoint in any form as a plain bf16 one in Flash's layout with heads of `head`, every expert decoded.

    `mtp`: with its draft layers.
    """
    layout = open_layout(folder)
    tensors: dict[str, torch.Tensor] = {}
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            tensors[name] = weights.tensor(name)
        for number in range(layout.geometry.layers):
            prefix = f"model.layers.{number}."
            layer = weights.layer(number)
            tensors |= {f"{prefix}self_attn.{name}": t for name, t in attention(layer.attention, head).items()}
            tensors[f"{prefix}input_layernorm.weight"] = layer.input_norm
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm
            if not layout.geometry.moe[number]:
                names = [f"{prefix}mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")]
                tensors |= {name: weights.tensor(name) for name in names}
                continue
            for part in ("weight", "e_score_correction_bias"):
                tensors[f"{prefix}mlp.gate.{part}"] = weights.tensor(f"{prefix}mlp.gate.{part}", torch.float32)
            for chunk in weights.expert_chunks(number):
                for projection in ("gate", "up", "down"):
                    for i, matrix in enumerate(getattr(chunk, projection)):
                        tensors[f"{prefix}mlp.experts.{chunk.begin + i}.{projection}_proj.weight"] = matrix
        for number in range(layout.mtp_layers if mtp else 0):
            tensors |= mtp_layer(weights.mtp_layer(number), f"model.mtp.layers.{number}.", head)
    twin.mkdir()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        twin / "model.safetensors",
        {"format": "pt"},
    )
    (twin / "config.json").write_text(json.dumps(config(layout.config, head)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, twin / name)
    return twin


def attention(weights: AttentionWeights, head: int) -> dict[str, torch.Tensor]:
    factor = math.sqrt(head / (weights.q.shape[0] // weights.heads))
    parts = {
        "q_proj.weight": padded(weights.q, weights.heads, head, factor),
        "k_proj.weight": padded(weights.k, weights.kv_heads, head),
        "v_proj.weight": padded(weights.v, weights.kv_heads, head),
        "o_proj.weight": padded(weights.o.T.contiguous(), weights.heads, head).T,
    }
    return parts if weights.sink is None else parts | {"attention_sink_bias": weights.sink}


def mtp_layer(weights: MtpWeights, prefix: str, head: int) -> dict[str, torch.Tensor]:
    mlp = weights.layer.mlp
    assert isinstance(mlp, DenseWeights)
    parts = {f"self_attn.{name}": tensor for name, tensor in attention(weights.layer.attention, head).items()}
    parts |= {
        "enorm.weight": weights.embedding_norm,
        "hnorm.weight": weights.hidden_norm,
        "eh_proj.weight": weights.projection,
        "input_layernorm.weight": weights.layer.input_norm,
        "pre_mlp_layernorm.weight": weights.layer.post_norm,
        "final_layernorm.weight": weights.final_norm,
        "mlp.gate_proj.weight": mlp.gate,
        "mlp.up_proj.weight": mlp.up,
        "mlp.down_proj.weight": mlp.down,
    }
    return {f"{prefix}{name}": tensor for name, tensor in parts.items()}


def padded(matrix: torch.Tensor, heads: int, head: int, factor: float = 1.0) -> torch.Tensor:
    """Rows [heads * d, H] → [heads * head, H], zeros at the end of each head."""
    out = torch.zeros(heads, head, matrix.shape[1])
    parts = matrix.view(heads, -1, matrix.shape[1])
    out[:, : parts.shape[1]] = parts.float() * factor
    return out.flatten(0, 1).to(matrix.dtype)


def config(source: dict[str, Any], head: int) -> dict[str, Any]:
    out = {key: value for key, value in source.items() if key not in ("quantization_config", "auto_map")}
    out.pop("attention_projection_layout", None)
    out |= {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "dtype": "bfloat16"}
    out |= dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), head)
    rotary = int(source["head_dim"] * source["partial_rotary_factor"])
    out["partial_rotary_factor"] = rotary / head
    told = source.get("rope_parameters", {})
    out["rope_parameters"] = {kind: values | {"partial_rotary_factor": rotary / head} for kind, values in told.items()}
    return out
