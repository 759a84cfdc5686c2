"""A finished run → OUT/report.json.

Key idea: nothing here depends on the machine or the clock, so a report is as reproducible as the weights beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.checkpoint.journal import JournalLine
from mimoquant.output.documents import QuantizeReport
from mimoquant.planning.facts import written_shards
from mimoquant.wording import ClampedGroups, clamped_notes

if TYPE_CHECKING:
    from mimoquant.calibration.layer_facts import LayerRecord
    from mimoquant.planning.plan import Plan


def quantize_report(plan: Plan, finished: dict[str, JournalLine]) -> QuantizeReport:
    """What a run wrote. `finished`: its journal, by unit."""
    records = {unit.name: finished[unit.name].facts for unit in plan.units if finished[unit.name].facts is not None}
    counts = clamped_groups(finished)
    report = QuantizeReport(
        schema_version=SCHEMA_VERSION,
        container=plan.container,
        method=plan.recipe.method,
        scale_search=plan.recipe.scale_search,
        formats=plan.layers_by_format,
        carve_outs={str(layer): kind for layer, kind in sorted(plan.carve_outs.items())},
        source_bytes=plan.source_bytes,
        output_bytes=plan.shard_bytes,
        fallbacks=fallbacks(finished),
        notes=[*plan.notes, *clamped_notes(counts)],
        shards=written_shards(plan, finished),
        calibration=cast("dict[str, LayerRecord]", records) or None,
    )
    if counts:
        report["clamped_groups"] = counts
    if plan.recipe.output.source_revision:
        report["source_revision"] = plan.recipe.output.source_revision
    return report


def clamped_groups(finished: dict[str, JournalLine]) -> dict[str, ClampedGroups]:
    """Weight → its groups that have no scale, by name."""
    found = {name: counts for line in finished.values() for name, counts in (line.clamped or {}).items()}
    return {
        name: ClampedGroups(zeroed=zeroed, clamped=clamped, groups=groups)
        for name, (zeroed, clamped, groups) in sorted(found.items())
    }


def fallbacks(finished: dict[str, JournalLine]) -> dict[str, int]:
    """How often a calibrated run did something else than its method says; empty for one without calibration."""
    told = [line.facts for line in finished.values() if line.facts is not None]
    if not told:
        return {}
    return {
        "experts_without_tokens": sum(facts["tokens"].count(0) for facts in told),
        "gptq_damped_more": sum(facts["damped"] for facts in told),
        "gptq_rounded_plainly": sum(facts["rounded"] for facts in told),
    }
