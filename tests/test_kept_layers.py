"""A layer of experts that a run keeps, as its source has it or in bf16: in casts, and beside other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import published
import pytest
import torch
from micro import MICRO, held_out, j_of
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, RecipeError
from mimoquant.output.verify import verify
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import parse_recipe
from mimoquant.serving.check import check
from mimoquant.serving.served import planned, read_served

KEPT, EXPERT = 2, "model.layers.2.mlp.experts.3.down_proj"
RECIPES = Path(MICRO).parent.parent / "recipes"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """V2.6's form, the same experts in compressed-tensors' MXFP4, and V2.5's FP8."""
    base = tmp_path_factory.mktemp("sources")
    v26 = published.small_v26(MICRO, base)
    pipeline.quantize(plan_of(v26, "mxfp4-cast"), base / "ct", device="cpu")
    return {"v2.6": v26, "compressed-tensors": base / "ct", "v2.5": Path(MICRO)}


def plan_of(source: Path, recipe: str, kept: dict[int, str] | None = None, container: str | None = None) -> Plan:
    carved = f"  carve_outs: {json.dumps(kept)}\n".replace('"', "") if kept else ""
    text = (RECIPES / f"{recipe}.yaml").read_text().rstrip() + "\n" + carved
    return make_plan(source, parse_recipe(text, recipe), container=container)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(values.contiguous().view(torch.uint8) for values in (one, other)))


# source, recipe, container, carve-out → how the layer is stored
WAYS = [
    ("v2.6", "nvfp4-cast", "compressed-tensors", "source", "mxfp4"),
    ("v2.6", "nvfp4-cast", "compressed-tensors", "bf16", "bf16"),
    ("v2.6", "nvfp4-cast", "modelopt", "bf16", "bf16"),
    ("v2.6", "mxfp4-cast", "compressed-tensors", "bf16", "bf16"),
    ("v2.6", "mxfp4-cast", "native", "bf16", "bf16"),
    ("compressed-tensors", "nvfp4-cast", "compressed-tensors", "source", "mxfp4"),
    ("compressed-tensors", "mxfp4-cast", "native", "bf16", "bf16"),
    ("compressed-tensors", "mxfp4-cast", "native", "source", "mxfp4"),
    ("v2.6", "int4-g32-mse", "compressed-tensors", "source", "mxfp4"),
    ("v2.6", "mxfp4-mse", "native", "source", "mxfp4"),
    ("v2.5", "nvfp4-mse", "compressed-tensors", "source", "fp8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "recipe", "container", "word", "kind"), WAYS)
def test_a_kept_layer_has_the_sources_values(
    sources: dict[str, Path], source: str, recipe: str, container: str, word: str, kind: str, tmp_path: Path
) -> None:
    plan = plan_of(sources[source], recipe, {KEPT: word}, container)
    assert plan.container == container and plan.carve_outs == {KEPT: kind} and KEPT not in plan.formats
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    before, after = (published.expert_values(folder) for folder in (sources[source], tmp_path / "out"))
    layer = [module for module in before if f".layers.{KEPT}." in module]
    wanted = before if "cast" in recipe else layer
    assert len(layer) == 24 and all(same(before[module], after[module]) for module in wanted)
    report = verify(tmp_path / "out", sources[source])
    assert report.ok and report.checked["quantized tensors"] == 72, report.problems
    if "cast" in recipe:
        assert j_of(tmp_path / "out", held_out(2, 32), sources[source]) == 0
    read, made = read_served(tmp_path / "out"), planned(plan)
    assert read.experts == made.experts
    problems = {p.text for p in check(read, "vllm", tp=1) if p.fails and "auto_map" not in p.text}
    assert not problems


def test_the_sources_bytes_are_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    """Codes and exponents as they lie, whatever blocks of zeros have; recipe.yaml says it again."""
    out = tmp_path / "out"
    pipeline.quantize(plan_of(sources["v2.6"], "int4-g128-mse", {KEPT: "source"}), out, device="cpu")
    before, after = (published.read(folder)[1] for folder in (sources["v2.6"], out))
    for name in (name for name in before if f".layers.{KEPT}.mlp.experts." in name):
        assert same(before[name], after[name if name.endswith("_scale") else f"{name}_packed"]), name
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    kinds = {group["format"]: group["targets"][0] for group in groups.values()}
    assert "(2)" in kinds["mxfp4-pack-quantized"] and "(1|3|4)" in kinds["pack-quantized"]
    assert "carve_outs: {2: source}" in (out / "recipe.yaml").read_text().replace("\n    2: source", " {2: source}")
    again = tmp_path / "again"
    made = CliRunner().invoke(app, ["quantize", str(sources["v2.6"]), "-r", str(out / "recipe.yaml"), "-o", str(again)])
    assert made.exit_code == 0, made.output
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in out.glob("*.safetensors"))
    told = CliRunner().invoke(app, ["plan", str(sources["v2.6"]), "-r", str(out / "recipe.yaml")]).stdout
    assert "layer 2 stays mxfp4" in told


@pytest.mark.slow
def test_calibration_tokens_go_through_it(sources: dict[str, Path], tmp_path: Path) -> None:
    """What a calibrated run makes of the layers behind it is what it makes beside the same layer in bf16."""
    folder = Path(shutil.copytree(sources["v2.6"], tmp_path / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO / name, folder)
    few = ("--sequences", "16", "--tokens", "64", "--device", "cpu", "-q")
    found = []
    for word in ("source", "bf16"):
        text = (RECIPES / "int4-g128-mse.yaml").read_text().replace("scale_search: mse", "scale_search: gram")
        text = f"{text.rstrip()}\n  carve_outs: {{{KEPT}: {word}}}\n"
        (tmp_path / f"{word}.yaml").write_text(text)
        out = tmp_path / f"{word}-out"
        asked = ["quantize", str(folder), "-r", str(tmp_path / f"{word}.yaml"), "-o", str(out), *few]
        made = CliRunner().invoke(app, asked)
        assert made.exit_code == 0, made.output
        assert CliRunner().invoke(app, ["verify", str(out), "--source", str(folder)]).exit_code == 0
        found.append(published.read(out)[1])
    rest = [name for name in found[0] if ".experts." in name and f".layers.{KEPT}." not in name]
    assert len(rest) == 72 * 3 and all(same(found[0][name], found[1][name]) for name in rest)


@pytest.mark.parametrize(
    ("source", "recipe", "container", "word", "said"),
    [
        ("v2.6", "nvfp4-cast", "modelopt", "source", "modelopt container holds NVFP4, and no layer of MXFP4 experts"),
        ("v2.5", "nvfp4-mse", "modelopt", "source", "modelopt container holds NVFP4, and no layer of FP8 experts"),
        ("v2.5", "mxfp4-rtn", "native", "source", "the native container cannot hold a layer of FP8 experts"),
        ("v2.6", "nvfp4-cast", "compressed-tensors", "fp8", "layer 2 cannot stay fp8, the source's experts are mxfp4"),
    ],
)
def test_what_a_container_cannot_hold_is_refused(
    sources: dict[str, Path], source: str, recipe: str, container: str, word: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        plan_of(sources[source], recipe, {KEPT: word}, container)
    assert refused.value.hint


def test_nvfp4_is_not_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    pipeline.quantize(plan_of(sources["v2.6"], "nvfp4-cast"), tmp_path / "nvfp4", device="cpu")
    with pytest.raises(RecipeError, match="layer 2 cannot stay as in the source, whose experts there are nvfp4"):
        plan_of(tmp_path / "nvfp4", "mxfp4-cast", {KEPT: "source"})
    plan = plan_of(tmp_path / "nvfp4", "mxfp4-cast", {KEPT: "bf16"})
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    before, after = (published.expert_values(folder) for folder in (sources["v2.6"], tmp_path / "out"))
    assert all(same(before[module], after[module]) for module in before)


def test_a_mixture_comes_back(sources: dict[str, Path], tmp_path: Path) -> None:
    """NVFP4 beside a layer in MXFP4, and beside one in bf16: cast to native, the latter kept."""
    for word, back in (("source", None), ("bf16", {KEPT: "source"})):
        there, out = tmp_path / f"{word}-there", tmp_path / f"{word}-back"
        pipeline.quantize(plan_of(sources["v2.6"], "nvfp4-cast", {KEPT: word}), there, device="cpu")
        pipeline.quantize(plan_of(there, "mxfp4-cast", back), out, device="cpu")
        assert verify(out, there).ok
        before, after = (published.expert_values(folder) for folder in (sources["v2.6"], out))
        assert all(same(before[module], after[module]) for module in before)
        ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignored_layers"]
        assert (f"model.layers.{KEPT}.mlp.experts" in ignored) == (word == "bf16")
    with pytest.raises(RecipeError, match="is bf16") as refused:
        plan_of(tmp_path / "bf16-there", "mxfp4-cast")
    assert "carve_outs: {2: source}" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("word", "suffix"), [("source", "weight_packed"), ("source", "weight_scale"), ("bf16", "weight")]
)
def test_damage_to_it_is_seen(sources: dict[str, Path], word: str, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.quantize(plan_of(sources["v2.6"], "nvfp4-cast", {KEPT: word}), out, device="cpu")
    info = open_index(out).tensors[f"{EXPERT}.{suffix}"]
    raw = bytearray((out / info.file).read_bytes())
    raw[info.offset] ^= 0x01
    (out / info.file).write_bytes(raw)
    assert f"{EXPERT}.{suffix}: its values are not the source's" in verify(out, sources["v2.6"]).problems


@pytest.mark.parametrize("word", ["source", "bf16"])
def test_a_nan_in_it_is_refused_by_name(sources: dict[str, Path], word: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["v2.6"], tmp_path / "source"))
    tensors = published.load_file(folder / "model-1-of-2.safetensors")
    tensors[f"{EXPERT}.weight_scale"][0, 0] = 255
    published.save_file(tensors, folder / "model-1-of-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{EXPERT}\.weight.*: holds NaN or Inf"):
        pipeline.quantize(plan_of(folder, "nvfp4-cast", {KEPT: word}), tmp_path / "out", device="cpu")
