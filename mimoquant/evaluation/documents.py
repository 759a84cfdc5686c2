"""What `eval-kl` and `eval-draft` say, field by field: what `--json` prints and the Python functions return.

J = (KL(p‖q) + KL(q‖p)) / 2 in nats per token, p the reference, q the candidate, over the full vocabulary at temperature
1 (defined in `divergence`). Intervals are of 95 %, by a bootstrap over whole sequences;
from -inf to inf, in JSON from -1e999 to 1e999, of fewer than 5 sequences. Positions where logits are not
finite count in `nonfinite_share` and nowhere else. Shares are of 1. Acceptance is defined in `eval_draft`.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from mimoquant.evaluation.rounding_documents import Rounded, RoundingFacts


class DataFacts(TypedDict):
    """The held-out tokens."""

    name: str
    """Of the sets or files, joined by "+"."""
    sha256: str
    """Of all ids, as little-endian int64."""
    origins: list[str]
    """Each file with its sha256, and the tokenizer."""
    shared_with_calibration: float | None
    """Share of its text that the candidate was calibrated on, below .01; null where nothing says on what that was."""


class JFacts(TypedDict):
    """J over all scored positions, nats per token."""

    mean: float
    """What is called J wherever one number is said."""
    low: float
    """Lower end of the mean's interval."""
    high: float
    """Upper end of the mean's interval."""
    max: float
    """Of the worst position."""
    median: float
    """Half of the positions have less."""
    p90: float
    """90 % of the positions have less."""
    p99: float
    """99 % of the positions have less."""
    p99_9: float
    """99.9 % of the positions have less."""


class Top1(TypedDict):
    """How often both have the same most likely token."""

    all: float
    """Share of all positions."""
    confident: float | None
    """Share of the positions where the reference is sure (above .9); null where it nowhere is."""
    confident_share: float
    """Share of the positions where it is."""


class Perplexity(TypedDict):
    """exp of the mean loss of the text's own tokens."""

    reference: float
    """Of the reference."""
    candidate: float
    """Of the candidate."""
    ratio: float
    """Candidate's over reference's."""


class ConfidencePart(TypedDict):
    """Positions where the reference's largest probability is in a range."""

    low: float
    """Above this probability."""
    high: float
    """Up to this one."""
    tokens: int
    """Positions."""
    j: float
    """Their mean J, nats per token."""


class Part(TypedDict):
    """Some of the positions."""

    tokens: int
    """Positions."""
    sequences: int
    """Sequences that have any."""
    j: float
    """Their mean J, nats per token."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    top1: float
    """Share of the positions where both have the same most likely token."""


class DomainPart(Part):
    """Positions of one domain of the data."""

    domain: str
    """Its name."""


class ContextPart(Part):
    """Positions by what the token that they predict follows."""

    context: str
    """text alone; right after (within 16 tokens), or later after, an image or a sound: the last one before it."""


class PositionPart(TypedDict):
    """Positions of a part of every sequence."""

    begin: int
    """First position, from 0."""
    end: int
    """The first one that does not belong to it."""
    tokens: int
    """Positions."""
    j: float
    """Their mean J, nats per token."""


class Histogram(TypedDict):
    """How many positions have how much J."""

    edges: list[float]
    """Edges of the bins, nats, evenly spaced in log10; the outer bins take what lies beyond."""
    counts: list[int]
    """Positions of each bin, one fewer than edges."""


class LayerPart(TypedDict):
    """How far the candidate's hidden states are from the reference's after one decoder layer."""

    layer: int
    """From 0."""
    kind: str
    """Of its attention: global or sliding."""
    quantized: bool
    """Whether the candidate's experts are in 4 bits there."""
    relative_error: float
    """Norm of the difference over the norm of the reference's states."""
    routing_overlap: float | None
    """Share of the reference's expert choices that the candidate makes too; null for a layer without experts."""


class WorstToken(TypedDict):
    """A position with one of the largest J."""

    sequence: int
    """From 0."""
    position: int
    """In the sequence, from 0: of the last token of the context."""
    domain: str
    """Of the sequence."""
    j: float
    """Nats."""
    context: str
    """The last 24 tokens up to here, as text; as ids where there is no tokenizer."""
    token: str
    """What follows in the text."""
    reference_top5: list[tuple[str, float]]
    """What the reference expects: token and probability, the most likely first."""
    candidate_top5: list[tuple[str, float]]
    """What the candidate expects."""


class Difference(TypedDict):
    """Another candidate on the same positions."""

    j: float
    """Its mean J, nats per token."""
    difference: float
    """The candidate's J minus this one's: below 0 the candidate is better."""
    low: float
    """Lower end of the difference's interval."""
    high: float
    """Upper end of the difference's interval."""


class BaselineFacts(Difference):
    """The same, and which one it is."""

    candidate: str
    """Its folder."""


class NoiseFloor(TypedDict):
    """J of the reference against itself, nats per token: a J below it says nothing about quantization."""

    batch: float
    """In another batch shape."""
    relative_noise: float
    """With relative noise of 2^-9, bf16's rounding, after every layer."""


class TailMass(TypedDict):
    """Mean probability of the ids that a server was not asked for."""

    reference: float
    """By the reference."""
    server: float
    """By the server."""


class ServerFacts(TypedDict):
    """A server as the candidate: what it was asked, and what the numbers are bounds of."""

    engine: str
    """vllm or sglang."""
    version: str | None
    """Of the engine; null where it does not say."""
    model: str
    """The server's name for it."""
    mode: str
    """How it was asked: reference-ids, whole-vocabulary or server-top."""
    meaning: str
    """The same in words."""
    vocab: int
    """Size of the vocabulary."""
    top_k: int
    """The reference's most likely ids that were asked for at a position."""
    ids_scored: float
    """How many of them the server scored, on average."""
    is_lower_bound: bool
    """Whether J and both KL are lower bounds; false where every id was scored."""
    tail_mass: TailMass
    """What lies in the ids that were lumped."""
    j_estimate: float
    """J if the lumped ids differ among themselves as the less likely half of the scored ones do; no bound."""
    j_ceiling_if_tail_is_like_the_rest: float
    """J at most, if none of the lumped ids has a p/q beyond those seen; no bound either."""


class Scores(TypedDict):
    """What all scored positions come to."""

    tokens: int
    """Scored positions whose logits are finite."""
    sequences: int
    """Sequences."""
    sequence_tokens: int
    """Tokens per sequence; all but the last are scored."""
    j: JFacts
    """Symmetric KL."""
    kl_forward: float
    """KL(p‖q), reference to candidate, nats per token."""
    kl_reverse: float
    """KL(q‖p), candidate to reference, nats per token."""
    symmetric_sum: float
    """Sum of both, twice J."""
    top1: Top1
    """Agreement of the most likely tokens."""
    perplexity: Perplexity
    """On the text's own tokens."""
    nonfinite_share: float
    """Share of positions whose logits are not finite, on either side."""
    by_confidence: list[ConfidencePart]
    """By what the reference is sure of; ranges without positions are left out."""
    by_domain: list[DomainPart]
    """By domain of the data, in the order of their names."""
    by_context: NotRequired[list[ContextPart]]
    """By whether an image or a sound comes before; absent of data without any."""
    by_position: list[PositionPart]
    """By the place in the sequence, in eight parts."""
    histogram: Histogram
    """Of J per position."""


class Evaluation(Scores):
    """What an evaluation says of any candidate."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    reference: str
    """The reference's folder."""
    reference_stored: str
    """What its experts and attention are stored in: "bf16", "FP8", or "MXFP4 experts, FP8 attention, as released"."""
    candidate: str
    """The candidate's folder, or the server's address."""
    recipe: str | None
    """The recipe.yaml beside the candidate; null without one."""
    left_out: list[str]
    """What the candidate's config quantizes beside weights, in words, and this evaluation did not; empty for a server,
    whose answers have it in them."""
    data: DataFacts
    """The held-out tokens."""
    layers: list[LayerPart]
    """Every decoder layer; empty for a server, which shows no hidden states."""
    worst_tokens: list[WorstToken]
    """The 20 positions with the largest J; empty for a server."""
    baseline: BaselineFacts | None
    """Another candidate on the same tokens; null without --baseline."""
    noise_floor: NoiseFloor | None
    """What the reference differs from itself; null where that was not measured."""
    device: str
    """cpu or cuda: what computed."""


class FolderEvaluation(Evaluation):
    """Of a candidate folder; depends on neither clock nor limit."""

    activations_quantized: bool
    """Whether the candidate's config quantizes activations too."""
    rounding: RoundingFacts | None
    """What else was rounded; null where J is of weights alone."""


class KeptEvaluation(FolderEvaluation):
    """What `eval-kl --out` writes."""

    made_of: dict[str, str]
    """What `--resume` holds a new request against: version, digests of headers, config and files of each checkpoint,
    tokens, noise floor, rounding, kind of device."""


class ServerEvaluation(Evaluation):
    """Of a running server."""

    server: ServerFacts
    """What it was asked, and what the numbers are bounds of."""


class EvalKlDocument(Evaluation):
    """An evaluation, held against a limit."""

    max_kl: float | None
    """The limit for J, nats per token; null without --max-kl."""
    passed: bool | None
    """Whether J is at most the limit and every position finite; null without a limit."""
    elapsed_s: float
    """Seconds from the beginning of the verb to its end."""
    peak_rss_bytes: int
    """Host memory of the process at its peak."""


class EvalFolderDocument(FolderEvaluation, EvalKlDocument):
    """What `eval-kl` says of a candidate folder."""


class EvalServerDocument(ServerEvaluation, EvalKlDocument):
    """What `eval-kl --server` says."""


# --- eval-draft -------------------------------------------------------------------------------------------------------


class MeanInterval(TypedDict):
    """A mean and its interval."""

    mean: float
    """Over all starts."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""


class Paired(TypedDict):
    """The same figure of both backbones."""

    reference: MeanInterval
    """With the reference as the backbone."""
    candidate: MeanInterval
    """With the candidate as the backbone."""
    difference: MeanInterval
    """Candidate's minus reference's, start by start."""


class DepthPart(TypedDict):
    """Guesses at one depth."""

    depth: int
    """From 1: how many tokens ahead of what the backbone itself predicts."""
    acceptance: Paired
    """What speculative sampling accepts, a share."""
    greedy_match: Paired
    """What is accepted at temperature 0, a share."""


class AcceptedLength(TypedDict):
    """Guesses that are accepted in a row, on average: tokens, the backbone's own not counted."""

    sampling: Paired
    """By speculative sampling at temperature 1."""
    greedy: Paired
    """At temperature 0."""


class DraftFigures(TypedDict):
    """What some of the starts come to."""

    sequences: int
    """Sequences among them."""
    starts: int
    """Positions from which guesses were made."""
    depths: list[DepthPart]
    """By depth, from 1."""
    accepted_length: AcceptedLength
    """Of a chain or block of that depth."""


class DraftDomainPart(DraftFigures):
    """The starts of one domain of the data."""

    domain: str
    """Its name."""


class DraftSummary(DraftFigures):
    """All starts."""

    depth: int
    """Tokens that are drafted at once."""
    sequence_tokens: int
    """Tokens per sequence."""
    nonfinite_share: float
    """Share of starts where logits are not finite, on either side."""
    by_domain: list[DraftDomainPart]
    """By domain of the data, in the order of their names."""


class DraftEvaluation(DraftSummary):
    """What a draft model is worth on both backbones."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    reference: str
    """The reference's folder."""
    reference_stored: str
    """What its experts and attention are stored in."""
    candidate: str
    """The candidate's folder."""
    recipe: str | None
    """The recipe.yaml beside the candidate; null without one."""
    draft: str
    """Each checkpoint's own MTP layers, mtp in a chain or mtp-backbone each on the backbone's hidden states, or the
    folder of a DFlash drafter."""
    rounding: Rounded | None
    """What of the backbones was rounded beside weights; null where nothing was. Draft models are not rounded."""
    data: DataFacts
    """The held-out tokens."""
    device: str
    """cpu or cuda: what computed."""


class EvalDraftDocument(DraftEvaluation):
    """The same, and what it took."""

    elapsed_s: float
    """Seconds from the beginning of the verb to its end."""
    peak_rss_bytes: int
    """Host memory of the process at its peak."""
