"""CPU and GPU write the same bytes. Needs a CUDA device; `scripts/stress/check_devices.py` does it across machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mimoquant
from mimoquant import pipeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.shipped import shipped_recipes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name.endswith(("-rtn", "-mse"))])
def test_cuda_writes_the_bytes_of_the_cpu(recipe: str, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        plan = make_plan(mimoquant.micro_checkpoint(), load_recipe(recipe))
        pipeline.quantize(plan, tmp_path / device, device=device)
    for path in (tmp_path / "cpu").iterdir():
        assert path.read_bytes() == (tmp_path / "cuda" / path.name).read_bytes(), path.name
