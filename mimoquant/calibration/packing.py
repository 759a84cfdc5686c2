"""Ids of records → sequences of equal length, dealt out by domain.

Key idea: every prefix of a set is balanced. The records of a domain are joined, with an end-of-text id between two, and
cut into sequences without padding; then the domains are dealt out in turn. So the first N sequences are the same N
whatever number was asked for, and they see every domain. No cut goes through an image or a sound: where one would, the
sequence begins so much later that it holds the medium whole, and what it leaves out is counted.

Left out: shuffling (the order is the file's), padding, truncation.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.media import Placed

Ids = npt.NDArray[np.int64]


@dataclass
class _Domain:
    """What a domain has so far. `starts`: where each sequence begins that can be cut from what is joined."""

    rows: list[Ids] = field(default_factory=list)  # whole sequences, from arrays
    joined: array[int] = field(default_factory=lambda: array("q"))
    media: list[Placed] = field(default_factory=list)  # by their places in what is joined, in rising order
    starts: list[int] = field(default_factory=list)
    skipped: int = 0  # ids left out between two sequences, so that no medium is cut
    passed: int = 0  # media that end before the next sequence

    def extend(self, tokens: int) -> None:
        """Find the sequences that what was joined last completes."""
        begin = self.starts[-1] + tokens if self.starts else 0
        while begin + tokens <= len(self.joined):
            start = self._past_media(begin, tokens)
            if start + tokens > len(self.joined):
                return
            self.skipped += start - begin
            self.starts.append(start)
            begin = start + tokens

    def _past_media(self, begin: int, tokens: int) -> int:
        """The least start from `begin` on at which a sequence cuts no medium."""
        number = self.passed
        while number < len(self.media) and self.media[number].start < begin + tokens:
            start, count, _ = self.media[number]
            if start + count <= begin:
                self.passed = number + 1
            elif start < begin:
                begin, number = start + count, self.passed
                continue
            elif start + count > begin + tokens:
                begin, number = start + count - tokens, self.passed
                continue
            number += 1
        return begin

    def cut(self, tokens: int) -> Iterator[Row]:
        for row in self.rows:
            yield Row(row, ())
        values, first = np.frombuffer(self.joined, np.int64) if self.joined else np.empty(0, np.int64), 0
        for start in self.starts:
            inside = []
            while first < len(self.media) and self.media[first].start < start + tokens:
                if self.media[first].start >= start:
                    inside.append(self.media[first]._replace(start=self.media[first].start - start))
                first += 1
            yield Row(values[start : start + tokens], tuple(inside))

    def end(self, dealt: int, tokens: int) -> int:
        """Up to where what is joined is in the first `dealt` sequences."""
        cut = dealt - len(self.rows)
        return self.starts[cut - 1] + tokens if cut > 0 else 0


@dataclass(frozen=True, eq=False)
class Row:
    """A sequence: ids [tokens], and what stands in place of some."""

    ids: Ids
    media: tuple[Placed, ...]


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences, and what they were made from. `texts`: of records with at least one id in a sequence; `passages`: ids
    that were no text. `skipped`: ids that are in none so that no medium is cut, of all domains."""

    rows: list[Row]
    domains: tuple[str, ...]
    left_out: tuple[str, ...]
    texts: list[str]
    passages: list[Ids]
    skipped: int


class Packer:
    """Collects the ids of each domain, in order of first appearance, and deals out sequences."""

    def __init__(self, tokens: int, sequences: int | None) -> None:
        self.tokens = tokens
        self.sequences = sequences
        self.domains: dict[str, _Domain] = {}
        self.texts: list[tuple[str, int, str]] = []  # domain, the first id's place in what is joined, text
        self.passages: list[tuple[str, int, Ids]] = []  # the same of records that were ids

    @property
    def has_ids(self) -> bool:
        """Whether some of the data was ids."""
        return bool(self.passages) or any(domain.rows for domain in self.domains.values())

    def is_full(self, name: str) -> bool:
        domain = self.domains.get(name)
        if self.sequences is None or domain is None:
            return False
        return len(domain.rows) + len(domain.starts) >= self.sequences

    def _open(self, name: str) -> _Domain:
        return self.domains.setdefault(name, _Domain())

    def add_rows(self, name: str, rows: Ids) -> None:
        self._open(name).rows += list(rows[: self.sequences])

    def add(self, name: str, ids: list[int], eos: int | None, text: str | None, media: Sequence[Placed] = ()) -> None:
        """`text`: what the ids were made from; None: they were ids. `media`: what stands in place of some."""
        domain = self._open(name)
        joined = domain.joined
        if joined and ids and eos is not None and joined[-1] != eos:
            joined.append(eos)
        if text is None:
            self.passages.append((name, len(joined), np.array(ids, np.int64)))
        else:
            self.texts.append((name, len(joined), text))
        domain.media += [item._replace(start=item.start + len(joined)) for item in media]
        joined.extend(ids)
        domain.extend(self.tokens)

    def finish(self, name: str) -> Packed:
        """Raises UsageError: there are too few tokens for one sequence."""
        every = self.domains
        sizes = {key: len(domain.rows) * self.tokens + len(domain.joined) for key, domain in every.items()}
        largest = max(sizes, key=lambda key: sizes[key], default="")
        counts = {key: len(domain.rows) + len(domain.starts) for key, domain in every.items()}
        if not any(counts.values()):
            size = sizes.get(largest, 0)
            less = "fewer than" if size < self.tokens else "of which none that cuts no image are"
            problem = f"data {name}: {size} tokens, {less} the {self.tokens} of one sequence"
            hint = f"that is {largest}, the largest of its {len(sizes)} domains" if len(sizes) > 1 else None
            raise UsageError(problem, hint=hint)
        turns = zip_longest(*(domain.cut(self.tokens) for domain in every.values()))
        dealt = [(key, row) for turn in turns for key, row in zip(every, turn, strict=True) if row is not None]
        dealt = dealt[: self.sequences]
        texts, passages = self._made_of(Counter(key for key, _ in dealt))
        return Packed(
            rows=[row for _, row in dealt],
            domains=tuple(key for key, _ in dealt),
            left_out=tuple(key for key, count in counts.items() if not count),
            texts=texts,
            passages=passages,
            skipped=sum(domain.skipped for domain in every.values()),
        )

    def _made_of(self, dealt: Counter[str]) -> tuple[list[str], list[Ids]]:
        """The records of which at least one id is in a sequence that was dealt; arrays come before what is joined."""
        ends = {key: domain.end(dealt[key], self.tokens) for key, domain in self.domains.items()}
        whole = [
            np.concatenate(domain.rows[: dealt[key]])
            for key, domain in self.domains.items()
            if domain.rows and dealt[key]
        ]
        passages = whole + [ids for key, begin, ids in self.passages if begin < ends[key]]
        return [text for key, begin, text in self.texts if begin < ends[key]], passages


def check_fits(media: Sequence[Placed], tokens: int, where: str) -> None:
    """Raises CheckpointError: a medium takes more tokens than a sequence has."""
    for _, count, _ in media:
        if count > tokens:
            raise CheckpointError(
                f"{where}: an image or a sound takes {count} tokens, and sequences have {tokens}",
                hint="ask for longer sequences with --tokens, or make it smaller",
            )
