"""The report of `eval-draft`, as text: both backbones side by side, and how far apart they are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mimoquant.report.eval_text import Origin, origin, rounding_lines
from mimoquant.wording import NAME_CHARS, WIDTH, has_interval, interval, number, percent, table, visible

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import DraftDomainPart, EvalDraftDocument, MeanInterval


def draft_text(facts: EvalDraftDocument) -> str:
    """For a terminal of 100 columns."""
    lines = []
    for name, text in (*_verdict(facts), *origin(_origin(facts))):
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    head = ("figure (shares: points)", "depth", "reference", "candidate", "difference", "95 % interval")
    lines += ["", *table(head, _figures(facts))]
    columns = ("domain, depth 1", "acceptance", "points (95 %)", "greedy", "points (95 %)")
    lines += ["", *table(columns, map(_domain, facts["by_domain"]))]
    return "\n".join(line.rstrip() for line in lines)


def _origin(facts: EvalDraftDocument) -> Origin:
    """What is scored here is starts."""
    return Origin(
        reference=facts["reference"],
        reference_stored=facts["reference_stored"],
        candidate=facts["candidate"],
        recipe=facts["recipe"],
        data=facts["data"],
        sequences=facts["sequences"],
        sequence_tokens=facts["sequence_tokens"],
        tokens=facts["starts"],
        device=facts["device"],
        elapsed_s=facts["elapsed_s"],
        peak_rss_bytes=facts["peak_rss_bytes"],
    )


def _verdict(facts: EvalDraftDocument) -> Iterator[tuple[str, str]]:
    length = facts["accepted_length"]["sampling"]
    ours, theirs = (number(side["mean"]) for side in (length["reference"], length["candidate"]))
    change, ends = _change(length["difference"], facts["sequences"])
    yield (
        "MEASURED",
        f"of {facts['depth']} drafted tokens {theirs} are accepted where the reference accepts {ours} ({change}, 95 % "
        f"interval {ends}), sampling at temperature 1 along the text's own tokens",
    )
    if facts["draft"] == "mtp-backbone":
        yield "DRAFTER", "MTP layers, each on the backbone's hidden states, as SGLang runs them"
    elif facts["draft"] != "mtp":
        yield "DRAFTER", facts["draft"]
    if facts["nonfinite_share"] > 0:
        yield "NOT FINITE", f"{percent(facts['nonfinite_share'])} of the starts, which are left out"
    if facts["rounding"] is not None:
        yield from rounding_lines(facts["rounding"])


def _figures(facts: EvalDraftDocument) -> Iterator[tuple[str, ...]]:
    depths, lengths = facts["depths"], facts["accepted_length"]
    shares = [("acceptance, sampling", row["depth"], row["acceptance"]) for row in depths]
    shares += [("greedy match", row["depth"], row["greedy_match"]) for row in depths]
    for name, depth, pair in shares:
        sides = (percent(side["mean"]) for side in (pair["reference"], pair["candidate"]))
        yield name, str(depth), *sides, *_points(pair["difference"], facts["sequences"])
    for name, pair in (("sampling", lengths["sampling"]), ("greedy", lengths["greedy"])):
        sides = (number(side["mean"]) for side in (pair["reference"], pair["candidate"]))
        yield f"accepted length, {name}", "", *sides, *_change(pair["difference"], facts["sequences"])


def _domain(part: DraftDomainPart) -> tuple[str, ...]:
    """Of the first depth alone, which every chain depends on; JSON has the others."""
    first, cells = part["depths"][0], []
    for pair in (first["acceptance"], first["greedy_match"]):
        change, ends = _points(pair["difference"], part["sequences"])
        cells += [percent(pair["candidate"]["mean"]), f"{change} ({ends})"]
    return visible(part["domain"])[:NAME_CHARS], *cells


def _points(difference: MeanInterval, sequences: int) -> tuple[str, str]:
    """A difference of shares in percentage points, and its interval."""
    return _change(difference, sequences, factor=100, digits=2)


def _change(difference: MeanInterval, sequences: int, factor: int = 1, digits: int = 4) -> tuple[str, str]:
    ends = (difference["mean"], difference["low"], difference["high"])
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in ends)
    return mean, f"{low} to {high}" if has_interval(difference) else interval(difference, sequences=sequences)
