"""`verify` finds each kind of damage, also where the journal was made to fit it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from micro import MICRO

from mimoquant import pipeline
from mimoquant.checkpoint.index import INDEX_NAME, TensorInfo, open_index
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.output.verify import VerifyReport, verify
from mimoquant.output.verify_values import Found, Sides, check_unit
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.planning.units import Unit

EXPERT = "model.layers.2.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    for recipe in ("int4-g128-mse", "mxfp4-mse", "nvfp4-mse"):
        pipeline.quantize(make_plan(MICRO, load_recipe(recipe)), folder / recipe, device="cpu")
    in_modelopt = make_plan(MICRO, load_recipe("nvfp4-mse"), container="modelopt")
    pipeline.quantize(in_modelopt, folder / "modelopt", device="cpu")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["int4-g128-mse", "mxfp4-mse", "nvfp4-mse", "modelopt"])
def damaged(request: pytest.FixtureRequest, outputs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an output, to be damaged."""
    return Path(shutil.copytree(outputs[request.param], tmp_path / "out"))


def edit(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a tensor's bytes in place."""
    info = tensor(folder, name)
    path = folder / info.file
    raw = np.fromfile(path, np.uint8)
    change(raw[info.offset : info.offset + info.size_bytes])
    raw.tofile(path)


def tensor(folder: Path, name: str) -> TensorInfo:
    return open_index(folder).tensors[name]


def codes_of(folder: Path, module: str) -> str:
    return next(
        f"{module}.{end}" for end in ("weight_packed", "weight") if f"{module}.{end}" in open_index(folder).tensors
    )


def mend_journal(folder: Path) -> None:
    """Make the journal agree with the files as they are now."""
    path = folder / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["sha256"], line["size_bytes"] = file_sha256(folder / line["file"]), (folder / line["file"]).stat().st_size
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def problems(folder: Path) -> str:
    report: VerifyReport = verify(folder, MICRO)
    assert report.ok == (not report.problems)
    return "\n".join(report.problems)


def test_a_flipped_nibble(damaged: Path) -> None:
    def flip(raw: np.ndarray) -> None:
        raw[1234] ^= 0x30

    edit(damaged, codes_of(damaged, EXPERT), flip)
    assert "sha256" in problems(damaged)
    mend_journal(damaged)
    found = problems(damaged)
    assert "sha256" not in found and f"{EXPERT}.weight: 1 values lie outside" in found


def test_two_swapped_experts(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are found in the same order by one thread and by several."""
    names = [codes_of(damaged, f"model.layers.3.mlp.experts.{e}.down_proj") for e in (1, 4)]
    held: list[np.ndarray] = []
    for name in names:
        edit(damaged, name, lambda raw: held.append(raw.copy()))
    for name, other in zip(names, reversed(held), strict=True):
        edit(damaged, name, lambda raw, other=other: np.copyto(raw, other))
    mend_journal(damaged)
    found = problems(damaged)
    assert "experts.1.down_proj.weight: " in found and "experts.4.down_proj.weight: " in found
    told = []
    for cores in (2, 16):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        told.append(verify(damaged, MICRO).as_json())
    assert told[0] == told[1]


def test_what_is_seen_of_a_layer_is_seen_no_further_when_another_fails(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken source, or Ctrl-C: whole layers of a large model would be waited for."""
    seen: list[Sides] = []

    def failing(sides: Sides, unit: Unit) -> Found:
        seen.append(sides)
        if unit.layer == 2:
            raise CheckpointError("shard: is cut off")
        return check_unit(sides, unit)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr("mimoquant.output.verify.check_unit", failing)
    with pytest.raises(CheckpointError, match="is cut off"):
        verify(outputs["mxfp4-mse"], MICRO)
    assert seen[0].stopped.is_set() and seen[0] is seen[-1]
    units = make_plan(MICRO, load_recipe("mxfp4-mse")).units
    assert not any(check_unit(seen[0], unit).checked for unit in units)


def test_a_nan_or_negative_or_zero_scale(damaged: Path) -> None:
    name = f"{EXPERT}.weight_scale"
    dtype = tensor(damaged, name).dtype
    nan = {"BF16": (0xC0, 0x7F), "U8": (255,), "F8_E4M3": (0x7F,)}[dtype]

    def poison(raw: np.ndarray) -> None:
        raw[: len(nan)] = nan

    sound = verify(damaged, MICRO).as_json()
    edit(damaged, name, poison)
    mend_journal(damaged)
    assert f"{EXPERT}.weight: " in problems(damaged)
    told = verify(damaged, MICRO).as_json()  # of all other weights
    json.dumps(told, allow_nan=False)
    assert told["worst_relative_error_tensor"] == sound["worst_relative_error_tensor"]
    if dtype != "U8":
        edit(damaged, name, lambda raw: raw.__setitem__(slice(0, len(nan)), 0))
        mend_journal(damaged)
        assert f"{EXPERT}.weight: " in problems(damaged)


def test_a_missing_mtp_tensor(damaged: Path) -> None:
    index = json.loads((damaged / INDEX_NAME).read_text())
    name = "model.mtp.layers.1.enorm.weight"
    file = index["weight_map"].pop(name)
    (damaged / INDEX_NAME).write_text(json.dumps(index))
    raw = bytearray((damaged / file).read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [value - (end - begin) for value in entry["data_offsets"]]
    text = json.dumps(header).encode()
    data = raw[8 + length :]
    (damaged / file).write_bytes(len(text).to_bytes(8, "little") + text + data[:begin] + data[end:])
    mend_journal(damaged)
    assert f"{name}: is missing" in problems(damaged)


def test_a_truncated_shard(damaged: Path) -> None:
    file = damaged / tensor(damaged, "lm_head.weight").file
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file.name}: has" in problems(damaged)
    mend_journal(damaged)
    assert f"{file.name}: has" in problems(damaged)


def test_a_wrong_qkv_interleave(damaged: Path) -> None:
    """Two ranks' rows exchanged: loads everywhere, wrong everywhere."""
    prefix = "model.layers.1.self_attn."
    split = f"{prefix}q_proj.weight" in open_index(damaged).tensors
    name = f"{prefix}q_proj.weight" if split else f"{prefix}qkv_proj.weight"

    def swap(raw: np.ndarray) -> None:
        half = len(raw) // 2
        raw[:] = np.concatenate([raw[half:], raw[:half]])

    edit(damaged, name, swap)
    mend_journal(damaged)
    assert f"{name}: its" in problems(damaged)


def test_an_extra_file_a_missing_side_file_and_a_changed_config(damaged: Path) -> None:
    shutil.copy(damaged / tensor(damaged, "lm_head.weight").file, damaged / "stray.safetensors")
    (damaged / "tokenizer.json").unlink()
    config = json.loads((damaged / "config.json").read_text())
    config["attention_value_scale"] = 1.0
    (damaged / "config.json").write_text(json.dumps(config))
    found = problems(damaged)
    assert "stray.safetensors: is an extra" in found
    assert "tokenizer.json: is missing" in found
    assert "config.json: is not what" in found


def test_global_scales_of_gate_and_up_that_differ(outputs: dict[str, Path], tmp_path: Path) -> None:
    """Engines use the gate's for both. The check names the pair."""
    folder = Path(shutil.copytree(outputs["nvfp4-mse"], tmp_path / "out"))

    def halve(raw: np.ndarray) -> None:
        raw.view(np.float32)[0] *= 0.5

    edit(folder, f"{EXPERT}.weight_global_scale", halve)
    mend_journal(folder)
    assert "different global scales" in problems(folder)


def turn_over(raw: np.ndarray) -> None:
    raw.view(np.float32)[0] = 1 / raw.view(np.float32)[0]


def halve(raw: np.ndarray) -> None:
    raw.view(np.float32)[0] *= 0.5


def one_bit(raw: np.ndarray) -> None:
    raw.view(np.uint32)[0] += 1


def nothing(raw: np.ndarray) -> None:
    raw.view(np.float32)[0] = 0


def reverse_nibbles(raw: np.ndarray) -> None:
    raw[:] = raw >> 4 | raw << 4


@pytest.mark.parametrize(
    ("suffix", "damage", "said"),
    [
        ("weight_scale_2", turn_over, "values lie outside the rounding interval"),
        ("weight_scale_2", turn_over, "different global scales"),
        ("weight_scale_2", halve, "different global scales"),
        ("weight_scale_2", one_bit, "weight_scale_2 is no power of two"),
        ("weight_scale_2", nothing, "has scales that are zero"),
        ("weight", reverse_nibbles, "values lie outside the rounding interval"),
    ],
)
def test_damage_in_modelopts_container(
    outputs: dict[str, Path], tmp_path: Path, suffix: str, damage: Callable[[np.ndarray], None], said: str
) -> None:
    """All of it loads in engines without a word."""
    folder = Path(shutil.copytree(outputs["modelopt"], tmp_path / "out"))
    edit(folder, f"{EXPERT}.{suffix}", damage)
    mend_journal(folder)
    assert said in problems(folder)


def test_modelopts_own_file_is_checked(outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(outputs["modelopt"], tmp_path / "out"))
    path = folder / "hf_quant_config.json"
    assert json.loads(path.read_text())["quantization"]["quantized_layers"][EXPERT]["quant_algo"] == "W4A16_NVFP4"
    path.write_text(path.read_text().replace("W4A16_NVFP4", "NVFP4", 1))
    assert "hf_quant_config.json: is not what the recipe makes of this source" in problems(folder)
    path.unlink()
    assert "hf_quant_config.json: is missing" in problems(folder)


def test_the_wrong_source_and_no_output_are_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(MICRO, tmp_path / "other")
    file = tensor(MICRO, "model.norm.weight").file
    raw = (other / file).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b"  "
    (other / file).write_bytes((length + 2).to_bytes(8, "little") + header + raw[8 + length :])
    with pytest.raises(CheckpointError, match="was not made from"):
        verify(outputs["mxfp4-mse"], other)
    with pytest.raises(UsageError, match=r"no recipe\.yaml"):
        verify(MICRO, MICRO)


def test_changed_source_values_are_seen(outputs: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(MICRO, tmp_path / "other"))
    edit(other, "model.layers.1.mlp.gate.weight", lambda raw: raw.__setitem__(0, raw[0] ^ 1))
    report = verify(outputs["int4-g128-mse"], other)
    assert report.problems == ["model.layers.1.mlp.gate.weight: its bytes are not the source's"]


def test_an_expert_that_is_clipped_away(outputs: dict[str, Path], tmp_path: Path) -> None:
    """Every code at the end of the grid, every scale tiny: nearest rounding of a kind, and worthless."""
    folder = Path(shutil.copytree(outputs["mxfp4-mse"], tmp_path / "out"))

    def saturate(raw: np.ndarray) -> None:
        raw[:] = (raw & 0x88) | 0x77

    edit(folder, f"{EXPERT}.weight", saturate)
    edit(folder, f"{EXPERT}.weight_scale", lambda raw: raw.fill(1))
    mend_journal(folder)
    assert f"{EXPERT}.weight: " in problems(folder)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("recipe.yaml", "scale_search: mse", "scale_search: absmax"),
        ("report.json", '"method": "rtn"', '"method": "gptq"'),
        (INDEX_NAME, '"total_size": ', '"total_size": 1'),
    ],
)
def test_an_edited_text_file(damaged: Path, file: str, old: str, new: str) -> None:
    text = (damaged / file).read_text()
    assert old in text
    (damaged / file).write_text(text.replace(old, new))
    found = problems(damaged)
    assert "is not what the recipe makes of this source" in found


def test_files_that_nobody_planned(damaged: Path) -> None:
    (damaged / "modeling_evil.py").write_text("import os")
    (damaged / "sub").mkdir()
    (damaged / "sub" / "a.bin").write_bytes(b"x")
    (damaged / "report.json").unlink()
    found = problems(damaged)
    assert "modeling_evil.py: is an extra file" in found and "sub/a.bin: is an extra file" in found
    assert "report.json: is missing" in found
