"""Releases by their marks, as published and converted; cards that name a base model, or ask for it."""

from __future__ import annotations

import copy
import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from micro import MICRO, contents
from typer.testing import CliRunner

from mimoquant.checkpoint.index import CheckpointIndex, TensorInfo
from mimoquant.cli.app import app
from mimoquant.model.geometry import read_geometry
from mimoquant.model.layout import ModelLayout, Weight
from mimoquant.model.releases import base_model, base_model_note, release_of
from mimoquant.planning import side_json

INDEX_OF_V26 = {"save_format": "mxfp4", "total_size": 172923364096, "tp_size": 4}
TOWERS = {"MiMo-V2.5", "MiMo-V2.6-Flash", "MiMo-V2.6-Pro"}


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def published(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the index's metadata of a release."""
    folder = shared / "mimo" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json.xz"
    return config, json.loads(lzma.open(index).read())["metadata"] if index.is_file() else INDEX_OF_V26


def layout(config: dict[str, Any], metadata: dict[str, Any], *, towers: bool) -> ModelLayout:
    """As read from headers, with no tensor but a tower's: what a release is told by."""
    tower = Weight("visual.a", "tower", TensorInfo("visual.a", "a.safetensors", "BF16", (1,), 0, 2))
    index = CheckpointIndex(Path("/models/X"), {}, {}, {}, metadata)
    geometry = read_geometry(config, "config.json", packed=True)
    return ModelLayout(index, config, geometry, {"towers": [tower]} if towers else {}, 3, {})


@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2.6-Flash", "MiMo-V2.6-Pro"])
def test_each_published_release_is_told(shared: Path, name: str) -> None:
    found = layout(*published(shared, name), towers=name in TOWERS)
    release = release_of(found)
    assert release is not None and release.name == name
    if "V2.6" in name:
        assert release.repositories == (f"XiaomiMiMo/{name}-RL", f"XiaomiMiMo/{name}-MOPD")
        assert base_model(found, None) is None and "alike" in str(base_model_note(found, None))
        assert base_model(found, release.repositories[1]) == release.repositories[1]
    else:
        assert base_model(found, None) == f"XiaomiMiMo/{name}" and base_model_note(found, None) is None
    assert base_model_note(found, "me/tuned") is None and base_model(found, "me/tuned") == "me/tuned"


@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2.6-Flash", "MiMo-V2.6-Pro"])
def test_a_conversion_keeps_the_name_and_no_repository(shared: Path, name: str) -> None:
    config, metadata = published(shared, name)
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}}
    cast = layout(config | {"quantization_config": quantization}, {"tp_size": metadata["tp_size"]}, towers=True)
    release = release_of(cast)
    assert release is not None and (release.name, release.repositories) == (name, ())
    assert base_model(cast, None) is None and "not as it was published" in str(base_model_note(cast, None))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("MiMo-V2.6-Flash", {"layernorm_epsilon": 1e-5}),
        ("MiMo-V2.6-Flash", {"num_nextn_predict_layers": None}),
        ("MiMo-V2.6-Flash", {"moe_router_dtype": "float32"}),
        ("MiMo-V2.6-Flash", {"num_hidden_layers": 47}),
        ("MiMo-V2.6-Pro", {"moe_router_dtype": None}),
        ("MiMo-V2.5", {"layernorm_epsilon": 1e-6}),
    ],
)
def test_another_mark_is_no_release(shared: Path, name: str, changes: dict[str, Any]) -> None:
    config, metadata = published(shared, name)
    changed = copy.deepcopy(config) | changes
    if "num_hidden_layers" in changes:
        changed |= {key: config[key][:-1] for key in ("hybrid_layer_pattern", "moe_layer_freq")}
    assert release_of(layout(changed, metadata, towers=True)) is None


def test_towers_tell_pro_apart(shared: Path) -> None:
    """V2.5-Pro has none; files with all other marks of V2.6-Pro and no towers are neither."""
    assert release_of(layout(*published(shared, "MiMo-V2.6-Pro"), towers=False)) is None
    assert release_of(layout(*published(shared, "MiMo-V2.5-Pro"), towers=True)) is None


def test_v25_in_mxfp4_is_not_v26(shared: Path) -> None:
    """What `quantize -r mxfp4-rtn` writes of V2.5: store_dtype mxfp4 beside V2.5's other marks."""
    config, metadata = published(shared, "MiMo-V2.5")
    config["quantization_config"] |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    release = release_of(layout(config, metadata, towers=True))
    assert release is not None and (release.name, release.repositories) == ("MiMo-V2.5", ())


def test_the_revision_that_mends_a_file_of_flash_is_named(shared: Path, tmp_path: Path) -> None:

    (tmp_path / "dflash").mkdir()
    (tmp_path / "dflash" / "config.json").write_text('{"a": [1, 2],\n}\n')
    for name, told in (("MiMo-V2.6-Flash", True), ("MiMo-V2.5", False)):
        found = layout(*published(shared, name), towers=True)
        found = replace(found, index=replace(found.index, folder=tmp_path))
        (fault,) = side_json.json_faults(found, ["dflash/config.json"])
        assert ("b2674c72" in fault.hint) == told and "--mend-json" in fault.hint


def test_a_named_base_model_is_in_card_and_recipe_and_proven(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = call("quantize", MICRO, "-r", "int4-g128-rtn", "-o", out, "--base-model", "me/My-Tune.v2", "-q")
    assert made.exit_code == 0, made.output
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "me/My-Tune.v2" and "# My-Tune.v2, routed experts" in card.text
    assert call("verify", out, "--source", MICRO).exit_code == 0
    again = tmp_path / "again"
    assert call("quantize", MICRO, "-r", out / "recipe.yaml", "-o", again).exit_code == 0
    assert contents(out) == contents(again)


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "a/b: c", "me/", "a/b\nlicense: x", "-a/b"])
def test_what_is_no_repository_is_refused(tmp_path: Path, name: str) -> None:
    refused = call("quantize", MICRO, "-r", "int4-g128-rtn", "-o", tmp_path / "out", "--base-model", name)
    assert refused.exit_code == 2 and "is no repository's name" in refused.stderr
    recipe = (Path(MICRO).parent.parent / "recipes" / "int4-g128-rtn.yaml").read_text()
    (tmp_path / "own.yaml").write_text(f"{recipe}\n  base_model: {json.dumps(name)}\n")
    refused = call("quantize", MICRO, "-r", tmp_path / "own.yaml", "-o", tmp_path / "out")
    assert refused.exit_code == 2 and "expected owner/model" in refused.stderr


CARDS = {
    None: ["base_model: me/tuned"],
    "---\nlicense: mit\nbase_model: a/b\n---\n\n# A card\n": ["license: mit", "base_model: me/tuned"],
    "---\nbase_model:\n- a/b\n- c/d\nlicense: mit\n---\n# A card\n": ["license: mit", "base_model: me/tuned"],
    "# A card\n\n---\n\nrest\n": ["base_model: me/tuned"],
}


@pytest.mark.parametrize("before", CARDS)
def test_a_relayout_names_it_too(tmp_path: Path, before: str | None) -> None:
    source, out = Path(shutil.copytree(MICRO, tmp_path / "source")), tmp_path / "out"
    if before is not None:
        (source / "README.md").write_text(before)
    made = call("relayout", source, "--qkv", "split", "--dtype", "bf16", "-o", out, "--base-model", "me/tuned", "-q")
    assert made.exit_code == 0, made.output
    lines = (out / "README.md").read_text().split("\n")
    end = lines.index("---", 1)
    assert lines[0] == "---" and lines[1:end] == CARDS[before]
    assert ("# A card" in lines) == (before is not None) and "## Layout of qkv" in lines
    assert call("verify", out, "--source", source).exit_code == 0
