"""NaN or Inf in any tensor of a checkpoint is told by the tensor's name, whatever reads it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import MICRO
from safetensors.torch import save_file
from typer.testing import CliRunner

import mimoquant
from mimoquant.checkpoint.index import INDEX_NAME, TensorInfo
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.weights.decoded import is_finite
from mimoquant.weights.stored import refuse_non_finite

NAN, INF, MINUS_INF = b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"  # bf16
NAN32, INF32, NAN8 = b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\x7f"
LAYER = "model.layers.1."  # the first with experts: runs end soon
SPOILED: dict[str, tuple[str, bytes]] = {
    "norm": (f"{LAYER}post_attention_layernorm.weight", NAN),
    "input norm": (f"{LAYER}input_layernorm.weight", MINUS_INF),
    "router": (f"{LAYER}mlp.gate.weight", b""),
    "bias": (f"{LAYER}mlp.gate.e_score_correction_bias", b""),
    "sink": ("model.layers.1.self_attn.attention_sink_bias", b""),
    "attention": (f"{LAYER}self_attn.o_proj.weight", b""),
    "attention scale": (f"{LAYER}self_attn.qkv_proj.weight_scale_inv", INF32),
    "attention code": (f"{LAYER}self_attn.qkv_proj.weight", NAN8),
    "dense scale": ("model.layers.0.mlp.down_proj.weight_scale_inv", NAN32),
    "expert scale": (f"{LAYER}mlp.experts.3.up_proj.weight_scale_inv", INF32),
    "expert code": (f"{LAYER}mlp.experts.3.down_proj.weight", NAN8),
    "embedding": ("model.embed_tokens.weight", INF),
    "head": ("lm_head.weight", NAN),
    "last norm": ("model.norm.weight", INF),
}
BY_DTYPE = {"BF16": NAN, "F32": NAN32, "F8_E4M3": NAN8}
DATA = ("--sequences", "4", "--tokens", "32", "--device", "cpu", "-q")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spoil(folder: Path, tensor: str, value: bytes) -> None:
    """Put a value into the middle of a tensor."""
    path = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][tensor]
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length])[tensor]
    value = value or BY_DTYPE[entry["dtype"]]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    at = begin + (end - begin) // len(value) // 2 * len(value)
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


def refused(tensor: str, *arguments: object) -> None:
    done = call(*arguments)
    assert done.exit_code == 3 and "Traceback" not in done.output, done.output
    assert f"{tensor.removesuffix('_scale_inv')}" in done.stderr and "holds NaN or Inf" in done.stderr, done.stderr
    assert "data for this model" not in done.stderr and "breaks this model" not in done.stderr


@pytest.fixture(params=list(SPOILED))
def spoiled(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    tensor, value = SPOILED[request.param]
    folder = Path(shutil.copytree(MICRO, tmp_path / "spoiled"))
    spoil(folder, tensor, value)
    return tensor, folder


def test_of_a_source_by_data_free_and_calibrated_runs(spoiled: tuple[str, Path], tmp_path: Path) -> None:
    tensor, folder = spoiled
    refused(tensor, "quantize", folder, "-r", "int4-g128-rtn", "-o", tmp_path / "a", "--device", "cpu", "-q")
    refused(tensor, "quantize", folder, "-r", "gptq-int4-g128", "-o", tmp_path / "b", *DATA)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.slow
def test_of_a_reference_or_a_candidate(spoiled: tuple[str, Path]) -> None:
    tensor, folder = spoiled
    refused(tensor, "eval-kl", folder, MICRO, *DATA)
    refused(tensor, "eval-kl", MICRO, folder, *DATA)


@pytest.mark.parametrize("name", ["norm", "expert scale"])
def test_of_a_source_by_sensitivity(name: str, tmp_path: Path) -> None:
    tensor, value = SPOILED[name]
    folder = Path(shutil.copytree(MICRO, tmp_path / "spoiled"))
    spoil(folder, tensor, value)
    refused(tensor, "sensitivity", folder, "-r", "mxfp4-rtn", "-o", tmp_path / "m.yaml", *DATA)


@pytest.mark.parametrize("tensor", ["model.mtp.layers.0.eh_proj.weight", "model.mtp.layers.1.enorm.weight"])
def test_of_a_draft_layer(tensor: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MICRO, tmp_path / "spoiled"))
    spoil(folder, tensor, b"")
    refused(tensor, "eval-draft", MICRO, folder, *DATA)
    refused(tensor, "quantize", folder, "-r", "mxfp4-rtn", "-o", tmp_path / "a", "--device", "cpu", "-q")


@pytest.mark.slow
def test_of_quantized_candidates_by_every_format(tmp_path: Path) -> None:
    for recipe, part, value in (
        ("int4-g128-rtn", "weight_scale", NAN),
        ("mxfp4-rtn", "weight_scale", b"\xff"),
        ("nvfp4-mse", "weight_scale", NAN8),
        ("nvfp4-mse", "weight_global_scale", NAN32),
    ):
        out = tmp_path / f"{recipe}-{part}"
        assert call("quantize", MICRO, "-r", recipe, "-o", out, "--device", "cpu", "-q").exit_code == 0
        spoil(out, f"{LAYER}mlp.experts.3.up_proj.{part}", value)
        refused(f"{LAYER}mlp.experts.3.up_proj.weight", "eval-kl", MICRO, out, *DATA)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_of_an_expert_that_a_carve_out_keeps(kind: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "default_stage: {default_modifiers: {QuantizationModifier: {scheme: MXFP4A16, targets: ['re:.*experts.*']}}}\n"
        f"mimoquant: {{carve_outs: {{2: {kind}}}}}"
    )
    for name in ("expert scale", "expert code"):
        folder = Path(shutil.copytree(MICRO, tmp_path / name))
        spoil(folder, *SPOILED[name])
        refused(
            SPOILED[name][0], "quantize", folder, "-r", recipe, "-o", tmp_path / f"{name}-o", "--device", "cpu", "-q"
        )


@pytest.mark.parametrize(
    ("dtype", "name", "value", "bad"),
    [
        ("F16", "a.weight", b"\0\x7c", True),
        ("F16", "a.weight", b"\0\x7b", False),
        ("U8", "a.weight_scale", b"\xff", True),
        ("U8", "a.weight_scale", b"\xfe", False),
        ("U8", "a.weight_packed", b"\xff", False),
        ("F8_E8M0", "a.scales", b"\xff", True),
        ("F8_E4M3", "a.weight", b"\xff", True),
        ("F8_E4M3", "a.weight", b"\x7e", False),
        ("BF16", "a.weight", b"\x7f\x7f", False),
        ("I32", "a.weight_packed", b"\xff\xff\xff\x7f", False),
    ],
)
def test_bytes_as_they_are_stored(dtype: str, name: str, value: bytes, bad: bool) -> None:
    info = TensorInfo(name, "f", dtype, (1,), 0, len(value))
    block = np.frombuffer(value, np.uint8)
    if bad:
        with pytest.raises(CheckpointError, match=name):
            refuse_non_finite(info, block)
    else:
        refuse_non_finite(info, block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_values_in_one_pass(dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 7, 12):
            values = torch.ones(13)
            assert is_finite(values.to(dtype)) and is_finite(values[:0].to(dtype))
            values[at] = value
            assert not is_finite(values.to(dtype)) or dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("dtype", "kind", "bad"), [("BF16", np.uint16, 0xFF80), ("F8_E4M3", np.uint8, 0xFF)])
@pytest.mark.parametrize("place", [0, 2**17 - 1, 2**17, 300_000])
def test_a_large_tensor_is_looked_at_to_its_end(dtype: str, kind: type, bad: int, place: int) -> None:
    values = np.full(300_001, 0x77, kind)
    info = TensorInfo("layer.weight", "model.safetensors", dtype, (300_001,), 0, values.nbytes)
    refuse_non_finite(info, values.view(np.uint8))
    values[place] = bad
    with pytest.raises(CheckpointError, match=r"layer\.weight: holds NaN or Inf"):
        refuse_non_finite(info, values.view(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "numbers", "finite"),
    [("F64", np.float64, 1.7e308), ("F32", np.float32, 3e38), ("F16", np.float16, 65504)],
)
def test_every_place_of_a_block_is_looked_at(dtype: str, numbers: type, finite: float) -> None:
    values = np.full(300_000, -finite, numbers)
    info = TensorInfo("visual.a", "f", dtype, values.shape, 0, values.nbytes)
    refuse_non_finite(info, values.view(np.uint8))
    refuse_non_finite(info, values[:0].view(np.uint8))
    for at in (0, 131_071, 131_072, 299_999):
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            spoilt = values.copy()
            spoilt[at] = bad
            with pytest.raises(CheckpointError, match=r"visual\.a: holds NaN or Inf"):
                refuse_non_finite(info, spoilt.view(np.uint8))


@pytest.mark.parametrize("code", range(256))
def test_eight_bit_floats_as_torch_reads_them(code: int) -> None:
    block = np.array([code], np.uint8)
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    for dtype, kind in kinds.items():
        info = TensorInfo("a", "f", dtype, (1,), 0, 1)
        if bool(torch.isfinite(torch.from_numpy(block).view(kind).float()).all()):
            refuse_non_finite(info, block)
        else:
            with pytest.raises(CheckpointError, match="holds NaN or Inf"):
                refuse_non_finite(info, block)


def with_more_tensors(folder: Path) -> Path:
    """Towers and tensors that no layer has, in a shard of their own."""
    shutil.copytree(MICRO, folder)
    more = {
        "visual.blocks.77.attn.proj.weight": torch.ones(8, 8, dtype=torch.bfloat16),
        "audio_encoder.layers.77.fc.bias": torch.ones(8),
        "unheard.of.half": torch.ones(4, 4, dtype=torch.float16),
        "unheard.of.double": torch.ones(4, dtype=torch.float64),
        "unheard.of.input_scale": torch.full((4,), 255, dtype=torch.uint8),
        "unheard.of.mask": torch.full((4,), 2**31 - 1, dtype=torch.int32),
    }
    save_file(more, folder / "more.safetensors")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(more, "more.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


MORE = {
    "visual.blocks.77.attn.proj.weight": MINUS_INF,
    "audio_encoder.layers.77.fc.bias": NAN32,
    "unheard.of.half": b"\0\xfc",
    "unheard.of.double": b"\0\0\0\0\0\0\xf8\x7f",
}
RELAYOUT = ("--qkv", "split", "--dtype", "bf16")


@pytest.mark.parametrize("tensor", list(MORE))
def test_of_towers_and_of_what_no_layer_has(tensor: str, tmp_path: Path) -> None:
    folder = with_more_tensors(tmp_path / "more")
    spoil(folder, tensor, MORE[tensor])
    free = ("-r", "mxfp4-rtn", "--device", "cpu", "-q", "--allow-unknown")
    refused(tensor, "quantize", folder, *free, "-o", tmp_path / "a")
    refused(tensor, "relayout", folder, *RELAYOUT, "-o", tmp_path / "b", "-q", "--allow-unknown")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_of_all_that_is_copied_every_byte_is_still_proven(tmp_path: Path) -> None:
    folder, out = with_more_tensors(tmp_path / "more"), tmp_path / "out"
    done = call("quantize", folder, "-r", "mxfp4-rtn", "--device", "cpu", "-q", "--allow-unknown", "-o", out)
    assert done.exit_code == 0, done.output
    assert call("verify", out, "--source", folder).exit_code == 0
    spoil(out, "unheard.of.double", MORE["unheard.of.double"])
    done = call("verify", out, "--source", folder)
    assert done.exit_code and "unheard.of.double: its bytes are not the source's" in done.stdout


def test_of_a_drafter_that_is_copied_as_a_file(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MICRO, tmp_path / "source"))
    shutil.copytree(mimoquant.micro_drafter(), folder / "dflash")
    (file,) = (folder / "dflash").glob("*.safetensors")
    free = ("-r", "mxfp4-rtn", "--device", "cpu", "-q")
    assert call("quantize", folder, *free, "-o", tmp_path / "good").exit_code == 0
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = next(name for name, entry in header.items() if name != "__metadata__" and entry["dtype"] in ("BF16", "F32"))
    end = 8 + length + header[name]["data_offsets"][1]
    raw[end - 2 : end] = b"\xc0\x7f"  # the upper half of a NaN in float32 too
    file.write_bytes(raw)
    for verb, more in (("quantize", free), ("relayout", (*RELAYOUT, "-q"))):
        done = call(verb, folder, *more, "-o", tmp_path / "bad")
        assert done.exit_code == 3 and f"dflash/{file.name}: {name}: holds NaN or Inf" in done.stderr, done.output
        assert not list(tmp_path.glob("bad*"))
