"""A checkpoint as weights to compute with, one layer and one chunk of experts at a time.

Key idea: published or quantized, in whatever container and sharding, a checkpoint becomes the same tensors, so the
walker does not know what it walks through. Formats are told by what is stored, not by what a config claims.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mimoquant.checkpoint.folders import resolve_inside
from mimoquant.checkpoint.index import CheckpointIndex, TensorInfo
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.torch_file import read_vector
from mimoquant.errors import CheckpointError
from mimoquant.machine.overlap import heir
from mimoquant.model.decoder_layer import (
    AttentionWeights,
    DenseWeights,
    ExpertChunk,
    LayerWeights,
    Router,
    read_forward_config,
)
from mimoquant.model.dflash import DrafterWeights, DraftLayer
from mimoquant.model.drafter import MASK_FILE, Drafter
from mimoquant.model.geometry import MXFP8_BLOCK
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight
from mimoquant.model.mtp import MtpWeights
from mimoquant.model.qkv import deinterleave_rows
from mimoquant.quant.engine_torch import TorchEngine, decode, dequantize_fp8, exp2
from mimoquant.quant.formats import Format
from mimoquant.weights.stored import packed_format, part_name, read_stack, scale_rows

CHUNK_ELEMENTS = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # weights of the experts that are decoded together


class CheckpointWeights:
    """A checkpoint, published or quantized, as weights to compute with: a `layer_stream.WeightSource`.

    Values are what an engine computes with, in bf16: FP8 and 4-bit weights are rounded to it once. The router and what
    is stored in float32 are float32, but for matrices that others' exports store so: engines hold them in bf16.
    """

    def __init__(self, reader: CheckpointReader, layout: ModelLayout, device: torch.device) -> None:
        self.reader, self.layout, self.device = reader, layout, device
        self.config = read_forward_config(layout.config, f"{layout.index.folder}/config.json")
        self.layers = layout.geometry.layers
        self._units = {weight.name: weight for weights in layout.units.values() for weight in weights}
        self._engine = TorchEngine(str(device))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Any weight that is not an expert's, by its name; a part of a fused qkv by the part's name."""
        weight = self._units[name]
        if weight.info.dtype == "F32":
            values = torch.from_numpy(self.reader.read(name).view(np.float32))
            if weight.role not in _HELD_IN_F32:
                values = values.to(torch.bfloat16)
        elif weight.scale and weight.scale.dtype == "U8":
            values = self._mxfp8(weight)
        elif weight.scale:
            values = self._fp8(weight)
        else:
            values = torch.from_numpy(self.reader.read(name)).view(torch.bfloat16)
        values = values.reshape(weight.info.shape).to(self.device, dtype)
        if not is_finite(values):
            raise self._damaged(name)
        return values

    def _damaged(self, name: str) -> CheckpointError:
        return damaged(self.layout.index.folder, name)

    def _fp8(self, weight: Weight) -> torch.Tensor:
        held = read_stack(self.reader, [weight])
        assert held.scales is not None
        codes, scales = (torch.from_numpy(part[0]).to(self.device) for part in (held.values, held.scales))
        rows = scale_rows(weight.role, len(codes), len(scales), self.layout.geometry)
        return dequantize_fp8(codes.view(torch.float8_e4m3fn), scales, torch.from_numpy(rows).to(self.device))

    def _mxfp8(self, weight: Weight) -> torch.Tensor:
        """FP8 with an E8M0 scale for 32 of a row, whose name may end in `_inv`: it is a scale all the same."""
        assert weight.scale is not None
        codes = self._parts([weight.info], torch.float8_e4m3fn)[0]
        scales = self._parts([weight.scale], torch.uint8)[0]
        return dequantize_fp8(codes, exp2(scales), torch.arange(len(codes), device=codes.device), MXFP8_BLOCK)

    def layer(self, number: int) -> LayerWeights:
        """Everything of a layer but its experts."""
        prefix, geometry = f"model.layers.{number}.", self.layout.geometry
        mlp: DenseWeights | Router
        if geometry.moe[number]:
            gate = f"{prefix}mlp.gate."
            mlp = Router(
                self.tensor(f"{gate}weight", torch.float32),
                self.tensor(f"{gate}e_score_correction_bias", torch.float32),
            )
        else:
            mlp = self._dense(prefix)
        return LayerWeights(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            post_norm=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            attention=self._attention(f"{prefix}self_attn.", sliding=geometry.sliding[number]),
            mlp=mlp,
        )

    def mtp_layer(self, number: int) -> MtpWeights:
        """One of the `layout.mtp_layers` draft layers."""
        prefix = f"model.mtp.layers.{number}."
        block = LayerWeights(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            post_norm=self.tensor(f"{prefix}pre_mlp_layernorm.weight"),
            attention=self._attention(f"{prefix}self_attn.", sliding=True),
            mlp=self._dense(prefix),
        )
        names = ("enorm", "hnorm", "eh_proj", "final_layernorm")
        return MtpWeights(block, *(self.tensor(f"{prefix}{name}.weight") for name in names))

    def _dense(self, prefix: str) -> DenseWeights:
        return DenseWeights(*(self.tensor(f"{prefix}mlp.{p}_proj.weight") for p in PROJECTIONS))

    def _attention(self, prefix: str, *, sliding: bool) -> AttentionWeights:
        geometry = self.layout.geometry
        shape = geometry.sliding_attention if sliding else geometry.global_attention
        if geometry.fused_qkv:
            rows = torch.from_numpy(deinterleave_rows(shape.rows, geometry.qkv_chunks)).to(self.device)
            q, k, v = torch.split(self.tensor(f"{prefix}qkv_proj.weight")[rows], list(shape.rows))
        else:
            q, k, v = (self.tensor(f"{prefix}{letter}_proj.weight") for letter in "qkv")
        sink = self.tensor(f"{prefix}attention_sink_bias") if shape.sink else None
        return AttentionWeights(
            q, k, v, self.tensor(f"{prefix}o_proj.weight"), sink, shape.heads, shape.kv_heads, sliding
        )

    def expert_chunks(self, number: int) -> Iterator[ExpertChunk]:
        """A layer's experts, in chunks; none where its MLP is dense."""
        geometry = self.layout.geometry
        if not geometry.moe[number]:
            return
        elements = 3 * geometry.hidden * geometry.expert_intermediate
        step = max(1, CHUNK_ELEMENTS[self.device.type] // elements)
        with ThreadPoolExecutor(len(PROJECTIONS), thread_name_prefix="stack", initializer=heir()) as pool:
            for begin in range(0, geometry.experts, step):
                end = min(begin + step, geometry.experts)
                yield ExpertChunk(begin, *self._stacks(number, begin, end, pool))

    def _stacks(self, number: int, begin: int, end: int, pool: Executor) -> Iterator[torch.Tensor]:
        """Of gate, up and down; on CUDA one is read while another is decoded, by the caller's stream."""
        if self.device.type != "cuda":
            return (self._stack(number, begin, end, projection) for projection in PROJECTIONS)
        stream = torch.cuda.current_stream(self.device)

        def made(projection: str) -> torch.Tensor:
            with torch.cuda.stream(stream):
                return self._stack(number, begin, end, projection)

        return pool.map(made, PROJECTIONS)

    def expert(self, number: int, expert: int, projection: str) -> torch.Tensor:
        """One expert's matrix [O, I]."""
        return self._stack(number, expert, expert + 1, projection)[0]

    def _stack(self, number: int, begin: int, end: int, projection: str) -> torch.Tensor:
        weights = [self.layout.expert(number, expert, projection) for expert in range(begin, end)]
        if weights[0].packed:
            values = self._unpack(weights).to(torch.bfloat16)
        else:
            values = self._engine.bf16(read_stack(self.reader, weights, self._engine.empty))
        if not is_finite(values):
            bad = next(weight for weight, of in zip(weights, values, strict=True) if not is_finite(of))
            raise self._damaged(bad.name)
        return values

    def _unpack(self, weights: list[Weight]) -> torch.Tensor:
        """4-bit experts of one projection, decoded together: float32 [e, O, I], exact."""
        fmt = packed_format(weights[0])
        if any(packed_format(weight) != fmt for weight in weights):
            raise CheckpointError(f"{weights[0].name}: its neighbours have another format; a layer's experts share one")
        parts = {"codes": self._parts([weight.info for weight in weights], torch.uint8)}
        parts["codes"] = parts["codes"].reshape(len(weights), weights[0].info.shape[0], -1)
        for place, info in enumerate(weights[0].packed):
            part = part_name(info)
            if part not in _NOT_OF_WEIGHTS:
                parts[part] = self._parts([weight.packed[place] for weight in weights], TORCH_DTYPES[info.dtype])
        return decode(parts, fmt)

    def _parts(self, infos: list[TensorInfo], dtype: torch.dtype) -> torch.Tensor:
        """The same part of several experts, stacked; uint8 as bytes [e, n], others [e, *shape]."""
        raw = self._engine.empty((len(infos), infos[0].size_bytes), np.uint8)
        self.reader.read_many(zip(infos, raw, strict=True))
        values = torch.from_numpy(raw).to(self.device, non_blocking=True).view(dtype)
        return values.reshape(len(infos), *infos[0].shape) if dtype == TORCH_DTYPES[infos[0].dtype] else values


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, in one pass without a copy."""
    if not values.numel():
        return True
    wide = values if values.element_size() > 1 else values.to(torch.float32)
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide.flatten()))).all())


def damaged(folder: Path, name: str) -> CheckpointError:
    """The error for a tensor of a checkpoint that is read for its values."""
    return CheckpointError(
        f"{folder}: {name} holds NaN or Inf, or its scale makes it so",
        hint="that checkpoint is damaged: download or write the file that holds it again",
    )


def decoded_chunk(begin: int, parts: dict[str, dict[str, torch.Tensor]], fmt: Format) -> ExpertChunk:
    """Experts `begin`.. as an engine reads them, from projection → part → [e, ...]."""
    return ExpertChunk(begin, *(decode(parts[p], fmt).to(torch.bfloat16) for p in PROJECTIONS))


def read_drafter_weights(drafter: Drafter, index: CheckpointIndex, device: torch.device) -> DrafterWeights:
    """A DFlash drafter's tensors, as stored. Raises CheckpointError where its mask embedding is not one."""
    with CheckpointReader(index) as reader:
        tensors = {
            name: torch.from_numpy(reader.read(name)).view(TORCH_DTYPES[info.dtype]).reshape(info.shape).to(device)
            for name, info in index.tensors.items()
        }
    for name, values in tensors.items():
        if not is_finite(values):
            raise damaged(index.folder, name)

    def layer(prefix: str) -> DraftLayer:
        q, k, v, o, q_norm, k_norm = (
            tensors[f"{prefix}self_attn.{name}.weight"]
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        )
        return DraftLayer(
            tensors[f"{prefix}input_layernorm.weight"],
            tensors[f"{prefix}post_attention_layernorm.weight"],
            q,
            k,
            v,
            o,
            q_norm,
            k_norm,
            tensors.get(f"{prefix}self_attn.attention_sink_bias"),
            DenseWeights(*(tensors[f"{prefix}mlp.{p}_proj.weight"] for p in PROJECTIONS)),
        )

    mask = _mask_embedding(drafter)
    return DrafterWeights(
        tensors["fc.weight"],
        tensors["hidden_norm.weight"],
        [layer(f"layers.{n}.") for n in range(drafter.layers)],
        tensors["norm.weight"],
        None if mask is None else mask.to(device),
    )


def _mask_embedding(drafter: Drafter) -> torch.Tensor | None:
    """What the drafter brings for its mask token, [H]."""
    path = drafter.folder / MASK_FILE
    if not path.exists():
        return None
    held = read_vector(resolve_inside(drafter.folder, MASK_FILE))
    token, size = held.numbers.get("mask_token_id"), len(held.data) // TORCH_DTYPES[held.dtype].itemsize
    if held.keys != {"mask_token_id", "embedding"}:
        raise CheckpointError(f"{path}: holds {sorted(held.keys)}, expected are mask_token_id and embedding")
    if token != drafter.mask_token or size != drafter.hidden:
        raise CheckpointError(
            f"{path}: holds {size} values for token {token}, expected are {drafter.hidden} for {drafter.mask_token}"
        )
    embedding = torch.from_numpy(held.data).view(TORCH_DTYPES[held.dtype])
    if not is_finite(embedding):
        raise damaged(drafter.folder, MASK_FILE)
    return embedding


TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_HELD_IN_F32 = ("norm", "router", "router_bias", "sink")  # by engines, where they are stored so; matrices never are
_NOT_OF_WEIGHTS = ("shape", "input_scale")
