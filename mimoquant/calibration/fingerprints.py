"""Text, or ids → fingerprints that two sets share where they share a passage, whatever the files are called.

Key idea: winnowing. Every run of GRAM units is hashed, and of every WINDOW such hashes in a row the least is kept. Two
texts that share GRAM + WINDOW - 1 units in a row therefore share a fingerprint, wherever these stand, and about one
hash in seventeen is kept. Units are words (letters and digits between what is neither; a character of a script that is
written without spaces) or ids. Words are the text's own, before any template, so that template, tokenizer, length of
sequences and kind of file do not matter; ids are for data that never was text here.

An image or a sound is one fingerprint, of its pixels or its codes.

Left out: case and accents are kept; a record of fewer than LEAST units is no passage, and is not looked at.
Reference: Schleimer, Wilkerson, Aiken, "Winnowing: local algorithms for document fingerprinting" (SIGMOD 2003).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

GRAM = 32
WINDOW = 33
LEAST = 8  # units of a record that is compared as a whole
OVERLAP_LIMIT = 0.01  # share of a set's fingerprints that may be another's too
Hashes = npt.NDArray[np.uint64]
_Ints = npt.NDArray[np.int64]
_BATCH = 2**16  # characters: what is hashed at once lies in a cache
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE = pow(_BASE, -1, 2**64)
# written without spaces: Thai to Burmese, Khmer, kana and ideographs, their extensions; all beyond 0xFFFF are too
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
_SEPARATOR, _LETTER, _ALONE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Of a set of sequences, sorted. `words`: of the texts that it was made from. `ids`: of what was read as ids.
    `media`: of images and sounds."""

    words: Hashes
    ids: Hashes
    media: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))

    @staticmethod
    def of(
        texts: Iterable[str], passages: Iterable[npt.NDArray[np.int64]], digests: Iterable[str] = ()
    ) -> Fingerprints:
        """`digests`: sha256 of each medium, in hex, of which a fingerprint is the first eight bytes."""
        media = np.array([int(digest[:16], 16) for digest in digests], np.uint64)
        return Fingerprints(of_texts(texts), of_ids(passages), np.unique(media))

    def share_in(self, calibration: Fingerprints) -> float:
        """The share of these that are `calibration`'s too, of words, of ids or of media, whichever is largest."""
        pairs = (
            (self.words, calibration.words),
            (self.ids, calibration.ids),
            (self.media, calibration.media),
        )
        return max(float(np.isin(ours, theirs).mean()) if len(ours) else 0.0 for ours, theirs in pairs)

    def as_bytes(self) -> bytes:
        """Little-endian, 8 bytes each: how many are of words, how many of ids; then they. With media it begins with
        _WITH_MEDIA, and has how many are of those third."""
        parts = [self.words, self.ids] + ([self.media] if len(self.media) else [])
        counts = [len(part) for part in parts]
        head = np.array(counts if len(counts) == 2 else [_WITH_MEDIA, *counts], np.uint64)
        return np.concatenate([head, *parts]).astype("<u8").tobytes()

    @staticmethod
    def from_bytes(held: bytes) -> Fingerprints:
        """Raises ValueError: these are no fingerprints."""
        values = np.frombuffer(held, "<u8").astype(np.uint64)
        head = values[1:4] if len(values) and int(values[0]) == _WITH_MEDIA else values[:2]
        begin = 4 if len(head) == 3 else 2
        ends = np.cumsum([begin, *map(int, head)], dtype=object)
        if len(head) < 2 or len(values) != ends[-1]:
            raise ValueError(f"{len(held)} bytes are not what their head says")
        return Fingerprints(*np.split(values[begin:], [int(end) - begin for end in ends[1:-1]]))


_WITH_MEDIA = 2**64 - 1  # no count
NOTHING = Fingerprints(np.empty(0, np.uint64), np.empty(0, np.uint64))


def of_texts(texts: Iterable[str]) -> Hashes:
    """Sorted fingerprints of records' words."""
    found = [_winnow(*_words(batch)) for batch in _batches(texts)]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def of_ids(passages: Iterable[npt.NDArray[np.int64]]) -> Hashes:
    """Sorted fingerprints of passages of ids, each a 1-D array."""
    found = [_winnow(_mixed(ids.astype(np.uint64)), np.array([len(ids)])) for ids in passages]
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts by some _BATCH characters; a longer one in pieces, which begin at the same places wherever it is read."""
    batch, size = [], 0
    for text in texts:
        for begin in range(0, len(text), _BATCH):
            batch.append(text[begin : begin + _BATCH])
            size += len(batch[-1])
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """[0x10001] each: what a character of the first plane is, and a number for it, 0 for a separator; the last entry is
    of all others."""
    kinds = np.fromiter(map(str.isalnum, map(chr, range(0x10001))), np.uint8, 0x10001)
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= _ALONE
    kinds[0x10000] = _ALONE
    numbers = _mixed(np.arange(1, 0x10002, dtype=np.uint64)).astype(np.uint32)
    return kinds, np.where(kinds == _SEPARATOR, 0, numbers).astype(np.uint32)


def _words(texts: list[str]) -> tuple[Hashes, _Ints]:
    """(a hash of each word, how many each text has). 32 bits do for a word: 32 words in a row make a fingerprint."""
    raw = "\0".join(texts).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(raw, np.uint32).astype(np.intp)
    kinds, numbers = (table.take(codes, mode="clip") for table in _tables())
    first, letter = kinds != _SEPARATOR, kinds == _LETTER
    first[1:] &= ~(letter[1:] & letter[:-1])
    begins = np.flatnonzero(first)
    numbers *= _powers(_BASE, len(codes), "uint32")
    sums = np.add.reduceat(numbers, begins, dtype=np.uint32) if len(begins) else numbers[:0]
    words = sums * _powers(_INVERSE, len(codes), "uint32")[begins]
    stops = np.cumsum([len(text) + 1 for text in texts])
    return _mixed(words.astype(np.uint64)), np.diff(np.searchsorted(begins, stops), prepend=0)


def _winnow(units: Hashes, counts: _Ints) -> Hashes:
    """Fingerprints of records of so many units, in no order. No run reaches from one record into another."""
    sums, back = _prefixes(units), _powers(_INVERSE, len(units) + 1)
    stops = np.cumsum(counts)
    starts = stops - counts
    short = (counts >= LEAST) & (counts < GRAM)
    whole = _mixed((sums[stops[short]] - sums[starts[short]]) * back[starts[short]])
    grams = np.maximum(counts - GRAM + 1, 0)
    if not grams.any():
        return whole
    hashes = _mixed((sums[GRAM:] - sums[:-GRAM]) * back[: len(units) - GRAM + 1])
    owner = np.repeat(np.arange(len(counts)), counts)
    hashes = hashes[owner[: len(hashes)] == owner[GRAM - 1 :]]
    owner = np.repeat(np.arange(len(counts)), grams)
    few = np.flatnonzero((grams > 0) & (grams < WINDOW))
    kept = [whole]
    if len(few):  # fewer than a window: the least of all
        begins = np.searchsorted(owner, few)
        edges = np.stack([begins, begins + grams[few]], 1).reshape(-1)
        kept.append(np.minimum.reduceat(np.append(hashes, np.uint64(0)), edges)[::2])
    if len(hashes) >= WINDOW:
        least = _window_minima(hashes)[owner[: len(hashes) - WINDOW + 1] == owner[WINDOW - 1 :]]
        kept.append(least[np.append(True, least[1:] != least[:-1])[: len(least)]])
    return np.concatenate(kept)


def _window_minima(hashes: Hashes) -> Hashes:
    """The least of each WINDOW in a row: of two halves that overlap, each made by doubling."""
    assert WINDOW == 33
    least = hashes
    for step in (1, 2, 4, 8, 16):
        least = np.minimum(least[:-step], least[step:])
    return np.minimum(least[:-1], least[1:])


def _prefixes(values: Hashes) -> Hashes:
    """[n + 1]: sums of value_i _BASE^i modulo 2^64, so that a difference of two is a run's polynomial."""
    out = np.zeros(len(values) + 1, np.uint64)
    np.multiply(values, _powers(_BASE, len(values)), out=out[1:])
    return out.cumsum(out=out)


@lru_cache(maxsize=8)
def _power_table(base: int, count: int, dtype: str) -> npt.NDArray[Any]:
    powers = np.full(count, base % 2 ** (8 * np.dtype(dtype).itemsize), dtype)
    powers[0] = 1
    return np.multiply.accumulate(powers, dtype=dtype)


def _powers(base: int, count: int, dtype: str = "uint64") -> npt.NDArray[Any]:
    """base^0 .. base^(count - 1), modulo what the type holds."""
    return _power_table(base, max(2 * _BATCH, 1 << max(count - 1, 1).bit_length()), dtype)[:count]


def _mixed(values: Hashes) -> Hashes:
    """Each value's bits spread over all 64 (the finalizer of SplitMix64)."""
    out = values ^ (values >> np.uint64(30))
    out *= np.uint64(0xBF58476D1CE4E5B9)
    out ^= out >> np.uint64(27)
    out *= np.uint64(0x94D049BB133111EB)
    out ^= out >> np.uint64(31)
    return out
