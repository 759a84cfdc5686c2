"""Groups without a scale are counted again by `verify` also where AWQ's factors are stored nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clamped_weights import EXPERT, with_one_small_group
from typer.testing import CliRunner

from mimoquant.checkpoint.journal import JOURNAL_NAME
from mimoquant.cli.app import app
from mimoquant.output.lost_groups import settled
from mimoquant.quant.clamped import Clamped
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import stored_parts
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import Stack
from mimoquant.run.chunk_facts import clamped_on_device, clamped_within

FORMATS = [Format("int4", 32), Format("int4", 32, symmetric=False), Format("mxfp4", 32), Format("nvfp4", 16)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
AWQ = r"""
default_stage:
  default_modifiers:
    AWQModifier:
      mappings: [{smooth_layer: 're:.*experts\.\d+\.up_proj$', balance_layers: ['re:.*experts\.\d+\.down_proj$']}]
      n_grid: 3
    QuantizationModifier: {scheme: NVFP4A16, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {fold: exact-real}
"""


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def stack_of(seed: int) -> torch.Tensor:
    """[2, 32, 256] in bf16, groups of sizes that formats hold, hold hardly and do not hold."""
    random = np.random.default_rng(seed)
    size = 10 ** random.uniform(-42, -33, (2, 32, 16, 1))
    values = torch.from_numpy((random.normal(0, 1, (2, 32, 16, 16)) * size).reshape(2, 32, 256).astype(np.float32))
    values[0, 0, :16] = 1e-33
    return values.to(torch.bfloat16)


def stored(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    stack = Stack(weight.view(torch.uint16).numpy(), None)
    parts = CpuEngine(1).encode({"gate": stack, "up": stack, "down": stack}, fmt, "absmax")["up"]
    return stored_parts(parts, fmt, torch.device("cpu"))


@formats
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_true_counts_lie_between_those_of_an_estimate(fmt: Format, seed: int) -> None:
    weight = stack_of(seed)
    factors = torch.from_numpy(np.random.default_rng(seed).uniform(0.55, 1.8, (2, 32, 1)).astype(np.float32))
    parts, estimated = stored(weight, fmt), weight.float() * factors
    true, within = clamped_on_device(weight.float(), parts, fmt), clamped_within(estimated, parts, fmt, 2.0)
    assert true and within.keys() >= true.keys()
    for expert, (least, most) in within.items():
        one = true.get(expert, Clamped(0, 0, 0, most.groups))
        assert all(a <= b <= c for a, b, c in zip(least, one, most, strict=True)), (least, one, most)
        assert least.zeroed == most.zeroed == one.zeroed
    exact = clamped_within(weight.float(), parts, fmt, 1.0)
    assert {expert: least for expert, (least, _) in exact.items()} == true
    assert all(least == most for least, most in exact.values())


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([1, 4, 64], (1, 4)),
        ([1, 3, 64], (1, 3)),
        ([1, 5, 64], (1, 5)),
        ([1, 2, 64], (1, 3)),
        ([1, 9, 64], (1, 5)),
        ([0, 4, 64], (1, 4)),
        ([7, 4, 64], (1, 4)),
        (None, (1, 3)),
    ],
)
def test_the_journal_is_believed_between_the_ends_alone(told: list[int] | None, found: tuple[int, int]) -> None:
    ranges = {"up": {3: (Clamped(1, 3, 0, 64), Clamped(1, 5, 0, 64))}, "down": {0: (Clamped(0, 0, 0, 64),) * 2}}
    made = settled(ranges, lambda projection, expert: told)
    assert made == {"up": {3: Clamped(*found, 0, 64)}, "down": {}}


def test_none_may_be_told_of_where_there_may_be_none() -> None:
    ranges = {"up": {3: (Clamped(0, 0, 0, 64), Clamped(0, 2, 0, 64))}}
    assert settled(ranges, lambda projection, expert: None) == {"up": {}}
    assert settled(ranges, lambda projection, expert: [0, 2, 64]) == {"up": {3: Clamped(0, 2, 0, 64)}}


@pytest.mark.slow
def test_a_journal_that_was_changed_is_found_though_factors_are_not_stored(tmp_path: Path) -> None:
    source, recipe, out = with_one_small_group(tmp_path / "source"), tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(AWQ)
    done = call(
        "quantize", source, "-r", recipe, "-o", out, "--sequences", "2", "--tokens", "32", "--device", "cpu", "-q"
    )
    assert done.exit_code == 0, done.output
    found = call("verify", out, "--source", source, "--json", "-q")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)["clamped_groups"]
    assert told == {f"{EXPERT}.up_proj.weight": {"zeroed": 1, "clamped": 0, "groups": 2048}}
    lines = [json.loads(line) for line in (out / JOURNAL_NAME).read_text().splitlines()]
    for line in lines:
        line.pop("clamped", None)
    (out / JOURNAL_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call("verify", out, "--source", source, "-q")
    assert done.exit_code == 3 and "up_proj.weight: has 1 groups of 2048 that became zero" in done.stdout, done.output
