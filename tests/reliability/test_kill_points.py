"""A process that dies at any call that changes the disk: a resume gives the bytes of a run that was left alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_layer import Call, FaultLayer, Killed
from micro import contents
from small_runs import left_alone, quantize, small_checkpoint, with_nested_files

from mimoquant.checkpoint.journal import JOURNAL_NAME, RUN_NAME, read_journal
from mimoquant.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_nested_files(small_checkpoint().save(tmp_path_factory.mktemp("kill") / "source"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[Call]]:
    return left_alone(source, tmp_path_factory.mktemp("whole") / "out")


def killed_at(number: int, source: Path, out: Path, *, resume: bool = False) -> None:
    """Run until the call `number`, which the process does not survive."""

    def fault(now: int, call: Call) -> None:
        if now == number:
            raise Killed

    with FaultLayer(out.parent, fault).active(), pytest.raises(Killed):
        quantize(source, out, resume=resume)


def begun(out: Path) -> Iterator[str]:
    """Shards that are there and not in the journal: work that is done again."""
    partial = out.with_name("out.partial")
    kept = {line.file for line in read_journal(partial / JOURNAL_NAME)} if partial.is_dir() else set()
    yield from (path.name for path in partial.glob("*.safetensors") if path.name not in kept)


def test_a_run_makes_all_kinds_of_calls(whole: tuple[dict[str, bytes], list[Call]]) -> None:
    assert {call.kind for call in whole[1]} == {"mkdir", "create", "write", "fsync", "rename", "unlink"}
    assert len(whole[1]) > 100


@pytest.mark.parametrize("first", range(4))
def test_killed_at_every_call_it_resumes_to_the_same_bytes(
    first: int, source: Path, whole: tuple[dict[str, bytes], list[Call]], tmp_path: Path
) -> None:
    files, calls = whole
    for number, call in list(enumerate(calls))[first::4]:
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        killed_at(number, source, out)
        if out.exists():  # complete, though not left by its run
            assert {name: data for name, data in contents(out).items() if name != RUN_NAME} == files, call
        assert len(list(begun(out))) <= 2, "the shard that is written and the next one, which is being computed"
        if not (out.exists() and not (out / RUN_NAME).exists()):
            quantize(source, out, resume=True)
        assert contents(out) == files, f"killed at {call.kind} {call.path.name}"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)


def test_a_resume_may_be_killed_too(source: Path, whole: tuple[dict[str, bytes], list[Call]], tmp_path: Path) -> None:
    files, calls = whole
    renames = [number for number, call in enumerate(calls) if call.kind == "rename"]
    for first in range(3, renames[-1], 30):
        out = tmp_path / str(first) / "out"
        out.parent.mkdir()
        killed_at(first, source, out)
        for second in (1, 9):
            killed_at(second, source, out, resume=True)
        quantize(source, out, resume=True)
        assert contents(out) == files, (first, calls[first])


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", [(), ("run.json.tmp",)])
def test_a_folder_in_which_nothing_had_begun_is_taken_over(
    left: tuple[str, ...], resume: bool, source: Path, whole: tuple[dict[str, bytes], list[Call]], tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name in left:
        (partial / name).write_text('{"vers')
    quantize(source, tmp_path / "out", resume=resume)
    assert contents(tmp_path / "out") == whole[0]


def test_a_folder_of_somebody_else_is_not_taken_over(source: Path, tmp_path: Path) -> None:
    """Nor is a finished output in which somebody has put a run.json."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="not an unfinished run of ours"):
        quantize(source, tmp_path / "out", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / RUN_NAME).write_text('{"name": "an experiment"}')
    for resume, message in ((True, "cannot be resumed, version was None"), (False, "unfinished run is there")):
        with pytest.raises(UsageError, match=message):
            quantize(source, tmp_path / "mine", resume=resume)
    assert contents(tmp_path / "mine") == {RUN_NAME: b'{"name": "an experiment"}'}


def kill_and_resume(*arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "scripts/stress/kill_and_resume.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_many_kills_by_the_system() -> None:
    told = kill_and_resume(
        "--data-free", "30", "--calibrated", "20", "--ranks", "6", "--evaluation", "12", "--sensitivity", "6"
    )
    assert "calibrated, 1 rank: 20 kills" in told and "calibrated, 2 ranks: 6 kills" in told
    assert "evaluation, 1 rank: 12 kills" in told and "sensitivity, 1 rank: 6 kills" in told
