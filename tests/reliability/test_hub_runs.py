"""Runs whose source is on the Hub: they give the output of the folder, killed or not, and record where it was."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from fault_layer import Call, FaultLayer, Killed
from hub_server import COMMIT, OTHER_COMMIT, REPO, HubServer, serving
from micro import MICRO, contents
from small_runs import left_alone, quantize, small_checkpoint
from typer.testing import CliRunner

from mimoquant import api
from mimoquant.checkpoint import network, ranges
from mimoquant.checkpoint.hub import opened
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.journal import read_journal
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import StoppedError, UsageError
from mimoquant.machine.overlap import read_ahead

SOURCE = f"hf://{REPO}"
SHARD = "model-1.safetensors"
RECIPE = "mxfp4-rtn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(fp8=True).save(tmp_path_factory.mktemp("hub") / "source")


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.001)
    with serving(folder) as server:
        yield server
        assert not server.strangers


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[Call]]:
    return left_alone(folder, tmp_path_factory.mktemp("whole") / "out")


def test_the_micro_checkpoint_is_quantized_as_from_its_folder(tmp_path: Path) -> None:
    api.quantize(MICRO, RECIPE, tmp_path / "near", device="cpu")
    with serving(MICRO) as hub:
        document = api.quantize(SOURCE, RECIPE, tmp_path / "far", device="cpu")
        assert {name: hub.times_asked(name) for name in hub.shards} == {name: {1} for name in hub.shards}
        assert not hub.strangers
        planned = api.plan(SOURCE, RECIPE, device="cpu")
    near, far = contents(tmp_path / "near"), contents(tmp_path / "far")
    assert {name for name in near | far if near.get(name) != far.get(name)} == {
        "recipe.yaml",
        "report.json",
        "README.md",
    }
    revision = f"{REPO}@{COMMIT}"
    assert (document["source_revision"], planned["source"]) == (revision, f"hf://{revision}")
    assert json.loads(far["report.json"])["source_revision"] == revision
    assert yaml.safe_load(far["recipe.yaml"])["mimoquant"]["source_revision"] == revision
    assert f"base_model: {REPO}\n".encode() in far["README.md"] and revision.encode() in far["README.md"]


@pytest.mark.slow
def test_an_output_is_proven_from_either(tmp_path: Path) -> None:
    with serving(MICRO) as hub:
        api.quantize(SOURCE, RECIPE, tmp_path / "out", device="cpu")
        for source in (SOURCE, MICRO):
            assert api.verify(tmp_path / "out", source)["problems"] == []
        assert not hub.strangers
    with pytest.raises(UsageError, match="there is nothing to hold") as caught:
        api.verify(tmp_path / "out")
    assert f"was made from hf://{REPO}@{COMMIT}" in str(caught.value.hint)


def killed_and_resumed(number: int, hub: HubServer, out: Path) -> None:
    def fault(now: int, call: Call) -> None:
        if now == number:
            raise Killed

    with opened(SOURCE) as place, FaultLayer(out.parent, fault).active(), pytest.raises(Killed):
        quantize(place, out)
    if not out.exists():
        with opened(SOURCE) as place:
            quantize(place, out, resume=True)


@pytest.mark.parametrize("point", [0.4, 0.9])
def test_killed_and_resumed_it_is_the_folders_output(
    hub: HubServer, whole: tuple[dict[str, bytes], list[Call]], point: float, tmp_path: Path
) -> None:
    files, calls = whole
    killed_and_resumed(int(point * len(calls)), hub, tmp_path / "out")
    assert contents(tmp_path / "out") == files


@pytest.mark.slow
@pytest.mark.parametrize("point", range(20))
def test_killed_at_many_points_it_is_the_folders_output(
    hub: HubServer, whole: tuple[dict[str, bytes], list[Call]], point: int, tmp_path: Path
) -> None:
    """Connections break as well, which costs other bytes at other times."""
    files, calls = whole
    hub.fault = lambda name, begin, end: "drop 30000" if begin % 7 == 0 and end - begin > 30000 else None
    killed_and_resumed(point * (len(calls) - 1) // 19, hub, tmp_path / "out")
    assert {name: data for name, data in contents(tmp_path / "out").items() if name != "run.json"} == files


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = [0, 1, 1, 1, 1]
    checkpoint = small_checkpoint(fp8=True, num_hidden_layers=5, hybrid_layer_pattern=kinds, moe_layer_freq=kinds)
    return checkpoint.save(tmp_path_factory.mktemp("deeper") / "source")


def asked_again(hub: HubServer, folder: Path) -> dict[str, int]:
    """Bytes of tensors that were asked for more than once, by the unit that they belong to."""
    again: dict[str, int] = {}
    for name, info in open_index(folder).tensors.items():
        first, last = info.offset, info.offset + info.size_bytes - 1
        if any(sum(begin <= at < end for begin, end in hub.asked[info.file]) > 1 for at in (first, last)):
            unit = ".".join(name.split(".")[:3]) if ".layers." in name else "embeddings" if "embed" in name else "head"
            again[unit] = again.get(unit, 0) + info.size_bytes
    return again


@pytest.mark.slow
@pytest.mark.parametrize("point", range(20))
def test_a_kill_costs_at_most_a_layer_of_what_was_read(deeper: Path, point: int, tmp_path: Path) -> None:
    files, calls = left_alone(deeper, tmp_path / "whole" / "out")
    with serving(deeper) as hub:
        killed_and_resumed(point * (len(calls) - 2) // 19, hub, tmp_path / "out")
        again = asked_again(hub, deeper)
    assert contents(tmp_path / "out") == files
    assert len(again) <= 1, again


def test_a_run_that_lost_the_hub_goes_on(
    hub: HubServer, whole: tuple[dict[str, bytes], list[Call]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with opened(SOURCE) as place:
        infos = open_index(place).tensors
        last = infos["lm_head.weight"].offset
        hub.fault = lambda name, begin, end: "503" if name == SHARD and begin <= last < end else None
        with pytest.raises(StoppedError, match=r"could not be read on from byte \d+, after 6 attempts .status 503."):
            quantize(place, out)
    assert (tmp_path / "out.partial" / "journal.jsonl").exists()
    kept = read_journal(tmp_path / "out.partial" / "journal.jsonl")
    hub.fault = None
    with opened(SOURCE) as place:
        quantize(place, out, resume=True)
    assert contents(out) == whole[0] and kept


def test_the_command_line_says_that_it_can_go_on(hub: HubServer, tmp_path: Path) -> None:
    hub.fault = lambda name, begin, end: "whole" if name == SHARD and begin > 8 else None
    result = CliRunner().invoke(app, ["quantize", SOURCE, "-r", RECIPE, "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert result.exit_code == 4
    assert f"error: hf://{REPO}@{COMMIT}/{SHARD}: bytes " in result.stderr and "status 200\nhint:" in result.stderr
    assert "secretsignature" not in result.output and (tmp_path / "out.partial").is_dir()


@pytest.mark.slow
def test_the_tiny_official_model_is_quantized_as_from_its_folder(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "mimo-tiny-official"
    api.quantize(folder, RECIPE, tmp_path / "near", device="cpu")
    with serving(folder) as hub:
        api.quantize(SOURCE, RECIPE, tmp_path / "far", device="cpu", keep_source=tmp_path / "kept")
        assert all(
            sum(end - begin for begin, end in hub.asked[name]) < 1.1 * len(hub.content[name]) for name in hub.shards
        )
        api.quantize(SOURCE, RECIPE, tmp_path / "farther", device="cpu")
    near, far, farther = (contents(tmp_path / name) for name in ("near", "far", "farther"))
    assert far == farther
    assert {name for name in near | far if near.get(name) != far.get(name)} == {
        "recipe.yaml",
        "report.json",
        "README.md",
    }
    assert contents(tmp_path / "kept") == contents(folder)


def test_a_folder_needs_no_client_of_the_hub(folder: Path) -> None:
    program = f"import sys, mimoquant\nmimoquant.inspect({str(folder)!r})\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"huggingface_hub", "httpx"} & set(done.stdout.split())


def test_a_resume_refuses_a_source_that_has_changed(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.fault = lambda name, begin, end: "503" if name == SHARD and begin > 8 else None
    with pytest.raises(StoppedError):
        api.quantize(SOURCE, RECIPE, out, device="cpu")
    hub.fault, hub.commit = None, OTHER_COMMIT
    with pytest.raises(UsageError, match=f"source_revision was {REPO}@{COMMIT}, is now {REPO}@{OTHER_COMMIT}"):
        api.quantize(SOURCE, RECIPE, out, device="cpu", resume=True)
    hub.commit = COMMIT
    hub.sha256[SHARD] = "0" * 64
    with pytest.raises(UsageError, match=rf"source.{SHARD} was \d+ bytes of etag .* is now \d+ bytes of etag 0000"):
        api.quantize(SOURCE, RECIPE, out, device="cpu", resume=True)


@pytest.mark.parametrize("how", ["one range", "many ranges", "kept"])
def test_what_waits_for_the_hub_is_given_up_with_its_run(
    hub: HubServer, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that this test would take the ten minutes that the server asks for."""
    monkeypatch.setattr(ranges, "SMALLEST_PART", 2**10 if how == "many ranges" else 2**20)
    asked = threading.Event()

    def fault(name: str, begin: int, end: int) -> str | None:
        asked.set()
        return "429 600"

    keep = tmp_path / "kept" if how == "kept" else None
    with pytest.raises(KeyboardInterrupt), opened(SOURCE, keep) as place, CheckpointReader(open_index(place)) as reader:
        hub.fault = fault

        def items() -> Iterator[object]:
            yield None
            yield reader.read("lm_head.weight")

        with contextlib.closing(read_ahead(items())) as ahead:
            next(ahead)
            assert asked.wait(60)
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["inspect", "hf://me/other"], 2, "hf://me/other: there is no such model at"),
        (["inspect", f"{SOURCE}@v9"], 2, f"{SOURCE}: has no revision v9"),
        (["quantize", SOURCE, "-r", RECIPE, "--out", "hf://me/out"], 2, "hf://me/out: is on the Hub, where only"),
        (["quantize", "hf://me", "-r", RECIPE, "--out", "out"], 2, "hf://me: is no repository on the Hub"),
        (["eval-kl", SOURCE, SOURCE, "--card"], 2, f"--card: hf://{REPO}@{COMMIT}/README.md is on the Hub, which is"),
        (["inspect", SOURCE], 0, f"hf://{REPO}@{COMMIT}"),
    ],
)
def test_the_command_line_says_what_is_wrong(hub: HubServer, words: list[str], code: int, says: str) -> None:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert (result.exit_code, says in result.output) == (code, True), result.output
    hub.strangers.clear()


def test_errors_name_the_source_as_its_user_does(hub: HubServer, folder: Path) -> None:
    hub.content[SHARD] = hub.content[SHARD][:-4]
    result = CliRunner().invoke(app, ["inspect", SOURCE])
    assert result.exit_code == 3
    assert result.output.startswith(f"error: hf://{REPO}@{COMMIT}/{SHARD}: the header describes")


def fresh(module: ModuleType) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fresh", str(module.__file__))
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(("value", "offline"), [(None, False), ("0", False), ("1", True), ("true", True)])
def test_being_offline_is_the_users_wish_alone(
    value: str | None, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this program sets for libraries that read folders is not."""
    monkeypatch.setattr(os, "environ", {"HF_HUB_OFFLINE": value} if value else {})
    module = fresh(network)
    for _ in range(2):
        assert module.user_is_offline() == offline
        module.stay_offline()


def test_offline_nothing_is_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimoquant.checkpoint.hub.user_is_offline", lambda: True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE forbids to ask it"):
        api.inspect(SOURCE)
    assert not hub.resolved
