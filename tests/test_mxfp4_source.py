"""MXFP4 experts as a source like any other: what is made of them is what is made of their values in bf16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import published
import pytest
from micro import MICRO
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mimoquant.cli.app import app

CALIBRATED = ("--sequences", "8", "--tokens", "64")
GPTQ = (*CALIBRATED, "--objective", "output")
RECIPES = {
    "int4-g128-rtn": (),
    "int4-g32-mse": (),
    "nvfp4-mse": (),
    "mxfp4-rtn": ("--container", "compressed-tensors"),
    "gptq-int4-g128": GPTQ,
}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As released, and the same values in bf16, decoded by hand."""
    base = tmp_path_factory.mktemp("mxfp4")
    native, twin = published.native_mxfp4(MICRO, base)
    for folder in (native, twin):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((MICRO / name).read_bytes())
    return native, twin


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) if RECIPES[name] == GPTQ else name for name in RECIPES]
)
def test_it_is_quantized_from_its_exact_values(folders: tuple[Path, Path], recipe: str, tmp_path: Path) -> None:
    outs = {folder: tmp_path / folder.name for folder in folders}
    for folder, out in outs.items():
        made = call("quantize", folder, "-r", recipe, "-o", out, "--device", "cpu", *RECIPES[recipe])
        assert made.exit_code == 0, made.output
        assert ("the source's experts are MXFP4, 4 bits already" in made.stderr) == (folder is folders[0])
        assert call("verify", out, "--source", folder).exit_code == 0
    one, other = (published.read(out)[1] for out in outs.values())
    assert one.keys() == other.keys()
    experts = [name for name in one if ".experts." in name]
    assert experts and all(one[name].equal(other[name]) for name in experts)


AWQ = r"""
default_stage:
  default_modifiers:
    AWQModifier:
      mappings:
        - smooth_layer: re:.*layers\.[1-9]\.post_attention_layernorm$
          balance_layers: ['re:.*mlp\.gate$', 're:.*mlp\.experts\.\d+\.(gate|up)_proj$']
        - smooth_layer: re:.*mlp\.experts\.\d+\.up_proj$
          balance_layers: ['re:.*mlp\.experts\.\d+\.down_proj$']
      n_grid: 4
    QuantizationModifier: {scheme: W4A16, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {fold: FOLD, carve_outs: {2: source, 3: bf16}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["pow2", "exact-real"])
def test_awq_begins_from_its_exact_values(folders: tuple[Path, Path], fold: str, tmp_path: Path) -> None:
    """Norm, router, up and down scaled against each other as for the same values in bf16; kept layers stay. A channel
    of each norm is much the largest, so that it is worth it."""
    (tmp_path / "awq.yaml").write_text(AWQ.replace("FOLD", fold))
    planted = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    for folder in planted:
        tensors = load_file(folder / "model-2-of-2.safetensors")
        for name in (name for name in tensors if "post_attention_layernorm" in name):
            tensors[name][7] *= 64
        save_file(tensors, folder / "model-2-of-2.safetensors", metadata={"format": "pt"})
    outs = {folder: tmp_path / f"{folder.name}-out" for folder in planted}
    for folder, out in outs.items():
        made = call("quantize", folder, "-r", tmp_path / "awq.yaml", "-o", out, "--device", "cpu", *CALIBRATED)
        assert made.exit_code == 0, made.output
        told = call("verify", out, "--source", folder)
        assert told.exit_code == 0, told.output
    one, other = (published.read(out)[1] for out in outs.values())
    source, kept = published.read(planted[0])[1], "model.layers.2."
    chosen = [name for name in one if ".mlp." in name or "post_attention_layernorm" in name]
    assert all(one[name].equal(other[name]) for name in chosen if not name.startswith(f"{kept}mlp.experts."))
    moved = {name for name in one if name in source and "norm" in name and not one[name].equal(source[name])}
    assert (moved or fold == "pow2") and not any(name.startswith((kept, "model.layers.3.")) for name in moved)
    assert one[f"{kept}mlp.experts.5.down_proj.weight_packed"].equal(source[f"{kept}mlp.experts.5.down_proj.weight"])


def test_a_layer_is_kept_in_bf16(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shipped = (Path(MICRO).parent.parent / "recipes" / "int4-g32-mse.yaml").read_text()
    (tmp_path / "own.yaml").write_text(shipped.rstrip() + "\n  carve_outs: {2: bf16}\n")
    made = call("quantize", folders[0], "-r", tmp_path / "own.yaml", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    found, expected = published.read(tmp_path / "out")[1], published.read(folders[1])[1]
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    assert found[name].equal(expected[name])
    (tmp_path / "fp8.yaml").write_text(shipped.rstrip() + "\n  carve_outs: {2: fp8}\n")
    refused = call("quantize", folders[0], "-r", tmp_path / "fp8.yaml", "-o", tmp_path / "other")
    assert refused.exit_code == 2 and "layer 2 cannot stay fp8, the source's experts are mxfp4" in refused.stderr


def test_chunks_are_as_large_in_memory_as_those_of_bf16(folders: tuple[Path, Path]) -> None:
    facts = [json.loads(call("plan", folder, "-r", "int4-g128-mse", "--json").stdout) for folder in folders]
    assert facts[0]["experts_at_once"] == facts[1]["experts_at_once"]
    assert facts[0]["host_memory_bytes"] == facts[1]["host_memory_bytes"]


@pytest.mark.slow
def test_sensitivity_begins_from_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--sequences", "8", "--tokens", "32", "--device", "cpu", "-q", "--json")
    told = [
        call("sensitivity", folder, "-r", "int4-g128-mse", "-o", tmp_path / f"{folder.name}.yaml", *options)
        for folder in folders
    ]
    assert all(one.exit_code == 0 for one in told), told[0].output
    of_mxfp4, of_bf16 = (json.loads(one.stdout) for one in told)
    assert "fp8" not in of_mxfp4["options"] and of_mxfp4["options"] == of_bf16["options"]
    assert of_mxfp4["layers"] == of_bf16["layers"]


def test_a_value_beyond_bf16_is_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    tensors, name = load_file(folder / "model-1-of-2.safetensors"), "model.layers.3.mlp.experts.1.up_proj.weight"
    tensors[f"{name}_scale"][0, 0], tensors[name][0, :16] = 254, 0x77
    save_file(tensors, folder / "model-1-of-2.safetensors", metadata={"format": "pt"})
    refused = call("quantize", folder, "-r", "int4-g128-rtn", "-o", tmp_path / "out")
    assert refused.exit_code == 3 and f"{name}: holds NaN or Inf" in refused.stderr


def test_an_evaluation_calls_its_reference_what_it_is(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """In text and card; of the twin it is bf16."""
    few = ("--sequences", "7", "--tokens", "32", "--device", "cpu", "--no-noise-floor", "--card")
    for folder, told in zip(
        folders, ("the reference (MXFP4 experts, FP8 attention)", "the bf16 reference"), strict=True
    ):
        out = tmp_path / folder.name
        assert call("quantize", folder, "-r", "int4-g128-rtn", "-o", out).exit_code == 0
        text = call("eval-kl", folder, out, *few)
        stored = told.partition("(")[2] or "bf16)"
        assert text.exit_code == 0 and f"({stored}" in " ".join(text.stdout.split()), text.output
        assert f"Against {told} on " in (out / "README.md").read_text()
