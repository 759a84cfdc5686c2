"""Files and folders of data → their records, one after the other.

Key idea: a folder is read by what its files are, as the Hub's data sets lie: tables and lines are data; a README, a
licence and the collection's own descriptions are not, and what is left out is named. Of several splits train is read.
JSON, text and csv are read as they stand: rows may differ in their fields, and nothing is guessed of a value, neither
of which Arrow has. Parquet and folders that datasets saved are read by datasets, row by row, nothing kept on disk.

Left out: archives, scripts (never run); downloads. Images and sounds are no records: a message names them, and
`media_files` reads them.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import itertools
import json
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mimoquant.calibration.conversations import FORMS, is_chat, kind_of
from mimoquant.calibration.tokenizer import go_offline, one_line
from mimoquant.checkpoint.folders import LFS_HINT, LFS_POINTER
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.shipped import calib_folder, shipped_sets
from mimoquant.wording import many

_PACKED = ("", ".xz", ".gz")
_LINES, _ARRAYS, _TEXTS, _TABLES = (".jsonl", ".ndjson"), (".json",), (".txt",), (".csv", ".tsv")
_PLAIN = (*_LINES, *_ARRAYS, *_TEXTS, *_TABLES)
_SUFFIXES = (*(kind + packed for kind in _PLAIN for packed in _PACKED), ".parquet", ".npy")
_CODES = ".codes.npy"  # of a sound, for a message to name: other arrays are ids
_MEDIA = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", _CODES)
KINDS = (
    "a shipped set, a file of .jsonl, .json, .txt, .csv (also .gz, .xz), .parquet or .npy (an array of ids), or a "
    "folder of them, as the Hub has it or saved by datasets"
)
_ABOUT = re.compile(r"(readme|licen[sc]e|notice|copying|citation|changelog|sources|authors|credits)\b.*", re.IGNORECASE)
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json"}
_PART = re.compile(r"(-\d{5}-of-\d{5}|-\d{5})$")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


@dataclass(frozen=True)
class Record:
    """One line of a file, or one row of a data set. `where` is how an error names it."""

    where: str
    domain: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What an entry of `--data` stands for. `left_out`: files of a folder that are not data, and links that lead to
    folders or to nothing."""

    entry: str
    folder: Path | None
    files: tuple[Path, ...]  # or the one folder that datasets saved
    left_out: tuple[str, ...] = ()

    def name(self, path: Path) -> str:
        inside = path.relative_to(self.folder).as_posix() if self.folder and path != self.folder else path.name
        return f"{Path(self.entry).name}/{inside}" if len(self.files) > 1 else path.name

    def note(self) -> str | None:
        """One sentence of what is not read."""
        media = [name for name in self.left_out if name.lower().endswith(_MEDIA)]
        other = [name for name in self.left_out if name not in media]
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        said = [f"not read as data: {', '.join(other[:8])}{more}"] if other else []
        if media:
            said.append(f"{len(media)} images and sounds are read where a message names them")
        return f"{self.entry}: {'; '.join(said)}" if said else None


def find(entry: str) -> Source:
    """Raises UsageError: there is nothing of that name, or nothing in it that can be read."""
    path = calib_folder() / entry if entry in shipped_sets() else Path(os.path.expanduser(entry))
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise UsageError(f"{entry}: cannot be read (Permission denied)")
        return _in_folder(entry, path)
    looks_like_a_path = os.sep in entry or entry.endswith(_SUFFIXES)
    if path.exists() and not path.is_file():
        raise UsageError(f"{entry}: is no regular file", hint="data is read more than once: write it to a file first")
    if not path.is_file():
        problem = f"{entry}: there is no such file" if looks_like_a_path else f"no data set is named {entry!r}"
        raise UsageError(
            problem, hint=f"shipped are {', '.join(shipped_sets()) or 'none'}; a file is given by its path"
        )
    if not entry.lower().endswith(_SUFFIXES):
        raise UsageError(f"{entry}: is not a kind of file that can be read", hint=f"expected is {KINDS}")
    return Source(entry, None, (path,))


def notes(data: Sequence[str]) -> list[str]:
    """What of `data` is left out, in sentences."""
    return [note for entry in data if (note := find(entry).note())]


def _in_folder(entry: str, folder: Path) -> Source:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return Source(entry, folder, (folder,))
    _refuse_cache(folder)
    every = sorted(_all_below(folder))
    visible = [path for path in every if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in visible if path.is_file() and _is_data(path)]
    splits = {path: _split(path) for path in found}
    train = {"train", ""} if "train" in splits.values() else {*splits.values()}
    kept = [path for path in found if splits[path] in train]
    if not kept:
        raise UsageError(f"{folder}: has neither a data set nor any file to read", hint=f"expected is {KINDS}")
    left_out = [path.relative_to(folder).as_posix() for path in visible if path not in kept]
    return Source(entry, folder, tuple(kept), tuple(left_out))


def _all_below(folder: Path) -> Iterator[Path]:
    """Files and links. Raises UsageError for a folder that cannot be read, whose files would be missing in silence."""

    def fail(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for root, folders, files in os.walk(folder, onerror=fail):
        yield from (path for path in (Path(root, name) for name in folders) if path.is_symlink())
        yield from (Path(root, name) for name in files)


def _refuse_cache(folder: Path) -> None:
    """Raises UsageError for a folder of the Hub's cache, of which each snapshot is the whole data set at one time."""
    repo = folder.parent if folder.name == "snapshots" else folder
    if not (repo / "snapshots").is_dir() or not (repo / "blobs").is_dir():
        return
    snapshots = sorted((path for path in (repo / "snapshots").iterdir() if path.is_dir()), key=os.path.getmtime)
    raise UsageError(
        f"{folder}: is a folder of the Hub's cache, which holds {many(len(snapshots), 'snapshot')}",
        hint=f"give one: {snapshots[-1]}" if snapshots else "download the data set again",
    )


def _is_data(path: Path) -> bool:
    name = path.name.lower()
    is_about = _ABOUT.fullmatch(name) and ".txt" in name
    return name.endswith(_SUFFIXES) and not name.endswith(_CODES) and not is_about and name not in _DESCRIPTIONS


def _split(path: Path) -> str:
    """The split that a file belongs to by its name, as the Hub's tools write it; "" where it has none."""
    name = _PART.sub("", stem(path)).lower()
    return _SPLITS.get(name) or _SPLITS.get(path.parent.name.lower()) or _SPLITS.get(re.split(r"[-_.]", name)[0], "")


def stem(path: Path) -> str:
    """File name without its suffixes."""
    name = path.name
    for suffix in (".xz", ".gz", *_PLAIN, ".parquet", ".npy"):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return name


def domain_of(source: Source, path: Path) -> str:
    """Of records that name none: the file's name, or its folder's where that only numbers parts of a split."""
    name = _PART.sub("", stem(path))
    if source.folder is None or name.lower() not in _SPLITS:
        return name
    outer = [part for part in path.relative_to(source.folder).parent.parts if part != "data"]
    return outer[-1] if outer else source.folder.resolve().name


def digest(path: Path) -> str:
    """sha256 of a file, or of the Arrow files of a data set folder."""
    hashed = hashlib.sha256()
    for file in sorted(path.glob("*.arrow")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def records(source: Source, path: Path) -> Iterator[Record]:
    """Raises CheckpointError: the file is broken; the message names the line or row. UsageError: a package is missing,
    or the folder holds several splits."""
    _refuse_pointer(path)
    kind, domain = path.name.lower().removesuffix(".xz").removesuffix(".gz"), domain_of(source, path)
    if path.is_dir():
        rows: Iterator[tuple[str, Any]] = _saved_rows(path)
    elif kind.endswith(".parquet"):
        rows = _parquet_rows(path)
    elif kind.endswith(_TABLES):
        rows = _csv_rows(path)
    elif kind.endswith(_TEXTS):
        rows = _text_row(path)
    else:
        rows = _array_rows(path) if kind.endswith(_ARRAYS) else _line_rows(path)
    for place, fields in rows:
        yield _record(fields, f"{path}: {place}" if place else str(path), domain)


def _refuse_pointer(path: Path) -> None:
    """A data set that was cloned without git-lfs has files of three lines, which would be read as text."""
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path}: is a pointer of git-lfs, not the file", hint=LFS_HINT)


def _record(fields: Any, where: str, default_domain: str) -> Record:
    if isinstance(fields, str):
        fields = {"text": fields}
    elif is_chat(fields):
        fields = {"messages": fields}
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{where} is {kind_of(fields)}, not a record with {FORMS}",
            hint="an array of records is a .json file" if isinstance(fields, list) else "leave it out, or fill it",
        )
    domain = fields.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise CheckpointError(f"{where} has a domain that is {kind_of(domain)}, not a name")
    return Record(where, domain or default_domain, fields)


_UNREADABLE = (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError)


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig", newline="\n")
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _text(path: Path) -> str:
    try:
        with _open_text(path) as stream:
            return stream.read()
    except _UNREADABLE as error:
        raise _unreadable(f"{path}: cannot be read", error) from error


def _unreadable(problem: str, error: Exception) -> CheckpointError:
    """`problem` with its reason; of another encoding than UTF-8 how to change it."""
    hint = None
    if isinstance(error, UnicodeDecodeError):
        wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = f"text is read as UTF-8: iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8 FILE > NEW converts it"
    return CheckpointError(f"{problem} ({one_line(error)})", hint=hint)


def _text_row(path: Path) -> Iterator[tuple[str, Any]]:
    """A text file is one record."""
    yield "", {"text": _text(path)}


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{path}: line {number} is not JSON ({error.msg} in column {error.colno})"
        raise CheckpointError(problem, hint="each line is one record, as in JSON Lines") from error
    except _UNREADABLE as error:
        raise _unreadable(f"{path}: cannot be read after line {number}", error) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        raise CheckpointError(f"{path}: line {number} cannot be read ({one_line(error)})") from error


def _array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A .json file is an array of records, or one under a key such as "data"; some hold lines in truth."""
    text = _text(path)
    try:
        held = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            yield from _line_rows(path)
            return
        raise CheckpointError(f"{path}: is not JSON ({error.msg} in line {error.lineno})") from error
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)})") from error
    if isinstance(held, dict):
        lists = [value for value in held.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_record = any(isinstance(held.get(name), str | list) for name in ("text", "messages", "conversations"))
        held = lists[0] if len(lists) == 1 and not is_record else [held]
    if not isinstance(held, list):
        raise CheckpointError(f"{path}: is {kind_of(held)}, not an array of records")
    yield from ((f"record {number}", fields) for number, fields in enumerate(held, start=1))


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """All values as they stand: no "NA" becomes nothing, and no text a number. Where the first line has semicolons and
    no comma, as spreadsheets of half the world write it, they part the columns."""
    number = 0
    csv.field_size_limit(2**31 - 1)  # of one value: a text may be long
    try:
        with _open_text(path) as stream:
            head = stream.readline()
            parted = "\t" if ".tsv" in path.name.lower() else ";" if ";" in head and "," not in head else ","
            rows = csv.DictReader(itertools.chain([head], stream), delimiter=parted, strict=True)
            for number, fields in enumerate(rows, start=1):
                if None in fields:
                    raise CheckpointError(f"{path}: row {number} has more values than the first line has names")
                yield f"row {number}", fields
    except (*_UNREADABLE, csv.Error) as error:
        raise _unreadable(f"{path}: cannot be read after row {number}", error) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    datasets, number = _package(path), 0
    try:
        if not importlib.import_module("pyarrow.parquet").read_metadata(path).num_rows:
            return  # a part of a split may be empty; datasets fails of it
        rows = datasets.load_dataset(
            "parquet",
            data_files={"train": [str(path)]},
            split="train",
            streaming=True,
            cache_dir="memory://nothing",  # else it makes folders and locks in the user's cache
        )
        for number, fields in enumerate(rows, start=1):
            yield f"row {number}", _without_nulls(fields)
    except Exception as error:  # whatever a broken file makes Arrow raise
        raise CheckpointError(f"{path}: cannot be read after row {number} ({one_line(error)})") from error


def _saved_rows(path: Path) -> Iterator[tuple[str, Any]]:
    datasets = _package(path)
    try:
        data_set = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes Arrow or JSON raise
        raise CheckpointError(f"{path}: is not a data set that datasets can load ({one_line(error)})") from error
    if isinstance(data_set, dict):
        splits = ", ".join(data_set)
        raise UsageError(
            f"{path}: holds {len(data_set)} splits ({splits})", hint=f"give one: {path / next(iter(data_set))}"
        )
    yield from ((f"row {number}", _without_nulls(row)) for number, row in enumerate(data_set, start=1))


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row without the keys that Arrow adds to nested records because others have them. The row's own stay."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(inner) for key, inner in value.items() if inner is not None}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in row.items()}


def _package(path: Path) -> Any:
    go_offline()
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(f"{path}: reading it needs the package datasets", hint="pip install datasets") from error
