"""What a recipe's targets and ignore list reach: experts, which are quantized, and what lies beside them.

Key idea: a recipe means what llm-compressor would do by it, and llm-compressor quantizes the modules that transformers
builds. Transformers builds no MTP layers and no towers of this family, so a pattern that is meant for experts and could
match those too leaves them as they are, and is told; a matrix of the decoder that it reaches is refused by name.

Reference: `_keys_to_ignore_on_load_unexpected` of transformers 5's MiMoV2FlashPreTrainedModel; compressed-tensors'
`match_named_modules`, where a name goes before a class.
"""

from __future__ import annotations

from collections.abc import Iterator

from mimoquant.errors import RecipeError
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight, expert_module
from mimoquant.planning.calibration_settings import match_name
from mimoquant.planning.recipe import Group, Recipe
from mimoquant.quant.formats import Format

LINEAR = "Linear"  # the class, which a target may name instead of modules
_LINEAR_ROLES = ("qkv", "q", "k", "v", "o", "dense", "mtp_projection", "lm_head")
_NOT_BUILT = {"mtp": "MTP layers", "towers": "towers"}  # unit → what it is, of which transformers builds nothing


def expert_format(recipe: Recipe, layer: int, expert: int, projection: str) -> Format | None:
    """The format that a recipe gives an expert's matrix; None where it leaves it."""
    module = expert_module(layer, expert, projection)
    ignored = recipe.ignores(module)
    group = recipe.group_of(module, ignored)
    if group is None and not ignored:
        group = _linear_group(recipe)
    return group.fmt if group else None


def check_targets(layout: ModelLayout, recipe: Recipe) -> None:
    """Only routed experts are quantized. Raises RecipeError for a recipe that would quantize another matrix."""
    meant_for_experts: dict[str, bool] = {}
    for unit, weight, target in _reached_beside(layout, recipe):
        if target not in meant_for_experts:
            meant_for_experts[target] = target == LINEAR or _reaches_experts(layout, target)
        if unit not in _NOT_BUILT or not meant_for_experts[target]:
            module = weight.name.removesuffix(".weight")
            raise RecipeError(
                f"recipe {recipe.name}: would quantize {module} ({weight.role}); only routed experts are quantized",
                hint=r"target 're:.*mlp\.experts\.\d+\.(gate|up|down)_proj$', or add it to ignore",
            )


def not_built_notes(layout: ModelLayout, recipe: Recipe) -> Iterator[str]:
    """What a recipe's targets could match and transformers does not build, for a recipe that `check_targets` took."""
    found: dict[str, list[str]] = {}
    for unit, weight, _ in _reached_beside(layout, recipe):
        if len(weight.info.shape) > 1:
            found.setdefault(_NOT_BUILT[unit], []).append(weight.name.removesuffix(".weight"))
    for what, modules in found.items():
        yield (
            f"{len(modules)} matrices of {what} match the recipe's targets (first {modules[0]}) and stay as they are: "
            "transformers builds none of them, so llm-compressor would not have quantized them either"
        )


def _reached_beside(layout: ModelLayout, recipe: Recipe) -> Iterator[tuple[str, Weight, str]]:
    """What lies beside the experts and a target reaches: its unit, it, the target."""
    linear = _linear_group(recipe) is not None
    for unit, weights in layout.units.items():
        for weight in weights:
            module = weight.name.removesuffix(".weight")
            if recipe.ignores(module):
                continue
            group = recipe.group_of(module, ignored=False)
            if group is not None:
                yield unit, weight, next(target for target in group.targets if match_name(module, target))
            elif linear and _is_linear(unit, weight):
                yield unit, weight, LINEAR


def _is_linear(unit: str, weight: Weight) -> bool:
    tower = unit == "towers" and len(weight.info.shape) == 2 and weight.name.endswith(".weight")
    return tower or weight.role in _LINEAR_ROLES


def _linear_group(recipe: Recipe) -> Group | None:
    return next((group for group in recipe.groups if LINEAR in group.targets), None)


def _reaches_experts(layout: ModelLayout, target: str) -> bool:
    geometry = layout.geometry
    return any(
        match_name(expert_module(layer, expert, projection), target)
        for layer in geometry.moe_layers
        for expert in range(geometry.experts)
        for projection in PROJECTIONS
    )
