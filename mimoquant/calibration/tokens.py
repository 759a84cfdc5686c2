"""Texts, chats and token ids on disk → sequences of equal length, the same wherever they are made.

Key idea: every prefix of a set is balanced. The records of a domain are joined, with an end-of-text id between two, and
cut into sequences without padding; then the domains are dealt out in turn. So the first N sequences are the same N
whatever number was asked for, and they see every domain. Each sequence has its hash: that two sets share one is found
without their text.

Nothing here opens a connection, runs code from a folder or unpickles. Left out: shuffling (the order is the file's),
padding, truncation, downloads.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import yaml

from mimoquant.calibration.conversations import Chat, content_of
from mimoquant.calibration.fingerprints import NOTHING, Fingerprints
from mimoquant.calibration.records import KINDS, Record, digest, domain_of, find, records
from mimoquant.calibration.tokenizer import Tokenizer, load_tokenizer, one_line
from mimoquant.checkpoint.folders import is_there, read_inside
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.layout import ModelLayout
from mimoquant.model.media import Placed, media_digest

Ids = npt.NDArray[np.int64]
Decode = Callable[[list[int]], str]
HASH_DIGITS = 16
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_MAX_RECIPE_BYTES, _MAX_FINGERPRINTS_BYTES = 10_000_000, 4_000_000_000


@dataclass(frozen=True)
class TokenSet:
    """Sequences to run a model on. `sha256`: see `set_digest`."""

    name: str
    ids: Ids  # [sequences, tokens], packed, no padding
    domains: tuple[str, ...]  # of each sequence
    sha256: str
    sequence_hashes: tuple[str, ...]  # sha256 of each sequence's ids
    origins: tuple[str, ...]  # the files that were read with their sha256, and how text became ids
    left_out: tuple[str, ...] = ()  # domains with fewer tokens than one sequence takes
    fingerprints: Fingerprints = NOTHING  # of the records that the sequences were made from
    media: tuple[tuple[Placed, ...], ...] = ()  # of each sequence, in place of ids; empty where no sequence has any

    def first(self, sequences: int) -> TokenSet:
        """The same set, of fewer sequences."""
        ids, media = self.ids[:sequences], self.media[:sequences]
        return replace(
            self,
            ids=ids,
            domains=self.domains[:sequences],
            sha256=set_digest(ids, media),
            sequence_hashes=self.sequence_hashes[:sequences],
            media=media if any(media) else (),
        )


def set_digest(ids: Ids, media: Sequence[Sequence[Placed]] = ()) -> str:
    """sha256 over ids [sequences, tokens] as little-endian int64, row by row, and then, where any sequence has media,
    over `media_digest` of each."""
    told = hashlib.sha256(ids.astype("<i8").tobytes())
    if any(media):
        for of_sequence in media:
            told.update(media_digest(of_sequence).encode())
    return told.hexdigest()


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
    def read(folder: Path) -> CalibrationRecord | None:
        """What a checkpoint's recipe.yaml, by this program or another, tells of its calibration; None: of none.

        Raises CheckpointError: the fingerprints beside it are not those that it names, or a link leads elsewhere.
        """
        raw = read_inside(folder, "recipe.yaml", _MAX_RECIPE_BYTES)
        try:
            held = yaml.safe_load(raw.decode("utf-8"))["mimoquant"]["provenance"]["calibration"]
            found = CalibrationRecord(
                str(held["name"]), str(held["tokens_sha256"]), tuple(held["origins"]), tuple(held["sequences"])
            )
            named = held.get("fingerprints_sha256")
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError):
            return None
        if named is None or not is_there(folder, FINGERPRINTS_NAME):
            return found
        data = read_inside(folder, FINGERPRINTS_NAME, _MAX_FINGERPRINTS_BYTES)
        if hashlib.sha256(data).hexdigest() != named:
            raise CheckpointError(
                f"{folder / FINGERPRINTS_NAME}: is not what the recipe beside it names, sha256 {str(named)[:12]}...",
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
    data: Sequence[str],
    tokenizer_folder: Path,
    *,
    sequences: int | None,
    tokens: int,
    vocab: int,
    column: str | None = None,
) -> TokenSet:
    """Read `data` (shipped sets, files, folders) as at most `sequences` sequences of `tokens` ids below `vocab`.

    Records of a domain that is full already are skipped, not tokenized. `column`: of a record, only that is read.

    Raises UsageError: nothing to read, no such set or file, or too few tokens for one sequence. CheckpointError: the
    tokenizer is missing, or the data is broken; the message names file and line.
    """
    if tokens < 2:
        raise UsageError(f"sequences of {tokens} tokens were asked for; at least 2 are needed to predict one")
    if sequences is not None and sequences < 1:
        raise UsageError(f"{sequences} sequences were asked for; at least 1 is needed")
    if not data:
        raise UsageError("no data was given", hint=f"give {KINDS}")
    sources = [find(entry) for entry in data]  # all of them first: a typing error should not take minutes
    tokenizer = _LazyTokenizer(tokenizer_folder, vocab)
    packer = _Packer(tokens, sequences)
    origins = []
    for source in sources:
        for path in source.files:
            origins.append(f"{source.name(path)} sha256:{digest(path)}")
            if path.suffix.lower() == ".npy":
                packer.add_rows(domain_of(source, path), _rows(path, tokens, vocab))
                continue
            for record in records(source, path):
                if not packer.is_full(record.domain):
                    ids, text = _encode(record, column, tokenizer, vocab)
                    packer.add(record.domain, ids, tokenizer.loaded.eos, text)
    if "loaded" in vars(tokenizer):
        origins.append(f"tokenizer: {tokenizer.loaded.origin}")
    return packer.finish("+".join(Path(entry).name or entry for entry in data), origins, tokenizer.decoder(packer))


# --- records to ids ---------------------------------------------------------------------------------------------------


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


def _encode(record: Record, column: str | None, tokenizer: _LazyTokenizer, vocab: int) -> tuple[list[int], str | None]:
    """The ids, and the text that they were made from, before any template; None where the record has ids."""
    content = content_of(record.fields, record.where, column)
    plain = content.text if isinstance(content, Chat) else content if isinstance(content, str) else None
    if isinstance(content, list):
        ids = content
    else:
        text = _chat_text(record, content, tokenizer.loaded) if isinstance(content, Chat) else content
        if not text.isascii() and _HALF_PAIR.search(text):
            raise CheckpointError(f"{record.where} holds half of a surrogate pair, which is no character")
        ids = tokenizer.loaded.encode(text)
    if ids:
        _check_range(min(ids), max(ids), vocab, record.where)
    return ids, plain


def _check_range(low: int, high: int, vocab: int, where: str) -> None:
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise CheckpointError(
            f"{where}: has the id {bad}, outside the vocabulary of {vocab}",
            hint="were these ids, or this tokenizer, made for another model?",
        )


def _chat_text(record: Record, chat: Chat, tokenizer: Tokenizer) -> str:
    """What the model's template makes of a chat; Alpaca's pairs, and what is said to be plain, can do without one."""
    may_be_plain = record.fields.get("plain") is True
    if tokenizer.render is None:
        if may_be_plain or "instruction" in record.fields:
            return chat.paragraphs()
        raise CheckpointError(
            f"{record.where} has messages, and the tokenizer has no chat template ({tokenizer.origin})",
            hint='put chat_template.jinja beside the tokenizer, or "plain": true into records that can do without it',
        )
    fitted = chat.for_template(
        tokenizer.template if not may_be_plain else f"{tokenizer.template} tools tool_calls", record.where
    )
    try:
        return tokenizer.render(fitted.messages, fitted.tools)
    except ImportError as error:
        raise UsageError(
            f"{record.where}: rendering its chat needs transformers", hint="pip install transformers"
        ) from error
    except Exception as error:  # a template is a program: it may raise anything
        if fitted.has_strings:
            with contextlib.suppress(Exception):
                return tokenizer.render(fitted.with_strings().messages, fitted.tools)
        raise CheckpointError(
            f"{record.where}: the chat template refuses it ({one_line(error)})", hint=_refusal_hint(fitted, error)
        ) from error


def _refusal_hint(chat: Chat, error: Exception) -> str:
    """How people convert what a template has no place for; of a template that is no template, where it stands."""
    if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError", "SecurityError"):
        return "the fault is the template's, in chat_template.jinja or tokenizer_config.json, not the data's"
    roles = [turn["role"] for turn in chat.messages]
    if "system" in roles:
        return "if it takes no system message, put that text before the first user's"
    if "tool" in roles:
        return "if it takes no tool's answers, write them as a user's message"
    return "templates mostly want user and assistant in turn, the user first, and content in every message"


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
            sha256=set_digest(packed),
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
    @property
    def column(self) -> str | None: ...


def calibration_tokens(wanted: Wanted | None, layout: ModelLayout) -> TokenSet | None:
    """What a recipe calibrates on; None for a recipe that needs none. The tokenizer is the source's own."""
    if wanted is None:
        return None
    return load_tokens(
        wanted.data,
        layout.index.folder,
        sequences=wanted.sequences,
        tokens=wanted.tokens,
        vocab=layout.geometry.vocab,
        column=wanted.column,
    )
