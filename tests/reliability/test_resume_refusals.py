"""A resume goes on only with what the run began with; what changed is told by name, as it was and as it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fault_layer import Call, FaultLayer, Killed
from micro import contents, plain_gptq
from small_runs import quantize, small_checkpoint
from typer.testing import CliRunner

import mimoquant
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.journal import JOURNAL_NAME
from mimoquant.cli.app import app
from mimoquant.errors import StoppedError, UsageError
from mimoquant.planning.plan import make_plan

SHARD = "model-1.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_checkpoint().save(tmp_path / "source")


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A run that was killed when two shards were finished."""
    written: list[Call] = []

    def fault(number: int, call: Call) -> None:
        written.append(call)
        if sum(call.kind == "fsync" and call.path.name == JOURNAL_NAME for call in written) == 3:
            raise Killed

    with FaultLayer(tmp_path, fault).active(), pytest.raises(Killed):
        quantize(source, tmp_path / "out")
    return tmp_path / "out"


def refusal(source: Path, out: Path, **options: Any) -> str:
    before = contents(out.with_name("out.partial"))
    with pytest.raises(UsageError) as caught:
        quantize(source, out, resume=True, **options)
    assert contents(out.with_name("out.partial")) == before, "a refusal changes nothing"
    return str(caught.value)


def test_another_recipe(source: Path, out: Path) -> None:
    told = refusal(source, out, recipe="int4-g128-mse")
    assert told.endswith("cannot be resumed, recipe.mimoquant.scale_search was absmax, is now mse")
    told = refusal(source, out, recipe="int4-g32-mse")
    assert "weights.group_size was 128, is now 32" in told


def test_another_version(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimoquant.planning.plan.__version__", "9.9")
    assert "version was 0.1.0, is now 9.9" in refusal(source, out)


def test_another_config(source: Path, out: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"rope_theta": 5e6}
    (source / "config.json").write_text(json.dumps(config))
    assert "config.rope_theta was None, is now 5000000.0" in refusal(source, out)


def test_another_payload_under_the_same_headers(source: Path, out: Path) -> None:
    """Its time of change tells, to the nanosecond; given its old time again, the same bytes go on."""
    before, stat = (source / SHARD).read_bytes(), (source / SHARD).stat()
    (source / SHARD).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    told = refusal(source, out)
    assert f"source.{SHARD} was {stat.st_size} bytes of 20" in told and f"is now {stat.st_size} bytes of 20" in told
    (source / SHARD).write_bytes(before)
    moment = told.partition(" bytes of ")[2].partition(",")[0]
    assert os.system(f"touch -d {moment} {source / SHARD}") == 0
    quantize(source, out, resume=True)


def test_another_header(source: Path, out: Path, tmp_path: Path) -> None:
    shutil.rmtree(source)
    checkpoint = small_checkpoint()
    checkpoint.tensors["model.visual.x"] = checkpoint.tensors.pop("model.norm.weight")
    checkpoint.tensors["model.norm.weight"] = checkpoint.tensors.pop("model.visual.x")
    checkpoint.shard_of = lambda name: 2 if name == "model.norm.weight" else 1
    checkpoint.save(source)
    fingerprint = open_index(source).headers_fingerprint()
    assert "source headers was" in (told := refusal(source, out))
    assert f"is now {fingerprint[:16]}" in told


def test_other_calibration_is_told_by_its_setting(tmp_path: Path) -> None:
    """Through the command line, which calibrates: killed by the journal, refused before a layer is walked."""
    micro, out = mimoquant.micro_checkpoint(), tmp_path / "out"
    recipe = plain_gptq("int4-g128").calibrated_on({"sequences": 8, "tokens": 64})

    def fault(number: int, call: Call) -> None:
        if call.kind == "create" and call.path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")

    from mimoquant import pipeline

    with FaultLayer(tmp_path, fault).active(), pytest.raises(StoppedError):
        pipeline.quantize(make_plan(micro, recipe), out, device="cpu")
    arguments = ["quantize", str(micro), "-r", "gptq-int4-g128", "--out", str(out), "--device", "cpu", "--resume"]
    arguments += ["--objective", "output"]
    for options, message in (
        (["--sequences", "8", "--tokens", "32"], "recipe.mimoquant.calibration.tokens was 64, is now 32"),
        (["--sequences", "4", "--tokens", "64"], "recipe.mimoquant.calibration.sequences was 8, is now 4"),
    ):
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 2 and message in result.stderr, result.output
