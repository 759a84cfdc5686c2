"""`compression_config`, the name that older compressed-tensors gave quantization_config: engines do not agree on it, so
every verb refuses it by name, unless it says once more what the new name says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, edit_json
from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import text_keys

FP8 = {"quant_method": "fp8", "fmt": "e4m3"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and an output of int4 whose config.json has the old name alone."""
    folder = tmp_path_factory.mktemp("old")
    mimoquant.quantize(MICRO, "int4-g128-rtn", folder / "out", device="cpu")
    shutil.copytree(MICRO, folder / "source")
    for name in ("out", "source"):
        edit_json(folder / name / "config.json", rename)
    return folder


def rename(config: dict[str, Any]) -> None:
    config["compression_config"] = config.pop("quantization_config")


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "out"),
        ("inspect", "source"),
        ("plan", "source", "-r", "mxfp4-rtn"),
        ("quantize", "source", "-r", "mxfp4-rtn", "-o", "new", "--device", "cpu"),
        ("relayout", "source", "--qkv", "split", "-o", "new"),
        ("eval-kl", "source", "out", "--sequences", "1", "--tokens", "16", "--device", "cpu"),
        ("eval-draft", "source", "out", "--sequences", "1", "--tokens", "16", "--device", "cpu"),
        ("verify", "out", "--engine", "vllm"),
        ("verify", "out", "--engine", "sglang"),
        ("verify", "out", "--engine", "transformers"),
        ("launch", "out", "--engine", "vllm", "--gpu", "h100", "--gpus", "8"),
    ],
    ids=" ".join,
)
def test_every_reader_names_it(arguments: tuple[str, ...], folders: Path) -> None:
    named = [str(folders / word) if word in ("out", "source", "new") else word for word in arguments]
    done = CliRunner().invoke(app, named)
    assert done.exit_code == 3, done.output
    assert "has compression_config, its old name, and no quantization_config" in done.stderr
    assert "hint: rename compression_config to quantization_config" in done.stderr
    assert not (folders / "new").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_beside_the_new_name(nested: bool) -> None:
    def keys(**values: Any) -> dict[str, Any]:
        return {"text_config": values} if nested else values

    assert text_keys(keys(quantization_config=FP8, compression_config=dict(FP8)), "c")["quantization_config"] == FP8
    for empty in (None, {}):
        assert text_keys(keys(quantization_config=FP8, compression_config=empty), "c")["quantization_config"] == FP8
    with pytest.raises(CheckpointError, match="beside another quantization_config") as caught:
        text_keys(keys(quantization_config=FP8, compression_config={"quant_method": "x"}), "c")
    assert caught.value.hint == "delete compression_config"


def test_an_output_has_it_no_more(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    edit_json(source / "config.json", lambda config: config.update(compression_config=config["quantization_config"]))
    for recipe in ("mxfp4-rtn", "int4-g128-rtn"):
        mimoquant.quantize(source, recipe, tmp_path / recipe, device="cpu")
        assert "compression_config" not in (tmp_path / recipe / "config.json").read_text()
