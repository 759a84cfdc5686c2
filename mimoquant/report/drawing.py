"""The plots of all pages, as SVG.

Key idea: x is in percent and y in pixels. Marks stretch with the window, letters keep their size, so one drawing serves
phone, screen and paper without a script. A plot has padding rather than margins, so that its labels, which lie outside
the axes, stay on its page. Colours are classes, which `templates/page.css` names once for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from mimoquant.wording import number, visible

Axis = tuple[str, list[tuple[float, str]]]  # title; (place in 0..1, label) of each tick


_SMALLEST = 1e-30  # what is below has no place of its own on an axis


Bar = tuple[float, float, float | None, str, str]  # left and right in 0..1, value, tooltip, style


Row = tuple[str, float | None, float | None, float | None, str]  # name, value, interval, tooltip


def escaped(value: object) -> Markup:
    """Markup as it is; any other text with what acts or vanishes made visible, and inert."""
    return value if isinstance(value, Markup) else escape(visible(value))


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


def tag(element: str, *children: str, **attributes: str | float) -> Markup:
    """Children that are no markup are text; `class_` and `aria_label` are written as HTML has them."""
    pairs = [(k.rstrip("_").replace("_", "-"), f"{v:g}" if isinstance(v, float) else v) for k, v in attributes.items()]
    head = " ".join([element, *(f'{k}="{escaped(v)}"' for k, v in pairs)])
    return Markup(f"<{head}>{''.join(map(escaped, children))}</{element}>")


def across(place: float) -> str:
    return f"{100 * place:.3f}".rstrip("0").rstrip(".") + "%"


def write(x: float, y: float, text: str, style: str, dx: float = 0) -> Markup:
    return tag("text", text, x=across(x), y=y, dx=dx, class_=style)


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=across(x1), y1=y1, x2=across(x2), y2=y2, class_=style)


def plot(height: int, marks: Sequence[str], label: str, x: Axis, y: Axis = ("", []), kind: str = "") -> Markup:
    """Axes and marks. With a y axis the grid is horizontal, without one it is vertical."""
    out = [line(0, height * (1 - at), 1, height * (1 - at), "grid") for at, _ in y[1]]
    out += [write(0, height * (1 - at) + 4, name, "end", -7) for at, name in y[1]]
    out += [line(at, height if y[1] else 0, at, height + 5, "axis" if y[1] else "grid") for at, _ in x[1]]
    out += [write(at, height + 21, name, "middle") for at, name in x[1]]
    out += [line(0, height, 1, height, "axis"), write(0.5, height + 38, x[0], "middle"), write(0, -12, y[0], "", -48)]
    return tag("svg", *out, *marks, class_=f"plot {kind}", height=height, role="img", aria_label=label)


def bars(items: Sequence[Bar], height: int, y: Scale) -> list[Markup]:
    """Columns from zero; the whole height of a column answers the pointer, or small ones could not be found."""
    out: list[Markup] = []
    for left, right, value, title, style in items:
        tall = max(y.at(value) * height, 1.0 if drawable(value) > 0 else 0.0)
        x, width = across(left), across(right - left)
        hit = tag("rect", x=x, width=width, y=0.0, height=float(height), class_="hit")
        drawn = tag("rect", x=x, width=width, y=height - tall, height=tall, class_=style) if tall else Markup()
        if value is not None and not math.isfinite(value):
            drawn = write((left + right) / 2, height - 6, number(value), "middle name")
        out.append(tag("g", tag("title", title), hit, drawn))
    if all(item[2] == 0 for item in items):
        out.append(write(0.5, height * 0.4, "nothing above 0", "middle name"))
    return out


def rows_plot(rows: Sequence[Row], x: Scale, label: str, kind: str = "rows", limit: float | None = None) -> Markup:
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
        out.append(tag("g", tag("title", title), *marks))
    return plot(len(rows) * step, out, label, x.axis("nats per token" + (", log" if x.log else "")), kind=kind)
