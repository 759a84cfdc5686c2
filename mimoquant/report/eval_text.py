"""What eval-kl prints."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from mimoquant.wording import (
    NAME_CHARS,
    WIDTH,
    has_interval,
    interval,
    left_out_note,
    number,
    percent,
    rounding_note,
    size,
    table,
    visible,
)

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import DataFacts, EvalKlDocument
    from mimoquant.evaluation.rounding_documents import Rounded, RoundingFacts

Quantile = Literal["median", "mean", "p90", "p99", "p99_9", "max"]
QUANTILES: dict[Quantile, str] = {
    "median": "median",
    "mean": "mean",
    "p90": "p90",
    "p99": "p99",
    "p99_9": "p99.9",
    "max": "max",
}


def verdict(facts: EvalKlDocument) -> tuple[str, str, str]:
    """(good | bad | plain, one word, one sentence)."""
    j, limit, broken, floor = facts["j"], facts["max_kl"], facts["nonfinite_share"], facts["noise_floor"]
    mean = j["mean"]
    of_what = what_j_is(facts)
    value = f"{of_what} {number(mean)} nats per token (95 % interval {interval(j, sequences=facts['sequences'])})"
    tail = f"; {percent(broken)} of the rows are not finite" if broken > 0 else ""
    if limit is not None and not has_interval(j):
        tail = f"; the limit is held against the mean, of which there is no interval{tail}"
    if limit is not None and facts["passed"] is False:
        over = f" ({100 * (mean / limit - 1):.1f} %)" if limit else ""
        excess = f" exceeds the limit {number(limit)} by {number(mean - limit)}{over}"
        return "bad", "FAILED", value + (excess if mean > limit else f"; limit {number(limit)}") + tail
    if broken > 0 or not math.isfinite(mean):
        return "bad", "NOT FINITE", value + tail
    if facts["passed"]:
        spare = f", {100 * (1 - mean / limit):.0f} % to spare" if limit else ""
        return "good", "PASSED", f"{value} keeps the limit {number(limit)}{spare}{tail}"
    if mean == 0 and j["max"] == 0:
        return "good", "IDENTICAL", f"{value}: both give the same distribution for every token"
    within = floor is not None and j["high"] <= max(floor["batch"], floor["relative_noise"])
    return ("good", "WITHIN NOISE", value) if within else ("plain", "MEASURED", value)


def rounding_of(facts: EvalKlDocument) -> RoundingFacts | None:
    """What was rounded beside weights; None too for a server, whose answers have it in them."""
    return cast("RoundingFacts | None", facts.get("rounding"))


def what_j_is(facts: EvalKlDocument) -> str:
    """J, and of what, where that could be mistaken."""
    rounding = rounding_of(facts)
    if rounding is None or not rounding["causes"]:
        return "J of the weights alone" if facts["left_out"] else "J"
    inputs, cache = {rounding["experts"], rounding["dense"]} != {"none"}, rounding["kv_cache"] != "none"
    beside = [*(["activations"] if inputs else []), *(["KV cache"] if cache else [])]
    return f"J of weights, {' and '.join(beside)}"


def rounding_lines(rounding: Rounded) -> list[tuple[str, str]]:
    """(name, sentence): what was rounded, and how it is known that kernels do."""
    anything = rounding["reference"] or {rounding["experts"], rounding["dense"], rounding["kv_cache"]} != {"none"}
    kinds = rounding["experts"], rounding["dense"], rounding["kv_cache"], rounding["input_scales"]
    told = rounding_note(*kinds, rounding.get("stored", "float32"))  # which older documents do not say
    told += f"; the reference: {rounding['reference']}" if rounding["reference"] else "; the reference is not rounded"
    return [
        ("rounded", told if anything else "nothing"),
        *(("kernels", known) for known in rounding["known"]),
    ]


CAUSES = {
    "weights": "weights alone",
    "activations": "activations alone",
    "both": "both, as served",
}


def cause_rows(rounding: RoundingFacts) -> list[tuple[str, str, str]]:
    """(of what, 95 % interval, J)."""
    return [
        (CAUSES[part["cause"]], interval(part, sequences=rounding["sequences"]), number(part["j"]))
        for part in rounding["causes"]
    ]


def context_rows(facts: EvalKlDocument) -> list[tuple[str, str, str, str, str]]:
    """(what comes before, J, 95 % interval, same top-1, tokens); empty of data without images and sounds."""
    return [
        (c["context"], number(c["j"]), interval(c, sequences=c["sequences"]), percent(c["top1"]), str(c["tokens"]))
        for c in facts.get("by_context", [])
    ]


def comparisons(facts: EvalKlDocument) -> list[tuple[str, str]]:
    """(name, sentence): what to hold J against."""
    floor, baseline, said = facts["noise_floor"], facts["baseline"], "not measured"
    if floor:
        mean, largest = facts["j"]["mean"], max(floor["batch"], floor["relative_noise"])
        said = f"{number(floor['batch'])} (other batch shape), {number(floor['relative_noise'])} (2⁻⁹ relative noise)"
        said += f"; J is {number(mean / largest, 3)} times the larger" if largest > 0 and mean > 0 else ""
    out = [*(("left out", note) for note in left_out_note(facts["left_out"])), ("noise floor", said)]
    out += rounding_lines(rounding) if (rounding := rounding_of(facts)) else []
    if baseline:
        told = "better" if baseline["high"] < 0 else "worse" if baseline["low"] > 0 else "not told apart"
        ends = interval(baseline, sequences=facts["sequences"])
        change = f"difference {number(baseline['difference'])} (95 % interval {ends})"
        out.append(("baseline", f"{baseline['candidate']} has J {number(baseline['j'])}; {change}: {told}"))
    return out


def key_figures(facts: EvalKlDocument) -> list[tuple[str, str, str]]:
    """(name, remark, value), the same on the page and in the terminal."""
    top1, ppl = facts["top1"], facts["perplexity"]
    return [
        ("J, half-sum", interval(facts["j"], sequences=facts["sequences"]), number(facts["j"]["mean"])),
        ("KL(p‖q)", "reference to candidate", number(facts["kl_forward"])),
        ("KL(q‖p)", "candidate to reference", number(facts["kl_reverse"])),
        ("Sum", "of both directions", number(facts["symmetric_sum"])),
        ("Same top-1", "of all tokens", percent(top1["all"])),
        ("Top-1 when sure", f"reference sure of {percent(top1['confident_share'])}", percent(top1["confident"])),
        ("Perplexity ratio", f"{number(ppl['reference'])} → {number(ppl['candidate'])}", number(ppl["ratio"], 5)),
        ("Not finite", "of the rows", percent(facts["nonfinite_share"])),
    ]


class Origin(TypedDict):
    """What an evaluation was made from and with; a part of its document, where the fields are described."""

    reference: str
    reference_stored: str
    candidate: str
    recipe: str | None
    data: DataFacts
    sequences: int
    sequence_tokens: int
    tokens: int
    device: str
    elapsed_s: float
    peak_rss_bytes: int


def origin(facts: Origin) -> list[tuple[str, str]]:
    data, memory = facts["data"], facts["peak_rss_bytes"]
    shape = f"{facts['sequences']} sequences of up to {facts['sequence_tokens']} tokens, {facts['tokens']} scored"
    used = f", {size(memory)} of host memory at most" if memory is not None else ""
    return [
        ("reference", f"{facts['reference']} ({facts['reference_stored']})"),
        ("candidate", facts["candidate"]),
        ("recipe", facts["recipe"] or "none given"),
        ("data", f"{data['name']}: {shape}{shared_part(data)}"),
        ("sha256", data["sha256"]),
        ("run", f"{facts['elapsed_s']:.1f} s on {facts['device']}{used}"),
    ]


def shared_part(data: DataFacts) -> str:
    """What of the data is not held out, if anything."""
    share = data["shared_with_calibration"]
    return f"; {percent(share)} of its text is in what was calibrated on" if share else ""


def eval_text(facts: EvalKlDocument) -> str:
    """The report for a terminal of 100 columns, made from the same facts."""
    _, word, sentence = verdict(facts)
    lines = []
    for name, text in ((word, sentence), *comparisons(facts), *origin(facts)):
        lines += textwrap.wrap(visible(text), WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13)
    figures = key_figures(facts)
    figures += [(name, "J of a token", number(facts["j"][key])) for key, name in QUANTILES.items() if key != "mean"]
    if (rounding := rounding_of(facts)) and rounding["causes"]:
        lines += ["", *table((f"of {rounding['sequences']} sequences", "95 % interval", "J"), cause_rows(rounding))]
    lines += ["", *table(("figure", "", "value"), figures)]
    if facts["by_domain"]:
        head = ("domain", "J", "95 % interval", "same top-1", "tokens")
        names = [visible(d["domain"])[:NAME_CHARS] for d in facts["by_domain"]]
        cells = [
            (number(d["j"]), interval(d, sequences=d["sequences"]), percent(d["top1"]), str(d["tokens"]))
            for d in facts["by_domain"]
        ]
        lines += ["", *table(head, [(name, *row) for name, row in zip(names, cells, strict=True)])]
    if rows := context_rows(facts):
        lines += ["", *table(("context", "J", "95 % interval", "same top-1", "tokens"), rows)]
    worst = sorted(facts["layers"], key=lambda v: (math.isfinite(v["relative_error"]), -v["relative_error"]))[:5]
    if worst:
        kinds = [(str(v["layer"]), v["kind"], "quantized" if v["quantized"] else "kept") for v in worst]
        errors = [(percent(v["routing_overlap"]), number(v["relative_error"])) for v in worst]
        head = ("worst layers", "attention", "experts", "same experts", "relative error")
        lines += ["", *table(head, [(*kind, *error) for kind, error in zip(kinds, errors, strict=True)])]
    return "\n".join(line.rstrip() for line in lines)
