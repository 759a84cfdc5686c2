"""`--keep-source`: a download and a run are one pass, and what is kept is the checkpoint of the Hub, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, OTHER_COMMIT, REPO, HubServer, serving
from micro import contents
from small_runs import small_checkpoint, with_nested_files

from mimoquant import api, pipeline
from mimoquant.checkpoint import hub as hub_module
from mimoquant.checkpoint import ranges
from mimoquant.errors import CheckpointError, MimoquantError, StoppedError, UsageError

SOURCE = f"hf://{REPO}"
RECIPE = "mxfp4-rtn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in three shards, with files that are no settings."""
    checkpoint = small_checkpoint(fp8=True)
    checkpoint.shard_of = lambda name: 3 if "lm_head" in name else 1 + (".layers.1." in name)
    folder = with_nested_files(checkpoint.save(tmp_path_factory.mktemp("hub") / "source"))
    (folder / "LICENSE").write_text("free")
    (folder / "recipe.yaml").write_text("of an earlier run")
    (folder / "report.html").write_text("of an earlier run")
    return folder


@pytest.fixture(params=["small", "large"])
def hub(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.001)
    if request.param == "large":  # as real shards are: in blocks of several requests
        for module, name, value in ((hub_module, "WHOLE_BYTES", 10), (hub_module, "BLOCK_BYTES", 2**17)):
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(ranges, "SMALLEST_PART", 2**14)
    with serving(folder) as server:
        yield server
        assert not server.strangers


def quantize(out: Path, keep: Path, *, resume: bool = False) -> None:
    api.quantize(SOURCE, RECIPE, out, device="cpu", keep_source=keep, resume=resume)


def test_what_is_kept_is_the_checkpoint_and_came_once(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    out, keep = tmp_path / "out", tmp_path / "kept"
    quantize(out, keep)
    assert contents(keep) == contents(folder)
    for name in hub.shards:
        assert hub.times_asked(name) <= {1, 2}, "the header is read twice"
        assert sum(end - begin for begin, end in hub.asked[name]) < len(hub.content[name]) + 10_000
    api.quantize(keep, RECIPE, tmp_path / "again", device="cpu")
    ours, again = contents(out), contents(tmp_path / "again")
    assert {name for name in ours if ours[name] != again[name]} == {"recipe.yaml", "report.json", "README.md"}
    hub.asked.clear()
    quantize(out, keep, resume=True)  # a job that is queued again
    assert sum(end - begin for asked in hub.asked.values() for begin, end in asked) < 30_000, "headers alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "kept", "out"]


def test_a_run_that_lost_the_hub_keeps_what_came(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    out, keep = tmp_path / "out", tmp_path / "kept"
    whole = "model-1.safetensors"
    lost = "model-2.safetensors"
    hub.fault = lambda name, begin, end: "503" if name == lost and end == len(hub.content[lost]) else None
    with pytest.raises(StoppedError):
        quantize(out, keep)
    assert not keep.exists() and (tmp_path / "kept.partial").is_dir()
    came = (tmp_path / "kept.partial" / whole).exists()
    hub.fault = None
    hub.asked.clear()
    quantize(out, keep, resume=(tmp_path / "out.partial").exists())
    assert contents(keep) == contents(folder)
    assert (whole in hub.asked and max(end for _, end in hub.asked[whole]) == len(hub.content[whole])) != came


@pytest.mark.parametrize("damage", ["hash", "commit"])
def test_another_source_is_not_kept(hub: HubServer, damage: str, tmp_path: Path) -> None:
    out, keep = tmp_path / "out", tmp_path / "kept"
    name = "model-2.safetensors"
    kind: type[MimoquantError] = CheckpointError
    if damage == "hash":
        data = bytearray(hub.content[name])
        data[-5] ^= 1
        hub.content[name] = bytes(data)  # the listing has the hash of what it was
        says = f"{name}: has the hash .*, the Hub's record has {hub.sha256[name][:16]}"
    else:
        hub.fault = lambda file, begin, end: "503" if file == name and end == len(hub.content[name]) else None
        with pytest.raises(StoppedError):
            quantize(out, keep)
        hub.fault, hub.commit, kind = None, OTHER_COMMIT, UsageError
        says = f"is a download of {REPO}@{COMMIT}, wanted is {REPO}@{OTHER_COMMIT}"
    with pytest.raises(kind, match=says):
        quantize(out, keep)
    assert not keep.exists() and not (tmp_path / "kept.partial" / name).exists() and not out.exists()


def test_both_must_find_room_on_one_disk(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, keep = tmp_path / "out", tmp_path / "kept"
    kept = sum(len(hub.content[name]) for name in hub.shards)
    room = api.plan(folder, RECIPE, device="cpu")["output_bytes"] + pipeline.DISK_SLACK + 10**6
    monkeypatch.setattr(pipeline, "free_bytes", lambda _: room)
    with monkeypatch.context() as larger:
        larger.setattr(hub_module.HubSource, "bytes_to_keep", kept + 10**9)
        larger.setattr(hub_module, "free_bytes", lambda _: 10**10)
        with pytest.raises(
            UsageError, match=r"out: needs 1\.\d\d GB, 1\.00 GB of it for the source that is kept, but 0"
        ):
            quantize(out, keep)
    assert not out.with_name("out.partial").exists()
    api.quantize(SOURCE, RECIPE, out, device="cpu")  # without the source there is room


def test_what_cannot_be_kept_is_refused(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    (tmp_path / "kept.partial").mkdir()
    (tmp_path / "kept.partial" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="is in the way, and no download of ours"):
        quantize(tmp_path / "out", keep)
    keep.mkdir()
    with pytest.raises(UsageError, match="kept: exists already"):
        quantize(tmp_path / "out", keep)
    for name in ("out", "out/source", "out.partial", "out.partial/source", "../" + tmp_path.name):
        with pytest.raises(UsageError, match=r"is --out .*, or one lies in the other"):
            quantize(tmp_path / "out", tmp_path / name)
    with pytest.raises(UsageError, match="keep-source /: exists already"):
        quantize(tmp_path / "out", Path("/"))
    with pytest.raises(UsageError, match="hf://me/x: is on the Hub, where only"):
        quantize(tmp_path / "out", Path("hf://me/x"))
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "kept.partial"}
    with pytest.raises(UsageError, match="is a folder, which is there already"):
        api.quantize(source=folder, recipe=RECIPE, out=tmp_path / "out", keep_source=tmp_path / "other")
    assert (tmp_path / "kept.partial" / "mine").read_text() == "precious"


@pytest.mark.parametrize("ranks", ["2", "8"])
def test_ranks_do_not_keep_a_source(
    ranks: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would download all of it; what they share is a folder that is there."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(
        UsageError, match=f"^--keep-source: is the work of one process, {ranks} were started$"
    ) as caught:
        quantize(tmp_path / "out", tmp_path / "kept")
    assert caught.value.hint == "run it without torchrun" and not list(tmp_path.iterdir())
