"""Outputs whose codes need not be the nearest are proven, and only there codes may be moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from micro import MICRO

import mimoquant
from mimoquant.output.verify_calibrated import RELATIVE_ERROR, audits, error_limits
from mimoquant.planning.recipe import load_recipe
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import Stack

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


def test_a_few_large_columns_are_no_problem_and_another_experts_values_are() -> None:
    """Beside columns that are 15 times as large other weights vanish in int4, by plain rounding too."""
    random, fmt, kernels = np.random.default_rng(0), Format("int4", 128), CpuEngine(1)
    values = random.normal(0, 0.02, (3, 32, 256)).astype(np.float32)
    for expert in range(3):
        for column in (random.integers(128), 128 + random.integers(128)):
            values[expert, :, column] = 0.3 * random.choice((-1, 1), 32)
    bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    stacks = dict.fromkeys(("gate", "up", "down"), Stack(bits, None))
    parts, recipe = kernels.encode(stacks, fmt, "absmax"), load_recipe("gptq-int4-g128")
    others = {p: {name: np.roll(part, 1, axis=0) for name, part in of.items()} for p, of in parts.items()}
    for stored, right in ((parts, True), (others, False)):
        judged, _ = audits(stored, stacks, fmt, recipe, None, layer=1, kernels=kernels)
        for (projection, expert), limit in error_limits(judged, stacks, fmt, kernels).items():
            error = judged[projection][expert].relative_error
            assert error > RELATIVE_ERROR and (error <= limit) is right, (projection, expert, error, limit)


def test_a_weight_that_is_not_finite_is_far_from_everything() -> None:
    fmt, kernels = Format("int4", 128), CpuEngine(1)
    codes, scales = np.full((1, 8, 128), 0x38, np.uint8), np.ones((1, 1, 1), np.float32)
    whole = dict.fromkeys(("gate", "up", "down"), Stack(codes, scales))
    parts = kernels.encode(whole, fmt, "absmax")
    spoilt = codes.copy()
    spoilt[0, 3, 5] = 0x7F
    stacks = dict.fromkeys(whole, Stack(spoilt, scales))
    judged, _ = audits(parts, stacks, fmt, load_recipe("gptq-int4-g128"), None, layer=1, kernels=kernels)
    limits = error_limits(judged, stacks, fmt, kernels)
    assert not any(judged[projection][expert].relative_error <= limit for (projection, expert), limit in limits.items())
