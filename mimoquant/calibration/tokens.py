"""Texts, chats and token ids on disk → sequences of equal length, the same wherever they are made.

Key idea: every prefix of a set is balanced. The records of a domain are joined, with an end-of-text id between two, and
cut into sequences without padding; then the domains are dealt out in turn. So the first N sequences are the same N
whatever number was asked for, and they see every domain. Each sequence has its hash: that two sets share one is found
without their text.

Nothing here opens a connection, runs code from a folder or unpickles. Left out: shuffling (the order is the file's),
padding, truncation, downloads.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import yaml

from mimoquant.calibration.fingerprints import NOTHING, Fingerprints
from mimoquant.calibration.tokenizer import Tokenizer, go_offline, load_tokenizer, one_line
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.layout import ModelLayout
from mimoquant.shipped import calib_folder, shipped_sets

Ids = npt.NDArray[np.int64]
Decode = Callable[[list[int]], str]
KEYS = ("input_ids", "messages", "text")  # the first that a record has is used
HASH_DIGITS = 16
_SUFFIXES = (".jsonl", ".jsonl.xz", ".txt", ".txt.xz", ".npy")
_KINDS = "a shipped set, a .jsonl or .txt file (also .xz), a .npy array of ids, or a data set folder saved by datasets"


@dataclass(frozen=True)
class TokenSet:
    """Sequences to run a model on. `sha256` is over `ids` as little-endian int64, row by row."""

    name: str
    ids: Ids  # [sequences, tokens], packed, no padding
    domains: tuple[str, ...]  # of each sequence
    sha256: str
    sequence_hashes: tuple[str, ...]  # sha256 of each sequence's ids
    origins: tuple[str, ...]  # the files that were read with their sha256, and how text became ids
    left_out: tuple[str, ...] = ()  # domains with fewer tokens than one sequence takes
    fingerprints: Fingerprints = NOTHING  # of the records that the sequences were made from


@dataclass(frozen=True)
class CalibrationRecord:
    """What a checkpoint was calibrated on, as its recipe.yaml keeps it under `mimoquant: provenance: calibration`."""

    name: str
    tokens_sha256: str
    origins: tuple[str, ...]
    sequences: tuple[str, ...]  # the first HASH_DIGITS digits of each sequence's hash
    fingerprints: Fingerprints | None = None  # which lie beside the recipe; earlier versions kept none

    @staticmethod
    def of(tokens: TokenSet) -> CalibrationRecord:
        short = tuple(digest[:HASH_DIGITS] for digest in tokens.sequence_hashes)
        return CalibrationRecord(tokens.name, tokens.sha256, tokens.origins, short, tokens.fingerprints)

    @staticmethod
    def read(recipe: Path) -> CalibrationRecord | None:
        """None where the recipe, by this program or another, tells of no calibration.

        Raises CheckpointError: the fingerprints beside it are not those that it names.
        """
        try:
            held = yaml.safe_load(recipe.read_text(encoding="utf-8"))["mimoquant"]["provenance"]["calibration"]
            found = CalibrationRecord(
                str(held["name"]), str(held["tokens_sha256"]), tuple(held["origins"]), tuple(held["sequences"])
            )
            named = held.get("fingerprints_sha256")
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError):
            return None
        path = recipe.with_name(FINGERPRINTS_NAME)
        if named is None or not path.is_file():
            return found
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != named:
            raise CheckpointError(
                f"{path}: is not what the recipe beside it names, sha256 {str(named)[:12]}...",
                hint="copy it again from where the checkpoint was made",
            )
        return replace(found, fingerprints=Fingerprints.from_bytes(data))

    def as_plain(self) -> dict[str, Any]:
        kept = self.fingerprints
        return {
            "name": self.name,
            "tokens_sha256": self.tokens_sha256,
            "origins": list(self.origins),
            "sequences": list(self.sequences),
        } | ({"fingerprints_sha256": hashlib.sha256(kept.as_bytes()).hexdigest()} if kept else {})

    def shared_with(self, tokens: TokenSet) -> tuple[int, list[str]]:
        """How many sequences of `tokens` are among these, and the files that both were read from."""
        ours = set(self.sequences)
        both = set(self.origins) & set(tokens.origins)
        files = sorted(origin.partition(" sha256:")[0] for origin in both if " sha256:" in origin)
        return sum(digest[:HASH_DIGITS] in ours for digest in tokens.sequence_hashes), files


def load_tokens(
    data: Sequence[str], tokenizer_folder: Path, *, sequences: int | None, tokens: int, vocab: int
) -> TokenSet:
    """Read `data` (shipped sets, files, folders) as at most `sequences` sequences of `tokens` ids below `vocab`.

    Records of a domain that is full already are skipped, not tokenized.

    Raises UsageError: nothing to read, no such set or file, or too few tokens for one sequence. CheckpointError: the
    tokenizer is missing, or the data is broken; the message names file and line.
    """
    if tokens < 2:
        raise UsageError(f"sequences of {tokens} tokens were asked for; at least 2 are needed to predict one")
    if sequences is not None and sequences < 1:
        raise UsageError(f"{sequences} sequences were asked for; at least 1 is needed")
    if not data:
        raise UsageError("no data was given", hint=f"give {_KINDS}")
    files = [(entry, _find(entry)) for entry in data]  # all of them first: a typing error should not take minutes
    tokenizer = _LazyTokenizer(tokenizer_folder, vocab)
    packer = _Packer(tokens, sequences)
    origins = []
    for entry, paths in files:
        for path in paths:
            name = f"{Path(entry).name}/{path.name}" if len(paths) > 1 else path.name
            origins.append(f"{name} sha256:{_digest(path)}")
            if path.suffix == ".npy":
                packer.add_rows(_stem(path), _rows(path, tokens, vocab))
                continue
            for record in _records(path):
                if not packer.is_full(record.domain):
                    ids, text = _encode(record, tokenizer, vocab)
                    packer.add(record.domain, ids, tokenizer.loaded.eos, text)
    if "loaded" in vars(tokenizer):
        origins.append(f"tokenizer: {tokenizer.loaded.origin}")
    return packer.finish("+".join(Path(entry).name or entry for entry in data), origins, tokenizer.decoder(packer))


# --- what there is to read --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """One line of a file, or one row of a data set. `where` is how an error names it."""

    where: str
    domain: str
    fields: dict[str, Any]


def _find(entry: str) -> list[Path]:
    """The files (or data set folder) that an entry of `data` stands for."""
    path = calib_folder() / entry if entry in shipped_sets() else Path(entry)
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return [path]
        files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
        if not files:
            raise UsageError(f"{path}: has neither a data set nor any file to read", hint=f"expected is {_KINDS}")
        return files
    looks_like_a_path = os.sep in entry or entry.endswith(_SUFFIXES)
    if not path.is_file():
        problem = f"{entry}: there is no such file" if looks_like_a_path else f"no data set is named {entry!r}"
        raise UsageError(
            problem, hint=f"shipped are {', '.join(shipped_sets()) or 'none'}; a file is given by its path"
        )
    if not entry.endswith(_SUFFIXES):
        raise UsageError(f"{entry}: is not a kind of file that can be read", hint=f"expected is {_KINDS}")
    return [path]


def _stem(path: Path) -> str:
    """File name without its suffixes: the domain of records that name none."""
    return path.name.removesuffix(".xz").removesuffix(".jsonl").removesuffix(".txt").removesuffix(".npy")


def _digest(path: Path) -> str:
    """sha256 of a file, or of the Arrow files of a data set folder."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.arrow")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _records(path: Path) -> Iterator[_Record]:
    if path.is_dir():
        return _data_set_records(path)
    return _text_record(path) if path.name.removesuffix(".xz").endswith(".txt") else _line_records(path)


def _open_text(path: Path) -> IO[str]:
    opener: Callable[..., IO[str]] = lzma.open if path.suffix == ".xz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def _text_record(path: Path) -> Iterator[_Record]:
    """A text file is one record."""
    try:
        with _open_text(path) as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    yield _Record(str(path), _stem(path), {"text": text})


def _line_records(path: Path) -> Iterator[_Record]:
    number = 0
    try:
        with _open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _record(json.loads(line), f"{path}: line {number}", _stem(path))
    except json.JSONDecodeError as error:
        problem = f"{path}: line {number} is not JSON ({error.msg} in column {error.colno})"
        raise CheckpointError(problem, hint="each line is one record, as in JSON Lines") from error
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read after line {number} ({error})") from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of thousands of digits
        raise CheckpointError(f"{path}: line {number} cannot be read ({one_line(error)})") from error


def _data_set_records(path: Path) -> Iterator[_Record]:
    go_offline()
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(f"{path}: reading it needs the package datasets", hint="pip install datasets") from error
    try:
        data_set = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes Arrow or JSON raise
        raise CheckpointError(f"{path}: is not a data set that datasets can load ({one_line(error)})") from error
    if isinstance(data_set, dict):
        splits = ", ".join(data_set)
        raise UsageError(
            f"{path}: holds {len(data_set)} splits ({splits})", hint=f"give one: {path / next(iter(data_set))}"
        )
    for number, row in enumerate(data_set, start=1):
        yield _record(row, f"{path}: row {number}", path.name)


def _record(fields: Any, where: str, default_domain: str) -> _Record:
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} is a {type(fields).__name__}, not a record with {', '.join(KEYS)}")
    domain = fields.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise CheckpointError(f"{where} has a domain that is a {type(domain).__name__}, not a name")
    return _Record(where, domain or default_domain, fields)


def _rows(path: Path, tokens: int, vocab: int) -> Ids:
    """A .npy array, as it is."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: is not a plain .npy array ({one_line(error)})") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "iu":
        found = f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else "an archive"
        raise CheckpointError(f"{path}: holds {found}; expected integers [sequences, tokens]")
    if values.shape[1] != tokens:
        problem = f"{path}: its sequences have {values.shape[1]} tokens; {tokens} were asked for"
        raise UsageError(problem, hint=f"ask for {values.shape[1]} tokens: an array is used as it is")
    if values.size:
        _check_range(int(values.min()), int(values.max()), vocab, str(path))
    return values.astype(np.int64)


# --- records to ids ---------------------------------------------------------------------------------------------------


class _LazyTokenizer:
    """Loads the tokenizer when a record first needs it; arrays of ids do not."""

    def __init__(self, folder: Path, vocab: int) -> None:
        self.folder = folder
        self.vocab = vocab

    @cached_property
    def loaded(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.eos is not None:
            _check_range(tokenizer.eos, tokenizer.eos, self.vocab, f"{self.folder}: the end-of-text token")
        return tokenizer

    def decoder(self, packer: _Packer) -> Decode | None:
        """Ids to text, where some of the data was ids and there is a tokenizer; it is not needed for them."""
        with_ids = bool(packer.passages) or any(packer.rows.values())
        try:
            return self.loaded.decode if with_ids else None
        except CheckpointError:
            return None


def _encode(record: _Record, tokenizer: _LazyTokenizer, vocab: int) -> tuple[list[int], str | None]:
    """The ids, and the text that they were made from, before any template; None where the record has ids."""
    key = next((key for key in KEYS if record.fields.get(key) is not None), None)
    if key is None:
        found = ", ".join(map(str, record.fields)) or "nothing"
        raise CheckpointError(f"{record.where} has none of {', '.join(KEYS)}; it has {found}")
    value = record.fields[key]
    if key == "input_ids":
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise CheckpointError(f"{record.where} has input_ids that are not a list of integers")
        ids: list[int] = value
        plain = None
    else:
        text = _chat_text(record, tokenizer.loaded) if key == "messages" else value
        plain = _said(value) if key == "messages" else value
        if not isinstance(text, str):
            raise CheckpointError(f"{record.where} has a text that is a {type(text).__name__}")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise CheckpointError(f"{record.where} holds half of a surrogate pair, which is no character")
        ids = tokenizer.loaded.encode(text)
    if ids:
        _check_range(min(ids), max(ids), vocab, record.where)
    return ids, plain


def _said(turns: list[dict[str, Any]]) -> str:
    """The words of a chat. A system's are left out, which whole collections share, unless nobody else speaks."""
    spoken = [turn for turn in turns if turn.get("role") not in ("system", "developer")] or turns
    return "\n".join(turn["content"] for turn in spoken if isinstance(turn.get("content"), str))


def _check_range(low: int, high: int, vocab: int, where: str) -> None:
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise CheckpointError(
            f"{where}: has the id {bad}, outside the vocabulary of {vocab}",
            hint="were these ids, or this tokenizer, made for another model?",
        )


def _chat_text(record: _Record, tokenizer: Tokenizer) -> str:
    messages = record.fields["messages"]
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in messages)
    ):
        raise CheckpointError(f"{record.where} has messages that are not a list of turns with a role")
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    if tokenizer.render is not None:
        try:
            return tokenizer.render(turns, record.fields.get("tools"))
        except Exception as error:  # a template is a program: it may raise anything
            raise CheckpointError(f"{record.where}: the chat template refuses it ({one_line(error)})") from error
    if record.fields.get("plain") is True:
        return "\n\n".join(f"{turn['role'].capitalize()}: {turn.get('content', '')}" for turn in turns)
    raise CheckpointError(
        f"{record.where} has messages, and the tokenizer has no chat template ({tokenizer.origin})",
        hint='put chat_template.jinja beside the tokenizer, or "plain": true into records that may be read without it',
    )


# --- ids to sequences -------------------------------------------------------------------------------------------------


class _Packer:
    """Collects the ids of each domain, in order of first appearance, and deals out sequences."""

    def __init__(self, tokens: int, sequences: int | None) -> None:
        self.tokens = tokens
        self.sequences = sequences
        self.rows: dict[str, list[Ids]] = {}  # whole sequences, from arrays
        self.joined: dict[str, array[int]] = {}
        self.texts: list[tuple[str, int, str]] = []  # domain, the first id's place in what is joined, text
        self.passages: list[tuple[str, int, Ids]] = []  # the same of records that were ids

    def is_full(self, domain: str) -> bool:
        if self.sequences is None or domain not in self.joined:
            return False
        return len(self.rows[domain]) + len(self.joined[domain]) // self.tokens >= self.sequences

    def _open(self, domain: str) -> None:
        self.rows.setdefault(domain, [])
        self.joined.setdefault(domain, array("q"))

    def add_rows(self, domain: str, rows: Ids) -> None:
        self._open(domain)
        self.rows[domain] += list(rows[: self.sequences])

    def add(self, domain: str, ids: list[int], eos: int | None, text: str | None) -> None:
        """`text`: what the ids were made from; None: they were ids."""
        self._open(domain)
        joined = self.joined[domain]
        if joined and ids and eos is not None and joined[-1] != eos:
            joined.append(eos)
        if text is None:
            self.passages.append((domain, len(joined), np.array(ids, np.int64)))
        else:
            self.texts.append((domain, len(joined), text))
        joined.extend(ids)

    def finish(self, name: str, origins: list[str], decode: Decode | None) -> TokenSet:
        sizes = {domain: len(self.rows[domain]) * self.tokens + len(ids) for domain, ids in self.joined.items()}
        largest = max(sizes, key=lambda domain: sizes[domain], default="")
        if sizes.get(largest, 0) < self.tokens:
            problem = f"data {name}: {sizes.get(largest, 0)} tokens, fewer than the {self.tokens} of one sequence"
            hint = f"that is {largest}, the largest of its {len(sizes)} domains" if len(sizes) > 1 else None
            raise UsageError(problem, hint=hint)
        arrays = {domain: list(rows) for domain, rows in self.rows.items()}
        for domain, ids in self.joined.items():
            whole = len(ids) // self.tokens
            cut = np.frombuffer(ids, np.int64, whole * self.tokens) if whole else np.empty(0, np.int64)
            self.rows[domain] += list(cut.reshape(whole, self.tokens))
        turns = zip_longest(*self.rows.values())
        dealt = [
            (domain, row) for turn in turns for domain, row in zip(self.rows, turn, strict=True) if row is not None
        ]
        dealt = dealt[: self.sequences]
        packed = np.stack([row for _, row in dealt])
        little_endian = packed.astype("<i8")
        return TokenSet(
            name=name,
            ids=packed,
            domains=tuple(domain for domain, _ in dealt),
            sha256=hashlib.sha256(little_endian.tobytes()).hexdigest(),
            sequence_hashes=tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in little_endian),
            origins=tuple(origins),
            left_out=tuple(domain for domain, size in sizes.items() if size < self.tokens),
            fingerprints=self._fingerprints(arrays, Counter(domain for domain, _ in dealt), decode),
        )

    def _fingerprints(self, arrays: dict[str, list[Ids]], dealt: Counter[str], decode: Decode | None) -> Fingerprints:
        """Of the records of which at least one id is in a sequence that was dealt; `arrays` come before what is
        joined. Ids count as the text that they stand for, too, where there is a tokenizer to tell."""
        ends = {domain: (dealt[domain] - len(rows)) * self.tokens for domain, rows in arrays.items()}
        whole = [np.concatenate(rows[: dealt[domain]]) for domain, rows in arrays.items() if rows and dealt[domain]]
        passages = whole + [ids for domain, begin, ids in self.passages if begin < ends[domain]]
        texts = [text for domain, begin, text in self.texts if begin < ends[domain]]
        decoded = [decode(ids.tolist()) for ids in passages] if decode else []
        return Fingerprints.of(texts + decoded, passages)


class Wanted(Protocol):
    """What a recipe says of its calibration tokens."""

    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def sequences(self) -> int: ...
    @property
    def tokens(self) -> int: ...


def calibration_tokens(wanted: Wanted | None, layout: ModelLayout) -> TokenSet | None:
    """What a recipe calibrates on; None for a recipe that needs none. The tokenizer is the source's own."""
    if wanted is None:
        return None
    return load_tokens(
        wanted.data, layout.index.folder, sequences=wanted.sequences, tokens=wanted.tokens, vocab=layout.geometry.vocab
    )
