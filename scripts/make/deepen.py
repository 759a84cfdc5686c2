"""A deeper model from a trained one, without training: some layers twice, each writing half as much.

    python scripts/make/deepen.py CHECKPOINT OUT --twice 1 2 3 4 [--plant 6]

CHECKPOINT: bf16 in Flash names. A layer that comes twice has its o_proj and its experts' (or MLP's) down_proj halved
in both copies, so the two together do about what the one did. --plant: the number, in OUT, of a layer whose experts are
made hard to quantize: every 32nd channel in front of them is a 16th in its norm, and 16-fold in router, gate and up;
powers of two, so the model stays the same.

Left out: MTP layers, FP8 sources.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
OUTLIER_EVERY, OUTLIER = 32, 16.0
PER_LAYER = ("hybrid_layer_pattern", "moe_layer_freq", "layer_types", "mlp_layer_types")


def deepened(tensors: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """Layer n of the result is layer order[n] of the source."""
    out = {name: values for name, values in tensors.items() if not LAYER.match(name) and ".mtp." not in name}
    for number, source in enumerate(order):
        for name, values in tensors.items():
            found = LAYER.match(name)
            if found and int(found[1]) == source:
                writes = found[2].endswith(("o_proj.weight", "down_proj.weight")) and order.count(source) > 1
                out[f"model.layers.{number}.{found[2]}"] = values / 2 if writes else values.clone()
    return out


def plant(tensors: dict[str, Tensor], layer: int) -> None:
    """Outlier channels in front of a layer's experts, of the same function."""
    prefix = f"model.layers.{layer}."
    wide = torch.ones(len(tensors[f"{prefix}post_attention_layernorm.weight"]))
    wide[::OUTLIER_EVERY] = OUTLIER
    for name, values in tensors.items():
        if name == f"{prefix}post_attention_layernorm.weight":
            tensors[name] = (values.float() / wide).to(values.dtype)
        elif name == f"{prefix}mlp.gate.weight" or (
            name.startswith(f"{prefix}mlp.experts.") and name.endswith(("gate_proj.weight", "up_proj.weight"))
        ):
            tensors[name] = (values.float() * wide).to(values.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--twice", type=int, nargs="+", required=True)
    parser.add_argument("--plant", type=int)
    given = parser.parse_args()
    config = json.loads((given.checkpoint / "config.json").read_bytes())
    order = [n for n in range(config["num_hidden_layers"]) for _ in range(1 + (n in given.twice))]
    tensors: dict[str, Tensor] = {}
    for path in sorted(given.checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    made = deepened(tensors, order)
    if given.plant is not None:
        plant(made, given.plant)
    config |= {key: [config[key][n] for n in order] for key in PER_LAYER if key in config}
    config |= {"num_hidden_layers": len(order)}
    given.out.mkdir(parents=True)
    save_file(made, given.out / "model.safetensors", metadata={"format": "pt"})
    index: dict[str, Any] = {"metadata": {"total_size": sum(v.nbytes for v in made.values())}}
    index |= {"weight_map": dict.fromkeys(sorted(made), "model.safetensors")}
    (given.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (given.out / "config.json").write_text(json.dumps(config, indent=1))
    for path in given.checkpoint.glob("*.json"):
        if not (given.out / path.name).exists():
            shutil.copy(path, given.out)


if __name__ == "__main__":
    main()
