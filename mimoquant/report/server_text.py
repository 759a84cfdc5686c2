"""The report of an evaluation against a server, as text: what `report_page` says, and what the numbers are bounds of.

Key idea: a lower bound can refute a limit and never prove that it is kept, so nothing here says PASSED.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from mimoquant.report.eval_text import QUANTILES, key_figures, origin
from mimoquant.wording import NAME_CHARS, WIDTH, has_interval, interval, number, percent, table, visible

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import EvalServerDocument


def server_text(facts: EvalServerDocument) -> str:
    """For a terminal of 100 columns."""
    lines = []
    rows = [_verdict(facts), *_meaning(facts), *(row for row in origin(facts) if row[0] not in ("candidate", "recipe"))]
    for name, text in rows:
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    least = "at least" if facts["server"]["is_lower_bound"] else ""
    figures = [
        (name, remark, f"{least if name in BOUNDS else ''} {value}".strip())
        for name, remark, value in key_figures(facts)
    ]
    figures += [
        (name, "J of a token", f"{least} {number(facts['j'][key])}".strip())
        for key, name in QUANTILES.items()
        if key != "mean"
    ]
    lines += ["", *table(("figure", "", "value"), figures)]
    head = ("domain", f"J {least}".strip(), "95 % interval", "same top-1", "tokens")
    domains = [
        (
            visible(d["domain"])[:NAME_CHARS],
            number(d["j"]),
            interval(d, sequences=d["sequences"]),
            percent(d["top1"]),
            str(d["tokens"]),
        )
        for d in facts["by_domain"]
    ]
    return "\n".join(line.rstrip() for line in [*lines, "", *table(head, domains)])


BOUNDS = {"J, half-sum", "KL(p‖q)", "KL(q‖p)", "Sum"}


def _verdict(facts: EvalServerDocument) -> tuple[str, str]:
    j, limit, server = facts["j"], facts["max_kl"], facts["server"]
    least = "is at least" if server["is_lower_bound"] else "is"
    said = f"J {least} {number(j['mean'])} nats per token (95 % interval {interval(j, sequences=facts['sequences'])})"
    if facts["nonfinite_share"] > 0:
        said += f"; {percent(facts['nonfinite_share'])} of the rows are not finite"
    if limit is not None and not has_interval(j):
        said += " and no interval, so that the limit is held against the mean"
    if facts["passed"] is False:
        return "FAILED", f"{said}, which exceeds the limit {number(limit)}"
    if limit is None or facts["passed"] is None:
        return "MEASURED", said
    if not server["is_lower_bound"]:
        return "PASSED", f"{said}, which keeps the limit {number(limit)}"
    estimate = "below" if server["j_estimate"] <= limit else "ABOVE"
    return (
        "NOT REFUTED",
        f"{said}, below the limit {number(limit)}; so says the bound, and the estimate is {estimate} it",
    )


def _meaning(facts: EvalServerDocument) -> list[tuple[str, str]]:
    server, tails = facts["server"], facts["server"]["tail_mass"]
    version = f" {server['version']}" if server["version"] else ""
    out = [
        ("server", f"{facts['candidate']}, {server['engine']}{version}, model {server['model']}"),
        ("mode", f"{server['mode']}: {server['meaning']}"),
    ]
    if not server["is_lower_bound"]:
        return [*out, ("exact", f"all {server['vocab']} ids of the vocabulary were scored; nothing is lumped")]
    ceiling = number(server["j_ceiling_if_tail_is_like_the_rest"])
    out += [
        (
            "lower bound",
            f"of the reference's {server['top_k']} most likely ids, {number(server['ids_scored'])} were scored at a "
            "position. All others count as one outcome, which can only lower J; it holds "
            f"{percent(tails['reference'])} of the reference's probability, {percent(tails['server'])} of the server's",
        ),
        (
            "estimate",
            f"J is about {number(server['j_estimate'])} if the lumped ids differ among themselves as the less likely "
            f"half of the scored ones do, and at most {ceiling} if none of their p/q is beyond those seen. Neither is "
            "a bound: nothing is known of the lumped ids",
        ),
    ]
    if server["engine"] == "vllm" and server["mode"] == "server-top":
        hint = (
            "--enable-scale-out (with model runner V2) scores the reference's ids; --max-logprobs allows more of them"
        )
        out.append(("tighter", f"vLLM started with {hint}"))
    return out
