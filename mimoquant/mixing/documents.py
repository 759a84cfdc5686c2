"""What `sensitivity` says, field by field: what `--json` prints and the Python function returns.

J is symmetric KL against the source in nats per token, on the tokens that choose; `attribution` defines what a layer
alone, a gain and a contribution are. Intervals are of 95 %, by a bootstrap over sequences; from -inf to
inf, in JSON from -1e999 to 1e999, where a half has fewer than 5 of them.

With `--quick` nothing is measured: what a layer costs is predicted by the Fisher matrix (`felt` says how), costs are
added up, and what needs forks or a measurement is absent.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from mimoquant.evaluation.documents import DataFacts
from mimoquant.planning.documents import CalibrationSettings, EngineCheck


class JEstimate(TypedDict):
    """A mean and its interval, in nats per token unless said otherwise."""

    mean: float
    """From the data itself."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""


class ChoosingData(DataFacts):
    """The tokens that J is measured on."""

    sequences: int
    """Sequences; half of them for each kind of fork."""
    sequence_tokens: int
    """Tokens per sequence."""


class OptionPart(TypedDict):
    """What one option would leave of a layer's share of J."""

    option: str
    """A format, or bf16 or fp8 for a layer that is kept."""
    bytes: int
    """The layer's shard with it."""
    ratio: float
    """Its error on the layer's output over that of the first option, with --quick as the loss feels it; 0 for what is
    kept."""
    predicted: float
    """The share of J that it leaves, nats per token."""


class ExpertsPart(TypedDict):
    """One value an expert of a layer."""

    relmse: list[float | None]
    """Squared error of its output over its square, in the first option; null where no probed token was routed to it."""
    token_share: list[float]
    """Share of the routing that it gets."""
    largest: list[float]
    """The largest |value| that comes out of it."""


class SensitivityLayer(TypedDict):
    """What quantizing one MoE layer costs."""

    layer: int
    """Among the decoder layers, from 0."""
    kind: str
    """Of its attention: global or sliding."""
    alone: NotRequired[JEstimate]
    """What quantizing only this layer adds to J, which nothing quantized has none of, or the rounding's; absent with
    --quick."""
    gain: NotRequired[JEstimate]
    """What restoring this layer alone takes off the J of all layers quantized; absent with --quick."""
    contribution: JEstimate
    """Its share of J: shares add up to what quantizing all layers adds. With --quick what it is predicted to cost."""
    rerouted: NotRequired[float]
    """With --quick: the part of that, 0 to 1, which is of tokens that later routers send to other experts."""
    options: list[OptionPart]
    """In the order of the document's `options`."""
    relative_error: float
    """Squared error of the layer's output over its square, in the first option."""
    median_relmse: float
    """Median over its experts; 0 where none was probed."""
    failed_experts: list[int]
    """Experts that quantizing ruins: their relMSE is far above the median."""
    super_experts: list[int]
    """Experts with huge outputs, which is a trait of the model."""
    experts: ExpertsPart
    """The figures behind both."""


class MixturePoint(TypedDict):
    """A choice of options, without saying which."""

    bytes: int
    """All shards."""
    predicted: float
    """Its J, nats per token."""


class UniformPoint(MixturePoint):
    """One option in every layer."""

    option: str
    """Which."""


class CarveOut(TypedDict):
    """One layer in bf16, all others in the first option."""

    layer: int
    """Which."""
    bytes: int
    """All shards."""
    j: JEstimate
    """As measured; with --quick as predicted."""


class WalkCost(TypedDict):
    """What one walk through the checkpoint took."""

    walk: str
    """ablation (the forks), or measure- and a name for the choices it measured; with --quick back (forward and back)
    and felt (each layer in every format)."""
    forward_passes: float
    """Passes of all tokens through the model; of a walk back also those that make a layer's forward again."""
    bytes_read: int
    """Of the checkpoint."""
    layers_walked: int
    """Layers; fewer than all where a run was taken up."""


class SensitivityCost(TypedDict):
    """What the run took."""

    walks: list[WalkCost]
    """In their order."""
    forward_passes_bound: NotRequired[float]
    """What the forks' walk stays below; absent with --quick."""


class MeasuredChoice(TypedDict):
    """A choice of options that was measured end to end; with --quick only predicted."""

    options: dict[str, str]
    """MoE layer → option."""
    bytes: int
    """All shards."""
    predicted: JEstimate
    """J as predicted."""
    measured: NotRequired[JEstimate]
    """J as measured; absent with --quick."""
    difference: NotRequired[JEstimate]
    """Measured minus predicted; absent with --quick."""
    agrees: NotRequired[bool]
    """Whether 0 is within the interval of their difference; absent with --quick."""
    to_all_quantized: JEstimate
    """J as measured, with --quick as predicted, over that of all layers in the first option, a ratio."""


class MixtureRounding(TypedDict):
    """What was rounded beside the weights, as kernels do: J is of all that."""

    inputs: dict[str, str]
    """Option → what goes into a layer's experts is rounded to where it has that option: none, fp8, mxfp8, mxfp4 or
    nvfp4."""
    dense: str
    """Inputs of matrices that are stored in FP8, beside the experts: fp8, fp8-ue8m0 (powers of two) or none."""
    kv_cache: str
    """fp8 or none."""
    reference: str | None
    """What was rounded of the source that is compared with, in words; null where it is as it was published."""
    input_scales: str | None
    """Of NVFP4's inputs: unit, 1 for all, or calibrated; null where nothing is rounded to NVFP4."""
    known: list[str]
    """Which kernels are thought to run, and how that is known; empty where the rounding was asked for by name."""
    j_of_source: JEstimate
    """J with every layer kept in bf16 and served so: of what no choice takes off."""


class Measurement(TypedDict):
    """What was measured of layers, and what it predicts."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    source: str
    """The checkpoint."""
    recipe: str
    """The recipe that it began with."""
    method: str
    """Its method and search for scales, in words."""
    calibration: CalibrationSettings | None
    """What it calibrates on; null for a recipe that needs no tokens."""
    costs_by: Literal["forks", "fisher"]
    """What tells a layer's cost: J of forks, measured, or with --quick the Fisher matrix, which predicts it."""
    container: str
    """How the experts would be stored."""
    options: list[str]
    """What a layer can be; the first is the recipe's own format."""
    data: ChoosingData
    """The tokens that choose. J of the result should be told on others."""
    budget_bytes: int | None
    """The limit for all shards; null with a target."""
    target_j: float | None
    """The limit for J, nats per token; null with a budget."""
    notes: list[str]
    """What of the recipe was left out, and groups that have no scale in the format that was chosen for them."""
    rounding: MixtureRounding | None
    """What else was rounded; null where J is of weights alone."""
    j: JEstimate
    """J of all layers in the first option; with --quick as predicted."""
    sum_alone: NotRequired[JEstimate]
    """Sum over layers of what quantizing only that layer adds; absent with --quick."""
    sum_gains: NotRequired[JEstimate]
    """Sum over layers of what restoring one takes off; absent with --quick."""
    layers: list[SensitivityLayer]
    """Every MoE layer."""
    uniform: list[UniformPoint]
    """Each option everywhere, as predicted."""
    carve_outs: list[CarveOut]
    """Each layer alone in bf16."""
    frontier: list[MixturePoint]
    """The least predicted J at growing sizes."""


class SensitivityFindings(Measurement):
    """What was measured and chosen, which depends on neither clock nor engines."""

    cost: SensitivityCost
    """What the run took."""
    chosen: MeasuredChoice
    """What the written recipe has; predicted with --quick, else measured."""
    tried: list[MeasuredChoice]
    """Every choice that was measured, the chosen one among them; empty with --quick."""


class KeptFindings(SensitivityFindings):
    """The file beside the recipe."""

    made_of: dict[str, str]
    """What another request must differ in: program, source, recipe and config key by key, data, rounding, limit, kind
    of device, and a digest of the recipe that was written."""


class SensitivityDocument(SensitivityFindings):
    """The findings, and what became of them."""

    out: str
    """The recipe that was written."""
    elapsed_s: float
    """Seconds from the beginning of the verb to its end."""
    engines: list[EngineCheck]
    """vLLM and SGLang on what the recipe makes, as far as it does not depend on how they are started."""
