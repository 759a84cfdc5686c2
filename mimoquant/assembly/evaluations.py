"""`eval-kl` and `eval-draft`: held-out tokens for the reference, the walk, the gate, the clock."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mimoquant.assembly.choices import EvaluationChoice, RoundingChoice, ServerChoice, Watcher
from mimoquant.assembly.files import check_new
from mimoquant.calibration.records import notes
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.errors import UsageError
from mimoquant.evaluation.drafts import choose_draft
from mimoquant.evaluation.eval_draft import eval_draft
from mimoquant.evaluation.eval_kl import AsServed, EvaluationFile, eval_kl, kept_bytes, open_layout
from mimoquant.evaluation.eval_server import eval_server
from mimoquant.evaluation.server import connect, shown_address
from mimoquant.machine.devices import resolve_device
from mimoquant.machine.memory import peak_rss_bytes
from mimoquant.model.rounding import rounds_cache
from mimoquant.model.served_rounding import NONE, Rounding
from mimoquant.serving.as_served import as_served, parse_place
from mimoquant.serving.served import read_served
from mimoquant.wording import size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mimoquant.evaluation.documents import EvalDraftDocument, EvalFolderDocument, EvalServerDocument, Evaluation
    from mimoquant.machine.team import Team
    from mimoquant.model.layout import ModelLayout


def evaluate_folder(
    reference: Path,
    candidate: Path,
    choice: EvaluationChoice,
    team: Team,
    *,
    baseline: Path | None = None,
    file: EvaluationFile | None = None,
    watcher: Watcher,
) -> EvalFolderDocument:
    """Walk reference and candidate. The same on every rank of the team, but for times; see `eval_kl.eval_kl`."""
    begin = time.monotonic()
    there = file is not None and file.resume and file.path.is_file()  # a result, which may be the one that is wanted
    if team.leads and file and not there:
        check_new(file.path, tuple(filter(None, (reference, candidate, baseline))))
    layout = open_layout(reference)
    served = rounded_checkpoints(
        {"reference": reference, "candidate": candidate, "baseline": baseline}, choice.rounding
    )
    tokens = held_out_tokens(reference, choice, layout.geometry.vocab, watcher, takes_media=True)
    if file and not there:
        causes = any(checkpoint.rounding.anything for checkpoint in served.values())
        kept = kept_bytes(layout, tokens, len(served), choice.noise_floor, causes=causes)
        watcher.note(f"up to {size(2 * kept)} of hidden states will lie in {file.path}.partial")
    measured = eval_kl(
        served["reference"],
        served["candidate"],
        tokens,
        baseline=served.get("baseline"),
        noise_floor=choice.noise_floor,
        progress=_layers(watcher),
        team=team,
        file=file and replace(file, note=watcher.note),
    )
    return {
        **measured,
        "max_kl": choice.max_kl,
        "passed": passed(measured, choice.max_kl),
        "elapsed_s": round(time.monotonic() - begin, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def rounded_checkpoints(folders: Mapping[str, Path | None], choice: RoundingChoice) -> dict[str, AsServed]:
    """The checkpoints that are there, by role, each with what is rounded of it.

    By name the same is rounded of all candidates, as an engine what its kernels round of each.
    Raises UsageError: options contradict each other, or it is not known what runs a checkpoint there.
    """
    rounding = asked_by_name(choice)
    out = {}
    for role, folder in folders.items():
        if folder is None:
            continue
        if role == "reference" and not choice.reference:
            out[role] = AsServed(folder)
        elif choice.as_served:
            cache = rounds_cache(open_layout(folder))
            out[role] = AsServed(folder, *as_served(read_served(folder), *parse_place(choice.as_served), cache=cache))
        elif role == "reference" or rounding.experts == NONE:
            out[role] = AsServed(folder, rounding)
        else:
            kept = tuple((layer, NONE) for layer in kept_layers(open_layout(folder)))
            out[role] = AsServed(folder, replace(rounding, by_layer=kept))
    return out


def asked_by_name(choice: RoundingChoice) -> Rounding:
    """What `--activations` and its like say. Raises UsageError where options contradict each other."""
    given = choice.given()
    named = [option for option in ("--activations", "--dense-activations", "--kv") if given[option] is not None]
    if choice.as_served and named:
        raise UsageError(f"--as-served {choice.as_served} says what is rounded: {named[0]} cannot go with it")
    if choice.reference and not (choice.as_served or named):
        raise UsageError(
            "--reference-as-served: nothing is said to be rounded", hint="give --as-served ENGINE:GPU, or --activations"
        )
    return Rounding(choice.activations or NONE, choice.dense or NONE, choice.kv or NONE)


def kept_layers(layout: ModelLayout) -> list[int]:
    """Layers whose experts are as the source had them, in a checkpoint that has others in 4 bits."""
    packed = {layer for (layer, _, _), weight in layout.experts.items() if weight.packed}
    return [layer for layer in layout.geometry.moe_layers if packed and layer not in packed]


def evaluate_server(
    reference: Path, asked: ServerChoice, choice: EvaluationChoice, device: str, watcher: Watcher
) -> EvalServerDocument:
    """Walk the reference, and ask a server for what it makes of the same tokens."""
    begin = time.monotonic()
    place, vocab = resolve_device(device), open_layout(reference).geometry.vocab
    # before the data: a typing error is told soon
    server = connect(asked.url, asked.model, top_k=asked.top_k, tokens=choice.tokens, vocab=vocab)
    if asked.top_k is None:
        watcher.note(f"{server.engine} is asked for {server.top_k} ids a position")
    measured = eval_server(
        reference,
        server,
        held_out_tokens(reference, choice, vocab, watcher),
        device=place,
        progress=_layers(watcher),
        asked=lambda done, sequences: watcher.progress(f"sequence {done}", done, sequences),
    )
    return {
        **measured,
        "max_kl": choice.max_kl,
        "passed": passed(measured, choice.max_kl),
        "elapsed_s": round(time.monotonic() - begin, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def evaluate_draft(
    reference: Path,
    candidate: Path,
    choice: EvaluationChoice,
    team: Team,
    *,
    draft: str,
    depth: int | None,
    watcher: Watcher,
) -> EvalDraftDocument:
    """What a draft model is worth on both backbones; see `eval_draft.eval_draft`."""
    begin = time.monotonic()
    layouts = open_layout(reference), open_layout(candidate)
    choose_draft(layouts, draft, depth, choice.tokens)  # before the data, which can take minutes
    served = rounded_checkpoints({"reference": reference, "candidate": candidate}, choice.rounding)
    tokens = held_out_tokens(reference, choice, layouts[0].geometry.vocab, watcher)
    measured = eval_draft(
        served["reference"],
        served["candidate"],
        tokens,
        draft=draft,
        depth=depth,
        progress=_layers(watcher),
        team=team,
    )
    return {
        **measured,
        "elapsed_s": round(time.monotonic() - begin, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def held_out_tokens(
    reference: Path, choice: EvaluationChoice, vocab: int, watcher: Watcher, *, takes_media: bool = False
) -> TokenSet:
    """The tokens that were asked for; what is not read, or too short for one sequence, is told."""
    for note in notes(choice.data):
        watcher.note(note)
    tokens = load_tokens(
        choice.data,
        reference,
        sequences=choice.sequences,
        tokens=choice.tokens,
        vocab=vocab,
        column=choice.column,
        takes_media=takes_media,
    )
    note_left_out(tokens, watcher)
    return tokens


def note_left_out(tokens: TokenSet, watcher: Watcher) -> None:
    if tokens.left_out:
        watcher.note(f"too few tokens for one sequence of {tokens.ids.shape[1]}: {', '.join(tokens.left_out)}")
    if tokens.skipped:
        watcher.note(f"{tokens.skipped} tokens between two sequences are left out, so that none cuts an image")


def passed(measured: Evaluation, max_kl: float | None) -> bool | None:
    """Whether J keeps the limit and every position is finite; None without a limit."""
    if max_kl is None:
        return None
    return measured["j"]["mean"] <= max_kl and not measured["nonfinite_share"]


def evaluation_file(out: Path | str | None, resume: bool) -> EvaluationFile | None:
    """`--out` and `--resume`, which needs the former."""
    if out is None and resume:
        raise UsageError(
            "--resume: only an evaluation with --out leaves something to go on from",
            hint="give the --out that the interrupted one had",
        )
    return None if out is None else EvaluationFile(Path(out), resume)


def check_candidate(
    candidate: Path | None, server: str | None, of_server: Mapping[str, object], of_candidate: Mapping[str, object]
) -> None:
    """Refuse options that contradict each other. Both mappings: option → what was given, None for nothing."""
    if candidate is None and server is None:
        raise UsageError(
            "there is nothing to compare the reference with", hint="give a CANDIDATE folder, or --server URL"
        )
    if candidate is not None and server is not None:
        raise UsageError(f"{candidate} and --server {shown_address(server)}: only one of them can be the candidate")
    for option, value in (of_candidate if candidate is None else of_server).items():
        if value is not None:
            raise UsageError(f"{option} cannot go with {'--server' if candidate is None else 'a CANDIDATE folder'}")


def _layers(watcher: Watcher) -> Callable[[int, int], None]:
    return lambda layer, layers: watcher.progress(f"layer {layer}", layer + 1, layers)
