"""`eval-kl`: how far a candidate's predictions are from its bf16 reference, on held-out tokens.

Key idea: both checkpoints are walked side by side, one layer and one chunk of experts at a time, each byte read once.
The noise floor rides along: the reference once more in another batch shape, and once more with 2^-9 relative noise
after every layer; a difference below it says nothing about quantization.

Left out: sampling, caches; every position is scored by prefill. Definition of J: `divergence`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.calibration.tokens import CalibrationRecord, TokenSet
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation.divergence import TokenScores, head_divergence
from mimoquant.evaluation.summary import paired_difference, summarize
from mimoquant.model.decoder_layer import linear, rms_norm
from mimoquant.model.layer_stream import Stream, batch_sequences, walk
from mimoquant.model.layout import ModelLayout, read_layout
from mimoquant.model_weights import CheckpointWeights
from mimoquant.plan import read_config

SCHEMA_VERSION = 1
NOISE = 2.0**-9
FLOOR_SEQUENCES = 16  # how many sequences the noise floor is measured on
WORST = 20


@dataclass
class LayerTrace:
    """How far the candidate's hidden states are from the reference's after one layer."""

    layer: int
    kind: str
    quantized: bool
    relative_error: float
    routing_overlap: float | None


@dataclass
class WorstToken:
    """One of the positions with the largest J: its index among the scored ones, and both models' favourites."""

    index: int
    j: float
    reference_top: list[tuple[int, float]]
    candidate_top: list[tuple[int, float]]


@dataclass
class Comparison:
    """One candidate against the reference: scores of every scored position, and the way there."""

    scores: TokenScores | None = None
    layers: list[LayerTrace] = field(default_factory=list)
    worst: list[WorstToken] = field(default_factory=list)


def open_layout(folder: Path) -> ModelLayout:
    """A checkpoint in any form, published or quantized."""
    index = open_index(folder)
    return read_layout(index, read_config(index), allow_unknown=True, packed=True)


def compare(
    reference: ModelLayout,
    candidates: list[ModelLayout],
    tokens: TokenSet,
    *,
    device: str = "cpu",
    noise_floor: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Comparison], dict[str, float] | None]:
    """Walk reference and candidates over the same tokens.

    Returns one comparison a candidate, and the noise floor: mean J of the reference against itself.
    Raises CheckpointError where a candidate is another model than the reference.
    """
    for candidate in candidates:
        _same_model(reference, candidate)
    place, ids = torch.device(device), torch.from_numpy(tokens.ids)
    readers = [CheckpointReader(layout.index) for layout in (reference, *candidates)]
    try:
        weights = [CheckpointWeights(reader, layout, place)
                   for reader, layout in zip(readers, (reference, *candidates), strict=True)]  # fmt: skip
        batch = batch_sequences(ids.shape[1])
        jobs = [[(ids, batch)] for _ in weights]
        if noise_floor:
            jobs[0] += [(ids[:FLOOR_SEQUENCES], 1), (ids[:FLOOR_SEQUENCES], batch)]
        first, *others = [streams_of(source, job) for source, job in zip(weights, jobs, strict=True)]
        streams = [first[0], *(stream for (stream,) in others), *first[1:]]
        if noise_floor:
            streams[-1].noise = NOISE
        comparisons = [Comparison() for _ in candidates]

        def after_layer(number: int) -> None:
            for comparison, stream, layout in zip(comparisons, streams[1:], candidates, strict=False):
                comparison.layers.append(_trace(number, streams[0], stream, layout))
            if progress:
                progress(number)

        walk(streams, after_layer)
        floor = _score(streams, weights, comparisons, ids)
        return comparisons, floor
    finally:
        for reader in readers:
            reader.close()


def _same_model(reference: ModelLayout, candidate: ModelLayout) -> None:
    ours, theirs = reference.geometry, candidate.geometry
    for key in ("hidden", "layers", "experts", "top_k", "vocab", "expert_intermediate", "sliding", "moe"):
        if getattr(ours, key) != getattr(theirs, key):
            raise CheckpointError(
                f"{candidate.index.folder}: is another model than {reference.index.folder}: "
                f"{key} is {getattr(theirs, key)} against {getattr(ours, key)}"
            )


def streams_of(source: CheckpointWeights, jobs: list[tuple[Tensor, int]]) -> list[Stream]:
    """One stream of embedded tokens for each (ids, sequences a batch); the embedding is read once."""
    embedding = source.tensor("model.embed_tokens.weight")
    return [
        Stream(source, [embedding[part.to(source.device)].to(torch.float32) for part in torch.split(ids, batch)])
        for ids, batch in jobs
    ]


def _trace(number: int, reference: Stream, candidate: Stream, layout: ModelLayout) -> LayerTrace:
    error2 = norm2 = 0.0
    for ours, theirs in zip(reference.batches, candidate.batches, strict=True):
        error2 += float((theirs - ours).square().sum(dtype=torch.float64))
        norm2 += float(ours.square().sum(dtype=torch.float64))
    shared = [(a.experts[:, :, None] == b.experts[:, None, :]).any(-1).double().mean()
              for a, b in zip(reference.routing, candidate.routing, strict=True)]  # fmt: skip
    expert = layout.experts.get((number, 0, "gate"))
    return LayerTrace(
        layer=number,
        kind="sliding" if layout.geometry.sliding[number] else "global",
        quantized=bool(expert and expert.packed),
        relative_error=(error2 / norm2) ** 0.5 if norm2 else 0.0,
        routing_overlap=float(torch.stack(shared).mean()) if shared else None,
    )


@torch.no_grad()
def _score(
    streams: list[Stream], weights: list[CheckpointWeights], comparisons: list[Comparison], ids: Tensor
) -> dict[str, float] | None:
    """Fill in the comparisons' scores; returns the noise floor, if streams for it are there."""
    heads = [source.tensor("lm_head.weight") for source in weights]
    norms = {id(source): source.tensor("model.norm.weight") for source in weights}
    finals = [final_hidden(stream, norms[id(stream.source)]) for stream in streams]
    labels = ids[:, 1:].flatten().to(finals[0].device)
    for number, comparison in enumerate(comparisons, start=1):
        comparison.scores = head_divergence(finals[0], finals[number], heads[0], heads[number], labels)
        comparison.worst = _worst(comparison.scores, finals[0], finals[number], heads[0], heads[number])
    floor = finals[1 + len(comparisons) :]
    if not floor:
        return None
    few = len(floor[0])
    means = [head_divergence(finals[0][:few], other, heads[0], heads[0], labels[:few]).j.mean() for other in floor]
    return {"batch": float(means[0]), "relative_noise": float(means[1])}


def _worst(
    scores: TokenScores, reference: Tensor, candidate: Tensor, reference_head: Tensor, candidate_head: Tensor
) -> list[WorstToken]:
    order = np.argsort(-np.where(scores.finite, scores.j, -1.0), kind="stable")[:WORST]
    rows = torch.from_numpy(order.copy())
    tops = []
    for hidden, head in ((reference, reference_head), (candidate, candidate_head)):
        probabilities = linear(hidden[rows], head).softmax(-1)
        values, ids = probabilities.topk(min(5, len(head)), dim=-1)
        tops.append([list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)])
    return [WorstToken(int(index), float(scores.j[index]), *pair)
            for index, pair in zip(order, zip(*tops, strict=True), strict=True)]  # fmt: skip


def final_hidden(stream: Stream, norm: Tensor) -> Tensor:
    """Normed hidden states of the scored positions (all but each sequence's last), [sequences * (T - 1), H]."""
    return torch.cat(
        [rms_norm(hidden, norm, stream.source.config.eps)[:, :-1].flatten(0, 1) for hidden in stream.batches]
    )


def eval_kl(
    reference: Path | str,
    candidate: Path | str,
    tokens: TokenSet,
    *,
    baseline: Path | str | None = None,
    device: str = "cpu",
    noise_floor: bool = True,
    decode: Callable[[list[int]], str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The facts of one evaluation, as plain data (see `report_page`).

    Args:
        decode: token ids → text, for the worst tokens' contexts; without it they are shown as ids.
        progress: called with (layer just passed, layers).
    Raises CheckpointError: a checkpoint is bad, or the two are not the same model. UsageError: `tokens` are among those
    that a candidate was calibrated on.
    """
    first = open_layout(Path(reference))
    folders = [Path(folder) for folder in (candidate, baseline) if folder is not None]
    others = [open_layout(folder) for folder in folders]
    for folder in folders:
        refuse_shared_data(folder, tokens)
    comparisons, floor = compare(
        first, others, tokens, device=device, noise_floor=noise_floor,
        progress=(lambda number: progress(number, first.geometry.layers)) if progress else None,
    )  # fmt: skip
    scores = comparisons[0].scores
    assert scores is not None
    facts = {
        "schema_version": SCHEMA_VERSION,
        "reference": str(reference),
        "candidate": str(candidate),
        "recipe": _recipe_name(Path(candidate)),
        "activations_quantized": _quantizes_activations(others[0]),
        "data": {"name": tokens.name, "sha256": tokens.sha256, "origins": list(tokens.origins)},
        **summarize(scores, tokens),
        "layers": [asdict(trace) for trace in comparisons[0].layers],
        "noise_floor": floor,
        "worst_tokens": [_worst_facts(worst, tokens, decode) for worst in comparisons[0].worst],
        "baseline": None,
        "device": device,
    }
    if baseline is not None:
        other = comparisons[1].scores
        assert other is not None
        facts["baseline"] = {"candidate": str(baseline), **paired_difference(scores, other, tokens)}
    return facts


def _recipe_name(candidate: Path) -> str | None:
    path = candidate / "recipe.yaml"
    return str(path) if path.is_file() else None


def _quantizes_activations(layout: ModelLayout) -> bool:
    """Whether the candidate's config has activations quantized too, which a J of the weights says nothing about."""
    groups = (layout.config.get("quantization_config") or {}).get("config_groups")
    held = groups.values() if isinstance(groups, dict) else ()
    return any(isinstance(group, dict) and bool(group.get("input_activations")) for group in held)


def refuse_shared_data(candidate: Path, tokens: TokenSet) -> None:
    """Raise UsageError where the candidate was calibrated on a sequence, or from a file, that `tokens` has too.

    The recipe beside the candidate says what that was (`calibration.tokens.CalibrationRecord`). One by another tool
    says nothing, and nothing is refused then.
    """
    path = candidate / "recipe.yaml"
    record = CalibrationRecord.read(path) if path.is_file() else None
    if record is None:
        return
    sequences, files = record.shared_with(tokens)
    if sequences or files:
        what = f"{sequences} of {len(tokens.ids)} sequences" if sequences else f"the file {files[0]}"
        raise UsageError(
            f"--data {tokens.name}: shares {what} with what {candidate} was calibrated on ({record.name})",
            hint="a model looks better on what it was calibrated on; give held-out data, such as heldout-v1",
        )


def _worst_facts(worst: WorstToken, tokens: TokenSet, decode: Callable[[list[int]], str] | None) -> dict[str, Any]:
    text = decode or (lambda ids: " ".join(str(i) for i in ids))
    sequence, position = divmod(worst.index, tokens.ids.shape[1] - 1)
    ids = tokens.ids[sequence].tolist()

    def one(token: int) -> str:
        shown = text([token])
        return f"<{token}>" if "\ufffd" in shown else shown  # a part of a character has no text

    def named(top: list[tuple[int, float]]) -> list[list[Any]]:
        return [[one(token), probability] for token, probability in top]

    return {
        "sequence": sequence,
        "position": position,
        "domain": tokens.domains[sequence],
        "j": worst.j,
        "context": text(ids[max(0, position - 23) : position + 1]).strip("\ufffd"),
        "token": one(ids[position + 1]),
        "reference_top5": named(worst.reference_top),
        "candidate_top5": named(worst.candidate_top),
    }
