"""Our decoder layers inside vLLM: its kernels make the sums of products and attention, everything else is ours.

    layers = OurLayers(checkpoint)     before the engine is made. Its next prompts go through its own layers, and
    layers.mode = BESIDE               through ours, each given what the engine's own layer was given, or
    layers.mode = INSTEAD              through ours alone

If our forward rounds as the engine does, its answer is then the engine's own but for what is ours in other bits: norms,
residual sums, rotations, SiLU, codes and scales of FP8 inputs. `model.decoder_layer` runs as it is; where it would
multiply by a weight it asks the engine's layer instead, which gets our codes. Experts run inside the engine's module:
their inputs' codes, SiLU x up and its codes are ours, routing, gains and the sum over experts are not, and of experts
that Marlin runs the input alone is ours. Embedding, last norm and head are the engine's.

All prompts are of one length and run in one step. `ask_engine.py` uses this, for vLLM 0.33.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mimoquant.model import decoder_layer
from mimoquant.model.attention import Heads
from mimoquant.model.decoder_layer import AttentionWeights, DenseWeights, LayerWeights, Router, read_forward_config
from mimoquant.model.served_rounding import LayerRounding
from mimoquant.quant.activations import quantize_fp8

SERVED = LayerRounding(in_bf16=True)
BESIDE, INSTEAD = "beside", "instead"


class _Answer:
    """Stands for a weight [O, I]: what the engine's layer answers to rows [..., I], or a part of that."""

    def __init__(self, ask: Callable[[Tensor], Any], part: Callable[[Tensor], Tensor]) -> None:
        self.ask, self.part = ask, part

    def __call__(self, rows: Tensor) -> Tensor:
        answered = self.part(self.ask(rows.flatten(0, -2).bfloat16())[0])
        return answered.float().contiguous().view(*rows.shape[:-1], -1)


class OurLayers:
    def __init__(self, checkpoint: Path) -> None:
        from vllm import _custom_ops
        from vllm.model_executor.layers.fused_moe import utils
        from vllm.model_executor.layers.quantization.utils import fp8_utils
        from vllm.model_executor.models import mimo_v2

        self.mode, self.coding = "", False
        self.told: dict[str, Any] = {"codes": 0, "codes_differ": 0, BESIDE: [], INSTEAD: []}
        self.seen: dict[int, Tensor] = {}
        self.split = mimo_v2._split_qkv
        where = checkpoint / "config.json"
        self.config = read_forward_config(json.loads(where.read_text()), str(where))
        plain = mimo_v2.MiMoV2FlashDecoderLayer.forward

        def forward(layer: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Any:
            given = hidden_states.clone() if residual is None else hidden_states + residual
            if self.mode == INSTEAD:
                made = self.passed(layer, positions, given)
                self.compare(layer.layer_id, made)
                return torch.zeros_like(made), made
            added, kept = plain(layer, positions, hidden_states, residual)
            self.seen[layer.layer_id] = added + kept
            if self.mode == BESIDE:
                self.compare(layer.layer_id, self.passed(layer, positions, given))
            return added, kept

        mimo_v2.MiMoV2FlashDecoderLayer.forward = forward
        for module, name in (
            (fp8_utils, "per_token_group_quant_fp8"),
            (utils, "per_token_group_quant_fp8"),
            (_custom_ops, "silu_and_mul_per_block_quant"),
        ):
            setattr(module, name, self.with_our_codes(getattr(module, name), gated=name.startswith("silu")))

    def compare(self, number: int, made: Tensor) -> None:
        """Count elements that the engine's own layer had otherwise, when it last ran."""
        theirs = self.seen[number]
        differ = int((made != theirs).sum()) if made.shape == theirs.shape else -1
        self.told[self.mode].append([number, made.numel(), differ])

    @torch.no_grad()
    def passed(self, layer: Any, positions: Tensor, states: Tensor) -> Tensor:
        """A layer's states [tokens, H] (bf16) through ours."""
        hidden = states.float().view(int((positions == 0).sum()), -1, states.shape[-1])
        self.coding = True
        with asking(layer):
            weights = weights_of(layer, self.split)
            hidden, normed = decoder_layer.attention_block(hidden, weights, self.config, SERVED)
            hidden, normed = hidden.flatten(0, 1), normed.flatten(0, 1)
            if isinstance(weights.mlp, Router):
                rows = normed.bfloat16()
                logits = layer.mlp.gate(rows.to(layer.mlp.gate_dtype or rows.dtype))[0]
                added = layer.mlp.experts(hidden_states=rows, router_logits=logits).float()
            else:
                added = decoder_layer.dense_mlp(normed, weights.mlp, SERVED)
        self.coding = False
        made: Tensor = (hidden + added).bfloat16()
        return made

    def with_our_codes(self, plain: Any, *, gated: bool) -> Any:
        """One of the engine's functions for codes and scales; inside `passed`, ours stand in what it returns."""

        def quantized(x: Tensor, *more: Any, **named: Any) -> Any:
            codes, scales = plain(x, *more, **named)
            if self.coding:
                rows = x.float()
                if gated:
                    gate, up = rows.chunk(2, -1)
                    rows = decoder_layer.gated(gate, up, torch.float32)
                blocks = quantize_fp8(rows)
                ours = blocks.elements.flatten(-2)[..., : rows.shape[-1]].to(codes.dtype)
                self.told["codes"] += ours.numel()
                self.told["codes_differ"] += int((ours.float() != codes.float()).sum())
                codes.copy_(ours)
                scales.copy_(blocks.scales)
            return codes, scales

        return quantized


def weights_of(layer: Any, split: Any) -> LayerWeights:
    """An engine's decoder layer as ours takes one: norms as they are, products by asking."""
    of = layer.self_attn

    def part(number: int) -> Callable[[Tensor], Tensor]:
        def of_fused(fused: Tensor) -> Tensor:
            parts: Sequence[Tensor] = split(fused, of.q_size, of.k_size, of.v_size, of.kv_chunk_rows)
            return parts[number]

        return of_fused

    def half(number: int) -> Callable[[Tensor], Tensor]:
        return lambda fused: fused.chunk(2, -1)[number]

    def whole(answered: Tensor) -> Tensor:
        return answered

    products: Any = [*(_Answer(of.qkv_proj, part(number)) for number in range(3)), _Answer(of.o_proj, whole)]
    q, k, v, o = products
    sliding: bool = layer.is_compressed_softmax_layer()
    attention = AttentionWeights(q, k, v, o, of.attention_sink_bias, of.num_heads, of.num_kv_heads, sliding)
    mlp: Router | DenseWeights
    if layer.is_layer_sparse:
        mlp = Router(layer.mlp.gate.weight.float(), torch.empty(0))
    else:
        dense: Any = [
            *(_Answer(layer.mlp.gate_up_proj, half(number)) for number in range(2)),
            _Answer(layer.mlp.down_proj, whole),
        ]
        gate, up, down = dense
        mlp = DenseWeights(gate, up, down)
    return LayerWeights(layer.input_layernorm.weight, layer.post_attention_layernorm.weight, attention, mlp)


@contextlib.contextmanager
def asking(layer: Any) -> Iterator[None]:
    """While this lasts, our forward has products by `_Answer`, which round their rows, and this layer's attention."""

    def attended(heads: Heads, key: Tensor, value: Tensor, sink: Tensor | None) -> Tensor:
        batch, _, _, tokens, _ = heads.query.shape
        query = heads.query.permute(0, 3, 1, 2, 4)
        flat = (part.reshape(batch * tokens, -1) for part in (query, key.transpose(1, 2), value.transpose(1, 2)))
        out: Tensor = layer.self_attn.attn(*(part.bfloat16() for part in flat))
        return out.float().view(batch, tokens, -1)

    with contextlib.ExitStack() as stack:
        for name, ours in (
            ("float32_parts", lambda rows, weight, parts=3: (rows,)),
            ("product", lambda parts, weight: weight(parts[0])),
            ("attended", attended),
        ):
            stack.enter_context(mock.patch.object(decoder_layer, name, ours))
        yield
