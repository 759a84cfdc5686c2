"""Texts, chats and token ids on disk → sequences of equal length, the same wherever they are made.

Key idea: text becomes ids as the model's own template and tokenizer make them, images and sounds placeholders in those
ids; `packing` cuts them. Each sequence has its hash, in which its media are: that two sets share one is found without
their text.

Nothing here opens a connection, runs code from a folder or unpickles. Left out: downloads.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import yaml

from mimoquant.calibration.conversations import NO_PLACE_NEEDED, Address, Chat, content_of
from mimoquant.calibration.fingerprints import NOTHING, Fingerprints
from mimoquant.calibration.media_files import DataFolder, MediaReader, content_digest, media_digest
from mimoquant.calibration.packing import Packed, Packer, check_fits
from mimoquant.calibration.records import KINDS, Record, Source, digest, domain_of, find, records
from mimoquant.calibration.tokenizer import Tokenizer, load_tokenizer, one_line
from mimoquant.checkpoint.folders import is_there, read_inside
from mimoquant.checkpoint.hf_files import CONFIG_NAME, FINGERPRINTS_NAME
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.layout import ModelLayout
from mimoquant.model.media import Medium, Picture, Placed, check_sequence, walked_ids
from mimoquant.model.tower_config import read_tower_config

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
    sequence_hashes: tuple[str, ...]  # sha256 of each sequence's ids, and media
    origins: tuple[str, ...]  # the files that were read with their sha256, and how text became ids
    left_out: tuple[str, ...] = ()  # domains with fewer tokens than one sequence takes
    fingerprints: Fingerprints = NOTHING  # of the records that the sequences were made from
    media: tuple[tuple[Placed, ...], ...] = ()  # of each sequence, in place of ids; empty where no sequence has any
    skipped: int = 0  # tokens that are in no sequence, so that no image is cut

    @property
    def kinds(self) -> Ids | None:
        """[sequences, tokens]: 0 of text, 1 of an image, 2 of a sound; None where all is text."""
        if not any(self.media):
            return None
        out = np.zeros_like(self.ids)
        for row, placed in zip(out, self.media, strict=True):
            for start, count, medium in placed:
                row[start : start + count] = 1 if isinstance(medium, Picture) else 2
        return out

    @property
    def walked(self) -> Ids:
        """`ids` with numbers below 0 in place of placeholders: see `walked_ids`."""
        return walked_ids(self.ids, self.media)

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
    takes_media: bool = False,
) -> TokenSet:
    """Read `data` (shipped sets, files, folders) as at most `sequences` sequences of `tokens` ids below `vocab`.

    Records of a domain that is full already are skipped, not tokenized. `column`: of a record, only that is read.
    `takes_media`: whether whoever asks looks at `TokenSet.media`.

    Raises UsageError: nothing to read, no such set or file, too few tokens for one sequence, or media that are not
    taken. CheckpointError: the tokenizer is missing, or the data is broken; the message names file and line.
    """
    if tokens < 2:
        raise UsageError(f"sequences of {tokens} tokens were asked for; at least 2 are needed to predict one")
    if sequences is not None and sequences < 1:
        raise UsageError(f"{sequences} sequences were asked for; at least 1 is needed")
    if not data:
        raise UsageError("no data was given", hint=f"give {KINDS}")
    sources = [find(entry) for entry in data]  # all of them first: a typing error should not take minutes
    _refuse_twice(sources)
    tokenizer, media = _LazyTokenizer(tokenizer_folder, vocab), MediaReader(tokenizer_folder)
    packer = Packer(tokens, sequences)
    origins = []
    for source in sources:
        for path in source.files:
            origins.append(f"{source.name(path)} sha256:{digest(path)}")
            if path.suffix.lower() == ".npy":
                packer.add_rows(domain_of(source, path), _rows(path, tokens, vocab))
                continue
            folder = DataFolder(path if path.is_dir() else path.parent, source.folder or path.parent)
            for record in records(source, path):
                if not packer.is_full(record.domain):
                    made = _encode(record, column, tokenizer, media if takes_media else None, folder)
                    check_fits(made.media, tokens, record.where)
                    packer.add(record.domain, made.ids, tokenizer.loaded.eos, made.text, made.media)
    if "loaded" in vars(tokenizer):
        origins.append(f"tokenizer: {tokenizer.loaded.origin}")
    name = "+".join(Path(entry).name or entry for entry in data)
    return _token_set(name, packer.finish(name), (*origins, *media.told), tokenizer.decoder(packer))


def _token_set(name: str, packed: Packed, origins: Sequence[str], decode: Decode | None) -> TokenSet:
    """Ids count as the text that they stand for, too, where there is a tokenizer to tell."""
    ids = np.stack([row.ids for row in packed.rows])
    media = tuple(row.media for row in packed.rows)
    decoded = [decode(passage.tolist()) for passage in packed.passages] if decode else []
    digests = {content_digest(medium) for of_sequence in media for _, _, medium in of_sequence}
    return TokenSet(
        name=name,
        ids=ids,
        domains=packed.domains,
        sha256=set_digest(ids, media),
        sequence_hashes=tuple(set_digest(row.ids[None], (row.media,)) for row in packed.rows),
        origins=(*origins, *([_media_origin(digests)] if digests else [])),
        left_out=packed.left_out,
        fingerprints=Fingerprints.of(packed.texts + decoded, packed.passages, digests),
        media=media if digests else (),
        skipped=packed.skipped,
    )


def _media_origin(digests: Iterable[str]) -> str:
    """What the media were, as one line; each one's digest is among the fingerprints."""
    every = sorted(digests)
    return f"{len(every)} images and sounds sha256:{hashlib.sha256(chr(10).join(every).encode()).hexdigest()}"


def _refuse_twice(sources: list[Source]) -> None:
    """Sequences that are there twice are no two observations."""
    found: dict[Path, str] = {}
    for source in sources:
        for path in source.files:
            if (where := path.resolve()) in found:
                raise UsageError(
                    f"{path}: is read twice, by {found[where]} and by {source.entry}",
                    hint="give each file or folder once",
                )
            found[where] = source.entry


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

    def decoder(self, packer: Packer) -> Decode | None:
        """Ids to text, where some of the data was ids and there is a tokenizer; it is not needed for them."""
        try:
            return self.loaded.decode if packer.has_ids else None
        except CheckpointError:
            return None


class _Encoded(NamedTuple):
    """`text`: what ids were made from, before any template; None where the record has ids."""

    ids: list[int]
    text: str | None
    media: tuple[Placed, ...] = ()


def _encode(
    record: Record, column: str | None, tokenizer: _LazyTokenizer, media: MediaReader | None, folder: DataFolder
) -> _Encoded:
    content = content_of(record.fields, record.where, column)
    if isinstance(content, list):
        made = _Encoded(content, None)
    else:
        shown = _shown(content.media, record.where, media, folder) if isinstance(content, Chat) else []
        text = _chat_text(record, content, tokenizer.loaded) if isinstance(content, Chat) else content
        if not text.isascii() and _HALF_PAIR.search(text):
            raise CheckpointError(f"{record.where} holds half of a surrogate pair, which is no character")
        ids, plain = tokenizer.loaded.encode(text), content.text if isinstance(content, Chat) else content
        made = _Encoded(ids, plain)
        if shown and media is not None:
            laid = media.laid(ids, shown, record.where)
            made = _Encoded(laid.ids, plain, laid.media)
    if made.ids:
        _check_range(min(made.ids), max(made.ids), tokenizer.vocab, record.where)
    return made


def _shown(addresses: Sequence[Address], where: str, media: MediaReader | None, folder: DataFolder) -> list[Medium]:
    """The images and sounds of a chat."""
    if not addresses:
        return []
    if media is None:
        raise UsageError(
            f"{where} has images or sound, and only text is walked here", hint="leave such records out of the data"
        )
    return [media.read(address, folder, where) for address in addresses]


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
        tokenizer.template if not may_be_plain else f"{tokenizer.template} {NO_PLACE_NEEDED}", record.where
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
    if type(error).__name__ in ("TemplateSyntaxError", "TemplateAssertionError", "SecurityError", "LookupError"):
        return "the fault is the template's, in chat_template.jinja or tokenizer_config.json, not the data's"
    roles = [turn["role"] for turn in chat.messages]
    if "system" in roles:
        return "if it takes no system message, put that text before the first user's"
    if "tool" in roles:
        return "if it takes no tool's answers, write them as a user's message"
    return "templates mostly want user and assistant in turn, the user first, and content in every message"


def check_media(tokens: TokenSet, layout: ModelLayout) -> None:
    """Hold a set's media against a model. Raises CheckpointError: see `check_sequence`; and for towers that are not
    understood. Of text alone nothing is asked."""
    if not any(tokens.media):
        return
    config = read_tower_config(layout.config, f"{layout.index.folder}/{CONFIG_NAME}")
    for number, (ids, media) in enumerate(zip(tokens.ids, tokens.media, strict=True)):
        check_sequence(ids, media, config, f"{tokens.name}, sequence {number}")


def refuse_media(tokens: TokenSet, what: str) -> None:
    """Raises UsageError where a set has images or sound and `what` walks text only."""
    if any(tokens.media):
        raise UsageError(f"{tokens.name} has images or sound, and {what} walks text only")


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
        takes_media=True,
    )
