"""`nvfp4-cast` as a run: from both containers of MXFP4 into both of NVFP4, stopped and resumed, verified, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import published
import pytest
import torch
from micro import MICRO
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, RecipeError
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.planning.units import Unit

EXPERT = "model.layers.2.mlp.experts.3.down_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MXFP4 in the published form, and as we write it in compressed-tensors'."""
    base = tmp_path_factory.mktemp("sources")
    plan = make_plan(MICRO, load_recipe("mxfp4-mse"), container="compressed-tensors")
    pipeline.quantize(plan, base / "ct", device="cpu")
    return {"native": published.native_mxfp4(MICRO, base)[0], "compressed-tensors": base / "ct"}


def cast_into(source: Path, out: Path, container: str) -> Path:
    pipeline.quantize(make_plan(source, load_recipe("nvfp4-cast"), container=container), out, device="cpu")
    return out


def experts(folder: Path) -> dict[str, torch.Tensor]:
    """Every expert's values in bf16, decoded by hand from whichever layout."""
    tensors, out = published.read(folder)[1], {}
    for name, codes in tensors.items():
        module, _, suffix = name.rpartition(".")
        if ".experts." not in name or suffix not in ("weight", "weight_packed"):
            continue
        scale = tensors[f"{module}.weight_scale"]
        step = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        if f"{module}.weight_global_scale" in tensors:
            step = step / tensors[f"{module}.weight_global_scale"]
        elif f"{module}.weight_scale_2" in tensors:
            step = step * tensors[f"{module}.weight_scale_2"]
        values = published.E2M1[published.unpack(codes).long()]
        out[module] = (values.unflatten(1, (scale.shape[1], -1)) * step[..., None]).flatten(1).bfloat16()
    return out


@pytest.mark.parametrize("container", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("kind", ["native", "compressed-tensors"])
def test_a_cast_has_the_values_of_its_source(
    sources: dict[str, Path], kind: str, container: str, tmp_path: Path
) -> None:
    out = cast_into(sources[kind], tmp_path / "out", container)
    before, after = experts(sources[kind]), experts(out)
    assert len(before) == len(after) == 4 * 8 * 3
    for module, values in before.items():
        assert torch.equal(values.view(torch.int16), after[module].view(torch.int16)), module
    report = verify(out, sources[kind])
    assert report.ok and report.checked["quantized tensors"] == 96, report.problems


def test_an_interrupted_cast_goes_on(sources: dict[str, Path], tmp_path: Path) -> None:
    whole = cast_into(sources["native"], tmp_path / "whole", "modelopt")
    plan = make_plan(sources["native"], load_recipe("nvfp4-cast"), container="modelopt")

    def stop(unit: Unit, done: int, finished: bool) -> None:
        if unit.name == "layer 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(plan, tmp_path / "out", device="cpu", progress=stop)
    assert not (tmp_path / "out").exists()
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    files = {path.name: file_sha256(path) for path in whole.iterdir()}
    assert files == {path.name: file_sha256(path) for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_2"])
def test_damage_to_a_cast_is_seen(sources: dict[str, Path], suffix: str, tmp_path: Path) -> None:
    """One bit of a code, of a block scale, of a global scale's exponent."""
    out = cast_into(sources["native"], tmp_path / "out", "modelopt")
    info = open_index(out).tensors[f"{EXPERT}.{suffix}"]
    raw = bytearray((out / info.file).read_bytes())
    raw[info.offset + (3 if suffix == "weight_scale_2" else 0)] ^= 0x01
    (out / info.file).write_bytes(raw)
    found = verify(out, sources["native"]).problems
    assert any(EXPERT in problem and "blocks of 16 do not have the source's values" in problem for problem in found)


def test_exponents_that_lie_too_far_apart_stop_the_run(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["native"], tmp_path / "source"))
    tensors = published.load_file(folder / "model-1-of-2.safetensors")
    scale = tensors[f"{EXPERT}.weight_scale"]
    scale[:2] = scale.max() - 18
    published.save_file(tensors, folder / "model-1-of-2.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["quantize", str(folder), "-r", "nvfp4-cast", "-o", str(tmp_path / "out")])
    assert result.exit_code == 3 and "Traceback" not in result.output, result.output
    assert (
        f"{EXPERT}.weight: NVFP4 cannot hold it exactly, 8 of its blocks of 32 have an exponent more than 17 below"
        in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_what_is_not_mxfp4_is_not_cast(sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-cast")
    with pytest.raises(RecipeError, match=r"casts MXFP4 experts, model\.layers\.1.* is fp8"):
        make_plan(MICRO, recipe)
    nvfp4 = cast_into(sources["native"], tmp_path / "nvfp4", "modelopt")
    with pytest.raises(RecipeError, match=r"casts MXFP4 experts, .* is nvfp4"):
        make_plan(nvfp4, recipe)
    with pytest.raises(CheckpointError, match="quantized already") as caught:
        make_plan(sources["native"], load_recipe("nvfp4-mse"))
    assert "nvfp4-cast" in str(caught.value.hint)


def test_a_layer_of_a_cast_cannot_be_kept(sources: dict[str, Path]) -> None:
    text = (Path(MICRO).parent.parent / "recipes" / "nvfp4-cast.yaml").read_text() + "  carve_outs: {2: bf16}\n"
    with pytest.raises(RecipeError, match="layer 2 cannot be kept, its experts are in 4 bits already"):
        make_plan(sources["native"], parse_recipe(text, "kept"))


def test_a_cast_is_of_nvfp4_alone() -> None:
    text = (Path(MICRO).parent.parent / "recipes" / "mxfp4-rtn.yaml").read_text().replace("absmax", "cast")
    assert "cast" in text
    with pytest.raises(RecipeError, match="scale_search cast makes NVFP4 of MXFP4 and nothing else"):
        parse_recipe(text, "mxfp4-cast")
