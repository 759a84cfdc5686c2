"""`eval-kl --server`: how far a running server's predictions are from the reference, on held-out tokens.

Key idea: the reference is streamed as ever, alone, and leaves the K most likely ids of every position. The server is
asked about those, and everything else is lumped (`divergence.lumped_divergence`). So the numbers are of the whole
deployment, kernels and all, and lower bounds of what `evaluate` would give for the same predictions.

Left out: traces of layers, worst tokens, a noise floor; a server shows none of its hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.calibration.tokens import TokenSet, refuse_media
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import named
from mimoquant.evaluation import eval_kl
from mimoquant.evaluation.divergence import (
    LumpedScores,
    TokenScores,
    TopScores,
    lumped_divergence,
    top_log_probabilities,
)
from mimoquant.evaluation.documents import ServerEvaluation, ServerFacts
from mimoquant.evaluation.facts import data_facts
from mimoquant.evaluation.server import MODES, Answer, Server
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.evaluation.summary import summarize
from mimoquant.model.layer_stream import batch_sequences, walk
from mimoquant.model.layout import ModelLayout
from mimoquant.model.releases import stored_as
from mimoquant.weights.decoded import CheckpointWeights


@torch.no_grad()
def reference_top(
    reference: ModelLayout, tokens: TokenSet, k: int, *, device: str, progress: Callable[[int], None] | None = None
) -> TopScores:
    """The reference's k most likely ids at every scored position, in one walk.

    Memory: one layer, the hidden states, and 16 bytes for each of the k ids of a position.
    """
    ids = torch.from_numpy(tokens.ids)
    with CheckpointReader(reference.index) as reader:
        weights = CheckpointWeights(reader, reference, torch.device(device))
        streams = streams_of(weights, [torch.split(ids, batch_sequences(ids.shape[1]))])
        walk(streams, progress)
        final = final_hidden(streams[0], weights.tensor("model.norm.weight"))
        head = weights.tensor("lm_head.weight")
        return top_log_probabilities(final, head, k, ids[:, 1:].flatten().to(final.device))


def score(reference: TopScores, answers: list[Answer], vocab: int) -> tuple[TokenScores, LumpedScores]:
    """Scores of all positions: as lower bounds in the form that `summary` takes, and with what was lumped."""
    theirs = np.concatenate([answer.log_probabilities for answer in answers])
    label = np.concatenate([answer.label for answer in answers])
    top = np.concatenate([answer.top for answer in answers])
    ours, known = reference.log_probabilities, ~np.isnan(theirs)
    lumped = lumped_divergence(ours, theirs, known, complete=ours.shape[1] == vocab)
    return TokenScores(
        kl_forward=lumped.kl_forward,
        kl_reverse=lumped.kl_reverse,
        j=lumped.j,
        reference_loss=reference.loss,
        candidate_loss=-label,
        confidence=np.exp(ours[:, 0]),
        agree=reference.ids[:, 0] == top,
        finite=np.isfinite(ours).all(-1) & np.isfinite(label) & np.isfinite(lumped.j),
        predicts=np.ones(len(label), np.bool_),
    ), lumped


def eval_server(
    reference: Path | str,
    server: Server,
    tokens: TokenSet,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    asked: Callable[[int, int], None] | None = None,
) -> ServerEvaluation:
    """One evaluation, in the form of `eval_kl`; `j`, `kl_*` are lower bounds, `server` says why.

    Args:
        progress: called with (layer just passed, layers). asked: with (sequences answered, sequences).
    Raises CheckpointError: the checkpoint is bad, or the server fails.
    """
    refuse_media(tokens, "eval-kl of a server")
    layout = eval_kl.open_layout(Path(reference))
    top = reference_top(
        layout,
        tokens,
        server.top_k,
        device=device,
        progress=(lambda number: progress(number, layout.geometry.layers)) if progress else None,
    )
    answers, length = [], tokens.ids.shape[1] - 1
    for number, row in enumerate(tokens.ids):
        answers.append(server.ask(row, top.ids[number * length : (number + 1) * length]))
        if asked:
            asked(number + 1, len(tokens.ids))
    scores, lumped = score(top, answers, layout.geometry.vocab)
    return {
        "schema_version": SCHEMA_VERSION,
        "reference": named(reference),
        "reference_stored": stored_as(layout),
        "candidate": server.link.url,
        "recipe": None,
        "left_out": [],
        "data": data_facts(tokens, None),
        **summarize(scores, tokens, (f"the reference {named(reference)}", f"what {server.link.url} answers")),
        "layers": [],
        "noise_floor": None,
        "worst_tokens": [],
        "baseline": None,
        "device": device,
        "server": _server_facts(server, scores, lumped, layout.geometry.vocab),
    }


def _server_facts(server: Server, scores: TokenScores, lumped: LumpedScores, vocab: int) -> ServerFacts:
    ok = scores.finite
    reference_tail, server_tail = (float(of[ok].mean()) for of in (lumped.reference_tail, lumped.candidate_tail))
    return {
        "engine": server.engine,
        "version": server.version,
        "model": server.model,
        "mode": server.mode,
        "meaning": MODES[server.mode],
        "vocab": vocab,
        "top_k": server.top_k,
        "ids_scored": float(lumped.ids[ok].mean()),
        "is_lower_bound": not (max(reference_tail, server_tail) == 0.0 and bool((lumped.ids[ok] == vocab).all())),
        "tail_mass": {"reference": reference_tail, "server": server_tail},
        "j_estimate": float((lumped.j + lumped.gap_estimate)[ok].mean()),
        "j_ceiling_if_tail_is_like_the_rest": float((lumped.j + lumped.gap_ceiling)[ok].mean()),
    }
