"""`eval-kl`: how far a candidate's predictions are from its reference, on held-out tokens.

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
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mimoquant.__version__ import __version__
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import named
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.divergence import TokenScores
from mimoquant.evaluation.documents import FolderEvaluation, NoiseFloor
from mimoquant.evaluation.facts import Compared, evaluation_of
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.evaluation.kept_result import finished_result, made_of, result_text
from mimoquant.evaluation.side_by_side import WORST, SideBySide, WorstToken
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.machine.team import Team
from mimoquant.model.layer_stream import portions, walk
from mimoquant.model.layout import ModelLayout, read_layout
from mimoquant.model.releases import stored_as
from mimoquant.planning.plan import read_config
from mimoquant.weights.decoded import CheckpointWeights

FLOOR_SEQUENCES = 16  # how many sequences of the first portion the noise floor is measured on
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
    team: Team | None = None,
    snapshots: Snapshots | None = None,
) -> tuple[list[Comparison], NoiseFloor | None]:
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
        both = SideBySide(weights, mine, floor)
        means = _walk(both, progress, snapshots)
        return _joined(candidates, team, both, len(every)), team.gather(means)[0]
    finally:
        for reader in readers:
            reader.close()


def _walk(both: SideBySide, progress: Callable[[int], None] | None, snapshots: Snapshots | None) -> NoiseFloor | None:
    """Walk this rank's portions to their scores. Returns the noise floor, on the rank that measures it."""
    layers, first = both.weights[0].layers, 0
    begun = snapshots.load(_WALK, layers) if snapshots else None
    if begun:
        first, *kept = begun
        both.take_up(*kept)

    def after_layer(number: int) -> None:
        both.passed()
        if snapshots:
            snapshots.save(_WALK, number, *both.snapshot())
        if progress:
            progress(number)

    if both.portions:
        walk(both.streams, after_layer, first=first)
    elif snapshots:  # ranks keep what they have together, also one that has nothing
        for number in range(first, layers):
            after_layer(number)
    return both.score()


def _joined(candidates: list[ModelLayout], team: Team, both: SideBySide, count: int) -> list[Comparison]:
    """All ranks' portions, in the order of the sequences, as one comparison a candidate."""
    out = []
    for candidate, layout in enumerate(candidates):
        mine = both.parts(candidate)
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


@dataclass(frozen=True)
class EvaluationFile:
    """A file that the evaluation goes to. Beside it hidden states are kept, twice `kept_bytes`.

    `resume`: take up what a killed evaluation left beside it; where the file is finished and of the same request there
    is nothing to do, and `note` is told so, in a sentence.
    """

    path: Path
    resume: bool = False
    note: Callable[[str], None] | None = None


def eval_kl(
    reference: Path | str,
    candidate: Path | str,
    tokens: TokenSet,
    *,
    baseline: Path | str | None = None,
    noise_floor: bool = True,
    progress: Callable[[int, int], None] | None = None,
    team: Team | None = None,
    file: EvaluationFile | None = None,
) -> FolderEvaluation:
    """One evaluation.

    Args:
        progress: called with (layer just passed, layers).
        team: the processes that share the evaluation, all of which call this.
        file: what to write it to, as JSON; it can be taken up after a kill then.
    Raises CheckpointError: a checkpoint is bad, or the two are not the same model. UsageError: `tokens` are among those
    that a candidate was calibrated on; `file` is there, or an evaluation of something else beside it. StoppedError:
    disk trouble, resumable.
    """
    team = team or Team()
    layouts = {"reference": open_layout(Path(reference)), "candidate": open_layout(Path(candidate))}
    if baseline is not None:
        layouts["baseline"] = open_layout(Path(baseline))
    first, *others = layouts.values()
    for layout in others:
        same_model(first, layout)
    shared, *_ = [refuse_shared_data(layout.index.folder, tokens) for layout in others]
    identity = _identity(layouts, tokens, noise_floor, team)
    if file and file.resume and (finished := _finished(file, identity, team)) is not None:
        return {**finished, "reference": named(reference), "candidate": named(candidate)}
    kept = Snapshots.beside(file.path, identity, resume=file.resume, team=team) if file else contextlib.nullcontext()
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
        compared = Compared(
            str(reference), stored_as(first), str(candidate), None if baseline is None else str(baseline)
        )
        device = team.device if team.size == 1 else team.device.partition(":")[0]
        evaluation = evaluation_of(compared, others[0], tokens, comparisons, floor, device, shared)
        if snapshots:
            text = result_text(evaluation, made_of(identity)) if team.leads else ""  # the first rank writes it
            snapshots.finish(text)
    return evaluation


def _finished(file: EvaluationFile, identity: dict[str, Any], team: Team) -> FolderEvaluation | None:
    """What the file has already, on every rank."""
    told = finished_result(file.path, made_of(identity)) if team.leads else None
    kept: FolderEvaluation | None = team.gather(told)[0]
    if kept is not None and file.note:
        file.note(f"{file.path}: is finished already, of the same checkpoints and tokens; nothing is left to do")
    return kept


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
