"""A checkpoint of two layers and its runs, small enough to be done a thousand times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Checkpoint, make_checkpoint
from fault_layer import Call, FaultLayer
from micro import contents

from mimoquant import pipeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import Recipe, load_recipe, parse_recipe

RECIPE = "int4-g128-rtn"


def with_nested_files(folder: Path) -> Path:
    """A checkpoint folder with a side file in folders of its own, which a run makes too."""
    (folder / "draft" / "deep").mkdir(parents=True)
    (folder / "draft" / "deep" / "notes.txt").write_text("carried over")
    return folder


def small_checkpoint(**settings: object) -> Checkpoint:
    """One dense layer, one with two experts."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    }
    return make_checkpoint(**(sizes | settings))


def recipe_of(text_or_name: str) -> Recipe:
    return parse_recipe(text_or_name, "test") if "\n" in text_or_name else load_recipe(text_or_name)


def quantize(source: Path, out: Path, *, resume: bool = False, recipe: str = RECIPE) -> None:
    pipeline.quantize(make_plan(source, recipe_of(recipe)), out, device="cpu", resume=resume)


def left_alone(source: Path, out: Path) -> tuple[dict[str, bytes], list[Call]]:
    """The files of a run that nothing stops, and its calls that change the disk."""
    with FaultLayer(out.parent).active() as layer:
        quantize(source, out)
    return contents(out), layer.calls
