"""What the experts of a kept layer stay: the recipe's words for it, held against what the source stores.

Key idea: a recipe says `bf16`, `fp8` or `source`, and the plan knows what that is of this source: bf16, fp8 or mxfp4,
the three that a container can hold. bf16 can be made of any; the others are the source's bytes, or nothing.
"""

from __future__ import annotations

from dataclasses import replace

from mimoquant.errors import RecipeError
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight
from mimoquant.planning.recipe import Recipe
from mimoquant.weights.stored import packed_format

_STORED = ("bf16", "fp8", "mxfp4")


def kept_kinds(layout: ModelLayout, recipe: Recipe, words: dict[int, str]) -> dict[int, str]:
    """Layer → bf16, fp8 or mxfp4. Raises RecipeError where the source has no such experts to keep."""
    return {layer: _kind(layout, recipe, layer, word) for layer, word in words.items()}


def _kind(layout: ModelLayout, recipe: Recipe, layer: int, word: str) -> str:
    if word == "bf16":
        return word
    experts = [layout.expert(layer, expert, p) for expert in range(layout.geometry.experts) for p in PROJECTIONS]
    stored = sorted({stored_kind(weight) for weight in experts})
    if word == "fp8" and stored != ["fp8"]:
        raise RecipeError(
            f"recipe {recipe.name}: layer {layer} cannot stay fp8, the source's experts are {' and '.join(stored)}",
            hint="carve_outs: source keeps what the source has",
        )
    if len(stored) > 1 or stored[0] not in _STORED:
        raise RecipeError(
            f"recipe {recipe.name}: layer {layer} cannot stay as in the source, whose experts there are "
            f"{' and '.join(stored)}; bf16, fp8 and mxfp4 can be kept",
            hint="keep it in bf16, or leave the carve-out out",
        )
    return stored[0]


def stored_kind(weight: Weight) -> str:
    """What an expert's matrix is in, in a word."""
    return packed_format(weight).label if weight.packed else "fp8" if weight.scale else "bf16"


def kept_as(kinds: dict[int, str], kind: str) -> list[int]:
    """The layers that are kept as `kind`."""
    return sorted(layer for layer, other in kinds.items() if other == kind)


def with_carve_outs(recipe: Recipe, words: dict[int, str]) -> Recipe:
    """The recipe with its kept layers named both ways: `carve_outs` for us, `ignore` for llm-compressor."""
    patterns = [rf"re:.*layers\.{layer}\.mlp\.experts\..*" for layer in sorted(words)]
    ignore = tuple(dict.fromkeys((*recipe.ignore, *patterns)))
    return replace(recipe, carve_outs=words, ignore=ignore)
