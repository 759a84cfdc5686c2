"""The run as a whole, on the trained micro checkpoint that the package ships."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import MICRO, contents
from safetensors.torch import save_file

import mimoquant
from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.output.verify import verify
from mimoquant.planning.facts import drafter_facts, layout_facts
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.planning.reorder import Reorder, RowBlock, read_blocks
from mimoquant.planning.units import Dequantize, Unit
from mimoquant.quant.engine_torch import TorchEngine
from mimoquant.report.verb_text import layout_text
from mimoquant.run import steps
from mimoquant.shipped import shipped_recipes
from mimoquant.synthetic.checkpoint import SynthSizes, synth

RUNNABLE = [name for name in shipped_recipes() if name.endswith(("-rtn", "-mse"))]


def run(recipe: str, out: Path, **options: Any) -> Plan:
    plan = make_plan(MICRO, load_recipe(recipe))
    pipeline.quantize(plan, out, device="cpu", **options)
    return plan


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    index = open_index(folder)
    with CheckpointReader(index) as reader:
        return {name: reader.read(name).tobytes() for name in index.tensors}


@pytest.mark.parametrize("recipe", RUNNABLE)
def test_every_shipped_recipe_writes_what_it_planned_and_verifies(recipe: str, tmp_path: Path) -> None:
    plan = run(recipe, tmp_path / "out")
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {unit.file: unit.size_bytes for unit in plan.units}
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems
    geometry = plan.layout.geometry
    assert report.checked["quantized tensors"] == len(geometry.moe_layers) * geometry.experts * 3
    assert 0 < report.mean_relative_error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNNABLE)
def test_both_engines_write_the_same_folder(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synth(tmp_path / "source", "v2.5", sizes=SynthSizes(layers=3, experts=4, expert_intermediate=128), seed=1)
    plan = make_plan(tmp_path / "source", load_recipe(recipe))
    pipeline.quantize(plan, tmp_path / "compiled", device="cpu")
    monkeypatch.setattr(pipeline, "make_engine", lambda device, empty: TorchEngine("cpu"))
    pipeline.quantize(plan, tmp_path / "torch", device="cpu")
    assert contents(tmp_path / "compiled") == contents(tmp_path / "torch")


def test_the_written_recipe_repeats_the_run_byte_for_byte(tmp_path: Path) -> None:
    run("mxfp4-mse", tmp_path / "first")
    run(str(tmp_path / "first" / "recipe.yaml"), tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_chunking_does_not_change_the_output(tmp_path: Path) -> None:
    run("int4-g32-mse", tmp_path / "whole")
    plan = make_plan(MICRO, load_recipe("int4-g32-mse"), chunk_bytes=1)
    assert plan.identity() == make_plan(MICRO, load_recipe("int4-g32-mse")).identity()
    pipeline.quantize(plan, tmp_path / "single", device="cpu")
    assert contents(tmp_path / "whole") == contents(tmp_path / "single")


def test_blocks_of_rows_do_not_change_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and dense MLP become bf16 a few rows at a time, and are proven so."""
    plan = run("int4-g32-mse", tmp_path / "whole")
    seen: list[int] = []

    def few(*args: Any, **options: Any) -> Iterator[RowBlock]:
        for block in read_blocks(*args, **options | {"block_bytes": 40_000}):
            seen.append(len(block.values))
            yield block

    monkeypatch.setattr(steps, "read_blocks", few)
    pipeline.quantize(plan, tmp_path / "few", device="cpu")
    steps_of_rows = [step for unit in plan.units for step in unit.steps if isinstance(step, Dequantize | Reorder)]
    assert sum(seen) == sum(entry.shape[0] for step in steps_of_rows for entry in step.entries)
    assert len(seen) > 2 * len(steps_of_rows) and any(isinstance(step, Dequantize) for step in steps_of_rows)
    assert contents(tmp_path / "whole") == contents(tmp_path / "few")
    report = verify(tmp_path / "few", MICRO)
    assert report.ok and report.checked == verify(tmp_path / "whole", MICRO).checked


def test_native_container_copies_everything_but_the_experts(tmp_path: Path) -> None:
    run("mxfp4-rtn", tmp_path / "out")
    source, out = tensor_bytes(MICRO), tensor_bytes(tmp_path / "out")
    others = [name for name in source if ".experts." not in name]
    assert len(others) > 100
    assert all(source[name] == out.get(name) for name in others)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (MICRO, tmp_path / "out"))
    before["quantization_config"] |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    assert before == after


def test_compressed_tensors_container_keeps_every_value_and_splits_qkv(tmp_path: Path) -> None:
    """Each output row of q, k, v is recomputed here with plain loops over ranks and blocks."""
    plan = run("int4-g128-rtn", tmp_path / "out")
    geometry, source, out = plan.layout.geometry, tensor_bytes(MICRO), tensor_bytes(tmp_path / "out")
    import torch

    for layer in range(geometry.layers):
        prefix = f"model.layers.{layer}.self_attn."
        attention, chunks = geometry.attention(layer), geometry.qkv_chunks
        counts = [count // chunks for count in attention.rows]
        per_rank = sum(counts)
        codes = np.frombuffer(source[f"{prefix}qkv_proj.weight"], np.uint8).reshape(-1, geometry.hidden)
        scales = np.frombuffer(source[f"{prefix}qkv_proj.weight_scale_inv"], np.float32)
        scales = scales.reshape(-1, -(-geometry.hidden // 128))
        values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
        blocks = -(-per_rank // 128)
        for letter, (begin, count) in zip(
            "qkv", ((0, counts[0]), (counts[0], counts[1]), (counts[0] + counts[1], counts[2])), strict=True
        ):
            wanted = []
            for rank in range(chunks):
                for row in range(begin, begin + count):
                    scale = np.repeat(scales[rank * blocks + row // 128], 128)[: geometry.hidden]
                    wanted.append(values[rank * per_rank + row] * scale)
            expected = torch.from_numpy(np.stack(wanted)).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
            assert out[f"{prefix}{letter}_proj.weight"] == expected, (layer, letter)


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    run("int4-g128-mse", tmp_path / "whole")
    stopped = 0
    for _ in range(20):
        seen: list[str] = []

        def stop(unit: Unit, size: int, finished: bool, seen: list[str] = seen, limit: int = stopped + 1) -> None:
            if finished:
                seen.append(unit.name)
                if len(seen) > limit:
                    raise KeyboardInterrupt

        try:
            run("int4-g128-mse", tmp_path / "out", resume=stopped > 0, progress=stop)
            break
        except KeyboardInterrupt:
            stopped += 1
            assert not (tmp_path / "out").exists()
    assert stopped >= 3
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    run("nvfp4-mse", tmp_path / "whole")
    command = [sys.executable, "-m", "mimoquant", "quantize", str(MICRO), "-r", "nvfp4-mse", "--device", "cpu"]
    victim = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and victim.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 2:
            os.kill(victim.pid, signal.SIGKILL)
        time.sleep(0.001)
    victim.wait()
    if not (tmp_path / "out").exists():  # on a very fast machine the run may have won
        run("nvfp4-mse", tmp_path / "out", resume=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_a_resume_under_another_recipe_is_refused(tmp_path: Path) -> None:
    def stop(unit: Unit, size: int, finished: bool) -> None:
        if finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("int4-g128-mse", tmp_path / "out", progress=stop)
    with pytest.raises(UsageError, match="unfinished run"):
        run("int4-g128-mse", tmp_path / "out")
    with pytest.raises(UsageError, match=r"cannot be resumed, recipe\.mimoquant\.scale_search was mse, is now absmax"):
        run("int4-g128-rtn", tmp_path / "out", resume=True)


def carved(kind: str, name: str = "test") -> str:
    return f"""
default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: ['re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$']
      scheme: W4A16
mimoquant: {{carve_outs: {{2: {kind}}}}}
"""


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts", "language_model.model.layers.1.mlp.experts.0.up_proj"])
def test_the_ignore_list_spares_the_experts(name: str) -> None:
    """SGLang stops at a matrix in neither targets nor ignore; an ignored layer of experts would be taken for bf16."""
    config = make_plan(MICRO, load_recipe("int4-g128-rtn")).config["quantization_config"]
    (ignore,) = config["ignore"]
    assert ignore.startswith("re:") and not re.match(ignore[3:], name)
    for module in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.gate"):
        assert re.match(ignore[3:], f"language_model.model.layers.0.{module}"), module
    assert all(re.match(ignore[3:], other) for other in ("lm_head", "model.mtp.layers.0.eh_proj", "visual.merger.0"))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_carved_out_layer_keeps_its_values(kind: str, tmp_path: Path) -> None:
    plan = make_plan(MICRO, parse_recipe(carved(kind), "carved"))
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    report = verify(tmp_path / "out", MICRO)
    assert report.ok, report.problems
    index = open_index(tmp_path / "out")
    weight = index.tensors["model.layers.2.mlp.experts.0.gate_proj.weight"]
    assert weight.dtype == {"bf16": "BF16", "fp8": "F8_E4M3"}[kind]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if kind == "bf16":
        assert config["ignore"] and config["format"] == "pack-quantized"
    else:
        assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
        source, out = tensor_bytes(MICRO), tensor_bytes(tmp_path / "out")
        name = "model.layers.2.mlp.experts.1.down_proj"
        assert out[f"{name}.weight"] == source[f"{name}.weight"]
        assert out[f"{name}.weight_scale"] == source[f"{name}.weight_scale_inv"]


def test_asymmetric_int4_verifies(tmp_path: Path) -> None:
    text = carved("bf16").replace("W4A16", "W4A16_ASYM")
    for search in ("absmax", "mse"):
        recipe = parse_recipe(text.replace("carve_outs", f"scale_search: {search}, carve_outs"), "asym")
        pipeline.quantize(make_plan(MICRO, recipe), tmp_path / search, device="cpu")
        report = verify(tmp_path / search, MICRO)
        assert report.ok, report.problems


def test_the_source_is_never_touched(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in MICRO.rglob("*")}
    run("int4-g128-rtn", tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in MICRO.rglob("*")}
    with pytest.raises(UsageError, match="inside the source"):
        run("int4-g128-rtn", MICRO / "out")
    assert not (MICRO / "out").exists() and not (MICRO / "out.partial").exists()


def test_a_full_disk_is_noticed_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_bytes", lambda folder: 10**6)
    with pytest.raises(UsageError, match=r"needs .* but 0\.00 GB are free"):
        run("int4-g128-rtn", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_source_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[CheckpointReader] = []

    class Counting(CheckpointReader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            readers.append(self)

    monkeypatch.setattr(pipeline, "CheckpointReader", Counting)
    plan = run("mxfp4-rtn", tmp_path / "out")
    assert [reader.bytes_read for reader in readers] == [plan.source_bytes]


def test_a_folder_that_is_not_ours_is_never_adopted_or_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="not an unfinished run of ours"):
            run("mxfp4-rtn", tmp_path / "out", resume=resume)
    (tmp_path / "link.partial").symlink_to(MICRO)
    before = sorted(MICRO.iterdir())
    with pytest.raises(UsageError, match="in the way"):
        run("mxfp4-rtn", tmp_path / "link", resume=True)
    assert (foreign / "thesis.txt").read_text() == "mine" and sorted(MICRO.iterdir()) == before


@pytest.mark.parametrize("make", ["link", "fifo", "closed"])
def test_side_files_are_looked_at_before_anything_is_done(make: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    if make == "link":
        (tmp_path / "secret").write_text("x")
        (source / "extra.json").symlink_to(tmp_path / "secret")
    elif make == "fifo":
        os.mkfifo(source / "extra.json")
    else:
        (source / "sub").mkdir(mode=0o000)
        if os.access(source / "sub", os.R_OK):
            pytest.skip("root may enter any folder")
    with pytest.raises(CheckpointError, match=r"extra\.json|sub"):
        make_plan(source, load_recipe("mxfp4-rtn"))


def test_side_files_count_in_the_plan(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    (source / "dflash").mkdir()
    save_file({"x": torch.zeros(123_456, dtype=torch.uint8)}, source / "dflash" / "model.safetensors")
    size = (source / "dflash" / "model.safetensors").stat().st_size
    plan = make_plan(source, load_recipe("mxfp4-rtn"))
    assert plan.side_files["dflash/model.safetensors"] == size > 123_456
    assert plan.side_bytes == size + make_plan(MICRO, load_recipe("mxfp4-rtn")).side_bytes
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "dflash" / "model.safetensors").stat().st_size == size
    assert verify(tmp_path / "out", source).ok


def test_a_drafter_goes_through_untouched_and_is_told_of(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    shutil.copytree(mimoquant.micro_drafter(), source / "dflash")
    plan = make_plan(source, load_recipe("mxfp4-rtn"))
    told = {"problem": None, "layers": 2, "block_size": 8, "window": 64, "captured_layers": [2, 4]}
    assert drafter_facts(plan.layout) == told and not [note for note in plan.notes if "drafter" in note]
    assert "drafter   DFlash, 2 layers, blocks of 8, window 64" in layout_text(layout_facts(plan.layout))
    out = tmp_path / "out"
    pipeline.quantize(plan, out, device="cpu")
    for path in mimoquant.micro_drafter().iterdir():
        assert (out / "dflash" / path.name).read_bytes() == path.read_bytes()
    assert verify(out, source).ok
    damaged = out / "dflash" / "dflash_draft_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\0\0")
    assert "dflash/dflash_draft_model.safetensors: differs from the source's" in verify(out, source).problems


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": 128}, "fc.weight is BF16[256, 512], expected is BF16[128, 256]"),
        ({"num_target_layers": 48}, "its num_target_layers is 48, the backbone's is 5"),
        (None, "is not valid JSON"),
    ],
)
def test_a_drafter_that_does_not_fit_is_told_of_and_copied(
    change: dict[str, int] | None, told: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    config = Path(shutil.copytree(mimoquant.micro_drafter(), source / "dflash")) / "config.json"
    text = config.read_text()
    config.write_text(text.rstrip()[:-1] + ",}" if change is None else json.dumps(json.loads(text) | change))
    plan = make_plan(source, load_recipe("mxfp4-rtn"))
    assert [told in note for note in plan.notes if note.startswith("the drafter is copied as it is, but ")] == [True]
    assert told in layout_facts(plan.layout)["drafter"]["problem"]
    assert "cannot be used" in layout_text(layout_facts(plan.layout)) and "dflash/config.json" in plan.side_files


def test_a_nan_in_a_copied_weight_stops_the_run(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    info = open_index(source).tensors["model.norm.weight"]
    raw = bytearray((source / info.file).read_bytes())
    raw[info.offset : info.offset + 2] = b"\xc0\x7f"
    (source / info.file).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds NaN or Inf"):
        pipeline.quantize(make_plan(source, load_recipe("mxfp4-rtn")), tmp_path / "out", device="cpu")


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimoquant.quant.kernels import compiled

    calls = []

    def njit(**options: Any) -> Callable[[object], object]:
        calls.append(options)
        if options.get("cache"):
            raise RuntimeError("no locator available")
        return lambda function: function

    monkeypatch.setattr(compiled, "njit", njit)
    assert compiled.compiled()(len) is len and [call.get("cache") for call in calls] == [True, None]
