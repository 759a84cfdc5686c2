"""Outputs whose codes were chosen together at the end (`--refine`) are proven, and only there codes may be moved."""

from __future__ import annotations

from pathlib import Path

import pytest
from micro import MICRO

import mimoquant

EXPERTS = "targets: ['re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$']"
DOWN = "{smooth_layer: 're:.*up_proj$', balance_layers: ['re:.*down_proj$']}"
AWQ = f"AWQModifier: {{mappings: [{DOWN}], n_grid: 3}}, QuantizationModifier: {{scheme: W4A16, {EXPERTS}}}"
RTN = f"QuantizationModifier: {{scheme: W4A16, {EXPERTS}}}"
RECIPES = {
    "awq": f"default_stage: {{default_modifiers: {{{AWQ}}}}}",
    "awq, real": f"default_stage: {{default_modifiers: {{{AWQ}}}}}\nmimoquant: {{fold: exact-real}}",
    "search": f"default_stage: {{default_modifiers: {{{RTN}}}}}\nmimoquant: {{scale_search: gram}}",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["awq, real", *(pytest.param(name, marks=pytest.mark.slow) for name in ("awq", "search"))]
)
def test_rounds_at_the_end_are_no_problem(name: str, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(RECIPES[name])
    mimoquant.quantize(MICRO, str(recipe), out, sequences=4, tokens=64, refine=1, refine_layer=[2], device="cpu")
    found = mimoquant.verify(out, MICRO)
    assert found["ok"] and found["problems"] == []
    text = (out / "recipe.yaml").read_text()
    moved = text.replace("reconstruct_layers: [2]", "reconstruct_layers: [3]")
    assert moved != text
    (out / "recipe.yaml").write_text(moved)  # now layer 2 has to have the nearest codes, which rounds moved
    problems = [line for line in mimoquant.verify(out, MICRO)["problems"] if "not the nearest" in line]
    assert problems and all("layers.2.mlp.experts" in line for line in problems)
