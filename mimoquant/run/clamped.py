"""Groups whose scale a format cannot store (`quant.clamped`), by matrix: counted and told, and refused where they are
many, or read as Inf.

Key idea: a few such groups are weights that hardly matter, far too small beside the rest of their matrix; many are a
matrix that is lost. What is counted goes into the journal, so that resumes and ranks count each group once.
"""

from __future__ import annotations

from collections.abc import Mapping

from mimoquant.errors import QualityError
from mimoquant.model.layout import ModelLayout
from mimoquant.planning.units import Experts
from mimoquant.quant.clamped import Clamped
from mimoquant.wording import percent

LIMIT = 1e-3  # of a matrix's groups
Counts = dict[str, list[int]]  # weight → groups that became zero, that were clamped, that read as Inf, all


def named(layout: ModelLayout, layer: int, begin: int, found: Mapping[str, Mapping[int, Clamped]]) -> Counts:
    """Counts by the weight's name. `found`: by projection and expert of a chunk that begins with expert `begin`."""
    return {
        layout.expert(layer, begin + expert, projection).name: list(counted)
        for projection, experts in found.items()
        for expert, counted in experts.items()
    }


def refuse_many(counts: Counts, step: Experts) -> None:
    """Raises QualityError for a matrix that is lost."""
    assert step.fmt is not None
    for name, numbers in counts.items():
        one = Clamped(*numbers)
        if not one.infinite and one.share <= LIMIT:
            continue
        allowed = "none may read as Inf" if one.infinite else f"at most {percent(LIMIT)} may"
        raise QualityError(
            f"{name} (layer {step.layer}): {one.lost} of its {one.groups} groups ({percent(one.share)}) are not "
            f"zero and have no scale in {step.fmt.label}: {one.zeroed} became zero, {one.clamped} were clamped, "
            f"{one.infinite} read as Inf; {allowed}",
            hint=f"{_else(step.fmt.name)}keep that layer's experts as they are (mimoquant: carve_outs: "
            f"{{{step.layer}: bf16}}), or look whether the source's weights are what they should be",
        )


def _else(name: str) -> str:
    return "" if name == "int4" else "quantize to int4, whose scales reach further, "
