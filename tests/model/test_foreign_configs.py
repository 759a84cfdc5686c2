"""Configs of checkpoints that other tools wrote: what they are is named; empty entries are as none."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_cache import hub_cache
from micro import MICRO

from mimoquant.checkpoint.index import open_index
from mimoquant.errors import CheckpointError
from mimoquant.model.decoder_layer import read_forward_config
from mimoquant.model.geometry import read_geometry

CONFIG: dict[str, Any] = json.loads((MICRO / "config.json").read_text())
FOREIGN: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "mlx": {"group_size": 64, "bits": 4, "mode": "affine"},
    "quark": {"quant_method": "quark", "export": {}, "global_quant_config": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "a list": {"quant_method": ["fp8"]},
}


@pytest.mark.parametrize("name", list(FOREIGN))
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_read_is_named(name: str, packed: bool) -> None:
    config = copy.deepcopy(CONFIG) | {"quantization_config": FOREIGN[name]}
    with pytest.raises(CheckpointError, match=r"quant_method is .*known are 'fp8', 'compressed-tensors' and") as caught:
        read_geometry(config, "config.json", packed=packed)
    assert "dequantize them with the tool that wrote them" in (caught.value.hint or "")


@pytest.mark.parametrize("key", ["rope_scaling", "quantization_config"])
def test_an_empty_entry_is_as_none(key: str) -> None:
    empty, none = (copy.deepcopy(CONFIG) | {key: value} for value in ({}, None))
    assert read_geometry(empty, "c") == read_geometry(none, "c")
    assert read_forward_config(empty, "c") == read_forward_config(none, "c")


def test_a_folder_of_the_hubs_cache_names_its_snapshot(tmp_path: Path) -> None:
    snapshot = hub_cache(Path(shutil.copytree(MICRO, tmp_path / "plain")), tmp_path, "model")
    with pytest.raises(CheckpointError, match="holds no safetensors file") as caught:
        open_index(snapshot.parents[1])
    assert f"give {snapshot}" in (caught.value.hint or "")
