"""The report of `eval-draft`, as text: both backbones side by side, and how far apart they are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from mimoquant.describe import table
from mimoquant.report_page import NAME_CHARS, WIDTH, number, origin, percent, visible

Facts = dict[str, Any]


def draft_text(facts: Facts) -> str:
    """For a terminal of 100 columns."""
    lines = []
    for name, text in (*_verdict(facts), *origin({**facts, "tokens": facts["starts"]})):
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    head = ("figure", "depth", "reference", "candidate", "difference", "95 % interval")
    lines += ["", *table(head, _figures(facts))]
    columns = ("domain", "acceptance", "difference, points", "greedy", "difference, points", "starts")
    lines += ["", *table(columns, map(_domain, facts["by_domain"]))]
    return "\n".join(line.rstrip() for line in lines)


def _verdict(facts: Facts) -> Iterator[tuple[str, str]]:
    length = facts["accepted_length"]["sampling"]
    yield (
        "MEASURED",
        f"of {facts['depth']} drafted tokens {number(length['candidate']['mean'])} are accepted where the reference "
        f"accepts {number(length['reference']['mean'])} ({_signed(length['difference'], 1)}), sampling at "
        "temperature 1, on the text's own tokens",
    )
    if facts["nonfinite_share"] > 0:
        yield "NOT FINITE", f"{percent(facts['nonfinite_share'])} of the starts, which are left out"


def _figures(facts: Facts) -> Iterator[tuple[str, ...]]:
    for key, name in (("acceptance", "acceptance, sampling"), ("greedy_match", "greedy match")):
        for row in facts["depths"]:
            ours, theirs = (percent(row[key][side]["mean"]) for side in ("reference", "candidate"))
            yield name, str(row["depth"]), ours, theirs, *_points(row[key]["difference"])
    for key, pair in facts["accepted_length"].items():
        ours, theirs = (number(pair[side]["mean"]) for side in ("reference", "candidate"))
        low, high = pair["difference"]["low"], pair["difference"]["high"]
        yield (
            f"accepted length, {key}",
            "",
            ours,
            theirs,
            f"{pair['difference']['mean']:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        )


def _domain(part: Facts) -> tuple[str, ...]:
    """Of the first depth: it has the most to say, as every guess depends on it."""
    first = part["depths"][0]
    cells = [(percent(first[key]["candidate"]["mean"]), _signed(first[key]["difference"], 100))
             for key in ("acceptance", "greedy_match")]  # fmt: skip
    return visible(part["domain"])[:NAME_CHARS], *cells[0], *cells[1], str(part["starts"])


def _points(difference: Facts) -> tuple[str, str]:
    low, high = (f"{100 * difference[key]:+.2f}" for key in ("low", "high"))
    return f"{100 * difference['mean']:+.2f} points", f"{low} to {high}"


def _signed(difference: Facts, unit: float) -> str:
    mean, low, high = (f"{unit * difference[key]:+.2f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
