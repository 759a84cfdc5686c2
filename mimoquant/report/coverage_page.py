"""The coverage of one calibrated run as a self-contained HTML page: how many tokens each expert saw, and to what end.

Key idea: a cell of a heat map is one short element whose class is its colour, so tens of thousands of experts make a
page of a few megabytes that needs no script. What is worth a look is bright: few tokens, a large error. Starved experts
carry a bar at the foot of their cell as well, because colour alone is not for everyone.

Left out: everything that the run's report does not tell, so equal reports give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mimoquant.report.coverage_text import coverage, token_count
from mimoquant.report.drawing import CSS, card, escaped, note, tag
from mimoquant.wording import layers_of_formats, number, percent

if TYPE_CHECKING:
    from mimoquant.calibration.layer_facts import LayerRecord as Facts
    from mimoquant.output.documents import QuantizeDocument

Cell = tuple[str, str]  # classes, tooltip

COLOURS = (
    "#440154",
    "#482173",
    "#433e85",
    "#38588c",
    "#2d708e",
    "#25858e",
    "#1e9b8a",
    "#2ab07f",
    "#52c569",
    "#86d549",
    "#c2df23",
    "#fde725",
)
STEPS = "abcdefghijkl"  # the colours' classes, dark to bright
SMALLEST = 1e-30  # below it a value has no place of its own on a logarithmic scale
LEAST_RANGE = 2.0  # a scale spans at least this factor, or noise would look like a pattern
MAP_WIDTH, CELL_WIDTHS = 1150, (3, 24)  # pixels; a map wider than its box scrolls
GROUPS = (
    ("tokens per expert", ("min", "p5", "median")),
    ("effective", ("min", "median")),
    ("experts", ("starved", "no tokens")),
    ("shrinkage", ("n0 / width", "lambda")),
    ("relMSE before", ("mean", "worst")),
    ("relMSE after", ("mean", "worst", "expert")),
    ("held out", ("predicted", "measured")),
    ("GPTQ fallbacks", ("damped", "rounded")),
)

FOLD_GROUP = ("top-k", ("changed",))  # where the norm of a layer was folded

MAP_CSS = """
.map,.layers{overflow-x:auto;margin:.6rem 0}.map>div{display:flex;width:max-content;min-width:100%}
.map b{flex:none;position:sticky;left:0;width:2.2rem;padding-right:.4rem;background:var(--card);color:var(--soft);
text-align:right;font:10px/1 system-ui,sans-serif;display:flex;align-items:center;justify-content:flex-end}
.map i,.map u{flex:none;display:block}.map u{text-decoration:none;font:11px/1.6 system-ui,sans-serif;
color:var(--soft);white-space:nowrap}.map i,.legend i{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.85rem;color:var(--soft);align-items:center}
.legend span{display:flex;align-items:center;white-space:nowrap;column-gap:.3rem}.legend>span{flex-wrap:wrap}
.legend i{display:block;width:14px;height:14px}.legend i+i{margin-left:-.3rem}
.map .s,.legend .s{box-shadow:inset 0 -5px #d0021b}
.map .z,.legend .z{background:var(--card);box-shadow:inset 0 0 0 1px #d0021b}
.map .x,.legend .x{background:#d0021b}.layers table{width:auto;min-width:100%}
.layers th,.layers td{font-size:.82rem;padding:.3rem .7rem .3rem 0;text-align:right;white-space:nowrap}
.layers thead th{border-top:0}.layers tr:first-child th+th{text-align:left;padding-left:1.2rem}
.layers .new{padding-left:1.2rem}.layers tr>:first-child{position:sticky;left:0;background:var(--card)}
.layers .bad{color:var(--bad);font-weight:700}
@media print{.map,.layers{overflow:visible}.map>div{width:100%}.map b{position:static}
.layers th,.layers td{font-size:6.5pt;padding:1pt 2pt 1pt 0}.layers .new,.layers tr:first-child th+th{padding-left:3pt}}
"""


def coverage_page(report: QuantizeDocument) -> str:
    """The HTML page of one calibrated run.

    `report` is what `quantize` tells; its `out`, if there, names the page.
    """
    layers: dict[str, Facts] = report["calibration"] or {}
    title = escaped(f"Calibration coverage: {report['out']}" if report.get("out") else "Calibration coverage")
    cards = [tokens_card(layers), error_card(layers), layers_card(layers)] if layers else []
    cards += [about_card(report)]
    body = "\n".join([figures(layers) if layers else "", tag("div", *cards, class_="cards")])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    style = tag("style", CSS, map_style(layers), "@page{size:landscape}")  # the table of layers is wide
    body = f"<h1>{title}</h1>\n<main>{body}</main>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}{style}</head>\n<body>{body}</body></html>\n'


def map_style(layers: dict[str, Facts]) -> str:
    """What the maps of these layers need beside the common styles."""
    return MAP_CSS + _cell_css(layers)


def figures(layers: dict[str, Facts]) -> str:
    """The run in eight numbers, or nine where norms were folded: name, value, remark."""
    c = coverage(layers.values())
    least, low, median = map(token_count, c["tokens"])
    fallbacks = f"{c['damped']} damped more, {c['rounded']} rounded plainly"
    rows = [
        ("Tokens per expert", median, f"median; min {least}, p5 {low}"),
        ("Effective sample", number(c["effective"][2]), f"median; min {number(c['effective'][0])}"),
        ("Starved", str(c["starved"]), f"of {c['experts']} experts, {percent(c['starved'] / c['experts'])}"),
        ("Without tokens", str(c["without_tokens"]), "take the layer's statistics"),
        ("Lambda", number(c["lambda"][1], 3), f"at most; at least {number(c['lambda'][0], 3)}"),
        ("relMSE before", number(c["relmse_plain"][0], 3), f"mean; worst {number(c['relmse_plain'][1], 3)}"),
        ("relMSE after", number(c["relmse"][0], 3), f"mean; worst {number(c['relmse'][1], 3)}"),
        ("GPTQ fallbacks", str(c["damped"] + c["rounded"]), fallbacks),
    ]
    if c["topk_changed"]:
        mean, worst = map(percent, c["topk_changed"])
        rows.append(("Top-k changed", mean, f"of tokens, by folded norms; worst layer {worst}"))
    parts = [
        tag("div", tag("dt", escaped(name)), tag("dd", escaped(value), tag("small", escaped(remark))))
        for name, value, remark in rows
    ]
    return tag("dl", *parts, class_="figures")


class Shades:
    """Values → steps of a logarithmic scale, from the least positive one to the largest."""

    def __init__(self, values: Iterable[float]) -> None:
        logs = [math.log(value) for value in values if SMALLEST < value < math.inf] or [0.0]
        self.high = max(logs)
        self.low = min(min(logs), self.high - math.log(LEAST_RANGE))

    def step(self, value: float) -> int:
        place = (math.log(max(value, SMALLEST)) - self.low) / (self.high - self.low)
        return min(max(int(place * len(STEPS)), 0), len(STEPS) - 1)

    def bounds(self) -> list[float]:
        """Where the steps meet, with both ends."""
        width = (self.high - self.low) / len(STEPS)
        return [math.exp(self.low + k * width) for k in range(len(STEPS) + 1)]


def starved_at_most(facts: Facts) -> int:
    """Tokens of the starved expert that has most, -1 where none is starved. The starved are those with least."""
    return sorted(facts["tokens"])[facts["starved"] - 1] if facts["starved"] else -1


def tokens_card(layers: dict[str, Facts]) -> str:
    shades = Shades(value for facts in layers.values() for value in facts["tokens"])

    def rounded(value: float) -> str:
        return f"{value:.0f}"

    def cells(facts: Facts) -> Iterator[Cell]:
        limit = starved_at_most(facts)
        for count in facts["tokens"]:
            bright = STEPS[-1 - shades.step(count)]
            yield ("z" if count == 0 else f"{bright} s" if count <= limit else bright), f"{count} tokens"

    said = "An expert sees the tokens that the router sends it. Starved: fewer tokens than half the model's width. "
    said += "L12 E3 in a tooltip is expert 3 of layer 12."
    marks = [((f"{STEPS[-1]} s",), "starved"), (("z",), "no tokens")]
    drawn = heat_map(layers, cells, "tokens per expert and layer")
    return card("Tokens per expert", note(said), legend(shades, STEPS[::-1], rounded, marks), drawn, kind="wide")


def error_card(layers: dict[str, Facts]) -> str:
    shades = Shades(value for facts in layers.values() for value in facts["relmse"])

    def cells(facts: Facts) -> Iterator[Cell]:
        for before, after in zip(facts["relmse_plain"], facts["relmse"], strict=True):
            shade = STEPS[shades.step(after)] if math.isfinite(after) else "x"
            yield shade, f"{number(before)} → {number(after)}"

    broken = any(not math.isfinite(value) for facts in layers.values() for value in facts["relmse"])
    said = "tr(D H Dᵀ) / tr(W H Wᵀ) of what was written, all three projections of an expert. Tooltips: absmax rounding "
    said += "→ what was written."
    scale = legend(shades, STEPS, lambda value: number(value, 3), [(("x",), "not finite")] if broken else [])
    return card("relMSE after", note(said), scale, heat_map(layers, cells, "relMSE per expert and layer"), kind="wide")


def legend(
    shades: Shades, steps: str, write: Callable[[float], str], marks: Sequence[tuple[tuple[str, ...], str]]
) -> str:
    """The colours in four groups between the values where they meet, then the marks."""
    bounds, few = shades.bounds(), len(steps) // 4
    parts = [
        tag("span", escaped(write(bounds[k])), *(tag("i", class_=step) for step in steps[k : k + few]))
        for k in range(0, len(steps), few)
    ]
    scale = tag("span", *parts, tag("span", escaped(f"{write(bounds[-1])} (log)")))
    rest = [tag("span", *(tag("i", class_=style) for style in styles), escaped(f" {text}")) for styles, text in marks]
    return tag("div", scale, *rest, class_="legend")


def heat_map(layers: dict[str, Facts], cells: Callable[[Facts], Iterable[Cell]], label: str) -> str:
    """A row a layer, a cell an expert. Cells are many, so they are written as short as HTML allows."""
    experts, rows = _experts(layers), []
    for name, facts in layers.items():
        layer = escaped(name.removeprefix("layer "))
        row = [
            f'<i class="{style}" title="L{layer} E{expert}: {said}"></i>'
            if " " in style
            else f'<i class={style} title="L{layer} E{expert}: {said}"></i>'
            for expert, (style, said) in enumerate(cells(facts))
        ]
        rows.append(tag("div", f"<b>{layer}</b>", *row))
    ticks = [tag("u", str(expert)) for expert in range(0, experts, _tick_step(experts))]
    said = note("Rows: layers. Columns: experts, by number.")
    return tag("div", *rows, tag("div", tag("b"), *ticks), class_="map", role="img", aria_label=label) + said


def _experts(layers: dict[str, Facts]) -> int:
    return max((len(facts["tokens"]) for facts in layers.values()), default=1)


def _cell_width(experts: int) -> int:
    return min(max(MAP_WIDTH // experts, CELL_WIDTHS[0]), CELL_WIDTHS[1])


def _tick_step(experts: int) -> int:
    """Experts from tick to tick: a power of two that leaves room for a number, also where paper is narrower."""
    step, wide = 1, _cell_width(experts)
    while step * wide < (CELL_WIDTHS[1] if wide == CELL_WIDTHS[1] else 48):
        step *= 2
    return step


def _cell_css(layers: dict[str, Facts]) -> str:
    """The sizes, which depend on the model, and the colours. On paper the cells share the width there is."""
    experts, tall = _experts(layers), 18 if len(layers) <= 24 else 12
    wide, every = _cell_width(experts), _tick_step(experts)
    colours = "".join(
        f".map .{step},.legend .{step}{{background-color:{colour}}}"
        for step, colour in zip(STEPS, COLOURS, strict=True)
    )
    gap = ".map i{border:solid var(--card);border-width:0 1px 1px 0}" if wide >= 8 else ""
    share = f"calc((100% - 2.2rem)/{experts}"
    low = ".map b,.map i{height:8px}.map b{font-size:8px}" if tall < 18 else ""
    paper = f"@media print{{.map i{{width:{share})}}.map u{{width:{share}*{every})}}{low}}}"
    sizes = f".map i{{width:{wide}px;height:{tall}px}}.map b{{height:{tall}px}}.map u{{width:{wide * every}px}}"
    return f"{colours}\n{sizes}{gap}{paper}\n"


def layers_card(layers: dict[str, Facts]) -> str:
    """Every layer's figures as text."""
    folds = any("topk_changed" in facts for facts in layers.values())
    groups = (*GROUPS, FOLD_GROUP) if folds else GROUPS
    upper = [tag("th", escaped(name), colspan=str(len(below)), scope="colgroup") for name, below in groups]
    lower = [
        tag("th", escaped(name), scope="col", class_="new" if k == 0 else "")
        for _, below in groups
        for k, name in enumerate(below)
    ]
    first = tag("th", "layer", scope="col", rowspan="2")
    lines = [
        tag("tr", tag("th", escaped(name.removeprefix("layer ")), scope="row"), *_cells(facts, folds=folds))
        for name, facts in layers.items()
    ]
    numbers = tag("table", tag("thead", tag("tr", first, *upper), tag("tr", *lower)), tag("tbody", *lines))
    said = (
        "Effective: (sum g)² / sum g² of the routing weights g. Lambda: how much of an expert's statistics is its "
        "layer's, n0 / (tokens + n0). Before: absmax rounding. Held out: relMSE of gate and up of a few experts, at "
        "the shrinkage that was taken, as the shrunk statistics predict it and as tokens that chose nothing else show "
        "it; n/a where no shrinkage was chosen. Damped: statistics that needed more damping than the recipe's; "
        "rounded: that none could help, so the matrix was rounded plainly."
    )
    if folds:
        said += " Top-k changed: tokens that the folded norm and router send to another set of experts."
    return card("Layers", note(said), tag("div", numbers, class_="layers"), kind="wide")


def _cells(facts: Facts, *, folds: bool) -> list[str]:
    c, held, used = coverage([facts]), facts["held_out"], f"{facts['shrinkage']:g}"
    low, high = (number(value, 3) for value in c["lambda"])
    worst = max(range(len(facts["relmse"])), key=lambda expert: facts["relmse"][expert])
    groups = (
        [token_count(value) for value in c["tokens"]],
        [number(c["effective"][0]), number(c["effective"][2])],
        [str(c["starved"]), str(c["without_tokens"])],
        [used, low if low == high else f"{low} to {high}"],
        [number(value) for value in c["relmse_plain"]],
        [*(number(value) for value in c["relmse"]), str(worst)],
        [number(held.get(f"{kind}_{used}")) for kind in ("predicted", "measured")],
        [str(c["damped"]), str(c["rounded"])],
        [percent(c["topk_changed"][0]) if c["topk_changed"] else "n/a"],
    )
    cells = []
    for (name, _), values in zip((*GROUPS, FOLD_GROUP)[: len(GROUPS) + folds], groups, strict=False):
        alarming = name in ("experts", "GPTQ fallbacks")
        for k, value in enumerate(values):
            style = ["new"] * (k == 0) + ["bad"] * (alarming and value != "0")
            cells.append(tag("td", escaped(value), class_=" ".join(style)) if style else tag("td", escaped(value)))
    return cells


def about_card(report: QuantizeDocument) -> str:
    formats = layers_of_formats(report["formats"])
    parts = [("experts", f"{formats} ({report['method']}, scales by {report['scale_search']})")]
    parts += [("note", text) for text in report["notes"]]
    parts += [] if report["calibration"] else [("calibration", "no layer was calibrated")]
    lines = [tag("div", tag("dt", escaped(name)), tag("dd", escaped(text))) for name, text in parts]
    return card("The run", tag("dl", *lines, class_="about"), kind="wide")
