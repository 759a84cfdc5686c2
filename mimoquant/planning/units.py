"""Units of an output, one shard each: which steps fill it, which tensors each step writes, in which order.

Key idea: a unit is one decoder layer, the embeddings, the head, MTP, or the towers. Inside its shard the steps lie in
file order: shapes, experts in numeric order (a few at a time: that bounds memory), then the rest by falling item size,
so that every tensor starts where its dtype can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mimoquant.checkpoint.index import TensorInfo
from mimoquant.checkpoint.writer import Entry, file_order, shard_header
from mimoquant.errors import CheckpointError
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight, expert_module
from mimoquant.planning.output_settings import OutputSettings
from mimoquant.planning.reorder import Reorder, reorder
from mimoquant.quant.formats import MXFP4, Format
from mimoquant.weights.container import (
    CALIBRATED,
    UNIT,
    expert_tensors,
    input_scale_tensor,
    keeps_fp8,
    scales_inputs,
    shape_tensor,
)


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor whose bytes go out unchanged: the values of `weight`, or its FP8 scales."""

    weight: Weight
    info: TensorInfo
    entries: tuple[Entry, ...]

    @property
    def role(self) -> str:
        return self.weight.role


@dataclass(frozen=True, slots=True)
class Dequantize:
    """An FP8 weight, or a float32 matrix, to bf16."""

    weight: Weight
    entries: tuple[Entry, ...]

    @property
    def role(self) -> str:
        return self.weight.role


@dataclass(frozen=True, slots=True)
class Shapes:
    """The `weight_shape` tensors of a layer's experts."""

    entries: tuple[Entry, ...]
    shapes: tuple[tuple[int, int], ...]
    role: ClassVar[str] = "expert"


@dataclass(frozen=True, slots=True)
class InputScales:
    """What scales the activations of a layer's experts: gate's, up's and down's of each, in the experts' order.
    `calibrated`: by the largest that were seen; else each is 1, for nothing is known of them."""

    layer: int
    calibrated: bool
    entries: tuple[Entry, ...]
    role: ClassVar[str] = "expert"


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts `begin..end` of a MoE layer. `fmt` None: kept, as `kept` bf16, fp8 or mxfp4. `as_codes`: 4 bits of the
    source are read as the codes that they are, not as bf16."""

    layer: int
    begin: int
    end: int
    fmt: Format | None
    kept: str | None
    as_codes: bool
    entries: tuple[Entry, ...]
    role: ClassVar[str] = "expert"


MATRICES = ("embedding", "qkv", "q", "k", "v", "o", "dense", "mtp_projection", "lm_head")
Step = Copy | Dequantize | Reorder | Shapes | InputScales | Experts


@dataclass(frozen=True, slots=True)
class Unit:
    """One output shard."""

    name: str
    file: str
    steps: tuple[Step, ...]
    header_bytes: int
    tensor_bytes: int

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def size_bytes(self) -> int:
        return self.header_bytes + self.tensor_bytes

    @property
    def entries(self) -> list[Entry]:
        return [entry for step in self.steps for entry in step.entries]


def layer_of(unit: str) -> int | None:
    """The decoder layer that a unit of this name is, if it is one."""
    return int(unit.removeprefix("layer ")) if unit.startswith("layer ") else None


def lay_out(steps: dict[str, tuple[Step, ...]], source: Path) -> list[Unit]:
    """Name of unit → steps, as shards. Raises CheckpointError where a tensor would not be aligned."""
    units = []
    for number, (name, made) in enumerate(steps.items(), start=1):
        entries = [entry for step in made for entry in step.entries]
        try:
            header = shard_header(entries)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}; such shapes cannot be stored") from error
        file = f"model-{number:05d}-of-{len(steps):05d}.safetensors"
        units.append(Unit(name, file, made, len(header), sum(entry.size_bytes for entry in entries)))
    return units


def is_wide(weight: Weight) -> bool:
    """Whether a matrix is stored in float32, which engines hold in bf16 all the same."""
    return weight.info.dtype == "F32" and weight.role in MATRICES


class UnitBuilder:
    """Lays the units out as shards, steps and entries."""

    def __init__(
        self,
        layout: ModelLayout,
        container: str,
        formats: dict[int, Format],
        carve_outs: dict[int, str],
        chunk_bytes: int,
        output: OutputSettings,
        *,
        casts: bool,
    ) -> None:
        """`casts`: whether experts are read as the codes that they are."""
        self.layout, self.container, self.input_scales = layout, container, output.input_scales
        self.keeps_fp8, self.casts = keeps_fp8(container, output.dense), casts
        self.formats, self.carve_outs, self.chunk_bytes = formats, carve_outs, chunk_bytes
        self.bf16_qkv = layout.ragged_qkv_layers if self.keeps_fp8 else ()

    def units(self) -> list[Unit]:
        return lay_out({name: tuple(self._steps(name)) for name in self.layout.units}, self.layout.index.folder)

    def _steps(self, unit: str) -> Iterable[Step]:
        layer = layer_of(unit)
        if layer in self.formats or layer in self.carve_outs:
            assert layer is not None
            yield from self._expert_steps(layer)
        rest = [self._rest(weight, layer) for weight in self.layout.units[unit]]
        yield from sorted((step for steps in rest for step in steps), key=lambda step: file_order(step.entries[0]))

    def _rest(self, weight: Weight, layer: int | None) -> list[Step]:
        """The steps of one weight that is not an expert's."""
        geometry = self.layout.geometry
        bf16 = weight.scale is None and not geometry.fp8  # fused, which only FP8 may be: engines misread it
        if weight.role == "qkv" and (bf16 or not self.keeps_fp8):
            sliding = layer is None or geometry.sliding[layer]  # MTP layers are sliding
            return [*reorder([weight], geometry, replace(geometry, fused_qkv=False), sliding=sliding, bf16=True)]
        widened = not self.keeps_fp8 or (layer in self.bf16_qkv and weight.role in ("q", "k", "v"))
        if (widened and weight.scale is not None) or is_wide(weight):
            return [Dequantize(weight, (Entry(weight.name, "BF16", weight.info.shape),))]
        return [Copy(weight, info, (Entry(info.name, info.dtype, info.shape),)) for info in weight.infos]

    def _expert_steps(self, layer: int) -> Iterable[Step]:
        experts, fmt = self.layout.geometry.experts, self.formats.get(layer)
        modules = [(e, p) for e in range(experts) for p in PROJECTIONS]
        if fmt and shape_tensor(self.container, fmt):
            yield Shapes(
                tuple(Entry(f"{expert_module(layer, e, p)}.weight_shape", "I64", (2,)) for e, p in modules),
                tuple(self.layout.geometry.expert_shape(p) for _, p in modules),
            )
        scales: list[Step] = []
        if fmt and scales_inputs(fmt, self.input_scales):
            suffix, shape = input_scale_tensor(self.container)
            entries = tuple(Entry(f"{expert_module(layer, e, p)}.{suffix}", "F32", shape) for e, p in modules)
            scales = [InputScales(layer, self.input_scales == CALIBRATED, entries)]
        if self.input_scales == UNIT:
            yield from scales
        kept = self.carve_outs.get(layer)
        small = self.casts and kept != "bf16"  # a kept layer of a calibrated run goes through as bf16 too
        size = sum(self.layout.expert(layer, 0, p).loaded_bytes(as_codes=small) for p in PROJECTIONS)
        chunk = -(-experts // -(-experts // max(1, self.chunk_bytes // size)))  # as even as can be, for ranks
        for begin in range(0, experts, chunk):
            end = min(begin + chunk, experts)
            entries = tuple(entry for e in range(begin, end) for entry in self._expert_entries(layer, e, fmt, kept))
            yield Experts(layer, begin, end, fmt, kept, small or kept == "mxfp4", entries)
        if self.input_scales == CALIBRATED:  # known when all experts have been passed
            yield from scales

    def _expert_entries(self, layer: int, expert: int, fmt: Format | None, kept: str | None) -> Iterable[Entry]:
        for projection in PROJECTIONS:
            module, shape = expert_module(layer, expert, projection), self.layout.geometry.expert_shape(projection)
            if fmt or kept == "mxfp4":
                for stored in expert_tensors(self.container, fmt or MXFP4, *shape):
                    yield Entry(f"{module}.{stored.suffix}", stored.dtype, stored.shape)
            elif kept == "fp8":
                weight = self.layout.expert(layer, expert, projection)
                assert weight.scale is not None
                yield Entry(f"{module}.weight_scale", "F32", weight.scale.shape)
                yield Entry(f"{module}.weight", "F8_E4M3", shape)
            else:
                yield Entry(f"{module}.weight", "BF16", shape)
