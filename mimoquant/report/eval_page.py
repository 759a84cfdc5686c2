"""The report of one `eval-kl` run: a self-contained HTML page with plots, and the same facts as text.

Key idea: plots are SVG with x in percent and y in pixels. Marks stretch with the window, letters keep their size, so
one drawing serves phone, screen and paper without a script.
Left out: whatever is not in the facts (no clock, no machine), so equal facts give equal bytes. Model text is hostile
until proven otherwise: every string passes `visible`, and on the page `html.escape`.
"""

from __future__ import annotations

import html
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mimoquant.output.quantize_report import number, size
from mimoquant.planning.facts import table
from mimoquant.report.drawing import CSS

Facts = dict[str, Any]
Axis = tuple[str, list[tuple[float, str]]]  # title; (place in 0..1, label) of each tick
_SMALLEST = 1e-30  # what is below has no place of its own on an axis
Bar = tuple[float, float, float | None, str, str]  # left and right in 0..1, value, tooltip, style
Row = tuple[str, float | None, float | None, float | None, str]  # name, value, interval, tooltip

WIDTH = 100  # columns of a terminal
CONTEXT_CHARS, TOKEN_CHARS = 300, 60
NAME_CHARS = 24
QUANTILES = {"median": "median", "mean": "mean", "p90": "p90", "p99": "p99", "p99_9": "p99.9", "max": "max"}
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories that act on their neighbours, or vanish


def visible(text: object) -> str:
    """The text with characters that act or vanish shown by a sign instead: ↵, ⇥, ‹U+200F›. Safe to print."""

    def sign(char: str) -> str:
        hidden = unicodedata.category(char) in HIDDEN or (char.isspace() and char != " ")
        return {"\n": "↵", "\t": "⇥"}.get(char, f"‹U+{ord(char):04X}›") if hidden else char

    return "".join(map(sign, str(text)))


def escaped(value: object) -> str:
    return html.escape(visible(value))


def token_sign(token: str) -> str:
    sign = visible(token).replace(" ", "␣") or "(empty)"
    return sign if len(sign) <= TOKEN_CHARS else sign[: TOKEN_CHARS - 1] + "…"


def percent(share: float | None) -> str:
    """Two decimals, but never 0 or 100 % for what is not."""
    if share is None or 0 < share < 5e-5:
        return "n/a" if share is None else f"{number(100 * share, 2)} %"
    return "> 99.99 %" if 0.99995 <= share < 1 else f"{100 * share:.2f} %"


def drawable(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def interval(part: Facts, digits: int = 4) -> str:
    return f"{number(part['low'], digits)} to {number(part['high'], digits)}"


def verdict(facts: Facts) -> tuple[str, str, str]:
    """(good | bad | plain, one word, one sentence)."""
    j, limit, broken, floor = facts["j"], facts["max_kl"], facts["nonfinite_share"], facts["noise_floor"]
    mean = j["mean"]
    value = f"J {number(mean)} nats per token (95 % interval {interval(j)})"
    tail = f"; {percent(broken)} of the rows are not finite" if broken > 0 else ""
    if facts["passed"] is False:
        over = f" ({100 * (mean / limit - 1):.1f} %)" if limit else ""
        excess = f" exceeds the limit {number(limit)} by {number(mean - limit)}{over}"
        return "bad", "FAILED", value + (excess if mean > limit else f"; limit {number(limit)}") + tail
    if broken > 0 or not math.isfinite(mean):
        return "bad", "NOT FINITE", value + tail
    if facts["passed"]:
        spare = f", {100 * (1 - mean / limit):.0f} % to spare" if limit else ""
        return "good", "PASSED", f"{value} keeps the limit {number(limit)}{spare}"
    if mean == 0 and j["max"] == 0:
        return "good", "IDENTICAL", f"{value}: both give the same distribution for every token"
    within = floor is not None and j["high"] <= max(floor.values())
    return ("good", "WITHIN NOISE", value) if within else ("plain", "MEASURED", value)


def comparisons(facts: Facts) -> list[tuple[str, str]]:
    """(name, sentence): what to hold J against."""
    floor, baseline, said = facts["noise_floor"], facts["baseline"], "not measured"
    if floor:
        mean, largest = facts["j"]["mean"], max(floor["batch"], floor["relative_noise"])
        said = f"{number(floor['batch'])} (other batch shape), {number(floor['relative_noise'])} (2⁻⁹ relative noise)"
        said += f"; J is {number(mean / largest, 3)} times the larger" if largest > 0 and mean > 0 else ""
    out = [("noise floor", said)]
    if baseline:
        told = "better" if baseline["high"] < 0 else "worse" if baseline["low"] > 0 else "not told apart"
        change = f"difference {number(baseline['difference'])} (95 % interval {interval(baseline)})"
        out.append(("baseline", f"{baseline['candidate']} has J {number(baseline['j'])}; {change}: {told}"))
    return out


def key_figures(facts: Facts) -> list[tuple[str, str, str]]:
    """(name, remark, value), the same on the page and in the terminal."""
    top1, ppl = facts["top1"], facts["perplexity"]
    return [
        ("J, half-sum", interval(facts["j"]), number(facts["j"]["mean"])),
        ("KL(p‖q)", "reference to candidate", number(facts["kl_forward"])),
        ("KL(q‖p)", "candidate to reference", number(facts["kl_reverse"])),
        ("Sum", "of both directions", number(facts["symmetric_sum"])),
        ("Same top-1", "of all tokens", percent(top1["all"])),
        ("Top-1 when sure", f"reference sure of {percent(top1['confident_share'])}", percent(top1["confident"])),
        ("Perplexity ratio", f"{number(ppl['reference'])} → {number(ppl['candidate'])}", number(ppl["ratio"], 5)),
        ("Not finite", "of the rows", percent(facts["nonfinite_share"])),
    ]


def origin(facts: Facts) -> list[tuple[str, str]]:
    data, memory = facts["data"], facts["peak_rss_bytes"]
    shape = f"{facts['sequences']} sequences of up to {facts['sequence_tokens']} tokens, {facts['tokens']} scored"
    used = f", {size(memory)} of host memory at most" if memory is not None else ""
    return [
        ("reference", facts["reference"]),
        ("candidate", facts["candidate"]),
        ("recipe", facts["recipe"] or "none given"),
        ("data", f"{data['name']}: {shape}"),
        ("sha256", data["sha256"]),
        ("run", f"{facts['elapsed_s']:.1f} s on {facts['device']}{used}"),
    ]


def eval_text(facts: Facts) -> str:
    """The report for a terminal of 100 columns, made from the same facts."""
    _, word, sentence = verdict(facts)
    lines = []
    for name, text in ((word, sentence), *comparisons(facts), *origin(facts)):
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    figures = key_figures(facts)
    figures += [(name, "J of a token", number(facts["j"][key])) for key, name in QUANTILES.items() if key != "mean"]
    lines += ["", *table(("figure", "", "value"), figures)]
    if facts["by_domain"]:
        head = ("domain", "J", "95 % interval", "same top-1", "tokens")
        names = [visible(d["domain"])[:NAME_CHARS] for d in facts["by_domain"]]
        cells = [(number(d["j"]), interval(d), percent(d["top1"]), str(d["tokens"])) for d in facts["by_domain"]]
        lines += ["", *table(head, [(name, *row) for name, row in zip(names, cells, strict=True)])]
    worst = sorted(facts["layers"], key=lambda v: (math.isfinite(v["relative_error"]), -v["relative_error"]))[:5]
    if worst:
        kinds = [(str(v["layer"]), v["kind"], "quantized" if v["quantized"] else "kept") for v in worst]
        errors = [(percent(v["routing_overlap"]), number(v["relative_error"])) for v in worst]
        head = ("worst layers", "attention", "experts", "same experts", "relative error")
        lines += ["", *table(head, [(*kind, *error) for kind, error in zip(kinds, errors, strict=True)])]
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class Scale:
    """Values → 0..1 along an axis. A logarithmic one puts zeros at its start."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def linear(cls, values: Iterable[float | None]) -> Scale:
        top = max(map(drawable, values), default=0.0)
        return cls(0.0, 1.05 * top if top > _SMALLEST else 1.0)

    @classmethod
    def decades(cls, values: Iterable[float | None]) -> Scale:
        powers = [math.log10(v) for v in map(drawable, values) if v > _SMALLEST] or [-6.0]
        low = math.floor(min(powers) + 1e-9)
        return cls(10.0**low, 10.0 ** max(math.ceil(max(powers) - 1e-9), low + 1), True)

    def at(self, value: float | None) -> float:
        value = max(drawable(value), self.low)
        place = math.log(value / self.low) / math.log(self.high / self.low) if self.log else 0.0
        return min(place if self.log else (value - self.low) / (self.high - self.low), 1.0)

    def axis(self, title: str) -> Axis:
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            values = [10.0**k for k in range(first, last + 1, math.ceil((last - first) / 5))]
        else:
            raw = (self.high - self.low) / 4
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.999 * raw)
            count = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            values = [k * step for k in count]
        return title, [(self.at(value), number(value)) for value in values]


def tag(element: str, *children: str, **attributes: str | float) -> str:
    """`children` are markup, attribute values are plain; `class_` and `aria_label` are written as HTML has them."""
    pairs = [(k.rstrip("_").replace("_", "-"), f"{v:g}" if isinstance(v, float) else v) for k, v in attributes.items()]
    head = " ".join([element, *(f'{k}="{escaped(v)}"' for k, v in pairs)])
    return f"<{head}>{''.join(children)}</{element}>"


def across(place: float) -> str:
    return f"{100 * place:.3f}".rstrip("0").rstrip(".") + "%"


def write(x: float, y: float, text: str, style: str, dx: float = 0) -> str:
    return tag("text", escaped(text), x=across(x), y=y, dx=dx, class_=style)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return tag("line", x1=across(x1), y1=y1, x2=across(x2), y2=y2, class_=style)


def plot(height: int, marks: Sequence[str], label: str, x: Axis, y: Axis = ("", []), kind: str = "") -> str:
    """Axes and marks. With a y axis the grid is horizontal, without one it is vertical."""
    out = [line(0, height * (1 - at), 1, height * (1 - at), "grid") for at, _ in y[1]]
    out += [write(0, height * (1 - at) + 4, name, "end", -7) for at, name in y[1]]
    out += [line(at, height if y[1] else 0, at, height + 5, "axis" if y[1] else "grid") for at, _ in x[1]]
    out += [write(at, height + 21, name, "middle") for at, name in x[1]]
    out += [line(0, height, 1, height, "axis"), write(0.5, height + 38, x[0], "middle"), write(0, -12, y[0], "", -48)]
    return tag("svg", *out, *marks, class_=f"plot {kind}", height=height, role="img", aria_label=label)


def bars(items: Sequence[Bar], height: int, y: Scale) -> list[str]:
    """Columns from zero; the whole height of a column answers the pointer, or small ones could not be found."""
    out = []
    for left, right, value, title, style in items:
        tall = max(y.at(value) * height, 1.0 if drawable(value) > 0 else 0.0)
        x, width = across(left), across(right - left)
        hit = tag("rect", x=x, width=width, y=0.0, height=float(height), class_="hit")
        drawn = tag("rect", x=x, width=width, y=height - tall, height=tall, class_=style) if tall else ""
        if value is not None and not math.isfinite(value):
            drawn = write((left + right) / 2, height - 6, number(value), "middle name")
        out.append(tag("g", tag("title", escaped(title)), hit, drawn))
    if all(item[2] == 0 for item in items):
        out.append(write(0.5, height * 0.4, "nothing above 0", "middle name"))
    return out


def rows_plot(rows: Sequence[Row], x: Scale, label: str, kind: str = "rows", limit: float | None = None) -> str:
    """One value a line: a dot on a logarithmic axis (hollow for 0, which it does not have), a bar on a linear one."""
    step, out = 38, []
    if limit is not None:
        out.append(line(x.at(limit), 0, x.at(limit), len(rows) * step, "limit"))
    for i, (name, value, low, high, title) in enumerate(rows):
        y, at = i * step + 28, x.at(value)
        marks = [tag("rect", x="0%", width="100%", y=y - 25, height=35, class_="hit")]
        marks += [write(0, y - 11, name, "name", 5), write(1, y - 11, number(value), "name end", -5)]
        if not x.log:
            marks.append(tag("rect", x="0%", width=across(at), y=y - 5, height=10, class_="pale"))
        if low is not None and high is not None and math.isfinite(high - low):
            marks.append(line(x.at(low), y, x.at(high), y, "range"))
            marks += [line(x.at(end), y - 5, x.at(end), y + 5, "range") for end in (low, high)]
        if value is not None and math.isfinite(value):
            marks.append(tag("circle", cx=across(at), cy=y, r=5, class_="dot" if value else "hollow"))
        out.append(tag("g", tag("title", escaped(title)), *marks))
    return plot(len(rows) * step, out, label, x.axis("nats per token" + (", log" if x.log else "")), kind=kind)


def card(title: str, *body: str, kind: str = "") -> str:
    return tag("section", tag("h2", escaped(title)), *body, class_=f"card {kind}")


def note(text: str) -> str:
    return tag("p", escaped(text), class_="note")


def verdict_card(facts: Facts) -> str:
    tone, word, sentence = verdict(facts)
    j, floor, baseline, limit = facts["j"], facts["noise_floor"], facts["baseline"], facts["max_kl"]
    rows: list[Row] = [("this candidate", j["mean"], j["low"], j["high"], f"J {number(j['mean'])}, {interval(j)}")]
    if baseline:
        rows.append(("baseline", baseline["j"], None, None, baseline["candidate"]))
    for name, key in (("noise: other batch shape", "batch"), ("noise: 2⁻⁹ relative", "relative_noise")):
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


def bucket_card(title: str, buckets: Sequence[Facts], low: str, high: str, x_title: str) -> str:
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


def top5(row: Facts, side: str) -> str:
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
