"""What survives a kill: finished shards are kept, anything doubtful is written again, another run is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mimoquant.checkpoint.journal import JOURNAL_NAME, RUN_NAME, JournalLine, RunFolder, free_bytes, read_journal
from mimoquant.errors import CheckpointError, UsageError

IDENTITY = {"plan": "abc", "version": "1"}


def finish(run: RunFolder, unit: str, content: bytes) -> JournalLine:
    """A shard as the pipeline leaves it: file first, then its line."""
    run.path(f"{unit}.st").write_bytes(content)
    line = JournalLine(unit, f"{unit}.st", len(content), hashlib.sha256(content).hexdigest())
    run.record(line)
    return line


def killed_run(out: Path, units: dict[str, bytes]) -> None:
    with RunFolder(out, IDENTITY, resume=False) as run:
        for unit, content in units.items():
            finish(run, unit, content)


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_run(out, {"a": b"one", "b": b"two"})
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    whole = journal.read_bytes()
    for torn in (b'{"unit": "c", "fi', whole.splitlines()[0], b"\x00\x00"):
        journal.write_bytes(whole + torn)
        assert [line.unit for line in read_journal(journal)] == ["a", "b"]
    with RunFolder(out, IDENTITY, resume=True) as run:
        assert list(run.finished) == ["a", "b"]
        finish(run, "c", b"three")
    assert [json.loads(line)["unit"] for line in journal.read_text().splitlines()] == ["a", "b", "c"]


def test_a_journal_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        "{}",
        '{"unit": "a", "file": 1, "size_bytes": 1, "sha256": ""}',
        '{"unit": "a", "file": "f", "size_bytes": "1", "sha256": ""}',
        '{"unit": "a", "file": "f", "size_bytes": 1, "sha256": "", "more": 1}',
        '{"unit": ["a"], "file": "f", "size_bytes": 1, "sha256": ""}',
    ],
)
def test_a_damaged_line_inside_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    good = json.dumps({"unit": "a", "file": "f", "size_bytes": 1, "sha256": "0"})
    (tmp_path / "j").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(CheckpointError, match=r"j: line 2 is damaged"):
        read_journal(tmp_path / "j")


def test_a_resume_keeps_whole_shards_and_forgets_damaged_ones(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed_run(out, {"whole": b"1234", "changed": b"1234", "short": b"1234", "gone": b"1234"})
    (partial / "changed.st").write_bytes(b"12E4")
    (partial / "short.st").write_bytes(b"123")
    (partial / "gone.st").unlink()
    with RunFolder(out, IDENTITY, resume=True) as run:
        assert list(run.finished) == ["whole"]
    lines = [json.loads(line) for line in (partial / JOURNAL_NAME).read_text().splitlines()]
    assert [line["unit"] for line in lines] == ["whole"], "forgotten lines leave the journal too"
    with RunFolder(out, IDENTITY, resume=True) as run:
        for unit in ("changed", "short", "gone"):
            finish(run, unit, b"1234")
        run.publish(["gone", "short", "whole", "changed"])
    assert [line.unit for line in read_journal(out / JOURNAL_NAME)] == ["gone", "short", "whole", "changed"]


def test_publishing_renames_and_leaves_no_trace_of_the_run(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with RunFolder(out, IDENTITY, resume=False) as run:
        lines = [finish(run, "b", b"2"), finish(run, "a", b"1")]
        assert not out.exists() and (run.partial / RUN_NAME).exists()
        run.publish(["a", "b"])
    assert sorted(path.name for path in out.iterdir()) == ["a.st", "b.st", JOURNAL_NAME]
    assert read_journal(out / JOURNAL_NAME) == lines[::-1]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_equal_runs_have_equal_journals_however_often_they_were_interrupted(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "straight", IDENTITY, resume=False) as run:
        for unit in "abc":
            finish(run, unit, unit.encode())
        run.publish(list("abc"))
    killed_run(tmp_path / "broken", {"b": b"b"})
    with RunFolder(tmp_path / "broken", IDENTITY, resume=True) as run:
        finish(run, "c", b"c")
    with RunFolder(tmp_path / "broken", IDENTITY, resume=True) as run:
        finish(run, "a", b"a")
        run.publish(list("abc"))
    assert (tmp_path / "broken" / JOURNAL_NAME).read_bytes() == (tmp_path / "straight" / JOURNAL_NAME).read_bytes()


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for resume in (False, True):
        with (
            pytest.raises(UsageError, match=f"{out}: exists already") as caught,
            RunFolder(out, IDENTITY, resume=resume),
        ):
            pass
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out.partial").exists()
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"), RunFolder(out, IDENTITY, resume=False):
        pass


def test_an_unfinished_run_needs_resume(tmp_path: Path) -> None:
    killed_run(tmp_path / "out", {"a": b"1"})
    with (
        pytest.raises(UsageError, match="an unfinished run is there") as caught,
        RunFolder(tmp_path / "out", IDENTITY, resume=False),
    ):
        pass
    assert "--resume" in (caught.value.hint or "")
    assert (tmp_path / "out.partial" / "a.st").read_bytes() == b"1"


@pytest.mark.parametrize(("key", "value"), [("plan", "def"), ("version", "2")])
def test_a_resume_under_another_identity_names_key_and_both_values(tmp_path: Path, key: str, value: str) -> None:
    killed_run(tmp_path / "out", {"a": b"1"})
    changed = IDENTITY | {key: value}
    with pytest.raises(UsageError) as caught, RunFolder(tmp_path / "out", changed, resume=True):
        pass
    for part in (str(tmp_path / "out.partial"), key, IDENTITY[key], value):
        assert part in str(caught.value)
    with RunFolder(tmp_path / "out", IDENTITY, resume=True) as run:
        assert list(run.finished) == ["a"], "the refusal destroyed nothing"


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_run_file_is_refused(tmp_path: Path, text: str) -> None:
    killed_run(tmp_path / "out", {"a": b"1"})
    (tmp_path / "out.partial" / RUN_NAME).write_text(text)
    with pytest.raises(UsageError, match=r"run\.json: is damaged"), RunFolder(tmp_path / "out", IDENTITY, resume=True):
        pass


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder(out, IDENTITY, resume=False) as run:
        finish(run, "a", b"1")
        with pytest.raises(UsageError, match="another run is writing there"), RunFolder(out, IDENTITY, resume=True):
            pass
        finish(run, "b", b"2")
    with RunFolder(out, IDENTITY, resume=True) as run:
        assert list(run.finished) == ["a", "b"], "the lock ends with its owner"


def test_discard_removes_everything(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out", IDENTITY, resume=False) as run:
        finish(run, "a", b"1")
        run.discard()
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
