"""The small files of an output: index, config.json, recipe, report, model card; or what a relayout writes instead.

Key idea: they follow from the plan, the journal and what was calibrated on, so `verify` writes them again and compares.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from mimoquant.__version__ import __version__
from mimoquant.checkpoint.folders import read_inside, resolve_inside, sha256_inside
from mimoquant.checkpoint.hf_files import CONFIG_NAME, MODELOPT_CONFIG_NAME
from mimoquant.checkpoint.index import INDEX_NAME
from mimoquant.checkpoint.journal import JournalLine
from mimoquant.model.releases import base_model, release_of
from mimoquant.output.model_card import Origin, model_card, without_quality
from mimoquant.output.quantize_report import fallbacks, quantize_report
from mimoquant.planning.plan import Plan
from mimoquant.planning.relayout import RelayoutPlan, relayout_texts
from mimoquant.serving.served import planned
from mimoquant.weights.container import MODELOPT, hf_quant_config

ESCAPE = "backslashreplace"  # of what UTF-8 cannot hold, half a character or a byte of a path, as JSON writes it
MAX_CARD_BYTES = 10_000_000


def written_texts(plan: Plan, finished: dict[str, JournalLine], calibration: dict[str, Any] | None) -> dict[str, bytes]:
    """By name. `finished`: the journal, by unit."""
    weight_map = {entry.name: unit.file for unit in plan.units for entry in unit.entries}
    index = {"metadata": plan.index_metadata, "weight_map": dict(sorted(weight_map.items()))}
    texts = {
        INDEX_NAME: json.dumps(index, indent=2),
        CONFIG_NAME: json.dumps(plan.config, indent=2, ensure_ascii=False),
    }
    if isinstance(plan, RelayoutPlan):
        texts |= relayout_texts(plan)
    else:
        report = quantize_report(plan, finished)
        texts["recipe.yaml"] = resolved_recipe(plan, finished, calibration)
        texts["report.json"] = json.dumps(report, indent=2)
        real_fold = plan.recipe.real_fold and any(map(plan.recipe.folds_norm, plan.formats))
        texts["README.md"] = model_card(report, planned(plan), _origin(plan), real_fold=real_fold)
    if plan.container == MODELOPT:
        texts[MODELOPT_CONFIG_NAME] = json.dumps(hf_quant_config(plan.config, __version__), indent=2)
    return {name: (text.rstrip("\n") + "\n").encode(errors=ESCAPE) for name, text in texts.items()}


def _origin(plan: Plan) -> Origin:
    release = release_of(plan.layout)
    output = plan.recipe.output
    return Origin(release.name if release else None, base_model(plan.layout, output.named_base), output.source_revision)


def is_as_written(folder: Path, name: str, written: bytes) -> bool:
    """Whether a small file is what `written_texts` says; a model card may have been told its quality since.

    Raises CheckpointError: it cannot be read, or leads out of the folder.
    """
    if sha256_inside(folder, name) == hashlib.sha256(written).hexdigest():
        return True
    if name != "README.md" or resolve_inside(folder, name).stat().st_size > MAX_CARD_BYTES:
        return False
    return without_quality(read_inside(folder, name, MAX_CARD_BYTES).decode("utf-8", "replace")).encode() == written


def resolved_recipe(plan: Plan, finished: dict[str, JournalLine], calibration: dict[str, Any] | None) -> str:
    """`OUT/recipe.yaml`: every default written out, and where the source came from. Reading it back repeats the run."""
    document, release = plan.recipe.resolved(plan.container), release_of(plan.layout)
    document["mimoquant"]["provenance"] = {
        "mimoquant": __version__,
        "release": release.name if release else None,
        "source_headers_sha256": plan.layout.index.headers_fingerprint(),
        "quantized_layers": len(plan.formats),
        "routed_experts": plan.layout.geometry.experts,
        "fallbacks": fallbacks(finished) or 0,
    }
    if calibration is not None:
        document["mimoquant"]["provenance"]["calibration"] = calibration
    if "sensitivity" in plan.recipe.provenance:  # what the mixture was chosen by
        document["mimoquant"]["provenance"]["sensitivity"] = plan.recipe.provenance["sensitivity"]
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)
