"""Disks that are full, broken, over quota, read-only or slow of uptake, at every call; and bits that flip on them."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_layer import Call, FaultLayer
from micro import contents
from small_runs import RECIPE, quantize, small_checkpoint
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.journal import RUN_NAME, read_journal
from mimoquant.cli.app import app
from mimoquant.errors import StoppedError
from mimoquant.output.verify import verify

TROUBLE = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint().save(tmp_path_factory.mktemp("disk") / "source")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of a run on a good disk, and how many calls it makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with FaultLayer(out.parent).active() as layer:
        quantize(source, out)
    return contents(out), len(layer.calls)


def assert_nothing_untrue_is_journaled(out: Path) -> None:
    partial = out.with_name("out.partial")
    for journal in partial.glob("journal*.jsonl"):
        for line in read_journal(journal):
            assert hashlib.sha256((partial / line.file).read_bytes()).hexdigest() == line.sha256


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
def test_trouble_at_any_call_stops_the_run_and_a_resume_ends_it(
    first: int, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """Each call meets one kind of trouble; of writes, half gets through before. It stays until the run has ended."""
    files, calls = whole
    for number in range(first, calls, 4):
        code, out = TROUBLE[number // 4 % 4], tmp_path / str(number) / "out"
        out.parent.mkdir()

        def fault(now: int, call: Call, number: int = number, code: int = code) -> int | None:
            if now < number:
                return None
            if now == number and call.kind == "write" and len(call.data) > 1:
                return len(call.data) // 2
            raise OSError(code, os.strerror(code), str(call.path))

        with FaultLayer(out.parent, fault).active() as layer:
            try:
                quantize(source, out)
            except StoppedError as error:
                assert error.exit_code == 4 and os.strerror(code) in str(error) and error.hint
                ended = False
            else:  # only what is done for the name's sake may fail unseen
                ended = True
        at = layer.calls[number]
        assert ended == (at.kind == "fsync" and at.path == out and not (out / RUN_NAME).exists()), at
        assert_nothing_untrue_is_journaled(out)
        if not ended:
            quantize(source, out, resume=True)
        assert contents(out) == files, at
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("most", [1, 1000])
def test_a_disk_that_takes_little_at_a_time_gets_it_all(
    most: int, source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    def fault(now: int, call: Call) -> int | None:
        return most if call.kind == "write" and (most > 1 or call.path.suffix != ".safetensors") else None

    with FaultLayer(tmp_path, fault).active():
        quantize(source, tmp_path / "out")
    assert contents(tmp_path / "out") == whole[0]


def test_a_disk_that_takes_nothing_is_noticed(source: Path, tmp_path: Path) -> None:
    with (
        FaultLayer(tmp_path, lambda now, call: 0 if call.path.suffix == ".safetensors" else None).active(),
        pytest.raises(StoppedError, match="the disk takes no more"),
    ):
        quantize(source, tmp_path / "out")


def call_quantize(source: Path, out: Path, *options: str) -> tuple[int, str]:
    arguments = ["quantize", str(source), "-r", RECIPE, "--out", str(out), "--device", "cpu", *options]
    result = CliRunner().invoke(app, arguments)
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_that_is_full_and_then_is_not(
    source: Path, whole: tuple[dict[str, bytes], int], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told = call_quantize(source, small_disk / "out")
    assert code == 2 and f"{small_disk}/out: needs 0.07 GB but 0.00 GB are free" in told
    assert not list(small_disk.iterdir())
    monkeypatch.setattr(pipeline, "free_bytes", lambda folder: 2**40)  # something else fills it later
    needed = sum(map(len, whole[0].values()))
    assert needed < 500_000
    (small_disk / "ballast").write_bytes(bytes(2**20 - needed // 2))
    code, told = call_quantize(source, small_disk / "out")
    assert code == 4 and "No space left on device" in told and "--resume" in told
    assert_nothing_untrue_is_journaled(small_disk / "out")
    (small_disk / "ballast").unlink()
    assert call_quantize(source, small_disk / "out", "--resume")[0] == 0
    assert contents(small_disk / "out") == whole[0]


def test_a_file_system_that_becomes_read_only(
    source: Path, whole: tuple[dict[str, bytes], int], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "free_bytes", lambda folder: 2**40)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, told = call_quantize(source, small_disk / "out")
    assert code == 4 and "Read-only file system" in told
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert call_quantize(source, small_disk / "out", "--resume")[0] == 0
    assert contents(small_disk / "out") == whole[0]


def test_a_limit_on_the_size_of_files(source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        code, told = call_quantize(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 4 and "File too large" in told
    assert_nothing_untrue_is_journaled(tmp_path / "out")
    assert call_quantize(source, tmp_path / "out", "--resume")[0] == 0
    assert contents(tmp_path / "out") == whole[0]


def test_a_bit_that_flips_before_the_end_is_found(
    source: Path, whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    """A resume writes that shard again; `verify` finds it where nobody resumed."""
    finished = sorted(name for name in whole[0] if name.endswith(".safetensors"))

    def fault(now: int, call: Call) -> None:
        if call.kind == "create" and call.path.name == "config.json.tmp":
            raise OSError(errno.EIO, "broken")

    def flip(path: Path, seed: int) -> None:
        raw = bytearray(path.read_bytes())
        raw[seed * 7919 % len(raw)] ^= 1 << seed % 8
        path.write_bytes(raw)

    for number, name in enumerate(finished):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        with FaultLayer(out.parent, fault).active(), pytest.raises(StoppedError):
            quantize(source, out)
        flip(out.with_name("out.partial") / name, number)
        quantize(source, out, resume=True)
        assert contents(out) == whole[0]
        flip(out / name, number)
        assert any(problem.startswith(f"{name}: sha256 is") for problem in verify(out, source).problems)
