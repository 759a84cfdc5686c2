"""Recipe + headers → `Plan`: exactly what happens to every tensor, and what the output weighs.

Key idea: the plan is the object that `quantize` executes and `verify` checks against. It is made from headers only, so
a terabyte is planned in seconds, and it fixes every output tensor, file and byte before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mimoquant.__version__ import __version__
from mimoquant.checkpoint.hf_files import CONFIG_NAME, side_files
from mimoquant.checkpoint.index import open_index
from mimoquant.errors import MimoquantError, RecipeError
from mimoquant.model.config_keys import text_keys
from mimoquant.model.layout import PROJECTIONS, ModelLayout, read_layout
from mimoquant.model.rounding import INPUT_SCALE_SUFFIXES
from mimoquant.planning.carve_outs import kept_as, kept_kinds, stored_kind, with_carve_outs
from mimoquant.planning.notes import plan_notes
from mimoquant.planning.recipe import Recipe
from mimoquant.planning.settings_beside import read_config
from mimoquant.planning.side_json import Fault, json_faults, refusal
from mimoquant.planning.stored import native_obstacle
from mimoquant.planning.targets import check_targets, expert_format
from mimoquant.planning.units import Copy, Unit, UnitBuilder, is_wide
from mimoquant.quant.formats import Format
from mimoquant.weights.container import (
    CALIBRATED,
    COMPRESSED_TENSORS,
    MODELOPT,
    NATIVE,
    NONE,
    keeps_fp8,
    output_config,
)
from mimoquant.wording import ranges

CHUNK_BYTES = 96 * 2**20  # source bytes of the experts that are in memory together
CUDA_CHUNK_BYTES = 800 * 2**20  # the same, where a GPU calibrates: some thirty experts, V2.5's in eight chunks
CAST_CHUNK_BYTES = 16 * 2**20  # the same of a cast, which computes next to nothing: what stays in a cache


@dataclass(frozen=True)
class Plan:
    """Everything a run will do. Sizes are in bytes and exact."""

    layout: ModelLayout
    recipe: Recipe
    container: str
    formats: dict[int, Format]
    carve_outs: dict[int, str]
    units: list[Unit]
    side_files: dict[str, int]  # relative path → bytes, copied; or `mended`
    notes: list[str]
    config: dict[str, Any]
    index_metadata: dict[str, Any] = field(default_factory=dict)
    json_faults: tuple[Fault, ...] = ()  # of the side files
    gpu_bytes: int = 0  # that a run may take of a GPU's memory; 0: all of it

    @property
    def json_refusal(self) -> MimoquantError | None:
        """A side file that no parser takes and the recipe does not mend, if there is one."""
        return refusal(self.json_faults, mend=self.recipe.output.mend_json)

    @property
    def mended(self) -> dict[str, bytes]:
        """Side files that go out otherwise than they are: name → bytes."""
        faults = self.json_faults if self.recipe.output.mend_json else ()
        return {fault.name: fault.mended for fault in faults if fault.mended is not None}

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

    def calibrates_inputs(self, layer: int) -> bool:
        """Whether a layer's input scales come from the calibration tokens."""
        fmt = self.formats.get(layer)
        return fmt is not None and self.recipe.output.input_scales == CALIBRATED and self.recipe.scales_inputs(fmt)

    def engine_device(self, device: str) -> str:
        """Where a run on `device` computes: a cast moves bytes, which a GPU would do no sooner."""
        return "cpu" if self.recipe.casts else device

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that began: anything here changes the output. JSON can hold it."""
        resolved = self.recipe.resolved(self.container)
        resolved["mimoquant"].get("calibration", {}).pop("max_starved_experts", None)  # stops a run, changes no byte
        return {
            "version": __version__,
            "source headers": self.layout.index.headers_fingerprint(),
            "container": self.container,
            "recipe": resolved,
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
    layout = _read_source(source, recipe, allow_unknown=allow_unknown)
    index = layout.index
    formats, kept = _resolve_layers(layout, recipe)
    if recipe.casts:
        _check_cast(layout, recipe, formats)
    carve_outs = kept_kinds(layout, recipe, kept)
    _check_shapes(layout, recipe, formats)
    _check_input_scales(recipe, formats)
    notes: list[str] = []
    chosen = _choose_container(layout, recipe, container or recipe.container, formats, carve_outs, notes)
    if chosen == MODELOPT:
        formats = {layer: replace(fmt, pow2_global=True) for layer, fmt in formats.items()}
    if recipe.casts:
        _refuse_unchanged(layout, recipe, chosen, formats, carve_outs)
    recipe = with_carve_outs(recipe, kept)
    chunk_bytes = min(chunk_bytes, CAST_CHUNK_BYTES) if recipe.casts else chunk_bytes
    builder = UnitBuilder(layout, chosen, formats, carve_outs, chunk_bytes, recipe.output, casts=recipe.casts)
    units = builder.units()
    notes += plan_notes(layout, recipe, chosen, carve_outs)
    beside = side_files(index.folder, index.file_sizes)
    faults = json_faults(layout, beside.sizes)
    if beside.left_out:
        notes.append(f"not copied: {', '.join(beside.left_out)}")
    plan = Plan(
        layout,
        recipe,
        chosen,
        formats,
        carve_outs,
        units,
        beside.sizes,
        notes,
        output_config(
            layout.config,
            chosen,
            formats,
            carve_outs,
            builder.bf16_qkv,
            modules=_named_modules(chosen, layout, units),
            input_scales=recipe.output.input_scales,
        ),
        json_faults=faults,
    )
    return _finished(plan)


def _finished(plan: Plan) -> Plan:
    """A plan with what follows from its units and its faulty side files."""
    mended = plan.mended
    notes = [*plan.notes, *(f"{name} is written mended, without a comma that no JSON parser takes" for name in mended)]
    metadata = dict(plan.layout.index.metadata) if keeps_fp8(plan.container, plan.recipe.output.dense) else {}
    if plan.container != NATIVE:
        metadata.pop("save_format", None)
    return replace(
        plan,
        side_files=plan.side_files | {name: len(data) for name, data in mended.items()},
        notes=notes,
        index_metadata=metadata | {"total_size": plan.tensor_bytes},
    )


def _read_source(source: Path | str, recipe: Recipe, *, allow_unknown: bool) -> ModelLayout:
    """Experts may be in 4 bits where they are cast, and where they are the family's own MXFP4, as V2.6 is published."""
    index = open_index(source)
    config = read_config(index)
    quantization = text_keys(config, str(index.folder / CONFIG_NAME)).get("quantization_config")
    declared = isinstance(quantization, dict) and quantization.get("store_dtype") == "mxfp4"
    mxfp4 = declared and any(t.dtype == "U8" and ".mlp.experts." in name for name, t in index.tensors.items())
    return read_layout(index, config, allow_unknown=allow_unknown, packed=recipe.casts or mxfp4)


def _resolve_layers(layout: ModelLayout, recipe: Recipe) -> tuple[dict[int, Format], dict[int, str]]:
    """Which format each MoE layer gets, and which layers are kept. One layer has one fate: engines load no mixture."""
    check_targets(layout, recipe)
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
        fates = {expert_format(recipe, layer, e, p) for e in range(layout.geometry.experts) for p in PROJECTIONS}
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
            f"recipe {recipe.name}: no routed expert of layers {ranges(moe_layers)} matches, nothing to quantize",
            hint="the usual target is 're:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$'",
        )
    _check_reconstruction(recipe, formats)
    return formats, kept


def _check_reconstruction(recipe: Recipe, formats: dict[int, Format]) -> None:
    calibration = recipe.calibration
    strange = sorted(set(calibration.reconstruct_layers) - formats.keys()) if calibration else []
    if strange:
        raise RecipeError(
            f"recipe {recipe.name}: layer {strange[0]} cannot be refined, it is not quantized",
            hint=f"quantized are {ranges(formats)}",
        )
    if calibration and calibration.reconstruct_layers and not calibration.reconstruct:
        raise RecipeError(f"recipe {recipe.name}: layers to refine are named, and no rounds", hint="add --refine 1")


_LINEAR = ("qkv", "q", "k", "v", "o", "dense")


def _check_shapes(layout: ModelLayout, recipe: Recipe, formats: dict[int, Format]) -> None:
    for fmt in set(formats.values()):
        for projection in PROJECTIONS:
            problem = fmt.misfit(*layout.geometry.expert_shape(projection))
            if problem:
                raise RecipeError(f"recipe {recipe.name}: experts' {projection}_proj cannot be {fmt.label}: {problem}")


def _check_input_scales(recipe: Recipe, formats: dict[int, Format]) -> None:
    wanted = recipe.output.input_scales
    if wanted == CALIBRATED and recipe.calibration is None:
        raise RecipeError(
            f"recipe {recipe.name}: input scales are to be calibrated, and it needs no tokens to calibrate them on",
            hint="add --input-scales unit, or choose a recipe that calibrates, such as gptq-nvfp4-w4a4",
        )
    if wanted != NONE and not any(map(recipe.scales_inputs, formats.values())):
        found = ", ".join(sorted({fmt.label for fmt in formats.values()}))
        raise RecipeError(
            f"recipe {recipe.name}: input scales ({wanted}) are for NVFP4 experts, and its own are {found}",
            hint="leave --input-scales out",
        )


def _check_cast(layout: ModelLayout, recipe: Recipe, formats: dict[int, Format]) -> None:
    """What is cast is MXFP4, or NVFP4 of it."""
    _refuse_mxfp8(layout, recipe)
    for (layer, _, _), weight in layout.experts.items():
        found = stored_kind(weight)
        if layer in formats and found not in ("mxfp4", "nvfp4"):
            raise RecipeError(
                f"recipe {recipe.name}: casts MXFP4 experts and NVFP4 of them, {weight.name} is {found}",
                hint=None
                if weight.packed
                else "quantize such a source by another recipe; where it is a layer of a "
                f"cast, keep it: carve_outs: {{{layer}: source}}",
            )


def _refuse_mxfp8(layout: ModelLayout, recipe: Recipe) -> None:
    if any(weight.scale.dtype == "U8" for weights in layout.units.values() for weight in weights if weight.scale):
        raise RecipeError(
            f"recipe {recipe.name}: {layout.index.folder} has MXFP8 beside its experts, which no container takes",
            hint="cast its source, which has the same experts",
        )


def _choose_container(
    layout: ModelLayout,
    recipe: Recipe,
    wanted: str | None,
    formats: dict[int, Format],
    carve_outs: dict[int, str],
    notes: list[str],
) -> str:
    if wanted == MODELOPT:
        _check_modelopt(layout, recipe, formats, carve_outs)
        return MODELOPT
    if recipe.output.dense == "fp8":
        raise RecipeError(
            f"recipe {recipe.name}: dense fp8 is for the modelopt container",
            hint="add --container modelopt; native keeps FP8 by itself, compressed-tensors has no place for it",
        )
    only_mxfp4 = all(fmt.name == "mxfp4" for fmt in formats.values())
    if recipe.casts and only_mxfp4:
        return _container_of_mxfp4(layout, recipe, wanted, carve_outs)
    obstacle = None
    if not only_mxfp4:
        obstacle = "holds MXFP4 only"
    elif "fp8" in carve_outs.values():
        obstacle = "cannot hold a layer of FP8 experts"
    else:
        obstacle = native_obstacle(layout, [*formats, *kept_as(carve_outs, "mxfp4")])
    if wanted == NATIVE and obstacle:
        raise RecipeError(
            f"recipe {recipe.name}: the native container {obstacle}", hint=f"use --container {COMPRESSED_TENSORS}"
        )
    if wanted is None and only_mxfp4 and obstacle:
        notes.append(f"container compressed-tensors: the native MXFP4 container {obstacle}")
    return wanted or (COMPRESSED_TENSORS if obstacle else NATIVE)


def _container_of_mxfp4(layout: ModelLayout, recipe: Recipe, wanted: str | None, carve_outs: dict[int, str]) -> str:
    """Where MXFP4 goes that is cast: from the native container to compressed-tensors', from any other back to it."""
    chosen = wanted or (COMPRESSED_TENSORS if layout.geometry.fp8 else NATIVE)
    if chosen == NATIVE and "fp8" in carve_outs.values():
        raise RecipeError(
            f"recipe {recipe.name}: the native container cannot hold a layer of FP8 experts",
            hint=f"use --container {COMPRESSED_TENSORS}",
        )
    return chosen


def _refuse_unchanged(
    layout: ModelLayout, recipe: Recipe, chosen: str, formats: dict[int, Format], carve_outs: dict[int, str]
) -> None:
    """A cast into the form that the experts have, which would change nothing beside them either."""
    geometry, first = layout.geometry, layout.expert(next(iter(formats)), 0, PROJECTIONS[0])
    here = NATIVE if geometry.fp8 else MODELOPT if geometry.mxfp8 else COMPRESSED_TENSORS
    stored, wanted = (
        {stored_kind(layout.expert(n, 0, PROJECTIONS[0])) for n in formats},
        {f.name for f in formats.values()},
    )
    scaled = any(info.name.endswith(INPUT_SCALE_SUFFIXES) for info in first.packed)
    if chosen != here or stored != wanted or "bf16" in carve_outs.values():
        return
    if scaled != (recipe.output.input_scales != NONE):
        return
    if chosen == MODELOPT:
        beside = [weight for weights in layout.units.values() for weight in weights]
        narrowed = any(map(is_wide, beside)) or (recipe.output.dense == "bf16" and any(w.scale for w in beside))
        if narrowed:
            return
    raise RecipeError(f"recipe {recipe.name}: the experts are {stored.pop().upper()} in the {chosen} container already")


def _check_modelopt(
    layout: ModelLayout, recipe: Recipe, formats: dict[int, Format], carve_outs: dict[int, str]
) -> None:
    other = next((fmt for fmt in formats.values() if fmt.name != "nvfp4"), None)
    kept = next((kind for kind in carve_outs.values() if kind != "bf16"), None)
    problem = f"not {other.label}" if other else f"and no layer of {kept.upper()} experts" if kept else None
    if problem:
        raise RecipeError(
            f"recipe {recipe.name}: the modelopt container holds NVFP4, {problem}",
            hint=f"use --container {COMPRESSED_TENSORS}",
        )
    scales = {weight.scale.dtype for weights in layout.units.values() for weight in weights if weight.scale}
    if recipe.output.dense == "fp8" and scales != {"F32"}:
        raise RecipeError(
            f"recipe {recipe.name}: dense is fp8, and {layout.index.folder} has no FP8 blocks beside its experts",
            hint="leave --dense out",
        )


def _named_modules(container: str, layout: ModelLayout, units: list[Unit]) -> list[str]:
    """Linear modules beside the experts that config.json has to name: what is FP8 under ModelOpt's, and what is bf16
    in a native one whose source is in another container."""
    if container == MODELOPT:
        copies = (step for unit in units for step in unit.steps if isinstance(step, Copy))
        return [step.weight.name.removesuffix(".weight") for step in copies if step.info == step.weight.scale]
    if container != NATIVE or layout.geometry.fp8:
        return []
    entries = (entry for unit in units for step in unit.steps if step.role in _LINEAR for entry in step.entries)
    return [entry.name.removesuffix(".weight") for entry in entries if entry.dtype == "BF16"]
