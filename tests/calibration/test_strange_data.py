"""Data files as strangers have them: read as they are meant, or refused with what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from micro import MICRO, VOCAB

from mimoquant.calibration.conversations import content_of
from mimoquant.calibration.records import find, records
from mimoquant.calibration.tokens import load_tokens
from mimoquant.errors import CheckpointError, UsageError

HEADS = ("text;other", '"text";"other"')


def texts(path: Path) -> list[object]:
    return [content_of(record.fields, record.where, None) for record in records(find(str(path)), path)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_whose_columns_are_parted_by_semicolons(head: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'{mark}{head}\n"one, two; ""three""\nfour";1\nfive;2\n')
    assert texts(path) == ['one, two; "three"\nfour', "five"]


def test_semicolons_in_a_table_with_commas_part_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,a;b\none; two,1\n")
    assert texts(path) == ["one; two"]
    (tmp_path / "b.tsv").write_text("text\ta;b\none; two\t1\n")
    assert texts(tmp_path / "b.tsv") == ["one; two"]
    (tmp_path / "c.csv").write_text('"te\nxt",text\n1,one\n')
    assert texts(tmp_path / "c.csv") == ["one"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize(("encoding", "told"), [("latin-1", "LATIN1"), ("utf-16", "UTF-16")])
def test_another_encoding_is_told_how_to_change(name: str, encoding: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes('text\n"café"\n'.encode(encoding))
    with pytest.raises(CheckpointError, match="codec can't decode") as caught:
        texts(path)
    assert caught.value.hint and f"iconv -f {told} -t UTF-8" in caught.value.hint


def test_a_table_without_a_head_is_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'"{"word " * 300}",1\n"{"more " * 300}",2\n')
    with pytest.raises(CheckpointError, match="has none of input_ids") as caught:
        texts(path)
    assert len(str(caught.value)) < 400 + len(str(path)) and "..." in str(caught.value)


def test_an_empty_part_of_a_split_has_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "train-00001-of-00002.parquet")
    source = find(str(tmp_path))
    assert [len(list(records(source, path))) for path in source.files] == [0, 2]


def test_a_parquet_file_that_was_cut_off_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"a\.parquet: cannot be read after row 0"):
        texts(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("fields", "told", "hint"),
    [
        ({"messages": []}, "has no turns in its messages", "leave the row out"),
        ({"conversations": []}, "has no turns in its conversations", "leave the row out"),
        ({"text": ["a", "b"]}, "has text that is not a list of integers", "a list of texts"),
        ({"input_ids": ["a"]}, "has input_ids that are not a list of integers", None),
    ],
)
def test_what_a_row_lacks(fields: dict[str, object], told: str, hint: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=told) as caught:
        texts(path)
    assert (hint is None and caught.value.hint is None) or (hint is not None and hint in (caught.value.hint or ""))


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        ("{% for m in messages %}{{ m.content", "the fault is the template's"),
        ("{{ cycler.__init__.__globals__ }}", "the fault is the template's"),
        ("{{ messages[0].nothing.more }}", "templates mostly want"),
        ("{{ raise_exception('no') }}", "templates mostly want user and assistant in turn"),
    ],
)
def test_whose_fault_a_template_is(template: str, hint: str, tmp_path: Path) -> None:
    folder, data = Path(shutil.copytree(MICRO, tmp_path / "model")), tmp_path / "a.jsonl"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "one two"}]}))
    with pytest.raises(CheckpointError, match="the chat template refuses it") as caught:
        load_tokens([str(data)], folder, sequences=1, tokens=2, vocab=VOCAB)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '["one", "two"]'),
        ("a.jsonl", '"one"\n"two"\n'),
        ("b.json", '{"data": [{"text": "one"}, {"text": "two"}]}'),
    ],
)
def test_texts_that_are_no_records(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert texts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "told", "hint"),
    [
        ("null", "line 1 is null, not a record", "leave it out"),
        ("[1, 2]", "line 1 is a list, not a record", "an array of records is a .json file"),
        ("true", "line 1 is a truth value, not a record", "leave it out"),
        ("1.5", "line 1 is a number, not a record", "leave it out"),
    ],
)
def test_rows_that_are_no_records(line: str, told: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(CheckpointError, match=told) as caught:
        texts(tmp_path / "a.jsonl")
    assert hint in (caught.value.hint or "")


def cached(folder: Path) -> Path:
    """A data set of the Hub's cache, at two times."""
    repo = folder / "datasets--me--fables"
    (repo / "blobs").mkdir(parents=True)
    for number in ("0", "1"):
        (repo / "blobs" / number).write_text('{"text": "one"}\n')
        (repo / "snapshots" / number).mkdir(parents=True)
        (repo / "snapshots" / number / "train.jsonl").symlink_to(f"../../blobs/{number}")
    return repo


def test_a_snapshot_of_the_hubs_cache_is_data_and_the_cache_is_not(tmp_path: Path) -> None:
    repo = cached(tmp_path)
    (file,) = find(str(repo / "snapshots" / "1")).files
    assert texts(file) == ["one"]
    for folder in (repo, repo / "snapshots"):
        with pytest.raises(UsageError, match="a folder of the Hub's cache, which holds 2 snapshots") as caught:
            find(str(folder))
        assert (caught.value.hint or "").startswith(f"give one: {repo}/snapshots/")


def test_links_that_are_not_followed_are_told(tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    (other / "b.jsonl").write_text('{"text": "two"}\n')
    (folder / "more").symlink_to(other)
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "b.jsonl").symlink_to(other / "b.jsonl")
    source = find(str(folder))
    assert [path.name for path in source.files] == ["a.jsonl", "b.jsonl"] and source.left_out == ("gone.jsonl", "more")
    assert source.note() == f"{folder}: not read as data: gone.jsonl, more"


def test_what_is_no_file_is_not_called_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", Path("/dev/null")):
        with pytest.raises(UsageError, match="is no regular file") as caught:
            find(str(path))
        assert "write it to a file first" in (caught.value.hint or "")


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    file, link = tmp_path / "data" / "a.jsonl", tmp_path / "b.jsonl"
    file.parent.mkdir()
    file.write_text('{"input_ids": [1, 2, 3, 4]}\n')
    link.symlink_to(file)
    for pair in ((file, file), (file, link), (file.parent, file), ("heldout-v1", "heldout-v1")):
        with pytest.raises(UsageError, match="is read twice, by "):
            load_tokens([*map(str, pair)], MICRO, sequences=1, tokens=2, vocab=VOCAB)
