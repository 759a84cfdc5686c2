"""Groups whose scale a format cannot store, as `verify` counts them once more, held against the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mimoquant.checkpoint.journal import JournalLine
from mimoquant.quant.clamped import Clamped
from mimoquant.run.clamped import Counts


def told_otherwise(line: JournalLine, counts: Counts) -> list[str]:
    """Where the journal has other counts of a shard's weights, each in a sentence."""
    told, found = dict(line.clamped or {}), {name: [z, c, n] for name, (z, c, _, n) in counts.items()}
    return [
        f"{name}: has {_words(found.get(name))}, the journal tells of {_words(told.get(name))}"
        for name in sorted(told.keys() | found.keys())
        if told.get(name) != found.get(name)
    ]


def settled(
    ranges: Mapping[str, Mapping[int, tuple[Clamped, Clamped]]], told: Callable[[str, int], list[int] | None]
) -> dict[str, dict[int, Clamped]]:
    """Counts that are known as least and most, where factors are stored nowhere: those that the journal tells of a
    projection's expert (`told`) where they lie in between, else the nearest."""

    def between(projection: str, expert: int, least: Clamped, most: Clamped) -> Clamped:
        zeroed, clamped, _ = told(projection, expert) or (0, 0, 0)
        return least._replace(
            zeroed=min(max(zeroed, least.zeroed), most.zeroed), clamped=min(max(clamped, least.clamped), most.clamped)
        )

    found = {p: {e: between(p, e, *ends) for e, ends in experts.items()} for p, experts in ranges.items()}
    return {p: {e: one for e, one in experts.items() if one.lost} for p, experts in found.items()}


def _words(numbers: list[int] | None) -> str:
    zeroed, clamped, groups = numbers or (0, 0, 0)
    if not groups:
        return "no groups without a scale"
    return f"{zeroed} groups of {groups} that became zero and {clamped} that were clamped"
