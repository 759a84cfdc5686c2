"""The report of one `eval-kl` run: a self-contained HTML page with plots, and the same facts as text.

Key idea: plots are SVG with x in percent and y in pixels. Marks stretch with the window, letters keep their size, so
one drawing serves phone, screen and paper without a script.
Left out: whatever is not in the facts (no clock, no machine), so equal facts give equal bytes. Model text is hostile
until proven otherwise: every string passes `visible`, and on the page `html.escape`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mimoquant.report.drawing import (
    CSS,
    Axis,
    Bar,
    Row,
    Scale,
    across,
    bars,
    card,
    drawable,
    escaped,
    note,
    plot,
    rows_plot,
    tag,
)
from mimoquant.report.eval_text import QUANTILES, comparisons, eval_text, key_figures, origin, verdict
from mimoquant.wording import NAME_CHARS, interval, number, percent, visible

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import EvalKlDocument as Facts

CONTEXT_CHARS, TOKEN_CHARS = 300, 60


def token_sign(token: str) -> str:
    sign = visible(token).replace(" ", "␣") or "(empty)"
    return sign if len(sign) <= TOKEN_CHARS else sign[: TOKEN_CHARS - 1] + "…"


def verdict_card(facts: Facts) -> str:
    tone, word, sentence = verdict(facts)
    j, floor, baseline, limit = facts["j"], facts["noise_floor"], facts["baseline"], facts["max_kl"]
    rows: list[Row] = [("this candidate", j["mean"], j["low"], j["high"], f"J {number(j['mean'])}, {interval(j)}")]
    if baseline:
        rows.append(("baseline", baseline["j"], None, None, baseline["candidate"]))
    noises: tuple[tuple[str, Literal["batch", "relative_noise"]], ...]
    noises = (("noise: other batch shape", "batch"), ("noise: 2⁻⁹ relative", "relative_noise"))
    for name, key in noises:
        rows += [(name, floor[key], None, None, "the reference against itself")] if floor else []
    said = [tag("p", tag("strong", word), " " + escaped(sentence))]
    said += [tag("p", escaped(f"{name.capitalize()}: {text}")) for name, text in comparisons(facts)]
    said += [note(f"dashed line: the limit, {number(limit)}")] if limit is not None else []
    x = Scale.decades([limit, *(value for row in rows for value in row[1:4])])
    drawn = rows_plot(rows, x, "J of the candidate beside noise floor and limit", limit=limit)
    return tag("section", *said, drawn, class_=f"card verdict {tone}")


def histogram_card(facts: Facts) -> str:
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
    outside = facts["tokens"] - sum(counts)
    rest = note(f"{outside} tokens are not in the histogram") if outside > 0 else ""
    return card("J per token", chart, rows_plot(rows, x, "quantiles of J per token", "aligned"), rest)


def domain_card(facts: Facts) -> str:
    head, rows, lines = ("domain", "95 % interval", "top-1", "tokens"), [], []
    for d in facts["by_domain"]:
        cells = (visible(d["domain"]), interval(d, 3), percent(d["top1"]), str(d["tokens"]))
        rows.append((cells[0][:NAME_CHARS], d["j"], d["low"], d["high"], f"{cells[0]}: {cells[1]}"))
        lines.append(tag("tr", *(tag("td", escaped(cell)) for cell in cells)))
    x = Scale.linear(value for row in rows for value in row[1:4])
    top = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    numbers = tag("div", tag("table", top, tag("tbody", *lines)), class_="numbers domains")
    return card("J by domain", rows_plot(rows, x, "J by domain"), numbers)


def bucket_card(title: str, buckets: Sequence[Mapping[str, Any]], low: str, high: str, x_title: str) -> str:
    """Equally wide columns for consecutive buckets, with their bounds as tick labels."""
    if not buckets:
        return card(title, note("no tokens"))
    count, y = len(buckets), Scale.linear(bucket["j"] for bucket in buckets)
    shown = [i for i in range(0, count, math.ceil(count / 6)) if count - i > count / 12]
    ticks = [*((i / count, number(buckets[i][low], 7)) for i in shown), (1.0, number(buckets[-1][high], 7))]
    items: list[Bar] = []
    for i, b in enumerate(buckets):
        tip = f"{number(b[low], 7)} to {number(b[high], 7)}: J {number(b['j'])}, {b['tokens']} tokens"
        items.append(((i + 0.08) / count, (i + 0.92) / count, b["j"], tip, "bar"))
    return card(title, plot(180, bars(items, 180, y), title, (x_title, ticks), y.axis("J, nats per token")))


def layers_card(facts: Facts) -> str:
    layers, items, below, dots = facts["layers"], [], [], []
    if not layers:
        return ""
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
            dots.append(tag("g", tag("title", escaped(title)), dot))
    marks, y_axis = [*bars(items, 200, y), *below], y.axis("relative error of hidden states")
    errors = plot(200, marks, "relative error per layer", x, y_axis)
    routes = plot(90, dots, "routing overlap per layer", x, share.axis("share of experts that both choose (axis cut)"))
    legend = (
        "Dot below, second colour: global attention; else sliding window. Dashed outline: experts kept as they were."
    )
    return card("Error by layer", note(legend), errors, routes if dots else "", kind="wide")


def top5(row: Mapping[str, Any], side: str) -> str:
    lines = []
    for token, probability in row[f"{side}_top5"]:
        sign = tag("bdi", html.escape(token_sign(token)), class_="text")
        same = token == row["token"] and "\ufffd" not in token  # pieces of a character all look like that
        lines.append(tag("li", sign, tag("span", number(probability, 3)), class_="actual" if same else "other"))
    return tag("td", tag("small", side), tag("ol", *lines), class_="top")


def worst_card(facts: Facts) -> str:
    rows = []
    for row in (row for row in facts["worst_tokens"] if row["j"] != 0):
        context = visible(row["context"])
        before = html.escape("…" + context[-CONTEXT_CHARS:] if len(context) > CONTEXT_CHARS else context)
        where = f"{row['domain']}, sequence {row['sequence']}, position {row['position']}"
        said = tag("bdi", before, tag("mark", html.escape(token_sign(row["token"]))), class_="text")
        cells = [tag("td", f"J {number(row['j'])}", class_="number"), tag("td", said, note(where))]
        rows.append(tag("tr", *cells, top5(row, "reference"), top5(row, "candidate")))
    hint = "Marked: the token that followed. Beside it, what both models expected; what did follow is underlined."
    return card("Worst tokens", note(hint), tag("table", *rows, class_="worst"), kind="wide") if rows else ""


def about_card(facts: Facts) -> str:
    parts = [tag("div", tag("dt", name), tag("dd", escaped(value))) for name, value in origin(facts)]
    parts += [tag("div", tag("dt", "text from"), tag("dd", escaped(source))) for source in facts["data"]["origins"]]
    defined = "J = (KL(p‖q) + KL(q‖p)) / 2, nats per token, temperature 1, full vocabulary; p is the reference, "
    defined += "q the candidate. Intervals: 95 %, bootstrap over whole sequences."
    text = tag("details", tag("summary", "All figures as text"), tag("pre", html.escape(eval_text(facts))))
    return card("What was measured", note(defined), tag("dl", *parts, class_="about"), text, kind="wide")


def eval_page(facts: Facts, more: tuple[str, str] = ("", "")) -> str:
    """The HTML page of one `eval-kl` run. `more`: styles and cards (see `changes_page`).

    `facts` is the JSON document that `eval-kl --json` prints. A worst token's `context` ends right before its `token`;
    a baseline's `difference` is candidate minus baseline.
    """
    figures = [
        tag("div", tag("dt", escaped(name)), tag("dd", escaped(value), tag("small", escaped(remark))))
        for name, remark, value in key_figures(facts)
    ]
    place = bucket_card("J by position", facts["by_position"], "begin", "end", "position in the sequence, tokens")
    sure, sure_x = "J by confidence of the reference", "largest probability that the reference gives"
    stack = tag("div", place, bucket_card(sure, facts["by_confidence"], "low", "high", sure_x), class_="stack")
    cards = [histogram_card(facts), domain_card(facts), stack]
    cards += [layers_card(facts), more[1], worst_card(facts), about_card(facts)]
    title = escaped(f"eval-kl: {facts['candidate']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join([verdict_card(facts), tag("dl", *figures, class_="figures"), tag("div", *cards, class_="cards")])
    body = f"<h1>{title}</h1>\n<main>{body}</main>"
    head += tag("style", CSS, more[0])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
