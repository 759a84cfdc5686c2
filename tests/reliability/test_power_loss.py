"""The power goes at any point of a run: what is left is finished by a resume, or is the finished output itself."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_model import Disk, Tree, power_losses, write_tree
from fault_layer import Call, FaultLayer, Killed
from micro import contents
from small_runs import quantize, small_checkpoint, with_nested_files

from mimoquant.checkpoint.journal import RUN_NAME
from mimoquant.errors import MimoquantError

Whole = tuple[dict[str, bytes], Path, list[Call]]  # files of a run, the folder that it could change, what it did


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_nested_files(small_checkpoint().save(tmp_path_factory.mktemp("power") / "source"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "deep" / "out"
    with FaultLayer(out.parents[1]).active() as layer:
        quantize(source, out)
    return contents(out), layer.root, layer.calls


def states(root: Path, calls: list[Call], samples: int, every_call: bool) -> Iterator[tuple[str, Tree]]:
    """What the disk may hold when the power goes before a call or at the end, each state once. Between writes little
    can differ that a later moment does not have too, so those before writes are left out unless asked for."""
    disk, dice, seen = Disk(root), random.Random(0), set()
    for number in range(len(calls) + 1):
        call = calls[number] if number < len(calls) else None
        if call is None or call.kind != "write" or every_call:
            for tree in power_losses(disk, dice, samples):
                state = frozenset(tree.items())
                if state not in seen:
                    seen.add(state)
                    yield f"before call {number}, {call and call.kind} {call and call.path.name}", tree
        if call is not None:
            disk.do(call)


def verdict(tree: Tree, folder: Path, source: Path, files: dict[str, bytes]) -> str:
    """`complete`, `resumed`, or what is wrong."""
    write_tree(tree, folder)
    out = folder / "deep" / "out"
    try:
        if out.exists() and not (out / RUN_NAME).exists():
            return "complete" if contents(out) == files else "is taken for complete and is not"
        try:
            with (
                pytest.MonkeyPatch.context() as patch
            ):  # this run loses no power: what it waits for a disk proves nothing
                patch.setattr(os, "fsync", lambda descriptor: None)
                quantize(source, out, resume=True)
        except MimoquantError as error:
            return f"cannot be resumed: {error}"
        return "resumed" if contents(out) == files else "is resumed to something else"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("samples", "every_call"), [(2, False), pytest.param(25, True, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_what_is_left_is_finished_or_can_be(
    samples: int, every_call: bool, source: Path, whole: Whole, tmp_path: Path
) -> None:
    files, root, calls = whole
    found: dict[str, list[str]] = {}
    for where, tree in states(root, calls, samples, every_call):
        found.setdefault(verdict(tree, tmp_path / "disk", source, files), []).append(where)
    print({what: len(cases) for what, cases in found.items()})
    assert found.keys() == {"complete", "resumed"}, {what: cases[:3] for what, cases in found.items()}
    assert len(found["resumed"]) > 40  # 72 to 95: which moments there are depends on how threads take turns


@pytest.mark.slow
def test_a_run_that_was_resumed_is_as_safe(source: Path, whole: Whole, tmp_path: Path) -> None:
    """Killed half way, resumed, and then the power goes: the second log goes on where the first ended."""
    files, _, calls = whole
    middle = next(number for number, call in enumerate(calls) if call.path.name.startswith("model-00003"))

    def fault(number: int, call: Call) -> None:
        if number == middle:
            raise Killed

    (tmp_path / "run").mkdir()
    with FaultLayer(tmp_path / "run", fault).active() as first, pytest.raises(Killed):
        quantize(source, tmp_path / "run" / "deep" / "out")
    with FaultLayer(tmp_path / "run").active() as second:
        quantize(source, tmp_path / "run" / "deep" / "out", resume=True)
    log = [*first.calls[:middle], *second.calls]
    found = {
        verdict(tree, tmp_path / "disk", source, files): where
        for where, tree in states(tmp_path / "run", log, 0, False)
    }
    assert found.keys() == {"complete", "resumed"}, found


@pytest.mark.parametrize("left_out", ["shards", "folders", "journal", "between"])
def test_the_checker_sees_an_fsync_that_is_missing(left_out: str, source: Path, whole: Whole, tmp_path: Path) -> None:
    files, root, calls = whole

    def missing(call: Call) -> bool:
        kinds = {
            "shards": call.path.suffix == ".safetensors",
            "folders": call.path.name == "out.partial",
            "journal": call.path.name.startswith("journal"),
            "between": call.path.name == "draft",
        }
        return call.kind == "fsync" and kinds[left_out]

    for _, tree in states(root, [call for call in calls if not missing(call)], 10, False):
        names = {name.rpartition("/")[2] for name in tree if name.startswith("deep/out/")}
        if names and RUN_NAME not in names and verdict(tree, tmp_path / "disk", source, files) != "complete":
            return
    raise AssertionError("nothing was found")
