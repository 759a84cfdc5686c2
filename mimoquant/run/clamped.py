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
from mimoquant.wording import ClampedGroups, percent

_LOOK = "look whether the source's weights are what they should be"
LIMIT = 1e-3  # of a matrix's groups
Counts = dict[str, list[int]]  # weight → groups that became zero, that were clamped, that read as Inf, all


def named(layout: ModelLayout, layer: int, begin: int, found: Mapping[str, Mapping[int, Clamped]]) -> Counts:
    """Counts by the weight's name. `found`: by projection and expert of a chunk that begins with expert `begin`."""
    return {
        layout.expert(layer, begin + expert, projection).name: list(counted)
        for projection, experts in found.items()
        for expert, counted in experts.items()
    }


def as_groups(counts: Counts) -> dict[str, ClampedGroups]:
    """For documents and sentences, by name."""
    return {
        name: ClampedGroups(zeroed=zeroed, clamped=clamped, groups=groups)
        for name, (zeroed, clamped, _, groups) in sorted(counts.items())
    }


def refuse_many(counts: Counts, step: Experts) -> None:
    """Raises QualityError for an expert's matrix that is lost."""
    assert step.fmt is not None
    hint = (
        f"{_else(step.fmt.name)}keep that layer's experts as they are (mimoquant: carve_outs: {{{step.layer}: bf16}}), "
        f"or {_LOOK}"
    )
    _refuse(counts, f" (layer {step.layer})", step.fmt.label, hint)


def refuse_lost(counts: Counts) -> None:
    """The same of a matrix that was FP8 and is stored in bf16, whose groups are its blocks."""
    _refuse(counts, "", "bf16", _LOOK)


def too_many(name: str, one: Clamped, label: str) -> str | None:
    """What is wrong with a matrix that is lost, in a sentence."""
    if not one.infinite and one.share <= LIMIT:
        return None
    allowed = "none may read as Inf" if one.infinite else f"at most {percent(LIMIT)} may"
    return (
        f"{name}: {one.lost} of its {one.groups} groups ({percent(one.share)}) are not "
        f"zero and have no scale in {label}: {one.zeroed} became zero, {one.clamped} were clamped, "
        f"{one.infinite} read as Inf; {allowed}"
    )


def _refuse(counts: Counts, place: str, label: str, hint: str) -> None:
    for name, numbers in counts.items():
        if said := too_many(f"{name}{place}", Clamped(*numbers), label):
            raise QualityError(said, hint=hint)


def _else(name: str) -> str:
    return "" if name == "int4" else "quantize to int4, whose scales reach further, "
