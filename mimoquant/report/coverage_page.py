"""The coverage of one calibrated run as a self-contained HTML page: how many tokens each expert saw, and to what end.

Key idea: a cell of a heat map is one short element whose class is its colour, so tens of thousands of experts make a
page of a few megabytes that needs no script. What is worth a look is bright: few tokens, a large error. Starved experts
carry a bar at the foot of their cell as well, because colour alone is not for everyone. This module picks what is
shown; `templates/coverage.html` and `maps.html` have the words.

Left out: everything that the run's report does not tell, so equal reports give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from mimoquant.report.coverage_text import coverage, token_count
from mimoquant.report.page import render
from mimoquant.wording import layers_of_formats, media_note, number, percent

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
FEW_LAYERS = 24  # above, rows are lower
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
FISHER_GROUPS = (  # where codes were chosen for the loss
    ("Fisher matrix", ("trace", "rank", "share")),
    ("felt before", ("mean", "worst")),
    ("felt after", ("mean", "worst")),
)


class HeatMap(NamedTuple):
    """A row a layer, a cell an expert, and its legend."""

    label: str
    rows: list[tuple[str, list[Cell]]]  # layer and cells
    ticks: range  # the experts that are numbered
    scale: list[tuple[str, str]]  # the least value and the classes of each group of colours, from first to last
    end: str  # the largest value
    marks: list[tuple[str, str]]  # a cell's classes and what they say


def coverage_page(report: QuantizeDocument) -> str:
    """The HTML page of one calibrated run.

    `report` is what `quantize` tells; its `out`, if there, names the page.
    """
    layers: dict[str, Facts] = report["calibration"] or {}
    return str(
        render(
            "coverage.html",
            title=f"Calibration coverage: {report['out']}" if report.get("out") else "Calibration coverage",
            styles=map_style(layers),
            figures=figures(layers) if layers else [],
            tokens=tokens_map(layers) if layers else None,
            errors=errors_map(layers) if layers else None,
            table=layer_table(layers) if layers else None,
            folds=folded(layers),
            felt=felt(layers),
            about=about(report),
        )
    )


def map_style(layers: dict[str, Facts]) -> Markup:
    """What the maps of these layers need beside the common styles: sizes, which depend on the model, and colours."""
    experts = _experts(layers)
    return render(
        "map.css",
        colours=list(zip(STEPS, COLOURS, strict=True)),
        experts=experts,
        cell_width=_cell_width(experts),
        tick_step=_tick_step(experts),
        height=18 if len(layers) <= FEW_LAYERS else 12,
        low_on_paper=len(layers) > FEW_LAYERS,
    )


def figures(layers: dict[str, Facts]) -> list[tuple[str, str, str]]:
    """The run in eight numbers, one more where norms were folded and where codes were chosen for the loss: name, value,
    remark."""
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
    if c["felt"]:
        before, after = (number(c[name][0], 3) for name in ("felt_plain", "felt"))
        rows.append(("Felt by the loss", after, f"mean; before {before}"))
    if c["topk_changed"]:
        mean, worst = map(percent, c["topk_changed"])
        rows.append(("Top-k changed", mean, f"of tokens, by folded norms; worst layer {worst}"))
    return rows


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


def tokens_map(layers: dict[str, Facts]) -> HeatMap:
    shades = Shades(value for facts in layers.values() for value in facts["tokens"])

    def rounded(value: float) -> str:
        return f"{value:.0f}"

    def cells(facts: Facts) -> Iterator[Cell]:
        limit = starved_at_most(facts)
        for count in facts["tokens"]:
            bright = STEPS[-1 - shades.step(count)]
            yield ("z" if count == 0 else f"{bright} s" if count <= limit else bright), f"{count} tokens"

    marks = [(f"{STEPS[-1]} s", "starved"), ("z", "no tokens")]
    return heat_map("tokens per expert and layer", layers, cells, legend(shades, STEPS[::-1], rounded), marks)


def errors_map(layers: dict[str, Facts]) -> HeatMap:
    shades = Shades(value for facts in layers.values() for value in facts["relmse"])

    def cells(facts: Facts) -> Iterator[Cell]:
        for before, after in zip(facts["relmse_plain"], facts["relmse"], strict=True):
            shade = STEPS[shades.step(after)] if math.isfinite(after) else "x"
            yield shade, f"{number(before)} → {number(after)}"

    broken = any(not math.isfinite(value) for facts in layers.values() for value in facts["relmse"])
    scale = legend(shades, STEPS, lambda value: number(value, 3))
    marks = [("x", "not finite")] if broken else []
    return heat_map("relMSE per expert and layer", layers, cells, scale, marks)


def legend(shades: Shades, steps: str, write: Callable[[float], str]) -> tuple[list[tuple[str, str]], str]:
    """`HeatMap.scale` and `HeatMap.end`: the colours in four groups between the values where they meet."""
    bounds, few = shades.bounds(), len(steps) // 4
    return [(write(bounds[k]), steps[k : k + few]) for k in range(0, len(steps), few)], write(bounds[-1])


def heat_map(
    label: str,
    layers: dict[str, Facts],
    cells: Callable[[Facts], Iterable[Cell]],
    scale: tuple[list[tuple[str, str]], str],
    marks: list[tuple[str, str]],
) -> HeatMap:
    experts = _experts(layers)
    rows = [(name.removeprefix("layer "), list(cells(facts))) for name, facts in layers.items()]
    return HeatMap(label, rows, range(0, experts, _tick_step(experts)), *scale, marks)


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


def folded(layers: dict[str, Facts]) -> bool:
    """Whether the norm of any layer was folded."""
    return any("topk_changed" in facts for facts in layers.values())


def felt(layers: dict[str, Facts]) -> bool:
    """Whether codes were chosen for what the loss feels."""
    return any("fisher" in facts for facts in layers.values())


class LayerTable(NamedTuple):
    """Every layer's figures as text."""

    groups: Sequence[tuple[str, tuple[str, ...]]]  # heading, headings of its columns
    rows: list[tuple[str, list[tuple[str, str]]]]  # layer; class and text of its cells


def layer_table(layers: dict[str, Facts]) -> LayerTable:
    groups = (*GROUPS, *(FOLD_GROUP,) * folded(layers), *FISHER_GROUPS * felt(layers))
    rows = [(name.removeprefix("layer "), _cells(facts, groups)) for name, facts in layers.items()]
    return LayerTable(groups, rows)


def _cells(facts: Facts, groups: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, str]]:
    c, held, used = coverage([facts]), facts["held_out"], f"{facts['shrinkage']:g}"
    low, high = (number(value, 3) for value in c["lambda"])
    worst = max(range(len(facts["relmse"])), key=lambda expert: facts["relmse"][expert])
    figures = (
        [token_count(value) for value in c["tokens"]],
        [number(c["effective"][0]), number(c["effective"][2])],
        [str(c["starved"]), str(c["without_tokens"])],
        [used, low if low == high else f"{low} to {high}"],
        [number(value) for value in c["relmse_plain"]],
        [*(number(value) for value in c["relmse"]), str(worst)],
        [number(held.get(f"{kind}_{used}")) for kind in ("predicted", "measured")],
        [str(c["damped"]), str(c["rounded"])],
    )
    more = {FOLD_GROUP: [percent(c["topk_changed"][0]) if c["topk_changed"] else "n/a"]} | _felt_cells(facts, c)
    cells = []
    for (name, _), values in zip(groups, [*figures, *(more[g] for g in groups if g in more)], strict=True):
        alarming = name in ("experts", "GPTQ fallbacks")
        for k, value in enumerate(values):
            style = ["new"] * (k == 0) + ["bad"] * (alarming and value != "0")
            cells.append((" ".join(style), value))
    return cells


def _felt_cells(facts: Facts, c: dict[str, Any]) -> dict[tuple[str, tuple[str, ...]], list[str]]:
    """Of `FISHER_GROUPS`; empty for a layer without."""
    if "fisher" not in facts:
        return {}
    of = facts["fisher"]
    told = [number(of["trace"], 3), number(of["effective_rank"], 3), percent(of["share"])]
    felt = ([number(value) for value in c[name]] for name in ("felt_plain", "felt"))
    return dict(zip(FISHER_GROUPS, (told, *felt), strict=True))


def about(report: QuantizeDocument) -> list[tuple[str, str]]:
    formats = layers_of_formats(report["formats"])
    parts = [("experts", f"{formats} ({report['method']}, scales by {report['scale_search']})")]
    parts += [("media", note)] if (note := media_note((report["calibration"] or {}).values())) else []
    parts += [("note", text) for text in report["notes"]]
    return parts + ([] if report["calibration"] else [("calibration", "no layer was calibrated")])
