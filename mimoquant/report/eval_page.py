"""The report of one `eval-kl` run: a self-contained HTML page with plots, and the same facts as text.

Key idea: this module draws the plots and picks what stands in the cards; `templates/eval.html` has the words.
Left out: whatever is not in the facts (no clock, no machine), so equal facts give equal bytes. Model text is hostile
until proven otherwise: `page` and `drawing` make every string visible and inert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from markupsafe import Markup

from mimoquant.report.drawing import Axis, Bar, Row, Scale, across, bars, drawable, plot, rows_plot, tag
from mimoquant.report.eval_text import (
    QUANTILES,
    cause_rows,
    comparisons,
    context_rows,
    eval_text,
    key_figures,
    origin,
    rounding_of,
    verdict,
)
from mimoquant.report.page import render
from mimoquant.wording import NAME_CHARS, interval, number, percent, visible

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import EvalKlDocument as Facts

CONTEXT_CHARS, TOKEN_CHARS = 300, 60


def token_sign(token: str) -> str:
    sign = visible(token).replace(" ", "␣") or "(empty)"
    return sign if len(sign) <= TOKEN_CHARS else sign[: TOKEN_CHARS - 1] + "…"


def verdict_plot(facts: Facts) -> Markup:
    j, floor, baseline, limit = facts["j"], facts["noise_floor"], facts["baseline"], facts["max_kl"]
    told = f"J {number(j['mean'])}, {interval(j, sequences=facts['sequences'])}"
    rows: list[Row] = [("this candidate", j["mean"], j["low"], j["high"], told)]
    if baseline:
        rows.append(("baseline", baseline["j"], None, None, baseline["candidate"]))
    noises: tuple[tuple[str, Literal["batch", "relative_noise"]], ...]
    noises = (("noise: other batch shape", "batch"), ("noise: 2⁻⁹ relative", "relative_noise"))
    for name, key in noises:
        rows += [(name, floor[key], None, None, "the reference against itself")] if floor else []
    x = Scale.decades([limit, *(value for row in rows for value in row[1:4])])
    return rows_plot(rows, x, "J of the candidate beside noise floor and limit", limit=limit)


def token_plots(facts: Facts) -> tuple[Markup, Markup]:
    """Histogram and quantiles of J per token, on one axis."""
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    rows = [(name, facts["j"][key], None, None, f"{name} {number(facts['j'][key])}") for key, name in QUANTILES.items()]
    shares = {i: count / max(facts["tokens"], 1) for i, count in enumerate(counts) if count}
    x = Scale.decades([*(edges[i + k] for i in shares for k in (0, 1)), *(row[1] for row in rows)])
    y = Scale.linear(100 * share for share in shares.values())
    items: list[Bar] = []
    for i, share in shares.items():
        title = f"{number(edges[i])} to {number(edges[i + 1])}: {counts[i]} tokens, {percent(share)}"
        items.append((x.at(edges[i]), x.at(edges[i + 1]), 100 * share, title, "bar"))
    across_x, label = x.axis("J of a token, nats, log; outer bins open"), "histogram of J per token"
    chart = plot(180, bars(items, 180, y), label, across_x, y.axis("% of tokens"), "histogram")
    return chart, rows_plot(rows, x, "quantiles of J per token", "aligned")


def domain_plot(facts: Facts) -> Markup:
    rows: list[Row] = []
    for d in facts["by_domain"]:
        name = visible(d["domain"])
        told = f"{name}: {interval(d, 3, sequences=d['sequences'])}"
        rows.append((name[:NAME_CHARS], d["j"], d["low"], d["high"], told))
    return rows_plot(rows, Scale.linear(value for row in rows for value in row[1:4]), "J by domain")


def bucket_plot(title: str, buckets: Sequence[Mapping[str, Any]], low: str, high: str, x_title: str) -> Markup | None:
    """Equally wide columns for consecutive buckets, with their bounds as tick labels; None without any."""
    if not buckets:
        return None
    count, y = len(buckets), Scale.linear(bucket["j"] for bucket in buckets)
    shown = [i for i in range(0, count, math.ceil(count / 6)) if count - i > count / 12]
    ticks = [*((i / count, number(buckets[i][low], 7)) for i in shown), (1.0, number(buckets[-1][high], 7))]
    items: list[Bar] = []
    for i, b in enumerate(buckets):
        tip = f"{number(b[low], 7)} to {number(b[high], 7)}: J {number(b['j'])}, {b['tokens']} tokens"
        items.append(((i + 0.08) / count, (i + 0.92) / count, b["j"], tip, "bar"))
    return plot(180, bars(items, 180, y), title, (x_title, ticks), y.axis("J, nats per token"))


def layer_plots(facts: Facts) -> list[Markup]:
    """Relative error by layer and, if any was measured, routing overlap; empty without layers."""
    layers, items, below, dots = facts["layers"], [], [], []
    if not layers:
        return []
    count = len(layers)
    every = next(e for e in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if count / e <= 8)
    x: Axis = ("decoder layer", [((i + 0.5) / count, str(layers[i]["layer"])) for i in range(0, count, every)])
    low = min((drawable(v["routing_overlap"]) for v in layers if v["routing_overlap"] is not None), default=0.0)
    share = Scale(min(math.floor(low * 20) / 20, 0.95), 1.0)
    y = Scale.linear(v["relative_error"] for v in layers)
    for i, v in enumerate(layers):
        middle, half = (i + 0.5) / count, min(0.4 / count, 0.04)
        made, overlap = "quantized" if v["quantized"] else "kept", v["routing_overlap"]
        error = f"relative error {number(v['relative_error'])}, same experts {percent(overlap)}"
        title = f"layer {v['layer']}, {v['kind']}, experts {made}: {error}"
        style = f"{'bar' if v['quantized'] else 'kept'} {v['kind']}"
        items.append((middle - half, middle + half, v["relative_error"], title, style))
        if v["kind"] == "global":
            below.append(tag("circle", cx=across(middle), cy=205, r=3, class_="below"))
        if overlap is not None and math.isfinite(overlap):
            dot = tag("circle", cx=across(middle), cy=90 * (1 - share.at(overlap)), r=3.5, class_="dot")
            dots.append(tag("g", tag("title", title), dot))
    marks, y_axis = [*bars(items, 200, y), *below], y.axis("relative error of hidden states")
    errors = plot(200, marks, "relative error per layer", x, y_axis)
    routes = plot(90, dots, "routing overlap per layer", x, share.axis("share of experts that both choose (axis cut)"))
    return [errors, routes] if dots else [errors]


class WorstToken(NamedTuple):
    """A token as the page shows it, with what came before."""

    facts: Mapping[str, Any]
    before: str  # the end of the context
    sign: str
    sides: list[tuple[str, list[tuple[str, float, bool]]]]  # model; its five: sign, probability, whether it followed


def worst_tokens(facts: Facts) -> list[WorstToken]:
    out = []
    for row in (row for row in facts["worst_tokens"] if row["j"] != 0):
        context = visible(row["context"])
        before = "…" + context[-CONTEXT_CHARS:] if len(context) > CONTEXT_CHARS else context
        sides = [(side, top5(row, side)) for side in ("reference", "candidate")]
        out.append(WorstToken(row, before, token_sign(row["token"]), sides))
    return out


def top5(row: Mapping[str, Any], side: str) -> list[tuple[str, float, bool]]:
    def followed(token: str) -> bool:
        return token == row["token"] and "\ufffd" not in token  # pieces of a character all look like that

    return [(token_sign(token), probability, followed(token)) for token, probability in row[f"{side}_top5"]]


def eval_page(facts: Facts, more: tuple[str, str] = ("", "")) -> str:
    """The HTML page of one `eval-kl` run. `more`: styles and cards, as `changes_card.changes_part` gives them.

    `facts` is the JSON document that `eval-kl --json` prints. A worst token's `context` ends right before its `token`;
    a baseline's `difference` is candidate minus baseline. What is no markup in `more` is written as text.
    """
    place, sure = "J by position", "J by confidence of the reference"
    place_x, sure_x = "position in the sequence, tokens", "largest probability that the reference gives"
    buckets = [
        (place, bucket_plot(place, facts["by_position"], "begin", "end", place_x)),
        (sure, bucket_plot(sure, facts["by_confidence"], "low", "high", sure_x)),
    ]
    return str(
        render(
            "eval.html",
            title=f"eval-kl: {facts['candidate']}",
            facts=facts,
            more_style=more[0],
            more_cards=more[1],
            verdict=verdict(facts),
            comparisons=comparisons(facts),
            verdict_plot=verdict_plot(facts),
            causes=cause_rows(rounding) if (rounding := rounding_of(facts)) else [],
            figures=[(name, value, remark) for name, remark, value in key_figures(facts)],
            token_plots=token_plots(facts),
            tokens_outside=facts["tokens"] - sum(facts["histogram"]["counts"]),
            domain_plot=domain_plot(facts),
            contexts=context_rows(facts),
            buckets=buckets,
            layer_plots=layer_plots(facts),
            worst=worst_tokens(facts),
            about=[*origin(facts), *(("text from", source) for source in facts["data"]["origins"])],
            text=eval_text(facts),
        )
    )
