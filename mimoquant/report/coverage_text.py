"""What the calibration reached, as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from mimoquant.wording import media_note

if TYPE_CHECKING:
    from mimoquant.calibration.layer_facts import LayerRecord


def coverage_text(layers: dict[str, LayerRecord]) -> str:
    """What the calibration tokens reached and gained, in one line."""
    c = coverage(layers.values())
    least, low, median = map(token_count, c["tokens"])
    weakest, strongest = c["lambda"]
    changed = c["topk_changed"][0] if c["topk_changed"] else 0.0
    felt = f"; felt by the loss {c['felt_plain'][0]:.3g} -> {c['felt'][0]:.3g}" if c["felt"] else ""
    shown = f"; {note}" if (note := media_note(layers.values())) else ""
    routed = f"; top-k changed for {100 * changed:.3g} % of tokens" if changed else ""
    return (
        f"tokens per expert {least} min, {low} p5, {median} median; {c['starved']} of {c['experts']} starved, "
        f"{c['without_tokens']} without; lambda {weakest:.3g} to {strongest:.3g}; "
        f"relMSE {c['relmse_plain'][0]:.3g} -> {c['relmse'][0]:.3g}{felt}{routed}{shown}"
    )


def coverage(layers: Iterable[LayerRecord]) -> dict[str, Any]:
    """`calibrated.LayerFacts` of one or more layers as figures over all their experts.

    tokens and effective: minimum, 5th percentile, median. lambda: least and most. relmse and relmse_plain: mean, worst.
    topk_changed: mean and worst of the layers whose norm was folded, None without such a layer. felt and felt_plain: as
    relmse, by what the loss feels; None where codes were not chosen for it.
    """
    layers = list(layers)
    every = {
        name: [value for facts in layers for value in facts[name]]
        for name in ("tokens", "effective", "shrunk", "relmse_plain", "relmse")
    }
    figures: dict[str, Any] = {name: sum(facts[name] for facts in layers) for name in ("starved", "damped", "rounded")}
    for name in ("tokens", "effective"):
        figures[name] = [float(value) for value in np.quantile(every[name], (0.0, 0.05, 0.5))]
    for name in ("relmse_plain", "relmse"):
        figures[name] = [float(np.mean(every[name])), float(np.max(every[name]))]
    felt_plain = [value for facts in layers for value in facts.get("felt_plain", [])]
    felt = [value for facts in layers for value in facts.get("felt", [])]
    for name, values in (("felt_plain", felt_plain), ("felt", felt)):
        figures[name] = [float(np.mean(values)), float(np.max(values))] if values else None
    changed = [facts["topk_changed"] for facts in layers if "topk_changed" in facts]
    return figures | {
        "topk_changed": [float(np.mean(changed)), max(changed)] if changed else None,
        "experts": len(every["tokens"]),
        "without_tokens": every["tokens"].count(0),
        "lambda": [min(every["shrunk"]), max(every["shrunk"])],
    }


def token_count(value: float) -> str:
    """A number of tokens; between two of them, with a decimal."""
    return f"{value:.1f}".removesuffix(".0")
