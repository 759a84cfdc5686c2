"""Data as people have it: each kind of file and folder gives the same records, and what is not read is named."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mimoquant import micro_checkpoint
from mimoquant.calibration.records import find, notes, records
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.errors import CheckpointError, UsageError

HERE = Path(__file__).resolve().parent
TEXTS = [f'Row {n}: the quick brown fox, "it" said,\njumps\tover {n * 7} lazy dogs — 日本語 NA.' for n in range(12)]
ROWS = [{"text": text, "id": n} for n, text in enumerate(TEXTS)]


def load(*data: Path | str, column: str | None = None, tokens: int = 16) -> TokenSet:
    return load_tokens(
        [str(entry) for entry in data], micro_checkpoint(), sequences=None, tokens=tokens, vocab=1024, column=column
    )


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows in the form that the file's name says, by other libraries than the reader uses where there are any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.partition(".")[2]
    if kind.startswith("parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    elif kind.startswith(("csv", "tsv")):
        with (gzip.open if kind.endswith("gz") else open)(path, "wt", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if kind.startswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows, ensure_ascii=False) if kind.startswith("json.") or kind == "json" else lines(rows)
        pack = {"gz": gzip.compress, "xz": lzma.compress}.get(kind.rpartition(".")[2], bytes)
        path.write_bytes(pack(text.encode()))
    return path


KINDS = ("json", "jsonl.gz", "json.gz", "json.xz", "ndjson", "csv", "csv.gz", "tsv", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_sequences(kind: str, tmp_path: Path) -> None:
    expected = load(write(tmp_path / "b" / "a.jsonl"))
    found = load(write(tmp_path / f"a.{kind}"))
    assert found.sha256 == expected.sha256 and found.domains == expected.domains
    assert found.fingerprints.share_in(expected.fingerprints) == 1


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1", "rows": ROWS, "about": ["x"]}),
        lines(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff" + json.dumps(ROWS),
    ],
)
def test_what_a_json_file_may_be(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert load(tmp_path / "a.json").sha256 == load(write(tmp_path / "b" / "a.jsonl")).sha256


def test_a_data_set_as_the_hub_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "fables"
    write(folder / "data" / "train-00000-of-00002.parquet", ROWS[:6])
    write(folder / "data" / "train-00001-of-00002.parquet", ROWS[6:])
    write(folder / "data" / "test-00000-of-00001.parquet", [{"text": "not these", "id": 0}])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n# Fables\n")
    for name in (".gitattributes", "LICENSE", "dataset_infos.json", "fables.py"):
        (folder / name).write_text("{}")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "train.json").write_text("[]")
    found = load(folder)
    assert found.sha256 == load(write(tmp_path / "a.jsonl")).sha256 and set(found.domains) == {"fables"}
    assert [origin.split()[0] for origin in found.origins[:2]] == [
        "fables/data/train-00000-of-00002.parquet",
        "fables/data/train-00001-of-00002.parquet",
    ]
    (said,) = notes([str(folder)])
    names = said.partition("not read as data: ")[2].split(", ")
    assert set(names) == {"README.md", "LICENSE", "dataset_infos.json", "fables.py", "data/test-00000-of-00001.parquet"}


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("a.jsonl", "README.txt", "LICENSE.txt", "NOTICE.txt"), {"a.jsonl"}),
        (("a.json", "b.jsonl.gz", "c.csv", "d.parquet"), {"a.json", "b.jsonl.gz", "c.csv", "d.parquet"}),
        (("train.jsonl", "test.jsonl", "validation.jsonl"), {"train.jsonl"}),
        (("test.jsonl", "a.jsonl"), {"a.jsonl", "test.jsonl"}),
        (("train/a.jsonl", "dev/a.jsonl"), {"train/a.jsonl"}),
        (("en/train-00000.jsonl", "fr/train-00000.jsonl"), {"en/train-00000.jsonl", "fr/train-00000.jsonl"}),
        (("readme.jsonl", "image.png", "x.zip"), {"readme.jsonl"}),
        (("a.JSONL", "._a.jsonl", ".hidden/b.jsonl"), {"a.JSONL"}),
    ],
)
def test_what_of_a_folder_is_data(names: tuple[str, ...], read: set[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    source = find(str(tmp_path))
    assert {path.relative_to(tmp_path).as_posix() for path in source.files} == read
    hidden = {name for name in names if name.startswith(".")}
    assert {*source.left_out} == {*names} - read - hidden and len(notes([str(tmp_path)])) == bool(source.left_out)


def test_domains_of_files_that_only_number_parts(tmp_path: Path) -> None:
    for name in ("en/train-00000-of-00001.jsonl", "fr/train-00000-of-00001.jsonl", "poems-00000-of-00002.jsonl"):
        write(tmp_path / name)
    assert set(load(tmp_path).domains) == {"en", "fr", "poems"}


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text(" ".join(TEXTS))
    assert set(load(tmp_path / "README.txt").domains) == {"README"}
    with pytest.raises(UsageError, match="neither a data set nor any file"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_a_column_by_name(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "other " * 9, "story": row["text"]} for row in ROWS]
    path = write(tmp_path / f"a.{kind}", rows)
    assert load(path, column="story").sha256 == load(write(tmp_path / "b" / "a.jsonl")).sha256
    with pytest.raises(CheckpointError, match=r"(line|record|row) 1 has no column 'tale'; it has text, story"):
        load(path, column="tale")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "jsonl.gz"])
def test_a_null_is_named(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{kind}", [*ROWS[:3], {"text": None, "id": 4}, *ROWS])
    with pytest.raises(CheckpointError, match=r"(line|record|row) 4 has null as its text") as caught:
        load(path)
    assert caught.value.hint == "leave the row out, or fill it"


BROKEN: dict[str, tuple[bytes, str]] = {
    "a.parquet": (b"PAR1", r"a\.parquet: cannot be read after row 0"),
    "b.jsonl.gz": (b"no gzip", r"b\.jsonl\.gz: cannot be read after line 0"),
    "c.jsonl.gz": (gzip.compress(lines(ROWS).encode())[:-20], r"c\.jsonl\.gz: cannot be read after line \d+"),
    "d.json": (b'[{"text": "x"},\n]', r"d\.json: is not JSON \(.* in line [12]\)"),
    "e.json": (b"3", r"e\.json: is a whole number, not an array of records"),
    "f.json": (b"[[1]]", r"f\.json: record 1 is a list, not a record"),
    "g.csv": (b'text,n\n"x', r"g\.csv: cannot be read after row 0"),
    "h.csv": (b"text\nx,y\n", r"h\.csv: row 1 has more values"),
    "i.csv": (b"text\nx\n\xff\n", r"i\.csv: cannot be read after row"),
    "j.json": (b"[" * 200_000, r"j\.json: cannot be read \(RecursionError"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_is_broken_is_named(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_table_keeps_what_looks_like_nothing_or_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n007\nTrue\n1e5\n")
    source = find(str(tmp_path / "a.csv"))
    assert [record.fields["text"] for record in records(source, source.files[0])] == [
        "NA",
        "null",
        "007",
        "True",
        "1e5",
    ]


def test_nested_rows_of_a_table_lose_what_arrow_added(tmp_path: Path) -> None:
    calls = [
        {"id": "1", "function": {"name": name, "arguments": given}}
        for name, given in (("f", {"a": 1}), ("g", {"b": 2}))
    ]
    rows = [{"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]} for call in calls]
    source = find(str(write(tmp_path / "a.parquet", rows)))
    assert [record.fields for record in records(source, source.files[0])] == rows


@pytest.mark.slow
@pytest.mark.parametrize("data", ["text", "chat"])
def test_what_reading_loads(data: str, tmp_path: Path) -> None:
    """Text needs neither datasets nor transformers, a chat transformers alone."""
    rows = ROWS if data == "text" else [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    write(tmp_path / "a.jsonl", rows)
    code = (
        "import sys\nfrom mimoquant import micro_checkpoint\nfrom mimoquant.calibration.tokens import load_tokens\n"
        f"load_tokens([{str(tmp_path / 'a.jsonl')!r}], micro_checkpoint(), sequences=None, tokens=16, vocab=1024)\n"
        "print(*({'datasets', 'transformers', 'pyarrow', 'torch'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "transformers" in loaded and not loaded & {"datasets", "pyarrow"} if data == "chat" else not loaded


def test_reading_leaves_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """Every kind, in a process of its own: no file is written, no socket opened, nothing unpickled."""
    data, home = tmp_path / "data", tmp_path / "home"
    home.mkdir()
    for kind in KINDS:
        write(data / f"{kind.replace('.', '_')}.{kind}")
    chat = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    write(data / "chat.jsonl", chat)
    (data / "data.py").write_text("raise SystemExit('mark_of_foreign_code ran')\n")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', {str(data)!r}, {str(home / 'nowhere')!r}]\n"
        f"run = runpy.run_path({str(HERE.parent / 'reliability' / 'audited_run.py')!r})\n"
        "from mimoquant import micro_checkpoint\nfrom mimoquant.calibration.tokens import load_tokens\n"
        "seen = run['hook'].__globals__\nsys.addaudithook(run['hook'])\nseen['watching'] = True\n"
        f"load_tokens([{str(data)!r}], micro_checkpoint(), sequences=None, tokens=16, vocab=1024)\n"
        "seen['watching'] = False\nprint(*seen['told'], sep='\\n')\n"
    )
    env = os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"PYTHONPATH": str(HERE.parents[1]), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    strays = [line for line in done.stdout.splitlines() if line.strip()]
    probe = [line for line in strays if f"{tmp_path}/" in line and "home" not in line and "data" not in line]
    assert [
        line for line in strays if line not in probe
    ] == []  # Python tries whether the folder for temporary files works
    assert list(home.iterdir()) == []


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files would be missing in silence, as would be those of one below it."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scan = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("deep"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=r"deep: cannot be read \(Permission denied\)$"):
        find(str(tmp_path))


def test_an_array_of_turns_is_a_chat(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "a.json").write_text(json.dumps([turns, turns]))
    (tmp_path / "b.jsonl").write_text(json.dumps(turns) + "\n")
    for name, count in (("a.json", 2), ("b.jsonl", 1)):
        source = find(str(tmp_path / name))
        assert [record.fields for record in records(source, source.files[0])] == [{"messages": turns}] * count
    (tmp_path / "c.jsonl").write_text("[1, 2]\n")
    with pytest.raises(CheckpointError, match="line 1 is a list, not a record"):
        list(records(find(str(tmp_path / "c.jsonl")), tmp_path / "c.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n")
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of git-lfs, not the file$") as caught:
        list(records(find(str(tmp_path / name)), tmp_path / name))
    assert "git lfs pull" in str(caught.value.hint)
