"""Groups whose scale a format cannot store, as `verify` counts them once more, held against the journal."""

from __future__ import annotations

from mimoquant.checkpoint.journal import JournalLine
from mimoquant.run.clamped import Counts


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
