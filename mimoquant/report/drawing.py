"""How all pages look: on phones and screens, light and dark, and on paper.

Key idea: colours are named once, for light and for dark; paper is always light. A plot has padding rather than margins,
so that its labels, which lie outside the axes, stay on its page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mimoquant.wording import number, visible

Axis = tuple[str, list[tuple[float, str]]]  # title; (place in 0..1, label) of each tick


_SMALLEST = 1e-30  # what is below has no place of its own on an axis


Bar = tuple[float, float, float | None, str, str]  # left and right in 0..1, value, tooltip, style


Row = tuple[str, float | None, float | None, float | None, str]  # name, value, interval, tooltip


def escaped(value: object) -> str:
    return html.escape(visible(value))


def drawable(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


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


CSS = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d5dae0;--bar:#2563b8;
--other:#b3500b;--good:#176639;--bad:#b3261e;--mark:#ffe08a}*{box-sizing:border-box;margin:0}
@media screen and (prefers-color-scheme:dark){:root{--page:#121518;--card:#1b1f23;--ink:#e8eaed;--soft:#a9b1bb;
--line:#3b424a;--bar:#7fb0ff;--other:#f2a560;--good:#74d29c;--bad:#ff8f86;--mark:#6a5200}}
body{margin:0 auto;padding:1rem;max-width:84rem;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}h1{font-size:1.25rem;margin-bottom:1rem}
h2{font-size:1rem}small,dt,th,.note{color:var(--soft);font-size:.85rem}p,summary{margin:.2rem 0}
.cards,.figures,.stack{display:grid;gap:1rem;align-content:start;grid-template-columns:minmax(0,1fr)}
.card,.figures div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem 1rem;min-width:0}
.verdict{border-left:6px solid var(--soft);margin-bottom:1rem}.verdict.good{border-color:var(--good)}
.verdict.bad{border-color:var(--bad)}.good strong{color:var(--good)}.bad strong{color:var(--bad)}
.verdict p:first-of-type{font-size:1.15rem}.figures small{display:block}
.figures{gap:.5rem;margin:1rem 0;grid-template-columns:repeat(2,minmax(0,1fr))}
.figures dd{font-size:1.25rem;line-height:1.35;font-variant-numeric:tabular-nums}dd{margin-bottom:.4rem}
.plot{display:block;overflow:visible;box-sizing:content-box;width:calc(100% - 72px);padding:28px 18px 46px 54px}
.plot.rows{width:calc(100% - 28px);padding:8px 14px 46px}.plot.aligned{padding-top:6px}
.plot text{font-size:12px;fill:var(--soft)}.middle{text-anchor:middle}.end{text-anchor:end}
.plot .name{fill:var(--ink);stroke:var(--card);stroke-width:4;paint-order:stroke}.hit{fill:transparent}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}g:hover>.hit{fill:var(--line);fill-opacity:.5}
.bar,.dot{fill:var(--bar)}.pale{fill:var(--bar);fill-opacity:.35}.range{stroke:var(--ink);stroke-width:2}
.global,.below{fill:var(--other)}.hollow{fill:var(--card);stroke:var(--bar);stroke-width:1.5}
.kept{fill:var(--card);stroke:var(--bar);stroke-width:1.5;stroke-dasharray:4 2}.kept.global{stroke:var(--other)}
.limit{stroke:var(--bad);stroke-width:2;stroke-dasharray:6 4}.histogram .bar{stroke:var(--card);stroke-width:.5}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.4rem .8rem .4rem 0;border-top:1px solid var(--line)}
.numbers *{font-size:.82rem;padding-right:.5rem}.numbers td+td,.numbers th+th{text-align:right;white-space:nowrap}
pre,.text{font:13px/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap}
pre{white-space:pre}pre,.numbers{overflow-x:auto;overflow-wrap:normal}ol{padding:0}
li{display:flex;gap:.75rem;justify-content:space-between}li>span,.number{white-space:nowrap}.actual>bdi{font-weight:700;text-decoration:underline}
mark{background:var(--mark);color:inherit;font-weight:700;border-radius:3px;padding:0 2px;outline:1px solid var(--soft)}
@media screen and (max-width:599px){.worst tr,.worst td{display:block}.worst td+td{border:0}
.domains tr>:nth-child(4){display:none}}@media print,(min-width:600px){.top{width:24%}
.figures{grid-template-columns:repeat(4,1fr)}}@media print,(min-width:800px){
.cards,.stack{grid-template-columns:repeat(2,minmax(0,1fr))}.wide,.stack{grid-column:1/-1}}
@media screen and (min-width:1250px){
.cards{grid-template-columns:repeat(3,minmax(0,1fr))}.stack{grid-column:auto;grid-template-columns:minmax(0,1fr)}
.figures{grid-template-columns:repeat(8,1fr)}.about{columns:2}.about div{break-inside:avoid}}
@page{margin:12mm}@media print{body{background:none;max-width:none;padding:0}mark{print-color-adjust:exact}
.card,.card>.note,tr,.plot,.about div{break-inside:avoid}.wide{break-inside:auto}h2,.card>.note{break-after:avoid}
details:not([open]){display:none}.numbers{overflow:visible;overflow-wrap:anywhere}
.numbers tr>*{font-size:7.5pt;white-space:normal}}
"""
