"""Train the DFlash drafter of the micro checkpoint and write it as published drafters are.

    scripts/make/train_micro_drafter.py --out mimoquant/micro_dflash

A toy of the real thing, with each of its traits: hidden states of some backbone layers joined by `fc`, grouped heads
with query and key norms, half of each head turned, sinks, a window, scaled values, blocks of eight, a mask embedding of
its own. It is trained on what it is measured by. At sampled starts of calibration sequences it drafts a block; the
loss is the cross entropy of its distributions with the backbone's, later places weighing less, and at the end the
probability that speculative sampling rejects a guess, weighed by that of accepting all before it.

The forward is the program's own, `model/dflash.py`, which torch differentiates; so training says nothing about its
being right. The tests do. The backbone runs once and its states are kept: no text is seen twice through it.

Left out: a schedule tuned by more than one try, a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import mimoquant
from mimoquant.calibration.tokens import load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.evaluation.side_by_side import streams_of
from mimoquant.model.decoder_layer import DenseWeights, rms_norm
from mimoquant.model.dflash import DrafterWeights, DraftLayer, draft_blocks, fuse
from mimoquant.model.drafter import Drafter, open_drafter, read_drafter
from mimoquant.model.layer_stream import batch_sequences, walk
from mimoquant.weights.decoded import CheckpointWeights

CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "v_head_dim": 32,
    "partial_rotary_factor": 0.5,
    "block_size": 8,
    "dflash_config": {
        "target_layer_ids": [2, 4],
        "mask_token_id": 211,  # a byte that no UTF-8 text has
        "block_size": 8,
        "attention_value_scale": 0.612,
        "attention_sink_bias": True,
    },
    "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 64,
    "use_sliding_window": True,
    "is_causal": False,
    "num_target_layers": 5,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PLACE_WEIGHT = 0.85  # of each place of a block to the one before it
LAST_SHARE = 0.35  # of the steps, on the probability of rejection


def start_weights(drafter: Drafter, mask: Tensor, generator: torch.Generator) -> dict[str, torch.nn.Parameter]:
    """Normal matrices, norms of one, sinks of zero, and the backbone's own embedding of the mask token."""
    out = {}
    for name, shape in drafter.shapes().items():
        if len(shape) == 2:
            shrink = (2 * drafter.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            value = torch.randn(shape, generator=generator) * shape[1] ** -0.5 * shrink
        else:
            value = torch.zeros(shape) if name.endswith("sink_bias") else torch.ones(shape)
        out[name] = torch.nn.Parameter(value)
    return out | {"mask": torch.nn.Parameter(mask.float().clone())}


def as_weights(tensors: dict[str, Any], drafter: Drafter) -> DrafterWeights:
    """The named tensors in the forward's form."""
    layers = []
    for number in range(drafter.layers):
        prefix = f"layers.{number}."
        attention = {name: tensors[f"{prefix}self_attn.{name}_proj.weight"] for name in ("q", "k", "v", "o")}
        attention |= {name: tensors[f"{prefix}self_attn.{name}.weight"] for name in ("q_norm", "k_norm")}
        mlp = DenseWeights(*(tensors[f"{prefix}mlp.{f.name}_proj.weight"] for f in fields(DenseWeights)))
        sink = tensors[f"{prefix}self_attn.attention_sink_bias"]
        norms = {
            "input_norm": tensors[f"{prefix}input_layernorm.weight"],
            "post_norm": tensors[f"{prefix}post_attention_layernorm.weight"],
        }
        layers.append(DraftLayer(**norms, **attention, sink=sink, mlp=mlp))
    return DrafterWeights(
        tensors["fc.weight"], tensors["hidden_norm.weight"], layers, tensors["norm.weight"], tensors["mask"]
    )


class Backbone:
    """What the backbone makes of the training tokens: captured states and its last norm's, [S, T, H] in bfloat16."""

    def __init__(self, folder: Path, drafter: Drafter, ids: Tensor) -> None:
        layout = open_layout(folder)
        with CheckpointReader(layout.index) as reader:
            source = CheckpointWeights(reader, layout, torch.device("cpu"))
            self.embedding = source.tensor("model.embed_tokens.weight").float()
            self.head = source.tensor("lm_head.weight").float()
            norm = source.tensor("model.norm.weight")
            (stream,) = streams_of(source, [torch.split(ids, batch_sequences(ids.shape[1]))])
            self.captured: list[Tensor] = []

            def after_layer(number: int) -> None:
                print(f"layer {number}", flush=True)
                if number in drafter.captured:
                    self.captured.append(torch.cat([batch.bfloat16() for batch in stream.batches]))

            walk([stream], after_layer)
            self.final = torch.cat([rms_norm(batch, norm, source.config.eps).bfloat16() for batch in stream.batches])
        self.ids = ids


def distributions(
    backbone: Backbone, weights: DrafterWeights, drafter: Drafter, rows: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """The backbone's distributions and the logits of the drafter's guesses at them, both [B, S, depth, vocab]."""
    fused = sum(fuse(states[rows].float(), place, weights) for place, states in enumerate(backbone.captured))
    embedded = backbone.embedding[backbone.ids[rows]]
    assert isinstance(fused, Tensor) and weights.mask is not None
    drafted = draft_blocks(fused, embedded, weights.mask, weights, drafter, starts)
    judged = backbone.final[rows][:, starts[:, None] + 1 + torch.arange(drafter.depth)].float()
    with torch.no_grad():
        p = (judged @ backbone.head.T).softmax(-1)
    return p, drafted @ backbone.head.T


def loss_of(p: Tensor, logits: Tensor, last: bool) -> Tensor:
    """See the header."""
    places = torch.arange(p.shape[2])
    if not last:
        weight = PLACE_WEIGHT**places
        entropy = -(p * logits.log_softmax(-1)).sum(-1)
        return (entropy * weight).sum(-1).mean() / weight.sum()
    accepted = torch.minimum(p, logits.softmax(-1)).sum(-1)
    return p.shape[2] - accepted.cumprod(-1).sum(-1).mean()


def train(args: argparse.Namespace, drafter: Drafter, backbone: Backbone) -> dict[str, Tensor]:
    """The trained tensors, in float32."""
    generator = torch.Generator().manual_seed(args.seed)
    tensors = start_weights(drafter, backbone.embedding.mean(0), generator)
    weights = as_weights(tensors, drafter)
    optimizer = torch.optim.AdamW(tensors.values(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, (sequences, tokens) = time.monotonic(), backbone.ids.shape
    for step in range(args.steps):
        done = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        rows = torch.randint(sequences, (args.batch,), generator=generator)
        starts = torch.randint(tokens - drafter.depth, (args.starts,), generator=generator)
        p, logits = distributions(backbone, weights, drafter, rows, starts)
        loss: Tensor = loss_of(p, logits, last=done > 1 - LAST_SHARE)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == args.steps - 1:
            with torch.no_grad():
                accepted = torch.minimum(p, logits.softmax(-1)).sum(-1)
                length = accepted.cumprod(-1).sum(-1).mean()
            print(
                f"step {step}: loss {loss.item():.4f}, accepted {accepted.mean((0, 1)).numpy().round(3)}, "
                f"length {length:.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return {name: value.detach() for name, value in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], drafter: Drafter) -> None:
    """The files that a published drafter has; read back by the program."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: value.bfloat16().contiguous() for name, value in tensors.items()}
    mask = {"mask_token_id": drafter.mask_token, "embedding": values.pop("mask")}
    torch.save(mask, folder / "mask_embedding.pt")
    save_file(values, folder / "dflash_draft_model.safetensors")
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in values.values())},
        "weight_map": dict.fromkeys(sorted(values), "dflash_draft_model.safetensors"),
    }
    for name, held in (("model.safetensors.index.json", index), ("config.json", CONFIG)):
        (folder / name).write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    open_drafter(folder)


def main() -> None:
    """Read the command line, train, write."""
    parser = argparse.ArgumentParser(description="Train the micro checkpoint's DFlash drafter.")
    parser.add_argument("--backbone", type=Path, default=mimoquant.micro_checkpoint())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="mixed-v1")
    parser.add_argument("--sequences", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--starts", type=int, default=12)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    drafter = read_drafter(CONFIG, args.out)
    began = time.monotonic()
    loaded = load_tokens([args.data], args.backbone, sequences=args.sequences, tokens=args.tokens, vocab=drafter.vocab)
    ids = torch.from_numpy(loaded.ids)
    print(f"{ids.numel()} tokens, mask token in {int(np.count_nonzero(loaded.ids == drafter.mask_token))} of them")
    print(f"{sum(math.prod(shape) for shape in drafter.shapes().values())} parameters")
    backbone = Backbone(args.backbone, drafter, ids)
    write(args.out, train(args, drafter, backbone), drafter)
    print(f"all: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
