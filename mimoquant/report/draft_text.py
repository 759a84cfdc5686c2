"""The report of `eval-draft`, as text: both backbones side by side, and how far apart they are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from mimoquant.report.eval_text import origin
from mimoquant.wording import NAME_CHARS, WIDTH, number, percent, table, visible

Facts = dict[str, Any]


def draft_text(facts: Facts) -> str:
    """For a terminal of 100 columns."""
    lines = []
    for name, text in (*_verdict(facts), *origin({**facts, "tokens": facts["starts"]})):
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    head = ("figure (shares: points)", "depth", "reference", "candidate", "difference", "95 % interval")
    lines += ["", *table(head, _figures(facts))]
    columns = ("domain, depth 1", "acceptance", "points (95 %)", "greedy", "points (95 %)")
    lines += ["", *table(columns, map(_domain, facts["by_domain"]))]
    return "\n".join(line.rstrip() for line in lines)


def _verdict(facts: Facts) -> Iterator[tuple[str, str]]:
    length = facts["accepted_length"]["sampling"]
    ours, theirs = (number(length[side]["mean"]) for side in ("reference", "candidate"))
    change, interval = _change(length["difference"])
    yield (
        "MEASURED",
        f"of {facts['depth']} drafted tokens {theirs} are accepted where the reference accepts {ours} ({change}, 95 % "
        f"interval {interval}), sampling at temperature 1 along the text's own tokens",
    )
    if facts["draft"] != "mtp":
        yield "DRAFTER", facts["draft"]
    if facts["nonfinite_share"] > 0:
        yield "NOT FINITE", f"{percent(facts['nonfinite_share'])} of the starts, which are left out"


def _figures(facts: Facts) -> Iterator[tuple[str, ...]]:
    for key, name in (("acceptance", "acceptance, sampling"), ("greedy_match", "greedy match")):
        for row in facts["depths"]:
            shares = (percent(row[key][side]["mean"]) for side in ("reference", "candidate"))
            yield name, str(row["depth"]), *shares, *_points(row[key]["difference"])
    for key, pair in facts["accepted_length"].items():
        lengths = (number(pair[side]["mean"]) for side in ("reference", "candidate"))
        yield f"accepted length, {key}", "", *lengths, *_change(pair["difference"])


def _domain(part: Facts) -> tuple[str, ...]:
    """Of the first depth alone, which every chain depends on; JSON has the others."""
    cells = []
    for key in ("acceptance", "greedy_match"):
        pair = part["depths"][0][key]
        change, interval = _points(pair["difference"])
        cells += [percent(pair["candidate"]["mean"]), f"{change} ({interval})"]
    return visible(part["domain"])[:NAME_CHARS], *cells


def _points(difference: Facts) -> tuple[str, str]:
    """A difference of shares in percentage points, and its interval."""
    return _change({key: 100 * value for key, value in difference.items()}, digits=2)


def _change(difference: Facts, digits: int = 4) -> tuple[str, str]:
    mean, low, high = (f"{difference[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return mean, f"{low} to {high}"
