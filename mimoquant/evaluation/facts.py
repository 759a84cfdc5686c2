"""One evaluation's comparisons → its document (`documents.FolderEvaluation`).

Key idea: what is said of a candidate beside its scores comes from its own folder: the recipe, and whether its config
quantizes activations, which a J of the weights says nothing about; only a J of rounded ones does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.calibration.tokenizer import decoder_of
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.remote import named
from mimoquant.evaluation import documents
from mimoquant.evaluation.divergence import TokenScores, bootstrap
from mimoquant.evaluation.documents import (
    BaselineFacts,
    DataFacts,
    FolderEvaluation,
    LayerPart,
    NoiseFloor,
)
from mimoquant.evaluation.rounding_documents import CausePart, Rounded, RoundingFacts
from mimoquant.evaluation.summary import paired_difference, summarize
from mimoquant.model.rounding import has_input_scales, left_out_of_j, rounds_activations
from mimoquant.model.served_rounding import NONE, NVFP4
from mimoquant.weights.layer_rounding import stored_in_bf16

if TYPE_CHECKING:
    from mimoquant.evaluation.eval_kl import AsServed, Comparison, LayerTrace
    from mimoquant.evaluation.side_by_side import WorstToken
    from mimoquant.model.layout import ModelLayout


@dataclass(frozen=True)
class Compared:
    """The folders of an evaluation, as its caller wrote them, and what the reference is stored in."""

    reference: str
    reference_stored: str
    candidate: str
    baseline: str | None


def evaluation_of(
    compared: Compared,
    layout: ModelLayout,
    tokens: TokenSet,
    comparisons: Sequence[Comparison],
    floor: NoiseFloor | None,
    device: str,
    shared: float | None,
    rounding: RoundingFacts | None,
) -> FolderEvaluation:
    """`layout`: the candidate's. `shared`: as `refuse_shared_data` says it. `comparisons`: of the candidate and, if
    there is one, the baseline."""
    scores = comparisons[0].scores
    assert scores is not None
    names = f"the reference {named(compared.reference)}", f"the candidate {named(compared.candidate)}"
    decode = decoder_of(Path(compared.reference))
    baseline = None
    if compared.baseline is not None:
        other = comparisons[1].scores
        assert other is not None
        baseline = BaselineFacts(candidate=named(compared.baseline), **paired_difference(scores, other, tokens))
    return {
        "schema_version": SCHEMA_VERSION,
        "reference": named(compared.reference),
        "reference_stored": compared.reference_stored,
        "candidate": named(compared.candidate),
        "recipe": recipe_name(Path(compared.candidate)),
        "activations_quantized": rounds_activations(layout),
        "rounding": rounding,
        "left_out": _left_out(layout, rounding),
        "data": data_facts(tokens, shared),
        **summarize(scores, tokens, names, comparisons[0].not_finite),
        "layers": [_layer_part(trace) for trace in comparisons[0].layers],
        "worst_tokens": [_worst_token(worst, tokens, decode) for worst in comparisons[0].worst],
        "baseline": baseline,
        "noise_floor": floor,
        "device": device,
    }


def rounding_facts(
    reference: AsServed,
    candidate: AsServed,
    layout: ModelLayout,
    causes: Mapping[str, TokenScores],
    tokens: TokenSet,
) -> RoundingFacts | None:
    """What was rounded, and what of J it is; None where nothing was, and nothing is known of a kernel that would."""
    rounded = rounded_facts(reference, candidate, layout)
    if rounded is None:
        return None
    length = tokens.ids.shape[1] - 1
    return RoundingFacts(
        **rounded,
        sequences=max((len(scores.j) // length for scores in causes.values()), default=0),
        causes=[_cause(name, scores, length) for name, scores in causes.items()],
    )


def rounded_facts(reference: AsServed, candidate: AsServed, layout: ModelLayout) -> Rounded | None:
    """What was rounded, by words alone; None where nothing was, and nothing is known of a kernel that would."""
    asked, of_reference = candidate.rounding, reference.rounding
    if not (asked.anything or of_reference.anything or candidate.known):
        return None
    return Rounded(
        experts=asked.kinds,
        dense=asked.dense,
        stored="bf16" if stored_in_bf16(layout, asked) else "float32",
        kv_cache=asked.cache,
        reference=of_reference.told if of_reference.anything else None,
        input_scales=("stored" if has_input_scales(layout) else "unit") if NVFP4 in asked.kinds else None,
        known=list(candidate.known),
    )


def _cause(name: str, scores: TokenScores, length: int) -> CausePart:
    ok = scores.counted
    low, high = bootstrap(scores.j[ok], (np.arange(len(ok)) // length)[ok])
    return CausePart(cause=name, j=float(scores.j[ok].mean()), low=low, high=high)


def _left_out(layout: ModelLayout, rounding: RoundingFacts | None) -> list[str]:
    """What the config quantizes and J has not in it: of a kernel that is known, nothing."""
    if rounding is None:
        return left_out_of_j(layout)
    if rounding["known"]:
        return []
    had = {"activations": rounding["experts"] != NONE, "the KV cache": rounding["kv_cache"] != NONE}
    return [part for part in left_out_of_j(layout) if not had[part]]


def data_facts(tokens: TokenSet, shared: float | None) -> DataFacts:
    return DataFacts(
        name=tokens.name,
        sha256=tokens.sha256,
        origins=list(tokens.origins),
        shared_with_calibration=shared,
    )


def recipe_name(candidate: Path) -> str | None:
    """The recipe beside a checkpoint, if there is one."""
    path = candidate / "recipe.yaml"
    return str(path) if path.is_file() else None


def _layer_part(trace: LayerTrace) -> LayerPart:
    return LayerPart(
        layer=trace.layer,
        kind=trace.kind,
        quantized=trace.quantized,
        relative_error=trace.relative_error,
        routing_overlap=trace.routing_overlap,
    )


def _worst_token(
    worst: WorstToken, tokens: TokenSet, decode: Callable[[list[int]], str] | None
) -> documents.WorstToken:
    text = decode or (lambda ids: " ".join(str(i) for i in ids))
    sequence, position = divmod(worst.index, tokens.ids.shape[1] - 1)
    ids = tokens.ids[sequence].tolist()

    def one(token: int) -> str:
        shown = text([token])
        return f"<{token}>" if "\ufffd" in shown else shown  # a part of a character has no text

    def in_words(top: list[tuple[int, float]]) -> list[tuple[str, float]]:
        return [(one(token), probability) for token, probability in top]

    return documents.WorstToken(
        sequence=sequence,
        position=position,
        domain=tokens.domains[sequence],
        j=worst.j,
        context=text(ids[max(0, position - 23) : position + 1]).strip("\ufffd"),
        token=one(ids[position + 1]),
        reference_top5=in_words(worst.reference_top),
        candidate_top5=in_words(worst.candidate_top),
    )
