"""Recipes whose layers differ: what a layer's experts can be in a container, what each of that weighs, and the recipe.

Key idea: an option is a format or a way to keep the source's values; a mixture gives each MoE layer one. What it weighs
is asked of the plan, so it is exact; a layer's shard does not depend on what the other layers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mimoquant.errors import RecipeError
from mimoquant.mixing.served import WEIGHTS_ALONE
from mimoquant.model.layout import PROJECTIONS
from mimoquant.planning.calibration_settings import match_name
from mimoquant.planning.plan import CHUNK_BYTES, Plan, make_plan
from mimoquant.planning.recipe import Group, Recipe
from mimoquant.quant.formats import GROUP_SIZES, Format
from mimoquant.weights.container import COMPRESSED_TENSORS, EXPERT_TARGET, NONE, layers_target


@dataclass(frozen=True, slots=True)
class LayerOption:
    """What a layer's experts are: of a format, or (`fmt` None) `kept` as bf16 or fp8."""

    fmt: Format | None
    kept: str | None = None

    @property
    def label(self) -> str:
        return self.fmt.label if self.fmt else str(self.kept)


class Mixtures:
    """The mixtures of a source, container and method. A choice is the index of an option for each of `layers`.

    `plan`: all layers in the recipe's one format, which is option 0. `dropped`: what of the recipe is not in it.
    `served`: what is rounded of each option beside its weights; whoever knows engines may set it.
    """

    def __init__(
        self, plan: Plan, chunk_bytes: int = CHUNK_BYTES, *, fp8: bool = True, any_format: bool = False
    ) -> None:
        """`fp8`: whether experts may stay FP8. `any_format`: int4 beside MXFP4 and NVFP4, whatever the recipe has.

        Raises RecipeError for a recipe of several formats, one MoE layer, or a container that has no other format.
        """
        self._given, self._chunk_bytes, self.served = plan, chunk_bytes, WEIGHTS_ALONE
        self.layers = plan.layout.geometry.moe_layers
        own = _one_format(plan)
        self.dropped = [
            f"the recipe's carve-out of layer {layer} ({kind}) is dropped: layers are chosen anew"
            for layer, kind in sorted(plan.carve_outs.items())
        ]
        self.options = [option for option in _options(plan, own, any_format) if fp8 or option.kept != "fp8"]
        self.plan = self.planned([0] * len(self.layers))
        every = [self._bytes(number) for number in range(len(self.options))]
        self.bytes = [[of_option[layer] for of_option in every] for layer in self.layers]  # [layer][option]
        self.rest_bytes = self.plan.shard_bytes - sum(of_layer[0] for of_layer in self.bytes)

    @property
    def formats(self) -> list[Format]:
        """Of the options that have one, in their order."""
        return [option.fmt for option in self.options if option.fmt]

    def size(self, choice: Sequence[int]) -> int:
        """Bytes of all shards, exactly."""
        return self.rest_bytes + sum(sizes[k] for sizes, k in zip(self.bytes, choice, strict=True))

    def named(self, choice: Sequence[int]) -> dict[int, LayerOption]:
        """MoE layer → option."""
        return {layer: self.options[k] for layer, k in zip(self.layers, choice, strict=True)}

    def planned(self, choice: Sequence[int]) -> Plan:
        """Raises RecipeError where nothing is quantized."""
        layout, recipe = self._given.layout, mixed_recipe(self._given.recipe, self.named(choice))
        return make_plan(
            layout.index.folder,
            recipe,
            container=self._given.container,
            allow_unknown=bool(layout.unknown),
            chunk_bytes=self._chunk_bytes,
        )

    def _bytes(self, option: int) -> dict[int, int]:
        """MoE layer → bytes of its shard with an option."""
        count = len(self.layers)
        if self.options[option].fmt:
            return _layer_bytes(self.planned([option] * count))
        # a plan must quantize something: the first layer's bytes come from another plan than the others'
        rest = _layer_bytes(self.planned([0] + [option] * (count - 1)))
        return rest | {self.layers[0]: _layer_bytes(self.planned([option] + [0] * (count - 1)))[self.layers[0]]}


def mixed_recipe(recipe: Recipe, options: Mapping[int, LayerOption]) -> Recipe:
    """The recipe with one option for each MoE layer, and of its own what is about anything else."""
    by_format: dict[Format, list[int]] = {}
    for layer, option in options.items():
        if option.fmt:
            by_format.setdefault(option.fmt, []).append(layer)
    alike = len(by_format) == 1 and all(option.fmt for option in options.values())
    groups = [
        Group(fmt.label.replace(" ", "_"), (EXPERT_TARGET if alike else layers_target(layers),), fmt)
        for fmt, layers in sorted(by_format.items(), key=lambda item: item[0].label)
    ]
    experts = [f"model.layers.{layer}.mlp.experts.0.{p}_proj" for layer in options for p in PROJECTIONS]
    ignore = tuple(p for p in recipe.ignore if not any(match_name(name, p) for name in experts))
    kept = {layer: option.kept for layer, option in options.items() if option.kept}
    output = recipe.output if any(map(recipe.scales_inputs, by_format)) else replace(recipe.output, input_scales=NONE)
    return replace(recipe, groups=tuple(groups), ignore=ignore, carve_outs=kept, provenance={}, output=output)


def formats_of(plan: Plan) -> list[Format]:
    """What `sensitivity` would choose among, beside what can be kept. Raises RecipeError where it would refuse."""
    return [option.fmt for option in _options(plan, _one_format(plan), False) if option.fmt]


def _one_format(plan: Plan) -> Format:
    formats, name = set(plan.formats.values()), plan.recipe.name
    if len(formats) > 1:
        raise RecipeError(
            f"recipe {name}: has {len(formats)} formats ({', '.join(sorted(fmt.label for fmt in formats))}); "
            "sensitivity begins with one and mixes by itself",
            hint="give a recipe of one format, such as int4-g128-mse",
        )
    layers = plan.layout.geometry.moe_layers
    if len(layers) < 2:
        raise RecipeError(f"recipe {name}: the model has {len(layers)} MoE layer, there is nothing to choose between")
    return formats.pop()


def _options(plan: Plan, own: Format, any_format: bool) -> list[LayerOption]:
    """What the container can hold of a layer's experts, the plan's own format first."""
    if plan.container != COMPRESSED_TENSORS:
        if any_format:
            raise RecipeError(
                f"recipe {plan.recipe.name}: the container {plan.container} holds {own.label} and no other format",
                hint="--container compressed-tensors holds them all",
            )
        return [LayerOption(own), LayerOption(None, "bf16")]
    integers = [
        replace(own if own.name == "int4" else Format("int4", size), group_size=size)
        for size in sorted(GROUP_SIZES["int4"], reverse=True)
    ]
    floats = [Format("mxfp4", 32), Format("nvfp4", 16)]
    formats = integers * (any_format or own.name == "int4") + floats * (any_format or own.name != "int4")
    geometry = plan.layout.geometry
    fitting = [
        fmt for fmt in formats if fmt != own and not any(fmt.misfit(*geometry.expert_shape(p)) for p in PROJECTIONS)
    ]
    fp8 = all(plan.layout.expert(layer, 0, p).scale for layer in geometry.moe_layers for p in PROJECTIONS)
    kept = [LayerOption(None, "fp8")] if fp8 else []
    return [LayerOption(own), *map(LayerOption, fitting), *kept, LayerOption(None, "bf16")]


def _layer_bytes(plan: Plan) -> dict[int, int]:
    sizes = {unit.name: unit.size_bytes for unit in plan.units}
    return {layer: sizes[f"layer {layer}"] for layer in plan.layout.geometry.moe_layers}
