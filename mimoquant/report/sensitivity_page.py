"""What a `sensitivity` run found: a self-contained HTML page, and the same facts for a terminal.

Key idea: three questions, three plots. Which layer costs what (alone, and what restoring it buys), what each option
would leave of that, and how low J gets for how many bytes, with uniform formats and one layer in bf16 beside the
choice.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from mimoquant.report.drawing import Axis, Scale, across, line, plot, tag, write
from mimoquant.report.eval_text import shared_part
from mimoquant.report.page import render
from mimoquant.wording import (
    WIDTH,
    has_interval,
    interval,
    many,
    number,
    percent,
    rounding_note,
    size,
    table,
    visible,
)

if TYPE_CHECKING:
    from mimoquant.mixing.documents import CarveOut, JEstimate, SensitivityDocument, SensitivityLayer

HEIGHT = 220  # pixels of a plot
ENDS: tuple[Literal["low", "high"], ...] = ("low", "high")  # of an interval
NAMED = 5  # experts named beside a layer, at most
REFINED = 3  # layers named for `quantize --refine`, which takes time and no bytes


def ranked(facts: SensitivityDocument) -> list[SensitivityLayer]:
    """The layers, the one that contributes most first."""
    return sorted(facts["layers"], key=lambda layer: -layer["contribution"]["mean"])


def verdict(facts: SensitivityDocument) -> str:
    """What was chosen, in one sentence."""
    chosen = facts["chosen"]
    kinds: dict[str, int] = {}
    for option in chosen["options"].values():
        kinds[option] = kinds.get(option, 0) + 1
    mixture = ", ".join(f"{option} in {many(count, 'layer')}" for option, count in kinds.items())
    ratio, j = chosen["to_all_quantized"], j_of(facts)
    predicted = "" if "measured" in chosen else "predicted "
    return (
        f"{predicted}J {number(j['mean'])} ({interval(j)}) in {size(chosen['bytes'])}: {mixture}; "
        f"{number(ratio['mean'], 3)} ({interval(ratio, 3)}) of {number(facts['j']['mean'])}, that of "
        f"{facts['options'][0]} everywhere in {size(facts['uniform'][0]['bytes'])}"
    )


def j_of(facts: SensitivityDocument) -> JEstimate:
    """Of what was chosen: as measured, or as predicted where nothing was."""
    return facts["chosen"].get("measured", facts["chosen"]["predicted"])


def agreement(facts: SensitivityDocument) -> str:
    """Prediction beside measurement; where they differ, why."""
    chosen = facts["chosen"]
    if not measured(facts):
        return (
            "costs are predicted by the Fisher matrix and by how near tokens are to other experts, layer by layer, and "
            "added up; no J was measured: eval-kl of the output tells it"
        )
    said = f"predicted {number(chosen['predicted']['mean'])} ({interval(chosen['predicted'])}), measured "
    said += f"{number(chosen['measured']['mean'])}; difference {number(chosen['difference']['mean'])} "
    said += f"({interval(chosen['difference'])})"
    if not has_interval(chosen["difference"]):
        return f"{said}: too few sequences to tell whether they agree"
    if chosen["agrees"]:
        return f"{said}: within the interval"
    alone, gains = facts["sum_alone"], facts["sum_gains"]
    return (
        f"{said}: beyond sampling error, because layers do not add up (alone they sum to {number(alone['mean'])}, "
        f"restored one by one to {number(gains['mean'])}, together they are {number(facts['j']['mean'])}), which is "
        "told of all pairs alike, and because what a finer format leaves is told by its error on the layer's output"
    )


def measured(facts: SensitivityDocument) -> bool:
    """Whether forks have told what layers cost; else the Fisher matrix predicts it."""
    return "measured" in facts["chosen"]


def best_carve_out(facts: SensitivityDocument) -> CarveOut:
    """The one layer that is best kept in bf16, with J as measured, or as predicted without forks."""
    return min(facts["carve_outs"], key=lambda point: point["j"]["mean"])


def remarks(layer: SensitivityLayer) -> str:
    """Experts that make a layer look sensitive."""
    out = []
    for experts, said in ((layer["failed_experts"], "quantized badly"), (layer["super_experts"], "huge outputs")):
        if experts:
            more = f" and {len(experts) - NAMED} more" if len(experts) > NAMED else ""
            out.append(f"experts {', '.join(map(str, experts[:NAMED]))}{more}: {said}")
    return "; ".join(out)


def cost(facts: SensitivityDocument) -> str:
    walks = facts["cost"]["walks"]
    if not measured(facts):
        passes, read = (sum(walk[key] for walk in walks) for key in ("forward_passes", "bytes_read"))
        return f"{passes:.1f} forward passes and {size(int(read))} read for one walk back and one forward"
    first, rest = walks[0], walks[1:]
    return (
        f"{first['forward_passes']:.1f} forward passes and {size(first['bytes_read'])} read for the forks, "
        f"{sum(walk['forward_passes'] for walk in rest):.1f} and {size(sum(walk['bytes_read'] for walk in rest))} "
        f"for {many(len(facts['tried']), 'choice')} measured end to end"
    )


def origin(facts: SensitivityDocument) -> list[tuple[str, str]]:
    data, held = facts["data"], facts["calibration"]
    calibrated = [("calibration", ", ".join(f"{key} {value}" for key, value in held.items()))] if held else []
    return [
        ("source", facts["source"]),
        ("recipe", f"{facts['recipe']} ({facts['method']}), container {facts['container']}"),
        *calibrated,
        (
            "data",
            f"{data['name']}: {data['sequences']} sequences of {data['sequence_tokens']} tokens, which choose; "
            f"tell J of the result on others{shared_part(data)}",
        ),
        ("sha256", data["sha256"]),
        *rounding_lines(facts),
        ("cost", cost(facts)),
        *(("note", text) for text in facts["notes"]),
    ]


def rounding_lines(facts: SensitivityDocument) -> list[tuple[str, str]]:
    """(name, sentence): what was rounded of each option, and how it is known that kernels do."""
    rounding = facts["rounding"]
    if rounding is None:
        return []
    inputs = ", ".join(f"{option} {kind}" for option, kind in rounding["inputs"].items())
    dense, stored = rounding["dense"], "float32" if rounding["dense"] == "none" else "bf16"
    told = rounding_note(f"({inputs})", dense, rounding["kv_cache"], rounding["input_scales"], stored)
    told += f"; the source: {rounding['reference']}" if rounding["reference"] else "; the source is not rounded"
    none, floor = (
        {*rounding["inputs"].values(), rounding["dense"], rounding["kv_cache"]} == {"none"},
        rounding["j_of_source"],
    )
    lines = [("rounded", "nothing" if none and not rounding["reference"] else told)]
    if floor["mean"]:
        lines.append(("of no choice", f"J {number(floor['mean'])} ({interval(floor)}) with all layers in bf16"))
    return lines + [("kernels", known) for known in rounding["known"]]


def sensitivity_text(facts: SensitivityDocument) -> str:
    """The report for a terminal."""
    carved = best_carve_out(facts)
    said = [
        ("CHOSEN", verdict(facts)),
        ("prediction", agreement(facts)),
        (
            "one layer",
            f"bf16 for layer {carved['layer']} alone: {'' if measured(facts) else 'predicted '}J "
            f"{number(carved['j']['mean'])} ({interval(carved['j'])}) in {size(carved['bytes'])}",
        ),
        *origin(facts),
    ]
    lines: list[str] = []
    for name, text in said:
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    lines += ["", *layers_table(facts)]
    lines += [f"note: layer {of['layer']}: {remarks(of)}" for of in facts["layers"] if remarks(of)]
    points = [(of["option"], size(of["bytes"]), number(of["predicted"])) for of in facts["uniform"]]
    lines += ["", *table(("everywhere", "size", "J predicted"), points)]
    if facts["calibration"]:
        worst = " ".join(f"--refine-layer {of['layer']}" for of in ranked(facts)[:REFINED])
        lines += ["", f"in the same bytes: quantize --refine 1 {worst}"]
    return "\n".join(line.rstrip() for line in lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def layers_table(facts: SensitivityDocument) -> list[str]:
    """A line a layer: what it costs, as measured or as predicted, and what was chosen."""
    rows = []
    for of in ranked(facts):
        costs: tuple[str, ...] = (_estimate(of["contribution"]), percent(of.get("rerouted", 0.0)))
        if "alone" in of:
            costs = (_estimate(of["alone"]), _estimate(of["gain"]), number(of["contribution"]["mean"], 3))
        rows.append((str(of["layer"]), of["kind"], *costs, facts["chosen"]["options"][str(of["layer"])]))
    forks = ("J alone", "J that restoring it buys", "share")
    titles = forks if measured(facts) else ("J predicted by the Fisher matrix", "rerouted")
    return table(("layer", "attention", *titles, "chosen"), rows)


def _estimate(part: JEstimate) -> str:
    return f"{number(part['mean'], 3)} ({interval(part, 2)})"


# --- the page ---------------------------------------------------------------------------------------------------------


def columns(layers: Sequence[SensitivityLayer], series: Sequence[tuple[str, list[JEstimate]]], label: str) -> Markup:
    """Groups of columns with whiskers, one group a layer. `series`: (style, an estimate for each layer)."""
    y = Scale.linear(value for _, row in series for estimate in row for value in (estimate["mean"], estimate["high"]))
    count, wide, out = len(layers), 0.8 / len(layers) / len(series), []
    for i, layer in enumerate(layers):
        for k, (style, row) in enumerate(series):
            left, estimate = (i + 0.1) / count + k * wide, row[i]
            tall = max(y.at(estimate["mean"]) * HEIGHT, 1.0 if estimate["mean"] > 0 else 0.0)
            marks = [
                tag("title", f"layer {layer['layer']}: {number(estimate['mean'])} ({interval(estimate)})"),
                tag("rect", x=across(left), width=across(wide * 0.9), y=HEIGHT - tall, height=tall, class_=style),
            ]
            ends = [HEIGHT * (1 - y.at(estimate[end])) for end in ENDS]
            marks.append(line(left + wide * 0.45, ends[0], left + wide * 0.45, ends[1], "whisker"))
            out.append(tag("g", *marks))
    every = next(e for e in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if count / e <= 16)
    x: Axis = ("decoder layer", [((i + 0.5) / count, str(layers[i]["layer"])) for i in range(0, count, every)])
    return plot(HEIGHT, out, label, x, y.axis("J, nats per token"))


def layers_plot(facts: SensitivityDocument) -> Markup:
    layers = facts["layers"]
    series = [("alone", [of["contribution"] for of in layers])]
    if measured(facts):
        series = [("alone", [of["alone"] for of in layers]), ("gain", [of["gain"] for of in layers])]
    return columns(layers, series, "J by layer")


def _times(part: JEstimate, factor: float) -> JEstimate:
    ends = (part["low"] * factor, part["high"] * factor) if has_interval(part) else (part["low"], part["high"])
    return {"mean": part["mean"] * factor, "low": ends[0], "high": ends[1]}


def shown_options(facts: SensitivityDocument) -> list[tuple[int, str]]:
    """(index, name) of the options that leave an error anywhere."""
    layers = facts["layers"]
    return [(k, name) for k, name in enumerate(facts["options"]) if any(of["options"][k]["ratio"] for of in layers)]


def options_plot(facts: SensitivityDocument) -> Markup:
    layers, series = facts["layers"], []
    for place, (k, _) in enumerate(shown_options(facts)):
        scaled = [_times(of["contribution"], of["options"][k]["ratio"]) for of in layers]
        series.append((f"o{place}", scaled))
    return columns(layers, series, "J by layer and option")


def options_rows(facts: SensitivityDocument) -> list[tuple[str, ...]]:
    """A row a layer: its number, what was chosen, what each option would leave."""
    rows = []
    for of in facts["layers"]:
        options = [of["options"][k] for k, _ in shown_options(facts)]
        cells = (f"{number(option['predicted'], 3)} in {size(option['bytes'])}" for option in options)
        rows.append((str(of["layer"]), facts["chosen"]["options"][str(of["layer"])], *cells))
    return rows


def frontier_plot(facts: SensitivityDocument) -> Markup:
    """Bytes across, J upward."""
    points = [(point["bytes"], point["predicted"]) for point in facts["frontier"]]
    uniform = [(float(of["bytes"]), of["predicted"], of["option"]) for of in facts["uniform"]]
    carved = [(float(of["bytes"]), of["j"]["mean"], f"layer {of['layer']} in bf16") for of in facts["carve_outs"]]
    chosen = facts["chosen"]
    places = [*points, *((at, j) for at, j, _ in (*uniform, *carved))]
    sizes = [*(at for at, _ in places), chosen["bytes"]]
    right = max(at for at, _ in (*points, *((at, j) for at, j, _ in carved)))
    x = Scale(min(sizes), max(right, chosen["bytes"], min(sizes) + 1))
    y = Scale.linear([*(j for _, j in places), j_of(facts)["high"]])

    def place(at: float, j: float) -> tuple[float, float]:
        return x.at(at), HEIGHT * (1 - y.at(j))

    marks = [line(*place(*a), *place(*b), "path") for a, b in itertools.pairwise(points)]
    for style, dots in (("uniform", uniform), ("carved", carved)):
        for at, j, name in dots:
            if at <= x.high:
                across_at, up = place(at, j)
                title = tag("title", f"{name}: J {number(j)} in {size(int(at))}")
                marks.append(tag("g", title, tag("circle", cx=across(across_at), cy=up, r=4.5, class_=style)))
                if style == "uniform":
                    side = ("name", 6) if across_at < 0.85 else ("name end", -6)  # towards the middle
                    marks.append(write(across_at, up - 9, name, *side))
    best, told = j_of(facts), "measured" if measured(facts) else "predicted"
    at, up = place(float(chosen["bytes"]), best["mean"])
    ends = [HEIGHT * (1 - y.at(best[end])) for end in ENDS]
    title = tag("title", f"chosen: J {number(best['mean'])} in {size(chosen['bytes'])}, {told}")
    marks += [
        line(at, ends[0], at, ends[1], "whisker"),
        tag("g", title, tag("circle", cx=across(at), cy=up, r=6.0, class_="chosen")),
    ]
    ticks = [(k / 4, size(int(x.low + (x.high - x.low) * k / 4))) for k in range(5)]
    return plot(HEIGHT, marks, "J over bytes", ("size of the checkpoint", ticks), y.axis("J, nats per token"))


def experts_rows(facts: SensitivityDocument) -> list[tuple[str, ...]]:
    """Experts by layer, so that one that quantizing ruins is not taken for a sensitive layer."""
    rows: list[tuple[str, ...]] = []
    for of in facts["layers"]:
        experts = of["experts"]
        relmse = [value if value is not None else -1.0 for value in experts["relmse"]]
        worst, largest = (max(range(len(values)), key=values.__getitem__) for values in (relmse, experts["largest"]))
        share = experts["token_share"]
        cells = (
            str(of["layer"]),
            number(of["median_relmse"], 3),
            number(relmse[worst], 3),
            str(worst),
            number(experts["largest"][largest], 3),
            str(largest),
            f"{percent(min(share))} to {percent(max(share))}",
            remarks(of) or "none",
        )
        rows.append(cells)
    return rows


def sensitivity_page(facts: SensitivityDocument) -> str:
    """The HTML page of one run; `facts` is what `sensitivity --json` prints."""
    options = [name for _, name in shown_options(facts)]
    return str(
        render(
            "sensitivity.html",
            title=f"sensitivity: {facts['source']}, {facts['recipe']}",
            verdict=verdict(facts),
            agreement=_sentence(agreement(facts)),
            measured=measured(facts),
            frontier_plot=frontier_plot(facts),
            layers_plot=layers_plot(facts),
            first_option=facts["options"][0],
            options=options,
            options_keys=[(f"o{place}", name) for place, name in enumerate(options)],
            options_plot=options_plot(facts),
            options_rows=options_rows(facts),
            experts_rows=experts_rows(facts),
            origin=origin(facts),
            text=sensitivity_text(facts),
        )
    )
