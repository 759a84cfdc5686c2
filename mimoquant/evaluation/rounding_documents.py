"""What a measurement says of activations and caches that it rounded: a part of the documents of `eval-kl`,
`eval-draft` and `sensitivity`."""

from __future__ import annotations

from typing import TypedDict


class CausePart(TypedDict):
    """J of one cause alone, over some of the sequences."""

    cause: str
    """weights: the candidate's, nothing rounded; activations: the reference's weights, inputs and cache rounded as the
    candidate's are; both: what `j` is of."""
    j: float
    """Its mean, nats per token."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""


class Rounded(TypedDict):
    """What was rounded beside the weights, as kernels do; see `quant.activations`."""

    experts: str
    """Inputs of routed experts: none, fp8, mxfp8, mxfp4 or nvfp4; several, joined by " and ", where layers differ."""
    dense: str
    """Inputs of matrices that are stored in FP8, beside the experts: fp8, fp8-ue8m0 (powers of two) or none."""
    stored: str
    """What operations' results are stored in: bf16, as engines do, where `dense` is not none and there is such a
    matrix; else float32."""
    kv_cache: str
    """fp8 or none."""
    reference: str | None
    """The same of the reference, in words; null where only the candidate was rounded."""
    input_scales: str | None
    """Of NVFP4's inputs: stored in the candidate, or unit, 1 for all; null for other kinds."""
    known: list[str]
    """Which kernels are thought to run, and how that is known; empty where the rounding was asked for by name."""


class RoundingFacts(Rounded):
    """The same, and what it does to J."""

    sequences: int
    """That the causes were measured on: one batch in four."""
    causes: list[CausePart]
    """What of J is due to what."""
