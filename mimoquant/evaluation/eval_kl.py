"""`eval-kl`: how far a candidate's predictions are from its reference, on held-out tokens.

Key idea: both checkpoints are walked side by side, one layer and one chunk of experts at a time, each byte read once.
The noise floor rides along: the reference once more in another batch shape, and once more with 2^-9 relative noise
after every layer; a difference below it says nothing about quantization.

Sequences go in portions that depend on the data alone (`layer_stream.portions`); several ranks take some each, walk by
themselves, and put their scores together at the end, so the numbers are those of one process.

A checkpoint may be measured as it is served, activations and cache rounded too (`AsServed`). Then some of the tokens
are walked once more, to tell what of J is due to weights and what to activations.

An evaluation that writes a file can be taken up after a kill: hidden states are kept after each layer (`snapshots`).

Left out: sampling, caches; every position is scored by prefill. Definition of J: `divergence`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from mimoquant.__version__ import __version__
from mimoquant.calibration.tokens import TokenSet, check_media
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import named
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.divergence import TokenScores
from mimoquant.evaluation.documents import FolderEvaluation, NoiseFloor
from mimoquant.evaluation.facts import Compared, evaluation_of, rounding_facts
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.evaluation.kept_result import finished_result, made_of, result_text
from mimoquant.evaluation.not_finite import first_of
from mimoquant.evaluation.side_by_side import (
    CAUSES_EVERY,
    WORST,
    Cause,
    Side,
    SideBySide,
    WorstToken,
    batches_of_causes,
)
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.machine.team import Team
from mimoquant.model.layer_stream import batch_sequences, portions, walk
from mimoquant.model.layout import ModelLayout, read_layout
from mimoquant.model.releases import stored_as
from mimoquant.model.rounding import has_input_scales
from mimoquant.model.served_rounding import NOTHING, Rounding, Roundings
from mimoquant.planning.settings_beside import read_config
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.layer_rounding import layer_roundings

CAUSES = ("weights", "activations", "both")  # of the candidate alone; of the reference alone; what J is of
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
    not_finite: tuple[int | None, int | None] = (None, None)  # first layer of the reference, of the candidate


@dataclass(frozen=True)
class AsServed:
    """A checkpoint as kernels compute with it: what is rounded beside its weights, and how that is known, in words."""

    folder: Path | str
    rounding: Rounding = NOTHING
    known: tuple[str, ...] = ()

    @staticmethod
    def of(checkpoint: Path | str | AsServed) -> AsServed:
        return checkpoint if isinstance(checkpoint, AsServed) else AsServed(checkpoint)


def open_layout(folder: Path) -> ModelLayout:
    """A checkpoint in any form, published or quantized."""
    index = open_index(folder)
    return read_layout(index, read_config(index), allow_unknown=True, packed=True)


@dataclass
class Walked:
    """All that came of a walk: a comparison of each candidate, mean J of the reference against itself, and the scores
    of each cause, over the batches that they were measured on."""

    comparisons: list[Comparison]
    floor: NoiseFloor | None
    causes: dict[str, TokenScores] = field(default_factory=dict)


def compare(
    reference: ModelLayout,
    candidates: list[ModelLayout],
    tokens: TokenSet,
    *,
    roundings: Sequence[Rounding] = (),
    noise_floor: bool = True,
    progress: Callable[[int], None] | None = None,
    team: Team | None = None,
    snapshots: Snapshots | None = None,
) -> Walked:
    """Walk reference and candidates over the same tokens, from where the `snapshots` of a killed walk end.

    Args:
        roundings: of the reference and each candidate; empty: nothing is rounded.
    Returns the same on every rank of `team`. The candidates are of one model with the reference (`same_model`).
    """
    team = team or Team()
    place, ids = torch.device(team.device), torch.from_numpy(tokens.walked)
    layouts = [reference, *candidates]
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(layout.index)) for layout in layouts]
        weights = [CheckpointWeights(*pair, place) for pair in zip(readers, layouts, strict=True)]
        sides, causes = _sides(weights, roundings)
        every = portions(ids)
        few = [
            batches_of_causes(number, batches, len(every[0])) if causes else [] for number, batches in enumerate(every)
        ]
        mine = list(zip(every, few, strict=True))[team.rank :: team.size]
        floor = torch.cat(every[0])[:FLOOR_SEQUENCES] if noise_floor and team.leads else None
        both = SideBySide(sides, causes, mine, floor, tokens.media)
        means = _walk(both, progress, snapshots)
        comparisons = _joined(candidates, team, both, len(every))
        told = _causes(team, both, [number for number, places in enumerate(few) if places])
        return Walked(comparisons, team.gather(means)[0], told)


def _sides(weights: list[CheckpointWeights], asked: Sequence[Rounding]) -> tuple[list[Side], list[Cause]]:
    """What is walked, the reference first, and what is walked besides where anything is rounded: see `CAUSES`."""
    if not asked:
        return [Side(source) for source in weights], []
    layers = roundings_of(weights, asked)
    sides = [Side(source, roundings) for source, roundings in zip(weights, layers, strict=True)]
    if not (layers[0] or layers[1]):
        return sides, []
    plain, other = Side(weights[0]), Side(weights[1])
    causes = [(plain, other), (plain, Side(weights[0], layers[1])), (sides[0], sides[1])]
    return sides, [Cause(name, *pair) for name, pair in zip(CAUSES, causes, strict=True)]


def roundings_of(weights: Sequence[CheckpointWeights], asked: Sequence[Rounding]) -> list[Roundings]:
    """What is rounded of the reference and of each candidate, by layer, with the scales that their files have.

    A reference that has no input scales takes the candidate's, where both are rounded.
    """
    layers = [layer_roundings(of.reader, of.layout, rounding) for of, rounding in zip(weights, asked, strict=True)]
    if layers[0] and layers[1] and not has_input_scales(weights[0].layout):
        pairs = zip(layers[0], layers[1], strict=True)
        layers[0] = tuple(
            replace(own, gate_up_scale=theirs.gate_up_scale, down_scale=theirs.down_scale) for own, theirs in pairs
        )
    return list(layers)


def _walk(both: SideBySide, progress: Callable[[int], None] | None, snapshots: Snapshots | None) -> NoiseFloor | None:
    """Walk this rank's portions to their scores. Returns the noise floor, on the rank that measures it."""
    layers, first = both.sides[0].source.layers, 0
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
        traces, worst, begin = [], [], 0
        parts = _portions_scores(team, [part.scores for part in mine], range(count))
        for number, scores in enumerate(parts):
            of_portion = told[number % team.size][number // team.size]
            traces.append(of_portion[0])
            worst += [WorstToken(**{**facts, "index": facts["index"] + begin}) for facts in of_portion[1]]
            begin += len(scores.j)
        worst.sort(key=lambda one: -one.j if math.isfinite(one.j) else 1.0)
        passed = list(zip(*traces, strict=True))
        layers = [_layer_trace(layout, number, of_layer) for number, of_layer in enumerate(passed)]
        theirs, ours = (first_of([not any(math.isnan(trace[at]) for trace in row) for row in passed]) for at in (0, 1))
        out.append(Comparison(TokenScores.joined(parts), layers, worst[:WORST], (ours, theirs)))
    return out


def _causes(team: Team, both: SideBySide, numbers: Sequence[int]) -> dict[str, TokenScores]:
    """The scores of each cause, of the portions that it was measured on."""
    out = {}
    for place, cause in enumerate(both.causes):
        mine = [portion.causes[place] if portion.causes else None for portion in both.portions]
        out[cause.name] = TokenScores.joined(_portions_scores(team, mine, numbers))
    return out


def _portions_scores(team: Team, mine: Sequence[TokenScores | None], numbers: Iterable[int]) -> list[TokenScores]:
    """The scores of these portions, everywhere; `mine` are those that this rank walked."""
    out = []
    for number in numbers:
        owner, place = number % team.size, number // team.size
        scores = mine[place] if owner == team.rank else None
        arrays = {f.name: torch.from_numpy(getattr(scores, f.name)) for f in fields(TokenScores)} if scores else None
        shared = team.share(arrays, owner, "cpu")
        out.append(TokenScores(**{name: values.numpy() for name, values in shared.items()}))
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
    reference: Path | str | AsServed,
    candidate: Path | str | AsServed,
    tokens: TokenSet,
    *,
    baseline: Path | str | AsServed | None = None,
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
    given = {"reference": reference, "candidate": candidate, "baseline": baseline}
    served = {role: AsServed.of(checkpoint) for role, checkpoint in given.items() if checkpoint is not None}
    layouts = {role: open_layout(Path(checkpoint.folder)) for role, checkpoint in served.items()}
    first, *others = layouts.values()
    for layout in others:
        same_model(first, layout)
    for layout in layouts.values():
        check_media(tokens, layout)
    shared, *_ = [refuse_shared_data(layout.index.folder, tokens) for layout in others]
    identity = _identity(layouts, served, tokens, noise_floor, team)
    if file and file.resume and (finished := _finished(file, identity, team)) is not None:
        folders = {role: named(served[role].folder) for role in ("reference", "candidate")}
        return {**finished, "reference": folders["reference"], "candidate": folders["candidate"]}
    kept = Snapshots.beside(file.path, identity, resume=file.resume, team=team) if file else contextlib.nullcontext()
    with kept as snapshots:
        walked = compare(
            first,
            others,
            tokens,
            roundings=[checkpoint.rounding for checkpoint in served.values()],
            noise_floor=noise_floor,
            team=team,
            snapshots=snapshots,
            progress=(lambda number: progress(number, first.geometry.layers)) if progress else None,
        )
        device = team.device if team.size == 1 else team.device.partition(":")[0]
        evaluation = evaluation_of(
            _compared(served, first),
            others[0],
            tokens,
            walked.comparisons,
            walked.floor,
            device,
            shared,
            rounding_facts(served["reference"], served["candidate"], others[0], walked.causes, tokens),
        )
        if snapshots:
            text = result_text(evaluation, made_of(identity)) if team.leads else ""  # the first rank writes it
            snapshots.finish(text)
    return evaluation


def _compared(served: dict[str, AsServed], reference: ModelLayout) -> Compared:
    baseline = served.get("baseline")
    folders = str(served["reference"].folder), stored_as(reference), str(served["candidate"].folder)
    return Compared(*folders, None if baseline is None else str(baseline.folder))


def _finished(file: EvaluationFile, identity: dict[str, Any], team: Team) -> FolderEvaluation | None:
    """What the file has already, on every rank."""
    told = finished_result(file.path, made_of(identity)) if team.leads else None
    kept: FolderEvaluation | None = team.gather(told)[0]
    if kept is not None and file.note:
        file.note(f"{file.path}: is finished already, of the same checkpoints and tokens; nothing is left to do")
    return kept


def _identity(
    layouts: dict[str, ModelLayout], served: dict[str, AsServed], tokens: TokenSet, noise_floor: bool, team: Team
) -> dict[str, Any]:
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
        "rounding": "; ".join(f"{role} {checkpoint.rounding.told}" for role, checkpoint in served.items()),
        "kind of device": team.device.partition(":")[0],
        "processes": str(team.size),
    }


def kept_bytes(
    layout: ModelLayout, tokens: TokenSet, checkpoints: int, noise_floor: bool, *, causes: bool = False
) -> int:
    """Hidden states of all tokens in that many checkpoints: what is kept after each layer. `causes`: see `CAUSES`."""
    count, length = tokens.ids.shape
    of_floor = 2 * min(FLOOR_SEQUENCES, count) if noise_floor else 0
    batch = batch_sequences(length)
    of_causes = 2 * min(count, batch * -(-count // (batch * CAUSES_EVERY))) if causes else 0
    return int(4 * layout.geometry.hidden * length * (count * checkpoints + of_floor + of_causes))
