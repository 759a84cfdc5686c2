"""Every verb that reads a checkpoint reads one on the Hub, with the results of its folder; and `plan` says how much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, REPO, HubServer, serving
from micro import MICRO, contents
from typer.testing import CliRunner

from mimoquant import api
from mimoquant.cli.app import app
from mimoquant.errors import UsageError

SOURCE, NAME = f"hf://{REPO}", f"hf://{REPO}@{COMMIT}"
FEW: dict[str, Any] = {"sequences": 8, "tokens": 32, "device": "cpu"}
pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving(MICRO) as server:
        yield server
        assert not server.strangers


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("candidate") / "out"
    api.quantize(MICRO, "mxfp4-rtn", out, device="cpu")
    return out


def without_times(document: Any) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("elapsed_s", "peak_rss_bytes", "reference")}


def test_relayout_writes_the_folders_output(hub: HubServer, tmp_path: Path) -> None:
    api.relayout(MICRO, tmp_path / "near", qkv="split", bf16=True)
    api.relayout(SOURCE, tmp_path / "far", qkv="split", bf16=True)
    near, far = contents(tmp_path / "near"), contents(tmp_path / "far")
    assert {name for name in near | far if near.get(name) != far.get(name)} == {"relayout.json"}
    assert json.loads(far["relayout.json"])["source_revision"] == f"{REPO}@{COMMIT}"
    assert api.verify(tmp_path / "far", SOURCE)["problems"] == []
    with pytest.raises(UsageError) as caught:
        api.verify(tmp_path / "far")
    assert f"was made from {NAME}" in str(caught.value.hint)


def test_evaluations_of_a_reference_on_the_hub_are_those_of_its_folder(
    hub: HubServer, candidate: Path, tmp_path: Path
) -> None:
    near, far = (api.eval_kl(source, candidate, noise_floor=False, **FEW) for source in (MICRO, SOURCE))
    assert without_times(near) == without_times(far)
    assert far["reference"] == NAME
    near, far = (api.eval_draft(source, candidate, **FEW) for source in (MICRO, SOURCE))
    assert without_times(near) == without_times(far)


def test_an_evaluation_beside_a_file_is_resumed(hub: HubServer, candidate: Path, tmp_path: Path) -> None:
    words = [
        "eval-kl",
        SOURCE,
        str(candidate),
        "--out",
        str(tmp_path / "kl.json"),
        "--sequences",
        "4",
        "--tokens",
        "32",
    ]
    first = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(app, [*words, "--device", "cpu", "--resume"])
    assert again.exit_code == 0 and "is finished already" in again.stderr
    assert json.loads((tmp_path / "kl.json").read_text())["reference"] == NAME


def test_sensitivity_writes_the_folders_recipe(hub: HubServer, tmp_path: Path) -> None:
    few = FEW | {"sequences": 4}
    for source, name in ((MICRO, "near"), (SOURCE, "far")):
        document = api.sensitivity(source, "int4-g128-mse", tmp_path / f"{name}.yaml", **few)
    assert document["source"] == NAME
    assert (tmp_path / "near.yaml").read_bytes() == (tmp_path / "far.yaml").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective": "output", "sequences": 8, "tokens": 32}, {"objective": "kl", "sequences": 8, "tokens": 32}],
)
def test_a_run_asks_for_what_its_plan_says(hub: HubServer, changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = "gptq-int4-g32" if changes else "mxfp4-rtn"
    planned = api.plan(SOURCE, recipe, device="cpu", measure=not changes, **changes)
    reads = planned["hub"]
    assert reads and (reads["seconds"] is not None) == (not changes)
    assert any("are read from the Hub" in note for note in planned["notes"])
    assert any("--keep-source" in note for note in planned["notes"]) == (changes.get("objective") == "kl")
    hub.asked.clear()
    api.quantize(SOURCE, recipe, tmp_path / "out", device="cpu", **changes)
    headers = sum(8 + int.from_bytes(hub.content[name][:8], "little") for name in hub.shards)
    assert sum(end - begin for asked in hub.asked.values() for begin, end in asked) == reads["bytes"] + headers
