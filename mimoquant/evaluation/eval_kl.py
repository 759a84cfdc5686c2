"""`eval-kl`: how far a candidate's predictions are from its bf16 reference, on held-out tokens.

Key idea: both checkpoints are walked side by side, one layer and one chunk of experts at a time, each byte read once.
The noise floor rides along: the reference once more in another batch shape, and once more with 2^-9 relative noise
after every layer; a difference below it says nothing about quantization.

Sequences go in portions that depend on the data alone (`layer_stream.portions`); several ranks take some each, walk by
themselves, and put their scores together at the end, so the numbers are those of one process.

An evaluation that writes a file can be taken up after a kill: hidden states are kept after each layer (`snapshots`).

Left out: sampling, caches; every position is scored by prefill. Definition of J: `divergence`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.__version__ import SCHEMA_VERSION, __version__
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.divergence import TokenScores, head_divergence
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.evaluation.summary import paired_difference, summarize
from mimoquant.machine.team import Team
from mimoquant.model.config_keys import text_keys
from mimoquant.model.decoder_layer import linear, rms_norm
from mimoquant.model.layer_stream import Stream, portions, walk
from mimoquant.model.layout import ModelLayout, read_layout
from mimoquant.planning.plan import read_config
from mimoquant.weights.decoded import CheckpointWeights

NOISE = 2.0**-9
FLOOR_SEQUENCES = 16  # how many sequences of the first portion the noise floor is measured on
WORST = 20
_WALK = "evaluation"  # the name of its snapshots


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


@dataclass
class Part:
    """The same of one portion. `traces`: of each layer (squared error, squared norm, sum of overlaps, blocks)."""

    traces: list[tuple[float, float, float, int]] = field(default_factory=list)
    scores: TokenScores | None = None
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
    team: Team | None = None,
    snapshots: Snapshots | None = None,
) -> tuple[list[Comparison], dict[str, float] | None]:
    """Walk reference and candidates over the same tokens, from where the `snapshots` of a killed walk end.

    Returns one comparison a candidate, and the noise floor: mean J of the reference against itself; the same on every
    rank of `team`. The candidates are of one model with the reference (`same_model`).
    """
    team = team or Team(device)
    place, ids = torch.device(team.device), torch.from_numpy(tokens.ids)
    readers = [CheckpointReader(layout.index) for layout in (reference, *candidates)]
    try:
        weights = [
            CheckpointWeights(reader, layout, place)
            for reader, layout in zip(readers, (reference, *candidates), strict=True)
        ]
        every = portions(ids)
        mine = every[team.rank :: team.size]
        floor = torch.cat(every[0])[:FLOOR_SEQUENCES] if noise_floor and team.leads else None
        parts, means = _walk(weights, mine, floor, progress, snapshots)
        return _joined(candidates, team, parts, len(every)), team.gather(means)[0]
    finally:
        for reader in readers:
            reader.close()


def _walk(
    weights: list[CheckpointWeights],
    mine: list[list[Tensor]],
    floor: Tensor | None,
    progress: Callable[[int], None] | None,
    snapshots: Snapshots | None,
) -> tuple[list[list[Part]], dict[str, float] | None]:
    """Walk this rank's portions. Returns parts[candidate][portion], and the noise floor on the sequences `floor`."""
    jobs = [list(mine) for _ in weights]
    if floor is not None:
        jobs[0] += [list(torch.split(floor, 1)), *portions(floor)[:1]]
    held = [streams_of(source, job) for source, job in zip(weights, jobs, strict=True)]
    extra = held[0][len(mine) :]
    if extra:
        extra[-1].noise = NOISE
    streams = [of_source[: len(mine)] for of_source in held]
    parts = [[Part() for _ in mine] for _ in weights[1:]]
    layers = weights[0].layers
    begun = snapshots.load(_WALK, layers) if snapshots else None
    first = _taken_up(held, parts, *begun) if begun else 0

    def after_layer(number: int) -> None:
        for of_candidate, theirs in zip(parts, streams[1:], strict=True):
            for part, ours, stream in zip(of_candidate, streams[0], theirs, strict=True):
                part.traces.append(_trace(ours, stream))
        if snapshots:
            traces = [[part.traces for part in of_candidate] for of_candidate in parts]
            snapshots.save(_WALK, number, _states(held), traces)
        if progress:
            progress(number)

    if mine:
        walk([stream for of_source in held for stream in of_source], after_layer, first=first)
    elif snapshots:  # ranks keep what they have together, also one that has nothing
        for number in range(first, layers):
            after_layer(number)
    return parts, _score(streams, extra, weights, parts, mine)


def _states(held: list[list[Stream]]) -> dict[str, Tensor]:
    """Hidden states by numbers: of the checkpoint, of its stream, of the batch."""
    return {
        f"{source} {job} {batch}": hidden
        for source, streams in enumerate(held)
        for job, stream in enumerate(streams)
        for batch, hidden in enumerate(stream.batches)
    }


def _taken_up(
    held: list[list[Stream]], parts: list[list[Part]], layers: int, states: dict[str, Tensor], traces: Any
) -> int:
    """Put streams and parts where they were after `layers` layers."""
    for key, hidden in states.items():
        source, job, batch = map(int, key.split())
        held[source][job].put(batch, hidden.to(held[source][job].source.device))
    for of_candidate, told in zip(parts, traces, strict=True):
        for part, of_part in zip(of_candidate, told, strict=True):
            part.traces = of_part
    return layers


def _joined(candidates: list[ModelLayout], team: Team, parts: list[list[Part]], count: int) -> list[Comparison]:
    """All ranks' portions, in the order of the sequences, as one comparison a candidate."""
    out = []
    for layout, mine in zip(candidates, parts, strict=True):
        told = team.gather([(part.traces, [asdict(worst) for worst in part.worst]) for part in mine])
        all_scores, traces, worst, begin = [], [], [], 0
        for number in range(count):
            owner, place = number % team.size, number // team.size
            scores = mine[place].scores if owner == team.rank else None
            arrays = (
                {f.name: torch.from_numpy(getattr(scores, f.name)) for f in fields(TokenScores)} if scores else None
            )
            shared = team.share(arrays, owner, "cpu")
            all_scores.append(TokenScores(**{name: values.numpy() for name, values in shared.items()}))
            traces.append(told[owner][place][0])
            worst += [WorstToken(**{**facts, "index": facts["index"] + begin}) for facts in told[owner][place][1]]
            begin += len(all_scores[-1].j)
        worst.sort(key=lambda one: -one.j if math.isfinite(one.j) else 1.0)
        layers = [_layer_trace(layout, number, of_layer) for number, of_layer in enumerate(zip(*traces, strict=True))]
        out.append(Comparison(TokenScores.joined(all_scores), layers, worst[:WORST]))
    return out


def same_model(reference: ModelLayout, candidate: ModelLayout) -> None:
    """Raise CheckpointError where the candidate's sizes are not the reference's."""
    ours, theirs = reference.geometry, candidate.geometry
    for key in ("hidden", "layers", "experts", "top_k", "vocab", "expert_intermediate", "sliding", "moe"):
        if getattr(ours, key) != getattr(theirs, key):
            raise CheckpointError(
                f"{candidate.index.folder}: is another model than {reference.index.folder}: "
                f"{key} is {getattr(theirs, key)} against {getattr(ours, key)}"
            )


def streams_of(source: CheckpointWeights, jobs: Sequence[Sequence[Tensor]]) -> list[Stream]:
    """One stream of embedded tokens for each list of batches of ids; the embedding is read once."""
    embedding = source.tensor("model.embed_tokens.weight")
    return [Stream(source, [embedding[ids.to(source.device)].to(torch.float32) for ids in job]) for job in jobs]


def _trace(reference: Stream, candidate: Stream) -> tuple[float, float, float, int]:
    """See `Part`."""
    error2 = norm2 = 0.0
    for ours, theirs in zip(reference.batches, candidate.batches, strict=True):
        error2 += float((theirs - ours).square().sum(dtype=torch.float64))
        norm2 += float(ours.square().sum(dtype=torch.float64))
    shared = [
        float((a.experts[:, :, None] == b.experts[:, None, :]).any(-1).double().sum())
        for a, b in zip(reference.routing, candidate.routing, strict=True)
    ]
    return error2, norm2, sum(shared), sum(routing.experts.numel() for routing in reference.routing)


def _layer_trace(layout: ModelLayout, number: int, parts: Sequence[tuple[float, float, float, int]]) -> LayerTrace:
    error2, norm2, shared, choices = (sum(values) for values in zip(*parts, strict=True))
    expert = layout.experts.get((number, 0, "gate"))
    return LayerTrace(
        layer=number,
        kind="sliding" if layout.geometry.sliding[number] else "global",
        quantized=bool(expert and expert.packed),
        relative_error=(error2 / norm2) ** 0.5 if norm2 else 0.0,
        routing_overlap=shared / choices if choices else None,
    )


@torch.no_grad()
def _score(
    streams: list[list[Stream]],
    extra: list[Stream],
    weights: list[CheckpointWeights],
    parts: list[list[Part]],
    mine: list[list[Tensor]],
) -> dict[str, float] | None:
    """Fill in the parts' scores; returns the noise floor, if streams for it are there."""
    heads = [source.tensor("lm_head.weight") for source in weights]
    norms = [source.tensor("model.norm.weight") for source in weights]
    floor = None
    for place, batches in enumerate(mine):
        finals = [final_hidden(of_source[place], norm) for of_source, norm in zip(streams, norms, strict=True)]
        labels = torch.cat(batches)[:, 1:].flatten().to(finals[0].device)
        for of_candidate, final, head in zip(parts, finals[1:], heads[1:], strict=True):
            scores = head_divergence(finals[0], final, heads[0], head, labels)
            of_candidate[place].scores = scores
            of_candidate[place].worst = _worst(scores, finals[0], final, heads[0], head)
        if extra and place == 0:
            others = [final_hidden(stream, norms[0]) for stream in extra]
            few = len(others[0])
            means = [
                float(head_divergence(finals[0][:few], other, heads[0], heads[0], labels[:few]).j.mean())
                for other in others
            ]
            floor = {"batch": means[0], "relative_noise": means[1]}
    return floor


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
    return [
        WorstToken(int(index), float(scores.j[index]), *pair)
        for index, pair in zip(order, zip(*tops, strict=True), strict=True)
    ]


def final_hidden(stream: Stream, norm: Tensor) -> Tensor:
    """Normed hidden states of the scored positions (all but each sequence's last), [sequences * (T - 1), H]."""
    normed = (rms_norm(hidden.to(norm.device), norm, stream.source.config.eps) for hidden in stream.batches)
    return torch.cat([states[:, :-1].flatten(0, 1) for states in normed])


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
    team: Team | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """The facts of one evaluation, as plain data (see `report_page`).

    Args:
        decode: token ids → text, for the worst tokens' contexts; without it they are shown as ids.
        progress: called with (layer just passed, layers).
        team: the processes that share the evaluation, all of which call this; `device` is then the team's.
        out: a file to write the facts to, as JSON. Beside it hidden states are kept, twice `kept_bytes`.
        resume: take up what a killed evaluation left beside `out`.
    Raises CheckpointError: a checkpoint is bad, or the two are not the same model. UsageError: `tokens` are among those
    that a candidate was calibrated on; `out` is there, or an evaluation of something else beside it. StoppedError: disk
    trouble, resumable.
    """
    team = team or Team(device)
    layouts = {"reference": open_layout(Path(reference)), "candidate": open_layout(Path(candidate))}
    if baseline is not None:
        layouts["baseline"] = open_layout(Path(baseline))
    first, *others = layouts.values()
    for layout in others:
        same_model(first, layout)
        refuse_shared_data(layout.index.folder, tokens)
    identity = _identity(layouts, tokens, noise_floor, team)
    kept = contextlib.nullcontext() if out is None else Snapshots.beside(out, identity, resume=resume, team=team)
    with kept as snapshots:
        comparisons, floor = compare(
            first,
            others,
            tokens,
            noise_floor=noise_floor,
            team=team,
            snapshots=snapshots,
            progress=(lambda number: progress(number, first.geometry.layers)) if progress else None,
        )
        named = (reference, candidate, baseline)
        facts = _facts(named, others, tokens, comparisons, decode) | {"noise_floor": floor, "device": device}
        if snapshots:
            snapshots.finish(json.dumps(facts, indent=2) + "\n")
    return facts


def _identity(layouts: dict[str, ModelLayout], tokens: TokenSet, noise_floor: bool, team: Team) -> dict[str, Any]:
    """What an evaluation that is taken up must share with the one that began. Other ranks may read copies of the
    checkpoints with times of their own."""
    identity: dict[str, Any] = {"version": __version__, "baseline": None}
    for name, layout in layouts.items():
        identity[name] = {"headers": layout.index.headers_fingerprint(), "config": layout.config}
        if team.leads:
            identity[f"{name} files"] = layout.index.stamps()
    return identity | {
        "tokens a sequence": str(tokens.ids.shape[1]),
        "tokens": tokens.sha256,
        "noise floor": str(noise_floor),
        "kind of device": team.device.partition(":")[0],
        "processes": str(team.size),
    }


def kept_bytes(layout: ModelLayout, tokens: TokenSet, checkpoints: int, noise_floor: bool) -> int:
    """Hidden states of all tokens in that many checkpoints: what is kept after each layer."""
    count, length = tokens.ids.shape
    of_floor = 2 * min(FLOOR_SEQUENCES, count) if noise_floor else 0
    return int(4 * layout.geometry.hidden * length * (count * checkpoints + of_floor))


def _facts(
    named: tuple[Path | str, Path | str, Path | str | None],
    others: list[ModelLayout],
    tokens: TokenSet,
    comparisons: list[Comparison],
    decode: Callable[[list[int]], str] | None,
) -> dict[str, Any]:
    """Of the `named` reference, candidate and baseline; `others`: the layouts of the last two."""
    reference, candidate, baseline = named
    scores = comparisons[0].scores
    assert scores is not None
    facts = {
        "schema_version": SCHEMA_VERSION,
        "reference": str(reference),
        "candidate": str(candidate),
        "recipe": recipe_name(Path(candidate)),
        "activations_quantized": _quantizes_activations(others[0]),
        "data": {"name": tokens.name, "sha256": tokens.sha256, "origins": list(tokens.origins)},
        **summarize(scores, tokens),
        "layers": [asdict(trace) for trace in comparisons[0].layers],
        "worst_tokens": [_worst_facts(worst, tokens, decode) for worst in comparisons[0].worst],
        "baseline": None,
    }
    if baseline is not None:
        other = comparisons[1].scores
        assert other is not None
        facts["baseline"] = {"candidate": str(baseline), **paired_difference(scores, other, tokens)}
    return facts


def recipe_name(candidate: Path) -> str | None:
    """The recipe beside a checkpoint, if there is one."""
    path = candidate / "recipe.yaml"
    return str(path) if path.is_file() else None


_MODELOPT_BOTH = {"NVFP4", "MXFP8"}  # of its names for formats, those that quantize activations too


def _quantizes_activations(layout: ModelLayout) -> bool:
    """Whether the candidate's config has activations quantized too, which a J of the weights says nothing about."""
    quantization = text_keys(layout.config, "config.json").get("quantization_config") or {}
    groups, layers = quantization.get("config_groups"), quantization.get("quantized_layers")
    held = groups.values() if isinstance(groups, dict) else ()
    named = layers.values() if isinstance(layers, dict) else ()
    algos = {entry.get("quant_algo") for entry in (quantization, *named) if isinstance(entry, dict)}
    return bool(algos & _MODELOPT_BOTH) or any(isinstance(g, dict) and bool(g.get("input_activations")) for g in held)


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
