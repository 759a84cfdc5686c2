"""The audio tower: codes of a speech tokenizer in, rows for the text model's embedding out.

Key idea: `group` frames are one token and see each other only. A frame is the sum of an embedding row of each codebook;
a small transformer, without a causal mask, goes over the group, whose frames side by side are projected to the text
model's width. Sounds take the same layer together, in portions, as in `vision`. Weights stay in bfloat16; all
arithmetic is float32.

Shapes: g groups, F frames of a group, H hidden, N heads, D head_dim.
Left out: the speech tokenizer itself, which makes codes of a waveform (`audio_tokenizer/` of a release).
Reference: vLLM 0.32 and SGLang 0.5.23, whose local transformer is transformers' Qwen2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.model.decoder_layer import DenseWeights, dense_mlp, rms_norm, rotary_table, rotate
from mimoquant.model.layer_stream import made_ahead, on_host
from mimoquant.model.media import PORTION_GROUPS, Sound, in_portions
from mimoquant.model.tower_config import AudioConfig
from mimoquant.model.vision import EPS, Affine

_GROUPS = 2**12  # that go through a layer at once


@dataclass(frozen=True, slots=True)
class AudioLayer:
    """One layer of the local transformer: norms [H]; q, k, v [H, H] with bias, o without; SwiGLU."""

    input_norm: Tensor
    post_norm: Tensor
    q: Affine
    k: Affine
    v: Affine
    o: Affine
    mlp: DenseWeights


@dataclass(frozen=True, slots=True)
class Projection:
    """What makes a token of a group: the local transformer's last norm, if it has one, and two products."""

    norm: Tensor | None
    first: Affine
    second: Affine


class AudioSource(Protocol):
    """Where the tower's weights come from, a layer at a time."""

    device: torch.device

    def speech_embedding(self, codebook: int) -> Tensor: ...  # [codes, H]

    def audio_layer(self, number: int) -> AudioLayer: ...

    def projection(self) -> Projection: ...


@torch.no_grad()
def sound_rows(sounds: Sequence[Sound], source: AudioSource, config: AudioConfig) -> list[Tensor]:
    """Each sound's rows for the embedding, [tokens, out_hidden] float32, on the host."""
    sizes = [-(-len(sound.codes) // config.group) for sound in sounds]
    portions = in_portions(sounds, sizes, PORTION_GROUPS)
    return [rows for portion in portions for rows in _portion_rows(portion, source, config)]


def _portion_rows(sounds: Sequence[Sound], source: AudioSource, config: AudioConfig) -> list[Tensor]:
    device = source.device
    codes = [torch.from_numpy(whole_groups(sound.codes, config.group)) for sound in sounds]
    states = [torch.zeros(*of_sound.shape[:2], config.hidden) for of_sound in codes]
    for codebook in range(config.codebooks):
        embedding = source.speech_embedding(codebook)
        for state, of_sound in zip(states, codes, strict=True):
            state += embedding[of_sound[..., codebook].to(device)].to(torch.float32).to(state.device)
    with made_ahead((source.audio_layer(number) for number in range(config.layers)), device) as ahead:
        for layer in ahead:
            for state in states:
                for part in torch.split(state, _GROUPS):
                    part.copy_(through_layer(part.to(device), layer, config))
    projection = source.projection()
    return [
        on_host(torch.cat([projected(part.to(device), projection) for part in torch.split(state, _GROUPS)]))
        for state in states
    ]


def whole_groups(codes: np.ndarray, group: int) -> np.ndarray:
    """Codes [frames, codebooks] → [groups, group, codebooks], the last group filled up with the last frame."""
    missing = -len(codes) % group
    filled = np.concatenate((codes, np.repeat(codes[-1:], missing, axis=0)))
    return filled.reshape(-1, group, codes.shape[1])


def through_layer(hidden: Tensor, layer: AudioLayer, config: AudioConfig) -> Tensor:
    """Groups [g, F, H] through one layer; frames of a group see each other, later ones too."""
    normed = rms_norm(hidden, layer.input_norm, EPS)
    cos, sin = rotary_table(hidden.shape[1], config.hidden // config.heads, config.rope_theta, hidden)
    query, key, value = (part(normed).view(*hidden.shape[:2], config.heads, -1) for part in (layer.q, layer.k, layer.v))
    query, key = (rotate(part, cos, sin).transpose(1, 2) for part in (query, key))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    out = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    hidden = hidden + layer.o(out)
    return hidden + dense_mlp(rms_norm(hidden, layer.post_norm, EPS), layer.mlp)


def projected(hidden: Tensor, projection: Projection) -> Tensor:
    """Groups [g, F, H] → [g, out_hidden]."""
    if projection.norm is not None:
        hidden = rms_norm(hidden, projection.norm, EPS)
    return projection.second(F.gelu(projection.first(hidden.flatten(1))))
