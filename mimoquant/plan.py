"""Recipe + headers → `Plan`: exactly what happens to every tensor, and what the output weighs.

Key idea: the plan is the object that `quantize` executes and `verify` checks against. It is made from headers only, so
a terabyte is planned in seconds, and it fixes every output tensor, file and byte before any weight is read.

A unit (one decoder layer, the embeddings, the head, MTP, the towers) is one shard. Inside a shard the steps lie in file
order: shapes, experts in numeric order (a few at a time: that bounds memory), then the rest by falling item size, so
that every tensor starts where its dtype can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mimoquant
from mimoquant.checkpoint.hf_files import CONFIG_NAME, side_files
from mimoquant.checkpoint.index import CheckpointIndex, TensorInfo, open_index, read_json_object, resolve_inside
from mimoquant.checkpoint.writer import Entry, file_order, shard_header
from mimoquant.container import COMPRESSED_TENSORS, NATIVE, expert_tensors, output_config, shape_tensor
from mimoquant.errors import CheckpointError, RecipeError
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight, read_layout
from mimoquant.quant.formats import Format
from mimoquant.recipe import Recipe
from mimoquant.reorder import Reorder, reorder

CHUNK_BYTES = 96 * 2**20  # source bytes of the experts that are in memory together
CUDA_CHUNK_BYTES = 800 * 2**20  # the same, where a GPU calibrates: some thirty experts, V2.5's in eight chunks
WRITE_QUEUE_BYTES = 192 * 2**20  # results that may wait for the disk


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor whose bytes go out unchanged: the values of `weight`, or its FP8 scales."""

    weight: Weight
    info: TensorInfo
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Dequantize:
    """An FP8 weight to bf16."""

    weight: Weight
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Shapes:
    """The `weight_shape` tensors of a layer's experts."""

    entries: tuple[Entry, ...]
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts `begin..end` of a MoE layer. `fmt` None: kept, as `kept` bf16 or fp8."""

    layer: int
    begin: int
    end: int
    fmt: Format | None
    kept: str | None
    entries: tuple[Entry, ...]


Step = Copy | Dequantize | Reorder | Shapes | Experts


@dataclass(frozen=True, slots=True)
class Unit:
    """One output shard."""

    name: str
    file: str
    steps: tuple[Step, ...]
    header_bytes: int
    tensor_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.header_bytes + self.tensor_bytes

    @property
    def entries(self) -> list[Entry]:
        return [entry for step in self.steps for entry in step.entries]


@dataclass(frozen=True)
class Plan:
    """Everything a run will do. Sizes are in bytes and exact."""

    layout: ModelLayout
    recipe: Recipe
    container: str
    formats: dict[int, Format]
    carve_outs: dict[int, str]
    units: list[Unit]
    side_files: dict[str, int]  # relative path → bytes, copied
    notes: list[str]
    config: dict[str, Any]
    index_metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def shard_bytes(self) -> int:
        return sum(unit.size_bytes for unit in self.units)

    @property
    def tensor_bytes(self) -> int:
        return sum(unit.tensor_bytes for unit in self.units)

    @property
    def source_bytes(self) -> int:
        return self.layout.index.size_bytes

    @property
    def layers_by_format(self) -> dict[str, list[int]]:
        """Format label → the MoE layers that get it."""
        layers: dict[str, list[int]] = {}
        for layer, fmt in sorted(self.formats.items()):
            layers.setdefault(fmt.label, []).append(layer)
        return layers

    @property
    def side_bytes(self) -> int:
        return sum(self.side_files.values())

    def identity(self) -> dict[str, str]:
        """What a resumed run must share with the one that began: anything here changes the output."""
        resolved = self.recipe.resolved(self.container)
        resolved["mimoquant"].get("calibration", {}).pop("max_starved_experts", None)  # stops a run, changes no byte
        recipe = json.dumps(resolved, sort_keys=True, default=str)
        return {
            "version": mimoquant.__version__,
            "source headers": self.layout.index.headers_fingerprint(),
            "container": self.container,
            "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        }


def make_plan(
    source: Path | str,
    recipe: Recipe,
    *,
    container: str | None = None,
    allow_unknown: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Plan:
    """Plan a run. Reads headers and config.json only.

    Args:
        container: overrides the recipe's; None lets the recipe, then the format and the source decide.
    Raises:
        UsageError, CheckpointError: the source; RecipeError: the recipe does not fit this source.
    """
    index = open_index(source)
    config = read_config(index)
    layout = read_layout(index, config, allow_unknown=allow_unknown)
    formats, carve_outs = _resolve_layers(layout, recipe)
    _check_shapes(layout, recipe, formats)
    notes: list[str] = []
    chosen = _choose_container(layout, recipe, container or recipe.container, formats, carve_outs, notes)
    recipe = _with_carve_outs(recipe, carve_outs)
    builder = _Builder(layout, chosen, formats, carve_outs, chunk_bytes)
    units = builder.units()
    notes += _notes(layout, recipe, chosen, carve_outs)
    plan = Plan(
        layout, recipe, chosen, formats, carve_outs, units, side_files(index.folder), notes,
        output_config(config, chosen, formats, carve_outs),
    )  # fmt: skip
    metadata = dict(index.metadata) if chosen == NATIVE else {}
    return replace(plan, index_metadata=metadata | {"total_size": plan.tensor_bytes})


def read_config(index: CheckpointIndex) -> dict[str, Any]:
    """config.json of a checkpoint folder."""
    return read_json_object(resolve_inside(index.folder, CONFIG_NAME), max_bytes=50_000_000)


def _resolve_layers(layout: ModelLayout, recipe: Recipe) -> tuple[dict[int, Format], dict[int, str]]:
    """Which format each MoE layer gets, and which layers are kept. One layer has one fate: engines load no mixture."""
    _refuse_other_modules(layout, recipe)
    formats: dict[int, Format] = {}
    kept: dict[int, str] = {}
    moe_layers = set(layout.geometry.moe_layers)
    for layer in recipe.carve_outs:
        if layer not in moe_layers:
            raise RecipeError(
                f"recipe {recipe.name}: carve_outs names layer {layer}, which has no routed experts",
                hint=f"the MoE layers are {ranges(moe_layers)}",
            )
    for layer in sorted(moe_layers):
        fates = {_fate(layout, recipe, layer, e, p) for e in range(layout.geometry.experts) for p in PROJECTIONS}
        if len(fates) > 1:
            raise RecipeError(
                f"recipe {recipe.name}: layer {layer} is treated in {len(fates)} ways; "
                "the experts of one layer must all have one format",
                hint="no engine loads a mixture inside a layer: match whole layers",
            )
        fate = fates.pop()
        if layer in recipe.carve_outs or fate is None:
            kept[layer] = recipe.carve_outs.get(layer, "bf16")
        else:
            formats[layer] = fate
    if not formats:
        raise RecipeError(
            f"recipe {recipe.name}: no routed expert of layers {ranges(moe_layers)} matches, nothing to quantize"
        )
    return formats, kept


def _fate(layout: ModelLayout, recipe: Recipe, layer: int, expert: int, projection: str) -> Format | None:
    module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
    group = recipe.group_of(module, recipe.ignores(module))
    if group is None and not recipe.ignores(module) and any("Linear" in g.targets for g in recipe.groups):
        group = next(g for g in recipe.groups if "Linear" in g.targets)
    return group.fmt if group else None


_LINEAR_ROLES = ("qkv", "q", "k", "v", "o", "dense", "mtp_projection", "lm_head")


def _refuse_other_modules(layout: ModelLayout, recipe: Recipe) -> None:
    """Only routed experts are quantized: a recipe that also claims another matrix is refused by name."""
    linear = any("Linear" in group.targets for group in recipe.groups)
    for weights in layout.units.values():
        for weight in weights:
            module = weight.name.removesuffix(".weight")
            ignored = recipe.ignores(module)
            claimed = recipe.group_of(module, ignored) is not None
            if claimed or (linear and not ignored and weight.role in _LINEAR_ROLES):
                raise RecipeError(
                    f"recipe {recipe.name}: would quantize {module} ({weight.role}); only routed experts are quantized",
                    hint=r"target 're:.*mlp\.experts\.\d+\.(gate|up|down)_proj$', or add it to ignore",
                )


def _check_shapes(layout: ModelLayout, recipe: Recipe, formats: dict[int, Format]) -> None:
    for fmt in set(formats.values()):
        for projection in PROJECTIONS:
            problem = fmt.misfit(*layout.geometry.expert_shape(projection))
            if problem:
                raise RecipeError(f"recipe {recipe.name}: experts' {projection}_proj cannot be {fmt.label}: {problem}")


def _choose_container(
    layout: ModelLayout,
    recipe: Recipe,
    wanted: str | None,
    formats: dict[int, Format],
    carve_outs: dict[int, str],
    notes: list[str],
) -> str:
    only_mxfp4 = all(fmt.name == "mxfp4" for fmt in formats.values())
    obstacle = None
    if not only_mxfp4:
        obstacle = "holds MXFP4 only"
    elif not layout.geometry.fp8:
        obstacle = "needs an FP8 source (it declares quant_method fp8)"
    elif "fp8" in carve_outs.values():
        obstacle = "cannot hold a layer of FP8 experts"
    if wanted == NATIVE and obstacle:
        raise RecipeError(
            f"recipe {recipe.name}: the native container {obstacle}", hint=f"use --container {COMPRESSED_TENSORS}"
        )
    if wanted is None and only_mxfp4 and obstacle:
        notes.append(f"container compressed-tensors: the native MXFP4 container {obstacle}")
    chosen = wanted or (COMPRESSED_TENSORS if obstacle else NATIVE)
    fp8_kept = sorted(layer for layer, kind in carve_outs.items() if kind == "fp8")
    if fp8_kept and not all(layout.expert(layer, 0, p).scale for layer in fp8_kept for p in PROJECTIONS):
        raise RecipeError(f"recipe {recipe.name}: layer {fp8_kept[0]} cannot stay fp8, the source's experts are bf16")
    return chosen


def _with_carve_outs(recipe: Recipe, carve_outs: dict[int, str]) -> Recipe:
    """The recipe with its kept layers named both ways: `carve_outs` for us, `ignore` for llm-compressor."""
    patterns = [rf"re:.*layers\.{layer}\.mlp\.experts\..*" for layer in sorted(carve_outs)]
    ignore = tuple(dict.fromkeys((*recipe.ignore, *patterns)))
    return replace(recipe, carve_outs=carve_outs, ignore=ignore)


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


class _Builder:
    """Lays the units out as shards, steps and entries."""

    def __init__(
        self, layout: ModelLayout, container: str, formats: dict[int, Format], carve_outs: dict[int, str],
        chunk_bytes: int,
    ) -> None:  # fmt: skip
        self.layout, self.container = layout, container
        self.formats, self.carve_outs, self.chunk_bytes = formats, carve_outs, chunk_bytes

    def units(self) -> list[Unit]:
        return lay_out({name: tuple(self._steps(name)) for name in self.layout.units}, self.layout.index.folder)

    def _steps(self, unit: str) -> Iterable[Step]:
        layer = int(unit.removeprefix("layer ")) if unit.startswith("layer ") else None
        if layer in self.formats or layer in self.carve_outs:
            assert layer is not None
            yield from self._expert_steps(layer)
        rest = [self._rest(weight, layer) for weight in self.layout.units[unit]]
        yield from sorted((step for steps in rest for step in steps), key=lambda step: file_order(step.entries[0]))

    def _rest(self, weight: Weight, layer: int | None) -> list[Step]:
        """The steps of one weight that is not an expert's."""
        if self.container == COMPRESSED_TENSORS and weight.role == "qkv":
            geometry = self.layout.geometry
            sliding = layer is None or geometry.sliding[layer]  # MTP layers are sliding
            return [*reorder([weight], geometry, replace(geometry, fused_qkv=False), sliding=sliding, bf16=True)]
        if self.container == COMPRESSED_TENSORS and weight.scale is not None:
            return [Dequantize(weight, (Entry(weight.name, "BF16", weight.info.shape),))]
        return [Copy(weight, info, (Entry(info.name, info.dtype, info.shape),)) for info in weight.infos]

    def _expert_steps(self, layer: int) -> Iterable[Step]:
        experts, fmt = self.layout.geometry.experts, self.formats.get(layer)
        modules = [(e, p) for e in range(experts) for p in PROJECTIONS]
        if fmt and shape_tensor(self.container, fmt):
            yield Shapes(
                tuple(Entry(f"{_module(layer, e, p)}.weight_shape", "I64", (2,)) for e, p in modules),
                tuple(self.layout.geometry.expert_shape(p) for _, p in modules),
            )
        size = sum(self.layout.expert(layer, 0, p).size_bytes for p in PROJECTIONS)
        chunk = -(-experts // -(-experts // max(1, self.chunk_bytes // size)))  # as even as can be, for ranks
        for begin in range(0, experts, chunk):
            end = min(begin + chunk, experts)
            kept = self.carve_outs.get(layer)
            entries = tuple(entry for e in range(begin, end) for entry in self._expert_entries(layer, e, fmt, kept))
            yield Experts(layer, begin, end, fmt, kept, entries)

    def _expert_entries(self, layer: int, expert: int, fmt: Format | None, kept: str | None) -> Iterable[Entry]:
        for projection in PROJECTIONS:
            module, shape = _module(layer, expert, projection), self.layout.geometry.expert_shape(projection)
            if fmt:
                for stored in expert_tensors(self.container, fmt, *shape):
                    yield Entry(f"{module}.{stored.suffix}", stored.dtype, stored.shape)
            elif kept == "fp8":
                weight = self.layout.expert(layer, expert, projection)
                assert weight.scale is not None
                yield Entry(f"{module}.weight_scale", "F32", weight.scale.shape)
                yield Entry(f"{module}.weight", "F8_E4M3", shape)
            else:
                yield Entry(f"{module}.weight", "BF16", shape)


def _module(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"


def _notes(layout: ModelLayout, recipe: Recipe, container: str, carve_outs: dict[int, str]) -> list[str]:
    """What a user should know before starting."""
    notes = []
    geometry = layout.geometry
    dequantized = sum(weight.scale is not None for weights in layout.units.values() for weight in weights)
    if container == COMPRESSED_TENSORS and dequantized:
        notes.append(
            f"{dequantized} FP8 weights beside the experts (attention, dense MLP, MTP) become bf16: "
            "compressed-tensors has no place for their block scales"
        )
    if container == COMPRESSED_TENSORS and geometry.fused_qkv:
        notes.append(
            f"fused qkv ({geometry.qkv_chunks} interleaved ranks) is written as bf16 q_proj, k_proj, v_proj with "
            "attention_projection_layout: split, which vLLM and SGLang load rightly at any tensor parallelism"
        )
    if container == NATIVE and carve_outs:
        notes.append("bf16 layers in the native container go by ignored_layers, as vLLM 0.33 reads it; SGLang untried")
    if not layout.mtp_layers:
        notes.append("the source has no MTP layers: speculative decoding by MTP will not be possible")
    if layout.unknown:
        notes.append(f"{len(layout.unknown)} unknown tensors are copied as they are, first {layout.unknown[0]}")
    if recipe.calibration is not None:
        held = recipe.calibration
        notes.append(f"calibrates on {', '.join(held.data)}: {held.sequences} sequences of {held.tokens} tokens")
    if recipe.real_fold and any(map(recipe.folds_norm, geometry.moe_layers)):
        notes.append("fold exact-real rounds norms and routers anew, so a few tokens may go to other experts")
    return notes


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 → '1-3, 7'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
