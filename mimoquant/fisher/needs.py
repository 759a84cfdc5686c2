"""What a walk back takes: bytes of states, files, host and GPU memory, and floating-point operations.

Key idea: it follows from sizes alone, as in `mimoquant.needs`. Between layers tokens weigh what is kept of them; inside
a layer what it holds of every token, and what a group of experts, a batch in attention and a block of logits hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimoquant.fisher.labels import TOKEN_BLOCK
from mimoquant.fisher.walk import FisherSettings
from mimoquant.model.geometry import Attention, Geometry
from mimoquant.model.layer_stream import BATCH_TOKENS, PORTION_TOKENS
from mimoquant.weights.decoded import CHUNK_ELEMENTS

_GROUP_ROWS, _SCORE_BYTES = 2**16, 2**28  # `decoder_layer` holds at once
_INTERPRETER_BYTES, _TORCH_BYTES, _CUDA_BYTES = 320 * 2**20, 400 * 2**20, 2 * 2**30


@dataclass(frozen=True, slots=True)
class FisherNeeds:
    """`states_bytes` of all ranks lie in files or on hosts, as a part of `file_bytes` or of `host_bytes`.

    `host_bytes`, `gpu_bytes`: at the peak of one process. `layer_flop`: of one layer's products on it, both ways.
    """

    states_bytes: int
    file_bytes: int
    host_bytes: int
    gpu_bytes: int
    layer_flop: float


def fisher_needs(
    geometry: Geometry, tokens: int, settings: FisherSettings, device: str = "cpu", ranks: int = 1
) -> FisherNeeds:
    """Upper bounds that a walk over so many tokens comes near, if `ranks` share it."""
    width, cuda, size = geometry.hidden, device.startswith("cuda"), 4 if settings.exact else 2
    kept = geometry.layers - min(geometry.moe_layers, default=0)  # layers whose input is kept, and what leaves the last
    states = kept * tokens * width * size
    portions = -(-tokens // PORTION_TOKENS)
    mine = min(tokens, -(-portions // ranks) * PORTION_TOKENS)
    gradients = settings.draws * tokens * width * size  # of a layer
    files = kept * (4 * width**2 + gradients) + (states if settings.states == "files" else 0)
    on_host = -(-states * mine // tokens) if settings.states == "host" else 2 * mine * width * size
    work = _token_bytes(geometry, mine, settings, size) + _work_bytes(geometry, settings.draws, size, device)
    host = _INTERPRETER_BYTES + _TORCH_BYTES + on_host + settings.draws * mine * width * size
    flop = _layer_flop(geometry, mine, settings, 3 if cuda else 1)
    if cuda:
        return FisherNeeds(states, files, host + _CUDA_BYTES, work, flop)
    return FisherNeeds(states, files, host + work, 0, flop)


def _token_bytes(geometry: Geometry, tokens: int, settings: FisherSettings, size: int) -> int:
    """What is held of every token inside a layer, on the way that takes more."""
    draws = settings.draws
    forward = 4 + size + 4 + 2 * size  # after attention, what experts see and add; what leaves, and is still kept
    back = 4 + 2 * size + 3 * draws * size + 4 * draws  # gradients before, after, and still kept; their sum at experts
    return max(forward, back) * tokens * geometry.hidden


def _work_bytes(geometry: Geometry, draws: int, size: int, device: str) -> int:
    """What comes and goes: chunks of experts (one in use, one ready, one in the making, and a group's copy), then the
    largest of a group's rows, a batch in attention, and a block of logits."""
    width, inner = geometry.hidden, geometry.expert_intermediate
    expert = 3 * width * inner
    chunk = min(geometry.experts, max(1, CHUNK_ELEMENTS[device.partition(":")[0]] // expert)) * expert
    group = _GROUP_ROWS * (width * (2 * size + 8) + inner * (28 + 2 * size))
    both = (geometry.global_attention, geometry.sliding_attention)
    heads = max(sum(attention.rows) + attention.heads * attention.v_head_dim for attention in both)
    batch = BATCH_TOKENS * 4 * (heads * (4 + draws) + width * (6 + 3 * draws)) + 6 * _SCORE_BYTES
    head = 2 * geometry.vocab * width + TOKEN_BLOCK * geometry.vocab * 4 * 6
    head += 4 * (1 + draws) * min(PORTION_TOKENS, 2**20) * width
    beside = 4 * max(_attention_weights(geometry, attention) for attention in both)
    return 2 * 5 * chunk + beside + max(group, batch, head) + 3 * 4 * width**2


def _attention_weights(geometry: Geometry, attention: Attention) -> int:
    return geometry.hidden * (sum(attention.rows) + attention.heads * attention.v_head_dim)


def _layer_flop(geometry: Geometry, tokens: int, settings: FisherSettings, parts: int) -> float:
    """Of a layer with experts (scores between positions left out): forward, forward again, and each draw's way back.
    float32 rows take `parts` products each: those of attention's forwards, and all where the walk is `exact`."""
    attention = max(_attention_weights(geometry, a) for a in (geometry.global_attention, geometry.sliding_attention))
    expert = geometry.top_k * geometry.hidden * geometry.expert_intermediate
    of_gradients, draws = parts if settings.exact else 1, settings.draws
    product = attention * (3 * parts + draws * of_gradients) + expert * of_gradients * (5 + 3 * draws)
    return 2.0 * tokens * (product + draws * geometry.hidden**2)
