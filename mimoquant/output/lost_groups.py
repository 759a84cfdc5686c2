"""Groups whose scale a format cannot store, counted once more by `verify`, and held against the journal."""

from __future__ import annotations

from mimoquant.checkpoint.journal import JournalLine
from mimoquant.run.clamped import Counts
from mimoquant.wording import ClampedGroups


def as_groups(counts: Counts) -> dict[str, ClampedGroups]:
    """For the document, by name."""
    return {
        name: ClampedGroups(zeroed=zeroed, clamped=clamped, groups=groups)
        for name, (zeroed, clamped, _, groups) in sorted(counts.items())
    }


def told_otherwise(line: JournalLine, counts: Counts) -> list[str]:
    """Where the journal has other counts of a shard's weights, each in a sentence."""
    told, found = dict(line.clamped or {}), {name: [z, c, n] for name, (z, c, _, n) in counts.items()}
    return [
        f"{name}: has {_words(found.get(name))}, the journal tells of {_words(told.get(name))}"
        for name in sorted(told.keys() | found.keys())
        if told.get(name) != found.get(name)
    ]


def _words(numbers: list[int] | None) -> str:
    zeroed, clamped, groups = numbers or (0, 0, 0)
    if not groups:
        return "no groups without a scale"
    return f"{zeroed} groups of {groups} that became zero and {clamped} that were clamped"
