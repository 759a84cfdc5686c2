"""Private folders: gone at the end, and what a killed process left goes with the next one's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mimoquant.checkpoint import scratch
from mimoquant.checkpoint.scratch import scratch_folder

PROGRAM = """
import sys, time
from mimoquant.checkpoint.scratch import scratch_folder
with scratch_folder("mq-") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").write_text("{}")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_private_and_gone_at_the_end(temporary: Path) -> None:
    with pytest.raises(KeyError), scratch_folder("mq-") as folder:
        assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
        (folder / "a").write_text("x")
        raise KeyError
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_one(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=-1, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        theirs = Path(other.stdout.readline().strip())
        with scratch_folder("mq-") as ours:
            assert (theirs / "deep" / "config.json").exists() and ours != theirs  # in use
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert theirs.exists()
    with scratch_folder("mq-") as ours:
        assert list(temporary.iterdir()) == [ours]


def test_what_is_not_ours_stays(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kept").write_text("x")
    (temporary / "mq-link").symlink_to(elsewhere)
    (temporary / "mq-file").write_text("x")
    (temporary / "other").mkdir()
    inside = temporary / "mq-left"
    inside.mkdir()
    (inside / "link").symlink_to(elsewhere)
    with scratch_folder("mq-"):
        assert not inside.exists() and (elsewhere / "kept").exists()
    assert {path.name for path in temporary.iterdir()} == {"mq-link", "mq-file", "other"}


def test_of_another_user_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "mq-theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with scratch_folder("mq-"):
        pass
    assert (temporary / "mq-theirs").exists()


def test_one_that_was_swept_before_it_was_locked_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, swept = scratch._opened, []

    def sweeping(folder: Path) -> int:
        lock = opened(folder)
        if len(swept) < 2:  # once before it is opened, as it were, once after
            swept.append(folder)
            folder.rmdir()
            if len(swept) == 1:
                os.close(lock)
                raise FileNotFoundError
        return lock

    monkeypatch.setattr(scratch, "_opened", sweeping)
    with scratch_folder("mq-") as folder:
        assert folder.is_dir() and folder not in swept and len(swept) == 2


def test_many_at_once_do_not_take_each_others(temporary: Path) -> None:
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(scratch_folder("mq-")) for _ in range(8)]
        assert sorted(temporary.iterdir()) == sorted(folders)
