"""Every lossless direction between the forms of V2.6: equal values by a decoder that is written here, and J = 0.

On the micro checkpoint each is walked that no other test walks; on the small trained checkpoint all are (slow).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from micro import MICRO

from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.eval_kl import eval_kl
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served

UNIT = {"input_scales": "unit"}
# form → recipe, container, settings that make it of any other
FORMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "native": ("mxfp4-cast", "native", {}),
    "MXFP4": ("mxfp4-cast", "compressed-tensors", {}),
    "NVFP4": ("nvfp4-cast", "compressed-tensors", {}),
    "ModelOpt": ("nvfp4-cast", "modelopt", {}),
    "ModelOpt, input scales": ("nvfp4-cast", "modelopt", UNIT),
    "ModelOpt, FP8": ("nvfp4-cast", "modelopt", UNIT | {"dense": "fp8"}),
}
OTHERS = {"others' FP8": "fp8", "others' float32": "float32", "others' bf16": "beside"}
EVERY = [
    (there, back)
    for there in (*FORMS, *OTHERS)
    for back in FORMS
    if there != back and (back != "ModelOpt, FP8" or there == "native")
    if (there, back) != ("others' bf16", "ModelOpt")  # is that already
]
UNTRIED = [  # elsewhere
    ("NVFP4", "ModelOpt"),
    ("ModelOpt", "NVFP4"),
    ("ModelOpt", "MXFP4"),
    ("ModelOpt, FP8", "ModelOpt"),
    ("ModelOpt", "ModelOpt, input scales"),
    *((other, "native") for other in OTHERS),
    ("others' float32", "NVFP4"),
    ("others' float32", "ModelOpt"),
]


class Forms:
    """A checkpoint in V2.6's form, and what is cast of it, once each."""

    def __init__(self, source: Path, work: Path) -> None:
        self.source, self.work = source, work
        self.values = published.expert_values(source) | published.rest_values(source)
        self.made = functools.cache(self._made)

    def _made(self, form: str) -> Path:
        if form == "native":
            return self.source
        if form in OTHERS:
            return published.lossless_cast(self.source, self.work, OTHERS[form])
        return self.cast(self.source, form, self.work / form)

    def cast(self, source: Path, form: str, out: Path) -> Path:
        recipe, container, settings = FORMS[form]
        plan = make_plan(source, load_recipe(recipe).stored_as(settings), container=container)
        pipeline.quantize(plan, out, device="cpu")
        return out

    def hold(self, source: Path, out: Path) -> None:
        """Equal to the first source to the bit, in values and in what comes of them."""
        found = published.expert_values(out) | published.rest_values(out)
        assert {*self.values} - {*found} == set()
        wrong = [name for name, value in self.values.items() if not same(value, found[name])]
        assert not wrong, wrong[:3]
        report = verify(out, source)
        assert report.ok, report.problems
        ids = np.random.default_rng(3).integers(0, 1024, (2, 32))
        tokens = TokenSet("test", ids, ("a", "b"), "0" * 64, ("0", "1"), ("test",))
        assert eval_kl(self.source, out, tokens, noise_floor=False)["j"]["mean"] == 0


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    base = tmp_path_factory.mktemp("micro")
    return Forms(published.small_v26(MICRO, base), base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Forms:
    """The trained checkpoint that `make_small_v26.py` writes."""
    tool, model = shared / "tools" / "make_small_v26.py", shared / "models" / "mimo-tiny-official"
    if not (tool.is_file() and model.is_dir()):
        pytest.skip(f"{tool} or {model} is not there")
    base = tmp_path_factory.mktemp("trained")
    pipeline.quantize(make_plan(model, load_recipe("mxfp4-rtn"), container="native"), base / "mxfp4", device="cpu")
    subprocess.run([sys.executable, tool, base / "mxfp4", base / "v26"], check=True, capture_output=True)
    return Forms(base / "v26", base)


@pytest.mark.slow
@pytest.mark.parametrize(("there", "back"), UNTRIED)
def test_a_direction_loses_nothing(micro: Forms, there: str, back: str, tmp_path: Path) -> None:
    source = micro.made(there)
    micro.hold(source, micro.cast(source, back, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(("there", "back"), EVERY)
def test_a_trained_checkpoint_loses_nothing(trained: Forms, there: str, back: str, tmp_path: Path) -> None:
    source = trained.made(there)
    trained.hold(source, trained.cast(source, back, tmp_path / "out"))


# --- float32 beside the experts ---------------------------------------------------------------------------------------


def test_float32_becomes_bf16_and_that_is_said(micro: Forms, tmp_path: Path) -> None:
    source = micro.made("others' float32")
    plan = make_plan(source, load_recipe("mxfp4-cast"))
    assert any("float32 matrices beside the experts become bf16, rounded once" in note for note in plan.notes)
    assert any("goes out in bf16, in ignored_layers" in note for note in plan.notes)
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    config, tensors = published.read(tmp_path / "out")
    assert "conversion_metadata" not in config and config["attention_projection_layout"] == "split"
    matrices = [name for name, value in tensors.items() if name.startswith("model.") and name.endswith("_proj.weight")]
    dense = [name.removesuffix(".weight") for name in matrices if ".experts." not in name and "eh_proj" not in name]
    assert all(tensors[f"{module}.weight"].dtype == torch.bfloat16 for module in dense)
    assert {*dense} <= {*config["quantization_config"]["ignored_layers"]}
    for engine in ("vllm", "sglang"):
        problems = [
            p for p in check(read_served(tmp_path / "out"), engine, tp=1) if p.fails and "auto_map" not in p.text
        ]
        assert not problems, problems


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4028e38])
@pytest.mark.parametrize("part", ["self_attn.qkv_proj", "mlp.down_proj"])
def test_float32_that_bf16_cannot_hold_is_refused_by_name(
    micro: Forms, part: str, value: float, tmp_path: Path
) -> None:
    config, tensors = published.read(micro.made("others' float32"))
    name = f"model.layers.0.{part}.weight"
    tensors[name][3, 5] = value
    folder = published.write(tmp_path / "source", config, tensors)
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN or Inf"):
        pipeline.quantize(make_plan(folder, load_recipe("mxfp4-cast")), tmp_path / "out", device="cpu")


def test_ties_are_rounded_to_even(micro: Forms, tmp_path: Path) -> None:
    """Against torch's own rounding, where halves lie exactly between two values."""
    config, tensors = published.read(micro.made("others' float32"))
    halves = torch.arange(0x3F80, 0x3F80 + 256, dtype=torch.int32) * 65536 + torch.tensor([0x8000, 0x7FFF]).repeat(128)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.qkv_proj.weight"):
        tensors[name].reshape(-1)[:256] = halves.to(torch.int32).view(torch.float32)
    folder = published.write(tmp_path / "source", config, tensors)
    pipeline.quantize(make_plan(folder, load_recipe("mxfp4-cast")), tmp_path / "out", device="cpu")
    before, after = (published.rest_values(one) for one in (folder, tmp_path / "out"))
    assert all(same(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
