"""What the report of `eval-kl` says of a candidate that this program wrote: what was changed, what was not, from what.

Key idea: it is read from the candidate's own report.json and recipe.yaml. Of others' checkpoints, and where one of the
two is damaged, the page says nothing; `verify` is who holds the files to these claims.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from mimoquant.report.coverage_page import map_style, tokens_map
from mimoquant.report.page import render
from mimoquant.wording import layers_of_formats, size

KEPT = "attention, {}embeddings, lm_head, MTP layers, vision and audio towers have the source's values"
FOLDED = "; norms and routers of {} layers are scaled against each other"


def changes_part(candidate: Path) -> tuple[Markup, Markup]:
    """(styles, cards) for `eval_page.eval_page`; empty where there is nothing to say."""
    try:
        report = json.loads((candidate / "report.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((candidate / "recipe.yaml").read_text(encoding="utf-8"))
        provenance, layers = recipe["mimoquant"]["provenance"], report["calibration"] or {}
        changes, tokens = _changes(report, provenance), tokens_map(layers) if layers else None
        return map_style(layers) if layers else Markup(), render("changes.html", changes=changes, tokens=tokens)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        return Markup(), Markup()


def _changes(report: dict[str, Any], provenance: dict[str, Any]) -> list[tuple[str, str]]:
    formats = layers_of_formats(report["formats"])
    kept = ", ".join(f"those of layer {layer} in {kind}" for layer, kind in report["carve_outs"].items())
    fallbacks = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in report["fallbacks"].items())
    calibration = provenance.get("calibration")
    folded = sum("topk_changed" in facts for facts in (report["calibration"] or {}).values())
    unchanged = KEPT.format("" if folded else "router, norms, ") + (FOLDED.format(folded) if folded else "")
    return [
        ("changed", f"routed experts: {formats} ({report['method']}, scales by {report['scale_search']})"),
        ("not changed", unchanged + (f"; experts kept: {kept}" if kept else "")),
        ("container", report["container"]),
        ("size", f"{size(report['source_bytes'])} → {size(report['output_bytes'])}"),
        *(("note", text) for text in report["notes"]),
        *([("fallbacks", fallbacks)] if fallbacks else []),
        ("made by", f"mimoquant {provenance['mimoquant']} from {provenance['release'] or 'an unnamed checkpoint'}"),
        ("source headers", f"sha256 {provenance['source_headers_sha256']}"),
        *([("calibrated on", f"{calibration['name']}, sha256 {calibration['tokens_sha256']}")] if calibration else []),
    ]
