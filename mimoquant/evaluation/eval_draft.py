"""`eval-draft`: what a draft model is worth on the reference's backbone and on a candidate's.

The definitions, once for the whole program. Let p_s be a backbone's next-token distribution at position s (softmax of
its own logits, temperature 1), given the tokens 0..s of the text. Guesses start at a position t, whose h_0(t) is the
backbone's hidden state after its last norm. h_d(t) is what the draft model makes of it at depth d = 1, 2, .. D, and
through the lm_head q_{d,t}: a guess at token t+d+1. Its judge is p_{t+d}.

* MTP layers form a chain: layer d takes h_{d-1}(t) and the embedding of the *text's* token t+d (teacher-forced, as are
  all earlier positions), so it has seen the tokens that its judge has seen.
* A DFlash drafter fills a block at once: of the text it has seen 0..t+1 at every depth, of its own guesses none. Its
  judge has seen the text's tokens up to t+d.

At depth d and start t:

    acceptance    a_d(t) = sum_x min(p_{t+d}(x), q_{d,t}(x))       what speculative sampling accepts on average
    greedy match  g_d(t) = [argmax p_{t+d} = argmax q_{d,t}]       what is accepted at temperature 0
    expected accepted length = mean over t of  sum_{d=1..D} a_1(t) a_2(t) .. a_d(t);  greedy: the same of g

A guess counts only if all before it were accepted, hence the products. The length is of guesses: a step of an engine
yields one token more, the backbone's own, which published acceptance lengths mostly count. Tokens are the text's, not
drawn by the draft, so the length estimates what an engine sees on such text. All depths have the same starts, 0 to
T-D-1.

Key idea: a quantized checkpoint has p and hidden states of its own, so acceptance can fall although the draft model is
untouched. Both backbones are walked side by side as in `eval-kl`, each byte read once (the embedding twice), and
compared start by start. A backbone may be walked as it is served (`AsServed`), activations and cache rounded too.

Left out: what kernels round inside the draft model; trees of guesses, one MTP layer used at every depth (as vLLM does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.calibration.tokens import TokenSet, refuse_media
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import named
from mimoquant.evaluation.divergence import bootstrap
from mimoquant.evaluation.documents import (
    AcceptedLength,
    DepthPart,
    DraftDomainPart,
    DraftEvaluation,
    DraftFigures,
    DraftSummary,
    MeanInterval,
    Paired,
)
from mimoquant.evaluation.drafts import Draft, Drafts, choose_draft
from mimoquant.evaluation.eval_kl import AsServed, open_layout, roundings_of, same_model
from mimoquant.evaluation.facts import data_facts, recipe_name, rounded_facts
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.evaluation.not_finite import Walked, all_finite, first_of, nothing_finite
from mimoquant.evaluation.side_by_side import streams_of
from mimoquant.machine.team import Team
from mimoquant.model.decoder_layer import linear, rms_norm
from mimoquant.model.layer_stream import Stream, portions, walk
from mimoquant.model.layout import ModelLayout
from mimoquant.model.releases import stored_as
from mimoquant.model.served_rounding import NOTHING, UNROUNDED, LayerRounding, Rounding
from mimoquant.weights.decoded import CheckpointWeights

_LOGITS = 2**25  # of one distribution's that are held at once

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DraftScores:
    """a_d(t) and g_d(t) of one backbone, both [sequences, starts, depths]; NaN where logits are not finite."""

    acceptance: _Floats
    match: _Floats
    first: int | None = None  # layer of the backbone after which hidden states are not finite

    def lengths(self) -> tuple[_Floats, _Floats]:
        """Expected accepted length of each start, sampling and greedy: [sequences, starts]."""
        sampling, greedy = (np.cumprod(one, axis=-1).sum(-1) for one in (self.acceptance, self.match))
        return sampling, greedy


def overlap(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of min(p, q), whether the largest entries are the same one) along the last axis, both float64."""
    accepted = torch.minimum(p, q).sum(-1, dtype=torch.float64).clamp(max=1)  # float32 shares may sum to a bit more
    match = (p.argmax(-1) == q.argmax(-1)).double()
    return accepted, torch.where(accepted.isfinite(), match, torch.nan)


@torch.no_grad()
def score_chain(
    final_BTH: Tensor, drafted: Sequence[Tensor], head: Tensor, rounding: LayerRounding = UNROUNDED
) -> tuple[Tensor, Tensor]:
    """Acceptance and greedy match, both [B, T - D, D].

    Args:
        final_BTH: the backbone's normed hidden states. drafted: h_1 .. h_D, each [B, T - D, H].
        head: [vocab, H].
        rounding: says whether logits, of the backbone and of its drafts, are stored in bf16.
    """
    depths, (sequences, starts, _) = len(drafted), drafted[0].shape
    step = max(1, _LOGITS // (sequences * len(head)))
    parts: list[tuple[Tensor, Tensor]] = []
    for begin in range(0, starts, step):
        end = min(begin + step, starts)
        p = rounding.stored(linear(final_BTH[:, begin + 1 : end + depths], head)).softmax(-1)
        rows = [
            overlap(p[:, d : d + end - begin], rounding.stored(linear(hidden[:, begin:end], head)).softmax(-1))
            for d, hidden in enumerate(drafted)
        ]
        accepted, match = (torch.stack(of_depths, -1) for of_depths in zip(*rows, strict=True))
        parts.append((accepted, match))
    accepted, match = (torch.cat(of_blocks, 1) for of_blocks in zip(*parts, strict=True))
    return accepted, match


@torch.no_grad()
def _score(
    source: CheckpointWeights, jobs: list[list[Tensor]], streams: list[Stream], drafts: Drafts
) -> list[DraftScores]:
    """One backbone's scores of each portion; only this checkpoint's embedding and head are in memory."""
    embedding, norm, head = (
        source.tensor(name) for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    )
    out = []
    for place, (batches, stream) in enumerate(zip(jobs, streams, strict=True)):
        parts, last = [], stream.rounding(source.layers - 1)
        for batch, (ids, hidden) in enumerate(zip(batches, stream.batches, strict=True)):
            final = last.stored(rms_norm(hidden.to(source.device), norm, source.config.eps))
            drafted = drafts.drafted(place, batch, ids.to(source.device), final, embedding)
            parts.append(score_chain(final, drafted, head, last))
        acceptance, match = (torch.cat(of_batches).cpu().numpy() for of_batches in zip(*parts, strict=True))
        out.append(DraftScores(acceptance, match))
    return out


def compare_drafts(
    reference: ModelLayout,
    candidate: ModelLayout,
    tokens: TokenSet,
    draft: Draft,
    *,
    roundings: tuple[Rounding, Rounding] = (NOTHING, NOTHING),
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    team: Team | None = None,
) -> tuple[DraftScores, DraftScores]:
    """Scores of both backbones with the same kind of draft; the same on every rank of `team`. `roundings`: of each."""
    team = team or Team(device)
    place, every = torch.device(team.device), portions(torch.from_numpy(tokens.ids))
    mine = every[team.rank :: team.size]
    with CheckpointReader(reference.index) as first, CheckpointReader(candidate.index) as second:
        weights = [CheckpointWeights(first, reference, place), CheckpointWeights(second, candidate, place)]
        streams = [streams_of(source, mine) for source in weights]
        for of_source, layers in zip(streams, roundings_of(weights, roundings), strict=True):
            for stream in of_source:
                stream.roundings = layers
        beside = draft.beside(weights, streams)
        finite: list[list[bool]] = [[], []]

        def after_layer(number: int) -> None:
            for drafts, of_source, told in zip(beside, streams, finite, strict=True):
                drafts.after_layer(number)
                told.append(all(all_finite(stream.batches) for stream in of_source))
            if progress:
                progress(number)

        if mine:
            walk([stream for of_source in streams for stream in of_source], after_layer)
        parts = [
            _score(source, mine, of_source, drafts)
            for source, of_source, drafts in zip(weights, streams, beside, strict=True)
        ]
    bad = [_first(team.gather(told)) for told in finite]
    ours, theirs = (_joined(of_source, len(every), team, at) for of_source, at in zip(parts, bad, strict=True))
    return ours, theirs


def _first(told: list[list[bool]]) -> int | None:
    """The first layer that is not finite on any rank; one without a portion has nothing to tell."""
    return first_of([all(row) for row in zip(*filter(None, told), strict=True)])


def _joined(mine: list[DraftScores], count: int, team: Team, first: int | None) -> DraftScores:
    """All ranks' portions in the order of the sequences."""
    shared = []
    for number in range(count):
        owner, place = number % team.size, number // team.size
        arrays = (
            {name: torch.from_numpy(getattr(mine[place], name)) for name in ("acceptance", "match")}
            if owner == team.rank
            else None
        )
        shared.append(team.share(arrays, owner, "cpu"))
    acceptance, match = (np.concatenate([part[name].numpy() for part in shared]) for name in ("acceptance", "match"))
    return DraftScores(acceptance, match, first)


def eval_draft(
    reference: Path | str | AsServed,
    candidate: Path | str | AsServed,
    tokens: TokenSet,
    *,
    draft: str = "mtp",
    depth: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    team: Team | None = None,
) -> DraftEvaluation:
    """One comparison.

    Args:
        draft: "mtp" or "mtp-backbone" (see `drafts`), or the folder of a DFlash drafter that both backbones share.
        depth: MTP layers in the chain; by default all that both checkpoints have, at most 3.
        progress: called with (layer just passed, layers).
        team: the processes that share the work, all of which call this; `device` is then the team's.
    Raises CheckpointError: a checkpoint is bad, the draft is not there or does not fit, or the two are not the same
    model. UsageError: too deep for the checkpoints or the sequences, or `tokens` are among those that the candidate was
    calibrated on.
    """
    refuse_media(tokens, "eval-draft")
    served = AsServed.of(reference), AsServed.of(candidate)
    folders = [Path(checkpoint.folder) for checkpoint in served]
    layouts = open_layout(folders[0]), open_layout(folders[1])
    same_model(*layouts)
    chosen = choose_draft(layouts, draft, depth, tokens.ids.shape[1])
    shared = refuse_shared_data(folders[1], tokens)
    layers = layouts[0].geometry.layers
    told = (lambda number: progress(number, layers)) if progress else None
    roundings = served[0].rounding, served[1].rounding
    names = f"the reference {named(served[0].folder)}", f"the candidate {named(served[1].folder)}"
    scores = compare_drafts(*layouts, tokens, chosen, roundings=roundings, device=device, progress=told, team=team)
    return {
        "schema_version": SCHEMA_VERSION,
        "reference": named(served[0].folder),
        "reference_stored": stored_as(layouts[0]),
        "candidate": named(served[1].folder),
        "recipe": recipe_name(folders[1]),
        "draft": chosen.name,
        "rounding": rounded_facts(*served, layouts[1]),
        "data": data_facts(tokens, shared),
        **summarize_drafts(*scores, tokens, names),
        "device": device,
    }


def summarize_drafts(
    reference: DraftScores,
    candidate: DraftScores,
    tokens: TokenSet,
    names: tuple[str, str] = ("the reference", "the candidate"),
) -> DraftSummary:
    """The report's numbers. Starts that are not finite, on either side, count in their share and nowhere else."""
    finite = np.isfinite((reference.acceptance + candidate.acceptance).sum(-1))
    if not finite.any():
        sides = zip(names, (reference, candidate), strict=True)
        walked = [Walked(name, bool(np.isfinite(side.acceptance).any()), side.first) for name, side in sides]
        raise nothing_finite(walked, "logits, or its draft's")
    domain = np.array(tokens.domains)
    by_domain: list[DraftDomainPart] = [
        {"domain": str(name), **_figures(reference, candidate, finite & (domain == name)[:, None])}
        for name in np.unique(domain[finite.any(-1)])
    ]
    return {
        "depth": reference.acceptance.shape[-1],
        "sequence_tokens": tokens.ids.shape[1],
        **_figures(reference, candidate, finite),
        "nonfinite_share": float(1 - finite.mean()),
        "by_domain": by_domain,
    }


def _figures(reference: DraftScores, candidate: DraftScores, inside: npt.NDArray[np.bool_]) -> DraftFigures:
    """Everything that is told of the starts `inside` [sequences, starts]."""
    sequence = np.nonzero(inside)[0]

    def paired(ours: _Floats, theirs: _Floats) -> Paired:
        return Paired(
            reference=_mean(ours[inside], sequence),
            candidate=_mean(theirs[inside], sequence),
            difference=_mean((theirs - ours)[inside], sequence),
        )

    depths = [
        DepthPart(
            depth=d + 1,
            acceptance=paired(reference.acceptance[..., d], candidate.acceptance[..., d]),
            greedy_match=paired(reference.match[..., d], candidate.match[..., d]),
        )
        for d in range(reference.acceptance.shape[-1])
    ]
    sampling, greedy = (paired(*both) for both in zip(reference.lengths(), candidate.lengths(), strict=True))
    return DraftFigures(
        sequences=len(np.unique(sequence)),
        starts=len(sequence),
        depths=depths,
        accepted_length=AcceptedLength(sampling=sampling, greedy=greedy),
    )


def _mean(values: _Floats, sequence: _Ints) -> MeanInterval:
    low, high = bootstrap(values, sequence)
    return MeanInterval(mean=float(values.mean()), low=low, high=high)
