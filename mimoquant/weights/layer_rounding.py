"""What a checkpoint's own files say of how its inputs and caches are rounded: layer by layer, from stored scales.

Key idea: engines take one input scale for all experts of a layer, gate and up together: the one of the largest
activation. Where none is stored the scale is 1, NVIDIA's unit (amax 2688). Kernels that round to FP8 are given bf16, so
a model that has a layer for them is stored in bf16 between operations, everywhere.
Sources: vLLM 0.33 (`flashinfer_fp4_moe.py`, `oracle/nvfp4.py`: `a13_scale.max()`), SGLang 0.5.23 (`modelopt_quant.py`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight
from mimoquant.model.served_rounding import FP8, MXFP8, NONE, NVFP4, LayerRounding, Rounding
from mimoquant.weights.decoded import TORCH_DTYPES

_MULTIPLIER, _DIVISOR = ".input_scale", ".input_global_scale"  # ModelOpt's amax / 2688; compressed-tensors' 2688 / amax


def layer_roundings(reader: CheckpointReader, layout: ModelLayout, asked: Rounding) -> tuple[LayerRounding, ...]:
    """Each layer's rounding; none at all where nothing is asked for.

    Raises CheckpointError: a stored scale is no positive number.
    """
    if not asked.anything:
        return ()
    weights = {weight.name: weight for of_unit in layout.units.values() for weight in of_unit}
    layers = [_of_layer(reader, layout, weights, number, asked) for number in range(layout.geometry.layers)]
    in_bf16 = stored_in_bf16(layout, asked)
    return tuple(replace(layer, in_bf16=in_bf16) for layer in layers)


def stored_in_bf16(layout: ModelLayout, asked: Rounding) -> bool:
    """Whether a kernel that rounds to FP8 is given some layer's states, so that all are stored in bf16."""
    weights = {weight.name: weight for of_unit in layout.units.values() for weight in of_unit}
    return any(set(_dense(layout, weights, number, asked)) != {NONE} for number in range(layout.geometry.layers))


def _dense(layout: ModelLayout, weights: dict[str, Weight], number: int, asked: Rounding) -> tuple[str, str, str]:
    """What the inputs of a layer's qkv, o and dense MLP are rounded to."""
    prefix = f"model.layers.{number}."

    def kind(*names: str) -> str:
        present = [weight for name in names if (weight := weights.get(f"{prefix}{name}.weight"))]
        kinds = {_stored_kind(weight) for weight in present}
        one = kinds.pop() if asked.dense != NONE and len(kinds) == 1 else NONE
        return asked.dense if one == FP8 else one

    mlp = NONE if layout.geometry.moe[number] else kind(*(f"mlp.{projection}_proj" for projection in PROJECTIONS))
    return kind(*(f"self_attn.{letter}_proj" for letter in ("qkv", "q", "k", "v"))), kind("self_attn.o_proj"), mlp


def _of_layer(
    reader: CheckpointReader, layout: ModelLayout, weights: dict[str, Weight], number: int, asked: Rounding
) -> LayerRounding:
    prefix, geometry = f"model.layers.{number}.", layout.geometry
    experts = asked.of_experts(number) if geometry.moe[number] else NONE
    gate_up = down = 1.0
    if experts == NVFP4:
        gate_up = _input_divisor(reader, layout, number, ("gate", "up"))
        down = _input_divisor(reader, layout, number, ("down",))
    qkv, o, mlp = _dense(layout, weights, number, asked)
    cache = _cache_scales(reader, weights, prefix) if asked.cache == FP8 else None
    return LayerRounding(experts, gate_up, down, qkv, o, mlp, cache)


def _stored_kind(weight: Weight) -> str:
    """How an engine with FP8 products rounds what such a matrix is multiplied with."""
    if weight.info.dtype != "F8_E4M3":
        return NONE
    return MXFP8 if weight.scale and weight.scale.dtype == "U8" else FP8


def _input_scale(weight: Weight) -> TensorInfo | None:
    return next((info for info in weight.packed if info.name.endswith((_MULTIPLIER, _DIVISOR))), None)


def _input_divisor(reader: CheckpointReader, layout: ModelLayout, number: int, projections: tuple[str, ...]) -> float:
    """The least input global scale of a layer's experts: that of the largest activation."""
    every = [
        info
        for expert in range(layout.geometry.experts)
        for projection in projections
        if (info := _input_scale(layout.expert(number, expert, projection)))
    ]
    if not every:
        return 1.0
    return shared_divisor(_numbers(reader, every), every[0].name)


def shared_divisor(scales: torch.Tensor, name: str) -> float:
    """The input global scale that engines make of the stored scales (float32) of several experts, told by a `name`."""
    return float(scales.min() if name.endswith(_DIVISOR) else 1.0 / scales.max())


def _cache_scales(reader: CheckpointReader, weights: dict[str, Weight], prefix: str) -> tuple[float, float]:
    """k_scale and v_scale of a layer, 1 where there is none."""
    found = {"k": 1.0, "v": 1.0}
    for name, weight in weights.items():
        if weight.role == "cache_scale" and name.startswith(f"{prefix}self_attn."):
            letter = name.removeprefix(f"{prefix}self_attn.")[0]
            found[letter] = float(_numbers(reader, [weight.info])[0])
    return found["k"], found["v"]


def _numbers(reader: CheckpointReader, infos: list[TensorInfo]) -> torch.Tensor:
    """One float32 a tensor, all positive and finite."""
    raw = np.empty((len(infos), infos[0].size_bytes), np.uint8)
    reader.read_many(zip(infos, raw, strict=True))
    values = torch.from_numpy(raw).view(TORCH_DTYPES[infos[0].dtype]).to(torch.float32).flatten()
    bad = ~(torch.isfinite(values) & (values > 0))
    if bad.any():
        place = int(bad.nonzero()[0])
        raise CheckpointError(
            f"{infos[place].name}: is {float(values[place])}, a scale is a positive number",
            hint="that checkpoint is damaged: download or write the file that holds it again",
        )
    return values
