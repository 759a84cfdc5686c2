"""Results as dataclasses → JSON, and how figures are written.

Key idea: nothing here depends on the machine or the clock, so a report is as reproducible as the weights beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.checkpoint.journal import JournalLine

if TYPE_CHECKING:
    from mimoquant.planning.plan import Plan


@dataclass(frozen=True)
class QuantizeReport:
    """What a run wrote."""

    container: str
    method: str
    scale_search: str
    formats: dict[str, list[int]]
    carve_outs: dict[str, str]
    source_bytes: int
    output_bytes: int
    fallbacks: dict[str, int]
    notes: list[str]
    shards: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None  # per layer: see `calibrated.LayerFacts`

    @classmethod
    def of(cls, plan: Plan, finished: dict[str, JournalLine]) -> QuantizeReport:
        return cls(
            container=plan.container,
            method=plan.recipe.method,
            scale_search=plan.recipe.scale_search,
            formats=plan.layers_by_format,
            carve_outs={str(layer): kind for layer, kind in sorted(plan.carve_outs.items())},
            source_bytes=plan.source_bytes,
            output_bytes=plan.shard_bytes,
            fallbacks=fallbacks(finished),
            notes=plan.notes,
            shards=[replace(finished[unit.name], facts=None).as_plain() for unit in plan.units],
            calibration={line.unit: line.facts for line in _told(plan, finished)} or None,
        )

    def as_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def _told(plan: Plan, finished: dict[str, JournalLine]) -> list[JournalLine]:
    return [finished[unit.name] for unit in plan.units if finished[unit.name].facts is not None]


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
